"""Decode passes in a few fixed shapes, which a GPU is told once and repeats: CUDA graphs.

A decode pass reads one token of each rollout: hundreds of small launches, which a processor needs longer to ask for
than a GPU to run. Here it is padded to a power of two of rows, and all that differs from pass to pass stands in buffers
that stay where they are. The first pass of a shape runs as it is; the second is recorded; it and all later ones are
replays. Where keys and values have moved, a shape is recorded anew; where what its rows see has outgrown the room that
it was given, a larger one takes its place. Weights are read where they lie, whatever they have become.

Written without a GPU: the tests replay what was recorded, operation by operation, on a CPU.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fuserl.engine.kv_cache import Pages, Pass
from fuserl.kernels import tree_decode
from fuserl.kernels.dispatch import choose
from fuserl.kernels.tree_frames import FixedLines
from fuserl.kernels.tree_lines import PAGE, Lines

_ASKS = frozenset({
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount", "unique_dim", "unique_consecutive",
    "_unique", "_unique2",
})  # fmt: skip
_FIELDS = 5  # of a row: token, position, row of the storage, stream, tokens drawn so far
_Draw = Callable[[Tensor, Pass], tuple[Tensor, ...]]


def recorder(model: nn.Module) -> Recorder | None:
    """What records the passes of a model; None where they run one by one: elsewhere than on a GPU, or without Triton.

    So do those of a model that FSDP cuts, whose hooks are not for recording.
    """
    weight = next(model.parameters())
    if weight.device.type != "cuda" or any(hasattr(module, "unshard") for module in model.modules()):
        return None
    fused = weight.dtype != torch.float64 and choose("tree_decode", tree_decode.IMPLS, weight.device) == "triton"
    return Recorder(weight.device) if fused else None


class Recorder:
    """Records what the host asks of a GPU as CUDA graphs, which share one pool of memory.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device):
        self._stream, self._pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def warm(self, step: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Runs a step where it will be recorded, so that libraries have their workspaces there."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            found = step()
        current.wait_stream(self._stream)
        return found

    def record(self, step: Callable[[], tuple[Tensor, ...]]) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
        """Something that runs a step again, and the tensors that hold its results once that was called.

        Raises:
            RuntimeError: the step cannot be recorded.
        """
        graph = torch.cuda.CUDAGraph()
        # Not torch.cuda.graph, which would leave its stream the current one where a recording fails. Other threads may
        # do what they like meanwhile, as the update does beside rollouts that are drawn ahead.
        with torch.cuda.stream(self._stream):
            graph.capture_begin(self._pool, capture_error_mode="thread_local")
            try:
                found = step()
            finally:
                graph.capture_end()
        return graph.replay, found


class Steps:
    """The decode passes of one model over one cache.

    Args:
        draw: (numbers (5, rows) int64, pass) -> (ids, logprobs), (rows,) each, for what it is given by address: of each
            row its token, its position, where its key is stored, its stream, and how many tokens it has drawn.
        pages: the cache; one page is taken for what padding writes.
        device: of the model.
        most: rows of the largest shape.
        padded: whether that is the only shape.
        recorder: what records.
    """

    def __init__(self, draw: _Draw, pages: Pages, device: torch.device, *, most: int, padded: bool, recorder: Recorder):
        self._draw, self.pages, self.device, self.recorder = draw, pages, device, recorder
        self.most, self.padded = most, padded
        self.spare = PAGE * pages.take(1)[0]
        pages.growth = 1.0  # every recording is lost when the cache moves
        self.shapes: dict[int, _Shape] = {}
        self.reason: str | None = None  # why no more passes may come here

    def rows(self, count: int) -> int:
        """The rows of the shape for so many."""
        return self.most if self.padded else min(self.most, 1 << (count - 1).bit_length())

    def run(self, numbers: Sequence[Sequence[int]], lines: Lines, windows: Sequence[int | None]) -> tuple[Tensor, ...]:
        """What `draw` makes of n rows: `numbers`, n of each field, and what each sees in layers of `windows`."""
        count = len(numbers[0])
        rows = self.rows(count)
        self.pages.fit()
        shape = self.shapes.get(rows)
        known = shape is not None and shape.lines.take(lines, windows)
        if not known:
            shape = self.shapes[rows] = _Shape(rows, self.device)
            shape.lines.take(lines, windows)
        shape.write(numbers, self.spare)
        step = functools.partial(self._step, shape)
        found = self._replayed(shape, step) if known else self._first(step)
        return tuple(x[:count] for x in found)

    def _step(self, shape: _Shape) -> tuple[Tensor, ...]:
        return self._draw(shape.numbers, Pass(self.pages, shape.numbers[2], shape.lines))

    def _first(self, step) -> tuple[Tensor, ...]:
        with _Noticing() as noticing:
            found = self.recorder.warm(step)
        self.reason = noticing.found
        if self.reason:
            _warned(self.reason)
        return found

    def _replayed(self, shape: _Shape, step) -> tuple[Tensor, ...]:
        if shape.recorded != self.pages.moved:
            try:
                shape.replay, shape.results = self.recorder.record(step)
            except RuntimeError as error:
                self.reason = f"{type(error).__name__}: {error}"
                _warned(self.reason)
                return self.recorder.warm(step)
            shape.recorded = self.pages.moved
        shape.replay()
        return shape.results


class _Shape:
    """The buffers that passes of so many rows read, and their recording."""

    def __init__(self, rows: int, device: torch.device):
        self._host = torch.zeros(_FIELDS, rows, dtype=torch.int64, pin_memory=device.type == "cuda")
        self.numbers = torch.zeros_like(self._host, device=device)
        self.lines = FixedLines(rows, device)
        self.recorded: int | None = None  # how often the cache had moved
        self.replay: Callable[[], None] | None = None
        self.results: tuple[Tensor, ...] = ()

    def write(self, numbers: Sequence[Sequence[int]], spare: int) -> None:
        """Replaces the last pass's numbers; rows beyond them are alike, and write to the page at `spare`."""
        count = len(numbers[0])
        self._host[:, :count] = torch.tensor(numbers)
        self._host[:, count:] = 0
        self._host[2, count:] = spare + torch.arange(self._host.shape[1] - count) % PAGE
        self.numbers.copy_(self._host, non_blocking=True)


class _Noticing(TorchDispatchMode):
    """Notices the first operation that no recording can repeat: it asks a GPU for a number, or copies to or fro."""

    found: str | None = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.found is None and _asks(func, args, kwargs or {}):
            self.found = f"{func} waits for the GPU"
        return func(*args, **(kwargs or {}))


def _asks(func, args, kwargs) -> bool:
    name = func.overloadpacket.__name__
    if name in ("index", "index_put", "index_put_"):
        return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    if name in ("copy_", "_to_copy"):
        to = args[0].device if name == "copy_" else kwargs.get("device") or args[0].device
        return to.type != args[name == "copy_"].device.type
    return name in _ASKS


@functools.cache
def _warned(reason: str) -> None:
    """Says so once."""
    warnings.warn(f"generate: decode passes run without CUDA graphs: {reason}", stacklevel=4)
