"""A reward that hangs, raises or gives no number, within a run: what is said of it, and what of the run is left."""

import json

import pytest
import tiny_runs
from tiny_runs import numbers, rows

from fuserl.engine import loop
from fuserl.engine.rewards import RewardError

# Nothing but itself is needed where it runs, which is another process.
MODULE = """
import time

def judged(completion):
    if len(completion) == 2:
        {deed}
    return 1.0 - len(completion) / 4
"""
DEEDS = {
    "raises": (
        "raise KeyError('units')",
        r"it raised KeyError: .*units.* for rollout \d \(prompt '\d\+1=', completion '",
    ),
    "is not a number": ("return float('nan')", r"must .*finite.*nan.* for rollout \d \(prompt '\d\+1=', completion '"),
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch, tmp_path):
    tiny_runs.use(monkeypatch)
    monkeypatch.chdir(tmp_path)


def config(tmp_path, module, deed, name="run", **changes):
    """A run with a reward of its own, in a module of its own."""
    (tmp_path / f"{module}.py").write_text(MODULE.format(deed=deed))
    settings = dict(reward=f"{module}:judged", reward_workers=1, eval_problems=0, samples=8, save_every=1)
    return tiny_runs.config(tmp_path, name, **{**settings, **changes})


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("deed", DEEDS)
def test_one_that_fails_is_named_with_its_rollout_and_nothing_is_lost(tmp_path, deed, overlap):
    code, says = DEEDS[deed]
    bad = config(tmp_path, f"bad{overlap}_{len(deed)}", code, overlap=overlap)
    with pytest.raises(RewardError, match=says) as error:
        loop.train(bad)
    done = [row["step"] for row in rows(tmp_path / "run")]
    kept = lines(tmp_path / "run" / f"failed-step-{len(done) + 1}.jsonl")
    number = int(str(error.value).partition("rollout ")[2].split()[0])
    assert len(kept) == 8 and kept[number]["reward"] is None and kept[number]["completion"] in str(error.value)
    ahead = tmp_path / "run" / f"failed-step-{len(done) + 2}.jsonl"
    assert ahead.exists() == overlap and (not overlap or len(lines(ahead)) == 8)
    works = dict(deed="pass", overlap=overlap)
    resumed = rows(loop.train(config(tmp_path, f"good{overlap}_{len(deed)}", **works), resume=tmp_path / "run"))
    whole = rows(loop.train(config(tmp_path, "whole", name="whole", **works)))
    assert numbers(resumed) == numbers(whole)


@pytest.mark.parametrize("overlap", [False, True])
def test_one_that_hangs_is_stopped_and_named_and_the_run_goes_on(tmp_path, overlap, capfd):
    hangs = config(tmp_path, f"hanging{overlap}", "time.sleep(600)", reward_timeout=0.5, overlap=overlap)
    found = rows(loop.train(hangs))
    late = [row["timeouts"] for row in found]
    said = [line for line in capfd.readouterr().err.splitlines() if "it was stopped after 0.5 s for rollout" in line]
    assert len(found) == 3 and sum(late) > 0 and len(said) == sum(count > 0 for count in late)
    written = [each for each in lines(tmp_path / "run" / "samples.jsonl") if each["reward"] == 0.0]
    assert any(repr(each["completion"]) in said[0] and repr(each["prompt"]) in said[0] for each in written)
