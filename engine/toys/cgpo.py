"""A bandit with a forbidden arm that pays best, by exact gradients; and small batches with judges' facts."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from fuserl.engine import checks
from fuserl.engine.batch import Batch
from fuserl.engine.checks import Figure, at_least, at_most
from fuserl.engine.constrained import calibrated, codpo, crpg, log_ratios, preferred, regularised, reinforced
from fuserl.engine.preferences import preference
from fuserl.engine.tabular import Table

ARMS = ("good", "ok", "hack", "bad")
SCORES = torch.tensor([1.0, 0.5, 3.0, 0.0], dtype=torch.float64)
PASSES = torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=torch.float64)
START = torch.tensor([0.0, 0.5, -0.5, 1.0], dtype=torch.float64)
STORED = 0.5  # the baseline's score
BOUNDS = (1.0, 2.0, 5.0, 20.0)  # kl_max of the first bandits; then plain policy gradient, and one with 0.1 KL


def trained(steps: int) -> Tensor:
    """Probabilities (6, 4) of the arms after `steps`: CRPG at each of BOUNDS, policy gradient, and that with 0.1 KL."""
    many = len(BOUNDS) + 2
    table = Table(START.expand(many, 4), lr=0.5)
    states = torch.arange(many).repeat_interleave(4)
    reference = START.log_softmax(-1).repeat(many)
    bounds, loss = torch.tensor(BOUNDS, dtype=torch.float64).repeat_interleave(4), reinforced()
    for _ in range(steps):
        batch = table.given(torch.arange(4).repeat(many)[:, None], states, SCORES.repeat(many), 4)
        batch = judged(batch.replace(old_logprobs=batch.rollout_logprobs, ref_logprobs=reference))
        ours = crpg(batch.rollouts_at(torch.arange(4 * len(BOUNDS))), bounds).advantages
        plain, held = batch.rewards[-8:-4], batch.rewards[-4:] - 0.1 * log_ratios(batch)[-4:]
        # Every arm stands once in the batch; what is expected weighs it by its probability.
        weights = batch.counts.rollouts * batch.rollout_logprobs.exp()
        table.update(batch.with_advantages(torch.cat([ours, plain, held]) * weights), loss)
    return table.probabilities


def judged(batch: Batch) -> Batch:
    """The batch of arms, as drawn completions, with what judges and calibration say of them."""
    scores, passes = SCORES[batch.tokens], PASSES[batch.tokens]
    facts = {"score": scores, "passes": passes, "calibrated": torch.sigmoid(scores - STORED)}
    return batch.replace(facts={**facts, "baseline": torch.zeros_like(scores)})


def small(passes: tuple[float, ...]) -> Batch:
    """A batch of two completions each of two prompts, in float64, with these verdicts and scores of their own."""
    batch = checks.example()
    wide = {name: getattr(batch, name).double() for name in ("rollout_logprobs", "ref_logprobs", "rewards")}
    scores = torch.tensor([2.0, 1.0, -3.0, -1.0], dtype=torch.float64)
    facts = {"score": scores, "passes": torch.tensor(passes, dtype=torch.float64), "calibrated": scores.sigmoid()}
    facts["baseline"] = torch.zeros_like(scores)
    return batch.replace(**wide, old_logprobs=wide["rollout_logprobs"], facts=facts)


def nothing_passes() -> float:
    """The largest gradient of CRPG where no completion passes."""
    return float(checks.gradient(crpg(small((0.0,) * 4), 5.0), reinforced()).abs().max())


def beyond() -> float:
    """The largest reward of completions whose log-ratio is at the bound, or beyond."""
    batch = small((1.0,) * 4)
    ratios = log_ratios(batch)
    return float(regularised(batch, ratios.clamp(min=1e-9))[ratios > 0].abs().max())


def apart_from_dpo() -> float:
    """CODPO's loss with lam 0, of prompts of which one completion passes, less DPO's of the same pairs."""
    batch = small((1.0, 0.0, 0.0, 1.0))
    pairs = batch.replace(rewards=batch.facts["passes"])
    return checks.value(codpo(batch), preferred(0.1, 0.0)) - checks.value(pairs, preference(beta=0.1))


def of_baseline() -> float:
    """The calibrated reward of a stored completion."""
    stored = torch.tensor([False, True])
    return float(calibrated(torch.tensor([2.0, 7.3]), torch.zeros(2, dtype=torch.int64), stored)[1])


def figures(*, steps: int = 3000) -> list[Figure]:
    """The figures of `fuserl check cgpo`, after so many steps of `trained`."""
    ends = trained(steps)
    good, hack = ends[:4, 0].tolist(), ends[:, 2].tolist()
    expected = (0.238, 0.306, 0.535, 0.983)
    return [
        Figure("forbidden arm, plain policy gradient", hack[4], 0.9998, 1e-4),
        Figure("forbidden arm, with 0.1 KL", hack[5], 0.9997, 1e-4),
        *(at_most(f"forbidden arm, CRPG at kl_max {m:g}", p, 0.01) for m, p in zip(BOUNDS, hack, strict=False)),
        *(Figure(f"good arm at kl_max {m:g}", p, e, 2.5e-3) for m, p, e in zip(BOUNDS, good, expected, strict=True)),
        at_least("the smallest step up of these", min(b - a for a, b in itertools.pairwise(good)), 0.0),
        Figure("largest gradient where nothing passes", nothing_passes(), 0, 0),
        Figure("reward at k = kl_max", beyond(), 0, 0),
        Figure("CODPO's loss apart from DPO's", apart_from_dpo(), 0, 1e-12),
        Figure("calibrated reward of a baseline", of_baseline(), 0.5, 0),
    ]
