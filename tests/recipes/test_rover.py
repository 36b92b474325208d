"""rover: on-policy twice REINFORCE; off-policy each log-ratio is regressed on its reward and the state after it."""

import pytest
import tiny_runs
import torch
from batches import each_rollout, gradient, losses, ragged, recipe

from fuserl.engine import checks
from fuserl.engine.losses import negative_logprob
from fuserl.engine.toys import rover as toy

SHORT = "tiny_runs:shortness"


def scored(seed=0):
    """A batch with the snapshot's two numbers of each token, one of the group's rollouts without any."""
    batch = ragged((3, 1, 0, 5, 2), (0, 1, 0, 0, 1), seed=seed)
    return batch.replace(extra={"old_mean_logprob": -3 - torch.rand(11, generator=torch.Generator().manual_seed(1))})


def objective(logprob, mean_logprob, batch, advantages, rho):
    """The equation, token by token."""
    found, old = [], batch.extra["old_mean_logprob"]
    for span, a in zip(each_rollout(batch), advantages.tolist(), strict=True):
        for t in range(span.start, span.stop):
            ahead = rho * (mean_logprob[t + 1] - old[t + 1]).detach() if t + 1 < span.stop else 0.0
            found.append((rho * (logprob[t] - batch.old_logprobs[t]) - a - ahead) ** 2 / len(batch.tokens))
    return torch.stack(found)


@pytest.mark.parametrize("rho", [1.0, 0.25])
@pytest.mark.parametrize("by_std", [False, True])
def test_the_loss_and_its_gradient_are_those_of_the_equation(rho, by_std, tmp_path):
    batch, rover = scored(), recipe(tmp_path, "rover", rho=rho, scale_by_std=by_std)
    random = torch.Generator().manual_seed(2)
    logprob = (batch.old_logprobs + 0.3 * torch.randn(11, generator=random)).requires_grad_()
    mean = (batch.extra["old_mean_logprob"] + 0.3 * torch.randn(11, generator=random)).requires_grad_()
    advantages = batch.rewards - batch.group_mean(batch.rewards)
    if by_std:
        spread = [batch.rewards[batch.group == group].std() + 1e-6 for group in (0, 1)]
        advantages = advantages / torch.stack(spread)[batch.group]
    expected = objective(logprob, mean, batch, advantages, rho)
    (slope,) = torch.autograd.grad(expected.sum(), logprob)
    got = losses(rover, batch, logprob=logprob, mean_logprob=mean)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(gradient(rover, batch, logprob.detach(), mean_logprob=mean), slope)
    assert torch.autograd.grad(got.sum(), mean, allow_unused=True) == (None,)
    assert (rover.loss.scope, rover.loss.reads) == ("rollout", ("old_logprobs", "old_mean_logprob"))


def test_on_policy_the_gradient_is_twice_reinforces(tmp_path):
    table, rover, reinforce = toy.learner(), recipe(tmp_path, "rover"), recipe(tmp_path, "rloo")
    batch = checks.credited(toy.drawn(table), rover.advantage)
    expected = 2 * table.gradient(batch, negative_logprob())  # over the mean of all tokens
    assert torch.equal(table.gradient(batch, rover.loss), expected) and expected.any()
    others = checks.credited(batch, reinforce.advantage).advantages  # from the mean of the group's other 31
    torch.testing.assert_close(batch.advantages, others * 31 / 32)


def test_values_that_are_no_scale_are_refused(tmp_path):
    for rho in (0.0, -1.0, float("inf")):
        with pytest.raises(ValueError, match="rover: rho must be a finite number > 0"):
            recipe(tmp_path, "rover", rho=rho)


@pytest.mark.slow
def test_more_right_leaves_are_kept_than_by_grpo(tmp_path):
    rover, grpo = recipe(tmp_path, "rover"), recipe(tmp_path, "grpo")
    kept = torch.tensor([[toy.spread(each.advantage, each.loss, s) for each in (rover, grpo)] for s in range(20)])
    ahead = kept[:, 0] - kept[:, 1]
    assert ahead.mean() > 3 * ahead.std() / 20**0.5


def test_a_step_of_a_tiny_model(tmp_path, monkeypatch):
    tiny_runs.use(monkeypatch)
    rows = tiny_runs.run(tmp_path, "run", recipe="rover", reward=SHORT, steps=1, rho=0.5, scale_by_std=True, epochs=2)
    (row,) = (row for row in rows if "tokens" in row)
    assert row["grad_norm"] > 0 and row["value_error"] > 0
