"""Runs of two ranks, their weights whole or cut over them, against the same runs by one: every figure is the same."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
import tiny_runs
import torch
from ranks import on_ranks
from safetensors.torch import load_file

from fuserl.engine import loop, models, ranks
from fuserl.engine.follower import Follower
from fuserl.engine.metrics import Run
from fuserl.engine.policy import Policy, Sampling, Updating

RANKS, STEPS = 2, 3
CASES = {
    "grpo": {"beta": 0.1, "minibatches": 2, "schedule": "cosine", "warmup": 1},
    "gspo": {"minibatches": 2},
    "reinforce_pp": {},
    "dpo": {},
    "dapo": {"attempts": 2},
    "ppo": {"minibatches": 2, "epochs": 2},
    "ppo apart": {"separate_critic": True, "minibatches": 2},
    "grpo adapters": {"lora_rank": 2, "beta": 0.1},
    "grpo recomputed": {"checkpoint_activations": True},
    "grpo alone": {"groups": 1, "group_size": 2, "minibatches": 2},  # the second rank has nothing to do
    "reward_model": {},
    "vpo online": {"online": True},
    "r_to_q": {"beams": "1,3", "guided": True},
}
STEADY = {"schedule": "constant", "warmup": 0, "steps": STEPS + 1}


def config(folder, name, case, **changes):
    """A run whose micro-batches hold two rollouts or three."""
    settings = dict(
        reward="tiny_runs:shortness", steps=STEPS, micro_tokens=16, eval_every=2, eval_samples=2, groups=3, lr=0.002
    )
    return tiny_runs.config(folder, name, recipe=case.split()[0], **{**settings, **CASES[case], **changes})


def trained(folder, name, case, *, resume=False, **changes):
    """Train in folder/name, and write this rank's rows of metrics with all their digits to folder/name.rank.json."""
    rows, kind = [], Run if ranks.first() else Follower
    with pytest.MonkeyPatch.context() as patch:
        # In float64 only what differs between the runs differs, and no rounding of theirs becomes another token.
        patch.setattr(models, "load", lambda *_: (tiny_models.model(dtype=torch.float64), tiny_runs.Characters()))
        log = kind.log
        patch.setattr(kind, "log", lambda run, row: (rows.append(row), log(run, row)))
        patch.setattr(kind, "evaluated", lambda run, step, row: rows.append({"step": step, **row}))
        asked = config(folder, name, case, **changes)
        assert loop.train(asked, resume=folder / name if resume else None) == folder / name
    path = folder / f"{name}.{ranks.rank()}.json"
    before = json.loads(path.read_text()) if resume and path.exists() else []
    path.write_text(json.dumps(before + tiny_runs.numbers(rows)))


def require_pieces():
    """Of every weight and of what AdamW keeps of it, the ranks have the elements once."""
    model = tiny_models.model()
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    actor = Policy(model, None, Sampling(), Updating(), value=True, cut=True)
    for state in (actor.parameters(), actor.optimizer.state_dict()):
        own = {name: piece.to_local().numel() for name, piece in state.items() if hasattr(piece, "to_local")}
        every = ranks.everyones(own)
        for name, size in own.items():
            whole = sizes.get(name.removeprefix("exp_avg_sq.").removeprefix("exp_avg."), 32)  # or the value head
            assert (sum(each[name] for each in every) == whole and size < whole) or whole == 32, name
        assert len(own) >= len(sizes)


def on_each(folder):
    """All cases; one with dropout, whose ranks draw their own, whole and in two parts; and one that one rank began."""
    for shard in ("none", "full"):
        for case in CASES:
            trained(folder, f"{case} {shard}", case, shard=shard)
        for part in ({}, {"steps": 2}, {"resume": True}):
            name = f"{'parts' if part else 'whole'} {shard}"
            trained(folder, name, "grpo adapters", shard=shard, lora_dropout=0.3, **part)
    require_pieces()
    trained(folder, "handed over", "grpo", resume=True, shard="full", **STEADY)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of the runs of one rank and of two."""
    folder = tmp_path_factory.mktemp("runs")
    for case in CASES:
        trained(folder, f"{case} one", case)
    shutil.copytree(folder / "grpo one", folder / "handed over")
    on_ranks(RANKS, on_each, folder, seconds=300)
    return folder


def figures(folder, name, rank=0):
    return json.loads((folder / f"{name}.{rank}.json").read_text())


def same(one, several):
    assert [row.keys() for row in one] == [row.keys() for row in several]
    for expected, got in zip(one, several, strict=True):
        assert got == pytest.approx(expected, rel=1e-6, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("shard", ["none", "full"])
@pytest.mark.parametrize("case", CASES)
def test_figures_are_those_of_one_rank(runs, case, shard):
    one, several = f"{case} one", f"{case} {shard}"
    for rank in range(RANKS):
        same(figures(runs, one), figures(runs, several, rank))
    texts = [(runs / name / "samples.jsonl").read_text() for name in (one, several)]
    alone, together = ([json.loads(line) for line in text.splitlines()] for text in texts)
    for expected, got in zip(alone, together, strict=True):  # credit is written with six digits
        assert got.pop("credit") == pytest.approx(expected.pop("credit"), rel=1e-5, abs=1e-6)
        assert got == expected
    assert len(alone) >= 2 * STEPS


@pytest.mark.parametrize("shard", ["none", "full"])
def test_a_resumed_run_is_as_one_that_never_stopped(runs, shard):
    for rank in range(RANKS):
        assert figures(runs, f"parts {shard}", rank) == figures(runs, f"whole {shard}", rank)


@pytest.mark.parametrize("case", CASES)
def test_checkpoints_are_whole_and_those_of_one_rank(runs, case):
    one, *several = (runs / f"{case} {name}" / "checkpoints" / f"step-{STEPS:08d}" for name in ("one", "none", "full"))
    for path in sorted(set(one.glob("*.safetensors")) - {one / "random.safetensors"}):
        expected = load_file(path)
        for folder in several:
            got = load_file(folder / path.name)
            assert got.keys() == expected.keys()
            for name, tensor in got.items():
                torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6, msg=f"{path.name}: {name}")


def test_another_number_of_ranks_goes_on(runs, tmp_path):
    """One rank's run by two, and a run of two by one: the same."""
    shutil.copytree(runs / "grpo full", tmp_path / "handed back")
    trained(tmp_path, "handed back", "grpo", resume=True, **STEADY)
    same(figures(tmp_path, "handed back"), figures(runs, "handed over"))
    assert [row["step"] for row in figures(runs, "handed over")] == [STEPS + 1, STEPS + 1]


def by_torchrun(how, *arguments):
    """A command of two ranks, in which the second one fails as `how` says: see ranked_run.py."""
    here = Path(__file__).parent
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    return subprocess.run(
        [*command, here / "ranked_run.py", how, *arguments], capture_output=True, text=True, timeout=200,
        env={**os.environ, "PYTHONPATH": f"{here.parent}:{here}", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


SAYS = "update: the second one must fail; it did. Expect no other."


@pytest.mark.parametrize("how", ["raises", pytest.param("killed", marks=pytest.mark.slow)])
def test_a_rank_that_fails_stops_all_and_the_run_goes_on(runs, tmp_path, how):
    settings, folder = tmp_path / "settings.json", tmp_path / "run"
    settings.write_text(json.dumps(config(tmp_path, "run", "grpo", save_every=1).to_dict()))
    failed = by_torchrun(how, "train", "--config", settings)
    assert failed.returncode and f"fuserl train --resume {folder} goes on." in failed.stderr  # of rank 0
    if how == "raises":
        assert f"fuserl: {SAYS}" in failed.stderr and f"fuserl: rank 1: {SAYS}" in failed.stderr  # of ranks 1 and 0
    else:  # torchrun may be quicker than the first rank to see it
        assert "SIGKILL" in failed.stderr
        assert "another one went without a word" in failed.stderr or "stopped by SIGTERM" in failed.stderr
    assert [row["step"] for row in tiny_runs.rows(folder)] == [0, 1]
    assert by_torchrun("whole", "train", "--resume", folder).returncode == 0
    for expected, got in zip(figures(runs, "grpo one"), tiny_runs.numbers(tiny_runs.rows(folder)), strict=True):
        assert got == pytest.approx(expected, rel=1.1e-5, abs=1e-6, nan_ok=True)  # six digits are written
