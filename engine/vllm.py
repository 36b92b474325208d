"""vLLM as the source of completions, in this process and on the GPU that trains: `--rollout vllm`.

Written for the documented Python interface of vLLM 0.22 to 0.31 (`LLM`, `SamplingParams`, `apply_model`,
`reset_prefix_cache`), those that TRL 1.16 takes, and tested against an imitation of it: vLLM itself, on a GPU, is
untested.

vLLM starts without weights and is given the policy's, adapters folded in, by `sync`: at the start and after each
update. Its log-probs are those of the distribution that it draws from ("processed"): after temperature, top-k, top-p
and min-p. They differ from the policy's own by rounding, which every step reports, and importance weights correct.
"""

from __future__ import annotations

import inspect
import os
import random
import tempfile
from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from fuserl.engine import adapters, generation, lookup
from fuserl.engine.batch import Rollouts
from fuserl.engine.config import Config
from fuserl.engine.prompts import Prompt

_CALL = inspect.signature(generation.generate)
_HONOURED = {"group_size", "max_new_tokens", "temperature", "top_k", "top_p", "min_p", "stop", "seed", "streams"}
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


class Vllm:
    """A source of completions: see `sources`.

    Args:
        config: resolved; its dtype, seed and `vllm_memory` are vLLM's.
        model: the policy's transformers model, or peft's LoRA around one.
        tokenizer: its tokenizer.

    Raises:
        ValueError: the model has experts, whose weights a running vLLM does not take in all versions, or adapters on a
            head that is tied to the embedding.
        RuntimeError: vLLM is not installed.
    """

    apart = True

    def __init__(self, config: Config, model: nn.Module, tokenizer):
        self.model, self.tokenizer = model, tokenizer
        _check(adapters.base(model))
        # An engine in a process of its own could not be handed this one's tensors. It is read when the engine is made.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        self._vllm = lookup.package("vllm", "vllm")
        with tempfile.TemporaryDirectory() as folder:
            _describe(adapters.base(model), tokenizer, folder)
            self._engine = self._vllm.LLM(
                model=folder, load_format="dummy", dtype=config.dtype, seed=config.seed,
                gpu_memory_utilization=config.vllm_memory, logprobs_mode="processed_logprobs",
            )  # fmt: skip

    @torch.no_grad()
    def sync(self) -> None:
        """Give vLLM the policy's weights, a tensor at a time, and forget the keys and values of the old ones."""
        weights = adapters.folded(self.model)
        self._engine.apply_model(lambda model: model.load_weights(weights))
        self._engine.reset_prefix_cache()

    def generate(self, prompts: Sequence[Prompt], **asked) -> Rollouts:
        """Completions of `prompts`; arguments and result are those of `generation.generate`.

        A completion is a function of the seed, its prompt's stream and its number in the group as far as vLLM's
        rounding does not depend on what it decodes beside it.

        Raises:
            ValueError: one of `asked` is something that vLLM does not do, and not None.
            RuntimeError: vLLM gave a completion up.
        """
        call = _CALL.bind(self.model, self.tokenizer, prompts, **asked)
        call.apply_defaults()
        given = SimpleNamespace(**call.arguments)
        unknown = [name for name, value in asked.items() if name not in _HONOURED and value is not None]
        if unknown:
            raise ValueError(
                f"vllm: a completion must be drawn in one go, in vLLM's own memory; got {', '.join(unknown)}. Leave it "
                "out, or --rollout vllm."
            )
        prompt_tokens = [torch.tensor(self.tokenizer(p.text).input_ids, dtype=torch.int64) for p in prompts]
        stop_ids = _eos_ids(adapters.base(self.model))
        settings = [
            self._vllm.SamplingParams(
                n=given.group_size, seed=_seed(given.seed, stream), temperature=given.temperature, top_k=given.top_k,
                top_p=given.top_p, min_p=given.min_p, max_tokens=given.max_new_tokens, stop=list(given.stop),
                stop_token_ids=stop_ids, logprobs=0,
            )
            for stream in (range(len(prompts)) if given.streams is None else given.streams)
        ]  # fmt: skip
        texts = [{"prompt_token_ids": tokens.tolist()} for tokens in prompt_tokens]
        # Autocast is for the products of float32 weights; vLLM's have their dtype.
        with torch.autocast(next(self.model.parameters()).device.type, enabled=False):
            groups = self._engine.generate(texts, settings, use_tqdm=False)
        completions = [completion for group in groups for completion in group.outputs]
        return self._collected(list(prompts), prompt_tokens, completions, given.group_size, (given.stop, stop_ids))

    def _collected(
        self, prompts: list[Prompt], prompt_tokens: list[Tensor], completions: list, group_size: int, ending: tuple
    ) -> Rollouts:
        unfinished = [each.finish_reason for each in completions if each.finish_reason not in ("stop", "length")]
        if unfinished:
            raise RuntimeError(
                f"vllm: every completion must end; {len(unfinished)} of {len(completions)} were given up "
                f"({unfinished[0]}). Take a larger --vllm-memory, or fewer --groups."
            )
        tokens = [list(each.token_ids) for each in completions]
        logprobs = [
            place[token].logprob
            for each in completions
            for token, place in zip(each.token_ids, each.logprobs, strict=True)
        ]
        return Rollouts(
            prompts=prompts,
            prompt_tokens=prompt_tokens,
            group=torch.arange(len(prompts)).repeat_interleave(group_size),
            tokens=torch.tensor([token for each in tokens for token in each], dtype=torch.int64),
            offsets=torch.tensor([0, *map(len, tokens)]).cumsum(0),
            rollout_logprobs=torch.tensor(logprobs, dtype=torch.float32),
            texts=[self._text(each, *ending) for each in tokens],
            finish=[each.finish_reason for each in completions],
        )

    def _text(self, tokens: list[int], stop: Sequence[str], stop_ids: list[int]) -> str:
        """A completion without what ended it."""
        shown = tokens[:-1] if tokens[-1] in stop_ids else tokens
        text = self.tokenizer.decode(shown, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text[: min([at for at in map(text.find, stop) if at >= 0], default=None)]


def _check(plain: nn.Module) -> None:
    """Refuse a model whose weights vLLM would not take, or not as they are."""
    settings = plain.config.get_text_config()
    found = next((name for name in _EXPERTS if getattr(settings, name, None)), None)
    if found is not None:
        raise ValueError(
            f"vllm: the model must be dense; {type(plain).__name__} has {found} = {getattr(settings, found)}. "
            "Leave --rollout vllm out."
        )
    head, embedding = plain.get_output_embeddings(), plain.get_input_embeddings()
    if hasattr(head, "base_layer") and head.weight is embedding.weight:
        raise ValueError(
            "vllm: a head with adapters must have weights of its own; it shares those of the embedding. Leave the head "
            "out of --lora-targets."
        )


def _describe(plain: nn.Module, tokenizer, folder: str) -> None:
    """Write what vLLM reads of a model beside its weights."""
    plain.config.architectures = [type(plain).__name__]
    for each in (plain.config, plain.generation_config, tokenizer):
        each.save_pretrained(folder)


def _eos_ids(plain: nn.Module) -> list[int]:
    eos = plain.generation_config.eos_token_id
    return [] if eos is None else eos if isinstance(eos, list) else [eos]


def _seed(seed: int, stream: int) -> int:
    """The seed of a prompt's completions; vLLM adds a completion's number in its group to it."""
    return random.Random(f"{seed} {stream}").getrandbits(62)
