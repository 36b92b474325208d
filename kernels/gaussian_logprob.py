"""Log-probability of actions under a diagonal normal distribution, its entropy, and its KL divergence from a reference.

    z = (actions - mean) / std        w = (mean - ref_mean) / ref_std        t = log std - log ref_std

    logprob = -sum_d (z^2 / 2 + log std + log(2 pi) / 2)
    entropy =  sum_d (log std + log(2 pi e) / 2)
    kl      =  sum_d (expm1(2 t) - 2 t + w^2) / 2        of the policy from the reference, KL(policy || reference)

    dactions = -g z / std                                dref_mean    = -g_kl w / ref_std
    dmean    =  g z / std + g_kl w / ref_std             dref_log_std = -g_kl (expm1(2 t) + w^2)
    dlog_std =  g (z^2 - 1) + g_entropy + g_kl expm1(2 t)

with g of logprob; of a standard deviation itself those of its logarithm over it. One read of the inputs forward, one
backward, which writes the gradients that are wanted: nothing is kept in between. Scales stay as small as they are
given, and their gradients are summed to that size at once.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fuserl.kernels.dispatch import choose
from fuserl.kernels.gaussian_inputs import Given, check, given_rows, scales_of, widened
from fuserl.kernels.registration import register

__all__ = ["GaussianLogprob", "gaussian_logprob"]

_HALF_LOG_2PI = math.log(2 * math.pi) / 2


class GaussianLogprob(NamedTuple):
    """What is known of each action, (...); None for what was not asked for."""

    logprob: Tensor
    entropy: Tensor | None
    kl: Tensor | None


def reference(given: Given) -> tuple[Tensor, Tensor, Tensor | None]:
    """The definition, in plain torch: log-probs, entropies, and divergences where there is a reference; each (N,)."""
    *tensors, mask, logs = given
    if mask is not None:
        fills = 0.0, 0.0, 1.0 - logs, 0.0, 1.0 - logs
        tensors = [x if x is None else torch.where(mask, x, fill) for x, fill in zip(tensors, fills, strict=True)]
    actions, mean, scale, ref_mean, ref_scale = tensors
    keep = torch.ones_like(actions, dtype=torch.bool) if mask is None else mask.expand_as(actions)
    std, log_std = _std_and_log(scale, logs)
    terms = [-((actions - mean) / std).square() / 2 - log_std - _HALF_LOG_2PI, log_std + _HALF_LOG_2PI + 0.5]
    if ref_mean is not None:
        ref_std, ref_log_std = _std_and_log(ref_scale, logs)
        t = log_std - ref_log_std
        terms.append((torch.expm1(2 * t) - 2 * t + ((mean - ref_mean) / ref_std).square()) / 2)
    sums = [torch.where(keep, x, 0.0).sum(-1) for x in terms]
    return sums[0], sums[1], sums[2] if ref_mean is not None else None


def _std_and_log(scale: Tensor, logs: bool) -> tuple[Tensor, Tensor]:
    return (scale.exp(), scale) if logs else (scale, scale.log())


def _reference_forward(given, wanted):
    return [x if want else None for x, want in zip(reference(given), wanted, strict=True)]


def _reference_backward(given, g, wanted):
    leaves = [x if x is None else x.detach().requires_grad_(want) for x, want in zip(given, wanted, strict=False)]
    asked = torch.stack([x != 0 for x in g if x is not None]).any(0)[:, None]
    mask = asked.expand_as(given.actions) if given.mask is None else asked & given.mask
    with torch.enable_grad():
        results = reference(Given(*leaves, mask, given.logs))
    outputs, above = zip(*[(x, each) for x, each in zip(results, g, strict=True) if each is not None], strict=True)
    needed = [x for x, want in zip(leaves, wanted, strict=True) if want]
    found = iter(torch.autograd.grad(outputs, needed, above, allow_unused=True, materialize_grads=True))
    return [next(found) if want else None for want in wanted]


def _cpu_forward(given, wanted):
    from fuserl import _C

    actions, mean, scale, *others, logs = given
    out = [mean.new_empty(mean.shape[0]) if want else None for want in wanted]
    _C.gaussian_logprob_forward(actions, mean, scale, others, logs, out, torch.get_num_threads())
    return out


def _cpu_backward(given, g, wanted):
    from fuserl import _C

    actions, mean, scale, *others, logs = given
    out = [torch.empty_like(x) if want else None for x, want in zip(given, wanted, strict=False)]
    _C.gaussian_logprob_backward(actions, mean, scale, others, logs, g, out, torch.get_num_threads())
    return out


def _triton_forward(given, wanted):
    from fuserl.kernels.gaussian_tiles import forward

    return forward(given, wanted)


def _triton_backward(given, g, wanted):
    from fuserl.kernels.gaussian_tiles import backward

    return backward(given, g, wanted)


IMPLS = {
    "triton": (_triton_forward, _triton_backward),
    "cpu": (_cpu_forward, _cpu_backward),
    "reference": (_reference_forward, _reference_backward),
}


def _counted(given):
    """What the mean over dimensions divides by."""
    return given.actions.shape[1] if given.mask is None else given.mask.sum(-1).clamp(min=1)


def _results(tensors, codes, backend):
    logs, average, entropy = codes
    given, shape = given_rows(tensors, logs), tensors[0].shape[:-1]
    results = IMPLS[backend][0](given, (True, bool(entropy), given.ref_mean is not None))
    if average:
        count = _counted(given)
        results = [None if x is None else x / count for x in results]
    return [x if x is None or x.shape == shape else x.view(shape) for x in results]


def _gradients(tensors, g, codes, wanted, backend):
    """Of the first five of the inputs, None where not wanted, and what comes from above `g` is None for 0."""
    logs, average, _ = codes
    given = given_rows(tensors, logs)
    g = [x if x is None else x.contiguous().view(-1) for x in g]
    if average:
        count = _counted(given)
        g = [None if x is None else x / count for x in g]
    found = IMPLS[backend][1](given, g, wanted)
    pairs = zip(found, tensors, strict=False)
    return [x if x is None or x.shape == like.shape else x.view(like.shape) for x, like in pairs]


def _forward(*inputs):
    *tensors, codes, backend = inputs
    backend = choose("gaussian_logprob", IMPLS, tensors[0].device, backend)
    return tuple(tensors[0].new_empty(0) if x is None else x for x in _results(tensors, codes, backend))


def _backward(*inputs):
    *tensors, g_logprob, g_entropy, g_kl, codes, wanted, backend = inputs
    backend = choose("gaussian_logprob", IMPLS, tensors[0].device, backend)
    found = _gradients(tensors, (g_logprob, g_entropy, g_kl), codes, wanted, backend)
    return [x for x in found if x is not None]


def _setup_context(ctx, inputs, output):
    *tensors, ctx.codes, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)
    wanted = ctx.codes[2], tensors[3] is not None
    ctx.mark_non_differentiable(*[x for x, want in zip(output[1:], wanted, strict=True) if not want])


@torch.autograd.function.once_differentiable
def _autograd(ctx, *g):
    found = [None] * len(ctx.needs_input_grad)
    wanted = [need and (i < 3 or g[2] is not None) for i, need in enumerate(ctx.needs_input_grad[:5])]
    if any(wanted) and any(x is not None for x in g):
        gradients = iter(_gaussian_logprob_backward(*ctx.saved_tensors, *g, ctx.codes, wanted, ctx.backend))
        found[:5] = [next(gradients) if want else None for want in wanted]
    return tuple(found)


def _fake_forward(actions, mean, scale, ref_mean, ref_scale, mask, codes, backend):
    wanted = True, codes[2], ref_mean is not None
    return tuple(actions.new_empty(actions.shape[:-1] if want else 0) for want in wanted)


def _fake_backward(*arguments):
    wanted = arguments[-2]
    return [x.new_empty(x.shape) for x, want in zip(arguments[:5], wanted, strict=True) if want]


_INPUTS = "Tensor actions, Tensor mean, Tensor scale, Tensor? ref_mean, Tensor? ref_scale, Tensor? mask"
_gaussian_logprob = register(
    f"gaussian_logprob({_INPUTS}, int[] codes, str? backend) -> (Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
    keep=_setup_context,
    backward=_autograd,
)
_gaussian_logprob_backward = register(
    f"gaussian_logprob_backward({_INPUTS}, Tensor? g_logprob, Tensor? g_entropy, Tensor? g_kl, int[] codes, "
    "bool[] wanted, str? backend) -> Tensor[]",
    _backward,
    _fake_backward,
)


def gaussian_logprob(
    actions: Tensor,
    mean: Tensor,
    log_std: Tensor | None = None,
    *,
    std: Tensor | float | None = None,
    ref_mean: Tensor | None = None,
    ref_log_std: Tensor | None = None,
    ref_std: Tensor | float | None = None,
    mask: Tensor | None = None,
    average: bool = False,
    entropy: bool = False,
    backend: str | None = None,
) -> GaussianLogprob:
    """Log-probability of actions under a diagonal normal policy, its entropy, and its KL divergence from a reference.

        logprob = -sum_d ((actions - mean)^2 / (2 std^2) + log std + log(2 pi) / 2)
        entropy =  sum_d (log std + log(2 pi e) / 2)
        kl      =  sum_d (std^2 / ref_std^2 - 1 - 2 log(std / ref_std) + (mean - ref_mean)^2 / ref_std^2) / 2

    Args:
        actions: (..., D) float32 or float64; 16 bits are widened to float32, here and below. D > 0.
        mean: (..., D), the policy's, for each action.
        log_std: logarithm of the policy's standard deviation, broadcastable to the actions: (..., D), (D,) for every
            state, (..., 1) for every dimension, (). Of another shape, (T, 1, D) say, it is expanded to the rows.
        std: the standard deviation itself instead, or a number; where it is not positive there is no density: NaN or
            infinity shows.
        ref_mean: (..., D) of the reference; given, kl is there.
        ref_log_std, ref_std: as log_std and std, in the one of these two forms that the policy's scale has; None for
            the policy's own, gradient and all.
        mask: (..., D) or (D,) bool; a False dimension has no part and gradient 0, and may hold anything.
        average: means over the dimensions that the mask keeps, not sums; of none, 0.
        entropy: return it, too.
        backend: "triton", "cpu" or "reference"; the fastest that runs here by default.

    Returns:
        GaussianLogprob(logprob, entropy, kl), each (...) in float32 (float64 from float64), or None where not asked
        for; each is differentiable once in every tensor but the mask, the reference's, too: detach what is data. kl is
        at least 0, and exactly 0 where the two agree; a small one has as many digits as a large one.

    Raises:
        ValueError: on a wrong shape, dtype, device or combination.

    A row to which nothing comes from above has gradients of 0, whatever it holds. Memory: none beside results and
    gradients; a gradient of a scale for all rows takes 32 rows of sums.

    Source: sums over dimensions and denoising steps, DPPO (arXiv:2409.00588); means, the code of DDPO (2305.13301).
    Sibling: `policy_loss` takes these log-probs, old_logprobs and all.
    """
    actions, mean = widened(actions), widened(mean)
    ref_mean = ref_mean if ref_mean is None else widened(ref_mean)
    check(actions, mean, ref_mean, mask)
    logs, scale, ref_scale = scales_of(actions, log_std, std, ref_mean, ref_log_std, ref_std)
    codes = [int(logs), int(average), int(entropy)]
    found = _gaussian_logprob(actions, mean, scale, ref_mean, ref_scale, mask, codes, backend)
    return GaussianLogprob(found[0], found[1] if entropy else None, None if ref_mean is None else found[2])
