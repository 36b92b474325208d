"""Tiny random models, a batch, and a training step, for tests of patched models against unpatched ones."""

import pytest
import tiny_models
import torch
import torch.nn.functional as F
import transformers
from tolerance import check, check_rows

from fuserl.trainers import transformers as ours

B, T = 3, 11
MIXTURE = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
               output_router_logits=True, router_aux_loss_coef=0.3)  # fmt: skip
FAMILIES = {
    "llama": {}, "qwen3": {"tie_word_embeddings": True}, "phi": {}, "gpt2": {}, "gpt_neox": {}, "opt": dict(ffn_dim=48),
    "gemma2": dict(final_logit_softcapping=2.0), "gemma3_text": dict(final_logit_softcapping=3.0),
    "cohere": dict(logit_scale=0.25), "granite": dict(logits_scaling=3.0), "mixtral": MIXTURE, "qwen3_moe": MIXTURE,
}  # fmt: skip


def tiny(family="llama", dtype=torch.float32, **changes):
    """A random model of a family, in training mode and without dropout."""
    dropouts = dict.fromkeys(("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop",
                              "resid_dropout", "embd_dropout", "dropout"), 0.0)  # fmt: skip
    sizes = tiny_models.SIZES | dropouts | dict(word_embed_proj_dim=32, num_hidden_layers=2)
    config = transformers.AutoConfig.for_model(family, **{**sizes, **FAMILIES.get(family, {}), **changes})
    torch.manual_seed(3)
    made = transformers.AutoModelForCausalLM.from_config(config)
    if family in ("mixtral", "qwen3_moe"):
        made.set_experts_implementation("eager")  # the only one for float64
    for parameter in made.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(4)
    return made.to(dtype).train()


def batch():
    """Ids, padding at the end of one row, and labels of a part."""
    draw = torch.Generator().manual_seed(5)
    ids = torch.randint(3, tiny_models.VOCABULARY, (B, T), generator=draw)
    attention = torch.ones_like(ids)
    attention[1, -3:] = 0
    labels = ids.masked_fill((attention == 0) | (torch.rand(B, T, generator=draw) < 0.4), -100)
    return {"input_ids": ids, "attention_mask": attention, "labels": labels}


def exactly(logits, labels, vocab_size, num_items_in_batch=None, ignore_index=-100, shift_labels=None, **_):
    """transformers' causal loss by definition, in the dtype of the logits, which its own brings to float32."""
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    losses = F.cross_entropy(logits.flatten(0, -2), shift_labels.flatten(), reduction="none", ignore_index=ignore_index)
    return losses.sum() / ((shift_labels != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch)


def defined(model):
    """The model with that loss."""
    model.loss_function = exactly
    return model


def step(model, given, **more):
    """Loss and gradients of every trained parameter."""
    loss = model(**given, **more).loss
    names, leaves = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    return loss.detach(), dict(zip(names, torch.autograd.grad(loss, leaves), strict=True))


def same(got, true, plain, *dtypes):
    """Losses and gradients within the tolerance of what the unpatched model errs."""
    check("loss", got[0], true[0], plain[0], *(dtypes or [torch.float32]))
    assert got[1].keys() == true[1].keys()
    for name in true[1]:
        rows = (x[1][name].reshape(len(x[1][name]), -1) for x in (got, true, plain))
        check_rows(name, *rows, *(dtypes or [torch.float32]))


def patched(model):
    ours.patch(model)
    return model


ADAPTERS = {
    "projections": dict(target_modules=["q_proj", "v_proj"]),
    "the head too": dict(target_modules=["q_proj", "lm_head"]),
    "the head trained whole": dict(target_modules=["q_proj"], modules_to_save=["lm_head"]),
}


def adapted(dtype, before=None, **options):
    """A model with adapters; `before` is called between."""
    peft = pytest.importorskip("peft", reason="pip install peft")
    model = tiny(dtype=dtype)
    if before is not None:
        before(model)
    torch.manual_seed(0)
    made = peft.get_peft_model(model, peft.LoraConfig(r=4, init_lora_weights=False, **options))
    return made.to(dtype).train()
