"""vla_opd: every form's gradient in its limit, what the teacher reads, and options that reach the loss."""

import dataclasses
from types import SimpleNamespace

import pytest
import tiny_models
import tiny_runs
import torch
from batches import config, gradient, ragged, recipe, rollouts

from fuserl.engine import distilling, hindsight, loop, models, policy, prompts
from fuserl.engine.config import Config
from fuserl.engine.prompts import Prompt
from fuserl.engine.second_models import Teacher
from fuserl.engine.toys import carrying, tied

FORMS = ("opd", "reverse_kl", "forward_kl", "hard_ce", "ppo", "reinforce")


def scored(**changes):
    """A batch with a teacher's log-probs, on-policy."""
    batch = ragged((3, 1, 5, 2), (0, 1, 0, 1))
    random = torch.Generator().manual_seed(4)
    extra = {"teacher_logprob": -torch.rand(11, generator=random).double()}
    double = {name: getattr(batch, name).double() for name in ("rewards", "rollout_logprobs")}
    return batch.replace(**double, ref_logprobs=None, old_logprobs=double["rollout_logprobs"], extra=extra, **changes)


def test_the_gradient_is_the_gap_raw_whatever_the_rewards(tmp_path):
    batch, opd = scored(), recipe(tmp_path, "vla_opd")
    gap = batch.extra["teacher_logprob"] - batch.old_logprobs
    assert torch.allclose(gradient(opd, batch, batch.old_logprobs), -gap / 11, rtol=1e-15, atol=0)
    other = batch.replace(rewards=torch.zeros(4, dtype=torch.float64))
    assert torch.equal(gradient(opd, other, batch.old_logprobs), gradient(opd, batch, batch.old_logprobs))
    assert opd.reads == ("old_logprobs", "teacher_logprob") and opd.teacher == Teacher()


@pytest.mark.parametrize("form", ["ppo", "reinforce"])
def test_forms_agree_where_nothing_has_moved_and_differ_where_it_has(form, tmp_path):
    batch, opd, other = scored(), recipe(tmp_path, "vla_opd"), recipe(tmp_path, "vla_opd", form=form)
    given = {"teacher_logprob": batch.extra["teacher_logprob"]} if form == "reinforce" else {}
    expected = gradient(opd, batch, batch.old_logprobs)
    assert torch.allclose(gradient(other, batch, batch.old_logprobs, **given), expected, rtol=1e-15, atol=0)
    moved = batch.old_logprobs + 0.5
    got, gap = gradient(other, batch, moved, **given), batch.extra["teacher_logprob"] - batch.old_logprobs
    if form == "ppo":
        ratio = torch.where(gap > 0, 0.0, torch.tensor(0.5).double().exp())  # beyond 1.2 nothing more is gained
        assert torch.allclose(got, -gap * ratio / 11, rtol=1e-12)
    else:
        assert torch.allclose(got, -(gap - 0.5) / 11, rtol=1e-12)


def test_options_reach_the_loss(tmp_path):
    batch = scored()
    gap = batch.extra["teacher_logprob"] - batch.old_logprobs
    weighed = recipe(tmp_path, "vla_opd", weigh_lengths=True, max_new_tokens=5)
    expected = -gap * batch.lengths[batch.rollout] / 5 / 11
    assert torch.allclose(gradient(weighed, batch, batch.old_logprobs), expected, rtol=1e-15)
    ppo = recipe(tmp_path, "vla_opd", form="ppo", low=0.1, high=0.7)
    got = gradient(ppo, batch, batch.old_logprobs + 0.5)
    assert (got[gap > 0] != 0).all()  # 1.65 is within 1.7
    down = gradient(ppo, batch, batch.old_logprobs - 0.15)  # 0.86 is below 0.9
    assert (down[gap < 0] == 0).all() and (down[gap > 0] != 0).all()
    for form in ("reverse_kl", "forward_kl"):
        made = recipe(tmp_path, "vla_opd", form=form)
        out = SimpleNamespace(logprob=batch.old_logprobs, **{form: torch.arange(11.0).double()})
        assert torch.allclose(made.loss(out, batch)[0], torch.arange(11.0).double() / 11) and made.reads == ()
    hard = recipe(tmp_path, "vla_opd", form="hard_ce").loss
    out = SimpleNamespace(logprob=batch.old_logprobs, likelihood_of_best=-torch.arange(11.0).double())
    assert torch.allclose(hard(out, batch)[0], torch.arange(11.0).double() / 11)
    with pytest.raises(ValueError, match="form must be one of opd, reverse_kl"):
        recipe(tmp_path, "vla_opd", form="kl")


def test_the_teacher_reads_the_question_solved_unless_it_is_the_users(tmp_path):
    ours, theirs = recipe(tmp_path, "vla_opd"), recipe(tmp_path, "vla_opd", teacher="folder")
    assert isinstance(ours.reward, hindsight.Shown) and not isinstance(theirs.reward, hindsight.Shown)
    asked = dataclasses.replace(rollouts(), prompts=[Prompt("1 + 1 =", "2"), Prompt("b")])
    rewards, facts = hindsight.Shown(lambda given: (torch.ones(3), {"n": 1}), hindsight.answered)(asked)
    solved = "1 + 1 = 2\n1 + 1 ="
    assert facts == {"n": 1, "teacher_prompts": [solved, solved, "b"]} and rewards.tolist() == [1, 1, 1]


@pytest.mark.parametrize("form", FORMS)
def test_a_step_of_every_form(form, tmp_path, monkeypatch):
    tiny_runs.use(monkeypatch)
    settings = dict(recipe="vla_opd", form=form, reward="tiny_runs:shortness", steps=2, eval_every=0)
    assert all(row["grad_norm"] > 0 for row in tiny_runs.run(tmp_path, "run", **settings) if "loss" in row)


def test_a_users_teacher_is_approached(tmp_path, monkeypatch):
    """From the same weights another model's distribution comes nearer."""
    other = tiny_models.model()
    for parameter in other.parameters():
        parameter.data.mul_(0.8)
    load = {None: tiny_models.model, "folder": lambda: other}
    monkeypatch.setattr(models, "load", lambda name, *_: (load[name](), tiny_runs.Characters()))
    asked = tiny_runs.config(
        tmp_path, "run", recipe="vla_opd", form="reverse_kl", teacher="folder", reward="tiny_runs:shortness", steps=8,
        eval_every=0, group_size=8,
    )  # fmt: skip
    rows = [row["distilled"] for row in tiny_runs.rows(loop.train(asked)) if "distilled" in row]
    assert rows[-1] < 0.9 * rows[0]


@pytest.mark.parametrize("teacher", [None, "folder"])
def test_a_grid_is_played_and_the_moves_alone_are_taught(teacher, tmp_path, monkeypatch):
    """What is credited are drawn tokens, each with the teacher's gap, as both models read plainly say."""
    other = tiny_models.model()
    for parameter in other.parameters():
        parameter.data.mul_(0.8)
    load = {None: tiny_models.model, "folder": lambda: other}
    monkeypatch.setattr(models, "load", lambda name, *_: (load[name](), tiny_runs.Characters()))
    batches, update = [], policy.Policy.update
    seen = lambda self, batch, *given, **named: batches.append(batch) or update(self, batch, *given, **named)  # noqa: E731
    monkeypatch.setattr(policy.Policy, "update", seen)
    asked = dict(
        tiny_runs.SETTINGS, recipe="vla_opd", task="grid:size=3,slips=0,most=3", teacher=teacher, steps=1, eval_every=0,
        max_new_tokens=60, eval_problems=3, stop=tuple("+-= \n"), out=str(tmp_path / "run"),
    )  # fmt: skip
    rows = tiny_runs.rows(loop.train(Config.from_dict(asked)))
    assert rows[0]["problems"] == 3 and "accuracy" in rows[-1]
    [batch] = batches
    assert any(len(chunk) > length for [chunk], length in zip(batch.completions, batch.lengths, strict=True))
    at = batch.offsets.tolist()
    for b, [tokens] in enumerate(batch.completions):
        asked, own = batch.prompt_tokens[int(batch.group[b])], slice(at[b], at[b + 1])
        shown = asked if teacher else batch.teacher_prompts[b]
        gap = plain(other if teacher else tiny_models.model(), shown, tokens) - plain(
            tiny_models.model(), asked, tokens
        )
        torch.testing.assert_close(batch.advantages[own], gap[batch.place[own]], atol=1e-4, rtol=1e-4)


def test_held_out_grids_are_played_too(tmp_path):
    made = recipe(tmp_path, "vla_opd", data=None, task="grid:slips=0", eval_problems=2, few_shot=0)
    held = prompts.task("grid:slips=0", shots=0, held_out=2).held_out()

    def generate(asked, *, reply=None, **drawing):
        """One who knows the way, and who is lost when nobody tells where it is."""
        texts = [each.answer if reply(each, "grip\n").startswith("you") else "" for each in asked]
        return dataclasses.replace(rollouts(), prompts=asked, group=torch.arange(2), texts=texts, finish=["stop"] * 2)

    found = loop.evaluated(SimpleNamespace(generate=generate, sync=lambda: None), made, held, 0)
    assert found["accuracy"] == 1.0 and found["problems"] == 2


@torch.no_grad()
def plain(model, prompt, tokens):
    """Log-probs (n,) of tokens behind a prompt, from one ordinary forward."""
    logits = model(torch.cat([prompt, tokens])[None]).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]


@pytest.mark.slow
def test_ten_arms():
    """The grid with twice the seeds of `show`."""
    assert all(figure.holds for figure in carrying.figures(distilling.gap, distilling.on_policy("opd"), seeds=10))


def test_figures_of_the_toys_can_fail():
    """A teacher's gap of the wrong sign is seen by the identity and on the grid."""
    wrong = lambda batch: -distilling.gap(batch)  # noqa: E731
    assert not all(figure.holds for figure in tied.identity(wrong, distilling.on_policy, draws=100))
    assert not carrying.figures(wrong, distilling.on_policy("opd"), seeds=1)[0].holds


def test_a_resolved_configuration_has_the_papers_numbers(tmp_path):
    asked = config(tmp_path, "vla_opd")
    assert asked.group_size == 8 and asked.lr == 5e-6
