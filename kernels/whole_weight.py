"""A head that arrives sharded, as a DTensor: gathered where it is used, its gradient reduced back to the shards.

    forward   whole = all_gather(shards)        backward   d_shards = reduce_scatter(d_whole) / ranks

That is what FSDP2 does with a parameter inside its module's forward; a head used outside of it has to do it itself. The
shards are cast to the dtype of the hidden states before they are gathered, and the gradient to theirs before it is
reduced, as a mixed-precision policy has it. The mean is over every rank of the mesh. Ranks that share their tokens, as
those of tensor parallelism do, have the same gradient, so that the mean is right for them too; given as group=, their
dimension of the mesh stays cut instead, and `vocabulary_shards` merges what its ranks find.

FSDP2 and DDP average gradients: a loss that is normalised over the whole batch is scaled by the number of ranks. A tied
embedding gets its part from FSDP2 or DDP as ever, and both add up. What goes to grad_weight is reduced by nobody: it is
the whole d_weight of this rank's tokens, for the caller to average after the last micro-batch. Under DDP a head is used
outside of the wrapped forward with find_unused_parameters=False, and, where it has grad_weight, kept out of the wrapped
module, which would wait for a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor


def whole(
    weight: Tensor | None,
    *,
    dtype: torch.dtype | None = None,
    group: torch.distributed.ProcessGroup | None = None,
    op: str = "whole",
) -> Tensor | None:
    """The plain tensor of a DTensor, differentiable; any other tensor as it is.

        d_weight = mean over the ranks of the mesh of d_whole, cut as weight is

    Call it once for several micro-batches and pass the result to the ops; each backward then reduces once.

    Args:
        weight: (V, ...), plain, or a DTensor on a mesh of any dimensions, or None.
        dtype: what a DTensor is gathered in; its gradient is reduced in its own dtype.
        group: a dimension of the mesh that has this process group stays cut: this rank's rows only are gathered.
        op: the caller's name, for errors.

    Returns:
        (V, ...), or (V_rank, ...) where `group` is of the mesh.

    Raises:
        ValueError: where the mesh dimension of `group` does not cut the first dimension.
    """
    if not hasattr(weight, "full_tensor"):
        return weight
    return _Whole.apply(weight, dtype or weight.dtype, _axis(op, weight, group))


def refuse(op: str, **tensors: Tensor | None) -> None:
    """Raise ValueError where an argument that must be plain is a DTensor."""
    for name, tensor in tensors.items():
        if hasattr(tensor, "full_tensor"):
            raise ValueError(
                f"{op}: {name} must be a plain tensor; got a DTensor of {tensor.placements}. Pass this rank's own, or "
                f"{name}.full_tensor(): only the head may be sharded."
            )


def _axis(op: str, weight, group) -> int | None:
    """The mesh dimension that has the group, None for none."""
    if group is None:
        return None
    mesh = weight.device_mesh
    for axis, placement in enumerate(weight.placements):
        if mesh.get_group(axis).group_name == group.group_name:
            if not placement.is_shard(0):
                raise ValueError(
                    f"{op}: the head must be cut along the vocabulary, Shard(0), over group=; got {placement}. Leave "
                    "group= out to use the whole head on each rank."
                )
            return axis
    return None


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, dtype: torch.dtype, axis: int | None):
        from torch.distributed.tensor import Replicate

        ctx.mesh, ctx.placements, ctx.axis, ctx.dtype = weight.device_mesh, weight.placements, axis, weight.dtype
        ctx.shape, ctx.stride = weight.shape, weight.stride()
        ctx.set_materialize_grads(False)  # none comes where it went to grad_weight
        placements = [p if i == axis else Replicate() for i, p in enumerate(ctx.placements)]
        return weight.detach().to(dtype).redistribute(placements=placements).to_local()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g: Tensor | None):
        if g is None:
            return None, None, None
        from torch.distributed.tensor import DTensor, Partial

        ranks = ctx.mesh.size() // (1 if ctx.axis is None else ctx.mesh.size(ctx.axis))
        placements = [p if i == ctx.axis else Partial() for i, p in enumerate(ctx.placements)]
        g = DTensor.from_local(
            g.to(ctx.dtype), ctx.mesh, placements, run_check=False, shape=ctx.shape, stride=ctx.stride
        )
        return g.redistribute(placements=ctx.placements) / ranks, None, None
