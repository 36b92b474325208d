"""Adapters on the head, through a policy's update: what peft's own forward gives, and nothing left out."""

import copy

import pytest
import tiny_models
import torch
from test_policy import tiny_batch
from tolerance import check, check_rows

from fuserl.engine import adapters
from fuserl.engine.losses import negative_logprob
from fuserl.engine.policy import Policy, Sampling, Updating
from fuserl.kernels import head_products

peft = pytest.importorskip("peft")
HEADS = {
    "plain": {},
    "rank_stabilised": {"use_rslora": True},
    "alone": {"target_modules": ["lm_head"]},
    "capped": {"family": "gemma2"},
}


def adapted(*names, family="llama", **settings):
    """A tiny model with one adapter or several on its head and its queries, all of them moved and active."""
    model = tiny_models.model(family)
    ranks = iter((4, 3))
    config = {"target_modules": ["q_proj", "lm_head"], "lora_alpha": 6, **settings}
    made = peft.get_peft_model(model, peft.LoraConfig(r=next(ranks), **config), adapter_name=(names or ("one",))[0])
    for name in names[1:]:
        made.add_adapter(name, peft.LoraConfig(r=next(ranks), **config))
    if len(names) > 1:
        made.base_model.set_adapter(list(names))
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    return made


def some_batch():
    """A batch of the tiny models' tokens, every one with the same weight in the loss."""
    batch, mine = tiny_batch(), tiny_models.VOCABULARY
    prompts = [tokens % mine for tokens in batch.prompt_tokens]
    return batch.replace(tokens=batch.tokens % mine, prompt_tokens=prompts, advantages=torch.ones(len(batch.tokens)))


def rows_of(model, batch):
    """Log-probs of the batch's tokens from peft's forward, one rollout at a time."""
    rows = []
    for b, group in enumerate(batch.group.tolist()):
        prompt, own = batch.prompt_tokens[group], batch.tokens[batch.offsets[b] : batch.offsets[b + 1]]
        logits = model(torch.cat([prompt, own])[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
        rows.append(logits.log_softmax(-1).gather(1, own[:, None])[:, 0])
    return torch.cat(rows)


def plainly(model, batch):
    logprobs = rows_of(model, batch)
    (-logprobs.sum() / len(logprobs)).backward()
    return logprobs.detach(), {name: parameter.grad for name, parameter in adapters.trained(model).items()}


def engine(model, batch, **settings):
    """Log-probs, and the gradients of one update as the optimizer sees them."""
    actor, taken = Policy(model, None, Sampling(), Updating(max_grad_norm=1e9, **settings)), []
    logprobs = actor.score(batch, ["old_logprobs"]).old_logprobs
    actor.optimizer.step = lambda: taken.append({n: p.grad.clone() for n, p in actor.parameters().items()}) or {}
    actor.update(batch, negative_logprob())
    return logprobs, taken[0]


def compare(make):
    batch = some_batch()
    plain, wide = make().train(), copy.deepcopy(make()).to(torch.float64).train()
    (truth, true), (rough, roughly), (found, got) = plainly(wide, batch), plainly(plain, batch), engine(make(), batch)
    check("logprob", found, truth, rough, torch.float32)
    assert got.keys() == true.keys() and any("lm_head.lora_A" in name for name in got)
    for name, gradient in got.items():
        assert true[name].norm() > 0
        rows = [x[None] if x.dim() == 1 else x for x in (gradient, true[name], roughly[name])]
        check_rows(name, *rows, torch.float32)


@pytest.mark.parametrize("head", HEADS)
def test_equals_the_forward_of_peft(head):
    compare(lambda: adapted(**HEADS[head]))


def test_several_active_adapters_add_up_as_they_do_in_peft():
    compare(lambda: adapted("one", "other"))


def test_one_of_two_adapters_is_the_one_that_is_active():
    batch = some_batch()

    def made(active):
        model = adapted("one", "other")
        model.set_adapter(active)
        return model

    found = {active: engine(made(active), batch)[0] for active in ("one", "other")}
    for active, logprobs in found.items():
        with torch.no_grad():
            assert torch.allclose(logprobs, rows_of(made(active), batch), atol=1e-5)
    assert (found["one"] - found["other"]).abs().max() > 1e-2


def test_merged_and_unmerged_adapters_are_the_same_head():
    model, batch = adapted(), some_batch()
    unmerged = engine(model, batch)[0]
    assert adapters.head_terms(model)["lora"] is not None
    model.merge_adapter()
    assert adapters.head_terms(model)["lora"] is None
    actor = Policy(model, None, Sampling(), Updating())
    assert torch.allclose(actor.score(batch, ["old_logprobs"]).old_logprobs, unmerged, atol=1e-5)
    plain = Policy(adapters.merged(adapted()).requires_grad_(), None, Sampling(), Updating())
    assert torch.allclose(plain.score(batch, ["old_logprobs"]).old_logprobs, unmerged, atol=1e-5)


def test_the_frozen_head_is_not_multiplied_nor_formed(monkeypatch):
    monkeypatch.setattr(head_products.HeadProducts, "_add_weight", None)
    model = adapted()
    monkeypatch.setattr(adapters.base(model).lm_head, "get_delta_weight", None)
    engine(model, some_batch())


@pytest.mark.parametrize(
    "settings,message",
    [({"lora_dropout": 0.1}, "dropout must be 0 on the head"), ({"use_dora": True}, "adapters must be LoRA without")],
)
def test_adapters_that_are_no_sum_of_products_are_refused_at_the_start(settings, message):
    with pytest.raises(ValueError, match=message):
        Policy(adapted(**settings), None, Sampling(), Updating())
