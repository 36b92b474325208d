"""Small runs for the tests of a run's folder: settings, rows, rollouts, and one that was stopped half-way."""

import contextlib
import json
import resource

import torch

from fuserl.engine import report
from fuserl.engine.batch import Rollouts
from fuserl.engine.config import Config
from fuserl.engine.metrics import Run
from fuserl.engine.prompts import Prompt


def config(folder, **changes):
    return Config(**{"out": str(folder), "steps": 6, "device": "cpu", **changes}).resolved()


def row(step, **changes):
    return {
        "step": step,
        "reward": 0.1 * step,
        "tokens": 100,
        "generate_s": 1.0,
        "update_s": 2.0,
        "seconds": 4.0,
        **changes,
    }


def evaluation(correct, problems=200):
    low, high = report.interval(correct, problems)
    return {
        "accuracy": correct / problems,
        "accuracy_low": low,
        "accuracy_high": high,
        "correct": correct,
        "problems": problems,
    }


def rollouts():
    """Two prompts, three completions of 2, 1 and 3 tokens."""
    return Rollouts(
        prompts=[Prompt("1 + 1 =", "2"), Prompt("b")],
        prompt_tokens=[torch.tensor([1, 2]), torch.tensor([3])],
        group=torch.tensor([0, 0, 1]),
        tokens=torch.arange(10, 16),
        offsets=torch.tensor([0, 2, 3, 6]),
        rollout_logprobs=-torch.arange(6.0),
        texts=[" 2", " 3\n", "\ud800 é\u2028"],
        finish=["stop", "length", "stop"],
    )


def trained(folder, steps=6, **changes):
    with Run(config(folder)) as run:
        run.evaluated(0, evaluation(100))
        for step in range(1, steps + 1):
            run.log(row(step, **changes))
        run.evaluated(steps, evaluation(150))
    return run


def interrupted(folder, last=3, position_at=2, **changes):
    """A run that was stopped after step `last`, and its position after step `position_at`."""
    with contextlib.suppress(KeyboardInterrupt), Run(config(folder, **changes)) as run:
        for step in range(1, last + 1):
            run.sampled(step, rollouts(), [1.0, 0.0, 0.5], 2)
            run.log(row(step))
            if step == position_at:
                position = json.loads(json.dumps(run.position()))
        raise KeyboardInterrupt
    return position


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@contextlib.contextmanager
def full(size):
    """No file can grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
