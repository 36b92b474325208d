"""What a teacher is shown that the policy is not: texts in the prompt's place, made of what is known of a rollout.

reward = Shown(rewards.scorer(config), answered)        teacher_prompts of every step, beside its rewards
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fuserl.engine.batch import Rollouts
from fuserl.engine.prompts import Prompt


class Shown:
    """A reward slot that says what the teacher reads in each prompt's place, too.

    Args:
        scorer: the reward itself.
        texts: (Rollouts, rewards (B,)) -> B texts, and {name: number or (B,) of facts}.
    """

    def __init__(self, scorer: Callable, texts: Callable):
        self.scorer, self.texts = scorer, texts

    def __call__(self, rollouts: Rollouts) -> tuple[Tensor, dict]:
        """The rewards, and their facts with `teacher_prompts` among them."""
        rewards, facts = self.scorer(rollouts)
        texts, more = self.texts(rollouts, rewards)
        return rewards, {**facts, **more, "teacher_prompts": texts}

    def close(self) -> None:
        """End the scorer's workers."""
        getattr(self.scorer, "close", lambda: None)()


def informed(prompt: Prompt, notes: str) -> str:
    """A prompt with notes: behind the question where the text goes on after it, as a chat's turn does, else in front.

    Args:
        prompt: what the policy reads; its question is metadata["question"] where that is known.
        notes: some lines.
    """
    question = prompt.metadata.get("question")
    before, found, after = prompt.text.rpartition(question) if isinstance(question, str) and question else ("", "", "")
    if found and after.strip():
        return f"{before}{found}\n\n{notes}{after}"
    return f"{notes}\n\n{prompt.text}"


def answered(rollouts: Rollouts, _rewards: Tensor) -> tuple[list[str], dict]:
    """Each prompt behind itself with its answer, so that the teacher has seen this very question solved."""
    texts = []
    for group in rollouts.group.tolist():
        prompt = rollouts.prompts[group]
        if prompt.answer is None:
            texts.append(prompt.text)
            continue
        seam = "" if prompt.text[-1:].isspace() or prompt.answer[:1].isspace() else " "
        texts.append(f"{prompt.text}{seam}{prompt.answer}\n{prompt.text}")
    return texts, {}
