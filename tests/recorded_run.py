"""A run as it lies on the disk, with every metric there is: made up, reproducible, and plausible to look at."""

import json
import math
import random

CONFIG = {
    "recipe": "ppo",
    "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "task": "reasoning_gym:chain_sum:max_terms=2,max_digits=2",
    "data": None,
    "steps": 60,
    "groups": 16,
    "group_size": 8,
    "max_new_tokens": 32,
    "stop": ["\n"],
    "lr": 2e-5,
    "beta": 0.02,
    "seed": 0,
    "device": "cuda",
    "dtype": "bfloat16",
    "out": "runs/ppo",
}
REASONS = {
    "groups": "a GPU decodes 1024 rollouts at once",
    "dtype": "GPUs multiply it fast",
    "stop": "an answer is one line",
    "device": "torch sees NVIDIA H200",
}
DESCRIBED = {
    "config": CONFIG,
    "reasons": REASONS,
    "versions": {"python": "3.12.3", "fuserl": "0.1.0", "torch": "2.13.0", "triton": "3.9.0", "vllm": None},
    "machine": {
        "system": "Linux-6.8-x86_64",
        "processor": "AMD EPYC",
        "cores": 16,
        "memory_gb": 128.0,
        "gpus": ["NVIDIA H200"],
    },
    "commit": "0123456789ab+changes",
    "started": "2026-11-21T05:10:36+0000",
}


def step(number, steps, noise):
    """One step's row, with everything that any recipe logs."""
    done, jitter = number / steps, noise.gauss(0, 0.06)
    reward = min(1.0, max(0.0, 0.1 + 0.62 * (1 - math.exp(-3 * done)) + jitter))
    broken = number == 23
    return {
        "step": number, "reward": reward, "reward_std": (reward * (1 - reward)) ** 0.5,
        "mixed": 0.5 - 0.2 * done + jitter, "live": 0.6 - 0.3 * done + jitter / 2,
        "length": 18 - 8 * done + 10 * jitter, "truncated": max(0, 0.3 - done + jitter),
        "tokens": int(2300 - 900 * done + 500 * jitter), "generate_s": 1.4 + jitter, "reward_s": 0.3, "ahead_s": 1.9,
        "staleness": 1,
        "update_s": 1.1 - jitter, "save_s": 0.8 if number % 20 == 0 else 0.0, "seconds": 3.0 + abs(jitter),
        "score_s": 0.05, "other_s": 0.15 + abs(jitter), "generate_tokens_per_s": 1640 * (1 - 0.4 * done) + 300 * jitter,
        "read_tokens_per_s": 930 + 300 * jitter, "update_tokens_per_s": 6100 + 3e3 * jitter,
        "generate_tflops": 3.1 + jitter, "generate_gb_per_s": 2210 + 900 * jitter, "update_tflops": 311 + 99 * jitter,
        "generate_share": 0.52 + jitter, "update_share": 0.43 + jitter,
        "elapsed": 3.2 * number, "host_gb": 3.1 + 0.2 * (number > 20), "gpu_gb": 21.4,
        "loss": None if broken else 0.02 - 0.02 * done + jitter / 10,
        "value_loss": 0.25 * math.exp(-4 * done) + 0.01 + abs(jitter) / 20,
        "explained_variance": 1 - math.exp(-3 * done) + jitter, "ratio": 1 + jitter / 100,
        "ratio_max": 1.5 + abs(jitter) * 12, "ratio_min": 0.6 - abs(jitter) * 2,
        "clipped_low": 0.01 + abs(jitter) / 10, "clipped_high": 0.02 + abs(jitter) / 8,
        "clipped_dual": abs(jitter) / 40, "approx_kl": 0.002 + abs(jitter) / 50, "kl": 0.08 * done + abs(jitter) / 30,
        "entropy": 1.6 * math.exp(-1.4 * done) + jitter / 3,
        "grad_norm": None if broken else math.exp(0.5 + 8 * jitter),
        "lr": 2e-5 * min(1, number / 8) * (1 - 0.8 * done), "mismatch": 1e-4 * math.exp(6 * jitter),
        "mismatch_max": 4e-2 * math.exp(12 * jitter), "mismatch_ess": 0.99 - abs(jitter) / 20,
        "mismatch_rollout_ess": 0.93 - abs(jitter), "ess": 0.97 - abs(jitter) / 4,
        "importance": 1 + jitter / 9, "importance_cut": abs(jitter) / 30,
        "skipped": int(broken), "timeouts": int(number in (7, 41)),
        "nll": 2.2 * math.exp(-done) + jitter / 4, "margin": 1.8 * done + jitter,
        "pair_accuracy": min(1.0, 0.5 + 0.4 * done + jitter), "format_reward": 0.9 * done + jitter,
    }  # fmt: skip


def evaluation(number, correct, problems=200):
    """One evaluation's row, with pass@k."""
    share = correct / problems
    tries = {f"pass@{k}": 1 - (1 - 0.9 * share) ** (k**0.6) for k in (1, 2, 4, 8)}
    bounds = {"accuracy_low": max(0.0, share - 0.07), "accuracy_high": min(1.0, share + 0.07)}
    counts = {"problems": problems, "correct": correct, "eval_s": 4.2, "samples": 8, "elapsed": 3.2 * number + 4}
    return {"step": number, "accuracy": share, **bounds, **counts, **tries}


def rows(steps=60, seed=0):
    """The rows of a whole run, evaluated four times."""
    noise, made = random.Random(seed), [evaluation(0, 52 + seed)]
    for number in range(1, steps + 1):
        made.append(step(number, steps, noise))
        if number % max(1, steps // 3) == 0:
            made.append(evaluation(number, min(200, 52 + int(2.2 * number * 60 / steps))))
    return made


def samples(steps=60):
    """Completions of every step, as samples.jsonl has them."""
    asked = "State the final answer to the following arithmetic problem: {} + {} =\n{}\n\n"
    shots = "".join(asked.format(a, b, a + b) for a, b in ((12, 7), (90, 4), (33, 51), (8, 8)))
    return [
        {
            "step": number,
            "prompt": shots + asked.format(number, 17, "").rstrip(),
            "completion": f" {number + 17}" if at else " 4 because the sum of the digits\nis what it is",
            "answer": str(number + 17),
            "reward": float(at > 0),
            "finish": "stop" if at else "length",
        }
        for number in range(1, steps + 1)
        for at in range(3)
    ]


def write(folder, metrics=None, told=None, described=None):
    """Lay a run down in `folder`: its configuration, metrics and samples."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(DESCRIBED if described is None else described))
    for name, lines in (("metrics.jsonl", rows() if metrics is None else metrics), ("samples.jsonl", told)):
        if lines is not None:
            (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
