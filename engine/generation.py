"""Generation inside the training process: each prompt is read once, then all its rollouts are decoded together.

Every pass of the model runs a fixed number of token rows. A row is a prompt token or the last token of a rollout; it
keeps its keys and values in a slot. Rollouts that end free their slots for those that wait. What a rollout gets, bit
for bit, depends on its prompt, its seed and its stream, not on what is decoded beside it (shown for float32 on CPUs).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fuserl import attention
from fuserl.engine.batch import Rollouts
from fuserl.engine.kv_cache import PROMPT_BLOCK, KVCache, Rows
from fuserl.engine.meter import span
from fuserl.engine.prompts import Prompt
from fuserl.engine.sampling import Sampling, stream_of
from fuserl.kernels.tree_layout import common_prefix


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer,
    prompts: Sequence[Prompt],
    *,
    group_size: int = 1,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    stop: Sequence[str] = (),
    stop_ids: Sequence[int] | None = None,
    seed: int = 0,
    streams: Sequence[int] | None = None,
    rows: int | None = None,
) -> Rollouts:
    """Completions of `prompts`, `group_size` each, rollout b belonging to prompt b // group_size.

    Args:
        model: a transformers causal language model; it is put in eval mode meanwhile.
        tokenizer: its tokenizer.
        group_size: completions of each prompt.
        max_new_tokens: tokens after which a completion is cut ("length").
        temperature, top_k, top_p, min_p: see `Sampling`; temperature 0 is greedy.
        stop: texts that end a completion ("stop") as soon as it contains one; cut from its text, not from its tokens.
        stop_ids: token ids that end a completion; None is the end-of-text ids of the model's generation config.
        seed: with `streams`, fixes every random draw.
        streams: one integer of 32 bits per prompt, naming its random stream; None is 0, 1, 2, ...
        rows: token rows of one pass and rollouts decoded at once; None is 64 on a CPU and 256 on a GPU. Part of what
            fixes the bits of a rollout.

    Returns:
        `Rollouts`, with the log-probability of every token as it was drawn.

    Raises:
        ValueError: an empty prompt, an argument out of range, or a model that cannot take the layout.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, seed)
    device = next(model.parameters()).device
    rows = rows or (64 if device.type == "cpu" else 256)
    streams = range(len(prompts)) if streams is None else streams
    _check(group_size=group_size, max_new_tokens=max_new_tokens, streams=streams, prompts=prompts, stop=stop)
    prompt_tokens = [torch.tensor(tokenizer(p.text).input_ids, dtype=torch.int64) for p in prompts]
    stop_ids = _eos_ids(model) if stop_ids is None else frozenset(stop_ids)
    ending = Ending(tokenizer, tuple(stop), stop_ids, max_new_tokens)
    rollouts = [
        Rollout(prompt, stream_of(streams[prompt], member))
        for prompt in range(len(prompts))
        for member in range(group_size)
    ]
    with _evaluating(model):
        Decoder(model, prompt_tokens, max_new_tokens, min(rows, len(rollouts)), rows).run(rollouts, sampling, ending)
    return _collected(list(prompts), prompt_tokens, rollouts, ending)


def _check(*, group_size: int, max_new_tokens: int, streams: Sequence[int], prompts: Sequence[Prompt], stop) -> None:
    for name, given, good, contract in (
        ("group_size", group_size, group_size >= 1, "be at least 1"),
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "be at least 1"),
        ("streams", len(streams), len(streams) == len(prompts), f"hold one integer per prompt ({len(prompts)})"),
        ("stop", stop, not isinstance(stop, str) and all(stop), "be a sequence of texts that are not empty"),
    ):
        if not good:
            raise ValueError(f"generate: {name} must {contract}; got {given!r}. Change the argument")
    for index, prompt in enumerate(prompts):
        if not prompt.text:
            raise ValueError(f"generate: prompts must not be empty; got {prompt.text!r} at {index}. Add text")


@dataclass
class Rollout:
    """One completion in the making."""

    prompt: int
    stream: int  # with the seed, names its random numbers
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: str | None = None


@dataclass(frozen=True)
class Ending:
    """When a completion ends, and what its text is then."""

    tokenizer: object
    stop: tuple[str, ...]
    stop_ids: frozenset[int]
    max_new_tokens: int

    def reason(self, tokens: list[int]) -> str | None:
        """ "stop", "length", or None while the completion goes on."""
        if tokens[-1] in self.stop_ids:
            return "stop"
        if self.stop:
            # A token holds at least one byte, so the last ones suffice to contain a stop text that has just ended.
            tail = tokens[-max(len(text.encode()) for text in self.stop) - 4 :]
            text = self._decoded(tail)
            if any(stop in text for stop in self.stop):
                return "stop"
        return "length" if len(tokens) == self.max_new_tokens else None

    def text(self, tokens: list[int]) -> str:
        """The completion without the token or text that ended it."""
        text = self._decoded(tokens[:-1] if tokens[-1] in self.stop_ids else tokens)
        cuts = [at for at in (text.find(stop) for stop in self.stop) if at >= 0]
        return text[: min(cuts)] if cuts else text

    def _decoded(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class Decoder:
    """Slots of a KV cache, and passes of the model over them.

    Args:
        model: in eval mode, with "fuserl" attention.
        prompts: G tensors of token ids.
        max_new_tokens: of any rollout.
        slots: rollouts decoded at once.
        rows: token rows of every pass, at least `slots`.
    """

    def __init__(self, model: nn.Module, prompts: list[Tensor], max_new_tokens: int, slots: int, rows: int):
        self.model, self.prompts, self.rows = model, prompts, rows
        self.device = next(model.parameters()).device
        self.layers = model.config.get_text_config().num_hidden_layers
        self.cache = KVCache(slots, max(map(len, prompts)) + max_new_tokens)
        self.free = list(range(slots))[::-1]
        self.live: dict[int, Rollout] = {}
        self.kept: dict[int, tuple[KVCache, Tensor]] = {}
        self.prefix = KVCache(1, max(map(len, prompts)))
        self.shared = common_prefix(prompts)
        if self.shared:
            self._read(self.prefix, {0: (0, 0, self.shared)})

    def run(self, rollouts: list[Rollout], sampling: Sampling, ending: Ending) -> None:
        """Decodes all `rollouts`, in order, as slots become free."""
        waiting = rollouts[::-1]
        while waiting or self.live:
            # Reading prompts costs whole passes: wait until a fair part of the slots is free.
            if waiting and (not self.live or 4 * len(self.free) >= self.cache.slots):
                with span("prefill"):
                    slots, logits = self._admit(waiting)
            else:
                with span("decode"):
                    slots, logits = list(self.live), self._step()
            drawn = [self.live[slot] for slot in slots]
            names = torch.tensor([[r.stream for r in drawn], [len(r.tokens) for r in drawn]]).to(self.device)
            ids, logprobs = sampling.draw(logits, *names)
            for slot, rollout, token, logprob in zip(slots, drawn, ids.tolist(), logprobs.tolist(), strict=True):
                rollout.tokens.append(token)
                rollout.logprobs.append(logprob)
                rollout.finish = ending.reason(rollout.tokens)
                if rollout.finish:
                    del self.live[slot]
                    self.free.append(slot)

    def _step(self) -> Tensor:
        """Logits (n, V) of the next token of every live rollout."""
        live = list(self.live.items())
        position = [len(self.prompts[r.prompt]) + len(r.tokens) - 1 for _, r in live]
        # Free slots run along at some live row's position: leaving them out would mean copying all keys to close ranks.
        slots = torch.arange(self.cache.slots)
        where = torch.full((self.cache.slots,), position[0])
        last = torch.zeros(self.cache.slots, dtype=torch.int64)
        at = torch.tensor([slot for slot, _ in live])
        where[at] = torch.tensor(position)
        last[at] = torch.tensor([r.tokens[-1] for _, r in live])
        return self._forward(self.cache, last, slots, where, 1, None)[at.to(self.device)]

    def _admit(self, waiting: list[Rollout]) -> tuple[list[int], Tensor]:
        """Gives free slots to waiting rollouts; their slots, and logits (n, V) of their first tokens."""
        admitted = [(self.free.pop(), waiting.pop()) for _ in range(min(len(self.free), len(waiting)))]
        self.live.update(admitted)
        members: dict[int, list[int]] = {}
        for slot, rollout in admitted:
            members.setdefault(rollout.prompt, []).append(slot)
        homes = {prompt: slots[0] for prompt, slots in members.items() if prompt not in self.kept}
        if self.shared and homes:
            self.cache.copy(self.prefix, 0, list(homes.values()), 0, self.shared)
        first = self._read(self.cache, {p: (slot, self.shared, len(self.prompts[p])) for p, slot in homes.items()})
        still = {rollout.prompt for rollout in waiting}
        for prompt, slots in members.items():
            size = len(self.prompts[prompt])
            if prompt in homes:
                self.cache.copy(self.cache, slots[0], slots[1:], 0, size)
            else:
                source, first[prompt] = self.kept[prompt]
                self.cache.copy(source, 0, slots, 0, size)
            if prompt not in still:
                self.kept.pop(prompt, None)
            elif prompt in homes:
                spare = KVCache(1, size)
                spare.copy(self.cache, slots[0], [0], 0, size)
                self.kept[prompt] = (spare, first[prompt])
        return [slot for slot, _ in admitted], torch.stack([first[rollout.prompt] for _, rollout in admitted])

    def _read(self, cache: KVCache, spans: dict[int, tuple[int, int, int]]) -> dict[int, Tensor]:
        """Runs prompts' tokens into slots, (slot, start, stop) each; logits (V,) after each one's last token."""
        tokens, slot, position, last = [], [], [], {}
        for prompt, (to, start, stop) in spans.items():
            tokens.append(self.prompts[prompt][start:stop])
            slot.append(torch.full((stop - start,), to))
            position.append(torch.arange(start, stop))
            last[sum(map(len, tokens)) - 1] = prompt
        if not tokens:
            return {}
        tokens, slot, position = torch.cat(tokens), torch.cat(slot), torch.cat(position)
        first = {}
        for begin in range(0, len(tokens), self.rows):
            part = slice(begin, begin + self.rows)
            ends = [row for row in last if begin <= row < begin + self.rows]
            logits = self._forward(
                cache, tokens[part], slot[part], position[part], PROMPT_BLOCK, [row - begin for row in ends]
            )
            first.update({last[row]: logits[i] for i, row in enumerate(ends)})
        return first

    def _forward(self, cache: KVCache, tokens: Tensor, slot: Tensor, position: Tensor, block: int, keep) -> Tensor:
        """One pass; logits of the rows `keep`, or of all rows for None."""
        padded = torch.zeros(2, 1, self.rows, dtype=torch.int64)
        padded[0, 0, : len(tokens)], padded[1, 0, : len(tokens)] = tokens, position
        ids, places = padded.to(self.device)
        layout = Rows(cache, slot, position, block, self.device)
        kept = 0
        if keep is not None:
            # The head, too, runs a fixed number of rows, unless nobody wants any.
            kept = torch.tensor(keep + [0] * (self.rows - len(keep)) if keep else [0], device=self.device)
        marker = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device)
        logits = self.model(
            input_ids=ids, position_ids=places, attention_mask=marker, segments=layout, use_cache=False,
            logits_to_keep=kept,
        ).logits[0]  # fmt: skip
        if layout.served != set(range(self.layers)):
            raise RuntimeError(
                f"generate: all {self.layers} layers of {type(self.model).__name__} must be attention layers; only "
                f"{len(layout.served)} called attention. Use another model"
            )
        return logits if keep is None else logits[: len(keep)]


def _eos_ids(model: nn.Module) -> frozenset[int]:
    eos = model.generation_config.eos_token_id
    return frozenset(() if eos is None else eos if isinstance(eos, list) else [eos])


@contextlib.contextmanager
def _evaluating(model: nn.Module):
    """Eval mode and "fuserl" attention for a while; both as before afterwards."""
    training, before = model.training, model.config._attn_implementation
    model.eval()
    attention.attach(model)
    try:
        yield
    finally:
        model.train(training)
        model.set_attn_implementation(before)


def _collected(prompts: list[Prompt], prompt_tokens: list[Tensor], rollouts: list[Rollout], ending: Ending) -> Rollouts:
    offsets = torch.tensor([0, *(len(r.tokens) for r in rollouts)]).cumsum(0)
    return Rollouts(
        prompts=prompts,
        prompt_tokens=prompt_tokens,
        group=torch.tensor([r.prompt for r in rollouts], dtype=torch.int64),
        tokens=torch.tensor([token for r in rollouts for token in r.tokens], dtype=torch.int64),
        offsets=offsets,
        rollout_logprobs=torch.tensor([logprob for r in rollouts for logprob in r.logprobs], dtype=torch.float32),
        texts=[ending.text(r.tokens) for r in rollouts],
        finish=[r.finish for r in rollouts],
    )
