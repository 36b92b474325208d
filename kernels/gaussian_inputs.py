"""What gaussian_logprob is given: its checks, and the inputs as implementations take them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Given", "check", "given_rows", "scales_of", "widened"]

_NARROW = (torch.bfloat16, torch.float16)


class Given(NamedTuple):
    """What a call is told, (N, D) or None; scales also (N, 1), or (D,) or (1,) for all rows; the mask also (D,)."""

    actions: Tensor
    mean: Tensor
    scale: Tensor
    ref_mean: Tensor | None = None
    ref_scale: Tensor | None = None
    mask: Tensor | None = None
    logs: bool = True


def given_rows(tensors: tuple[Tensor | None, ...], logs: int) -> Given:
    """The inputs of the op as its implementations take them: as rows where they have one for each action."""
    lead, rows = tensors[0].shape[:-1], []
    for x in tensors:
        if x is not None:
            shape = x.shape
            if len(shape) != 2 or shape[:1] != lead:
                x = x.reshape(-1, shape[-1]) if shape[:-1] == lead and len(shape) else x.reshape(-1)
            x = x.contiguous()
        rows.append(x)
    return Given(*rows, bool(logs))


def widened(x: Tensor) -> Tensor:
    """Sixteen bits as float32."""
    return x.float() if x.dtype in _NARROW else x


def scales_of(actions: Tensor, log_std, std, ref_mean, ref_log_std, ref_std) -> tuple[bool, Tensor, Tensor | None]:
    """Whether scales are given as logarithms; the policy's; the reference's, or None without one."""
    if (log_std is None) == (std is None):
        got = "neither" if std is None else "both"
        raise ValueError(f"gaussian_logprob: log_std or std must be given, one of them; got {got}. Give one.")
    logs = std is None
    if (ref_std if logs else ref_log_std) is not None:
        name, form = ("ref_std", "log_std") if logs else ("ref_log_std", "std")
        raise ValueError(
            f"gaussian_logprob: {name} must be None where the policy's scale is {form}; got a value. Give ref_{form}."
        )
    if ref_mean is None and (ref_log_std if logs else ref_std) is not None:
        raise ValueError("gaussian_logprob: ref_mean must be given with the reference's scale; got None. Give both.")
    scale, ref_scale = (log_std, ref_log_std) if logs else (std, ref_std)
    scale = _scale_of("log_std" if logs else "std", scale, actions)
    if ref_mean is not None:
        ref_scale = scale if ref_scale is None else _scale_of("ref_log_std" if logs else "ref_std", ref_scale, actions)
    return logs, scale, ref_scale


def _scale_of(name: str, x: Tensor | float, actions: Tensor) -> Tensor:
    """A scale in the actions' dtype, for all rows or for each."""
    if not isinstance(x, Tensor):
        return actions.new_full((), x)
    x, shape = widened(x), actions.shape
    if x.shape == shape:
        _check_kind(name, x, actions)
        return x
    columns = x.shape[-1] if x.dim() else 1
    lead, rows = x.shape[:-1], shape[:-1]
    fits = columns in (1, shape[-1]) and len(lead) <= len(rows)
    fits = fits and all(a in (1, b) for a, b in zip(reversed(lead), reversed(rows), strict=False))
    if not fits:
        raise ValueError(
            f"gaussian_logprob: {name} must be broadcastable to {tuple(shape)}; got {tuple(x.shape)}. Give (D,) for "
            "every state, (..., 1) for every dimension."
        )
    _check_kind(name, x, actions)
    return x if lead == rows or all(size == 1 for size in lead) else x.expand(*rows, columns)


def _check_kind(name: str, x: Tensor, actions: Tensor) -> None:
    if x.dtype != actions.dtype or x.device != actions.device:
        raise ValueError(
            f"gaussian_logprob: {name} must be {actions.dtype} on {actions.device} like actions; got {x.dtype} on "
            f"{x.device}. Convert it with .to()."
        )


def check(actions: Tensor, mean: Tensor, ref_mean: Tensor | None, mask: Tensor | None) -> None:
    """Raise unless actions, means and mask fit together."""
    shape = actions.shape
    if actions.dtype not in (torch.float32, torch.float64) or actions.dim() == 0 or shape[-1] == 0:
        raise ValueError(
            f"gaussian_logprob: actions must be (..., D) of a floating dtype, D > 0; got {tuple(shape)} "
            f"{actions.dtype}. Give a vector per action, (..., 1) for a number."
        )
    for name, x in (("mean", mean), ("ref_mean", ref_mean)):
        if x is None:
            continue
        if x.shape != shape:
            raise ValueError(
                f"gaussian_logprob: {name} must be {tuple(shape)} like actions; got {tuple(x.shape)}. Expand it."
            )
        _check_kind(name, x, actions)
    if mask is None:
        return
    if mask.shape not in (shape, shape[-1:]) or mask.dtype != torch.bool or mask.device != actions.device:
        raise ValueError(
            f"gaussian_logprob: mask must be {tuple(shape)} or {tuple(shape[-1:])} torch.bool on {actions.device}; got "
            f"{tuple(mask.shape)} {mask.dtype} on {mask.device}. Expand or convert it."
        )
