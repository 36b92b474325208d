"""A search agent in a table: which four pages of a generated web to open and cite, before it has to answer.

It knows the answer once it has read the page that tells it, or all of the chain; what it then says names whom it read
of, and cites what it opened. Rewards are those of real texts, by rule.
"""

from __future__ import annotations

import asyncio
from typing import NamedTuple

import torch
from torch import Tensor

from fuserl.engine import tabular, webs
from fuserl.engine.advantages import standardized
from fuserl.engine.batch import Batch
from fuserl.engine.citations import Ruled, citation_aware, rubric_share
from fuserl.engine.judges import Judge
from fuserl.engine.losses import clipped, token_mean
from fuserl.engine.problems import Problem
from fuserl.engine.tabular import Table

HOPS, OPENED, GROUP, STEPS = 3, 4, 16, 120
PAGES = HOPS + 2  # the chain, the one that tells, and one beside the matter


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


def rewarded(batch: Batch, several: list[Problem], alpha: float, **how) -> Batch:
    """The batch with the rewards of its texts, and what they are made of as facts."""
    reward = citation_aware(Judge(rule=_exactly), alpha=alpha, **how)
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


def learnt(alpha: float, seeds: int, steps: int = STEPS) -> Earned:
    """What the agent earns after training on two problems with this weight of rubrics, averaged over seeds."""
    outcome, rubric = 0.0, 0.0
    for seed in range(seeds):
        several = webs.Web(f"hops={HOPS},others=1").distinct(seed, 2)
        sets = 2**PAGES

        def state(context: int, said: Tensor, sets: int = sets) -> int:
            opened = sum(1 << page for page in set(said.tolist()))
            return (context * OPENED + len(said)) * sets + opened

        table = Table(
            torch.zeros(2 * OPENED * sets, PAGES),
            state=state,
            length=OPENED,
            lr=0.1,
            optimizer=torch.optim.Adam,
            seed=seed,
        )
        for _ in range(steps):
            batch = rewarded(table.drawn([0, 1], GROUP, lambda *_: 0.0), several, alpha)
            tabular.learnt(table, batch, standardized, clipped(high=0.28, reduce=token_mean))
        batch = rewarded(table.drawn([0, 1], 100, lambda *_: 0.0), several, alpha)
        outcome += float(batch.facts["outcome"].mean()) / seeds
        rubric += float(batch.facts["rubric"].mean()) / seeds
    return Earned(outcome, rubric)


def unconnected() -> float:
    """The share of rubrics of a response that cites the second of two hops alone, without the walk from the answer."""
    known = {"E0": "Ada", "E1": "Bela", "E2": "Cora"}
    found = webs.Episode({"u": ["Bela is near Cora."]}, "u", "Ada, as Bela is near Cora [1](u).")
    rubrics = ("<E0> is near <E1>.", "<E1> is near <E2>.")
    return asyncio.run(rubric_share(Ruled(known), "", found, rubrics, connect=False))
