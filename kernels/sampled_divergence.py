"""Divergence of the policy from a reference, estimated from the log-probs of sampled tokens, and its gradient.

    d = logprobs - ref_logprobs, held to [-clamp, clamp]

    samples of the policy: estimates of KL(policy || reference)
    kind   value           gradient to logprobs
    k1     d               1
    k2     d^2 / 2         d
    k3     e^-d - 1 + d    1 - e^-d
    k1+    as k1           d
    k3+    as k3           d

    samples of the reference: f(e^d), where f(u) = F(u, 1) has the summand F of divergence_terms; gradient e^d f'(e^d)

One pass writes values and derivatives: small differences keep their digits, which e^-d - 1 + d as it reads would lose.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fuserl.kernels import divergence_terms
from fuserl.kernels.dispatch import choose
from fuserl.kernels.divergence_terms import TERMS, Rule, near_zero, reference_terms, triton_terms
from fuserl.kernels.jit import tl, triton
from fuserl.kernels.registration import register

__all__ = ["ESTIMATORS", "sampled_divergence"]

# Of samples of the policy: which value, and whether the gradient is that of k2.
ESTIMATORS = {"k1": (1, False), "k2": (2, False), "k3": (3, False), "k1+": (1, True), "k3+": (3, True)}
LAUNCH = {"BLOCK": 512, "num_warps": 4, "enable_fp_fusion": True}


def reference(
    logprobs: Tensor, ref_logprobs: Tensor, estimator: int, score: bool, rule: Rule, clamp: float
) -> tuple[Tensor, Tensor]:
    """Values and derivatives: the definition, in plain torch; estimator 0 is the generator of `rule`."""
    d = logprobs - ref_logprobs
    inside = d.clamp(-clamp, clamp)
    if estimator == 0:
        ratio = inside.clamp_max(1e30)  # its exponential is infinite as well
        value, derivative, _ = (rule.scale * x for x in reference_terms(ratio, torch.zeros_like(d), rule))
    else:
        value = (inside, inside.square() / 2, torch.expm1(-inside) + inside)[estimator - 1]
        derivative = (torch.ones_like(d), inside, -torch.expm1(-inside))[1 if score else estimator - 1]
    flat = (inside != d) | (value == torch.inf)
    undefined = d.isnan()
    return tuple(x.masked_fill(undefined, torch.nan) for x in (value, derivative.masked_fill(flat, 0.0)))


@triton.jit(do_not_specialize=["N"])
def _kernel(
    logprob_ptr, ref_ptr, value_ptr, derivative_ptr, N, parameter: tl.float64, scale: tl.float64, clamp: tl.float64,
    ESTIMATOR: tl.constexpr, SCORE: tl.constexpr, KIND: tl.constexpr, TERMS: tl.constexpr, LOG_TERMS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Values and derivatives of BLOCK samples."""
    dtype: tl.constexpr = value_ptr.dtype.element_ty
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < N
    d = tl.load(logprob_ptr + at, inside, other=0.0) - tl.load(ref_ptr + at, inside, other=0.0)
    bound = tl.full([BLOCK], clamp, dtype)
    low, high = d < -bound, d > bound
    held = tl.where(low, -bound, tl.where(high, bound, d))
    if ESTIMATOR == 0:
        zero = tl.zeros([BLOCK], dtype)
        one = tl.full([BLOCK], 1.0, dtype)
        parameters = tl.full([BLOCK], parameter, dtype)
        ratio = tl.minimum(held, 1e30)  # its exponential is infinite as well
        value, derivative, _ = triton_terms(tl.exp(ratio), one, ratio, zero, ratio, parameters, KIND, TERMS, LOG_TERMS)
        scales = tl.full([BLOCK], scale, dtype)
        value, derivative = value * scales, derivative * scales
    else:
        near_one, near_rest = near_zero(-held, TERMS)
        close = tl.abs(held) < 1.0
        less_one = tl.where(close, near_one, tl.exp(-held) - 1.0)
        if ESTIMATOR == 1:
            value, derivative = held, tl.full([BLOCK], 1.0, dtype)
        elif ESTIMATOR == 2:
            value, derivative = 0.5 * held * held, held
        else:
            value, derivative = tl.where(close, near_rest, less_one + held), -less_one
        if SCORE:
            derivative = held
    tl.store(value_ptr + at, tl.where(d == d, value, d), inside)
    if derivative_ptr is not None:
        flat = low | high | (value == float("inf"))
        tl.store(derivative_ptr + at, tl.where(d == d, tl.where(flat, 0.0, derivative), d), inside)


def _triton(logprobs, ref_logprobs, estimator, score, rule, clamp, with_derivative):
    values, derivative = _outputs(logprobs, with_derivative)
    with torch.cuda.device_of(logprobs):
        _kernel[(triton.cdiv(logprobs.numel(), LAUNCH["BLOCK"]),)](
            logprobs, ref_logprobs, values, derivative, logprobs.numel(), rule.parameter, rule.scale, clamp,
            ESTIMATOR=estimator, SCORE=score, KIND=rule.kind, **TERMS[logprobs.dtype], **LAUNCH,
        )  # fmt: skip
    return values, derivative


def _cpu(logprobs, ref_logprobs, estimator, score, rule, clamp, with_derivative):
    from fuserl import _C

    values, derivative = _outputs(logprobs, with_derivative)
    samples = logprobs, ref_logprobs, estimator, score, *rule, clamp, values, derivative
    _C.sampled_divergence(*samples, torch.get_num_threads())
    return values, derivative


def _reference(*arguments):
    *arguments, with_derivative = arguments
    values, derivative = reference(*arguments)
    return values, derivative if with_derivative else None


def _outputs(logprobs, with_derivative):
    return torch.empty_like(logprobs), torch.empty_like(logprobs) if with_derivative else None


IMPLS = {"triton": _triton, "cpu": _cpu, "reference": _reference}


def _dispatch(logprobs, ref_logprobs, estimator, score, *settings):
    *rule, clamp, with_derivative, backend = settings
    backend = choose("sampled_divergence", IMPLS, logprobs.device, backend)
    flat = [x.reshape(-1).contiguous() for x in (logprobs, ref_logprobs)]
    if logprobs.numel():
        found = IMPLS[backend](*flat, estimator, score, Rule(*rule), clamp, with_derivative)
    else:
        found = _outputs(flat[0], with_derivative)
    values, derivative = found
    return values.view(logprobs.shape), derivative.view(logprobs.shape) if with_derivative else values.new_empty(0)


def _setup_context(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


@torch.autograd.function.once_differentiable
def _autograd(ctx, g, _):
    return g * ctx.saved_tensors[0], *[None] * 9


def _fake(logprobs, *arguments):
    with_derivative = arguments[-2]
    return logprobs.new_empty(logprobs.shape), logprobs.new_empty(logprobs.shape if with_derivative else 0)


_sampled_divergence = register(
    "sampled_divergence(Tensor logprobs, Tensor ref_logprobs, int estimator, bool score, int kind, float parameter, "
    "float scale, float clamp, bool with_derivative, str? backend) -> (Tensor, Tensor)",
    _dispatch,
    _fake,
    keep=_setup_context,
    backward=_autograd,
)


def sampled_divergence(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    kind: str,
    *,
    beta: float = 0.5,
    alpha: float = 0.5,
    clamp: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Estimate, per sampled token, of the policy's divergence from a reference, with d = logprobs - ref_logprobs.

        samples of the policy, for KL(policy || reference):
            k1 = d        k2 = d^2 / 2        k3 = e^-d - 1 + d        k1+, k3+: their values, the gradient of k2
        samples of the reference, f(e^d) for any kind of `divergence`:
            forward_kl: e^d - 1 - d           reverse_kl: e^d (d - 1) + 1            chi_squared: (e^d - 1)^2     ...

    Which are right on average: k1, k3, k1+ and k3+ in value; k2, k1+ and k3+ in gradient, which is d times the score
    (that of k1 is 0 on average, that of k3 is forward_kl's); for samples of the reference both, of every kind.

    Args:
        logprobs: (...) float32 or float64, of the policy; the only input that may require a gradient.
        ref_logprobs: (...) of that dtype, of the reference.
        kind: one of ESTIMATORS for samples of the policy, of `divergence`'s KINDS for samples of the reference.
        beta: of jensen_shannon, as in `divergence`.
        alpha: of alpha, as in `divergence`.
        clamp: positive: d is held to [-clamp, clamp] first, so that one token cannot rule the batch; beyond, the value
            is that at the bound and the gradient 0, and no estimate is right on average. None for no clamp.
        backend: "triton", "cpu" or "reference"; the fastest that runs here by default.

    Returns:
        (...) of logprobs' dtype, differentiable once in logprobs.

    Raises:
        ValueError: on a wrong shape, dtype, device, name or number, and for a gradient asked of ref_logprobs.

    A value that overflows is infinite and its gradient 0; NaN shows in both. Memory: one number per token beside the
    values, none without a gradient.
    Source: k1 to k3: Schulman, Approximating KL divergence (2020). k1+ and k3+ are named as in verl.
    Sibling: `divergence` sums over the vocabulary, where there is nothing to estimate.
    """
    _check(logprobs, ref_logprobs)
    if clamp is not None and not clamp > 0:
        raise ValueError(f"sampled_divergence: clamp must be positive; got {clamp}. Use None for no clamp.")
    estimator, score = ESTIMATORS.get(kind, (0, False))
    if estimator:
        rule = Rule(0, 0.0, 1.0)
    elif kind in divergence_terms.KINDS:
        rule = divergence_terms.rule("sampled_divergence", kind, beta, alpha)
    else:
        names = ", ".join((*ESTIMATORS, *divergence_terms.KINDS))
        raise ValueError(f"sampled_divergence: kind must be one of {names}; got {kind!r}. Correct the name.")
    bound = math.inf if clamp is None else float(clamp)
    with_derivative = logprobs.requires_grad and torch.is_grad_enabled()
    numbers = estimator, score, *rule, bound, with_derivative, backend
    return _sampled_divergence(logprobs, ref_logprobs, *numbers)[0]


def _check(logprobs: Tensor, ref_logprobs: Tensor) -> None:
    if logprobs.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"sampled_divergence: logprobs must be float32 or float64; got {logprobs.dtype}. A log-probability of 16 "
            "bits cannot hold a ratio: compute them in float32."
        )
    same = ref_logprobs.shape == logprobs.shape and ref_logprobs.dtype == logprobs.dtype
    if not same or ref_logprobs.device != logprobs.device:
        raise ValueError(
            f"sampled_divergence: ref_logprobs must be {tuple(logprobs.shape)} {logprobs.dtype} on {logprobs.device}; "
            f"got {tuple(ref_logprobs.shape)} {ref_logprobs.dtype} on {ref_logprobs.device}. Convert it to match "
            "logprobs."
        )
    if ref_logprobs.requires_grad:
        raise ValueError(
            "sampled_divergence: ref_logprobs must not require a gradient; got one that does. Pass it detached."
        )
