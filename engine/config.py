"""The settings of a run: one frozen dataclass, from which the command line's flags are generated.

A setting left at None is chosen by `Config.resolved()` for the machine and the task at hand; the reason of each such
choice is kept in `reasons`, printed when the run starts, and saved with it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import types
import typing
from dataclasses import dataclass
from pathlib import Path

from fuserl.engine import lookup

DTYPES = ("float32", "bfloat16", "float16")


def _setting(default, section: str, doc: str, *, least=None, above=None, most=None, choices=None):
    """A field with what the command line and the validation need: its section, its doc string, its range."""
    rule = {"least": least, "above": above, "most": most, "choices": choices}
    return dataclasses.field(default=default, metadata={"section": section, "doc": doc, **rule})


_task = functools.partial(_setting, section="what to learn")
_rollout = functools.partial(_setting, section="rollouts")
_update = functools.partial(_setting, section="updates")
_machine = functools.partial(_setting, section="run and machine")


@dataclass(frozen=True)
class Config:
    """Every setting of a run that is not a recipe's own; invalid values raise ValueError when it is made."""

    recipe: str = _task("grpo", doc="the system to train with; `fuserl list` names them")
    model: str | None = _task(None, doc="a transformers folder or hub name; default the built-in SmolLM2-135M-Instruct")
    task: str = _task(
        "reasoning_gym:chain_sum:max_terms=2,max_digits=2",
        doc="a reasoning-gym dataset with options: reasoning_gym:DATASET:option=value,...",
    )
    data: str | None = _task(None, doc="a JSONL file with prompt, answer, ... a line; replaces --task; default none")
    reward: str | None = _task(None, doc="module:function, exact or math_equal; default the task's own verifier")
    partial_credit: bool = _task(False, doc="reward with the verifier's partial score, not with right or wrong")
    few_shot: int | None = _task(None, doc="solved examples in front of every question", least=0)
    chat: bool = _task(False, doc="put questions through the model's chat template")
    eval_problems: int = _task(200, doc="held-out problems, never trained on", least=0)
    eval_every: int = _task(20, doc="steps between evaluations; 0 evaluates before and after only", least=0)

    steps: int = _rollout(40, doc="turns of the loop", least=1)
    groups: int | None = _rollout(None, doc="prompts a step", least=1)
    group_size: int | None = _rollout(None, doc="completions of each prompt", least=1)
    max_new_tokens: int = _rollout(6, doc="tokens after which a completion is cut", least=1)
    stop: tuple[str, ...] | None = _rollout(None, doc="texts that end a completion; write a line break as \\n")
    temperature: float = _rollout(1.0, doc="softmax temperature of sampling", above=0.0)
    top_k: int = _rollout(0, doc="sample among the k likeliest tokens; 0 is all", least=0)
    top_p: float = _rollout(1.0, doc="sample among the likeliest tokens of this total probability", above=0.0, most=1.0)
    min_p: float = _rollout(0.0, doc="sample among tokens this likely relative to the likeliest", least=0.0, most=1.0)

    lr: float = _update(1e-5, doc="learning rate of AdamW", above=0.0)
    weight_decay: float = _update(0.0, doc="weight decay of AdamW", least=0.0)
    max_grad_norm: float = _update(1.0, doc="gradients are scaled down to this norm", above=0.0)
    epochs: int = _update(1, doc="passes over each step's rollouts", least=1)
    minibatches: int = _update(1, doc="optimizer steps a pass", least=1)
    micro_tokens: int | None = _update(None, doc="packed tokens of one forward and backward", least=1)
    chunk: int | None = _update(None, doc="rows of logits that exist at once; default the op's own choice", least=1)
    low: float = _update(0.2, doc="the ratio is clipped below 1 - low", least=0.0, most=1.0)
    high: float = _update(0.2, doc="the ratio is clipped above 1 + high", least=0.0)
    beta: float = _update(0.0, doc="weight of the KL divergence to the initial model", least=0.0)
    entropy_coef: float = _update(0.0, doc="weight of the entropy bonus")

    seed: int = _machine(0, doc="of problems and sampling", least=0, most=2**31 - 1)
    device: str | None = _machine(None, doc="cpu, cuda or cuda:N")
    dtype: str | None = _machine(None, doc="of the forward and backward; weights stay float32", choices=DTYPES)
    threads: int | None = _machine(None, doc="CPU threads", least=1)
    out: str | None = _machine(None, doc="the run's folder; default runs/RECIPE-TIME")
    reasons: dict = dataclasses.field(default_factory=dict, compare=False, repr=False)  # of the automatic choices

    def __post_init__(self):
        for setting in settings():
            object.__setattr__(self, setting.name, _checked(setting, getattr(self, setting.name)))

    def replace(self, **changes) -> Config:
        """A copy with `changes`; an unknown name raises ValueError with the nearest known one."""
        _refuse_unknown(changes)
        return dataclasses.replace(self, **changes)

    def resolved(self) -> Config:
        """A copy in which every automatic setting has its value, and `reasons` says why; resolving twice is as once.

        Raises:
            RuntimeError: a GPU is asked for that torch does not see.
        """
        import torch

        seen = torch.cuda.device_count()
        device = self.device or ("cuda" if seen else "cpu")
        if device != "cpu" and int(device.partition(":")[2] or 0) >= seen:
            raise RuntimeError(f"device: torch must see {device}; it sees {seen} CUDA devices. Use --device cpu.")
        chosen = {
            "device": (device, f"torch sees {torch.cuda.get_device_name(0)}" if seen else "torch sees no GPU"),
            **_by_device(device.partition(":")[0]),
            "threads": (torch.get_num_threads(), "torch's own count for this machine"),
            "few_shot": _few_shot(self),
            "stop": ((), "a chat model ends its own turn") if self.chat else (("\n",), "an answer is one line"),
        }
        chosen = {name: choice for name, choice in chosen.items() if getattr(self, name) is None}
        values = {name: value for name, (value, _) in chosen.items()}
        reasons = {name: reason for name, (_, reason) in chosen.items()}
        return dataclasses.replace(self, **values, reasons={**self.reasons, **reasons})

    def to_dict(self) -> dict:
        """The settings by name, ready for JSON."""
        return {
            setting.name: list(value) if isinstance(value := getattr(self, setting.name), tuple) else value
            for setting in settings()
        }

    @staticmethod
    def from_dict(values: dict) -> Config:
        """The configuration that `to_dict` wrote, or a part of one; an unknown name raises ValueError."""
        _refuse_unknown(values)
        return Config(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})

    @staticmethod
    def read(path: str | Path) -> Config:
        """The configuration in a JSON file, a run's config.json included."""
        try:
            values = json.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"config: {path} must be a JSON file that can be read; it is not ({error}).") from error
        if isinstance(values, dict) and isinstance(values.get("config"), dict):
            values = values["config"]
        if not isinstance(values, dict):
            raise ValueError(f"config: {path} must hold a JSON object of settings; got {type(values).__name__}.")
        return Config.from_dict(values)


@functools.cache
def settings() -> tuple[dataclasses.Field, ...]:
    """The fields that a user can set, in order."""
    return tuple(each for each in dataclasses.fields(Config) if "doc" in each.metadata)


@functools.cache
def kind(name: str) -> tuple[type, bool]:
    """The type of a setting without None (tuple for several texts), and whether None is allowed."""
    hint = typing.get_type_hints(Config)[name]
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    plain = next(option for option in options if option is not type(None))
    return typing.get_origin(plain) or plain, type(None) in options


def _by_device(device: str) -> dict[str, tuple[object, str]]:
    if device == "cuda":
        return {
            "dtype": ("bfloat16", "GPUs multiply it fast"),
            "groups": (64, "a GPU decodes 1024 rollouts at once"),
            "group_size": (16, "a GPU decodes 1024 rollouts at once"),
            "micro_tokens": (32768, "fits beside a small model in GPU memory"),
        }
    return {
        "dtype": ("float32", "CPU cores multiply it fastest"),
        "groups": (16, "a step of 128 rollouts takes seconds on a CPU"),
        "group_size": (8, "a step of 128 rollouts takes seconds on a CPU"),
        "micro_tokens": (4096, "activations of a few GB"),
    }


def _few_shot(config: Config) -> tuple[int, str]:
    if config.data:
        return 0, "the file's prompts are used as they are"
    if config.chat:
        return 0, "a chat model is asked directly"
    return 4, "examples show the form of an answer"


def _refuse_unknown(names) -> None:
    known = [setting.name for setting in settings()]
    for name in names:
        if name not in known:
            raise ValueError(f"config: every name must be a setting; got {name!r}. {lookup.nearest(name, known)}")


def _checked(setting: dataclasses.Field, value: object) -> object:
    """The value in the setting's type, or ValueError with the contract that it breaks."""
    wanted, optional = kind(setting.name)
    if value is None and optional:
        return value
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    fits = type(value) is wanted and (wanted is not tuple or all(isinstance(each, str) for each in value))
    rule = setting.metadata
    if fits and wanted in (int, float):
        fits = (
            math.isfinite(value)
            and (rule["least"] is None or value >= rule["least"])
            and (rule["above"] is None or value > rule["above"])
            and (rule["most"] is None or value <= rule["most"])
        )
    if fits and rule["choices"]:
        fits = value in rule["choices"]
    if fits and setting.name == "device":
        fits = value == "cpu" or value == "cuda" or (value.startswith("cuda:") and value[5:].isdecimal())
    if fits and wanted is str and not value:
        fits = False
    if not fits:
        raise ValueError(f"config: {setting.name} must be {contract(setting)}; got {value!r}.")
    return value


def contract(setting: dataclasses.Field) -> str:
    """What a value of the setting must be, in words: `an integer >= 1`."""
    rule, wanted = setting.metadata, kind(setting.name)[0]
    if rule["choices"]:
        return f"one of {', '.join(rule['choices'])}"
    if setting.name == "device":
        return "cpu, cuda or cuda:N"
    words = {int: "an integer", float: "a number", bool: "true or false", str: "a text", tuple: "texts"}[wanted]
    limits = [
        f"{sign} {rule[name]}"
        for name, sign in (("above", ">"), ("least", ">="), ("most", "<="))
        if rule[name] is not None
    ]
    return " ".join([words, " and ".join(limits)]).strip()
