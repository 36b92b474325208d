"""`fuserl.trainers.liger`'s GRPO loss against its definition in float64, and against liger-kernel where that is.

The definition is written on padded tensors through all logits; Liger's known defects are held against it, too.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from liger_case import LIGER, compare, values_and_gradients
from rivals import rival

from fuserl.kernels import linear_policy_loss
from fuserl.trainers import liger
from fuserl.trainers.liger import LigerFusedLinearGRPOLoss

CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
KINDS = (*CLIPPED, "cispo", "sapo", "vespo")
T, D, V = 9, 16, 61


class Batch:
    """Rollouts with padding, one of them empty, one with advantage 0; `options` of the call by Liger's names."""

    def __init__(self, seed=0, full=False, bias=False, dtype=torch.float32):
        g = torch.Generator().manual_seed(seed)
        rand = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
        self.rollouts = 5
        self.hidden, self.weight = (0.6 * rand(5, T, D)).to(dtype), rand(V, D).to(dtype)
        self.bias = rand(V).to(dtype) if bias else None
        self.ids = torch.randint(V, (5, T), generator=g)
        lengths = torch.full((5,), T) if full else torch.tensor([T, 4, 0, 1, 7])[torch.randperm(5, generator=g)]
        self.mask = (torch.arange(T) < lengths[:, None]).float()
        self.advantages = rand(5)
        self.advantages[1] = 0.0
        logp = (self.hidden.float() @ self.weight.float().T).log_softmax(-1).gather(-1, self.ids[..., None])[..., 0]
        self.old, self.ref = (logp + 0.3 * rand(5, T) for _ in range(2))
        self.ratio = 0.5 + torch.rand(5, T, generator=g)
        # Near the policy's, as e^(ref - logprob) of another model would be all that is seen of the errors.
        self.other_hidden = torch.cat([self.hidden.float(), 0.1 * rand(5, T, 8)], -1)
        self.other_weight, self.other_bias = torch.cat([self.weight.float(), rand(V, 8)], 1), 0.1 * rand(V)

    @property
    def leaves(self):
        return self.hidden, self.weight, self.bias

    def call(self, cls, init, options):
        """Function of the leaves; `cls` may be a definition of the same signature."""
        return lambda hidden, weight, bias: cls(**init)(
            hidden, weight, self.ids, self.mask, self.advantages, bias=bias, **options
        )

    def run(self, cls, init, options):
        """[loss, *metrics], gradients of twice the loss."""
        return values_and_gradients(self.call(cls, init, options), self.leaves)


def definition(**init):
    """A class of Liger's signature: plain torch through all logits, in the dtype of the hidden states."""
    return lambda *call, **options: _define(init, *call, **options)


def _logprobs(hidden, weight, bias, ids, temperature):
    z = hidden @ weight.T + (0 if bias is None else bias)
    return (z / temperature).log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)


def _define(
    init, hidden, weight, ids, mask, a, bias=None, ref_per_token_logps=None, old_per_token_logps=None, ref_input=None,
    ref_weight=None, ref_bias=None, vllm_is_ratio=None, num_items_in_batch=None,
):  # fmt: skip
    kind, beta, temperature = init["loss_type"], init["beta"], init.get("temperature", 1.0)
    dtype, (rollouts, length) = hidden.dtype, ids.shape
    mask, a = mask.to(dtype), a.to(dtype)
    a = a[:, None].expand(rollouts, length) if a.dim() == 1 else a
    logprob = _logprobs(hidden, weight, bias, ids, temperature)
    old = logprob.detach() if old_per_token_logps is None else old_per_token_logps.to(dtype)
    ref = ref_per_token_logps
    if ref is None and ref_input is not None:
        ref = _logprobs(ref_input.to(dtype), ref_weight.to(dtype), ref_bias.to(dtype), ids, temperature)
    log_weight = log_ratio = logprob - old
    if init.get("importance_sampling_level") == "sequence":
        log_weight = ((log_ratio * mask).sum(1) / mask.sum(1).clamp(min=1))[:, None].expand_as(mask)
    ratio, low, high = log_weight.exp(), 1 - init["epsilon_low"], 1 + init["epsilon_high"]
    r = None
    if vllm_is_ratio is not None:
        r = vllm_is_ratio.to(dtype)
        r = r[:, None] if r.dim() == 1 else r
    clipped = torch.zeros_like(mask, dtype=torch.bool)
    if kind in CLIPPED:
        bounded = ratio.clamp(max=init.get("delta") or math.inf)
        losses = -torch.minimum(bounded * a, ratio.clamp(low, high) * a)
        clipped = (ratio < low) & (a < 0) | (ratio > high) & (a > 0)
    elif kind == "cispo":
        losses = -ratio.detach().clamp(max=init["epsilon_high"]) * a * logprob
        clipped = (ratio > init["epsilon_high"]) & (a > 0)
    elif kind == "sapo":
        t = torch.where(a > 0, 1.0, 1.05).to(dtype)
        losses = -4 / t * torch.sigmoid(t * (ratio - 1)) * a
    else:
        w = (log_ratio.detach().clamp(-20, 20) * mask).sum(1, keepdim=True)
        if r is not None:
            w = w + (r.log().clamp(math.log(1e-8), 20) * (mask if r.shape[1] > 1 else 1)).sum(1, keepdim=True)
        w = w.clamp(math.log(1e-8), 20)
        k, lam = torch.where(a >= 0, 2.0, 3.0).to(dtype), torch.where(a >= 0, 3.0, 2.0).to(dtype)
        losses = -(lam + k * w - lam * w.exp()).exp() * a * logprob
    if r is not None and kind != "vespo":
        losses = losses * r
    kl = torch.zeros_like(losses)
    if beta and ref is not None:
        kl = (ref.to(dtype) - logprob).exp() - (ref.to(dtype) - logprob) - 1
        kl = kl * ratio if init.get("use_bias_correction_kl") else kl
        losses = losses + beta * kl
    losses, tokens = losses * mask, mask.sum().clamp(min=1)
    if kind in ("grpo", "sapo"):
        loss = (losses.sum(1) / mask.sum(1).clamp(min=1)).sum() / rollouts
    else:
        items = tokens if num_items_in_batch is None else num_items_in_batch
        loss = losses.sum() / {
            "bnpo": tokens, "dr_grpo": rollouts * (init.get("max_completion_length") or 1), "luspo": rollouts
        }.get(kind, items)  # fmt: skip
    metrics = ((kl * mask).sum() / tokens, (clipped * mask).sum() / tokens)
    return loss, metrics if beta else metrics[1:]


def theirs(**init):
    return rival("liger-kernel", "liger_kernel.chunked_loss").LigerFusedLinearGRPOLoss(compiled=False, **init)


def near(batch, init, options, with_liger=True):
    """Ours within the allowance around the definition in float64, and Liger near it."""
    init = {"epsilon_low": 0.2, "epsilon_high": 0.28, "beta": 0.0, "use_ref_model": init.get("beta", 0) > 0} | init
    classes = LigerFusedLinearGRPOLoss, definition, theirs
    calls = [batch.call(cls, init, options) for cls in (classes if with_liger and LIGER else classes[:2])]
    compare(calls[0], calls[1], batch.leaves, *calls[2:])


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_every_option(kind, data):
    draw = lambda *choices: data.draw(st.sampled_from(choices))  # noqa: E731
    # Liger's luspo is wrong where there is padding: see below.
    batch = Batch(data.draw(st.integers(0, 999)), full=kind == "luspo", bias=draw(False, True))
    level, beta = draw("token", "sequence") if kind in CLIPPED else "token", draw(0.0, 0.04)
    init = {"loss_type": kind, "importance_sampling_level": level, "beta": beta, "temperature": draw(1.0, 0.7)}
    init |= {"use_bias_correction_kl": draw(False, True), "max_completion_length": 20}
    if kind in CLIPPED:
        init["delta"] = draw(None, 1.1)
    elif kind == "cispo":
        init["epsilon_high"] = 1.2
    ratio = {"none": None, "token": batch.ratio, "rollout": batch.ratio[:, :1], "flat": batch.ratio[:, 0]}
    ratio = ratio[draw(*ratio)]
    if ratio is not None and kind == "vespo" and ratio.shape == batch.mask.shape:
        ratio = ratio.where(batch.mask != 0, 1.0)  # Liger's vespo adds up that of padding, too
    options = {"vllm_is_ratio": ratio, "old_per_token_logps": draw(None, batch.old)}
    if beta and draw(False, True):
        options |= dict(zip(("ref_input", "ref_weight", "ref_bias"),
                            (batch.other_hidden, batch.other_weight, batch.other_bias), strict=True))  # fmt: skip
    elif beta:
        options["ref_per_token_logps"] = batch.ref
    options["num_items_in_batch"] = draw(None, 33, torch.tensor(33))
    near(batch, init, options)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_luspo_leaves_padding_out(level, beta):
    """Liger divides by the padded length and adds up all of it: a padded token has a loss and a gradient there."""
    batch = Batch()
    init = {"loss_type": "luspo", "importance_sampling_level": level, "beta": beta}
    options = {"ref_per_token_logps": batch.ref if beta else None, "old_per_token_logps": batch.old}
    near(batch, init, options, with_liger=False)
    init |= {"epsilon_low": 0.2, "epsilon_high": 0.28, "use_ref_model": beta > 0}
    got = batch.run(LigerFusedLinearGRPOLoss, init, options)[1][0]
    assert (got[batch.mask == 0] == 0).all()
    if (level, beta) != ("sequence", 0.0):
        rival("liger-kernel", "math", exactly=True)
        assert (batch.run(theirs, init, options)[1][0][batch.mask == 0] != 0).any()


def test_vespo_leaves_the_ratio_of_padding_out():
    """Liger adds log(vllm_is_ratio) of padding to the rollout's weight."""
    batch = Batch()
    options = {"vllm_is_ratio": batch.ratio, "old_per_token_logps": batch.old}
    near(batch, {"loss_type": "vespo"}, options, with_liger=False)
    init = {"loss_type": "vespo", "beta": 0.0, "use_ref_model": False}
    ones = options | {"vllm_is_ratio": batch.ratio.where(batch.mask != 0, 1.0)}
    assert torch.equal(*(batch.run(LigerFusedLinearGRPOLoss, init, each)[0][0] for each in (options, ones)))
    rival("liger-kernel", "math", exactly=True)
    assert not torch.allclose(*(batch.run(theirs, init, each)[0][0] for each in (options, ones)), rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_advantage_per_token(kind, level):
    if level == "sequence" and kind not in CLIPPED:
        pytest.skip("refused")
    batch = Batch()
    batch.advantages = torch.randn(5, T)
    batch.advantages[:, ::2] = 0
    init = {"loss_type": kind, "importance_sampling_level": level, "max_completion_length": 20, "epsilon_high": 1.2}
    near(batch, init, {"old_per_token_logps": batch.old}, with_liger=False)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_states(kind):
    batch = Batch(dtype=torch.bfloat16, bias=True)
    near(batch, {"loss_type": kind, "max_completion_length": 20, "beta": 0.04, "epsilon_high": 1.2},
         {"old_per_token_logps": batch.old, "ref_per_token_logps": batch.ref}, with_liger=False)  # fmt: skip


def test_autocast_and_a_head_of_another_dtype():
    batch, init = Batch(), {"loss_type": "grpo", "beta": 0.0, "use_ref_model": False}
    low = Batch()
    low.hidden, low.weight = low.hidden.bfloat16(), low.weight.bfloat16()
    expected = low.run(LigerFusedLinearGRPOLoss, init, {})[0][0]
    with torch.autocast("cpu", torch.bfloat16):
        loss, (d_hidden, d_weight) = batch.run(LigerFusedLinearGRPOLoss, init, {})
    assert torch.equal(loss[0], expected) and d_hidden.dtype == d_weight.dtype == torch.float32
    batch.hidden = batch.hidden.bfloat16()
    weight = batch.weight.clone().requires_grad_()
    found, _ = LigerFusedLinearGRPOLoss(**init)(batch.hidden, weight, batch.ids, batch.mask, batch.advantages)
    found.backward()
    assert torch.equal(found.detach(), expected) and weight.grad.dtype == torch.float32


def test_a_frozen_head_costs_no_product(monkeypatch):
    monkeypatch.setattr(linear_policy_loss.head_products.HeadProducts, "_add_weight", None)
    batch = Batch()
    hidden = batch.hidden.clone().requires_grad_()
    loss = LigerFusedLinearGRPOLoss(beta=0.0)(hidden, batch.weight, batch.ids, batch.mask, batch.advantages)[0]
    loss.backward()
    assert hidden.grad.any() and batch.weight.grad is None


@pytest.mark.parametrize("kind", ["grpo", "vespo"])
def test_padding_and_zero_advantage_are_not_projected(kind, monkeypatch):
    batch, projected = Batch(), []
    products = linear_policy_loss.head_products.HeadProducts
    logits = products.logits
    monkeypatch.setattr(products, "logits", lambda self, piece: projected.append(piece) or logits(self, piece))
    batch.run(LigerFusedLinearGRPOLoss, {"loss_type": kind, "beta": 0.0}, {})
    live = (batch.mask != 0) & (batch.advantages != 0)[:, None]
    assert sum(piece.stop - piece.start for piece in projected) == live.sum() < batch.mask.sum()


def test_no_token_at_all():
    batch = Batch()
    batch.mask = torch.zeros(5, T)
    for kind in KINDS:
        (loss, clipped), gradients = batch.run(
            LigerFusedLinearGRPOLoss, {"loss_type": kind, "beta": 0.0, "max_completion_length": 9}, {}
        )
        assert loss == 0 and clipped == 0 and not any(g.any() for g in gradients)


def test_padding_may_be_any_number():
    batch, init = Batch(), {"beta": 0.0}
    expected = batch.run(LigerFusedLinearGRPOLoss, init, {})[0][0]
    batch.ids = batch.ids.where(batch.mask != 0, -100)
    batch.hidden = batch.hidden.where(batch.mask[..., None] != 0, torch.nan)
    assert torch.equal(batch.run(LigerFusedLinearGRPOLoss, init, {})[0][0], expected)


def test_without_a_reference_the_kl_is_to_itself():
    batch = Batch()
    zero, some = (
        batch.run(LigerFusedLinearGRPOLoss, {"beta": b, "use_ref_model": False}, {"old_per_token_logps": batch.old})
        for b in (0.0, 0.5)
    )
    assert torch.equal(zero[0][0], some[0][0]) and some[0][1] == 0 and len(some[0]) == 3
    other = batch.run(theirs, {"beta": 0.5, "use_ref_model": False}, {"old_per_token_logps": batch.old})
    torch.testing.assert_close(some[0], [x.to(torch.float32) for x in other[0]], rtol=1e-5, atol=1e-6)


def test_the_function_takes_everything_by_position():
    batch = Batch()
    module = LigerFusedLinearGRPOLoss(beta=0.1, loss_type="bnpo", temperature=0.7, delta=2.0, epsilon_high=0.3)
    given = batch.hidden, batch.weight, batch.ids, batch.mask, batch.advantages
    options = None, batch.ref, batch.old, None, None, None
    rest = 0.1, 0.2, 0.3, "bnpo", None, "token", 1.0, 1.05, 0.7, False, True, 1, batch.ratio, 2.0
    got = liger.LigerFusedLinearGRPOFunction.apply(*given, *options, *rest)
    expected = module(*given, *options, vllm_is_ratio=batch.ratio)
    assert torch.equal(got[0], expected[0]) and torch.equal(torch.stack(got[1]), torch.stack(expected[1]))
    function = rival("liger-kernel", "liger_kernel.chunked_loss.grpo_loss").LigerFusedLinearGRPOFunction
    torch.testing.assert_close(function.apply(*given, *options, *rest)[0], got[0], rtol=1e-4, atol=1e-5)


REFUSED = [
    ({"loss_type": "gspo"}, {}, "loss_type must be one of grpo.*'gspo'"),
    ({"importance_sampling_level": "word"}, {}, "importance_sampling_level must be .*'word'"),
    ({"loss_type": "cispo", "importance_sampling_level": "sequence"}, {}, "must be 'token' with cispo"),
    ({"loss_type": "sapo", "delta": 2.0}, {}, "delta must be left out with sapo"),
    ({"delta": -1.0}, {}, "delta must be positive"),
    ({"sapo_temperature_neg": 0.0}, {}, "sapo_temperature_neg must be positive"),
    ({"loss_type": "dr_grpo"}, {}, "max_completion_length must be given"),
    ({}, {}, "ref_per_token_logps or ref_input must be given"),
    ({"use_ref_model": False}, {"ref_per_token_logps": torch.zeros(5, T)}, "use_ref_model must be True"),
    ({}, {"ref_input": torch.zeros(5, T, D)}, "ref_weight must be given"),
    ({"beta": 0.0}, {"vllm_is_ratio": torch.ones(T)}, r"vllm_is_ratio must be \(5, 9\) or \(5, 1\) or \(5,\)"),
    ({"beta": 0.0}, {"old_per_token_logps": torch.zeros(5)}, r"old_per_token_logps must be \(5, 9\)"),
    ({}, {"ref_per_token_logps": torch.zeros(5)}, r"ref_per_token_logps must be \(5, 9\)"),
]


@pytest.mark.parametrize("init,options,says", REFUSED, ids=[each[2] for each in REFUSED])
def test_refused(init, options, says):
    with pytest.raises(ValueError, match=says):
        Batch().run(LigerFusedLinearGRPOLoss, init, options)


def test_a_reference_that_liger_drops():
    """With use_ref_model=False Liger takes the policy for its own reference, whatever is given: the KL is 0."""
    rival("liger-kernel", "math", exactly=True)
    batch = Batch()
    init = {"beta": 0.5, "use_ref_model": False}
    found = [batch.run(theirs, init, {"ref_per_token_logps": ref})[0] for ref in (None, batch.ref)]
    assert found[0] == found[1] and found[1][1] == 0


def test_names_and_report():
    text = str(liger.report())
    assert "LigerFusedLinearGRPOLoss" in text and "LigerFusedLinearCosineSimilarityLoss" in text
    assert all(hasattr(liger, name) for name in liger.__all__)
    with pytest.raises(ImportError, match="LigerFusedLinearCosineSimilarityLoss"):
        from fuserl.trainers.liger import LigerFusedLinearCosineSimilarityLoss  # noqa: F401
    with pytest.raises(AttributeError, match="Keep importing it from liger_kernel"):
        _ = liger.LigerRMSNorm


def test_signatures_are_ligers():
    import inspect

    chunked, transformers = (
        rival("liger-kernel", f"liger_kernel.{name}", exactly=True) for name in ("chunked_loss", "transformers")
    )
    for name in liger.__all__:
        host = next((getattr(m, name) for m in (chunked, transformers) if hasattr(m, name)), None)
        if host is None or not isinstance(host, type):
            continue
        for method in ("__init__", "forward"):
            ours, other = (inspect.signature(getattr(each, method)).parameters for each in (getattr(liger, name), host))
            assert list(ours) == list(other), (name, method)
            defaults = {key: (ours[key].default, other[key].default) for key in ours}
            assert all(a == b for key, (a, b) in defaults.items() if key != "shift_labels"), defaults
