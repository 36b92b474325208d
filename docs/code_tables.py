"""Tables of what the code says of itself: ops, recipes, settings, and what other trainers call them."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator

import measured_tables
from docstrings import docstring, prose, slug, table

import fuserl
from fuserl.engine import catalogue, config, flags
from fuserl.engine.config import Config

BACKENDS = {"cuda": "CUDA C++", "triton": "Triton", "cpu": "C++ (CPU)", "reference": "torch"}
# The flags of a TRL command line, most used first.
TRL = (
    "model_name_or_path", "dataset_name", "reward_funcs", "output_dir", "learning_rate", "num_generations",
    "max_completion_length", "per_device_train_batch_size", "gradient_accumulation_steps", "max_steps",
    "num_train_epochs", "num_iterations", "steps_per_generation", "temperature", "top_p", "top_k", "min_p", "beta",
    "epsilon", "epsilon_high", "delta", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "bf16",
    "gradient_checkpointing", "use_peft", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "save_steps",
    "save_total_limit", "resume_from_checkpoint", "eval_steps", "report_to", "log_completions", "seed",
)  # fmt: skip
_SETTINGS = """\
# Settings and recipes

Every setting is a flag of `fuserl train`, a name in the file that `--config` reads (TOML or JSON), and a field of
`fuserl.engine.config.Config`; so is every option of a recipe. A flag wins over the file. What is automatic is chosen
for the machine and the task, and a run says at its start what it chose and why. What is true or false is given as
`--chat` or `--no-chat`.

- [Settings](#settings)
- [Recipes](#recipes): {recipes}"""
_FILE = """\
```toml
# run.toml: fuserl train --config run.toml
recipe = "dapo"
data = "problems.jsonl"
reward = "my_rewards:exact"
steps = 200
high = 0.28
```"""


def ops() -> str:
    """Ops by backend."""
    rows = []
    for op in fuserl.OPS:
        module = importlib.import_module(f"fuserl.kernels.{op}")
        what = getattr(module, op).__doc__.splitlines()[0].rstrip(".")
        marks = ["yes" if backend in module.IMPLS else "" for backend in BACKENDS]
        rows.append([f"[`{op}`](docs/api.md#{slug(op)})", what, *marks])
    return table(["op", "what", *BACKENDS.values()], rows)


def recipes() -> str:
    """Recipes by name."""
    checks = measured_tables.checks()
    rows = [
        [
            str(catalogue.SYSTEMS.get(name, "")), f"[`{name}`](docs/settings.md#{slug(name)})", prose(says),
            "objective" if name in catalogue.SYSTEMS else "baseline", _checked(name, checks),
        ]
        for name, says in catalogue.RECIPES.items()
    ]  # fmt: skip
    return table(["no.", "recipe", "what", "family", "figures of its check that hold"], rows)


def _checked(name: str, checks: dict[str, dict]) -> str:
    if name not in checks:
        return "not run"
    figures = checks[name]["figures"]
    return f"[{sum(figure['holds'] for figure in figures)} of {len(figures)}](docs/checks.md#{slug(name)})"


def trl() -> str:
    """TRL's flags and what they are here; in one line those that have the same name."""
    known = {setting.name: setting.metadata["doc"] for setting in config.settings()}
    known |= {name: option.doc for name, option in catalogue.options(Config.recipe).items()}
    known |= {"resume": "the folder of a run to go on with, from its newest checkpoint"}
    rows, same = [], []
    for theirs in TRL:
        ours = flags.SYNONYMS.get(theirs.replace("_", "-"), theirs.replace("_", "-"))
        if ours == theirs.replace("_", "-"):
            same.append(f"`--{ours}`")
        else:
            rows.append(
                [f"`--{theirs}`", f"`--{ours}`", prose(known[ours.replace("-", "_")].partition("; default ")[0])]
            )
    return f"{table(['TRL', 'fuserl', 'what it says here'], rows)}\n\nThe same in both: {', '.join(same)}."


def settings_page() -> str:
    """The page of settings, and of every recipe with its options."""
    listed = " · ".join(f"[`{name}`](#{slug(name)})" for name in catalogue.RECIPES)
    body = [_SETTINGS.format(recipes=listed), _FILE, "## Settings"]
    sections: dict[str, list] = {}
    for setting in config.settings():
        sections.setdefault(setting.metadata["section"], []).append(setting)
    automatic = _automatic()
    for section, found in sections.items():
        rows = [_row(s.name, config.contract(s), s.default, s.metadata["doc"], automatic) for s in found]
        body += [f"### {section.capitalize()}", table(["setting", "value", "default", "what"], rows)]
    body += ["## Recipes", *(text for name in catalogue.RECIPES for text in _recipe(name))]
    return "\n\n".join(body) + "\n"


def _recipe(name: str) -> Iterator[str]:
    module = importlib.import_module(f"fuserl.engine.recipes.{name}")
    yield f"### {name}"
    yield docstring(inspect.cleandoc(module.__doc__))
    usual = ", ".join(f"`--{_dashed(key)} {value}`" for key, value in catalogue.defaults(name).items())
    if usual:
        yield f"Run with {usual} where nothing else is said."
    options = catalogue.options(name).values()
    rows = [_row(each.name, config.WORDS[each.type], each.default, each.doc, {}) for each in options]
    yield table(["option", "value", "default", "what"], rows) if rows else "It has no options of its own."


def _automatic() -> dict[str, str]:
    """What an automatic setting comes to, where that does not depend on the machine's size."""
    cpu, gpu = config._by_device("cpu"), config._by_device("cuda")
    chosen = Config().resolved()
    known = {name: f"{cpu[name][0]}, on a GPU {gpu[name][0]}" for name in cpu}
    for name in ("lr", "epochs", "minibatches", "few_shot", "stop"):
        known[name] = _shown(getattr(chosen, name))
    return known


def _row(name: str, value: str, default: object, doc: str, automatic: dict[str, str]) -> list[str]:
    """Flag, value, default and meaning; where the default is no plain value, the doc string says what it is."""
    says, _, described = doc.partition("; default ")
    if default in (None, ()) and described:
        shown, doc = prose(described), says
    elif default is None:
        shown = f"automatic: {automatic[name]}" if name in automatic else "automatic"
    else:
        shown = _shown(default)
    return [f"`--{_dashed(name)}`", value, shown, prose(doc)]


def _shown(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return ", ".join(f"`{each}`".replace("\n", r"\n") for each in value) or "none"
    return f"`{value}`" if isinstance(value, str) else str(value)


def _dashed(name: str) -> str:
    return name.replace("_", "-")
