"""Where a policy's completions come from: the model under training, a copy of its weights, or vLLM.

Each has `generate(prompts, **sampling) -> Rollouts`, with the arguments of `generation.generate`, and `apart`: whether
it has weights of its own. One that has also has `sync()`, after which completions come from the policy's weights as
they are. Nobody who draws or trains knows which one it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import nn

from fuserl.engine import adapters, generation, lookup, ranks, second_models
from fuserl.engine.batch import Rollouts
from fuserl.engine.beams import Beams, search
from fuserl.engine.config import Config
from fuserl.engine.prompts import Prompt
from fuserl.engine.recipe import Recipe


class Own:
    """The embedded engine on the model under training.

    Args:
        model: a transformers causal language model, or peft's LoRA around one.
        tokenizer: its tokenizer.
    """

    apart = False

    def __init__(self, model: nn.Module, tokenizer):
        self.model, self.tokenizer = model, tokenizer

    def generate(
        self, prompts: Sequence[Prompt], *, beams: Beams | None = None, reference=None, **sampling
    ) -> Rollouts:
        """Completions of `prompts`, as `generation.generate` draws them; or, given beams, as `beams.search` finds them.

        What else says how to draw does not matter to a search.
        """
        model = adapters.base(self.model)
        if beams is None:
            return generation.generate(model, self.tokenizer, prompts, **sampling)
        kept = {name: sampling[name] for name in ("group_size", "max_new_tokens", "stop", "kv_gb") if name in sampling}
        return search(model, self.tokenizer, prompts, beams, reference=reference, **kept)


class Behind:
    """The embedded engine on a copy of the weights, which stays as it was at the last `sync` while the model learns.

    Memory: what is trained, once more; what is frozen is shared. On a GPU it draws in a stream of its own.

    Args:
        model: a transformers causal language model, or peft's LoRA around one.
        tokenizer: its tokenizer.
    """

    apart = True

    def __init__(self, model: nn.Module, tokenizer):
        self.tokenizer, self._trained = tokenizer, adapters.trained(model)
        self._copy = second_models.twin(model)
        self._copied = adapters.trained(self._copy)
        device = next(self._copy.parameters()).device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def generate(self, prompts: Sequence[Prompt], **sampling) -> Rollouts:
        """Completions of `prompts` from the copy, as `generation.generate` draws them."""
        with contextlib.ExitStack() as stack:
            if self._stream is not None:
                self._stream.wait_stream(torch.cuda.default_stream(self._stream.device))
                stack.enter_context(torch.cuda.stream(self._stream))
            return generation.generate(self._copy, self.tokenizer, prompts, **sampling)

    @torch.no_grad()
    def sync(self) -> None:
        """Copy what is trained, in place."""
        for name, parameter in self._trained.items():
            self._copied[name].copy_(parameter)


def check(config: Config, recipe: Recipe) -> None:
    """Refuse what cannot be done with the recipe, or in this process, before anything is loaded.

    Raises:
        ValueError: nothing is drawn that could come from elsewhere, or ahead; the run has several ranks; or its GPU is
            not the one that vLLM would take.
        RuntimeError: vLLM is not installed.
    """
    wanted = {"overlap": config.overlap, "rollout": config.rollout != "embedded"}
    for name in (name for name, given in wanted.items() if given):
        if recipe.learns_from:
            raise ValueError(
                f"{name}: the recipe must draw completions; {config.recipe} learns from given ones. Leave it out."
            )
        if ranks.world() > 1:
            raise ValueError(f"{name}: the run must have one rank; it has {ranks.world()}. Leave it out.")
    if wanted["rollout"]:
        if config.device not in ("cpu", "cuda", "cuda:0"):
            raise ValueError(
                f"rollout: vLLM takes the first GPU that the process sees, so device must be it; got {config.device}. "
                "Choose the GPU with CUDA_VISIBLE_DEVICES."
            )
        lookup.package("vllm", "vllm")


def of(config: Config, model: nn.Module, tokenizer) -> Own | Behind:
    """The source that a resolved configuration asks for."""
    if config.rollout == "vllm":
        from fuserl.engine.vllm import Vllm

        return Vllm(config, model, tokenizer)
    return (Behind if config.overlap else Own)(model, tokenizer)
