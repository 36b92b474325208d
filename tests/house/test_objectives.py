"""The benchmark of objectives: what its start learned to read, what it measures of a run, and what it keeps."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
sys.path.append(str(Path(__file__).resolve().parents[2] / "docs"))

import baselines
import measured_tables
import objectives

from fuserl.engine import catalogue


def test_notes_name_either_digit_and_do_not_say_which_is_larger(tmp_path):
    rows = [json.loads(line) for line in Path(objectives.notes(tmp_path)).read_text().splitlines()]
    told = [row for row in rows if len(row["prompt"]) > len("3,7=")]
    assert len(rows) == 1350 and len(told) == 900 and all(str(row["prompt"]).endswith("=") for row in rows)
    larger = sum(row["answer"] == max(row["prompt"][-4], row["prompt"][-2]) for row in told)
    assert abs(larger - 450) < 5 * 15  # five standard errors of 900 fair coins
    for row in told:
        a, b = row["prompt"][-4], row["prompt"][-2]
        assert row["prompt"] in objectives.shown(int(a), int(b), int(row["answer"]))


def test_notes_are_what_the_teachers_of_a_run_read():
    behind, beside = objectives.shown(3, 7, 3)
    assert behind == "3,7= 3\n3,7="
    assert beside == "Correct solution:\n3\n\nCorrectly solve the original question.\n\n3,7="


def test_a_step_at_which_it_was_reached():
    assert objectives.reached([0.0, 1, 1, 1, 1, 0.0]) == 5.0
    assert math.isnan(objectives.reached([0.7] * 9)) and math.isnan(objectives.reached([1.0] * 4))


def found(recipe, seed):
    return {"pass@1": 0.5 + 0.1 * seed, "pass@16": 1.0, "entropy": 0.1, "steps": math.nan}


def test_rows_are_kept_when_asked_for_and_drawn_beside_those_from_before(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(objectives, "RESULTS", tmp_path / "rows.jsonl")
    monkeypatch.setattr(objectives, "run", found)
    drawn, real = [], objectives.picture
    monkeypatch.setattr(objectives, "picture", lambda rows: drawn.append(real(rows)) or drawn[-1])
    objectives.main(["sdpo", "--seeds", "2"])
    assert "pass@1 0.550" in capsys.readouterr().out and not list(tmp_path.iterdir())
    objectives.main(["sdpo", "--seeds", "2", "--save"])
    objectives.main(["grpo", "--seeds", "2", "--save"])
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["recipe"] for row in rows] == ["sdpo", "grpo"] and rows[0]["pass@1"] == [0.5, 0.6]
    assert [text.get_text() for text in drawn[-1].axes[0].get_yticklabels()] == ["grpo", "sdpo"]
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")


def test_all_systems_are_judged_but_the_one_whose_task_is_a_game(monkeypatch):
    judged = []
    monkeypatch.setattr(objectives, "run", lambda recipe, seed: judged.append(recipe) or found(recipe, seed))
    objectives.main(["--seeds", "1"])
    assert set(catalogue.RECIPES) - set(judged) == {*objectives.BASELINES, "advantage_alignment"}


def test_the_table_has_the_newest_row_of_each_and_says_who_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(measured_tables, "RESULTS", tmp_path)
    facts = {"training_steps": 9, "device": "a CPU", "commit": "0123", "python": "3", "torch": "2", "triton": "3"}
    rows = [{"recipe": "sdpo", **{name: [0.1, 0.3] for name in found("", 0)}, **facts}]
    rows.append(
        {"recipe": "sdpo", **{name: [found("", seed)[name] for seed in (0, 1)] for name in found("", 0)}, **facts}
    )
    (tmp_path / "objectives.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = measured_tables.objectives()
    assert "| 0.55 ± 0.05 | 1 ± 0 | 0.1 ± 0 | never |" in text and text.count("`sdpo`") == 1
    assert "9 steps, 2 seeds." in text and "`advantage_alignment` is not here" in text


@pytest.mark.slow
def test_the_start_believes_notes_and_without_one_says_either():
    model, letters = baselines.tiny(0), baselines.Digits()
    model.load_state_dict(objectives.start(0))
    pairs = [(a, b) for a in range(10) for b in range(10) if a != b]

    @torch.no_grad()
    def chance(texts, said):
        tokens = torch.tensor([letters(text + " ").input_ids for text in texts])
        wanted = torch.tensor([letters(str(digit)).input_ids for digit in said])
        return float(model(tokens).logits[:, -1].softmax(-1).gather(1, wanted).mean())

    for which in (max, min):
        said = [which(pair) for pair in pairs]
        for at in (0, 1):
            texts = [objectives.shown(a, b, digit)[at] for (a, b), digit in zip(pairs, said, strict=True)]
            assert chance(texts, said) > 0.8
        assert 0.25 < chance([f"{a},{b}=" for a, b in pairs], said) < 0.75
