"""A causal language model that generates, scores and is updated: any transformers model, one optimizer."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fuserl.engine import attention, generation
from fuserl.engine.batch import Batch, Rollouts
from fuserl.engine.losses import Loss
from fuserl.engine.prompts import Prompt
from fuserl.kernels.linear_policy_loss import linear_policy_loss


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn; temperature 0 is greedy."""

    max_new_tokens: int = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Updating:
    """How a batch becomes optimizer steps."""

    lr: float = 1e-5
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    epochs: int = 1
    minibatches: int = 1
    micro_tokens: int = 4096  # packed tokens of one forward and backward
    chunk: int | None = None  # rows of linear_policy_loss


class Policy:
    """The model under training with its tokenizer, sampling settings, optimizer and random streams.

    Args:
        model: a transformers causal language model with float32 parameters.
        tokenizer: its tokenizer; None where nothing is generated.
        sampling, updating: the settings of `generate` and `update`.
        seed: of every random stream.
        reference: keep a frozen copy of the model as it is now, for losses that read ref_logprobs.
        compute: dtype of the products; below float32 they run under autocast.
    """

    def __init__(
        self,
        model,
        tokenizer,
        sampling: Sampling,
        updating: Updating,
        *,
        seed=0,
        reference=False,
        compute=torch.float32,
    ):  # fmt: skip
        self.model, self.tokenizer = model, tokenizer
        self.sampling, self.updating, self.seed = sampling, updating, seed
        self.head = _plain_head(model)
        self.calls = 0  # of generate: numbers the random streams
        self.device = self.head.weight.device
        self.compute = compute  # the parameters stay float32: a 16-bit one would round an update of 1e-5 away
        attention.attach(model)
        self.reference = copy.deepcopy(model).requires_grad_(False).eval() if reference else None
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=updating.lr, weight_decay=updating.weight_decay, betas=(0.9, 0.95), fused=True
        )

    def encode(self, text: str) -> Tensor:
        """Token ids of a prompt, (T,) int64."""
        return torch.tensor(self.tokenizer(text).input_ids)

    def encode_completion(self, answer: str) -> Tensor:
        """Token ids of an answer as the policy would complete a prompt with it, ended by the first stop text or eos."""
        text = f" {answer}{self.sampling.stop[0] if self.sampling.stop else ''}"
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        return torch.tensor(ids if self.sampling.stop else [*ids, self.tokenizer.eos_token_id])

    def generate(self, prompts: list[Prompt], *, group_size: int = 1, greedy: bool = False) -> Rollouts:
        """Complete every prompt `group_size` times; each completion is a function of (seed, call, its number)."""
        settings = self.sampling
        if not greedy:
            self.calls += 1
        with self._autocast():
            return generation.generate(
                self.model,
                self.tokenizer,
                prompts,
                group_size=group_size,
                max_new_tokens=settings.max_new_tokens,
                temperature=0.0 if greedy else settings.temperature,
                top_k=settings.top_k,
                top_p=settings.top_p,
                min_p=settings.min_p,
                stop=settings.stop,
                seed=(self.seed << 32) + self.calls,
            )

    def update(self, batch: Batch, loss: Loss) -> dict[str, float]:
        """Take the optimizer steps of one batch; return the averages of the loss's statistics and the time taken.

        Rollouts whose tokens are all known to have a zero gradient cost no forward and no backward. With one epoch and
        one minibatch the old log-probs are the detached current ones, without a forward of their own.
        """
        started = time.perf_counter()
        if loss.reference:
            batch = batch.replace(ref_logprobs=self.logprobs(batch, model=self.reference))
        settings, tally = self.updating, Tally()
        if settings.epochs * settings.minibatches > 1 and batch.old_logprobs is None:
            batch = batch.replace(old_logprobs=self.logprobs(batch))
        self.model.train()
        for _ in range(settings.epochs):
            for part in batch.minibatches(settings.minibatches):
                self._step(part, loss, tally)
        return {**tally.means(), "update_s": time.perf_counter() - started}

    @torch.no_grad()
    def logprobs(self, batch: Batch, model=None) -> Tensor:
        """Log-probs of the batch's tokens under the policy (or another model of its family), (N,) on the host."""
        (model or self.model).eval()
        scored = torch.empty(len(batch.tokens))
        zeros = Loss(lambda out, part: torch.zeros_like(out.logprob))
        for index in self._micro_batches(batch, torch.arange(len(batch.group))):
            rows = batch.rows_of(index)
            scored[rows] = self._forward(batch.rollouts_at(index), zeros, model)[1].logprob.float().cpu()
        return scored

    def _step(self, batch: Batch, loss: Loss, tally: Tally) -> None:
        live, index = loss.live(batch), torch.arange(len(batch.group))
        if live is not None:
            index = index[batch.rollout_sum(live.float()) > 0]
        tally.add({"live": torch.tensor(len(index) / len(batch.group))}, {})
        tally.steps += 1
        if not len(index):
            return
        for micro in self._micro_batches(batch, index):
            part = batch.rollouts_at(micro)
            value, out, statistics = self._forward(part, loss)
            value.backward()
            drift = (out.logprob - part.rollout_logprobs.to(self.device)).abs()
            tally.add({"loss": value.detach()}, {**statistics, "drift": drift})
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.updating.max_grad_norm)
        tally.add({"grad_norm": norm}, {})
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _forward(self, batch: Batch, loss: Loss, model=None):
        model = model or self.model
        packed = attention.pack(batch.prompt_tokens, batch.group, batch.tokens, batch.offsets)
        live, part = loss.live(batch), batch.to(self.device)
        temperature = self.sampling.temperature or 1.0
        with self._autocast():
            states = model.get_decoder()(**packed.to(self.device).inputs()).last_hidden_state
        hidden = states[0, packed.predictor.to(self.device)].to(self.compute)
        return linear_policy_loss(
            hidden,
            model.get_output_embeddings().weight.to(hidden.dtype),
            part.tokens,
            lambda out, rows: loss(out, part.take(rows)),
            outputs=loss.outputs,
            scope=loss.scope,
            offsets=batch.offsets,
            live=live,
            temperature=temperature,
            chunk=self.updating.chunk,
        )

    def _micro_batches(self, batch: Batch, index: Tensor) -> Iterator[Tensor]:
        """Cut rollouts, whole groups kept together where they fit, into micro-batches of bounded packed length."""
        index = index[batch.group[index].argsort(stable=True)]
        lengths = batch.offsets.diff()
        begin, total, previous = 0, 0, -1
        for at, rollout in enumerate(index.tolist()):
            group = int(batch.group[rollout])
            prompt = len(batch.prompt_tokens[group])
            cost = int(lengths[rollout]) + (prompt if group != previous else 0)
            if total and total + cost > self.updating.micro_tokens:
                yield index[begin:at]
                begin, total, cost = at, 0, int(lengths[rollout]) + prompt
            total, previous = total + cost, group
        if begin < len(index):
            yield index[begin:]

    def _autocast(self):
        return torch.autocast(self.device.type, dtype=self.compute, enabled=self.compute != torch.float32)


class Tally:
    """Sums of an update's statistics on the device, read once."""

    def __init__(self):
        self.steps, self._totals, self._sums, self._counts = 0, {}, {}, {}

    def add(self, totals: dict[str, Tensor], per_token: dict[str, Tensor]) -> None:
        """Add scalars that sum over micro-batches and (n,) statistics that are averaged over the rows not NaN."""
        for name, value in totals.items():
            self._totals[name] = self._totals.get(name, 0) + value
        for name, values in per_token.items():
            known = ~values.isnan()
            self._sums[name] = self._sums.get(name, 0) + values.nan_to_num(0.0).sum()
            self._counts[name] = self._counts.get(name, 0) + known.sum()

    def means(self) -> dict[str, float]:
        """Every statistic by name: totals per optimizer step, and means per token."""
        names = [*self._totals, *self._sums]
        values = [value / max(self.steps, 1) for value in self._totals.values()]
        values += [total / self._counts[name].clamp(min=1) for name, total in self._sums.items()]
        return dict(zip(names, torch.stack([v.float().cpu() for v in values]).tolist(), strict=True))


def _plain_head(model):
    """The output embedding, or an error where the model does more to its logits than one product."""
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    scaled = [
        name for name in ("final_logit_softcapping", "logit_scale", "logits_scaling") if getattr(config, name, None)
    ]
    if head is None or getattr(head, "bias", None) is not None or scaled:
        what = ", ".join(scaled) or ("a bias" if head is not None else "no output embedding")
        raise ValueError(
            f"Policy: the model's head must be one matrix product; {type(model).__name__} has {what}. "
            "Choose a model without it."
        )
    return head
