"""matmul against float64 in every layout, dtype and instruction set; linear's gradients; layers of whole models."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from backends import threads
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import model as tiny_model
from tolerance import check, check_rows
from torch import nn

from fuserl import layers
from fuserl.kernels import matmul as module
from fuserl.kernels.matmul import linear, matmul, native

_C = pytest.importorskip("fuserl._C")
HALVES = (torch.float32, torch.bfloat16, torch.float16)
# One more and one less than tiles, panels and what is summed at once, in each instruction set.
SIZES = [(1, 1, 1), (5, 7, 3), (8, 48, 16), (65, 97, 385), (17, 33, 400), (300, 95, 768), (3, 1600, 20), (520, 9, 40)]


@pytest.fixture
def own(monkeypatch):
    """fuserl's own products, whatever the processor."""
    monkeypatch.setattr(module, "_preferred", lambda: True)


def laid_out(rows, columns, transposed, dtype=torch.float32):
    """A random matrix, its rows or its columns in one stretch, inside a larger one."""
    if transposed:
        return torch.randn(columns, rows + 3).to(dtype)[:, :rows].T
    return torch.randn(rows, columns + 5).to(dtype)[:, :columns]


def poisoned(rows, columns):
    return torch.full((rows, columns + 2), torch.nan)[:, :columns]


@pytest.mark.parametrize("n,m,k", SIZES)
def test_equals_float64(own, isa, n, m, k):
    for a_t, b_t, dtype in itertools.product((False, True), (False, True), HALVES):
        a, b, bias = laid_out(n, k, a_t), laid_out(k, m, b_t, dtype), torch.randn(m)
        truth, plain = a.double() @ b.double(), a @ b.float()
        check("product", matmul(a, b, out=poisoned(n, m)), truth, plain, a.dtype)
        scaled = matmul(a, b, bias=bias, alpha=-0.3, out=poisoned(n, m))
        check("scaled", scaled, bias - 0.3 * truth, bias - 0.3 * plain, a.dtype)
        start = torch.randn(n, m)
        found = matmul(a, b, alpha=2.0, out=start.clone(), add=True)
        check("added", found, start + 2 * truth, start + 2 * plain, a.dtype)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(0, 70), m=st.integers(0, 130), k=st.integers(0, 50), seed=st.integers(0, 99))
def test_any_size(n, m, k, seed):
    torch.manual_seed(seed)
    a, b, out = torch.randn(n, k), torch.randn(m, k).T, torch.full((n, m), torch.nan)
    _C.matmul(a, b, None, 1.0, False, out, 2)
    check("product", out, a.double() @ b.double(), a @ b, a.dtype)


def test_a_row_is_the_same_alone_and_among_others(own, isa):
    a, b = torch.randn(300, 577), torch.randn(960, 577).T
    whole = matmul(a, b)
    for count in (1, 2, 8, 15, 16, 17, 64, 299):
        chosen = torch.randperm(300)[:count]
        assert torch.equal(matmul(a[chosen], b), whole[chosen]), count
    for number in (1, 2, 3, 7):
        with threads(number):
            assert torch.equal(matmul(a, b), whole), number
    half = b.bfloat16()
    assert torch.equal(matmul(a, half), matmul(a, half.float()))


def test_what_is_not_finite_stays_in_its_row_and_column(own):
    a, b = torch.randn(20, 30), torch.randn(30, 50)
    a[3, 4], b[5, 6] = torch.inf, torch.nan
    found = matmul(a, b)
    expected = a @ b
    assert torch.equal(found.isfinite(), expected.isfinite()) and not found.isfinite()[3].any()


def test_a_foreign_processor_takes_torchs(monkeypatch):
    monkeypatch.setattr(module, "_preferred", lambda: False)
    monkeypatch.setattr(_C, "matmul", None)
    a, b, bias = torch.randn(4, 5), torch.randn(5, 3), torch.randn(3)
    assert torch.equal(matmul(a, b), a @ b)
    assert torch.equal(matmul(a, b.bfloat16()), a @ b.bfloat16().float())
    assert torch.equal(matmul(a, b, alpha=3.0), (a @ b) * 3.0)
    assert torch.equal(matmul(a, b, bias=bias), torch.addmm(bias, a, b))
    assert torch.equal(matmul(a, b, out=torch.ones(4, 3), add=True), torch.ones(4, 3).addmm_(a, b))
    assert not native(a.device, a.dtype)


def test_double_and_other_devices_take_torchs(own):
    a, b = torch.randn(4, 5, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    assert torch.equal(matmul(a, b), a @ b)
    assert native(torch.device("cpu"), torch.float32) and not native(torch.device("cuda"), torch.float32)


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda a, b, c: _C.matmul(a, b[:-1], None, 1.0, False, c, 1), "a, b and c must be"),
        (lambda a, b, c: _C.matmul(a.double(), b, None, 1.0, False, c, 1), "a must be float32"),
        (lambda a, b, c: _C.matmul(a, b.double(), None, 1.0, False, c, 1), "b must be float32, bfloat16 or float16"),
        (lambda a, b, c: _C.matmul(a, b, torch.ones(2), 1.0, False, c, 1), "bias must have shape"),
        (lambda a, b, c: _C.matmul(a, b, None, 1.0, False, c.T.contiguous().T, 1), "c must be a matrix whose rows"),
        (lambda a, b, c: _C.matmul(a[:, ::2], b[::2], None, 1.0, False, c, 1), "a must be a matrix whose rows or"),
    ],
)  # fmt: skip
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(4, 6), torch.randn(6, 3), torch.empty(4, 3))


@pytest.mark.parametrize("shape", [(7,), (2, 5), (0,), (2, 3, 1)])
@pytest.mark.parametrize("biased", [True, False])
def test_linear_and_its_gradients(own, shape, biased):
    given = [torch.randn(*shape, 33), torch.randn(50, 33), torch.randn(50) if biased else None]
    g = torch.randn(*shape, 50)

    def run(function, dtype):
        leaves = [None if x is None else x.to(dtype).clone().requires_grad_() for x in given]
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out, [x for x in leaves if x is not None], g.to(dtype))]

    found, truth, plain = run(linear, torch.float32), run(F.linear, torch.float64), run(F.linear, torch.float32)
    for name, got, exact, torchs in zip(("out", "dx", "dweight", "dbias"), found, truth, plain, strict=False):
        assert got.shape == torchs.shape
        if got.numel():
            check_rows(name, got, exact, torchs, torch.float32)


def test_linear_is_one_op_of_torch(own):
    given = torch.randn(4, 6, requires_grad=True), torch.randn(3, 6, requires_grad=True), torch.randn(3)
    torch.library.opcheck(torch.ops.fuserl.linear.default, given)
    torch.library.opcheck(torch.ops.fuserl.linear.default, (*given[:2], None))
    torch.library.opcheck(torch.ops.fuserl.matmul.default, (torch.randn(4, 6), torch.randn(6, 2)))
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*given), linear(*given))


def test_a_frozen_weight_costs_no_product(own, monkeypatch):
    x, weight = torch.randn(4, 6, requires_grad=True), torch.randn(3, 6)
    calls = []
    monkeypatch.setattr(module, "_times", lambda a, b: calls.append(a.shape) or a @ b)
    linear(x, weight).sum().backward()
    assert calls == [(4, 3)] and torch.allclose(x.grad, weight.sum(0).expand(4, 6))


def test_layers_of_a_model(own):
    model, ids = tiny_model(), torch.randint(64, (2, 12))
    names, parameters = [*model.state_dict()], [*model.parameters()]

    def run():
        model.zero_grad()
        out = model(input_ids=ids, labels=ids)
        out.loss.backward()
        return [out.logits.detach(), *(x.grad.clone() for x in parameters)]

    plain = run()
    assert layers.attach(layers.attach(model)) is model
    linears = [x for x in model.modules() if isinstance(x, nn.Linear)]
    assert linears and all(type(x) is layers.Linear for x in linears)
    found = run()
    model.double()
    truth = run()
    model.float()
    for i, (got, exact, torchs) in enumerate(zip(found, truth, plain, strict=True)):
        check_rows(f"{i}", got, exact, torchs, torch.float32)
    assert [*model.state_dict()] == names and all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    layers.detach(model)
    assert all(type(x) is nn.Linear for x in linears)
    assert all(torch.equal(a, b) for a, b in zip(run(), plain, strict=True))


def test_layers_of_another_class_stay(own):
    class Mine(nn.Linear):
        pass

    replaced = nn.Linear(3, 3)
    replaced.forward = lambda x: x
    model = nn.Sequential(Mine(3, 3), replaced, nn.Linear(3, 3))
    layers.attach(model)
    assert [type(x) for x in model] == [Mine, nn.Linear, layers.Linear]


def test_autocast_is_torchs(own, monkeypatch):
    monkeypatch.setattr(module, "_linear", None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(torch.randn(2, 4), torch.randn(3, 4)).dtype == torch.bfloat16
