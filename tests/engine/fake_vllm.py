"""An imitation of vLLM: what fuserl uses of `LLM` and `SamplingParams`, drawing from a transformers model.

It follows what vLLM documents: a folder without weights gives random ones; `load_weights` takes names of a checkpoint;
prefixes stay cached until they are reset; completion i of a prompt has the seed of its prompt plus i.
"""

import dataclasses
import types
import typing

import tiny_runs
import torch
import transformers


@dataclasses.dataclass
class SamplingParams:
    """The settings that fuserl gives, all by name; as vLLM's own it refuses several completions where it is greedy."""

    n: int
    seed: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    max_tokens: int
    stop: list
    stop_token_ids: list
    logprobs: int

    def __post_init__(self):
        if self.temperature == 0 and self.n > 1:
            raise ValueError(f"n must be 1 when using greedy sampling, got {self.n}.")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError("seed must be of 64 bits")


class LLM:
    """Made as fuserl makes it; `made` keeps the arguments of each."""

    made: typing.ClassVar[list] = []
    gives_up = False

    def __init__(self, *, model, load_format, dtype, seed, gpu_memory_utilization, logprobs_mode):
        if load_format != "dummy" or logprobs_mode != "processed_logprobs":
            raise ValueError("the imitation has no more")
        config = transformers.AutoConfig.from_pretrained(model)
        if config.architectures != [f"{type(config).__name__.removesuffix('Config')}ForCausalLM"]:
            raise ValueError(f"Model architectures {config.architectures} are not supported for now.")
        with torch.random.fork_rng():
            torch.manual_seed(99)
            self.model = transformers.AutoModelForCausalLM.from_config(config).eval()
        self.model.load_weights = self._load_weights
        self.tokenizer = tiny_runs.Characters.from_pretrained(model)
        self.made.append(types.SimpleNamespace(dtype=dtype, seed=seed, memory=gpu_memory_utilization, engine=self))
        self.first = {}  # logits behind each prompt: what a cache of prefixes makes of old weights

    def apply_model(self, function):
        """Run a function on the model."""
        return [function(self.model)]

    def reset_prefix_cache(self):
        """Forget what was read."""
        self.first.clear()
        return True

    def generate(self, prompts, sampling_params, *, use_tqdm):
        """A request's output per prompt."""
        if torch.is_autocast_enabled("cpu"):
            raise ValueError("the weights have their dtype")
        return [
            types.SimpleNamespace(
                outputs=[self._complete(prompt["prompt_token_ids"], settings, i) for i in range(settings.n)]
            )
            for prompt, settings in zip(prompts, sampling_params, strict=True)
        ]

    def _load_weights(self, weights):
        state = self.model.state_dict()
        with torch.no_grad():
            for name, tensor in weights:
                if state[name].shape != tensor.shape:
                    raise ValueError(f"{name} must have the shape {state[name].shape}")
                state[name].copy_(tensor)

    @torch.no_grad()
    def _complete(self, prompt, settings, index):
        random = torch.Generator().manual_seed(settings.seed + index)
        tokens, logprobs, finish = [], [], None
        while finish is None:
            logits = self.first.get(tuple(prompt)) if not tokens else None
            if logits is None:
                logits = self.model(torch.tensor([prompt + tokens])).logits[0, -1].float()
            if not tokens:
                self.first[tuple(prompt)] = logits
            chances = _processed(logits, settings)
            drawn = int(
                chances.argmax() if settings.temperature == 0 else torch.multinomial(chances, 1, generator=random)
            )
            tokens.append(drawn)
            logprobs.append({drawn: types.SimpleNamespace(logprob=float(chances[drawn].log()), rank=1)})
            if drawn in settings.stop_token_ids or any(text in self.tokenizer.decode(tokens) for text in settings.stop):
                finish = "stop"
            elif len(tokens) == settings.max_tokens:
                finish = "length"
        finish = "abort" if self.gives_up else finish
        return types.SimpleNamespace(index=index, token_ids=tokens, logprobs=logprobs, finish_reason=finish)


def _processed(logits, settings):
    """The distribution drawn from."""
    chances = (logits / (settings.temperature or 1.0)).softmax(-1)
    if settings.top_k:
        chances = chances.where(chances >= chances.topk(settings.top_k).values[-1], 0.0)
    if settings.min_p:
        chances = chances.where(chances >= settings.min_p * chances.max(), 0.0)
    return chances / chances.sum()
