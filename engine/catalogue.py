"""The recipes by name: where each lives, and one phrase."""

from __future__ import annotations

import difflib
from importlib import import_module

RECIPES = {
    "grpo": "group-relative advantages, clipped ratio (arXiv:2402.03300)",
    "sft": "maximum likelihood of the task's answers",
}


def recipe(config):
    """Build the configured recipe; an unknown name raises ValueError with the nearest known one."""
    name = config.recipe
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(RECIPES)}."
        raise ValueError(f"recipe: name must be a known recipe; got {name!r}. {hint}")
    return import_module(f"fuserl.engine.recipes.{name}").recipe(config)
