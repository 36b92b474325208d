"""Linear scans along ragged segments: what returns, advantages and discounted prefix sums are made of.

    x[t] = b[t] + a[t] x[t + 1]            the last token of a segment has nothing after it
    y[t] = b[t] + a[t - 1] y[t - 1]        forward; the first has nothing before it

    dL/db = forward scan of dL/dx          dL/da[t] = (dL/db)[t] x[t + 1]
    dL/db = reverse scan of dL/dy          dL/da[t] = (dL/db)[t + 1] y[t]

a[t] is the link between a token and the next in both directions, so each scan is the other's transpose. Every backend
cuts a segment into tiles of a fixed length, counted from where its scan begins, scans each as if nothing came before,
and adds what does, times the product of the links. So no result depends on threads or on what lies beside a segment.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fuserl.kernels.dispatch import choose
from fuserl.kernels.registration import register
from fuserl.kernels.scan_tiles import launch

__all__ = ["discounted_scan", "ends", "following"]


def reference(b: Tensor, a: Tensor | None, factor: float, offsets: Tensor | None, forward: bool) -> Tensor:
    """The definition, in plain torch, a step along all segments at once."""
    if offsets is None:
        offsets = torch.tensor([0, b.shape[1]], device=b.device)
    x, first, lengths = b.clone(), offsets[:-1], offsets.diff()
    for step in range(1, int(lengths.max()) if len(lengths) else 0):
        some = lengths > step
        at = (first + step if forward else first + lengths - 1 - step)[some]
        before, link = (at - 1, at - 1) if forward else (at + 1, at)
        x[:, at] += (factor if a is None else a[:, link]) * x[:, before]
    return x


def _triton(b, a, factor, offsets, forward):
    x = torch.empty_like(b)
    launch({"b": b, "a": a, "offsets": offsets, "x": x}, factor=factor, forward=forward)
    return x


def _cpu(b, a, factor, offsets, forward):
    from fuserl import _C

    x = torch.empty_like(b)
    _C.discounted_scan(b, a, factor, offsets, forward, x, torch.get_num_threads())
    return x


IMPLS = {"triton": _triton, "cpu": _cpu, "reference": reference}


def _dispatch(b, a, factor, offsets, forward, backend):
    backend = choose("discounted_scan", IMPLS, b.device, backend)
    if b.numel() == 0:
        return torch.empty_like(b, memory_format=torch.contiguous_format)
    a, offsets = (None if x is None else x.contiguous() for x in (a, offsets))
    return IMPLS[backend](b.contiguous(), a, factor, offsets, forward)


def _setup_context(ctx, inputs, output):
    _, a, ctx.factor, offsets, ctx.forward, ctx.backend = inputs
    ctx.save_for_backward(a, offsets, output if ctx.needs_input_grad[1] else None)


def _autograd(ctx, g):
    a, offsets, x = ctx.saved_tensors
    d_b = _discounted_scan(g, a, ctx.factor, offsets, not ctx.forward, ctx.backend)
    d_a = None
    if ctx.needs_input_grad[1]:
        d_a = following(d_b, offsets) * x if ctx.forward else d_b * following(x, offsets)
    return d_b, d_a, None, None, None, None


def _fake(b, *_):
    return torch.empty_like(b, memory_format=torch.contiguous_format)


_discounted_scan = register(
    "discounted_scan(Tensor b, Tensor? a, float factor, Tensor? offsets, bool forward, str? backend) -> Tensor",
    _dispatch,
    _fake,
    keep=_setup_context,
    backward=_autograd,
)


def discounted_scan(
    b: Tensor,
    a: float | Tensor,
    *,
    offsets: Tensor | None = None,
    mask: Tensor | None = None,
    forward: bool = False,
    exclusive: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Linear scan along each segment, from its last token down or from its first up, in one pass for all segments.

        x[t] = b[t] + a[t] x[t + 1]        forward: x[t] = b[t] + a[t - 1] x[t - 1]

    Args:
        b: (..., N) float32 or float64, tokens of all segments one after the other; leading dimensions are channels.
            Without offsets (..., T): every row is a segment.
        a: a number, or a tensor that broadcasts to b's shape: the link of a token to the next one, in both directions.
            0 where an episode ends inside a segment. The last link of a segment is not used, but must be finite.
        offsets: (B + 1,) int64, where each segment begins, and N at the end; the same for all channels. Segments may be
            empty. On GPU, where a check would wait, wrong ones give wrong numbers.
        mask: bool, broadcasting to b's shape; a False token is passed over: its neighbours are each other's, its x and
            its gradients are 0, and its b and a may be anything.
        forward: scan from the first token up.
        exclusive: leave out the token's own b: a[t] x[t + 1], or forward a[t - 1] x[t - 1].
        backend: "triton", "cpu" or "reference"; the fastest that runs here by default.

    Returns:
        x of b's shape and dtype, differentiable in b and a.

    Raises:
        ValueError: on a wrong shape, dtype or device, and on CPU for offsets that decrease or miss an end.

    Within a tile, 4096 tokens on CPU, products of links must not overflow: meant for |a| <= 1. Memory: x; with a mask
    or a tensor that is expanded copies of b and a.
    Sibling: `gae` scans temporal differences without writing them down.
    """
    a, mask = checked("discounted_scan", "b", b, {"a": a}, offsets, mask)
    rows, a, mask = (flat(x, b.shape) for x in (b, a, mask))
    if mask is not None:
        rows, a = torch.where(mask, rows, 0.0), torch.where(mask, a, torch.ones_like(rows))
    x = scan(rows, a, offsets, backend, forward=forward)
    if exclusive:
        x = preceding(a * x, offsets) if forward else a * following(x, offsets)
    return (x if mask is None else torch.where(mask, x, 0.0)).view(b.shape)


def ends(x: Tensor, offsets: Tensor | None) -> Tensor:
    """Which tokens of x (C, N) are the last of their segment, (N,) bool."""
    marks = torch.zeros(x.shape[1] + 1, dtype=torch.bool, device=x.device)
    if offsets is None:
        marks[-1:] = True
        return marks[1:]
    return marks.index_fill(0, offsets, True)[1:]


def following(x: Tensor, offsets: Tensor | None, beyond: Tensor | None = None) -> Tensor:
    """x (C, N) of each token's successor; `beyond` (C, N), or 0, where its segment ends."""
    beyond = x.new_zeros(()) if beyond is None else beyond
    return torch.where(ends(x, offsets), beyond, torch.cat([x[:, 1:], x[:, :1]], 1))


def preceding(x: Tensor, offsets: Tensor | None) -> Tensor:
    """x (C, N) of each token's predecessor; 0 where its segment begins."""
    return torch.cat([x[:, -1:], x[:, :-1]], 1).masked_fill(ends(x, offsets).roll(1), 0.0)


def scan(b: Tensor, a: float | Tensor, offsets: Tensor | None, backend: str | None, *, forward: bool = False) -> Tensor:
    """`discounted_scan` of rows (C, N), without mask."""
    a, factor = split(a)
    return _discounted_scan(b, a, factor, offsets, forward, backend)


def split(number: float | Tensor) -> tuple[Tensor | None, float]:
    """A tensor and 1, or None and a number: ops take both, for a tensor of one number would be read at every token."""
    return (number, 1.0) if isinstance(number, Tensor) else (None, float(number))


def flat(x: float | Tensor | None, shape: torch.Size) -> float | Tensor | None:
    """A tensor that broadcasts to (..., N) as (C, N); a number, or nothing, as it is."""
    return x.expand(shape).reshape(shape[:-1].numel(), shape[-1]) if isinstance(x, Tensor) else x


def checked(function: str, name: str, x: Tensor, others: dict, offsets: Tensor | None, mask: Tensor | None) -> tuple:
    """The values of `others` and the mask, each as it is if it can be a partner of x (..., N); else ValueError."""
    if x.dtype not in (torch.float32, torch.float64) or x.dim() == 0:
        raise ValueError(
            f"{function}: {name} must be (..., N) float32 or float64; got {tuple(x.shape)} {x.dtype}. "
            "Give one number per token, and convert them with .float()."
        )
    for other, y in {**others, "mask": mask}.items():
        dtype = torch.bool if other == "mask" else x.dtype
        if isinstance(y, Tensor) and not (_broadcasts(y, x) and y.dtype == dtype and y.device == x.device):
            raise ValueError(
                f"{function}: {other} must broadcast to {tuple(x.shape)} as {dtype} on {x.device}; got "
                f"{tuple(y.shape)} {y.dtype} on {y.device}. Give one per token, or convert it to match {name}."
            )
    if offsets is not None and (offsets.dim() != 1 or offsets.dtype != torch.int64 or offsets.device != x.device):
        raise ValueError(
            f"{function}: offsets must be (B + 1,) int64 on {x.device}; got {tuple(offsets.shape)} {offsets.dtype} on "
            f"{offsets.device}. Give where each segment begins, and the end of the last."
        )
    return *others.values(), mask


def _broadcasts(y: Tensor, x: Tensor) -> bool:
    extra = x.dim() - y.dim()
    return extra >= 0 and all(of_y in (1, of_x) for of_y, of_x in zip(y.shape, x.shape[extra:], strict=True))
