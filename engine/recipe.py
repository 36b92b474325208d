"""An algorithm is data: one plain callable per slot of the one loop."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field

from fuserl.engine.config import Config
from fuserl.engine.contracts import require
from fuserl.engine.importance import token_importance
from fuserl.engine.losses import Loss, summed
from fuserl.engine.second_models import Teacher
from fuserl.kernels.surrogates import Truncate, Within


@dataclass(frozen=True)
class Critic:
    """A value model apart from the policy: started as a copy of it, trained on its own loss."""

    loss: Loss  # of the output "value"
    lr: float | None = None  # None is the policy's


@dataclass(frozen=True)
class Recipe:
    """What a system puts in each slot.

    The loop runs prompts -> rollout -> reward -> advantage -> update with the loss, and knows no recipe by name.
    """

    name: str
    prompts: Callable  # (step) -> list[Prompt]: samplers, curricula; a function of the step, so that runs resume
    rollout: Callable  # (policy, prompts) -> Rollouts: where tokens come from
    # (Rollouts) -> (B,) float32, and {name: number, or (B, ...) of facts; "teacher_prompts": B texts that a teacher
    # reads in the prompt's place}; None where completions come with rewards
    reward: Callable | None
    advantage: Callable  # (Batch) -> (B,) or (N,), or a Batch that has them, of other rollouts too: credit; no gradient
    loss: Loss  # (out, Batch) -> (per-token loss, statistics)
    reads: tuple[str, ...] = ()  # what the advantage needs of the batch, as of `Policy.score`
    learns_from: tuple[str, ...] = ()  # completions that every problem must bring: answer, chosen, rejected
    critic: Critic | None = None  # where values do not come from a head on the policy's trunk
    reference: Teacher = field(default_factory=Teacher)  # what is read as ref_..., unless the user names a model
    teacher: Teacher | None = None  # the second model whose log-probs or distributions advantage or loss read
    packed: Callable | None = None  # (Batch) -> Batch, before it is scored: tokens put behind rollouts
    batches: Callable | None = None  # (Batch with advantages) -> list[Batch], updated on in turn; by default it alone
    evaluate: Callable | None = None  # (policy, prompts) -> {name: number}, beside accuracy by the reward
    state: dict = field(default_factory=dict)  # name -> object with state_dict and load_state_dict: is checkpointed


def actor_critic(
    policy: Loss, value: Loss, value_coef: float, separate_critic: bool, critic_lr: float | None
) -> tuple[Loss, Critic | None]:
    """The slots `loss` and `critic` of a policy with values: of a head on its trunk, or of a model of its own.

    Args:
        policy, value: their losses.
        value_coef: weight of the value's, for a head.
        separate_critic: the values are those of a `Critic`.
        critic_lr: its learning rate; None is the policy's.
    """
    good = critic_lr is None or 0 < critic_lr < math.inf
    require("actor_critic", "critic_lr", critic_lr, good, "a finite number > 0, or None for the policy's")
    if separate_critic:
        return policy, Critic(value, critic_lr)
    return summed(policy, value, value_coef), None


def weighed(recipe: Recipe, config: Config) -> Recipe:
    """The recipe with the importance weights that a resolved configuration asks for on its loss.

    Where they were chosen for it, a loss that can take none, or has its own, stays as it is.

    Raises:
        ValueError: the user asks for weights and the loss cannot take any.
    """
    if recipe.loss.weighed is None:
        if "importance" in config.reasons:
            return recipe
        raise ValueError(
            f"importance: the recipe's loss must be one that takes weights; that of {config.recipe} learns from given "
            f"completions, or has weights of its own; got {config.importance!r}. Leave it out."
        )
    bound = config.importance_bound
    bounds = Truncate(bound) if config.importance == "truncate" else Within(1 / bound, bound)
    return dataclasses.replace(recipe, loss=recipe.loss.weighed(token_importance(bounds)))
