"""Generation inside the training process: each prompt is read once, then all its rollouts are decoded together.

What a rollout gets, bit for bit, depends on its prompt, its seed and its stream, not on what is decoded beside it nor
on how its tokens fall into passes (shown for float32 on CPUs).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import os
import threading
import warnings
from collections.abc import Awaitable, Callable, Sequence
from concurrent import futures
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fuserl import attention, families
from fuserl.engine import plain_decoding
from fuserl.engine.batch import Rollouts
from fuserl.engine.decoding import Decoder
from fuserl.engine.prompts import Prompt
from fuserl.engine.sampling import Sampling, stream_of
from fuserl.engine.scheduling import Rollout, Source

Answer = str | None


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
    forced: Sequence[Sequence[int]] | None = None,
    reply: Callable[[Prompt, str], Answer | Awaitable[Answer] | futures.Future] | None = None,
    chunk: tuple[int, int] | None = None,
    rows: int | None = None,
    kv_gb: float | None = None,
    graphs: bool = True,
) -> Rollouts:
    """Completions of `prompts`, `group_size` each, rollout b belonging to prompt b // group_size.

    Args:
        model, tokenizer: a transformers causal language model, in eval mode meanwhile, and its tokenizer. A model that
            cannot be given our attention runs by transformers' own `generate`, prompt by prompt; a warning says why.
        group_size: completions of each prompt.
        max_new_tokens: tokens after which a completion is cut ("length"), those not drawn included.
        temperature, top_k, top_p, min_p: see `Sampling`; temperature 0 is greedy.
        stop: texts that end a completion ("stop") as soon as it contains one; cut from its text, not from its tokens.
        stop_ids: token ids that end a completion; None is the end-of-text ids of the model's generation config.
        seed, streams: fix every random draw; streams has an integer of 32 bits per prompt, None is 0, 1, 2, ...
        forced: (B,) token ids that each completion begins with, not drawn and not trained; fewer than max_new_tokens.
        reply: called with a prompt and its completion so far, the text that ended it included, whenever one ends by
            itself. What it returns (a tool's output, the next turn of a talk) is put behind it, neither drawn nor
            trained, and the completion goes on; with None it ends. One without room behind it is left out ("length").
            While an awaitable or a `concurrent.futures.Future` of it is to come, other rollouts go on.
        chunk: (size, carry): whenever that many tokens stand behind its prompt, a completion goes on anew behind the
            prompt and its last `carry` tokens, which are then context, not trained, and not counted again.
        rows: rollouts decoded at once; None is 64 on a CPU and 256 on a GPU. Part of what fixes the bits of a rollout.
        kv_gb: 1e9 bytes for keys and values; None is what fits. Beyond it the last rollouts wait and are read again.
        graphs: on a GPU, record passes that read one token of each rollout as CUDA graphs, and replay them.

    Returns:
        `Rollouts`, with the log-probability of every token as it was drawn; NaN for those that were not.

    Raises:
        ValueError: an empty prompt, an argument out of range, or a model that sees what comes.
        RuntimeError: no room for a single rollout.
    """
    check(prompts, streams, group_size=group_size, max_new_tokens=max_new_tokens, stop=stop, chunk=chunk)
    sampling = Sampling(temperature, top_k, top_p, min_p, seed)
    prompt_tokens = [torch.tensor(tokenizer(p.text).input_ids, dtype=torch.int64) for p in prompts]
    stop_ids = eos_ids(model) if stop_ids is None else frozenset(stop_ids)
    ending = Ending(tokenizer, tuple(stop), stop_ids, max_new_tokens, prompts, reply, chunk)
    rollouts = _begun(prompt_tokens, streams or range(len(prompts)), group_size, forced, max_new_tokens)
    with _decoding(model, rollouts, max_new_tokens, rows, kv_gb, graphs) as run:
        run(sampling, ending.drew)
    return collected(list(prompts), prompt_tokens, rollouts, ending)


def check(prompts: Sequence[Prompt], streams, *, group_size: int, max_new_tokens: int, stop, chunk) -> None:
    """Refuse arguments that are out of range."""
    named = len(prompts if streams is None else streams)
    for name, given, good, contract in (
        ("group_size", group_size, group_size >= 1, "be at least 1"),
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "be at least 1"),
        ("streams", named, named == len(prompts), f"hold one integer per prompt ({len(prompts)})"),
        ("stop", stop, not isinstance(stop, str) and all(stop), "be a sequence of texts that are not empty"),
        (
            "chunk",
            chunk,
            chunk is None or 0 <= chunk[1] < chunk[0],
            "be (size, carry), carry at least 0 and below size",
        ),
    ):
        if not good:
            raise ValueError(f"generate: {name} must {contract}; got {given!r}. Change the argument")
    for index, prompt in enumerate(prompts):
        if not prompt.text:
            raise ValueError(f"generate: prompts must not be empty; got {prompt.text!r} at {index}. Add text")


def _begun(prompts: list[Tensor], streams, group_size: int, forced, most: int) -> list[Rollout]:
    """The rollouts before anything is drawn."""
    sources = [Source(ids.tolist()) for ids in prompts]
    rollouts = [
        Rollout([], source=source, number=number, stream=stream_of(streams[number], member))
        for number, source in enumerate(sources)
        for member in range(group_size)
    ]
    forced = [()] * len(rollouts) if forced is None else forced
    if len(forced) != len(rollouts) or any(len(ids) >= most for ids in forced):
        raise ValueError(
            f"generate: forced must hold fewer than {most} token ids for each of {len(rollouts)} rollouts; got "
            f"{[len(ids) for ids in forced][:8]}. Shorten them, or raise max_new_tokens"
        )
    for rollout, ids in zip(rollouts, forced, strict=True):
        rollout.insert(list(ids))
    return rollouts


@dataclass(frozen=True)
class Ending:
    """When a completion ends, and what its text is then."""

    tokenizer: object
    stop: tuple[str, ...]
    stop_ids: frozenset[int]
    max_new_tokens: int
    prompts: Sequence[Prompt]
    reply: Callable[[Prompt, str], Answer | Awaitable[Answer] | futures.Future] | None
    chunk: tuple[int, int] | None

    def drew(self, rollout: Rollout) -> None:
        """Ends a rollout that has drawn a token, if that is its last, answers it, or begins its next chunk.

        One whose answer is still to come has it as its `reply`, and ends or goes on when it comes here again.
        """
        waited, rollout.reply = rollout.reply, None
        rollout.finish = self.reason(rollout)
        if rollout.finish == "stop" and self.reply is not None:
            text = waited.result() if waited is not None else self._answer(rollout)
            if isinstance(text, futures.Future):
                rollout.reply, rollout.finish = text, None
                return
            if text is not None:
                ids = self.tokenizer(text, add_special_tokens=False).input_ids
                room = rollout.count + len(ids) < self.max_new_tokens
                rollout.finish = None if room else "length"
                if room:
                    rollout.insert(ids)
        if not rollout.finish and self.chunk is not None and len(rollout.tokens) >= self.chunk[0]:
            rollout.begin_anew(self.chunk[1])

    def _answer(self, rollout: Rollout) -> str | futures.Future | None:
        answer = self.reply(self.prompts[rollout.number], self.seen(rollout.said))
        return asyncio.run_coroutine_threadsafe(answer, _loop(os.getpid())) if inspect.isawaitable(answer) else answer

    def reason(self, rollout: Rollout) -> str | None:
        """ "stop", "length", or None while the completion goes on."""
        tokens = rollout.tokens
        if tokens[-1] in self.stop_ids:
            return "stop"
        if self.stop:
            # A token holds at least one byte, so the last ones suffice to contain a stop text that has just ended.
            begin = len(tokens) - max(len(text.encode()) for text in self.stop) - 4
            text = self.seen(tokens[max(begin, rollout.turn) :])
            if any(stop in text for stop in self.stop):
                return "stop"
        return "length" if rollout.count >= self.max_new_tokens else None

    def text(self, rollout: Rollout) -> str:
        """The completion without the token or text that ended it."""
        tokens = rollout.said
        text = self.seen(tokens[:-1] if tokens[-1] in self.stop_ids else tokens)
        turn = rollout.turn + len(tokens) - len(rollout.tokens)
        begin = len(self.seen(tokens[:turn])) if turn else 0
        cuts = [at for at in (text.find(stop, begin) for stop in self.stop) if at >= 0]
        return text[: min(cuts)] if cuts else text

    def seen(self, tokens: list[int]) -> str:
        """Tokens as text."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@functools.cache
def _loop(process: int) -> asyncio.AbstractEventLoop:
    """Where replies are awaited: a thread of this process, which its children have not."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="replies", daemon=True).start()
    return loop


def eos_ids(model: nn.Module) -> frozenset[int]:
    """The token ids that end a text, by the model's generation config."""
    eos = model.generation_config.eos_token_id
    return frozenset(() if eos is None else eos if isinstance(eos, list) else [eos])


@contextlib.contextmanager
def prepared(model: nn.Module, kv_gb: float | None):
    """A model in eval mode with "fuserl" attention, as before afterwards; yields why it cannot have that, or None."""
    reason, training, before = families.unsupported(model), model.training, model.config._attn_implementation
    try:
        model.eval()
        if reason is not None and not families.bidirectional(model):
            _warned(reason)
            if kv_gb is not None:
                raise ValueError(
                    f"generate: kv_gb must be None for {reason}; got {kv_gb}. Its cache is transformers' own"
                )
            yield reason
        else:
            attention.attach(model)
            yield None
    finally:
        model.train(training)
        model.set_attn_implementation(before)


@contextlib.contextmanager
def _decoding(model, rollouts: list[Rollout], most: int, rows: int | None, kv_gb: float | None, graphs: bool):
    """How tokens are drawn with a model: the `run` of `Decoder`, or transformers' `generate` where that cannot be."""
    with prepared(model, kv_gb) as reason:
        if reason is None:
            yield Decoder(model, rollouts, most, rows, kv_gb, graphs).run
        else:
            yield functools.partial(plain_decoding.run, model, rollouts, most, rows)


@functools.cache
def _warned(reason: str) -> None:
    """Says so once."""
    warnings.warn(f"generate: transformers' own generate is used, prompt by prompt, for {reason}.", stacklevel=3)


def collected(prompts: list[Prompt], prompt_tokens: list[Tensor], rollouts: list[Rollout], ending: Ending) -> Rollouts:
    """What has been drawn, packed."""
    chunks = [[*r.chunks, r.tokens] for r in rollouts]
    return Rollouts(
        prompts=prompts,
        prompt_tokens=prompt_tokens,
        group=torch.tensor([r.number for r in rollouts], dtype=torch.int64),
        tokens=torch.tensor([token for each in chunks for chunk in each for token in chunk], dtype=torch.int64),
        offsets=torch.tensor([0, *(len(r.trained) for r in rollouts)]).cumsum(0),
        rollout_logprobs=torch.tensor([logprob for r in rollouts for logprob in r.logprobs], dtype=torch.float32),
        texts=[ending.text(r) for r in rollouts],
        finish=[r.finish for r in rollouts],
        trained=torch.tensor([trained for r in rollouts for trained in r.trained], dtype=torch.bool),
        chunks=[[len(chunk) for chunk in each] for each in chunks],
    )
