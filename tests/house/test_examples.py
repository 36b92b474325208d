"""Every example runs and learns what it says."""

import importlib
import importlib.util
from pathlib import Path

import pytest
from rivals import openrlhf, rival, verl_losses

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TESTED = {"liger_import", "openrlhf_ppo", "own_trainer", "transformers_sft", "trl_grpo", "verl_grpo"}


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


def test_transformers_sft_learns():
    pytest.importorskip("accelerate", reason="pip install accelerate")
    assert example("transformers_sft").main() > 0.9


def test_openrlhf_ppo_learns():
    openrlhf("openrlhf.models.actor")
    openrlhf("openrlhf.trainer.ppo_utils.experience_maker")
    assert example("openrlhf_ppo").main() > 0.9


def test_liger_import_learns():
    assert example("liger_import").main() > 0.9


def test_every_example_is_tested():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == TESTED
