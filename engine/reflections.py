"""How often completions turn round or look again: words that reasoning models think twice with."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from fuserl.engine.batch import Rollouts

TRANSITIONS = re.compile(
    r"\b(but|however|alternatively|wait|hmm|instead|although|though|otherwise|yet|actually)\b", re.IGNORECASE
)
REFLECTIONS = re.compile(
    r"\b((double[- ]?|re-?)?check(s|ed|ing)?|(re-?)?verif(y|ies|ied|ying|ication)|confirm(s|ed|ing)?|look again|"
    r"re-?(evaluat|examin|consider|think|calculat|visit)\w*|mistakes?)\b",
    re.IGNORECASE,
)


class Reflections:
    """Counts of words of transition and of reflection in completions, and how they have grown since the first ones.

    A recipe's state: what the first completions had is kept.
    """

    def __init__(self):
        self.first: dict[str, float] = {}

    def __call__(self, _policy, rollouts: Rollouts) -> dict[str, Tensor]:
        """{"transitions", "reflections": (B,) counts}, and over the first mean, where it is not 0, "..._growth"."""
        found = {
            name: torch.tensor([float(len(words.findall(text))) for text in rollouts.texts])
            for name, words in (("transitions", TRANSITIONS), ("reflections", REFLECTIONS))
        }
        if not self.first:
            self.first = {name: float(counts.mean()) for name, counts in found.items()}
        grown = {f"{name}_growth": found[name] / mean for name, mean in self.first.items() if mean}
        return found | grown

    def state_dict(self) -> dict[str, float]:
        """The means of the first completions."""
        return dict(self.first)

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from a `state_dict`."""
        self.first = dict(state)
