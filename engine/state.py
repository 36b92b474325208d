"""What a run is made of between two steps, to a checkpoint and back: after a resume every number is as without a stop.

policy, policy_optimizer      and critic, critic_optimizer: tensors
random                        torch's streams
state.json                    step, counters, Python's and NumPy's streams, where the files of metrics end, recipe state

The first rank writes it; tensors are whole in it, and streams those of every rank, so that as many go on as before, or
more, or fewer.
"""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fuserl.engine import checkpoint, metrics, ranks, sharding
from fuserl.engine.metrics import Run
from fuserl.engine.policy import Policy


@dataclass
class State:
    """Everything that a step changes.

    Args:
        learners: the policy, and the critic where there is one, by name.
        parts: the recipe's objects with `state_dict` and `load_state_dict`, by name.
        recipe: its name: a checkpoint of another one is refused.
    """

    recipe: str
    learners: dict[str, Policy]
    parts: dict[str, object]
    step: int = 0
    skipped: int = 0  # steps in a row with non-finite gradients
    counters: dict = field(default_factory=dict)

    def save(self, run: Run, keep: int) -> None:
        """Write a checkpoint into the run's folder."""
        tensors = {"random": _torch_streams()}
        for name, learner in self.learners.items():
            tensors[name] = learner.parameters()
            tensors[f"{name}_optimizer"] = learner.optimizer.state_dict()
        parts = {}
        for name, part in self.parts.items():
            state = part.state_dict()
            tensors[f"part_{name}"] = {key: value for key, value in state.items() if isinstance(value, Tensor)}
            parts[name] = {key: value for key, value in state.items() if not isinstance(value, Tensor)}
        state = {
            "recipe": self.recipe,
            "step": self.step,
            "skipped": self.skipped,
            "calls": {name: learner.calls for name, learner in self.learners.items()},
            "position": run.position(),
            "parts": parts,
            "random": ranks.everyones(_plain_streams()),
        }
        if ranks.first():
            checkpoint.save(run.folder, self.step, tensors, state, keep=keep)
        else:
            checkpoint.attend(tensors)

    def require_room(self, run: Run, keep: int) -> None:
        """Check before training that the disk takes the checkpoints: one more than are kept, and those there count.

        Raises:
            RuntimeError: it is too full.
        """
        tensors = [each for learner in self.learners.values() for each in learner.parameters().values()]
        size = sum(3 * each.numel() * each.element_size() for each in tensors)  # with the optimizer's two moments
        needed = size * max(1, keep + 1 - checkpoint.count(run.folder))
        free = shutil.disk_usage(run.folder).free
        if free < needed:
            raise RuntimeError(
                f"save: the disk must have room for {keep + 1} checkpoints of {size / 1e9:.3g} GB in {run.folder}; "
                f"{free / 1e9:.3g} GB are free. Make room, keep fewer with --keep, or choose another --out."
            )

    def restore(self, run: Run) -> None:
        """Go back to the newest checkpoint of the run's folder, or to the start where it has none."""
        found = checkpoint.newest(run.folder)
        if found is None:
            _require_none_lost(run)
            run.rewind(None)
            return
        if found.state["recipe"] != self.recipe:
            raise ValueError(
                f"resume: the run must be one of {self.recipe}; {run.folder} is one of {found.state['recipe']}. "
                "Leave the recipe out, or start a new run."
            )
        for name, learner in self.learners.items():
            copy(learner.parameters(), found.tensors(name), f"{found.path.name} of {run.folder}")
            learner.optimizer.load_state_dict(found.tensors(f"{name}_optimizer"))
            learner.calls = found.state["calls"][name]
        for name, part in self.parts.items():
            part.load_state_dict({**found.tensors(f"part_{name}"), **found.state["parts"][name]})
        self.step, self.skipped = found.state["step"], found.state["skipped"]
        _set_streams(found.tensors("random"), found.state["random"])
        run.rewind(found.state["position"])  # last: a refused resume leaves the run as it is


def _require_none_lost(run: Run) -> None:
    """Refuse to begin anew where that would cut away metrics of steps that checkpoints were written of."""
    every = run.saved_every()
    last = max((row["step"] for row in metrics.read(run.folder)), default=0)
    if every and last > every:
        raise ValueError(
            f"resume: {run.folder} must have a checkpoint; its metrics reach step {last} and there is none. Put its "
            "checkpoints back, or start a new run."
        )


@torch.no_grad()
def copy(into: dict[str, Tensor], values: dict[str, Tensor], where: str) -> None:
    """Copy tensors by name, which must be the same on both sides."""
    for name in sorted(into.keys() | values.keys()):
        here, there = into.get(name), values.get(name)
        if here is None or there is None or here.shape != there.shape:
            shapes = " and ".join("nothing" if each is None else str(tuple(each.shape)) for each in (here, there))
            raise ValueError(
                f"resume: {where} must hold the parameters that this run trains; for {name} they are {shapes}. Resume "
                "with the model, adapters and frozen parameters that the run was started with."
            )
    for name, tensor in into.items():
        sharding.assign(tensor, values[name])


def _torch_streams() -> dict[str, Tensor]:
    """Those of this rank by name, and those of rank 1, 2, ... with its number after a point."""
    own = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        # Of several ranks each has a GPU to itself, and would take memory on any other that it looked at.
        cuda = torch.cuda.get_rng_state_all() if ranks.world() == 1 else [torch.cuda.get_rng_state()]
        own |= {f"cuda_{index}": stream for index, stream in enumerate(cuda)}
    every = {name: ranks.gathered(stream) for name, stream in own.items()}
    return {f"{name}.{at}" if at else name: each for name, several in every.items() for at, each in enumerate(several)}


def _plain_streams() -> dict:
    version, words, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    return {"python": [version, list(words), gauss], "numpy": [name, keys.tolist(), *rest]}


def _set_streams(tensors: dict[str, Tensor], plain: list[dict]) -> None:
    """Go on with this rank's streams; one that was not there begins with the first one's."""
    own = ranks.rank() if ranks.rank() < len(plain) else 0
    mark = f".{own}" if own else ""
    torch.set_rng_state(tensors[f"cpu{mark}"])
    cuda = [tensors[f"cuda_{index}{mark}"] for index in range(len(tensors)) if f"cuda_{index}{mark}" in tensors]
    if cuda and ranks.world() > 1:
        torch.cuda.set_rng_state(cuda[0])
    elif cuda and len(cuda) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(cuda)
    version, words, gauss = plain[own]["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = plain[own]["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
