"""transformers' causal language models on our ops: their loss and log-probs from hidden states, without logits.

    from fuserl.trainers.transformers import AutoFuserlModelForCausalLM, patch
    model = AutoFuserlModelForCausalLM.from_pretrained(...)      # or patch(model); unpatch(model) takes it out
    model.train()
    model(input_ids=ids, labels=labels).loss                     # no logits are made; .logits is None
    model(input_ids=ids, labels=labels, outputs=("logprob", "entropy"), temperature=0.7).logprob      # in eval mode too

In eval mode, in generate, and where no labels are given, a patched model is what it was. The model's own forward runs:
its auxiliary losses, its output and its keywords are kept, num_items_in_batch, shift_labels and ignore_index too.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fuserl.kernels.linear_logprob import linear_logprob
from fuserl.kernels.linear_policy_loss import linear_policy_loss
from fuserl.trainers import heads
from fuserl.trainers.patching import Host, Report

__all__ = ["AutoFuserlModelForCausalLM", "patch", "report", "unpatch"]

_HOST = Host("transformers", since="5.5", below="6", replacements={})
_LEFT = {
    "the forward in eval mode, in generate, and without labels": "their logits are wanted",
    "label smoothing, compute_loss_func": "the trainer takes them of logits: it gives no labels to the model then",
    "attention, norms, MLPs": "not of the loss; attn_implementation='fuserl' and Liger's layers go with it",
}


class AutoFuserlModelForCausalLM:
    """AutoModelForCausalLM whose models are patched, and may have attn_implementation="fuserl"."""

    @staticmethod
    def from_pretrained(*arguments, **keywords) -> nn.Module:
        """AutoModelForCausalLM.from_pretrained(...), patched.

        Raises:
            ValueError, RuntimeError: as `patch`, and as `fuserl.attention.attach` where that attention is asked for.
        """
        return _patched("from_pretrained", arguments, keywords)

    @staticmethod
    def from_config(*arguments, **keywords) -> nn.Module:
        """AutoModelForCausalLM.from_config(...), patched.

        Raises:
            ValueError, RuntimeError: as `patch`, and as `fuserl.attention.attach` where that attention is asked for.
        """
        return _patched("from_config", arguments, keywords)


def patch(model: nn.Module) -> ExitStack:
    """Give a model the loss and log-probs of our ops, in training, and wherever outputs are asked for.

        loss = sum over labels of -logprob / num_items_in_batch, or their mean
        model(..., labels=labels, outputs=("logprob",))      position t: of the token after it, 0 where it has no label

    Args:
        model: a transformers causal language model, or a PeftModel around one; before it is compiled or prepared by
            accelerate, before or after peft. `outputs` and `temperature` are those of `linear_logprob`.

    Returns:
        A context; where it is entered, its end takes the patch out. Else it stays until `unpatch`.

    Raises:
        ValueError: a model without a head, with a forward that is no method, or with Liger's fused loss.
        RuntimeError: transformers has another version than 5.
    """
    _HOST.patch()
    inner, context = heads.causal_lm(model), ExitStack()
    if "_fuserl" in vars(inner):
        if not inner._fuserl.on:
            inner._fuserl.on, inner._fuserl.hook = True, inner.register_forward_pre_hook(_refuse_fused_liger)
            context.callback(unpatch, model)
        return context
    original = inner.forward
    if not isinstance(original, types.MethodType):
        raise ValueError(
            f"patch: the model's forward must be a method; got {type(original).__name__}. Patch before the model is "
            "prepared by accelerate or compiled."
        )
    _refuse_fused_liger(inner)

    @functools.wraps(original.__func__)
    def forward(self, *arguments, **keywords):
        return _forward(self, *arguments, **keywords)

    names, hook = tuple(inspect.signature(original).parameters), inner.register_forward_pre_hook(_refuse_fused_liger)
    inner._fuserl = _Patch(original, names, vars(inner).get("forward"), hook)
    inner.forward = inner._fuserl.ours = types.MethodType(forward, inner)
    context.callback(unpatch, model)
    return context


def unpatch(model: nn.Module) -> None:
    """Restore the model's own forward; no error where it is not patched."""
    inner = heads.causal_lm(model)
    found = vars(inner).get("_fuserl")
    if found is None:
        return
    found.on = False
    found.hook.remove()
    if inner.forward != found.ours:
        return  # another stands over ours, which now only calls the model's own
    if found.before is None:
        del inner.forward
    else:
        inner.forward = found.before
    del inner._fuserl


def report(model: nn.Module) -> Report:
    """What of the model is replaced now, and what is left and why."""
    inner = heads.causal_lm(model)
    name, found = type(inner).__name__, vars(inner).get("_fuserl")
    on = found is not None and found.on
    replaced = {f"{name}.forward": ["with labels in training", "with outputs"]} if on else {}
    return Report(f"transformers {_HOST.version}", replaced, dict(_LEFT))


@dataclasses.dataclass
class _Patch:
    """What a patched model keeps of itself."""

    original: types.MethodType
    names: tuple[str, ...]  # of its arguments
    before: object  # the instance's own forward, if it had one
    hook: RemovableHandle
    ours: object = None
    on: bool = True


def _forward(self, *arguments, outputs: tuple[str, ...] = (), temperature: float = 1.0, **keywords):
    """The forward of a patched model."""
    patched = self._fuserl
    given = dict(zip(patched.names, arguments, strict=False)) | keywords
    labels, shifted = given.get("labels"), given.get("shift_labels")
    if not outputs and (labels is None or not self.training or not patched.on):
        _require(temperature == 1.0, "temperature must be 1 without outputs and labels", temperature, "Give outputs=")
        return patched.original(**given)
    _require(patched.on, "outputs must be empty, as the model is not patched any more", outputs, "Patch it again")
    _require(labels is not None or shifted is not None, "labels must be given with outputs", None, "Pass labels=")
    asked = _Asked(tuple(outputs), temperature, *_targets(labels, shifted, given.get("ignore_index", -100)))
    with _loss_function(self, asked), heads.instead_of_logits(self, asked.read) as reading:
        asked.reading = reading
        try:
            found = patched.original(**given)
        except (IndexError, RuntimeError, ValueError) as error:
            if reading.used and not asked.summed and labels is not None:
                raise _own_loss(self) from error
            raise
    _require(hasattr(found, "logits"), "return_dict must be True where no logits are made", "a tuple", "Leave it out")
    reading.check(found.logits)
    if labels is not None and not asked.summed:
        raise _own_loss(self)
    kept = {name: value for name, value in found.items() if name != "logits"}
    if not outputs:
        return type(found)(**kept)
    return _extended(type(found), asked.outputs)(**kept, **asked.found())


class _Asked:
    """What one forward is asked for, and what was found."""

    def __init__(self, outputs, temperature, targets: Tensor, counted: Tensor):
        self.outputs, self.temperature, self.targets, self.counted = outputs, temperature, targets, counted
        self.wanted = tuple(dict.fromkeys(("logprob", *outputs)))
        self.reading, self.vocabulary, self.summed = None, 0, False

    def read(self, terms: heads.Terms, hidden: Tensor) -> Tensor:
        """The outputs of each position, or, where none are asked for, the sum of the losses at each."""
        _require(
            hidden.shape[:-1] == self.targets.shape, f"labels must be {tuple(hidden.shape[:-1])}, one per position",
            tuple(self.targets.shape), "Leave logits_to_keep out",
        )  # fmt: skip
        self.targets, self.counted = self.targets.to(hidden.device), self.counted.to(hidden.device)
        self.vocabulary = terms.weight.shape[0]
        given = {"temperature": self.temperature, **terms.options()}
        if self.outputs:
            found = linear_logprob(hidden, terms.weight, self.targets, outputs=self.wanted, mask=self.counted, **given)
            return torch.stack([vars(found)[name] for name in self.wanted], -1)
        loss, _, _ = linear_policy_loss(
            hidden.reshape(-1, hidden.shape[-1]), terms.weight, self.targets.reshape(-1),
            lambda out, rows: -out.logprob, live=self.counted.reshape(-1).cpu(), **given,
        )  # fmt: skip
        return loss.expand(*self.targets.shape, 1)

    def loss(self, vocab_size: int, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The loss, where the model would have it from its logits."""
        _require(
            vocab_size == self.vocabulary, f"the head must have vocab_size {vocab_size} rows", self.vocabulary,
            "Leave this model unpatched",
        )  # fmt: skip
        self.summed = True
        values = self.reading.values
        total = -values[..., 0].sum() if self.outputs else values.flatten()[0]
        # One at least: a batch without a label, as a slice of a sequence may be, has no gradient, where 0 / 0 has NaN.
        items = self.counted.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return total / (items.to(total.device) if isinstance(items, Tensor) else items)

    def found(self) -> dict[str, Tensor]:
        """The outputs that were asked for, (B, T) each."""
        every = dict(zip(self.wanted, self.reading.values.unbind(-1), strict=True))
        return {name: every[name] for name in self.outputs}


def _targets(labels: Tensor | None, shifted: Tensor | None, ignored: int) -> tuple[Tensor, Tensor]:
    """(the token after each position, 0 where it has no label; whether it has one)."""
    if shifted is None:
        shifted = F.pad(labels, (0, 1), value=ignored)[..., 1:]
    counted = shifted != ignored
    return shifted.masked_fill(~counted, 0), counted


@contextmanager
def _loss_function(model: nn.Module, asked: _Asked):
    """A context in which the model's loss is the one asked for."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    _require(
        model.loss_function is ForCausalLMLoss, "the model's loss must be transformers' causal one",
        getattr(model.loss_function, "__name__", model.loss_function), "Leave this model unpatched",
    )  # fmt: skip
    own = vars(model).get("_loss_function")
    model._loss_function = lambda logits, labels, vocab_size, num_items_in_batch=None, **_: asked.loss(
        vocab_size, num_items_in_batch
    )
    try:
        yield
    finally:
        if own is None:
            del model._loss_function
        else:
            model._loss_function = own


@functools.cache
def _extended(kind: type, names: tuple[str, ...]) -> type:
    """A model's output with fields of those names after its own."""
    return dataclasses.make_dataclass(kind.__name__, [(name, Tensor | None, None) for name in names], bases=(kind,))


def _refuse_fused_liger(model: nn.Module, _given: tuple = ()) -> None:
    """Before each call of a patched model too: Liger may put its forward over ours, as Trainer does in train()."""
    if (getattr(model.forward, "__module__", None) or "").startswith("liger_kernel"):
        raise ValueError(
            f"fuserl.trainers.transformers: the head must be the model's to call; got {type(model).__name__} with "
            "Liger's fused loss. Apply Liger with fused_linear_cross_entropy=False."
        )


def _own_loss(model: nn.Module) -> ValueError:
    return ValueError(
        f"fuserl.trainers.transformers: the model must take its loss from loss_function; {type(model).__name__} does "
        "not. Leave this model unpatched."
    )


def _patched(maker: str, arguments, keywords) -> nn.Module:
    from transformers import AutoModelForCausalLM

    from fuserl import attention, layers  # attention registers attn_implementation="fuserl"

    model = getattr(AutoModelForCausalLM, maker)(*arguments, **keywords)
    if keywords.get("attn_implementation") == attention.NAME:
        attention.attach(model)
    patch(layers.attach(model))
    return model


def _require(good: bool, contract: str, got: object, advice: str) -> None:
    if not good:
        raise ValueError(f"fuserl.trainers.transformers: {contract}; got {got!r}. {advice}.")
