"""divergence against extended precision: values and gradients to both sides, every backend, edges and identities."""

import math

import pytest
import torch
from backends import FAST, INTERPRETING, cpu_only, each_backend, each_fast_backend, run_interpreted, threads
from divergences import KINDS, by_hand, with_roundings
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import eps

import fuserl
from fuserl.kernels import divergence_rows
from fuserl.kernels.divergence import divergence

each_kind = pytest.mark.parametrize("kind", KINDS)

SHAPES = [(1, 1), (40, 2), (20, 17), (20, 1000), (10, 4097), (2, 9, 129), (0, 7)]
if INTERPRETING:  # which takes its time over each row
    SHAPES = [(2, 17), (1, 4097), (0, 7)]
FEW = 2 if INTERPRETING else 5
OPTIONS = [
    ("jensen_shannon", {"beta": 0.1}), ("jensen_shannon", {"beta": 0.9}), ("alpha", {"alpha": -0.5}),
    ("alpha", {"alpha": 0.2}), ("alpha", {"alpha": 0.99}), ("alpha", {"alpha": 1.01}), ("alpha", {"alpha": 1.5}),
]  # fmt: skip
# At which the divergence is finite whichever tokens one side lacks.
BOUNDED = [("jensen_shannon", {"beta": 0.3}), ("alpha", {"alpha": 0.3}), ("total_variation", {})]
BOUNDED += [("squared_hellinger", {})]


def pair(*shape, dtype=torch.float32, device="cpu", apart=1.0):
    """Logits with large probabilities, and others at a distance of `apart` in standard deviation."""
    x = torch.randn(*shape, device=device) * 3
    return x.to(dtype), (x + apart * torch.randn(*shape, device=device)).to(dtype)


def run(p, q, g, kind, **options):
    """(divergence, entropy, dp, dq) with g (2, ...) from above."""
    p, q = (x.detach().clone().requires_grad_() for x in (p, q))
    outputs = divergence(p, q, kind, detach_q=False, **options)
    torch.autograd.backward(outputs, [x.to(o.dtype) for x, o in zip(g, outputs, strict=True)])
    return *(o.detach() for o in outputs), p.grad, q.grad


def compare(p, q, kind, backend, rough=False, **options):
    g = torch.randn(2, *p.shape[:-1], device=p.device)
    got = run(p, q, g, kind, backend=backend, **options)
    accumulator = torch.float64 if p.dtype == torch.float64 else torch.float32
    assert [x.dtype for x in got] == [accumulator, accumulator, p.dtype, q.dtype]
    if not p.numel():
        assert got[0].shape == got[1].shape == p.shape[:-1] and got[2].shape == p.shape
        return
    truth = with_roundings(p, q, g, kind, rough=rough or backend == "reference", **options)
    for name, some, (expected, roundings) in zip(("divergence", "entropy", "dp", "dq"), got, truth, strict=True):
        kept, smallest = eps(some.dtype), torch.finfo(some.dtype).smallest_normal
        allowed = eps(accumulator) * roundings + kept * (expected.abs() + smallest) + 1e-18  # where the truth cancels
        error = (some.cpu().double() - expected).abs()
        assert (error <= allowed).all(), f"{name}: {(error / allowed).max():.3f} of what is allowed"
        assert allowed.norm() < 1000 * kept * (1 + expected.norm()), f"{name}: allows too much"


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@each_kind
def test_equals_the_definition(kind, shape, dtype, device, backend):
    compare(*pair(*shape, dtype=dtype, device=device), kind, backend)


@each_backend
@pytest.mark.parametrize("kind,options", OPTIONS)
def test_parameters(kind, options, device, backend):
    compare(*pair(3, 500, device=device), kind, backend, **options)
    compare(*pair(3, 50, device=device, dtype=torch.float64), kind, backend, **options)


@each_backend
@each_kind
def test_temperatures(kind, device, backend):
    p, q = pair(FEW, 300, device=device, apart=0.3)
    compare(p, q, kind, backend, temperature=0.7)
    compare(p, q, kind, backend, temperature=1.5, temperature_q=1.25)
    compare(p, q, kind, backend, temperature=torch.rand(FEW, device=device) + 0.5, temperature_q=1.0)
    compare(p[None], q[None], kind, backend, temperature_q=torch.rand(FEW, device=device) + 1)


@each_backend
def test_strides_and_two_dtypes(device, backend):
    p, q = pair(2, FEW + 1, 130, device=device)
    compare(p[:, :-1, :65], q[:, 1:, 65:], "reverse_kl", backend)
    compare(p[:, :-1, ::2], q[:, 1:, ::2], "forward_kl", backend)
    compare(p.transpose(0, 1), q.transpose(0, 1), "jensen_shannon", backend)
    compare(p[:1].expand_as(q), q, "total_variation", backend)
    compare(p.bfloat16(), q, "reverse_kl", backend)
    compare(p, q.half(), "forward_kl", backend)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind,options", [*((kind, {}) for kind in KINDS), *OPTIONS])
def test_of_itself_exactly_zero(kind, options, dtype, device, backend):
    p = pair(3, 301 if INTERPRETING else 3001, dtype=dtype, device=device)[0]
    p[1] += 1e4
    p[2, 5:] = -torch.inf
    g = torch.tensor([[1.0], [0.0]], device=device).expand(2, 3)
    for temperature in (1.0, 0.7):
        value, _, d_p, d_q = run(p, p, g, kind, backend=backend, temperature=temperature, **options)
        assert not value.any() and not d_p.any() and not d_q.any()


@each_fast_backend
@pytest.mark.parametrize("kind,options", [*((kind, {}) for kind in KINDS), *OPTIONS])
def test_small_divergences_keep_their_digits(kind, options, device, backend):
    """Divergences of 1e-9 are as exact as those of 1; a sum of p (log p - log q) has no digit of them in float32."""
    p, _ = pair(3, 400, device=device)
    q = p + 1e-4 * torch.randn_like(p)
    g = torch.tensor([[1.0], [0.0]], device=device).expand(2, 3)
    got, truth = run(p, q, g, kind, backend=backend, **options), by_hand(p, q, g, kind, **options)
    # e^x costs |x| roundings of its argument. What is wrong with the two normalisers is the same for all tokens: it has
    # a square in the divergences, which are flat at 0, all but total_variation, and none in the gradients.
    allowed, normalisers = (8 + 2 * p.log_softmax(-1).abs().max().item()) * eps(torch.float32), 4 * eps(torch.float32)
    flat = kind != "total_variation"
    assert not flat or (truth[0] < 1e-7).all()
    offset = normalisers**2 if flat else normalisers
    assert ((got[0].cpu() - truth[0]).abs() <= allowed * truth[0] + offset).all()
    for i in (2, 3) if flat else ():  # the sign of a difference as small as what is wrong with a normaliser is open
        assert ((got[i].cpu() - truth[i]).norm(dim=1) <= allowed * truth[i].norm(dim=1)).all()


@each_backend
@each_kind
@pytest.mark.parametrize("case", ["1e4", "-120", "peaks"])
def test_edges(case, kind, device, backend):
    p, q = pair(3, 2500, device=device, apart=0.5)
    if case == "1e4":
        p, q = ((x + torch.where(p > 3, 1e4, 0.0)) for x in (p, q))
    elif case == "-120":
        p, q = p - 120, q - 120
    elif backend != "cpu" and kind == "total_variation":
        pytest.skip("the sign of a difference smaller than a rounding of lse")
    else:
        p[:, 7], q[:, 7] = 30.0, 29.0
    compare(p, q, kind, backend)


@each_backend
@pytest.mark.parametrize("kind,options", [*((kind, {}) for kind in KINDS), *OPTIONS, ("alpha", {"alpha": 0.0})])
def test_tokens_that_neither_has_do_not_count(kind, options, device, backend):
    p, q = pair(3, 2600, device=device)
    g = torch.randn(2, 3, device=device)
    kept = torch.arange(2600, device=device) % 5 > 1
    kept[:2100] = False
    expected = run(p[:, kept], q[:, kept], g, kind, backend=backend, **options)
    got = run(*(x.masked_fill(~kept, -torch.inf) for x in (p, q)), g, kind, backend=backend, **options)
    for some, others in zip(got[:2], expected[:2], strict=True):
        torch.testing.assert_close(some, others, rtol=1e-5, atol=1e-6)
    for some, others in zip(got[2:], expected[2:], strict=True):
        assert not some[:, ~kept].any()
        torch.testing.assert_close(some[:, kept], others, rtol=1e-4, atol=1e-6)


@each_backend
@pytest.mark.parametrize("kind,options", BOUNDED)
def test_a_bounded_divergence_where_one_side_lacks_tokens(kind, options, device, backend):
    p, q = pair(4, 300, device=device)
    p[0, :100], q[1, 50:], q[2, :150], p[2, 150:] = (torch.tensor(-torch.inf),) * 4
    g = torch.randn(2, 4, device=device)
    far = [x.cpu().double().masked_fill(x.cpu() == -torch.inf, -5e3) for x in (p, q)]
    got, truth = run(p, q, g, kind, backend=backend, **options), by_hand(*far, g, kind, **options)
    for some, others in zip(got, truth, strict=True):
        torch.testing.assert_close(some.cpu().double(), others, rtol=1e-4, atol=2e-6)


@each_backend
@pytest.mark.parametrize(
    "kind,options,lacking",
    [
        ("reverse_kl", {}, "q"), ("forward_kl", {}, "p"), ("chi_squared", {}, "q"), ("alpha", {"alpha": 1.5}, "q"),
        ("alpha", {"alpha": -1.0}, "p"),
    ],
)  # fmt: skip
def test_infinite_where_a_token_is_missing_and_then_without_gradient(kind, options, lacking, device, backend):
    p, q = pair(3, 70, device=device)
    missing, there = (p, q) if lacking == "p" else (q, p)
    missing[0, 3] = -torch.inf
    there[0, 3] = -150.0  # too small for its format is not 0
    g = torch.ones(2, 3, device=device)
    value, _, d_p, d_q = run(p, q, g, kind, backend=backend, **options)
    assert value[0] == torch.inf and value[1:].isfinite().all()
    _, _, entropy_only, none = run(p, q, torch.stack([0 * g[0], g[1]]), kind, backend=backend, **options)
    assert torch.equal(d_p[0], entropy_only[0]) and d_p[0].any() and not d_q[0].any() and not none.any()
    other = "forward_kl" if kind in ("reverse_kl", "chi_squared") else "reverse_kl"
    if "alpha" not in kind:
        assert run(p, q, g, other, backend=backend)[0].isfinite().all()


@each_backend
@each_kind
def test_nan_is_not_hidden_but_where_nothing_is_asked(kind, device, backend):
    p, q = pair(6, 20, device=device)
    p[0, 4], p[1, 4], p[2], q[3, 4], q[4] = torch.nan, torch.inf, -torch.inf, torch.nan, -torch.inf
    g = torch.ones(2, 6, device=device)
    value, _, d_p, d_q = run(p, q, g, kind, backend=backend)
    assert value[:5].isnan().all() and d_p[:5].isnan().all() and d_q[:5].isnan().all()
    assert value[5].isfinite() and d_p[5].isfinite().all() and d_q[5].isfinite().all()
    g[:, :5] = 0
    _, _, d_p, d_q = run(p, q, g, kind, backend=backend)
    assert not d_p[:5].any() and not d_q[:5].any() and d_p[5].any()


@settings(max_examples=1 if INTERPRETING else 40, deadline=None)
@given(rows=st.integers(1, 4), columns=st.integers(1, 90), apart=st.floats(1e-3, 8), seed=st.integers(0, 999))
def test_identities(rows, columns, apart, seed):
    torch.manual_seed(seed)
    p, q = pair(rows, columns, dtype=torch.float64, apart=apart)
    backend, close = FAST[0][1], dict(rtol=1e-9, atol=1e-13)
    g = torch.stack([torch.ones(rows), torch.zeros(rows)])
    results = {kind: run(p, q, g, kind, backend=backend) for kind in KINDS}
    value = {kind: result[0] for kind, result in results.items()}
    assert all((x >= 0).all() for x in value.values())
    assert (value["total_variation"] <= 1 + 1e-12).all() and (value["squared_hellinger"] <= 1 + 1e-12).all()
    assert (value["jensen_shannon"] <= math.log(2) + 1e-12).all()
    assert (value["total_variation"].square() <= value["reverse_kl"] / 2 + 1e-12).all()
    assert (value["squared_hellinger"] <= value["total_variation"] + 1e-12).all()
    for _, _, d_p, d_q in results.values():
        torch.testing.assert_close(d_p.sum(-1), torch.zeros_like(d_p[:, 0]), rtol=0, atol=1e-9 * (1 + d_p.abs().max()))
        torch.testing.assert_close(d_q.sum(-1), torch.zeros_like(d_q[:, 0]), rtol=0, atol=1e-9 * (1 + d_q.abs().max()))

    def same(kind, other, factor=1.0, swapped=False, **options):
        sides = (q, p) if swapped else (p, q)
        got = run(*sides, g, other, backend=backend, **options)
        got = (got[0], *((got[3], got[2]) if swapped else (got[2], got[3])))
        for some, others in zip(got, (results[kind][0], *results[kind][2:]), strict=True):
            torch.testing.assert_close(factor * some, others, **close)

    same("jensen_shannon", "jensen_shannon", swapped=True)
    same("reverse_kl", "forward_kl", swapped=True)
    same("total_variation", "total_variation", swapped=True)
    same("forward_kl", "alpha", alpha=0.0)
    same("reverse_kl", "alpha", alpha=1.0)
    same("squared_hellinger", "alpha", 0.25)
    same("chi_squared", "alpha", 2.0, alpha=2.0)


@each_fast_backend
def test_alpha_tends_to_both_kls(device, backend):
    p, q = pair(4, 200, dtype=torch.float64, device=device)
    for end, kind in ((0.0, "forward_kl"), (1.0, "reverse_kl")):
        limit = divergence(p, q, kind, backend=backend)[0]
        for small in (1e-4, -1e-4, 1e-8):
            near = divergence(p, q, "alpha", alpha=end + small, backend=backend)[0]
            torch.testing.assert_close(near, limit, rtol=100 * abs(small) + 1e-7, atol=0)


@pytest.mark.parametrize("columns_first", [False, True])
@each_fast_backend
def test_detached_and_in_place(device, backend, columns_first):
    p, q = pair(5, 700, device=device)
    g = torch.randn(2, 5, device=device)
    expected = run(p, q, g, "jensen_shannon", backend=backend)
    p.requires_grad_()
    q.requires_grad_()
    outputs = divergence(p, q, "jensen_shannon", backend=backend)
    gradients = torch.autograd.grad(outputs, (p, q), list(g), allow_unused=True)
    assert torch.equal(gradients[0], expected[2]) and gradients[1] is None
    scaled = p.T.contiguous().T if columns_first else p * 1.0
    outputs = divergence(scaled, q, "jensen_shannon", detach_q=False, inplace_backward=True, backend=backend)
    gradients = torch.autograd.grad(outputs, (scaled, q), list(g), retain_graph=True)
    assert gradients[0].data_ptr() == scaled.data_ptr()
    assert torch.equal(gradients[0], expected[2]) and torch.equal(gradients[1], expected[3])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        sum(o.sum() for o in outputs).backward()


@each_fast_backend
def test_runs_threads_and_neighbours_change_nothing(device, backend):
    count = 9 if INTERPRETING else 300
    p, q = pair(count, 1003, device=device)
    g, own = torch.randn(2, count, device=device), torch.get_num_threads()
    whole = run(p, q, g, "jensen_shannon", backend=backend)
    for number in (own,) if INTERPRETING else (*[own] * 9, 1, 2, 3):
        with threads(number):
            again = run(p, q, g, "jensen_shannon", backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(again, whole, strict=True))
    for n in (1, 2, 8) if INTERPRETING else (1, 2, 8, 15, 16, 17):
        part = run(p[:n], q[:n], g[:, :n], "jensen_shannon", backend=backend)
        assert all(torch.equal(a, b[:n]) for a, b in zip(part, whole, strict=True))


@cpu_only
@pytest.mark.parametrize("kind", KINDS)
def test_every_instruction_set(kind, isa):
    compare(*pair(2, 4099), kind, "cpu")
    compare(*pair(2, 77, dtype=torch.bfloat16), kind, "cpu")


@cpu_only
@pytest.mark.parametrize("kind,options", [*((kind, {}) for kind in KINDS), *OPTIONS])
def test_gradcheck(kind, options):
    p, q = (x.requires_grad_() for x in pair(3, 11, dtype=torch.float64))

    def function(p, q):
        return divergence(p, q, kind, temperature=1.3, temperature_q=0.8, detach_q=False, backend="cpu", **options)

    assert torch.autograd.gradcheck(function, (p, q))


@cpu_only
def test_beyond_two_to_the_thirty_one():
    p, q = pair(1, 65536)
    got = divergence(p.expand(32769, 65536)[-2:], q.expand(32769, 65536)[-2:], "reverse_kl", backend="cpu")
    assert torch.equal(got[0], divergence(p, q, "reverse_kl", backend="cpu")[0].expand(2))


@cpu_only
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(dynamic):
    def loss(p, q, beta):
        value, entropy = divergence(p * 2, q, "jensen_shannon", beta=beta, temperature=0.9, detach_q=False)
        return (value - 0.1 * entropy).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows, beta in ((4, 0.5), (7, 0.3)):
        p, q = (x.requires_grad_() for x in pair(rows, 50))
        expected = torch.autograd.grad(loss(p, q, beta), (p, q))
        assert all(map(torch.equal, torch.autograd.grad(compiled(p, q, beta), (p, q)), expected))


@cpu_only
def test_opcheck():
    p, q = (x.requires_grad_() for x in pair(4, 33))
    rule = (2, 0.3, 1.0)
    torch.library.opcheck(torch.ops.fuserl.divergence, (p, q, torch.ones(2, 4), *rule, False, "cpu"))
    kept = torch.ones(divergence_rows.STATISTICS, 4)
    for wanted in (True, False):
        arguments = (p.detach(), q.detach(), torch.ones(2, 4), kept, torch.ones(2, 4), *rule, wanted, "cpu")
        torch.library.opcheck(torch.ops.fuserl.divergence_backward, arguments)
        torch.library.opcheck(torch.ops.fuserl.divergence_backward_, arguments)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"logits_p": torch.zeros(3, 4).long()}, "logits_p must be .* of a floating dtype"),
        ({"logits_q": torch.zeros(3, 5)}, r"logits_q must be \(3, 4\) on cpu"),
        ({"logits_q": torch.zeros(3, 4, dtype=torch.float64)}, "both be float64 or neither"),
        ({"kind": "kl"}, "kind must be one of forward_kl, .*; got 'kl'"),
        ({"kind": "jensen_shannon", "beta": 1.0}, "beta must lie between 0 and 1"),
        ({"kind": "alpha", "alpha": math.inf}, "alpha must be finite"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"temperature_q": torch.tensor([1.0, -1.0, 1.0])}, "temperature .* must be positive"),
        ({"backend": "cudnn"}, "backend must be one of"),
    ],
)
def test_bad_input_gets_one_sentence(change, message):
    arguments = {"logits_p": torch.zeros(3, 4), "logits_q": torch.zeros(3, 4), "kind": "reverse_kl", **change}
    if INTERPRETING and "temperature_q" in change:
        pytest.skip("the C++ backend alone looks at each row's")
    with pytest.raises(ValueError, match=f"^divergence.*: .*{message}"):
        fuserl.divergence(**arguments)


@cpu_only
def test_triton_in_the_interpreter():
    run_interpreted(__file__)
