"""Token losses: functions of (out, batch) that return one normalised loss per token, and its statistics."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fuserl.engine.batch import Batch
from fuserl.engine.contracts import BOUND, WEIGHT, require
from fuserl.engine.importance import Importance
from fuserl.kernels.policy_loss import STATISTICS, policy_loss
from fuserl.kernels.surrogates import Clip, Gate, Weight


def every_token(batch: Batch) -> None:
    """`live` of a loss that no token leaves without a gradient."""
    return None


def with_advantage(batch: Batch) -> Tensor:
    """`live` of a loss that vanishes, with its gradient, where the advantage is zero: (N,) bool."""
    return batch.advantages != 0


def with_any_advantage(batch: Batch) -> Tensor:
    """`live` of a loss of whole rollouts that vanishes where the advantage is zero at every token of one: (N,) bool."""
    return batch.to_tokens(batch.rollout_sum(with_advantage(batch).float()) > 0)


@dataclass(frozen=True)
class Loss:
    """A per-token loss, and what an update must know of it before calling it."""

    function: Callable  # (out, Batch) -> (loss (n,), statistics {name: (n,), NaN where there is none; or (1, K)})
    # Of linear_policy_loss, with divergences from the teacher (reverse_kl, ...); "value", the value head at the state
    # before each token; "score", at the state after it.
    outputs: tuple[str, ...] = ("logprob",)
    scope: str = "token"  # what must be seen together: a "token", a "rollout", or all rollouts of a "group"
    live: Callable = every_token  # (Batch) -> (N,) bool, or None for all: tokens whose gradient is not known to be zero
    reads: tuple[str, ...] = ()  # fields of the batch: old_logprobs, ref_logprobs, values, or as of `Policy.score`
    divergence: dict | None = None  # beta and alpha of the divergences from the recipe's teacher among the outputs
    # Outputs of its own by name, beside those of linear_policy_loss: (HeadInput) -> (n,) with their graph, as
    # `distilling` makes of the policy's states and the teacher's.
    made: dict[str, Callable] = field(default_factory=dict)
    weighed: Callable | None = None  # (Importance) -> this loss with importance weights, where it can take some

    def __call__(self, out, batch: Batch):
        return self.function(out, batch)


def token_mean(batch: Batch) -> Tensor:
    """Weight 1 / N of each token: the average over all tokens of the batch (DAPO), (n,)."""
    return batch.rewards.new_full(batch.tokens.shape, 1.0 / batch.counts.tokens)


def rollout_mean(batch: Batch) -> Tensor:
    """Weight 1 / (B length) of each token: the average over rollouts of their average (GRPO), (n,)."""
    return 1.0 / (batch.counts.rollouts * batch.to_tokens(batch.lengths)).to(batch.dtype)


def rollout_sum(batch: Batch) -> Tensor:
    """Weight 1 / B of each token: the average over rollouts of their sum (REINFORCE), (n,)."""
    return batch.rewards.new_full(batch.tokens.shape, 1.0 / batch.counts.rollouts)


def mean_over(length: int) -> Callable:
    """A reduction to sums over rollouts, divided by one constant length (Dr. GRPO): weight 1 / (B length)."""
    return lambda batch: rollout_sum(batch) / length


def clipped(
    *,
    low: float = 0.2,
    high: float = 0.2,
    dual: float | None = None,
    beta: float = 0.0,
    kl: str = "k3",
    kl_weighted: bool = False,
    entropy_coef: float = 0.0,
    importance: Importance | None = None,
    reduce: Callable = rollout_mean,
) -> Loss:
    """The clipped surrogate of PPO (arXiv:1707.06347, eq. 7), with a KL and an entropy term when weighted.

        loss = -w min(ratio A, clip(ratio, 1 - low, 1 + high) A) + beta kl - entropy_coef entropy
        ratio = exp(logprob - old_logprob)        k3 = exp(ref - logprob) - (ref - logprob) - 1

    Without old_logprobs in the batch the update is on-policy: they are the current ones, detached, and the ratio is 1.
    With `dual` (> 1) the loss of a token with A < 0 is at most dual |A| (arXiv:1912.09729); above 1 + high that is the
    two-sided clip (2505.07291). `kl` and `kl_weighted` are as of `policy_loss`; `importance` says what w is, None 1.
    """
    _require_clip("clipped", low, high)
    require("clipped", "dual", dual, dual is None or dual > 1, "above 1, or None for no such bound")
    terms = {"beta": beta, "kl": kl, "kl_weighted": kl_weighted, "entropy_coef": entropy_coef}
    return _of_surrogate("clipped", Clip(low, high, dual), importance=importance, reduce=reduce, **terms)


def decoupled(*, importance: Importance, **options) -> Loss:
    """The clipped surrogate around the proximal policy, of samples of a behaviour policy (arXiv:2110.00641).

        loss = -w min(ratio A, clip(ratio, 1 - low, 1 + high) A)        w = exp(old_logprob - rollout_logprob)

    rollout_logprobs are the behaviour's, old_logprobs the proximal policy's, made when the update starts (AReaL,
    2505.24298). `options` are those of `clipped`.
    """
    return clipped(importance=importance, **options)


def clipped_rollouts(
    *, low: float, high: float, per_token: bool = False, reduce: Callable = rollout_mean, **terms
) -> Loss:
    """The clipped surrogate with one ratio per rollout, the geometric mean of its tokens' (arXiv:2507.18071, eq. 5-7).

        ratio[b] = exp(mean over its tokens of logprob - old_logprobs)

    With `per_token` (section 4.3) that ratio has no gradient, and each token has its own through a factor of value 1:
    the same values and, where the advantage is that of the rollout, the same gradient. `terms` are those of `clipped`
    after `dual`; divergence and entropy are of tokens, and so is the ratio that weighs a divergence.
    """
    _require_clip("clipped_rollouts", low, high)

    def ratios(logprob, old, batch):
        whole = batch.to_tokens(batch.rollout_mean(logprob - old))
        whole = whole.detach() + (logprob - logprob.detach()) if per_token else whole
        return whole, torch.zeros_like(whole)

    return _of_rollouts("clipped_rollouts", ratios, Clip(low, high), reduce=reduce, **terms)


def geometric_rollouts(*, low: float = 0.4, high: float = 0.4, reduce: Callable = rollout_mean, **terms) -> Loss:
    """The geometric mean of a rollout's ratios, each clipped, in the place of their mean (arXiv:2507.20673).

        loss = -A exp(mean over the tokens of the rollout of the clipped log_ratio)
        clipped log_ratio = min(log_ratio, high) where A > 0, max(log_ratio, -low) where A < 0

    Bounds are those of the logarithm, and the advantage is that of the whole rollout. `terms` are as of
    `clipped_rollouts`.
    """
    _require_clip("geometric_rollouts", low, high)

    def ratios(logprob, old, batch):
        each, a = logprob - old, batch.advantages
        held = torch.where(a > 0, each.clamp(max=high), torch.where(a < 0, each.clamp(min=-low), each))
        whole = batch.to_tokens(batch.rollout_mean(held))
        return whole, torch.zeros_like(whole)

    def clipped_at(logprob, old, batch):
        each, a = logprob - old, batch.advantages
        return (a < 0) & (each < -low), (a > 0) & (each > high)

    unbounded = Clip(math.inf, math.inf)
    return _of_rollouts("geometric_rollouts", ratios, unbounded, clipped_at=clipped_at, reduce=reduce, **terms)


def truncated(*, low: float, high: float, reduce: Callable = token_mean, **terms) -> Loss:
    """Log-probs weighted by the truncated importance ratio, which carries no gradient (arXiv:2506.13585, eq. 4-5).

        loss = -clip(ratio, 1 - low, 1 + high) A logprob

    Unlike under clipping, every token keeps a gradient. `terms` are those of `clipped` after its bounds.
    """
    _require_clip("truncated", low, high)
    bounds = max(0.0, 1 - low), 1 + high
    return _of_surrogate("truncated", Weight(bounds, bounds), reduce=reduce, **terms)


def asymmetric(
    *,
    positive: tuple[float, float] = (1.0, 1.0),
    negative: tuple[float, float] = (0.0, 1.0),
    reduce: Callable = token_mean,
    **terms,
) -> Loss:
    """Log-probs weighted by the ratio within other bounds where A > 0 than where A < 0 (TOPR, arXiv:2503.14286).

        loss = -clip(ratio, *bounds of A's sign) A logprob

    By default what is good is learnt as in supervised learning, whoever sampled it, and what is bad is unlearnt only as
    far as the policy would still say it. Each token has its own ratio, as in `truncated`; `terms` are as of `clipped`.
    """
    return _of_surrogate("asymmetric", _asymmetry("asymmetric", positive, negative), reduce=reduce, **terms)


def asymmetric_rollouts(
    *,
    positive: tuple[float, float] = (1.0, 1.0),
    negative: tuple[float, float] = (0.0, 1.0),
    reduce: Callable = rollout_sum,
    **terms,
) -> Loss:
    """Log-probs weighted by the ratio of the rollout within other bounds where A > 0 than where A < 0 (TOPR).

        loss = -clip(ratio, *bounds of A's sign) A logprob
        ratio[b] = exp(sum over its tokens of logprob - old_logprobs)

    That is the paper's (arXiv:2503.14286), of which `asymmetric` is the form by token. `terms` are as of
    `clipped_rollouts`.
    """

    def ratios(logprob, old, batch):
        here = logprob.detach()
        return logprob, here - batch.to_tokens(batch.rollout_sum(here - old))

    surrogate = _asymmetry("asymmetric_rollouts", positive, negative)
    return _of_rollouts("asymmetric_rollouts", ratios, surrogate, reduce=reduce, **terms)


def _asymmetry(function: str, positive: tuple[float, float], negative: tuple[float, float]) -> Weight:
    for name, (least, most) in (("positive", positive), ("negative", negative)):
        require(function, name, (least, most), 0 <= least <= most and most > 0, "0 <= least <= most, most > 0")
    return Weight(tuple(positive), tuple(negative))


def gated(*, positive: float = 1.0, negative: float = 1.05, reduce: Callable = rollout_mean, **terms) -> Loss:
    """A soft gate on the ratio in the place of a clip (SAPO, arXiv:2511.20347).

        loss = -4 / tau sigmoid(tau (ratio - 1)) A        tau = positive where A > 0, else negative

    The gradient is that of the plain ratio at 1 and fades to both sides. `terms` are those of `clipped`.
    """
    for name, tau in (("positive", positive), ("negative", negative)):
        require("gated", name, tau, 0 < tau < math.inf, "a finite number > 0")
    return _of_surrogate("gated", Gate(positive, negative), reduce=reduce, **terms)


def _of_surrogate(
    function: str,
    surrogate: Clip | Weight | Gate,
    *,
    beta: float = 0.0,
    kl: str = "k3",
    kl_weighted: bool = False,
    entropy_coef: float = 0.0,
    importance: Importance | None = None,
    reduce: Callable,
) -> Loss:
    """The loss of a surrogate of each token's ratio, with a KL and an entropy term when weighted."""
    _require_terms(function, beta, entropy_coef)
    terms = {"beta": beta, "kl": kl, "kl_weighted": kl_weighted, "entropy_coef": entropy_coef, "reduce": reduce}

    def loss(out, batch: Batch):
        old = out.logprob.detach() if batch.old_logprobs is None else batch.old_logprobs
        losses, statistics = policy_loss(
            out.logprob,
            batch.advantages,
            old_logprobs=batch.old_logprobs,
            ref_logprobs=batch.ref_logprobs,  # for its statistic where beta is 0
            entropy=out.entropy if entropy_coef else None,
            weights=reduce(batch),
            surrogate=surrogate,
            beta=beta,
            kl=kl,
            kl_weighted=kl_weighted,
            entropy_coef=entropy_coef,
            **({} if importance is None else importance.of_tokens(batch, old)),
        )
        return losses, {"policy": statistics[None]}

    scope = "token" if importance is None else importance.scope
    return Loss(
        loss,
        outputs=("logprob", "entropy") if entropy_coef else ("logprob",),
        scope=scope,
        live=every_token if beta or entropy_coef else with_advantage if scope == "token" else with_any_advantage,
        reads=("ref_logprobs",) if beta else (),
        weighed=_weighed(functools.partial(_of_surrogate, function, surrogate, **terms), importance),
    )


def _of_rollouts(
    function: str,
    ratios: Callable,
    surrogate: Clip | Weight,
    *,
    clipped_at: Callable | None = None,
    importance: Importance | None = None,
    reduce: Callable,
    **terms,
) -> Loss:
    """The loss of a surrogate of ratios(logprob, old, batch), log-probs and old ones whose ratio is that of a rollout.

    `terms` are of tokens, and come from a pass of their own, without advantages.
    """
    beta, entropy_coef = (terms.setdefault(name, 0.0) for name in ("beta", "entropy_coef"))
    _require_terms(function, beta, entropy_coef)
    again = functools.partial(_of_rollouts, function, ratios, surrogate, clipped_at=clipped_at, reduce=reduce, **terms)

    def loss(out, batch: Batch):
        old = out.logprob.detach() if batch.old_logprobs is None else batch.old_logprobs
        (logprob, start), weights = ratios(out.logprob, old, batch), reduce(batch)
        weighed = {} if importance is None else importance.of_rollouts(batch, old)
        losses, statistics = policy_loss(
            logprob, batch.advantages, old_logprobs=start, weights=weights, surrogate=surrogate, **weighed
        )
        if clipped_at is not None:
            counts = torch.stack([each.sum() for each in clipped_at(out.logprob.detach(), old, batch)])
            statistics[STATISTICS.index("clipped_low") :][:2] = counts
        if beta or entropy_coef or batch.ref_logprobs is not None:  # for its statistic where beta is 0
            entropy, nothing = out.entropy if entropy_coef else None, torch.zeros_like(batch.advantages)
            given = {"old_logprobs": old, "ref_logprobs": batch.ref_logprobs, "entropy": entropy, "weights": weights}
            more, of_terms = policy_loss(out.logprob, nothing, **given, **terms)
            losses = losses + more
            statistics[STATISTICS.index("kl")] = of_terms[STATISTICS.index("kl")]
        return losses, {"policy": statistics[None]}

    return Loss(
        loss,
        outputs=("logprob", "entropy") if entropy_coef else ("logprob",),
        scope="rollout",
        live=every_token if beta or entropy_coef else with_any_advantage,
        reads=("ref_logprobs",) if beta else (),
        weighed=_weighed(again, importance),
    )


def _weighed(again: Callable, importance: Importance | None) -> Callable | None:
    """`weighed` of a loss made by `again`, which takes importance weights where it has none."""
    return None if importance is not None else lambda given: again(importance=given)


def _require_terms(function: str, beta: float, entropy_coef: float) -> None:
    require(function, "beta", beta, 0 <= beta < math.inf, WEIGHT)
    require(function, "entropy_coef", entropy_coef, abs(entropy_coef) < math.inf, "a finite number")


def negative_logprob(*, reduce: Callable = token_mean) -> Loss:
    """Maximum likelihood of the batch's tokens, weighted by their advantages: -A logprob."""

    def loss(out, batch: Batch):
        return -out.logprob * batch.advantages * reduce(batch), {"nll": -out.logprob}

    return Loss(loss, live=with_advantage)


def squared_value(*, clip: float = math.inf, reduce: Callable = token_mean) -> Loss:
    """Half the squared error of the value head to the returns, clipped around the old values (arXiv:2005.12729, 3).

    loss = max((value - returns)^2, (clip(value, values - clip, values + clip) - returns)^2) / 2
    """
    require("squared_value", "clip", clip, clip > 0, "a number > 0; inf bounds nothing")

    def loss(out, batch: Batch):
        near = torch.clamp(out.value, batch.values - clip, batch.values + clip)
        error = torch.maximum((out.value - batch.returns).square(), (near - batch.returns).square()) / 2
        return error * reduce(batch), {"value_loss": error}

    return Loss(loss, outputs=("value",), reads=("values",))


def summed(first: Loss, second: Loss, coefficient: float) -> Loss:
    """first + coefficient second, in one pass over the model: a policy's loss and that of a head on its trunk."""
    require("summed", "coefficient", coefficient, 0 <= coefficient < math.inf, WEIGHT)

    def loss(out, batch: Batch):
        (one, one_statistics), (two, two_statistics) = first(out, batch), second(out, batch)
        return one + coefficient * two, {**one_statistics, **two_statistics}

    def live(batch: Batch) -> Tensor | None:
        one, two = first.live(batch), second.live(batch)
        return None if one is None or two is None else one | two

    outputs, reads = (tuple(dict.fromkeys(a + b)) for a, b in zip(needs(first), needs(second), strict=True))
    scope = max(first.scope, second.scope, key=("token", "rollout", "group").index)
    weighed = first.weighed and (lambda given: summed(first.weighed(given), second, coefficient))
    divergence = first.divergence or second.divergence
    terms = {"divergence": divergence, "weighed": weighed, "made": first.made | second.made}
    return Loss(loss, outputs=outputs, reads=reads, scope=scope, live=live, **terms)


def needs(loss: Loss) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What an update must find for a loss: outputs of the model, and fields of the batch."""
    return loss.outputs, loss.reads


def _require_clip(function: str, low: float, high: float) -> None:
    require(function, "low", low, low >= 0, BOUND)
    require(function, "high", high, high >= 0, BOUND)
