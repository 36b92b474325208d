"""Liger's `LigerFusedLinearGRPOLoss` over `linear_policy_loss`: its names, arguments and returns.

Where it differs from liger-kernel 0.8.5: padding is never projected, nor rollouts whose advantage is 0 when there is no
KL term; logits are float32; luspo counts no padded token (Liger averages over them, too, and trains on them); padded
entries of vllm_is_ratio do not enter vespo's weight. An option that Liger drops in silence raises: delta with cispo,
sapo or vespo, a reference with use_ref_model=False. The surrogates are in `surrogates`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fuserl.kernels.head_outputs import requirer
from fuserl.kernels.linear_logprob import linear_logprob
from fuserl.kernels.linear_policy_loss import linear_policy_loss
from fuserl.kernels.softmax_rows import accumulator
from fuserl.trainers.liger.surrogates import LEAST_LOG_WEIGHT, Settings, TokenLoss

_require = requirer("LigerFusedLinearGRPOLoss")


class LigerFusedLinearGRPOFunction:
    """`LigerFusedLinearGRPOLoss` with everything positional, as Liger's autograd function of this name."""

    @staticmethod
    def apply(
        _input, weight, selected_token_ids, attention_mask, advantages, bias=None, ref_per_token_logps=None,
        old_per_token_logps=None, ref_input=None, ref_weight=None, ref_bias=None, beta=0.04, epsilon_low=0.2,
        epsilon_high=0.2, loss_type="dapo", max_completion_length=None, importance_sampling_level="token",
        sapo_temperature_pos=1.0, sapo_temperature_neg=1.05, temperature=1.0, compiled=True, use_ref_model=True,
        chunk_size=1, vllm_is_ratio=None, delta=None, use_bias_correction_kl=False, vespo_k_pos=2.0,
        vespo_lambda_pos=3.0, vespo_k_neg=3.0, vespo_lambda_neg=2.0, num_items_in_batch=None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
        """(loss, metrics) of `LigerFusedLinearGRPOLoss`, whose constructor has half of these arguments."""
        settings = Settings(
            beta, epsilon_low, epsilon_high, loss_type, max_completion_length, importance_sampling_level,
            sapo_temperature_pos, sapo_temperature_neg, delta, use_bias_correction_kl, vespo_k_pos, vespo_lambda_pos,
            vespo_k_neg, vespo_lambda_neg,
        )  # fmt: skip
        batch = _Batch(_input, selected_token_ids, attention_mask, advantages, old_per_token_logps, vllm_is_ratio)
        reference = _Reference(use_ref_model, ref_per_token_logps, ref_input, ref_weight, ref_bias)
        return _loss(settings, batch, reference, (weight, bias), temperature, num_items_in_batch)


class _Batch:
    """The tensors of a batch of B rollouts of T tokens, checked, in the dtype of the loss."""

    def __init__(self, hidden, ids, mask, advantages, old, ratio):
        _require(
            hidden.dim() == 3 and ids.shape == hidden.shape[:2], "_input must be (B, T, D) beside ids (B, T)",
            f"{tuple(hidden.shape)} and {tuple(ids.shape)}", "Leave the batch and the tokens two dimensions.",
        )  # fmt: skip
        (rollouts, _), dtype = ids.shape, accumulator(hidden.dtype)

        def checked(name, x, *shapes):
            _require(
                x.shape in shapes, f"{name} must be {' or '.join(map(str, map(tuple, shapes)))}", tuple(x.shape),
                "Pass one number per rollout or per token.",
            )  # fmt: skip
            x = x.detach().to(dtype)
            return x[:, None] if x.dim() == 1 else x

        self.hidden, self.ids = hidden, ids
        self.mask = checked("attention_mask", mask, ids.shape)
        self.advantages = checked("advantages", advantages, (rollouts,), ids.shape).expand(ids.shape)
        self.old = None if old is None else checked("old_per_token_logps", old, ids.shape)
        self.ratio = None
        if ratio is not None:
            self.ratio = checked("vllm_is_ratio", ratio, ids.shape, (rollouts, 1), (rollouts,))

    def live(self, settings: Settings, with_kl: bool) -> Tensor:
        """(B, T) bool on the host: the tokens that can have a loss; on a GPU this waits for the mask."""
        live = self.mask != 0
        if not with_kl:
            with_advantage = self.advantages != 0
            # In a rollout that has a ratio of its own every token is a part of it.
            live = live & (with_advantage if settings.scope == "token" else with_advantage.any(1, keepdim=True))
        return live.cpu()

    def weights(self, settings: Settings, items: Tensor | float | None) -> Tensor:
        """(B, T), what each token's loss is multiplied by in the batch's."""
        kind, mask, rollouts = settings.loss_type, self.mask, max(1, len(self.ids))
        if kind in ("grpo", "sapo"):
            return mask / mask.sum(1, keepdim=True).clamp(min=1) / rollouts
        if kind == "bnpo":
            return mask / mask.sum().clamp(min=1)
        if kind == "dr_grpo":
            return mask / (rollouts * settings.max_completion_length)
        return mask / rollouts if kind == "luspo" else mask / _tokens_per_rank(mask, items)

    def log_ratio(self) -> Tensor | None:
        """(B,), the log of vllm_is_ratio over each rollout, as vespo adds it to the policy's."""
        if self.ratio is None:
            return None
        log_ratio = self.ratio.log().clamp(LEAST_LOG_WEIGHT, 20)
        if log_ratio.shape == self.mask.shape and log_ratio.shape[1] > 1:
            log_ratio = log_ratio.where(self.mask != 0, 0.0)
        return log_ratio.sum(1)


def _tokens_per_rank(mask: Tensor, items: Tensor | float | None) -> Tensor:
    """The denominator of dapo, cispo and vespo: tokens of the whole batch, of all ranks, over their number."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if items is None:
        items = mask.sum()
        if distributed:
            torch.distributed.all_reduce(items)
    items = torch.as_tensor(items, dtype=mask.dtype, device=mask.device)
    return (items / (torch.distributed.get_world_size() if distributed else 1)).clamp(min=1)


class _Reference:
    """Where the reference's log-probs come from."""

    def __init__(self, use, logprobs, hidden, weight, bias):
        given = logprobs is not None or hidden is not None
        self.use, self.logprobs, self.head = use, logprobs, (hidden, weight, bias)
        self.known = use and given
        self.dropped = given and not use

    def check(self, beta: float) -> None:
        """Raise where beta asks for a KL term that the arguments do not give, or that use_ref_model would drop."""
        if beta == 0:
            return
        _require(
            not self.dropped, "use_ref_model must be True where a reference is given and beta is not 0", False,
            "Or leave the reference out.",
        )  # fmt: skip
        hidden, weight, _ = self.head
        _require(
            self.known or not self.use, "ref_per_token_logps or ref_input must be given with use_ref_model", None,
            "Or set beta=0.",
        )  # fmt: skip
        _require(
            self.logprobs is not None or hidden is None or weight is not None,
            "ref_weight must be given with ref_input", None, "Pass the reference's head.",
        )  # fmt: skip

    def tokens(self, ids: Tensor, live: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
        """(B, T) log-probs."""
        if self.logprobs is not None:
            _require(
                self.logprobs.shape == ids.shape, f"ref_per_token_logps must be {tuple(ids.shape)}",
                tuple(self.logprobs.shape), "Pass one per token.",
            )  # fmt: skip
            return self.logprobs.detach().to(dtype)
        hidden, weight, bias = self.head
        with torch.no_grad():
            weight = weight.to(hidden.dtype)
            found = linear_logprob(hidden, weight, ids, bias=bias, temperature=temperature, mask=live)
        return found.logprob.to(dtype)


def _loss(settings: Settings, batch: _Batch, reference: _Reference, head, temperature, items):
    reference.check(settings.beta)
    with_kl = settings.beta != 0 and reference.known
    live, (weight, bias) = batch.live(settings, with_kl), head
    ids = batch.ids.masked_fill(batch.mask == 0, 0)  # what stands for padding need not be a token
    other = reference.tokens(ids, live, temperature, batch.mask.dtype) if with_kl else None
    per_token = [batch.mask, batch.advantages, batch.weights(settings, items), batch.old, other]
    per_token.append(None if batch.ratio is None else batch.ratio.expand(ids.shape))
    per_token = [None if x is None else x.reshape(-1) for x in per_token]
    hidden, ids, options, device_offsets = batch.hidden.flatten(0, 1), ids.flatten(), {"live": live.flatten()}, None
    if settings.scope == "rollout":  # tokens that belong together must be rows that follow each other
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), live.sum(1).cumsum(0)])
        options, device_offsets = {"scope": "rollout", "offsets": offsets}, offsets.to(hidden.device)
        if not live.all():
            rows = live.flatten().nonzero().squeeze(1).to(hidden.device)
            hidden, ids, *per_token = [
                None if x is None else x.index_select(0, rows) for x in (hidden, ids, *per_token)
            ]
    log_ratio = batch.log_ratio() if settings.loss_type == "vespo" else None
    token_loss = TokenLoss(settings, *per_token, log_ratio, device_offsets)
    loss, _, found = linear_policy_loss(
        hidden, weight.to(hidden.dtype), ids, token_loss, bias=bias, temperature=temperature, **options
    )
    sums = found["sums"].sum(0) if "sums" in found else batch.mask.new_zeros(2)
    kl, clipped = (sums / batch.mask.sum().clamp(min=1)).unbind()
    return loss, (kl, clipped) if settings.beta != 0 else (clipped,)


class LigerFusedLinearGRPOLoss(torch.nn.Module):
    """The loss of GRPO and its kin from hidden states, as liger-kernel 0.8.5 has it, in three matrix products.

    Args:
        beta: weight of the k3 estimate of the KL to the reference; 0 for none.
        compiled, chunk_size: how Liger runs; taken, and without effect.
        use_ref_model: whether there is a reference; with beta and without one the KL is to the policy itself, 0.
        epsilon_low, epsilon_high: the clip range, 1 - low to 1 + high; in cispo the largest weight is epsilon_high.
        loss_type: grpo, bnpo, dr_grpo, dapo, luspo, cispo, sapo or vespo.
        max_completion_length: the denominator per rollout of dr_grpo.
        importance_sampling_level: "token", or "sequence" for one ratio per rollout (not in cispo, sapo, vespo).
        temperature: of both distributions.
        delta: upper bound of the ratio in the unclipped term, None for none.
        use_bias_correction_kl: multiply the KL by the importance ratio.
        sapo_temperature_pos, sapo_temperature_neg, vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg: of
            the two losses, by the advantage's sign.
    """

    def __init__(
        self, beta: float = 0.04, compiled: bool = True, use_ref_model: bool = True, chunk_size: int = 1,
        epsilon_low: float = 0.2, epsilon_high: float = 0.2, loss_type: str = "dapo",
        max_completion_length: int | None = None, importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0, sapo_temperature_neg: float = 1.05, temperature: float = 1.0,
        delta: float | None = None, use_bias_correction_kl: bool = False, vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0, vespo_k_neg: float = 3.0, vespo_lambda_neg: float = 2.0,
    ):  # fmt: skip
        super().__init__()
        self.beta, self.compiled, self.use_ref_model, self.chunk_size = beta, compiled, use_ref_model, chunk_size
        self.epsilon_low, self.epsilon_high, self.loss_type = epsilon_low, epsilon_high, loss_type
        self.max_completion_length, self.importance_sampling_level = max_completion_length, importance_sampling_level
        self.sapo_temperature_pos, self.sapo_temperature_neg = sapo_temperature_pos, sapo_temperature_neg
        self.temperature, self.delta, self.use_bias_correction_kl = temperature, delta, use_bias_correction_kl
        self.vespo_k_pos, self.vespo_lambda_pos = vespo_k_pos, vespo_lambda_pos
        self.vespo_k_neg, self.vespo_lambda_neg = vespo_k_neg, vespo_lambda_neg
        Settings(**{name: getattr(self, name) for name in Settings.__dataclass_fields__})

    def forward(
        self, _input: Tensor, lin_weight: Tensor, selected_token_ids: Tensor, attention_mask: Tensor,
        advantages: Tensor, bias: Tensor | None = None, ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None, ref_input: Tensor | None = None, ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None, vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
        """The loss, differentiable in _input, lin_weight and bias, and its metrics.

        Args:
            _input: (B, T, D), the states that predict selected_token_ids (B, T); any floating dtype.
            lin_weight, bias: (V, D) and (V,), the head; cast to the states' dtype, no gradient where frozen.
            attention_mask: (B, T), 0 at padding; other values weigh their token.
            advantages: (B,), or (B, T).
            old_per_token_logps: (B, T), of the policy that drew the tokens; None for the policy itself.
            ref_per_token_logps: (B, T), or ref_input (B, T, D_r), ref_weight (V, D_r) and ref_bias (V,) in its place.
            vllm_is_ratio: (B, T), (B, 1) or (B,), multiplies a token's policy loss.
            num_items_in_batch: tokens of the whole batch on all ranks, the denominator of dapo, cispo and vespo; None
                to sum the masks of this call's, over all ranks.

        Returns:
            (loss, metrics): a scalar whose backward may run once, and (KL, share of clipped tokens), or the latter
            alone where beta is 0.

        Raises:
            ValueError: on a wrong shape or option, and where an option would have no effect.

        Memory: one chunk of float32 logits. Sibling: `fuserl.linear_policy_loss`.
        """
        settings = Settings(**{name: getattr(self, name) for name in Settings.__dataclass_fields__})
        batch = _Batch(_input, selected_token_ids, attention_mask, advantages, old_per_token_logps, vllm_is_ratio)
        reference = _Reference(self.use_ref_model, ref_per_token_logps, ref_input, ref_weight, ref_bias)
        return _loss(settings, batch, reference, (lin_weight, bias), self.temperature, num_items_in_batch)
