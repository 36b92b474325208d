"""Matrix products in float32 on CPU, whose rows do not depend on each other: c = bias + alpha a b, or c + alpha a b.

torch takes them from MKL, which uses half of a register's width on processors that are not Intel's: on an AMD EPYC with
AVX-512 two threads reach 230 GFLOP/s of 550, and these 330 to 480. A row's sums are taken in the same order whatever
other rows there are, so its bits do not change when it is read alone, in another chunk or beside others.

On Intel's processors, where torch has no MKL, for other dtypes and on other devices the products are torch's: `native`.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from fuserl.kernels.registration import register

__all__ = ["linear", "matmul", "native"]

_B = (torch.float32, torch.bfloat16, torch.float16)


def native(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of this dtype are fuserl's own on a device, with rows that do not depend on each other."""
    return device.type == "cpu" and dtype == torch.float32 and _preferred()


@functools.cache
def _preferred() -> bool:
    try:
        from fuserl import _C
    except ImportError:
        return False
    return torch.backends.mkl.is_available() and not _C.intel


def matmul(
    a: Tensor, b: Tensor, *, bias: Tensor | None = None, alpha: float = 1.0, out: Tensor | None = None, add=False
) -> Tensor:
    """The product of two matrices, without a gradient.

        out = bias + alpha a @ b,  or  out + alpha a @ b  with `add`

    Args:
        a: (N, K) of the products' dtype.
        b: (K, M) of the same dtype, or of another, which is widened: where `native` holds for a as it is read.
        bias: (M,) of a's dtype.
        alpha: a factor of the product.
        out: (N, M) of a's dtype to write to; its rows stand together.
        add: add to `out`, which then has no bias.

    Returns:
        `out`, or a new (N, M).
    """
    if not native(a.device, a.dtype) or b.dtype not in _B:
        return _torch(a, b.to(a.dtype), bias, alpha, out, add)
    from fuserl import _C

    out = a.new_empty(a.shape[0], b.shape[1]) if out is None else out
    given = a if 1 in a.stride() else a.contiguous(), b if 1 in b.stride() else b.contiguous()
    _C.matmul(*given, bias, alpha, add, out, torch.get_num_threads())
    return out


def _torch(a, b, bias, alpha, out, add):
    if add:
        return out.addmm_(a, b, alpha=alpha)
    if bias is not None:
        return torch.addmm(bias, a, b, alpha=alpha, out=out)
    found = torch.mm(a, b, out=out)
    return found if alpha == 1.0 else found.mul_(alpha)


def _run(x, weight, bias):
    return matmul(x.reshape(-1, x.shape[-1]), weight.T, bias=bias).view(*x.shape[:-1], weight.shape[0])


def _fake(x, weight, bias):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])
    ctx.biased = inputs[2] is not None


def _backward(ctx, gradient):
    x, weight = ctx.saved_tensors
    gradient = gradient.reshape(-1, gradient.shape[-1])
    to_x, to_weight, to_bias = ctx.needs_input_grad
    return (
        _times(gradient, weight).view(x.shape) if to_x else None,
        _times(gradient.T, x.reshape(-1, x.shape[-1])) if to_weight else None,
        gradient.sum(0) if to_bias and ctx.biased else None,
    )


def _times_fake(a, b):
    return a.new_empty(a.shape[0], b.shape[1])


_times = register("matmul(Tensor a, Tensor b) -> Tensor", matmul, _times_fake)
_linear = register(
    "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor", _run, _fake, keep=_keep, backward=_backward
)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer, torch's F.linear, by `matmul` where that is fuserl's own: x @ weight.T + bias.

    Args:
        x: (..., K).
        weight: (M, K).
        bias: (M,) or None.

    Returns:
        (..., M), with gradients to all three.
    """
    own = native(x.device, x.dtype) and weight.dtype == x.dtype and not torch.is_autocast_enabled("cpu")
    if not own or hasattr(weight, "full_tensor") or (bias is not None and bias.dtype != x.dtype):
        return F.linear(x, weight, bias)
    return _linear(x, weight, bias)
