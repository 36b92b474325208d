"""sdpo: what the teacher is shown, who is taught, the family of losses with its options, and the test-time row."""

import copy
from types import SimpleNamespace

import pytest
import tiny_models
import tiny_runs
import torch
from batches import config, ragged, recipe
from test_second_models import adapted as with_adapters
from test_second_models import batch_, gradients, logits_of, policy

from fuserl.engine import adapters, hindsight, loop, rewards
from fuserl.engine.batch import Rollouts, offsets_of
from fuserl.engine.distilling import distilled, self_distilled, taught
from fuserl.engine.prompts import Prompt
from fuserl.engine.second_models import Teacher
from fuserl.engine.toys import feedback


def drawn(texts, prompts, each):
    return Rollouts(
        prompts=prompts,
        prompt_tokens=[torch.zeros(1, dtype=torch.int64)] * len(prompts),
        group=torch.arange(len(prompts)).repeat_interleave(each),
        tokens=torch.zeros(len(texts), dtype=torch.int64),
        offsets=offsets_of(torch.ones(len(texts), dtype=torch.int64)),
        rollout_logprobs=torch.zeros(len(texts)),
        texts=texts,
        finish=["stop"] * len(texts),
    )


def scored(completion, answer):
    return float(completion == answer)


def explained(completion, answer):
    return None if completion == answer else f"{completion} is not {answer}"


AGAIN = "Correctly solve the original question."


def test_a_sibling_and_feedback_are_shown_to_those_who_have_them():
    prompts = [Prompt("one", "1"), Prompt("two", "2"), Prompt("three", "3")]
    rollouts = drawn(["1", "x", "2", "2", "y", "z"], prompts, 2)
    made = hindsight.reprompted(scored, success=1.0, most=1000, skip_solved=False)
    good = torch.tensor([1.0, 0, 1, 1, 0, 0])
    texts, facts = made(rollouts, good)
    assert facts["taught"].tolist() == [0, 1, 1, 1, 0, 0]
    assert texts[0] == "one" and texts[4:] == ["three", "three"]
    assert texts[1] == f"Correct solution:\n1\n\n{AGAIN}\n\none"
    assert (
        hindsight.reprompted(scored, success=1.0, most=9, skip_solved=False)(rollouts, good)[0][1] == "Correct s\n\none"
    )
    strict = hindsight.reprompted(scored, success=1.0, most=1000, skip_solved=True)(rollouts, good)[1]
    assert strict["taught"].tolist() == [0, 1, 0, 0, 0, 0]
    scored.feedback = explained
    try:
        with rewards.Scorer(scored) as scorer:
            shown = hindsight.Shown(scorer, hindsight.reprompted(scorer, success=1.0, most=1000, skip_solved=False))
            found, facts = shown(rollouts)
    finally:
        del scored.feedback
    assert torch.equal(found, good) and facts["taught"].tolist() == [0, 1, 1, 1, 1, 1] and facts["timeouts"] == 0
    assert facts["teacher_prompts"][4] == f"Feedback on an earlier attempt:\ny is not 3\n\n{AGAIN}\n\nthree"
    assert "Correct solution:\n1\n\nFeedback on an earlier attempt:\nx is not 1" in facts["teacher_prompts"][1]


def test_notes_stand_behind_the_question_of_a_chat():
    talk = Prompt("<user>How many?<end><assistant>", metadata={"question": "How many?"})
    assert hindsight.informed(talk, "N") == "<user>How many?\n\nN<end><assistant>"
    plain = Prompt("3 + 4 = 7\n5 - 9 =", metadata={"question": "5 - 9 ="})
    assert hindsight.informed(plain, "N") == "N\n\n3 + 4 = 7\n5 - 9 ="


def test_a_mean_is_one_over_the_taught_tokens():
    batch = ragged((3, 1, 5, 2), (0, 0, 1, 1)).replace(
        facts={"taught": torch.tensor([1.0, 0, 0, 1])}, old_logprobs=None
    )
    batch = batch.replace(advantages=taught(batch))
    each = torch.arange(11.0)
    out = SimpleNamespace(logprob=batch.rollout_logprobs, forward_kl=each)
    loss = self_distilled(0.0)
    assert float(loss(out, batch)[0].sum()) == pytest.approx(float(each[[0, 1, 2, 9, 10]].mean()))
    assert loss.live(batch).tolist() == [True] * 3 + [False] * 6 + [True] * 2
    none = batch.replace(facts={"taught": torch.zeros(4)})
    assert not taught(none).any()


def test_the_ratio_is_clipped_and_has_no_gradient():
    batch = ragged((3, 2), (0, 0)).replace(advantages=torch.ones(5))
    logprob = (batch.old_logprobs + torch.tensor([0.1, 50.0, -50.0, 1.0, 0.0])).requires_grad_()
    out = SimpleNamespace(logprob=logprob, forward_kl=torch.ones(5))
    found = self_distilled(0.0, is_clip=2.0)(out, batch)[0] * 5
    expected = torch.tensor([0.1, 50, -50, 1, 0]).clamp(-20, 20).exp().clamp(max=2)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert not found.requires_grad


OPTIONS = [
    ({}, ("logprob", "forward_kl"), None),
    ({"alpha": 1.0}, ("logprob", "reverse_kl"), None),
    ({"alpha": 0.3}, ("logprob", "jensen_shannon"), {"beta": 0.3}),
    ({"alpha": 0.5, "topk": 4, "tail": False}, ("logprob", "listed"), None),
    ({"alpha": 1.0, "sampled_form": True}, ("logprob", "teacher_logprob"), None),
]


@pytest.mark.parametrize(("options", "outputs", "numbers"), OPTIONS)
def test_options_reach_the_loss(options, outputs, numbers, tmp_path):
    made = recipe(tmp_path, "sdpo", **options)
    assert made.loss.outputs == outputs and made.loss.divergence == numbers
    assert made.teacher == Teacher("average", 0.05)
    other = recipe(tmp_path, "sdpo", self_teacher="mixed", rate=0.2)
    assert other.teacher == Teacher("mixed", 0.2) and config(tmp_path, "sdpo").group_size == 8


@pytest.mark.parametrize(
    "wrong",
    [
        {"alpha": 1.5},
        {"sampled_form": True},
        {"self_teacher": "best"},
        {"topk": -1},
        {"is_clip": 0.0},
        {"reprompt_tokens": 0},
    ],
)
def test_bad_options_are_refused(wrong, tmp_path):
    with pytest.raises(ValueError, match="must be"):
        recipe(tmp_path, "sdpo", **wrong)


@pytest.mark.parametrize("adapted", [False, True])
def test_mixed_logits_are_a_mix_exactly(adapted):
    actor = policy(with_adapters() if adapted else tiny_models.model(), teacher=Teacher("mixed", 0.3))
    batch = batch_(taught=True)
    initial = tiny_models.model()
    actor.update(batch, distilled("forward_kl"))  # moves the policy away from where it started
    now = copy.deepcopy(adapters.base(actor.model))
    with torch.no_grad():
        first, second = (logits_of(each, batch.teacher_prompts, batch) for each in (initial, copy.deepcopy(now)))
        mix = (0.7 * first + 0.3 * second).log_softmax(-1)
        own = [batch.prompt_tokens[group] for group in batch.group.tolist()]
        z = logits_of(copy.deepcopy(now), own, batch).log_softmax(-1)
        expected = (mix.exp() * (mix - z)).sum(-1).mean()
    _, row = gradients(actor, batch, distilled("forward_kl"))
    assert row["distilled"] == pytest.approx(float(expected), rel=1e-4)
    with pytest.raises(ValueError, match="mixed logits must be read by divergences"):
        actor.score(batch, ["teacher_logprob"])
    with pytest.raises(ValueError, match="mixed logits must not be capped"):
        policy(tiny_models.model("gemma2"), teacher=Teacher("mixed")).update(batch, distilled("forward_kl"))


def run(folder, name, **options):
    settings = dict(reward="tiny_runs:shortness", steps=2, eval_every=0, group_size=4) | options
    return [row for row in tiny_runs.numbers(tiny_runs.run(folder, name, recipe="sdpo", **settings)) if "taught" in row]


FORMS = [*(each[0] for each in OPTIONS), {"self_teacher": "mixed"}, {"is_clip": 2.0, "epochs": 2}]


@pytest.mark.parametrize("options", FORMS)
def test_a_step_of_every_form(options, tmp_path, monkeypatch):
    tiny_runs.use(monkeypatch)
    taught = [row for row in run(tmp_path, "run", **options) if row["taught"] > 0]
    assert taught and all(row["grad_norm"] > 0 for row in taught)


def test_one_question_is_asked_until_it_is_solved_and_a_resumed_run_knows(tmp_path, monkeypatch):
    tiny_runs.use(monkeypatch)
    settings = dict(recipe="sdpo", reward="tiny_runs:shortness", question=3, eval_every=0, save_every=1, group_size=4)
    rows = tiny_runs.run(tmp_path, "whole", steps=4, **settings)
    attempts = [row["attempts"] for row in rows if "attempts" in row]
    solved = [row["discovered"] for row in rows if "attempts" in row]
    assert len(attempts) == 4 and solved == sorted(solved) and attempts == sorted(attempts) and attempts[0] <= 4
    tiny_runs.run(tmp_path, "parts", steps=2, **settings)
    folder = loop.train(tiny_runs.config(tmp_path, "parts", steps=4, **settings), resume=tmp_path / "parts")
    assert [row["attempts"] for row in tiny_runs.rows(folder) if "attempts" in row] == attempts
    found = hindsight.Discovery(lambda rollouts, scored: ([], {}), 1.0)
    asked = drawn(["a", "b", "c"], [Prompt("q")], 3)
    assert found(asked, torch.tensor([0.0, 0, 0]))[1] == {"attempts": 3, "discovered": 0.0}
    assert found(asked, torch.tensor([0.0, 1, 1]))[1] == {"attempts": 5, "discovered": 1.0}
    assert found(asked, torch.tensor([0.0, 0, 0]))[1] == {"attempts": 5, "discovered": 1.0}


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_other_ends_of_the_family_learn_the_toy(alpha):
    assert feedback.learnt(0, taught, self_distilled(alpha)) > 0.5
