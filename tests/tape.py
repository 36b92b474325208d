"""What a GPU does with a recording, on a CPU: the same operations on the same addresses, and no Python between them."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fuserl import _C
from fuserl.engine import replay


class _Recording(TorchDispatchMode):
    """The operations of a step; a number that Python worked out from data is what it was."""

    def __init__(self, tree_decode):
        super().__init__()
        self.calls, self._tree_decode = [], tree_decode

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, found))
        return found

    def tree_decode(self, *args):
        self.calls.append((self._tree_decode, args, {}, None))
        self._tree_decode(*args)

    def replay(self):
        for func, args, kwargs, results in self.calls:
            for to, x in zip(tree_leaves(results), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(to, torch.Tensor) and to.data_ptr() != x.data_ptr():
                    to.copy_(x)


class Tape:
    """A `replay.Recorder` for a CPU, and how often each of its methods was called."""

    def __init__(self, monkeypatch):
        self.monkeypatch, self.warmed, self.recorded, self.replayed = monkeypatch, 0, 0, 0

    def warm(self, step):
        self.warmed += 1
        return step()

    def record(self, step):
        self.recorded += 1
        with self.monkeypatch.context() as patch, _Recording(_C.tree_decode) as recording:
            patch.setattr(_C, "tree_decode", recording.tree_decode)
            results = step()
        for x in results:
            x.fill_(-7)  # a GPU that records runs nothing

        def again():
            self.replayed += 1
            recording.replay()

        return again, results


def attach(monkeypatch):
    """Let decode passes on a CPU be recorded by a tape, and return it."""
    tape = Tape(monkeypatch)
    monkeypatch.setattr(replay, "recorder", lambda model: tape)
    return tape
