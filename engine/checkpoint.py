"""Checkpoints of a run: folders of safetensors and JSON, whole or absent, checked before they are used.

RUN/checkpoints/step-00000020/
    policy.safetensors, ...    a file per part
    state.json                 numbers, texts and lists: positions, counters, random streams
    checksums.json             format, step, and the SHA-256 of each of the others

Nothing that is read can run code. A process killed at any instant leaves the checkpoints that were there, and beside
them either a new one or a hidden draft, which the next save removes. A step that is saved again gets `-2` to its name.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from fuserl.engine import atomic, lookup, sharding

FORMAT = 1
_FOLDER, _CHECKSUMS, _STATE = "checkpoints", "checksums.json", "state.json"
_NAME = re.compile(r"step-(\d{8,})(?:-([2-9]|[1-9]\d+))?")
_PIECE = 1 << 20  # bytes hashed and written at a time: they stay in the processor's cache between the two
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose checksums held when it was found.

    Args:
        path: its folder.
        step: steps done when it was saved.
        state: the JSON part, as it was given to `save`.
    """

    path: Path
    step: int
    state: dict

    def tensors(self, part: str) -> dict[str, Tensor]:
        """The tensors of one part, on the host, bit for bit as they were saved.

        Raises:
            ValueError: there is no such part.
        """
        known = sorted(path.stem for path in self.path.glob("*.safetensors"))
        if part not in known:
            raise ValueError(f"tensors: part must be in {self.path}; got {part!r}. {lookup.nearest(part, known)}")
        return lookup.package("safetensors.torch", "engine").load_file(self.path / f"{part}.safetensors")


def save(folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict, *, keep: int = 2) -> Path:
    """Save a checkpoint, then discard those older than the `keep` newest whole ones.

    The disk needs room for `keep + 1`. Only one process may save into a run at a time.

    Args:
        folder: of the run; its `checkpoints` is made where it is missing.
        step: steps done, which names the checkpoint.
        tensors: by part, then by name; any device, layout of strides and sharing of storage; dtypes of safetensors.
        state: what JSON can hold: dicts with texts as keys, lists, texts, booleans, None, and numbers, which come back
            bit for bit, infinities and NaN included.
        keep: whole checkpoints of different steps that stay, this one included.

    Returns:
        The checkpoint's folder.

    Raises:
        ValueError: something cannot be saved so that it comes back the same.
        RuntimeError: the disk is full or cannot be written; the other checkpoints are as they were.
    """
    _check(step, tensors, state, keep)
    folder = Path(folder) / _FOLDER
    try:
        path = _free(folder, step)
        atomic.remove_drafts(folder)
        with atomic.draft_folder(folder, path.name) as draft:
            files = {_file(part): _write(draft / _file(part), named) for part, named in tensors.items()}
            (draft / _STATE).write_text(json.dumps(state))
            files[_STATE] = atomic.sha256(draft / _STATE)
            manifest = {"format": FORMAT, "step": step, "files": files}
            (draft / _CHECKSUMS).write_text(json.dumps(manifest, separators=(",", ":")))
            atomic.publish_folder(draft, path)
        _discard_old(folder, path, keep)
    except OSError as error:
        raise RuntimeError(
            f"save: {folder} must take the checkpoint of step {step}; it does not ({error.strerror or error}). "
            "The earlier checkpoints are intact: make room or set its permissions, and resume."
        ) from error
    return path


def attend(tensors: dict[str, dict[str, Tensor]]) -> None:
    """Take part in a save by the first rank, with this one's pieces of the tensors: whole, one at a time."""
    for named in tensors.values():
        for _, tensor in _ordered(named):
            sharding.whole(tensor.detach())


def newest(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint of the run in `folder`, or None where it has none.

    Every file is read and compared with its checksum. One that is damaged, or of another format, is named in a line on
    standard error and the one before it is taken.

    Raises:
        ValueError: there are checkpoints, and none is whole.
        RuntimeError: the folder cannot be read.
    """
    folder = Path(folder) / _FOLDER
    try:
        found = _found(folder)
    except OSError as error:
        raise RuntimeError(
            f"newest: {folder} must be readable; it is not ({error.strerror or error}). Set its permissions."
        ) from error
    for path in found:
        damage = _damage(path)
        if damage is None:
            return Checkpoint(path, _order(path)[0], json.loads((path / _STATE).read_bytes()))
        print(f"fuserl: checkpoint {path} is left out: {damage}", file=sys.stderr, flush=True)
    if found:
        raise ValueError(
            f"newest: {folder} must hold a checkpoint that is whole; none of its {len(found)} is. "
            "Put a copy back, or start a new run."
        )
    return None


def count(folder: Path) -> int:
    """How many checkpoints the run in `folder` has, whole or not."""
    return len(_found(Path(folder) / _FOLDER))


def _check(step: int, tensors: dict[str, dict[str, Tensor]], state: dict, keep: int) -> None:
    for name, value, least in (("step", step, 0), ("keep", keep, 1)):
        if type(value) is not int or value < least:
            raise ValueError(f"save: {name} must be an integer >= {least}; got {value!r}.")
    for part, named in tensors.items():
        if not re.fullmatch(r"\w[\w-]*", part, re.ASCII):
            raise ValueError(f"save: a part's name must be letters, digits, _ and -; got {part!r}. Rename it.")
        for name, tensor in named.items():
            if tensor.dtype not in _DTYPES or tensor.layout is not torch.strided or name == "__metadata__":
                raise ValueError(
                    f"save: tensors must be dense and of a dtype of safetensors; got {tensor.dtype} ({tensor.layout}) "
                    f"for {name!r} of {part!r}. Convert it, or leave it out."
                )
    if not isinstance(state, dict):
        raise ValueError(f"save: state must be a dict; got {type(state).__name__}.")
    _check_json(state, "state")


def _check_json(value: object, where: str) -> None:
    """Refuse what JSON would change without a word: tuples, keys that are no texts, objects."""
    if type(value) is dict:
        for key, each in value.items():
            if type(key) is not str:
                raise ValueError(f"save: keys in state must be texts; got {key!r} in {where}. Make it one.")
            _check_json(each, f"{where}[{key!r}]")
    elif type(value) is list:
        for index, each in enumerate(value):
            _check_json(each, f"{where}[{index}]")
    elif value is not None and type(value) not in (bool, int, float, str):
        raise ValueError(f"save: state must hold what JSON keeps; got a {type(value).__name__} at {where}. Convert it.")


def _write(path: Path, named: dict[str, Tensor]) -> str:
    """Write tensors as a safetensors file and return its SHA-256, in one pass and with one tensor's copy in memory.

    The library's own writer takes a second pass for the sum, twice the time, and hides the kind of an error.
    """
    ordered, header, end = _ordered(named), {}, 0
    for name, tensor in ordered:
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    sha = hashlib.sha256()
    with path.open("xb", buffering=0) as file:
        _put(file, sha, len(head).to_bytes(8, "little") + head)
        for _, tensor in ordered:
            flat = sharding.whole(tensor.detach()).cpu().contiguous().reshape(-1)
            _put(file, sha, flat.view(torch.uint8).numpy())
    return sha.hexdigest()


def _ordered(named: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
    """Wide elements first, so that each tensor is aligned when the file is mapped."""
    return sorted(named.items(), key=lambda item: -item[1].element_size())


def _put(file: BinaryIO, sha, data) -> None:
    rest = memoryview(data)
    while rest:
        # On a disk that is about to be full less than asked is written, and the next call says why.
        written = file.write(rest[:_PIECE])
        sha.update(rest[:written])
        rest = rest[written:]


def _found(folder: Path) -> list[Path]:
    """Checkpoints in `folder`, newest first, whole or not."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), key=_order, reverse=True)


def _order(path: Path) -> tuple[int, int]:
    step, again = _NAME.fullmatch(path.name).groups()
    return int(step), int(again or 1)


def _free(folder: Path, step: int) -> Path:
    """A path for a checkpoint of `step` beside those that are there: replacing one would leave an instant without."""
    taken = [again for number, again in map(_order, _found(folder)) if number == step]
    return folder / (f"step-{step:08d}-{max(taken) + 1}" if taken else f"step-{step:08d}")


def _discard_old(folder: Path, written: Path, keep: int) -> None:
    kept = {_order(written)[0]}
    for path in _found(folder):
        step, _ = _order(path)
        if _order(path) >= _order(written):
            continue
        if len(kept) >= keep or step in kept:
            atomic.discard_folder(path)
        elif _damage(path) is None:
            kept.add(step)


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads((path / _CHECKSUMS).read_bytes())
        version, step, files = (manifest[name] for name in ("format", "step", "files"))
        if version != FORMAT:
            return f"its format is {version!r}, and this fuserl reads {FORMAT}"
        if step != _order(path)[0] or _STATE not in files:
            return f"{_CHECKSUMS} is not of this checkpoint"
        for name, expected in files.items():
            if atomic.sha256(path / Path(name).name) != expected:
                return f"{name} does not match its checksum"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"{Path(error.filename or path).name} cannot be read ({error.strerror})"
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return f"{_CHECKSUMS} is not of a checkpoint, or damaged"
    return None


def _file(part: str) -> str:
    return f"{part}.safetensors"
