"""Second models: whose weights they read, how those move, and divergences from them against the definition."""

import copy
import dataclasses

import pytest
import tiny_models
import tiny_runs
import tolerance
import torch
from ranks import on_ranks
from torch import nn

from fuserl.engine import adapters, catalogue, learners, loop, models, ranks, second_models
from fuserl.engine.batch import Batch, Counts, offsets_of
from fuserl.engine.follower import Follower
from fuserl.engine.losses import Loss, clipped, rollout_mean, summed, token_mean
from fuserl.engine.metrics import Run
from fuserl.engine.policy import Policy, Sampling, Updating
from fuserl.engine.second_models import SecondModel, Teacher

TARGETS = ("q_proj", "down_proj")


def batch_(seed=0, taught=False):
    """Four rollouts of two prompts, with prompts of the teacher's own where it is `taught` otherwise."""
    random = torch.Generator().manual_seed(seed)
    lengths = [3, 2, 4, 1]

    def drawn(length):
        return torch.randint(3, tiny_models.VOCABULARY, (length,), generator=random)

    return Batch(
        tokens=drawn(10),
        rollout=torch.arange(4).repeat_interleave(torch.tensor(lengths)),
        offsets=offsets_of(torch.tensor(lengths)),
        group=torch.tensor([0, 0, 1, 1]),
        rewards=torch.tensor([1.0, 0.0, 0.0, 1.0]),
        rollout_logprobs=torch.zeros(10),
        counts=Counts(10, 4, 2),
        prompt_tokens=[drawn(4), drawn(6)],
        advantages=torch.ones(10),
        teacher_prompts=[drawn(length) for length in (7, 3, 5, 9)] if taught else None,
    )


def of_divergence(kind, **numbers):
    """The mean over tokens of a divergence from the teacher, which is its statistic too."""

    def loss(out, batch):
        each = getattr(out, kind)
        return each * token_mean(batch), {"distilled": each}

    return Loss(loss, outputs=("logprob", kind), divergence=numbers or None)


def policy(model=None, **given):
    settings = {name: given.pop(name) for name in ("epochs", "minibatches", "micro_tokens") if name in given}
    updating = Updating(lr=0.01, max_grad_norm=1e9, **settings)
    return Policy(model or tiny_models.model(), None, Sampling(temperature=0.7), updating, **given)


def adapted(targets=TARGETS):
    """A model with adapters that do something."""
    model = adapters.lora(tiny_models.model(), rank=2, alpha=4.0, targets=targets)
    for name, parameter in adapters.trained(model).items():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2)
    return model


def logits_of(model, prompts, batch):
    """Logits at every token by transformers' own forward of each rollout behind its prompt, over the temperature."""
    plain, found = adapters.base(model), []
    plain.set_attn_implementation("eager")
    for prompt, tokens in zip(prompts, batch.tokens.split(batch.lengths.tolist()), strict=True):
        found.append(plain(torch.cat([prompt, tokens])[None]).logits[0, len(prompt) - 1 : -1])
    return torch.cat(found) / 0.7


def student_prompts(batch):
    return [batch.prompt_tokens[group] for group in batch.group.tolist()]


def forward_kl(z, q):
    return (q.exp() * (q - z)).sum(-1)


def reverse_kl(z, q):
    return (z.exp() * (z - q)).sum(-1)


def jensen_shannon(z, q, beta=0.3):
    m = (beta * q.exp() + (1 - beta) * z.exp()).log()
    return beta * forward_kl(m, q) + (1 - beta) * forward_kl(m, z)


def alpha(z, q, alpha=0.4):
    return ((alpha * z + (1 - alpha) * q).exp().sum(-1) - 1) / (alpha * (alpha - 1))


KINDS = {
    "forward_kl": (forward_kl, {}),
    "reverse_kl": (reverse_kl, {}),
    "jensen_shannon": (jensen_shannon, {"beta": 0.3}),
    "alpha": (alpha, {"alpha": 0.4}),
}


def gradients(actor, batch, loss):
    """The gradient of each step of an update, and its statistics."""
    taken, step = [], actor.optimizer.step
    actor.optimizer.step = lambda: (
        taken.append({name: p.grad.clone() for name, p in adapters.trained(actor.model).items()}) or step()
    )
    return taken, actor.update(batch, loss)


def defined(model, teacher, batch, function):
    """The mean divergence and its gradient, from all logits of both models; float64 where they are."""
    student, other = copy.deepcopy(model), copy.deepcopy(teacher)
    z = logits_of(student, student_prompts(batch), batch).log_softmax(-1)
    with torch.no_grad():
        q = logits_of(other, batch.teacher_prompts or student_prompts(batch), batch).log_softmax(-1)
    value = function(z, q).mean()
    value.backward()
    return value.detach(), {name: p.grad for name, p in adapters.trained(student).items()}


def require_defined(got, value, models_, batch, function):
    """A gradient and a value as near the float64 ones as plain torch's in float32 are, every parameter's alike."""
    truth = defined(*(copy.deepcopy(each).double() for each in models_), batch, function)
    plain = defined(*models_, batch, function)
    assert value == pytest.approx(float(truth[0]), rel=1e-5)
    size = {name: x.norm() for name, x in truth[1].items()}
    rows = [torch.cat([(x / size[name]).flatten() for name, x in each.items()]) for each in (got, truth[1], plain[1])]
    assert got.keys() == size.keys()
    tolerance.check_rows("gradient", *rows, torch.float32)


@pytest.mark.parametrize("taught", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_divergences_and_their_gradients_are_those_of_the_definition(kind, taught):
    function, numbers = KINDS[kind]
    model, other, batch = tiny_models.model(), tiny_models.model(), batch_(taught=taught)
    for parameter in other.parameters():
        parameter.data.mul_(0.9)
    both = copy.deepcopy(model), copy.deepcopy(other)
    for micro_tokens in (4096, 8):
        actor = policy(copy.deepcopy(model), teacher=other, micro_tokens=micro_tokens)
        taken, row = gradients(actor, batch, of_divergence(kind, **numbers))
        require_defined(taken[0], row["distilled"], both, batch, function)


@pytest.mark.parametrize("make", [tiny_models.model, adapted])
@pytest.mark.parametrize("weights", ["initial", "current", "old", "average"])
def test_each_reads_the_weights_that_it_names(weights, make):
    """Two updates of two epochs: what the teacher's log-probs are before each step of them."""
    actor, batch, rate = policy(make(), teacher=Teacher(weights, rate=0.25), epochs=2), batch_(), 0.25
    seen, snapshots = [], []

    def loss(out, part):
        seen.append(out.reverse_kl.detach().clone())
        snapshots.append(copy.deepcopy(adapters.base(actor.model)))
        return out.reverse_kl * token_mean(part) - out.logprob * rollout_mean(part), {}

    bare = adapters.without_adapters(actor.model) if adapters.present(actor.model) else None
    if bare is None:
        initial = copy.deepcopy(actor.model)
    else:
        with bare:
            initial = adapters.merged(actor.model)
    average = copy.deepcopy(adapters.base(actor.model))
    both = Loss(loss, outputs=("logprob", "reverse_kl"))
    for _ in range(2):
        begin = len(seen)
        actor.update(batch, both)
        for at in range(begin, len(seen)):
            teacher = {"initial": initial, "current": snapshots[at], "old": snapshots[begin], "average": average}
            with torch.no_grad():
                z = logits_of(copy.deepcopy(snapshots[at]), student_prompts(batch), batch).log_softmax(-1)
                q = logits_of(copy.deepcopy(teacher[weights]), student_prompts(batch), batch).log_softmax(-1)
            torch.testing.assert_close(seen[at], reverse_kl(z, q), rtol=1e-3, atol=2e-5)
        ours, theirs = (dict(each.named_parameters()) for each in (average, adapters.base(actor.model)))
        with torch.no_grad():
            for name, parameter in ours.items():
                parameter.lerp_(theirs[name], rate)
    assert len(seen) == 4 and (seen[3].abs().max() > 1e-3) == (weights != "current")


def test_an_average_moves_exactly_and_comes_back_exactly():
    actor, batch = policy(teacher=Teacher("average", rate=0.3)), batch_()
    expected = {name: x.detach().clone() for name, x in adapters.trained(actor.model).items()}
    for _ in range(3):
        actor.update(batch, of_divergence("forward_kl"))
        actor.update(batch, clipped())
        now = actor.seconds["teacher"].state_dict()
    first = policy(teacher=Teacher("average", rate=0.3))
    for _ in range(3):
        for loss in (of_divergence("forward_kl"), clipped()):
            first.update(batch, loss)
            for name, x in adapters.trained(first.model).items():
                expected[name] = expected[name].lerp(x.detach(), 0.3)
    assert (
        all(torch.equal(now[name], x) for name, x in expected.items()) and now.keys() - {"updates"} == expected.keys()
    )
    other = policy(teacher=Teacher("average", rate=0.3)).seconds["teacher"]
    other.load_state_dict(now)
    assert other.state_dict()["updates"] == now["updates"]
    assert all(torch.equal(other.state_dict()[name], now[name]) for name in expected)


def test_what_is_frozen_is_shared_and_what_is_trained_is_not():
    model = adapted()
    own = policy(model, teacher=Teacher("average")).seconds["teacher"].own
    ours, theirs = dict(adapters.base(model).named_parameters()), dict(own.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all((ours[name] is theirs[name]) == ("lora_" not in name) for name in ours)
    assert policy(adapted(), teacher=Teacher()).seconds["teacher"].own is None  # itself without its adapters
    whole = tiny_models.model()
    own = policy(whole, teacher=Teacher("old")).seconds["teacher"].own
    assert not {id(p) for p in whole.parameters()} & {id(p) for p in own.parameters()}
    both = policy(reference=Teacher(), teacher=Teacher())
    assert both.seconds["ref"] is both.seconds["teacher"]  # one copy for two names
    assert policy(teacher=Teacher("current")).seconds["teacher"].state_dict() == {}


def test_reading_is_without_gradients_or_dropout_and_leaves_the_policy_as_it_was():
    actor = policy(adapted(), teacher=Teacher("current"))
    actor.model.train()
    with actor.seconds["teacher"].reading() as model:
        assert model is actor.model and not model.training and not torch.is_grad_enabled()
    assert actor.model.training and torch.is_grad_enabled()


def test_an_offloaded_model_is_with_the_policy_only_while_it_is_read(monkeypatch):
    places = []
    monkeypatch.setattr(SecondModel, "_to", lambda _, device: places.append(str(device)))
    second = SecondModel(nn.Linear(2, 2).to("meta"), nn.Linear(2, 2), offload=True)
    with pytest.raises(KeyError), second.reading():
        assert places == ["meta"]
        raise KeyError
    assert places == ["meta", "cpu"]
    with SecondModel(nn.Linear(2, 2), nn.Linear(2, 2), offload=True).reading():
        assert len(places) == 2  # a policy on the host has nowhere to send it from


def test_what_is_shared_with_the_policy_is_not_sent_away(monkeypatch):
    actor = policy(adapted(), teacher=Teacher("average"))
    second = actor.seconds["teacher"]
    before = {name: p.data_ptr() for name, p in second.own.named_parameters()}
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "to", lambda tensor, device: tensor.clone())
        second._to("elsewhere")
    assert all((p.data_ptr() == before[name]) == ("lora_" not in name) for name, p in second.own.named_parameters())


def test_scores_are_those_of_whom_they_name():
    model, other, batch = tiny_models.model(), tiny_models.model(), batch_(taught=True)
    for parameter in other.parameters():
        parameter.data.mul_(0.9)
    actor = policy(copy.deepcopy(model), teacher=other, reference=Teacher())
    actor.update(batch, clipped())
    now = copy.deepcopy(actor.model)
    fields = ["old_logprobs", "ref_logprobs", "teacher_logprob", "ref_entropy", "old_mean_logprob"]
    found = actor.score(batch, fields)

    def logs(of, prompts):
        with torch.no_grad():
            return logits_of(copy.deepcopy(of), prompts, batch).log_softmax(-1)

    at, own = batch.tokens[:, None], student_prompts(batch)
    old, ref, taught = logs(now, own), logs(model, own), logs(other, batch.teacher_prompts)
    for got, expected in (
        (found.old_logprobs, old.gather(1, at)[:, 0]),
        (found.ref_logprobs, ref.gather(1, at)[:, 0]),
        (found.extra["teacher_logprob"], taught.gather(1, at)[:, 0]),
        (found.extra["ref_entropy"], -(ref.exp() * ref).sum(-1)),
        (found.extra["old_mean_logprob"], old.mean(-1)),
    ):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_features_are_means_of_transformers_own_hidden_states(family):
    model, batch = tiny_models.model(family), batch_()
    actor = policy(copy.deepcopy(model), reference=Teacher(), micro_tokens=8)
    actor.update(batch, clipped())  # they are of the reference, which stays
    found = actor.score(batch, ["features"]).facts["features"]
    model.set_attn_implementation("eager")
    for b, tokens in enumerate(batch.tokens.split(batch.lengths.tolist())):
        text = torch.cat([batch.prompt_tokens[int(batch.group[b])], tokens])
        states = model(text[None], output_hidden_states=True).hidden_states[-1][0, -len(tokens) :]
        torch.testing.assert_close(found[b], states.mean(0).detach(), rtol=1e-4, atol=1e-4)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"Teacher: weights must be one of initial.*got 'avarage'.*'average'"):
        Teacher("avarage")
    with pytest.raises(ValueError, match=r"Teacher: rate must be in \[0, 1\]; got 1.5"):
        Teacher("average", rate=1.5)
    with pytest.raises(ValueError, match=r"it has 60 tokens and the policy 64"):
        policy(teacher=tiny_models.model(vocab_size=60))
    with pytest.raises(ValueError, match=r"offload: second models must be whole"):
        second_models.of(tiny_models.model(), offload=True, cut=True, teacher=Teacher())
    actor = policy(adapted((*TARGETS, "lm_head")), teacher=Teacher("average"))
    with pytest.raises(ValueError, match=r"teacher: its head must be one matrix; it carries an adapter"):
        actor.update(batch_(), of_divergence("reverse_kl"))
    policy(adapted((*TARGETS, "lm_head")), teacher=Teacher()).update(batch_(), of_divergence("reverse_kl"))


CASES = {
    "average": (Teacher("average", 0.3), {}),
    "old": (Teacher("old"), {"epochs": 2, "minibatches": 2}),
    "current": (Teacher("current"), {}),
    "initial": (Teacher(), {"minibatches": 2}),
    "average adapters": (Teacher("average", 0.3), {"lora_rank": 2}),
    "initial adapters": (Teacher(), {"lora_rank": 2}),
    "mixed": (Teacher("mixed", 0.3), {}),
}
STEPS, RANKS = 4, 2


def distilled(real, teacher):
    """Recipes with a teacher, which reads the prompts of the batch backwards."""

    def recipe(config):
        made = real(config)

        def advantage(batch):
            found = batch.with_advantages(made.advantage(batch))
            return found.replace(teacher_prompts=[each.flip(0) for each in student_prompts(batch)])

        reads = () if teacher.weights == "mixed" else ("teacher_logprob",)
        loss = summed(clipped(), of_divergence("jensen_shannon", beta=0.3), 1.0)
        return dataclasses.replace(made, teacher=teacher, loss=loss, advantage=advantage, reads=reads)

    return recipe


def trained(folder, name, case, *, resume=False, **changes):
    """A run in folder/name; its rows on this rank, with all their digits."""
    (teacher, settings), kind, rows = CASES[case], Run if ranks.first() else Follower, []
    with pytest.MonkeyPatch.context() as patch:
        # In float64 no rounding of theirs becomes another token.
        patch.setattr(models, "load", lambda *_: (tiny_models.model(dtype=torch.float64), tiny_runs.Characters()))
        patch.setattr(catalogue, "recipe", distilled(catalogue.recipe, teacher))
        log = kind.log
        patch.setattr(kind, "log", lambda run, row: (rows.append(row), log(run, row)))
        patch.setattr(kind, "evaluated", lambda *_: None)
        settings = dict(reward="tiny_runs:shortness", steps=STEPS, eval_every=0, micro_tokens=24, groups=3) | settings
        asked = tiny_runs.config(folder, name, recipe="grpo", **{**settings, **changes})
        loop.train(asked, resume=folder / name if resume else None)
    return tiny_runs.numbers(rows)


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_is_as_one_that_never_stopped(case, tmp_path):
    whole = trained(tmp_path, "whole", case)
    parts = trained(tmp_path, "parts", case, steps=2)
    parts += trained(tmp_path, "parts", case, resume=True)
    assert parts == whole and len(whole) == STEPS and whole[-1]["distilled"] > 0


def on_each(folder):
    for shard in ("none", "full"):
        for case in CASES:
            rows = trained(folder, f"{case} {shard}", case, shard=shard)
            torch.save(rows, folder / f"{case} {shard} {ranks.rank()}.pt")


def test_figures_of_two_ranks_are_those_of_one(tmp_path):
    on_ranks(RANKS, on_each, tmp_path, seconds=150)
    for case in CASES:
        one = trained(tmp_path, case, case)
        for shard in ("none", "full"):
            for rank in range(RANKS):
                several = torch.load(tmp_path / f"{case} {shard} {rank}.pt")
                for expected, got in zip(one, several, strict=True):
                    assert got == pytest.approx(expected, rel=1e-6, abs=1e-6, nan_ok=True), (case, shard)


def test_the_user_names_a_teacher_and_a_recipe_without_one_reads_none(tmp_path, monkeypatch):
    asked = []

    def load(name, *_):
        asked.append(name)
        return tiny_models.model(), tiny_runs.Characters()

    monkeypatch.setattr(models, "load", load)
    config = tiny_runs.config(tmp_path, "run", recipe="grpo", teacher="folder").resolved()
    recipe = catalogue.recipe(config)
    assert "teacher" not in learners.of(config, recipe)[0].seconds and asked == [None]
    actor, _ = learners.of(config, dataclasses.replace(recipe, teacher=Teacher("average")))
    assert actor.seconds["teacher"].teacher is None and asked[1:] in (["folder", None], [None, "folder"])
