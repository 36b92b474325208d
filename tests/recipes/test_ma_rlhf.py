"""ma_rlhf: with macros of one token it is PPO; each rule of segmentation, average and ratio is as defined."""

import itertools
import math
from types import SimpleNamespace

import pytest
import tiny_runs
import torch
from batches import each_rollout, losses, ragged, recipe

from fuserl.engine import checks, macro_actions
from fuserl.engine.macro_actions import macro_generalised
from fuserl.engine.toys import ma_rlhf as toy

SHORT = "tiny_runs:shortness"
LENGTHS = (7, 1, 0, 12, 4, 1)


def rollouts_of():
    """Ragged rollouts in float64, one of no token."""
    batch = ragged(LENGTHS, (0, 0, 1, 1, 1, 0))
    names = ("rewards", "rollout_logprobs", "old_logprobs", "ref_logprobs", "values")
    return batch.replace(**{name: getattr(batch, name).double() for name in names})


def plain(batch, spans, gamma, lam, beta, sigma="equal", reward_agg="mean", clip=math.inf):
    """Advantages and returns in plain Python; `spans` has the macros of each rollout as [begin, end)."""
    advantages, returns = [0.0] * len(batch.tokens), [0.0] * len(batch.tokens)
    for macros, reward in zip(spans, batch.rewards.tolist(), strict=True):
        value = advantage = 0.0
        for begin, end in reversed(macros):
            each = [-beta * float(batch.old_logprobs[t] - batch.ref_logprobs[t]) for t in range(begin, end)]
            if (begin, end) == macros[-1]:
                each[-1] += max(-clip, min(clip, reward))
            size = end - begin
            weights = {"equal": [1.0] * size, "unit": [0.0] * (size - 1) + [1.0]}.get(sigma)
            weights = weights or [1 / (j + 1) for j in range(size)]
            weights = [w / sum(weights) for w in weights]
            discounts = weights if reward_agg == "mean" else [gamma**j for j in range(size)]
            now = sum(w * float(batch.values[t]) for w, t in zip(weights, range(begin, end), strict=True))
            got = sum(w * r for w, r in zip(discounts, each, strict=True))
            advantage = got + gamma * value - now + gamma * lam * advantage
            value = now
            for t in range(begin, end):
                advantages[t], returns[t] = advantage, advantage + now
    return torch.tensor(advantages, dtype=torch.float64), torch.tensor(returns, dtype=torch.float64)


def ngrams(batch, n):
    """The macros of each rollout for a cut every n tokens."""
    spans = []
    for span in each_rollout(batch):
        cuts = [*range(span.start, max(span.stop - 1, span.start), n)]
        cuts = sorted({*cuts, *([span.stop - 1, span.stop] if span.stop > span.start else [])})
        spans.append(list(itertools.pairwise(cuts)))
    return spans


@pytest.mark.parametrize("n", [1, 2, 5, 99])
@pytest.mark.parametrize("sigma", macro_actions.SIGMAS)
@pytest.mark.parametrize("reward_agg", macro_actions.REWARD_AGGS)
def test_advantages_and_returns_are_those_of_the_definition(n, sigma, reward_agg, tmp_path):
    options = dict(gamma=0.9, lam=0.8, beta=0.3, sigma=sigma, reward_agg=reward_agg)
    batch = rollouts_of()
    got = recipe(tmp_path, "ma_rlhf", n=n, reward_clip=0.7, **options).advantage(batch)
    advantages, returns = plain(batch, ngrams(batch, n), clip=0.7, **options)
    torch.testing.assert_close(got.advantages, advantages, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.returns, returns, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("ratio", ["token", "macro"])
def test_with_macros_of_one_token_it_is_ppo(ratio, separate, tmp_path):
    common = dict(gamma=0.9, lam=0.8, beta=0.3, value_coef=0.7, value_clip=0.4, separate_critic=separate)
    ours = recipe(tmp_path, "ma_rlhf", n=1, reward_clip=1e9, ratio=ratio, clip=0.1, **common)
    ppo = recipe(tmp_path, "ppo", whiten=False, low=0.1, high=0.1, **common)
    batch, random = rollouts_of(), torch.Generator().manual_seed(1)
    moved = batch.old_logprobs + 0.3 * torch.randn(25, generator=random), torch.randn(25, generator=random).double()
    found = []
    for each in (ours, ppo):
        logprob, value = (x.clone().requires_grad_() for x in moved)
        out = dict(logprob=logprob) if separate else dict(logprob=logprob, value=value)
        loss = losses(each, batch, **out)
        if separate:
            credited = checks.credited(batch, each.advantage)
            loss = loss + each.critic.loss(SimpleNamespace(value=value), credited)[0]
        found.append((loss, *torch.autograd.grad(loss.sum(), (logprob, value))))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)) and found[0][1].any()
    assert set(ours.reads) == set(ppo.reads)


def test_the_last_token_is_a_macro_by_itself_and_none_is_empty():
    batch = rollouts_of()
    for n in (1, 2, 3, 6, 11, 99):
        steps = macro_actions.steps_of(batch, macro_actions.every(n)(batch))
        expected = [begin for macros in ngrams(batch, n) for begin, _ in macros]
        assert steps.tolist() == [*expected, 25] and (steps.diff() > 0).all()
        counts = [-(-(length - 1) // n) + 1 if length else 0 for length in LENGTHS]
        assert len(steps) - 1 == sum(counts)


def test_randomised_lengths_are_those_of_a_shuffled_multiset():
    batch = ragged((200, 30, 200), (0, 0, 0))
    begins = [
        macro_actions.randomised(2, seed)(batch.replace(step=step)) for seed, step in ((0, 1), (0, 1), (1, 1), (0, 2))
    ]
    assert torch.equal(begins[0], begins[1]) and not torch.equal(begins[0], begins[2])
    assert not torch.equal(begins[0], begins[3]) and not torch.equal(begins[0][:200], begins[0][230:])
    steps = macro_actions.steps_of(batch, begins[0])
    first = steps[steps <= 200].diff().tolist()
    assert sorted(first[:10]) == sorted(macro_actions.LENGTHS * 2) and first[10:] == [200 - 42 - 1, 1]


def test_a_macro_goes_on_while_the_reference_is_not_more_surprised():
    batch = ragged((5, 3), (0, 0)).replace(ref_logprobs=torch.tensor([-2.0, -1, -1, -3, -2, -1, -5, -1]))
    steps = macro_actions.steps_of(batch, macro_actions.surprising(batch))
    assert steps.tolist() == [0, 3, 4, 5, 6, 7, 8]


def test_units_of_language_are_found_by_place(tmp_path):
    batch = ragged((4, 2), (0, 0)).replace(
        facts={"macro_begins": torch.tensor([[1, 0, 0, 1, 0, 0], [1, 1, 1, 1, 1, 1]]).bool()}
    )
    assert macro_actions.marked(batch).tolist() == [True, False, False, True, True, True]
    partly = batch.replace(place=torch.tensor([0, 2, 3, 5, 0, 1]))
    assert macro_actions.marked(partly).tolist() == [True, False, True, False, True, True]


def test_on_policy_both_ratios_have_the_gradient_of_macros_and_off_it_they_clip_apart(tmp_path):
    batch = rollouts_of()
    token, macro = (recipe(tmp_path, "ma_rlhf", ratio=r, separate_critic=True) for r in ("token", "macro"))
    on = batch.replace(old_logprobs=batch.rollout_logprobs)
    slopes = []
    for each, seen in ((token, on), (macro, on), (token, batch), (macro, batch)):
        leaf = seen.rollout_logprobs.clone().requires_grad_()
        slopes.append(torch.autograd.grad(losses(each, seen, logprob=leaf).sum(), leaf)[0])
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-12, atol=1e-15)
    found = checks.credited(batch, macro.advantage)
    for begin, end in (macros for spans in ngrams(batch, 5) for macros in spans):
        rho, a = (batch.rollout_logprobs - batch.old_logprobs)[begin:end].sum().exp(), found.advantages[begin]
        kept = (rho <= 1.2) if a > 0 else (rho >= 0.8)
        torch.testing.assert_close(slopes[3][begin:end], (-a * rho / 25 * kept).expand(end - begin))
    assert not torch.allclose(slopes[2], slopes[3]) and macro.loss.scope == "rollout"


def test_what_is_read_is_what_is_needed(tmp_path):
    assert recipe(tmp_path, "ma_rlhf").reads == ("values", "old_logprobs", "ref_logprobs")
    assert recipe(tmp_path, "ma_rlhf", beta=0.0).reads == ("values",)
    assert recipe(tmp_path, "ma_rlhf", beta=0.0, segmentation="perplexity").reads == ("values", "ref_logprobs")
    for option, says in (("segmentation", "ngram"), ("ratio", "token"), ("sigma", "equal"), ("reward_agg", "mean")):
        with pytest.raises(ValueError, match=f"{option} must be one of {says}, "):
            recipe(tmp_path, "ma_rlhf", **{option: "x"})


def test_credit_has_no_loop_over_macros():
    credit = macro_generalised(macro_actions.every(5), gamma=1.0, lam=0.9, beta=0.1)

    def calls(lengths):
        with torch.profiler.profile() as profile:
            credit(ragged(lengths, [0] * len(lengths)))
        return sum(event.count for event in profile.key_averages())

    assert calls((5,) * 64) == calls((50,) * 3)


def test_noise_of_the_critic_is_averaged_out():
    noise = toy.noise(lambda n: macro_generalised(macro_actions.every(n), gamma=1.0, lam=0.0, beta=0.0), n=10)
    assert noise == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("segmentation", ["randomised", "perplexity", "constituents", "statements"])
def test_a_step_of_a_tiny_model(tmp_path, monkeypatch, segmentation):
    tiny_runs.use(monkeypatch)
    options = dict(ratio="macro", sigma="position", reward_agg="sum", separate_critic=segmentation == "statements")
    rows = tiny_runs.run(
        tmp_path, "run", recipe="ma_rlhf", reward=SHORT, steps=1, segmentation=segmentation, leaves=2, **options
    )
    assert [row["grad_norm"] > 0 and row["value_loss"] > 0 for row in rows if "tokens" in row] == [True]
