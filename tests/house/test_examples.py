"""Every example runs and learns what it says."""

import importlib.util
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_own_trainer_learns():
    spec = importlib.util.spec_from_file_location("own_trainer", EXAMPLES / "own_trainer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main(steps=120) > 0.9


def test_every_example_is_tested():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {"own_trainer"}
