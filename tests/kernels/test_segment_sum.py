"""segment_sum, segment_mean and to_tokens against sums in extended precision, ragged and empty segments, gradients.

Triton takes the same tests under its interpreter, in the process that test_discounted_scan starts.
"""

import numpy as np
import pytest
import torch
from backends import INTERPRETING, cpu_only, each_backend, each_fast_backend, threads
from hypothesis import given, settings
from hypothesis import strategies as st
from sequences import SHAPES, both_dtypes, each_segment, offsets_of
from tolerance import check

from fuserl.kernels.segment_sum import reference, segment_mean, segment_sum, to_tokens

BACKEND = "triton" if INTERPRETING else "cpu"
PART = 32768  # what one thread adds up


def by_hand(x, offsets):
    x = x.numpy().astype(np.longdouble)
    sums = [[row[list(segment)].sum(dtype=np.longdouble) for segment in each_segment(offsets)] for row in x]
    return torch.tensor(np.array(sums, dtype=np.float64).reshape(len(x), len(offsets) - 1))


def compare(x, offsets, backend, device="cpu"):
    there = offsets.to(device)
    sums = segment_sum(x.to(device), there, backend=backend).cpu()
    truth, plain = by_hand(x, offsets), reference(x, offsets)
    check("sums", sums, truth, plain, x.dtype)
    lengths = offsets.diff().clamp(min=1)
    means = segment_mean(x.to(device), there, backend=backend).cpu()
    check("means", means, truth / lengths, plain / lengths, x.dtype)
    assert sums.dtype == means.dtype == x.dtype and not sums[:, offsets.diff() == 0].any()
    y = torch.randn(len(x), len(offsets) - 1, dtype=x.dtype)
    spread = to_tokens(y.to(device), there, x.shape[1], backend=backend).cpu()
    assert torch.equal(spread, y.repeat_interleave(offsets.diff(), dim=1))
    return sums


@each_backend
@both_dtypes
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_definition(shape, dtype, device, backend):
    offsets = offsets_of(SHAPES[shape])
    compare(torch.randn(2, int(offsets[-1]), dtype=dtype) + 1, offsets, backend, device)


@settings(max_examples=6 if INTERPRETING else 60, deadline=None)
@given(lengths=st.lists(st.integers(0, 70), max_size=9), channels=st.integers(1, 3), seed=st.integers(0, 99))
def test_any_lengths(lengths, channels, seed):
    torch.manual_seed(seed)
    offsets = offsets_of(lengths)
    x = torch.randn(channels, int(offsets[-1]))
    sums = compare(x, offsets, BACKEND)
    for s, (begin, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        if end > begin:
            alone = segment_sum(x[:, begin:end], torch.tensor([0, end - begin]), backend=BACKEND)
            assert torch.equal(alone[:, 0], sums[:, s])


@each_backend
def test_gradients(device, backend):
    offsets = offsets_of([0, 3, 1, 0, 4]).to(device)
    x = torch.randn(2, 8, dtype=torch.float64, device=device, requires_grad=True)
    y = torch.randn(2, 5, dtype=torch.float64, device=device, requires_grad=True)
    check = dict(fast_mode=INTERPRETING)
    assert torch.autograd.gradcheck(lambda x: segment_mean(x, offsets, backend=backend), x, **check)
    assert torch.autograd.gradcheck(lambda y: to_tokens(y, offsets, 8, backend=backend), y, **check)
    if not INTERPRETING:
        assert torch.autograd.gradgradcheck(lambda x: segment_sum(x, offsets, backend=backend).square(), x)


@cpu_only
def test_threads_and_ten_runs_of_a_long_segment():
    x, offsets = torch.randn(2, 3 * PART + 50), offsets_of([7, 3 * PART, 0, 43])
    found = []
    for run in range(10):
        with threads((1, 2, 5)[run % 3]):
            found.append(segment_sum(x, offsets))
    assert all(torch.equal(each, found[0]) for each in found)
    compare(x, offsets, "cpu")


@each_fast_backend
def test_shapes_strides_and_empty_input(device, backend):
    x, offsets = torch.randn(40, 3, device=device), offsets_of([30, 10]).to(device)
    assert torch.equal(
        segment_sum(x.t(), offsets, backend=backend), segment_sum(x.t().contiguous(), offsets, backend=backend)
    )
    assert segment_sum(x[:, 0], offsets, backend=backend).shape == (2,)
    assert to_tokens(torch.ones(3, 1, 2, device=device), offsets, 40, backend=backend).shape == (3, 1, 40)
    none = torch.zeros(1, dtype=torch.int64, device=device)
    assert segment_sum(x[:0, 0], none, backend=backend).shape == (0,)
    assert segment_sum(x[:0, 0], offsets * 0, backend=backend).tolist() == [0, 0]
    assert to_tokens(x[:2, 0], offsets * 0, 0, backend=backend).shape == (0,)


@cpu_only
def test_wrong_arguments_are_refused():
    x, offsets = torch.ones(8), torch.tensor([0, 3, 8])
    for call, says in (
        (lambda: segment_sum(x.half(), offsets), r"segment_sum: x must be \(\.\.\., N\) float32 or float64"),
        (lambda: segment_sum(x, offsets.int()), r"segment_sum: offsets must be \(B \+ 1,\) int64"),
        (lambda: segment_sum(x, offsets[:2]), "segment_sum: offsets must begin with 0 and end with 8; got 0 and 3"),
        (lambda: segment_mean(x, offsets.flip(0)), "segment_sum: offsets must not decrease"),
        (lambda: to_tokens(x, offsets, 8), r"to_tokens: per_segment must be \(\.\.\., B\) for offsets"),
        (lambda: to_tokens(x[:2], offsets, 9), "to_tokens: offsets must begin with 0 and end with 9"),
    ):
        with pytest.raises(ValueError, match=f"^{says}"):
            call()


@cpu_only
def test_opcheck_and_compile():
    x, offsets = torch.randn(2, 8, requires_grad=True), offsets_of([3, 0, 5])
    torch.library.opcheck(torch.ops.fuserl.segment_sum, (x, offsets, None))
    torch.library.opcheck(torch.ops.fuserl.to_tokens, (x[:, :3].detach().requires_grad_(), offsets, 8, None))

    def centred(x):
        return x - to_tokens(segment_mean(x, offsets), offsets, 8)

    compiled = torch.compile(centred, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), centred(x))
