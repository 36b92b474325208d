"""segment_sum and to_tokens of ragged segments: against a read and a copy, and what torch has for it."""

import pytest
import torch
from measure import Provider, compare

from fuserl.kernels.segment_sum import segment_sum, to_tokens


@pytest.fixture
def ragged(device, smoke):
    """Tokens of 512 segments of uneven lengths: x, offsets, and which segment each token is of."""
    lengths = torch.randint(1, 20 if smoke else 1024, (512,))
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    segment = torch.arange(512).repeat_interleave(lengths)
    return torch.randn(len(segment), device=device), offsets.to(device), segment.to(device)


def test_segment_sum(benchmark, ragged, smoke):
    x, offsets, segment = ragged
    truth = x.new_zeros(512, dtype=torch.float64).index_add(0, segment, x.double())

    def right(sums):
        torch.testing.assert_close(sums.double(), truth, rtol=1e-5, atol=1e-4)

    compare(
        benchmark,
        Provider("one sum of all", lambda: x.sum()),
        Provider("fuserl", lambda: segment_sum(x, offsets), right),
        Provider("index_add", lambda: x.new_zeros(512).index_add(0, segment, x), right),
        Provider("segment_reduce", lambda: torch.segment_reduce(x, "sum", offsets=offsets), right),
        rounds=100,
        smoke=smoke,
    )


def test_to_tokens(benchmark, ragged, smoke):
    x, offsets, segment = ragged
    values, tokens = x[:512].clone(), len(x)
    truth = values[segment]

    def right(spread):
        assert torch.equal(spread, truth)

    compare(
        benchmark,
        Provider("fill a vector", lambda: torch.ones_like(x)),
        Provider("fuserl", lambda: to_tokens(values, offsets, tokens), right),
        Provider("an index per token", lambda: values[segment], right),
        Provider("repeat_interleave", lambda: values.repeat_interleave(offsets.diff(), output_size=tokens), right),
        rounds=100,
        smoke=smoke,
    )
