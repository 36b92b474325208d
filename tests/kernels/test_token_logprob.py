"""token_logprob against float64: values and gradients, every backend, odd shapes and edge values."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import check, check_rows

from fuserl.kernels.token_logprob import reference, token_logprob

DEVICES = [pytest.param("cpu", "cpu"), pytest.param("cuda", "triton", marks=pytest.mark.gpu)]
SHAPES = [(1, 1), (1, 17), (3, 2), (5, 1000), (4, 4096), (4, 4097), (2, 3, 129), (2, 2, 3, 33), (0, 7)]


def peaky(*shape, dtype=torch.float32, device="cpu"):
    """Logits with large probabilities: uniform ones make every check vacuous."""
    return (torch.randn(*shape, device=device) * 4).to(dtype)


def both(function, logits, ids, g_logprob, g_entropy, **options):
    """Outputs and the logits' gradient of one implementation."""
    logits = logits.detach().clone().requires_grad_()
    outputs = function(logits, ids, **options)
    torch.autograd.backward(outputs, [g_logprob.to(outputs[0].dtype), g_entropy.to(outputs[1].dtype)])
    return *(o.detach() for o in outputs), logits.grad


def extended(logits, ids, g_logprob, g_entropy):
    """The equations of the op's docstring in NumPy's extended precision: the truth for float64."""
    x = logits.reshape(-1, logits.shape[-1]).numpy().astype(np.longdouble)
    chosen = np.eye(x.shape[-1], dtype=np.longdouble)[ids.reshape(-1).numpy()]
    logp = x - x.max(-1, keepdims=True)
    logp -= np.log(np.exp(logp).sum(-1, keepdims=True))
    p, g = np.exp(logp), [np.asarray(t.reshape(-1, 1).numpy(), np.longdouble) for t in (g_logprob, g_entropy)]
    entropy = -(p * logp).sum(-1, keepdims=True)
    gradient = g[0] * (chosen - p) - g[1] * p * (logp + entropy)
    shapes = ids.shape, ids.shape, logits.shape
    results = (logp * chosen).sum(-1), entropy, gradient
    return [torch.from_numpy(r.astype(np.float64)).reshape(s) for r, s in zip(results, shapes, strict=True)]


def compare(logits, ids, backend, temperature=1.0):
    g = torch.randn(2, *ids.shape, device=logits.device)
    double_temperature = temperature.double() if isinstance(temperature, torch.Tensor) else temperature
    if logits.dtype == torch.float64 and logits.device.type == "cpu" and logits.numel():
        truth = extended(logits, ids, *g)
    else:
        truth = both(reference, logits.double(), ids, *g, temperature=double_temperature)
    plain = both(reference, logits, ids, *g, temperature=temperature)
    got = both(token_logprob, logits, ids, *g, temperature=temperature, backend=backend)
    accumulator = torch.float64 if logits.dtype == torch.float64 else torch.float32
    check("logprob", got[0], truth[0], plain[0], accumulator)
    check("entropy", got[1], truth[1], plain[1], accumulator)
    if logits.numel():
        check_rows("d_logits", got[2], truth[2], plain[2], logits.dtype, accumulator, ids=ids)
    assert got[0].dtype == accumulator and got[2].dtype == logits.dtype


@pytest.mark.parametrize("device,backend", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_float64(shape, dtype, device, backend):
    ids = torch.randint(shape[-1], shape[:-1], device=device)
    compare(peaky(*shape, dtype=dtype, device=device), ids, backend)


@pytest.mark.parametrize("device,backend", DEVICES)
def test_strides(device, backend):
    logits = peaky(3, 6, 130, device=device)
    ids = torch.randint(65, (3, 5), device=device)
    compare(logits[:, :-1, :65], ids, backend)
    compare(logits[:, :-1, ::2], ids, backend)
    compare(logits.transpose(0, 1)[:5].transpose(0, 1)[:, :, :65], ids, backend)


@pytest.mark.parametrize("device,backend", DEVICES)
def test_temperature(device, backend):
    logits, ids = peaky(7, 300, device=device), torch.randint(300, (7,), device=device)
    compare(logits, ids, backend, temperature=0.7)
    compare(logits, ids, backend, temperature=torch.rand(7, device=device) + 0.5)
    compare(logits.view(1, 7, 300), ids.view(1, 7), backend, temperature=torch.tensor([[1.3]], device=device))


@pytest.mark.parametrize("device,backend", DEVICES)
@pytest.mark.parametrize("case", ["-inf block", "1e4", "-120", "last id", "two equal tops", "one token left"])
def test_edges(case, device, backend):
    logits, ids = peaky(4, 9000, device=device), torch.randint(4500, (4,), device=device)
    if case == "-inf block":
        logits[:, 4500:] = -torch.inf
        logits[0, :4000] = -torch.inf
        ids[0] = 4100
    elif case == "1e4":
        logits = torch.where(logits > 4, 1e4, -1e4) + logits
    elif case == "-120":
        logits -= 120
    elif case == "last id":
        ids[:] = 8999
    elif case == "two equal tops":
        logits[:, 3] = logits[:, 8000] = 50.0
    else:
        logits[:] = -torch.inf
        logits.scatter_(1, ids[:, None], 2.0)
    compare(logits, ids, backend)


def test_nan_and_inf_are_not_hidden():
    logits = peaky(3, 100)
    logits[0, 5], logits[1, 6], logits[2] = torch.nan, torch.inf, -torch.inf
    for output in token_logprob(logits, torch.zeros(3, dtype=torch.int64)):
        assert output.isnan().all()


@pytest.mark.parametrize("columns_first", [False, True])
@pytest.mark.parametrize("device,backend", DEVICES)
def test_inplace_backward(device, backend, columns_first):
    logits, ids = peaky(6, 500, device=device), torch.randint(500, (6,), device=device)
    expected = both(token_logprob, logits, ids, torch.ones(6, device=device), torch.ones(6, device=device))[2]
    leaf = (logits.T.contiguous().T if columns_first else logits.clone()).requires_grad_()
    scaled = leaf * 1.0
    outputs = token_logprob(scaled, ids, inplace_backward=True, backend=backend)
    (gradient,) = torch.autograd.grad(sum(o.sum() for o in outputs), scaled, retain_graph=True)
    assert gradient.data_ptr() == scaled.data_ptr()
    assert torch.equal(gradient, expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        sum(o.sum() for o in outputs).backward()


def test_gradcheck():
    logits, ids = peaky(3, 11, dtype=torch.float64).requires_grad_(), torch.randint(11, (3,))
    assert torch.autograd.gradcheck(lambda x: token_logprob(x, ids, temperature=1.3, backend="cpu"), logits)


def test_beyond_two_to_the_thirty_one():
    row = peaky(1, 65536)
    logits = row.expand(32769, 65536)
    ids = torch.randint(65536, (32769,))
    got = token_logprob(logits[-2:], ids[-2:], backend="cpu")
    wide = token_logprob(torch.as_strided(row, (2, 65536), (0, 1)), ids[-2:], backend="cpu")
    assert torch.equal(got[0], wide[0])


def test_rows_do_not_depend_on_their_neighbours():
    logits, ids = peaky(300, 1003), torch.randint(1003, (300,))
    whole = token_logprob(logits, ids)
    for count in (1, 2, 8, 15, 16, 17):
        part = token_logprob(logits[:count], ids[:count])
        assert torch.equal(part[0], whole[0][:count]) and torch.equal(part[1], whole[1][:count])
    assert all(torch.equal(a, b) for _ in range(10) for a, b in zip(token_logprob(logits, ids), whole, strict=True))


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 5), columns=st.integers(1, 200), shift=st.floats(-50, 50), seed=st.integers(0, 99))
def test_shift_invariance_and_bounds(rows, columns, shift, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, columns, generator=generator, dtype=torch.float64) * 3
    every = torch.arange(columns).repeat(rows, 1)
    logprob, entropy = token_logprob(logits[:, None].expand(rows, columns, columns), every)
    assert torch.allclose(logprob.exp().sum(1), torch.ones(rows, dtype=torch.float64))
    assert (entropy >= -1e-12).all() and (entropy <= torch.tensor(columns).log() + 1e-12).all()
    shifted = token_logprob(logits + shift, every[:, 0])
    assert torch.allclose(shifted[0], logprob[:, 0]) and torch.allclose(shifted[1], entropy[:, 0])


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(dynamic):
    def loss(logits, ids):
        logprob, entropy = token_logprob(logits * 2, ids, temperature=0.9)
        return (logprob - 0.1 * entropy).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (4, 7):
        logits, ids = peaky(rows, 50).requires_grad_(), torch.randint(50, (rows,))
        expected = torch.autograd.grad(loss(logits, ids), logits)[0]
        assert torch.equal(torch.autograd.grad(compiled(logits, ids), logits)[0], expected)


def test_opcheck():
    logits, ids = peaky(4, 33).requires_grad_(), torch.randint(33, (4,))
    torch.library.opcheck(torch.ops.fuserl.token_logprob, (logits, ids, None, 1.0, False, "cpu"))
    arguments = (logits.detach(), ids, None, 1.0, torch.ones(3, 4), torch.ones(2, 4), "cpu")
    torch.library.opcheck(torch.ops.fuserl.token_logprob_backward, arguments)
    torch.library.opcheck(torch.ops.fuserl.token_logprob_backward_, arguments)


@pytest.mark.parametrize(
    "arguments,message",
    [
        (lambda x, i: ((x, i[:2]), {}), "ids must be int64 of shape"),
        (lambda x, i: ((x, i.int()), {}), "ids must be int64"),
        (lambda x, i: ((x.long(), i), {}), "logits must be"),
        (lambda x, i: ((x, i), {"temperature": 0.0}), "temperature must be positive"),
        (lambda x, i: ((x, i), {"temperature": torch.ones(3, requires_grad=True)}), "must not require a gradient"),
        (lambda x, i: ((x, i + 9), {}), "ids"),
        (lambda x, i: ((x, i), {"backend": "cudnn"}), "backend must be one of"),
    ],
)
def test_bad_input_gets_one_sentence(arguments, message):
    args, options = arguments(peaky(3, 9), torch.tensor([0, 4, 8]))
    with pytest.raises(ValueError, match=message):
        token_logprob(*args, **options)


def test_a_backend_that_cannot_run_says_why(monkeypatch):
    with pytest.raises(RuntimeError, match="'cuda' cannot run on cpu: token_logprob has no cuda implementation"):
        token_logprob(peaky(2, 3), torch.tensor([0, 1]), backend="cuda")
    monkeypatch.setenv("FUSERL_BACKEND", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="Triton takes GPU tensors"):
        token_logprob(peaky(2, 3), torch.tensor([0, 1]))
