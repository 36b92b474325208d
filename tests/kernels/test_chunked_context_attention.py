"""chunked_context_attention against an ordinary causal attention per chunk, and the budgets of its source."""

import pytest
import torch
from forests import inputs

from fuserl.kernels.chunked_context_attention import chunk_lengths, chunked_context_attention, segments
from fuserl.kernels.tree_attention import tree_attention

QUERIES, TRACES = [7, 3], [[[12, 10, 6], [5]], [[12, 12], [], [12, 9]]]


def alone(q, k, v, kept):
    """Each chunk in an ordinary causal softmax behind its query and the kept tokens, chunk by chunk."""
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:2])
    at = 0
    for size, traces in zip(QUERIES, TRACES, strict=True):
        query = list(range(at, at + size))
        at += size
        shown = [(query, query)]
        for trace in traces:
            head = list(range(at, at + min(kept, trace[0]))) if trace else []
            for n, length in enumerate(trace):
                own = list(range(at, at + length))
                at += length
                shown.append((own, [*query, *(head if n else []), *own]))
        for own, line in shown:
            scores = torch.einsum("ihd,jhd->hij", q[own], k[line].repeat_interleave(2, 1)) / q.shape[2] ** 0.5
            later = torch.ones_like(scores, dtype=torch.bool).triu(len(line) - len(own) + 1)
            scores = scores.masked_fill(later, -torch.inf)
            out[own] = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v[line].repeat_interleave(2, 1))
            lse[own] = scores.logsumexp(-1).mT
    return out, lse


@pytest.mark.parametrize("kept", [0, 4, 100])
def test_a_chunk_sees_its_query_and_itself(kept):
    tokens = sum(QUERIES) + sum(sum(trace) for traces in TRACES for trace in traces)
    q, k, v, *_ = inputs([tokens], dtype=torch.float64)
    got = chunked_context_attention(q, k, v, QUERIES, TRACES, kept=kept)
    for mine, expected in zip(got, alone(q, k, v, kept), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)


def test_one_chunk_is_a_causal_text():
    q, k, v, *_ = inputs([60])
    whole = tree_attention(q, k, v, ([-1], [60]))
    for kept in (0, 20):
        for mine, expected in zip(
            chunked_context_attention(q, k, v, [20], [[[40]]], kept=kept), whole, strict=True
        ):  # fmt: skip
            torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-6)


def test_budgets_of_the_source():
    """C + (I - 1)(C - m) tokens, exactly; twice the budget is 2.2 times the work, where one long thought is 4 times."""
    for chunks, budget in ((5, 24576), (11, 49152), (23, 98304)):
        assert chunk_lengths(budget, 8192, 4096) == [8192] * chunks
    assert chunk_lengths(10, 8, 3) == [8, 5] and chunk_lengths(0, 8, 3) == [0]


def test_segments():
    assert segments([7], [[[5, 6], [2]]]) == ([-1, 0, 0, 0], [7, 5, 6, 2])
    assert segments([7], [[[5, 6], [2]]], kept=3) == ([-1, 0, 1, 1, 0, 4], [7, 3, 2, 6, 2, 0])


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: chunk_lengths(10, 4, 4), "carry must be"),
        (lambda: chunk_lengths(-1, 4, 2), "thinking at least 0"),
        (lambda: segments([1, 2], [[]]), "traces must hold one list for each of 2 queries"),
        (lambda: segments([1], [[]], kept=-1), "kept be at least 0"),
        (lambda: chunked_context_attention(*[torch.zeros(4, 1, 8)] * 3, [2], [[[3]]]), "got 5 for 4"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()
