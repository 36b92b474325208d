"""`fuserl.trainers.liger`'s preference losses against their definitions in float64, and against liger-kernel.

The definitions are written on padded tensors through all logits; Liger's known defects are held against them, too.
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from liger_case import LIGER, compare, values_and_gradients
from rivals import rival

from fuserl.kernels import linear_policy_loss
from fuserl.trainers import liger

B, T, D, V = 6, 7, 16, 61
DPO = {"sigmoid": 0.0, "hinge": 0.0, "exo_pair": 1e-3, "nca_pair": 0.0, "robust": 0.1, "bco_pair": 0.0,
       "sppo_hard": 0.0, "apo_zero": 0.0, "apo_down": 0.0, "discopop": 0.0}  # fmt: skip


class Batch:
    """Three pairs, or six completions, of unequal lengths; `empty` leaves one, and one whole pair, without a token."""

    def __init__(self, seed=0, bias=True, empty=False, dtype=torch.float32):
        g = torch.Generator().manual_seed(seed)
        rand = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
        self.hidden, self.weight = (0.6 * rand(B, T, D)).to(dtype), rand(V, D).to(dtype)
        self.bias = rand(V).to(dtype) if bias else None
        self.target = torch.randint(V, (B, T), generator=g)
        lengths = torch.tensor([0, T, 3, 0, 0, 5] if empty else [5, T, 3, 1, T, 2])
        self.target[torch.arange(T) >= lengths[:, None]] = -100
        self.labels = torch.tensor([1, 0, 1, 1, 0, 0]).bool()
        self.other = 0.6 * rand(B, T, 8), rand(V, 8), rand(V)
        self.nll_target = torch.randint(V, (B, T), generator=g)
        self.nll_target[:, 5:] = -100

    def near(self, name, init, options, with_liger=True):
        """Ours within the allowance around the definition, and Liger near it."""
        ours = self.call(getattr(liger, name), init, options)
        definition = self.call(lambda **init: lambda *call, **options: _define(name, init, self, *call, **options),
                               init, options)  # fmt: skip
        theirs = self.call(self.host(name), {"compiled": False} | init, options) if with_liger and LIGER else None
        compare(ours, definition, (self.hidden, self.weight, self.bias), theirs)

    def call(self, cls, init, options):
        """Function of the leaves."""
        if getattr(cls, "__name__", "").endswith("KTOLoss") or "preference_labels" in options:
            return lambda h, w, b: cls(**init)(h, w, self.target, b, **options)
        return lambda h, w, b: cls(**init)(w, h, self.target, b, **options)

    @staticmethod
    def host(name):
        return getattr(rival("liger-kernel", "liger_kernel.chunked_loss"), name)

    def reference(self, bias=True):
        return dict(zip(("ref_input", "ref_weight", "ref_bias"), self.other if bias else self.other[:2], strict=False))


def _logps(hidden, weight, bias, target, average):
    logits = hidden @ weight.T + (0 if bias is None else bias)
    valid = target != -100
    logprob = logits.log_softmax(-1).gather(-1, target.where(valid, 0)[..., None]).squeeze(-1) * valid
    total = logprob[:, torch.randperm(logprob.shape[1])].sum(1)  # whose order is anyone's
    return logits, total / valid.sum(1).clamp(min=1) if average else total


def _pair(kind, c, r, beta, smoothing, tau):
    margin, s = beta * (c - r), F.sigmoid
    return {
        "sigmoid": -(1 - smoothing) * s(margin).log() - smoothing * s(-margin).log(),
        "hinge": (1 - margin).clamp(min=0),
        "exo_pair": s(margin) * (s(margin).log() - torch.as_tensor(1 - smoothing).to(c).log())
        + s(-margin) * (s(-margin).log() - torch.as_tensor(smoothing).to(c).log()),
        "nca_pair": -s(beta * c).log() - 0.5 * s(-beta * c).log() - 0.5 * s(-beta * r).log(),
        "robust": (-(1 - smoothing) * s(margin).log() + smoothing * s(-margin).log()) / (1 - 2 * smoothing),
        "bco_pair": -s(beta * c).log() - s(-beta * r).log(),
        "sppo_hard": (c - 0.5 / beta) ** 2 + (r + 0.5 / beta) ** 2,
        "apo_zero": 1 - s(beta * c) + s(beta * r),
        "apo_down": s(beta * c) + 1 - s(margin),
        "discopop": -s(margin).log() * (1 - s(margin / tau)) + torch.exp(-margin) * s(margin / tau),
    }[kind]


def _define(name, init, batch, *call, nll_target=None, ref_input=None, ref_weight=None, ref_bias=None, kl=None,
            preference_labels=None):  # fmt: skip
    unpaired = name.endswith("KTOLoss")
    hidden, weight = call[:2] if unpaired else call[1::-1]
    target, bias, dtype = *call[2:], call[0].dtype
    average = init.get("average_log_prob", "SimPO" in name or "ORPO" in name)
    logits, logps = _logps(hidden, weight, bias, target, average)
    known, beta = 0.0, init.get("beta", 0.1)
    if ref_input is not None:
        other = [None if x is None else x.to(dtype) for x in (ref_input, ref_weight, ref_bias)]
        known = _logps(*other, target, average)[1]
    if unpaired:
        labels, ratios = preference_labels, logps - known
        sign = torch.where(labels, 1.0, -1.0).to(dtype)
        loss = (1 - F.sigmoid(beta * sign * (ratios - (0 if kl is None else kl.to(dtype))))).mean()
        both = labels, ~labels
        sums = [[(x * of).sum() for of in both] for x in (logps, logits.sum((1, 2)), beta * ratios)]
        return loss, [x for pair in sums for x in pair]
    half, labels = len(target) // 2, target if nll_target is None else nll_target
    c, r = (logps - known).split(half)
    likelihood = torch.zeros((), dtype=dtype)
    if init.get("compute_nll_loss", "DPO" not in name):
        labels = labels[:half].flatten()
        likelihood = F.cross_entropy(logits[:half].flatten(0, 1), labels, reduction="sum")
        likelihood = likelihood / (labels != -100).sum().clamp(min=1)
    extra = []
    smoothing = init.get("label_smoothing", 0.0)
    if "ORPO" in name:
        odds = c - r - ((1 - c.exp()).log() - (1 - r.exp()).log())
        losses, extra = -beta * F.sigmoid(odds).log(), [F.sigmoid(odds).log().mean(), odds.mean()]
    elif "SimPO" in name:
        losses = _pair("sigmoid", beta * (c - r) - init.get("gamma", 0.5), torch.zeros_like(c), 1.0, smoothing, 1.0)
    else:
        losses = _pair(init.get("loss_type", "sigmoid"), c, r, beta, smoothing, init.get("discopop_tau", 0.05))
    loss = init.get("alpha", 1.0) * likelihood + losses.mean()
    means = [x.mean() for x in logits.split(half)]
    return loss, [*logps.split(half), *means, likelihood, beta * c, beta * r, *extra]


@pytest.mark.parametrize("kind", DPO)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_dpo(kind, data):
    draw = lambda *choices: data.draw(st.sampled_from(choices))  # noqa: E731
    batch = Batch(data.draw(st.integers(0, 999)), bias=draw(True, False))
    init = {"loss_type": kind, "label_smoothing": DPO[kind], "compute_nll_loss": draw(False, True), "alpha": 0.7}
    init |= {"average_log_prob": draw(False, True), "beta": draw(0.1, 0.4), "use_ref_model": draw(True, False)}
    batch.near("LigerFusedLinearDPOLoss", init, batch.reference(draw(True, False)) if init["use_ref_model"] else {})


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("nll", [False, True])
def test_cpo(average, nll):
    init = {"average_log_prob": average, "compute_nll_loss": nll, "label_smoothing": 0.1, "alpha": 0.6}
    Batch().near("LigerFusedLinearCPOLoss", init, {})


@pytest.mark.parametrize("nll", [False, True])
def test_simpo(nll):
    Batch().near("LigerFusedLinearSimPOLoss", {"compute_nll_loss": nll, "gamma": 0.3, "label_smoothing": 0.1}, {})


@pytest.mark.parametrize("nll", [False, True])
@pytest.mark.parametrize("own_target", [False, True])
def test_orpo(nll, own_target):
    batch = Batch()
    options = {"nll_target": batch.nll_target} if own_target else {}
    batch.near("LigerFusedLinearORPOLoss", {"compute_nll_loss": nll, "beta": 0.3}, options)


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_kto(data):
    draw = lambda *choices: data.draw(st.sampled_from(choices))  # noqa: E731
    batch = Batch(data.draw(st.integers(0, 999)), bias=draw(True, False))
    init = {"use_ref_model": draw(True, False), "average_log_prob": draw(True, False), "beta": 0.3}
    options = {"preference_labels": batch.labels, "kl": draw(None, torch.tensor([0.4]), torch.tensor(0.4))}
    batch.near("LigerFusedLinearKTOLoss", init, options | (batch.reference() if init["use_ref_model"] else {}))


def test_kto_with_a_kl_per_completion():
    """Liger documents kl as (B,), and subtracts all B of them from each completion."""
    batch = Batch()
    options = {"preference_labels": batch.labels, "kl": torch.randn(B)}
    batch.near("LigerFusedLinearKTOLoss", {}, options, with_liger=False)
    rival("liger-kernel", "math", exactly=True)
    leaves = batch.hidden, batch.weight, batch.bias
    call = batch.call(batch.host("LigerFusedLinearKTOLoss"), {"compiled": False}, options)
    loss = values_and_gradients(call, leaves)[0][0]
    ours = values_and_gradients(batch.call(liger.LigerFusedLinearKTOLoss, {}, options), leaves)[0][0]
    assert loss > 1.5 * ours


def test_label_smoothing_of_dpo_is_dropped_by_liger():
    """Its argument says cDPO; its sigmoid does not read it."""
    batch, reference = Batch(), Batch().reference()
    init = {"label_smoothing": 0.2}
    batch.near("LigerFusedLinearDPOLoss", init, reference, with_liger=False)
    rival("liger-kernel", "math", exactly=True)
    found = [
        values_and_gradients(
            batch.call(batch.host("LigerFusedLinearDPOLoss"), {"compiled": False} | each, reference),
            (batch.hidden, batch.weight, batch.bias),
        )[0][0]
        for each in (init, {})
    ]
    assert torch.equal(*found)


@pytest.mark.parametrize(
    "name,init",
    [
        ("LigerFusedLinearDPOLoss", {"average_log_prob": True, "compute_nll_loss": True}),
        ("LigerFusedLinearCPOLoss", {}),
        ("LigerFusedLinearSimPOLoss", {}),
        ("LigerFusedLinearKTOLoss", {"average_log_prob": True}),
    ],
)
def test_completions_without_a_token(name, init):
    """Liger's averages over no token are NaN, and so is its loss."""
    batch = Batch(empty=True)
    options = {"preference_labels": batch.labels} if "KTO" in name else {}
    options |= batch.reference() if "DPO" in name else {}
    batch.near(name, init, options, with_liger=False)
    if name == "LigerFusedLinearDPOLoss":
        batch.near(name, {}, options)
        rival("liger-kernel", "math", exactly=True)
        call = batch.call(batch.host(name), {"compiled": False} | init, options)
        assert values_and_gradients(call, (batch.hidden, batch.weight, batch.bias))[0][0].isnan()


def test_no_token_at_all():
    batch = Batch()
    batch.target[:] = -100
    batch.near("LigerFusedLinearDPOLoss", {"compute_nll_loss": True}, batch.reference(), with_liger=False)


def test_bfloat16_states_and_autocast():
    batch = Batch(dtype=torch.bfloat16)
    batch.other = tuple(x.bfloat16().float() for x in batch.other)
    batch.near("LigerFusedLinearCPOLoss", {}, {}, with_liger=False)
    call = batch.call(liger.LigerFusedLinearCPOLoss, {}, {})
    expected = values_and_gradients(call, (batch.hidden, batch.weight, batch.bias))[0][0]
    with torch.autocast("cpu", torch.bfloat16):
        found, gradients = values_and_gradients(call, [x.float() for x in (batch.hidden, batch.weight, batch.bias)])
    assert torch.equal(found[0], expected) and all(g.dtype == torch.float32 for g in gradients)


def test_padding_and_a_frozen_head_cost_no_product(monkeypatch):
    batch, projected = Batch(), []
    products = linear_policy_loss.head_products.HeadProducts
    logits = products.logits
    monkeypatch.setattr(products, "logits", lambda self, piece: projected.append(piece) or logits(self, piece))
    monkeypatch.setattr(products, "_add_weight", None)
    hidden = batch.hidden.clone().requires_grad_()
    loss, _ = liger.LigerFusedLinearDPOLoss(use_ref_model=False)(batch.weight, hidden, batch.target)
    loss.backward()
    assert sum(piece.stop - piece.start for piece in projected) == (batch.target != -100).sum()
    assert (hidden.grad.abs().sum(-1) != 0).equal(batch.target != -100)


def test_pairs_longer_than_a_chunk(monkeypatch):
    monkeypatch.setattr(linear_policy_loss.head_products, "default_chunk", lambda hidden, weight: 5)
    batch = Batch()
    batch.near("LigerFusedLinearDPOLoss", {"compute_nll_loss": True}, batch.reference())
    batch.near("LigerFusedLinearORPOLoss", {}, {"nll_target": batch.nll_target})


REFUSED = [
    ("DPO", {"loss_type": "ipo"}, {}, "loss_type must be one of sigmoid.*'ipo'"),
    ("DPO", {"loss_type": "hinge", "label_smoothing": 0.1}, {}, "label_smoothing must be 0 with hinge"),
    ("DPO", {"loss_type": "exo_pair"}, {}, "label_smoothing must be > 0 with exo_pair"),
    ("DPO", {"loss_type": "robust", "label_smoothing": 0.5}, {}, r"label_smoothing must be in \[0, 0.5\)"),
    ("DPO", {}, {}, "ref_input and ref_weight must be given"),
    ("DPO", {"use_ref_model": False}, Batch().reference(), "use_ref_model must be True"),
    ("ORPO", {}, {"nll_target": torch.zeros(B)}, r"nll_target must be \(6, 7\)"),
    ("KTO", {}, {"preference_labels": torch.ones(B)}, r"preference_labels must be \(6,\) bool"),
    ("KTO", {}, {"preference_labels": torch.ones(B).bool(), "kl": torch.ones(3)}, r"kl must be .* got \(3,\)"),
]


@pytest.mark.parametrize("name,init,options,says", REFUSED, ids=[each[3] for each in REFUSED])
def test_refused(name, init, options, says):
    batch = Batch()
    with pytest.raises(ValueError, match=says):
        batch.call(getattr(liger, f"LigerFusedLinear{name}Loss"), init, options)(batch.hidden, batch.weight, batch.bias)


def test_an_odd_batch_is_refused():
    """Liger pairs the first of the rejected with none."""
    batch = Batch()
    with pytest.raises(ValueError, match="as many chosen as rejected; got 5"):
        liger.LigerFusedLinearCPOLoss()(batch.weight, batch.hidden[:5], batch.target[:5])
