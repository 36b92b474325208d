"""Mixtures of judges: a completion passes where all of them pass it; each prompt has a stored one beside it."""

import dataclasses

import pytest
import torch
from batches import config, made

from fuserl.engine import judge_mixtures
from fuserl.engine.judge_mixtures import WARM_UP, Constrained, with_baselines
from fuserl.engine.meter import Meter
from fuserl.engine.prompts import Prompt


class Told:
    """A policy that says "1", "2", ... to every prompt."""

    def __init__(self):
        self.meter, self.asked = Meter(), []

    def encode(self, text):
        return torch.tensor([ord(letter) for letter in text])

    def encode_completion(self, prompt, text):
        return self.encode(text)

    def generate(self, asked, *, group_size):
        self.asked.append(([prompt.text for prompt in asked], group_size))
        group = torch.arange(len(asked)).repeat_interleave(group_size)
        texts = [str(n % group_size + 1) for n in range(len(group))]
        return dataclasses.replace(made([prompt.text for prompt in asked], group, texts), prompts=asked)


def honest(messages):
    """A judge that finds a lie in whatever has a 2 in it, and a refusal in whatever has a 3."""
    said = messages[0]["content"]
    text = said.partition("<answer-")[2].partition("\n")[2].partition("\n</answer-")[0]
    true = "3" in text if "refuses" in said else "2" not in text
    return f'{{"verdict": {str(true).lower()}}}'


def large(completion):
    """A reward model: a tenth of the number that is said."""
    return float(completion) / 10


def prompt(text, answer="1", **metadata):
    return Prompt(text, answer, metadata)


def rewarded(given, prompts, sizes=None):
    with_stored = with_baselines(sizes or {"t": 3})
    rollouts = with_stored(Told(), prompts)
    rewards, facts = given(rollouts)
    given.close()
    return rollouts, rewards, facts


@pytest.mark.parametrize(
    ("names", "metadata", "expected"),
    [
        ("answer", {}, [1, 0, 0, 1]),
        ("number", {}, [1, 0, 0, 1]),
        ("refusal", {}, [1, 1, 1, 1]),
        ("format", {"instructions": {"excludes": ["3"]}}, [1, 1, 0, 1]),
        ("pattern", {"pattern": "[13]"}, [1, 0, 1, 1]),
        ("pattern+format", {"pattern": "[13]", "instructions": {"excludes": ["3"]}}, [1, 0, 0, 1]),
        ("tests", {"tests": "assert True"}, [1, 1, 1, 1]),
    ],
)
def test_rules_must_all_pass(names, metadata, expected, tmp_path):
    given = Constrained(config(tmp_path, "cgpo"), ["t"], [names.split("+")], [None])
    rollouts, rewards, facts = rewarded(given, [prompt("?", **metadata)])
    assert rollouts.texts == ["1", "2", "3", "1"] and rollouts.facts["baseline"].tolist() == [0, 0, 0, 1]
    assert facts["passes"].tolist() == expected and facts["score"].tolist() == [1, 0, 0, 1]  # the run's own reward
    assert torch.equal(rewards, facts["passes"] * facts["calibrated"]) and facts["calibrated"][3] == 0.5


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("factuality", [1, 0, 1, 1]),
        ("safety", [1, 0, 1, 1]),
        ("refusal", [1, 1, 0, 1]),
        ("safety+refusal", [1, 0, 0, 1]),
    ],
)
def test_a_model_is_asked_what_rules_cannot_see(names, expected, tmp_path):
    given = Constrained(config(tmp_path, "cgpo", judge=f"{__name__}:honest"), ["t"], [names.split("+")], [None])
    _, _, facts = rewarded(given, [prompt("?")])
    assert facts["passes"].tolist() == expected and facts["judge_fallbacks"] == 0


@pytest.mark.parametrize("judge", [None, "tiny_runs:shortness"])
def test_without_a_model_it_is_not_asked(judge, tmp_path):
    with pytest.raises(ValueError, match="must have a model to ask for factuality, safety"):
        Constrained(config(tmp_path, "cgpo", judge=judge), ["t"], [["safety", "factuality"]], [None])


def test_each_task_has_its_judges_and_its_number_of_completions(tmp_path):
    given = Constrained(config(tmp_path, "cgpo"), ["a", "b"], [["answer"], ["refusal"]], ["", f"{__name__}:large"])
    asked = [prompt("p", task="a"), prompt("q", task="b"), prompt("r", task="a")]
    rollouts, _, facts = rewarded(given, asked, {"a": 2, "b": 3})
    assert [each.text for each in rollouts.prompts] == ["p", "r", "q"]
    assert rollouts.group.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 2]
    assert rollouts.facts["task"].tolist() == [0] * 6 + [1] * 4
    assert facts["passes"].tolist() == [1, 0, 1, 1, 0, 1, 1, 1, 1, 1]
    assert facts["score"].tolist() == pytest.approx([1, 0, 1, 1, 0, 1, 0.1, 0.2, 0.3, 0.1])  # each by its own


def test_what_is_stored_is_the_metadatas_or_the_chosen_or_the_answer():
    several = [prompt("p", baseline="b"), dataclasses.replace(prompt("q"), chosen="c"), prompt("r")]
    rollouts = with_baselines({"t": 1})(Told(), several)
    assert rollouts.texts == ["1", "b", "1", "c", "1", "1"] and rollouts.scores is None
    assert rollouts.rollout_logprobs.isnan().tolist() == [False, True] * 3
    with pytest.raises(ValueError, match="must have completions to learn from"):
        with_baselines({"t": 1})(Told(), [prompt("p", answer=None)])


def test_the_warm_up_is_on_pairs_of_the_data():
    one = dataclasses.replace(prompt("p", stage=WARM_UP), chosen="c", rejected="d")
    rollouts = with_baselines({"t": 4})(Told(), [one, one])
    assert rollouts.texts == ["c", "d"] * 2 and rollouts.scores[0].tolist() == [1, 0] * 2 and not rollouts.facts


def test_the_names_of_judges_are_those_that_there_are():
    assert set(judge_mixtures.CRITERIA) <= set(judge_mixtures.JUDGES)
