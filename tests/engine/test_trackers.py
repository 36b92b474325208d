"""Trackers: what TensorBoard reads back, what W&B is told, and what is said when one cannot be had."""

import math
import os
import sys
import types

import pytest

from fuserl.engine import lookup, trackers

ROW = {
    "step": 3, "reward": 0.5, "seconds": 4.0, "generate_s": 1.0, "host_gb": 2.0, "loss": math.nan, "grad_norm": None,
    "finish": "stop", "skipped": 0, "update_tokens_per_s": 90.0, "update_share": 0.5,
}  # fmt: skip
EVALUATION = {"step": 3, "accuracy": 0.25, "accuracy_low": 0.2, "problems": 4, "pass@2": 0.75, "eval_s": 1.5}


def drawn(folder):
    """Steps and values by tag, as TensorBoard would show them."""
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = module.EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    scalars = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    return scalars, events.Tags()["tensors"]


def test_tensorboard_shows_every_number_under_its_kind(tmp_path):
    [board] = trackers.of(["tensorboard"], tmp_path, {"recipe": "grpo", "stop": ["\n"]})
    board.log(3, ROW)
    board.log(3, EVALUATION)
    scalars, tensors = drawn(tmp_path)  # nothing is closed yet: log leaves it on the disk
    board.close()
    assert scalars == {
        "train/reward": [(3, 0.5)],
        "train/skipped": [(3, 0.0)],
        "time/seconds": [(3, 4.0)],
        "time/generate_s": [(3, 1.0)],
        "memory/host_gb": [(3, 2.0)],
        "speed/update_tokens_per_s": [(3, 90.0)],
        "speed/update_share": [(3, 0.5)],
        "eval/accuracy": [(3, 0.25)],
        "eval/accuracy_low": [(3, pytest.approx(0.2))],
        "eval/problems": [(3, 4.0)],
        "eval/pass_at_2": [(3, 0.75)],
        "time/eval_s": [(3, 1.5)],
    }
    assert tensors == ["config/text_summary"]


@pytest.mark.parametrize("kept", [0, 4])
def test_a_resumed_run_is_drawn_once(tmp_path, kept):
    [board] = trackers.of(["tensorboard"], tmp_path, {})
    for step in range(8):
        board.log(step, {"reward": step})
    board.close()
    [board] = trackers.of(["tensorboard"], tmp_path, {}, step=kept)
    for step in range(kept + 1 if kept else 0, 10):
        board.log(step, {"reward": 10 * step})
    board.close()
    whole = [(step, step if step <= kept else 10 * step) for step in range(10)]
    assert drawn(tmp_path)[0]["train/reward"] == whole


def test_what_was_logged_is_on_the_disk_when_the_process_is_killed(tmp_path):
    child = os.fork()
    if child == 0:
        [board] = trackers.of(["tensorboard"], tmp_path, {})
        for step in range(300):
            board.log(step, {"reward": step})
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert len(drawn(tmp_path)[0]["train/reward"]) == 300


class FakeWandB(types.ModuleType):
    """Remembers what it is told."""

    class Error(Exception):
        pass

    class Settings:
        def __init__(self, **settings):
            self.settings = settings

    def __init__(self):
        super().__init__("wandb")
        self.told, self.refuses = [], None

    def init(self, **options):
        if self.refuses:
            raise self.Error(self.refuses)
        self.told.append(("init", options))
        return types.SimpleNamespace(
            log=lambda row, step: self.told.append(("log", row, step)), finish=lambda: self.told.append(("finish",))
        )


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_is_told_every_number_and_resumes_by_the_folders_id(tmp_path, wandb):
    folder = tmp_path / "grpo-1"
    folder.mkdir()
    for step in (0, 3):
        [tracker] = trackers.of(["wandb"], folder, {"lr": 1e-5}, step=step)
        tracker.log(3, ROW)
        tracker.log(3, EVALUATION)
        tracker.close()
    (_, first), (_, row, step), (_, evaluation, _), (end,), (_, second), *_ = wandb.told
    assert first["id"] == second["id"] == (folder / "wandb-id").read_text().strip() and len(first["id"]) == 8
    assert first["name"] == "grpo-1" and first["dir"] == str(folder) and first["config"] == {"lr": 1e-5}
    assert first["resume"] == "allow" and first["settings"].settings == {"console": "off"}
    assert step == 3 and end == "finish"
    assert row["train/reward"] == 0.5 and "train/loss" not in row and "train/finish" not in row
    assert evaluation["eval/pass_at_2"] == 0.75


def test_two_runs_have_two_ids(tmp_path, wandb):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        trackers.of(["wandb"], tmp_path / name, {})
    assert len({options["id"] for _, options in wandb.told}) == 2


def test_wandb_that_does_not_start_says_what_to_do_and_closes_the_others(tmp_path, wandb, monkeypatch):
    closed = []
    monkeypatch.setattr(trackers.TensorBoard, "close", lambda self: closed.append(self._writer.close()))
    wandb.refuses = "api_key not configured\n(no-tty)"
    with pytest.raises(RuntimeError, match=r"api_key not configured \(no-tty\).*WANDB_MODE=offline"):
        trackers.of(["tensorboard", "wandb"], tmp_path, {})
    assert len(closed) == 1


@pytest.mark.parametrize("opened", [trackers.check, lambda names: trackers.of(names, "absent", {})])
def test_an_unknown_or_missing_tracker_is_one_sentence_before_any_is_opened(opened, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"must be tensorboard or wandb; got 'tensorbord'. Did you mean 'tensorboard'"):
        opened(["tensorboard", "tensorbord"])
    found = lookup.importlib.import_module

    def absent(name, *rest):
        if name == "wandb":
            raise ModuleNotFoundError("No module named 'wandb'", name="wandb")
        return found(name, *rest)

    monkeypatch.setattr(lookup.importlib, "import_module", absent)
    with pytest.raises(RuntimeError, match=r'wandb is not installed. Run: pip install "fuserl\[trackers\]"'):
        opened(["tensorboard", "wandb"])
    assert not list(tmp_path.iterdir())


def test_no_tracker_and_one_named_twice(tmp_path):
    assert trackers.of((), tmp_path, {}) == []
    [board] = trackers.of(["tensorboard", "tensorboard"], tmp_path, {})
    board.close()
