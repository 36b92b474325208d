"""TRL's GRPOTrainer with each prompt once in a pass, and no backward through rollouts that teach nothing.

    from fuserl.trainers.trl_grpo import FuserlGRPOTrainer

    trainer = FuserlGRPOTrainer(...)         # as trl.GRPOTrainer
    trainer.train()

A pass of G rollouts of one prompt runs its tokens once where TRL runs them G times, and no padding; the head and the
log-probs are those of `fuserl.trainers.trl`, which making a trainer patches in, and the linear layers those of
`fuserl.layers`, on CPUs where these are faster. Loss, metrics and checkpoints are
TRL's, number for number.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from fuserl import attention, layers
from fuserl.trainers import trl as drop_in
from fuserl.trainers.heads import causal_lm

__all__ = ["FuserlGRPOTrainer"]

_IGNORED = -100


class FuserlGRPOTrainer(importlib.import_module("trl").GRPOTrainer):  # where it is missing, drop_in has said so
    """`trl.GRPOTrainer` whose passes over rollouts are packed.

    A rollout whose advantage is 0 has no gradient where the loss is the policy's alone (no KL term, entropy bonus or
    auxiliary loss): its log-probs and entropies, which TRL logs, come from a forward without one.

    Args:
        as of `trl.GRPOTrainer`. Images, models of experts that train with their auxiliary loss, and prompts of one
            token take TRL's passes.

    Raises:
        ValueError: the model has layers that packed rollouts cannot run in (latent attention, recurrent states),
            generation by transformers' continuous batching, which brings an attention of its own, or ranks that share
            a sequence.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.use_transformers_continuous_batching:
            raise ValueError(
                "FuserlGRPOTrainer: use_transformers_continuous_batching must be False, as it brings its own "
                "attention; got True. Use use_vllm, or trl.GRPOTrainer with fuserl.trainers.trl.patch()."
            )
        # A launcher sets it without TRL's arguments.
        parallel = getattr(self.accelerator, "parallelism_config", None)
        if parallel is not None and (parallel.cp_enabled or parallel.sp_enabled):
            raise ValueError(
                f"FuserlGRPOTrainer: cp_size and sp_size must be 1, as packed rollouts are whole on a rank; got "
                f"{parallel.cp_size} and {parallel.sp_size}. Use data parallelism: DDP or FSDP2."
            )
        drop_in.patch()
        for model in (self.model, self.ref_model):
            if model is not None:
                attention.attach(layers.attach(causal_lm(model)))
        self._teaching = None

    def _compute_loss(self, model, inputs):
        quiet = self.beta != 0 or self._entropy_bonus_enabled or self.aux_loss_enabled
        self._teaching = None if quiet else self._rows_that_teach(inputs["advantages"])
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self._teaching = None

    def _rows_that_teach(self, advantages: Tensor) -> Tensor | None:
        """(B,) bool on the host: the rollouts with a gradient, one at least; None where no rank has others.

        A loss has to have a graph, and ranks as many passes each, in which they wait for one another.
        """
        teaching = (advantages != 0 if advantages.dim() == 1 else (advantages != 0).any(1)).cpu()
        teaching[0] |= ~teaching.any()
        idle = (~teaching).any()[None]
        if self.accelerator.num_processes > 1:
            idle = self.accelerator.gather(idle.to(advantages.device))
        return teaching if idle.any() else None

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, compute_entropy=False,
        compute_aux_loss=False, **images,
    ):  # fmt: skip
        if compute_aux_loss or any(x is not None for x in images.values()):
            given = model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, compute_aux_loss
            return super()._get_per_token_logps_and_entropies(*given, **images)
        rows = torch.arange(len(input_ids))
        split = self._teaching is not None and torch.is_grad_enabled()
        parts = [rows[self._teaching], rows[~self._teaching]] if split else [rows]
        found = []
        for part, learns in zip(parts, (torch.is_grad_enabled(), False), strict=False):
            for some in part.split(batch_size or len(input_ids)):
                run = some if len(some) else rows[:1]  # another rank has idle rows, and waits for this one's pass
                with torch.set_grad_enabled(learns):
                    both = self._scored(model, input_ids[run], attention_mask[run], logits_to_keep, compute_entropy)
                found.append([x[: len(some)] for x in both])
        logps, entropies = (torch.cat(each)[torch.cat(parts).argsort()] for each in zip(*found, strict=True))
        return logps, entropies if compute_entropy else None, None

    def _scored(
        self, model, input_ids: Tensor, attention_mask: Tensor, kept: int, compute_entropy: bool
    ) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies (R, T) of the last `kept` tokens of padded rows, 0 where they are padding."""
        if attention_mask[:, :-kept].sum(1).min() < 2:  # no token to share beside the one that each has of its own
            logps, entropies, _ = super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, kept, compute_entropy=compute_entropy
            )
            return logps, logps.detach() if entropies is None else entropies
        packed, labels, places = _packed(input_ids, attention_mask, kept)
        with self.accelerator.autocast():
            out = model(**packed.inputs(), shift_labels=labels, fused_lm_head=True)
        mask = attention_mask[:, -kept:] != 0
        nothing = out.log_probs.new_zeros(mask.shape)
        entropy = out.log_probs.detach() if out.entropy is None else out.entropy  # a reference has none
        return tuple(nothing.masked_scatter(mask, x[0].index_select(0, places)) for x in (out.log_probs, entropy))


def _packed(input_ids: Tensor, attention_mask: Tensor, kept: int) -> tuple[attention.Packed, Tensor, Tensor]:
    """Rows of a left-padded prompt and a right-padded completion as TRL has them: packed, labels (1, L) and the places
    (N,) of those that predict a completion's token, row by row.

    A prompt's last token stands in front of each of its completions, for each predicts another token from it.
    """
    device, mask = input_ids.device, attention_mask.cpu() != 0
    ids = input_ids.cpu()
    prompts, group = [], []
    for row, keep in zip(ids[:, :-kept], mask[:, :-kept], strict=True):
        prompt = row[keep]
        if not prompts or not torch.equal(prompt, prompts[-1]):
            prompts.append(prompt)
        group.append(len(prompts) - 1)
    rows = zip(group, ids[:, -kept:], mask[:, -kept:], strict=True)
    texts = [torch.cat([prompts[g][-1:], row[keep]]) for g, row, keep in rows]
    tokens, lengths = torch.cat(texts), torch.tensor([len(text) for text in texts])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    packed = attention.pack([prompt[:-1] for prompt in prompts], torch.tensor(group), tokens, offsets)
    predicted = torch.ones_like(tokens, dtype=torch.bool)
    predicted[offsets[:-1]] = False
    places = packed.predictor[predicted]
    labels = torch.full_like(packed.input_ids, _IGNORED)
    labels[0, places] = tokens[predicted]
    return packed.to(device), labels.to(device), places.to(device)
