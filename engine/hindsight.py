"""What a teacher is shown that the policy is not: texts in the prompt's place, made of what is known of a rollout.

reward = Shown(rewards.scorer(config), answered)        teacher_prompts of every step, beside its rewards
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fuserl.engine import rewards
from fuserl.engine.batch import Rollouts
from fuserl.engine.contracts import require
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
        scored, facts = self.scorer(rollouts)
        texts, more = self.texts(rollouts, scored)
        return scored, {**facts, **more, "teacher_prompts": texts}

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


def reprompted(scorer: Callable, *, success: float, most: int, skip_solved: bool) -> Callable:
    """Texts for `Shown`: a sibling's right solution, and feedback on the completion itself, then the question again.

    The fact `taught` is 1 for rollouts that have either.

    Args:
        scorer: whose function may give feedback: see `rewards.feedback`.
        success: a rollout with this reward is a solution.
        most: characters of the notes, which are no fewer tokens.
        skip_solved: a rollout that succeeds itself is not taught.
    """
    require("reprompted", "most", most, most >= 1, "an integer >= 1")

    def texts(rollouts: Rollouts, scored: Tensor) -> tuple[list[str], dict]:
        said, found, taught = rewards.feedback(scorer, rollouts), [], []
        group, good = rollouts.group.tolist(), (scored >= success).tolist()
        for b, number in enumerate(group):
            others = (other for other, its in enumerate(group) if its == number and other != b and good[other])
            solution = next((rollouts.texts[other] for other in others), None)
            notes = [] if solution is None else [f"Correct solution:\n{solution.strip()}"]
            notes += [] if said[b] is None or good[b] else [f"Feedback on an earlier attempt:\n{said[b].strip()}"]
            taught.append(float(bool(notes) and not (skip_solved and good[b])))
            again = "Correctly solve the original question."
            text = "\n\n".join([*notes, again])[:most]
            found.append(informed(rollouts.prompts[number], text) if notes else rollouts.prompts[number].text)
        return found, {"taught": torch.tensor(taught)}

    return texts


class Discovery:
    """Texts for `Shown` with facts of how one question goes: `attempts` so far, and whether it is `discovered`.

    Args:
        texts: those that are shown.
        success: reward of a right solution.
    """

    def __init__(self, texts: Callable, success: float):
        self.texts, self.success = texts, success
        self.attempts, self.at = 0, None  # at: the number of the first attempt that succeeded, from 1

    def __call__(self, rollouts: Rollouts, scored: Tensor) -> tuple[list[str], dict]:
        """The texts, and the facts."""
        texts, facts = self.texts(rollouts, scored)
        good = (scored >= self.success).nonzero()
        if self.at is None and len(good) and len(rollouts.tokens):
            self.at = self.attempts + int(good[0]) + 1
        self.attempts += len(rollouts) if len(rollouts.tokens) else 0  # one that is made up to rehearse is none
        return texts, {**facts, "attempts": self.at or self.attempts, "discovered": float(self.at is not None)}

    def state_dict(self) -> dict:
        """Where it stands."""
        return {"attempts": self.attempts, "at": self.at}

    def load_state_dict(self, state: dict) -> None:
        """Go on from a `state_dict`."""
        self.attempts, self.at = state["attempts"], state["at"]
