"""How a policy samples and how it is updated."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn; temperature 0 is greedy."""

    max_new_tokens: int = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    kv_gb: float | None = None  # 1e9 bytes of keys and values at most; None is what fits


@dataclass(frozen=True)
class Updating:
    """How a batch becomes optimizer steps."""

    lr: float = 1e-5
    schedule: str = "constant"
    warmup: int = 0  # optimizer steps
    total: int = 1  # optimizer steps of the whole run
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    epochs: int = 1
    minibatches: int = 1
    micro_tokens: int = 1024  # packed tokens of one forward and backward
    chunk: int | None = None  # rows of linear_policy_loss
