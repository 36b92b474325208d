"""Passes of a model over token rows: pieces of prompts, the last tokens of rollouts, and texts put in between."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fuserl import layers
from fuserl.engine import meter, replay
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
        graphs: record decode passes where that can be.
    """

    def __init__(
        self, model: nn.Module, rollouts: list[Rollout], most: int, rows: int | None, kv_gb: float | None, graphs=False
    ):
        self.model, self.recorder = model, replay.recorder(model) if graphs else None
        self.device = next(model.parameters()).device
        self.marker = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device)
        self.layers = model.config.get_text_config().num_hidden_layers
        self.windows: list[int | None] = []  # of the layers, once a pass has asked for them
        self.slots = slots = rows or (64 if self.device.type == "cpu" else 256)
        self.rows = slots if self.device.type == "cpu" and not row_by_row(model) else 0
        prompts = [source.tokens for source in dict.fromkeys(rollout.source for rollout in rollouts)]
        self.pages = Pages(self._room(max(map(len, prompts)), most, kv_gb))
        shared = common_prefix([torch.tensor(tokens) for tokens in prompts])
        self.scheduler = Scheduler(rollouts, self.pages, slots, self.rows or _CHUNK * slots, shared)

    def run(self, sampling: Sampling, drew: Callable[[Rollout], None]) -> None:
        """Draws until all rollouts have a `finish`, which `drew`, called with each behind each token, is to set.

        And called again, where it has left a rollout with a `reply`, when that has come.
        """
        scheduler, steps = self.scheduler, self._steps(sampling)

        def told(rollout: Rollout) -> None:
            drew(rollout)
            if rollout.finish:
                scheduler.done(rollout)

        while scheduler.live or scheduler.waiting:
            for rollout in scheduler.replied():
                told(rollout)
            spans = scheduler.plan()
            reads = any(isinstance(each.text, Source) for each in spans)
            with meter.span("prefill" if reads else "decode"):
                drawn = self._drawn(spans, sampling, steps)
            for rollout, token, logprob in drawn:
                rollout.draw(token, logprob)
                told(rollout)
            if not spans and not drawn:
                scheduler.wait()

    def _steps(self, sampling: Sampling) -> replay.Steps | None:
        """What decode passes are recorded by."""
        if self.recorder is None:
            return None

        def draw(numbers: Tensor, layout: Pass) -> tuple[Tensor, Tensor]:
            return sampling.draw(self._logits(numbers[0:1], numbers[1:2], layout, 0), numbers[3], numbers[4])

        shapes = {"most": self.slots, "padded": self.rows > 0}
        return replay.Steps(draw, self.pages, self.device, recorder=self.recorder, **shapes)

    def _drawn(self, spans: list[Span], sampling: Sampling, steps: replay.Steps | None) -> list[tuple]:
        """One pass: (rollout, token, logprob) of all rollouts whose next token can be drawn after it."""
        if steps is None or steps.reason or not spans or not all(map(_decodes, spans)):
            rollouts, logits = self._ready(spans, self._forward(spans) if spans else None)
            if not rollouts:
                return []
            names = torch.tensor([[r.stream for r in rollouts], [r.count for r in rollouts]]).to(self.device)
            return _each(rollouts, *sampling.draw(logits, *names))
        places = [len(rollout.source.tokens) + at for rollout, at, _ in spans]
        numbers = [
            [rollout.tokens[at] for rollout, at, _ in spans], places, _stored(spans),
            [rollout.stream for rollout, *_ in spans], [rollout.count for rollout, *_ in spans],
        ]  # fmt: skip
        drawn = _each([span.text for span in spans], *steps.run(numbers, _lines(spans, places), self.windows))
        for span in spans:
            span.text.read = span.stop
        # Those that have drawn nothing yet wait for no pass.
        return drawn + self._drawn([], sampling, steps)

    def _room(self, prompt: int, completion: int, kv_gb: float | None) -> int:
        """How many pages fit, enough for the longest rollout."""
        each = page_bytes(self.model)
        most = int(free_bytes(self.device) if kv_gb is None else 1e9 * kv_gb) // each
        least = -(-prompt // PAGE) - (-completion // PAGE) + (self.recorder is not None)
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
        going, fresh = [r for r in ready if r in row], [r for r in ready if not r.tokens]
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
        lines = _lines(spans, places)
        layout = Pass(self.pages, torch.tensor(_stored(spans), device=self.device), lines)
        # The head, too, runs a fixed number of rows, unless nobody wants any.
        kept = keep + [0] * max(0, self.rows - len(keep)) if keep else [0]
        logits = self._logits(ids, positions, layout, torch.tensor(kept, device=self.device))
        self.windows = lines.windows
        return logits[: len(keep)]

    def _logits(self, ids: Tensor, positions: Tensor, layout: Pass, kept: Tensor | int) -> Tensor:
        """Logits behind the rows `kept`, all of them for 0, of ids and positions (1, rows)."""
        logits = self.model(
            input_ids=ids, position_ids=positions, attention_mask=self.marker, segments=layout, use_cache=False,
            logits_to_keep=kept,
        ).logits[0]  # fmt: skip
        if layout.served != set(range(self.layers)):
            raise RuntimeError(
                f"generate: all {self.layers} layers of {type(self.model).__name__} must be attention layers; only "
                f"{len(layout.served)} called attention. Use another model"
            )
        return logits


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


def _decodes(span: Span) -> bool:
    """Whether a pass reads a rollout's last token alone."""
    return isinstance(span.text, Rollout) and span.start + 1 == span.stop == len(span.text.tokens)


def _each(rollouts: list[Rollout], ids: Tensor, logprobs: Tensor) -> list[tuple]:
    return list(zip(rollouts, ids.tolist(), logprobs.tolist(), strict=True))


def _stored(spans: list[Span]) -> list[int]:
    """Where the storage has each token of a pass."""
    return [text.pages[at // PAGE] * PAGE + at % PAGE for text, *span in spans for at in range(*span)]


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
