"""Reward models: a frozen classifier of one label that scores completions, as `fuserl export` writes them.

score = reward_models.configured(config)  # --reward-model FOLDER
scores = score(prompt, completions)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from fuserl.engine import models


class RewardModel:
    """Scores completions with a sequence classifier of one label, which is never trained.

    It reads prompt and completion as the recipe reward_model does: a space between the two where neither has one, and
    `end` behind them. The score is that of the last token, whatever the classifier's padding token.

    Args:
        model: of transformers, with one label.
        tokenizer: its tokenizer.
        end: text behind every completion; None is the tokenizer's end of text.
        tokens: padding included, that one forward reads; a longer text is read alone.

    Raises:
        ValueError: the model has more labels.
    """

    def __init__(self, model: nn.Module, tokenizer, *, end: str | None = None, tokens: int = 16384):
        labels = model.config.num_labels
        if labels != 1:
            raise ValueError(
                f"reward_model: the classifier must have one label, a score; it has {labels}. Take a reward model."
            )
        self.model, self.tokenizer, self.end, self.tokens = model, tokenizer, end, tokens

    @torch.no_grad()
    def __call__(self, prompt: str, completions: Sequence[str]) -> Tensor:
        """The scores of completions of one prompt, (n,) float32 on the host; higher is better.

        Args:
            prompt: the text that the policy read.
            completions: n texts.
        """
        before = self.tokenizer(prompt).input_ids
        texts = [torch.tensor([*before, *self._ids(prompt, completion)]) for completion in completions]
        scores = torch.zeros(len(texts))
        for rows in batches([len(text) for text in texts], self.tokens):
            scores[rows] = self._scored([texts[row] for row in rows]).float().cpu()
        return scores

    def _ids(self, prompt: str, completion: str) -> list[int]:
        seam = "" if prompt[-1:].isspace() or completion[:1].isspace() else " "
        ids = self.tokenizer(f"{seam}{completion}{self.end or ''}", add_special_tokens=False).input_ids
        return ids if self.end is not None else [*ids, self.tokenizer.eos_token_id]

    def _scored(self, texts: list[Tensor]) -> Tensor:
        inputs = padded(texts, self.model.device)
        head = getattr(self.model, "score", None)
        if head is None:
            return self.model(**inputs).logits[:, 0]
        # Its own forward would look for the last token that is no padding, and where the end of text pads take another.
        hidden = self.model.base_model(**inputs, use_cache=False).last_hidden_state
        last = inputs["attention_mask"].sum(1) - 1
        return head(hidden[torch.arange(len(texts), device=last.device), last])[:, 0]


def configured(config) -> RewardModel | None:
    """The reward model of a resolved configuration, None where none is named; it is loaded now.

    Raises:
        ValueError: there is no classifier of one label in the folder, or it is a run's.
    """
    name = config.reward_model
    if name is None:
        return None
    if (Path(name) / "metrics.jsonl").is_file():
        raise ValueError(
            f"reward_model: it must be a model's folder; {name} is a run's. Use fuserl export {name} --out NEW."
        )
    dtype = getattr(torch, config.dtype)
    model, tokenizer = models.frozen(name, "AutoModelForSequenceClassification", config.device, dtype)
    return RewardModel(model, tokenizer, end=config.stop[0] if config.stop else None, tokens=config.micro_tokens)


def batches(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Numbers of texts to read in one forward: the shortest first, `tokens` at most with padding, at least one text."""
    found: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if not found or lengths[row] * (len(found[-1]) + 1) > tokens:
            found.append([])
        found[-1].append(row)
    return found


def padded(texts: Sequence[Tensor], device) -> dict[str, Tensor]:
    """Token ids (T_i,) of texts, one a row and zeros behind them, with the mask of what is no padding."""
    mask = [torch.ones_like(text) for text in texts]
    return {
        "input_ids": pad_sequence(list(texts), batch_first=True).to(device),
        "attention_mask": pad_sequence(mask, batch_first=True).to(device),
    }
