"""topk_divergence: equal to the divergence of the buckets, and to the whole one where every token is listed."""

import pytest
import torch
from backends import BACKENDS, INTERPRETING, cpu_only, each_backend, run_interpreted
from divergences import KINDS
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import eps

from fuserl.kernels.divergence import divergence
from fuserl.kernels.topk_divergence import reference, topk_divergence

each_kind = pytest.mark.parametrize("kind", KINDS)

ROWS = 2 if INTERPRETING else 12
SHIFTS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)  # equal logits, rounded elsewhere: one run alone may be right by chance
SHAPES = [((ROWS, 17), 1), ((ROWS, 1000), 64), ((2, ROWS, 129), 100), ((2, 4097), 5), ((0, 7), 2), ((ROWS, 1), 1)]


def lists(*shape, k, dtype=torch.float32, device="cpu", apart=1.0):
    """Student's logits, the teacher's k best tokens and their log-probs."""
    logits = torch.randn(*shape, device=device) * 3
    teacher = (logits + apart * torch.randn_like(logits)).log_softmax(-1)
    logprobs, ids = teacher.topk(k)
    return logits.to(dtype), ids, logprobs


def run(logits, ids, teacher, kind, g, function=topk_divergence, **options):
    """(divergence, entropy, dlogits) with g (2, ...) from above."""
    leaf = logits.detach().clone().requires_grad_()
    outputs = function(leaf, ids, teacher, kind, **options)
    torch.autograd.backward(outputs, [x.to(o.dtype) for x, o in zip(g, outputs, strict=True)])
    return *(o.detach() for o in outputs), leaf.grad


def by_buckets(logits, ids, teacher, kind, temperature=1.0, **options):
    """The definition: the divergence of one distribution over buckets from another, through torch's own autograd."""
    p, q = reference(logits, ids, temperature), teacher.to(logits.dtype)
    if ids.shape[-1] < logits.shape[-1]:
        q = torch.cat([q, torch.log1p(-q.exp().sum(-1, keepdim=True))], -1)
    t = temperature.unsqueeze(-1) if isinstance(temperature, torch.Tensor) else temperature
    logp = (logits / t).log_softmax(-1)
    value = divergence(p, q, kind, backend="reference", **options)[0]
    return value, -(logp.exp() * logp).sum(-1)


def compare(logits, ids, teacher, kind, backend, **options):
    g = torch.randn(2, *ids.shape[:-1], device=logits.device)
    got = run(logits, ids, teacher, kind, g, backend=backend, **options)
    accumulator = torch.float64 if logits.dtype == torch.float64 else torch.float32
    assert [x.dtype for x in got] == [accumulator, accumulator, logits.dtype]
    if not logits.numel():
        assert got[0].shape == ids.shape[:-1] and got[2].shape == logits.shape
        return
    wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    truth = run(logits.double(), ids, teacher.double(), kind, g, by_buckets, **wide)
    plain = [run(logits.to(accumulator) + shift, ids, teacher, kind, g, by_buckets, **options) for shift in SHIFTS]
    for i, name in enumerate(("divergence", "entropy", "dlogits")):
        exact = truth[i].reshape(len(got[0]), -1)
        wrong, *plainly = ((x[i].double().view_as(exact) - exact).norm(dim=1) for x in (got, *plain))
        # The reference is a plain program itself, as right or wrong as those.
        times = 4 if backend == "reference" else 2
        allowed = times * max(x.max() for x in plainly) + 4 * eps(got[i].dtype) * exact.norm(dim=1)
        assert (wrong <= allowed).all(), f"{name}: {(wrong / allowed).max():.3f} of what is allowed"


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16] if INTERPRETING else [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape,k", SHAPES[:2] if INTERPRETING else SHAPES, ids=str)
@each_kind
def test_equals_the_divergence_of_the_buckets(kind, shape, k, dtype, device, backend):
    compare(*lists(*shape, k=k, dtype=dtype, device=device), kind, backend)


@each_backend
def test_temperature_strides_and_large_logits(device, backend):
    logits, ids, teacher = lists(2 * ROWS, 300, k=20, device=device)
    compare(logits, ids, teacher, "reverse_kl", backend, temperature=0.75)
    compare(logits, ids, teacher, "forward_kl", backend, temperature=torch.rand(2 * ROWS, device=device) + 0.5)
    compare(logits + 1e4, ids, teacher, "jensen_shannon", backend)
    compare(logits[::2], ids[::2], teacher[::2], "alpha", backend, alpha=0.2)
    compare(logits.t().contiguous().t(), ids.flip(-1), teacher.flip(-1), "total_variation", backend)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@each_kind
def test_of_every_token_it_is_the_whole(kind, dtype, device, backend):
    logits, ids, _ = lists(5, 700, k=700, dtype=dtype, device=device)
    other = logits + torch.randn(5, 700, device=device).to(dtype)
    in_order = torch.arange(700, device=device).expand(5, 700)
    g = torch.randn(2, 5, device=device)
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    teacher = other.to(accumulator).log_softmax(-1)
    leaf = logits.clone().requires_grad_()
    whole = divergence(leaf, teacher, kind, backend=backend)
    gradient = torch.autograd.grad(whole, leaf, [x.to(accumulator) for x in g])[0]
    close = {torch.float64: (1e-11, 1e-13), torch.float32: (2e-5, 2e-6), torch.bfloat16: (2e-2, 1e-5)}[dtype]
    for listed in (in_order, ids):
        got = run(logits, listed, teacher.gather(-1, listed), kind, g, backend=backend)
        for some, others in zip(got[:2], whole, strict=True):
            torch.testing.assert_close(some, others.detach(), rtol=min(close[0], 2e-5), atol=close[1])
        torch.testing.assert_close(got[2], gradient, rtol=close[0], atol=close[1])


@each_backend
@each_kind
def test_of_itself_nothing(kind, device, backend):
    logits, ids, _ = lists(4, 500, k=40, device=device)
    teacher = logits.log_softmax(-1).gather(-1, ids)
    value, _, gradient = run(logits, ids, teacher, kind, torch.tensor([[1.0], [0.0]]).expand(2, 4), backend=backend)
    # Total variation is not flat at 0: what is wrong with the two tails shows.
    assert (value >= 0).all() and value.max() < (2e-6 if kind == "total_variation" else 1e-10)
    assert gradient.abs().max() < (1 if kind == "total_variation" else 2e-6)


@each_backend
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jensen_shannon", "squared_hellinger"])
def test_a_tail_too_small_to_be_told_from_none(kind, device, backend):
    logits, ids, _ = lists(4, 90, k=9, device=device)
    logits = torch.full_like(logits, -40.0).scatter(-1, ids, logits.gather(-1, ids))
    teacher = torch.zeros_like(ids, dtype=torch.float32).sub(torch.tensor(9.0, device=device).log())
    value, _, gradient = run(logits, ids, teacher, kind, torch.ones(2, 4), backend=backend)
    alone = divergence(logits.gather(-1, ids), teacher, kind, backend=backend)[0]
    assert gradient.isfinite().all()
    torch.testing.assert_close(value, alone, rtol=1e-5, atol=1e-5)


@each_backend
def test_tokens_that_are_not_there(device, backend):
    logits, ids, teacher = lists(4, 60, k=10, device=device)
    unlisted = torch.ones_like(logits, dtype=torch.bool).scatter(-1, ids, False) & (logits < 0)
    logits = logits.masked_fill(unlisted, -torch.inf)
    value, entropy, gradient = run(logits, ids, teacher, "forward_kl", torch.ones(2, 4), backend=backend)
    assert value.isfinite().all() and entropy.isfinite().all() and not gradient[unlisted].any()
    teacher[:, 3] = -torch.inf
    assert run(logits, ids, teacher, "forward_kl", torch.ones(2, 4), backend=backend)[2].isfinite().all()
    logits[0, ids[0, 0]] = -torch.inf
    value = topk_divergence(logits, ids, teacher, "forward_kl", backend=backend)[0]
    assert value[0] == torch.inf and value[1:].isfinite().all()


@settings(max_examples=1 if INTERPRETING else 40, deadline=None)
@given(columns=st.integers(2, 60), share=st.floats(0, 1), seed=st.integers(0, 999))
def test_never_more_than_the_whole_and_more_with_more_tokens(columns, share, seed):
    torch.manual_seed(seed)
    backend, k = BACKENDS[0][1], max(1, int(share * (columns - 1)))
    logits = torch.randn(3, columns, dtype=torch.float64) * 2
    teacher = (torch.randn(3, columns, dtype=torch.float64) * 2).log_softmax(-1)
    logprobs, ids = teacher.sort(-1, descending=True)
    for kind in KINDS:
        whole = divergence(logits, teacher, kind, backend=backend)[0]
        some = topk_divergence(logits, ids[:, :k], logprobs[:, :k], kind, backend=backend)[0]
        more = topk_divergence(logits, ids[:, : k + 1], logprobs[:, : k + 1], kind, backend=backend)[0]
        assert (
            (some >= 0).all() and (some <= more * (1 + 1e-9) + 1e-9).all() and (more <= whole * (1 + 1e-9) + 1e-9).all()
        )


@cpu_only
def test_gradcheck():
    logits, ids, _ = lists(3, 11, k=4, dtype=torch.float64)
    teacher = torch.randn(3, 11, dtype=torch.float64).log_softmax(-1).gather(-1, ids)
    for kind in KINDS:

        def function(x, kind=kind):
            return topk_divergence(x, ids, teacher, kind, temperature=1.3, backend="cpu")

        assert torch.autograd.gradcheck(function, logits.requires_grad_())
    # The buckets' own gradient, whatever comes from above.
    ones = torch.ones(3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: torch.ops.fuserl.topk_buckets(x, ids, ones, "cpu")[:2], logits)


@cpu_only
def test_opcheck_and_compile():
    logits, ids, teacher = lists(4, 33, k=5)
    torch.library.opcheck(torch.ops.fuserl.topk_buckets, (logits.clone().requires_grad_(), ids, torch.ones(4), "cpu"))
    buckets, _, statistics = torch.ops.fuserl.topk_buckets(logits, ids, torch.ones(4), "cpu")
    arguments = logits, ids, torch.ones(4), buckets, statistics, torch.ones(4, 6), torch.ones(4), "cpu"
    torch.library.opcheck(torch.ops.fuserl.topk_buckets_backward, arguments)

    def loss(logits, ids, teacher):
        value, entropy = topk_divergence(logits * 2, ids, teacher, "forward_kl")
        return (value - 0.1 * entropy).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for rows in (4, 7):
        logits, ids, teacher = lists(rows, 50, k=6)
        logits.requires_grad_()
        expected = torch.autograd.grad(loss(logits, ids, teacher), logits)[0]
        assert torch.equal(torch.autograd.grad(compiled(logits, ids, teacher), logits)[0], expected)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"logits": torch.zeros(3, 5).long()}, "logits must be .* of a floating dtype"),
        ({"ids": torch.zeros(3, 2)}, r"ids must be \(3,\) with 1 to 5 in a row, int64"),
        ({"ids": torch.zeros(2, 2, dtype=torch.int64)}, "ids must be"),
        ({"ids": torch.zeros(3, 6, dtype=torch.int64)}, "ids must be"),
        ({"ids": torch.tensor([[0, 5]] * 3)}, r"ids must lie in \[0, 5\); got 0 to 5"),
        ({"teacher_logprobs": torch.zeros(3, 3)}, r"teacher_logprobs must be \(3, 2\)"),
        ({"temperature": -1.0}, "temperature must be positive"),
        ({"kind": "jsd"}, "kind must be one of"),
    ],
)
def test_bad_input_gets_one_sentence(change, message):
    arguments = {"logits": torch.zeros(3, 5), "ids": torch.tensor([[0, 1]] * 3), "kind": "forward_kl"}
    with pytest.raises(ValueError, match=f"divergence: .*{message}"):
        topk_divergence(**{**arguments, "teacher_logprobs": torch.full((3, 2), -1.0), **change})


@cpu_only
def test_triton_in_the_interpreter():
    run_interpreted(__file__)


@each_backend
@each_kind
def test_without_a_tail_both_are_normalised_over_the_list(kind, device, backend):
    logits, ids, teacher = lists(ROWS, 60, k=7, device=device)
    leaf = logits.double().requires_grad_()
    value, entropy = topk_divergence(leaf, ids, teacher.double(), kind, tail=False, backend=backend)
    again = logits.double().requires_grad_()
    expected = divergence(again.gather(-1, ids), teacher.double(), kind, backend="reference")[0]
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)
    for each in (value, expected):
        each.sum().backward()
    torch.testing.assert_close(leaf.grad, again.grad, rtol=1e-9, atol=1e-12)
    assert torch.equal(entropy, topk_divergence(leaf, ids, teacher.double(), kind, backend=backend)[1])
