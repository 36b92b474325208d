"""discounted_scan against textbook loops in extended precision: ragged segments, both directions, masks, gradients."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from backends import INTERPRETING, cpu_only, each_backend, each_fast_backend, run_interpreted, threads
from hypothesis import given, settings
from hypothesis import strategies as st
from sequences import RAGGED, SHAPES, TILE, both_dtypes, offsets_of, scan_by_hand
from tolerance import check

from fuserl.kernels.discounted_scan import discounted_scan

BACKEND = "triton" if INTERPRETING else "cpu"


def compare(b, a, offsets, backend, device="cpu", **how):
    """The op within its allowance, of b (..., N)."""
    there = [x.to(device) if isinstance(x, torch.Tensor) else x for x in (b, a, offsets)]
    masks = {"mask": how["mask"].to(device)} if "mask" in how else {}
    got = discounted_scan(there[0], there[1], offsets=there[2], backend=backend, **{**how, **masks})
    assert got.shape == b.shape and got.dtype == b.dtype
    truth = scan_by_hand(b, a, offsets, **how)
    plain = scan_by_hand(b, a, offsets, precision=b.numpy().dtype.type, **how)
    check("x", got.cpu().reshape(truth.shape), truth, plain, b.dtype)


def inputs(lengths, channels=2, dtype=torch.float32):
    """Summands and links of each token, and the offsets."""
    offsets = offsets_of(lengths)
    b = torch.randn(channels, int(offsets[-1]), dtype=dtype)
    a = 1 - 1e-3 * torch.rand(b.shape, dtype=dtype)  # so near 1 that a tile's end is seen at the next one's
    return b, torch.where(torch.rand(b.shape) < 2e-3, 0.5 * a, a), offsets


@each_backend
@both_dtypes
@pytest.mark.parametrize("forward", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_definition(shape, forward, dtype, device, backend):
    b, a, offsets = inputs(SHAPES[shape], 1 if shape == "ragged" else 2, dtype)
    compare(b, a, offsets, backend, device, forward=forward)
    compare(b[0], 0.9999, offsets, backend, device, forward=forward)


@each_backend
@pytest.mark.parametrize("forward", [False, True])
@pytest.mark.parametrize("exclusive", [False, True])
def test_masks_and_exclusive_sums(forward, exclusive, device, backend):
    b, a, offsets = inputs([5, 0, 1, TILE + 3, 40])
    compare(b, a, offsets, backend, device, forward=forward, exclusive=exclusive)
    for share in (0.7, 0.02):
        mask = torch.rand(b.shape) < share
        compare(b, a, offsets, backend, device, mask=mask, forward=forward, exclusive=exclusive)
        compare(b, 0.9, offsets, backend, device, mask=mask[0], forward=forward, exclusive=exclusive)


@each_backend
def test_rows_without_offsets_are_segments(device, backend):
    b, a, _ = inputs([TILE + 7], 3)
    whole = torch.tensor([0, TILE + 7], device=device)
    b, a = b.to(device), a.to(device)
    for forward in (False, True):
        dense = discounted_scan(b, a, forward=forward, backend=backend)
        assert torch.equal(dense, discounted_scan(b, a, offsets=whole, forward=forward, backend=backend))
        cube = discounted_scan(b.view(3, 1, -1), a.view(3, 1, -1), forward=forward, backend=backend)
        assert torch.equal(cube[:, 0], dense)
        packed = discounted_scan(
            b.flatten(), a.flatten(), offsets=(TILE + 7) * torch.arange(4, device=device), forward=forward,
            backend=backend,
        )  # fmt: skip
        assert torch.equal(packed.view(3, -1), dense), "a segment depends on what lies beside it"


@each_fast_backend
def test_masked_tokens_are_as_good_as_absent(device, backend):
    b, a, offsets = (x.to(device) for x in inputs([40, 0, 3, 100], 1, torch.float64))
    mask = torch.rand(b.shape[1], device=device) < 0.6
    bad = torch.where(mask, b, torch.nan), torch.where(mask, a, torch.inf)
    kept = torch.cat([mask.new_zeros(1).long(), mask.cumsum(0)])[offsets]
    for forward in (False, True):
        for exclusive in (False, True):
            how = dict(forward=forward, exclusive=exclusive, backend=backend)
            x = discounted_scan(*bad, offsets=offsets, mask=mask, **how)
            assert not x[:, ~mask].any()
            assert torch.allclose(x[:, mask], discounted_scan(b[:, mask], a[:, mask], offsets=kept, **how), atol=1e-13)


@each_backend
@pytest.mark.parametrize("forward", [False, True])
@pytest.mark.parametrize("exclusive", [False, True])
def test_gradients(forward, exclusive, device, backend):
    b, a, offsets = (x.to(device) for x in inputs([0, 4, 1, 0, 7], 2, torch.float64))
    mask = torch.rand(b.shape, device=device) < 0.7
    leaves = b.requires_grad_(), a.requires_grad_()
    how = dict(offsets=offsets, forward=forward, exclusive=exclusive, backend=backend)
    assert torch.autograd.gradcheck(
        lambda b, a: discounted_scan(b, a, mask=mask, **how), leaves, fast_mode=INTERPRETING
    )
    if INTERPRETING:
        return
    assert torch.autograd.gradcheck(lambda b, a: discounted_scan(b, a, **how), leaves)
    assert torch.autograd.gradcheck(lambda b: discounted_scan(b, 0.8, **how), leaves[:1])
    assert torch.autograd.gradcheck(lambda b, a: discounted_scan(b, a[:1], forward=forward), leaves)
    assert torch.autograd.gradgradcheck(lambda b, a: discounted_scan(b, a, **how), leaves)


@each_fast_backend
def test_gradients_of_long_segments(device, backend):
    b, a, offsets = (x.to(device) for x in inputs([3 * TILE + 5, 2], 1))
    g = torch.randn_like(b)
    found = {}
    for precision in (torch.float32, torch.float64):
        leaves = [x.to(precision).requires_grad_() for x in (b, a)]
        for name in (backend, "reference"):
            x = discounted_scan(*leaves, offsets=offsets, backend=name)
            found[name, precision] = torch.autograd.grad(x, leaves, g.to(precision))
    for which in range(2):
        truth, plain = found["reference", torch.float64][which], found["reference", torch.float32][which]
        check("gradient", found[backend, torch.float32][which].cpu(), truth.cpu(), plain.cpu(), torch.float32)


@each_fast_backend
def test_each_direction_is_the_transpose_of_the_other(device, backend):
    b, a, offsets = (x.to(device) for x in inputs([3, 0, 2 * TILE + 9, 1], 1, torch.float64))
    g = torch.randn_like(b)
    down = discounted_scan(b, a, offsets=offsets, backend=backend)
    up = discounted_scan(g, a, offsets=offsets, forward=True, backend=backend)
    assert float((down * g).sum()) == pytest.approx(float((b * up).sum()), rel=1e-11)


@each_backend
def test_links_of_zero_and_one(device, backend):
    b, _, offsets = (x.to(device) for x in inputs([TILE + 20, 5], 1, torch.float64))
    assert torch.equal(discounted_scan(b, 0.0, offsets=offsets, backend=backend), b)
    ones = discounted_scan(torch.ones_like(b), 1.0, offsets=offsets, backend=backend)[0]
    lengths = [*range(TILE + 20, 0, -1), *range(5, 0, -1)]
    assert ones.tolist() == lengths
    ends = torch.ones_like(b)
    ends[:, ::7] = 0  # an episode ends at every seventh token
    until = discounted_scan(torch.ones_like(b), ends, offsets=offsets, backend=backend)
    assert int(until.max()) == 7 and bool((until[:, ::7] == 1).all())


@each_fast_backend
def test_no_underflow_or_overflow_leaks(device, backend):
    """Products of links leave the range of floats on both sides; where nothing is carried, nothing comes of it."""
    b = torch.zeros(10 * TILE, device=device)
    b[-1] = 1.0
    small = discounted_scan(b, 0.5, backend=backend)
    assert float(small[-2]) == 0.5 and not small[: 5 * TILE].any() and small.isfinite().all()
    b[-1] = 0.0
    b[0] = 1.0
    assert torch.equal(discounted_scan(b, 2.0, backend=backend), b)


@cpu_only
@pytest.mark.parametrize("forward", [False, True])
def test_threads_and_instruction_sets(forward, isa):
    b, a, offsets = inputs(RAGGED, 2)
    truth = scan_by_hand(b, a, offsets, forward=forward)
    plain = scan_by_hand(b, a, offsets, forward=forward, precision=np.float32)
    found, number = [], float(a.mean())
    for count in (1, 2, 5):
        with threads(count):
            found += [discounted_scan(b, a, offsets=offsets, forward=forward) for _ in range(4)]
            found += [discounted_scan(b, number, offsets=offsets, forward=forward) for _ in range(4)]
    check(isa, found[0], truth, plain, torch.float32)
    assert all(torch.equal(found[i], found[i % 8 // 4 * 4]) for i in range(len(found)))


@cpu_only
@pytest.mark.parametrize("link", [0.99, 0.999, 0.9999, 1.0])
def test_one_link_for_all_loses_no_more_than_the_loop(link):
    """Its powers are taken again and again: what each lost would add up, where differing links' errors cancel."""
    b, a = torch.randn(1, 6 * TILE), torch.full((1, 1), link)
    truth, plain = (
        scan_by_hand(b, a, torch.tensor([0, 6 * TILE]), precision=precision)
        for precision in (np.longdouble, np.float32)
    )
    assert (discounted_scan(b, float(a)) - truth).abs().max() < (plain - truth).abs().max()


@settings(max_examples=5 if INTERPRETING else 60, deadline=None)
@given(lengths=st.lists(st.integers(0, 70), max_size=9), channels=st.integers(1, 3), seed=st.integers(0, 99))
def test_any_lengths(lengths, channels, seed):
    torch.manual_seed(seed)
    b, a, offsets = inputs(lengths, channels)
    a *= 0.95
    forward = bool(seed % 2)
    mask = torch.rand(b.shape) < 0.8
    compare(b, a, offsets, BACKEND, forward=forward)
    compare(b, a, offsets, BACKEND, forward=forward, mask=mask, exclusive=bool(seed % 3))
    whole = discounted_scan(b, a, offsets=offsets, forward=forward, backend=BACKEND)
    for segment, (begin, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        alone = discounted_scan(b[:, begin:end], a[:, begin:end], forward=forward, backend=BACKEND)
        assert torch.equal(whole[:, begin:end], alone), segment


@each_fast_backend
def test_ten_runs_are_equal(device, backend):
    b, a, offsets = (x.to(device) for x in inputs([4 * TILE + 5, 7, 0, 100]))
    first = discounted_scan(b, a, offsets=offsets, backend=backend)
    assert all(torch.equal(first, discounted_scan(b, a, offsets=offsets, backend=backend)) for _ in range(9))


@each_fast_backend
def test_strides_and_empty_input(device, backend):
    b, a, offsets = inputs([30, 10], 3)
    compare(b.t().contiguous().t(), a[:, :1].expand(3, 40), offsets, backend, device)
    compare(torch.randn(3, 80)[:, ::2], a, offsets, backend, device)
    nothing = torch.zeros(2, 0, device=device, requires_grad=True)
    for offsets in (None, torch.zeros(1, dtype=torch.int64, device=device)):
        x = discounted_scan(nothing, 0.9, offsets=offsets, backend=backend)
        assert x.shape == (2, 0) and torch.autograd.grad(x.sum(), nothing)[0].shape == (2, 0)
    assert discounted_scan(torch.zeros(0, 5, device=device), 0.9, backend=backend).shape == (0, 5)


@cpu_only
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"b": torch.ones(8).half()}, r"b must be \(\.\.\., N\) float32 or float64"),
        ({"b": torch.tensor(1.0)}, r"b must be"),
        ({"a": torch.ones(7)}, r"a must broadcast to \(8,\)"),
        ({"a": torch.ones(8).double()}, "a must broadcast"),
        ({"a": torch.ones(2, 8)}, "a must broadcast"),
        ({"mask": torch.ones(8)}, r"mask must broadcast to \(8,\) as torch.bool"),
        ({"offsets": torch.tensor([0, 8]).int()}, r"offsets must be \(B \+ 1,\) int64"),
        ({"offsets": torch.tensor([0, 9])}, "offsets must begin with 0 and end with 8"),
        ({"offsets": torch.tensor([1, 8])}, "offsets must begin with 0 and end with 8"),
        ({"offsets": torch.tensor([0, 5, 3, 8])}, "offsets must not decrease; got 5 before 3"),
        ({"offsets": torch.zeros(0, dtype=torch.int64)}, "offsets"),
    ],
)
def test_wrong_arguments_are_refused(change, says):
    arguments = {"b": torch.ones(8), "a": 0.9, **change}
    with pytest.raises(ValueError, match=rf"^discounted_scan: {says}"):
        discounted_scan(arguments.pop("b"), arguments.pop("a"), **arguments)


@cpu_only
def test_opcheck_and_compile():
    b, a, offsets = inputs([3, 0, 5], 2)
    b.requires_grad_()
    for links in (a.requires_grad_(), None):
        for forward in (False, True):
            torch.library.opcheck(torch.ops.fuserl.discounted_scan, (b, links, 0.9, offsets, forward, None))

    def loss(b, a, offsets):
        return discounted_scan(2 * b, a, offsets=offsets, exclusive=True).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for function in (loss, compiled):
        function(b, a, offsets).backward()
    assert torch.allclose(b.grad / 2, torch.autograd.grad(loss(b, a, offsets), b)[0])


@pytest.mark.gpu
def test_nothing_waits_for_the_device():
    b, a, offsets = (x.cuda() for x in inputs([3000, 0, 5]))
    torch.cuda.set_sync_debug_mode("error")
    try:
        discounted_scan(b, a, offsets=offsets, mask=b > 0, exclusive=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(INTERPRETING, reason="is the other process")
@pytest.mark.parametrize("file", ["discounted_scan", "gae", "returns", "segment_sum"])
def test_triton_in_the_interpreter(file):
    run_interpreted(__file__.replace("test_discounted_scan", f"test_{file}"))


@cpu_only
def test_imports_without_triton():
    program = (
        "import sys; sys.modules['triton'] = None; import torch, fuserl; "
        "assert fuserl.discounted_scan(torch.ones(3), 1.0, backend='reference').tolist() == [3, 2, 1]"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
