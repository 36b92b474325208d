"""Drawing rollouts from the best policy so far, where an update can learn from another's."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fuserl.engine import past_selves
from fuserl.engine.batch import Rollouts
from fuserl.engine.contracts import require, require_one_of


class Proposal:
    """The weights that rollouts are drawn with: those of the policy when it was last adopted, at first as it starts.

    Memory: what is trained, twice on the host.
    """

    def __init__(self):
        self.weights: dict[str, Tensor] = {}

    @classmethod
    def of(cls, config, name: str) -> Proposal | None:
        """That of a resolved configuration: None for the name "policy", which draws as it is; else the "best" so far.

        Raises:
            ValueError: another name, or rollouts that do not come from weights in this process.
        """
        require_one_of("Proposal", "proposal", name, ("policy", "best"))
        here = name == "policy" or (config.rollout == "embedded" and not config.overlap)
        require("Proposal", "proposal", name, here, "policy where rollouts are drawn ahead or by vLLM")
        return None if name == "policy" else cls()

    def adopt(self) -> None:
        """Take the policy's weights when rollouts are drawn next."""
        self.weights = {}

    def drawing(self, rollout: Callable) -> Callable:
        """The rollout slot, drawn with these weights; the policy has its own back when it returns, or raises."""

        def slot(policy, prompts) -> Rollouts:
            if not self.weights:
                self.weights = past_selves.weights(policy)
                return rollout(policy, prompts)
            with past_selves.speaking(policy, self.weights):
                return rollout(policy, prompts)

        return slot

    def state_dict(self) -> dict[str, Tensor]:
        """The weights; empty where the policy's are taken next."""
        return dict(self.weights)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on with a `state_dict`."""
        self.weights = dict(state)
