"""Embedders: texts as unit vectors, by hashing, by a language model on this machine, or by a server.

embed = embedders.configured(config)  # what --embedder names; without it hashing
vectors = embed(texts)  # (n, D) float32, their products are cosines
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from fuserl.engine import judges, models
from fuserl.engine.answerers import waited
from fuserl.engine.endpoint import Endpoint
from fuserl.engine.reward_models import batches, padded

_ENDLESS = 2**31


class Hashing:
    """Counts of words and of runs of three letters, hashed into `size` signed buckets: similar letters, near vectors.

    It needs no model and gives the same everywhere; meaning it knows nothing of.

    Args:
        size: D.
    """

    def __init__(self, size: int = 256):
        if size < 1:
            raise ValueError(f"embedder: size must be at least 1; got {size}. 256 is usual.")
        self.size = size

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(n, D) float32 rows of norm 1."""
        vectors = torch.zeros(len(texts), self.size)
        for row, text in enumerate(texts):
            words = [f" {word} " for word in text.lower().split()]
            runs = [word[at : at + 3] for word in words for at in range(len(word) - 2)]
            for feature in [*words, *runs]:
                code = zlib.crc32(feature.encode(errors="replace"))
                vectors[row, (code >> 1) % self.size] += 1.0 - 2.0 * (code & 1)
            if not vectors[row].any():  # no word at all, or all of them cancel
                vectors[row, zlib.crc32(text.encode(errors="replace")) % self.size] = 1.0
        return normalize(vectors, dim=1)


class LocalEmbedder:
    """The mean of a frozen model's last hidden states over a text's tokens, at norm 1.

    Args:
        model: a transformers model without a head.
        tokenizer: its tokenizer.
        tokens: padding included, that one forward reads.
    """

    def __init__(self, model: nn.Module, tokenizer, *, tokens: int = 16384):
        self.model, self.tokenizer, self.tokens = model, tokenizer, tokens

    @torch.no_grad()
    def __call__(self, texts: Sequence[str], contexts: Sequence[str] | None = None) -> Tensor:
        """(n, D) float32 rows of norm 1, on the host.

        Args:
            texts: n of them; what a model has no room for is left out at the end.
            contexts: n texts that are read in front of them and not counted; None is nothing.
        """
        before = [[] if text is None else self.tokenizer(text).input_ids for text in contexts or [None] * len(texts)]
        config = self.model.config.get_text_config()
        most = getattr(config, "max_position_embeddings", _ENDLESS)
        read, counted = [], []
        for head, text in zip(before, texts, strict=True):
            own = self.tokenizer(text, add_special_tokens=not head).input_ids or [self.tokenizer.eos_token_id or 0]
            head = head[len(head) - min(len(head), max(most - len(own), 0)) :]
            ids = torch.tensor([*head, *own])[:most]
            read.append(ids)
            counted.append((torch.arange(len(ids)) >= len(head)).to(torch.int64))
        vectors = torch.zeros(len(texts), config.hidden_size)
        for rows in batches([len(ids) for ids in read], self.tokens):
            inputs = padded([read[row] for row in rows], self.model.device)
            hidden = self.model(**inputs).last_hidden_state.float()
            own = nn.utils.rnn.pad_sequence([counted[row] for row in rows], batch_first=True).to(hidden)
            vectors[rows] = ((hidden * own[..., None]).sum(1) / own.sum(1, keepdim=True)).cpu()
        return normalize(vectors, dim=1)


class ServedEmbedder:
    """The embeddings of a server, at norm 1; a text that was embedded once is not asked for again.

    Args:
        endpoint: the server and its model.
    """

    def __init__(self, endpoint: Endpoint):
        self.endpoint = endpoint

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(n, D) float32 rows of norm 1.

        Raises:
            RuntimeError: as `Endpoint.answer`; the vectors have not all one length.
        """
        if not texts:
            return torch.zeros(0, 0)
        vectors = waited(self._all(texts))
        if len({len(each) for each in vectors}) > 1:
            raise RuntimeError(
                f"embedder: all vectors must have one length; {self.endpoint.url} gave "
                f"{sorted({len(each) for each in vectors})}. Empty the cache of another model's answers."
            )
        return normalize(torch.tensor(vectors, dtype=torch.float32).view(len(texts), -1), dim=1)

    async def _all(self, texts: Sequence[str]) -> list[list[float]]:
        return await asyncio.gather(*map(self._one, texts))

    async def _one(self, text: str) -> list[float]:
        return await self.endpoint.ask("embeddings", {"model": self.endpoint.model, "input": text}, _vector)


def configured(config) -> Callable[[Sequence[str]], Tensor]:
    """The embedder of a resolved configuration: what `--embedder` names, else `Hashing`; a model is loaded now.

    Raises:
        ValueError: there is no such thing, or a server without `--embedder-model`.
    """
    name = config.embedder
    if name is None:
        return Hashing()
    if name.startswith(("http://", "https://")):
        return ServedEmbedder(judges.endpoint(config, "embedder", name, "embedder_model"))
    dtype = getattr(torch, config.dtype)
    model, tokenizer = models.frozen(name, "AutoModel", config.device, dtype, spare="pooler.")
    return LocalEmbedder(model, tokenizer, tokens=config.micro_tokens)


def _vector(reply: dict) -> list[float]:
    vector = reply["data"][0]["embedding"]
    if not isinstance(vector, list) or not vector or not all(isinstance(each, int | float) for each in vector):
        raise TypeError("embedding")
    return vector
