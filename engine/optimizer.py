"""AdamW with clipping that skips a step whose gradient is not finite, and the learning rate's course, without a wait.

Norm, clipping and the decision to skip stay on the device: the fused kernel divides by `grad_scale` as it reads a
gradient, so clipping costs no pass of its own, and leaves everything as it was where `found_inf` is 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from fuserl.engine import lookup, sharding

_STATE = ("exp_avg", "exp_avg_sq", "step")
_COURSES = {  # by steps done since the warm-up and steps from there to the end
    "constant": lambda done, span: 1.0,
    "linear": lambda done, span: (span - done) / max(1, span),
    "cosine": lambda done, span: 0.5 * (1.0 + math.cos(math.pi * (done / max(1, span)))),
}


def schedule(name: str, *, warmup: int, total: int) -> Callable[[int], float]:
    """The factor of the learning rate at optimizer step 0, 1, ...: `step / warmup`, then the named course.

    Args:
        name: "constant", "linear" (falls to 0 at `total`) or "cosine" (half a wave to 0 at `total`).
        warmup: optimizer steps over which the factor rises from 0; 0 starts at 1.
        total: optimizer steps of the whole run; later ones keep the last factor.

    Returns:
        A function of the optimizer step, as transformers' `get_<name>_schedule_with_warmup` multiplies with it.

    Raises:
        ValueError: an unknown name, or a warm-up that is not within the run.
    """
    if name not in _COURSES:
        raise ValueError(f"schedule: name must be a known course; got {name!r}. {lookup.nearest(name, _COURSES)}")
    if not 0 <= warmup <= total:
        raise ValueError(
            f"schedule: warmup must be from 0 to total ({total}) steps; got {warmup}. Shorten it or train longer"
        )
    course = _COURSES[name]

    def factor(step: int) -> float:
        step = min(step, total)
        return step / warmup if step < warmup else course(step - warmup, total - warmup)

    return factor


class Optimizer:
    """AdamW over named parameters; matrices decay, vectors (norms, biases) do not.

    A step whose gradient norm is not finite changes no parameter, no moment and no step count of AdamW's. The schedule
    counts it all the same: it counts attempts, which the host knows without asking the device.

    Args:
        parameters: (name, tensor) pairs, every tensor once and each with requires_grad.
        lr: learning rate where `factor` is 1.
        weight_decay: of tensors with two dimensions or more, per step and times the learning rate.
        betas: decay of the first and of the second moment.
        max_grad_norm: gradients are scaled down to this norm over all of them; inf leaves them alone.
        factor: of the learning rate, by optimizer step: a `schedule`.

    Raises:
        ValueError: no parameters, a repeated one, one that is not trained, or a setting out of range.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, Tensor]],
        *,
        lr: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        max_grad_norm: float = 1.0,
        factor: Callable[[int], float] = lambda step: 1.0,
    ):
        pairs = list(parameters)
        self.parameters = dict(pairs)
        _check(pairs, lr=lr, weight_decay=weight_decay, max_grad_norm=max_grad_norm)
        self.lr, self.max_grad_norm, self.factor = lr, max_grad_norm, factor
        self.count = 0  # of steps attempted
        every = self.parameters.values()
        groups = [
            {"params": [p for p in every if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in every if p.dim() < 2], "weight_decay": 0.0},
        ]
        self._adam = torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, fused=True)
        # AdamW makes these at a parameter's first step; made now, a checkpoint holds the same names at any time.
        for p in every:
            self._adam.state[p] = {
                "step": torch.zeros((), dtype=torch.float32, device=p.device),
                "exp_avg": torch.zeros_like(p, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(p, memory_format=torch.preserve_format),
            }

    @torch.no_grad()
    def step(self) -> dict[str, Tensor]:
        """Clip the gradients, take one step and drop the gradients, with no wait for the device.

        Returns:
            Scalars on the device: "grad_norm" before clipping, "skipped" (1 where it was not finite, else 0), "lr".

        Raises:
            RuntimeError: no parameter has a gradient.
        """
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        if not gradients:
            raise RuntimeError("step: some parameter must have a gradient; got none. Call backward before")
        norm = sharding.whole(torch.nn.utils.get_total_norm(gradients))
        skipped = 1.0 - norm.isfinite().to(torch.float32)
        lr = self.lr * self.factor(self.count)
        for group in self._adam.param_groups:
            group["lr"] = lr
        self._adam.grad_scale = (norm / self.max_grad_norm).clamp(min=1.0).to(torch.float32)
        self._adam.found_inf = skipped
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        self.count += 1
        return {"grad_norm": norm, "skipped": skipped, "lr": torch.full_like(skipped, lr)}

    def state_dict(self) -> dict[str, Tensor]:
        """The moments and step counts, the optimizer's own tensors as "<kind>.<parameter's name>", and "count"."""
        state = {f"{kind}.{name}": self._adam.state[p][kind] for kind in _STATE for name, p in self.parameters.items()}
        return {**state, "count": torch.tensor(self.count)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue where `state` was taken, bit for bit; the settings (learning rate, schedule, ...) stay one's own.

        Raises:
            ValueError: a tensor is missing, unknown, or of another shape or dtype; nothing has been loaded then.
        """
        own = self.state_dict()
        for names, what in ((own.keys() - state.keys(), "lacks"), (state.keys() - own.keys(), "also has")):
            if names:
                first, more = min(names), f" and {len(names) - 1} more" if len(names) > 1 else ""
                raise ValueError(
                    f"load_state_dict: state must hold exactly this optimizer's tensors; it {what} {first}{more}. "
                    "Train the same parameters as when it was saved"
                )
        for name, tensor in own.items():
            kinds = [(tuple(each.shape), each.dtype) for each in (tensor, state[name])]
            if kinds[0] != kinds[1]:
                raise ValueError(
                    f"load_state_dict: {name} must be {kinds[0][1]} of shape {kinds[0][0]}; got {kinds[1][1]} of shape "
                    f"{kinds[1][0]}. Train the same model as when it was saved"
                )
        self.count = int(state["count"])
        for name in own.keys() - {"count"}:
            sharding.assign(own[name], state[name])


def _check(pairs: list[tuple[str, Tensor]], *, lr: float, weight_decay: float, max_grad_norm: float) -> None:
    names, tensors = {name for name, _ in pairs}, {id(tensor) for _, tensor in pairs}
    if not pairs or len(names) < len(pairs) or len(tensors) < len(pairs):
        raise ValueError(
            f"Optimizer: parameters must be pairs (name, tensor), at least one and none twice; got {len(pairs)} pairs "
            f"of {len(names)} names and {len(tensors)} tensors. Pass trained(model).items()"
        )
    frozen = [name for name, tensor in pairs if not tensor.requires_grad]
    if frozen:
        raise ValueError(
            f"Optimizer: parameters must require a gradient; got {frozen[0]}, which does not. "
            "Pass trained(model).items()"
        )
    for name, given, good, contract in (
        ("lr", lr, math.isfinite(lr) and lr >= 0, "be a finite number, 0 or more"),
        ("weight_decay", weight_decay, math.isfinite(weight_decay) and weight_decay >= 0, "be finite, 0 or more"),
        ("max_grad_norm", max_grad_norm, max_grad_norm > 0, "be above 0 (inf: no clipping)"),
    ):
        if not good:
            raise ValueError(f"Optimizer: {name} must {contract}; got {given!r}. Change the setting")
