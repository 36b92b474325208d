"""verl's workers on our ops: one line of its configuration, the same numbers, no logits and no loops in Python.

    actor_rollout_ref.model.external_lib=fuserl.trainers.verl

verl imports that module wherever it makes the model's configuration, on its driver too, and importing this one patches:
`unpatch` takes it out, `patch` puts it in again. From a program: `import fuserl.trainers.verl`.

With it verl's fused heads (use_fused_kernels, any backend), the log-probs and entropies it takes from logits, its GAE
and its GRPO advantages are ours, and `actor.policy_loss.loss_mode` and `algorithm.adv_estimator` know the names of
`verl_losses.LOSSES` and `verl_advantages.ESTIMATORS`. What differs: log-probs and entropies are float32 whatever the
logits are; equal rewards in a group give advantages of exactly 0; and advantages and returns are 0 where the mask is.
"""

from __future__ import annotations

import importlib
from contextlib import ExitStack

import torch
from torch import Tensor

from fuserl.kernels.linear_logprob import linear_logprob
from fuserl.kernels.token_logprob import token_logprob
from fuserl.trainers.heads import weight_like, whole
from fuserl.trainers.logits import entropy_from_logits
from fuserl.trainers.patching import Host, Report
from fuserl.trainers.verl_advantages import ESTIMATORS, gae_advantage, grpo
from fuserl.trainers.verl_losses import LOSSES

__all__ = ["patch", "report", "unpatch"]

_CORE = "verl.trainer.ppo.core_algos"
_REGISTRIES = {"POLICY_LOSS_REGISTRY": LOSSES, "ADV_ESTIMATOR_REGISTRY": ESTIMATORS}
_IGNORED = -100  # the label that flash-attn's and Liger's cross entropies pass over


class FusedLinearForPPO(torch.nn.Module):
    """verl's head by linear_logprob: log-probs and entropies from hidden states.

    Args:
        chunk_size: verl's rows at a time. Rows stream here; the backward finds again the logits of five times as many,
            which is the memory that verl takes for these, and computes those of the others again.
        impl_backend: "torch" or "liger", as verl's configuration has it; both run our op.

    Raises:
        ValueError: another backend.
    """

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch"):
        super().__init__()
        if impl_backend not in ("torch", "liger"):
            raise ValueError(
                f"FusedLinearForPPO: impl_backend must be 'torch' or 'liger'; got {impl_backend!r}. Either runs "
                "linear_logprob."
            )
        self.chunk_size, self.impl_backend = chunk_size, impl_backend

    def forward(
        self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float | Tensor = 1.0
    ) -> tuple[Tensor, Tensor]:
        """(log-probs, entropies) of input_ids, float32 (float64 from float64), differentiable in states and weights.

        Args:
            hidden_states: (B, T, D) or (N, D), of a floating dtype.
            vocab_weights: (V, D); a DTensor, as FSDP2 leaves a head of its own, is gathered, and its gradient averaged
                over the mesh. Its gradient is skipped where it requires none.
            input_ids: (B, T) or (N,), of an integer dtype: the tokens that the states predict. -100 has log-prob 0 and
                entropy 0.
            temperature: positive: a number, one per sample, (B,) or (B, 1), or one per token.

        Returns:
            Of input_ids' shape, both.

        Raises:
            ValueError: on a wrong shape, dtype, device, temperature or id, and for a head that is in parts.
        """
        vocab_weights = whole(vocab_weights)[0]
        return _scored(
            hidden_states, weight_like(vocab_weights, hidden_states), input_ids, _of_samples(temperature, input_ids),
            memory=5 * self.chunk_size * len(vocab_weights) * 4,
        )  # fmt: skip


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float | Tensor | None = 1.0,
    reduction: str | None = "none", dist_process_group: torch.distributed.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(log-probs, entropies) of the labels from hidden states by linear_logprob, also where Megatron cuts the head.

    Args:
        hidden: (..., D); every rank of the group has the same.
        weight: (V, D), or under a group this rank's rows of it, in rank order.
        labels: as many tokens as hidden has, in its order, of the whole vocabulary.
        temperature: positive: a number, or one per token.
        reduction: "none".
        dist_process_group: the tensor parallel group. hidden's gradient is then one addend per rank, which Megatron's
            sequence parallelism sums, as verl's function leaves it.

    Returns:
        (N,) each, float32 (float64 from float64), differentiable in hidden and weight.

    Raises:
        ValueError: another reduction, or as FusedLinearForPPO.
    """
    if reduction not in (None, "none"):
        raise ValueError(
            f"linear_cross_entropy: reduction must be 'none', as verl asks; got {reduction!r}. Reduce what it returns."
        )
    weight = whole(weight)[0]
    hidden, labels = hidden.flatten(0, -2), labels.flatten()
    ranks = 1 if dist_process_group is None else dist_process_group.size()
    if ranks > 1 and hidden.requires_grad:
        hidden = hidden.view_as(hidden)
        hidden.register_hook(lambda g: g / ranks)
    temperature = temperature.flatten() if isinstance(temperature, Tensor) else temperature
    return _scored(
        hidden, weight_like(weight, hidden), labels, 1.0 if temperature is None else temperature,
        group=dist_process_group if ranks > 1 else None,
    )  # fmt: skip


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """Log-probability of each label by token_logprob.

    Args:
        logits: (..., V) of a floating dtype.
        labels: (...), or as many tokens in another shape, of an integer dtype; -100 has log-prob 0.
        inplace_backward: write the gradient over the logits, on any device.

    Returns:
        (...), float32 (float64 from float64).

    Raises:
        ValueError: as `token_logprob`.
    """
    labels = labels.reshape(logits.shape[:-1]).long()
    ignored = labels == _IGNORED
    inplace = inplace_backward and logits.requires_grad
    return token_logprob(logits, labels.masked_fill(ignored, 0), inplace_backward=inplace)[0].masked_fill(ignored, 0.0)


def entropy_from_logits_with_chunking(logits: Tensor, chunk_size: int = 2048) -> Tensor:
    """entropy_from_logits.

    Args:
        logits: (..., V) of a floating dtype.
        chunk_size: verl's rows at a time; nothing is copied here, and no result depends on it.

    Returns:
        (...), float32 (float64 from float64).

    Raises:
        ValueError: as `token_logprob`.
    """
    return entropy_from_logits(logits)


_HOST = Host(
    "verl",
    since="0.9.1",
    below="0.10",
    replacements={
        "verl.utils.experimental.torch_functional:FusedLinearForPPO": FusedLinearForPPO,
        "verl.utils.kernel.linear_cross_entropy:linear_cross_entropy": linear_cross_entropy,
        "verl.utils.torch_functional:logprobs_from_logits": logprobs_from_logits,
        "verl.utils.torch_functional:entropy_from_logits": entropy_from_logits,
        "verl.utils.torch_functional:entropy_from_logits_with_chunking": entropy_from_logits_with_chunking,
        f"{_CORE}:compute_gae_advantage_return": gae_advantage,
        f"{_CORE}:compute_grpo_outcome_advantage": grpo,
    },
    left={
        "its policy losses, and its estimators but gae and grpo": "under verl's names; ours begin with fuserl_",
        "clip_cov, kl_cov, dppo_tv, dppo_kl, bypass_mode; remax, otb, tir_otb": "no op of ours is what they compute",
        "agg_loss, kl_penalty, value loss": "(batch, length) numbers beside (batch, length, vocabulary) logits",
        "log-probs of Megatron's logits, top-k distillation, sum_pi_squared": "not in verl.utils.torch_functional",
        "the refusal of a temperature per sample by fused heads": "verl's engine asserts it before the head is called",
        "engines made before the patch": "they keep the entropy function that they found",
    },
)


def patch() -> ExitStack:
    """Replace verl's heads, log-probs, entropies, GAE and GRPO advantages by ours, and register what is fuserl_*.

    Returns:
        A context; where it is entered, its end takes them out. Else they stay until `unpatch`.

    Raises:
        RuntimeError: verl has another version than 0.9, or a name that begins with fuserl_ is taken.
    """
    if _HOST.report().replaced:
        return ExitStack()
    core = importlib.import_module(_CORE)
    taken = [name for registry, ours in _REGISTRIES.items() for name in ours if name in getattr(core, registry)]
    if taken:
        raise RuntimeError(f"patch: verl must not have {', '.join(taken)} yet; got another's. Give yours other names.")
    context = _HOST.patch()
    for registry, ours in _REGISTRIES.items():
        getattr(core, registry).update(ours)
    context.callback(_unregister)
    return context


def unpatch() -> None:
    """Restore verl's own functions, and take the names that begin with fuserl_ out of its registries."""
    if _HOST.report().replaced:
        _unregister()
    _HOST.unpatch()


def report() -> Report:
    """What is replaced and registered now, at which places, and what is left and why."""
    found = _HOST.report()
    if found.replaced:
        found.replaced.update({f"{_CORE}:{registry}": sorted(ours) for registry, ours in _REGISTRIES.items()})
    return found


def _unregister() -> None:
    core = importlib.import_module(_CORE)
    for registry, ours in _REGISTRIES.items():
        for name in ours:
            getattr(core, registry).pop(name, None)


def _scored(hidden, weight, labels, temperature, **options) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies, 0 where a label is ignored."""
    ids = labels.long()
    ignored = ids == _IGNORED
    given = {"temperature": temperature, "outputs": ("logprob", "entropy"), **options}
    found = linear_logprob(hidden, weight, ids.masked_fill(ignored, 0), **given)
    return found.logprob.masked_fill(ignored, 0.0), found.entropy.masked_fill(ignored, 0.0)


def _of_samples(temperature: float | Tensor, ids: Tensor) -> float | Tensor:
    """A temperature per sample, (B,), as it broadcasts to ids (B, T)."""
    if not isinstance(temperature, Tensor) or temperature.dim() != 1 or ids.dim() != 2:
        return temperature
    if len(ids) == 1:
        return temperature[None]
    if len(temperature) != len(ids):
        raise ValueError(
            f"FusedLinearForPPO: temperature must have one number per sample, ({len(ids)},); got "
            f"{tuple(temperature.shape)}. Expand it to {tuple(ids.shape)} for one per token."
        )
    return temperature[:, None]


patch()
