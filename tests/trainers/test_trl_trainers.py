"""TRL's own trainers with the patch and without: every logged number of ten steps, losses and gradients' norms too.

A run in float64 by the definition is the truth; ours may err by twice what TRL errs, and 4 eps.
"""

import functools
import importlib

import pytest
import torch
import trl_runs
from rivals import rival

rival("trl", "trl.trainer.utils")
rival("trl", "trl.trainer.grpo_trainer")
ours = importlib.import_module("fuserl.trainers.trl")
slow = pytest.mark.slow
GRPO = {
    "dapo": {"loss_type": "dapo", "num_iterations": 1},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "bnpo": {"loss_type": "bnpo", "temperature": 0.7},
    "grpo": {"loss_type": "grpo"},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 2.0},
    "sapo": {"loss_type": "sapo"},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "vespo": {"loss_type": "vespo"},
    "delta": {"loss_type": "grpo", "delta": 1.5},
    "off_policy_mask": {"off_policy_mask_threshold": 0.001},
    "entropy_mask": {"top_entropy_quantile": 0.3},
    "entropy_bonus": {"entropy_coef": 0.02},
    "k3": {"beta": 0.04, "use_bias_correction_kl": False},
    "k3_corrected": {"beta": 0.04, "use_bias_correction_kl": True},
    "accumulated": {"loss_type": "dapo", "gradient_accumulation_steps": 2},
}
MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
RUNS = {f"GRPO {name}": functools.partial(trl_runs.sampled, "GRPO", **given) for name, given in GRPO.items()}
for mode in MODES:
    options = {"vllm_importance_sampling_mode": mode, "vllm_importance_sampling_clip_max": 1.5}
    RUNS[f"GRPO vllm {mode}"] = functools.partial(trl_runs.sampled, "GRPO", vllm=True, **options)
options = {"vllm_importance_sampling_mode": "token_truncate", "loss_type": "vespo"}
RUNS["GRPO vllm vespo"] = functools.partial(trl_runs.sampled, "GRPO", vllm=True, **options)
RUNS["RLOO"] = functools.partial(trl_runs.sampled, "RLOO", beta=0.05)
for kind in ("sigmoid", "hinge", "ipo", "apo_zero", "sft"):
    RUNS[f"DPO {kind}"] = functools.partial(trl_runs.paired, "DPO", loss_type=[kind], learning_rate=0.002)
RUNS["DPO weighted"] = functools.partial(trl_runs.paired, "DPO", use_weighting=True)
RUNS["KTO"] = functools.partial(trl_runs.paired, "KTO")
RUNS["SFT"] = functools.partial(trl_runs.paired, "SFT")
QUICK = {"GRPO dapo", "GRPO k3_corrected", "GRPO vllm token_mask", "RLOO", "DPO sigmoid", "KTO", "SFT"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in QUICK else slow) for name in RUNS])
def test_ten_steps(name, tmp_path):
    make = RUNS[name]
    truth = trl_runs.history(make, trl_runs.defined(), torch.float64, tmp_path)
    plain = trl_runs.history(make, [], torch.float32, tmp_path)
    with ours.patch():
        got = trl_runs.history(make, [], torch.float32, tmp_path)
    assert got.keys() == plain.keys() == truth.keys() and {"loss", "grad_norm"} <= got.keys()
    for metric, true in truth.items():
        worst, allowed = (got[metric] - true).abs(), 2 * (plain[metric] - true).abs().max() + 4 * 2**-23 * true.abs()
        assert (worst <= allowed).all(), f"{metric}: {worst} where {allowed} is allowed of {true}"
