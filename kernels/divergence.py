"""Divergence of each token's whole distribution from another's, from two sets of logits.

    p = softmax(logits_p / temperature)        q = softmax(logits_q / temperature_q)

    divergence[n] = sum_v F(p, q)              entropy[n] = -sum_v p log p
    dz_p[n, v]    = g (p dF/dp - p sum_u p dF/dp) - g_entropy p (log p + entropy)
    dz_q[n, v]    = g (q dF/dq - q sum_u q dF/dq)

F of every kind is in divergence_terms, the kernels in divergence_rows. Two reads of both logits forward, the second
from the cache on a CPU; one read and one write backward, over the logits of p themselves when told so.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fuserl.kernels.dispatch import choose
from fuserl.kernels.divergence_rows import IMPLS, STATISTICS, reference
from fuserl.kernels.divergence_terms import KINDS, Rule, rule
from fuserl.kernels.registration import register
from fuserl.kernels.token_logprob import put_back, row_temperatures, rows_of

__all__ = ["IMPLS", "KINDS", "divergence", "reference"]


def _forward(logits_p, logits_q, temperatures, kind, parameter, scale, inplace, backend):
    backend = choose("divergence", IMPLS, logits_p.device, backend)
    rows, rule = (rows_of(logits_p), rows_of(logits_q)), Rule(kind, parameter, scale)
    shape, N = logits_p.shape[:-1], temperatures.shape[1]
    kept = IMPLS[backend][0](*rows, temperatures, rule) if N else temperatures.new_empty((STATISTICS, 0))
    return kept[0].view(shape).clone(), kept[1].view(shape).clone(), kept


def _backward(logits_p, logits_q, *arguments):
    out = torch.empty_like(logits_p, memory_format=torch.contiguous_format)
    return out, _write_gradient(out, logits_p, logits_q, *arguments)


def _backward_(logits_p, logits_q, *arguments):
    return _write_gradient(logits_p, logits_p, logits_q, *arguments)


def _write_gradient(out, logits_p, logits_q, temperatures, kept, g, *settings):
    *rule, wanted_q, backend = settings
    backend = choose("divergence", IMPLS, logits_p.device, backend)
    out_q = torch.empty_like(logits_q, memory_format=torch.contiguous_format) if wanted_q else None
    if temperatures.numel():
        rows = rows_of(logits_p), rows_of(logits_q), temperatures, kept, g.flatten(1)
        into = rows_of(out)
        IMPLS[backend][1](*rows, Rule(*rule), into, rows_of(out_q) if wanted_q else None)
        put_back(into, out)
    return out_q if wanted_q else logits_q.new_empty(0)


def _setup_context(ctx, inputs, output):
    *tensors, kind, parameter, scale, ctx.inplace, ctx.backend = inputs
    ctx.rule = kind, parameter, scale
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(*tensors, output[2])


def _autograd(ctx, g_divergence, g_entropy, _g_kept):
    tensors, g = ctx.saved_tensors, torch.stack([g_divergence, g_entropy])
    arguments = *tensors, g, *ctx.rule, ctx.needs_input_grad[1], ctx.backend
    if ctx.inplace:
        d_p, d_q = tensors[0], _divergence_backward_(*arguments)
        torch.autograd.graph.increment_version(d_p)  # so that whoever saved them too learns that they are gone
    else:
        d_p, d_q = _divergence_backward(*arguments)
    return d_p, d_q if ctx.needs_input_grad[1] else None, *[None] * 6


_ROWS = "Tensor logits_p, Tensor logits_q, Tensor temperatures"
_RULE = "int kind, float parameter, float scale"
_GRADIENTS = f"Tensor kept, Tensor g, {_RULE}, bool wanted_q, str? backend"


def _fake_forward(logits_p, logits_q, temperatures, *_):
    divergence, entropy = (temperatures.new_empty(logits_p.shape[:-1]) for _ in range(2))
    return divergence, entropy, temperatures.new_empty((STATISTICS, temperatures.shape[1]))


def _fake_backward(logits_p, *arguments):
    return torch.empty_like(logits_p, memory_format=torch.contiguous_format), _fake_backward_(logits_p, *arguments)


def _fake_backward_(logits_p, logits_q, *arguments):
    wanted_q = arguments[-2]
    return torch.empty_like(logits_q, memory_format=torch.contiguous_format) if wanted_q else logits_q.new_empty(0)


_divergence = register(
    f"divergence({_ROWS}, {_RULE}, bool inplace_backward, str? backend) -> (Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
    keep=_setup_context,
    backward=_autograd,
)
_divergence_backward = register(
    f"divergence_backward({_ROWS}, {_GRADIENTS}) -> (Tensor, Tensor)", _backward, _fake_backward
)
_divergence_backward_ = register(
    f"divergence_backward_({_ROWS.replace('Tensor', 'Tensor(a!)', 1)}, {_GRADIENTS}) -> Tensor",
    _backward_,
    _fake_backward_,
)


def divergence(
    logits_p: Tensor,
    logits_q: Tensor,
    kind: str,
    *,
    beta: float = 0.5,
    alpha: float = 0.5,
    temperature: float | Tensor = 1.0,
    temperature_q: float | Tensor | None = None,
    detach_q: bool = True,
    inplace_backward: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Divergence of each token's whole distribution p from another's, q, and the entropy of p, from logits.

        forward_kl          KL(q || p) = sum_v q log (q / p)
        reverse_kl          KL(p || q) = sum_v p log (p / q)
        jensen_shannon      beta KL(q || m) + (1 - beta) KL(p || m),  m = beta q + (1 - beta) p
        alpha               (sum_v p^alpha q^(1 - alpha) - 1) / (alpha (alpha - 1))
        total_variation     sum_v |p - q| / 2
        squared_hellinger   sum_v (sqrt(p) - sqrt(q))^2 / 2
        chi_squared         sum_v (p - q)^2 / q

    p is the policy or student, q the reference or teacher; forward and reverse are said as GKD and TRL say them.

    Args:
        logits_p: (..., V) float32, bfloat16, float16 or float64; any strides. -inf marks a token that cannot be drawn.
        logits_q: of that shape; another dtype is fine, but float64 goes with float64 only.
        kind: one of KINDS, as above; each in nats or without unit, at least 0, and 0 where p == q.
        beta: of jensen_shannon, between 0 and 1. TRL's beta 0 and 1 are forward_kl and reverse_kl.
        alpha: of alpha, finite; 0 and 1 are forward_kl and reverse_kl, which it tends to.
        temperature: of p; positive number, or one per row, broadcastable to the rows; not differentiable.
        temperature_q: of q; None for the same.
        detach_q: take logits_q as data; False for its gradient, too.
        inplace_backward: write the gradient over `logits_p`, which must then have no other use; saves a tensor of their
            size. A second backward through them raises.
        backend: "triton", "cpu" or "reference"; the fastest that runs here by default.

    Returns:
        (divergence, entropy), each of the rows' shape, float32 (float64 from float64 logits), differentiable once.

    Raises:
        ValueError: on a wrong shape, dtype, temperature, name or number.

    0 log 0 is 0. A token that p has and q lacks makes reverse_kl, chi_squared and alpha >= 1 infinite, one that q has
    and p lacks forward_kl and alpha <= 0; overflow does, too. An infinite divergence passes no gradient on: it shows in
    the value, and the row's gradient is 0. A row with NaN, +inf or nothing but -inf is NaN, and its gradient too unless
    what comes from above is 0. At equal probabilities total_variation takes the subgradient 0.

    Memory: eight numbers a row forward; backward one tensor of the logits' size for each gradient, none in place.
    Source: GKD (arXiv:2306.13649, eq. 1); Amari's alpha-divergence.
    Sibling: `sampled_divergence` needs only the chosen tokens' log-probs, `topk_divergence` the teacher's best tokens.
    """
    _check(logits_p, logits_q)
    chosen = rule("divergence", kind, beta, alpha)
    temperature_q = temperature if temperature_q is None else temperature_q
    temperatures = torch.stack([row_temperatures("divergence", t, logits_p) for t in (temperature, temperature_q)])
    logits_q = logits_q.detach() if detach_q else logits_q
    result = _divergence(logits_p, logits_q, temperatures, *chosen, inplace_backward, backend)
    return result[0], result[1]


def _check(logits_p: Tensor, logits_q: Tensor) -> None:
    for name, logits in (("logits_p", logits_p), ("logits_q", logits_q)):
        if not logits.is_floating_point() or logits.dim() == 0 or logits.shape[-1] == 0:
            raise ValueError(
                f"divergence: {name} must be (..., V) of a floating dtype; got {tuple(logits.shape)} {logits.dtype}. "
                "Pass the model's raw logits."
            )
    double = logits_p.dtype == torch.float64
    if logits_q.shape != logits_p.shape or logits_q.device != logits_p.device:
        raise ValueError(
            f"divergence: logits_q must be {tuple(logits_p.shape)} on {logits_p.device} like logits_p; got "
            f"{tuple(logits_q.shape)} on {logits_q.device}. Cut both to the vocabulary that they share."
        )
    if (logits_q.dtype == torch.float64) != double:
        raise ValueError(
            f"divergence: logits must both be float64 or neither; got {logits_p.dtype} and {logits_q.dtype}. Convert "
            "one with .to()."
        )
