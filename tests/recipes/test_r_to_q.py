"""r_to_q: DPO exactly; its evaluation searches and watches; and the tree's identities at full size."""

import pytest
import tiny_runs
import torch
from batches import config, gradient, losses, pairs, recipe

from fuserl.engine import catalogue, evaluation, learners
from fuserl.engine.preferences import preference
from fuserl.engine.prompts import Prompt
from fuserl.engine.toys import r_to_q


@pytest.mark.parametrize("seed", range(3))
def test_trained_it_is_dpo(seed, tmp_path):
    batch = pairs((3, 1, 4, 2, 2, 5, 1, 1), seed=seed)
    ours, dpo = (recipe(tmp_path, name, beta=0.3) for name in ("r_to_q", "dpo"))
    wide = batch.rollout_logprobs.double()
    batch = batch.replace(ref_logprobs=batch.ref_logprobs.double(), rewards=batch.rewards.double())
    assert torch.equal(losses(ours, batch, logprob=wide), losses(dpo, batch, logprob=wide))
    assert torch.equal(gradient(ours, batch, wide), gradient(dpo, batch, wide))
    assert ours.loss.live(batch) is None and not torch.equal(
        gradient(recipe(tmp_path, "r_to_q"), batch, wide), gradient(dpo, batch, wide)
    )


def test_evaluations_search_and_watch(tmp_path, monkeypatch):
    tiny_runs.use(monkeypatch)
    options = dict(recipe="r_to_q", reward="tiny_runs:shortness", beta=0.5, beams="1, 3", guided=True, eval_problems=4)
    rows = tiny_runs.run(tmp_path, "run", reference_samples=2, steps=2, lr=0.003, **options)
    before, after = (row for row in rows if "beam_1_reward" in row)
    for row in (before, after):
        names = {f"{kind}_{width}_{what}" for kind in ("beam", "guided") for width in (1, 3)
                 for what in ("logprob", "reward", "accuracy")}  # fmt: skip
        assert names | {"pair_accuracy", "chosen_reward", "rejected_reward", "reference_reward"} <= set(row)
        assert "beam_2_reward" not in row and 0 <= row["beam_3_accuracy"] <= 1
        assert row["margin"] == pytest.approx(row["chosen_reward"] - row["rejected_reward"], abs=1e-5)
        assert row["beam_3_logprob"] >= row["beam_1_logprob"]  # of texts of four tokens: no rule, but so it is here
    assert before["reference_reward"] == before["chosen_reward"] == before["rejected_reward"] == 0
    assert after["reference_reward"] < 0
    trained = [row for row in rows if "grad_norm" in row]
    assert all("chosen_reward" in row and "rejected_reward" in row for row in trained)
    plain = tiny_runs.run(tmp_path, "plain", reference_samples=0, steps=1, **{**options, "beams": "", "guided": False})
    assert not any(name.startswith(("beam", "guided", "reference")) for row in plain for name in row)


def test_what_evaluation_draws_does_not_disturb_training(tmp_path, monkeypatch):
    tiny_runs.use(monkeypatch)
    runs = [tiny_runs.run(tmp_path, f"run{every}", recipe="r_to_q", eval_every=every) for every in (0, 1)]
    first, second = ([row["loss"] for row in rows if "loss" in row] for rows in runs)
    assert first == second and len(first) == 3


def test_widths_are_read_from_the_option(tmp_path):
    for wrong in ("1,,2", "0", "a", "2.5"):
        with pytest.raises(ValueError, match="beams must be widths"):
            recipe(tmp_path, "r_to_q", beams=wrong)


def likeliest_apart(policy, prompt, most):
    """The sum of log-probs of the text whose every token, of the 8 likeliest, gained most over the reference."""
    tokens, total = policy.encode(prompt.text), 0.0
    for _ in range(most):
        with torch.no_grad():
            ours = policy.model(tokens[None]).logits[0, -1].log_softmax(-1)
            with policy.seconds["ref"].reading() as reference:
                theirs = reference(tokens[None]).logits[0, -1].log_softmax(-1)
        among = ours.topk(8).indices
        token = among[(ours - theirs)[among].argmax()]
        total += float(ours[token])
        tokens = torch.cat([tokens, token[None]])
        if int(token) == 2 or policy.tokenizer.decode([int(token)]) == "\n":
            break
    return total


@pytest.mark.parametrize("rank", [0, 2], ids=["frozen copy", "adapters off"])
def test_guided_beams_follow_what_the_policy_gained_on_its_reference(rank, tmp_path, monkeypatch):
    tiny_runs.use(monkeypatch)
    given = config(tmp_path, "r_to_q", lora_rank=rank, max_new_tokens=5, threads=1)
    policy = learners.of(given, catalogue.recipe(given))[0]
    random = torch.Generator().manual_seed(0)
    for parameter in policy.parameters().values():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=random)
    held_out = [Prompt(f"{n}+1=") for n in range(3)]
    row = evaluation.searched(policy, held_out, None, (1, 4), beta=0.3)
    assert set(row) == {"guided_1_logprob", "guided_4_logprob"}
    expected = sum(likeliest_apart(policy, prompt, 5) for prompt in held_out) / 3
    assert row["guided_1_logprob"] == pytest.approx(expected, abs=1e-4)
    plain = evaluation.searched(policy, held_out, None, (1, 4))
    assert plain["beam_1_logprob"] != row["guided_1_logprob"] and plain["beam_4_logprob"] != row["guided_4_logprob"]
    assert evaluation.searched(policy, [], None, (1,)) == {}


def plain(*, beta):
    """The recipe's loss of `every_pair` in plain torch, which is quicker with a million of them."""

    def loss(out, batch):
        implied = beta * (out.logprob - batch.ref_logprobs).view(-1, 2)
        each = torch.nn.functional.softplus(implied[:, 1] - implied[:, 0]) / (2 * batch.counts.groups)
        return each.repeat_interleave(2), {}

    return loss


@pytest.mark.slow
def test_the_trees_at_full_size():
    small = r_to_q.tree(3, 3)
    ours, theirs = (r_to_q.preferred(small, make(beta=r_to_q.BETA), 5)[-1] for make in (preference, plain))
    assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-9)
    figures = r_to_q.figures(plain, depth=r_to_q.DEPTH, steps=300)
    assert all(figure.holds for figure in figures), [str(figure) for figure in figures]


@pytest.mark.slow
@pytest.mark.parametrize("width", r_to_q.SHARES)
def test_beams_in_a_thousand_trees(width):
    """The entry's shares are of fifty trees: three of their standard deviations, and ours are small beside those."""
    trees = [r_to_q.tree(seed) for seed in range(1000)]
    share = sum(a == r_to_q.best_reward(b) for a, b in zip(r_to_q.found_by(trees, width), trees, strict=True)) / 1000
    expected = r_to_q.SHARES[width]
    assert share == pytest.approx(expected, abs=3 * (expected * (1 - expected) * (1 / 50 + 1 / 1000)) ** 0.5 + 1 / 1000)
