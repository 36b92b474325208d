"""Liger's norms, rotary embeddings and SwiGLU under the drop-ins, in every order: as the hosts alone, and float64.

Liger's kernels are Triton's, which run on a CPU under its interpreter: one test starts this file again, in a process of
its own with TRITON_INTERPRET=1, where the others run.
"""

import contextlib
import functools
import importlib

import pytest
import torch
import trl_runs
from backends import INTERPRETING, cpu_only, run_interpreted
from patched_models import batch, defined, same, step, tiny
from rivals import openrlhf, rival, verl_losses
from transformers.models.llama import modeling_llama

from fuserl.trainers import transformers as ours

liger = rival("liger-kernel", "liger_kernel.transformers")
interpreted = pytest.mark.skipif(not INTERPRETING, reason="Liger's kernels want a GPU or Triton's interpreter")
REPLACED = "apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP"
ORDERS = "before the model", "before the patch", "after the patch"


@pytest.fixture
def layers(monkeypatch):
    """Put Liger's layers into a model, or into all that are made later; out again at the end."""
    for name in REPLACED:
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
    monkeypatch.setattr(modeling_llama.LlamaForCausalLM, "forward", modeling_llama.LlamaForCausalLM.forward)
    _mend_the_interpreter(monkeypatch)
    given = {"rope": True, "rms_norm": True, "swiglu": True, "fused_linear_cross_entropy": False}
    return lambda model=None, **more: liger.apply_liger_kernel_to_llama(model=model, **{**given, **more})


def _mend_the_interpreter(monkeypatch):
    """It gives kernels Python's floats, which have no .to, and knows no function of libdevice."""
    import numpy
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def converted(value):
        if not isinstance(value, float):
            return convert(value)
        return tl.tensor(interpreter.TensorHandle(numpy.array([value], numpy.float32), tl.float32), tl.float32)

    monkeypatch.setattr(interpreter, "_implicit_cvt", converted)
    norms = importlib.import_module("liger_kernel.ops.rms_norm")
    monkeypatch.setattr(norms, "rsqrt", lambda x: tl.rsqrt(x))


def liger_runs(model):
    """Whether its norms, and so its other layers, are Liger's."""
    norm = model.model.norm
    return getattr(norm.forward, "__func__", norm.forward) is liger.LigerRMSNorm.forward


def in_order(order, layers, make, patch):
    """A model with Liger's layers and ours."""
    if order == "before the model":
        layers()
    model = make()
    if order == "before the patch":
        layers(model)
    patch(model)
    if order == "after the patch":
        layers(model)
    assert liger_runs(model)
    return model


@interpreted
@pytest.mark.parametrize("more", [{}, {"outputs": ("logprob",)}], ids=["loss", "outputs"])
@pytest.mark.parametrize("order", ORDERS)
def test_transformers(order, more, layers):
    given = batch()
    true = step(defined(tiny(dtype=torch.float64)), given)
    plain = step(in_order(order, layers, tiny, lambda model: None), given)
    same(step(in_order(order, layers, tiny, ours.patch), given, **more), true, plain)


@interpreted
@pytest.mark.parametrize("order", ORDERS)
def test_trl_head(order, layers):
    rival("trl", "trl.trainer.utils")
    utils, drop_in = (importlib.import_module(name) for name in ("trl.trainer.utils", "fuserl.trainers.trl"))
    given = {**batch(), "fused_lm_head": True}

    def made(dtype=torch.float32):
        model = tiny(dtype=dtype)
        utils.add_fused_lm_head(model)
        return model

    with contextlib.ExitStack() as stack:
        for definition in trl_runs.defined():
            stack.enter_context(definition)
        true = step(made(torch.float64), given)
    plain = step(in_order(order, layers, made, lambda model: None), given)
    with contextlib.ExitStack() as stack:
        model = in_order(order, layers, made, lambda model: stack.enter_context(drop_in.patch()))
        same(step(model, given), true, plain)


@interpreted
@pytest.mark.parametrize("order", ORDERS)
def test_verl_head(order, layers):
    verl_losses()
    common = rival("verl", "verl.models.transformers.dense_common")
    drop_in = importlib.import_module("fuserl.trainers.verl")
    drop_in.unpatch()  # importing it has patched

    def run(model):
        found = common.forward_with_torch_backend(model, input_ids=batch()["input_ids"], return_dict=True)
        names, leaves = zip(*model.named_parameters(), strict=True)
        loss = found.log_probs.mean() + 0.1 * found.entropy.mean()
        return loss.detach(), dict(zip(names, torch.autograd.grad(loss, leaves), strict=True))

    true = run(tiny(dtype=torch.float64))
    plain = run(in_order(order, layers, tiny, lambda model: None))
    with contextlib.ExitStack() as stack:
        same(run(in_order(order, layers, tiny, lambda model: stack.enter_context(drop_in.patch()))), true, plain)


@interpreted
@pytest.mark.parametrize("order", ORDERS)
def test_openrlhf_actor(order, layers):
    actors = openrlhf("openrlhf.models.actor")
    drop_in = importlib.import_module("fuserl.trainers.openrlhf")
    ids, attention = batch()["input_ids"], batch()["attention_mask"]

    def by_actor(model):
        made = actors.Actor(model)
        made.packing_samples = False  # as it sets it where it loads the model itself
        return made(ids, attention_mask=attention, return_logprobs=True)

    def by_definition(model):  # OpenRLHF's logits are float32, whatever the model is
        logits = model(ids, attention_mask=attention).logits[:, :-1]
        return logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]

    def run(model, score=by_actor):
        logprob = score(model)
        names, leaves = zip(*model.named_parameters(), strict=True)
        loss = (logprob * attention[:, 1:]).mean()
        return loss.detach(), dict(zip(names, torch.autograd.grad(loss, leaves), strict=True))

    true = run(tiny(dtype=torch.float64), by_definition)
    plain = run(in_order(order, layers, tiny, lambda model: None))
    with contextlib.ExitStack() as stack:
        same(run(in_order(order, layers, tiny, lambda model: stack.enter_context(drop_in.patch()))), true, plain)


@pytest.mark.parametrize("order", ORDERS)
def test_ligers_fused_loss_is_refused(order, layers):
    """At once where it came first; after the patch, where it would stand over ours unseen, before the model runs."""
    with_loss, sentence = (
        functools.partial(layers, fused_linear_cross_entropy=True),
        "LlamaForCausalLM with Liger's fused",
    )
    if order != "after the patch":
        with pytest.raises(ValueError, match=sentence):
            in_order(order, with_loss, tiny, ours.patch)
        return
    model = in_order(order, with_loss, tiny, ours.patch)
    with pytest.raises(ValueError, match=sentence):
        model(**batch())


def test_what_was_refused_may_be_used_unpatched(layers):
    model = tiny()
    ours.patch(model)
    layers(model, fused_linear_cross_entropy=True)
    ours.unpatch(model)
    assert not model._forward_pre_hooks
    ours.patch(model)
    with pytest.raises(ValueError, match="with Liger's fused loss"):
        model(**batch())


@interpreted
@pytest.mark.parametrize("prompts", [pytest.param("each", marks=pytest.mark.slow), "once"])
def test_ten_steps_of_grpo(prompts, tmp_path, layers):
    """use_liger_kernel, which TRL applies as training starts, after any patch."""
    rival("trl", "trl.trainer.grpo_trainer")
    drop_in = importlib.import_module("fuserl.trainers.trl")
    ours = importlib.import_module("fuserl.trainers.trl_grpo").FuserlGRPOTrainer if prompts == "once" else None
    plain = functools.partial(trl_runs.sampled, "GRPO", loss_type="dapo", num_iterations=1)
    truth = trl_runs.history(plain, trl_runs.defined(), torch.float64, tmp_path)
    plain = functools.partial(plain, use_liger_kernel=True)
    theirs = trl_runs.history(plain, [], torch.float32, tmp_path)
    with drop_in.patch():
        got = trl_runs.history(functools.partial(plain, trainer=ours), [], torch.float32, tmp_path)
    assert modeling_llama.apply_rotary_pos_emb is liger.liger_rotary_pos_emb
    assert got.keys() == theirs.keys() == truth.keys() and {"loss", "grad_norm"} <= got.keys()
    for metric, true in truth.items():
        worst, allowed = (got[metric] - true).abs(), 2 * (theirs[metric] - true).abs().max() + 4 * 2**-23 * true.abs()
        assert (worst <= allowed).all(), f"{metric}: {worst} where {allowed} is allowed of {true}"


@cpu_only
def test_in_the_interpreter(monkeypatch):
    monkeypatch.setenv("FUSERL_BACKEND", "cpu")  # ours stay C++
    run_interpreted(__file__, "-m", "not slow")
