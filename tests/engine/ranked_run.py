"""A command under torchrun whose rank 1 ends in its second update, `raises` or `killed`, or does not, `whole`."""

import os
import signal
import sys

import tiny_models
import tiny_runs
import torch

from fuserl.engine import cli, models, ranks
from fuserl.engine.policy import Policy


def failing(how, update=Policy.update):
    """An update that fails on rank 1 at its second call."""
    calls = []

    def replaced(policy, batch, loss):
        calls.append(1)
        if ranks.rank() == 1 and len(calls) == 2 and how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if ranks.rank() == 1 and len(calls) == 2 and how == "raises":
            raise RuntimeError("update: the second one must fail; it did. Expect no other")
        return update(policy, batch, loss)

    return replaced


if __name__ == "__main__":
    how, *arguments = sys.argv[1:]
    models.load = lambda *_: (tiny_models.model(dtype=torch.float64), tiny_runs.Characters())
    Policy.update = failing(how)
    sys.exit(cli.main(arguments))
