"""A run's folder: what is written when, what is shown, and what it all comes to."""

import itertools
import json
import math
import os
import re

import pytest

from fuserl.engine import display, lookup, machine, metrics, report
from fuserl.engine.config import Config
from fuserl.engine.metrics import Run


def config(folder, **changes):
    return Config(out=str(folder), steps=6, device="cpu", **changes).resolved()


def row(step, **changes):
    return {
        "step": step,
        "reward": 0.1 * step,
        "tokens": 100,
        "generate_s": 1.0,
        "update_s": 2.0,
        "seconds": 4.0,
        **changes,
    }


def trained(folder, steps=6, **changes):
    with Run(config(folder)) as run:
        run.evaluated(0, {"problems": 200, "correct": 100})
        for step in range(1, steps + 1):
            run.log(row(step, **changes))
        run.evaluated(steps, {"problems": 200, "correct": 150})
    return run


def test_a_run_leaves_its_configuration_its_metrics_and_a_plot(tmp_path):
    run = trained(tmp_path / "run")
    written = json.loads((run.folder / "config.json").read_text())
    assert Config.read(run.folder / "config.json") == run.config
    assert written["reasons"]["groups"] and written["versions"]["torch"] and written["machine"]["cores"] >= 1
    rows = metrics.read(run.folder)
    assert [each["step"] for each in rows] == [0, 1, 2, 3, 4, 5, 6, 6]
    assert rows[0]["accuracy"] == 0.5 and rows[0]["problems"] == 200 and rows[3]["reward"] == 0.3
    assert all(a["elapsed"] <= b["elapsed"] for a, b in itertools.pairwise(rows))
    assert (run.folder / "reward.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(os.listdir(run.folder)) == ["config.json", "metrics.jsonl", "reward.png"]


def test_a_line_is_on_disk_when_log_returns(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(descriptor))
    with Run(config(tmp_path / "run")) as run:
        before = len(synced)
        run.log(row(1))
        assert len(synced) == before + 1 and len(metrics.read(run.folder)) == 1


def test_numbers_that_json_lacks_are_null(tmp_path):
    run = trained(tmp_path / "run", loss=math.nan, ratio=math.inf, count=7)
    assert "NaN" not in (run.folder / "metrics.jsonl").read_text()
    assert metrics.read(run.folder)[1]["loss"] is None and metrics.read(run.folder)[1]["count"] == 7


def test_a_line_cut_off_by_a_crash_is_left_out(tmp_path):
    run = trained(tmp_path / "run")
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "rew')
    assert metrics.read(run.folder)[-1]["step"] == 6


def test_an_error_and_an_interrupt_keep_what_was_measured(tmp_path, capsys):
    for error in (KeyboardInterrupt, ZeroDivisionError):
        with pytest.raises(error), Run(config(tmp_path / error.__name__)) as run:
            run.log(row(1))
            raise error
        assert len(metrics.read(run.folder)) == 1 and (run.folder / "reward.png").is_file()
        assert f"stopped by {error.__name__}" in capsys.readouterr().out
    with pytest.raises(KeyboardInterrupt), Run(config(tmp_path / "empty")):
        raise KeyboardInterrupt  # before anything was measured


def test_two_runs_do_not_share_a_folder(tmp_path):
    trained(tmp_path / "run")
    with pytest.raises(ValueError, match="must be a new folder"):
        Run(config(tmp_path / "run"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="must be writable"):
        Run(config(tmp_path / "file" / "run"))


def test_default_folder_is_named_after_the_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Run(Config(recipe="sft", device="cpu").resolved())
    assert run.folder.parent.name == "runs" and run.folder.name.startswith("sft-2") and run.folder.is_dir()


def test_plain_lines_when_output_is_no_terminal(tmp_path, capsys):
    trained(tmp_path / "run")
    out = capsys.readouterr().out
    lines = [line for line in out.split("\n") if line.startswith("step ")]
    assert len(lines) == 8 and lines[0] == "step 0/6  held-out accuracy 0.500 (100 of 200)"
    assert lines[3].startswith("step 3/6  reward 0.300  held-out 0.500  25 tokens/s  elapsed 0:00  left 0:12")
    assert "groups = 16: a step of 128 rollouts takes seconds on a CPU" in out
    assert "+0.250" in out and str(tmp_path / "run" / "reward.png") in re.sub(r"\s", "", out)


def test_live_display_shows_step_reward_speed_and_time(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    live = display.Live(config(tmp_path), tmp_path)
    live.start()
    live.show({"step": 0, "accuracy": 0.5, "correct": 100, "problems": 200})
    live.show(row(2))
    assert live._progress.tasks[0].percentage == pytest.approx(100 / 3)
    live.stop()
    out = capsys.readouterr().out
    for shown in (
        "grpo 2/6",
        "reward 0.200",
        "held-out 0.500",
        "25 tokens/s",
        "left 0:16",
        "accuracy 0.500 (100 of 200)",
    ):
        assert shown in out


def test_summary_says_what_the_run_came_to(tmp_path):
    rows = trained(tmp_path / "run").rows
    rows[-1]["elapsed"] = 48.0
    table = dict(report.summary(rows))
    assert table["held-out accuracy before"].startswith("0.500  (100 of 200; 95 %: 0.431 to 0.569)")
    assert table["rise"].startswith("+0.250  (95 %: +0.156 to +0.338)")
    assert table["reward, first and last 3 steps"] == "0.200 to 0.500"
    assert table["tokens/s"] == "25"
    assert table["time"] == "0:48  (generating 12%, updating 25%, evaluating and the rest 62%)"
    assert "host" in table["peak memory"]


def test_intervals_at_their_known_points():
    # Newcombe 1998, table I: 81/263 by Wilson's score method; table II (a): 56/70 - 48/80 by method 10.
    assert report.interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert report.interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    before, after = {"correct": 48, "problems": 80}, {"correct": 56, "problems": 70}
    assert report.rise_interval(before, after) == pytest.approx((0.0524, 0.3339), abs=5e-5)


def test_smoothing_keeps_constants_and_the_mean_of_a_line():
    assert report.smoothed([2.0] * 30) == [2.0] * 30
    assert report.smoothed([float(n) for n in range(30)]) == pytest.approx(list(range(30)))
    noisy = [float(n % 2) for n in range(40)]
    assert all(abs(value - 0.5) < 0.2 for value in report.smoothed(noisy)[4:-4])


@pytest.mark.parametrize("scale", [1.0, 7.0])
def test_plot_shows_every_reward_and_accuracy(scale, tmp_path, monkeypatch):
    figures = []
    figure_module = lookup.package("matplotlib.figure", "tasks")

    class Kept(figure_module.Figure):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            figures.append(self)

    monkeypatch.setattr(figure_module, "Figure", Kept)
    rows = [{"step": 0, "accuracy": 0.5, "accuracy_low": 0.4, "accuracy_high": 0.6, "problems": 100}]
    rows += [row(step, reward=scale * 0.1 * step) for step in range(1, 7)]
    assert report.plot(rows, tmp_path / "reward.png", "a title") == str(tmp_path / "reward.png")
    [figure] = figures
    axes = figure.axes[0]
    assert axes.lines[0].get_ydata() == pytest.approx([scale * 0.1 * step for step in range(1, 7)])
    assert axes.get_title(loc="left") == "a title" and axes.get_xlabel() == "step" and "reward" in axes.get_ylabel()
    assert len(figure.axes) == (1 if scale == 1.0 else 2)
    shown = figure.axes[-1].containers[0].lines[0].get_ydata()
    assert list(shown) == [0.5] and [text.get_text() for text in figure.axes[-1].texts] == ["0.50"]


def test_without_matplotlib_the_plot_says_so_in_one_line(tmp_path, monkeypatch):
    def absent(name, extra):
        raise RuntimeError(f'{name} is not installed. Run: pip install "fuserl[{extra}]"')

    monkeypatch.setattr(report.lookup, "package", absent)
    said = report.plot([row(1)], tmp_path / "reward.png", "")
    assert said == 'none: matplotlib is not installed. Run: pip install "fuserl[tasks]"'


def test_machine_facts():
    assert machine.versions()["torch"] and machine.versions()["fuserl"]
    assert 0 < machine.peak_memory()["host"] < 1000
    assert machine.machine()["memory_gb"] > 0.5
