"""linear_divergence against float64 autograd through all logits of both models: values, gradients, chunks, masks."""

import pytest
import torch
from backends import INTERPRETING, cpu_only, each_backend, run_interpreted
from divergences import KINDS
from tolerance import check, check_rows

import fuserl
from fuserl.kernels import head_products
from fuserl.kernels.divergence import divergence
from fuserl.kernels.linear_divergence import linear_divergence, reference

ROWS, WIDTHS, VOCABULARY = 9 if INTERPRETING else 45, (24, 40), 301
# The row kernels' divisor, temperature / cap, is a float32 number: these are exact, as inputs are quantised beforehand.
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"logit_scale_p": 0.3, "logit_scale_q": 0.6},
    "caps": {"softcap_p": 32.0, "softcap_q": 16.0},
    "cap of q": {"softcap_q": 16.0},
    "all": {
        "bias": True, "logit_scale_p": 1.3, "softcap_p": 32.0, "temperature": 0.75, "logit_scale_q": 0.5,
        "softcap_q": 16.0, "temperature_q": 1.25,
    },
}  # fmt: skip
NAMES = ("hidden_p", "weight_p", "bias_p", "hidden_q", "weight_q", "bias_q")


def operands(dtype=torch.float32, dtype_q=None, device="cpu", rows=ROWS, vocabulary=VOCABULARY):
    """States, heads and biases of a student and of a wider teacher, whose peaky distributions are not far apart."""
    common = torch.randn(rows, WIDTHS[0]) * 2
    hidden_q = torch.cat([common + 0.3 * torch.randn_like(common), torch.randn(rows, WIDTHS[1] - WIDTHS[0])], 1)
    weight_p = torch.randn(vocabulary, WIDTHS[0])
    weight_q = torch.cat([weight_p, 0.3 * torch.randn(vocabulary, WIDTHS[1] - WIDTHS[0])], 1)
    bias = 3 * torch.randn(vocabulary)
    made = {
        "hidden_p": common, "weight_p": weight_p, "bias_p": bias, "hidden_q": hidden_q, "weight_q": weight_q,
        "bias_q": bias + torch.randn(vocabulary),
    }  # fmt: skip
    return {name: x.to(dtype_q or dtype if name.endswith("q") else dtype).to(device) for name, x in made.items()}


def run(function, given, g, kind, dtype=None, *, bias=False, detach_q=False, trained=NAMES, **options):
    """(divergence, entropy) and the gradients by name, with g (2, ...) from above."""
    names = [name for name in NAMES if bias or "bias" not in name]
    leaves = {
        name: given[name].to(dtype or given[name].dtype).detach().clone().requires_grad_(name in trained)
        for name in names
    }
    first = [leaves.pop(name) for name in ("hidden_p", "weight_p", "hidden_q", "weight_q")]
    found = function(*first, kind, detach_q=detach_q, **leaves, **options)
    if found[0].requires_grad:
        torch.autograd.backward(found, [x.to(o.dtype) for x, o in zip(g, found, strict=True)])
    leaves |= dict(zip(("hidden_p", "weight_p", "hidden_q", "weight_q"), first, strict=True))
    return [x.detach() for x in found], {name: leaves[name].grad for name in names if leaves[name].grad is not None}


def plain_run(given, g, kind, **options):
    """Plain torch with the states' dimensions in an order of chance: results, and gradients in the old order."""
    orders = {side: torch.randperm(given[f"hidden_{side}"].shape[1]) for side in "pq"}
    mixed = {name: x if "bias" in name else x[:, orders[name[-1]]] for name, x in given.items()}
    found, gradients = run(reference, mixed, g, kind, **options)
    back = {side: order.argsort() for side, order in orders.items()}
    return found, {name: x if "bias" in name else x[:, back[name[-1]]] for name, x in gradients.items()}


def compare(given, kind, backend, *, mask=None, head=None, detach_q=False, **options):
    """Against the truth and, as right as that, plain torch; returns what was found."""
    head = head or {}
    double = given["hidden_p"].dtype == torch.float64
    g = torch.randn(2, *given["hidden_p"].shape[:-1], device=given["hidden_p"].device)
    here = None if mask is None else mask.to(g.device)
    same = {"detach_q": detach_q, **head}
    truth, true = run(reference, given, g, kind, torch.float64, mask=here, **same)
    rough = [plain_run(given, g, kind, mask=here, **same) for _ in range(5)]
    # The sums are the same in another order: one run alone may be right by chance.
    plain = [max((x[i] for x, _ in rough), key=lambda x, i=i: (x - truth[i]).norm()) for i in range(2)]
    plainly = {n: max((x[n] for _, x in rough), key=lambda x, n=n: (x - true[n]).norm()) for n in true}
    found, gradients = run(linear_divergence, given, g, kind, mask=mask, backend=backend, **same, **options)
    assert gradients.keys() == true.keys() and len(true) == (2 if detach_q else 4) * (3 if head.get("bias") else 2) / 2
    if double:
        pairs = [*zip(found, truth, strict=True), *((gradients[name], true[name]) for name in true)]
        assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-11 * b.abs().max()) for a, b in pairs)
        return found, gradients
    for name, got, exact, rough in zip(("divergence", "entropy"), found, truth, plain, strict=True):
        assert got.dtype == torch.float32 and got.shape == g.shape[1:]
        check(name, got, exact, rough, torch.float32)
    for name, exact in true.items():
        got, dtype = gradients[name], given[name].dtype
        assert got.dtype == dtype and exact.norm() > 0
        rows = [x[None] if "bias" in name else x for x in (got, exact, plainly[name])]
        check_rows(name, *rows, dtype, torch.float32)
    return found, gradients


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32] if INTERPRETING else [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("head", ["plain", "caps"] if INTERPRETING else HEADS)
@pytest.mark.parametrize("detach_q", [False, True])
@pytest.mark.parametrize("chunk", [4] if INTERPRETING else [7, None])
def test_equals_float64(chunk, detach_q, head, dtype, device, backend):
    given = operands(dtype, device=device)
    found, _ = compare(given, "reverse_kl", backend, head=HEADS[head], detach_q=detach_q, chunk=chunk)
    assert found[0].max() > 0.1 and found[1].min() < 1, "peaky and apart, or every check is vacuous"


@each_backend
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(kind, device, backend):
    numbers = {"jensen_shannon": {"beta": 0.2}, "alpha": {"alpha": 0.3}}.get(kind, {})
    compare(operands(device=device), kind, backend, head={**numbers, "softcap_p": 32.0, "softcap_q": 32.0}, chunk=20)


@each_backend
def test_two_dtypes_and_a_temperature_per_token(device, backend):
    given = operands(torch.float32, torch.bfloat16, device)
    head = {"temperature": (torch.rand(ROWS) + 0.5).to(device), "bias": True, "softcap_p": 32.0}
    compare(given, "jensen_shannon", backend, head=head, chunk=20)
    compare(operands(torch.float16, torch.float32, device), "forward_kl", backend, chunk=20)


@each_backend
@pytest.mark.parametrize("detach_q", [False, True])
def test_rows_of_many_blocks(detach_q, device, backend):
    """Whole vectors are written where they were read, the last ones by way of a buffer."""
    given = operands(device=device, rows=9, vocabulary=4100)
    compare(given, "reverse_kl", backend, head=HEADS["caps"], detach_q=detach_q, chunk=5)


@cpu_only
def test_rows_of_rollouts():
    given, g = operands(), torch.randn(2, ROWS)
    square = {name: x.view(5, 9, -1) if "hidden" in name else x for name, x in given.items()}
    temperature, mask = torch.rand(5, 1) + 0.5, torch.rand(ROWS) < 0.7
    flat = {"temperature": temperature.expand(5, 9).reshape(-1), "mask": mask}
    one, ones = run(linear_divergence, given, g, "reverse_kl", **flat)
    two, twos = run(
        linear_divergence, square, g.view(2, 5, 9), "reverse_kl", temperature=temperature, mask=mask.view(5, 9)
    )
    assert all(torch.equal(a, b.flatten()) and b.shape == (5, 9) for a, b in zip(one, two, strict=True))
    assert all(torch.equal(ones[name].flatten(), twos[name].flatten()) for name in ones)


@cpu_only
def test_shares_its_logits_with_divergence():
    given = operands()
    z_p, z_q = given["hidden_p"] @ given["weight_p"].T, given["hidden_q"] @ given["weight_q"].T
    found = linear_divergence(*(given[n] for n in ("hidden_p", "weight_p", "hidden_q", "weight_q")), "forward_kl")
    assert all(map(torch.equal, found, divergence(z_p, z_q, "forward_kl")))


@each_backend
@pytest.mark.parametrize("head", ["plain", "caps"])
@pytest.mark.parametrize("which", ["some", "none", "one"])
def test_masked_tokens_are_zero_and_cost_nothing(which, head, device, backend, monkeypatch):
    given, g = operands(device=device), torch.randn(2, ROWS, device=device)
    mask = {"some": torch.rand(ROWS) < 0.5, "none": torch.zeros(ROWS).bool(), "one": torch.arange(ROWS) == 3}[which]
    whole, _ = run(linear_divergence, given, g, "reverse_kl", backend=backend, **HEADS[head])
    for name in ("hidden_p", "hidden_q"):  # padding may hold anything
        given[name][~mask] = torch.nan
    projected, logits = [], head_products.HeadProducts.logits
    monkeypatch.setattr(
        head_products.HeadProducts,
        "logits",
        lambda self, piece: projected.append(piece.stop - piece.start) or logits(self, piece),
    )
    found, gradients = run(
        linear_divergence, given, g, "reverse_kl", mask=mask, chunk=8, backend=backend, **HEADS[head]
    )
    for value, expected in zip(found, whole, strict=True):
        assert not value[~mask].any()
        torch.testing.assert_close(value[mask], expected[mask], rtol=1e-4, atol=1e-5)
    assert all(x.isfinite().all() for x in gradients.values())
    assert not gradients["hidden_p"][~mask].any() and not gradients["hidden_q"][~mask].any()
    assert sum(projected) == 4 * mask.sum()
    if which == "some" and device == "cpu":
        compare(operands(), "reverse_kl", backend, mask=mask, head=HEADS[head], chunk=8)


@cpu_only
@pytest.mark.parametrize("masked", [False, True])
def test_rows_without_a_gradient_cost_no_product_backward(masked, monkeypatch):
    given, g = operands(), torch.randn(2, ROWS)
    alive, mask = torch.rand(ROWS) < 0.4, torch.rand(ROWS) < 0.7 if masked else None
    g[0] *= alive
    g[1] *= alive
    projected, logits = [], head_products.HeadProducts.logits
    _, expected = run(reference, given, g, "forward_kl", mask=mask)
    monkeypatch.setattr(
        head_products.HeadProducts,
        "logits",
        lambda self, piece: projected.append(piece.stop - piece.start) or logits(self, piece),
    )
    _, gradients = run(linear_divergence, given, g, "forward_kl", mask=mask, chunk=10)
    both = alive if mask is None else alive & mask
    assert sum(projected) == 2 * (ROWS if mask is None else mask.sum()) + 2 * both.sum()
    for name, x in gradients.items():
        assert torch.allclose(x, expected[name], rtol=1e-4, atol=2e-6 * x.abs().max())


@cpu_only
def test_frozen_operands_cost_no_product(monkeypatch):
    given, g = operands(), torch.randn(2, ROWS)
    _, expected = run(linear_divergence, given, g, "reverse_kl", bias=True, softcap_p=20.0, chunk=10)
    skipped = {"hidden": "_add_weight", "weight": "_times_weight", "bias": "_times_weight"}
    for name in NAMES:
        with monkeypatch.context() as patch:
            patch.setattr(head_products.HeadProducts, skipped[name[:-2]], None)
            options = {"bias": True, "softcap_p": 20.0, "chunk": 10, "trained": (name,)}
            _, found = run(linear_divergence, given, g, "reverse_kl", **options)
        assert found.keys() == {name} and torch.equal(found[name], expected[name])


@cpu_only
def test_teacher_is_data_unless_told(monkeypatch):
    given, g = operands(), torch.randn(2, ROWS)
    products, made = head_products.HeadProducts, []
    init = products.__init__
    monkeypatch.setattr(products, "__init__", lambda self, *a, **k: made.append(k["needs"]) or init(self, *a, **k))
    _, found = run(linear_divergence, given, g, "reverse_kl", bias=True, detach_q=True)
    assert found.keys() == {"hidden_p", "weight_p", "bias_p"} and not any(made[-1])


@cpu_only
def test_chunk_size_does_not_matter():
    given = operands(rows=101)
    for chunk in (1, 7, 64, 101, 1000):
        compare(given, "jensen_shannon", "cpu", chunk=chunk)


@cpu_only
def test_no_row():
    found, gradients = run(linear_divergence, operands(rows=0), torch.randn(2, 0), "reverse_kl")
    assert found[0].shape == (0,) and not gradients["weight_p"].any() and gradients["hidden_q"].shape == (0, 40)


@each_backend
def test_of_itself_nothing(device, backend):
    given, g = operands(device=device), torch.stack([torch.ones(ROWS), torch.zeros(ROWS)]).to(device)
    for name in ("hidden", "weight", "bias"):
        given[f"{name}_q"] = given[f"{name}_p"]
    found, gradients = run(linear_divergence, given, g, "reverse_kl", bias=True, chunk=10, backend=backend)
    assert not found[0].any() and not any(x.any() for x in gradients.values())


@cpu_only
def test_infinite_divergences_pass_no_gradient_on():
    given, g = operands(), torch.ones(2, ROWS)
    given["bias_q"][3] = -torch.inf
    found, gradients = run(linear_divergence, given, g * torch.tensor([[1.0], [0.0]]), "reverse_kl", bias=True)
    assert (found[0] == torch.inf).all() and found[1].isfinite().all()
    assert not any(x.any() for x in gradients.values())


@cpu_only
def test_gradcheck():
    given = {name: x.double() for name, x in operands(rows=4).items()}
    leaves = [given[name][:11] / 3 for name in NAMES]
    for kind in KINDS:

        def both(hidden_p, weight_p, bias_p, hidden_q, weight_q, bias_q, kind=kind):
            return linear_divergence(
                hidden_p, weight_p, hidden_q, weight_q, kind, bias_p=bias_p, bias_q=bias_q, softcap_p=3.0,
                softcap_q=2.0, logit_scale_q=0.5, detach_q=False, chunk=3,
            )  # fmt: skip

        assert torch.autograd.gradcheck(both, [x.requires_grad_() for x in leaves])


@cpu_only
def test_ten_runs_are_bit_equal():
    given, g = operands(), torch.randn(2, ROWS)
    first = run(linear_divergence, given, g, "forward_kl", chunk=10)
    for _ in range(9):
        again = run(linear_divergence, given, g, "forward_kl", chunk=10)
        assert all(map(torch.equal, first[0], again[0]))
        assert all(torch.equal(again[1][name], x) for name, x in first[1].items())


@cpu_only
def test_without_gradient():
    given = operands()
    expected, _ = run(linear_divergence, given, torch.ones(2, ROWS), "reverse_kl")
    first = [given[name].requires_grad_() for name in ("hidden_p", "weight_p", "hidden_q", "weight_q")]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = linear_divergence(*first, "reverse_kl")
        assert all(map(torch.equal, found, expected)) and not found[0].requires_grad


@cpu_only
@pytest.mark.parametrize("masked", [False, True])
def test_compiles_without_a_graph_break(masked):
    given = operands()

    def loss(hidden_p, weight_p, hidden_q, weight_q, mask):
        value, entropy = linear_divergence(
            torch.tanh(hidden_p), weight_p, hidden_q * 2, weight_q, "jensen_shannon", beta=0.3, softcap_p=20.0,
            detach_q=False, mask=mask, chunk=10,
        )  # fmt: skip
        return (value - 0.1 * entropy).sum()

    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(loss, fullgraph=True, backend=counting)
    for rows in (*range(26, 44), 45):
        leaves = [
            given[name][: rows if "hidden" in name else None].clone().requires_grad_()
            for name in ("hidden_p", "weight_p", "hidden_q", "weight_q")
        ]
        arguments = *leaves, torch.arange(rows) % 3 > 0 if masked else None
        expected = torch.autograd.grad(loss(*arguments), leaves)
        for a, b in zip(torch.autograd.grad(compiled(*arguments), leaves), expected, strict=True):
            assert torch.equal(a, b)
    assert len(graphs) <= 2


@cpu_only
def test_opcheck():
    given = operands(rows=9)
    leaves = [given[name].requires_grad_() for name in NAMES]
    settings = 0.1, None, 1, 0.0, 1.0, 4, "cpu"
    arguments = *leaves, torch.arange(9) % 3 > 0, torch.ones(2, 9), *settings
    torch.library.opcheck(torch.ops.fuserl.linear_divergence, arguments)
    kept = torch.ops.fuserl.linear_divergence(*arguments)[2].detach()
    detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
    for needs in ([True] * 6, [True, False, False, False, True, False], [True, True, False, False, False, False]):
        torch.library.opcheck(torch.ops.fuserl.linear_divergence_backward, (torch.randn(2, 9), kept, needs, *detached))


@cpu_only
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_autocast_casts_operands_and_nothing_else(backend):
    given, found = operands(), []
    for cast in (False, True):
        dtype = torch.float32 if cast else torch.bfloat16
        leaves = [given[n].to(dtype).requires_grad_() for n in ("hidden_p", "weight_p", "hidden_q", "weight_q")]
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            value, entropy = linear_divergence(*leaves, "reverse_kl", detach_q=False, backend=backend)
        found.append([value, entropy, *torch.autograd.grad((value + entropy).sum(), leaves)])
        assert value.dtype == torch.float32
    assert all(torch.equal(a.float(), b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    "change,message",
    [
        ({"hidden_p": torch.zeros(24)}, "hidden_p must be"),
        ({"hidden_q": torch.zeros(ROWS, 40).long()}, "hidden_q must be"),
        ({"hidden_q": torch.zeros(ROWS + 1, 40)}, rf"hidden_q must be \({ROWS},\) tokens"),
        ({"weight_p": torch.zeros(24, 301)}, r"weight_p must be \(V, 24\)"),
        ({"weight_q": torch.zeros(301, 40).bfloat16()}, "weight_q must be torch.float32"),
        ({"weight_q": torch.zeros(300, 40)}, "weight_q must have 301 rows"),
        ({"hidden_q": torch.zeros(ROWS, 40).double(), "weight_q": torch.zeros(301, 40).double()}, "both be float64"),
        ({"bias_q": torch.zeros(300)}, r"bias_q must be \(301,\)"),
        ({"kind": "kl"}, "kind must be one of"),
        ({"kind": "jensen_shannon", "beta": 1.0}, "beta must lie"),
        ({"softcap_q": 0.0}, "softcap must be positive"),
        ({"logit_scale_p": -1.0}, "logit_scale must be positive"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"mask": torch.ones(ROWS)}, "mask must be"),
        ({"chunk": 0}, "chunk must be"),
        ({"backend": "cudnn"}, "backend must be one of"),
    ],
)
def test_bad_input_gets_one_sentence(change, message):
    given = {name: x for name, x in operands().items() if "bias" not in name}
    with pytest.raises(ValueError, match=f"^linear_divergence: .*{message}"):
        fuserl.linear_divergence(**{**given, "kind": "reverse_kl", **change})


@cpu_only
def test_triton_in_the_interpreter():
    run_interpreted(__file__)
