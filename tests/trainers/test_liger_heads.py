"""`fuserl.trainers.liger`'s cross entropies and distillation losses against float64, and against liger-kernel.

Liger's fused cross entropy and its `LigerFusedLinearJSD` are Triton kernels: on a CPU they are compared under the
interpreter, in a process of its own.
"""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from backends import INTERPRETING, run_interpreted
from hypothesis import given, settings
from hypothesis import strategies as st
from liger_case import LIGER, compare, values_and_gradients
from ranks import on_ranks
from rivals import rival

from fuserl.trainers import liger
from fuserl.trainers.liger import LigerFusedLinearScaledCrossEntropyFunction as Scaled

N, D, V = 23, 16, 61
CHUNKED = "liger_kernel.chunked_loss"
interpreted = pytest.mark.skipif(not INTERPRETING, reason="runs in test_under_the_interpreter")


class Batch:
    """Tokens, a third of them ignored, a head with bias, and a teacher of another width."""

    def __init__(self, seed=0, bias=True, dtype=torch.float32):
        g = torch.Generator().manual_seed(seed)
        rand = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
        self.hidden, self.weight = (0.6 * rand(N, D)).to(dtype), rand(V, D).to(dtype)
        self.bias = rand(V).to(dtype) if bias else None
        self.target = torch.randint(V, (N,), generator=g)
        self.target[torch.rand(N, generator=g) < 0.3] = -100
        self.teacher = 0.6 * rand(N, 24), rand(V, 24), rand(V)
        self.class_weight = torch.rand(V, generator=g)

    @property
    def leaves(self):
        return self.hidden, self.weight, self.bias


def scaled_definition(hidden, weight, target, temperature, selected):
    logp, valid = (hidden @ weight.T / temperature).log_softmax(-1), target != -100
    nll = -logp.gather(1, target.where(valid, 0)[:, None]).squeeze(1) * valid
    return nll, -(logp.exp() * logp).sum(1) * valid, logp[:, selected] * valid[:, None]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scaled_cross_entropy(temperature, dtype):
    batch, selected = Batch(bias=False, dtype=dtype), torch.tensor([3, 60, 3, 1])
    g = [torch.randn(N), torch.randn(N), torch.randn(N, 4)]

    def call(function):
        def run(hidden, weight, _):
            outputs = function(hidden, weight)
            return sum((x * each.to(x.dtype)).sum() for x, each in zip(outputs, g, strict=True)), outputs

        return run

    options = batch.target, temperature, -100, 1, True, selected
    host = None
    if LIGER and dtype == torch.float32:
        host = rival("liger-kernel", "liger_kernel.ops").LigerFusedLinearScaledCrossEntropyFunction
    compare(
        call(lambda h, w: Scaled.apply(h, w, *options)),
        call(lambda h, w: scaled_definition(h, w, batch.target, temperature, selected)),
        batch.leaves,
        call(lambda h, w: host.apply(h, w, *options)) if host else None,
    )


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("selected", [None, torch.tensor([], dtype=torch.int64), torch.tensor([5])])
def test_scaled_cross_entropy_returns_what_liger_returns(entropy, selected):
    batch = Batch()
    host = rival("liger-kernel", "liger_kernel.ops").LigerFusedLinearScaledCrossEntropyFunction
    given = batch.hidden, batch.weight, batch.target, 1.0, -100, 1, entropy, selected
    found = [f.apply(*given) for f in (Scaled, host)]
    assert type(found[0]) is type(found[1])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_scaled_cross_entropy_under_autocast():
    batch, low = Batch(), Batch(dtype=torch.bfloat16)
    expected = Scaled.apply(low.hidden, low.weight, low.target, 1.0, -100, 1, True, torch.tensor([4, 7]))
    with torch.autocast("cpu", torch.bfloat16):
        found = Scaled.apply(batch.hidden, batch.weight, batch.target, 1.0, -100, 1, True, torch.tensor([4, 7]))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    "change,says",
    [
        ({"m_tiles_per_cluster": 1.0}, "m_tiles_per_cluster must be int"),
        ({"return_entropy": 1}, "return_entropy must be bool"),
        ({"selected_token_ids": torch.zeros(2, 2)}, r"selected_token_ids must be \(K,\) int64"),
        ({"selected_token_ids": torch.tensor([V])}, "ids"),
        ({"temperature": 0.0}, "temperature"),
        ({"target": torch.full((N,), V)}, "ids"),
    ],
)
def test_scaled_cross_entropy_refuses(change, says):
    batch = Batch()
    given = {"_input": batch.hidden, "weight": batch.weight, "target": batch.target} | change
    with pytest.raises(ValueError, match=says):
        Scaled.apply(**given)


def _sharded():
    batch, rank = Batch(bias=False), dist.get_rank()
    hidden = batch.hidden.clone().requires_grad_()
    weight = batch.weight.split([40, 21])[rank].clone().requires_grad_()
    nll, entropy = liger.liger_fused_linear_scaled_cross_entropy_tp(
        hidden, weight, batch.target, None, temperature=0.7, return_entropy=True
    )
    (nll.sum() + entropy.square().sum()).backward()
    whole = batch.hidden.clone().requires_grad_(), batch.weight.clone().requires_grad_()
    expected = Scaled.apply(*whole, batch.target, 0.7, -100, 1, True)
    (expected[0].sum() + expected[1].square().sum()).backward()
    pairs = [(nll, expected[0]), (entropy, expected[1]), (hidden.grad, whole[0].grad)]
    for a, b in (*pairs, (weight.grad, whole[1].grad.split([40, 21])[rank])):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_vocabulary_cut_over_two_ranks():
    on_ranks(2, _sharded)


def test_a_cut_vocabulary_needs_a_group():
    batch = Batch()
    with pytest.raises(RuntimeError, match="init_process_group"):
        liger.LigerFusedLinearScaledCrossEntropyTPFunction.apply(batch.hidden, batch.weight, batch.target, None)


def entropy_definition(hidden, weight, bias, target, *, ce_weight=None, smoothing=0.0, z_scale=0.0, reduction="mean",
                       softcap=None, scaled=False):  # fmt: skip
    """(loss, z_loss, accuracy)"""
    z = hidden @ weight.T + (0 if bias is None else bias)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    options = {"reduction": reduction, "label_smoothing": smoothing, "ignore_index": -100}
    options["weight"] = None if ce_weight is None else ce_weight.to(z.dtype)
    valid = target != -100
    count = valid.sum() if reduction == "mean" else 1
    if scaled:
        options["reduction"] = "none"
    loss = F.cross_entropy(z, target, **options)
    z_loss = z_scale * z.logsumexp(-1).square() * valid / count
    if scaled:
        factor = z.detach().softmax(-1).gather(1, target.where(valid, 0)[:, None]).squeeze(1)
        loss = (loss / count + z_loss) * factor
        z_loss = z_loss * factor
        loss = loss if reduction == "none" else loss.sum()
    else:
        loss = loss + (z_loss if reduction == "none" else z_loss.sum())
    accuracy = (z.argmax(-1) == target).to(z.dtype) * valid
    if reduction != "none":
        z_loss, accuracy = z_loss.sum(), accuracy.sum() / valid.sum()
    return loss, z_loss.detach(), accuracy


def draw_options(data):
    draw = lambda *choices: data.draw(st.sampled_from(choices))  # noqa: E731
    options = {"reduction": draw("mean", "sum", "none"), "softcap": draw(None, 5.0), "z_scale": draw(0.0, 0.1)}
    options |= {"smoothing": draw(0.0, 0.1), "scaled": draw(False, True)}
    if options["smoothing"] == 0 and not options["scaled"]:
        options["with_class_weights"] = draw(False, True)
    return options, Batch(data.draw(st.integers(0, 999)), bias=draw(True, False))


def entropies(options, batch):
    """Ours, the definition and Liger's class, as functions of the leaves."""
    options = dict(options)
    class_weight = batch.class_weight if options.pop("with_class_weights", False) else None
    names = {"smoothing": "label_smoothing", "z_scale": "lse_square_scale", "scaled": "use_token_scaling"}
    init = {names.get(name, name): value for name, value in options.items()} | {"ce_weight": class_weight}
    g = torch.randn(N) if options["reduction"] == "none" else torch.ones(())

    def reduced(loss, *others):
        return (loss * g.to(loss.dtype)).sum(), (loss, *others)

    def module(cls):
        def run(hidden, weight, bias):
            out = cls(return_z_loss=True, return_token_accuracy=True, **init)(weight, hidden, batch.target, bias)
            return reduced(out.loss, out.z_loss, out.token_accuracy)

        return run

    def definition(hidden, weight, bias):
        return reduced(*entropy_definition(hidden, weight, bias, batch.target, ce_weight=class_weight, **options))

    return module, definition


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_cross_entropy(data):
    options, batch = draw_options(data)
    module, definition = entropies(options, batch)
    compare(module(liger.LigerFusedLinearCrossEntropyLoss), definition, batch.leaves)


@interpreted
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("more", [{}, {"smoothing": 0.1, "z_scale": 0.1}, {"scaled": True, "z_scale": 0.1}], ids=str)
def test_cross_entropy_of_liger(reduction, more):
    """Its soft cap and class weights call .to of a number, which is one under the interpreter."""
    batch = Batch()
    module, _ = entropies({"reduction": reduction} | more, batch)
    host = rival("liger-kernel", "liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss
    ours, theirs = (
        values_and_gradients(module(cls), batch.leaves) for cls in (liger.LigerFusedLinearCrossEntropyLoss, host)
    )
    for a, b in zip((*ours[0], *ours[1]), (*theirs[0], *theirs[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@interpreted
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_divergence_of_liger(beta):
    batch = Batch(bias=False)
    host = rival("liger-kernel", "liger_kernel.transformers").LigerFusedLinearJSD
    found = [
        values_and_gradients(
            lambda h, w, _, cls=cls: (cls(beta, temperature=2.0)(h, w, *batch.teacher[:2], batch.target), ()),
            batch.leaves,
        )
        for cls in (liger.LigerFusedLinearJSD, host)
    ]
    for a, b in zip(*((*each[0], *each[1]) for each in found), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(INTERPRETING, reason="this is that process")
def test_under_the_interpreter():
    rival("liger-kernel", "liger_kernel.ops")
    run_interpreted(__file__, "-k", "of_liger")


def test_cross_entropy_returns():
    batch = Batch()
    given = batch.weight, batch.hidden, batch.target, batch.bias
    loss = liger.LigerFusedLinearCrossEntropyLoss()(*given)
    assert isinstance(loss, torch.Tensor)
    torch.testing.assert_close(
        loss, liger.liger_fused_linear_cross_entropy(batch.hidden, batch.weight, *given[2:]), rtol=0, atol=0
    )
    found = liger.LigerFusedLinearCrossEntropyFunction.apply(batch.hidden, batch.weight, *given[2:])
    assert torch.equal(found[0], loss) and found[1:] == (None, None, None)
    out = liger.LigerFusedLinearCrossEntropyLoss(return_z_loss=True)(*given)
    assert out.z_loss == 0 and out.token_accuracy is None


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_of_no_target(reduction):
    batch = Batch()
    batch.target[:] = -100
    module = liger.LigerFusedLinearCrossEntropyLoss(reduction=reduction, lse_square_scale=0.1, return_z_loss=True)
    (loss, _), gradients = values_and_gradients(
        lambda h, w, b: (module(w, h, batch.target, b).loss.sum(), [torch.zeros(())]), batch.leaves
    )
    assert loss == 0 and not any(g.any() for g in gradients)


@pytest.mark.parametrize(
    "init,says",
    [
        ({"reduction": "max"}, "reduction must be one of"),
        ({"label_smoothing": 2.0}, "label_smoothing must be in"),
        ({"return_predicted_tokens": True}, "return_predicted_tokens must be False"),
        ({"label_smoothing": 0.1, "ce_weight": torch.ones(V)}, "ce_weight must be left out with label_smoothing"),
        ({"accum_dtype": torch.float64}, "accum_dtype must be no finer than torch.float32"),
        ({"softcap": -1.0}, "softcap"),
    ],
)
def test_cross_entropy_refuses(init, says):
    batch = Batch()
    with pytest.raises(ValueError, match=says):
        liger.LigerFusedLinearCrossEntropyLoss(**init)(batch.weight, batch.hidden, batch.target)


def test_cross_entropy_refuses_kernels_of_liger():
    batch = Batch()
    with pytest.raises(ValueError, match="ce_impl and ce_mode must be None"):
        liger.LigerFusedLinearCrossEntropyFunction.apply(
            batch.hidden, batch.weight, batch.target, ce_impl="nvidia-cutile"
        )


def distilled_definition(init, batch):
    def run(hidden, weight, bias):
        valid, count = batch.target != -100, (batch.target != -100).sum().clamp(min=1)
        z, (h, w, b) = hidden @ weight.T + (0 if bias is None else bias), (x.to(hidden) for x in batch.teacher)
        hard = F.cross_entropy(z, batch.target, reduction="sum") / count
        p, q = (x.div(init["temperature"]).log_softmax(-1) for x in (z, h @ w.T + b))
        beta = init["beta"]
        m = (beta * q.exp() + (1 - beta) * p.exp()).log()
        soft = beta * q.exp() * (q - m) + (1 - beta) * p.exp() * (p - m)
        soft = {0.0: q.exp() * (q - p), 1.0: p.exp() * (p - q)}.get(beta, soft).sum(-1) * valid
        soft = soft.sum() / count
        return init["weight_hard_loss"] * hard + init["weight_soft_loss"] * soft, (soft, hard)

    return run


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_distillation(data):
    draw = lambda *choices: data.draw(st.sampled_from(choices))  # noqa: E731
    init = {"beta": draw(0.0, 0.3, 0.5, 1.0), "temperature": draw(1.0, 2.0), "return_soft_hard_loss": True}
    init |= {"weight_hard_loss": draw(0.0, 0.5, 1.0), "weight_soft_loss": draw(0.0, 0.5)}
    batch = Batch(data.draw(st.integers(0, 999)), bias=draw(True, False))

    def call(cls, **more):
        def run(hidden, weight, bias):
            h, w, b = batch.teacher
            loss, soft, hard = cls(**init, **more)(hidden, weight, h, w, batch.target, bias, b)
            return loss, (soft, hard)

        return run

    theirs = call(rival("liger-kernel", CHUNKED).LigerFusedLinearJSDLoss, compiled=False) if LIGER else None
    compare(call(liger.LigerFusedLinearJSDLoss), distilled_definition(init, batch), batch.leaves, theirs)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("labelled", [False, True])
def test_divergence(beta, labelled):
    batch = Batch(bias=False)
    batch.teacher = *batch.teacher[:2], torch.zeros(V)
    labels = batch.target.clone() if labelled else None
    batch.target = batch.target if labelled else torch.zeros(N, dtype=torch.int64)
    init = {"weight_hard_loss": 0.0, "weight_soft_loss": 1.0, "beta": beta, "temperature": 2.0}
    definition = distilled_definition(init, batch)
    ours = liger.LigerFusedLinearJSD(beta, temperature=2.0)
    compare(
        lambda h, w, _: (ours(h, w, *batch.teacher[:2], labels), ()), lambda *x: (definition(*x)[0], ()), batch.leaves
    )


def test_distillation_of_bfloat16_and_a_frozen_head():
    batch = Batch(dtype=torch.bfloat16)
    batch.teacher = tuple(x.bfloat16() for x in batch.teacher)
    init = {"weight_hard_loss": 0.5, "weight_soft_loss": 0.5, "beta": 0.5, "temperature": 1.0}
    module, (h, w, b) = liger.LigerFusedLinearJSDLoss(), batch.teacher
    compare(lambda x, y, z: (module(x, y, h, w, batch.target, z, b), ()),
            lambda *x: (distilled_definition(init, batch)(*x)[0], ()), batch.leaves)  # fmt: skip
    hidden = batch.hidden.clone().requires_grad_()
    module(hidden, batch.weight, h, w, batch.target, batch.bias, b).backward()
    assert hidden.grad.any()


def test_soft_and_hard_loss_carry_no_gradient():
    """Liger's have a graph, along which no gradient comes: a loss made of them trains nothing."""
    batch, (h, w, b) = Batch(), Batch().teacher
    found = liger.LigerFusedLinearJSDLoss(return_soft_hard_loss=True)(
        batch.hidden.requires_grad_(), batch.weight, h, w, batch.target, batch.bias, b
    )
    assert found[0].requires_grad and not found[1].requires_grad and not found[2].requires_grad
    host = rival("liger-kernel", "liger_kernel.chunked_loss", exactly=True).LigerFusedLinearJSDLoss
    theirs = host(return_soft_hard_loss=True, compiled=False)(
        batch.hidden, batch.weight, h, w, batch.target, batch.bias, b
    )
    assert theirs[1].requires_grad and not torch.autograd.grad(theirs[1], batch.hidden)[0].any()


def test_a_teacher_with_more_tokens_is_refused():
    """Liger gives the student a logit of 0 for each: its divergence from a teacher that has none of them is not 0."""
    batch, module = Batch(bias=False), liger.LigerFusedLinearJSDLoss(0.0, 1.0, beta=0.0)
    more = torch.cat([batch.weight, torch.full((9, D), 0.0)])
    with pytest.raises(ValueError, match=r"as many rows as student_weight; got 70 and 61.*weight\[:61\]"):
        module(batch.hidden, batch.weight, batch.hidden, more, batch.target)
    assert module(batch.hidden, batch.weight, batch.hidden, more[:V], batch.target).abs() < 1e-6


@pytest.mark.parametrize(
    "init,says", [({"beta": 1.5}, "beta must be in"), ({"temperature": 0.0}, "temperature must be positive")]
)
def test_distillation_refuses(init, says):
    batch, (h, w, b) = Batch(), Batch().teacher
    with pytest.raises(ValueError, match=says):
        liger.LigerFusedLinearJSDLoss(**init)(batch.hidden, batch.weight, h, w, batch.target, batch.bias, b)
    with pytest.raises(ValueError, match="labels must be"):
        liger.LigerFusedLinearJSDLoss()(batch.hidden, batch.weight, h, w, batch.target[:3])
    with pytest.raises(ValueError, match="accum_dtype"):
        liger.LigerFusedLinearJSD(accum_dtype=torch.float64)(batch.hidden, batch.weight, h, w)
