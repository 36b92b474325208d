"""Attention in which a token sees its own segment up to itself, and all tokens of its segment's ancestors.

    s[i,j] = scale q[i].k[j],  or softcap tanh(scale q[i].k[j] / softcap);   -inf where token i may not see token j
    lse[i] = log sum_j exp s[i,j]       p[i,j] = exp(s[i,j] - lse[i])       out[i] = sum_j p[i,j] v[j]

    dv[j]  = sum_i p[i,j] dout[i]       ds[i,j] = p[i,j] (dout[i].v[j] - dout[i].out[i] + dlse[i])
    dq[i]  = scale sum_j ds[i,j] k[j]   dk[j]  = scale sum_i ds[i,j] q[i]   (ds times 1 - (s / softcap)^2 under a cap)

A prompt and its rollouts, forked rollouts and trees of any depth are the same rule over other segments. A parent's keys
are read once for all its descendants, and its gradients are summed once, in a fixed order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fuserl.kernels import softmax_rows, tree_flash, tree_segments, tree_tiles
from fuserl.kernels.dispatch import choose
from fuserl.kernels.registration import register
from fuserl.kernels.tree_segments import Layout, Rule, Saved

_NAME = "tree_attention"
_NO_WINDOW = 2**31 - 1
_TILE = 64  # tokens: tree_tile in csrc
_WIDTH = 16  # the C++ takes head dimensions in multiples of this


class Implementation(NamedTuple):
    """One backend: (q, k, v, layout, rule) -> (out, lse), and (d_out, d_lse, saved, layout, rule) -> dq, dk, dv.

    Tokens are in preorder, and out may have more digits than q. lse is (L, 2, H), rounded and what rounding took from
    it, without which every weight of the backward would be off by its size; d_lse is (L, H), or None for no gradient.
    """

    forward: Callable
    backward: Callable


def reference(q: Tensor, k: Tensor, v: Tensor, layout: Layout, rule: Rule) -> tuple[Tensor, Tensor]:
    """The definition, in plain torch: the scores of all pairs, masked."""
    i, last, place = (x.to(q.device) for x in (torch.arange(len(q)), layout.last, layout.position))
    seen = (i[:, None] >= i) & (i[:, None] < last)
    if rule.window is not None:
        seen &= place[:, None] - place < rule.window
    queries, keys, values = (x.to(_accumulator(q)).transpose(0, 1) for x in (q, k, v))
    keys, values = (x.repeat_interleave(len(queries) // len(keys), dim=0) for x in (keys, values))
    scores = queries @ keys.mT * rule.scale
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    scores = scores.masked_fill(~seen, -torch.inf)
    lse = scores.logsumexp(-1).mT
    return (scores.softmax(-1) @ values).transpose(0, 1).contiguous(), torch.stack([lse, torch.zeros_like(lse)], dim=1)


def _reference_backward(d_out, d_lse, saved, layout, rule):
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in saved[:3]]
        found, sums = reference(*leaves, layout, rule)
    d_sums = torch.zeros_like(saved.lse)
    if d_lse is not None:
        d_sums[:, 0] = d_lse
    return torch.autograd.grad((found, sums), leaves, (d_out.to(found.dtype), d_sums))


def delta(d_out: Tensor, d_lse: Tensor | None, out: Tensor) -> Tensor:
    """(L, H): d_out . out - d_lse, what the gradient of every weight of a row is less by."""
    inner = (d_out.to(_accumulator(out)) * out).sum(-1)
    return inner if d_lse is None else inner - d_lse


def _accumulator(x: Tensor) -> torch.dtype:
    return softmax_rows.accumulator(x.dtype)


@functools.lru_cache(maxsize=16)
def _tiles(layout: Layout) -> tuple[Tensor, ...]:
    """What the C++ asks of a layout: last, position, start, parent, and the segment of every tile's first token."""
    padding = -layout.tokens % _TILE
    last, position = (torch.nn.functional.pad(x, (0, padding)) for x in (layout.last, layout.position))
    return last, position, layout.start, layout.parent, layout.owner()[::_TILE].to(torch.int32)


def _rows(x: Tensor) -> Tensor:
    """(L, H, D) as the C++ reads it: D in one stretch, filled up with zeros to a multiple of 16."""
    spare = -x.shape[2] % _WIDTH
    x = torch.nn.functional.pad(x, (0, spare)) if spare else x
    return x if x.stride(2) == 1 else x.contiguous()


def _numbers(layout: Layout, rule: Rule) -> tuple[int, int, float, float]:
    return layout.tokens, min(rule.window or _NO_WINDOW, _NO_WINDOW), rule.scale, rule.softcap or 0.0


def _cpu_forward(q, k, v, layout, rule):
    from fuserl import _C

    queries, keys, values = (_rows(x) for x in (q, k, v))
    out = queries.new_empty(queries.shape, dtype=_accumulator(q))
    lse = out.new_empty(len(q), 2, q.shape[1])
    _C.tree_attention_forward(
        _tiles(layout), queries, keys, values, *_numbers(layout, rule), out, lse, torch.get_num_threads()
    )
    return out[..., : q.shape[2]].contiguous(), lse


def _cpu_backward(d_out, d_lse, saved, layout, rule):
    from fuserl import _C

    queries, keys, values, arriving, out = (_rows(x) for x in (*saved[:3], d_out, saved.out))
    dq = torch.empty_like(queries, memory_format=torch.contiguous_format)
    dk, dv = (out.new_zeros(keys.shape) for _ in range(2))
    _C.tree_attention_backward(
        _tiles(layout), queries, keys, values, out.contiguous(), saved.lse, arriving,
        None if d_lse is None else d_lse.contiguous(), *_numbers(layout, rule), dq, dk, dv, torch.get_num_threads(),
    )  # fmt: skip
    return [x[..., : saved.q.shape[2]].to(saved.q.dtype).contiguous() for x in (dq, dk, dv)]


def _triton_backward(d_out, d_lse, saved, layout, rule):
    return tree_tiles.backward(d_out, delta(d_out, d_lse, saved.out), saved, layout, rule)


IMPLS = {
    "triton": Implementation(tree_tiles.forward, _triton_backward),
    "cpu": Implementation(_cpu_forward, _cpu_backward),
    "flash": Implementation(tree_flash.forward, tree_flash.backward),
    "reference": Implementation(reference, _reference_backward),
}


def _forward(q, k, v, parent, length, *numbers_and_backend):
    *numbers, backend = numbers_and_backend
    backend = _chosen(q, backend)
    layout = _layout(parent, length, q)
    if layout.tokens == 0:
        return _fake_forward(q)
    found = IMPLS[backend].forward(*(layout.gathered(x) for x in (q, k, v)), layout, Rule(*numbers))
    wide, lse = (layout.scattered(x) for x in found)
    out = wide.to(q.dtype)
    return out, lse, (wide - out).to(q.dtype) if _keeps_rest(q) else q.new_empty(0)


def _keeps_rest(q: Tensor) -> bool:
    """Whether what rounding took from out is kept for the backward, where d_out . v - d_out . out may cancel."""
    return q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16)


def _backward(d_out, d_lse, *saved_and_call):
    q, k, v, out, lse, rest, parent, length, *numbers, backend = saved_and_call
    backend = _chosen(q, backend)
    layout = _layout(parent, length, q)
    if layout.tokens == 0:
        return tuple(torch.zeros_like(x) for x in (q, k, v))
    d_out = torch.zeros_like(out) if d_out is None else d_out
    out = out.float().add_(rest) if _keeps_rest(q) else out
    d_lse = None if d_lse is None else d_lse[:, 0]
    arriving = (None if x is None else layout.gathered(x) for x in (d_out, d_lse))
    saved = Saved(*(layout.gathered(x) for x in (q, k, v, out, lse)))
    found = IMPLS[backend].backward(*arriving, saved, layout, Rule(*numbers))
    return tuple(layout.scattered(x) for x in found)


def _chosen(q: Tensor, backend: str | None) -> str:
    backend = choose(_NAME, IMPLS, q.device, backend or ("reference" if _too_wide(q) else None))
    if backend == "triton" and _too_wide(q):
        raise RuntimeError(f"{_NAME}: backend 'triton' cannot run on float64: its products have at most 32 bits.")
    return backend


def _too_wide(q: Tensor) -> bool:
    return q.dtype == torch.float64 and q.device.type != "cpu"


def _layout(parent: Tensor, length: Tensor, q: Tensor) -> Layout:
    layout = tree_segments.layout(parent, length)
    if layout.tokens != len(q):
        raise ValueError(
            f"{_NAME}: length must sum to the tokens of q; got {layout.tokens} for {len(q)}. Describe every token."
        )
    return layout


def _setup_context(ctx, inputs, output):
    q, k, v, parent, length, *ctx.settings = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(q, k, v, *output, parent, length)


@torch.autograd.function.once_differentiable
def _autograd(ctx, d_out, d_lse, _):
    if d_out is None and d_lse is None:
        return (None,) * 9
    found = _tree_attention_backward(d_out, d_lse, *ctx.saved_tensors, *ctx.settings)
    return *(d if need else None for d, need in zip(found, ctx.needs_input_grad, strict=False)), *[None] * 6


_CALL = "Tensor parent, Tensor length, float scale, int? window, float? softcap, str? backend"


def _fake_forward(q, *_):
    rest = q.new_empty(q.shape if _keeps_rest(q) else 0)
    return q.new_empty(q.shape), q.new_empty((len(q), 2, q.shape[1]), dtype=_accumulator(q)), rest


def _fake_backward(_d_out, _d_lse, q, k, v, *_others):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


_tree_attention = register(
    f"tree_attention(Tensor q, Tensor k, Tensor v, {_CALL}) -> (Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
    keep=_setup_context,
    backward=_autograd,
)
_tree_attention_backward = register(
    "tree_attention_backward(Tensor? d_out, Tensor? d_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"Tensor rest, {_CALL}) -> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)


def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of packed tokens along a forest of segments: each token sees its ancestors, and its own segment so far.

        out[i] = sum_j softmax_j(scale q[i].k[j]) v[j],   j over what token i sees

    Args:
        q: (L, H, D) float32, bfloat16, float16 or float64, tokens of all segments end to end; D up to 256.
        k, v: (L, Hkv, D) of q's dtype, Hkv a divisor of H: query head h reads key head h // (H / Hkv).
        segments: (parent, length), each (S,) integers on the host, or an object with these attributes: the segment that
            each one continues, -1 for none, and its tokens, 0 or more. They may come in any order; in preorder, each
            parent right before its descendants, no token has to be moved.
        scale: of the scores; D ** -0.5 by default.
        window: a token at position p of its text, counted along its ancestors, sees positions p - window + 1 to p.
        softcap: c makes each score c tanh(score / c).
        backend: "triton", "cpu", "reference", or "flash" (flash-attn, 16 bits, no window and no gradient of lse); by
            default the fastest of the first three that runs here.

    Returns:
        (out, lse): (L, H, D) of q's dtype, and (L, H), float32 (float64 from float64), the log of each softmax's
        denominator, with which partial results over other keys merge. Both are differentiable, once, in q, k and v.

    Raises:
        ValueError: on a wrong shape, dtype, device, number or forest.

    Memory: linear in tokens, forward and backward. Ten runs give the same bits: nothing is added in the order in which
    threads arrive. A length or a new forest compiles nothing anew.

    Source: a prompt once for all its rollouts, Prefix Grouper (arXiv:2506.05433), here for trees of any depth.
    Sibling: `chunked_context_attention`, the same for a query and its chunks of bounded context.
    """
    parent, length = tree_segments.arrays(segments)
    _check(q, k, v)
    _check_numbers(scale, window, softcap)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    softcap = None if softcap is None else float(softcap)
    out, lse, _ = _tree_attention(q, k, v, parent, length, scale, window, softcap, backend)
    return out, lse[:, 0]


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.dim() != 3 or not q.is_floating_point() or not 0 < q.shape[2] <= 256 or q.shape[1] == 0:
        raise ValueError(
            f"{_NAME}: q must be (L, H, D) of a floating dtype, D up to 256; got {tuple(q.shape)} {q.dtype}. Lay the "
            "tokens of all segments end to end."
        )
    for name, x in {"k": k, "v": v}.items():
        fits = x.dim() == 3 and len(x) == len(q) and x.shape[2] == q.shape[2] and x.shape == k.shape
        if not (fits and x.shape[1] > 0 and q.shape[1] % x.shape[1] == 0):
            raise ValueError(
                f"{_NAME}: {name} must be ({len(q)}, Hkv, {q.shape[2]}) with Hkv a divisor of {q.shape[1]}; got "
                f"{tuple(x.shape)}. Give a key and a value per token."
            )
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{_NAME}: {name} must be {q.dtype} on {q.device}; got {x.dtype} on {x.device}. Convert it with .to()."
            )


def _check_numbers(scale: float | None, window: int | None, softcap: float | None) -> None:
    for name, value in {"scale": scale, "softcap": softcap}.items():
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{_NAME}: {name} must be positive and finite; got {value}. Use None for the default.")
    if window is not None and not window > 0:
        raise ValueError(f"{_NAME}: window must be positive; got {window}. Use None for no window.")
