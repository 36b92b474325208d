"""The API page: what a caller of ops, an author of recipes and a user of the command line may rely on."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
from collections.abc import Iterator
from types import FunctionType, ModuleType
from unittest import mock

import docstrings

import fuserl
from fuserl.engine import (
    advantages,
    answerers,
    catalogue,
    cli,
    embedders,
    evaluation,
    flags,
    importance,
    judges,
    loop,
    losses,
    prompts,
    reward_models,
    rewards,
    rollouts,
    rules,
)
from fuserl.engine.batch import Batch, Counts, Rollouts
from fuserl.engine.config import Config, settings
from fuserl.engine.endpoint import Endpoint
from fuserl.engine.policy import Policy, Sampling, Updating
from fuserl.engine.prompts import Prompt
from fuserl.engine.recipe import Critic, Recipe
from fuserl.kernels import policy_loss

OPS = [name for name in fuserl.__all__ if name != "backends"]
_HEAD = """\
# API

What fuserl offers to import, from its docstrings. Sizes: B rollouts, N tokens, V vocabulary, D hidden, G prompts.
"""
_PARTS = """\
A recipe is one plain callable per slot of the one loop. These are the parts to fill the slots with; any callable of the
same shape is as good. The recipes themselves, with their equations and options, are in [settings](settings.md#recipes);
`engine/recipes/grpo.py` is the example to copy."""
_COMMANDS = """\
`fuserl COMMAND --help` says the same. Wrong arguments get one line and status 2, failures of the machine one line and
status 1; `FUSERL_DEBUG=1` shows the traceback."""


_RECIPE = "one of `fuserl list`"


def page() -> str:
    """The page."""
    chapters = list(_chapters())
    names = [name for _, _, entries in chapters for name, _ in entries]
    contents, body = [], []
    for title, lead, entries in chapters:
        listed = " · ".join(f"[`{name}`](#{docstrings.slug(name)})" for name, _ in entries)
        contents.append(f"- [{title}](#{docstrings.slug(title)}): {listed}")
        body += [f"## {title}", lead, *(text for entry in entries for text in _entry(*entry, _links(entry[0], names)))]
    contents.append("- [The command line](#the-command-line)")
    body += ["## The command line", _COMMANDS, *_commands()]
    return "\n\n".join([_HEAD.strip(), "\n".join(contents), *filter(None, body)]) + "\n"


def parsers() -> dict[str, flags.Parser]:
    """The parser of every command, as the command makes it."""
    return {name: _parser(name) for name in cli._COMMANDS}


def _chapters() -> Iterator[tuple[str, str, list[tuple[str, object]]]]:
    """Title, introduction, and the things that it explains by name."""
    statistics = [("policy_loss.merged", policy_loss.merged), ("policy_loss.named", policy_loss.named)]
    ops = [(name, getattr(fuserl, name)) for name in [*OPS, "backends"]]
    yield "Ops", "`import fuserl`; tensors in, tensors out.", [*ops, *statistics]
    slots = [("Recipe", Recipe), ("Critic", Critic), ("Loss", losses.Loss)]
    yield "Parts of a recipe", _PARTS, slots
    parts = {"Losses": losses, "Importance weights of a loss": importance, "Advantages": advantages}
    for title, module in {**parts, "Where rollouts come from": rollouts}.items():
        yield title, docstrings.docstring(module.__doc__), _functions(module)
    asked = [("Prompt", Prompt), ("prompts.sampler", prompts.sampler), ("rewards.scorer", rewards.scorer)]
    asked += [(f"rewards.{name}", function) for name, function in rewards.BUILT_IN.items()]
    yield "Prompts and rewards", docstrings.docstring(rewards.__doc__), asked
    judging = [("judges.configured", judges.configured), ("Judge", judges.Judge), ("judges.quoted", judges.quoted)]
    judging += [("judges.numbers", judges.numbers), ("judges.truth", judges.truth)]
    judging += [("JudgedScorer", judges.JudgedScorer), ("Endpoint", Endpoint)]
    judging += [("LocalModel", answerers.LocalModel), ("Rule", answerers.Rule)]
    yield "Judges", docstrings.docstring(judges.__doc__), judging
    yield "Rules", docstrings.docstring(rules.__doc__), _functions(rules)
    scoring = [("reward_models.configured", reward_models.configured), ("RewardModel", reward_models.RewardModel)]
    scoring += [("ServedRewardModel", reward_models.ServedRewardModel)]
    scoring += [("RuledRewardModel", reward_models.RuledRewardModel)]
    yield "Reward models", docstrings.docstring(reward_models.__doc__), scoring
    embedding = [("embedders.configured", embedders.configured), ("Hashing", embedders.Hashing)]
    embedding += [("LocalEmbedder", embedders.LocalEmbedder), ("ServedEmbedder", embedders.ServedEmbedder)]
    yield "Embedders", docstrings.docstring(embedders.__doc__), embedding
    yield "Batches", "", [("Rollouts", Rollouts), ("Batch", Batch), ("Counts", Counts)]
    running = [("Policy", Policy), ("Sampling", Sampling), ("Updating", Updating)]
    running += [("loop.train", loop.train), ("evaluation.evaluate", evaluation.evaluate)]
    running += [("evaluation.pass_at_k", evaluation.pass_at_k)]
    yield "Running", "", running


def _functions(module: ModuleType) -> list[tuple[str, FunctionType]]:
    """The public functions that a module defines, in its order."""
    short = module.__name__.rpartition(".")[2]
    return [
        (f"{short}.{name}", thing)
        for name, thing in vars(module).items()
        if isinstance(thing, FunctionType) and thing.__module__ == module.__name__ and not name.startswith("_")
    ]


def _links(name: str, names: list[str]) -> dict[str, str]:
    """Where the names are explained that the text of `name` may mean: by itself, and short within its module."""
    links, module = {}, name.rpartition(".")[0]
    for other in names:
        place, _, short = other.rpartition(".")
        for known in {other, short if place in (module, name) else other} - {name}:
            links[known] = f"#{docstrings.slug(other)}"
    return links


def _entry(name: str, thing, links: dict[str, str]) -> Iterator[str]:
    yield f"### `{name}`"
    if not inspect.isclass(thing):
        yield docstrings.code(docstrings.signature(name, thing))
        yield docstrings.docstring(thing.__doc__, links)
        return
    described = inspect.cleandoc(thing.__doc__)
    if not dataclasses.is_dataclass(thing):
        yield docstrings.code(docstrings.signature(name, thing if issubclass(thing, tuple) else thing.__init__))
    yield docstrings.docstring(described, links)
    if dataclasses.is_dataclass(thing) and "\nArgs:" not in described:
        yield docstrings.fields(thing, links)
    yield from _members(name, thing, links)


def _members(name: str, kind: type, links: dict[str, str]) -> Iterator[str]:
    """The methods of a class: a line in a list each, and under its signature where there is more to say."""
    listed, longer, ours = [], [], {field.name for field in _fields(kind)}
    for member, value in vars(kind).items():
        function = value.fget if isinstance(value, property) else value
        if member.startswith("_") or member in ours or not isinstance(function, FunctionType):
            continue
        called = docstrings.signature(f"{name}.{member}", function)
        if isinstance(value, property):
            called = f"{name}.{member}: {function.__annotations__['return']}"
        says = docstrings.docstring(function.__doc__, links)
        if "\n" in called or "**Args**" in says:
            longer += [docstrings.code(called), says]
        else:
            listed.append(f"- `{called}`: {' '.join(says.split())}")
    if listed or longer:
        yield "**Methods and properties**"
    yield "\n".join(listed)
    yield from longer


def _fields(kind: type) -> tuple[dataclasses.Field, ...]:
    return dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()


def _commands() -> Iterator[str]:
    known = {setting.name for setting in settings()} - {"recipe"} | set(catalogue.options(Config.recipe))
    for name, parser in parsers().items():
        yield f"### `fuserl {name}`"
        yield docstrings.prose(inspect.cleandoc(cli._COMMANDS[name][0].__doc__))
        own = [action for action in parser._actions if action.help != argparse.SUPPRESS and action.dest != "help"]
        if any(action.dest == "eval_problems" for action in own):
            own = [action for action in own if action.dest not in known]
            also = " and every option of the [recipe](settings.md#recipes)" if name == "train" else ""
            yield f"Every [setting](settings.md#settings){also} is a flag, and:"
        yield "\n".join(f"- `{_shown(action)}`: {docstrings.prose(action.help or _RECIPE)}" for action in own)


def _shown(action) -> str:
    if not action.option_strings:
        return action.metavar or action.dest.upper()
    values = "|".join(action.choices) if action.choices else action.metavar
    return f"{action.option_strings[0]}{'' if action.nargs == 0 else f' {values}'}"


class _Parsing(Exception):
    """Carries a command's parser out of the command, which would go on to do its work."""


def _parser(name: str) -> flags.Parser:
    if name == "train":
        return cli.train_parser()

    def known(parser, _words):
        raise _Parsing(parser)

    with mock.patch.object(flags.Parser, "known", known):
        try:
            cli._COMMANDS[name][0]([])
        except _Parsing as caught:
            return caught.args[0]
    raise RuntimeError(f"fuserl {name}: a command must parse its arguments first; it does not. Use flags.Parser.known.")
