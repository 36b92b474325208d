"""A run taken up again: its lock, its files cut back to a checkpoint's position, its settings, its trackers."""

import json
import os
import signal
import subprocess
import sys
import types

import pytest
from runs import config, interrupted, rollouts, row, trained

import fuserl.engine
from fuserl.engine import metrics
from fuserl.engine.config import Config
from fuserl.engine.metrics import Run

WRITER = """
import sys
from fuserl.engine.config import Config
from fuserl.engine.metrics import Run
with Run(Config(out=sys.argv[1], steps=6, device="cpu").resolved()) as run:
    run.log({"step": 1, "reward": 0.5, "seconds": 1.0})
    print("written", flush=True)
    sys.stdin.read()
"""


def test_a_folder_is_locked_as_long_as_its_process_lives(tmp_path):
    folder = tmp_path / "run"
    arguments = [sys.executable, "-c", WRITER, folder]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        while "written" not in writer.stdout.readline():
            assert writer.poll() is None
        with pytest.raises(ValueError, match=f"one run at a time may write .*; process {writer.pid} does") as error:
            Run(config(folder), resume=folder)
        assert "\n" not in str(error.value)
        writer.send_signal(signal.SIGKILL)
    with Run(config(folder), resume=folder) as run:
        run.rewind(None)
        with pytest.raises(ValueError, match=f"; process {os.getpid()} does"):
            Run(config(folder), resume=folder)


def test_of_two_runs_that_start_together_one_stops(tmp_path):
    with metrics._lock(tmp_path), pytest.raises(ValueError, match="one run at a time"):
        Run(config(tmp_path))
    with Run(config(tmp_path)), pytest.raises(ValueError, match="one run at a time"):
        Run(config(tmp_path), resume=tmp_path)


def test_a_resumed_run_goes_on_from_the_position(tmp_path):
    folder = tmp_path / "run"
    position = interrupted(folder)
    before = {name: (folder / name).read_bytes() for name in ("metrics.jsonl", "samples.jsonl")}
    assert position["step"] == 2 and position["metrics.jsonl"] < len(before["metrics.jsonl"])
    for name in before:
        with (folder / name).open("a") as file:
            file.write('{"step": 4, "rew')
    with Run(config(folder), resume=folder) as run:
        run.rewind({**position, "elapsed": 1000.0})
        for name, data in before.items():
            assert (folder / name).read_bytes() == data[: position[name]]
        assert [each["step"] for each in run.rows] == [1, 2]
        run.sampled(3, rollouts(), [1.0, 0.0, 0.5], 2)
        run.log(row(3))
        assert run.position() == {
            "step": 3,
            "elapsed": pytest.approx(1000.0, abs=60),
            "metrics.jsonl": (folder / "metrics.jsonl").stat().st_size,
            "samples.jsonl": len(before["samples.jsonl"]),
        }
    rows = metrics.read(folder)
    assert [each["step"] for each in rows] == [1, 2, 3] and 1000 <= rows[2]["elapsed"] < 1060
    assert (folder / "samples.jsonl").read_bytes() == before["samples.jsonl"]
    with Run(config(folder), resume=folder) as run:
        run.rewind(None)  # there was no checkpoint
        assert run.rows == [] and run.position() == {
            "step": 0, "elapsed": pytest.approx(0.0, abs=60), "metrics.jsonl": 0, "samples.jsonl": 0,
        }  # fmt: skip


def test_a_rewind_that_was_stopped_is_made_again(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    position = interrupted(folder)

    def stop(*args):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Run(config(folder), resume=folder) as run:
        monkeypatch.setattr(os, "fsync", stop)  # after the first file was cut
        run.rewind(position)
    monkeypatch.undo()
    with Run(config(folder), resume=folder) as run:
        run.rewind(position)
        assert {name: (folder / name).stat().st_size for name in ("metrics.jsonl", "samples.jsonl")}.items() <= (
            position.items()
        )


def test_lines_that_were_lost_from_before_the_position_are_said(tmp_path, capsys):
    folder = tmp_path / "run"
    position = interrupted(folder)
    data = (folder / "metrics.jsonl").read_bytes()
    (folder / "metrics.jsonl").write_bytes(data[: position["metrics.jsonl"] - 1])
    with Run(config(folder), resume=folder) as run:
        run.rewind(position)
        assert [each["step"] for each in run.rows] == [1]
        run.log(row(3))
    assert [each["step"] for each in metrics.read(folder)] == [1, 3]
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"fuserl: {folder / 'metrics.jsonl'} has lost lines")


def test_a_resume_and_its_changes_are_in_the_configuration(tmp_path):
    folder = tmp_path / "run"
    position = interrupted(folder)
    first = json.loads((folder / "config.json").read_text())
    moved = folder.rename(tmp_path / "moved")
    for steps, wanted in ((9, {"steps": [6, 9], "groups": [16, 4]}), (9, {})):
        with Run(config(moved, steps=steps, groups=4), resume=moved) as run:
            run.rewind(position)
        written = json.loads((moved / "config.json").read_text())
        assert written["resumed"][-1]["step"] == 2 and written["resumed"][-1]["changes"] == wanted
    assert len(written["resumed"]) == 2 and written["started"] == first["started"]
    assert Config.read(moved / "config.json") == config(moved, steps=9, groups=4)
    assert "groups" not in written["reasons"] and written["reasons"]["group_size"] == first["reasons"]["group_size"]


def test_what_cannot_be_resumed_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"must hold a run; it has no config\.json"):
        Run(config(tmp_path), resume=tmp_path)
    for text, says in (("{", "must be readable JSON"), ("[1]", "something else"), ('{"a": 1}', "something else")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=says):
            Run(config(tmp_path), resume=tmp_path)
        assert (tmp_path / "config.json").read_text() == text
    trained(tmp_path / "run")
    unmoved = Run(config(tmp_path / "run"), resume=tmp_path / "run")
    with unmoved, pytest.raises(ValueError, match="must be rewound before anything is logged"):
        unmoved.log(row(7))
    assert len(metrics.read(tmp_path / "run")) == 8


class Trackers:
    """Stands for the module of trackers: keeps what it is told."""

    def __init__(self, monkeypatch):
        self.said = []
        module = types.SimpleNamespace(of=self.of)
        monkeypatch.setitem(sys.modules, "fuserl.engine.trackers", module)
        monkeypatch.setattr(fuserl.engine, "trackers", module, raising=False)

    def of(self, names, folder, settings, *, step):
        if "unknown" in names:
            raise ValueError("of: trackers must be known")
        self.said.append(("of", names, folder.name, settings["steps"], step))
        tracker = types.SimpleNamespace(
            log=lambda step, row: self.said.append(("log", step, row["reward"])),
            close=lambda: self.said.append(("close",)),
        )
        return [tracker]


def test_trackers_hear_every_row_and_where_a_resume_starts(tmp_path, monkeypatch):
    trackers, folder = Trackers(monkeypatch), tmp_path / "run"
    with pytest.raises(ValueError, match="must be known"):
        Run(config(folder, trackers=("unknown",)))
    position = interrupted(folder, trackers=("tensorboard",))
    with Run(config(folder, trackers=("tensorboard",)), resume=folder) as run:
        run.rewind(position)
        run.log(row(3, reward=0.7))
    opened = ("of", ("tensorboard",), "run", 6)
    assert trackers.said == [
        (*opened, 0), ("log", 1, 0.1), ("log", 2, 0.2), ("log", 3, pytest.approx(0.3)), ("close",),
        (*opened, 2), ("log", 3, 0.7), ("close",),
    ]  # fmt: skip
