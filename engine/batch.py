"""What a policy produced (`Rollouts`), and what an update consumes (`Batch`): packed arrays, no padding."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fuserl.engine.prompts import Prompt
from fuserl.kernels.tree_layout import Packed, pack


@dataclass(frozen=True)
class Rollouts:
    """G prompts and their B completions, N tokens in all: readable by a person, scored by rewards.

    Tensors live on the host. Completion b holds `tokens[offsets[b]:offsets[b + 1]]`, the ending token included where
    one was sampled.
    """

    prompts: list[Prompt]
    prompt_tokens: list[Tensor]  # G ragged int64
    group: Tensor  # (B,) int64, which prompt
    tokens: Tensor  # (N,) int64
    offsets: Tensor  # (B + 1,) int64
    rollout_logprobs: Tensor  # (N,) float32, under the distribution each token was drawn from
    texts: list[str]  # B completions, without the stop text
    finish: list[str]  # B, "stop" or "length"
    scores: tuple[Tensor, dict] | None = None  # rewards (B,) and their statistics, where making them took the reward
    trained: Tensor | None = None  # (N,) bool, False for what others put in, which is context only; all True by default
    chunks: list[list[int]] | None = None  # B lists of token counts, each read right behind the prompt; by default one
    facts: dict[str, Tensor] = field(default_factory=dict)  # (B, ...) each, what is known of a rollout besides

    def __post_init__(self):
        if self.trained is None:
            object.__setattr__(self, "trained", torch.ones_like(self.tokens, dtype=torch.bool))
        if self.chunks is None:
            object.__setattr__(self, "chunks", [[length] for length in self.offsets.diff().tolist()])

    def __len__(self) -> int:
        return len(self.texts)

    def prompt_of(self, rollout: int) -> Prompt:
        """The prompt that completion `rollout` answers."""
        return self.prompts[int(self.group[rollout])]


@dataclass(frozen=True)
class Counts:
    """Sizes of the whole batch, across micro-batches and ranks: the denominators of every normaliser."""

    tokens: int
    rollouts: int
    groups: int


@dataclass(frozen=True)
class Objective:
    """The sizes that one of several losses sees of a batch: as if its tokens were all there are."""

    counts: Counts
    lengths: Tensor  # (B,) int64 on the host, its tokens of each rollout


@dataclass(frozen=True)
class Batch:
    """N trained tokens of B rollouts of G prompts, one element per trained token.

    `take(rows)` selects trained tokens and keeps `counts`, so a loss normalised by `counts` does not depend on how the
    batch is cut. Per-rollout fields stay whole: `rollout` (N,) indexes them.
    """

    tokens: Tensor  # (N,) int64
    rollout: Tensor  # (N,) int64, which rollout a token is of
    offsets: Tensor  # (B + 1,) int64, on the host
    group: Tensor  # (B,) int64
    rewards: Tensor  # (B,) float32
    rollout_logprobs: Tensor  # (N,) float32, as sampled
    counts: Counts
    prompt_tokens: list[Tensor] = field(default_factory=list)  # G ragged int64, each prompt once
    # B lists of chunks, ragged int64, each read right behind its prompt, where not all of their tokens are trained.
    completions: list[list[Tensor]] | None = None
    place: Tensor | None = None  # (N,) int64, where each token stands in its completion, given `completions`
    advantages: Tensor | None = None  # (N,) float32
    old_logprobs: Tensor | None = None  # (N,) float32, at the start of the update
    ref_logprobs: Tensor | None = None  # (N,) float32
    values: Tensor | None = None  # (N,) float32
    returns: Tensor | None = None  # (N,) float32
    extra: dict[str, Any] = field(default_factory=dict)  # what one system needs, (N,) tensors under documented keys
    facts: dict[str, Tensor] = field(default_factory=dict)  # the same of rollouts, (B, ...): of rewards and judges
    step: int = 0  # turns of the loop so far, this one included: what a schedule depends on
    teacher_prompts: list[Tensor] | None = None  # B ragged int64, what a teacher reads in the prompt's place
    objective: Tensor | None = None  # (N,) int64, which of several losses a token is for
    objectives: tuple[Objective, ...] = ()  # their sizes

    @property
    def dtype(self) -> torch.dtype:
        """That of losses and credit: float32, or float64 where rewards are."""
        return self.rewards.dtype

    @property
    def lengths(self) -> Tensor:
        """Trained tokens per rollout of the whole batch, (B,) int64, on the tokens' device."""
        return self.offsets.diff().to(self.tokens.device)

    def take(self, rows: Tensor) -> Batch:
        """The trained tokens `rows` (n,) int64, as a view of this batch with the same counts and rollouts."""
        return dataclasses.replace(
            self,
            extra={name: value[rows] for name, value in self.extra.items()},
            **{name: value[rows] for name, value in self._token_fields()},
        )

    def rows_of(self, index: Tensor) -> Tensor:
        """The rows of the rollouts `index` (b,), in their order, (n,) int64."""
        lengths = self.offsets.diff()[index]
        starts = self.offsets[:-1][index] - (lengths.cumsum(0) - lengths)
        return torch.arange(int(lengths.sum())) + starts.repeat_interleave(lengths)

    def rollouts_at(self, index: Tensor) -> Batch:
        """The rollouts `index` (b,) with all their tokens, renumbered from 0, with the whole batch's counts."""
        lengths = self.offsets.diff()[index]
        return dataclasses.replace(
            self.take(self.rows_of(index)),
            rollout=torch.arange(len(index)).repeat_interleave(lengths),
            offsets=offsets_of(lengths),
            **self._of_rollouts(index),
            objectives=tuple(dataclasses.replace(each, lengths=each.lengths[index]) for each in self.objectives),
        )

    def seen_by(self, number: int) -> tuple[Tensor, Batch]:
        """The rows (n,) of the tokens for objective `number`, and the batch of them, their rollouts and its sizes."""
        rows, sizes = (self.objective == number).nonzero().squeeze(-1), self.objectives[number]
        index = (sizes.lengths > 0).nonzero().squeeze(-1)
        return rows, dataclasses.replace(
            self.take(rows),
            rollout=torch.searchsorted(index.to(self.rollout.device), self.rollout[rows]),
            **self._of_rollouts(index),
            counts=sizes.counts,
            offsets=offsets_of(sizes.lengths[index]),
            objective=None,
            objectives=(),
        )

    def _of_rollouts(self, index: Tensor) -> dict[str, Any]:
        """The fields that have one element per rollout, of the rollouts `index` (b,) on the host."""
        at, numbers = index.to(self.group.device), index.tolist()
        return {
            "group": self.group[at],
            "rewards": self.rewards[at],
            "completions": self.completions and [self.completions[b] for b in numbers],
            "facts": {name: value[at] for name, value in self.facts.items()},
            "teacher_prompts": self.teacher_prompts and [self.teacher_prompts[b] for b in numbers],
        }

    @property
    def as_taught(self) -> Batch:
        """The batch as a teacher reads it: behind `teacher_prompts` where there are some."""
        if self.teacher_prompts is None:
            return self
        return dataclasses.replace(
            self, prompt_tokens=self.teacher_prompts, group=torch.arange(len(self.teacher_prompts))
        )

    @property
    def as_read(self) -> list[list[Tensor]]:
        """`completions`, or where there are none each rollout's tokens as its one chunk."""
        if self.completions is not None:
            return self.completions
        return [[tokens] for tokens in self.tokens.split(self.offsets.diff().tolist())]

    @property
    def sizes(self) -> Tensor:
        """Tokens of each rollout, the untrained ones too, (B,) int64 on the host."""
        if self.completions is None:
            return self.offsets.diff()
        return torch.tensor([sum(map(len, chunks)) for chunks in self.completions])

    def packed(self, *, whole: bool = False) -> Packed:
        """What one forward needs to score every trained token, on the host; `whole` as in `pack`."""
        if self.completions is None:
            return pack(self.prompt_tokens, self.group, self.tokens, self.offsets, whole=whole)
        chunks = [chunk for chunks in self.completions for chunk in chunks]
        group = self.group.repeat_interleave(torch.tensor([*map(len, self.completions)]))
        bounds = offsets_of(torch.tensor([*map(len, chunks)]))
        found = pack(self.prompt_tokens, group, torch.cat(chunks), bounds, whole=whole)
        rows = offsets_of(self.sizes)[self.rollout] + self.place
        reader = None if found.reader is None else found.reader[rows]
        return dataclasses.replace(found, predictor=found.predictor[rows], reader=reader)

    def minibatches(self, count: int, *, whole_groups: bool = False) -> list[Batch]:
        """This batch cut into `count` of whole groups, or of rollouts where groups are too few: one per optimizer step.

        Each has its own counts. There are fewer where rollouts are too few, or groups with `whole_groups`.
        """
        if count == 1:
            return [self]
        index = self.group.argsort(stable=True)
        kinds = self.group[index].unique_consecutive(return_counts=True)[1]
        pieces = kinds if whole_groups or len(kinds) >= count else torch.ones_like(index)
        sizes = [int(part.sum()) for part in pieces.tensor_split(count)]
        parts = [self.rollouts_at(rows) for rows in index.split(sizes) if len(rows)]
        return [part.counted() for part in parts]

    def counted(self) -> Batch:
        """A copy whose counts are its own: what is here is the whole of it."""
        counts = Counts(len(self.tokens), len(self.group), len(self.group.unique()))
        objectives = tuple(Objective(self._counts(each.lengths), each.lengths) for each in self.objectives)
        return dataclasses.replace(self, counts=counts, objectives=objectives)

    def _counts(self, lengths: Tensor) -> Counts:
        """The sizes of an objective with these tokens (B,) of each rollout: those without any are none of its own."""
        alive = lengths > 0
        return Counts(int(lengths.sum()), int(alive.sum()), len(self.group[alive].unique()))

    def micro_batches(self, index: Tensor, limit: int, *, whole_groups: bool = False) -> Iterator[Tensor]:
        """Cut the rollouts `index` (b,), sorted by group, into parts of at most `limit` packed tokens where possible.

        A group's prompt counts once in each part. With `whole_groups` no group is cut.
        """
        index = index[self.group[index].argsort(stable=True)]
        lengths, groups = self.sizes[index].tolist(), self.group[index].tolist()
        begin = start = total = 0  # of the part, of the group
        for at, group in enumerate(groups):
            if at and group != groups[at - 1]:
                start = at
            prompt = len(self.prompt_tokens[group])
            total += lengths[at] + (prompt if at == start else 0)
            cut = start if whole_groups else at
            if total > limit and cut > begin:
                yield index[begin:cut]
                begin = cut
                total = prompt + sum(lengths[cut : at + 1])
        if begin < len(index):
            yield index[begin:]

    def balanced(self, index: Tensor, limit: int, *, of: int = 1, whole_groups: bool = False) -> list[Tensor]:
        """Micro-batches of the rollouts `index` (b,), as few as `limit` allows, the largest as small as can be.

        There are as many as `of` ranks share evenly, or fewer where rollouts, or groups with `whole_groups`, are few.
        """
        parts = list(self.micro_batches(index, limit, whole_groups=whole_groups))
        most, below = -(-len(parts) // of) * of, 0
        while limit - below > 1:
            middle = (below + limit) // 2
            closer = list(self.micro_batches(index, middle, whole_groups=whole_groups))
            below, limit, parts = (below, middle, closer) if len(closer) <= most else (middle, limit, parts)
        return parts

    def to(self, device: torch.device | str) -> Batch:
        """A copy whose per-token and per-rollout fields live on `device`; offsets stay on the host."""
        moved = {name: value.to(device) for name, value in self._token_fields()}
        extra, facts = ({name: x.to(device) for name, x in each.items()} for each in (self.extra, self.facts))
        return dataclasses.replace(
            self, group=self.group.to(device), rewards=self.rewards.to(device), extra=extra, facts=facts, **moved
        )

    def replace(self, **fields: Any) -> Batch:
        """A copy with `fields` replaced."""
        return dataclasses.replace(self, **fields)

    def with_advantages(self, advantages: Tensor) -> Batch:
        """A copy with advantages given per rollout (B,), or per token (N,); per rollout where both are as many."""
        if advantages.shape == self.rewards.shape:
            advantages = self.to_tokens(advantages)
        elif advantages.shape != self.tokens.shape:
            raise ValueError(
                f"with_advantages: advantages must be ({len(self.rewards)},), one per rollout, or "
                f"({len(self.tokens)},), one per token; got {tuple(advantages.shape)}. Correct the recipe's advantage."
            )
        return self.replace(advantages=advantages.to(self.dtype))

    def to_tokens(self, per_rollout: Tensor) -> Tensor:
        """Spread one value per rollout (B,) over its tokens (n,)."""
        return taken(per_rollout, self.rollout)

    def rollout_sum(self, per_token: Tensor) -> Tensor:
        """Sum per-token values (n,) within each rollout, (B,)."""
        return per_token.new_zeros(len(self.group)).index_add(0, self.rollout, per_token)

    def rollout_mean(self, per_token: Tensor) -> Tensor:
        """Average per-token values (n,) within each rollout, (B,); rollouts without tokens give 0."""
        return self.rollout_sum(per_token) / self.lengths.clamp(min=1)

    def group_sum(self, per_rollout: Tensor) -> Tensor:
        """Sum values (B,) within each group and give it back to its rollouts, (B,)."""
        groups = max(len(self.prompt_tokens), len(self.group))
        return per_rollout.new_zeros(groups).index_add(0, self.group, per_rollout)[self.group]

    def group_mean(self, per_rollout: Tensor) -> Tensor:
        """Average values (B,) within each group and give it back to its rollouts, (B,)."""
        return self.group_sum(per_rollout) / self.group_sum(torch.ones_like(per_rollout))

    @property
    def group_offsets(self) -> Tensor:
        """(groups + 1,) int64 on the host: where the tokens of each group begin, for rollouts sorted by group."""
        sizes = self.group.cpu().unique_consecutive(return_counts=True)[1]
        return self.offsets[torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])]

    @property
    def last(self) -> Tensor:
        """Which tokens end their rollout, (n,) bool, where the batch holds whole rollouts."""
        ends = torch.ones_like(self.rollout, dtype=torch.bool)
        ends[:-1] = self.rollout[1:] != self.rollout[:-1]
        return ends

    def at_last(self, per_rollout: Tensor) -> Tensor:
        """One value per rollout (B,) at its last token, NaN at the others, (n,): a statistic that counts once."""
        return torch.where(self.last, self.to_tokens(per_rollout), torch.nan)

    def _token_fields(self):
        names = (
            "tokens",
            "rollout",
            "place",
            "rollout_logprobs",
            "advantages",
            "old_logprobs",
            "ref_logprobs",
            "values",
            "returns",
            "objective",
        )
        return [(name, getattr(self, name)) for name in names if getattr(self, name) is not None]


def batch_of(rollouts: Rollouts, rewards: Tensor, *, step: int = 0) -> Batch:
    """Pack `rollouts` with their `rewards` (B,) into a batch of those of their tokens that are trained."""
    if rewards.shape != (len(rollouts),):
        raise ValueError(
            f"batch_of: rewards must have shape ({len(rollouts)},), one per rollout; got {tuple(rewards.shape)}. "
            "Return one number per rollout from the recipe's reward."
        )
    trained, lengths = rollouts.trained, rollouts.offsets.diff()
    rollout = torch.repeat_interleave(torch.arange(len(rollouts)), lengths)[trained]
    partly = {}
    if not trained.all() or any(len(chunks) > 1 for chunks in rollouts.chunks):
        place = torch.arange(len(trained))[trained] - rollouts.offsets[rollout]
        each = zip(rollouts.tokens.split(lengths.tolist()), rollouts.chunks, strict=True)
        partly = {"completions": [list(tokens.split(chunks)) for tokens, chunks in each], "place": place}
    return Batch(
        tokens=rollouts.tokens[trained],
        rollout=rollout,
        offsets=offsets_of(rollout.bincount(minlength=len(rollouts))),
        group=rollouts.group,
        rewards=rewards.float(),
        rollout_logprobs=rollouts.rollout_logprobs[trained],
        counts=Counts(tokens=len(rollout), rollouts=len(rollouts), groups=len(rollouts.prompts)),
        prompt_tokens=rollouts.prompt_tokens,
        facts=rollouts.facts,
        step=step,
        **partly,
    )


def taken(x: Tensor, rows: Tensor) -> Tensor:
    """x[rows], whose gradient sums what several take of a row in one order: the same bits every time."""
    # With several threads torch adds by atomics: behind an index on CPUs, behind index_select on GPUs.
    return x.index_select(0, rows) if x.device.type == "cpu" else x[rows]


def offsets_of(lengths: Tensor) -> Tensor:
    """(B,) lengths as (B + 1,) offsets."""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
