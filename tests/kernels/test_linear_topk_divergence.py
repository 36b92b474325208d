"""linear_topk_divergence against float64 autograd through all logits, and against its siblings that it equals."""

import pytest
import torch
from backends import INTERPRETING, cpu_only, each_backend, run_interpreted
from divergences import KINDS
from tolerance import check, check_rows

import fuserl
from fuserl.kernels import head_products
from fuserl.kernels.linear_divergence import linear_divergence
from fuserl.kernels.linear_topk_divergence import linear_topk_divergence, reference
from fuserl.kernels.topk_divergence import topk_divergence

ROWS, WIDTH, VOCABULARY, LISTED = 9 if INTERPRETING else 45, 24, 301, 12
# Temperatures over caps that are float32 numbers, as the row kernels take them: inputs are quantised beforehand.
HEADS = {
    "plain": {},
    "softcap": {"softcap": 32.0},
    "all": {"bias": True, "logit_scale": 1.3, "softcap": 32.0, "temperature": 0.75},
}


def operands(dtype=torch.float32, device="cpu", rows=ROWS, k=LISTED):
    """States, a head and its bias of a student; lists of a teacher not far from it, and their log-probs."""
    hidden, weight, bias = torch.randn(rows, WIDTH) * 2, torch.randn(VOCABULARY, WIDTH), 3 * torch.randn(VOCABULARY)
    teacher = (hidden @ weight.T + torch.randn(rows, VOCABULARY)).log_softmax(-1)
    logprobs, ids = teacher.topk(k)
    return [x.to(dtype).to(device) for x in (hidden, weight, bias)], ids.to(device), logprobs.to(device)


def run(function, given, g, kind, dtype=None, *, bias=False, **options):
    """(divergence, entropy) and the gradients, with g (2, ...) from above."""
    floats, ids, teacher = given
    hidden, weight, offset = (x.to(dtype or x.dtype).detach().clone().requires_grad_() for x in floats)
    teacher = teacher.to(dtype) if dtype == torch.float64 else teacher
    found = function(hidden, weight, ids, teacher, kind, bias=offset if bias else None, **options)
    torch.autograd.backward(found, [x.to(o.dtype) for x, o in zip(g, found, strict=True)])
    return [x.detach() for x in found], [hidden.grad, weight.grad, *([offset.grad] if bias else [])]


def plain_run(given, g, kind, **options):
    """Plain torch with the states' dimensions in an order of chance: results, and gradients in the old order."""
    (hidden, weight, bias), *lists = given
    order = torch.randperm(hidden.shape[1])
    found, (d_hidden, d_weight, *rest) = run(
        reference, ([hidden[:, order], weight[:, order], bias], *lists), g, kind, **options
    )  # fmt: skip
    return [*found, d_hidden[:, order.argsort()], d_weight[:, order.argsort()], *rest]


def compare(given, kind, backend, *, mask=None, head=None, **options):
    head, dtype = head or {}, given[0][0].dtype
    g = torch.randn(2, *given[1].shape[:-1], device=given[1].device)
    here = None if mask is None else mask.to(g.device)
    truth, true = run(reference, given, g, kind, torch.float64, mask=here, **head)
    rough = [plain_run(given, g, kind, mask=here, **head) for _ in range(5)]
    # The sums are the same in another order: one run alone may be right by chance.
    worst = [max(each, key=lambda x: (x - exact).norm()) for *each, exact in zip(*rough, [*truth, *true], strict=True)]
    plain, plainly = worst[:2], worst[2:]
    found, gradients = run(linear_topk_divergence, given, g, kind, mask=mask, backend=backend, **head, **options)
    if dtype == torch.float64:
        pairs = zip([*found, *gradients], [*truth, *true], strict=True)
        assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-10 * b.abs().max()) for a, b in pairs)
        return
    for name, got, exact, rough in zip(("divergence", "entropy"), found, truth, plain, strict=True):
        assert got.dtype == torch.float32 and got.shape == g.shape[1:]
        check(name, got, exact, rough, torch.float32)
    for name, got, exact, rough in zip(("hidden", "weight", "bias"), gradients, true, plainly, strict=False):
        assert got.dtype == dtype and exact.norm() > 0
        check_rows(name, *(x[None] if name == "bias" else x for x in (got, exact, rough)), dtype, torch.float32)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32] if INTERPRETING else [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("chunk", [4] if INTERPRETING else [7, None])
def test_equals_float64(chunk, head, dtype, device, backend):
    compare(operands(dtype, device), "forward_kl", backend, head=HEADS[head], chunk=chunk)


@each_backend
@pytest.mark.parametrize("k", [1, LISTED, VOCABULARY])
@pytest.mark.parametrize("kind", ["reverse_kl"] if INTERPRETING else KINDS)
def test_every_kind(kind, k, device, backend):
    compare(operands(device=device, k=k), kind, backend, head={"softcap": 32.0}, chunk=20)


@each_backend
def test_temperature_per_token(device, backend):
    compare(operands(device=device), "reverse_kl", backend, head={"temperature": (torch.rand(ROWS) + 0.5).to(device)})


@cpu_only
@pytest.mark.parametrize("kind", KINDS)
def test_of_every_token_it_is_the_whole(kind):
    given, g = operands(torch.float64), torch.randn(2, ROWS)
    hidden, weight, bias = given[0]
    states, head = torch.randn(ROWS, 30).double(), torch.randn(VOCABULARY, 30).double()
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    whole = linear_divergence(*leaves, states, head, kind, bias_p=bias, softcap_p=5.0, chunk=10)
    expected = torch.autograd.grad(whole, leaves, list(g.double()))
    teacher = (states @ head.T).log_softmax(-1)
    ids = torch.stack([torch.randperm(VOCABULARY) for _ in range(ROWS)])
    found = linear_topk_divergence(
        *leaves, ids, teacher.gather(-1, ids), kind, bias=bias, softcap=5.0, chunk=10
    )  # fmt: skip
    gradients = torch.autograd.grad(found, leaves, list(g.double()))
    for a, b in zip((*found, *gradients), (*whole, *expected), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-11 * float(b.detach().abs().max()))


@cpu_only
def test_shares_its_logits_with_topk_divergence():
    (hidden, weight, _), ids, teacher = operands()
    found = linear_topk_divergence(hidden, weight, ids, teacher, "reverse_kl")
    assert all(map(torch.equal, found, topk_divergence(hidden @ weight.T, ids, teacher, "reverse_kl")))


@each_backend
def test_masked_tokens_are_zero_and_may_hold_anything(device, backend, monkeypatch):
    given, g, mask = operands(device=device), torch.randn(2, ROWS, device=device), torch.rand(ROWS) < 0.5
    compare(given, "reverse_kl", backend, mask=mask, chunk=8)
    (hidden, weight, bias), ids, teacher = given
    hidden[~mask], ids[~mask], teacher[~mask] = torch.nan, -100, torch.nan
    projected, logits = [], head_products.HeadProducts.logits
    monkeypatch.setattr(
        head_products.HeadProducts,
        "logits",
        lambda self, piece: projected.append(piece.stop - piece.start) or logits(self, piece),
    )
    given = (hidden, weight, bias), ids, teacher
    found, gradients = run(linear_topk_divergence, given, g, "reverse_kl", mask=mask, chunk=8, backend=backend)
    assert not any(x[~mask].any() for x in (*found, gradients[0]))
    assert all(x.isfinite().all() for x in (*found, *gradients)) and sum(projected) == 2 * mask.sum()


@cpu_only
def test_rows_without_a_gradient_cost_no_product_backward(monkeypatch):
    given, alive = operands(), torch.rand(ROWS) < 0.4
    projected, logits = [], head_products.HeadProducts.logits
    g = torch.randn(2, ROWS) * alive
    _, expected = run(reference, given, g, "forward_kl")
    monkeypatch.setattr(
        head_products.HeadProducts,
        "logits",
        lambda self, piece: projected.append(piece.stop - piece.start) or logits(self, piece),
    )
    _, gradients = run(linear_topk_divergence, given, g, "forward_kl", chunk=10)
    assert sum(projected) == ROWS + alive.sum()
    for a, b in zip(gradients, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=2e-6 * b.abs().max())


@cpu_only
def test_frozen_head_costs_no_product(monkeypatch):
    (hidden, weight, _), ids, teacher = operands()
    leaf = hidden.requires_grad_()
    monkeypatch.setattr(head_products.HeadProducts, "_add_weight", None)
    linear_topk_divergence(leaf, weight, ids, teacher, "forward_kl", chunk=10)[0].sum().backward()
    assert leaf.grad.any()


@cpu_only
def test_rows_of_rollouts_and_no_row():
    (hidden, weight, _), ids, teacher = operands()
    flat = linear_topk_divergence(hidden, weight, ids, teacher, "forward_kl", mask=ids[:, 0] % 3 > 0)
    square = linear_topk_divergence(
        hidden.view(5, 9, -1), weight, ids.view(5, 9, -1), teacher.view(5, 9, -1), "forward_kl",
        mask=(ids[:, 0] % 3 > 0).view(5, 9),
    )  # fmt: skip
    assert all(torch.equal(a, b.flatten()) and b.shape == (5, 9) for a, b in zip(flat, square, strict=True))
    found, gradients = run(linear_topk_divergence, operands(rows=0), torch.randn(2, 0), "reverse_kl")
    assert found[0].shape == (0,) and not gradients[1].any()


@cpu_only
def test_gradcheck():
    floats, ids, teacher = operands(rows=4, k=5)
    leaves = [x[:11].double().div(3).requires_grad_() for x in floats]
    ids = torch.stack([torch.randperm(11)[:5] for _ in range(4)])
    for kind in KINDS:

        def function(hidden, weight, bias, kind=kind):
            return linear_topk_divergence(
                hidden, weight, ids, teacher.double(), kind, bias=bias, softcap=3.0, logit_scale=0.5, chunk=3
            )

        assert torch.autograd.gradcheck(function, leaves)


@cpu_only
def test_opcheck_compile_and_ten_runs():
    floats, ids, teacher = operands()
    leaves = [x.requires_grad_() for x in floats]
    arguments = *leaves, ids, torch.arange(ROWS) % 3 > 0, torch.ones(ROWS), 0.1, 10, "cpu"
    torch.library.opcheck(torch.ops.fuserl.linear_topk_buckets, arguments)
    buckets, _, statistics = (x.detach() for x in torch.ops.fuserl.linear_topk_buckets(*arguments))
    detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
    given = torch.randn_like(buckets), torch.randn(ROWS), buckets, statistics
    for needs in ([True, True, True], [True, False, False]):
        torch.library.opcheck(torch.ops.fuserl.linear_topk_buckets_backward, (*given, needs, *detached))

    def loss(hidden, weight, ids, teacher):
        value, entropy = linear_topk_divergence(hidden * 2, weight, ids, teacher, "forward_kl", softcap=9.0, chunk=10)
        return (value - 0.1 * entropy).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for rows in (26, 33, 45):
        some = leaves[0][:rows], leaves[1], ids[:rows], teacher[:rows]
        expected = torch.autograd.grad(loss(*some), leaves[:2])
        for _ in range(4):
            assert all(map(torch.equal, torch.autograd.grad(compiled(*some), leaves[:2]), expected))


@pytest.mark.parametrize(
    "change,message",
    [
        ({"hidden": torch.zeros(24)}, "hidden must be"),
        ({"weight": torch.zeros(24, 301)}, r"weight must be \(V, 24\)"),
        ({"bias": torch.zeros(300)}, r"bias must be \(301,\)"),
        ({"ids": torch.zeros(ROWS, 2)}, rf"ids must be \({ROWS},\) with 1 to 301 in a row, int64"),
        ({"ids": torch.zeros(ROWS, 302, dtype=torch.int64)}, "ids must be"),
        ({"ids": torch.full((ROWS, LISTED), 301)}, r"ids must lie in \[0, 301\)"),
        ({"teacher_logprobs": torch.zeros(ROWS, 3)}, "teacher_logprobs must be"),
        ({"softcap": 0.0}, "softcap must be positive"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"mask": torch.ones(ROWS)}, "mask must be"),
        ({"chunk": 0}, "chunk must be"),
        ({"backend": "cudnn"}, "backend must be one of"),
    ],
)
def test_bad_input_gets_one_sentence(change, message):
    (hidden, weight, _), ids, teacher = operands()
    given = {"hidden": hidden, "weight": weight, "ids": ids, "teacher_logprobs": teacher, "kind": "reverse_kl"}
    with pytest.raises(ValueError, match=f"^linear_topk_divergence: .*{message}"):
        fuserl.linear_topk_divergence(**{**given, **change})
    with pytest.raises(ValueError, match="kind must be one of"):
        fuserl.linear_topk_divergence(**{**given, "kind": "kl"})


@cpu_only
def test_triton_in_the_interpreter():
    run_interpreted(__file__)


@each_backend
def test_without_a_tail_it_is_that_of_the_logits(device, backend):
    (hidden, weight, _), ids, teacher = operands(torch.float64, device)
    leaf, other = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    given = ids, teacher.double(), "forward_kl"
    found = linear_topk_divergence(leaf, weight, *given, tail=False, backend=backend)[0]
    expected = topk_divergence(other @ weight.T, *given, tail=False, backend=backend)[0]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    for each in (found, expected):
        each.sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-9, atol=1e-12)
