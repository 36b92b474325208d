"""vpo: DPO where alpha is 0, signed as it learns, and online a buffer that every step goes through."""

import math
from types import SimpleNamespace

import pytest
import tiny_runs
import torch
from batches import gradient, losses, pairs, ragged, recipe

from fuserl.engine import checks
from fuserl.engine.mixtures import joined
from fuserl.engine.preferences import value_bonus
from fuserl.engine.recipes import vpo as module
from fuserl.engine.toys import vpo

SHORT = "tiny_runs:shortness"


def wide(batch):
    names = ("rewards", "rollout_logprobs", "ref_logprobs")
    return batch.replace(**{name: getattr(batch, name).double() for name in names})


@pytest.mark.parametrize("calibration", ["chosen", "responses"])
def test_with_alpha_0_it_is_dpo(calibration, tmp_path):
    batch = wide(pairs((3, 1, 4, 2, 2, 5, 1, 1)))
    logprob = batch.rollout_logprobs.double()
    ours = recipe(tmp_path, "vpo", beta=0.3, alpha=0.0, calibration=calibration)
    dpo = recipe(tmp_path, "dpo", beta=0.3)
    assert torch.equal(losses(ours, batch, logprob=logprob), losses(dpo, batch, logprob=logprob))
    assert torch.equal(gradient(ours, batch, logprob), gradient(dpo, batch, logprob))


@pytest.mark.parametrize("online", [False, True])
def test_with_alpha_0_pairs_beside_others_are_dpos(online, tmp_path):
    batch, rest = wide(pairs((3, 1, 4, 2))).counted(), wide(ragged((2, 3, 1), (0, 1, 2))).counted()
    ours, dpo = (recipe(tmp_path, "vpo", online=online, alpha=0.0, calibration="reference"), recipe(tmp_path, "dpo"))
    expected = checks.gradient(batch, dpo.loss)
    got = checks.gradient(joined(batch, rest), ours.loss)
    assert torch.equal(got[: len(expected)], expected) and not got[len(expected) :].any()
    index = torch.tensor([1, 3, 5])  # a micro-batch of one pair and one other
    part = joined(batch, rest).rollouts_at(index)
    assert torch.equal(checks.gradient(part, ours.loss), got[joined(batch, rest).rows_of(index)])


def plain(batch, logprob, alpha, beta, bound, chosen):
    totals = beta * torch.stack(
        [(logprob - batch.ref_logprobs)[batch.rollout == b].sum() for b in range(len(batch.group))]
    )
    some = totals[batch.rewards == 1] if chosen else totals
    return alpha * some.clamp(-bound, bound).mean()


@pytest.mark.parametrize("chosen", [True, False])
@pytest.mark.parametrize("bound", [math.inf, 0.12])
def test_the_value_is_its_definition(chosen, bound):
    batch = wide(pairs((3, 1, 4, 2, 2, 5, 1, 1)))
    leaves = [batch.rollout_logprobs.double().requires_grad_() for _ in range(2)]
    loss = value_bonus(beta=0.3, alpha=-0.7, bound=bound, chosen=chosen)
    got, seen = loss(SimpleNamespace(logprob=leaves[0]), batch)
    totals = [got.sum(), plain(batch, leaves[1], -0.7, 0.3, bound, chosen)]
    assert totals[0].item() == pytest.approx(totals[1].item(), rel=1e-12)
    ours, theirs = (torch.autograd.grad(total, leaf)[0] for total, leaf in zip(totals, leaves, strict=True))
    assert torch.allclose(ours, theirs, rtol=1e-12, atol=0) and bool((ours == 0).any()) == (chosen or bound < 1)
    counted = 4 if chosen else 8
    assert int((~seen["calibration_reward"].isnan()).sum()) == counted


def test_options_reach_the_loss_and_the_buffer(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(module, "value_bonus", lambda **given: seen.append(given) or value_bonus(**given))
    offline = recipe(tmp_path, "vpo", steps=20, groups=5)
    recipe(tmp_path, "vpo", alpha=0.5, beta=0.2, calibration="responses")
    online = recipe(tmp_path, "vpo", online=True, replay=3, oracle="bradley_terry", seed=7)
    recipe(tmp_path, "vpo", online=True, alpha=0.5, bound=9.0)
    assert seen == [
        {"beta": 0.1, "alpha": -0.1, "chosen": True},
        {"beta": 0.2, "alpha": -0.5, "chosen": False},
        {"beta": 0.1, "alpha": 0.1, "bound": 3.0},
        {"beta": 0.1, "alpha": 0.5, "bound": 9.0},
    ]
    buffer = online.state["buffer"]
    assert (buffer.replay, buffer.oracle, buffer.seed) == (3, "bradley_terry", 7) and online.learns_from == ()
    assert not offline.state and offline.learns_from == ("chosen", "rejected") and offline.batches is None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"online": True, "calibration": "chosen"}, "calibration must be one of reference;"),
     ({"calibration": "else"}, "calibration must be one of chosen, responses, reference;"),
     ({"alpha": -1.0}, "alpha must be"), ({"online": True, "oracle": "me"}, "oracle must be one of"),
     ({"online": True, "second": "me"}, "second must be policy or reference"),
     ({"online": True, "replay": -1}, "replay must be"), ({"beta": 0.0}, "beta must be"),
     ({"online": True, "bound": 0.0}, "bound must be"), ({"online": True, "overlap": True}, "overlap must be off")],
)  # fmt: skip
def test_what_cannot_be_is_refused(wrong, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        recipe(tmp_path, "vpo", **wrong)


@pytest.mark.parametrize("calibration", ["chosen", "responses", "reference"])
def test_it_learns_from_given_pairs(calibration, tmp_path, monkeypatch):
    tiny_runs.use(monkeypatch)
    options = dict(recipe="vpo", calibration=calibration, steps=20, groups=4, eval_problems=2)
    rows = [row for row in tiny_runs.run(tmp_path, "run", **options) if "loss" in row]
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert rows[-1]["pair_accuracy"] == 1 and "calibration_reward" in rows[-1] and "reward" not in rows[-1]


@pytest.mark.parametrize("second", ["policy", "reference"])
def test_online_it_learns_what_is_rewarded(second, tmp_path, monkeypatch):
    tiny_runs.use(monkeypatch)
    options = dict(recipe="vpo", online=True, second=second, reward=SHORT, groups=8, lr=0.005, beta=0.2, replay=4)
    rows = [row for row in tiny_runs.run(tmp_path, "run", steps=24, eval_problems=0, **options) if "loss" in row]
    first, last = (sum(row["reward"] for row in some) / 4 for some in (rows[:4], rows[-4:]))
    half = 2 if second == "reference" else 1  # of the completions whose mean that is, the policy's
    assert last > first + 0.1 / half and rows[0]["margin"] == pytest.approx(0, abs=0.5)


@pytest.mark.slow
@pytest.mark.parametrize(("alpha", "expected"), [(0.0, 0.708), (0.3, 0.532), (1.0, 0.373), (3.0, 0.249), (10.0, 0.230)])
def test_pessimism_offline_at_full_size(alpha, expected):
    """Of 200 problems, as those that the figures were taken of: within three errors of the difference of both means."""
    each = vpo.offline(module.objective, alpha, problems=200)
    error = float(each.std()) / len(each) ** 0.5
    assert float(each.mean()) == pytest.approx(expected, abs=3 * math.sqrt(2) * error)


@pytest.mark.slow
def test_the_figures_of_200_problems():
    assert all(figure.holds for figure in vpo.figures(module.objective, problems=200))
