"""sampled_divergence: the estimates and their derivatives, and what they are on average over every token there is."""

import math

import numpy as np
import pytest
import torch
from backends import FAST, INTERPRETING, cpu_only, each_backend, each_fast_backend, run_interpreted, threads
from divergences import KINDS, generator
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import eps

from fuserl.kernels.divergence import divergence
from fuserl.kernels.sampled_divergence import ESTIMATORS, LAUNCH, sampled_divergence

both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])

BLOCK = LAUNCH["BLOCK"]
SHAPES = [(), (17,), (3, 5, 7), (BLOCK + 1,), (0, 3)]
OPTIONS = [(kind, {}) for kind in (*ESTIMATORS, *KINDS)]
OPTIONS += [("jensen_shannon", {"beta": 0.1}), ("alpha", {"alpha": -0.5}), ("alpha", {"alpha": 1.5})]
each_option = pytest.mark.parametrize("kind,options", OPTIONS)


def run(logprobs, ref_logprobs, kind, **options):
    """Values and derivatives."""
    leaf = logprobs.detach().clone().requires_grad_()
    values = sampled_divergence(leaf, ref_logprobs, kind, **options)
    return values.detach(), torch.autograd.grad(values, leaf, torch.ones_like(values))[0]


def by_hand(d, kind, **options):
    """The same of log-ratios in extended precision, and the size of what is subtracted in it."""
    d = d.cpu().double().numpy().astype(np.longdouble)
    if kind in ESTIMATORS:
        value = {"1": d, "2": d**2 / 2, "3": np.expm1(-d) + d}[kind[1]]
        derivative = {"k1": 1 + 0 * d, "k3": -np.expm1(-d)}.get(kind, d)
    else:
        u = np.exp(d)
        (f, slope), (f0, slope0) = generator(kind, u, **options), generator(kind, np.longdouble(1), **options)
        value, derivative = f - f0 - slope0 * (u - 1), u * (slope - slope0)
    return [torch.from_numpy(np.asarray(x, np.float64)) for x in (value, derivative)]


def pair(*shape, dtype=torch.float32, device="cpu", apart=1.0):
    logprobs = -3 * torch.rand(shape, device=device, dtype=dtype)
    return logprobs, logprobs + apart * torch.randn(shape, device=device, dtype=dtype)


@each_backend
@both_dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@each_option
def test_equals_the_definition(kind, options, shape, dtype, device, backend):
    logprobs, ref_logprobs = pair(*shape, dtype=dtype, device=device)
    got = run(logprobs, ref_logprobs, kind, backend=backend, **options)
    assert all(x.dtype == dtype and x.shape == logprobs.shape for x in got)
    d = (logprobs - ref_logprobs).cpu()
    # d has a few roundings, each of which e^(c d) multiplies by c d, and c is at most 2; eight more for the operations.
    allowed = (8 + 4 * d.abs()) * eps(dtype) * (2 * d).exp().add((-2 * d).exp())
    for some, truth in zip(got, by_hand(d, kind, **options), strict=True):
        assert ((some.cpu().double() - truth).abs() <= allowed).all()


@each_fast_backend
@both_dtypes
@each_option
def test_small_differences_keep_their_digits(kind, options, dtype, device, backend):
    d = torch.logspace(-4, -0.1, 60, dtype=torch.float64).to(dtype)
    d = torch.cat([d, -d]).to(device)
    got = run(d, 0 * d, kind, backend=backend, **options)
    truth = by_hand(d, kind, **options)
    for some, expected, smallest in zip(got, truth, (1e-17, 1e-17), strict=True):  # where the truth cancels
        assert ((some.cpu().double() - expected).abs() <= 40 * eps(dtype) * expected.abs() + smallest).all()


@each_backend
@each_option
def test_of_no_difference_exactly_nothing(kind, options, device, backend):
    d = torch.zeros(5, device=device)
    value, derivative = run(d, d, kind, backend=backend, **options)
    assert not value.any() and (kind == "k1" or not derivative.any())


@each_backend
@both_dtypes
@each_option
def test_on_average_over_the_vocabulary(kind, options, dtype, device, backend):
    """The expectation over enumerated tokens is the divergence, and of the gradients its gradient, as documented."""
    logits, other = (2 * torch.randn(1, 40, dtype=dtype, device=device) for _ in range(2))
    exact, of_policy = kind in KINDS, kind in ESTIMATORS
    full = kind if exact else "reverse_kl"
    leaf = logits.clone().requires_grad_()
    value = divergence(leaf, other, full, backend=backend, **options)[0]
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    leaf = logits.clone().requires_grad_()
    logprobs, ref_logprobs = leaf.log_softmax(-1)[0], other.log_softmax(-1)[0]
    estimates = sampled_divergence(logprobs, ref_logprobs, kind, backend=backend, **options)
    weights = (logprobs if of_policy else ref_logprobs).detach().exp()
    (found,) = torch.autograd.grad((weights * estimates).sum(), leaf)
    close = dict(rtol=1e-4, atol=1e-5) if dtype == torch.float32 else dict(rtol=1e-10, atol=1e-12)
    if kind != "k2":
        torch.testing.assert_close((weights * estimates).sum(0, keepdim=True), value, **close)
    if kind == "k1":
        gradient = 0 * gradient
    elif kind == "k3":
        leaf = logits.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(divergence(leaf, other, "forward_kl", backend=backend)[0].sum(), leaf)
    torch.testing.assert_close(found, gradient, **close)


@each_backend
@each_option
def test_clamp(kind, options, device, backend):
    d = torch.linspace(-6, 6, 49, device=device)
    value, derivative = run(d, 0 * d, kind, clamp=2.0, backend=backend, **options)
    within, _ = run(d.clamp(-2, 2), 0 * d, kind, backend=backend, **options)
    assert torch.equal(value, within) and not derivative[d.abs() > 2].any()
    expected = run(d, 0 * d, kind, backend=backend, **options)[1]
    assert torch.equal(derivative[d.abs() <= 2], expected[d.abs() <= 2])


@each_backend
@pytest.mark.parametrize("kind", KINDS)
def test_overflow_is_infinite_and_without_gradient(kind, device, backend):
    d = torch.tensor([200.0, torch.inf], device=device)
    value, derivative = run(d, torch.zeros_like(d), kind, backend=backend)
    assert value.tolist() == [math.inf] * 2 and not derivative.any()
    value, derivative = run(-d, torch.zeros_like(d), kind, backend=backend)
    assert value.isfinite().tolist() == [True, kind != "forward_kl"] and derivative.isfinite().all()


@each_backend
@each_option
def test_nan_is_not_hidden(kind, options, device, backend):
    d = torch.tensor([0.5, torch.nan, 0.1], device=device)
    for clamp in (None, 1.0):
        for x, y in ((d, 0 * d.nan_to_num()), (0 * d.nan_to_num(), d)):
            value, derivative = run(x, y, kind, clamp=clamp, backend=backend, **options)
            assert value.isnan().tolist() == derivative.isnan().tolist() == [False, True, False]


@settings(max_examples=2 if INTERPRETING else 60, deadline=None)
@given(seed=st.integers(0, 999), apart=st.floats(1e-4, 20))
def test_none_but_k1_is_negative(seed, apart):
    torch.manual_seed(seed)
    logprobs, ref_logprobs = pair(50, apart=apart)
    for kind, options in OPTIONS:
        if kind not in ("k1", "k1+"):
            assert (sampled_divergence(logprobs, ref_logprobs, kind, backend=FAST[0][1], **options) >= 0).all(), kind


@each_fast_backend
def test_strides_threads_and_neighbours(device, backend):
    count = 2 * BLOCK + 5 if INTERPRETING else 100_000
    logprobs, ref_logprobs = pair(2, count, device=device)
    whole = run(logprobs, ref_logprobs, "jensen_shannon", backend=backend)
    for number in (1, 2, 3):
        with threads(number):
            again = run(logprobs, ref_logprobs, "jensen_shannon", backend=backend)
        assert all(map(torch.equal, again, whole))
    for part in ((slice(1, 2), slice(None, None, 3)), (slice(None), slice(17)), (slice(None), slice(-15, None))):
        some = run(logprobs[part], ref_logprobs[part], "jensen_shannon", backend=backend)
        assert all(torch.equal(a, b[part]) for a, b in zip(some, whole, strict=True))


@cpu_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_instruction_set(dtype, isa):
    for kind, options in OPTIONS:
        test_equals_the_definition(kind, options, (1003,), dtype, "cpu", "cpu")
        test_small_differences_keep_their_digits(kind, options, dtype, "cpu", "cpu")


@cpu_only
@each_option
def test_gradcheck(kind, options):
    logprobs, ref_logprobs = pair(20, dtype=torch.float64)
    if kind.endswith("+"):
        pytest.skip("its gradient is another estimate's on purpose")

    def function(x):
        return sampled_divergence(x, ref_logprobs, kind, clamp=3.0, backend="cpu", **options)

    assert torch.autograd.gradcheck(function, logprobs.requires_grad_())


@cpu_only
def test_opcheck_and_compile():
    logprobs, ref_logprobs = pair(20)
    for wanted in (True, False):
        arguments = logprobs.clone().requires_grad_(wanted), ref_logprobs, 3, True, 0, 0.0, 1.0, math.inf, wanted, "cpu"
        torch.library.opcheck(torch.ops.fuserl.sampled_divergence, arguments)

    def loss(x, y):
        return sampled_divergence(x * 2, y, "k3+", clamp=5.0).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for count in (20, 21):
        logprobs, ref_logprobs = pair(count)
        logprobs.requires_grad_()
        expected = torch.autograd.grad(loss(logprobs, ref_logprobs), logprobs)[0]
        assert torch.equal(torch.autograd.grad(compiled(logprobs, ref_logprobs), logprobs)[0], expected)


@cpu_only
def test_only_the_derivative_is_saved_and_only_when_wanted():
    logprobs, ref_logprobs = pair(100)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        sampled_divergence(logprobs.clone().requires_grad_(), ref_logprobs, "k3")
        assert saved == [(100,)]
        sampled_divergence(logprobs, ref_logprobs, "k3")
    assert saved == [(100,)]


@pytest.mark.parametrize(
    "change,message",
    [
        ({"logprobs": torch.zeros(3).half()}, "logprobs must be float32 or float64"),
        ({"ref_logprobs": torch.zeros(4)}, r"ref_logprobs must be \(3,\) torch.float32"),
        ({"ref_logprobs": torch.zeros(3, requires_grad=True)}, "ref_logprobs must not require a gradient"),
        ({"kind": "k4"}, "kind must be one of k1, k2, .*chi_squared; got 'k4'"),
        ({"clamp": 0.0}, "clamp must be positive"),
        ({"kind": "jensen_shannon", "beta": 0.0}, "beta must lie between 0 and 1"),
    ],
)
def test_bad_input_gets_one_sentence(change, message):
    arguments = {"logprobs": torch.zeros(3), "ref_logprobs": torch.zeros(3), "kind": "k3", **change}
    with pytest.raises(ValueError, match=f"^sampled_divergence: .*{message}"):
        sampled_divergence(**arguments)


@cpu_only
def test_triton_in_the_interpreter():
    run_interpreted(__file__)
