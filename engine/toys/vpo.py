"""Softmax policies in tables: the value of VPO in closed form, its sign, and pessimism on skewed offline data."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fuserl.engine import checks
from fuserl.engine.batch import Batch
from fuserl.engine.checks import Figure
from fuserl.engine.losses import Loss
from fuserl.engine.mixtures import joined
from fuserl.engine.preferences import preference, value_bonus
from fuserl.engine.tabular import Table

ARMS, PAIRS, BETA, RIDGE = 12, 60, 0.2, 1e-4
# Mean suboptimality by alpha over 200 problems, and its standard error.
FOUND = {0.0: (0.708, 0.040), 3.0: (0.249, 0.012)}


def closed_form(actions: int = 32, seed: int = 0) -> tuple[float, float]:
    """(beta log Z of a reward, the value that the loss gives the policy which is optimal under it)."""
    random = torch.Generator().manual_seed(seed)
    reward, logits = torch.randn(2, actions, generator=random, dtype=torch.float64)
    reference = logits.log_softmax(-1)
    said = torch.arange(actions).repeat_interleave(torch.randint(1, 4, (actions,), generator=random))
    reward = reward - reward[said].mean()  # over what calibrates
    value = BETA * (reference + reward / BETA).logsumexp(-1)
    table = Table((reference + reward / BETA)[None])
    batch = table.given(said[:, None], torch.zeros_like(said), torch.zeros(len(said)), 1)
    batch = batch.replace(ref_logprobs=reference[said])
    return float(value), float(table.loss(batch, value_bonus(beta=BETA, alpha=-1.0)).detach())


def example(*, calibrated: bool) -> Batch:
    """A small batch of pairs in float64, with rollouts of the reference behind them or not."""
    pairs = _wide(checks.example())
    if not calibrated:
        return pairs
    rest = _wide(checks.example((2, 4), 1, seed=1))
    return joined(pairs, rest)


def off(objective: Callable, *, online: bool, calibration: str) -> tuple[float, float]:
    """How far the loss with alpha 0 and its gradient are from DPO's."""
    batch, dpo = example(calibrated=calibration == "reference"), example(calibrated=False)
    loss = objective(beta=0.1, alpha=0.0, bound=3.0, online=online, calibration=calibration)
    ours, theirs = checks.gradient(batch, loss), checks.gradient(dpo, preference(beta=0.1))
    rest = ours[len(theirs) :]
    value = checks.value(batch, loss) - checks.value(dpo, preference(beta=0.1))
    return abs(value), float((ours[: len(theirs)] - theirs).abs().max() + rest.abs().sum())


def push(objective: Callable, *, online: bool, calibration: str) -> tuple[float, float]:
    """The least and the largest gradient, beyond DPO's, at the tokens that calibrate, in units of alpha beta."""
    batch = example(calibrated=calibration == "reference")
    with_value, without = (
        checks.gradient(batch, objective(beta=0.1, alpha=alpha, bound=3.0, online=online, calibration=calibration))
        for alpha in (0.7, 0.0)
    )
    several = 2  # rollouts that calibrate
    pushed = (with_value - without) * several / (0.7 * 0.1)
    rows = batch.objective == 1 if batch.objective is not None else batch.to_tokens(batch.rewards) == 1
    return float(pushed[rows].min()), float(pushed[rows].max())


def offline(objective: Callable, alpha: float, *, problems: int, steps: int = 400) -> Tensor:
    """Suboptimality of the policy that the loss trains to convergence on each of many offline problems, (problems,).

    PAIRS pairs of ARMS arms are drawn from a skewed reference and compared by Bradley and Terry's judge. What counts is
    the reward less BETA KL(policy || reference); `alpha` weighs the value beside the sum over pairs.
    """
    random = torch.Generator().manual_seed(0)
    rewards = 2 * torch.rand(problems, ARMS, generator=random, dtype=torch.float64) - 1
    reference = (2 * torch.randn(problems, ARMS, generator=random, dtype=torch.float64)).log_softmax(-1)
    arms = torch.multinomial(reference.exp(), 2 * PAIRS, replacement=True, generator=random).view(problems, PAIRS, 2)
    of_arms = rewards.gather(1, arms.flatten(1)).view(arms.shape)
    first = torch.rand(problems, PAIRS, generator=random) < (of_arms[..., 0] - of_arms[..., 1]).sigmoid()
    labels = torch.stack([first, ~first], -1).double()
    table = Table(reference)
    states = torch.arange(problems).repeat_interleave(2 * PAIRS)
    batch = table.given(arms.reshape(-1, 1), states, labels.flatten(), 2)
    batch = batch.replace(ref_logprobs=batch.rollout_logprobs)
    loss = objective(beta=BETA, alpha=alpha / PAIRS, bound=math.inf, online=False, calibration="chosen")
    _converged(table, batch, loss, reference, steps)
    optimal, found = (reference + rewards / BETA).log_softmax(-1), table.logits.detach().log_softmax(-1)
    best, got = ((p.exp() * (rewards - BETA * (p - reference))).sum(-1) for p in (optimal, found))
    return best - got


def _converged(table: Table, batch: Batch, loss: Loss, reference: Tensor, steps: int) -> None:
    settings = dict(max_iter=steps, max_eval=4 * steps, history_size=30, tolerance_grad=1e-9, tolerance_change=0)
    optimizer = torch.optim.LBFGS([table.logits], line_search_fn="strong_wolfe", **settings)

    def closure() -> Tensor:
        optimizer.zero_grad()
        ridge = RIDGE * (table.logits - reference).square().sum()
        total = batch.counts.groups * table.loss(batch, loss) + ridge  # a sum over all pairs
        total.backward()
        return total

    optimizer.step(closure)


def figures(objective: Callable, *, problems: int = 40) -> list[Figure]:
    """The figures of `fuserl check vpo`.

    Args:
        objective: makes the recipe's loss.
        problems: of `offline`.
    """
    cases = {
        "offline, chosen": {"online": False, "calibration": "chosen"},
        "offline, reference": {"online": False, "calibration": "reference"},
        "online": {"online": True, "calibration": "reference"},
    }
    found = []
    for name, case in cases.items():
        value, gradient = off(objective, **case)
        found += [
            Figure(f"{name}: loss with alpha 0 apart from DPO's", value, 0, 1e-12),
            Figure(f"{name}: its gradient apart from DPO's", gradient, 0, 1e-12),
        ]
        sign = 1 if case["online"] else -1
        for which, got in zip(("least", "largest"), push(objective, **case), strict=True):
            found.append(Figure(f"{name}: {which} gradient of what calibrates, in alpha beta", got, sign, 1e-12))
    value, got = closed_form()
    found.append(Figure("value of 32 actions apart from beta log Z", got - value, 0, 1e-12))
    means = {}
    for alpha, (expected, error) in FOUND.items():
        each = offline(objective, alpha, problems=problems)
        means[alpha] = float(each.mean())
        # Three standard deviations of the difference of two means over so many problems.
        spread = 3 * math.hypot(error, float(each.std()) / math.sqrt(len(each)))
        found.append(Figure(f"suboptimality offline with alpha {alpha:g}", means[alpha], expected, spread))
    return [*found, checks.at_most("that with alpha 3 over that with alpha 0", means[3.0] / means[0.0], 0.5)]


def _wide(batch: Batch) -> Batch:
    wide = {name: getattr(batch, name).double() for name in ("rewards", "rollout_logprobs", "ref_logprobs")}
    return batch.replace(**wide)
