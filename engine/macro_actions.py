"""Macro actions: runs of tokens that count as one decision each, and PPO over them (MA-RLHF, arXiv:2410.02743).

steps   (M + 1,), where each macro begins among the tokens of a batch, and N at the end
begins  (N,) bool, tokens that a rule of segmentation begins a macro with; the first of a rollout always does, and
        so does the last, which has the reward: it is a macro by itself
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import torch
from torch import Tensor

from fuserl.engine import parsing
from fuserl.engine.advantages import token_rewards
from fuserl.engine.batch import Batch
from fuserl.engine.contracts import BOUND, WEIGHT, require, require_one_of
from fuserl.engine.losses import Loss, token_mean, with_any_advantage
from fuserl.kernels.gae import gae
from fuserl.kernels.policy_loss import policy_loss
from fuserl.kernels.segment_sum import segment_sum
from fuserl.kernels.surrogates import Clip

LENGTHS = (1, 2, 3, 5, 10)  # of randomised macros
SIGMAS, REWARD_AGGS = ("equal", "unit", "position"), ("mean", "sum")


def every(n: int) -> Callable:
    """A rule: a macro has n tokens."""
    require("every", "n", n, n >= 1, "a number of tokens >= 1")
    return lambda batch: _ordinal(batch) % n == 0


def randomised(repeat_times: int, seed: int) -> Callable:
    """A rule: lengths are those of LENGTHS, each `repeat_times`, in an order drawn for each rollout; the rest is one.

    What is drawn is a function of the seed and the batch's step.
    """
    require("randomised", "repeat_times", repeat_times, repeat_times >= 1, "an integer >= 1")

    def begins(batch: Batch) -> Tensor:
        # Of a larger number torch's generator takes 32 bits only.
        drawing = torch.Generator().manual_seed(random.Random(f"{seed} {batch.step}").getrandbits(32))
        several = torch.tensor(LENGTHS * repeat_times)
        order = torch.rand(len(batch.group), len(several), generator=drawing).argsort(1)
        cuts = several[order].cumsum(1)
        within = cuts < batch.offsets.diff()[:, None]
        found = torch.zeros(len(batch.tokens), dtype=torch.bool)
        found[(batch.offsets[:-1, None] + cuts)[within]] = True
        return found

    return begins


def surprising(batch: Batch) -> Tensor:
    """A rule: a macro goes on while the reference's perplexity 1 / p(token) does not rise, (N,) bool."""
    return batch.ref_logprobs < batch.ref_logprobs.roll(1)


def marked(batch: Batch) -> Tensor:
    """A rule: where facts["macro_begins"] (B, T) says so of each token of a completion, (N,) bool."""
    place = _ordinal(batch) if batch.place is None else batch.place
    return batch.facts["macro_begins"][batch.rollout, place]


def segmented(
    rollout: Callable, segmentation: str, *, n: int, repeat_times: int, leaves: int, seed: int
) -> tuple[Callable, Callable]:
    """A rule by its name, and the rollout slot that finds units of language where the rule is about those.

    Args:
        rollout: the slot that draws.
        segmentation: ngram, randomised, perplexity, constituents or statements.
        n: of `every`.
        repeat_times, seed: of `randomised`.
        leaves: most words, of `parsing.constituents`.
    """
    rules = {"ngram": every(n), "randomised": randomised(repeat_times, seed), "perplexity": surprising}
    units = {"constituents": parsing.constituents(leaves), "statements": parsing.statements}
    require_one_of("segmented", "segmentation", segmentation, (*rules, *units))
    if segmentation in rules:
        return rollout, rules[segmentation]
    return parsing.parsed(rollout, units[segmentation]), marked


def steps_of(batch: Batch, begins: Tensor) -> Tensor:
    """Where the macros of a batch begin, and N, (M + 1,) int64; none is empty, and none of two rollouts."""
    last = batch.last
    starts = (begins | last | last.roll(1)).nonzero().squeeze(-1)
    return torch.cat([starts, starts.new_tensor([len(last)])])


def macro_generalised(
    segmentation: Callable,
    *,
    gamma: float,
    lam: float,
    beta: float,
    sigma: str = "equal",
    reward_agg: str = "mean",
    reward_clip: float = math.inf,
) -> Callable:
    """Generalised advantage estimation over macros; each token has its macro's advantage and return.

        V[k] = sum of sigma values in macro k,   R[k] = the same of token rewards, or with "sum" their discounted sum
        delta[k] = R[k] + gamma V[k + 1] - V[k],   A[k] = delta[k] + gamma lam A[k + 1],   returns = A + V

    sigma sums to 1 in a macro: "equal", all on its last token ("unit"), or in proportion to 1 / (place + 1)
    ("position"). The rollout's reward is held to -+ reward_clip. extra["macro"] numbers the macros, (N,).
    """
    for name, value in (("gamma", gamma), ("lam", lam)):
        require("macro_generalised", name, value, 0 <= value <= 1, "in [0, 1]; 1 is no discount")
    require("macro_generalised", "beta", beta, 0 <= beta < math.inf, WEIGHT)
    require("macro_generalised", "reward_clip", reward_clip, reward_clip >= 0, BOUND)
    require_one_of("macro_generalised", "sigma", sigma, SIGMAS)
    require_one_of("macro_generalised", "reward_agg", reward_agg, REWARD_AGGS)

    def advantage(batch: Batch) -> Batch:
        steps = steps_of(batch, segmentation(batch))
        lengths = steps.diff()
        macro = torch.arange(len(lengths)).repeat_interleave(lengths)
        place = torch.arange(len(macro)) - steps[macro]
        weights = _weights(sigma, place, lengths[macro], steps)
        held = batch.replace(rewards=batch.rewards.clamp(-reward_clip, reward_clip))
        within = weights if reward_agg == "mean" else gamma ** place.double()
        rewards = segment_sum(within * token_rewards(held, beta).double(), steps)
        values = segment_sum(weights * batch.values.double(), steps)
        found = gae(rewards, values, gamma=gamma, lam=lam, offsets=torch.searchsorted(steps, batch.offsets))
        advantages, returns = (x[macro].to(batch.dtype) for x in found)
        return batch.replace(advantages=advantages, returns=returns, extra=batch.extra | {"macro": macro})

    return advantage


def clipped_macros(*, low: float, high: float) -> Loss:
    """The clipped surrogate with one ratio per macro, the product of its tokens': one term per macro, weight 1 / N.

        loss = -min(ratio A, clip(ratio, 1 - low, 1 + high) A)        ratio[k] = exp(sum of logprob - old_logprob)

    So the on-policy gradient is that of `clipped` over tokens. The batch has extra["macro"].
    """
    require("clipped_macros", "low", low, low >= 0, BOUND)
    require("clipped_macros", "high", high, high >= 0, BOUND)

    def loss(out, batch: Batch):
        old = out.logprob.detach() if batch.old_logprobs is None else batch.old_logprobs
        _, macro, lengths = batch.extra["macro"].unique_consecutive(return_inverse=True, return_counts=True)
        whole = out.logprob.new_zeros(len(lengths)).index_add(0, macro, out.logprob - old)[macro]
        losses, statistics = policy_loss(
            whole,
            batch.advantages,
            old_logprobs=torch.zeros_like(whole),
            weights=token_mean(batch) / lengths[macro],
            surrogate=Clip(low, high),
        )
        return losses, {"policy": statistics[None]}

    return Loss(loss, scope="rollout", live=with_any_advantage)


def _weights(sigma: str, place: Tensor, lengths: Tensor, steps: Tensor) -> Tensor:
    """sigma of each token, given its place in its macro and how long that is, (N,) float64."""
    if sigma == "unit":
        return (place == lengths - 1).double()
    raw = torch.ones_like(place, dtype=torch.float64) if sigma == "equal" else 1.0 / (place + 1).double()
    return raw / segment_sum(raw, steps).repeat_interleave(steps.diff())


def _ordinal(batch: Batch) -> Tensor:
    """Which of its rollout's trained tokens each one is, (N,)."""
    return torch.arange(len(batch.tokens)) - batch.offsets[:-1][batch.rollout]
