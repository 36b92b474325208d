"""The processes of one run, which torchrun starts: who this one is, and what all of them find together.

    torchrun --nproc-per-node 2 -m fuserl.engine.cli train grpo

Every rank goes through the same loop with the same whole batch, as token ids and rewards are small. What takes time is
shared out: prompts to complete, completions to reward, micro-batches to run. Each rank brings in what it found, so that
all of them decide alike. A process that torchrun did not start is the one rank of its run and waits for nobody.

Ranks send one another numbers and JSON, nothing that could run code when it is read.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import json
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from fuserl.engine import wording

_PATIENCE = datetime.timedelta(minutes=30)  # for the slowest rank: a reward may take its time
_FAILURE = "fuserl/failure"


def world() -> int:
    """How many ranks the run has."""
    return dist.get_world_size() if _joined() else 1


def rank() -> int:
    """The number of this one, from 0."""
    return dist.get_rank() if _joined() else 0


def first() -> bool:
    """Whether this is the rank that writes: files, metrics, the display."""
    return rank() == 0


@contextlib.contextmanager
def joined(device: str) -> Iterator[None]:
    """Join the other ranks for a while, where torchrun started this process; nothing is done elsewhere.

    A rank whose body raises tells the others why, and they raise that once they wait for it in vain.

    Args:
        device: "cpu", or "cuda" for the GPU that has this rank's number on its machine.

    Raises:
        ValueError: one GPU is named for all ranks, or there are fewer than ranks.
        RuntimeError: another rank failed.
    """
    if not dist.is_available() or dist.is_initialized() or not dist.is_torchelastic_launched():
        yield
        return
    if ":" in device:
        raise ValueError(f"joined: device must be cpu or cuda, of which each rank takes one; got {device}. Use cuda.")
    if device == "cuda":
        local, seen = dist.get_node_local_rank(), torch.cuda.device_count()
        if local >= seen:
            raise ValueError(
                f"joined: each rank must have a GPU of its own; torch sees {seen} here, and this is the rank number "
                f"{local + 1}. Lower --nproc-per-node."
            )
        torch.cuda.set_device(local)
    store, number, count = next(dist.rendezvous("env://"))
    kind = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"  # tokens and texts travel between hosts
    dist.init_process_group(kind, store=store, rank=number, world_size=count, timeout=_PATIENCE)
    with contextlib.ExitStack() as stack:
        stack.callback(dist.destroy_process_group)
        stack.push(functools.partial(_ended, store, number))
        yield


def share(count: int) -> range:
    """This rank's part of `count` things in a row, as many as another's or one more."""
    return range(count * rank() // world(), count * (rank() + 1) // world())


def everyones(value: object) -> list:
    """What JSON makes of every rank's value, in their order."""
    if world() == 1:
        return [value]
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    return [json.loads(part.numpy().tobytes()) for part in gathered(text)]


def gathered(tensor: Tensor) -> list[Tensor]:
    """The tensors (n,) of all ranks, on the host, of one dtype and any lengths, in their order."""
    if world() == 1:
        return [tensor]
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(world())]
    dist.all_gather(sizes, torch.tensor([len(tensor)]))
    parts = [tensor.new_empty(int(size)) for size in sizes]
    parts[rank()] = tensor.contiguous()
    for at, part in enumerate(parts):  # gloo gathers equal lengths only
        if len(part):
            dist.broadcast(part, at)
    return parts


def summed(tensor: Tensor) -> Tensor:
    """The sum of all ranks' tensors of one shape, which takes the place of this one."""
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor


def require_same(what: str, texts: list[str]) -> None:
    """Raise RuntimeError where ranks, each of which has made its own, have different texts."""
    sums = everyones(hashlib.sha256(json.dumps(texts).encode()).hexdigest())
    if len(set(sums)) > 1:
        odd = next(number for number, each in enumerate(sums) if each != sums[0])
        raise RuntimeError(
            f"train: {what} must be the same on every rank; rank {odd} has others than rank 0. Give all the same "
            "files, packages and PYTHONHASHSEED."
        )


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def _ended(store: dist.Store, number: int, kind, error: BaseException | None, traceback) -> None:
    """Leave word of the first failure; a later one is its consequence, and is replaced by it."""
    if error is None:
        return
    chain = [error]  # an interrupt, by which torchrun stops the others, may come while an error is on its way
    while chain[-1].__context__ is not None:
        chain.append(chain[-1].__context__)
    own = f"rank {number}: {wording.sentence(error)}"
    if isinstance(error, KeyboardInterrupt):
        said = store.get(_FAILURE).decode() if store.check([_FAILURE]) else own
    else:
        said = store.compare_set(_FAILURE, "", own).decode()
    if said.partition(": ")[2] == own.partition(": ")[2]:  # this one's, or what all ranks have found alike
        if not any(isinstance(each, dist.DistError) or "gloo" in str(each) for each in chain):
            return
        said = (
            "train: every rank must stay until the end; another one went without a word, and torchrun says how. Go on "
            "from the last checkpoint."
        )
    raised = RuntimeError(said)
    for note in (note for each in chain for note in getattr(each, "__notes__", ())):
        raised.add_note(note)
    raise raised from error
