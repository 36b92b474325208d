"""Several objectives in one pass: batches laid end to end, or tokens put behind rollouts, each under a loss of its own.

batch = joined(explored, rehearsed)        loss = mixture(clipped(), rehearsal)
batch = joined(emptied(explored), rehearsed)    the same loss, with nothing for its first part
each objective's loss sees its own tokens, with its own counts and lengths, as if they were all there are
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import torch
from torch import Tensor

from fuserl.engine.batch import Batch, Counts, Objective, offsets_of
from fuserl.engine.losses import Loss, needs

# What a batch may lack: NaN where it does and another one has it.
_NUMBERS = ("advantages", "old_logprobs", "ref_logprobs", "values", "returns")


def joined(*batches: Batch) -> Batch:
    """Batches one after the other, their rollouts and groups renumbered; tokens of number k are for objective k.

    Args:
        batches: each of one objective, with counts of its own. What only some have is NaN in the others, and their
            teacher reads the prompt that they have. An empty one is an objective that nothing is for.
    """
    for batch in batches:
        if batch.objectives:
            raise ValueError(
                "joined: each batch must have one objective; got one that has several. Join them all at once."
            )
    several = [len(batch.group) for batch in batches]
    starts = [sum(several[:at]) for at in range(len(several))]
    prompts = [sum(len(each.prompt_tokens) for each in batches[:at]) for at in range(len(batches))]
    lengths = torch.cat([batch.offsets.diff() for batch in batches])
    found = {"rollout": torch.cat([batch.rollout + start for batch, start in zip(batches, starts, strict=True)])}
    found["group"] = torch.cat([batch.group + start for batch, start in zip(batches, prompts, strict=True)])
    for name in ("tokens", "rewards", "rollout_logprobs"):
        found[name] = torch.cat([getattr(batch, name) for batch in batches])
    for name in _NUMBERS:
        found[name] = _filled([getattr(batch, name) for batch in batches], [len(batch.tokens) for batch in batches])
    for name, sizes in (("extra", [len(batch.tokens) for batch in batches]), ("facts", several)):
        named = {key: None for batch in batches for key in getattr(batch, name)}
        found[name] = {key: _filled([getattr(batch, name).get(key) for batch in batches], sizes) for key in named}
    if any(batch.completions is not None for batch in batches):
        found["completions"] = [each for batch in batches for each in batch.as_read]
        found["place"] = torch.cat([_places(batch) for batch in batches])
    if any(batch.teacher_prompts is not None for batch in batches):
        found["teacher_prompts"] = [each for batch in batches for each in _taught(batch)]
    return Batch(
        **found,
        offsets=offsets_of(lengths),
        counts=Counts(*(sum(each) for each in zip(*(dataclasses.astuple(b.counts) for b in batches), strict=True))),
        prompt_tokens=[tokens for batch in batches for tokens in batch.prompt_tokens],
        step=batches[0].step,
        objective=torch.cat([torch.full_like(batch.tokens, at) for at, batch in enumerate(batches)]),
        objectives=tuple(
            Objective(batch.counts, _within(batch.offsets.diff(), start, len(lengths)))
            for batch, start in zip(batches, starts, strict=True)
        ),
    )


def emptied(batch: Batch) -> Batch:
    """The batch without its rollouts: an objective that nothing is for."""
    return only(batch, torch.zeros(len(batch.group), dtype=torch.bool))


def only(batch: Batch, chosen: Tensor) -> Batch:
    """The rollouts `chosen` (B,) bool as if there were no others: they are what normalisers count."""
    return batch.rollouts_at(chosen.nonzero().squeeze(-1)).counted()


def parted(batch: Batch) -> list[Batch]:
    """The objectives of a joined batch as a batch each; without the empty ones."""
    return [only(batch, each.lengths > 0) for each in batch.objectives if each.counts.rollouts]


def together(*batches: Batch) -> Batch:
    """Batches one after the other as one of a single objective, with only the prompts that it has rollouts of."""
    found = joined(*batches)
    used, group = found.group.unique(return_inverse=True)
    prompts = [found.prompt_tokens[each] for each in used.tolist()]
    return found.replace(group=group, prompt_tokens=prompts, objective=None, objectives=()).counted()


def woven(batch: Batch) -> Batch:
    """A joined batch, its groups numbered so that of each objective every minibatch has its share."""
    place = torch.full((len(batch.prompt_tokens),), torch.inf, dtype=torch.float64)
    for objective in batch.objectives:
        groups = batch.group[objective.lengths > 0].unique()
        place[groups] = (torch.arange(len(groups)) + 0.5).double() / max(len(groups), 1)
    order = place.argsort(stable=True)
    return batch.replace(
        group=order.argsort()[batch.group], prompt_tokens=[batch.prompt_tokens[group] for group in order.tolist()]
    )


def appended(batch: Batch, tokens: Tensor, chosen: Tensor) -> Batch:
    """The batch with one more token behind each of the rollouts `chosen` (B,) bool, for objective 1; the rest is 0.

    Args:
        tokens: (B,) int64, the token of each, which nobody drew: its rollout_logprob is NaN, its advantage 0.
    """
    if batch.objectives:
        raise ValueError("appended: the batch must have one objective; it has several. Append before joining.")
    index, last = chosen.nonzero().squeeze(-1), len(batch.tokens)
    order = torch.cat([batch.rollout, index]).argsort(stable=True)
    new = torch.full((len(index),), torch.nan)

    def more(x: Tensor, end: Tensor) -> Tensor:
        return torch.cat([x, end.to(x.dtype)])[order]

    found = {name: more(getattr(batch, name), new) for name in _NUMBERS if getattr(batch, name) is not None}
    if batch.advantages is not None:
        found["advantages"] = more(batch.advantages, torch.zeros(len(index)))
    if batch.completions is not None:
        ends = dict(zip(index.tolist(), tokens[index].split(1), strict=True))
        found["completions"] = [
            [*each[:-1], torch.cat([each[-1], ends[b]])] if b in ends else each
            for b, each in enumerate(batch.completions)
        ]
        found["place"] = more(batch.place, batch.sizes[index])
    lengths = batch.offsets.diff()
    return batch.replace(
        **found,
        tokens=more(batch.tokens, tokens[index]),
        rollout=more(batch.rollout, index),
        rollout_logprobs=more(batch.rollout_logprobs, new),
        offsets=offsets_of(lengths + chosen.long()),
        counts=dataclasses.replace(batch.counts, tokens=batch.counts.tokens + len(index)),
        extra={name: more(value, new) for name, value in batch.extra.items()},
        objective=(order >= last).long(),
        objectives=(
            Objective(batch.counts, lengths),
            Objective(Counts(len(index), len(index), len(batch.group[index].unique())), chosen.long()),
        ),
    )


def mixture(*losses: Loss) -> Loss:
    """Loss number k of the tokens for objective k, each normalised by its own counts, in one pass over the model.

    The log-ratio statistics of a policy's loss are those of the first that has some; the others' other names must
    differ. It takes importance weights where the first loss does.
    """

    def function(out, batch: Batch):
        total, statistics = None, {}
        for number, loss in enumerate(losses):
            rows, seen = batch.seen_by(number)
            if not len(rows):
                continue
            each, facts = loss(SimpleNamespace(**{name: value[rows] for name, value in vars(out).items()}), seen)
            total = each.new_zeros(len(batch.tokens)) if total is None else total
            total = total.index_put((rows,), each)
            for name, value in facts.items():
                if value.dim() == 1:
                    value = value.new_full((len(batch.tokens),), torch.nan).index_put((rows,), value.detach())
                statistics.setdefault(name, value)
        if total is None:  # an empty batch, whose loss is 0
            total = 0.0 * next(iter(vars(out).values()))
        return total, statistics

    def live(batch: Batch) -> Tensor:
        found = torch.zeros(batch.tokens.shape, dtype=torch.bool)
        for number, loss in enumerate(losses):
            rows, seen = batch.seen_by(number)
            each = loss.live(seen)
            found[rows] = True if each is None else each
        return found

    outputs, reads = (tuple(dict.fromkeys(sum(each, ()))) for each in zip(*map(needs, losses), strict=True))
    first = losses[0].weighed
    return Loss(
        function,
        outputs=outputs,
        scope=max((loss.scope for loss in losses), key=("token", "rollout", "group").index),
        live=live,
        reads=reads,
        weighed=first and (lambda given: mixture(first(given), *losses[1:])),
        divergence=next((loss.divergence for loss in losses if loss.divergence), None),
        made={name: make for loss in losses for name, make in loss.made.items()},
    )


def _filled(several: list[Tensor | None], sizes: list[int]) -> Tensor | None:
    known = next((x for x in several if x is not None), None)
    if known is None:
        return None
    none = known.new_tensor(torch.nan if known.is_floating_point() else 0)
    return torch.cat(
        [none.expand(size, *known.shape[1:]) if x is None else x for x, size in zip(several, sizes, strict=True)]
    )


def _places(batch: Batch) -> Tensor:
    if batch.place is not None:
        return batch.place
    return torch.arange(len(batch.tokens)) - batch.offsets[batch.rollout]


def _taught(batch: Batch) -> list[Tensor]:
    if batch.teacher_prompts is not None:
        return batch.teacher_prompts
    return [batch.prompt_tokens[group] for group in batch.group.tolist()]


def _within(lengths: Tensor, start: int, count: int) -> Tensor:
    found = lengths.new_zeros(count)
    found[start : start + len(lengths)] = lengths
    return found
