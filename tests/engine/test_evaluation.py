"""Evaluation: pass@k is the textbook's, counts and intervals are right, training draws what it would anyway."""

import dataclasses
import math
from fractions import Fraction

import pytest
import tiny_models
import torch

from fuserl.engine import evaluation, generation, report
from fuserl.engine.batch import Rollouts
from fuserl.engine.prompts import Prompt


def textbook(correct, samples, k):
    return 1 - Fraction(math.comb(samples - correct, k), math.comb(samples, k))


@pytest.mark.parametrize("samples", [1, 2, 5, 16, 257, 4000])
def test_pass_at_k_is_the_textbooks(samples):
    counts = sorted(
        {c for c in (0, 1, 2, samples // 3, samples // 2, samples - 2, samples - 1, samples) if 0 <= c <= samples}
    )
    for k in {1, min(2, samples), max(samples // 2, 1), max(samples - 1, 1), samples}:
        expected = torch.tensor([float(textbook(c, samples, k)) for c in counts], dtype=torch.float64)
        found = evaluation.pass_at_k(torch.tensor(counts), samples, k)
        # Every factor and every product rounds once.
        assert found.dtype == torch.float64 and (found - expected).abs().max() <= 2 * samples * 2.0**-53
        assert found[0] == 0.0 and found[-1] == 1.0


def test_pass_at_k_rises_with_k_and_with_what_is_correct():
    table = torch.stack([evaluation.pass_at_k(torch.arange(13), 12, k) for k in range(1, 13)])
    assert bool((table.diff(dim=0) >= 0).all()) and bool((table.diff(dim=1) >= 0).all())
    assert torch.allclose(table[0], torch.arange(13).double() / 12)  # k = 1 is the share of correct completions


def test_pass_at_k_is_unbiased():
    """Averaged over what 6 completions with a chance of 0.3 can bring, it is the chance that k new ones hold a hit."""
    chances = torch.tensor([math.comb(6, c) * 0.3**c * 0.7 ** (6 - c) for c in range(7)], dtype=torch.float64)
    for k in range(1, 7):
        assert float(chances @ evaluation.pass_at_k(torch.arange(7), 6, k)) == pytest.approx(1 - 0.7**k, abs=1e-12)


@pytest.mark.parametrize(
    ("correct", "samples", "k", "says"),
    [
        ([0], 4, 0, "k must be 1 to samples = 4; got 0"),
        ([0], 4, 5, "k must be 1 to samples = 4; got 5"),
        ([1, 5], 4, 2, "correct must be 0 to samples = 4; got 1 to 5"),
        ([-1, 2], 4, 2, "got -1 to 2"),
        ([0.5], 4, 2, "correct must be integers; got torch.float32"),
    ],
)
def test_pass_at_k_refuses_what_cannot_be(correct, samples, k, says):
    with pytest.raises(ValueError, match=says):
        evaluation.pass_at_k(torch.tensor(correct), samples, k)


class Scripted:
    """A policy that completes prompt g with "right" as often as it is told, the last completions first."""

    def __init__(self, right, greedy):
        self.right, self.greedy, self.asked = right, greedy, []

    def generate(self, prompts, *, group_size=1, greedy=False, stream=None):
        self.asked.append({"group_size": group_size, "greedy": greedy, "stream": stream})
        right = self.greedy if greedy else self.right
        texts = [
            "right" if member >= group_size - right[g] else "half"
            for g in range(len(prompts))
            for member in range(group_size)
        ]
        count = len(texts)
        return Rollouts(
            prompts=prompts,
            prompt_tokens=[torch.ones(1, dtype=torch.int64)] * len(prompts),
            group=torch.arange(len(prompts)).repeat_interleave(group_size),
            tokens=torch.ones(count, dtype=torch.int64),
            offsets=torch.arange(count + 1),
            rollout_logprobs=torch.zeros(count),
            texts=texts,
            finish=["stop"] * count,
        )


def scored(rollouts):
    worth = {"right": 1.0, "half": 0.5}
    return torch.tensor([worth.get(text, 0.0) for text in rollouts.texts]), {"timeouts": 0}


PROMPTS = [Prompt(text) for text in "abcd"]


def test_accuracy_is_greedy_and_has_its_interval():
    policy = Scripted(None, greedy=[1, 0, 1, 1])
    row = evaluation.accuracy(policy, PROMPTS, scored)
    low, high = report.interval(3, 4)
    assert row == {"problems": 4, "correct": 3, "accuracy": 0.75, "accuracy_low": low, "accuracy_high": high}
    assert policy.asked == [{"group_size": 1, "greedy": True, "stream": None}]


def test_more_than_right_is_right_and_less_is_not():
    def generous(rollouts):
        return torch.tensor([1.0, 1.5, 0.999, -1.0]), {}

    assert evaluation.accuracy(Scripted(None, [0] * 4), PROMPTS, generous)["correct"] == 2


def test_pass_at_powers_of_two_and_at_all_samples():
    policy = Scripted([0, 1, 3, 6], greedy=None)
    row = evaluation.sampled(policy, PROMPTS, scored, 6)
    assert list(row) == ["samples", "pass@1", "pass@2", "pass@4", "pass@6"] and row["samples"] == 6
    for k in (1, 2, 4, 6):
        expected = sum(textbook(c, 6, k) for c in (0, 1, 3, 6)) / 4
        assert row[f"pass@{k}"] == pytest.approx(float(expected), abs=1e-12)
    assert policy.asked == [{"group_size": 6, "greedy": False, "stream": evaluation.EVALUATION}]
    assert list(evaluation.sampled(policy, PROMPTS, scored, 8))[1:] == ["pass@1", "pass@2", "pass@4", "pass@8"]
    with pytest.raises(ValueError, match="samples must be at least 1; got 0"):
        evaluation.sampled(policy, PROMPTS, scored, 0)


def test_an_evaluation_is_both_or_greedy_alone():
    policy = Scripted([2, 2, 2, 2], greedy=[1, 1, 0, 0])
    row = evaluation.evaluate(policy, PROMPTS, scored, samples=2)
    assert row.pop("eval_s") >= 0.0
    assert row == evaluation.accuracy(policy, PROMPTS, scored) | {"samples": 2, "pass@1": 1.0, "pass@2": 1.0}
    alone = evaluation.evaluate(policy, PROMPTS, scored)
    assert set(alone) == {"problems", "correct", "accuracy", "accuracy_low", "accuracy_high", "eval_s"}
    asked = len(policy.asked)
    assert evaluation.evaluate(policy, [], scored, samples=2) == {} and len(policy.asked) == asked


class Tiny:
    """A tiny model's completions, streams numbered as training numbers them."""

    def __init__(self):
        self.model, self.calls = tiny_models.model(), 0

    def generate(self, prompts, *, group_size=1, greedy=False, stream=None):
        if stream is None and not greedy:
            self.calls += 1
            stream = self.calls
        return generation.generate(
            self.model,
            tiny_models.Letters(),
            prompts,
            group_size=group_size,
            max_new_tokens=4,
            temperature=0.0 if greedy else 1.5,
            seed=stream or 0,
            stop_ids=(),
        )


def test_training_draws_the_same_with_and_without_evaluations():
    prompts = [Prompt("1a1"), Prompt("2a3")]
    drawn = {}
    for evaluating in (False, True):
        policy, texts = Tiny(), []
        for _ in range(3):
            if evaluating:
                evaluation.evaluate(policy, prompts, lambda rollouts: (torch.rand(len(rollouts)), {}), samples=4)
            texts += policy.generate(prompts, group_size=2).texts
        drawn[evaluating] = texts
    assert drawn[True] == drawn[False] and len(set(drawn[True])) > 6


def test_two_evaluations_of_one_policy_are_the_same():
    def by_letter(rollouts):
        return torch.tensor([float(ord(text[:1] or "0") % 2) for text in rollouts.texts]), {}

    policy, prompts = Tiny(), [Prompt(f"{n}a{n}") for n in range(8)]
    first, again = (evaluation.evaluate(policy, prompts, by_letter, samples=4) for _ in range(2))
    assert {**first, "eval_s": 0} == {**again, "eval_s": 0} and 0 < first["pass@1"] < first["pass@4"] <= 1


def test_given_completions_are_measured_with_their_scores():
    class Measuring(Scripted):
        def measure(self, batch, loss):
            self.measured = batch, loss
            return self.statistics

    def pairs(policy, prompts):
        rollouts = policy.generate(prompts, group_size=2)
        return dataclasses.replace(rollouts, scores=(torch.tensor([1.0, 0.0]).repeat(len(prompts)), {}))

    policy = Measuring([1, 1, 1, 1], greedy=[1, 1, 1, 0])
    policy.statistics = {"nll": 2.0, "pair_accuracy": 0.75}
    row = evaluation.of_completions(pairs, "the loss", policy, PROMPTS)
    assert row == policy.statistics | evaluation.accuracy(policy, PROMPTS, scored) and row["correct"] == 3
    batch, loss = policy.measured
    assert loss == "the loss" and batch.rewards.tolist() == [1.0, 0.0] * 4 and batch.counts.groups == 4
    policy.statistics = {"nll": 2.0}
    assert evaluation.of_completions(pairs, "the loss", policy, PROMPTS) == {"nll": 2.0}
