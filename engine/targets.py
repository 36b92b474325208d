"""Distributions that a policy is brought to, and how far it is from them: control as inference over whole rollouts.

    log P(y) = log prior(y) + score(y)        unnormalised; p = P / Z,   Z = E_q[P / q] for each prompt
    posterior    score = reward / beta                                  (arXiv:2205.11275)
    moments      score = coefficients . features, with E_p features = moments   (GDC, arXiv:2012.11635)
    pointwise    score = 0 where the reward is at least 1, else -inf

log prior, log pi and log q are sums over a rollout's tokens of ref_logprobs, old_logprobs and rollout_logprobs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import softplus

from fuserl.engine.batch import Batch, Rollouts
from fuserl.engine.contracts import require, require_one_of
from fuserl.engine.losses import Loss, negative_logprob, rollout_sum, with_any_advantage
from fuserl.engine.proposals import Proposal

# f'(t) of D_f(pi || p) = E_p f(pi / p), given log t; the third is KL(pi || m) + KL(p || m), m half of each.
SLOPES: dict[str, Callable] = {
    "forward_kl": lambda log_t: -(-log_t).exp(),
    "reverse_kl": lambda log_t: log_t + 1,
    "jensen_shannon": lambda log_t: math.log(2) - softplus(-log_t),
    "total_variation": lambda log_t: log_t.sign() / 2,
}
DIAGNOSTICS = ("kl_to_prior", "kl_to_target", "kl_from_target", "sequence_entropy", "effective_sample_size")


class Partition:
    """Z of each prompt: the mean of P / q over what was drawn of it, and once that is much, its moving average."""

    def __init__(self, rate: float = 0.99):
        require("Partition", "rate", rate, 0 <= rate < 1, "in [0, 1)")
        self.rate, self.logs = rate, {}

    def seen(self, batch: Batch, log_weights: Tensor) -> Tensor:
        """log Z of each rollout's prompt, (B,) float64, after log P / q (B,) of its rollouts are counted in."""
        found = torch.zeros_like(log_weights)
        for group in batch.group.unique().tolist():
            members = batch.group == group
            mean = float(log_weights[members].logsumexp(0)) - math.log(int(members.sum()))
            key = hashlib.sha256(batch.prompt_tokens[group].numpy().tobytes()).hexdigest()
            before, count = self.logs.get(key, (-math.inf, 0))
            share = max(1 / (count + 1), 1 - self.rate)
            kept = before + math.log1p(-share) if share < 1 else -math.inf
            log_z = float(torch.tensor([kept, mean + math.log(share)], dtype=torch.float64).logsumexp(0))
            self.logs[key] = log_z, count + 1
            found[members] = log_z
        return found

    def state_dict(self) -> dict:
        """log Z and how many batches it is of, by prompt; log 0 is None."""
        return {"logs": {key: [None if z == -math.inf else z, count] for key, (z, count) in self.logs.items()}}

    def load_state_dict(self, state: dict) -> None:
        """Go on with a `state_dict`."""
        self.logs = {key: (-math.inf if z is None else z, count) for key, (z, count) in state["logs"].items()}


class Moments:
    """Coefficients of features with which the prior has the wanted moments, by gradient steps on each batch.

        coefficients += lr (moments - E_p features),   E_p by self-normalised importance sampling within each prompt

    Args:
        moments: (K,) wanted means.
        lr, steps: of each batch.
    """

    def __init__(self, moments: Sequence[float], *, lr: float, steps: int):
        require("Moments", "lr", lr, 0 < lr < math.inf, "a finite number > 0")
        require("Moments", "steps", steps, steps >= 1, "an integer >= 1")
        require("Moments", "moments", moments, all(map(math.isfinite, moments)), "finite numbers")
        self.moments, self.lr, self.steps = torch.tensor(moments, dtype=torch.float64), lr, steps
        self.coefficients = torch.zeros_like(self.moments)

    def fitted(self, batch: Batch, features: Tensor, log_weights: Tensor) -> Tensor:
        """The coefficients (K,) after a batch of features (B, K) with log prior / q (B,)."""
        if features.shape[1] != len(self.moments):
            raise ValueError(
                f"Moments: moments must be one per feature, {features.shape[1]}; got {len(self.moments)}. "
                "Give the mean that each is to have."
            )
        sizes = batch.group_sum(torch.ones_like(log_weights))
        for _ in range(self.steps):
            tilted = log_weights + features @ self.coefficients
            most = tilted.new_full((int(batch.group.max()) + 1,), -math.inf)
            most = most.scatter_reduce(0, batch.group, tilted, "amax")
            weights = (tilted - most[batch.group]).exp()
            shares = weights / batch.group_sum(weights) / (1 / sizes).sum()
            self.coefficients = self.coefficients + self.lr * (self.moments - shares @ features)
        return self.coefficients

    def state_dict(self) -> dict:
        """The coefficients."""
        return {"coefficients": self.coefficients}

    def load_state_dict(self, state: dict) -> None:
        """Go on with a `state_dict`."""
        self.coefficients = state["coefficients"].double()


def posterior(beta: float) -> Callable:
    """A score: the reward over beta, (Batch, log prior / q) -> (B,)."""
    return lambda batch, _: batch.rewards.double() / beta


def with_moments(moments: Moments) -> Callable:
    """A score: coefficients . features, which are facts["phi"] (B, K), or the reward where there are none."""

    def score(batch: Batch, log_weights: Tensor) -> Tensor:
        features = batch.facts.get("phi", batch.rewards[:, None]).double()
        return features @ moments.fitted(batch, features, log_weights)

    return score


def pointwise(batch: Batch, _: Tensor) -> Tensor:
    """A score: 0 where the reward is at least 1, else -inf, (B,)."""
    return torch.where(batch.rewards.double() >= 1, 0.0, -math.inf)


def sums(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """log pi, log prior and log q of each rollout, (B,) float64 each."""
    fields = batch.old_logprobs, batch.ref_logprobs, batch.rollout_logprobs
    return tuple(batch.rollout_sum(x.double()) for x in fields)


def others(batch: Batch, x: Tensor) -> Tensor:
    """The mean of x (B,) over the other rollouts of each one's group; 0 where it is alone."""
    sizes = batch.group_sum(torch.ones_like(x))
    return (batch.group_sum(x) - x) / (sizes - 1).clamp(min=1)


def inferred(
    objective: str = "kl_rl",
    target: str = "posterior",
    *,
    beta: float = 0.1,
    divergence: str = "jensen_shannon",
    baseline: bool = True,
    partition: Partition | None = None,
    moments: Moments | None = None,
    proposal: Proposal | None = None,
) -> Callable:
    """Credit whose score-function gradient brings a policy to a target, (Batch) -> Batch with advantages and facts.

        kl_rl   (pi / q) (r + beta (log prior - log pi) - b)        where P is no posterior: log P - log pi
        dpg     P / (Z q) - b pi / q
        fdpg    (pi / q) (-f'(pi Z / P) - b)

    b is 1 for dpg, else the mean of the group's others; 0 without `baseline`. `divergence` names f out of SLOPES,
    `partition` and `moments` are what goes on from batch to batch, and `proposal` adopts a policy that is nearer.
    """
    require_one_of("inferred", "objective", objective, ("kl_rl", "dpg", "fdpg"))
    require_one_of("inferred", "target", target, ("posterior", "moments", "pointwise"))
    require_one_of("inferred", "divergence", divergence, SLOPES)
    free = objective == "kl_rl" and target == "posterior"
    require("inferred", "beta", beta, 0 <= beta < math.inf and (beta > 0 or free), "> 0; 0 for kl_rl to a posterior")
    reverse = objective == "kl_rl" or (objective == "fdpg" and divergence == "reverse_kl")
    require("inferred", "target", target, target != "pointwise" or not reverse, "above 0 everywhere for a reverse KL")
    known = target != "moments" or moments is not None
    require("inferred", "moments", moments, known, "given for the target moments")
    score = {"posterior": posterior(beta), "pointwise": pointwise, "moments": moments and with_moments(moments)}[target]
    partition = Partition() if partition is None else partition

    def advantage(batch: Batch) -> Batch:
        log_pi, log_prior, log_q = sums(batch)
        on = (log_pi - log_q).exp()
        if not beta:  # there is no target but the largest reward
            rewards = batch.rewards.double()
            return batch.with_advantages(on * (rewards - others(batch, rewards) * baseline))
        log_p = log_prior + score(batch, log_prior - log_q)
        normal = log_p - _finite(partition.seen(batch, log_p - log_q))
        if objective == "dpg":
            found = (normal - log_q).exp() - on * baseline
        else:
            gain = -SLOPES[divergence](log_pi - normal)
            if objective == "kl_rl":
                gain = (beta if target == "posterior" else 1.0) * (log_p - log_pi)
            found = on * (gain - others(batch, gain) * baseline)
        if proposal is not None and _nearer(normal, log_pi, log_q):
            proposal.adopt()
        facts = diagnosed(batch, normal, log_pi, log_prior, log_q)
        return batch.with_advantages(found).replace(facts=batch.facts | facts)

    return advantage


def _finite(log_z: Tensor) -> Tensor:
    """log Z, or 0 where nothing of the target has been seen: what P is 0 there stays 0."""
    return torch.where(log_z == -math.inf, 0.0, log_z)


def _nearer(log_p: Tensor, log_pi: Tensor, log_q: Tensor) -> bool:
    """Whether KL(p || pi) is below KL(p || q): their difference is E_p[log q - log pi]."""
    return bool(((log_p - log_q).exp() * (log_q - log_pi)).mean() < 0)


def diagnosed(batch: Batch, log_p: Tensor, log_pi: Tensor, log_prior: Tensor, log_q: Tensor) -> dict[str, Tensor]:
    """Estimates of a batch by name of DIAGNOSTICS, each (B,), the same for all; log_p is normalised.

    KL(pi || prior), KL(pi || p) and KL(p || pi), the entropy of pi in nats a rollout, and the share of the rollouts
    that the importance weights p / q leave. What is infinite, where p is 0 somewhere, is NaN.
    """
    on, target = (log_pi - log_q).exp(), (log_p - log_q).exp()
    gap = torch.where(target > 0, log_p - log_pi, 0.0)
    numbers = (on * (log_pi - log_prior), on * (log_pi - log_p), target * gap, -on * log_pi)
    several = [x.mean().nan_to_num(math.nan, math.nan, math.nan) for x in numbers]
    several += [target.sum().square() / (len(target) * target.square().sum())]
    return {name: x.to(batch.dtype).repeat(len(batch.group)) for name, x in zip(DIAGNOSTICS, several, strict=True)}


def reinforced() -> Loss:
    """-A logprob, summed over a rollout and averaged over them, which reports what `diagnosed` put into the facts."""
    inner = negative_logprob(reduce=rollout_sum)

    def loss(out, batch: Batch):
        each, statistics = inner(out, batch)
        known = {name: batch.at_last(batch.facts[name]) for name in DIAGNOSTICS if name in batch.facts}
        return each, {**statistics, **known}

    return dataclasses.replace(inner, function=loss, scope="rollout", live=with_any_advantage)


def with_distinct(reward: Callable) -> Callable:
    """The reward slot `reward`, which tells `distinct` of all rollouts together too: "distinct_1" and "distinct_2"."""

    def scored(rollouts: Rollouts) -> tuple[Tensor, dict]:
        scores, facts = reward(rollouts)
        return scores, facts | {f"distinct_{n}": distinct(rollouts.tokens, rollouts.offsets, n) for n in (1, 2)}

    scored.close = getattr(reward, "close", lambda: None)
    return scored


def distinct(tokens: Tensor, offsets: Tensor, n: int) -> float:
    """Different n-grams over all n-grams of rollouts (N,) at offsets (B + 1,); NaN where there are none."""
    rollout = torch.arange(len(offsets) - 1).repeat_interleave(offsets.diff())
    if len(tokens) < n:
        return math.nan
    grams = tokens.unfold(0, n, 1)[rollout[: len(rollout) - n + 1] == rollout[n - 1 :]]
    return len(grams.unique(dim=0)) / len(grams) if len(grams) else math.nan
