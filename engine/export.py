"""A trained model as a folder that transformers, and all that reads its folders, loads."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from fuserl.engine import adapters, atomic, models


def write(
    model: nn.Module, tokenizer, folder: str | Path, *, dtype: torch.dtype | None = None, score: nn.Linear | None = None
) -> Path:
    """Write config, weights (safetensors), generation settings and tokenizer; the folder is there whole or not at all.

    Adapters are folded in, so the folder needs no peft. A critic's value head is no part of a language model and is not
    written; with `score` the model is written as a sequence classifier of one label, as reward models are.

    Args:
        model: a transformers model or a PeftModel; it stays as it is.
        tokenizer: its tokenizer, or None to write none.
        folder: does not exist yet, or is empty.
        dtype: of the weights written; None is the model's own.
        score: a reward model's head, (D -> 1) without bias, which takes the language model head's place.

    Returns:
        The folder, absolute.

    Raises:
        ValueError: `folder` holds something.
        RuntimeError: it cannot be written: a full disk, no permission.
    """
    from safetensors import SafetensorError

    folder = require_new(folder)
    plain = adapters.base(model)
    if adapters.present(model) or dtype not in (None, plain.dtype):
        plain = adapters.merged(model).to(dtype or plain.dtype)
    if score is not None:
        plain = _classifier(plain, score, tokenizer)
    try:
        with atomic.draft_folder(folder.parent, folder.name) as draft, models.no_progress_bars():
            with _any_generation_settings(plain, draft):
                plain.save_pretrained(draft)
            if tokenizer is not None:
                tokenizer.save_pretrained(draft)
            for path in draft.rglob("*.safetensors"):
                # safetensors writes files that only their owner can read; a server may run as somebody else.
                path.chmod((draft / "config.json").stat().st_mode)
            atomic.publish_folder(draft, folder)
    except (OSError, SafetensorError) as error:
        raise RuntimeError(f"write: cannot write {folder} ({error}). Make room, or choose another folder") from error
    return folder


def require_new(folder: str | Path) -> Path:
    """The folder's absolute path; ValueError where there is something in it already."""
    folder = Path(folder).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"write: folder must not exist yet or be empty; got {str(folder)!r}. Choose another name")
    return folder


def _classifier(plain: nn.Module, score: nn.Linear, tokenizer) -> nn.Module:
    """The trunk of a language model under a score head, as transformers' classifier of its family."""
    from transformers import AutoModelForSequenceClassification

    config = copy.deepcopy(plain.config)
    config.num_labels = 1
    if config.pad_token_id is None:  # the classifier scores the last token that is no padding
        config.pad_token_id = getattr(tokenizer, "pad_token_id", None) or getattr(tokenizer, "eos_token_id", None)
    try:
        with torch.device("meta"):
            made = AutoModelForSequenceClassification.from_config(config)
    except ValueError as error:
        raise ValueError(
            f"write: transformers must have a sequence classifier for {type(plain).__name__}; it has none. Train the "
            "reward model on another family of models."
        ) from error
    state = {f"{made.base_model_prefix}.{name}": value for name, value in plain.base_model.state_dict().items()}
    state["score.weight"] = score.weight.detach().to("cpu", plain.dtype)
    made.load_state_dict(state, assign=True)
    return made


@contextlib.contextmanager
def _any_generation_settings(model: nn.Module, draft: Path) -> Iterator[None]:
    """Lets a model be saved whose generation settings came from elsewhere and contradict themselves.

    Published models have such (a temperature beside greedy search); transformers loads them and may refuse to save
    them, which would cost a trained model its export.
    """
    settings = getattr(model, "generation_config", None)
    if settings is None:
        yield
        return
    model.generation_config = type(settings)()
    try:
        yield
    finally:
        model.generation_config = settings
    settings.to_json_file(draft / "generation_config.json", use_diff=True)
