"""The head of a transformers model, asked for numbers of its tokens in the place of logits.

    with instead_of_logits(model, read) as reading:
        found = model(...)               # the head returns what read(terms, hidden) makes of its input
    reading.check(found.logits)          # the model left the head's output as its configuration says

The model's own forward runs: its backbone, its auxiliary losses and its output are as ever. Reading happens inside the
head's forward, between the hooks that FSDP2 and ZeRO-3 put around it, so that its parameters are whole.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fuserl import layers

__all__ = ["Reading", "Terms", "causal_lm", "instead_of_logits", "weight_like", "whole"]

_PROBE = 8.0  # a number that rides along with the head's output, to see what the model does to it


class Terms(NamedTuple):
    """What a model's logits are of its hidden states, as the ops take it."""

    weight: Tensor
    bias: Tensor | None
    lora: tuple[Tensor, Tensor, float] | None
    softcap: float | None
    logit_scale: float | None

    def options(self) -> dict:
        """All but the weight, by name."""
        return {name: value for name, value in self._asdict().items() if name != "weight"}


class Reading:
    """What a head was asked for during one forward of its model."""

    def __init__(self, model: nn.Module, read: Callable[[Terms, Tensor], Tensor]):
        self._model, self._read, self.values, self.used = model, read, None, False

    def __call__(self, hidden: Tensor) -> Tensor:
        """In the place of the head's forward: (..., K + 1), the K numbers that `read` gives and the probe."""
        if self.used:
            raise ValueError(
                f"fuserl.trainers: the head must be used once in a forward; {type(self._model).__name__} uses it "
                "again. Leave this model unpatched."
            )
        terms = _terms(self._model.get_output_embeddings(), self._model.config)
        values = self._read(terms._replace(weight=weight_like(terms.weight, hidden)), hidden)
        self.used = True
        return torch.cat([values, torch.full_like(values[..., :1], _PROBE)], -1)

    def take(self, _head, _given, found: Tensor) -> None:
        """The head's last hook: the numbers as they leave those of ZeRO-3 and FSDP2, which go with their gradient."""
        self.values = found[..., :-1]

    def check(self, logits: Tensor) -> None:
        """Raise ValueError where the model does other things to the head's output than its configuration names.

        It waits for the device, at the first forward of a model alone.
        """
        if not self.used:
            raise ValueError(
                f"fuserl.trainers: the head must be used once in a forward; {type(self._model).__name__} does not use "
                "it. Apply Liger with fused_linear_cross_entropy=False, or leave this model unpatched."
            )
        if getattr(self._model, "_fuserl_checked", False) or logits.numel() == 0:
            return
        softcap, scale = _after_the_head(self._model.config)
        expected = _PROBE * (scale or 1.0)
        expected = softcap * math.tanh(expected / softcap) if softcap else expected
        got = logits.reshape(-1, logits.shape[-1])[0, -1].item()
        if not math.isclose(got, expected, rel_tol=1e-2):
            raise ValueError(
                f"fuserl.trainers: the model must do to its logits what its configuration names, {expected:.4g} of "
                f"{_PROBE:g}; {type(self._model).__name__} makes {got:.4g} of it. Leave this model unpatched."
            )
        self._model._fuserl_checked = True


def causal_lm(model: nn.Module) -> nn.Module:
    """The transformers model inside DDP, a DeepSpeed engine or a PeftModel, or the model itself.

    Raises:
        ValueError: there is none with a head.
    """
    inner = model
    while isinstance(getattr(inner, "module", None), nn.Module):
        inner = inner.module
    if hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    if not callable(getattr(inner, "get_output_embeddings", None)) or inner.get_output_embeddings() is None:
        raise ValueError(
            f"fuserl.trainers: model must be a transformers model with a head; got {type(model).__name__}. Give the "
            "causal language model itself, not compiled: its backbone, model.model, may be."
        )
    return inner


def weight_like(weight: Tensor, hidden: Tensor) -> Tensor:
    """A head in the dtype of the hidden states; autocast casts both, and a DTensor is cast where it is gathered."""
    left = torch.is_autocast_enabled(hidden.device.type) or hasattr(weight, "full_tensor")
    return weight if left or weight.dtype == hidden.dtype else weight.to(hidden.dtype)


def whole(weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """A head's parameters as they are inside a gather of ZeRO-3, for a backward that runs after it.

    ZeRO-3 empties a parameter where its gather ends. The aliases keep what was gathered until the head's backward,
    which is a model's first: nothing runs between the two but the loss.

    Args:
        weight, bias: (V, D), and (V,) or None; parameters of any other kind are returned as they are.

    Returns:
        (weight, bias), whose gradients are the parameters'.

    Raises:
        ValueError: a parameter that ZeRO-3 or FSDP1 has partitioned, and nobody has gathered.
    """
    for each in (weight, bias):
        status = getattr(getattr(each, "ds_status", None), "name", "AVAILABLE")
        if weight.dim() != 2 or status != "AVAILABLE":
            raise ValueError(
                f"fuserl.trainers: the head must be whole, (V, D); got {tuple(weight.shape)}, as ZeRO-3 and FSDP1 "
                "leave it outside of its own forward. Gather it around this call, or use FSDP2 or ZeRO-2."
            )
    return tuple(each.view_as(each) if hasattr(each, "ds_id") else each for each in (weight, bias))


@contextlib.contextmanager
def instead_of_logits(model: nn.Module, read: Callable[[Terms, Tensor], Tensor]) -> Iterator[Reading]:
    """A context in which the head of `model` gives what `read` makes of the hidden states.

    Args:
        model: as `causal_lm` returns it.
        read: called with the head's `Terms` and hidden (..., D); returns (..., K) with the same leading dimensions.

    Returns:
        The `Reading`, whose `values` are what was read.

    Raises:
        ValueError: a head that is no linear layer, or that the model uses twice; inside of the forward.
    """
    head, reading = model.get_output_embeddings(), Reading(model, read)
    if "forward" in vars(head):
        raise ValueError(
            f"fuserl.trainers: the head must have its own forward; got one that was replaced, as offloading does, of "
            f"{type(head).__name__}. Keep the head on its device."
        )
    head.forward, hook = reading, head.register_forward_hook(reading.take)
    try:
        yield reading
    finally:
        hook.remove()
        del head.forward


def _terms(head: nn.Module, config) -> Terms:
    """The head in effect, with what its adapter and its configuration add."""
    lora = None
    if hasattr(head, "modules_to_save"):  # peft's copy of a layer that is trained whole
        head = head.original_module if head.disable_adapters else head.modules_to_save[head.active_adapters[0]]
    elif hasattr(head, "base_layer"):
        lora, head = _adapter(head), head.base_layer
    if getattr(type(head), "forward", None) not in (nn.Linear.forward, layers.Linear.forward):
        raise ValueError(
            f"fuserl.trainers: the head must be a linear layer, with peft's LoRA at most; got {type(head).__name__}. "
            "Leave this model unpatched."
        )
    return Terms(head.weight, head.bias, lora, *_after_the_head(config))


def _adapter(head: nn.Module) -> tuple[Tensor, Tensor, float] | None:
    """(A, B, scale) of a LoRA layer's adapter, None where none is in effect."""
    plain = hasattr(head, "lora_A") and not any(head.lora_bias.values()) and not getattr(head, "lora_variant", None)
    names = [] if not plain or head.disable_adapters or head.merged else head.active_adapters
    names = [name for name in names if name in head.scaling]
    dropout = [head.lora_dropout[name].p for name in names if getattr(head.lora_dropout[name], "p", 0.0)]
    if not plain or len(names) > 1 or (dropout and head.training):
        raise ValueError(
            "fuserl.trainers: an adapter on the head must be one LoRA, without dropout, bias or another addition; got "
            f"{type(head).__name__} with {len(names)} active and dropout {dropout}. Leave the head out of the targets."
        )
    return (head.lora_A[names[0]].weight, head.lora_B[names[0]].weight, head.scaling[names[0]]) if names else None


def _after_the_head(config) -> tuple[float | None, float | None]:
    """(softcap, factor) of the logits in a model's configuration."""
    config = config.get_text_config()
    factors = (getattr(config, name, None) for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"))
    scale = next((float(factor) for factor in factors if factor is not None), None)
    divisor = getattr(config, "logits_scaling", None)
    if scale is None and divisor is not None:
        scale = float(divisor) if config.model_type == "hyperclovax" else 1 / divisor
    return getattr(config, "final_logit_softcapping", None), scale
