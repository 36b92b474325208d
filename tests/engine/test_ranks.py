"""Runs of two ranks, their weights whole or cut over them, against the same runs by one: every figure is the same."""

import json
import math

import pytest
import tiny_models
import tiny_runs
import torch
from ranks import on_ranks

from fuserl.engine import loop, models, ranks
from fuserl.engine.follower import Follower
from fuserl.engine.metrics import Run

RANKS = 2
STEPS = 4
CASES = {
    "grpo": {"beta": 0.1, "minibatches": 2, "schedule": "cosine", "warmup": 1},
    "gspo": {"minibatches": 2},
    "reinforce_pp": {},
    "dpo": {},
    "dapo": {"attempts": 2},
    "ppo": {"minibatches": 2, "epochs": 2},
    "ppo apart": {"separate_critic": True, "minibatches": 2},
    "grpo adapters": {"lora_rank": 2, "beta": 0.1},
    "reward_model": {},
}


def config(folder, name, case, **changes):
    """A run whose micro-batches hold two rollouts or three, and whose last step has fewer of them than ranks."""
    settings = dict(
        reward="tiny_runs:shortness", steps=STEPS, micro_tokens=16, eval_every=3, eval_samples=2, groups=3, lr=0.002
    )
    return tiny_runs.config(folder, name, recipe=case.split()[0], **{**settings, **CASES[case], **changes})


def load(*_):
    return tiny_models.model(dtype=torch.float64), tiny_runs.Characters()


def trained(folder, name, case, resume=None, **changes):
    """Train, and write this rank's rows of metrics with all their digits to folder/name.rank.json."""
    rows = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "load", load)
        kind = Run if ranks.first() else Follower
        log = kind.log
        patch.setattr(kind, "log", lambda run, row: (rows.append(row), log(run, row)))
        patch.setattr(kind, "evaluated", lambda run, step, row: rows.append({"step": step, **row}))
        assert loop.train(config(folder, name, case, **changes), resume=resume) == folder / name
    path = folder / f"{name}.{ranks.rank()}.json"
    before = json.loads(path.read_text()) if resume else []
    path.write_text(json.dumps(before + tiny_runs.numbers(rows)))


def on_each(folder, shard):
    """All cases, the first of them in two parts too."""
    for case in CASES:
        trained(folder, f"{case} {shard}", case, shard=shard)
    trained(folder, f"resumed {shard}", "grpo", shard=shard, steps=2)
    trained(folder, f"resumed {shard}", "grpo", shard=shard, resume=folder / f"resumed {shard}")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of the runs of one rank and of two."""
    folder = tmp_path_factory.mktemp("runs")
    for case in CASES:
        trained(folder, f"{case} one", case)
    for shard in ("none", "full"):
        on_ranks(RANKS, on_each, folder, shard)
    return folder


def same(one, several):
    assert len(one) == len(several)
    for expected, got in zip(one, several, strict=True):
        assert expected.keys() == got.keys()
        for name, value in expected.items():
            near = (math.isnan(value) and math.isnan(got[name])) or math.isclose(
                value, got[name], rel_tol=1e-6, abs_tol=1e-6
            )
            assert near, f"{name} of step {expected['step']}: {got[name]}, where one rank has {value}"


def figures(folder, name, rank=0):
    return json.loads((folder / f"{name}.{rank}.json").read_text())


@pytest.mark.parametrize("shard", ["none", "full"])
@pytest.mark.parametrize("case", CASES)
def test_figures_are_those_of_one_rank(runs, case, shard):
    one, several = f"{case} one", f"{case} {shard}"
    for rank in range(RANKS):
        same(figures(runs, one), figures(runs, several, rank))
    samples = [(runs / name / "samples.jsonl").read_text() for name in (one, several)]
    assert samples[0] == samples[1] and samples[0].count("\n") == 4 * STEPS
