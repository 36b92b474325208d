"""An adapter on the head: both ops against float64 autograd through weight + scale B A, which they never form."""

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from tolerance import check, check_rows

from fuserl.kernels import head_products
from fuserl.kernels.linear_logprob import linear_logprob, reference
from fuserl.kernels.linear_policy_loss import linear_policy_loss

DEVICES = [pytest.param("cpu", "cpu"), pytest.param("cuda", "triton", marks=pytest.mark.gpu)]
ROWS, WIDTH, VOCABULARY, RANK, SCALE = 45, 24, 301, 3, 1.5
NAMES = ("hidden", "weight", "bias", "A", "B")


def operands(dtype=torch.float32, device="cpu", adapter=None):
    """The five matrices of a head whose adapter moves the logits as much as the head makes them, and tokens."""
    shapes = (ROWS, WIDTH), (VOCABULARY, WIDTH), (VOCABULARY,), (RANK, WIDTH), (VOCABULARY, RANK)
    made = [(factor * torch.randn(shape)).to(dtype) for factor, shape in zip((2, 1, 3, 0.5, 0.5), shapes, strict=True)]
    made = [x.to(adapter or dtype) if i > 2 else x for i, x in enumerate(made)]
    ids = torch.randint(VOCABULARY, (ROWS,))
    return [x.to(device) for x in made], ids.to(device), torch.randn(ROWS).to(device)


def scored(leaves, ids, weights, lora, function=linear_logprob, **options):
    out = function(*leaves[:2], ids, outputs=("logprob", "entropy"), bias=leaves[2], lora=lora, **options)
    ((out.logprob + 0.3 * out.entropy) * weights.to(out.logprob.dtype)).sum().backward()
    return out.logprob.detach()


def learnt(leaves, ids, weights, lora, **options):
    def loss(out, rows):
        return (out.logprob + 0.3 * out.entropy) * weights[rows].to(out.logprob.dtype)

    given = {"outputs": ("logprob", "entropy"), "bias": leaves[2], "lora": lora, **options}
    value, out, _ = linear_policy_loss(*leaves[:2], ids, loss, **given)
    value.backward()
    return out.logprob


def gradients(run, made, ids, weights, dtype=None, **options):
    leaves = [x.to(dtype or x.dtype).clone().requires_grad_() for x in made]
    return run(leaves, ids, weights, (*leaves[3:], SCALE), **options), [leaf.grad for leaf in leaves]


def compare(run, made, ids, weights, dtype, **options):
    head = {name: options[name] for name in ("softcap", "logit_scale", "temperature") if name in options}
    definition = {**head, "function": reference}
    truth, true = gradients(scored, made, ids, weights, torch.float64, **definition)
    plain, plainly = gradients(scored, made, ids, weights, None, **definition)
    found, got = gradients(run, made, ids, weights, **options)
    if dtype == torch.float64:
        every = zip([found, *got], [truth, *true], strict=True)
        assert all(torch.allclose(a, b, rtol=1e-11, atol=1e-12 * b.abs().max()) for a, b in every)
        return
    accumulator = torch.float32
    check("logprob", found, truth, plain, accumulator)
    for name, *each in zip(NAMES, got, true, plainly, strict=True):
        assert each[1].norm() > 0
        rows = [x[None] if x.dim() == 1 else x for x in each]
        check_rows(name, *rows, dtype, accumulator)


@pytest.mark.parametrize("device,backend", [*DEVICES, ("cpu", "reference")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("head", [{}, {"softcap": 30.0, "logit_scale": 1.3, "temperature": 0.8}], ids=["plain", "all"])
@pytest.mark.parametrize("run", [scored, learnt])
def test_equals_float64(run, head, dtype, device, backend):
    compare(run, *operands(dtype, device), dtype, backend=backend, chunk=20, **head)


@pytest.mark.parametrize("device,backend", DEVICES)
@pytest.mark.parametrize("run", [scored, learnt])
def test_a_float32_adapter_beside_a_16_bit_head(run, device, backend):
    """As peft keeps them; what is between the two products is not rounded to 16 bits."""
    compare(run, *operands(torch.bfloat16, device, adapter=torch.float32), torch.bfloat16, backend=backend, chunk=20)


@pytest.mark.parametrize("run", [scored, learnt])
def test_equals_the_merged_head(run):
    made, ids, weights = operands(torch.float64)
    found, got = gradients(run, made, ids, weights, chunk=20)
    leaves = [x.clone().requires_grad_() for x in made]
    hidden, weight, bias, down, up = leaves
    merged = run([hidden, weight + SCALE * up @ down, bias], ids, weights, None, chunk=20)
    assert torch.allclose(found, merged, rtol=1e-11)
    for a, leaf in zip(got, leaves, strict=True):
        assert torch.allclose(a, leaf.grad, rtol=1e-10, atol=1e-12 * leaf.grad.abs().max())
    unadapted = run([x.clone().requires_grad_() for x in made[:3]], ids, weights, None)
    assert (unadapted - found).abs().min() > 1e-3, "or the adapter could be ignored unseen"


@pytest.mark.parametrize("run", [scored, learnt])
@pytest.mark.parametrize("trained", [("A", "B"), ("A",), ("B",), ("hidden",), ("hidden", "A", "B")], ids=str)
def test_a_frozen_head_costs_no_product_for_its_weight(run, trained, monkeypatch):
    made, ids, weights = operands()
    _, expected = gradients(run, made, ids, weights, chunk=10)
    leaves = [x.clone().requires_grad_(name in trained) for name, x in zip(NAMES, made, strict=True)]
    monkeypatch.setattr(head_products.HeadProducts, "_add_weight", None)
    if "hidden" not in trained:
        monkeypatch.setattr(head_products.HeadProducts, "_times_weight", None)
    run(leaves, ids, weights, (*leaves[3:], SCALE), chunk=10)
    for name, leaf, gradient in zip(NAMES, leaves, expected, strict=True):
        assert torch.equal(leaf.grad, gradient) if name in trained else leaf.grad is None


@pytest.mark.parametrize("run", [scored, learnt])
def test_chunks_and_dropped_rows_change_nothing(run):
    made, ids, weights = operands()
    dead = torch.rand(ROWS) < 0.5
    weights[dead] = 0.0
    whole, expected = gradients(run, made, ids, weights, chunk=ROWS)
    drop = {"mask": ~dead} if run is scored else {"live": ~dead}
    for options in ({"chunk": 1}, {"chunk": 7}, {"chunk": 7, **drop}, drop):
        found, got = gradients(run, made, ids, weights, **options)
        assert torch.allclose(found[~dead], whole[~dead], rtol=1e-5, atol=1e-5)
        for a, b in zip(got, expected, strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=2e-6 * b.abs().max())


def test_padding_may_hold_anything():
    (hidden, *rest), ids, _ = operands()
    mask = torch.rand(ROWS) < 0.5
    hidden, leaves = hidden.masked_fill(~mask[:, None], torch.nan), [x.requires_grad_() for x in rest]
    weight, bias, down, up = leaves
    out = linear_logprob(hidden, weight, ids, bias=bias, lora=(down, up, SCALE), mask=mask, chunk=8)
    out.logprob.sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)


def test_autocast_leaves_the_adapter_as_it_is():
    made, ids, weights = operands(torch.bfloat16, adapter=torch.float32)
    expected, exact = gradients(scored, made, ids, weights)
    with torch.autocast("cpu", torch.bfloat16):
        found, got = gradients(scored, [x.float() for x in made], ids, weights)
    assert torch.equal(found, expected) and all(torch.equal(a.to(b.dtype), b) for a, b in zip(got, exact, strict=True))


def test_gradcheck():
    made, ids, _ = operands(torch.float64)
    hidden, weight, bias, down, up = (x[:n].requires_grad_() for x, n in zip(made, (5, 11, 11, 3, 11), strict=True))

    def outputs(hidden, weight, bias, down, up):
        given = {"bias": bias, "lora": (down, up, 0.7), "softcap": 9.0, "chunk": 2, "outputs": ("logprob", "entropy")}
        return tuple(vars(linear_logprob(hidden, weight, ids[:5] % 11, **given)).values())

    assert torch.autograd.gradcheck(outputs, (hidden, weight, bias, down, up))


@pytest.mark.parametrize(
    "change,message",
    [
        ((torch.zeros(3, WIDTH), torch.zeros(VOCABULARY, 2), 1.0), r"lora's B must be \(301, 3\)"),
        ((torch.zeros(3, WIDTH + 1), torch.zeros(VOCABULARY, 3), 1.0), r"lora's A must be \(3, 24\)"),
        ((torch.zeros(3, WIDTH).long(), torch.zeros(VOCABULARY, 3), 1.0), "lora's A must be .* floating"),
        ((torch.zeros(3, WIDTH), torch.zeros(VOCABULARY, 3)), "lora must be"),
    ],
)
@pytest.mark.parametrize("run", [scored, learnt])
def test_bad_input_gets_one_sentence(run, change, message):
    made, ids, weights = operands()
    with pytest.raises(ValueError, match=message):
        run([x.requires_grad_() for x in made], ids, weights, change)


def adapter_over_ranks():
    """Each rank has its rows of the head, the bias and B; A and its gradient are of all."""
    torch.manual_seed(0)
    made, ids, weights = operands()
    sizes = [100, 201]
    cut = [x.split(sizes)[dist.get_rank()] if len(x) == VOCABULARY else x for x in made]
    for run in (scored, learnt):
        _, true = gradients(scored, made, ids, weights, torch.float64, function=reference)
        _, plainly = gradients(scored, made, ids, weights, function=reference)
        _, got = gradients(run, cut, ids, weights, chunk=20, group=dist.group.WORLD)
        for name, *each in zip(NAMES, got, true, plainly, strict=True):
            if len(each[1]) == VOCABULARY:
                each[1:] = (x.split(sizes)[dist.get_rank()] for x in each[1:])
            check_rows(name, *(x[None] if x.dim() == 1 else x for x in each), torch.float32)


def test_over_ranks_that_cut_the_vocabulary():
    on_ranks(2, adapter_over_ranks)
