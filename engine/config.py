"""The settings of a run: one frozen dataclass, from which the command line's flags are generated.

A recipe's own options (beta, low, ...) come from its signature and stand beside the settings, in files as in flags.

A setting left at None is chosen by `Config.resolved()` for the machine and the task at hand; the reason of each such
choice is kept in `reasons`, printed when the run starts, and saved with it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import tomllib
import types
import typing
from dataclasses import dataclass
from pathlib import Path

from fuserl.engine import catalogue, lookup, wording

DTYPES = ("float32", "bfloat16")
_LARGE = "an integer below 2^31"
WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "a text", tuple: "texts"}


def _setting(default, section: str, doc: str, *, least=None, above=None, most=None, choices=None):
    """A field with what the command line and the validation need: its section, its doc string, its range."""
    rule = {"least": least, "above": above, "most": most, "choices": choices}
    return dataclasses.field(default=default, metadata={"section": section, "doc": doc, **rule})


_task = functools.partial(_setting, section="what to learn")
_rollout = functools.partial(_setting, section="rollouts")
_judge = functools.partial(_setting, section="judges, reward models, embedders")
_update = functools.partial(_setting, section="updates")
_machine = functools.partial(_setting, section="run and machine")


TASK = "reasoning_gym:chain_sum:max_terms=2,max_digits=2"


@dataclass(frozen=True)
class Config:
    """Every setting of a run that is not a recipe's own; invalid values raise ValueError when it is made."""

    recipe: str = _task("grpo", doc="the system to train with; `fuserl list` names them")
    model: str | None = _task(None, doc="a transformers folder or hub name; default the built-in SmolLM2-135M-Instruct")
    task: str | None = _task(
        None,
        doc="reasoning_gym:DATASET:option=value,..., web, grid or symbolic_videos; several are joined by +",
    )
    data: str | None = _task(
        None,
        doc="a JSONL or Parquet file with prompt, answer, chosen, rejected; replaces --task; default none",
    )
    columns: tuple[str, ...] = _task((), doc="columns of the file that are called otherwise: prompt=question ...")
    reward: str | None = _task(None, doc="module:function, exact or math_equal; default the task's own verifier")
    partial_credit: bool = _task(False, doc="reward with the verifier's partial score, not with right or wrong")
    reward_workers: int | None = _task(
        None, doc="processes that run the reward; 0 runs it in this one", least=0, most=1024
    )
    reward_timeout: float = _task(30.0, doc="seconds after which a reward counts as 0 (with workers)", above=0.0)
    few_shot: int | None = _task(None, doc="solved examples in front of every question", least=0)
    chat: bool = _task(False, doc="put questions through the model's chat template")
    system: str | None = _task(None, doc="the system message of chat prompts; default none")
    eval_data: str | None = _task(None, doc="a file of held-out problems; default a part of the data")
    eval_problems: int | None = _task(
        None, doc="held-out problems, never trained on; default 200, or a fifth of a small file, or all of --eval-data",
        least=0,
    )  # fmt: skip
    eval_every: int = _task(20, doc="steps between evaluations; 0 evaluates before and after only", least=0)
    eval_samples: int = _task(0, doc="sampled completions per held-out problem, for pass@k; 0 is greedy only", least=0)

    steps: int = _rollout(40, doc="turns of the loop", least=1)
    groups: int | None = _rollout(None, doc="prompts a step", least=1)
    group_size: int | None = _rollout(None, doc="completions of each prompt", least=1)
    max_new_tokens: int | None = _rollout(None, doc="tokens after which a completion is cut", least=1)
    stop: tuple[str, ...] | None = _rollout(None, doc="texts that end a completion; write a line break as \\n")
    temperature: float = _rollout(1.0, doc="softmax temperature of sampling", above=0.0)
    top_k: int = _rollout(0, doc="sample among the k likeliest tokens; 0 is all", least=0)
    top_p: float = _rollout(1.0, doc="sample among the likeliest tokens of this total probability", above=0.0, most=1.0)
    min_p: float = _rollout(0.0, doc="sample among tokens this likely relative to the likeliest", least=0.0, most=1.0)
    kv_gb: float | None = _rollout(None, doc="gigabytes of keys and values at most; default what fits", above=0.0)

    rollout: str = _rollout(
        "embedded", doc="the engine that completes prompts: embedded, or vllm (untested on a GPU)",
        choices=("embedded", "vllm"),
    )  # fmt: skip
    vllm_memory: float = _rollout(0.3, doc="share of the GPU's memory that vLLM takes", above=0.0, most=1.0)
    overlap: bool = _rollout(
        False,
        doc="draw the next step's completions while a step's update runs, from a copy of the weights one step old",
    )

    judge: str | None = _judge(
        None, doc="http(s)://HOST[:PORT]/v1 of an OpenAI-compatible server, a transformers folder or hub name, or a"
        " module:function of messages, or of what a reward sees; default the run's own reward",
    )  # fmt: skip
    judge_model: str | None = _judge(None, doc="the model's name at the server; default none")
    judge_tokens: int = _judge(1024, doc="tokens of a judge's answer at most, its thoughts included", least=1)
    judge_timeout: float = _judge(60.0, doc="seconds that a server has for one try to answer", above=0.0)
    judge_concurrency: int = _judge(16, doc="questions to a server under way at once", least=1, most=1024)
    judge_cache: str | None = _judge(
        None, doc="a folder for a server's answers, asked for once over all runs; default memory only"
    )
    reward_model: str | None = _judge(
        None, doc="a classifier of one label as fuserl export writes it, a run of reward_model, http(s)://HOST[:PORT]"
        " of a server that has /pooling, or a module:function of what a reward sees; default the run's own reward",
    )  # fmt: skip
    reward_model_name: str | None = _judge(None, doc="the reward model's name at the server; default none")
    embedder: str | None = _judge(
        None,
        doc="http(s)://HOST[:PORT]/v1 with --embedder-model, or a transformers folder or hub name; default letters",
    )
    embedder_model: str | None = _judge(None, doc="the embedding model's name at the server; default none")

    lr: float | None = _update(None, doc="learning rate of AdamW", above=0.0)
    schedule: str = _update("constant", doc="of the learning rate", choices=("constant", "linear", "cosine"))
    warmup: int = _update(0, doc="optimizer steps over which the learning rate rises from 0", least=0)
    weight_decay: float = _update(0.0, doc="weight decay of AdamW, on matrices", least=0.0)
    max_grad_norm: float = _update(1.0, doc="gradients are scaled down to this norm", above=0.0)
    max_skipped: int = _update(5, doc="steps in a row with non-finite gradients before the run stops", least=0)
    epochs: int | None = _update(None, doc="passes over each step's rollouts", least=1)
    minibatches: int | None = _update(None, doc="optimizer steps a pass", least=1)
    micro_tokens: int | None = _update(
        None,
        doc="packed tokens of one forward and backward; gradients accumulate over a step",
        least=1,
    )
    chunk: int | None = _update(None, doc="rows of logits that exist at once; default the op's own choice", least=1)
    checkpoint_activations: bool = _update(False, doc="recompute activations in the backward, to save memory")
    reference: str | None = _update(None, doc="the model that KL terms refer to; default the model as it starts")
    teacher: str | None = _update(None, doc="the model that a recipe distils from; default as the recipe says")
    offload: bool = _update(False, doc="keep reference and teacher in the host's memory while they are not read")
    shard: str = _update(
        "none", doc="with several ranks: none copies the weights to each, full cuts them over all (FSDP2)",
        choices=("none", "full"),
    )  # fmt: skip
    importance: str | None = _update(
        None, doc="weights of tokens that other weights, or another engine, drew: truncate holds them to"
        " --importance-bound, mask drops tokens beyond it or below its inverse",
        choices=("none", "truncate", "mask"),
    )  # fmt: skip
    importance_bound: float = _update(2.0, doc="largest importance weight of a token", least=1.0)
    freeze: tuple[str, ...] = _update((), doc="parameters to leave as they are, by name: model.embed_tokens.* ...")
    lora_rank: int = _update(0, doc="train low-rank adapters of this rank instead of the weights; 0 is none", least=0)
    lora_alpha: float = _update(32.0, doc="the adapters' products are scaled by alpha / rank", above=0.0)
    lora_dropout: float = _update(0.0, doc="dropout in front of the adapters", least=0.0, most=1.0)
    lora_targets: tuple[str, ...] = _update(("all-linear",), doc="modules with adapters, by name; lm_head is the head")

    seed: int = _machine(0, doc="of problems and sampling", least=0, most=2**31 - 1)
    device: str | None = _machine(None, doc="cpu, cuda or cuda:N")
    dtype: str | None = _machine(None, doc="of the forward and backward; weights stay float32", choices=DTYPES)
    threads: int | None = _machine(None, doc="CPU threads", least=1, most=1024)
    save_every: int = _machine(20, doc="steps between checkpoints; 0 is one at the end", least=0)
    keep: int = _machine(2, doc="newest checkpoints that are kept", least=1)
    samples: int = _machine(4, doc="completions of a step that are written to samples.jsonl", least=0)
    trackers: tuple[str, ...] = _machine((), doc="tensorboard, wandb, or both")
    profile: tuple[str, ...] | None = _machine(
        None, doc="steps to write a Chrome trace of into the run's folder; without a number the second; default none"
    )
    out: str | None = _machine(None, doc="the run's folder; default runs/RECIPE-TIME")
    options: dict = dataclasses.field(default_factory=dict)  # of the recipe, as its signature declares them
    reasons: dict = dataclasses.field(default_factory=dict, compare=False, repr=False)  # of the automatic choices

    def __post_init__(self):
        for setting in settings():
            object.__setattr__(self, setting.name, _checked(setting, getattr(self, setting.name)))
        object.__setattr__(self, "options", _checked_options(catalogue.known(self.recipe), self.options))

    def replace(self, **changes) -> Config:
        """A copy with `changes` to settings and to the recipe's options; an unknown name raises ValueError."""
        own, options = _sorted_out(changes)
        return dataclasses.replace(self, **own, options={**self.options, **options})

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
        usual = {name: (value, f"as {self.recipe} is run") for name, value in catalogue.defaults(self.recipe).items()}
        if self.data:
            usual.pop("task", None)
        chosen = {
            "device": (device, f"torch sees {torch.cuda.get_device_name(0)}" if seen else "torch sees no GPU"),
            **_by_device(device.partition(":")[0]),
            "lr": (1e-5, "raises the reward of small models without collapse"),
            "epochs": (1, "on-policy: every rollout is used once"),
            "minibatches": (1, "on-policy: every rollout is used once"),
            "importance": _importance(self),
            "threads": (torch.get_num_threads(), "torch's own count for this machine"),
            "reward_workers": (min(os.cpu_count() or 1, 8), "a verifier may hang on what a model writes"),
            "few_shot": _few_shot(self),
            **({} if self.data else {"task": (TASK, "a small model can learn it")}),
            "max_new_tokens": (6, "an answer is a few tokens"),
            "stop": ((), "a chat model ends its own turn") if _converses(self) else (("\n",), "an answer is one line"),
            **usual,
        }
        for name, value in catalogue.fixed(self.recipe).items():
            if getattr(self, name) not in (None, value):
                raise ValueError(
                    f"config: {name} must be {value} for {self.recipe}; got {getattr(self, name)}. Leave it out."
                )
        chosen = {name: choice for name, choice in chosen.items() if getattr(self, name) is None}
        values = {name: value for name, (value, _) in chosen.items()}
        reasons = {name: reason for name, (_, reason) in chosen.items()}
        options = {name: option.default for name, option in catalogue.options(self.recipe).items()} | self.options
        return dataclasses.replace(self, **values, options=options, reasons={**self.reasons, **reasons})

    def to_dict(self) -> dict:
        """The settings and the recipe's options by name, ready for JSON."""
        values = {setting.name: getattr(self, setting.name) for setting in settings()}
        listed = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        return {**listed, **self.options}

    @staticmethod
    def from_dict(values: dict) -> Config:
        """The configuration that `to_dict` wrote, or a part of one; an unknown name raises ValueError."""
        own, options = _sorted_out(values)
        return Config(**own, options=options)

    @staticmethod
    def read(path: str | Path) -> Config:
        """The configuration in a TOML or JSON file, a run's config.json included."""
        path = Path(path)
        try:
            values = (tomllib.loads if path.suffix == ".toml" else json.loads)(path.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(
                f"config: {path} must be a TOML or JSON file that can be read; it is not ({error})."
            ) from error
        if isinstance(values, dict) and isinstance(values.get("config"), dict):
            values = values["config"]
        if not isinstance(values, dict):
            raise ValueError(f"config: {path} must hold settings by name; got {type(values).__name__}.")
        if "model_type" in values:
            raise ValueError(f"config: {path} must hold settings; it describes a model. Name a run, or give --model.")
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
        "micro_tokens": (1024, "as fast as more, in less memory"),
    }


def _importance(config: Config) -> tuple[str, str]:
    if config.overlap:
        return "truncate", "rollouts are one step old"
    if config.rollout != "embedded":
        return "truncate", "its log-probs are not quite those of the model that learns"
    return "none", "the model that learns draws its rollouts"


def _few_shot(config: Config) -> tuple[int, str]:
    if config.data:
        return 0, "the file's prompts are used as they are"
    if config.chat:
        return 0, "a chat model is asked directly"
    return 4, "examples show the form of an answer"


def _converses(config: Config) -> bool:
    """Whether the model reads conversations: it is asked to, or the data holds messages."""
    if config.chat or not config.data or config.stop is not None:
        return config.chat
    from fuserl.engine import prompts

    shots = _few_shot(config)[0] if config.few_shot is None else config.few_shot
    return prompts.configured(dataclasses.replace(config, few_shot=shots)).source.conversational


def _sorted_out(values: dict) -> tuple[dict, dict]:
    """The settings, and what must be options of the recipe."""
    known = {setting.name for setting in settings()}
    own = {name: value for name, value in values.items() if name in known}
    return own, {name: value for name, value in values.items() if name not in known}


def _checked_options(recipe: str, values: dict) -> dict:
    if not values:
        return values
    options, checked = catalogue.options(recipe), {}
    for name, value in values.items():
        if name not in options:
            known = [*options, *(setting.name for setting in settings())]
            raise ValueError(
                f"config: every name must be a setting or an option of {recipe}; got {name!r}. "
                f"{catalogue.owners(name) or lookup.nearest(name, known)}"
            )
        option = options[name]
        checked[name] = _number(value, option.type)
        fits = (value is None and option.optional) or type(checked[name]) is option.type
        if not fits or (isinstance(value, float) and math.isnan(value)) or _too_large(checked[name]):
            words = _LARGE if _too_large(checked[name]) else WORDS[option.type]
            raise ValueError(f"config: {name} must be {words}; got {value!r}.")
    return checked


def _number(value: object, wanted: type) -> object:
    """Where a number is wanted, an integer, or a float of NumPy, as that number."""
    if wanted is not float or not isinstance(value, int | float) or isinstance(value, bool):
        return value
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _checked(setting: dataclasses.Field, value: object) -> object:
    """The value in the setting's type, or ValueError with the contract that it breaks."""
    wanted, optional = kind(setting.name)
    if value is None and optional:
        return value
    value = tuple(value) if wanted is tuple and isinstance(value, list) else _number(value, wanted)
    fits = type(value) is wanted and (wanted is not tuple or all(isinstance(each, str) and each for each in value))
    texts = value if fits and wanted is tuple else (value,) if fits and wanted is str else ()
    fits = fits and all(map(wording.encodable, texts))
    rule = setting.metadata
    if fits and wanted in (int, float) and not _too_large(value):
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
    if not fits or (wanted is int and _too_large(value)):
        words = _LARGE if fits else contract(setting)
        raise ValueError(f"config: {setting.name} must be {words}; got {value!r}.")
    return value


def _too_large(value: object) -> bool:
    """Whether a count is one that no machine can hold, and that arithmetic on it would stumble over."""
    return isinstance(value, int) and abs(value) >= 2**31


def contract(setting: dataclasses.Field) -> str:
    """What a value of the setting must be, in words: `an integer >= 1`."""
    rule, wanted = setting.metadata, kind(setting.name)[0]
    if rule["choices"]:
        return f"one of {', '.join(rule['choices'])}"
    if setting.name == "device":
        return "cpu, cuda or cuda:N"
    words = WORDS[wanted]
    limits = [
        f"{sign} {rule[name]}"
        for name, sign in (("above", ">"), ("least", ">="), ("most", "<="))
        if rule[name] is not None
    ]
    return " ".join([words, " and ".join(limits)]).strip()
