"""Log-probability and entropy of the chosen token, from logits.

With z = logits / temperature and p = softmax(z):

    logprob[n] = z[n, ids[n]] - lse(z[n])          entropy[n] = -sum_v p[n, v] log p[n, v]
    dz[n, v]   = g_logprob (1[v = ids[n]] - p) - g_entropy p (log p + entropy)

One read of the logits forward; one read and one write backward, over the logits themselves when told so.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fuserl.kernels import softmax_rows
from fuserl.kernels.dispatch import choose
from fuserl.kernels.registration import register

__all__ = ["token_logprob"]


def reference(logits: Tensor, ids: Tensor, temperature: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
    """The definition, in plain torch."""
    if isinstance(temperature, Tensor):
        temperature = temperature.unsqueeze(-1)
    z = (logits if logits.dtype == torch.float64 else logits.float()) / temperature
    logp = z.log_softmax(-1)
    finite = logp.masked_fill(logp == -torch.inf, 0.0)
    return logp.gather(-1, ids.unsqueeze(-1)).squeeze(-1), -(logp.exp() * finite).sum(-1)


def _forward(logits, ids, row_temperature, temperature, inplace, backend):
    backend = choose("token_logprob", IMPLS, logits.device, backend)
    flat = ids.reshape(-1).contiguous()
    statistics = softmax_rows.forward(rows_of(logits), flat, temperature, row_temperature, 4, backend)
    return statistics[0].view(ids.shape).clone(), statistics[1].view(ids.shape).clone(), statistics[1:].clone()


def _backward(logits, *arguments):
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    _write_gradient(out, logits, *arguments)
    return out


def _backward_(logits, *arguments):
    _write_gradient(logits, logits, *arguments)


def _write_gradient(out, logits, ids, row_temperature, temperature, kept, g, backend):
    backend = choose("token_logprob", IMPLS, logits.device, backend)
    (g_logprob, g_entropy), zero = g.flatten(1), torch.zeros_like(kept[0])
    coefficients = torch.stack([zero, -g_logprob - g_entropy * kept[0], -g_entropy, zero, g_logprob])
    rows, into = (rows_of(logits), ids.reshape(-1).contiguous(), kept[1:], coefficients), rows_of(out)
    softmax_rows.gradient(*rows, temperature, row_temperature, into, backend)
    put_back(into, out)


def rows_of(logits: Tensor) -> Tensor:
    """A (A, R, V) view of logits with any leading dimensions; a copy only where strides allow no such view."""
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    if logits.dim() < 3:
        return logits.reshape(1, -1, logits.shape[-1])
    return logits.flatten(0, -3)


def put_back(rows: Tensor, logits: Tensor) -> None:
    """Bring what was written to `rows_of(logits)` to the logits, where it is a copy."""
    if rows.data_ptr() != logits.data_ptr():
        logits.copy_(rows.view(logits.shape))


def _setup_context(ctx, inputs, output):
    logits, ids, row_temperature, ctx.temperature, ctx.inplace, ctx.backend = inputs
    ctx.save_for_backward(logits, ids, row_temperature, output[2])


def _autograd(ctx, g_logprob, g_entropy, _g_kept):
    logits, ids, row_temperature, kept = ctx.saved_tensors
    arguments = logits, ids, row_temperature, ctx.temperature, kept, torch.stack([g_logprob, g_entropy]), ctx.backend
    if not ctx.inplace:
        return _token_logprob_backward(*arguments), None, None, None, None, None
    _token_logprob_backward_(*arguments)
    torch.autograd.graph.increment_version(logits)  # so that whoever saved them too learns that they are gone
    return logits, None, None, None, None, None


_ROW = "Tensor logits, Tensor ids, Tensor? row_temperature, float temperature"
_GRADIENTS = "Tensor kept, Tensor g, str? backend"


def _fake_forward(logits, ids, row_temperature, temperature, inplace, backend):
    dtype = softmax_rows.accumulator(logits.dtype)
    logprob, entropy = (logits.new_empty(ids.shape, dtype=dtype) for _ in range(2))
    return logprob, entropy, logits.new_empty((3, ids.numel()), dtype=dtype)


def _fake_backward(logits, *_):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _fake_backward_(*_):
    return None


_token_logprob = register(
    f"token_logprob({_ROW}, bool inplace_backward, str? backend) -> (Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
    keep=_setup_context,
    backward=_autograd,
)
_token_logprob_backward = register(f"token_logprob_backward({_ROW}, {_GRADIENTS}) -> Tensor", _backward, _fake_backward)
_token_logprob_backward_ = register(
    f"token_logprob_backward_({_ROW.replace('Tensor', 'Tensor(a!)', 1)}, {_GRADIENTS}) -> ()",
    _backward_,
    _fake_backward_,
)


IMPLS = softmax_rows.IMPLS


def token_logprob(
    logits: Tensor,
    ids: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    inplace_backward: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each chosen token and entropy of its distribution, from logits.

        logprob = log_softmax(logits / temperature)[ids]       entropy = -sum_v p log p      (nats)

    Args:
        logits: (..., V) float32, bfloat16, float16 or float64; any strides. -inf marks a token that cannot be drawn.
        ids: (...) int64 in [0, V). On CPU an id outside raises; on GPU, where a check would wait, its row is NaN.
        temperature: positive number, or one per row, broadcastable to ids; not differentiable.
        inplace_backward: write the gradient over `logits`, which must then have no other use; saves a tensor of their
            size. A second backward through them raises.
        backend: "triton", "cpu" or "reference"; the fastest that runs here by default.

    Returns:
        (logprob, entropy), each of ids' shape, float32 (float64 from float64 logits), differentiable in logits.

    Raises:
        ValueError: on a wrong shape, dtype, temperature or id.

    Memory: two numbers a row forward; one tensor of the logits' size backward, none in place.
    Sibling: `linear_policy_loss` starts from hidden states and never holds the logits.
    """
    _check(logits, ids)
    row_temperature, temperature = split_temperature("token_logprob", temperature, ids)
    logprob, entropy, _ = _token_logprob(logits, ids, row_temperature, temperature, inplace_backward, backend)
    return logprob, entropy


def split_temperature(op: str, temperature: float | Tensor, ids: Tensor) -> tuple[Tensor | None, float]:
    """One temperature per row as a flat tensor beside 1.0, or None beside the number that serves every row."""
    if not isinstance(temperature, Tensor):
        if not temperature > 0:
            raise ValueError(f"{op}: temperature must be positive; got {temperature}. Use argmax for greedy choices.")
        return None, float(temperature)
    if temperature.requires_grad:
        raise ValueError(
            f"{op}: temperature must not require a gradient; got one that does. Pass temperature.detach()."
        )
    return temperature.to(ids.device).expand(ids.shape).reshape(-1).contiguous(), 1.0


def row_temperatures(op: str, temperature: float | Tensor, logits: Tensor) -> Tensor:
    """The temperature of each row of logits (..., V), (N,) in the dtype of their statistics."""
    rows = logits[..., 0]
    split = split_temperature(op, temperature, rows)
    return each_temperature(*split, rows.numel(), softmax_rows.accumulator(rows.dtype), rows.device)


def each_temperature(
    rows: Tensor | None, number: float, count: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """What `split_temperature` made of one, as a number for each of `count` rows."""
    return torch.full((count,), number, dtype=dtype, device=device) if rows is None else rows.to(dtype)


def _check(logits: Tensor, ids: Tensor) -> None:
    if not logits.is_floating_point() or logits.dim() == 0:
        raise ValueError(
            f"token_logprob: logits must be (..., V) of a floating dtype; got {tuple(logits.shape)} {logits.dtype}. "
            "Pass the model's raw logits."
        )
    if ids.dtype != torch.int64 or ids.shape != logits.shape[:-1]:
        raise ValueError(
            f"token_logprob: ids must be int64 of shape {tuple(logits.shape[:-1])}; got {ids.dtype} of shape "
            f"{tuple(ids.shape)}. Shift labels against logits before the call."
        )
    if ids.device != logits.device:
        raise ValueError(f"token_logprob: ids must be on {logits.device}; got {ids.device}. Move them with .to().")
