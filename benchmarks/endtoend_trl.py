"""A whole GRPO step of the built-in model here and in TRL's GRPOTrainer: generation, rewards, update, optimizer.

    pip install trl==1.16.0 datasets; python benchmarks/endtoend_trl.py [CASE ...] [--steps 5] [--save]

Either side lives in a process of its own with the model, the prompts, the lengths, the threads, AdamW and its learning
rate alike, in float32, and they take steps in turn. TRL has its best settings on a CPU of those tried: no gradient
checkpointing, and as many rollouts in a pass as is fastest. A peak is the most that a process has held during a step,
packages and weights included. Rewards are drawn from what is completed, so that every group, or every other one, has a
signal. `--save` appends rows to benchmarks/results/endtoend.jsonl.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import types
import zlib
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "endtoend.jsonl"
# prompts, tokens of each, rollouts of each, tokens of each, TRL's rollouts in a pass, whether every group has a signal
CASES = {
    "4 prompts of 55 tokens x 8 rollouts x 8 tokens": (4, 55, 8, 8, 32, True),
    "the same, half the groups without signal": (4, 55, 8, 8, 32, False),
    "2 prompts of 256 tokens x 16 rollouts x 32 tokens": (2, 256, 16, 32, 8, True),
}
SIDES = ("fuserl", "trl")
LR = 1e-6
WORDS = "the quick brown fox jumps over a lazy dog and runs far away from some angry farmer who lost his best hat "


def prompts_of(tokenizer, count: int, tokens: int) -> list[str]:
    """Texts of so many tokens; they differ from the first word on."""
    texts = [tokenizer(f"{name} says: {WORDS * (tokens // 8)}").input_ids[:tokens] for name in NAMES[:count]]
    return [tokenizer.decode(ids) for ids in texts]


NAMES = ("Anna", "Berta", "Carl", "David", "Emil", "Frida", "Gustav", "Hanna")


def reward(prompt: str, completion: str, every: bool) -> float:
    """A number in [0, 1) drawn from the texts; 0 for every second prompt, unless for `every` one."""
    silent = NAMES.index(prompt.split()[0]) % 2 and not every
    return 0.0 if silent else zlib.crc32(f"{prompt}|{completion}".encode()) / 2**32


class Steps:
    """What a side does at the beginning and the end of its steps: wait for a line, and answer with one."""

    def __init__(self, answers):
        self._answers = answers

    def begin(self) -> None:
        """Wait until it is this side's turn."""
        if not sys.stdin.readline():
            raise SystemExit
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # restart the kernel's record of the peak
        self._started = time.perf_counter()

    def end(self, **more: float) -> None:
        """Say what the step took."""
        seconds = time.perf_counter() - self._started
        status = Path("/proc/self/status").read_text()
        peak = int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9
        print(json.dumps({"seconds": seconds, "peak_gb": peak, **more}), file=self._answers, flush=True)


def fuserl(case: str, steps: Steps) -> None:
    """Steps of our loop."""
    import torch

    from fuserl.engine import loop, models
    from fuserl.engine.advantages import standardized
    from fuserl.engine.ahead import Ahead
    from fuserl.engine.losses import clipped
    from fuserl.engine.policy import Policy, Sampling, Updating
    from fuserl.engine.prompts import Prompt
    from fuserl.engine.recipe import Recipe
    from fuserl.engine.rollouts import sampled

    prompts, tokens, rollouts, length, _, every = CASES[case]
    model, tokenizer = models.load()
    model.generation_config.eos_token_id = None  # every completion is as long as it may be
    texts = prompts_of(tokenizer, prompts, tokens)
    policy = Policy(model, tokenizer, Sampling(max_new_tokens=length), Updating(lr=LR))

    def rewarded(drawn):
        found = [reward(drawn.prompt_of(b).text, text, every) for b, text in enumerate(drawn.texts)]
        return torch.tensor(found), {}

    recipe = Recipe(
        "grpo", lambda step: [Prompt(text) for text in texts], sampled(rollouts), rewarded, standardized, clipped()
    )
    run, state = types.SimpleNamespace(sampled=lambda *_: None), types.SimpleNamespace(step=0, skipped=0)
    ahead = Ahead(policy, recipe, overlap=False)
    while True:
        steps.begin()
        state.step += 1
        row = loop.step(policy, None, recipe, run, state, ahead)
        steps.end(generate_s=row["generate_s"], update_s=row["update_s"])


def trl(case: str, steps: Steps) -> None:
    """Steps of TRL's trainer."""
    import datasets
    import transformers
    import trl

    from fuserl.engine import models

    datasets.disable_progress_bars()
    # datasets cannot hash rows under some versions of Python and pyarrow; nothing here is cached by its hash.
    datasets.fingerprint.Hasher.hash = classmethod(lambda cls, value: "0" * 16)
    prompts, tokens, rollouts, length, batch, every = CASES[case]
    model, tokenizer = models.load()
    model.set_attn_implementation("sdpa")
    texts = prompts_of(tokenizer, prompts, tokens)

    class Turns(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            steps.begin()

        def on_step_end(self, *_, **__):
            steps.end()

    with tempfile.TemporaryDirectory() as folder:
        arguments = trl.GRPOConfig(
            output_dir=folder, max_steps=1_000_000, per_device_train_batch_size=batch, num_generations=rollouts,
            gradient_accumulation_steps=prompts * rollouts // batch, max_completion_length=length, learning_rate=LR,
            lr_scheduler_type="constant", max_grad_norm=1.0, beta=0.0, temperature=1.0, bf16=False, use_cpu=True,
            generation_kwargs={"min_new_tokens": length}, gradient_checkpointing=False, report_to="none",
            logging_strategy="no", save_strategy="no", disable_tqdm=True, shuffle_dataset=False,
        )  # fmt: skip
        trl.GRPOTrainer(
            model=model.train(),
            args=arguments,
            train_dataset=datasets.Dataset.from_list([{"prompt": text} for text in texts] * 64),
            processing_class=tokenizer,
            reward_funcs=lambda prompts, completions, **_: [
                reward(*each, every) for each in zip(prompts, completions, strict=True)
            ],
            callbacks=[Turns()],
        ).train()


class Side:
    """One of the two, in a process of its own."""

    def __init__(self, name: str, case: str):
        command = [sys.executable, __file__, "--worker", name, case]
        self.name, self.rows = name, []
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def step(self, counts: bool) -> None:
        """Take a step; keep what it took if it `counts`."""
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"endtoend_trl: the process of {self.name} ended. Its message stands above.")
        if counts:
            self.rows.append(json.loads(answer))

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


def compared(case: str, steps: int) -> list[dict]:
    """Rows of both sides, from steps in turn after one each that warms up."""
    sides = [Side(name, case) for name in SIDES]
    try:
        for number in range(steps + 1):
            for side in sides:
                side.step(number > 0)
    finally:
        for side in sides:
            side.close()
    ratios = [b["seconds"] / a["seconds"] for a, b in zip(*(side.rows for side in sides), strict=True)]
    found = []
    for side in sides:
        taken = [row["seconds"] for row in side.rows]
        quartiles = statistics.quantiles(taken, n=4) if len(taken) > 1 else taken * 3
        row = {"work": case, "side": side.name, "steps": steps, "median_s": statistics.median(taken)}
        row |= {"iqr_s": quartiles[2] - quartiles[0], "peak_gb": max(row["peak_gb"] for row in side.rows)}
        phases = [name for name in side.rows[0] if name.endswith("_s")]
        row |= {name: statistics.median(each[name] for each in side.rows) for name in phases}
        found.append(row | ({"times_faster": statistics.median(ratios)} if side.name == "fuserl" else {}))
    return found


def main() -> None:
    """Compare the cases, print a line for each side, and keep the rows where that is asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help=f"words of some of: {'; '.join(CASES)}")
    parser.add_argument("--steps", type=int, default=5, help="steps of either side that count")
    parser.add_argument("--save", action="store_true", help="append the rows to benchmarks/results/endtoend.jsonl")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        answers, sys.stdout = os.fdopen(os.dup(1), "w"), sys.stderr  # what packages print is no answer
        {"fuserl": fuserl, "trl": trl}[given.worker[0]](given.worker[1], Steps(answers))
        return
    from fuserl.engine import bench, machine

    for case in CASES:
        if given.cases and not any(word in case for word in given.cases):
            continue
        for row in compared(case, given.steps):
            print({name: round(value, 3) if isinstance(value, float) else value for name, value in row.items()})
            if given.save:
                facts = {"device": bench.device(), **machine.versions(), "trl": importlib.metadata.version("trl")}
                facts |= {"commit": machine.commit(), "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")}
                with RESULTS.open("a") as file:
                    file.write(json.dumps(row | facts) + "\n")


if __name__ == "__main__":
    main()
