"""linear_policy_loss with a reference: divergences as outputs, against float64 and against the ops that they equal."""

import pytest
import torch
from backends import INTERPRETING, cpu_only, each_fast_backend, run_interpreted
from divergences import KINDS
from head_case import Case, compare, same

from fuserl.kernels import head_products, second_head
from fuserl.kernels.linear_divergence import linear_divergence
from fuserl.kernels.linear_logprob import linear_logprob
from fuserl.kernels.linear_policy_loss import linear_policy_loss

ROWS = 9 if INTERPRETING else 45
# A temperature over a cap that is a float32 number, as the row kernels take it: inputs are quantised beforehand.
HEADS = {
    "plain": {}, "bias": {"bias": True}, "softcap": {"softcap": 32.0},
    "all": {"bias": True, "logit_scale": 1.3, "softcap": 32.0, "temperature": 0.75},
}  # fmt: skip


class Pair(Case):
    """A case beside a wider reference, whose distributions are not far from the policy's."""

    def __init__(self, rows=ROWS, reference_dtype=None, **options):
        super().__init__(rows, **options)
        hidden, weight = self.hidden, self.weight
        more, dtype = 16, reference_dtype or hidden.dtype
        states = torch.cat([hidden + 0.3 * torch.randn_like(hidden), torch.randn(rows, more).to(hidden)], 1)
        head = torch.cat([weight, 0.3 * torch.randn(len(weight), more).to(weight)], 1)
        self.reference_bias = self.bias + torch.randn_like(self.bias)
        self.beside = states.to(dtype), head.to(dtype)

    def run(self, loss=None, dtype=None, bias=False, beta=0.5, alpha=0.5, **options):
        beside = *self.beside, self.reference_bias if bias else None
        beside = (x if dtype is None or x is None else x.to(dtype) for x in beside)
        return super().run(loss, dtype, bias, reference=second_head.Reference(*beside, beta, alpha), **options)

    def penalised(self, kind, weight=0.3):
        """Weighted likelihoods and a divergence, no term of which cancels another."""

        def loss(out, rows):
            likelihood = -self.advantages[rows].to(out.logprob.dtype).square() * out.logprob
            return (likelihood + weight * getattr(out, kind)) / self.rows

        return loss


@each_fast_backend
@pytest.mark.parametrize("dtype", [torch.float32] if INTERPRETING else [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("chunk", [4] if INTERPRETING else [7, None])
def test_equals_float64(chunk, head, dtype, device, backend):
    case = Pair(dtype=dtype, device=device)
    outputs = ("logprob", "reverse_kl")
    compare(case, case.penalised("reverse_kl"), backend, outputs=outputs, chunk=chunk, **HEADS[head])
    reached = case.run(case.penalised("reverse_kl"), outputs=outputs, backend=backend)[3].reverse_kl
    assert reached.max() > 0.1, "apart, or every check is vacuous"


@each_fast_backend
@pytest.mark.parametrize("kind", ["jensen_shannon"] if INTERPRETING else KINDS)
def test_every_kind_alone_and_with_others(kind, device, backend):
    case = Pair(device=device)
    numbers = {"jensen_shannon": {"beta": 0.2}, "alpha": {"alpha": 0.3}}.get(kind, {})
    options = {"chunk": 20, "softcap": 32.0, **numbers}
    compare(case, lambda out, rows: getattr(out, kind) / case.rows, backend, outputs=(kind,), **options)

    def loss(out, rows):
        return (
            getattr(out, kind) + out.entropy * out.forward_kl - out.mean_logprob * out.squared_hellinger
        ) / case.rows

    outputs = dict.fromkeys((kind, "forward_kl", "entropy", "squared_hellinger", "mean_logprob"))
    compare(case, loss, backend, outputs=tuple(outputs), **options)


@each_fast_backend
def test_rows_of_many_blocks(device, backend):
    """Whole vectors are written where they were read, the last ones by way of a buffer."""
    case = Pair(9, vocabulary=4100, device=device)
    compare(case, case.penalised("forward_kl"), backend, outputs=("logprob", "forward_kl"), chunk=5, softcap=32.0)


@each_fast_backend
def test_a_reference_of_another_dtype(device, backend):
    case = Pair(reference_dtype=torch.bfloat16, device=device)
    compare(case, case.penalised("forward_kl"), backend, outputs=("logprob", "forward_kl"), chunk=20)


@cpu_only
def test_temperature_per_token_and_live_rows():
    case = Pair(zero_half=True)
    live, temperature = case.advantages != 0, torch.rand(ROWS) + 0.5

    def loss(out, rows):
        return case.advantages[rows].to(out.logprob) * (out.logprob + 0.2 * out.reverse_kl) / case.rows

    options = {"outputs": ("logprob", "reverse_kl"), "temperature": temperature, "chunk": 10}
    compare(case, loss, live=live, **options)
    whole, part = case.run(loss, **options), case.run(loss, live=live, **options)
    same(whole, part)
    assert part[3].reverse_kl[~live].isnan().all() and part[3].reverse_kl[live].isfinite().all()


@cpu_only
@pytest.mark.parametrize("scope", ["rollout", "batch"])
@pytest.mark.parametrize("chunk", [4, 20, None])
def test_scopes(scope, chunk):
    case, offsets = Pair(), torch.tensor([0, 3, 3, 14, 33, 45])

    def loss(out, rows):
        first = torch.searchsorted(offsets, rows, right=True) if scope == "rollout" else torch.zeros_like(rows)
        share = torch.zeros(9).to(out.forward_kl).index_add(0, first, out.forward_kl)[first]
        return out.logprob * share / case.rows**2

    options = {"scope": scope, "chunk": chunk, "outputs": ("logprob", "forward_kl"), "softcap": 32.0}
    compare(case, loss, **options, **({"offsets": offsets} if scope == "rollout" else {}))


@cpu_only
def test_equals_linear_logprob_and_linear_divergence():
    case = Pair()
    loss, d_hidden, d_weight, out, _ = case.run(
        case.penalised("jensen_shannon"), outputs=("logprob", "jensen_shannon"), chunk=10, beta=0.3
    )
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    logprob = linear_logprob(hidden, weight, case.ids, chunk=10)
    value, _ = linear_divergence(hidden, weight, *case.beside, "jensen_shannon", beta=0.3, chunk=10)
    assert torch.equal(out.logprob, logprob.logprob) and torch.equal(out.jensen_shannon, value)
    other = ((0.3 * value - case.advantages.square() * logprob.logprob) / ROWS).sum()
    same((other.detach(), *torch.autograd.grad(other, (hidden, weight))), (loss, d_hidden, d_weight))


@cpu_only
def test_rows_dead_by_clipping_cost_no_backward_product(monkeypatch):
    case, alive = Pair(), torch.rand(ROWS) < 0.5
    multiplied, accumulate = [], head_products.HeadProducts.accumulate
    monkeypatch.setattr(
        head_products.HeadProducts,
        "accumulate",
        lambda self, gradient, *rest: multiplied.append(len(gradient)) or accumulate(self, gradient, *rest),
    )

    def loss(out, rows):
        return (out.logprob * (rows % 3 == 0) + 0.1 * out.reverse_kl) * alive[rows] / case.rows

    compare(case, loss, outputs=("logprob", "reverse_kl"), chunk=10, softcap=32.0)
    assert sum(multiplied) == alive.sum()


@cpu_only
def test_products_of_both_heads(monkeypatch):
    case, made = Pair(), []
    logits = head_products.HeadProducts.logits
    monkeypatch.setattr(
        head_products.HeadProducts,
        "logits",
        lambda self, piece: made.append((len(self.hidden[0]), piece.stop - piece.start)) or logits(self, piece),
    )
    case.run(case.penalised("reverse_kl"), outputs=("logprob", "reverse_kl"), chunk=10)
    by_width = {width: sum(n for w, n in made if w == width) for width in (24, 40)}
    assert by_width == {24: ROWS, 40: ROWS}


@cpu_only
def test_a_divergence_that_is_only_watched_costs_no_gradient(monkeypatch):
    case = Pair()
    alone = Case.run(case, chunk=10)
    forward, _ = second_head.IMPLS["cpu"]
    monkeypatch.setitem(second_head.IMPLS, "cpu", (forward, None))
    watched = case.run(chunk=10, outputs=("logprob", "reverse_kl"))
    assert all(map(torch.equal, watched[:3], alone[:3])) and (watched[3].reverse_kl > 0).all()
    with torch.no_grad():
        out = linear_policy_loss(
            case.hidden, case.weight, case.ids, case.clipped, outputs=("logprob", "reverse_kl"), reference=case.beside
        )[1]
    torch.testing.assert_close(out.reverse_kl, watched[3].reverse_kl, rtol=1e-4, atol=1e-6)


@cpu_only
def test_the_reference_is_data():
    case = Pair()
    leaves = [x.requires_grad_() for x in case.beside]
    case.run(case.penalised("reverse_kl"), outputs=("logprob", "reverse_kl"))
    assert all(x.grad is None for x in leaves)


@cpu_only
def test_params_grad_weight_and_ten_runs():
    case, grads = Pair(), {}
    for backend in ("cpu", "reference"):
        beta, weight = torch.tensor(0.5, requires_grad=True), case.weight.clone().requires_grad_()
        loss, *_ = linear_policy_loss(
            case.hidden, weight, case.ids, lambda out, rows, b=beta: out.reverse_kl * b.exp() - out.logprob,
            outputs=("logprob", "reverse_kl"), params=(beta,), chunk=10, backend=backend, reference=case.beside,
        )  # fmt: skip
        loss.backward()
        grads[backend] = loss.detach(), weight.grad, beta.grad
    same(grads["reference"], grads["cpu"])
    options = {"outputs": ("logprob", "reverse_kl"), "chunk": 10}
    loss, first = case.penalised("reverse_kl"), case.run(case.penalised("reverse_kl"), **options)
    for _ in range(9):
        assert all(torch.equal(a, b) for a, b in zip(first[:3], case.run(loss, **options)[:3], strict=True))
    start = torch.randn_like(case.weight)
    total = start.clone()
    case.run(loss, grad_weight=total, **options)
    assert torch.allclose(total - start, first[2], atol=1e-5)


@cpu_only
@pytest.mark.parametrize(
    "change,message",
    [
        ({"outputs": ("logprob",)}, "reference must be given where outputs name a divergence, and only there"),
        ({"reference": None}, "reference must be given where"),
        ({"outputs": ("logprob", "kl")}, "outputs must be among"),
        ({"reference": (torch.zeros(44, 40), torch.zeros(301, 40))}, "hidden and weight of the reference must have 45"),
        ({"reference": (torch.zeros(45, 40), torch.zeros(300, 40))}, "must have 45 and 301 rows"),
        ({"reference": (torch.zeros(45, 40), torch.zeros(301, 24))}, r"weight of the reference must be \(V, 40\)"),
        ({"reference": (torch.zeros(45, 4), torch.zeros(301, 4), torch.zeros(3))}, "bias of the reference must be"),
        ({"reference": (torch.zeros(45, 4).double(), torch.zeros(301, 4).double())}, "both be float64 or neither"),
        (
            {"reference": (torch.zeros(45, 4), torch.zeros(301, 4), None, 2.0), "outputs": ("jensen_shannon",)},
            "beta must",
        ),
    ],
)
def test_bad_input_gets_one_sentence(change, message):
    case = Pair()
    given = {"outputs": ("logprob", "reverse_kl"), "reference": case.beside, **change}
    with pytest.raises(ValueError, match=f"^linear_policy_loss: .*{message}"):
        linear_policy_loss(case.hidden, case.weight, case.ids, case.clipped, **given)


@cpu_only
def test_triton_in_the_interpreter():
    run_interpreted(__file__)
