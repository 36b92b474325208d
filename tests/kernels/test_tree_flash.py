"""The flash backend's parts and their merging, on a CPU, where plain torch stands in for flash-attn's two functions."""

import types

import pytest
import torch
from forests import FORESTS, forest, inputs, mask, plainly
from tolerance import check_rows

from fuserl.kernels import tree_attention as module
from fuserl.kernels import tree_flash, tree_segments
from fuserl.kernels.tree_attention import IMPLS, tree_attention


def stretches(q, k, query_bounds, key_bounds, causal):
    """(L, Lk) mask of packed stretches, causal from the end of each as flash-attn counts."""
    seen = torch.zeros(len(q), len(k), dtype=torch.bool)
    for a, b, c, d in zip(query_bounds, query_bounds[1:], key_bounds, key_bounds[1:], strict=False):
        ones = torch.ones(int(b - a), int(d - c), dtype=torch.bool)
        seen[a:b, c:d] = ones.tril(int(d - c) - int(b - a)) if causal else ones
    return seen


def scores(q, k, bounds, scale, causal, softcap):
    repeat = q.shape[1] // k.shape[1]
    raw = torch.einsum("ihd,jhd->hij", q.float(), k.float().repeat_interleave(repeat, 1)) * scale
    raw = softcap * torch.tanh(raw / softcap) if softcap else raw
    return raw.masked_fill(~stretches(q, k, *bounds, causal), -torch.inf)


def flash_forward(q, k, v, query_bounds, key_bounds, *rest, softcap):
    longest_q, longest_k, dropout, scale, causal = rest
    s = scores(q, k, (query_bounds, key_bounds), scale, causal, softcap)
    assert longest_q == query_bounds.diff().max() and longest_k == key_bounds.diff().max() and dropout == 0
    values = v.float().repeat_interleave(q.shape[1] // v.shape[1], 1)
    return torch.einsum("hij,jhd->ihd", s.softmax(-1), values).to(q.dtype), s.logsumexp(-1), None, None


def flash_backward(d_out, q, k, v, out, lse, *rest):
    dq, dk, dv, query_bounds, key_bounds, _, _, _, scale, causal, left, right, softcap, alibi, deterministic = rest
    assert (left, right, alibi, deterministic) == (-1, -1, None, True)
    with torch.enable_grad():
        leaves = [x.detach().float().requires_grad_() for x in (q, k)]
        s = scores(*leaves, (query_bounds, key_bounds), scale, causal, softcap)
    repeat = q.shape[1] // v.shape[1]
    p = (s.detach() - lse[..., None]).exp()
    dp = torch.einsum("ihd,jhd->hij", d_out.float(), v.float().repeat_interleave(repeat, 1))
    delta = (d_out.float() * out.float()).sum(-1).mT[..., None]
    (found_q, found_k) = torch.autograd.grad(s, leaves, p * (dp - delta))
    dq.copy_(found_q)
    dk.copy_(found_k)
    dv.copy_(torch.einsum("hij,ihd->jhd", p, d_out.float()).unflatten(1, (-1, repeat)).sum(2))


@pytest.fixture
def stand_in(monkeypatch):
    functions = {"_flash_attn_varlen_forward": flash_forward, "_flash_attn_varlen_backward": flash_backward}
    monkeypatch.setattr(tree_flash.importlib, "import_module", lambda _: types.SimpleNamespace(**functions))
    monkeypatch.setattr(module, "choose", lambda *_: "flash")


@pytest.mark.parametrize("segments", [*FORESTS.values(), forest(3), forest(4)])
def test_the_parts_cover_every_pair_once(segments):
    layout = tree_segments.layout(*(torch.tensor(x) for x in segments))
    pairs = torch.zeros(layout.tokens, layout.tokens, dtype=torch.int64)
    for part in tree_flash.parts(layout, torch.device("cpu")):
        seen = stretches(part.queries, part.keys, part.query_bounds, part.key_bounds, part.causal)
        pairs[part.queries[:, None], part.keys] += seen.long()
    order = torch.arange(layout.tokens) if layout.order is None else layout.order
    assert torch.equal(pairs, mask(segments)[order][:, order].long())


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("name", ["one", "group", "deep", "any_order"])
def test_the_parts_merge(stand_in, name, softcap):
    segments = FORESTS[name]
    q, k, v, g, _ = inputs(segments[1], dtype=torch.bfloat16)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = tree_attention(*leaves, segments, softcap=softcap)
    out.backward(g.to(out.dtype))
    zeros = torch.zeros(lse.shape)
    truth = plainly([x.double() for x in (q, k, v, g, zeros)], segments, softcap=softcap)
    plain = plainly([x.float() for x in (q, k, v, g, zeros)], segments, softcap=softcap, weights=torch.bfloat16)
    got = (out.detach(), lse.detach(), *(x.grad for x in leaves))
    for what, *each in zip(("out", "lse", "dq", "dk", "dv"), got, truth, plain, strict=True):
        check_rows(what, *each, torch.bfloat16)


def test_what_it_cannot_do_is_refused(stand_in):
    q, k, v, *_ = inputs([3], dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="cannot run with a window"):
        tree_attention(q, k, v, ([-1], [3]), window=2)
    with pytest.raises(RuntimeError, match=r"cannot run on torch\.float32"):
        tree_attention(q.float(), k.float(), v.float(), ([-1], [3]))
    leaf = q.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="cannot run backward from lse"):
        tree_attention(leaf, k, v, ([-1], [3]))[1].sum().backward()


def test_without_flash_attn_the_reason_is_said():
    q, k, v, *_ = inputs([3], dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"backend 'flash' cannot run on cpu: .*(pip install flash-attn|CUDA)"):
        tree_attention(q, k, v, ([-1], [3]), backend="flash")
    assert "flash" in IMPLS
