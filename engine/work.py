"""What a model's passes come to, counted from its shapes: floating-point operations and bytes of memory.

Forward of n tokens, with r rows of the head, where token i sees k[i] keys in a layer of H heads of D numbers:

    2 W n + sum over layers 4 H D sum_i k[i] + 2 V E r            a multiply and an add are two operations

W are the weights of all products in the layers, adapters among them and of experts those that a token uses; V E is the
head. The backward is 2 W n and 2 V E r for the gradients of what came in, as much again for those of the weights that
are trained, and twice the attention's. Useful work alone counts: no padding, no group that was left out, and no
activation computed a second time.

Generation reads weights once per token of the longest rollout, and for each rollout its own keys and values; those of
a prompt are read once for all its rollouts. That is the least there is to read, whatever the program does.
"""

from __future__ import annotations

import functools
from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fuserl.engine import adapters
from fuserl.engine.batch import Rollouts
from fuserl.kernels.tree_layout import common_prefix


class Work(NamedTuple):
    """Tokens that went through a model, and what that came to; `+` adds each."""

    tokens: int = 0
    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))


class Costs:
    """What passes of one model cost.

    Args:
        model: a transformers causal language model, or peft's LoRA around one, with its frozen parameters frozen.
        dtype: of its products.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        plain = adapters.base(model)
        config, self.size = plain.config.get_text_config(), dtype.itemsize
        experts = getattr(config, "num_experts_per_tok", None) or 0
        self.weights, self.trained = _weights(plain.get_decoder(), experts)
        self.head, self.head_trained = _weights(plain.get_output_embeddings(), 0)
        heads = getattr(config, "num_attention_heads", None) or 0
        each = getattr(config, "head_dim", None) or config.hidden_size // max(heads, 1)
        self.width = heads * each  # of all queries of a token
        self.kept = 2 * each * (getattr(config, "num_key_value_heads", None) or heads)  # of its keys and values
        self.windows = Counter(_windows(config))  # layers by the keys that a token of them sees at most

    def forward(self, position: Tensor, rows: int) -> Work:
        """A pass over tokens at `position` (L,) int64 of their own texts, with the head on `rows` of them."""
        keys = sum(layers * int((position + 1).clamp(max=window).sum()) for window, layers in self.windows.items())
        return Work(len(position), 2.0 * self.weights * len(position) + self._attention(keys) + 2.0 * self.head * rows)

    def update(self, position: Tensor, rows: int) -> Work:
        """A pass as of `forward`, and its backward."""
        there = self.forward(position, rows)
        heads = 2.0 * (self.head + self.head_trained) * rows
        if not self.trained:
            return there._replace(flops=there.flops + heads)
        attention = there.flops - 2.0 * self.weights * len(position) - 2.0 * self.head * rows
        layers = 2.0 * (self.weights + self.trained) * len(position) + 2 * attention
        return there._replace(flops=there.flops + layers + heads)

    def generation(self, rollouts: Rollouts) -> tuple[Work, Work]:
        """Reading the prompts of `rollouts`, what they all begin with once; and drawing their tokens."""
        prompts, lengths = torch.tensor([len(each) for each in rollouts.prompt_tokens]), rollouts.offsets.diff()
        shared = torch.tensor(common_prefix(rollouts.prompt_tokens))
        prompt = prompts[rollouts.group]
        longest = torch.ones_like(prompts).scatter_reduce(0, rollouts.group, lengths, "amax")
        read = drawn = stored = 0
        for window, layers in self.windows.items():
            seen = functools.partial(_seen, window=window)
            read += layers * int(seen(prompts).sum() - (len(prompts) - 1) * seen(shared))
            # A rollout's last token is drawn and never read.
            drawn += layers * int((seen(prompt + lengths - 1) - seen(prompt)).sum())
            of_prompts = seen(prompts + longest - 1) - seen(prompts) - seen(longest - 1)
            stored += layers * int(seen(lengths - 1).sum() + of_prompts.sum())
        tokens = int(prompts.sum() - (len(prompts) - 1) * shared)
        weights, rows = self.size * (self.weights + self.head), len(rollouts.tokens) - len(rollouts)
        reading = 2.0 * self.weights * tokens + self._attention(read) + 2.0 * self.head * len(prompts)
        drawing = 2.0 * (self.weights + self.head) * rows + self._attention(drawn)
        passes = int(longest.max()) - 1
        return (
            Work(tokens, reading, weights + float(self.size * self.kept * tokens * self.windows.total())),
            Work(int(rollouts.trained.sum()), drawing, weights * passes + self.size * self.kept * float(stored)),
        )

    def _attention(self, keys: int) -> float:
        """Operations of queries that see so many keys together: a product with the keys, and one with the values."""
        return 4.0 * self.width * keys


def _weights(module: nn.Module, experts: int) -> tuple[float, float]:
    """How many weights a token is multiplied with, and how many of these are trained; of experts `experts` are used."""
    every = trained = 0.0
    for part in module.modules():
        if isinstance(part, nn.Embedding):
            continue
        for weight in part.parameters(recurse=False):
            if weight.dim() < 2:
                continue
            used = weight.numel() * (experts / len(weight) if weight.dim() == 3 else 1.0)
            every, trained = every + used, trained + used * weight.requires_grad
    return every, trained


def _windows(config) -> list[int]:
    """How many keys a token of each layer sees at most; none in a layer that is no attention."""
    every, window = 2**62, getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if types is None:
        used = window if getattr(config, "use_sliding_window", True) else None
        return [used or every] * config.num_hidden_layers
    seen = {"full_attention": every, "sliding_attention": window or every}
    return [seen.get(each, 0) for each in types]


def _seen(count: Tensor, window: int) -> Tensor:
    """Keys that the first `count` tokens of a text see together: sum over p < count of min(p + 1, window)."""
    near = count.clamp(min=0, max=window)
    return near * (near + 1) // 2 + (count - near).clamp(min=0) * near
