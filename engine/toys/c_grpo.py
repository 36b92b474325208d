"""A search agent in a table: which four pages of a generated web to open and cite, before it has to answer.

It knows the answer once it has read the page that tells it, or all of the chain; what it then says names whom it read
of, and cites what it opened. Rewards are those of real texts, by rule.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fuserl.engine import citations, tabular, webs
from fuserl.engine.batch import Batch
from fuserl.engine.checks import Figure, at_least, at_most
from fuserl.engine.judges import Judge
from fuserl.engine.losses import Loss
from fuserl.engine.problems import Problem
from fuserl.engine.tabular import Table

HOPS, OPENED, GROUP, STEPS = 3, 4, 16, 120
PAGES = HOPS + 2  # the chain, the one that tells, and one beside the matter
CHAIN = ("<E0> is near <E1>.", "<E1> is near <E2>.")


class Earned(NamedTuple):
    """Means over what is drawn at the end of training."""

    outcome: float
    rubric: float


def text(problem: Problem, pages: list[int]) -> str:
    """The agent's text when it opens these pages of a problem: 0, 1, ... along the chain, then the one that tells."""
    known, facts = problem.metadata["pages"], [sentence(problem, hop) for hop in range(HOPS)]
    places = [next(url for url, page in known.items() if page == fact) for fact in facts]
    rest = [url for url in known if url not in places and url != "https://quiz.net"]
    chosen = [[*places, "https://quiz.net", *rest][page] for page in pages]
    knows = HOPS in pages or set(range(HOPS)) <= set(pages)
    calls = [f"open({url})\n[{url}] {known[url]}\n" for url in chosen]
    facts = " ".join(f"{known[url]} [{n}]({url})" for n, url in enumerate(dict.fromkeys(chosen), 1))
    return f"{''.join(calls)}<answer>{problem.answer if knows else 'nobody'}</answer> {facts}"


def sentence(problem: Problem, hop: int) -> str:
    """The fact that a rubric asks for."""
    names = problem.metadata["entities"]
    found = problem.metadata["rubrics"][hop]
    for name, value in names.items():
        found = found.replace(f"<{name}>", value)
    return found


async def _exactly(arguments: dict) -> float:
    return float(f"<answer>{arguments['answer']}</answer>" in arguments["completion"])


def rewarded(batch: Batch, several: list[Problem], alpha: float) -> Batch:
    """The batch with the rewards of its texts, and what they are made of as facts."""
    reward = citations.citation_aware(Judge(rule=_exactly), alpha=alpha)
    drawn = batch.tokens.view(len(several), -1, OPENED).tolist()

    async def of_all() -> list[dict]:
        found = []
        for problem, group in zip(several, drawn, strict=True):
            texts = [text(problem, pages) for pages in group]
            found += await reward("", texts, problem.answer, problem.metadata, ["stop"] * len(texts))
        return found

    found = asyncio.run(of_all())
    columns = {name: torch.tensor([each[name] for each in found], dtype=torch.float64) for name in found[0]}
    return batch.replace(rewards=columns.pop("reward"), facts=columns)


def state(context: int, said: Tensor) -> int:
    """The table's row of a problem and of how many and which pages were opened."""
    opened = sum(1 << page for page in set(said.tolist()))
    return (context * OPENED + len(said)) * 2**PAGES + opened


def learnt(alpha: float, advantage: Callable, loss: Loss, seeds: int) -> Earned:
    """What the agent earns after training on two problems with this weight of rubrics, averaged over seeds."""
    outcome, rubric = 0.0, 0.0
    for seed in range(seeds):
        several, logits = webs.Web(f"hops={HOPS},others=1").distinct(seed, 2), torch.zeros(2 * OPENED * 2**PAGES, PAGES)
        table = Table(logits, state=state, length=OPENED, lr=0.1, optimizer=torch.optim.Adam, seed=seed)
        for _ in range(STEPS):
            batch = rewarded(table.drawn([0, 1], GROUP, lambda *_: 0.0), several, alpha)
            tabular.learnt(table, batch, advantage, loss)
        batch = rewarded(table.drawn([0, 1], 100, lambda *_: 0.0), several, alpha)
        outcome += float(batch.facts["outcome"].mean()) / seeds
        rubric += float(batch.facts["rubric"].mean()) / seeds
    return Earned(outcome, rubric)


def unconnected() -> float:
    """The share of rubrics of a response that cites the second of two hops alone, without the walk from the answer."""
    known = {"E0": "Ada", "E1": "Bela", "E2": "Cora"}
    found = webs.Episode({"u": ["Bela is near Cora."]}, "u", "Ada, as Bela is near Cora [1](u).")
    return asyncio.run(citations.rubric_share(citations.Ruled(known), "", found, CHAIN, connect=False))


def figures(advantage: Callable, loss: Loss, seeds: int = 2) -> list[Figure]:
    """Chains with and without a break, rewards of groups, and the agent in its web."""
    right, broken = [citations.connected(CHAIN, supported) for supported in ((True, True), (False, True))]
    worst = citations.mixed([0.0, 1.0], [1.0, 0.2], alpha=0.3)[0]
    group = citations.mixed([1.0] * 3, [0.2, 0.4, 0.8], alpha=0.3)
    outcomes, ours = (learnt(alpha, advantage, loss, seeds) for alpha in (0.0, 0.3))
    return [
        Figure("rubrics of a whole chain", sum(right) / 2, 1),
        Figure("rubrics behind a break", sum(broken) / 2, 0),
        Figure("the same by shares of supported ones", unconnected(), 0.5),
        Figure("reward of a wrong answer with all rubrics", worst, 0, 0),
        Figure("reward at R_r = 0.2", group[0], 0.775),
        Figure("reward at R_r = 0.4", group[1], 0.85),
        Figure("reward at R_r = 0.8", group[2], 1.0),
        at_most("rubrics earned after outcomes alone", outcomes.rubric, 0.5),
        at_least("rubrics earned after C-GRPO", ours.rubric, 0.8),
        at_least("right answers above those of outcomes", ours.outcome - outcomes.outcome, -0.03),
    ]
