"""The token losses as loops over rollouts in float64, one number for the whole batch."""

import math

import preference_formulas
import torch
from batches import each_rollout

from fuserl.engine.importance import mean_importance, rollout_importance, token_importance
from fuserl.engine.losses import (
    asymmetric,
    asymmetric_rollouts,
    clipped,
    clipped_rollouts,
    decoupled,
    gated,
    geometric_rollouts,
    mean_over,
    negative_logprob,
    rollout_sum,
    squared_value,
    summed,
    token_mean,
    truncated,
)
from fuserl.kernels.surrogates import Truncate, Within


def surrogate(ratio, a, low, high, dual=math.inf):
    gain = torch.minimum(ratio * a, ratio.clamp(1 - low, 1 + high) * a)
    return -torch.where(a < 0, torch.maximum(gain, dual * a) if dual < math.inf else gain, gain)


def clipped_formula(x, b, low=0.2, high=0.2, dual=math.inf, beta=0.0, entropy_coef=0.0, reduce="rollout"):
    total = 0.0
    for span in each_rollout(b):
        if span.start == span.stop:
            continue
        logprob, ref = x["logprob"][span], b.ref_logprobs[span].double()
        old = logprob.detach() if b.old_logprobs is None else b.old_logprobs[span].double()
        each = surrogate((logprob - old).exp(), b.advantages[span].double(), low, high, dual)
        each = each + beta * ((ref - logprob).exp() - (ref - logprob) - 1)
        if entropy_coef:
            each = each - entropy_coef * x["entropy"][span]
        weight = {"rollout": 1 / (len(each) * len(b.group)), "token": 1 / len(b.tokens), "sum": 1 / len(b.group)}
        total = total + weight.get(reduce, 1 / (len(b.group) * 7)) * each.sum()
    return total


def rollouts_formula(x, b, low, high, weight=None):
    total = 0.0
    for span in each_rollout(b):
        if span.start < span.stop:
            ratio = (x["logprob"][span] - b.old_logprobs[span].double()).mean().exp()
            each = surrogate(ratio, b.advantages[span].double(), low, high)
            total = total + (each if weight is None else weight(b)[span] * each).mean() / len(b.group)
    return total


def rollouts_by_token_formula(x, b, low, high):
    total = 0.0
    for span in each_rollout(b):
        if span.start < span.stop:
            logprob = x["logprob"][span]
            ratio = (logprob - b.old_logprobs[span].double()).mean().exp().detach() * (logprob - logprob.detach()).exp()
            total = total + surrogate(ratio, b.advantages[span].double(), low, high).mean() / len(b.group)
    return total


def geometric_formula(x, b, low, high):
    """The product of clipped ratios to the power of 1 / length, with min and max as in the paper."""
    total = 0.0
    for span in each_rollout(b):
        if span.start < span.stop:
            a, ratio = b.advantages[span].double(), (x["logprob"][span] - b.old_logprobs[span].double()).exp()
            inside = ratio.clamp(math.exp(-low), math.exp(high))
            each = torch.where(
                a > 0, torch.minimum(ratio, inside), torch.where(a < 0, torch.maximum(ratio, inside), ratio)
            )
            total = total - (each.prod() ** (1 / len(a)) * a).mean() / len(b.group)
    return total


def weighted_formula(x, b, positive, negative, weight=None):
    """-w clip(ratio) A logprob, averaged over tokens."""
    a, ratio = b.advantages.double(), (x["logprob"] - b.old_logprobs.double()).exp().detach()
    factor = torch.where(a > 0, ratio.clamp(*positive), ratio.clamp(*negative))
    return -(factor * a * x["logprob"] * (1 if weight is None else weight(b))).mean()


def weighted_rollouts_formula(x, b, positive, negative, weight=None):
    """-w clip(ratio of the rollout) A logprob, summed over rollouts and averaged over these."""
    total = 0.0
    for span in each_rollout(b):
        a, logprob = b.advantages[span].double(), x["logprob"][span]
        ratio = (logprob - b.old_logprobs[span].double()).sum().exp().detach()
        factor = torch.where(a > 0, ratio.clamp(*positive), ratio.clamp(*negative))
        total = total - ((1 if weight is None else weight(b)[span]) * factor * a * logprob).sum() / len(b.group)
    return total


def terms_formula(x, b, beta, entropy_coef):
    """beta k3 - entropy_coef entropy, averaged over rollouts of their averages."""
    d, total = b.ref_logprobs.double() - x["logprob"], 0.0
    each = beta * (d.exp() - d - 1) - entropy_coef * x["entropy"]
    for span in each_rollout(b):
        total = total + (each[span].mean() / len(b.group) if span.start < span.stop else 0.0)
    return total


def gated_formula(x, b, positive, negative):
    a, total = b.advantages.double(), 0.0
    for span in each_rollout(b):
        if span.start < span.stop:
            ratio = (x["logprob"][span] - b.old_logprobs[span].double()).exp()
            tau = torch.where(a[span] > 0, positive, negative)
            total = total - (torch.sigmoid(tau * (ratio - 1)) * 4 / tau * a[span]).mean() / len(b.group)
    return total


def importance(level, bound):
    """The weight of each token by loops: bound(weight of its level)."""

    def weights(b):
        gap, found = (b.old_logprobs - b.rollout_logprobs).double(), []
        for span in each_rollout(b):
            found += {"token": gap[span], "sum": gap[span].sum(), "mean": gap[span].mean()}[level].expand(
                span.stop - span.start
            )
        return bound(torch.stack(found).exp())

    return weights


def within(least, most):
    return lambda weight: weight.where((weight >= least) & (weight <= most), 0.0)


def corrected_formula(x, b, weight, beta=0.0):
    """The clipped surrogate times the weight; the weight leaves the divergence, DeepSeek-V3.2's, alone."""
    ratio = (x["logprob"] - b.old_logprobs.double()).exp()
    d = b.ref_logprobs.double() - x["logprob"]
    return (surrogate(ratio, b.advantages.double(), 0.2, 0.2) * weight(b) + beta * ratio * (d.exp() - d - 1)).mean()


def value_formula(x, b, clip=math.inf):
    near = b.values + (x["value"] - b.values.double()).clamp(-clip, clip)
    worst = torch.maximum((x["value"] - b.returns).square(), (near - b.returns).square())
    return worst.mean() / 2


LOSSES = {
    "clipped": (clipped(low=0.2, high=0.3), lambda x, b: clipped_formula(x, b, 0.2, 0.3)),
    "dual": (clipped(dual=1.3), lambda x, b: clipped_formula(x, b, dual=1.3)),
    "kl": (clipped(beta=0.3, reduce=token_mean), lambda x, b: clipped_formula(x, b, beta=0.3, reduce="token")),
    "entropy": (clipped(entropy_coef=0.1), lambda x, b: clipped_formula(x, b, entropy_coef=0.1)),
    "sum": (clipped(reduce=rollout_sum), lambda x, b: clipped_formula(x, b, reduce="sum")),
    "mean_over": (clipped(reduce=mean_over(7)), lambda x, b: clipped_formula(x, b, reduce="seventh")),
    "rollouts": (clipped_rollouts(low=0.05, high=0.1), lambda x, b: rollouts_formula(x, b, 0.05, 0.1)),
    "rollouts_by_token": (
        clipped_rollouts(low=0.05, high=0.1, per_token=True),
        lambda x, b: rollouts_by_token_formula(x, b, 0.05, 0.1),
    ),
    "rollouts_corrected": (
        clipped_rollouts(low=0.05, high=0.1, importance=mean_importance(Truncate(1.1))),
        lambda x, b: rollouts_formula(x, b, 0.05, 0.1, importance("mean", lambda weight: weight.clamp(max=1.1))),
    ),
    "geometric": (geometric_rollouts(low=0.3, high=0.4), lambda x, b: geometric_formula(x, b, 0.3, 0.4)),
    "rollouts_and_terms": (
        clipped_rollouts(low=0.05, high=0.1, beta=0.3, entropy_coef=0.1),
        lambda x, b: rollouts_formula(x, b, 0.05, 0.1) + terms_formula(x, b, 0.3, 0.1),
    ),
    "geometric_and_terms": (
        geometric_rollouts(low=0.3, high=0.4, beta=0.3, entropy_coef=0.1),
        lambda x, b: geometric_formula(x, b, 0.3, 0.4) + terms_formula(x, b, 0.3, 0.1),
    ),
    "truncated": (truncated(low=0.3, high=0.5), lambda x, b: weighted_formula(x, b, (0.7, 1.5), (0.7, 1.5))),
    "asymmetric": (asymmetric(), lambda x, b: weighted_formula(x, b, (1, 1), (0, 1))),
    "asymmetric_corrected": (
        asymmetric(positive=(0.5, 1.5), importance=token_importance(Within(0.6, 1.6))),
        lambda x, b: weighted_formula(x, b, (0.5, 1.5), (0, 1), importance("token", within(0.6, 1.6))),
    ),
    "asymmetric_rollouts": (asymmetric_rollouts(), lambda x, b: weighted_rollouts_formula(x, b, (1, 1), (0, 1))),
    "asymmetric_rollouts_corrected": (
        asymmetric_rollouts(positive=(0.5, 1.5), importance=rollout_importance(Truncate(1.1))),
        lambda x, b: weighted_rollouts_formula(
            x, b, (0.5, 1.5), (0, 1), importance("sum", lambda weight: weight.clamp(max=1.1))
        ),
    ),
    "gated": (gated(negative=1.5), lambda x, b: gated_formula(x, b, 1.0, 1.5)),
    "decoupled": (
        decoupled(importance=token_importance(Truncate(1.2)), reduce=token_mean),
        lambda x, b: corrected_formula(x, b, importance("token", lambda weight: weight.clamp(max=1.2))),
    ),
    "corrected_kl": (
        clipped(importance=token_importance(Within(0.5, 2.0)), beta=0.2, kl_weighted=True, reduce=token_mean),
        lambda x, b: corrected_formula(x, b, importance("token", within(0.5, 2.0)), 0.2),
    ),
    "corrected_rollouts": (
        clipped(importance=rollout_importance(Within(0.5, 2.0)), reduce=token_mean),
        lambda x, b: corrected_formula(x, b, importance("sum", within(0.5, 2.0))),
    ),
    "likelihood": (negative_logprob(), lambda x, b: -(b.advantages.double() * x["logprob"]).mean()),
    "value": (squared_value(), value_formula),
    "value_clipped": (squared_value(clip=0.3), lambda x, b: value_formula(x, b, 0.3)),
    "summed": (
        summed(clipped(reduce=token_mean), squared_value(clip=0.3), 0.7),
        lambda x, b: clipped_formula(x, b, reduce="token") + 0.7 * value_formula(x, b, 0.3),
    ),
    "rollouts_and_value": (
        summed(squared_value(), clipped_rollouts(low=0.05, high=0.1), 0.7),
        lambda x, b: value_formula(x, b) + 0.7 * rollouts_formula(x, b, 0.05, 0.1),
    ),
    **preference_formulas.LOSSES,
}
