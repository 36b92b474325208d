"""Policy: what an update computes, what it saves, and what must not change it. Tiny random Llama, no tokenizer."""

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import tiny_models
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from fuserl.engine import adapters
from fuserl.engine.batch import Rollouts, batch_of
from fuserl.engine.losses import (
    clipped,
    clipped_rollouts,
    every_token,
    negative_logprob,
    squared_value,
    summed,
)
from fuserl.engine.policy import Policy, Sampling, Updating
from fuserl.engine.preferences import bradley_terry, preference
from fuserl.engine.prompts import Prompt
from fuserl.engine.second_models import Teacher


def tiny_model(**changes):
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=67, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, **changes,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def tiny_batch():
    lengths, prompts = [3, 2, 4, 1, 5, 2], [torch.randint(67, (n,)) for n in (4, 6, 3)]
    rollouts = Rollouts(
        prompts=[Prompt(str(n)) for n in range(3)],
        prompt_tokens=prompts,
        group=torch.tensor([0, 0, 1, 1, 2, 2]),
        tokens=torch.randint(67, (sum(lengths),)),
        offsets=torch.tensor([0, *lengths]).cumsum(0),
        rollout_logprobs=torch.zeros(sum(lengths)),
        texts=[""] * 6,
        finish=["stop"] * 6,
    )
    batch = batch_of(rollouts, torch.tensor([1.0, 0.0, 2.0, 2.0, 0.0, 1.0]))
    return batch.replace(advantages=batch.to_tokens(torch.tensor([1.0, -1.0, 0.0, 0.0, -0.7, 0.7])))


def policy(model=None, **settings):
    return Policy(model or tiny_model(), None, Sampling(), Updating(**{"lr": 0.1, "max_grad_norm": 1e9, **settings}))


def gradients(batch, loss, **settings):
    """The model's gradient of one update, seen as the optimizer sees it."""
    taken, actor = [], policy(**settings)
    actor.optimizer.step = lambda: taken.append([p.grad.clone() for p in actor.model.parameters()]) or {}
    actor.update(batch, loss)
    return taken


def plain_logprobs(model, batch):
    """Log-probs of every token from one ordinary forward per rollout."""
    scored = []
    for b, group in enumerate(batch.group.tolist()):
        prompt, tokens = batch.prompt_tokens[group], batch.tokens[batch.offsets[b] : batch.offsets[b + 1]]
        logits = model(torch.cat([prompt, tokens])[None], attention_mask=None).logits[0, len(prompt) - 1 : -1]
        scored.append(logits.log_softmax(-1).gather(1, tokens[:, None]).squeeze(1))
    return torch.cat(scored)


def test_logprobs_equal_a_plain_forward():
    model, batch = tiny_model(), tiny_batch()
    expected = plain_logprobs(copy.deepcopy(model), batch)
    for micro_tokens in (4096, 7):
        assert torch.allclose(
            policy(model, micro_tokens=micro_tokens).score(batch, ["old_logprobs"]).old_logprobs, expected, atol=1e-6
        )


def test_update_gradient_equals_autograd_through_plain_forwards():
    batch, model = tiny_batch(), tiny_model()
    lengths = batch.lengths[batch.rollout]
    (-(plain_logprobs(model, batch) * batch.advantages / (6 * lengths)).sum()).backward()
    (got,) = gradients(batch, clipped())
    for (name, parameter), gradient in zip(model.named_parameters(), got, strict=True):
        assert torch.allclose(gradient, parameter.grad, rtol=1e-4, atol=1e-7), name


def close(a, b):
    return all(torch.allclose(x, y, rtol=1e-5, atol=1e-7) for x, y in zip(a, b, strict=True))


def test_micro_batches_do_not_change_the_gradient():
    batch = tiny_batch()
    (whole,) = gradients(batch, clipped())
    for micro_tokens in (1, 8, 12):
        (part,) = gradients(batch, clipped(), micro_tokens=micro_tokens)
        assert close(whole, part)


def test_dropping_dead_rollouts_changes_nothing_and_costs_no_forward(monkeypatch):
    batch, loss = tiny_batch(), clipped()
    (dropped,) = gradients(batch, loss)
    (kept,) = gradients(batch, dataclasses.replace(loss, live=every_token))
    assert close(dropped, kept)
    actor, seen = policy(), []
    forward = actor.model.model.forward
    monkeypatch.setattr(actor.model.model, "forward", lambda **k: seen.append(k["input_ids"].numel()) or forward(**k))
    actor.update(batch, loss)
    live = [0, 1, 4, 5]
    assert seen == [4 + 3 + sum(int(batch.lengths[b]) - 1 for b in live)]


def test_dead_rollouts_are_not_scored_before_an_update(monkeypatch):
    """Their log-probs at its start are NaN, so that nobody takes them for any."""
    batch, seen, scored = tiny_batch(), [], Policy._scored
    monkeypatch.setattr(Policy, "_scored", lambda *arguments: seen.append(scored(*arguments)) or seen[-1])
    found = gradients(batch, clipped(), minibatches=3)
    assert [each["logprob"].isnan().tolist() for each in seen] == [(batch.advantages == 0).tolist()]
    batch = policy().score(batch, ["old_logprobs"])
    assert not batch.old_logprobs.isnan().any()
    assert all(map(close, found, gradients(batch, clipped(), minibatches=3)))


def test_nothing_live_takes_no_step():
    batch, actor = tiny_batch(), policy()
    before = [p.clone() for p in actor.model.parameters()]
    statistics = actor.update(batch.replace(advantages=torch.zeros(17)), clipped())
    assert statistics["live"] == 0 and all(map(torch.equal, before, actor.model.parameters()))


def test_one_epoch_one_minibatch_needs_no_forward_for_old_logprobs(monkeypatch):
    batch, forwards = tiny_batch(), []
    for settings, count in (({}, 1), ({"epochs": 2}, 3), ({"minibatches": 2}, 3)):
        actor = policy(**settings)
        forwards.clear()
        actor.model.model.register_forward_hook(lambda *_: forwards.append(1))
        actor.update(batch.replace(advantages=torch.ones(17)), clipped())
        assert len(forwards) == count


def test_second_epoch_uses_the_log_probs_of_the_start():
    batch, actor = tiny_batch(), policy(epochs=2, lr=0.5)
    statistics = actor.update(batch, clipped())
    assert abs(statistics["ratio"] - 1) > 1e-3  # after the first step the ratio has left 1


def test_reference_is_the_initial_model_and_stays():
    batch = tiny_batch()
    actor = Policy(tiny_model(), None, Sampling(), Updating(lr=0.1), reference=Teacher())
    first = actor.update(batch, clipped(beta=0.1))
    second = actor.update(batch, clipped(beta=0.1))
    assert abs(first["kl"]) < 1e-7 < second["kl"]


def test_update_lowers_the_loss_of_what_it_imitates():
    batch, actor = tiny_batch(), policy(lr=0.02)
    batch = batch.replace(advantages=torch.ones(17))
    losses = [actor.update(batch, negative_logprob())["nll"] for _ in range(5)]
    assert losses[-1] < losses[0] - 0.5


FAMILIES = {
    "Gemma2": dict(final_logit_softcapping=2.0, query_pre_attn_scalar=4, head_dim=4),
    "Cohere": dict(logit_scale=0.4),
    "Granite": dict(logits_scaling=3.0),
    "Phi": dict(),  # its head has a bias
}


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_that_are_more_than_a_product(family):
    torch.manual_seed(1)
    settings = dict(
        vocab_size=67, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config = getattr(transformers, f"{family}Config")(**settings, **FAMILIES[family])
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for parameter in model.lm_head.parameters():
        torch.nn.init.normal_(parameter)
    plain, batch, taken = copy.deepcopy(model), tiny_batch(), []
    plain.set_attn_implementation("eager")
    logprobs = plain_logprobs(plain, batch)
    (-(logprobs * batch.advantages / (6 * batch.lengths[batch.rollout])).sum()).backward()
    actor = policy(model)
    assert torch.allclose(actor.score(batch, ["old_logprobs"]).old_logprobs, logprobs, rtol=1e-5, atol=1e-5)
    actor.optimizer.step = lambda: taken.append({n: p.grad.clone() for n, p in actor.parameters().items()}) or {}
    actor.update(batch, clipped())
    assert (model.lm_head.bias is not None) == (family == "Phi")
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(taken[0][name], parameter.grad, rtol=1e-4, atol=1e-6), name


def test_the_terms_of_a_head_with_adapters():
    model = adapters.lora(tiny_model(), rank=2, alpha=4.0, targets=("lm_head",))
    terms = adapters.head_terms(model)
    assert terms.pop("lora")[2] == 2.0 and terms == dict.fromkeys(("bias", "softcap", "logit_scale"))
    plain, bias = adapters.base(model), torch.nn.Parameter(torch.ones(67))
    plain.lm_head.base_layer.bias = bias
    plain.config.logit_scale, plain.config.logits_scaling, plain.config.lm_head_multiplier = 3.0, 4.0, 2.0
    plain.config.final_logit_softcapping = 30.0
    terms = adapters.head_terms(model)
    assert terms.pop("lora")[2] == 2.0 and terms == {"bias": bias, "softcap": 30.0, "logit_scale": 1.5}
    plain.config.logit_scale = "inv_sqrt_d_model"
    with pytest.raises(ValueError, match="logit_scale must be a positive number; LlamaForCausalLM has"):
        adapters.head_terms(model)


def pairs_batch():
    batch = tiny_batch()
    return batch.replace(
        rewards=torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0]), ref_logprobs=-torch.rand(17), old_logprobs=-torch.rand(17)
    )


SCOPES = {
    "rollout": clipped_rollouts(low=0.2, high=0.2),
    "group": preference(beta=0.3),
}


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("settings", [{}, {"micro_tokens": 9}, {"chunk": 2}, {"chunk": 6, "micro_tokens": 16}])
def test_losses_of_rollouts_and_pairs_equal_autograd_through_plain_forwards(scope, settings):
    batch, model, loss = pairs_batch(), tiny_model(), SCOPES[scope]
    loss(SimpleNamespace(logprob=plain_logprobs(model, batch)), batch)[0].sum().backward()
    (got,) = gradients(batch, loss, **settings)
    for (name, parameter), gradient in zip(model.named_parameters(), got, strict=True):
        assert torch.allclose(gradient, parameter.grad, rtol=1e-4, atol=1e-7), name


def plain_states(model, batch, *, after=False):
    """The hidden state that predicts each token, or the one after it, from one ordinary forward per rollout."""
    states = []
    for b, group in enumerate(batch.group.tolist()):
        prompt, tokens = batch.prompt_tokens[group], batch.tokens[batch.offsets[b] : batch.offsets[b + 1]]
        whole = model.model(torch.cat([prompt, tokens])[None]).last_hidden_state[0]
        states.append(whole[len(prompt) :] if after else whole[len(prompt) - 1 : -1])
    return torch.cat(states)


def valued(**settings):
    actor = Policy(tiny_model(), None, Sampling(), Updating(lr=0.1, max_grad_norm=1e9, **settings), value=True)
    torch.manual_seed(2)
    torch.nn.init.normal_(actor.value.weight)
    return actor


@pytest.mark.parametrize("settings", [{}, {"micro_tokens": 9, "chunk": 3}])
def test_value_head_and_policy_share_one_gradient(settings):
    batch = pairs_batch().replace(values=torch.randn(17), returns=torch.randn(17))
    loss = summed(clipped(low=0.9, high=5.0), squared_value(clip=0.3), 0.7)
    actor, plain = valued(**settings), valued()
    states = plain_states(plain.model, batch)
    logprob = (states @ plain.model.lm_head.weight.T).log_softmax(-1).gather(1, batch.tokens[:, None]).squeeze(1)
    out = SimpleNamespace(logprob=logprob, value=plain.value(states).squeeze(-1))
    assert torch.allclose(valued().score(batch.replace(values=None), ["values"]).values, out.value, atol=1e-6)
    loss(out, batch)[0].sum().backward()
    taken = {}
    actor.optimizer.step = lambda: taken.update({n: p.grad.clone() for n, p in actor.parameters().items()}) or {}
    actor.update(batch, loss)
    expected = plain.parameters()
    assert taken.keys() == expected.keys() and "value_head.weight" in taken
    for name, gradient in taken.items():
        assert torch.allclose(gradient, expected[name].grad, rtol=1e-4, atol=1e-6), name


def test_scores_of_pairs_train_the_trunk_and_the_head():
    batch, actor, plain = pairs_batch(), valued(micro_tokens=9), valued()
    out = SimpleNamespace(score=plain.value(plain_states(plain.model, batch, after=True)).squeeze(-1))
    bradley_terry(centre=0.1)(out, batch)[0].sum().backward()
    taken = {}
    actor.optimizer.step = lambda: taken.update({n: p.grad.clone() for n, p in actor.parameters().items()}) or {}
    actor.update(batch, bradley_terry(centre=0.1))
    for name, parameter in plain.parameters().items():
        assert torch.allclose(taken[name], parameter.grad, rtol=1e-4, atol=1e-6), name


def test_statistics_of_parts_are_those_of_the_whole():
    batch = pairs_batch()
    whole, parts = (
        policy(micro_tokens=size, chunk=chunk).update(batch, clipped(beta=0.1))
        for size, chunk in ((4096, None), (9, 2))
    )
    assert whole.keys() == parts.keys() and whole["ratio_max"] > whole["ratio"] > whole["ratio_min"]
    for name in whole:
        assert whole[name] == pytest.approx(parts[name], rel=1e-4, abs=1e-6), name


def test_measure_changes_nothing():
    actor, batch = policy(), pairs_batch()
    before = [p.clone() for p in actor.model.parameters()]
    measured = actor.measure(batch, preference(beta=0.3))
    assert 0 <= measured["pair_accuracy"] <= 1 and all(map(torch.equal, before, actor.model.parameters()))
    assert measured["margin"] == pytest.approx(actor.update(batch, preference(beta=0.3))["margin"], rel=1e-5)


def test_adapters_train_alone_and_the_base_is_the_reference():
    batch, model = tiny_batch(), tiny_model()
    base = [p.clone() for p in model.parameters()]
    adapted = adapters.lora(model, rank=2, alpha=4.0, targets=("all-linear",))
    actor = Policy(adapted, None, Sampling(), Updating(lr=0.1), reference=Teacher())
    first, second = (actor.update(batch, clipped(beta=0.1)) for _ in range(2))
    assert abs(first["kl"]) < 1e-7 < second["kl"]
    assert all("lora" in name for name in actor.parameters())
    assert all(map(torch.equal, base, (p for n, p in adapted.named_parameters() if "lora" not in n)))


def test_another_model_as_reference_must_number_the_same_tokens():
    batch, other = tiny_batch(), tiny_model()
    other.model.layers[0].mlp.down_proj.weight.data.mul_(3)
    actor = Policy(tiny_model(), None, Sampling(), Updating(lr=0.1), reference=other)
    expected = plain_logprobs(other, batch)
    assert torch.allclose(actor.score(batch, ["ref_logprobs"]).ref_logprobs, expected, atol=1e-6)
    strange = tiny_models.model()
    with pytest.raises(ValueError, match="it has 64 tokens and the policy 67"):
        Policy(tiny_model(), None, Sampling(), Updating(), reference=strange)
