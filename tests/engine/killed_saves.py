"""Saves checkpoints in processes that are killed, and checks what each of them left: `killed_saves.py HOW RUN`."""

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

from fuserl.engine import checkpoint
from fuserl.engine.checkpoint import Checkpoint

CALLS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir", "shutil.rmtree"}


def save(run, step):
    tensors = {"policy": {"w": torch.full((300, 100), float(step)), "n": torch.tensor(step)}, "random": {}}
    checkpoint.save(run, step, tensors, {"step": step, "list": [step] * 50})


def whole(path):
    """The checkpoint's step, which every one of its files must be of, whatever the checksums say."""
    step = int(path.name.removeprefix("step-"))
    tensors = Checkpoint(path, step, {}).tensors("policy")
    assert (tensors["w"] == step).all() and tensors["n"] == step, path
    assert json.loads((path / "state.json").read_text()) == {"step": step, "list": [step] * 50}, path
    return step


def there(run):
    return sorted(path for path in (run / "checkpoints").iterdir() if path.name.startswith("step-"))


def forked(child, *arguments):
    pid = os.fork()
    if not pid:
        try:
            child(*arguments)
            os._exit(0)
        finally:
            traceback.print_exc()
            os._exit(1)
    return pid


def at_random(run):
    """30 kills, each within the time of two saves after two saves."""

    def forever(step, said):
        while True:
            step += 1
            save(run, step)
            os.write(said, b".")

    last = 0
    for _ in range(30):
        heard, said = os.pipe()
        pid = forked(forever, last, said)
        os.close(said)
        for _ in range(2):
            began = time.perf_counter()
            os.read(heard, 1)
        time.sleep(random.uniform(0.0, 2.0) * (time.perf_counter() - began))
        os.kill(pid, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        found = checkpoint.newest(run)
        assert found.path == there(run)[-1]
        assert whole(found.path) == found.step == found.state["step"] >= last + 2
        last = found.step
    save(run, last + 1)
    print(*sorted(os.listdir(run / "checkpoints")), last)


def at_every_call(run):
    """A kill in front of each call that one save makes on the disk."""

    def killed(copy, count):
        left = count

        def hook(event, _):
            nonlocal left
            if event in CALLS:
                left -= 1
                if not left:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        save(copy, 3)

    for step in (1, 2):
        save(run, step)
    (run / "checkpoints" / ".step-00000003.0.draft").mkdir()
    status, count = signal.SIGKILL, 0
    while status:
        count += 1
        copy = run.parent / f"killed-{count}"
        shutil.copytree(run, copy)
        status = os.waitpid(forked(killed, copy, count), 0)[1]
        assert status in (0, signal.SIGKILL), status
        steps = [whole(path) for path in there(copy)]
        assert steps in ([1, 2], [1, 2, 3], [2, 3]), steps
        assert checkpoint.newest(copy).step == steps[-1]
        save(copy, 4)
        assert sorted(os.listdir(copy / "checkpoints")) == [f"step-{step:08d}" for step in (steps[-1], 4)]
    print(count)


if __name__ == "__main__":
    Path(sys.argv[2]).mkdir()
    {"at_random": at_random, "at_every_call": at_every_call}[sys.argv[1]](Path(sys.argv[2]))
