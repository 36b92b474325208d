"""Command-line flags from the settings of a run and the options of a recipe, with errors that name the nearest flag."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from fuserl.engine import catalogue, lookup, wording
from fuserl.engine.config import WORDS, contract, kind, settings

# What other trainers call it.
SYNONYMS = {
    "adam-lr": "lr", "learning-rate": "lr", "lr-scheduler-type": "schedule", "lr-scheduler": "schedule",
    "warmup-steps": "warmup", "max-steps": "steps", "num-train-steps": "steps", "total-steps": "steps",
    "num-generations": "group-size", "n-samples-per-prompt": "group-size", "rollout-n": "group-size",
    "per-device-train-batch-size": "groups", "train-batch-size": "groups", "batch-size": "groups",
    "rollout-batch-size": "groups", "gradient-accumulation-steps": "micro-tokens", "micro-batch-size": "micro-tokens",
    "num-iterations": "epochs", "num-ppo-epochs": "epochs", "ppo-epochs": "epochs", "num-train-epochs": "steps",
    "num-mini-batches": "minibatches", "steps-per-generation": "minibatches", "ppo-mini-batch-size": "minibatches",
    "max-completion-length": "max-new-tokens", "max-response-length": "max-new-tokens", "max-tokens": "max-new-tokens",
    "output-dir": "out", "output": "out", "resume-from-checkpoint": "resume", "save-steps": "save-every",
    "save-total-limit": "keep", "eval-steps": "eval-every", "report-to": "trackers", "logging": "trackers",
    "model-name-or-path": "model", "model-name": "model", "pretrain": "model", "dataset": "data",
    "dataset-name": "data", "train-data": "data", "prompt-data": "data", "reward-funcs": "reward",
    "reward-function": "reward", "gradient-checkpointing": "checkpoint-activations", "bf16": "dtype", "fp16": "dtype",
    "use-peft": "lora-rank", "lora-r": "lora-rank", "lora-target-modules": "lora-targets", "load-in-4bit": "lora-rank",
    "epsilon": "low", "cliprange": "low", "clip-eps": "low", "eps-clip": "low", "clip-ratio-low": "low",
    "epsilon-high": "high", "clip-ratio-high": "high", "eps-clip-high": "high", "delta": "dual", "clip-ratio-c": "dual",
    "kl-coef": "beta", "init-kl-coef": "beta", "kl-loss-coef": "beta", "entropy-coeff": "entropy-coef",
    "vf-coef": "value-coef", "cliprange-value": "value-clip", "apply-chat-template": "chat",
    "use-vllm": "rollout", "rollout-backend": "rollout", "vllm-gpu-memory-utilization": "vllm-memory",
    "gpu-memory-utilization": "vllm-memory", "async-rollout": "overlap", "async-train": "overlap",
    "vllm-importance-sampling-correction": "importance", "rollout-is": "importance", "tis": "importance",
    "vllm-importance-sampling-cap": "importance-bound", "rollout-is-threshold": "importance-bound",
    "system-prompt": "system", "log-completions": "samples", "max-grad-value": "max-grad-norm",
    "fsdp": "shard", "deepspeed": "shard",
}  # fmt: skip


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors name the nearest flag or command, on one line."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str):
        """Print one line and leave with status 2."""
        self.exit(2, f"{self.prog}: {wording.sentence(message)}\n")

    def known(self, words: Sequence[str]) -> argparse.Namespace:
        """Parse everything; leave with status 2 and the nearest known flag when something is left over."""
        odd = next((word for word in words if not wording.encodable(word)), None)
        if odd is not None:
            self.error(f"arguments must be UTF-8 without NUL; got {odd!r}. Rename the file, or write the text anew")
        given, leftover = self.parse_known_args([_dashed(word) for word in words])
        if leftover:
            wrong = next((word for word in leftover if word.startswith("-")), leftover[0])
            flag = wrong.partition("=")[0]
            known = sorted(option for option in self._option_string_actions if option.startswith("--"))
            name = flag.removeprefix("--")
            meant = SYNONYMS.get(name, name)
            owners = catalogue.owners(meant.replace("-", "_"))
            hint = f"It is --{meant} here." if f"--{meant}" in known else owners or lookup.nearest(flag, known)
            self.error(f"unknown argument {flag!r}. {hint}")
        return given


def recipe_of(words: Sequence[str]) -> str | None:
    """The recipe among the words of a command line: the first one, that of --recipe, or one that names a recipe."""
    for at, word in enumerate(words):
        if word == "--recipe":
            return words[at + 1] if at + 1 < len(words) else None
        if word.startswith("--recipe="):
            return word.partition("=")[2]
    if words and not words[0].startswith("-"):
        return words[0]
    return next((word for word in words if word in catalogue.RECIPES), None)


def add_settings(parser: Parser, recipe: str | None = None) -> None:
    """A flag for every setting of Config but the recipe, by section, with the defaults of `recipe` if it is given."""
    sections, usual = {}, catalogue.defaults(recipe) if recipe else {}
    for setting in settings():
        section = setting.metadata["section"]
        if section not in sections:
            sections[section] = parser.add_argument_group(section)
        if setting.name != "recipe":
            wanted, _ = kind(setting.name)
            default = usual.get(setting.name, setting.default)
            _add(sections[section], setting.name, wanted, setting.metadata["doc"], default, contract(setting))


def add_options(parser: Parser, recipe: str) -> None:
    """A flag for every option of a recipe."""
    options = catalogue.options(recipe)
    group = parser.add_argument_group(f"options of {recipe}")
    for option in options.values():
        _add(group, option.name, option.type, option.doc, option.default, WORDS[option.type])


def given(namespace: argparse.Namespace) -> dict[str, object]:
    """What was given, by name, with line breaks written as \\n made real."""
    return {
        name: tuple(text.replace("\\n", "\n") for text in value) if isinstance(value, list) else value
        for name, value in vars(namespace).items()
    }


def _add(group, name: str, wanted: type, doc: str, default: object, contract: str) -> None:
    if default not in (None, ()):
        doc += f" (default {' '.join(default) if isinstance(default, tuple) else default})"
    elif default is None and "default" not in doc:
        doc += " (default: chosen for the machine and the task)"
    flag = f"--{name.replace('_', '-')}"
    options = {"default": argparse.SUPPRESS, "help": doc.replace("%", "%%"), "dest": name}
    if wanted is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
    elif wanted is tuple:
        group.add_argument(flag, nargs="*", metavar="TEXT", **options)
    else:
        metavar = {int: "N", float: "X"}.get(wanted, "TEXT")
        group.add_argument(flag, type=_reader(contract, wanted), metavar=metavar, **options)


def _reader(contract: str, wanted: type) -> Callable:
    def read(text: str):
        try:
            return wanted(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be {contract}; got {text!r}") from None

    return read


def _dashed(word: str) -> str:
    """--group_size for --group-size, which means the same."""
    flag, equals, value = word.partition("=")
    return f"{flag.replace('_', '-')}{equals}{value}" if flag.startswith("--") else word
