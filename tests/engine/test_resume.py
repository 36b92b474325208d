"""A run killed at any instant goes on from its last checkpoint, and every figure is as if nothing had happened."""

import functools
import importlib
import os
import random
import signal
import sys
import time

import pytest
import tiny_runs
import torch
from tiny_runs import numbers, rows

from fuserl.engine import loop
from fuserl.engine.checkpoint import newest
from fuserl.engine.optimizer import Optimizer
from fuserl.engine.sampling import Sampling

RECIPES = {
    "grpo": {"beta": 0.1, "minibatches": 2, "schedule": "cosine", "warmup": 2},
    "dapo": {"attempts": 2},
    "ppo": {"minibatches": 2},
    "ppo apart": {"separate_critic": True, "minibatches": 2},
    "grpo adapters": {"lora_rank": 2, "lora_dropout": 0.3, "beta": 0.1},
    "reward_model": {},
    "vpo online": {"online": True, "oracle": "bradley_terry", "replay": 2},
    "ppo overlap": {"overlap": True, "minibatches": 2},
    "dapo overlap": {"overlap": True, "attempts": 2},
    "grpo adapters overlap": {"overlap": True, "lora_rank": 2, "lora_dropout": 0.3, "beta": 0.1},
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    tiny_runs.use(monkeypatch)
    torch.set_num_threads(1)  # before any fork: an OpenMP team does not survive one


def configured(folder, name, case, **changes):
    settings = dict(
        recipe=case.split()[0], reward="tiny_runs:shortness", steps=6, save_every=2, eval_every=3, eval_samples=2
    )
    return tiny_runs.config(folder, name, **{**settings, **RECIPES[case], **changes})


def in_a_child(action, killed_after=None):
    """Run `action` in a forked process, killed after some seconds; whether it came to its end."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with open(os.devnull, "w") as sys.stdout:
                action()
            status = 0
        finally:
            os._exit(status)
    if killed_after is not None:
        time.sleep(killed_after)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1] == 0


def finish(config, folder):
    """Train, or go on where a killed run stopped."""
    loop.train(config, resume=folder if (folder / "config.json").exists() else None)


@pytest.mark.parametrize("case", RECIPES)
def test_a_resumed_run_is_as_one_that_never_stopped(tmp_path, case):
    steady = dict(schedule="constant", warmup=0)  # else the schedule knows the number of steps
    whole = numbers(rows(loop.train(configured(tmp_path, "whole", case, **steady))))
    folder = loop.train(configured(tmp_path, "parts", case, steps=4, **steady))
    loop.train(configured(tmp_path, "parts", case, **steady), resume=folder)
    parts = numbers(rows(folder))
    after = [row for row in parts if row["step"] == 4 and "accuracy" in row]
    assert len(after) == 1  # the evaluation at the end of the first part
    assert [row for row in parts if row not in after] == whole


PLACES = {"rollout": (Sampling, "draw"), "reward": (tiny_runs, "shortness"), "update": (Optimizer, "step")}


def dies_in(place, step):
    """Let this process be killed in the second call of something within a step of the loop."""
    owner, name = PLACES[place]
    real, turn, now, calls = getattr(owner, name), loop.step, [], []

    def noted(*arguments):
        now.append(arguments[4].step)
        return turn(*arguments)

    @functools.wraps(real)
    def deadly(*arguments, **named):
        if now and now[-1] == step:
            calls.append(1)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **named)

    loop.step = noted
    setattr(owner, name, deadly)


@pytest.mark.parametrize("case", ["ppo", "ppo overlap"])
def test_a_kill_in_the_middle_of_anything(tmp_path, case):
    config = configured(tmp_path, "whole", case)
    assert in_a_child(lambda: loop.train(config))
    whole = numbers(rows(tmp_path / "whole"))
    for place in PLACES:
        config = configured(tmp_path, place, case)
        assert not in_a_child(lambda place=place, config=config: (dies_in(place, 4), loop.train(config)))
        assert [row["step"] for row in rows(tmp_path / place) if "tokens" in row] == [1, 2, 3]
        assert in_a_child(lambda place=place, config=config: finish(config, tmp_path / place))
        assert numbers(rows(tmp_path / place)) == whole, place


@pytest.mark.slow
def test_thirty_kills(tmp_path):
    random.seed(11)
    whole, spans = {}, {}
    for case in RECIPES:
        started = time.perf_counter()
        config = configured(tmp_path, f"whole {case}", case)
        assert in_a_child(lambda config=config: loop.train(config))
        spans[case] = time.perf_counter() - started
        whole[case] = numbers(rows(tmp_path / f"whole {case}"))
    for number in range(30):
        check_one_kill(tmp_path, number, list(RECIPES)[number % len(RECIPES)], whole, spans)


def test_three_kills(tmp_path):
    random.seed(5)
    started = time.perf_counter()
    assert in_a_child(lambda: loop.train(configured(tmp_path, "whole", "ppo")))
    spans, whole = {"ppo": time.perf_counter() - started}, {"ppo": numbers(rows(tmp_path / "whole"))}
    for number in range(3):
        check_one_kill(tmp_path, number, "ppo", whole, spans)


def check_one_kill(tmp_path, number, case, whole, spans):
    folder = tmp_path / f"killed {number}"
    config = configured(tmp_path, folder.name, case)
    at = random.uniform(0, 1.1) * spans[case]
    in_a_child(lambda: finish(config, folder), killed_after=at)
    killed = len(rows(folder)) if (folder / "metrics.jsonl").exists() else 0
    assert in_a_child(lambda: finish(config, folder)), (case, at, killed)
    assert numbers(rows(folder)) == whole[case], (case, at, killed)
    assert newest(folder).step == 6


def test_random_streams_go_on(tmp_path):
    importlib.import_module("rich.table")  # which draws a random number when first imported
    config = configured(tmp_path, "run", "grpo adapters", steps=2)
    loop.train(config)
    expected = torch.rand(3), random.random()
    torch.manual_seed(99), random.seed(99)
    loop.train(config, resume=tmp_path / "run")
    assert torch.equal(torch.rand(3), expected[0]) and random.random() == expected[1]


def test_a_checkpoint_of_another_recipe_or_model_is_refused(tmp_path):
    folder = loop.train(configured(tmp_path, "run", "grpo", steps=2))
    with pytest.raises(ValueError, match=r"one of ppo; .* is one of grpo"):
        loop.train(configured(tmp_path, "run", "ppo", steps=4), resume=folder)
    with pytest.raises(ValueError, match="must hold the parameters that this run trains"):
        loop.train(configured(tmp_path, "run", "grpo", steps=4, freeze=("*.mlp.*",)), resume=folder)


def test_a_finished_run_stays_as_it_is(tmp_path):
    config = configured(tmp_path, "run", "grpo", steps=2)
    folder = loop.train(config)
    before = rows(folder)
    loop.train(config, resume=folder)
    assert rows(folder) == before
