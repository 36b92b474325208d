"""gae against the textbook loop in extended precision: ragged segments, masks, values beyond an end, macro steps.

Triton takes the same tests under its interpreter, in the process that test_discounted_scan starts.
"""

import pytest
import torch
from backends import INTERPRETING, cpu_only, each_backend, each_fast_backend, threads
from hypothesis import given, settings
from hypothesis import strategies as st
from sequences import SHAPES, TILE, both_dtypes, gae_by_hand, offsets_of
from tolerance import check

from fuserl.kernels.discounted_scan import discounted_scan
from fuserl.kernels.gae import gae
from fuserl.kernels.segment_sum import segment_mean, segment_sum, to_tokens

BACKEND = "triton" if INTERPRETING else "cpu"


def inputs(lengths, channels=1, dtype=torch.float32):
    """Rewards, values, the value beyond each segment, and offsets."""
    offsets = offsets_of(lengths)
    rewards, values = torch.randn(2, channels, int(offsets[-1]), dtype=dtype)
    return rewards, values, torch.randn(channels, len(lengths), dtype=dtype), offsets


def moved(device, *tensors, **named):
    return [x.to(device) for x in tensors], {
        name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in named.items()
    }


def compare(rewards, values, offsets, backend, device="cpu", *, gamma=0.99, lam=0.95, **how):
    (r, v), there = moved(device, rewards, values, gamma=gamma, lam=lam, offsets=offsets, **how)
    got = gae(r, v, backend=backend, **there)
    truth = gae_by_hand(rewards, values, gamma, lam, offsets, **how)
    plain = gae_by_hand(rewards, values, gamma, lam, offsets, precision=rewards.numpy().dtype.type, **how)
    for name, *three in zip(("advantages", "returns"), got, truth, plain, strict=True):
        assert three[0].shape == rewards.shape and three[0].dtype == rewards.dtype
        check(name, three[0].cpu().reshape(three[1].shape), three[1], three[2], rewards.dtype)
    return got


@each_backend
@both_dtypes
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_textbook(shape, dtype, device, backend):
    rewards, values, beyond, offsets = inputs(SHAPES[shape], 1, dtype)
    compare(rewards, values, offsets, backend, device)
    compare(rewards, values, offsets, backend, device, gamma=0.9999, lam=0.9998, bootstrap=beyond)


@each_backend
@pytest.mark.parametrize("share", [0.97, 0.6, 0.01])
def test_masked_tokens_are_passed_over(share, device, backend):
    rewards, values, beyond, offsets = inputs([5, 0, 1, 3 * TILE + 3, 40, TILE], 2)
    mask = torch.rand(rewards.shape) < share
    mask[:, -TILE + 9 :] = False  # padding, longer than what a program looks at
    for also in ({}, {"bootstrap": beyond}):
        plain = compare(rewards, values, offsets, backend, device, mask=mask, **also)
        bad = [torch.where(mask, x, torch.nan) for x in (rewards, values)]
        (r, v), there = moved(device, *bad, offsets=offsets, mask=mask, **also)
        again = gae(r, v, gamma=0.99, lam=0.95, backend=backend, **there)
        for some, others in zip(plain, again, strict=True):
            assert torch.equal(some, others) and not some.cpu()[~mask].any()


@each_backend
def test_discounts_per_token(device, backend):
    """Where an episode ends inside a segment gamma is 0; on tokens of a message it and lam are 1."""
    rewards, values, beyond, offsets = inputs([TILE + 30, 2, 0, 9], 2)
    gamma = torch.where(torch.rand(rewards.shape) < 1e-3, 0.0, 0.9999)
    lam = torch.where(torch.rand(rewards.shape[1]) < 0.999, 1.0, 0.5)
    compare(rewards, values, offsets, backend, device, gamma=gamma, lam=lam, bootstrap=beyond)
    compare(rewards, values, offsets, backend, device, gamma=gamma[0])
    compare(rewards, values, offsets, backend, device, lam=lam, mask=rewards > -1)


@each_fast_backend
@pytest.mark.parametrize("masked", [False, True])
def test_dense_rows_are_packed_segments(masked, device, backend):
    rewards, values, beyond, _ = (x.to(device) for x in inputs([3 * (TILE + 11)]))
    offsets = (TILE + 11) * torch.arange(4, device=device)
    how = dict(gamma=0.99, lam=0.95, backend=backend)
    beyond = beyond.expand(1, 3)
    mask = rewards[0] > -0.5 if masked else None
    packed = gae(rewards[0], values[0], offsets=offsets, bootstrap=beyond[0], mask=mask, **how)
    dense = gae(
        rewards.view(3, -1), values.view(3, -1), bootstrap=beyond[0], mask=mask.view(3, -1) if masked else None, **how
    )
    for some, others in zip(packed, dense, strict=True):
        assert torch.equal(some.view(3, -1), others)


@each_fast_backend
def test_padding_is_as_good_as_absent(device, backend):
    """A padded batch gives what the packed one gives."""
    lengths = [7, 40, 1, 33]
    rewards, values, beyond, offsets = (x.to(device) for x in inputs(lengths, 1, torch.float64))
    how = dict(gamma=0.9, lam=0.8, backend=backend)
    packed = gae(rewards[0], values[0], offsets=offsets, bootstrap=beyond[0], **how)
    mask = torch.arange(50, device=device) < torch.tensor(lengths, device=device)[:, None]
    padded = [torch.full(mask.shape, torch.nan, dtype=torch.float64, device=device) for _ in range(2)]
    for dense, x in zip(padded, (rewards, values), strict=True):
        dense[mask] = x[0]
    for some, others in zip(packed, gae(*padded, mask=mask, bootstrap=beyond[0], **how), strict=True):
        assert torch.allclose(some, others[mask], atol=1e-13)


@each_backend
@pytest.mark.parametrize("masked", [False, True])
def test_gradients(masked, device, backend):
    rewards, values, beyond, offsets = (x.to(device) for x in inputs([0, 4, 1, 0, 5], 2, torch.float64))
    mask = torch.rand(rewards.shape, device=device) < 0.7 if masked else None
    gamma, lam = 0.5 + 0.5 * torch.rand(2, rewards.shape[1], device=device, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (rewards, values, beyond, gamma, lam)]

    def function(r, v, beyond, gamma, lam):
        return gae(r, v, bootstrap=beyond, gamma=gamma, lam=lam, offsets=offsets, mask=mask, backend=backend)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=INTERPRETING)
    with torch.no_grad():  # the way of one pass
        fused = function(*leaves)
    for some, others in zip(fused, function(*leaves), strict=True):
        assert torch.allclose(some, others, atol=1e-13)


@each_backend
def test_limits(device, backend):
    rewards, values, beyond, offsets = (x.to(device) for x in inputs([5, 0, 70, 1], 1, torch.float64))
    how = dict(offsets=offsets, bootstrap=beyond, backend=backend)
    advantages, returns = gae(rewards, values, gamma=0.9, lam=0.0, **how)
    last = torch.zeros_like(rewards, dtype=torch.bool)
    last[:, offsets[1:] - 1] = True
    ahead = torch.where(last, to_tokens(beyond, offsets, 76, backend=backend), values.roll(-1))
    assert torch.allclose(returns, rewards + 0.9 * ahead, atol=1e-13)  # one step
    _, returns = gae(rewards, values, gamma=0.9, lam=1.0, **how)
    ended = rewards + torch.where(last, 0.9 * ahead, 0.0)
    assert torch.allclose(returns, discounted_scan(ended, 0.9, offsets=offsets, backend=backend), atol=1e-12)
    right = torch.ones_like(values)  # values that are right leave nothing to learn
    advantages, _ = gae(last.double(), right, gamma=1.0, lam=0.95, offsets=offsets, backend=backend)
    assert not advantages.any()


@cpu_only
def test_values_that_are_large_cost_their_digits_and_no_more():
    rewards, values, _, offsets = inputs([3000, 17])
    compare(rewards, 1e4 + values, offsets, "cpu", gamma=1.0)


def macro_steps(lengths, n):
    """Where runs of n tokens begin; the last token of each segment is a run of its own (arXiv:2410.02743)."""
    starts, begin = [], 0
    for length in lengths:
        starts += [*range(begin, begin + length - 1, n), begin + length - 1] if length else []
        begin += length
    return torch.tensor([*starts, begin])


def macro_gae(rewards, values, offsets, steps, reduce=segment_mean, gamma=1.0, lam=0.95):
    rewards, values = reduce(rewards, steps, backend=BACKEND), segment_mean(values, steps, backend=BACKEND)
    counted = torch.searchsorted(steps, offsets)
    found = gae(rewards, values, offsets=counted, gamma=gamma, lam=lam, backend=BACKEND)
    return (rewards, values, counted, *found)


def test_macro_steps_of_one_token_are_tokens():
    rewards, values, _, offsets = inputs([5, 0, 1, 40], 1, torch.float64)
    steps = macro_steps([5, 0, 1, 40], 1)
    *_, advantages, returns = macro_gae(rewards, values, offsets, steps)
    for some, others in zip(
        (advantages, returns), gae(rewards, values, offsets=offsets, gamma=1.0, lam=0.95, backend=BACKEND), strict=True
    ):
        assert torch.equal(to_tokens(some, steps, 46, backend=BACKEND), others)


def test_macro_steps_sum_what_is_left_and_carry_a_reward_further():
    rewards, values, _, offsets = inputs([23, 0, 7], 1, torch.float64)
    steps = macro_steps([23, 0, 7], 5)
    r, v, counted, advantages, _ = macro_gae(rewards, values, offsets, steps, segment_sum, lam=1.0)
    for begin, end in ((0, int(counted[1])), (int(counted[2]), int(counted[3]))):
        for k in range(begin, end):
            assert float(advantages[0, k]) == pytest.approx(float(r[0, k:end].sum() - v[0, k]), abs=1e-12)
    reward = torch.zeros(1, 100, dtype=torch.float64)
    reward[0, -1] = 1.0
    nothing, whole = torch.zeros_like(reward), torch.tensor([0, 100])
    for n, power in ((1, 99), (5, 20)):
        *_, advantages, _ = macro_gae(reward, nothing, whole, macro_steps([100], n))
        assert float(advantages[0, 0]) == pytest.approx(0.95**power, abs=1e-12)


@settings(max_examples=4 if INTERPRETING else 60, deadline=None)
@given(lengths=st.lists(st.integers(0, 70), max_size=9), channels=st.integers(1, 2), seed=st.integers(0, 99))
def test_any_lengths(lengths, channels, seed):
    torch.manual_seed(seed)
    rewards, values, beyond, offsets = inputs(lengths, channels)
    how = {"mask": torch.rand(rewards.shape) < 0.8} if seed % 2 else {}
    whole = compare(rewards, values, offsets, BACKEND, bootstrap=beyond, **how)
    for s, (begin, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        alone = gae(
            rewards[:, begin:end], values[:, begin:end], gamma=0.99, lam=0.95, bootstrap=beyond[:, s], backend=BACKEND,
            **{name: x[:, begin:end] for name, x in how.items()},
        )  # fmt: skip
        assert all(torch.equal(x[:, begin:end], y) for x, y in zip(whole, alone, strict=True))


@each_fast_backend
def test_threads_and_ten_runs(device, backend):
    lengths = [6 * TILE + 7, 3, 0]
    rewards, values, beyond, offsets = (x.to(device) for x in inputs(lengths))
    for mask in (None, rewards > -2):
        found, options = [], {"offsets": offsets, "bootstrap": beyond, "mask": mask, "backend": backend}
        for run in range(10):
            with threads((1, 2, 5)[run % 3]):
                found.append(gae(rewards, values, gamma=0.99, lam=0.95, **options))
        assert all(torch.equal(x, y) for each in found for x, y in zip(each, found[0], strict=True))


@each_fast_backend
def test_strides_and_empty_input(device, backend):
    rewards, _, _, offsets = inputs([30, 10], 3)
    compare(rewards.t().contiguous().t(), torch.randn(3, 80)[:, ::2], offsets, backend, device)
    nothing = torch.zeros(2, 0, device=device)
    for x in gae(nothing, nothing, gamma=1.0, lam=1.0, backend=backend):
        assert x.shape == (2, 0)
    scalar = gae(nothing[0], nothing[0], gamma=1.0, lam=1.0, offsets=torch.zeros(3, dtype=torch.int64, device=device))
    assert scalar[0].shape == (0,)


@cpu_only
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rewards": torch.ones(8).half()}, r"rewards must be \(\.\.\., N\) float32 or float64"),
        ({"values": torch.ones(7)}, r"values must broadcast to \(8,\)"),
        ({"values": torch.ones(8).double()}, "values must broadcast"),
        ({"gamma": torch.ones(2)}, "gamma must broadcast"),
        ({"mask": torch.ones(8)}, "mask must broadcast"),
        ({"bootstrap": torch.ones(3), "offsets": torch.tensor([0, 3, 8])}, r"bootstrap must be \(2,\)"),
        ({"bootstrap": torch.ones(1)}, r"bootstrap must be \(\)"),
        ({"offsets": torch.tensor([0, 9])}, "offsets must begin with 0 and end with 8"),
    ],
)
def test_wrong_arguments_are_refused(change, says):
    arguments = {"rewards": torch.ones(8), "values": torch.ones(8), "gamma": 1.0, "lam": 1.0, **change}
    with pytest.raises(ValueError, match=f"^gae: {says}"):
        gae(arguments.pop("rewards"), arguments.pop("values"), **arguments)


@cpu_only
def test_opcheck_and_compile():
    rewards, values, beyond, offsets = inputs([3, 0, 5], 2)
    tensors = rewards, values, None, values, beyond, rewards > 0, offsets
    torch.library.opcheck(torch.ops.fuserl.gae, (*tensors, 0.9, 0.8, None))
    torch.library.opcheck(torch.ops.fuserl.gae, (rewards, values, *[None] * 5, 0.9, 0.8, None))

    def both(rewards, values, gamma):
        return gae(rewards, 2 * values, gamma=gamma, lam=0.9, offsets=offsets, bootstrap=beyond, mask=rewards > 0)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for some, others in zip(compiled(rewards, values, 0.9), both(rewards, values, 0.9), strict=True):
        assert torch.equal(some, others)
    leaf = values.clone().requires_grad_()
    compiled(rewards, leaf, 0.9)[0].sum().backward()
    assert torch.allclose(leaf.grad, torch.autograd.grad(both(rewards, leaf, 0.9)[0].sum(), leaf)[0])


@pytest.mark.gpu
def test_nothing_waits_for_the_device():
    rewards, values, beyond, offsets = (x.cuda() for x in inputs([3000, 0, 5]))
    torch.cuda.set_sync_debug_mode("error")
    try:
        gae(rewards, values, gamma=1.0, lam=0.9, offsets=offsets, bootstrap=beyond, mask=rewards > 0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
