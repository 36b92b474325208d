"""cgpo: judged completions of several tasks, each learnt in its own way; codpo's limit is DPO."""

from types import SimpleNamespace

import pytest
import tiny_runs
import torch
from batches import config, recipe

from fuserl.engine import checks, constrained, mixtures
from fuserl.engine.batch import batch_of
from fuserl.engine.judge_mixtures import WARM_UP
from fuserl.engine.preferences import preference
from fuserl.engine.recipes import cgpo
from fuserl.engine.toys import cgpo as toy

SUMS, GCD = "reasoning_gym:chain_sum:max_terms=2,max_digits=1", "reasoning_gym:gcd"
TWO = dict(data=None, task=f"{SUMS} + {GCD}", reward=None, groups=4, few_shot=0)


@pytest.fixture
def built(tmp_path):
    made = []

    def make(**options):
        made.append(recipe(tmp_path, "cgpo", **options))
        return made[-1]

    yield make
    for each in made:
        each.rollout.close()


def test_codpo_without_its_second_term_is_dpo():
    """The limit, exactly: K = 2, one passes and one does not, lam = 0."""
    batch = toy.small((1.0, 0.0, 0.0, 1.0))
    pairs = batch.replace(rewards=batch.facts["passes"])
    ours, dpo = (
        checks.gradient(each, loss)
        for each, loss in (
            (constrained.codpo(batch), constrained.preferred(0.1, 0.0)),
            (pairs, preference(beta=0.1)),
        )
    )
    # Pairs are laid with the chosen one first; here the second prompt's is the other way round.
    first, second, third, fourth = dpo.split(batch.offsets.diff().tolist())
    assert torch.equal(ours, torch.cat([first, second, fourth, third]))


def test_each_task_has_settings_of_its_own(built, monkeypatch):
    seen = {}
    real = constrained.several
    monkeypatch.setattr(
        cgpo, "several", lambda strategies, **how: seen.update(s=strategies, **how) or real(strategies, **how)
    )
    ours = built(**TWO, optimizer="crpg,codpo", kl_max="2, 9", weights="1,0.5", k="2,3", beta=0.3, lam=0.2)
    first, second = seen["s"]
    assert (first.optimizer, first.kl_max, first.weight) == ("crpg", 2, 1)
    assert (second.optimizer, second.kl_max, second.weight) == ("codpo", 9, 0.5)
    assert (seen["beta"], seen["lam"]) == (0.3, 0.2) and ours.loss.scope == "group"
    built(**{**TWO, "task": f"3 {SUMS} + {GCD}"}, weights="data")
    assert [each.weight for each in seen["s"]] == [0.75, 0.25]
    assert [each.kl_max for each in seen["s"]] == [5, 5]


def test_each_task_may_have_its_reward_model(built, monkeypatch):
    given = []
    real = cgpo.Constrained
    monkeypatch.setattr(cgpo, "Constrained", lambda *args: given.append(args[-1]) or real(*args))
    built(**TWO, reward_models=",tiny_runs:shortness")
    built(**TWO, reward_model="tiny_runs:constant")
    assert given == [["", "tiny_runs:shortness"], ["tiny_runs:constant"] * 2]


def test_first_steps_are_on_pairs(built):
    ours = built(**TWO, dpo_steps=2)
    stages = [{prompt.metadata.get("stage") for prompt in ours.prompts(step)} for step in (1, 2, 3)]
    assert stages == [{WARM_UP}, {WARM_UP}, {None}]
    plain = built(**TWO)
    assert [each.text for each in ours.prompts(1)] == [each.text for each in plain.prompts(1)]


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("optimizer", "ppo", "optimizer must be one of"),
        ("judges", "answer+taste", "judges must be one of"),
        ("k", "2,3,4", "one, or one for each"),
        ("kl_max", "0", "numbers > 0"),
        ("weights", "all", "weights must be numbers"),
        ("weights", "inf", "weights must be finite numbers > 0"),
        ("beta", 0.0, "beta must be"),
        ("dpo_steps", -1, "dpo_steps must be"),
        ("reward_models", "a,b", "one, or one for each"),
        ("lam", -1.0, "lam must be"),
        ("judges", "safety", "must have a model to ask for safety"),
    ],
)
def test_what_cannot_be_is_refused(option, value, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        recipe(tmp_path, "cgpo", **{option: value})


def test_paper_settings(tmp_path):
    found = config(tmp_path, "cgpo")
    assert found.group_size == 4 and found.options["kl_max"] == "5" and found.options["beta"] == 0.1


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "crpg"},
        {"optimizer": "codpo", "lam": 0.5},
        {"optimizer": "crraft"},
        {"dpo_steps": 1, "kl_max": "1"},
        {"task": 2, "optimizer": "crpg,codpo", "k": "2,3", "minibatches": 2},
    ],
)
def test_runs(tmp_path, monkeypatch, options):
    tiny_runs.use(monkeypatch)
    options = dict(options)
    if options.pop("task", None):
        two = [tmp_path / "one", tmp_path / "two"]
        for folder in two:
            folder.mkdir()
        options["data"] = " + ".join(map(tiny_runs.problems, two))
    given = dict(recipe="cgpo", reward="tiny_runs:shortness", steps=2, max_new_tokens=6)
    config_of = tiny_runs.config(tmp_path, "run", **given).replace(**options)
    rows = tiny_runs.rows(tiny_runs.loop.train(config_of))
    steps = [row for row in rows if "tokens" in row]
    assert len(steps) == 2 and all(row["grad_norm"] > 0 and row["skipped"] == 0 for row in steps)
    assert ("passes" in steps[0]) == (options.get("dpo_steps", 0) == 0) and "passes" in steps[1]


@pytest.mark.parametrize("minibatches", [1, 2])
def test_a_step_of_which_nothing_is_kept_changes_nothing(tmp_path, monkeypatch, minibatches):
    tiny_runs.use(monkeypatch)
    given = dict(recipe="cgpo", reward=f"{__name__}:nothing", steps=1, optimizer="codpo", minibatches=minibatches)
    rows = tiny_runs.run(tmp_path, "run", **given)
    assert any(row.get("passes") == 0 for row in rows) and not any("grad_norm" in row for row in rows)


def nothing(completion):
    """A reward under which nothing passes."""
    return 0.0


def test_a_reward_below_the_bound_pushes_up_and_an_equal_one_does_nothing(built):
    """CRPG of completions that all earn the same: advantages of 0, and the stored one is no part of it."""
    ours = built(optimizer="crpg", groups=1, group_size=2)
    from test_judge_mixtures import Told, prompt

    rollouts = ours.rollout(Told(), [prompt("?", answer="1")])
    batch = batch_of(rollouts, rollouts.scores[0]).replace(facts=rollouts.facts)
    batch = batch.replace(old_logprobs=batch.rollout_logprobs.nan_to_num(-1.0))
    batch = batch.replace(ref_logprobs=batch.old_logprobs)
    made = ours.advantage(batch)
    assert made.advantages.tolist() == [0.25, -0.25] and made.objectives[0].counts.rollouts == 2
    out = SimpleNamespace(logprob=made.old_logprobs.clone().requires_grad_())
    gradient = torch.autograd.grad(ours.loss(out, made)[0].sum(), out.logprob)[0]
    assert gradient.tolist() == [-0.125, 0.125] and mixtures.emptied(batch).counts.rollouts == 0


@pytest.mark.slow
def test_the_arms_settle_where_they_should():
    """After 20,000 steps; and where the rewards of the arms that are allowed are equal, in closed form."""
    ends = toy.trained(20_000)
    assert ends[:4, 0].tolist() == pytest.approx([0.238, 0.306, 0.535, 0.983], abs=5e-4)
    assert ends[2, 2] == pytest.approx(2e-4, abs=1e-4)
    allowed, start = toy.PASSES > 0, toy.START.softmax(-1)
    earned = torch.sigmoid(toy.SCORES - toy.STORED)[allowed]
    for bound, found in zip(toy.BOUNDS, ends[:4, 0].tolist(), strict=True):
        low, high = 0.0, 10.0
        for _ in range(100):  # the common reward at which probabilities add up to 1
            middle = (low + high) / 2
            arms = start[allowed] * (bound * (1 - middle / earned)).exp()
            low, high = (middle, high) if arms.sum() > 1 else (low, middle)
        assert found == pytest.approx(float(arms[0]), abs=3e-3)
