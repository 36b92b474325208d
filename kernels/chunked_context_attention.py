"""Attention of a query and thinking in chunks of bounded context, each of which starts with what the last one hands on.

    query | chunk 1 | m tokens of chunk 1, chunk 2 | m tokens of chunk 2, chunk 3 | ...

A token sees the query, its own chunk so far (what was handed on included, whose keys and values are made anew, at the
positions after the query), and `kept` tokens that the first chunk of its trace begins with. That is `tree_attention` on
a query, its traces' kept tokens and their chunks; time and memory are linear in the number of chunks.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fuserl.kernels import tree_attention

_NAME = "chunked_context_attention"
IMPLS = tree_attention.IMPLS


def chunk_lengths(thinking: int, chunk: int, carry: int) -> list[int]:
    """Tokens of each chunk of a trace with `thinking` new ones: `chunk` at most, the first `carry` of all but one old.

    Raises:
        ValueError: chunks that hand on all that they hold.
    """
    if not 0 <= carry < chunk or thinking < 0:
        raise ValueError(
            f"{_NAME}: carry must be at least 0 and below chunk, and thinking at least 0; got carry {carry}, chunk "
            f"{chunk} and thinking {thinking}. Hand on fewer tokens."
        )
    lengths = [min(thinking, chunk)]
    left = thinking - lengths[0]
    while left > 0:
        lengths.append(carry + min(left, chunk - carry))
        left -= chunk - carry
    return lengths


def segments(
    queries: Sequence[int], traces: Sequence[Sequence[Sequence[int]]], kept: int = 0
) -> tuple[list[int], list[int]]:
    """(parent, length) of the segments that `chunked_context_attention` gives to `tree_attention`.

    Raises:
        ValueError: another number of lists of traces than of queries, or a negative `kept`.
    """
    if len(queries) != len(traces) or kept < 0:
        raise ValueError(
            f"{_NAME}: traces must hold one list for each of {len(queries)} queries, and kept be at least 0; got "
            f"{len(traces)} and {kept}. Use an empty list for a query without a trace."
        )
    parent, length = [], []
    for query, of_query in zip(queries, traces, strict=True):
        root = len(parent)
        parent.append(-1)
        length.append(query)
        for trace in of_query:
            trunk, rest = root, list(trace)
            if kept and rest:
                head = min(kept, rest[0])
                trunk, rest[0] = len(parent), rest[0] - head
                parent.append(root)
                length.append(head)
            parent += [trunk] * len(rest)
            length += rest
    return parent, length


def chunked_context_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Sequence[int],
    traces: Sequence[Sequence[Sequence[int]]],
    *,
    kept: int = 0,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of chunks of bounded context: each sees its query and itself, not the chunks before it.

    Args:
        q: (L, H, D) float32, bfloat16, float16 or float64: per query its tokens, then trace by trace and chunk by chunk
            theirs, what each chunk was handed on from the one before standing again at its beginning.
        k, v: (L, Hkv, D) of q's dtype, Hkv a divisor of H.
        queries: (G,) tokens of each query.
        traces: per query a list of traces; each is the list of its chunks' tokens, those handed on included, as
            `chunk_lengths` makes it.
        kept: tokens that the first chunk of a trace begins with and that its later chunks see too, after the query.
        scale, window, softcap, backend: as in `tree_attention`.

    Returns:
        (out, lse), as `tree_attention` has them.

    Raises:
        ValueError: on a wrong shape, dtype, device or number, and for lengths that do not add up to L.

    Time and memory: linear in the tokens of the traces, for chunks of one length.

    Source: Delethink (arXiv:2510.06557). With one chunk per trace it is causal attention behind a shared prompt.
    """
    forest = segments(queries, traces, kept)
    return tree_attention.tree_attention(q, k, v, forest, scale=scale, window=window, softcap=softcap, backend=backend)
