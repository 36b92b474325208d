"""What the numerics page tries the attentions on, a prompt with rollouts and a query with chunks, and plain torch."""

import itertools

import subjects
import torch
from subjects import Subject
from torch import Tensor

from fuserl.kernels import chunked_context_attention as chunked
from fuserl.kernels import tree_attention, tree_decode

HEADS = 4
SCORES = ", 4 heads of 64, scores of standard deviation 2"


def group(kind: str, rows: int, width: int) -> tuple[Tensor, ...]:
    """Queries, keys, values and gradients, (8 rows, width)."""
    q, k, v, g = torch.randn(4, 8 * rows, width)
    return {"usual": 2.0, "peaky": 8.0}[kind] * q, k, v, g


def _forest(tokens: int) -> tuple[list[int], list[int]]:
    """A prompt of a quarter of the tokens, and six rollouts of an eighth."""
    return [-1, *[0] * 6], [tokens // 4, *[tokens // 8] * 6]


def _outputs(attend, tensors: tuple[Tensor, ...]) -> dict[str, Tensor]:
    *leaves, g = (x.unflatten(1, (HEADS, -1)).clone() for x in tensors)
    leaves = [x.requires_grad_() for x in leaves]
    out = attend(*leaves)
    gradients = torch.autograd.grad(out, leaves, g)
    found = dict(zip(("out", "d_q", "d_k", "d_v"), (out, *gradients), strict=True))
    return {name: x.flatten(1) for name, x in found.items()}


def tree_attention_run(backend: str, *tensors: Tensor) -> dict[str, Tensor]:
    """The op, and autograd through it."""
    forest = _forest(len(tensors[0]))
    return _outputs(lambda *x: tree_attention.tree_attention(*x, forest, backend=backend)[0], tensors)


def chunked_run(backend: str, *tensors: Tensor) -> dict[str, Tensor]:
    """The op on a query of an eighth of the tokens and seven chunks of as many, and autograd through it."""
    size = len(tensors[0]) // 8
    return _outputs(
        lambda *x: chunked.chunked_context_attention(*x, [size], [[[size] * 7]], backend=backend)[0],
        tensors,
    )


def tree_attention_eager(*tensors: Tensor) -> dict[str, Tensor]:
    """Products and the softmax of every score in the dtype, under a mask."""
    return _eager(_forest(len(tensors[0]))[1], tensors)


def chunked_eager(*tensors: Tensor) -> dict[str, Tensor]:
    """The same for the chunks."""
    return _eager([len(tensors[0]) // 8] * 8, tensors)


def _eager(lengths: list[int], tensors: tuple[Tensor, ...]) -> dict[str, Tensor]:
    length = torch.tensor(lengths, device=tensors[0].device)
    owner = torch.repeat_interleave(torch.arange(len(length), device=length.device), length)
    seen = ((owner[:, None] == owner) | (owner == 0)).tril()

    def attend(q, k, v):
        scores = torch.einsum("ihd,jhd->hij", q, k) / q.shape[2] ** 0.5
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        return torch.einsum("hij,jhd->ihd", weights, v)

    return _outputs(attend, tensors)


def decode_run(backend: str, *tensors: Tensor) -> dict[str, Tensor]:
    """tree_decode of the last token of each rollout of the group."""
    (parent, length), (q, k, v, _) = _forest(len(tensors[0])), (x.unflatten(1, (HEADS, -1)) for x in tensors)
    ends = torch.tensor(length).cumsum(0)
    segments = parent, ends - torch.tensor(length), length
    out, lse = tree_decode.tree_decode(q[ends[1:] - 1], k, v, segments, range(1, len(parent)), backend=backend)
    return {"out": out.flatten(1), "lse": lse}


def decode_eager(*tensors: Tensor) -> dict[str, Tensor]:
    """The same rollout by rollout, in the dtype."""
    (_, length), (q, k, v, _) = _forest(len(tensors[0])), (x.unflatten(1, (HEADS, -1)) for x in tensors)
    ends, outs, sums = torch.tensor(length).cumsum(0).tolist(), [], []
    for begin, end in itertools.pairwise(ends):
        line = [*range(ends[0]), *range(begin, end)]
        scores = torch.einsum("hd,jhd->hj", q[end - 1], k[line]) / q.shape[2] ** 0.5
        outs.append(torch.einsum("hj,jhd->hd", scores.softmax(-1), v[line]).flatten())
        sums.append(scores.logsumexp(-1))
    return {"out": torch.stack(outs), "lse": torch.stack(sums)}


SUBJECTS = {
    "tree_attention": Subject(
        lambda kind, rows: group(kind, rows, subjects.WIDTH), tree_attention_run,
        tree_attention_eager, tree_attention.IMPLS,
        {"usual": f"a prompt of 128 tokens and 6 rollouts of 64{SCORES}", "peaky": "the same at 8"},
    ),
    "tree_decode": Subject(
        lambda kind, rows: group(kind, rows, subjects.WIDTH), decode_run, decode_eager, tree_decode.IMPLS,
        {"usual": f"the last tokens of 6 rollouts of 64 behind a prompt of 128{SCORES}", "peaky": "the same at 8"},
    ),
    "chunked_context_attention": Subject(
        lambda kind, rows: group(kind, rows, subjects.WIDTH), chunked_run,
        chunked_eager, chunked.IMPLS,
        {"usual": f"a query and 7 chunks of 64 tokens{SCORES}", "peaky": "the same at 8"},
    ),
}  # fmt: skip
