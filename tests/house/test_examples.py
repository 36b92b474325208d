"""Every example runs and learns what it says."""

import importlib
import importlib.util
from pathlib import Path

from rivals import rival, verl_losses

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_own_trainer_learns():
    assert example("own_trainer").main(steps=120) > 0.9


def test_trl_grpo_learns():
    rival("trl", "trl.trainer.grpo_trainer")
    assert example("trl_grpo").main() > 0.9


def test_verl_grpo_learns():
    verl_losses()
    try:
        assert example("verl_grpo").main() > 0.9
    finally:
        importlib.import_module("fuserl.trainers.verl").unpatch()  # importing it has patched


def test_every_example_is_tested():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {"own_trainer", "trl_grpo", "verl_grpo"}
