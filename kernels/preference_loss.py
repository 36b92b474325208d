"""Losses of preferences between rollouts, from the log-probs of their tokens, in one pass over these.

    score  = sum over a rollout's tokens of (logprobs - ref_logprobs), over its tokens where the form says so
    losses = link(scale (score of chosen - score of rejected) - shift - margins) + nll and centre terms

    dlosses[p] / dlogprobs[t] = the derivative to the score of the rollout that t is of, over its tokens or not

kernels/preferences.py has the forms. Every token of a rollout has the same derivative, so only those of pairs are kept,
and backward writes each token's gradient once. Sums, and all that follows from them, are in double in every backend.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fuserl.kernels import preference_pairs
from fuserl.kernels.dispatch import choose
from fuserl.kernels.preferences import HINGE, LOGISTIC, ODDS, SIGMOID, SQUARE, STATISTICS, Form, Rule, merged, named
from fuserl.kernels.registration import register
from fuserl.kernels.segment_sum import reference as segment_sums
from fuserl.kernels.segment_sum import to_tokens

__all__ = ["STATISTICS", "merged", "named", "preference_loss"]


class Given(NamedTuple):
    """The other tensors of a call, each of them or None; csrc/ops.h has their shapes."""

    offsets: Tensor | None
    mask: Tensor | None
    chosen: Tensor | None
    rejected: Tensor | None
    ref_logprobs: Tensor | None
    margins: Tensor | None
    desirable: Tensor | None
    baseline: Tensor | None

    def sizes(self, logprobs: Tensor) -> tuple[int, int]:
        """Rollouts, and losses; by shape, since len of a symbolic one would be a number, and compile for each."""
        rollouts = logprobs.shape[0] if self.offsets is None else self.offsets.shape[0] - 1
        pairs = rollouts // 2 if self.chosen is None else self.chosen.shape[0]
        return rollouts, pairs if self.desirable is None else rollouts


def reference(logprobs: Tensor, given: Given, rule: Rule) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The definition, in plain torch: losses, through which autograd goes; rewards; statistics; derivatives."""
    logprobs, given = _packed(logprobs, given)
    sums, totals, lengths = _rollouts(logprobs, given)
    scores = sums / lengths if rule.mean else sums
    (c, has_c), (r, has_r) = _sides(logprobs, given)
    baseline = 0.0 if given.baseline is None else given.baseline
    score_c, score_r = torch.where(has_c, scores[c], baseline), torch.where(has_r, scores[r], baseline)
    apart = rule.scale * (score_c - score_r)
    margin = apart - rule.shift - (0.0 if given.margins is None else given.margins)
    losses, d_c, d_r = _linked(margin, score_c, score_r, has_c, rule)
    both = score_c + score_r
    if rule.centre:
        losses = losses + rule.centre * both.square()
        d_c, d_r = (d + 2 * rule.centre * both for d in (d_c, d_r))
    if rule.mean:
        d_c, d_r = d_c / lengths[c], d_r / lengths[r]
    nll = torch.zeros_like(margin)
    if rule.nll:
        nll = -(totals / lengths)[c]
        losses, d_c = losses + rule.nll * nll, d_c - rule.nll / lengths[c]
    derivative = torch.stack([torch.where(has_c, d_c, 0.0), torch.where(has_r, d_r, 0.0)]).detach()
    won, lost = (torch.where(has, rule.scale * s, 0.0) for has, s in ((has_c, score_c), (has_r, score_r)))
    seen = torch.ones_like(apart), apart, apart > 0, has_c, has_r, won, lost, nll
    statistics = torch.stack([x.sum(dtype=apart.dtype) for x in seen]).detach()
    return losses, (rule.scale * scores).detach(), statistics, derivative


def _packed(logprobs: Tensor, given: Given) -> tuple[Tensor, Given]:
    """The same rollouts one after the other, where they are rows."""
    if logprobs.dim() == 1:
        return logprobs, given
    rollouts, width = logprobs.shape
    mask, ref_logprobs = (None if x is None else x.flatten() for x in (given.mask, given.ref_logprobs))
    offsets = width * torch.arange(rollouts + 1, device=logprobs.device)
    return logprobs.flatten(), given._replace(offsets=offsets, mask=mask, ref_logprobs=ref_logprobs)


def _rollouts(logprobs: Tensor, given: Given) -> tuple[Tensor, Tensor, Tensor]:
    """Of each rollout: the sum of what its score is made of, that of its log-probs, and its tokens, at least 1."""
    rows = [logprobs if given.ref_logprobs is None else logprobs - given.ref_logprobs, logprobs]
    if given.offsets is None:
        return *rows, torch.ones_like(logprobs)
    keep = torch.ones_like(logprobs, dtype=torch.bool) if given.mask is None else given.mask
    rows = torch.stack([torch.where(keep, x, 0.0) for x in (*rows, torch.ones_like(logprobs))])
    sums, totals, lengths = segment_sums(rows, given.offsets)
    return sums, totals, lengths.clamp(min=1)


def _sides(logprobs: Tensor, given: Given):
    """(rollouts of the chosen, where there is one), and of the rejected."""
    _, items = given.sizes(logprobs)
    every, there = torch.arange(items, device=logprobs.device), torch.ones(items, dtype=torch.bool).to(logprobs.device)
    if given.desirable is not None:
        return (every, given.desirable), (every, ~given.desirable)
    if given.chosen is None:
        return (every, there), (every + items, there)
    return (given.chosen, there), (given.rejected, there)


def _linked(margin, score_c, score_r, has_c, rule):
    """The loss of each margin and its derivatives to both scores."""
    if rule.link == ODDS:
        (log_p, log_rest), (log_q, log_other) = ((x, _log_one_less_exp(x)) for x in (score_c, score_r))
        odds = log_p - log_q - (log_rest - log_other)
        rest, other = (-torch.expm1(x) for x in (log_p, log_q))
        d_c = -rule.positive / ((log_p - log_q).exp() * other + rest)
        return rule.positive * _softplus(-odds), d_c, rule.positive / (other * (1 + odds.exp()))
    if rule.link == LOGISTIC:
        losses, d = rule.positive * _softplus(-margin), -rule.positive * torch.sigmoid(-margin)
        if rule.negative:
            losses, d = losses + rule.negative * _softplus(margin), d + rule.negative * torch.sigmoid(margin)
    elif rule.link == HINGE:
        losses, d = rule.positive * torch.relu(1 - margin), torch.where(margin < 1, -rule.positive, 0.0)
        d = torch.where(margin.isnan(), margin, d)
    elif rule.link == SQUARE:
        losses, d = rule.positive * margin.square(), 2 * rule.positive * margin
    else:
        weight = torch.where(has_c, rule.positive, rule.negative).to(margin.dtype)
        losses, d = weight * torch.sigmoid(-margin), -weight * torch.sigmoid(margin) * torch.sigmoid(-margin)
    return losses, rule.scale * d, -rule.scale * d


def _softplus(x):
    return -F.logsigmoid(-x)  # whose own form, F.softplus, leaves out what is below 2e-9


def _log_one_less_exp(x):
    return torch.where(x > -0.693, torch.log(-torch.expm1(x)), torch.log1p(-x.exp()))


def _triton(logprobs, given, rule):
    logprobs, given = _packed(logprobs, given)
    losses, rewards, derivative = _outputs(logprobs, given)
    statistics = preference_pairs.launch(logprobs, given, rule, (losses, rewards, derivative))
    return losses, rewards, statistics, derivative


def _cpu(logprobs, given, rule):
    from fuserl import _C

    losses, rewards, derivative = _outputs(logprobs, given)
    statistics = logprobs.new_empty(len(STATISTICS))
    link, mean, *numbers = rule
    outputs = losses, rewards, derivative, statistics
    _C.preference_loss(logprobs, given, link, mean, numbers, *outputs, torch.get_num_threads())
    return losses, rewards, statistics, derivative


def _outputs(logprobs, given):
    rollouts, items = given.sizes(logprobs)
    return logprobs.new_empty(items), logprobs.new_empty(rollouts), logprobs.new_empty((2, items))


IMPLS = {"triton": _triton, "cpu": _cpu, "reference": reference}


def _dispatch(logprobs, *arguments):
    *tensors, numbers, (link, mean), backend = arguments
    backend = choose("preference_loss", IMPLS, logprobs.device, backend)
    given = Given(*(None if x is None else x.contiguous() for x in tensors))
    if given.sizes(logprobs)[1] == 0:
        losses, rewards, derivative = (x.zero_() for x in _outputs(logprobs, given))
        return losses, rewards, logprobs.new_zeros(len(STATISTICS)), derivative
    return IMPLS[backend](logprobs.contiguous(), given, Rule(link, bool(mean), *numbers))


class Spread(NamedTuple):
    """How the derivatives of pairs become those of tokens: each of them None where the call had none."""

    offsets: Tensor | None
    mask: Tensor | None
    chosen: Tensor | None
    rejected: Tensor | None


def reference_gradient(g: Tensor, derivative: Tensor, spread: Spread, paired: bool, shape: torch.Size) -> Tensor:
    """The gradient to logprobs in torch, of g (P,) and the derivatives (2, P) that `reference` returned."""
    each = g * derivative
    if not paired:
        each = each.sum(0)
    elif spread.chosen is None:
        each = each.flatten()
    else:
        rollouts = shape[0] if spread.offsets is None else len(spread.offsets) - 1
        each = _added(each.flatten(), torch.cat([spread.chosen, spread.rejected]), rollouts)
    if spread.offsets is not None:
        each = to_tokens(each, spread.offsets, shape[0])
    if len(shape) == 2:
        each = each[:, None].expand(shape)
    return each.contiguous() if spread.mask is None else torch.where(spread.mask, each, 0.0)


def _added(values: Tensor, index: Tensor, size: int) -> Tensor:
    """Sums of values by index, for a rollout may be in many pairs; always in one order, on a GPU by a sort."""
    out = values.new_zeros(size)
    return out.index_put((index,), values, accumulate=True) if values.is_cuda else out.index_add(0, index, values)


def _cpu_gradient(g, derivative, spread, paired, shape):
    from fuserl import _C

    out = g.new_empty(shape)
    _C.preference_gradient(g.contiguous(), derivative, spread, paired, out, torch.get_num_threads())
    return out


GRADIENTS = {"triton": reference_gradient, "cpu": _cpu_gradient, "reference": reference_gradient}


def _dispatch_gradient(g, derivative, *arguments):
    *tensors, paired, shape, backend = arguments
    spread = Spread(*(None if x is None else x.contiguous() for x in tensors))
    backend = choose("preference_gradient", GRADIENTS, g.device, backend)
    return GRADIENTS[backend](g, derivative, spread, paired, shape)


def _fake_gradient(g, *arguments):
    return g.new_empty(arguments[-2])


_preference_gradient = register(
    "preference_gradient(Tensor g, Tensor derivative, Tensor? offsets, Tensor? mask, Tensor? chosen, Tensor? rejected, "
    "bool paired, SymInt[] shape, str? backend) -> Tensor",
    _dispatch_gradient,
    _fake_gradient,
)


def _setup_context(ctx, inputs, output):
    logprobs, offsets, mask, chosen, rejected, _, _, desirable, *_, backend = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.settings = desirable is None, logprobs.shape, backend
    ctx.save_for_backward(output[3], offsets, mask, chosen, rejected)


@torch.autograd.function.once_differentiable
def _autograd(ctx, g, *_):
    return _preference_gradient(g, *ctx.saved_tensors, *ctx.settings), *[None] * 11


def _fake(logprobs, *arguments):
    losses, rewards, derivative = _outputs(logprobs, Given(*arguments[:8]))
    return losses, rewards, logprobs.new_empty(len(STATISTICS)), derivative


_preference_loss = register(
    "preference_loss(Tensor logprobs, Tensor? offsets, Tensor? mask, Tensor? chosen, Tensor? rejected, "
    "Tensor? ref_logprobs, Tensor? margins, Tensor? desirable, Tensor? baseline, float[] numbers, int[] codes, "
    "str? backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _dispatch,
    _fake,
    keep=_setup_context,
    backward=_autograd,
)


def preference_loss(
    logprobs: Tensor, form: Form, *, offsets: Tensor | None = None, mask: Tensor | None = None,
    chosen: Tensor | None = None, rejected: Tensor | None = None, ref_logprobs: Tensor | None = None,
    margins: Tensor | None = None, desirable: Tensor | None = None, baseline: Tensor | float = 0.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss of each pair of rollouts, in the form of a published method, from the log-probs of their tokens.

        margin = scale (score of chosen - score of rejected) - shift - margins
        score  = sum, or mean where the form normalises by length, over a rollout of (logprobs - ref_logprobs)

    Args:
        logprobs: (N,) float32 or float64, tokens of R rollouts one after the other; or (R, T), padded; or (R,) scores
            without offsets: of a reward head, or sums or means of log-probs as the form takes them.
        form: one of `DPO`, `IPO`, `KTO`, `SimPO`, `ORPO`, `CPO`, `Hinge`, `BradleyTerry`, with its numbers.
        offsets: (R + 1,) int64, where each rollout begins, and N at the end. On GPU, where a check would wait, wrong
            ones give wrong numbers.
        mask: of logprobs' shape, bool; a False token counts for nothing and may be anything.
        chosen, rejected: (P,) int64, rollouts of each pair, which may be in several; None for the first half of the
            rollouts chosen, the second rejected. On GPU an index out of range gives NaN.
        ref_logprobs: of logprobs' shape, of the reference; asked for by DPO, IPO and KTO, refused by SimPO, ORPO, CPO
            and BradleyTerry, as either pleases Hinge and scores.
        margins: (P,), by how much a pair's margin must be larger (arXiv:2307.09288, eq. 2; 2402.10571).
        desirable: (R,) bool, for KTO alone: there are no pairs, and R losses.
        baseline: a number or (), what KTO holds a score against: the mean score of mismatched rollouts, at least 0.
        backend: "triton", "cpu" or "reference"; the fastest that runs here by default.

    Returns:
        (losses, rewards, statistics): (P,) or (R,), differentiable once in logprobs; (R,) scale times score, detached;
        (8,) sums over pairs, detached, in the order of STATISTICS, for `merged` and `named`.

    Raises:
        ValueError: on a wrong shape, dtype, device or number, and for a gradient asked of another input; on CPU also
            for offsets and indices out of range.

    Each pair's loss is good to its last digits at margins of any size; NaN shows in the loss of its pair and in the
    statistics. A rollout without tokens has score 0. Memory: two numbers a pair beside the losses.
    Sibling: `linear_logprob` makes logprobs without logits; `segment_sum` the sums alone.
    """
    rule = form.rule()
    if not isinstance(baseline, Tensor):
        baseline = None if desirable is None else logprobs.new_full((1,), baseline)
    else:
        baseline = baseline.reshape(1)
    given = Given(offsets, mask, chosen, rejected, ref_logprobs, margins, desirable, baseline)
    _check(logprobs, given, form, rule)
    link, mean, *numbers = rule
    return _preference_loss(logprobs, *given, numbers, [link, int(mean)], backend)[:3]


def _check(logprobs: Tensor, given: Given, form: Form, rule: Rule) -> None:
    dtype, device, padded = logprobs.dtype, logprobs.device, logprobs.dim() == 2
    if logprobs.dim() - padded != 1 or dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"preference_loss: logprobs must be (N,), (R, T) or (R,), float32 or float64; got {tuple(logprobs.shape)} "
            f"{dtype}. Flatten or convert them, with .float()."
        )
    if given.offsets is not None and (given.offsets.dim() != 1 or not given.offsets.shape[0]):
        raise ValueError(f"preference_loss: offsets must be (R + 1,); got {tuple(given.offsets.shape)}.")
    _agree(
        given.offsets is not None,
        given.offsets is not None and not padded,
        "offsets",
        "(R, T)",
        "A row begins a rollout.",
    )
    tokens = padded or given.offsets is not None
    name, kto = type(form).__name__, rule.link == SIGMOID
    _agree(given.desirable is not None, kto, "desirable", name, "It says on which side of the baseline a rollout is.")
    _agree(given.mask is not None, tokens and given.mask is not None, "mask", "scores", "It is of tokens.")
    if tokens and form.reference is not None:
        advice = "Give it, or another form." if form.reference else "Leave it out, or take another form."
        _agree(given.ref_logprobs is not None, form.reference, "ref_logprobs", name, advice)
    _agree(given.rejected is not None, given.chosen is not None, "rejected", "chosen", "Give both or none.")
    if kto:
        _agree(given.chosen is not None, False, "chosen", name, "Its rollouts have no pairs.")
    if rule.nll and not (tokens or rule.mean):
        raise ValueError(
            f"preference_loss: nll of {name} must be 0 for scores; got {rule.nll}. Give tokens and offsets."
        )
    rollouts, items = given.sizes(logprobs)
    if not kto and given.chosen is None and rollouts % 2:
        raise ValueError(f"preference_loss: rollouts must be even without chosen and rejected; got {rollouts}.")
    wanted = {
        "offsets": ((rollouts + 1,), torch.int64), "mask": (logprobs.shape, torch.bool),
        "chosen": ((items,), torch.int64), "rejected": ((items,), torch.int64),
        "ref_logprobs": (logprobs.shape, dtype), "margins": ((items,), dtype),
        "desirable": ((rollouts,), torch.bool), "baseline": ((1,), dtype),
    }  # fmt: skip
    for name, x in given._asdict().items():
        if x is not None and (x.shape != wanted[name][0] or x.dtype != wanted[name][1] or x.device != device):
            raise ValueError(
                f"preference_loss: {name} must be {tuple(wanted[name][0])} {wanted[name][1]} on {device}; got "
                f"{tuple(x.shape)} {x.dtype} on {x.device}. Convert it, or check which tensor was passed."
            )
        if x is not None and x.requires_grad:
            raise ValueError(f"preference_loss: {name} must not require a gradient; got one that does. Detach it.")


def _agree(given: bool, wanted: bool, argument: str, other: str, advice: str) -> None:
    """Raise unless an argument is there exactly where it is `wanted`."""
    if given != wanted:
        said = ("given", "None") if wanted else ("None", "a tensor")
        raise ValueError(f"preference_loss: {argument} must be {said[0]} for {other}; got {said[1]}. {advice}")
