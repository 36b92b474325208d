"""Linear layers of a model by fuserl's matrix products, where these are faster than torch's.

    from fuserl import layers
    layers.attach(model)                     # of any trainer; parameters, names and hooks stay
    layers.detach(model)

See `fuserl.kernels.matmul` for where that is; elsewhere, as on GPUs and under autocast, a layer computes as before.
"""

from __future__ import annotations

from torch import Tensor, nn

from fuserl.kernels.matmul import linear

__all__ = ["Linear", "attach", "detach"]


class Linear(nn.Linear):
    """torch's layer, with another product."""

    def forward(self, input: Tensor) -> Tensor:
        """input (..., in_features) -> (..., out_features)."""
        return linear(input, self.weight, self.bias)


def attach(model: nn.Module) -> nn.Module:
    """Make every linear layer of a model one of ours, in place, and return the model; twice is no error.

    A layer of a class of its own, or whose forward was replaced, stays as it is.
    """
    return _exchanged(model, nn.Linear, Linear)


def detach(model: nn.Module) -> nn.Module:
    """Make the layers torch's own again."""
    return _exchanged(model, Linear, nn.Linear)


def _exchanged(model: nn.Module, old: type, new: type) -> nn.Module:
    for layer in model.modules():
        if type(layer) is old and "forward" not in vars(layer):
            layer.__class__ = new
    return model
