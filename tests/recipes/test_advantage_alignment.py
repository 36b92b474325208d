"""advantage_alignment: without shaping it is REINFORCE with a leave-one-out baseline; options reach the credit."""

from types import SimpleNamespace

import pytest
import tiny_runs
import torch
from batches import config, losses, ragged, recipe
from tiny_runs import numbers, run

from fuserl.engine import loop
from fuserl.engine.losses import token_mean, truncated
from fuserl.engine.opponent_shaping import returns, round_advantages
from fuserl.engine.toys import advantage_alignment as toy
from fuserl.kernels.group_advantage import group_advantage


def turns(step=1, seed=0):
    """Two starts of three matches of three rounds, both agents' turns."""
    random = torch.Generator().manual_seed(seed)
    payoff = torch.randint(0, 6, (6, 3, 2), generator=random).float()
    seat = torch.tensor([[m // 3, m, a, t] for m in range(6) for a in (0, 1) for t in range(3)])
    batch = ragged((1, 2, 3) * 12, range(36), seed=seed)
    own, other = (payoff[seat[:, 1], seat[:, 3], (seat[:, 2] + k) % 2] for k in (0, 1))
    return batch.replace(rewards=own, step=step, facts={"seat": seat, "other": other[:, None]})


def credit(tmp_path, batch=None, **options):
    return recipe(tmp_path, "advantage_alignment", **options).advantage(turns() if batch is None else batch)


def test_without_shaping_it_is_reinforce_with_a_leave_one_out_baseline(tmp_path):
    batch = turns()
    seat, row = batch.facts["seat"], torch.arange(36) // 3
    gains = returns(batch.rewards.view(12, 3) / 5, 0.9).flatten()
    group = (seat[:, 0] * 2 + seat[:, 2]) * 3 + seat[:, 3]
    expected = group_advantage(gains, group, baseline="leave_one_out", scale=None)
    assert torch.equal(credit(tmp_path, shaping=0.0), expected)
    assert torch.equal(credit(tmp_path, objective="naive"), expected) and len(row.unique()) == 12
    ours = recipe(tmp_path, "advantage_alignment", shaping=0.0, entropy_coef=0.0)
    got = losses(ours, batch.replace(old_logprobs=None), logprob=batch.rollout_logprobs.clone().requires_grad_())
    weighted = -batch.to_tokens(expected) * batch.rollout_logprobs / batch.counts.tokens
    gradient = truncated(low=1.0, high=1.0, reduce=token_mean)
    leaf = batch.rollout_logprobs.clone().requires_grad_()
    plain = gradient(SimpleNamespace(logprob=leaf), batch.replace(old_logprobs=None).with_advantages(expected))[0]
    assert torch.equal(got, plain)
    (slope,) = torch.autograd.grad(plain.sum(), leaf)
    torch.testing.assert_close(slope, weighted / batch.rollout_logprobs)


def test_sum_of_rewards_gives_both_the_same(tmp_path):
    both = credit(tmp_path, objective="sum").view(6, 2, 3)
    torch.testing.assert_close(both[:, 0], both[:, 1])


@pytest.mark.parametrize(
    "options",
    [{"gamma": 0.5}, {"shaping": 2.0}, {"now": True}, {"sign": True}, {"clip": 0.1}, {"over_time": True},
     {"anneal_every": 1}, {"objective": "sum"}],
)  # fmt: skip
def test_options_change_the_credit(tmp_path, options):
    given = turns(step=2)
    assert not torch.allclose(credit(tmp_path, given, **options), credit(tmp_path, given))


def test_annealing_takes_its_three_numbers(tmp_path):
    given = turns(step=7)
    options = {"anneal_every": 2, "anneal_rate": 0.5, "anneal_least": 0.2, "shaping": 1.0}
    torch.testing.assert_close(credit(tmp_path, given, **options), credit(tmp_path, given, shaping=0.2))
    options["anneal_least"] = 0.0
    torch.testing.assert_close(credit(tmp_path, given, **options), credit(tmp_path, given, shaping=0.125))


def test_the_loss_is_cut_at_the_cap_and_has_an_entropy_term(tmp_path):
    ours = recipe(tmp_path, "advantage_alignment", ratio_cap=3.0, entropy_coef=0.0)
    batch = turns().replace(old_logprobs=torch.zeros(72), advantages=None)
    logprob = torch.full((72,), 2.0).requires_grad_()  # ratios of 7.4
    slope = torch.autograd.grad(losses(ours, batch, logprob=logprob).sum(), logprob)[0]
    torch.testing.assert_close(slope, -3.0 * batch.to_tokens(ours.advantage(batch)) / 72)
    assert recipe(tmp_path, "advantage_alignment").loss.outputs == ("logprob", "entropy")
    assert ours.loss.live(batch.with_advantages(ours.advantage(batch))).dtype == torch.bool


def test_games_and_their_options_reach_the_prompts(tmp_path):
    texts = {
        name: recipe(tmp_path, "advantage_alignment", game=name).prompts(1)[0].text
        for name in ("ipd", "split", "trust")
    }
    assert "say 1 or 2" in texts["ipd"] and "Both say at once" in texts["split"] and "rock" in texts["trust"]
    assert (
        len(recipe(tmp_path, "advantage_alignment").prompts(1)) == config(tmp_path, "advantage_alignment").groups == 8
    )
    ours = recipe(tmp_path, "advantage_alignment", past=3, past_every=7)
    assert (ours.state["past"].most, ours.state["past"].every) == (3, 7)
    for name, value in (("game", "chess"), ("objective", "selfish"), ("rounds", 0), ("past", -1)):
        with pytest.raises(ValueError, match="must be"):
            recipe(tmp_path, "advantage_alignment", **{name: value})


@pytest.mark.parametrize("options", [{}, {"game": "split"}, {"game": "trust", "alternate": True}, {"alternatives": 1}])
def test_a_run_plays_logs_and_resumes(tmp_path, monkeypatch, options):
    tiny_runs.use(monkeypatch)
    settings = dict(
        recipe="advantage_alignment", rounds=2, groups=2, group_size=2, steps=3, save_every=2, eval_every=0,
        past=1, past_every=2, eval_problems=2, **options,
    )  # fmt: skip
    whole = run(tmp_path, "whole", **settings)
    steps = [row for row in whole if "tokens" in row]
    assert all(row["unread"] <= 1 and "reward" in row for row in steps) and "payoff_greedy" in whole[0]
    folder = loop.train(tiny_runs.config(tmp_path, "run", **{**settings, "steps": 2}))
    loop.train(tiny_runs.config(tmp_path, "run", **settings), resume=folder)
    assert numbers(tiny_runs.rows(folder))[-2:] == numbers(whole)[-2:]


@pytest.mark.slow
def test_three_seeds_cooperate_and_none_is_exploited():
    loss = truncated(low=1.0, high=1.0, entropy_coef=0.01, reduce=token_mean)
    for seed in range(3):
        naive = toy.trained(seed, loss, shaping=0.0)
        assert max(toy.payoffs(naive)) <= 1.1
        pair = toy.trained(seed, loss, shaping=1.0)
        assert min(toy.payoffs(pair)) >= 2.2 and toy.payoffs((pair[0], toy.defector()))[1] <= 1.5


def test_round_advantages_of_a_game_alone_are_0():
    assert not round_advantages(torch.randn(1, 4), torch.zeros(1, dtype=torch.int64)).any()
