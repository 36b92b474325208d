"""Reward models: a frozen classifier of one label that scores completions, as `fuserl export` writes them.

score = reward_models.configured(config)  # --reward-model FOLDER, or a run of the recipe reward_model
scores = score(prompt, completions)
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from fuserl.engine import checkpoint, export, judges, learners, lookup, models, rewards, state
from fuserl.engine.answerers import Rule, waited
from fuserl.engine.config import Config
from fuserl.engine.endpoint import Endpoint

_KIND = "AutoModelForSequenceClassification"


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
    def __call__(self, prompt: str, completions: Sequence[str], **_) -> Tensor:
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
        text = f"{_seam(prompt, completion)}{completion}{self.end or ''}"
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
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


class ServedRewardModel:
    """Scores completions with a reward model at a server, by the last number of `/pooling`'s reply (as vLLM's).

    The number is what the server makes of it: vLLM puts a sigmoid on a classifier's score unless it is told not to.

    Args:
        endpoint: the server and its model.
        end: text behind every completion.
    """

    def __init__(self, endpoint: Endpoint, *, end: str = ""):
        self.endpoint, self.end = endpoint, end

    def __call__(self, prompt: str, completions: Sequence[str], **_) -> Tensor:
        """The scores of completions of one prompt, (n,) float32; arguments as for `RewardModel`.

        Raises:
            RuntimeError: as `Endpoint.answer`.
        """
        texts = [f"{prompt}{_seam(prompt, completion)}{completion}{self.end}" for completion in completions]
        return torch.tensor(waited(self._all(texts)), dtype=torch.float32)

    async def _all(self, texts: list[str]) -> list[float]:
        asked = ({"model": self.endpoint.model, "input": text} for text in texts)
        return await asyncio.gather(*(self.endpoint.ask("/pooling", body, _last) for body in asked))


class RuledRewardModel:
    """Scores completions with a rule, between 0 and 1.

    Args:
        rule: of single completions.
    """

    def __init__(self, rule: Rule):
        self.rule = rule

    def __call__(
        self, prompt: str, completions: Sequence[str], *, answer: str | None = None, metadata: dict | None = None
    ) -> Tensor:
        """The scores of completions of one prompt, (n,) float32.

        Args:
            prompt, completions: as for `RewardModel`.
            answer, metadata: the problem's own, where it has them.

        Raises:
            RuntimeError: as `Rule`.
        """
        known = {"prompt": prompt, "answer": answer, "metadata": metadata or {}, "finish": "stop"}
        return torch.tensor(waited(self._all([{**known, "completion": each} for each in completions])))

    async def _all(self, asked: list[dict]) -> list[float]:
        return await asyncio.gather(*map(self.rule, asked))


def configured(config) -> Callable[..., Tensor]:
    """The reward model of a resolved configuration: what `--reward-model` names, which is loaded now.

    Without it, the run's own reward as a rule.

    Raises:
        ValueError: there is no classifier of one label in the folder, or it is the run of another recipe; a server
            without a model.
    """
    name, end = config.reward_model, config.stop[0] if config.stop else None
    if name is None:
        return RuledRewardModel(judges.ruled(config, rewards.configured(config)))
    if name.startswith(("http://", "https://")):
        return ServedRewardModel(judges.endpoint(config, "reward_model", name, "reward_model_name"), end=end or "")
    if ":" in name and not Path(name).is_dir():
        return RuledRewardModel(judges.ruled(config, lookup.function(name)))
    dtype = getattr(torch, config.dtype)
    if (Path(name) / "metrics.jsonl").is_file():
        model, tokenizer = _of_run(name, config.device, dtype)
    else:
        model, tokenizer = models.frozen(name, _KIND, config.device, dtype)
    return RewardModel(model, tokenizer, end=end, tokens=config.micro_tokens)


def _of_run(run: str, device: str, dtype: torch.dtype) -> tuple:
    """The newest checkpoint of a run as the classifier that an export of it is, and its tokenizer."""
    settings = Config.read(Path(run) / "config.json").replace(device=device, shard="none").resolved()
    if settings.recipe != "reward_model":
        raise ValueError(
            f"reward_model: a run must have trained a reward model; {run} is one of {settings.recipe}. Name a run of "
            "the recipe reward_model, or a classifier's folder."
        )
    found = checkpoint.newest(Path(run))
    if found is None:
        raise ValueError(
            f"reward_model: the run must have a checkpoint; {run} has none yet. Wait for --save-every steps."
        )
    policy = learners.policy_of(settings, value=True)
    state.copy(policy.parameters(), found.tensors("policy"), f"{found.path.name} of {run}")
    with tempfile.TemporaryDirectory() as scratch:
        export.write(policy.model, policy.tokenizer, Path(scratch) / "model", dtype=dtype, score=policy.value)
        return models.frozen(f"{scratch}/model", _KIND, device, dtype)


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


def _seam(prompt: str, completion: str) -> str:
    return "" if prompt[-1:].isspace() or completion[:1].isspace() else " "


def _last(reply: dict) -> float:
    """The score in a reply: its one number, or that of the last token where each has one."""
    found = reply["data"][0]["data"]
    while isinstance(found, list):
        found = found[-1]
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise TypeError("data")
    return float(found)
