"""Arrays of other libraries in the place of tensors, as arguments of the ops.

    advantages, returns = fuserl.gae(rewards, values, gamma=1.0, lam=0.95)      # NumPy, JAX, CuPy: what has __dlpack__

Memory is shared, not copied, and what comes back are tensors: `.numpy()`, or `jax.dlpack.from_dlpack` of them, costs
nothing either. No gradient goes to an array.
"""

import functools
from collections.abc import Callable

import numpy
import torch

__all__ = ["as_tensor", "taking_arrays"]


def as_tensor(x: object) -> object:
    """The tensor that shares the memory of an array, or what x is where it is none.

    An array of NumPy that is read-only is copied, since a tensor cannot be.
    """
    if isinstance(x, torch.Tensor) or not hasattr(x, "__dlpack__"):
        return x
    if isinstance(x, numpy.ndarray):
        return torch.from_numpy(x if x.flags.writeable else x.copy())
    return torch.from_dlpack(x)


def taking_arrays(op: Callable) -> Callable:
    """The op, whose arguments may be arrays."""

    @functools.wraps(op)
    def taking(*args, **kwargs):
        return op(*map(as_tensor, args), **{name: as_tensor(x) for name, x in kwargs.items()})

    return taking
