"""What of a model is trained: LoRA through peft, frozen parameters, recomputed activations, and the head in effect.

Every function takes a transformers model or a PeftModel around one; `base` is the way from either to the former. peft
puts its layers into that very model, so its forward is the adapted one, and packing and generation work on both.

    y = W x + scale B A x        scale = alpha / rank; A (rank, in) random, B (out, rank) zero at the start
"""

from __future__ import annotations

import contextlib
import copy
import fnmatch
import math
import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from fuserl.engine import lookup

_EVERY_LINEAR = "all-linear"
# Names in the configs of model families for factors of the logits: Cohere and Falcon-H1, Granite.
_MULTIPLIERS, _DIVISORS = ("logit_scale", "lm_head_multiplier"), ("logits_scaling",)


def base(model: nn.Module) -> nn.Module:
    """The transformers model inside a PeftModel, or the model itself where it is none."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def present(model: nn.Module) -> bool:
    """Whether the model carries adapters."""
    return base(model) is not model


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by name in the base model, in its order, each shared one once."""
    return {name: parameter for name, parameter in base(model).named_parameters() if parameter.requires_grad}


def frozen(model: nn.Module, patterns: Sequence[str]) -> None:
    """Take the parameters whose names match a glob (`model.embed_tokens.*`, `*.layers.0.*`) out of the training.

    Tied weights are one tensor: naming one of them freezes it for all. With LoRA, what is left to freeze is adapters:
    `*.layers.0.*` names those of the first layer too.

    Raises:
        ValueError: a pattern matches no name, or nothing would be left to train; nothing has been frozen then.
    """
    named = [
        (name.replace(".base_layer.", "."), parameter)
        for name, parameter in base(model).named_parameters(remove_duplicate=False)
    ]
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name, _ in named):
            raise ValueError(
                f"frozen: patterns must each match a parameter's name; got {pattern!r}. "
                f"{lookup.nearest(pattern, [name for name, _ in named])}"
            )
    still = [parameter for name, parameter in named if any(fnmatch.fnmatchcase(name, each) for each in patterns)]
    if not {id(parameter) for parameter in trained(model).values()} - {id(parameter) for parameter in still}:
        raise ValueError(
            f"frozen: patterns must leave a parameter to train; got {', '.join(patterns) or 'a model without any'}. "
            "Freeze less"
        )
    for parameter in still:
        parameter.requires_grad_(False)


def lora(model: nn.Module, *, rank: int, alpha: float, dropout: float = 0.0, targets: Sequence[str] = (_EVERY_LINEAR,)):
    """Put trainable low-rank adapters beside linear layers and freeze all else: `y = W x + alpha / rank * B A x`.

    The A are drawn from torch's global generator; they and the B are float32 where the model has fewer bits. A tied
    head may carry an adapter: it changes the head alone, and the embedding stays.

    Args:
        model: a transformers model without adapters; its layers are replaced in place.
        rank: rows of A.
        alpha: `rank` times the scale of the product.
        dropout: probability with which an input of A is zeroed in training.
        targets: names of linear layers or their last parts (`q_proj`), globs of them, or "all-linear" for every one but
            the head.

    Returns:
        The PeftModel around `model`.

    Raises:
        ValueError: a target that names no linear layer, a setting out of range, or a model that has adapters already.
        RuntimeError: peft is not installed.
    """
    peft = lookup.package("peft", "peft")
    for name, given, good, contract in (
        ("model", type(model).__name__, not present(model), "have no adapters yet"),
        ("rank", rank, rank >= 1, "be at least 1"),
        ("alpha", alpha, alpha > 0, "be above 0"),
        ("dropout", dropout, 0 <= dropout < 1, "be from 0 to below 1"),
    ):
        if not good:
            raise ValueError(f"lora: {name} must {contract}; got {given!r}. Change the argument")
    names = _linear_layers(model, targets)
    if dropout and any(model.get_submodule(name) is model.get_output_embeddings() for name in names):
        raise _dropout_on_the_head("lora", dropout)
    widest = max(min(model.get_submodule(name).weight.shape) for name in names)
    if rank > widest:
        raise ValueError(
            f"lora: rank must be at most {widest}, the rank of the largest layer that is adapted; got {rank}. Take 8 "
            "to 64, as is usual"
        )
    settings = peft.LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=names, bias="none", task_type="CAUSAL_LM"
    )
    with warnings.catch_warnings():
        # peft warns of a tied head, which `merged` takes care of, and of transposed layers, which it does itself.
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*deprecated")
        return peft.get_peft_model(model, settings)


def head_weight(model: nn.Module) -> Tensor:
    """The head's matrix `W`, (V, D); `head_terms` has the rest, adapters on the head among it.

    Raises:
        ValueError: the model has no such matrix.
    """
    plain = base(model)
    head = plain.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if weight is None or hasattr(head, "original_module"):
        what = "no output embedding" if weight is None else "a copy of its own"
        raise ValueError(
            f"head_weight: the model's head must be one matrix product; {type(plain).__name__} has {what}. "
            "Choose a model without it"
        )
    return weight


def head_terms(model: nn.Module) -> dict[str, Tensor | float | tuple | None]:
    """What the model does to the product with `head_weight`: `bias`, `softcap`, `logit_scale`, `lora` of its ops.

    Several active adapters are one whose rank is the sum of theirs.

    Raises:
        ValueError: a scale that is no positive number, or adapters on the head that are no plain LoRA or drop inputs.
    """
    plain = base(model)
    config, head = plain.config.get_text_config(), plain.get_output_embeddings()
    terms = {"bias": getattr(head, "bias", None), "softcap": getattr(config, "final_logit_softcapping", None) or None}
    terms["lora"] = _lora_terms(head) if hasattr(head, "base_layer") else None
    factors = {name: getattr(config, name, None) or 1.0 for name in (*_MULTIPLIERS, *_DIVISORS)}
    for name, factor in factors.items():
        if not isinstance(factor, int | float) or factor <= 0:
            raise ValueError(
                f"head_terms: {name} must be a positive number; {type(plain).__name__} has {factor!r}. "
                "Choose another model"
            )
    scale = math.prod(factors[name] for name in _MULTIPLIERS) / math.prod(factors[name] for name in _DIVISORS)
    return {**terms, "logit_scale": None if scale == 1.0 else scale}


@contextlib.contextmanager
def without_adapters(model: nn.Module) -> Iterator[nn.Module]:
    """The model as it was before `lora`, for a while: the reference policy of a LoRA run, at no memory.

    Raises:
        ValueError: the model has no adapters.
    """
    if not present(model):
        raise ValueError(
            f"without_adapters: model must have adapters; got a plain {type(model).__name__}. Call lora first, or keep "
            "a copy of the model"
        )
    # peft makes every active adapter trainable as it comes back, frozen ones too.
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            yield model
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@torch.no_grad()
def merged(model: nn.Module) -> nn.Module:
    """A plain transformers model on the host, a copy with the adapters folded in: `W + scale B A`, in float32.

    A head tied to the embedding gets weights of its own, and its config says so, if its adapter changed it.
    Memory: one model on the host; nothing on the device but one layer at a time.

    Raises:
        ValueError: adapters that are no plain LoRA.
    """
    source = base(model)
    # deepcopy takes what it finds here for the copy: the tensors go to the host without a second set on the device.
    host = {id(p): nn.Parameter(p.detach().to("cpu", copy=True), requires_grad=False) for p in source.parameters()}
    host |= {id(buffer): buffer.detach().to("cpu", copy=True) for buffer in source.buffers()}
    plain = copy.deepcopy(source, host)
    for name, layer in list(plain.named_modules()):
        if hasattr(layer, "original_module"):
            raise ValueError(f"merged: adapters must be LoRA; {name} is {type(layer).__name__}. Fold it in with peft")
        if hasattr(layer, "base_layer"):
            delta, inner = _delta("merged", layer), layer.get_base_layer()
            if delta is not None and delta.any():
                folded = inner.weight.float() + delta.float()
                inner.weight = nn.Parameter(folded.to(inner.weight.dtype), requires_grad=False)
            plain.set_submodule(name, inner)
    head, embedding = plain.get_output_embeddings(), plain.get_input_embeddings()
    if head is not None and head.weight is not embedding.weight:
        plain.config.tie_word_embeddings = plain.config.get_text_config().tie_word_embeddings = False
    if hasattr(plain, "peft_config"):
        del plain.peft_config
    return plain


def folded(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weights of the model without adapters that does the same, by name, each shared one once: `W + scale B A`.

    Memory: one layer's weight at a time, made as it is asked for; sums are float32.

    Raises:
        ValueError: adapters that are no plain LoRA.
    """
    plain = base(model)
    for name, parameter in plain.named_parameters():
        owner, _, kind = name.rpartition(".")
        if ".lora_" in f".{name}":
            continue
        if not owner.endswith(".base_layer"):
            yield name, parameter.detach()
            continue
        owner = owner.removesuffix(".base_layer")
        delta = _delta("folded", plain.get_submodule(owner)) if kind == "weight" else None
        yield f"{owner}.{kind}", parameter.detach() if delta is None else (parameter.float() + delta.float()).detach()


def checkpoint_activations(model: nn.Module) -> None:
    """Keep each layer's input only and compute the rest anew in backward: less memory, one more forward in training.

    Raises:
        ValueError: the model has no layers that can.
    """
    plain = base(model)
    # The older name of the two warns in newer transformers.
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    enable = next(getattr(plain, name) for name in names if hasattr(plain, name))
    if not plain.supports_gradient_checkpointing:
        raise ValueError(
            f"checkpoint_activations: model must be able to recompute its layers; {type(plain).__name__} is not. "
            "Train without, with fewer tokens at once"
        )
    enable({"use_reentrant": False})


def _linear_layers(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """Full names of the linear layers that `targets` mean."""
    head = model.get_output_embeddings()
    linear = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    }
    chosen = set()
    for target in targets:
        meant = [
            name
            for name, module in linear.items()
            if (module is not head if target == _EVERY_LINEAR else f".{name}".endswith(f".{target}"))
            or fnmatch.fnmatchcase(name, target)
        ]
        if not meant:
            known = [_EVERY_LINEAR, *dict.fromkeys(name.rpartition(".")[2] for name in linear)]
            raise ValueError(
                f"lora: targets must each name a linear layer; got {target!r}. {lookup.nearest(target, known)}"
            )
        chosen.update(meant)
    if not chosen:
        raise ValueError("lora: targets must name a linear layer; got none. Leave it out for every one but the head")
    return sorted(chosen)


def _lora_terms(head: nn.Module) -> tuple[Tensor, Tensor, float] | None:
    """(A, B, scale) of the active adapters of a peft layer, W + scale B A in effect; None where none is active."""
    names = _active("head_terms", head)
    for name in names:
        if getattr(head.lora_dropout[name], "p", 0.0):
            raise _dropout_on_the_head("head_terms", head.lora_dropout[name].p)
    if len(names) < 2:
        return (head.lora_A[names[0]].weight, head.lora_B[names[0]].weight, head.scaling[names[0]]) if names else None
    scaled = [head.scaling[name] * head.lora_B[name].weight for name in names]
    return torch.cat([head.lora_A[name].weight for name in names]), torch.cat(scaled, dim=1), 1.0


def _delta(function: str, layer: nn.Module) -> Tensor | None:
    """What the active adapters of a peft layer add to its weight, in the weight's shape; None where none is active."""
    deltas = [layer.get_delta_weight(name) for name in _active(function, layer)]
    return sum(deltas[1:], deltas[0]) if deltas else None


def _active(function: str, layer: nn.Module) -> list[str]:
    """The adapters of a peft layer that take part in its forward; none where they are off, or folded in already."""
    kinds = lookup.package("peft", "peft").tuners.lora
    if (
        not isinstance(layer, kinds.Linear | kinds.Embedding)
        or any(layer.lora_bias.values())
        or getattr(layer, "lora_variant", None)
    ):
        raise ValueError(
            f"{function}: adapters must be LoRA without a bias or another addition; got {type(layer).__name__}. "
            "Fold it in with peft first"
        )
    if layer.disable_adapters or layer.merged:
        return []
    return [name for name in layer.active_adapters if name in layer.scaling]


def _dropout_on_the_head(function: str, dropout: float) -> ValueError:
    return ValueError(
        f"{function}: dropout must be 0 on the head, whose product is taken in one piece with the loss; got {dropout}. "
        "Set it to 0 or leave the head out of the targets"
    )
