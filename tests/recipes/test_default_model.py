"""Three steps of every system on the default model and its own task, as `fuserl train` runs them, and a stop."""

import json
import math
import shutil

import pytest
import tiny_runs

from fuserl.engine import catalogue, cli

SMALL = "--steps 3 --groups 2 --max-new-tokens 12 --eval-problems 2 --save-every 2 --threads 1 --reward-workers 0"
# So that what begins later begins within three steps, and what is drawn beside the training is little.
OPTIONS = {
    "dph_rl": "--presamples 2 --solved 0.5",
    "rorecomp": "--buffer 1",
    "advantage_alignment": "--rounds 2 --past-every 1 --group-size 2 --max-new-tokens 4",
    "pre_rl": "--switch 1",
    "rep_exp": "--k 2",
    "self_interference": "--groups 6",  # of which greedy decoding leaves some that are right by chance
    "laser": "--w1 1 --w2 1",
    "c_grpo": "--max-new-tokens 24",
    "vas": "--n 2 --pool 4 --t-upd 2",
    "med_grpo": "--baseline 4",
    "r_to_q": "--beams 1,2",
}
PAIRS = ("vpo", "r_to_q")
HARD = ("c_grpo", "med_grpo")  # the model may earn the same for all that it says in so few tokens


@pytest.fixture
def folder(tmp_path):
    """A run's folder, whose checkpoints are too large to stay."""
    yield tmp_path / "run"
    shutil.rmtree(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("system", catalogue.SYSTEMS)
def test_three_steps_and_the_third_again(system, folder):
    size = "" if system in PAIRS else "--group-size 4"
    asked = f"train {system} --out {folder} {SMALL} {size} {OPTIONS.get(system, '')}"
    assert cli.main(asked.split()) == 0
    first = tiny_runs.rows(folder)
    steps = [row for row in first if "tokens" in row]
    assert [row["step"] for row in steps] == [1, 2, 3] and [row["step"] for row in first if "accuracy" in row] == [0, 3]
    assert all(math.isfinite(value) for row in first for value in row.values() if value is not None)
    assert all(row["loss"] is not None and row["skipped"] == 0 for row in steps if "loss" in row)
    assert system in HARD or any(row.get("grad_norm", 0) > 0 for row in steps)
    shutil.rmtree(max((folder / "checkpoints").iterdir()))
    assert cli.main(["train", "--resume", str(folder)]) == 0
    again = tiny_runs.rows(folder)
    assert [json.dumps(row) for row in tiny_runs.numbers(again)] == [
        json.dumps(row) for row in tiny_runs.numbers(first)
    ]
