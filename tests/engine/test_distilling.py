"""Losses of distillation: what each reads at a policy of transformers is its definition over all logits, in float64."""

import copy

import pytest
import tiny_models
import tolerance
import torch
from test_second_models import adapted, batch_, defined, gradients, logits_of, policy

from fuserl.engine import adapters, distilling
from fuserl.engine.losses import Loss, clipped, summed, token_mean
from fuserl.engine.second_models import Teacher
from fuserl.kernels.top_tokens import top_tokens


def listed(k, tail):
    """forward_kl over the policy's k likeliest tokens."""

    def function(z, q):
        ids = z.detach().topk(k)[1]
        p, q = z.gather(-1, ids), q.gather(-1, ids)
        if tail:
            p, q = (torch.cat([x, torch.log1p(-x.exp().sum(-1, keepdim=True))], -1) for x in (p, q))
        else:
            p, q = p.log_softmax(-1), q.log_softmax(-1)
        return (q.exp() * (q - p)).sum(-1)

    return function


def best(z, q):
    return -z.gather(-1, q.argmax(-1, keepdim=True)).squeeze(-1)


def made(make, name="each", sign=1.0):
    def loss(out, batch):
        return sign * getattr(out, name) * token_mean(batch), {name: sign * getattr(out, name)}

    return Loss(loss, outputs=("logprob", name), made={name: make})


CASES = {
    "hard": (made(distilling.likelihood_of_best, sign=-1.0), best),
    "listed": (made(distilling.listed_divergence("forward_kl", 5)), listed(5, True)),
    "renormalised": (made(distilling.listed_divergence("forward_kl", 5, tail=False)), listed(5, False)),
}


@pytest.mark.parametrize("taught", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_each_is_its_definition_with_its_gradient(case, taught):
    loss, function = CASES[case]
    model, other, batch = tiny_models.model(), tiny_models.model(), batch_(taught=taught)
    for parameter in other.parameters():
        parameter.data.mul_(0.9)
    both = copy.deepcopy(model), copy.deepcopy(other)
    for settings in ({}, {"micro_tokens": 8}):
        taken, row = gradients(policy(copy.deepcopy(model), teacher=other, **settings), batch, loss)
        truth, plain = (defined(*(copy.deepcopy(x).to(kind) for x in both), batch, function)
                        for kind in (torch.float64, torch.float32))  # fmt: skip
        assert row["each"] == pytest.approx(float(truth[0]), rel=1e-5)
        size = {name: x.norm() for name, x in truth[1].items()}
        rows = [
            torch.cat([(x / size[name]).flatten() for name, x in g.items()]) for g in (taken[0], truth[1], plain[1])
        ]
        tolerance.check_rows("gradient", *rows, torch.float32)


def test_the_score_function_form_has_the_teachers_logprobs():
    model, batch = tiny_models.model(), batch_(taught=True)
    other = tiny_models.model()
    for parameter in other.parameters():
        parameter.data.mul_(0.9)
    seen = []

    def loss(out, part):
        seen.append(out.teacher_logprob.detach())
        return distilling.following()(out, part)

    following = Loss(loss, outputs=("logprob", "teacher_logprob"), made=distilling.following().made)
    policy(copy.deepcopy(model), teacher=copy.deepcopy(other)).update(batch, following)
    with torch.no_grad():
        q = logits_of(other, batch.teacher_prompts, batch).log_softmax(-1)
    torch.testing.assert_close(seen[0], q.gather(1, batch.tokens[:, None])[:, 0], rtol=1e-4, atol=1e-5)


def test_dead_tokens_have_no_part_and_a_sum_of_losses_reads_what_both_do():
    batch = batch_().replace(advantages=torch.tensor([1.0] * 5 + [0.0] * 5))
    each, plain = made(distilling.listed_divergence("reverse_kl", 3)), clipped()
    both = summed(plain, each, 0.5)
    assert both.made == each.made and {"logprob", "each"} <= {*both.outputs}
    live = Loss(each.function, outputs=each.outputs, made=each.made, live=plain.live)
    taken, _ = gradients(policy(teacher=Teacher(), micro_tokens=4096), batch, live)
    assert taken and all(g.isfinite().all() for g in taken[0].values())


def test_a_list_of_a_policy_with_an_adapter_on_its_head_is_refused():
    actor = policy(adapted(("q_proj", "lm_head")), teacher=Teacher())
    with pytest.raises(ValueError, match=r"listed_divergence: the policy's head must be one matrix"):
        actor.update(batch_(), made(distilling.listed_divergence("reverse_kl", 3)))
    actor.update(batch_(), made(distilling.likelihood_of_best, sign=-1.0))
    with pytest.raises(ValueError, match=r"k must be an integer >= 1; got 0"):
        distilling.listed_divergence("reverse_kl", 0)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("k", [1, 4])
def test_top_tokens_are_those_of_all_logits(family, k):
    model = adapted(("lm_head",)) if family == "llama" else tiny_models.model(family)
    terms, weight = adapters.head_terms(model), adapters.head_weight(model)
    hidden = torch.randn(7, weight.shape[1], generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        z = adapters.base(model).get_output_embeddings()(hidden)
        cap = terms["softcap"]
        z = (z if cap is None else cap * torch.tanh(z / cap)) / 0.7
    expected = z.log_softmax(-1).topk(k)
    for chunk in (None, 3):
        ids, logprobs = top_tokens(hidden, weight, k, temperature=0.7, chunk=chunk, **terms)
        assert torch.equal(ids, expected[1])
        torch.testing.assert_close(logprobs, expected[0], rtol=1e-5, atol=1e-5)
        again = top_tokens(hidden, weight, k, ids=ids, temperature=0.7, chunk=chunk, **terms)
        assert torch.equal(again[1], logprobs)
    with pytest.raises(ValueError, match=r"top_tokens: k must be 1 to 64"):
        top_tokens(hidden, weight, 65)
