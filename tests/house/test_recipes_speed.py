"""The benchmark of recipes: what it measures of a run, what it draws, and what README makes of its rows."""

import concurrent.futures
import json
import sys
from pathlib import Path
from unittest.mock import ANY

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
sys.path.append(str(Path(__file__).resolve().parents[2] / "docs"))

import measured_tables
import recipes_speed

from fuserl.engine import catalogue, figures


def row(recipe, **changes):
    """A row as the benchmark writes it."""
    phases = {"generate_s": 2.0, "reward_s": 0.01, "score_s": 0.0, "update_s": 1.9, "other_s": 0.09, "seconds": 4.0}
    rates = {"generate_tokens_per_s": 1234.5, "generate_share": 0.25, "update_tokens_per_s": 198.0, "update_share": 0.5}
    facts = {"groups": 4, "group_size": 8, "max_new_tokens": 8, "model": "small", "device": "a CPU", "commit": "0123"}
    return {"recipe": recipe, **phases, **rates, **facts, "host_gb": 3.16, **changes}


@pytest.mark.parametrize(("recipe", "drawn"), [("grpo", True), ("dpo", False)])
def test_a_recipe_is_measured(recipe, drawn):
    found = recipes_speed.measured(recipe, "tiny", 4)
    assert found["steps"] == 2 and found["model"] == "tiny" and found["host_gb"] > 0
    # Medians of parts need not be parts of the median: two steps have theirs in the middle, so that these do add up.
    parts = sum(found[f"{phase}_s"] for phase in recipes_speed.PHASES)
    assert parts == pytest.approx(found["seconds"], rel=1e-2)
    assert found["update_tokens_per_s"] > 0 and found["update_share"] > 0
    assert ("generate_tokens_per_s" in found) == drawn


def test_the_reward_differs_within_groups_and_the_prompts_share_no_beginning(tmp_path):
    assert len({recipes_speed.spread(f" {n}") for n in range(90)}) > 60
    rows = [json.loads(line) for line in Path(recipes_speed.problems(tmp_path, 16)).read_text().splitlines()]
    assert len({each["prompt"][:12] for each in rows}) == 16
    for each in rows:
        a, b = map(int, each["prompt"].splitlines()[-1].removesuffix("=").split("+"))
        assert each["answer"] == each["chosen"] == str(a + b) != each["rejected"]


def test_the_picture_has_a_bar_a_recipe_with_phase_on_phase():
    figure = recipes_speed.picture([row("grpo"), row("sft", generate_s=0.0, seconds=2.0)])
    [axes] = figure.axes
    assert [text.get_text() for text in axes.get_yticklabels()] == ["grpo", "sft"]
    ends = [
        max(bar.get_x() + bar.get_width() for bar in axes.patches if bar.get_y() + 0.31 == place) for place in (0, 1)
    ]
    assert ends == pytest.approx([4.0, 2.0])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(recipes_speed.PHASES)
    assert "4 prompts x 8 completions x 8 tokens · a CPU" in axes.get_xlabel()
    assert figures.png(figure, dots=20).startswith(b"\x89PNG")


def test_rows_and_picture_are_kept_when_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(recipes_speed, "RESULTS", tmp_path / "rows.jsonl")
    monkeypatch.setattr(
        recipes_speed, "measured", lambda recipe, model, steps, once: row(recipe, model=model, steps=steps)
    )
    monkeypatch.setattr(
        concurrent.futures, "ProcessPoolExecutor", lambda workers, mp_context: concurrent.futures.ThreadPoolExecutor()
    )
    recipes_speed.main(["sft", "--model", "tiny", "--steps", "3"])
    assert capsys.readouterr().out.startswith("sft") and not list(tmp_path.iterdir())
    recipes_speed.main(["sft", "--model", "tiny", "--steps", "3", "--save"])
    assert "1,234       198 tokens/s  generate 50%  reward 0%" in capsys.readouterr().out
    [kept] = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert kept["recipe"] == "sft" and kept["steps"] == 3 and {"device", "torch", "commit", "date"} <= set(kept)
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_has_the_newest_row_of_each_recipe_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(measured_tables, "RESULTS", tmp_path)
    assert "Not measured yet" in measured_tables.speed()
    last, first = list(catalogue.RECIPES)[-1], next(iter(catalogue.RECIPES))
    rows = [row(last, seconds=9.0), row(first), row(last, gpu_gb=21.44)]
    costs = (first, 1.0), (last, 9.0), (last, 3.0), (first, 3.0), (first, 2.0), ("ppo", 4.0)
    rows += [row(name, once=True, seconds=99.0, update_s=cost) for name, cost in costs]
    del rows[2]["generate_share"], rows[2]["generate_tokens_per_s"]
    (tmp_path / "recipes_speed.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    head, _, *lines = measured_tables.speed().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len(head.split("|")) == len(lines[0].split("|"))
    split = "50% / 0% / 0% / 48% / 2%"
    assert cells == [
        [first, "small", "a CPU", "4 x 8 x 8", "1,234 (25%)", "198 (50%)", "4", split, "1.00", "3.2", "0123"],
        [
            "ppo",
            "small",
            "a CPU",
            "4 x 8 x 8",
            "1,234 (25%)",
            "198 (50%)",
            "99 (one update)",
            ANY,
            "2.00",
            "3.2",
            "0123",
        ],
        [last, "small", "a CPU", "4 x 8 x 8", "", "198 (50%)", "4", split, "1.50", "21.4", "0123"],
    ]
    (tmp_path / "recipes_speed.png").write_bytes(b"")
    assert measured_tables.speed().endswith("](benchmarks/results/recipes_speed.png)")
