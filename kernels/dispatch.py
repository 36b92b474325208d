"""Which implementation of an op runs: an order per device, and a reason for every backend that cannot."""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from collections.abc import Iterable

import torch

BACKENDS = ("cuda", "triton", "cpu", "flash", "reference")
_ORDER = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpu", "reference")}


def choose(op: str, implemented: Iterable[str], device: torch.device, backend: str | None = None) -> str:
    """The backend that runs `op` on a tensor of `device`: the one asked for, or the first usable in the device's order.

    `backend`, or else the environment variable FUSERL_BACKEND, asks for one and raises if that one cannot run. Without
    either, falling to the reference warns once with the reason.
    """
    implemented = tuple(implemented)
    wanted = backend or os.environ.get("FUSERL_BACKEND") or None
    if wanted is not None:
        if wanted not in BACKENDS:
            raise ValueError(f"{op}: backend must be one of {', '.join(BACKENDS)}; got {wanted!r}.")
        reason = why_not(op, implemented, wanted, device.type)
        if reason:
            raise RuntimeError(f"{op}: backend {wanted!r} cannot run on {device.type}: {reason}")
        return wanted
    return _first_usable(op, implemented, device.type)


def why_not(op: str, implemented: Iterable[str], backend: str, device_type: str) -> str | None:
    """The reason why `backend` cannot run `op` on a device of this type, or None when it can."""
    if backend not in implemented:
        return f"{op} has no {backend} implementation."
    if backend == "reference":
        return None
    if backend == "cpu" and device_type != "cpu":
        return "the C++ kernels take CPU tensors."
    if backend == "flash" and device_type != "cuda":
        return _import_failure("flash_attn", "pip install flash-attn") or "flash-attn takes CUDA tensors."
    if backend == "cuda" and device_type != "cuda":
        return "the CUDA kernels take CUDA tensors."
    if backend == "triton" and device_type == "cpu" and not _interpreting():
        return "Triton takes GPU tensors, or TRITON_INTERPRET=1 set before the start."
    return backends()[backend]


def backends() -> dict[str, str | None]:
    """Name every backend; the value is None where it can run on this machine, else the reason why it cannot."""
    return {
        "cuda": _import_failure("fuserl._cuda", "reinstall fuserl where nvcc is found (FUSERL_CUDA=ON)")
        or (None if torch.cuda.is_available() else "torch sees no CUDA device."),
        "triton": _import_failure("triton", "pip install triton"),
        "cpu": _import_failure("fuserl._C", "reinstall fuserl with a C++17 compiler"),
        "flash": _import_failure("flash_attn", "pip install flash-attn"),
        "reference": None,
    }


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _import_failure(module: str, cure: str) -> str | None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"{module} does not load ({error}); {cure}."
    return None


@functools.cache
def _first_usable(op: str, implemented: tuple[str, ...], device_type: str) -> str:
    order = _ORDER.get(device_type, ("triton", "reference"))
    usable = next(name for name in order if name == "reference" or why_not(op, implemented, name, device_type) is None)
    if usable == "reference":
        reasons = "; ".join(f"{name}: {why_not(op, implemented, name, device_type)}" for name in order[:-1])
        message = f"{op}: running the plain torch reference on {device_type}, slowly ({reasons})"
        warnings.warn(message, RuntimeWarning, stacklevel=4)
    return usable
