"""What a run came to: the facts, the figures of every panel, and the plot that stays in the folder."""

import io
import math
import re

import pytest
import recorded_run

from fuserl.engine import figures, lookup, panels, report


def axes_of(name, runs):
    """The axes of one panel, drawn."""
    [(panel, figure)] = [each for each in figures.figures(runs) if each[0].name == name]
    figures.png(figure, dots=20)
    return panel, figure.axes[0]


def names(rows):
    return [panel.name for panel, _ in figures.figures({"run": rows})]


def test_every_metric_that_is_logged_is_drawn_somewhere():
    rows = recorded_run.rows()
    shown = panels.present(panels.prepared({"run": rows}))
    drawn = {name for panel in shown for name in panel.labels(panels.prepared({"run": rows}))}
    counts = {"step", "tokens", "seconds", "elapsed", "skipped", "accuracy_low", "accuracy_high", "problems", "correct"}
    assert {name for row in rows for name in row} - drawn == counts | {"samples", "staleness", "ahead_s"}
    assert "tokens_per_second" in drawn
    assert len({panel.name for panel in shown}) == len(shown) > 20


def test_only_panels_whose_data_exist():
    assert names([{"step": 1, "reward": 0.5}]) == ["reward"]
    assert names([{"step": 1, "reward": 0.5, "entropy": 1.0}, {"step": 2, "loss": None}]) == ["reward", "entropy"]
    assert names([{"step": 1, "nll": 2.0, "tokens": 10, "seconds": 2.0}]) == ["nll", "throughput"]
    assert names([{"step": 1, "update_s": 2.0, "update_tflops": 1.0, "mismatch_ess": 1.0}]) == [
        "ess",
        "phases",
        "compute",
    ]
    assert names([{"step": 1}]) == [] and names([]) == []


def test_a_metric_without_a_panel_gets_one_and_an_evaluations_stays_apart_from_the_steps():
    rows = [{"step": 1, "margin": 0.5, "format_reward": 0.1}, {"step": 1, "problems": 4, "margin": 2.0, "eval_s": 1.0}]
    drawn = {panel.title: panel for panel, _ in figures.figures({"run": rows})}
    assert list(drawn) == ["Margin", "Time", "Format reward", "Held-out margin"]
    assert axes_of("margin", {"run": rows})[1].lines[0].get_ydata() == pytest.approx([0.5])


@pytest.mark.parametrize(
    "change",
    [
        lambda value: value,
        lambda value: None,
        lambda value: 0.0,
        lambda value: -abs(value or 1.0),
        lambda value: 7.0,
        lambda value: 1e300,
        lambda value: "text",
        lambda value: [1, 2],
        lambda value: True,
    ],
    ids=["as it is", "null", "zero", "negative", "constant", "huge", "text", "list", "true"],
)
def test_figures_of_anything(change):
    kept = ("step", "problems", "correct")
    one, two = (
        [{k: v if k in kept else change(v) for k, v in row.items()} for row in recorded_run.rows(steps)]
        for steps in (7, 1)
    )
    for runs in ({"one": two}, {"$\\frac{$": one, "two": two, "none": []}):
        figures.png(figures.overview(runs, "a $\\frac{$ title"), dots=20)
    report.summary(one)
    figures.png(figures.reward(one, "a $\\frac{$ title"), dots=20)


def test_what_is_missing_is_a_gap_and_not_a_line_across():
    rows = [{"step": step, "loss": None if step == 4 else 1.0} for step in range(1, 9)]
    drawn = list(axes_of("loss", {"run": rows})[1].lines[-1].get_ydata())
    assert math.isnan(drawn[3]) and [value for value in drawn if value == value] == [1.0] * 7
    assert report.smoothed([1.0, math.nan, 3.0])[0] == 1.0


def test_accuracy_has_its_interval_and_pass_at_k_in_order():
    panel, axes = axes_of("accuracy", {"run": recorded_run.rows()})
    rows = panels.prepared({"run": recorded_run.rows()})
    assert [label for label, *_ in panel.keys(rows)] == ["greedy", "pass@1", "pass@2", "pass@4", "pass@8"]
    [bars] = axes.containers
    assert bars.lines[0].get_ydata() == pytest.approx([0.26, 0.48, 0.70, 0.92])
    [segments] = bars.lines[2]
    assert segments.get_segments()[0][:, 1] == pytest.approx([0.19, 0.33])
    assert axes.get_ylim() == (-0.02, 1.02)


def test_time_is_stacked_phase_on_phase():
    rows = [{"step": 1, "generate_s": 4.0, "update_s": 3.0, "reward_s": 1.0, "score_s": 0.5, "save_s": 2.0}]
    rows = [{**rows[0], "seconds": 10.0, "other_s": 1.5}, {"step": 1, "accuracy": 0.5, "eval_s": 5.0}]
    _, axes = axes_of("phases", {"run": rows})
    tops = [patch.get_data().values.tolist() for patch in axes.patches]
    # generate, reward, score, update, other, save, evaluate
    assert tops == [[4.0], [5.0], [5.5], [8.5], [10.0], [12.0], [17.0]]
    panel, axes = axes_of("phases", {"one": rows, "two": [*rows, {"step": 2, "other_s": 1.0}]})
    assert [text.get_text() for text in axes.get_yticklabels()] == ["one", "two"]
    assert max(bar.get_x() + bar.get_width() for bar in axes.patches) == pytest.approx(18.0)
    assert [colour for _, colour, _ in panel.keys(panels.prepared({"one": rows, "two": rows}))][:2] == [
        "blue",
        "orange",
    ]


def test_skipped_steps_are_marked():
    _, axes = axes_of("gradient", {"run": recorded_run.rows()})
    assert [line.get_xdata()[0] for line in axes.lines if len(line.get_xdata()) == 2] == [23]


def test_several_runs_are_told_by_colour_and_their_series_by_dashes():
    runs = {"one": recorded_run.rows(seed=0), "two": recorded_run.rows(seed=1)}
    panel, axes = axes_of("clipped", runs)
    bold = [line for line in axes.lines if line.get_linewidth() == 2]
    looks = [(line.get_color(), line.get_linestyle()) for line in bold]
    assert len(set(looks)) == 6 and len({colour for colour, _ in looks}) == 2
    keys = panel.keys(panels.prepared(runs))
    assert keys == [("low", "soft", "-"), ("high", "soft", "--"), ("dual", "soft", ":")]


def test_a_scale_is_logarithmic_where_it_spans_decades():
    rows = [{"step": step, "mismatch": 10.0**-step} for step in range(1, 7)]
    assert axes_of("mismatch", {"run": rows})[1].get_yscale() == "log"
    assert axes_of("mismatch", {"run": rows[:2]})[1].get_yscale() == "linear"
    assert axes_of("mismatch", {"run": [*rows, {"step": 8, "mismatch": 0.0}]})[1].get_yscale() == "linear"


def test_long_runs_are_averaged_in_bins():
    rows = [{"step": step, "entropy": float(step % 2)} for step in range(1, 5001)]
    _, axes = axes_of("entropy", {"run": rows})
    drawn = axes.lines[0].get_ydata()
    assert 100 < len(drawn) <= 320 and all(abs(value - 0.5) < 0.1 for value in drawn)


def test_an_svg_has_the_pages_colours_and_no_address_or_shared_id():
    rows = {"run": recorded_run.rows()}
    drawn = {panel.name: figures.svg(figure, panel.name) for panel, figure in figures.figures(rows)}
    for text in drawn.values():
        assert "http" not in text and "<style" not in text and "DejaVu" not in text
        assert not re.search(r"#[0-9a-f]{6}\b", re.sub(r'(id="|href="#|url\(#)\w+', "", text)), text
        assert "var(--blue)" in text and set(re.findall(r"var\(--(\w+)\)", text)) <= set(panels.PALETTE)
    ids = [each for text in drawn.values() for each in re.findall(r'\bid="([^"]+)"', text)]
    assert len(set(ids)) == len(ids) > 20
    for text in drawn.values():
        assert set(re.findall(r"(?:href=\"#|url\(#)(\w+)", text)) <= set(re.findall(r'\bid="([^"]+)"', text))


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"), (0.25, "0.25"), (9999, "9999"), (12000, "12k"), (3e6, "3M"), (2.5e9, "2.5G"), (1e20, "1e20"),
        (1.5e-5, "1.5e\u22125"), (-0.5, "\u22120.5"),
    ],
)  # fmt: skip
def test_numbers_are_short(value, shown):
    assert panels.number(value) == shown


def test_summary_says_everything_that_a_run_came_to():
    table = dict(report.summary(recorded_run.rows()))
    assert table["held-out accuracy before"] == "0.260  (52 of 200; 95 %: 0.204 to 0.325)"
    assert table["held-out accuracy after"].startswith("0.920  (184 of 200;")
    assert table["rise"].startswith("+0.660  (95 %: +0.5")
    assert table["held-out pass@8"].endswith("(of 8 samples)") and table["held-out pass@8"].startswith("0.6")
    assert table["peak memory"] == "21.40 GB  (gpu, host 3.30 GB)"
    assert table["skipped updates"] == "1  (gradients were not finite)" and table["reward time-outs"] == "2"
    split = table["time"]
    assert all(word in split for word in ("generating", "rewarding", "scoring", "updating", "saving", "the rest"))
    assert sum(map(int, re.findall(r"(\d+)%", split))) == pytest.approx(100, abs=3)


def test_rates_are_those_of_all_the_time_that_a_phase_took():
    steps = [
        {"step": 1, "generate_s": 3.0, "generate_tokens_per_s": 100.0, "generate_gb_per_s": 4.0, "generate_share": 0.2},
        {"step": 2, "generate_s": 1.0, "generate_tokens_per_s": 500.0, "generate_gb_per_s": 8.0, "generate_share": 0.6},
        {"step": 3, "generate_s": 9.0, "update_s": 2.0, "update_tokens_per_s": 7000.0, "update_tflops": 0.0456},
    ]
    table = dict(report.summary(steps))
    assert table["generating"] == "200 tokens/s  (5 GB/s, 30% of the machine's best)"
    assert table["updating"] == "7,000 tokens/s  (0.0456 TFLOP/s)"


def test_the_mismatch_of_a_run_is_its_worst():
    steps = [{"step": n, "mismatch_max": 1e-5 * n, "mismatch_ess": 1 - 0.125 * n} for n in (1, 2)]
    table = dict(report.summary([*steps, {"step": 3, "mismatch_max": None, "mismatch_ess": None}]))
    assert table["largest mismatch"] == "2e-05 nats  (effective sample size 75.0% of the tokens at least)"
    assert "largest mismatch" not in dict(report.summary([{"step": 1, "mismatch_max": None}]))


def test_summary_of_runs_without_rewards_or_evaluations():
    steps = [{"step": step, "nll": 3.0 - step, "seconds": 1.0, "tokens": 50} for step in (1, 2)]
    assert dict(report.summary(steps)) == {
        "nll, first and last 1 step": "2.000 to 1.000",
        "tokens/s": "50",
        "time": "0:02  (evaluating and the rest 100%)",
    }
    one = dict(report.summary([{"step": 3, "accuracy": 0.5, "problems": 4, "correct": 2}]))
    assert one["held-out accuracy after 3 steps"].startswith("0.500  (2 of 4")
    assert report.summary([]) == []


def test_the_plot_of_a_run_without_rewards_shows_its_loss(tmp_path):
    rows = [{"step": step, "nll": 3.0 - step} for step in range(1, 4)]
    assert report.plot(rows, tmp_path / "reward.png", "sft") == str(tmp_path / "reward.png")
    assert (tmp_path / "reward.png").read_bytes().startswith(b"\x89PNG")
    axes = figures.reward(rows, "sft").axes[0]
    assert axes.get_ylabel() == "nll" and axes.lines[0].get_ydata() == pytest.approx([2.0, 1.0, 0.0])


def test_negative_rewards_have_an_axis_of_their_own():
    figure = figures.reward([{"step": 1, "reward": -3.0}, {"step": 1, "accuracy": 0.5}], "")
    left, right = figure.axes
    assert left.get_ylim()[0] < -2.9 and right.get_ylim() == (-0.02, 1.02) and right.get_ylabel() == "accuracy"


def test_a_folders_name_is_no_markup(capsys, tmp_path):
    report.show([("rise", "[bold]+1[/bold]")], tmp_path / "[red]", "none")
    out = re.sub(r"\s", "", capsys.readouterr().out)
    assert "[bold]+1[/bold]" in out and out.count("[red]") == 2 and "fuserlreport" in out


def test_an_overview_holds_every_panel_with_its_title():
    runs = {"one": recorded_run.rows(9), "two": recorded_run.rows(12)}
    figure = figures.overview(runs, "two runs")
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == [panel.title for panel, _ in figures.figures(runs)] and figure.get_suptitle() == "two runs"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["one", "two"]
    image = lookup.package("PIL.Image", "tasks").open(io.BytesIO(figures.png(figure, dots=40)))
    assert image.width > 400 and image.height > 400
