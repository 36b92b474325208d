"""Rewards of several tasks: metrics, their quartiles, and each task's share."""

import asyncio
import dataclasses

import pytest
import torch
from batches import config, made, ragged

from fuserl.engine import prompts, task_rewards
from fuserl.engine.advantages import centred
from fuserl.engine.embedders import Hashing
from fuserl.engine.judges import Judge
from fuserl.engine.prompts import Prompt
from fuserl.engine.task_rewards import Baseline, Normalised, Quantiles, TaskScorer, task_batch_std, with_shares

KINDS = [
    Prompt("when", "2-6", {"dataset": "a", "task": "TAG"}),
    Prompt("where", "0:0,0,2,2", {"dataset": "a", "task": "STG"}),
    Prompt("what", "they cut", {"dataset": "b", "task": "VS"}),
    Prompt("sum", "3", {}),
    Prompt("skill", "4", {"dataset": "b", "task": "SA"}),
]
TEXTS = ["2-6", "4-8", "0:1,0,3,2", "later", "they cut", "", "3", "4", "4", "5"]


def rollouts(texts=TEXTS):
    group = torch.arange(5).repeat_interleave(2)
    return dataclasses.replace(made([prompt.text for prompt in KINDS], group, texts), prompts=KINDS)


def plain(rollouts):
    return torch.tensor([float(text == "3") for text in rollouts.texts]), {"timeouts": 0}


def scorer(**options):
    return TaskScorer(plain, Judge(rule=task_rewards.overlap), Hashing(), **options)


def test_each_task_has_its_metric():
    raw = scorer()
    rewards, facts = raw(rollouts())
    assert rewards.tolist() == pytest.approx([1, 1 / 3, 1 / 3, 0, 1, float(facts["parts"][5].mean()), 1, 0, 0, 0])
    assert facts["parts"][4].tolist() == pytest.approx([1, 1]) and facts["parts"][5, 1] == 0
    assert raw.pairs == ["a_TAG", "a_STG", "b_VS", "data_task", "b_SA"]
    assert facts["pair"][:, 0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert facts["reward_a_TAG"] == pytest.approx(2 / 3) and facts["timeouts"] == 0
    assert scorer(threshold=0.3)(rollouts())[0][:2].tolist() == [1, 1]
    assert scorer(threshold=0.5)(rollouts())[0][:2].tolist() == [1, 0]
    raw.close()


def test_a_task_of_another_name_has_the_runs_own_reward():
    """As those of a blend, which are named by what they are drawn from."""
    other = [dataclasses.replace(KINDS[3], metadata={"task": name}) for name in ("reasoning_gym:chain_sum", "CVS")]
    drawn = dataclasses.replace(made(["a", "b"], torch.tensor([0, 0, 1]), ["3", "4", "3"]), prompts=other)
    rewards, facts = scorer()(drawn)
    assert rewards.tolist() == [1, 0, 0] and facts["reward_data_reasoning_gym:chain_sum"] == 0.5
    ours = Normalised(scorer(), Quantiles())
    ours.fit(drawn)
    assert set(ours.quantiles.known) == {"data_reasoning_gym:chain_sum:0"} and ours(drawn)[0][2] == 0
    with pytest.raises(ValueError, match="a problem of task VS must have an answer to compare with"):
        scorer()(dataclasses.replace(drawn, prompts=[Prompt("x", None, {"task": "VS"})] * 2))


def test_a_judge_gives_the_mean_of_five_aspects_and_sees_the_reference():
    seen = []

    async def answer(messages):
        seen.append(messages[-1]["content"])
        return "{" + ", ".join(f'"{aspect}": {2 + at % 2}' for at, aspect in enumerate(task_rewards.ASPECTS)) + "}"

    raw = TaskScorer(plain, Judge(answer=answer), Hashing())
    facts = raw(rollouts())[1]
    assert facts["parts"][4:6, 1].tolist() == pytest.approx([(2.4 - 1) / 4] * 2) and len(seen) == 2
    assert all("how close the answer is to the reference" in text and "they cut" in text for text in seen)


def test_words_in_common():
    f1 = lambda said, wanted: asyncio.run(task_rewards.overlap({"completion": said, "answer": wanted}))  # noqa: E731
    assert f1("a b", "A b") == 1 and f1("a a b", "a c") == pytest.approx(2 / 5) and f1("", "a") == f1("a", "") == 0


def test_quartiles_make_every_tasks_median_one_half():
    quantiles = Quantiles(k=3.0)
    values = torch.rand(101, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for key, scale in (("x", 1.0), ("y", 0.01)):
        quantiles.fit(key, scale * values)
    assert torch.equal(quantiles.normalised("x", values).argsort(), values.argsort())
    torch.testing.assert_close(quantiles.normalised("y", 0.01 * values), quantiles.normalised("x", values))
    low, median, high = (values.quantile(q) for q in (0.25, 0.5, 0.75))
    got = quantiles.normalised("x", torch.stack([low, median, high]))
    expected = torch.sigmoid(3 * (torch.stack([low, median, high]) - median) / (high - low))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    again = Quantiles()
    again.load_state_dict(quantiles.state_dict())
    assert torch.equal(again.normalised("y", values), quantiles.normalised("y", values))


def test_a_task_without_spread_has_the_floor_and_an_unknown_one_its_own_quartiles():
    quantiles = Quantiles(floor=0.5)
    quantiles.fit("flat", torch.full((4,), 0.2))
    got = quantiles.normalised("flat", torch.tensor([0.2, 0.7], dtype=torch.float64))
    assert got.tolist() == pytest.approx([0.5, float(torch.sigmoid(torch.tensor(3.0)))], rel=1e-6)
    assert quantiles.normalised("new", torch.tensor([1.0, 2.0, 3.0]))[1] == 0.5
    for name in ("k", "floor"):
        with pytest.raises(ValueError, match=f"Quantiles: {name} must be"):
            Quantiles(**{name: 0.0})


def test_normalised_parts_are_averaged_and_imitated_tasks_are_worth_nothing():
    ours = Normalised(scorer(), Quantiles())
    ours.fit(rollouts())
    rewards, facts = ours(rollouts())
    parts, rnorm = facts["parts"], ours.quantiles.normalised
    assert set(ours.quantiles.known) == {"a_TAG:0", "a_STG:0", "b_VS:0", "b_VS:1", "data_task:0"}
    caption = (rnorm("b_VS:0", parts[4:6, 0]) + rnorm("b_VS:1", parts[4:6, 1])) / 2
    torch.testing.assert_close(rewards[4:6].double(), caption, rtol=1e-6, atol=0)
    torch.testing.assert_close(rewards[:2].double(), rnorm("a_TAG:0", parts[:2, 0]), rtol=1e-6, atol=0)
    assert rewards[8:].tolist() == [0, 0] and float(rewards[:2].mean()) == pytest.approx(0.5)


def test_advantages_over_a_tasks_own_spread_and_its_share():
    batch = ragged((1,) * 8, (0, 0, 1, 1, 2, 2, 3, 3)).replace(facts={"pair": torch.tensor([[0]] * 4 + [[1]] * 4)})
    batch = batch.replace(rewards=torch.tensor([0.0, 2, 0, 4, 0, 20, 0, 40]))
    got = task_batch_std(batch)
    spread = (0.5 * (1 + 4)) ** 0.5
    expected = torch.tensor([-1.0, 1, -2, 2] * 2) / spread
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)
    shared = with_shares(centred, ["x", "y"])(batch)
    assert torch.equal(shared.advantages, centred(batch))
    assert shared.facts["grad_share_x"].tolist() == pytest.approx([6 / 66] * 8)
    assert shared.facts["grad_share_y"].tolist() == pytest.approx([60 / 66] * 8)


@pytest.mark.parametrize(("recompute", "fitted"), [(0, [1]), (1, [1, 2, 3, 4, 5]), (2, [1, 3, 5]), (4, [1, 5])])
def test_quartiles_are_made_by_the_policy_when_they_are_due(tmp_path, recompute, fitted):
    start, found = Baseline(config(tmp_path, "med_grpo"), size=3, recompute=recompute), []

    class Speaking:
        def generate(self, asked):
            found.append((start.step, len(asked)))
            return rollouts()

    reward = Normalised(scorer(), Quantiles())
    slot, plain_steps = start.fitting(lambda policy, asked: asked, reward), prompts.sampler(start.config)
    for step in range(1, 6):
        asked = start.prompts(step)
        assert slot(Speaking(), asked) == asked == plain_steps(step)
    assert found == [(step, 3) for step in fitted] and "a_TAG:0" in reward.quantiles.known
