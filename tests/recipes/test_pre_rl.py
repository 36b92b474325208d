"""pre_rl: completions behind no prompt, the phases and what each loss sees, the reference's renewal, its metrics."""

import dataclasses
import types

import pytest
import tiny_models
import tiny_runs
import torch
from batches import config, made, ragged, recipe
from tiny_runs import numbers

from fuserl.engine import checks, loop, openings, probes, reflections
from fuserl.engine.advantages import centred, standardized
from fuserl.engine.losses import clipped, token_mean
from fuserl.engine.mixtures import joined, woven
from fuserl.engine.policy import Policy, Sampling, Updating
from fuserl.engine.second_models import SecondModel, Teacher

SHORT = "tiny_runs:shortness"


def batch(step=1, rewards=(1.0, 0, 0, 1, 0, 0)):
    made = ragged((3, 1, 5, 2, 4, 1), (0, 0, 0, 1, 1, 1), (2, 3))
    opening = torch.full((6, 1), 1)
    return made.replace(rewards=torch.tensor(rewards), old_logprobs=None, step=step, facts={"opening": opening})


def test_a_completion_behind_no_prompt_is_read_from_position_0():
    opened = openings.without_prompts(batch(), 7)
    packed = opened.packed()
    model = tiny_models.model().double()
    policy = Policy(model, None, Sampling(), Updating())
    tokens = opened.replace(tokens=opened.tokens + 10)
    scored = policy.score(tokens, ["old_logprobs"]).old_logprobs
    for b in range(6):
        rows = slice(int(opened.offsets[b]), int(opened.offsets[b + 1]))
        text = torch.cat([torch.tensor([7]), tokens.tokens[rows]])
        alone = model(text[None]).logits[0, :-1].log_softmax(-1).gather(-1, text[1:, None]).squeeze(-1)
        torch.testing.assert_close(scored[rows].double(), alone.detach(), rtol=1e-5, atol=1e-5)
    assert int(packed.position_ids.max()) == 4 and opened.rollout_logprobs.isnan().all()


@pytest.mark.parametrize(
    ("options", "step", "seen"),
    [
        ({}, 20, [[], [1, 2, 4, 5]]),
        ({}, 21, [[0, 1, 2, 3, 4, 5], []]),
        ({"switch": 0}, 1, [[0, 1, 2, 3, 4, 5], []]),
        ({"pre_samples": "positive"}, 1, [[], [0, 3]]),
        ({"pre_samples": "both", "switch": 2}, 2, [[], [0, 1, 2, 3, 4, 5]]),
        ({"pre_samples": "none"}, 1, [[], []]),
        ({"rl_samples": "negative"}, 21, [[1, 2, 4, 5], []]),
        ({"rl_samples": "positive"}, 21, [[0, 3], []]),
        ({"mixed": True, "rl_samples": "positive"}, 1, [[0, 3], [1, 2, 4, 5]]),
    ],
)
def test_each_loss_sees_its_rollouts_in_its_steps(options, step, seen, tmp_path):
    pre, given = recipe(tmp_path, "pre_rl", **options), batch(step)
    found = pre.advantage(given)
    assert [each.counts.rollouts for each in found.objectives] == [len(each) for each in seen]
    tokens = [[t for b in each for t in range(*given.offsets[b : b + 2].tolist())] for each in seen]
    assert [found.tokens[found.objective == k].tolist() for k in (0, 1)] == tokens
    for k, credit in enumerate((standardized, centred)):
        expected = given.to_tokens(credit(given))[tokens[k]] if tokens[k] else torch.zeros(0)
        assert torch.equal(found.advantages[found.objective == k], expected)
    for group in found.group.unique().tolist():
        free = bool((found.objective == 1)[found.group[found.rollout] == group].all())
        assert (found.prompt_tokens[group].tolist() == [1]) == free


def test_fixed_advantages_keep_groups_without_a_right_answer(tmp_path):
    wrong = batch(rewards=(0.0, 0, 0, 1, 0, 0))
    plain, fixed = (recipe(tmp_path, "pre_rl", fixed=fixed).advantage(wrong) for fixed in (False, True))
    assert plain.counts.rollouts == 2 and fixed.counts.rollouts == 5 and (fixed.advantages == -1).all()


def test_losses_are_scaled_clipped_and_held(tmp_path):
    options = dict(mixed=True, weight=0.5, low=0.1, high=0.3, dual=4.0, beta=0.2)
    pre = recipe(tmp_path, "pre_rl", **options)
    seen = pre.advantage(batch())
    random = torch.Generator().manual_seed(0)
    old = torch.rand(len(seen.tokens), generator=random) - 2
    now = old + 0.8 * torch.randn(len(old), generator=random)
    seen = seen.replace(old_logprobs=old, rollout_logprobs=now, ref_logprobs=old - 0.3)
    alone = clipped(low=0.1, high=0.3, dual=4.0, beta=0.2, reduce=token_mean), clipped(low=0.1, high=0.3, dual=4.0)
    got, held = checks.gradient(seen, pre.loss), token_mean
    for k, scale in ((0, 1.0), (1, 0.5)):
        rows, part = seen.seen_by(k)
        loss = alone[0] if k == 0 else clipped(low=0.1, high=0.3, dual=4.0, reduce=held)
        assert torch.allclose(got[rows], scale * checks.gradient(part, loss)) and got[rows].any()
    with pytest.raises(ValueError, match=r"pre_samples must be one of .*; got 'wrong'"):
        recipe(tmp_path, "pre_rl", pre_samples="wrong")
    with pytest.raises(ValueError, match="weight must be a finite number"):
        recipe(tmp_path, "pre_rl", weight=-1.0)
    with pytest.raises(ValueError, match="probe must have the model to itself"):
        recipe(tmp_path, "pre_rl", probe=True, overlap=True)


def test_minibatches_of_a_mixture_have_their_share_of_each():
    first, second = ragged((3, 1, 5, 2), (0, 1, 2, 3)), ragged((2, 4), (0, 1), (9, 8))
    whole = joined(first, second)
    parts = woven(whole).minibatches(2)
    assert [[each.counts.rollouts for each in part.objectives] for part in parts] == [[2, 1], [2, 1]]
    together = torch.cat([part.tokens for part in parts])
    assert sorted(together.tolist()) == sorted(whole.tokens.tolist())
    again = woven(whole)
    for b in range(6):
        assert torch.equal(again.prompt_tokens[again.group[b]], whole.prompt_tokens[whole.group[b]])


def test_the_token_that_opens_a_text():
    def tokenizer(**known):
        vocabulary = known.pop("vocabulary", {})
        spoken = lambda text, add_special_tokens: types.SimpleNamespace(input_ids=[ord(x) for x in text])  # noqa: E731
        kind = type("Spoken", (), {"__call__": lambda self, *given, **options: spoken(*given, **options)})
        made = kind()
        made.__dict__.update({"bos_token_id": None, "eos_token_id": None, "get_vocab": lambda: vocabulary, **known})
        return made

    assert openings.token(tokenizer(bos_token_id=5, eos_token_id=6)) == 5
    assert openings.token(tokenizer(eos_token_id=6, vocabulary={"<|im_start|>": 9})) == 9
    assert openings.token(tokenizer(eos_token_id=6)) == 6
    assert openings.token(tokenizer(bos_token_id=5), "A") == 65
    with pytest.raises(ValueError, match="must be one token; 'AB' is 2"):
        openings.token(tokenizer(bos_token_id=5), "AB")
    with pytest.raises(ValueError, match="must have a token that opens texts"):
        openings.token(tokenizer())


def test_words_are_counted_and_compared_with_the_first():
    count = lambda words, *texts: words(None, types.SimpleNamespace(texts=texts))  # noqa: E731
    words = reflections.Reflections()
    first = count(words, "But wait. I check.", "button", "However, re-evaluate and verify it")
    assert first["transitions"].tolist() == [2, 0, 1] and first["reflections"].tolist() == [1, 0, 2]
    again = reflections.Reflections()
    again.load_state_dict(words.state_dict())
    assert count(again, "but but")["transitions_growth"].tolist() == [2]
    assert "transitions_growth" not in again.state_dict()
    nothing = reflections.Reflections()
    assert {*count(nothing, "x")} == {"transitions", "reflections"}
    assert "reflections_growth" not in count(nothing, "check")


def test_a_reference_is_renewed_once():
    policy = tiny_models.model()
    second = SecondModel(policy, Teacher(renewed=2))
    seen, weight = [], lambda model: float(model.lm_head.weight[0, 0])
    states = []
    for update in range(4):
        second.begin()
        with second.reading() as model:
            seen.append(weight(model))
        states.append({name: torch.as_tensor(x).clone() for name, x in second.state_dict().items()})
        policy.lm_head.weight.data[0, 0] = 100.0 + update
        second.end()
    start = seen[0]
    assert seen == [start, start, 101.0, 101.0] and start != 101.0
    for at, state in enumerate(states):  # a run that is resumed goes on alike, whatever its weights are now
        other = SecondModel(tiny_models.model(), Teacher(renewed=2))
        other.load_state_dict(state)
        with other.reading() as model:
            assert weight(model) == seen[at]
        other.begin()  # the third update's is the one that renews, from the weights of another policy here
        with other.reading() as model:
            assert weight(model) == (101.0 if at >= 2 else start)
    with pytest.raises(ValueError, match="renewed must be a number of updates"):
        Teacher("old", renewed=1)


def test_the_recipe_asks_for_the_renewal(tmp_path):
    assert recipe(tmp_path, "pre_rl", switch=7).reference == Teacher(renewed=7)
    assert recipe(tmp_path, "pre_rl", mixed=True).reference == Teacher()


def test_gradients_are_compared_without_a_step():
    model = tiny_models.model()
    policy = Policy(model, None, Sampling(), Updating())
    before = {name: value.clone() for name, value in policy.parameters().items()}
    given = ragged((3, 2, 4), (0, 0, 1), (2, 3)).replace(old_logprobs=None, advantages=torch.linspace(-1, 2, 9))
    given = given.replace(tokens=given.tokens + 5, prompt_tokens=[torch.tensor([3, 4]), torch.tensor([5, 6, 7])])
    loss = clipped(reduce=token_mean)
    found, value = probes.gradient(policy, given, loss)
    assert all(torch.equal(before[name], x) and x.grad is None for name, x in policy.parameters().items())
    assert policy.optimizer.count == 0
    logits = model(torch.tensor([[3, 4, *given.tokens[:3]]])).logits  # the head's gradient is there, and not of it all
    assert logits.requires_grad and found["lm_head.weight"].any()
    opposite = given.replace(advantages=-given.advantages)
    assert probes.alignment(policy, (given, loss), (given, loss)) == pytest.approx(
        {"gradient_cosine": 1.0, "loss_ratio": 1.0}
    )
    against = probes.alignment(policy, (given, loss), (opposite, loss))
    assert against == pytest.approx({"gradient_cosine": -1.0, "loss_ratio": -1.0}) and value
    nothing = given.replace(advantages=torch.zeros(9))
    assert probes.alignment(policy, (given, loss), (nothing, loss)) == {}
    drawn = dataclasses.replace(made(["a"], torch.zeros(1, dtype=torch.int64), ["b"]), scores=(torch.ones(1), {"n": 1}))
    twice = given.with_advantages(2 * given.advantages)
    slot = probes.aligned(lambda *_: drawn, lambda batch: (given, twice), loss)
    rewards, facts = slot(policy, []).scores
    assert rewards.tolist() == [1] and facts == pytest.approx({"n": 1, "gradient_cosine": 1.0, "loss_ratio": 2.0})


@pytest.fixture
def tiny(monkeypatch):
    tiny_runs.use(monkeypatch)


def run(folder, name, **changes):
    return tiny_runs.run(folder, name, recipe="pre_rl", reward=SHORT, **changes)


def test_after_the_switch_a_run_is_grpo_bit_for_bit(tmp_path, tiny):
    """With rollouts of one length GRPO's mean over rollouts of their means is that over tokens."""
    ours = numbers(run(tmp_path, "ours", switch=0, minibatches=2, dual=None, top_k=3))
    theirs = tiny_runs.run(tmp_path, "theirs", recipe="grpo", reward=SHORT, minibatches=2, top_k=3)
    assert all(row["length"] == 4 for row in ours if "length" in row)
    words = ("transitions", "reflections")
    ours = [{name: value for name, value in row.items() if name not in words} for row in ours]
    assert ours == numbers(theirs)


@pytest.mark.parametrize(
    "options",
    [
        {"switch": 2, "probe": True, "minibatches": 2, "epochs": 2},
        {"mixed": True, "minibatches": 2},
        {"switch": 1, "beta": 0.1},
        {"fixed": True, "pre_samples": "both", "bos": "="},
    ],
)
def test_a_run_takes_its_options(tmp_path, tiny, options):
    plain, rows = numbers(run(tmp_path, "plain")), numbers(run(tmp_path, "run", **options))
    assert rows != plain
    steps = [row for row in rows if "tokens" in row]
    assert all(row["grad_norm"] > 0 for row in steps)
    if options.get("probe"):
        assert all(-1 <= row["gradient_cosine"] <= 1 and "loss_ratio" in row for row in steps)
    assert all("opening" not in row and "transitions" in row for row in steps)


def test_a_run_without_what_it_may_learn_from_stays_where_it_is(tmp_path, tiny):
    rows = tiny_runs.run(tmp_path, "run", recipe="pre_rl", reward="tiny_runs:constant", minibatches=2)
    assert [row["loss"] for row in rows if "loss" in row] == [] and all(row.get("live", 0) == 0 for row in rows)


def test_a_stopped_run_goes_on_as_if_it_had_not(tmp_path, tiny):
    options = dict(recipe="pre_rl", reward=SHORT, switch=2, beta=0.1, lora_rank=2, save_every=1, keep=9)
    whole = numbers(tiny_runs.run(tmp_path, "whole", steps=5, **options))
    folder = loop.train(tiny_runs.config(tmp_path, "parts", steps=3, **options))
    settings = dataclasses.replace(tiny_runs.config(tmp_path, "parts", steps=5, **options))
    parts = numbers(tiny_runs.rows(loop.train(settings, resume=folder)))
    strip = lambda rows: [row for row in rows if "tokens" in row]  # noqa: E731
    assert strip(parts) == strip(whole)


def test_settings_reach_the_rollouts(tmp_path):
    settings = config(tmp_path, "pre_rl", groups=2, group_size=3)

    class Drawing:
        tokenizer = types.SimpleNamespace(bos_token_id=4)

        def generate(self, asked, *, group_size):
            assert group_size == settings.group_size
            return made(["a"], torch.zeros(1, dtype=torch.int64), ["wait"])

    found = recipe(tmp_path, "pre_rl", groups=2, group_size=3).rollout(Drawing(), [])
    assert found.facts["opening"].tolist() == [[4]] and found.facts["transitions"].tolist() == [1]
