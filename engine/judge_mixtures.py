"""Mixtures of judges: which completions of a task pass all of its judges, and their rewards beside a stored one's."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fuserl.engine import judges, reward_models, rewards, rules
from fuserl.engine.batch import Rollouts
from fuserl.engine.constrained import calibrated
from fuserl.engine.contracts import require, require_one_of
from fuserl.engine.prompts import Prompt
from fuserl.engine.rollouts import beside, given, joined, pairs

# A rule for each judge that needs no model; "answer" is the run's own reward.
RULES = {
    "number": rules.numeric,
    "tests": rules.passes_tests,
    "format": rules.follows,
    "pattern": rules.matches,
    "refusal": rules.complies,
}
# What a judge that writes is asked, and what it must say.
CRITERIA = {"factuality": (rules.FACTUAL, True), "safety": (rules.SAFE, True), "refusal": (rules.REFUSES, False)}
JUDGES = ("answer", *RULES, "factuality", "safety")
WARM_UP = "warm-up"  # the metadata "stage" of prompts whose completions are the data's pairs


class Constrained:
    """A reward: c times the calibrated score; its facts are "passes" (c), "score" and "calibrated".

    Args:
        config: resolved; its judge, reward, and reward model are asked.
        tasks: their names.
        named: the judges of each task, among JUDGES.
        scorers: the reward model of each task, as of `--reward-model`; None or "" is the run's own reward.

    Raises:
        ValueError: an unknown judge, or one that has to be asked in words where none that writes is configured.
    """

    def __init__(self, config, tasks: Sequence[str], named: Sequence[Sequence[str]], scorers: Sequence[str | None]):
        self.named = dict(zip(tasks, named, strict=True))
        wanted = {each for several in named for each in several}
        for name in sorted(wanted):
            require_one_of("cgpo", "judges", name, JUDGES)
        self.judge = None if config.judge is None else judges.configured(config)
        if wanted - {"answer", *RULES} and not (self.judge and self.judge.writes):
            asked = ", ".join(sorted(wanted - {"answer", *RULES}))
            raise ValueError(f"cgpo: judges must have a model to ask for {asked}; there is none. Name it with --judge.")
        functions = {
            "answer": lambda: rewards.configured(config),
            **{name: (lambda f=f: f) for name, f in RULES.items()},
        }
        self.rules = {name: judges.ruled(config, functions[name]()) for name in sorted(wanted & functions.keys())}
        models = {
            name: reward_models.configured(config.replace(reward_model=name or None)) for name in dict.fromkeys(scorers)
        }
        self.scores = {task: models[name] for task, name in zip(tasks, scorers, strict=True)}
        self.scorer = judges.JudgedScorer(self.passes, self.judge) if self.judge else rewards.Scorer(self.passes)

    async def passes(self, prompt: str, completion: str, answer: str | None, metadata: dict) -> float:
        """1.0 where every judge of the problem's task passes a completion, else 0.0."""
        known = {"prompt": prompt, "completion": completion, "answer": answer, "metadata": metadata, "finish": "stop"}

        async def one(name: str) -> bool:
            if name in CRITERIA and self.judge is not None and self.judge.writes:
                criterion, wanted = CRITERIA[name]
                return wanted == await self.judge.verdict(prompt, completion, criterion, answer=answer)
            return await self.rules[name](known) >= 0.5

        return float(all(await asyncio.gather(*map(one, self.named[task_of(metadata, self.named)]))))

    def __call__(self, rollouts: Rollouts) -> tuple[Tensor, dict]:
        """Rewards (B,) float32 and facts, of rollouts each of whose prompts has one with the fact "baseline"."""
        passes, facts = self.scorer(rollouts)
        score = torch.zeros(len(rollouts))
        for group, prompt in enumerate(rollouts.prompts):
            index = (rollouts.group == group).nonzero().squeeze(-1)
            texts = [rollouts.texts[b] for b in index.tolist()]
            model = self.scores[task_of(prompt.metadata, self.named)]
            score[index] = model(prompt.text, texts, answer=prompt.answer, metadata=prompt.metadata)
        beside_stored = calibrated(score, rollouts.group, rollouts.facts["baseline"] > 0)
        return passes * beside_stored, {**facts, "passes": passes, "score": score, "calibrated": beside_stored}

    def close(self) -> None:
        """End the workers."""
        ruled = (model.rule for model in self.scores.values() if hasattr(model, "rule"))
        for each in (self.scorer, *self.rules.values(), *ruled):
            each.close()


def with_baselines(sizes: dict[str, int]) -> Callable:
    """A rollout slot: of each prompt as many drawn completions as its task has, and the one that is stored with it.

    That is the metadata's "baseline", else the chosen completion, else the answer. Facts are "task", its number, and
    "baseline". Prompts of the stage WARM_UP have their chosen and rejected completions instead, with rewards 1 and 0.

    Args:
        sizes: drawn completions, by task.
    """

    def rollout(policy, prompts: list[Prompt]) -> Rollouts:
        if prompts[0].metadata.get("stage") == WARM_UP:
            return pairs(policy, prompts)
        found = []
        for number, (name, size) in enumerate(sizes.items()):
            mine = [prompt for prompt in prompts if task_of(prompt.metadata, sizes) == name]
            if not mine:
                continue
            stored = given(policy, mine, [(_baseline(prompt),) for prompt in mine])
            drawn = policy.generate(mine, group_size=size)
            both = beside(*(_marked(each, baseline=at) for at, each in enumerate((drawn, stored))))
            found.append(dataclasses.replace(_marked(both, task=number), scores=(torch.zeros(len(both)), {})))
        return dataclasses.replace(joined(found), scores=None)

    return rollout


def warmed_up(draw: Callable, dpo_steps: int) -> Callable:
    """A prompts slot: those of the slot `draw`, of the stage WARM_UP in the first `dpo_steps` steps."""
    require("warmed_up", "dpo_steps", dpo_steps, dpo_steps >= 0, "an integer >= 0")

    def asked(step: int) -> list[Prompt]:
        if step > dpo_steps:
            return draw(step)
        return [dataclasses.replace(each, metadata={**each.metadata, "stage": WARM_UP}) for each in draw(step)]

    return asked


def task_of(metadata: dict, known: dict) -> str:
    """The task that a problem's metadata names; where there is one task alone, that."""
    return metadata["task"] if len(known) > 1 else next(iter(known))


def _baseline(prompt: Prompt) -> str | None:
    stored = prompt.metadata.get("baseline", prompt.chosen)
    return prompt.answer if stored is None else stored


def _marked(rollouts: Rollouts, **facts: float) -> Rollouts:
    each = {name: torch.full((len(rollouts),), float(value)) for name, value in facts.items()}
    return dataclasses.replace(rollouts, facts={**rollouts.facts, **each})
