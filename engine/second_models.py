"""Models beside the policy that are read and never trained: a reference, a teacher, weights as they were or on average.

    initial   the policy as it starts: itself without its adapters where it has some, else a frozen copy
    current   the policy as it is, under another prompt say
    old       the policy as it was when the update started
    average   weights <- (1 - rate) weights + rate policy, after each update
    mixed     logits (1 - rate) initial + rate current, of both under one prompt: for divergences only

Initial ones may be renewed once, after some updates: the policy as it is then. Old, average and renewed ones hold what
is trained once more, and share what is frozen.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fuserl.engine import adapters, sharding
from fuserl.engine.contracts import require_one_of
from fuserl.kernels.second_head import Reference

WEIGHTS = ("initial", "current", "old", "average", "mixed")


@dataclass(frozen=True)
class Teacher:
    """The second model that a recipe's loss reads, unless the user names a model of his own with --teacher."""

    weights: str = "initial"  # one of WEIGHTS
    rate: float = 0.05  # of "average" and "mixed"
    renewed: int | None = None  # updates after which "initial" weights become those of the policy, once

    def __post_init__(self):
        if self.renewed is not None and (self.weights != "initial" or self.renewed < 0):
            raise ValueError(
                f"Teacher: renewed must be a number of updates >= 0 of initial weights; got {self.renewed} of "
                f"{self.weights}. Leave it out."
            )
        require_one_of("Teacher", "weights", self.weights, WEIGHTS)
        if not 0 <= self.rate <= 1:
            raise ValueError(f"Teacher: rate must be in [0, 1]; got {self.rate!r}. 0 never moves, 1 follows at once.")


class SecondModel:
    """A second model of a policy's.

    Args:
        model: the policy's.
        source: what it is: a Teacher, or a model of its own, which is frozen.
        offload: keep what is its own on the host between readings.
        share: whether it may share the policy's frozen parameters.
    """

    def __init__(self, model: nn.Module, source: Teacher | nn.Module, *, offload: bool = False, share: bool = True):
        self._policy, self.teacher = model, source if isinstance(source, Teacher) else None
        self.device = next(model.parameters()).device
        self.renewed = None if self.teacher is None else self.teacher.renewed
        self.updates = 0  # begun
        follows = self.renewed is not None or (self.teacher is not None and self.teacher.weights in ("old", "average"))
        self._follows = follows
        self.own = self._held(source, share)
        self._offload = offload and self.own is not None and self.device.type != "cpu"
        if self.own is not None:
            if not self._follows:
                self.own.requires_grad_(False)
            self.own.eval()

    def _held(self, source: Teacher | nn.Module, share: bool) -> nn.Module | None:
        """The module that is this one's alone; None where the policy's serves."""
        if isinstance(source, nn.Module):
            return source
        if self._follows:
            return twin(self._policy, share=share)
        if source.weights == "current" or (source.weights == "initial" and adapters.present(self._policy)):
            return None
        return copy.deepcopy(self._policy)

    @property
    def parts(self) -> list[tuple[float, SecondModel]]:
        """Whose logits, by what share, make this one's."""
        return [(1.0, self)]

    @contextlib.contextmanager
    def reading(self) -> Iterator[nn.Module]:
        """The model, in eval mode and where the policy is, for a while; without gradients."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if self.own is None:
                training = self._policy.training
                stack.callback(self._policy.train, training)
                self._policy.eval()
                if self.teacher.weights == "initial":
                    stack.enter_context(adapters.without_adapters(self._policy))
                yield self._policy
                return
            if self._offload:
                self._to(self.device)
                stack.callback(self._to, "cpu")
            yield self.own

    def _to(self, device: torch.device | str) -> None:
        """Move what is its own; what it shares with the policy stays there."""
        shared = {id(parameter) for parameter in self._policy.parameters()}
        for tensor in (*self.own.parameters(), *self.own.buffers()):
            if id(tensor) not in shared:
                tensor.data = tensor.data.to(device)

    def begin(self) -> None:
        """An update starts: "old" weights are those of now, and so are those whose time to be renewed has come."""
        if self._follows and (self.teacher.weights == "old" or self.updates == self.renewed):
            self._move(1.0)
        self.updates += 1

    def end(self) -> None:
        """An update has ended: "average" weights follow."""
        if self._follows and self.teacher.weights == "average":
            self._move(self.teacher.rate)

    @torch.no_grad()
    def _move(self, rate: float) -> None:
        ours = adapters.trained(self.own)
        for name, parameter in adapters.trained(self._policy).items():
            ours[name].lerp_(parameter.to(ours[name].device), rate)

    def state_dict(self) -> dict[str, Tensor]:
        """The weights that nothing else could give back, those of an average or renewed, and the updates begun."""
        if not self._follows or self.teacher.weights == "old":
            return {}
        weights = {name: sharding.whole(x.detach()) for name, x in adapters.trained(self.own).items()}
        return {"updates": self.updates, **weights}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on with the weights of a `state_dict`."""
        if not state:
            return
        self.updates = state["updates"]
        for name, parameter in adapters.trained(self.own).items():
            sharding.assign(parameter, state[name])


class Mixed:
    """A second model whose logits are a mix of the policy's and of those that it started with."""

    def __init__(self, model: nn.Module, source: Teacher, **given: bool):
        initial, current = (SecondModel(model, Teacher(weights), **given) for weights in ("initial", "current"))
        self.parts, self.own = [(1 - source.rate, initial), (source.rate, current)], initial.own

    def reading(self):
        """Refuse to be one model."""
        raise ValueError(
            "teacher: mixed logits must be read by divergences; got a score. Take another kind of weights."
        )

    def begin(self) -> None:
        """Nothing: neither part moves by itself."""

    def end(self) -> None:
        """Nothing either."""

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing that would be lost."""
        return {}

    def load_state_dict(self, _state: dict[str, Tensor]) -> None:
        """Nothing to go on from."""


def mixed(several: list[tuple[float, Reference]], softcap: float | None) -> Reference:
    """One reference whose logits are the mix of several, by their shares: their states and heads side by side."""
    if len(several) == 1:
        return several[0][1]
    if softcap is not None:
        raise ValueError("teacher: mixed logits must not be capped; this model caps them. Take other weights.")
    biases = [share * each.bias for share, each in several if each.bias is not None]
    hidden = torch.cat([share * each.hidden for share, each in several], -1)
    weight = torch.cat([each.weight for _, each in several], -1)
    return several[0][1]._replace(hidden=hidden, weight=weight, bias=sum(biases) if biases else None)


def twin(model: nn.Module, *, share: bool = True) -> nn.Module:
    """A copy of the transformers model in `model` whose trained parameters are its own; frozen ones are shared."""
    plain = adapters.base(model)
    # deepcopy takes what it finds here for the copy.
    return copy.deepcopy(plain, {id(p): p for p in plain.parameters() if share and not p.requires_grad})


def of(model: nn.Module, *, offload: bool, cut: bool, **sources: Teacher | nn.Module | None) -> dict[str, SecondModel]:
    """The second models of a policy by name, of those whose source is given.

    Raises:
        ValueError: one numbers other tokens than the policy, or is to be kept on the host though it is cut.
    """
    if cut and offload:
        raise ValueError("offload: second models must be whole; --shard full cuts them over the ranks. Leave one out.")
    held: dict[object, SecondModel] = {}
    for source in sources.values():
        if source is not None and source not in held:
            mixes = isinstance(source, Teacher) and source.weights == "mixed"
            held[source] = (Mixed if mixes else SecondModel)(model, source, offload=offload, share=not cut)
            _check_vocabulary(model, held[source].own)
    return {name: held[source] for name, source in sources.items() if source is not None}


def reference(model: nn.Module, policy: nn.Module, read: Callable, dtype: torch.dtype, **numbers: float) -> Reference:
    """What divergences from a second model take of it, within the forward of the policy, which it may be.

    Args:
        read: () -> (its states over a batch, where those of each token stand in them).
        dtype: of the products.
        numbers: beta and alpha, as of a `Reference`.

    Raises:
        ValueError: there is more to its head than one matrix, an adapter of low rank.
    """
    own = adapters.base(model)

    def found() -> Reference:
        states, packed = read()
        terms, weight = adapters.head_terms(model), adapters.head_weight(model).to(dtype)
        if terms["lora"] is not None:
            raise ValueError(
                "teacher: its head must be one matrix; it carries an adapter. Leave lm_head out of --lora-targets."
            )
        bias = terms["bias"]
        if model is not policy and sharding.is_cut(own):  # its weights are gone where its forward ends
            weight, bias = weight.clone(), None if bias is None else bias.clone()
        return Reference(states[packed.predictor].to(dtype), weight, bias, **numbers)

    return found() if model is policy else sharding.inside(own, found)


def fields(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Which model, and which of its outputs, each field of `Policy.score` is."""
    known = {"old_logprobs": "old_logprob", "ref_logprobs": "ref_logprob", "values": "old_value"}
    found = {}
    for field in names:
        who, _, output = known.get(field, field).partition("_")
        found.setdefault(who, {})[field] = output
    return found


def _check_vocabulary(model: nn.Module, other: nn.Module | None) -> None:
    ours, theirs = (adapters.head_weight(each).shape[0] for each in (model, other or model))
    if ours != theirs:
        raise ValueError(
            f"Policy: a second model must have the policy's vocabulary; it has {theirs} tokens and the policy {ours}. "
            "Take one of the same family."
        )
