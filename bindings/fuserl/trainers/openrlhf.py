"""OpenRLHF's PPO on our ops: one call in every process that trains, the same numbers, and no logits in memory.

    import fuserl.trainers.openrlhf
    fuserl.trainers.openrlhf.patch()         # until unpatch(); or: with fuserl.trainers.openrlhf.patch(): ...
    print(fuserl.trainers.openrlhf.report())

OpenRLHF trains in Ray's workers, which ray.init(runtime_env={"worker_process_setup_hook": patch_worker}) patches as
they load its modules. Actors, losses and experience makers that exist already take part.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import math
import sys
from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor

from fuserl.kernels.gae import gae
from fuserl.kernels.linear_logprob import linear_logprob
from fuserl.kernels.policy_loss import policy_loss
from fuserl.kernels.returns import returns
from fuserl.kernels.surrogates import Clip, Truncate, Within
from fuserl.kernels.token_logprob import token_logprob
from fuserl.trainers import heads
from fuserl.trainers.logits import entropy_from_logits
from fuserl.trainers.patching import Host, Report

__all__ = ["patch", "patch_worker", "report", "unpatch"]

_ACTOR = "openrlhf.models.actor:Actor.forward"
_WIDEST = 20.0  # OpenRLHF holds the log-ratio of PPO to [-20, 20]


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of each label by token_logprob; the logits stay as they are, which OpenRLHF divides in place.

    Args:
        logits: (..., V) of a floating dtype.
        labels: (...) int64.
        temperature: positive.

    Returns:
        (...), float32 (float64 from float64).

    Raises:
        ValueError: as `token_logprob`.
    """
    return token_logprob(logits, labels, temperature=temperature)[0]


def actor_forward(
    self, sequences: Tensor, action_mask: Tensor | None = None, attention_mask: Tensor | None = None,
    return_output: bool = False, allgather_logits: bool = False, return_logprobs: bool = False, ring_attn_group=None,
    packed_seq_lens: list[int] | None = None, return_entropy: bool = False, **mm_inputs,
):  # fmt: skip
    """Actor.forward by linear_logprob: log-probs, and entropies, from hidden states.

    Arguments and results are OpenRLHF's, but that the output has no logits, and that log-probs and entropies are 0, and
    cost nothing, where no caller reads them: outside of the action mask, and of the attention mask where there is none.
    Calls that ask for logits, and vision-language models, are OpenRLHF's own.

    Raises:
        ValueError: a head that is no linear layer, or a model that changes its logits in a way of its own.
    """
    if getattr(self, "is_vlm", False) or (action_mask is None and not return_logprobs):
        return _MODELS.original(_ACTOR)(
            self, sequences, action_mask, attention_mask, return_output, allgather_logits, return_logprobs,
            ring_attn_group, packed_seq_lens, return_entropy, **mm_inputs,
        )  # fmt: skip
    if return_entropy and not return_output:
        raise ValueError("Actor.forward: return_output must be True with return_entropy; got False. Pass it.")
    (ids, positions, targets, mask, counted), spread = _laid_out(
        self, sequences, action_mask, attention_mask, ring_attn_group
    )
    wanted = ("logprob", "entropy") if return_entropy else ("logprob",)

    def read(terms: heads.Terms, hidden: Tensor) -> Tensor:
        found = linear_logprob(
            hidden, terms.weight, targets, outputs=wanted, temperature=self.temperature, mask=counted, **terms.options()
        )
        return torch.stack([vars(found)[name] for name in wanted], -1)

    with heads.instead_of_logits(heads.causal_lm(self.model), read) as reading:
        output = self.model(ids, attention_mask=mask, position_ids=positions, **mm_inputs)
    reading.check(output["logits"])
    output = type(output)(**{name: value for name, value in output.items() if name != "logits"})
    log_probs, *entropies = (spread(x)[:, :-1] for x in reading.values.float().unbind(-1))
    if return_entropy:
        output.entropy = entropies[0]
    if action_mask is not None:
        log_probs = log_probs[:, -action_mask.shape[1] :] * action_mask.float()
    return (log_probs, output) if return_output else log_probs


def _laid_out(self, sequences, action_mask, attention_mask, group):
    """(ids, positions, targets, attention mask, which targets count) of a forward, and the way back to (B, L)."""
    from openrlhf.models import actor

    batch, length = sequences.shape
    counted = torch.zeros_like(sequences)
    if action_mask is None:
        counted[:, :-1] = attention_mask[:, 1:]
    else:
        counted[:, -1 - action_mask.shape[1] : -1] = action_mask
    if self.packing_samples:
        ids, positions, targets, padding, indices = actor.unpad_and_slice_tensor(sequences, attention_mask, group)
        counted = actor.unpad_and_slice_tensor(counted, attention_mask, group)[0] != 0

        def spread(x):
            return actor.gather_and_pad_tensor(x, group, padding, indices, batch, length)

        return (ids, positions, targets, None, counted), spread
    positions = (attention_mask.long().cumsum(-1) - 1).masked_fill(attention_mask == 0, 1)
    targets = torch.roll(sequences, shifts=-1, dims=1)
    return (sequences, positions, targets, attention_mask, counted != 0), lambda x: x


def policy_loss_forward(
    self, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, action_mask: Tensor | None = None,
    rollout_log_probs: Tensor | None = None, dp_size: int = 1, batch_num_tokens: float | None = None,
    global_batch_size: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """PolicyLoss.forward by policy_loss, with every option of OpenRLHF.

        log_ratio = clip(log_probs - old_log_probs, -20, 20); for gspo the mean over a sequence, unclipped
        loss      = aggregate_loss(w * -min(ratio A, clip(ratio) A)), at most dual_clip |A| where A < 0

    Args:
        log_probs, old_log_probs, rollout_log_probs: (B, T); the latter for importance corrections, else it may be None.
        advantages: (B, T), or (B, 1).
        action_mask: (B, T), or None for all; masked tokens may hold anything.
        dp_size, batch_num_tokens, global_batch_size: as aggregate_loss has them.

    Returns:
        (loss, share of ratios that were clipped, mean of old_log_probs - log_probs, the same of rollout_log_probs -
        old_log_probs, share of tokens or sequences that the correction met); the last two None without a correction.

    Raises:
        ValueError: an unknown kind of loss, or a correction without rollout_log_probs.
    """
    from openrlhf.models.loss import aggregate_loss
    from openrlhf.models.utils import masked_mean

    corrected = _checked_correction(self, rollout_log_probs)
    mask = torch.ones_like(log_probs, dtype=torch.bool) if action_mask is None else action_mask != 0
    dtype = torch.promote_types(log_probs.dtype, torch.float32)
    tensors = log_probs, old_log_probs, advantages, rollout_log_probs
    kept = (None if x is None else torch.where(mask, x.to(dtype), 0.0) for x in tensors)
    log_probs, old, advantages, rollout = kept
    options, log_weights, met = {}, None, None
    if self.policy_loss_type == "gspo":
        sums = (log_probs - (rollout if corrected else old)).sum(-1, keepdim=True)
        log_ratio = (sums / mask.sum(-1, keepdim=True).clamp(min=1)).expand_as(log_probs)
    else:
        log_ratio = (log_probs - old).clamp(-_WIDEST, _WIDEST)
        if corrected:
            log_weights, options, met = _correction(self, old, rollout, mask)
    losses, seen = policy_loss(
        log_ratio, advantages, old_logprobs=torch.zeros_like(log_ratio), mask=mask, log_weights=log_weights,
        surrogate=Clip(self.clip_eps_low, self.clip_eps_high, self.dual_clip), **options,
    )  # fmt: skip
    loss = aggregate_loss(
        losses, mask, token_level_loss=self.token_level_loss, dp_size=dp_size, batch_num_tokens=batch_num_tokens,
        global_batch_size=global_batch_size,
    )  # fmt: skip
    if log_weights is None:
        tokens, low, high = seen[:3].unbind()
        clip_ratio = (low + high) / tokens
    else:  # policy_loss counts what is clipped of what the correction leaves, OpenRLHF of all
        ratio = log_ratio.detach().exp()
        clipped = ratio.clamp(1 - self.clip_eps_low, 1 + self.clip_eps_high) * advantages < ratio * advantages
        clip_ratio = masked_mean(clipped.to(ratio.dtype), mask)
    vllm_kl = None if met is None else masked_mean(rollout - old, mask)
    return loss, clip_ratio, masked_mean((old - log_probs).detach(), mask), vllm_kl, met


def _checked_correction(self, rollout: Tensor | None) -> bool:
    """Whether a PolicyLoss corrects for the rollout's log-probs."""
    if self.policy_loss_type not in ("ppo", "gspo"):
        raise ValueError(
            f"PolicyLoss: policy_loss_type must be ppo or gspo; got {self.policy_loss_type!r}. Correct the name."
        )
    if self.is_correction_level != "off" and rollout is None:
        raise ValueError(
            f"PolicyLoss: rollout_log_probs must be given with is_correction_level {self.is_correction_level}; got "
            "None. Pass them, or set it to off."
        )
    return self.is_correction_level != "off"


def _correction(self, old: Tensor, rollout: Tensor, mask: Tensor) -> tuple[Tensor, dict, Tensor]:
    """(log weights, options of policy_loss, share of units outside the threshold) of OpenRLHF's rollout correction."""
    from openrlhf.models.utils import masked_mean

    log_weights, (low, high) = (old - rollout).detach(), self.is_correction_threshold
    by_token = self.is_correction_level == "token"

    def unit(x: Tensor) -> Tensor:
        return x if by_token else masked_mean(x, mask, dim=-1).unsqueeze(-1)  # NaN, so outside, without a token

    if self.is_correction_gating == "ratio":
        gate = unit(log_weights).exp()
    else:
        p, q = (x.exp().clamp(1e-6, 1 - 1e-6) for x in (rollout, old))
        kl = self.is_correction_gating == "binary_kl"
        gate = unit(p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log() if kl else (p - q).abs())
    outside = ~((gate >= low) & (gate <= high))
    met = masked_mean(outside.to(gate.dtype), mask) if by_token else outside.to(gate.dtype).mean()
    if self.is_correction_gating == "ratio" and by_token:
        kind = Truncate(most=high, least=low) if self.is_correction_mode == "clip" else Within(low, high)
        return log_weights, {"importance": kind}, met
    return log_weights.masked_fill(outside, -math.inf), {}, met


@torch.no_grad()
def get_advantages_and_returns(
    self, values: Tensor, rewards: Tensor, action_mask: Tensor | None, gamma: float, lambd: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantages and returns by gae, in the place of a loop over tokens.

    Args:
        values, rewards: (B, T).
        action_mask: (B, T) or None; what it masks counts as 0, and time goes on there, as OpenRLHF has it.
        gamma, lambd: the discount, and its lambda.

    Returns:
        (advantages, returns), (B, T), in the dtype that values and rewards promote to.

    Raises:
        ValueError: as `gae`.
    """
    dtype = torch.promote_types(values.dtype, rewards.dtype)
    if action_mask is not None:
        values, rewards = action_mask * values, action_mask * rewards
    exact = torch.promote_types(dtype, torch.float32)
    advantages, targets = gae(rewards.to(exact), values.to(exact), gamma=gamma, lam=lambd)
    return advantages.to(dtype), targets.to(dtype)


@torch.no_grad()
def get_cumulative_returns(self, rewards: Tensor, action_mask: Tensor | None, gamma: float) -> Tensor:
    """Discounted returns by returns, in the place of a loop over tokens.

    Args:
        rewards: (B, T).
        action_mask: (B, T) or None; what it masks counts as 0, and time goes on there, as OpenRLHF has it.
        gamma: the discount.

    Returns:
        (B, T) of rewards' dtype.

    Raises:
        ValueError: as `returns`.
    """
    counted = rewards if action_mask is None else action_mask * rewards
    return returns(counted.to(torch.promote_types(rewards.dtype, torch.float32)), gamma=gamma).to(rewards.dtype)


_MAKER = "openrlhf.trainer.ppo_utils.experience_maker"
_VERSIONS = {"since": "0.11.2", "below": "0.12"}
_MODELS = Host(
    "openrlhf",
    **_VERSIONS,
    replacements={
        "openrlhf.models.utils:log_probs_from_logits": log_probs_from_logits,
        "openrlhf.models.utils:compute_entropy": entropy_from_logits,
        _ACTOR: actor_forward,
        "openrlhf.models.loss:PolicyLoss.forward": policy_loss_forward,
    },
    left={
        "Actor.forward of vision-language models, and where logits are asked for": "OpenRLHF's own; the logits exist",
        "compute_approx_kl, aggregate_loss, baselines and whitening": "(batch, length) numbers, no loop",
        "ValueLoss, SFTLoss, DPOLoss, GPTLMLoss": "(batch, length) numbers of log-probs that are ours already",
        "DeepSpeed, ring attention, vLLM, generation": "not of the loss",
    },
)
# Apart, as their module imports vllm, which who trains on preferences alone need not have.
_LOOPS = Host(
    "openrlhf",
    **_VERSIONS,
    replacements={
        f"{_MAKER}:RemoteExperienceMaker.get_advantages_and_returns": get_advantages_and_returns,
        f"{_MAKER}:RemoteExperienceMaker.get_cumulative_returns": get_cumulative_returns,
    },
)


def patch() -> ExitStack:
    """Replace OpenRLHF's log-probs, entropies, policy loss, advantages and returns by ours, wherever they are bound.

    Returns:
        A context; where it is entered, its end takes them out. Else they stay until `unpatch`.

    Raises:
        RuntimeError: OpenRLHF has another version than 0.11.2 to 0.11.
    """
    context = ExitStack()
    if _MAKER in sys.modules or importlib.util.find_spec("vllm") is not None:
        context.enter_context(_LOOPS.patch())
    context.enter_context(_MODELS.patch())
    return context


def patch_worker() -> None:
    """Patch this process as it loads OpenRLHF's modules, and load none: for Ray's worker_process_setup_hook.

    OpenRLHF keeps DeepSpeed out of the workers that sample and vLLM out of those that train; so does this.

    Raises:
        RuntimeError: as `patch`, where OpenRLHF is loaded.
    """
    for module, host in (("openrlhf.models", _MODELS), (_MAKER, _LOOPS)):
        if module in sys.modules:
            host.patch()
        else:
            sys.meta_path.insert(0, _AfterImport(module, host.patch))


def unpatch() -> None:
    """Restore OpenRLHF's own functions, and patch none that are loaded later."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _AfterImport)]
    for host in (_MODELS, _LOOPS):
        host.unpatch()


def report() -> Report:
    """What is replaced now, at which places, and what is left and why."""
    models, loops = _MODELS.report(), _LOOPS.report()
    missing = {} if loops.replaced else dict.fromkeys(_LOOPS.replacements, "their module is not loaded, or needs vllm")
    return Report(models.host, models.replaced | loops.replaced, models.left | missing)


class _AfterImport(importlib.abc.MetaPathFinder):
    """Runs an action once, when a module has been loaded."""

    def __init__(self, module: str, action: Callable[[], object]):
        self.module, self.action = module, action

    def find_spec(self, name, path=None, target=None):
        """The module's own specification, its loader running the action after it; None for other modules."""
        if name != self.module:
            return None
        sys.meta_path.remove(self)
        found = importlib.util.find_spec(name)
        if found is not None:
            load = found.loader.exec_module

            def loaded(module):
                load(module)
                self.action()

            found.loader.exec_module = loaded
        return found
