"""Random forests of segments, and attention along them as one dense masked softmax, for tests."""

import random

import torch

# (parent, length): a prompt and rollouts, a fork in a rollout, empty segments, single tokens, no parent at all.
FORESTS = {
    "one": ([-1], [1]),
    "text": ([-1], [150]),
    "group": ([-1, 0, 0, 0], [70, 40, 1, 66]),
    "groups": ([-1, 0, 0, -1, 3, 3], [5, 3, 4, 130, 0, 9]),
    "deep": ([-1, 0, 1, 2, 3, 4, 2, 0], [30, 20, 1, 0, 33, 7, 64, 5]),
    "empty_root": ([-1, 0, 0, -1], [0, 17, 3, 0]),
    "any_order": ([2, 2, -1, 0, -1, 4, 1, 0], [9, 31, 40, 12, 3, 0, 20, 65]),
}


def forest(seed, segments=14, longest=40, depth=5):
    """A random one of up to `depth` ancestors, with empty and single-token segments among them."""
    draw = random.Random(seed)
    parent, level = [], []
    for s in range(segments):
        up = draw.choice([-1, *[p for p in range(s) if level[p] < depth]])
        parent.append(up)
        level.append(level[up] + 1 if up >= 0 else 0)
    return parent, [draw.choice([0, 1, draw.randint(2, longest)]) for _ in parent]


def inputs(length, heads=2, kv_heads=1, dim=16, dtype=torch.float32, device="cpu"):
    """q, k, v and gradients of out and lse, peaky: a softmax near uniform would hide a wrong key."""
    tokens = sum(length)
    q, k, v, g = (torch.randn(tokens, n, dim) for n in (heads, kv_heads, kv_heads, heads))
    return *(x.to(dtype).to(device) for x in (2 * q, k, v, g)), torch.randn(tokens, heads).to(device)


def lines(parent, length):
    """(tokens of a segment, tokens of its ancestors and itself from the root down), for every segment."""
    start = [sum(length[:s]) for s in range(len(length))]
    for s in range(len(parent)):
        line, up = [], s
        while up >= 0:
            line = [*range(start[up], start[up] + length[up]), *line]
            up = parent[up]
        yield list(range(start[s], start[s] + length[s])), line


def mask(segments, window=None):
    """(L, L), True where a query sees a key, pair by pair."""
    seen = torch.zeros(2 * [sum(segments[1])], dtype=torch.bool)
    for own, line in lines(*segments):
        for row, token in enumerate(own):
            visible = line[: len(line) - len(own) + row + 1]
            seen[token, visible if window is None else visible[-window:]] = True
    return seen


def dense(q, k, v, segments, *, scale=None, window=None, softcap=None):
    """(out, lse) of one softmax over all tokens under that mask."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) * (q.shape[2] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask(segments, window), -torch.inf)
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1), v), scores.logsumexp(-1).mT


def plainly(tensors, segments, *, scale=None, window=None, softcap=None, weights=None, order=None):
    """(out, lse, dq, dk, dv) by the equations in plain torch, the weights rounded to the dtype `weights` if given.

    order: of the dimensions, in which the backward sums the scores anew, as a kernel does that keeps the lse only.
    """
    q, k, v, g, g_lse = tensors
    scale = q.shape[2] ** -0.5 if scale is None else scale
    repeat, seen = q.shape[1] // k.shape[1], mask(segments, window)
    k, v = (x.repeat_interleave(repeat, dim=1) for x in (k, v))

    def scored(q, k):
        raw = torch.einsum("ihd,jhd->hij", q, k) * scale
        capped = raw if softcap is None else softcap * torch.tanh(raw / softcap)
        slope = 1.0 if softcap is None else 1 - (capped / softcap).square()
        return capped.masked_fill(~seen, -torch.inf), slope

    scores, slope = scored(q, k)
    p, lse = scores.softmax(-1), scores.logsumexp(-1)

    def rounded(x):
        return x if weights is None else x.to(weights).to(x.dtype)

    out = rounded(torch.einsum("hij,jhd->ihd", rounded(p), v))
    if order is not None:
        scores, slope = scored(q[..., order], k[..., order])
        p = (scores - lse[..., None]).exp()
    less = (g * out).sum(-1) - g_lse
    ds = p * (torch.einsum("ihd,jhd->hij", g, v) - less.mT[..., None])
    ds = rounded(torch.where(seen, ds * slope, 0.0))
    dq = torch.einsum("hij,jhd->ihd", ds, k) * scale
    dk, dv = torch.einsum("hij,ihd->jhd", ds, q) * scale, torch.einsum("hij,ihd->jhd", rounded(p), g)
    return out, lse.mT, dq, *(x.unflatten(1, (-1, repeat)).sum(2) for x in (dk, dv))


def with_gradients(function, tensors, segments, **options):
    """(out, lse, dq, dk, dv) under the gradients that come with the tensors, in the dtype of each."""
    *arrays, g, g_lse = tensors
    leaves = [x.detach().clone().requires_grad_() for x in arrays]
    out, lse = function(*leaves, segments, **options)
    torch.autograd.backward((out, lse), (g.to(out.dtype), g_lse.to(lse.dtype)))
    return out.detach(), lse.detach(), *(x.grad for x in leaves)
