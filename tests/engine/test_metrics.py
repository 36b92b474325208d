"""A run's folder: what is written when, who may write there, and what is left when writing fails."""

import itertools
import json
import math
import os
import re

import pytest
import torch
from runs import config, full, lines, rollouts, row, trained

from fuserl.engine import lookup, machine, metrics, report
from fuserl.engine.config import Config
from fuserl.engine.metrics import Run


def test_a_run_leaves_its_configuration_its_metrics_and_a_plot(tmp_path):
    run = trained(tmp_path / "run")
    written = json.loads((run.folder / "config.json").read_text())
    assert Config.read(run.folder / "config.json") == run.config
    assert written["reasons"]["groups"] and written["versions"]["torch"] and written["machine"]["cores"] >= 1
    assert "resumed" not in written
    rows = metrics.read(run.folder)
    assert [each["step"] for each in rows] == [0, 1, 2, 3, 4, 5, 6, 6]
    assert rows[0]["accuracy"] == 0.5 and rows[0]["problems"] == 200 and rows[3]["reward"] == 0.3
    assert all(a["elapsed"] <= b["elapsed"] for a, b in itertools.pairwise(rows))
    assert (run.folder / "reward.png").read_bytes().startswith(b"\x89PNG")
    left = ["config.json", "metrics.jsonl", "reward.png", "run.lock", "samples.jsonl"]
    assert sorted(os.listdir(run.folder)) == left


def test_a_line_is_on_disk_when_log_returns(tmp_path, monkeypatch):
    synced = []
    with Run(config(tmp_path / "run")) as run:
        monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
        run.log(row(1))
        assert synced == [(run.folder / "metrics.jsonl").stat().st_size] and len(metrics.read(run.folder)) == 1
        run.sampled(1, rollouts(), [1.0, 0.0, 0.5], 2)
        assert synced[1:] == [(run.folder / "samples.jsonl").stat().st_size]


def test_numbers_that_json_lacks_are_null(tmp_path):
    run = trained(tmp_path / "run", loss=math.nan, ratio=math.inf, count=7)
    assert "NaN" not in (run.folder / "metrics.jsonl").read_text()
    assert metrics.read(run.folder)[1]["loss"] is None and metrics.read(run.folder)[1]["count"] == 7


def test_an_evaluation_of_nothing_is_no_row(tmp_path):
    with Run(config(tmp_path / "run")) as run:
        run.evaluated(0, {})
        run.evaluated(1, {"pass@1": 0.25, "eval_s": 1.5})
    [only] = metrics.read(tmp_path / "run")
    assert only["step"] == 1 and only["pass@1"] == 0.25


def test_a_line_cut_off_by_a_crash_is_left_out(tmp_path):
    run = trained(tmp_path / "run")
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "rew')
    assert metrics.read(run.folder)[-1]["step"] == 6


def test_files_that_are_no_metrics_are_one_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"must hold a run; metrics\.jsonl cannot be read \(No such file"):
        metrics.read(tmp_path)
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n\xff\0\n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 2 is not"):
        metrics.read(tmp_path)


def test_samples_are_the_first_completions_of_a_step(tmp_path):
    with Run(config(tmp_path / "run", samples=1)) as run:
        run.sampled(1, rollouts(), torch.tensor([1.0, 0.1, math.nan]), 9)
        run.sampled(2, rollouts(), [1, 0, 0])
        run.sampled(3, rollouts(), [1, 0, 0], 0)
    written = lines(tmp_path / "run" / "samples.jsonl")
    first = {"step": 1, "prompt": "1 + 1 =", "completion": " 2", "answer": "2", "reward": 1.0, "finish": "stop"}
    assert written[0] == first and [each["step"] for each in written] == [1, 1, 1, 2]
    assert written[1]["reward"] == 0.1 and written[1]["finish"] == "length"
    assert written[2] == first | {"prompt": "b", "completion": "\ud800 é\u2028", "answer": None, "reward": None}


@pytest.mark.parametrize(
    ("rewards", "written"),
    [
        ([1.0, None, None], [1.0, None, None]),
        (torch.tensor([1.0, 0.5, math.nan]), [1.0, 0.5, None]),
        (torch.tensor([[1.0, 0.5]] * 3), [[1.0, 0.5]] * 3),
        (None, [None] * 3),
        (torch.tensor(1.0), [None] * 3),
        (torch.ones(4), [None] * 3),
    ],
    ids=["some", "nan", "channels", "none", "number", "too-many"],
)
def test_everything_generated_for_a_failed_step_is_saved(rewards, written, tmp_path):
    with Run(config(tmp_path / "run")) as run:
        path = run.failed(4, rollouts(), rewards)
    assert path == tmp_path / "run" / "failed-step-4.jsonl"
    assert [each["completion"] for each in lines(path)] == rollouts().texts
    assert [each["reward"] for each in lines(path)] == written


def test_an_error_and_an_interrupt_keep_what_was_measured(tmp_path):
    for error in (KeyboardInterrupt, ZeroDivisionError):
        with pytest.raises(error) as raised, Run(config(tmp_path / error.__name__)) as run:
            run.log(row(1))
            raise error
        assert len(metrics.read(run.folder)) == 1 and (run.folder / "reward.png").is_file()
        assert f"fuserl train --resume {run.folder} goes on" in raised.value.__notes__[0]


def test_what_ends_before_anything_was_measured_leaves_nothing(tmp_path):
    there = tmp_path / "there"
    there.mkdir()
    (there / "mine.txt").write_text("kept")
    for folder in (tmp_path / "empty", there):
        with pytest.raises(KeyboardInterrupt) as raised, Run(config(folder)):
            raise KeyboardInterrupt
        assert not hasattr(raised.value, "__notes__")
    assert [path.name for path in tmp_path.rglob("*")] == ["there", "mine.txt"]
    with pytest.raises(KeyboardInterrupt), Run(config(there)) as run:
        run.failed(1, rollouts(), None)
        raise KeyboardInterrupt
    assert (there / "failed-step-1.jsonl").is_file() and (there / "config.json").is_file()
    trained(tmp_path / "run")
    for _ in range(2):  # neither a run that is resumed nor a folder that is taken is touched
        with pytest.raises(KeyboardInterrupt), Run(config(tmp_path / "run"), resume=tmp_path / "run"):
            raise KeyboardInterrupt
    with pytest.raises(ValueError, match="is taken"):
        Run(config(tmp_path / "run"))
    assert len(metrics.read(tmp_path / "run")) == 8


@pytest.mark.parametrize("line", ["3", '["step"]', '{"reward": 1.0}', '{"step": "x"}', "[" * 100_000])
def test_lines_that_are_no_rows_are_refused(line, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"line 2 is not.* Remove (it|that line)\.$"):
        metrics.read(tmp_path)


def test_two_runs_do_not_share_a_folder(tmp_path):
    trained(tmp_path / "run")
    with pytest.raises(ValueError, match="must be a new folder"):
        Run(config(tmp_path / "run"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="must be writable"):
        Run(config(tmp_path / "file" / "run"))


def test_a_folder_is_taken_by_what_a_run_would_lose(tmp_path):
    for number, name in enumerate(["metrics.jsonl", "samples.jsonl", "config.json", "checkpoints"]):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "notes").write_text("mine")
        Run(config(tmp_path / f"beside-{number}")).__exit__(None, None, None)
        (folder / name).write_text("mine")
        with pytest.raises(ValueError, match="is taken"):
            Run(config(folder))
        assert (folder / name).read_text() == "mine"
    (tmp_path / "killed").mkdir()  # before the run had written anything
    (tmp_path / "killed" / "run.lock").write_text("1\n")
    (tmp_path / "killed" / "metrics.jsonl").write_text("")
    (tmp_path / "killed" / ".config.json.0123.draft").write_text("{")
    with Run(config(tmp_path / "killed")) as run:
        run.log(row(1))
    assert not list(run.folder.glob("*.draft"))


def test_a_full_disk_is_one_sentence_and_leaves_whole_lines(tmp_path):
    with Run(config(tmp_path / "run")) as run:
        run.log(row(1))
        before = (run.folder / "metrics.jsonl").read_bytes()
        with full(len(before) + 20), pytest.raises(RuntimeError, match=r"metrics\.jsonl must be writable; .*too large"):
            run.log(row(2))
        assert (run.folder / "metrics.jsonl").read_bytes() == before and len(run.rows) == 1
        with full(20), pytest.raises(RuntimeError, match=r"failed-step-2\.jsonl must be writable"):
            run.failed(2, rollouts(), None)
        run.log(row(2))
    assert [each["step"] for each in metrics.read(run.folder)] == [1, 2]


def test_a_plot_that_cannot_be_written_hides_neither_table_nor_error(tmp_path, capsys):
    with pytest.raises(ZeroDivisionError), full(5000), Run(config(tmp_path / "run")) as run:
        run.log(row(1))
        raise ZeroDivisionError
    out = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "plot none: File too large" in out and not (run.folder / "reward.png").exists()


def test_default_folder_is_named_after_the_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Run(Config(recipe="sft", device="cpu").resolved()) as run:
        pass
    assert run.folder.parent.name == "runs" and run.folder.name.startswith("sft-2") and run.folder.is_dir()


def test_plain_lines_when_output_is_no_terminal(tmp_path, capsys):
    trained(tmp_path / "run")
    out = capsys.readouterr().out
    lines = [line for line in out.split("\n") if line.startswith("step ")]
    assert len(lines) == 8 and lines[0] == "step 0/6  held-out accuracy 0.500 (100 of 200)"
    assert re.match(r"step 3/6  reward 0\.300  held-out 0\.500  elapsed 0:\d\d  left 0:12", lines[3])
    assert "groups = 16: a step of 128 rollouts takes seconds on a CPU" in out
    assert "+0.250" in out and str(tmp_path / "run" / "reward.png") in re.sub(r"\s", "", out)


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
