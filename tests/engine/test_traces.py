"""Chrome traces: of the steps that were asked for, with a range for each phase, whole on the disk or not there."""

import json
import os

import pytest
import tiny_runs
import torch

from fuserl.engine import loop, meter, traces


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    tiny_runs.use(monkeypatch)


def ranges(path):
    """(name, begin, end) of the ranges of a trace."""
    events = json.loads(path.read_text())["traceEvents"]
    return [(e["name"], e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") == "user_annotation"]


def test_a_trace_has_a_range_for_each_phase_and_the_display_says_where_it_is(tmp_path, capsys):
    tiny_runs.run(tmp_path, "run", reward="tiny_runs:shortness", profile=(), beta=0.1, max_new_tokens=3)
    assert sorted(path.name for path in (tmp_path / "run").glob("*trace*")) == ["trace-step-2.json"]
    path = tmp_path / "run" / "trace-step-2.json"
    assert f"step 2/3  trace in {path}; " in capsys.readouterr().out
    found = ranges(path)
    names = [name for name, *_ in found]
    for name in ("generate", "prefill", "reward", "update", "optimizer"):
        assert names.count(name) == 1, name
    assert 1 <= names.count("decode") <= 2 and "score" in names
    at = {name: (begin, end) for name, begin, end in found}
    for outer, inner in (("generate", "prefill"), ("generate", "decode"), ("update", "optimizer"), ("update", "score")):
        assert at[outer][0] <= at[inner][0] < at[inner][1] <= at[outer][1], (outer, inner)
    assert at["generate"][1] <= at["reward"][0] < at["reward"][1] <= at["update"][0]
    events = json.loads(path.read_text())["traceEvents"]
    assert any(
        e["name"] in ("aten::mm", "fuserl::linear") and at["update"][0] <= e["ts"] <= at["update"][1] for e in events
    )


def test_recording_changes_no_number_and_only_the_steps_asked_for_are_recorded(tmp_path):
    plain, traced = (
        tiny_runs.numbers(tiny_runs.run(tmp_path, name, reward="tiny_runs:shortness", profile=profile))
        for name, profile in (("plain", None), ("traced", ("1", "3")))
    )
    assert plain == traced
    assert not list((tmp_path / "plain").glob("*trace*"))
    assert sorted(p.name for p in (tmp_path / "traced").glob("*trace*")) == ["trace-step-1.json", "trace-step-3.json"]


def test_a_run_that_goes_on_records_its_own_second_step(tmp_path):
    config = tiny_runs.config(tmp_path, "run", steps=2, reward="tiny_runs:shortness", eval_every=0)
    folder = loop.train(config)
    draft = folder / ".trace-step-1.json.0123abcd.draft"
    draft.write_text("of a process that was killed")
    loop.train(config.replace(steps=5, profile=()), resume=folder)
    assert sorted(path.name for path in folder.glob("*trace*")) == ["trace-step-4.json"] and not draft.exists()


@pytest.mark.parametrize(
    ("profile", "start", "steps"),
    [(None, 0, set()), ((), 0, {2}), ((), 7, {9}), ((), 9, {10}), (("3", "7"), 5, {3, 7}), (("10",), 0, {10})],
)
def test_which_steps_are_recorded(profile, start, steps):
    assert traces.chosen(profile, 10, start=start) == steps
    assert traces.chosen((), 1) == {1}


@pytest.mark.parametrize("wrong", ["0", "11", "-1", "two", "2.5", ""])
def test_what_is_no_step_is_refused_before_anything_is_made(tmp_path, wrong):
    with pytest.raises(ValueError, match=f"must name steps from 1 to 10; got '{wrong}'"):
        traces.chosen(("1", wrong), 10)
    if wrong:
        with pytest.raises(ValueError, match="profile must name steps"):
            loop.train(tiny_runs.config(tmp_path, "run", profile=(wrong,), steps=10))
        assert not (tmp_path / "run").exists()


def test_a_trace_that_cannot_be_written_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch):
    absent = tmp_path / "absent" / "trace.json"
    with pytest.raises(RuntimeError, match=r"profile: .* must be writable"), traces.recorded(absent, "cpu"):
        torch.ones(2).sum()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RuntimeError, match="No space left"), traces.recorded(tmp_path / "trace.json", "cpu"):
        torch.ones(2).sum()
    assert not list(tmp_path.iterdir())


def test_what_fails_inside_fails_and_writes_nothing(tmp_path):
    with pytest.raises(KeyError), traces.recorded(tmp_path / "trace.json", "cpu"):
        raise KeyError
    assert not list(tmp_path.iterdir()) and not torch.autograd._profiler_enabled()


def test_a_range_costs_nothing_while_nothing_is_recorded(monkeypatch):
    made, make = [], meter.record_function
    monkeypatch.setattr(meter, "record_function", lambda name: made.append(name) or make(name))
    with meter.span("quiet"):
        pass
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]), meter.span("loud"):
        pass
    assert made == ["loud"]
