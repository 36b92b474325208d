"""Policy: what an update computes, what it saves, and what must not change it. Tiny random Llama, no tokenizer."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fuserl.engine.batch import Rollouts, batch_of
from fuserl.engine.losses import clipped, negative_logprob
from fuserl.engine.policy import Policy, Sampling, Updating
from fuserl.engine.prompts import Prompt


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
    actor.optimizer.step = lambda: taken.append([p.grad.clone() for p in actor.model.parameters()])
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
        assert torch.allclose(policy(model, micro_tokens=micro_tokens).logprobs(batch), expected, atol=1e-6)


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
    (kept,) = gradients(batch, type(loss)(loss.function))
    assert close(dropped, kept)
    actor, seen = policy(), []
    forward = actor.model.model.forward
    monkeypatch.setattr(actor.model.model, "forward", lambda **k: seen.append(k["input_ids"].numel()) or forward(**k))
    actor.update(batch, loss)
    live = [0, 1, 4, 5]
    assert seen == [4 + 3 + sum(int(batch.lengths[b]) - 1 for b in live)]


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
    actor = Policy(tiny_model(), None, Sampling(), Updating(lr=0.1), reference=True)
    first = actor.update(batch, clipped(beta=0.1))
    second = actor.update(batch, clipped(beta=0.1))
    assert abs(first["kl"]) < 1e-7 < second["kl"]


def test_update_lowers_the_loss_of_what_it_imitates():
    batch, actor = tiny_batch(), policy(lr=0.02)
    batch = batch.replace(advantages=torch.ones(17))
    losses = [actor.update(batch, negative_logprob())["nll"] for _ in range(5)]
    assert losses[-1] < losses[0] - 0.5


def test_head_that_is_more_than_a_product_is_refused():
    model = tiny_model()
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match=r"one matrix product.*final_logit_softcapping"):
        policy(model)
