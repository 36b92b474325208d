"""The recipes by name: where each lives, one phrase, and the options that its signature declares.

Options are read from the source, as literals, so that a command line is parsed before anything heavy is imported.
"""

from __future__ import annotations

import ast
import functools
import re
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from fuserl.engine import lookup

RECIPES = {
    "grpo": "group-relative advantages, clipped ratio (arXiv:2402.03300)",
    "dr_grpo": "GRPO without its two normalisers, which bias it (arXiv:2503.20783)",
    "dapo": "GRPO with a wider upper clip, token mean, dynamic sampling, overlong shaping (arXiv:2503.14476)",
    "gspo": "GRPO with one ratio per rollout (arXiv:2507.18071)",
    "cispo": "truncated importance weights instead of clipped tokens (arXiv:2506.13585)",
    "max_rl": "reward over the group's mean reward: maximum likelihood of success (arXiv:2602.02710)",
    "rloo": "REINFORCE with the mean of the group's other members as baseline (arXiv:2402.14740)",
    "reinforce_pp": "REINFORCE++: KL in the reward, advantages normalised over the batch (arXiv:2501.03262)",
    "ppo": "clipped ratio, value model, generalised advantage estimation (arXiv:1707.06347)",
    "dpo": "preference pairs without a reward model (arXiv:2305.18290)",
    "reward_model": "Bradley-Terry reward model of preference pairs (arXiv:2203.02155)",
    "sft": "maximum likelihood of the task's answers",
    "ma_rlhf": "PPO whose decisions are runs of tokens (arXiv:2410.02743)",
    "arena_rl": "advantages from a tournament among a group's completions (arXiv:2601.06487)",
    "kl_bayes": "reverse KL, forward KL or any f-divergence to a target distribution (arXiv:2205.11275)",
    "cgpo": "a mixture of judges as constraints, three optimisers, several tasks (arXiv:2409.20370)",
    "vpo": "preferences with a value regulariser: optimism online, pessimism offline (arXiv:2405.19320)",
    "r_to_q": "DPO as soft Q-learning of tokens: implied rewards, and search by beams (arXiv:2404.12358)",
    "rover": "log-ratios regressed on the value of a uniformly random policy (arXiv:2509.24981)",
    "dph_rl": "DPH-RL: what the initial policy solves is rehearsed by an f-divergence (arXiv:2509.07430)",
    "ace": "wrong rollouts that the policy has grown confident of are pushed down harder (arXiv:2602.21420)",
    "rorecomp": "RoRecomp: short right and long wrong rollouts first, the rest from a buffer (arXiv:2509.25958)",
    "advantage_alignment": "games of two agents, each shaping what the other learns (arXiv:2511.19405)",
    "sdpo": "the policy that has read feedback or a sibling's solution teaches it (arXiv:2601.20802)",
    "pre_rl": "PreRL, DSRL: rewards act on the prompt-free likelihood first, then on the prompted (arXiv:2604.14142)",
    "rep_exp": "an elliptical bonus for novel responses, by the initial model's hidden states (arXiv:2510.11686)",
    "self_interference": "SELF: trained only where greedy decoding fails, held by a forward KL (arXiv:2510.02230)",
    "mdpo": "mirror descent: a full-vocabulary KL to the turn's start, weighing more and more (arXiv:2005.09814)",
    "laser": "LaSeR: the policy's own verdict, read from one token behind its answer (arXiv:2510.14943)",
    "c_grpo": "search agents rewarded for cited chains of evidence (arXiv:2601.06021)",
    "vas": "prompts drawn by the variance and diversity of their completions (arXiv:2509.21268)",
    "med_grpo": "rewards of several tasks brought to one scale by a baseline's medians (arXiv:2512.06581)",
    "vla_opd": "a teacher scores the tokens of the student: reverse KL on its own states (arXiv:2603.26666)",
}


# The numbers of published systems in the list that this product hosts; the other recipes are the field's baselines.
SYSTEMS = {
    "ma_rlhf": 1, "arena_rl": 2, "kl_bayes": 3, "cgpo": 5, "vpo": 10, "r_to_q": 11, "rover": 15, "dph_rl": 17,
    "ace": 26, "rorecomp": 27, "advantage_alignment": 28, "sdpo": 32, "pre_rl": 35, "rep_exp": 39,
    "self_interference": 43, "mdpo": 44, "laser": 45, "c_grpo": 53, "vas": 57, "med_grpo": 59, "vla_opd": 66,
}  # fmt: skip

TYPES = {"int": int, "float": float, "bool": bool, "str": str}


@dataclass(frozen=True)
class Option:
    """A keyword of a recipe's signature: what the command line and the configuration file may set."""

    name: str
    type: type  # int, float, bool or str
    optional: bool  # None is allowed
    default: object
    doc: str


def recipe(config):
    """Build the recipe of a resolved configuration, with its options, its loss weighted as `importance` says."""
    built = _module(config.recipe).recipe(config, **config.options)
    if config.importance in (None, "none"):
        return built
    return import_module("fuserl.engine.recipe").weighed(built, config)


def defaults(name: str) -> dict[str, object]:
    """The settings for which a recipe has values of its own: its module's DEFAULTS, and FIXED."""
    return {**_constant(name, "DEFAULTS"), **fixed(name)}


def fixed(name: str) -> dict[str, object]:
    """The settings that a recipe leaves no choice about: its module's FIXED."""
    return _constant(name, "FIXED")


def show(name: str) -> list:
    """The figures of a recipe's check, got and expected."""
    return _module(name).show()


@functools.cache
def options(name: str) -> dict[str, Option]:
    """The options of a recipe, from the signature and the docstring of its `recipe` function."""
    function = next(node for node in _source(name) if isinstance(node, ast.FunctionDef) and node.name == "recipe")
    described, found = _described(ast.get_docstring(function)), {}
    for argument, default in zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True):
        kind, *none = ast.unparse(argument.annotation).split(" | ")
        doc = described[argument.arg]
        found[argument.arg] = Option(argument.arg, TYPES[kind], none == ["None"], ast.literal_eval(default), doc)
    return found


def owners(option: str) -> str:
    """A sentence that names the recipes with an option of this name; empty where none has it."""
    found = [name for name in RECIPES if option in options(name)]
    return f"{option} is an option of {', '.join(found)}." if found else ""


def known(name: str) -> str:
    """The name of a recipe as it is; an unknown one raises ValueError with the nearest known one."""
    if name not in RECIPES:
        raise ValueError(f"recipe: name must be a known recipe; got {name!r}. {lookup.nearest(name, RECIPES)}")
    return name


def _module(name: str):
    return import_module(f"fuserl.engine.recipes.{known(name)}")


def _constant(name: str, constant: str) -> dict[str, object]:
    for node in _source(name):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == constant:
            return ast.literal_eval(node.value)
    return {}


@functools.cache
def _source(name: str) -> list[ast.stmt]:
    path = Path(__file__).parent / "recipes" / f"{known(name)}.py"
    return ast.parse(path.read_text(encoding="utf-8")).body


def _described(docstring: str) -> dict[str, str]:
    """Each argument's text in a docstring's `name: text` lines, continuation lines joined; `a, b: text` is of both."""
    lines = docstring.splitlines()
    found, names = {}, []
    for line in lines[lines.index("Args:") + 1 :] if "Args:" in lines else []:
        start = re.match(r" {4}(\w+(?:, \w+)*): (.*)", line)
        if start:
            names = start[1].split(", ")
            found |= dict.fromkeys(names, start[2])
        elif line.startswith(" " * 8) and names:
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
        elif line.strip():
            break
    return {name: text.rstrip(".") for name, text in found.items()}
