"""Passes of a model over token rows: pieces of prompts, the last tokens of rollouts, and texts put in between."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fuserl import layers
from fuserl.engine import meter
from fuserl.engine.kv_cache import Pages, Pass, free_bytes, page_bytes
from fuserl.engine.sampling import Sampling
from fuserl.engine.scheduling import Rollout, Scheduler, Source, Span
from fuserl.kernels.matmul import native
from fuserl.kernels.tree_layout import common_prefix
from fuserl.kernels.tree_lines import PAGE, Lines

_LANES = 16  # of the widest registers: what torch's elementwise loops leave over of an array they work out otherwise
_CHUNK = 8  # a pass that need not be of a fixed size reads so many times as many tokens as there are rollouts at once


class Decoder:
    """A model, the rollouts that it draws and the cache that they share.

    Args:
        model: in eval mode, with "fuserl" attention.
        rollouts: in the order in which they begin, those of a prompt together.
        most: tokens of any of them.
        rows: rollouts decoded at once, None for 64 on a CPU and 256 on a GPU.
        kv_gb: 1e9 bytes that keys and values may take, None for what fits.
    """

    def __init__(self, model: nn.Module, rollouts: list[Rollout], most: int, rows: int | None, kv_gb: float | None):
        self.model = model
        self.device = next(model.parameters()).device
        self.layers = model.config.get_text_config().num_hidden_layers
        slots = rows or (64 if self.device.type == "cpu" else 256)
        self.rows = slots if self.device.type == "cpu" and not row_by_row(model) else 0
        prompts = [source.tokens for source in dict.fromkeys(rollout.source for rollout in rollouts)]
        self.pages = Pages(self._room(max(map(len, prompts)), most, kv_gb))
        shared = common_prefix([torch.tensor(tokens) for tokens in prompts])
        self.scheduler = Scheduler(rollouts, self.pages, slots, self.rows or _CHUNK * slots, shared)

    def run(self, sampling: Sampling, drew: Callable[[Rollout], None]) -> None:
        """Draws until all rollouts have a `finish`, which `drew`, called with each behind each token, is to set."""
        scheduler = self.scheduler
        while scheduler.live or scheduler.waiting:
            spans = scheduler.plan()
            reads = any(isinstance(each.text, Source) for each in spans)
            with meter.span("prefill" if reads else "decode"):
                ready, rows = self._ready(spans, self._forward(spans) if spans else None)
            if not ready:
                continue
            names = torch.tensor([[r.stream for r in ready], [r.count for r in ready]]).to(self.device)
            ids, logprobs = sampling.draw(rows, *names)
            for rollout, token, logprob in zip(ready, ids.tolist(), logprobs.tolist(), strict=True):
                rollout.draw(token, logprob)
                drew(rollout)
                if rollout.finish:
                    scheduler.done(rollout)

    def _room(self, prompt: int, completion: int, kv_gb: float | None) -> int:
        """How many pages fit, enough for the longest rollout."""
        each = page_bytes(self.model)
        most = int(free_bytes(self.device) if kv_gb is None else 1e9 * kv_gb) // each
        least = -(-prompt // PAGE) - (-completion // PAGE)
        if most < least:
            raise RuntimeError(
                f"generate: kv_gb must have room for a rollout of {prompt} and {completion} tokens, "
                f"{least * each / 1e9:.3g} GB; there is {most * each / 1e9:.3g}. Raise it, or shorten what is generated"
            )
        return most

    def _ready(self, spans: list[Span], logits: Tensor | None) -> tuple[list[Rollout], Tensor | None]:
        """The rollouts whose next token can be drawn, and the logits (n, V) that it is drawn from."""
        row = {}
        for span in spans:
            span.text.read = span.stop
            if span.stop == len(span.text.tokens):
                row[span.text] = len(row)
                if isinstance(span.text, Source):
                    span.text.logits = logits[row[span.text]].clone()
        ready = self.scheduler.ready()
        going, fresh = [r for r in ready if r.tokens], [r for r in ready if not r.tokens]
        at = [row[rollout] for rollout in going]
        found = [logits if at == [*range(len(logits))] else logits[at]] if at else []
        if fresh:
            found.append(torch.stack([rollout.source.logits for rollout in fresh]))
        return going + fresh, torch.cat(found) if len(found) > 1 else found[0] if found else None

    def _forward(self, spans: list[Span]) -> Tensor:
        """One pass; logits (n, V) behind the texts that it reads to their ends."""
        tokens = [token for text, start, stop in spans for token in text.tokens[start:stop]]
        base = [0 if isinstance(text, Source) else len(text.source.tokens) for text, *_ in spans]
        places = [b + at for b, (_, start, stop) in zip(base, spans, strict=True) for at in range(start, stop)]
        ends, keep = 0, []
        for text, start, stop in spans:
            ends += stop - start
            keep += [ends - 1] * (stop == len(text.tokens))
        spare = max(0, self.rows - len(tokens))
        ids, positions = torch.tensor([tokens + [0] * spare, places + [0] * spare], device=self.device)[:, None]
        stored = [text.pages[at // PAGE] * PAGE + at % PAGE for text, *span in spans for at in range(*span)]
        layout = Pass(self.pages, torch.tensor(stored, device=self.device), _lines(spans, places))
        # The head, too, runs a fixed number of rows, unless nobody wants any.
        kept = keep + [0] * max(0, self.rows - len(keep)) if keep else [0]
        marker = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device)
        logits = self.model(
            input_ids=ids, position_ids=positions, attention_mask=marker, segments=layout, use_cache=False,
            logits_to_keep=torch.tensor(kept, device=self.device),
        ).logits[0]  # fmt: skip
        if layout.served != set(range(self.layers)):
            raise RuntimeError(
                f"generate: all {self.layers} layers of {type(self.model).__name__} must be attention layers; only "
                f"{len(layout.served)} called attention. Use another model"
            )
        return logits[: len(keep)]


def row_by_row(model: nn.Module) -> bool:
    """Whether what a pass on a CPU makes of a row does not depend on how many rows it has: then it needs no padding.

    Products must be fuserl's own, and every width a whole number of registers on each thread.
    """
    unit, config = _LANES * torch.get_num_threads(), model.config.get_text_config()
    head, widths = model.get_output_embeddings(), {getattr(config, "head_dim", None) or config.hidden_size}
    for part in model.modules():
        matrices = any(weight.dim() > 1 for weight in part.parameters(recurse=False))
        if isinstance(part, layers.Linear) and native(part.weight.device, part.weight.dtype):
            widths |= {part.in_features} if part is head else {part.in_features, part.out_features}
        elif matrices and not isinstance(part, nn.Embedding):
            return False
    return not torch.is_autocast_enabled("cpu") and all(width % unit == 0 for width in widths)


def _lines(spans: list[Span], places: list[int]) -> Lines:
    """What each token of a pass sees: its own text up to itself and, in a rollout, the prompt."""
    parent, start, length, leaf, page = [], [], [], [], []
    number: dict[Source, int] = {}

    def add(text, up: int, size: int) -> int:
        parent.append(up)
        start.append(PAGE * len(page))
        length.append(size)
        page.extend(text.pages[: -(-size // PAGE)])
        return len(parent) - 1

    for text, begin, stop in spans:
        up = -1
        if isinstance(text, Rollout):
            if text.source not in number:
                number[text.source] = add(text.source, -1, len(text.source.tokens))
            up = number[text.source]
        leaf += [add(text, up, stop)] * (stop - begin)
    return Lines(*map(tuple, (parent, start, length, leaf, places, page)))
