"""Every recipe learns a toy problem from three seeds: two digits are shown, the larger is to be said."""

import baselines
import objectives
import pytest

from fuserl.engine import catalogue

OF_THEIR_OWN = ("advantage_alignment",)  # learn something else than a task's answers: games
TAUGHT = ("sdpo", "vla_opd")  # by the model itself, shown an answer: it must have learned to read that


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [name for name in catalogue.RECIPES if name not in OF_THEIR_OWN])
def test_every_recipe_learns(recipe, monkeypatch):
    if recipe in TAUGHT:
        starts = {seed: objectives.start(seed) for seed in baselines.SEEDS}
        monkeypatch.setattr(baselines, "start", starts.__getitem__)
    rows = [baselines.judged(recipe, seed) for seed in baselines.SEEDS]
    before, after = (sum(each[side]["accuracy"] for each in rows) / len(rows) for side in (0, 1))
    # 60 judged problems: from 0.38 the rise to 0.6 is beyond four standard errors of chance.
    assert after >= max(0.6, before + 0.2), rows
    assert all(each[1]["accuracy"] >= each[0]["accuracy"] for each in rows)
    if "pair_accuracy" in rows[0][1]:
        assert all(each[1]["pair_accuracy"] >= 0.85 for each in rows)
