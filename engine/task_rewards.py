"""Rewards of several tasks on several data sets, and their normalisation by how a baseline did (arXiv:2512.06581).

    rnorm(x) = 1 / (1 + exp(-k (x - p50) / max(p75 - p25, floor)))        p of the baseline, for each data set and task
    grounding (TAG, STG): rnorm(metric, 0 where the format is not kept)
    captions (VS, RC):    rnorm(semantic similarity) / 2 + rnorm(judge) / 2

The median becomes 1/2 and half an interquartile range above it sigmoid(k / 2), whatever a metric's scale. Advantages
that are divided by their group's standard deviation do not see any affine difference between tasks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fuserl.engine import grounding, judges, prompts
from fuserl.engine.advantages import centred, standardized
from fuserl.engine.batch import Batch, Rollouts
from fuserl.engine.contracts import require
from fuserl.engine.judges import Judge, JudgedScorer

GROUNDING, CAPTIONS = ("TAG", "STG"), ("VS", "RC")
COMPARED = GROUNDING + CAPTIONS
UNREWARDED = ("CVS", "NAP", "SA", "DVC")  # of the paper's tasks those that are only imitated
ASPECTS = (
    "terminology precision", "instrument and anatomy identification", "specificity", "procedure context",
    "action and state accuracy",
)  # fmt: skip
RUBRIC = (
    "For each aspect say how close the answer is to the reference: 5 is equivalent, 3 is partly so, 1 is unrelated. "
    "Do not judge it by anything but the reference."
)


class Quantiles:
    """The quartiles of a baseline's metrics by key, and rewards relative to them; state of a recipe.

    Args:
        k: steepness of the logistic.
        floor: of the interquartile range, > 0.
    """

    def __init__(self, *, k: float = 3.0, floor: float = 1e-3):
        require("Quantiles", "k", k, 0 < k < math.inf, "a finite number > 0")
        require("Quantiles", "floor", floor, 0 < floor < math.inf, "a finite number > 0")
        self.k, self.floor, self.known = k, floor, {}

    def fit(self, key: str, values: Tensor) -> None:
        """Take the quartiles of a baseline's values (n,), n >= 1, for a key."""
        at = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
        self.known[key] = values.double().quantile(at).tolist()

    def normalised(self, key: str, values: Tensor) -> Tensor:
        """Rewards in (0, 1) of raw values (n,), float64; a key without quartiles takes those of these values."""
        if key not in self.known:
            self.fit(key, values)
        low, median, high = self.known[key]
        return torch.sigmoid(self.k * (values.double() - median) / max(high - low, self.floor))

    def state_dict(self) -> dict:
        """The quartiles."""
        return {"known": self.known}

    def load_state_dict(self, state: dict) -> None:
        """Go on with those of a `state_dict`."""
        self.known = dict(state["known"])


async def overlap(arguments: dict) -> float:
    """A rule in a judge's place: F1 of the words of a caption and of its reference, 0 to 1."""
    said, wanted = (arguments[name].lower().split() for name in ("completion", "answer"))
    shared = sum(min(said.count(word), wanted.count(word)) for word in {*said})
    return 2 * shared / (len(said) + len(wanted)) if said and wanted else 0.0


class TaskScorer:
    """A reward slot of raw metrics by a prompt's metadata["task"]; one of no such task has the run's own reward.

    Facts: `parts` (B, 2), the metric and 0, or a caption's similarity and judge; `pair` (B, 1), the number of the
    prompt's data set and task among `pairs`; the mean reward of each pair.

    Args:
        plain: the run's own reward.
        judge: of captions, each by five aspects as 1 to 5.
        embed: texts -> unit rows.
        threshold: of temporal intersections over unions, that reach it or do not; None gives them as they are.
    """

    def __init__(self, plain: Callable, judge: Judge, embed: Callable, *, threshold: float | None = None):
        self.plain, self.embed, self.threshold, self.pairs = plain, embed, threshold, []
        self._marked = JudgedScorer(_marks(judge), judge)

    def __call__(self, rollouts: Rollouts) -> tuple[Tensor, dict]:
        """(B,) rewards and their facts."""
        asked = [rollouts.prompt_of(b) for b in range(len(rollouts))]
        tasks = [prompt.metadata.get("task") for prompt in asked]
        for prompt, task in zip(asked, tasks, strict=True):
            if task in COMPARED and prompt.answer is None:
                raise ValueError(
                    f"task: a problem of task {task} must have an answer to compare with; {prompt.text[-80:]!r} has "
                    "none. Add it, or take the task off the problem."
                )
        parts, facts = torch.zeros(len(rollouts), 2), {}
        others = torch.tensor([task not in COMPARED + UNREWARDED for task in tasks])
        if others.any():
            own, facts = self.plain(rollouts)
            parts[:, 0] = torch.where(others, own, 0.0)
        captions = [b for b, task in enumerate(tasks) if task in CAPTIONS]
        if captions:
            texts = [text for b in captions for text in (rollouts.texts[b], asked[b].answer)]
            said, wanted = self.embed(texts).view(len(captions), 2, -1).unbind(1)
            parts[captions, 0] = (said * wanted).sum(-1)
            marks, counted = self._marked(rollouts)
            parts[captions, 1], facts = marks[captions], facts | counted
        for b, task in enumerate(tasks):
            if task in GROUNDING:
                parts[b, 0] = self.located(task, rollouts.texts[b], asked[b].answer)
        single = torch.tensor([task not in CAPTIONS for task in tasks])
        rewards = torch.where(single, parts[:, 0], parts.mean(1))
        pair = torch.tensor([[self._number(prompt.metadata)] for prompt in asked])
        means = {f"reward_{name}": rewards[pair[:, 0] == at] for at, name in enumerate(self.pairs)}
        facts |= {name: float(each.mean()) for name, each in means.items() if len(each)}
        return rewards, {**facts, "parts": parts, "pair": pair}

    def located(self, task: str, text: str, answer: str) -> float:
        """The metric of an answer to TAG or STG; 0 where its format is not kept."""
        if task == "STG":
            return grounding.mean_iou(grounding.boxes(text), grounding.boxes(answer))
        found = grounding.temporal_iou(grounding.interval(text), grounding.interval(answer))
        return found if self.threshold is None else float(found >= self.threshold)

    def state_dict(self) -> dict:
        """The names of the pairs: their numbers are in rollouts that are drawn ahead."""
        return {"pairs": list(self.pairs)}

    def load_state_dict(self, state: dict) -> None:
        """Go on with the numbers of a `state_dict`."""
        self.pairs[:] = state["pairs"]

    def close(self) -> None:
        """End the reward's workers, and the judge."""
        for each in (self.plain, self._marked):
            getattr(each, "close", lambda: None)()

    def _number(self, metadata: dict) -> int:
        name = f"{metadata.get('dataset', 'data')}_{metadata.get('task', 'task')}"
        if name not in self.pairs:
            self.pairs.append(name)
        return self.pairs.index(name)


class Normalised:
    """The reward slot of a `TaskScorer` with its parts brought to a common scale by `Quantiles`."""

    def __init__(self, raw: TaskScorer, quantiles: Quantiles):
        self.raw, self.quantiles, self.close = raw, quantiles, raw.close

    def fit(self, rollouts: Rollouts) -> None:
        """Take a baseline's quartiles."""
        for key, _, values, _ in self._each(self.raw(rollouts)[1]):
            self.quantiles.fit(key, values)

    def __call__(self, rollouts: Rollouts) -> tuple[Tensor, dict]:
        """(B,) rewards in [0, 1], the mean of a caption's two parts, and the facts of the raw ones."""
        _, facts = self.raw(rollouts)
        rewards = torch.zeros(len(rollouts), dtype=torch.float64)
        for key, rows, values, share in self._each(facts):
            rewards[rows] += share * self.quantiles.normalised(key, values)
        return rewards.float(), facts

    def _each(self, facts: dict) -> Iterator[tuple[str, Tensor, Tensor, float]]:
        """Each part of each pair: its quartiles' key, the rows of its rollouts, their values, its share of a reward."""
        for number, name in enumerate(self.raw.pairs):
            rows, task = facts["pair"][:, 0] == number, name.rpartition("_")[2]
            if not rows.any() or task in UNREWARDED:
                continue
            columns = 2 if task in CAPTIONS else 1
            for column in range(columns):
                yield f"{name}:{column}", rows, facts["parts"][rows, column], 1 / columns


class Baseline:
    """The slots of a run that makes the quartiles of a `Normalised` reward by its own policy.

    Args:
        config: resolved, of the run.
        size: training problems that the policy completes once each.
        recompute: steps after which the quartiles are made anew, by the policy of then; 0 keeps the first ones.
    """

    def __init__(self, config, *, size: int, recompute: int = 0):
        require("Baseline", "baseline", size, size >= 1, "an integer >= 1")
        require("Baseline", "recompute", recompute, recompute >= 0, "an integer >= 0")
        self.config, self.size, self.recompute = config, size, recompute
        self.step, self._steps = 0, prompts.sampler(config)

    def prompts(self, step: int) -> list:
        """The prompts slot: those of the run's task."""
        self.step = step
        return self._steps(step)

    def fitting(self, draw: Callable, reward: Normalised) -> Callable:
        """The rollout slot `draw`, before which the reward is fitted where that is due."""

        def rollout(policy, asked: list) -> Rollouts:
            due = self.recompute and (self.step - 1) % self.recompute == 0
            if due or not reward.quantiles.known:
                reward.fit(policy.generate(prompts.pool(self.config, self.size)[: self.size]))
            return draw(policy, asked)

        return rollout


def task_batch_std(batch: Batch) -> Tensor:
    """Reward minus the group's mean, over the standard deviation of that in all groups of its pair, (B,)."""
    found, pair = centred(batch), batch.facts["pair"][:, 0]
    sums = found.new_zeros(int(pair.max()) + 1)
    squares, counts = (sums.index_add(0, pair, each) for each in (found.square(), torch.ones_like(found)))
    return found / ((squares / counts).sqrt() + 1e-6)[pair]


ADV_NORMS = {"group_std": standardized, "group_mean": centred, "task_batch_std": task_batch_std}


def with_shares(advantage: Callable, pairs: list[str]) -> Callable:
    """The advantage slot, with a fact `grad_share_PAIR` (B,) for each pair: its share of all |A|.

    Where rollouts weigh the same and nothing is clipped, that is its share of the gradient in the log-probs, in L1.
    """

    def found(batch: Batch) -> Batch:
        advantages, pair = advantage(batch), batch.facts["pair"][:, 0]
        size = advantages.abs()
        shares = {
            f"grad_share_{name}": torch.full_like(size, float(size[pair == at].sum() / size.sum().clamp(min=1e-30)))
            for at, name in enumerate(pairs)
        }
        return batch.replace(facts=batch.facts | shares).with_advantages(advantages)

    return found


def _marks(judge: Judge) -> Callable:
    async def marks(prompt: str, completion: str, answer: str, metadata: dict) -> float:
        if metadata.get("task") not in CAPTIONS:
            return 0.0
        scores = await judge.scores(prompt, completion, ASPECTS, rubric=RUBRIC, answer=answer, metadata=metadata)
        return (sum(scores) / len(scores) - 1) / 4

    return marks


def judge_of(config) -> Judge:
    """The judge that a resolved configuration names, else the rule `overlap`."""
    return judges.configured(config) if config.judge else Judge(rule=overlap)
