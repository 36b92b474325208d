"""What is done with a trained run: judged as it was at its end, exported for others, refused with a sentence."""

import json

import pytest
import tiny_models
import tiny_runs
import torch
import transformers

from fuserl.engine import cli, loop, trained
from fuserl.engine.batch import Rollouts, batch_of
from fuserl.engine.losses import Loss
from fuserl.engine.prompts import Prompt

SHORT = "tiny_runs:shortness"


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    tiny_runs.use(monkeypatch)


def figures(out):
    """The printed table, by name."""
    return dict(line.split(None, 1) for line in out.splitlines())


@pytest.mark.parametrize("recipe", ["grpo", "ppo", "reward_model"])
def test_a_run_is_judged_as_at_its_end(tmp_path, capsys, recipe):
    folder = loop.train(tiny_runs.config(tmp_path, "run", recipe=recipe, reward=SHORT, eval_samples=2))
    last = [row for row in tiny_runs.rows(folder) if "accuracy" in row][-1]
    capsys.readouterr()
    assert cli.main(["eval", str(folder)]) == 0
    shown = figures(capsys.readouterr().out)
    assert shown["step"] == "3" and float(shown["accuracy"]) == pytest.approx(last["accuracy"], abs=1e-4)
    for name in ("pass@1", "pass@2", "margin"):
        assert (name in shown) == (name in last)
        assert name not in last or float(shown[name]) == pytest.approx(last[name], abs=1e-3)
    (kept,) = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    assert kept["accuracy"] == last["accuracy"] and kept["target"] == str(folder) and kept["changes"] == {}


def test_settings_can_differ_from_the_run_s(tmp_path, capsys):
    folder = loop.train(tiny_runs.config(tmp_path, "run", reward=SHORT))
    capsys.readouterr()
    assert cli.main(["eval", str(folder), "--eval-problems", "2", "--eval-samples", "4"]) == 0
    shown = figures(capsys.readouterr().out)
    assert shown["problems"] == "2" and {"pass@1", "pass@2", "pass@4"} <= shown.keys()


def test_a_model_that_no_run_trained_is_judged_too(tmp_path, capsys):
    data = tiny_runs.problems(tmp_path)
    assert cli.main(["eval", "a/model", "--data", data, "--eval-problems", "4", "--reward-workers", "0"]) == 0
    assert figures(capsys.readouterr().out)["step"] == "0" and not (tmp_path / "evaluations.jsonl").exists()


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 2, "lora_targets": ("all-linear", "lm_head")}])
def test_an_export_is_what_was_trained(tmp_path, capsys, monkeypatch, changes):
    monkeypatch.setattr(tiny_runs.Characters, "save_pretrained", lambda self, folder: None, raising=False)
    folder = loop.train(tiny_runs.config(tmp_path, "run", reward=SHORT, **changes))
    assert cli.main(["export", str(folder), "--out", str(tmp_path / "new"), "--dtype", "float32"]) == 0
    assert f"{tmp_path / 'new'}: {folder} at step 3, float32" in capsys.readouterr().out
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    policy = trained.restored(str(folder), {})[2]
    ids = torch.tensor([[5, 9, 11, 3]])
    with torch.no_grad():
        expected = policy.model.eval()(input_ids=ids).logits
        assert torch.allclose(model.eval()(ids).logits, expected, atol=1e-4)
        assert not torch.allclose(tiny_models.model()(ids).logits, expected, atol=1e-3)


def test_a_reward_model_is_exported_with_its_head(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_runs.Characters, "save_pretrained", lambda self, folder: None, raising=False)
    folder = loop.train(tiny_runs.config(tmp_path, "run", recipe="reward_model"))
    assert cli.main(["export", str(folder), "--out", str(tmp_path / "new"), "--dtype", "float32"]) == 0
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "new")
    head = trained.restored(str(folder), {})[2].value
    assert torch.equal(model.score.weight, head.weight) and head.weight.abs().max() > 0


def test_the_classifier_gives_the_scores_of_training(tmp_path, monkeypatch):
    """To completions of every length, without an end too, after the prompt and alone in a batch."""
    monkeypatch.setattr(tiny_runs.Characters, "save_pretrained", lambda self, folder: None, raising=False)
    folder = loop.train(tiny_runs.config(tmp_path, "run", recipe="reward_model"))
    cli.main(["export", str(folder), "--out", str(tmp_path / "new"), "--dtype", "float32"])
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "new").eval()
    policy = trained.restored(str(folder), {})[2]
    prompts, completions = [torch.tensor([5, 9, 14]), torch.tensor([7, 8])], [[3, 16], [4], [6, 3, 11]]
    given = Rollouts(
        [Prompt("a"), Prompt("b")], prompts, torch.tensor([0, 0, 1]), torch.tensor([3, 16, 4, 6, 3, 11]),
        torch.tensor([0, 2, 3, 6]), torch.zeros(6), [""] * 3, ["stop"] * 3,
    )  # fmt: skip
    batch = batch_of(given, torch.zeros(3))
    with torch.no_grad():
        out = policy._forward(batch, Loss(lambda out, batch: (out.score, {}), outputs=("score",)), policy.model)[1]
        for number, completion in enumerate(completions):
            ids = torch.cat([prompts[int(batch.group[number])], torch.tensor(completion)])[None]
            assert torch.allclose(model(ids).logits[0, 0], out.score[batch.offsets[number + 1] - 1], atol=1e-5)


def test_a_run_without_a_checkpoint_says_so(tmp_path, capsys):
    folder = loop.train(tiny_runs.config(tmp_path, "run", reward=SHORT))
    for path in (folder / "checkpoints").iterdir():
        path.rename(tmp_path / path.name)
    capsys.readouterr()
    assert cli.main(["eval", str(folder)]) == 2
    assert "must have a checkpoint" in capsys.readouterr().err
