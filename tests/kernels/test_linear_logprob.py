"""linear_logprob against float64 autograd through all logits: every output and gradient, chunks, masks, kept logits."""

import pytest
import torch
from backends import threads
from tolerance import check, check_rows

from fuserl.kernels import head_products
from fuserl.kernels.head_outputs import OUTPUTS
from fuserl.kernels.linear_logprob import linear_logprob, reference
from fuserl.kernels.token_logprob import token_logprob

DEVICES = [pytest.param("cpu", "cpu"), pytest.param("cuda", "triton", marks=pytest.mark.gpu)]
ROWS, WIDTH, VOCABULARY = 45, 24, 301
LOGITS = 4 * VOCABULARY  # bytes of a row
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"logit_scale": 0.3},
    "softcap": {"softcap": 30.0},
    "all": {"bias": True, "logit_scale": 1.3, "softcap": 30.0, "temperature": 0.8},
}
DIFFERENTIABLE = [name for name in OUTPUTS if name != "is_top1"]


def operands(dtype=torch.float32, device="cpu", rows=ROWS):
    """Hidden states, a head that gives peaky logits, its bias, and tokens."""
    made = torch.randn(rows, WIDTH) * 2, torch.randn(VOCABULARY, WIDTH), 3 * torch.randn(VOCABULARY)
    return *(x.to(dtype).to(device) for x in made), torch.randint(VOCABULARY, (rows,)).to(device)


def with_gradients(function, given, weights, dtype=None, *, bias=False, **options):
    """The outputs, and the gradients of their sums with `weights`, {output: (N,)}."""
    *floats, ids = given
    hidden, weight, offset = (x.to(dtype or x.dtype).detach().clone().requires_grad_() for x in floats)
    leaves = [hidden, weight, *([offset] if bias else [])]
    out = function(hidden, weight, ids, outputs=tuple(weights), bias=offset if bias else None, **options)
    sum((getattr(out, name) * g.to(getattr(out, name).dtype)).sum() for name, g in weights.items()).backward()
    return {name: x.detach() for name, x in vars(out).items()}, [leaf.grad for leaf in leaves]


def compare(given, outputs, backend, *, mask=None, head=None, **options):
    head, dtype = head or {}, given[0].dtype
    weights = {name: torch.randn(given[-1].shape, device=given[-1].device) for name in outputs}
    truth, true = with_gradients(reference, given, weights, torch.float64, mask=mask, **head)
    plain, plainly = with_gradients(reference, given, weights, None, mask=mask, **head)
    found, gradients = with_gradients(linear_logprob, given, weights, mask=mask, backend=backend, **head, **options)
    if dtype == torch.float64:
        every = [*found.values(), *gradients], [*truth.values(), *true]
        assert all(torch.allclose(a, b, rtol=1e-11, atol=1e-12 * b.abs().max()) for a, b in zip(*every, strict=True))
        return found, gradients
    accumulator = torch.float32
    for name, value in truth.items():
        assert found[name].dtype == accumulator and found[name].shape == given[-1].shape
        check(name, found[name], value, plain[name], accumulator)
    for name, got, exact, rough in zip(("d_hidden", "d_weight", "d_bias"), gradients, true, plainly, strict=False):
        assert got.dtype == dtype and exact.norm() > 0
        rows = [x[None] if name == "d_bias" else x for x in (got, exact, rough)]
        check_rows(name, *rows, dtype, accumulator)
    return found, gradients


@pytest.mark.parametrize("device,backend", [*DEVICES, ("cpu", "reference")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("chunk", [7, None])
def test_equals_float64(chunk, head, dtype, device, backend):
    compare(operands(dtype, device), ("logprob", "entropy"), backend, head=HEADS[head], chunk=chunk)


@pytest.mark.parametrize("head", ["plain", "all"])
@pytest.mark.parametrize("output", DIFFERENTIABLE)
def test_gradient_of_every_output(output, head):
    compare(operands(), (output,), "cpu", head=HEADS[head], chunk=16)


@pytest.mark.parametrize("device,backend", DEVICES)
def test_all_outputs_together_with_a_temperature_per_token(device, backend):
    given = operands(device=device)
    head = {**HEADS["all"], "temperature": (torch.rand(ROWS) + 0.5).to(device)}
    found, _ = compare(given, DIFFERENTIABLE, backend, head=head, chunk=20)
    every = linear_logprob(given[0], given[1].requires_grad_(), given[3], outputs=OUTPUTS, backend=backend)
    logits = given[0] @ given[1].T
    assert torch.equal(every.is_top1, (logits.argmax(1) == given[3]).float())
    assert every.logprob.requires_grad and not every.is_top1.requires_grad
    assert found["entropy"].min() < 0.5, "peaky, or every check is vacuous"


@pytest.fixture
def one_thread():
    """With more, a product's rounding depends on how many rows it has, which is what keeping logits changes."""
    with threads(1):
        yield


@pytest.mark.parametrize(
    "memory", [0, 9 * LOGITS, 30 * LOGITS, 10**9], ids=["none", "less than a chunk", "some", "all"]
)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("half_dead", [False, True])
@pytest.mark.parametrize("head", ["plain", "all"])
def test_kept_logits_change_nothing_but_the_products(head, half_dead, masked, memory, monkeypatch, one_thread):
    given, projected = operands(), []
    weights = {"logprob": torch.randn(ROWS), "entropy": torch.randn(ROWS)}
    mask = torch.rand(ROWS) < 0.6 if masked else None
    if half_dead:
        dead = torch.rand(ROWS) < 0.5
        weights = {name: g.masked_fill(dead, 0.0) for name, g in weights.items()}
    options = {"mask": mask, "chunk": 10, **HEADS[head]}
    truth, true = with_gradients(linear_logprob, given, weights, **options)
    logits = head_products.HeadProducts.logits
    monkeypatch.setattr(
        head_products.HeadProducts,
        "logits",
        lambda self, piece, out=None: projected.append(piece.stop - piece.start) or logits(self, piece, out),
    )
    found, gradients = with_gradients(linear_logprob, given, weights, memory=memory, **options)
    assert all(torch.equal(found[name], x) for name, x in truth.items())
    _, exact = with_gradients(reference, given, weights, torch.float64, mask=mask, **HEADS[head])
    for name, *each in zip(("d_hidden", "d_weight", "d_bias"), gradients, exact, true, strict=False):
        check_rows(name, *(x[None] if x.dim() == 1 else x for x in each), torch.float32)
    live = torch.ones(ROWS, dtype=torch.bool) if mask is None else mask
    room, count = memory // LOGITS, int(live.sum())
    kept = live.nonzero()[: count if room >= count else room // 10 * 10].squeeze(1)
    again = live & (weights["logprob"] != 0)
    again[kept] = False
    assert sum(projected) == count + again.sum()


def test_kept_logits_serve_a_second_backward():
    hidden, weight, _, ids = operands()
    hidden.requires_grad_()
    out = linear_logprob(hidden, weight, ids, memory=20 * LOGITS, chunk=10)
    first, second = (torch.autograd.grad(out.logprob.sum(), hidden, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("mask_shape", ["rows", "none", "one"])
def test_masked_tokens_are_zero_and_the_others_as_without_them(mask_shape):
    given = operands()
    mask = {"rows": torch.rand(ROWS) < 0.4, "none": torch.zeros(ROWS).bool(), "one": torch.arange(ROWS) == 7}[
        mask_shape
    ]
    weights = {name: torch.randn(ROWS) for name in DIFFERENTIABLE}
    found, (d_hidden, d_weight) = with_gradients(linear_logprob, given, weights, mask=mask, chunk=8)
    whole, _ = with_gradients(linear_logprob, given, weights, chunk=8)
    for name, value in found.items():
        assert (value[~mask] == 0).all() and torch.allclose(value[mask], whole[name][mask], rtol=1e-5, atol=1e-5)
    assert (d_hidden[~mask] == 0).all()
    if mask.any():
        compare(given, ("logprob", "entropy"), "cpu", mask=mask, chunk=8)
    else:
        assert (d_weight == 0).all()


def test_padding_may_hold_anything():
    """NaN states and tokens that do not exist, where the mask says so."""
    hidden, weight, _, ids = operands()
    mask = torch.rand(ROWS) < 0.5
    hidden, ids = hidden.masked_fill(~mask[:, None], torch.nan).requires_grad_(), ids.masked_fill(~mask, -100)
    linear_logprob(hidden, weight.requires_grad_(), ids, mask=mask, chunk=8).logprob.sum().backward()
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()


def test_rows_of_rollouts():
    hidden, weight, _, ids = operands()
    temperature = torch.rand(5, 1) + 0.5
    flat = linear_logprob(hidden, weight, ids, temperature=temperature.expand(5, 9).reshape(-1), mask=ids % 3 > 0)
    square = linear_logprob(
        hidden.view(5, 9, WIDTH), weight, ids.view(5, 9), temperature=temperature, mask=(ids % 3 > 0).view(5, 9)
    )
    assert square.logprob.shape == (5, 9) and torch.equal(square.logprob.flatten(), flat.logprob)


def test_rows_without_a_gradient_cost_no_product_backward(monkeypatch):
    hidden, weight, _, ids = operands()
    hidden.requires_grad_()
    out, projected = linear_logprob(hidden, weight, ids, chunk=10), []
    logits = head_products.HeadProducts.logits
    monkeypatch.setattr(
        head_products.HeadProducts,
        "logits",
        lambda self, piece, out=None: projected.append(piece.stop - piece.start) or logits(self, piece, out),
    )
    out.logprob[::3].sum().backward()
    assert projected == [10, 5] and (hidden.grad != 0).any(1).sum() == 15


def test_chunk_size_does_not_matter():
    given, weights = operands(rows=101), {"logprob": torch.randn(101)}
    whole, gradients = with_gradients(linear_logprob, given, weights, chunk=101)
    for chunk in (1, 7, 64, 1000):
        part, found = with_gradients(linear_logprob, given, weights, chunk=chunk)
        assert torch.allclose(part["logprob"], whole["logprob"], rtol=1e-5, atol=1e-5)
        for a, b in zip(found, gradients, strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=2e-6 * b.abs().max())


def test_no_row():
    found, gradients = with_gradients(linear_logprob, operands(rows=0), {"logprob": torch.randn(0)})
    assert found["logprob"].shape == (0,) and (gradients[1] == 0).all()


def test_frozen_operands_cost_no_product(monkeypatch):
    given, weights = operands(), {"logprob": torch.randn(ROWS)}
    _, (d_hidden, d_weight, d_bias) = with_gradients(linear_logprob, given, weights, bias=True, chunk=10)
    hidden, weight, bias, ids = given
    for leaf, expected, skipped in (
        (hidden, d_hidden, "_add_weight"), (weight, d_weight, "_times_weight"), (bias, d_bias, "_times_weight"),
    ):  # fmt: skip
        leaf.requires_grad_()
        with monkeypatch.context() as patch:
            patch.setattr(head_products.HeadProducts, skipped, None)
            out = linear_logprob(hidden, weight, ids, bias=bias, chunk=10)
            (out.logprob * weights["logprob"]).sum().backward()
        assert torch.equal(leaf.grad, expected)
        leaf.requires_grad_(False)


def test_without_gradient_nothing_is_kept(monkeypatch):
    hidden, weight, _, ids = operands()
    weight.requires_grad_()
    expected = linear_logprob(hidden, weight, ids, memory=10**9)
    kept, op = [], torch.ops.fuserl.linear_logprob
    monkeypatch.setattr("fuserl.kernels.linear_logprob._linear_logprob", lambda *a: kept.append(a[-3]) or op(*a))
    with torch.no_grad():
        out = linear_logprob(hidden, weight, ids, memory=10**9)
    linear_logprob(hidden, weight.detach(), ids, memory=10**9)
    linear_logprob(hidden, weight, ids, memory=10**9)
    assert kept == [0, 0, 10**9] and torch.equal(out.logprob, expected.logprob) and not out.logprob.requires_grad
    with torch.inference_mode():
        assert torch.equal(linear_logprob(hidden, weight, ids).logprob, expected.logprob)


def test_sixteen_bit_states_give_float32_logits():
    """As a product with float32 output and a float32 log-softmax have them, and far from 16-bit logits."""
    hidden, weight, _, ids = operands(torch.bfloat16)
    truth = reference(hidden.double(), weight.double(), ids).logprob
    careful = reference(hidden, weight, ids).logprob
    rounded = (hidden @ weight.T).float().log_softmax(-1).gather(1, ids[:, None])[:, 0]
    ours, theirs, bad = (
        (x - truth).abs().max() for x in (linear_logprob(hidden, weight, ids).logprob, careful, rounded)
    )
    assert ours <= 1.5 * theirs and bad > 100 * ours


def test_shares_its_logits_with_token_logprob():
    hidden, weight, bias, ids = operands()
    out = linear_logprob(hidden, weight, ids, bias=bias, outputs=("logprob", "entropy"))
    logits = torch.addmm(bias, hidden, weight.T)
    assert all(map(torch.equal, (out.logprob, out.entropy), token_logprob(logits, ids)))


def test_a_bias_of_minus_infinity_bars_a_token():
    hidden, weight, bias, ids = operands()
    bias[ids[0]] = -torch.inf
    given = hidden, weight, bias, torch.where(ids == ids[0], (ids + 1) % VOCABULARY, ids)
    found, gradients = with_gradients(linear_logprob, given, {"logprob": torch.ones(ROWS)}, bias=True)
    assert found["logprob"].isfinite().all() and gradients[2][ids[0]] == 0 and gradients[1][ids[0]].eq(0).all()


def test_tied_weights():
    hidden, weight, _, ids = operands()
    results = []
    for function in (linear_logprob, reference):
        tied = weight.clone().requires_grad_()
        function(torch.tanh(tied[ids] * 0.5 + hidden), tied, ids).logprob.sum().backward()
        results.append(tied.grad)
    assert torch.allclose(*results, rtol=1e-5, atol=2e-6 * results[1].abs().max())


def test_gradcheck():
    hidden, weight, bias, ids = (x[:5] if x.dtype == torch.int64 else x.double() for x in operands(rows=5))
    leaves = [hidden.requires_grad_(), (weight[:11] / 5).requires_grad_(), bias[:11].requires_grad_()]

    def outputs(hidden, weight, bias):
        out = linear_logprob(
            hidden, weight, ids % 11, bias=bias, outputs=DIFFERENTIABLE, softcap=3.0, logit_scale=0.5, chunk=2
        )
        return tuple(vars(out).values())

    assert torch.autograd.gradcheck(outputs, leaves)


def test_ten_runs_are_bit_equal():
    given, weights = operands(), {"logprob": torch.randn(ROWS)}
    first = with_gradients(linear_logprob, given, weights, chunk=10)
    for _ in range(9):
        again = with_gradients(linear_logprob, given, weights, chunk=10)
        assert torch.equal(first[0]["logprob"], again[0]["logprob"])
        assert all(map(torch.equal, first[1], again[1]))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("memory", [None, 20 * LOGITS])
def test_compiles_without_a_graph_break(memory, masked):
    hidden, weight, bias, ids = operands()

    def loss(hidden, weight, bias, ids, mask):
        out = linear_logprob(
            torch.tanh(hidden), weight, ids, bias=bias, outputs=("logprob", "entropy"), mask=mask, softcap=9.0,
            memory=memory, chunk=10,
        )  # fmt: skip
        return (out.logprob * out.entropy).sum()

    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(loss, fullgraph=True, backend=counting)
    for rows in (*range(26, 44), 45):
        leaves = [hidden[:rows].clone().requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
        arguments = *leaves, ids[:rows], torch.arange(rows) % 3 > 0 if masked else None
        expected = torch.autograd.grad(loss(*arguments), leaves)
        for a, b in zip(torch.autograd.grad(compiled(*arguments), leaves), expected, strict=True):
            assert torch.equal(a, b)
    assert len(graphs) <= 2


def test_opcheck():
    hidden, weight, bias, ids = operands()
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    down, up = (torch.randn(*shape).requires_grad_() for shape in ((2, WIDTH), (VOCABULARY, 2)))
    settings = (
        None,
        None,
        1.0,
        5.0,
        1.0,
        0.5,
        ["logprob", "sum_sq_prob", "extra_logprob"],
        10,
        20 * LOGITS,
        False,
        "cpu",
    )
    lists = torch.stack([ids, ids.flip(0)], 1).flatten(), 2 * torch.arange(ROWS + 1)
    arguments = *leaves, down, up, ids, torch.arange(ROWS) % 3 > 0, None, ids.flip(0), *lists, *settings
    torch.library.opcheck(torch.ops.fuserl.linear_logprob, arguments)
    _, statistics, kept = (x.detach() for x in torch.ops.fuserl.linear_logprob(*arguments))
    detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
    for needs in ([True] * 5, [True, False, False, False, True]):
        given = torch.randn(3, ROWS), statistics, kept, needs, *detached
        torch.library.opcheck(torch.ops.fuserl.linear_logprob_backward, given)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_autocast_casts_operands_and_nothing_else(backend):
    hidden, weight, bias, ids = operands()
    found = []
    for cast in (False, True):
        leaves = [x.clone().to(torch.float32 if cast else torch.bfloat16).requires_grad_() for x in (hidden, weight)]
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            out = linear_logprob(*leaves, ids, bias=bias, backend=backend)
        out.logprob.sum().backward()
        found.append([out.logprob, *(x.grad.float() for x in leaves)])
        assert out.logprob.dtype == torch.float32
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize(
    "change,message",
    [
        ({"hidden": torch.zeros(WIDTH)}, "hidden must be"),
        ({"hidden": torch.zeros(ROWS, WIDTH, dtype=torch.int64)}, "hidden must be"),
        ({"weight": torch.zeros(WIDTH, VOCABULARY)}, "weight must be"),
        ({"weight": torch.zeros(VOCABULARY, WIDTH).bfloat16()}, "weight must be torch.float32"),
        ({"ids": torch.zeros(44, dtype=torch.int64)}, r"ids must be \(45,\)"),
        ({"ids": torch.full((ROWS,), VOCABULARY)}, "ids must lie in"),
        ({"outputs": ("logprobs",)}, "outputs must be among"),
        ({"outputs": ()}, "outputs must be among"),
        ({"bias": torch.zeros(VOCABULARY - 1)}, r"bias must be \(301,\)"),
        ({"softcap": 0.0}, "softcap must be positive"),
        ({"logit_scale": -1.0}, "logit_scale must be positive"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"mask": torch.ones(ROWS)}, "mask must be"),
        ({"mask": torch.ones(5, 9).bool()}, "mask must be"),
        ({"memory": -1}, "memory must be"),
        ({"chunk": 0}, "chunk must be"),
        ({"backend": "cudnn"}, "backend must be one of"),
    ],
)
def test_bad_input_gets_one_sentence(change, message):
    hidden, weight, _, ids = operands()
    with pytest.raises(ValueError, match=message):
        linear_logprob(**{"hidden": hidden, "weight": weight, "ids": ids, **change})
    with pytest.raises(AttributeError, match=r"no 'entropy'.*outputs="):
        _ = linear_logprob(hidden, weight, ids).entropy
