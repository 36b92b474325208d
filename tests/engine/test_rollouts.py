"""Rollout slots: sampled, sampled until rewards differ, or given by the data; taking rollouts apart and together."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from batches import made, steady
from hypothesis import given
from hypothesis import strategies as st

from fuserl.engine import meter
from fuserl.engine.batch import Rollouts
from fuserl.engine.meter import Meter
from fuserl.engine.prompts import Prompt
from fuserl.engine.rollouts import demonstrations, joined, mixed, pairs, sampled, selected


class Letters:
    """A policy that completes a prompt with its own letters: completion k of "abc" is "abc"[k]; one token a letter."""

    def __init__(self):
        self.asked, self.meter = [], Meter()

    def encode(self, text):
        return torch.tensor([ord(letter) for letter in text], dtype=torch.int64)

    def encode_completion(self, prompt, text):
        return self.encode(f"{text}.")

    def generate(self, prompts, *, group_size):
        self.asked.append([prompt.text for prompt in prompts])
        texts = [prompt.text[k % len(prompt.text)] * (k + 1) for prompt in prompts for k in range(group_size)]
        return made(
            [prompt.text for prompt in prompts], torch.arange(len(prompts)).repeat_interleave(group_size), texts
        )


def ones(rollouts):
    """Reward 1 where a completion is of 1s, and how many it has looked at."""
    return torch.tensor([float(text[0] == "1") for text in rollouts.texts]), {"seen": len(rollouts.texts)}


def asked(*texts):
    return [Prompt(text) for text in texts]


def same(one, two):
    """Whether two rollouts are equal in every field."""

    def plain(value):
        if isinstance(value, torch.Tensor):
            return value.tolist()
        return [plain(each) for each in value] if isinstance(value, list | tuple) else value

    fields = [field.name for field in dataclasses.fields(Rollouts)]
    return all(plain(getattr(one, name)) == plain(getattr(two, name)) for name in fields)


def test_sampled_asks_for_a_group_of_each_prompt():
    policy = Letters()
    rollouts = sampled(3)(policy, asked("10", "0"))
    assert policy.asked == [["10", "0"]] and rollouts.group.tolist() == [0, 0, 0, 1, 1, 1] and rollouts.scores is None


@pytest.mark.parametrize(
    ("prompts", "kept", "batches"),
    [
        (["10", "01", "11", "10"], ["10", "01"], 1),  # enough at once
        (["11", "10", "00", "01", "10", "10"], ["10", "01"], 2),
        (["11", "10", "10", "01", "10", "10"], ["10", "10"], 2),  # one too many
        (["11", "00", "00", "11", "10"], ["10"], 3),  # too few, the last batch of one prompt
        (["00", "11", "11"], ["00"], 2),  # none
    ],
)
def test_mixed_goes_on_until_enough_groups_differ(prompts, kept, batches):
    policy = Letters()
    rollouts = mixed(2, 2, ones)(policy, asked(*prompts))
    assert [prompt.text for prompt in rollouts.prompts] == kept and len(policy.asked) == batches
    assert policy.asked == [prompts[at : at + 2] for at in range(0, 2 * batches, 2)]
    rewards, facts = rollouts.scores
    assert rewards.tolist() == [float(letter) for text in kept for letter in text]
    assert facts == {"seen": 2 * sum(map(len, policy.asked))}
    assert rollouts.texts == [letter * (k + 1) for text in kept for k, letter in enumerate(text)]
    assert rollouts.group.tolist() == [group for group in range(len(kept)) for _ in range(2)]


def test_the_time_of_rewards_that_mixed_asks_for_is_theirs(monkeypatch):
    moment = SimpleNamespace(now=0.0)
    monkeypatch.setattr(meter.time, "perf_counter", lambda: moment.now)

    def reward(rollouts):
        moment.now += 3
        return ones(rollouts)

    policy = Letters()
    with policy.meter.phase("generate"):
        mixed(2, 1, reward)(policy, asked("11", "10"))
    assert policy.meter.seconds["reward"] == 6 and policy.meter.seconds["generate"] == 0


def test_mixed_of_single_completions_keeps_one_prompt():
    policy = Letters()
    rollouts = mixed(1, 2, ones)(policy, asked("1", "0", "1"))
    assert [prompt.text for prompt in rollouts.prompts] == ["1"] and len(policy.asked) == 2


def test_mixed_sums_facts_that_only_some_batches_have():
    def reward(rollouts):
        rewards, _ = ones(rollouts)
        return rewards, {"timeouts": 2} if rollouts.prompts[0].text == "11" else {"late": 1}

    assert mixed(2, 1, reward)(Letters(), asked("11", "00", "10")).scores[1] == {"timeouts": 2, "late": 2}


def test_demonstrations_are_the_answers_with_reward_1():
    prompts = [Prompt("1+1=", answer="2"), Prompt("5+5=", answer="10")]
    rollouts = demonstrations(Letters(), prompts)
    assert (
        rollouts.texts == ["2", "10"] and rollouts.group.tolist() == [0, 1] and rollouts.offsets.tolist() == [0, 2, 5]
    )
    assert bytes(rollouts.tokens.tolist()) == b"2.10." and rollouts.rollout_logprobs.isnan().all()
    assert rollouts.scores[0].tolist() == [1, 1] and rollouts.scores[1] == {} and rollouts.finish == ["stop"] * 2
    assert [bytes(tokens.tolist()) for tokens in rollouts.prompt_tokens] == [b"1+1=", b"5+5="]


def test_pairs_are_chosen_and_rejected_with_rewards_1_and_0():
    prompts = [Prompt("a", chosen="good", rejected="bad"), Prompt("b", chosen="x", rejected="yy")]
    rollouts = pairs(Letters(), prompts)
    assert rollouts.texts == ["good", "bad", "x", "yy"] and rollouts.group.tolist() == [0, 0, 1, 1]
    assert rollouts.scores[0].tolist() == [1, 0, 1, 0] and bytes(rollouts.tokens.tolist()) == b"good.bad.x.yy."


@pytest.mark.parametrize(
    ("slot", "prompt"),
    [
        (demonstrations, Prompt("the question=", chosen="a", rejected="b")),
        (pairs, Prompt("the question=", answer="a", chosen="a")),
        (pairs, Prompt("the question=", answer="a", rejected="a")),
    ],
)
def test_data_that_lacks_a_completion_is_named(slot, prompt):
    with pytest.raises(ValueError, match="'the question=' lacks one"):
        slot(Letters(), [prompt])


def test_an_empty_completion_is_one():
    assert demonstrations(Letters(), [Prompt("a", answer="")]).texts == [""]


@st.composite
def several(draw):
    """Rollouts of up to five prompts, some of them without a completion, in any order; and rewards."""
    texts = draw(st.lists(st.text("ab", max_size=3), min_size=1, max_size=8))
    group = draw(st.lists(st.integers(0, 4), min_size=len(texts), max_size=len(texts)))
    return made([*"pqrst"], torch.tensor(group), texts), torch.arange(float(len(texts)))


@steady
@given(several(), st.permutations(range(5)), st.integers(0, 5), st.integers(0, 5))
def test_selected_groups_can_be_joined_again(drawn, order, one, two):
    rollouts, rewards = drawn
    groups = torch.tensor(order)
    together = selected(rollouts, groups, rewards)
    cuts = sorted((one, two))
    parts = [selected(rollouts, part, rewards) for part in groups.tensor_split(cuts)]
    assert same(joined(parts), together)

    members = [b for group in order for b in range(len(rollouts)) if rollouts.group[b] == group]
    assert together.texts == [rollouts.texts[b] for b in members] and together.scores[0].tolist() == members
    assert [prompt.text for prompt in together.prompts] == ["pqrst"[group] for group in order]
    assert [together.prompt_of(at).text for at in range(len(members))] == [rollouts.prompt_of(b).text for b in members]
    assert together.finish == [rollouts.finish[b] for b in members]
    assert bytes(together.tokens.tolist()).decode() == "".join(together.texts)
    lengths = [len(text) for text in together.texts]
    assert together.offsets.diff().tolist() == lengths and int(together.offsets[0]) == 0
    spans = [slice(int(rollouts.offsets[b]), int(rollouts.offsets[b + 1])) for b in members]
    assert together.rollout_logprobs.tolist() == [x for span in spans for x in rollouts.rollout_logprobs[span].tolist()]
    assert [tokens.tolist() for tokens in together.prompt_tokens] == [[ord("pqrst"[group])] for group in order]


def test_nothing_selected_is_rollouts_of_nothing():
    rollouts = Letters().generate(asked("10"), group_size=2)
    nothing = selected(rollouts, torch.zeros(0, dtype=torch.int64), torch.ones(2))
    assert len(nothing) == 0 and nothing.offsets.tolist() == [0] and same(joined([nothing, nothing]), nothing)


def test_slots_take_any_policy_that_has_their_methods():
    rollouts = made(["1"], torch.tensor([0]), ["1"])
    policy = SimpleNamespace(generate=lambda prompts, group_size: rollouts)
    assert sampled(1)(policy, asked("1")) is rollouts
