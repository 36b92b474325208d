"""What is seen of a run as it goes, on a terminal and in a log."""

import math
import sys
import types
from pathlib import Path

import pytest

from fuserl.engine import display


def config(**changes):
    """What the display reads of a configuration."""
    settings = {
        "recipe": "grpo",
        "steps": 6,
        "data": None,
        "task": "sums",
        "reasons": {"groups": "because"},
        "groups": 16,
    }
    return types.SimpleNamespace(**{**settings, **changes})


def row(step, **changes):
    return {"step": step, "reward": 0.1 * step, "tokens": 100, "seconds": 4.0, **changes}


def lines(capsys, rows, **options):
    shown = display.Lines(config(), Path("runs/a"), **options)
    shown.start()
    for each in rows:
        shown.show(each)
    shown.stop()
    return capsys.readouterr().out.splitlines()


def test_the_opening_says_what_runs_where_why_and_from_which_step(capsys):
    assert lines(capsys, []) == ["grpo on sums, 6 steps, in runs/a", "  groups = 16: because"]
    assert lines(capsys, [], step=4)[0] == "grpo on sums, 6 steps, in runs/a, resumed at step 4"


def test_a_step_and_an_evaluation_are_a_line_each(capsys):
    evaluation = {"step": 0, "accuracy": 0.5, "correct": 100, "problems": 200, "pass@1": 0.4, "pass@8": 0.75}
    told = lines(capsys, [evaluation, row(1), row(2)])[2:]
    assert told[0] == "step 0/6  held-out accuracy 0.500 (100 of 200)  pass@8 0.750"
    assert told[1] == "step 1/6  reward 0.100  held-out 0.500  elapsed 0:00  left 0:20"
    assert told[2].endswith("left 0:16")


def test_speeds_are_those_of_the_phases_and_shares_of_the_machine(capsys):
    rates = {"generate_tokens_per_s": 310.4, "generate_share": 0.123, "update_tokens_per_s": 2900.0}
    told = lines(capsys, [row(1, **rates, update_share=0.456), row(2, **rates, update_share=math.nan), row(3)])[2:]
    assert told[0].endswith("left 0:20  generate 310 tokens/s (12%)  update 2,900 tokens/s (46%)")
    assert told[1].endswith("left 0:16  generate 310 tokens/s (12%)  update 2,900 tokens/s")
    assert told[2].endswith("left 0:12")


def test_the_time_left_is_of_this_processs_steps(capsys):
    assert lines(capsys, [row(5, seconds=8.0)], step=4)[-1].endswith("left 0:08")


def test_trouble_is_counted_and_shown_once_there_is_some(capsys):
    told = lines(capsys, [row(1, skipped=0), row(2, skipped=1, timeouts=2), row(3, skipped=math.nan, timeouts=1)])[2:]
    assert "skipped" not in told[0] and "timeouts" not in told[0]
    assert "skipped 1  timeouts 2" in told[1] and "skipped 1  timeouts 3" in told[2]


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ({"nll": 2.5, "loss": 1.0}, "nll 2.500"),
        ({"loss": 1.0}, "loss 1.000"),
        ({"pair_accuracy": 0.75, "loss": 1.0}, "pair accuracy 0.750"),
        ({"reward": None, "loss": math.nan}, "elapsed"),
        ({}, "elapsed"),
    ],
)
def test_a_step_without_reward_shows_what_it_has(capsys, given, shown):
    told = lines(capsys, [{"step": 1, "seconds": 2.0, "tokens": 10, **given}])[2:]
    assert len(told) == 1 and shown in told[0] and "reward" not in told[0] and "None" not in told[0]


def test_rows_that_are_no_step_and_evaluations_without_accuracy(capsys):
    told = lines(capsys, [{"step": 2, "save_s": 1.0}, {"step": 2, "problems": 4, "nll": 2.0}, row(3)])[2:]
    assert told[0] == "step 2/6  evaluated" and len(told) == 2 and told[1].endswith("left 0:12")


def test_the_bar_shows_step_speed_and_time_and_starts_where_a_run_resumes(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    live = display.Live(config(), Path("runs/[bold]a"), step=1)
    [task] = live._progress.tasks
    assert task.completed == 1 and task.description == "grpo 1/6"
    live.start()
    live.show({"step": 1, "accuracy": 0.5, "correct": 100, "problems": 200})
    live.show(row(2, timeouts=1))
    assert task.percentage == pytest.approx(100 / 3)
    live.show({"step": 3, "nll": 2.0, "seconds": 2.0, "update_tokens_per_s": 90.0, "update_share": 0.5})
    live.note("trace in runs/[bold]a")
    live.stop()
    out = capsys.readouterr().out
    for shown in ("grpo 3/6", "nll 2.000", "held-out 0.500", "timeouts 1", "left 0:09", "accuracy 0.500 (100 of 200)",
                  "update 90 tokens/s (50%)", "trace in runs/[bold]a"):  # fmt: skip
        assert shown in out, shown
    assert "in runs/[bold]a, resumed at step 1" in out


@pytest.mark.parametrize(
    ("columns", "last"), [(60, "held-out 0.500"), (80, "left 0:16"), (110, "tokens/s (12%)"), (140, "tokens/s (46%)")]
)
def test_a_narrow_terminal_leaves_out_the_last_facts_and_cuts_none(monkeypatch, columns, last):
    live = display.Live(config(), Path("runs/a"))
    monkeypatch.setattr(live._progress.console, "_width", columns)  # the console is one for the process
    live.show({"step": 0, "accuracy": 0.5})
    rates = {"generate_tokens_per_s": 310.4, "generate_share": 0.123, "update_tokens_per_s": 2900.0}
    live.show(row(2, **rates, update_share=0.456))
    [task] = live._progress.tasks
    assert task.fields["facts"].startswith("reward 0.200 · held-out 0.500") and task.fields["facts"].endswith(last)
    with live._progress.console.capture() as shown:
        live._progress.console.print(live._progress.get_renderable())
    [line] = shown.get().splitlines()
    assert "grpo 2/6" in line and task.fields["facts"] in line


def test_the_display_is_what_standard_output_can_show(monkeypatch):
    assert type(display.of(config(), Path("a"))) is display.Lines
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert type(display.of(config(), Path("a"), step=3)) is display.Live


def test_clock():
    assert [display.clock(seconds) for seconds in (0, 59.6, 3599, 3600, 90061)] == [
        "0:00", "1:00", "59:59", "1:00:00", "25:01:01",
    ]  # fmt: skip
