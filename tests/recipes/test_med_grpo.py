"""med_grpo: an affine change of a metric changes nothing, without normalisation it is GRPO, a run does all tasks."""

import json
from types import SimpleNamespace

import pytest
import tiny_runs
import torch
from batches import gradient, losses, ragged, recipe
from tiny_runs import numbers, run

from fuserl.engine import catalogue, loop
from fuserl.engine.advantages import standardized
from fuserl.engine.config import Config
from fuserl.engine.losses import clipped
from fuserl.engine.task_rewards import Quantiles

SHORT = "tiny_runs:shortness"


def paired(**changes):
    batch = ragged((3, 2, 4, 1), (0, 0, 1, 1)).replace(facts={"pair": torch.tensor([[0], [0], [1], [1]])})
    return batch.replace(**changes)


def test_without_normalisation_a_run_is_grpos_with_its_clip(tmp_path, monkeypatch):
    tiny_runs.use(monkeypatch)
    plain = run(tmp_path, "med", recipe="med_grpo", normalise=False, reward=SHORT)
    grpo = run(tmp_path, "grpo", recipe="grpo", high=0.3, reward=SHORT)
    names = {*grpo[1]}
    assert [{name: row[name] for name in row if name in names} for row in numbers(plain)] == [
        {name: row[name] for name in row if name in names} for row in numbers(grpo)
    ]


@pytest.mark.parametrize(("slope", "shift"), [(4.0, 0.0), (0.25, -2.0), (64.0, 8.0)])
def test_an_affine_change_of_the_metric_changes_no_reward(slope, shift):
    one, other = Quantiles(), Quantiles()
    values = torch.arange(16, dtype=torch.float64) / 16
    one.fit("x", values)
    other.fit("x", slope * values + shift)  # powers of two: exact
    assert torch.equal(one.normalised("x", values), other.normalised("x", slope * values + shift))


def test_options_reach_their_places(tmp_path):
    batch = paired()
    logprob = batch.old_logprobs + torch.linspace(-1, 1, 10)
    plain = gradient(recipe(tmp_path, "med_grpo"), batch, logprob)
    expected = clipped(high=0.3)(SimpleNamespace(logprob=logprob), batch.with_advantages(standardized(batch)))[0]
    torch.testing.assert_close(losses(recipe(tmp_path, "med_grpo"), batch, logprob=logprob), expected)
    for options in ({"low": 0.9}, {"high": 0.9}, {"adv_norm": "group_mean"}, {"adv_norm": "task_batch_std"}):
        assert not torch.allclose(gradient(recipe(tmp_path, "med_grpo", **options), batch, logprob), plain)
    kept = recipe(tmp_path, "med_grpo", k=2.0, floor=0.1).state["quantiles"]
    assert (kept.k, kept.floor) == (2.0, 0.1)
    assert recipe(tmp_path, "med_grpo", threshold=0.3).reward.threshold == 0.3
    for name, value in (("adv_norm", "std"), ("baseline", 0), ("recompute", -1)):
        with pytest.raises(ValueError, match=f": {name} must be"):
            recipe(tmp_path, "med_grpo", **{name: value})


def media(folder):
    """A file of two tasks in letters that the tiny tokenizer knows, and of sums without a task."""
    kinds = [({"task": "TAG"}, "0-{n}"), ({"task": "VS"}, "{n} {n}"), ({}, "{n}")]
    rows = [
        {"prompt": f"{n}+{at}=", "answer": answer.format(n=n + 1), "dataset": "d", **task}
        for n in range(8)
        for at, (task, answer) in enumerate(kinds)
    ]
    (folder / "media.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "media.jsonl")


@pytest.mark.parametrize("overlap", [False, True])
def test_a_run_on_a_users_own_tasks_logs_each_and_resumes(tmp_path, monkeypatch, overlap):
    tiny_runs.use(monkeypatch)
    settings = dict(
        recipe="med_grpo", steps=4, save_every=2, eval_every=0, groups=6, baseline=9, overlap=overlap, recompute=2,
        adv_norm="group_mean",
    )  # fmt: skip
    given = tiny_runs.config(tmp_path, "whole", **settings).replace(data=media(tmp_path))
    whole = tiny_runs.rows(loop.train(given))
    steps = [row for row in whole if "tokens" in row]
    assert any("reward_d_VS" in row for row in steps) and any("grad_share_d_VS" in row for row in steps)
    shares = [sum(row[name] for name in row if name.startswith("grad_share")) for row in steps]
    assert all(min(abs(share), abs(share - 1)) < 1e-6 for share in shares) and max(shares) > 0.5  # 0 where nothing is
    again = given.replace(out=str(tmp_path / "run"))
    folder = loop.train(again.replace(steps=2))
    loop.train(again, resume=folder)
    assert numbers(tiny_runs.rows(folder))[-2:] == numbers(whole)[-2:]


def test_its_own_task_is_the_made_up_videos():
    assert catalogue.defaults("med_grpo")["task"] == "symbolic_videos"
    assert Config(recipe="med_grpo", device="cpu").resolved().task == "symbolic_videos"
