"""Weights and gradients of several ranks: a model that each holds whole, or one that FSDP2 cuts over them.

    whole   each rank runs its micro-batches; their gradients are summed once, before the optimizer's step
    cut     a layer's weights are gathered for its forward and backward, its gradients summed into the pieces

Losses are normalised over the whole batch, so gradients are summed over ranks, never averaged.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fuserl.engine import ranks

_BUCKET = 1 << 23  # elements that are summed at once
_INSIDE = "_inside_fsdp"


@torch.no_grad()
def align(model: nn.Module) -> None:
    """Give every rank the first one's parameters, whatever each has loaded."""
    if ranks.world() > 1:
        for parameter in model.parameters():
            dist.broadcast(parameter.data, 0)


def cut(model: nn.Module, device: torch.device) -> None:
    """Cut a module's parameters over the ranks, the items of its module lists (decoder layers) one by one.

    They become DTensors of which each rank holds a piece, and are whole within a forward, or within `inside` or
    `uncut`. A gradient is the sum over the ranks.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (ranks.world(),))
    lists = [each for each in model.modules() if isinstance(each, nn.ModuleList)]
    layers = [item for each in lists for item in each if any(True for _ in item.parameters())]
    setattr(model, _INSIDE, types.MethodType(lambda self, function: function(), model))
    for module in [*layers[::-1], model]:
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no other
    register_fsdp_forward_method(model, _INSIDE)


def is_cut(model: nn.Module) -> bool:
    """Whether the parameters of a module have been cut over the ranks."""
    return hasattr(model, _INSIDE)


def inside(model: nn.Module, function: Callable):
    """`function()`, as if it were the forward of a model that may be cut: it may use any of its parameters.

    Every rank must come here, and backward through what it returns, equally often.
    """
    return getattr(model, _INSIDE, lambda function: function())(function)


@contextlib.contextmanager
def uncut(model: nn.Module) -> Iterator[None]:
    """Every parameter whole for a while: ranks may run the model as often as each likes. No gradients."""
    modules = [module for module in model.modules() if hasattr(module, "unshard")]
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.reshard()
            module.set_reshard_after_forward(True, recurse=False)


@torch.no_grad()
def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Sum the gradients of whole parameters over the ranks; those of a cut model are sums already.

    A rank that had nothing to run takes part with zeros. A parameter that no rank has a gradient of keeps none.
    """
    # Not DistributedDataParallel: that sums in every rank's backward through a wrapped forward, and would wait for ever
    # for a rank with fewer micro-batches; and the head is used outside of any module's forward.
    plain = [parameter for parameter in parameters if not _is_cut(parameter)]
    if ranks.world() == 1 or not plain:
        return
    held = ranks.summed(torch.tensor([float(parameter.grad is not None) for parameter in plain]))
    plain = [parameter for parameter, count in zip(plain, held.tolist(), strict=True) if count]
    for parameter in plain:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for bucket in _buckets([parameter.grad for parameter in plain]):
        flat = ranks.summed(torch.cat([gradient.reshape(-1) for gradient in bucket]))
        for gradient, part in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
            gradient.copy_(part.view_as(gradient))


def whole(tensor: Tensor) -> Tensor:
    """A tensor as it is, or gathered from its pieces, for which every rank must ask."""
    return tensor.full_tensor() if _is_cut(tensor) else tensor


@torch.no_grad()
def assign(into: Tensor, value: Tensor) -> None:
    """Copy a whole tensor, which every rank has, into one that may be cut."""
    if _is_cut(into):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.to(into.device), into.device_mesh, into.placements, src_data_rank=None)
    into.copy_(value)


def _is_cut(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    bucket, size = [], 0
    for tensor in tensors:
        if bucket and size + tensor.numel() > _BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel()
    if bucket:
        yield bucket
