"""What linear_policy_loss asks of its arguments and of the loss it is given, and how it refuses."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fuserl.kernels import head_outputs, second_head
from fuserl.kernels.softmax_rows import accumulator

SCOPES = ("token", "rollout", "batch")


def refuse_captured(losses: Tensor, known: Sequence[Tensor]) -> None:
    """Raise if the loss reaches a trainable tensor whose gradient would be lost."""
    known_ids = {id(leaf) for leaf in known}
    # What lies behind a known tensor that is no leaf gets its gradient from there.
    pending, seen = [losses.grad_fn], {tensor.grad_fn for tensor in known}
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in known_ids:
            raise ValueError(
                f"linear_policy_loss: token_loss must reach trainable tensors only through out and params=; got one of "
                f"shape {tuple(leaf.shape)} that it captured, whose gradient would be lost. Pass it in params=, or "
                "detach it."
            )
        pending += [following for following, _ in node.next_functions]


def refuse_coupled(evaluate: Callable, losses: Tensor) -> None:
    """Raise if a row's loss changes when it is evaluated without the others: the scope says that rows are independent.

    Args:
        evaluate: called with a function that cuts a tensor, or a dict of them, to some of the rows; the loss of those.
        losses: (n,) of all rows.
    """
    half = (len(losses) + 1) // 2
    for part in (slice(0, half), slice(half, len(losses))):

        def cut(values, part=part):
            return {name: v[part] for name, v in values.items()} if isinstance(values, dict) else values[part]

        with torch.no_grad():
            result = evaluate(cut)
        alone = result[0] if isinstance(result, tuple) else result
        if not torch.allclose(alone, losses[part], rtol=1e-4, atol=1e-7, equal_nan=True):
            raise ValueError(
                "linear_policy_loss: with scope='token' each row's loss must depend on that row only; got other values "
                "for half of the rows. Use scope='rollout', or normalise by counts fixed before the call."
            )


def live_spans(scope: str, offsets: Tensor | None, live: Tensor | None, count: int) -> list[tuple[int, int]] | None:
    """[begin, end) among the live rows of what token_loss must see together; None where rows are independent."""
    if scope == "token":
        return None
    if scope == "batch":
        rows = count if live is None else int(live.sum())
        return [(0, rows)] if rows else []
    if offsets is None or offsets.device.type != "cpu":
        raise ValueError(
            f"linear_policy_loss: offsets must be a host tensor for scope 'rollout'; got "
            f"{offsets if offsets is None else offsets.device}. Pass the (B + 1,) row offsets of the rollouts."
        )
    bounds = offsets.tolist()
    if bounds[:1] != [0] or bounds[-1] != count or bounds != sorted(bounds):
        raise ValueError(
            f"linear_policy_loss: offsets must rise from 0 to {count}, the rows of hidden; got {bounds[0]} to "
            f"{bounds[-1]}. Pass the (B + 1,) row offsets of the rollouts."
        )
    spans, position = [], 0
    for begin, end in itertools.pairwise(bounds):
        kept = end - begin if live is None else int(live[begin:end].sum())
        if kept not in (0, end - begin):
            raise ValueError(
                f"linear_policy_loss: live must be constant within a rollout for scope 'rollout'; got {kept} of "
                f"{end - begin} rows in the one at row {begin}. A rollout's loss needs all of its rows."
            )
        if kept:
            spans.append((position, position + kept))
            position += kept
    return spans


def check(hidden, weight, ids, *, outputs, scope, live, grad_weight, **given) -> None:
    """Raise ValueError with the first broken contract of the arguments."""
    require = head_outputs.requirer("linear_policy_loss")
    require(hidden.dim() == 2, "hidden must be (N, D)", tuple(hidden.shape), "Flatten (B, T, D) and drop padding.")
    own, divergences = second_head.split(outputs)
    own = own or (divergences and head_outputs.OUTPUTS)  # divergences alone are enough
    head_outputs.check("linear_policy_loss", hidden, weight, ids, outputs=own, **given)
    require(scope in SCOPES, f"scope must be one of {SCOPES}", repr(scope), "Use 'rollout' for sequence-level losses.")
    if live is not None:
        require(
            live.shape == ids.shape and live.dtype == torch.bool and live.device.type == "cpu",
            f"live must be ({len(hidden)},) bool on the host", f"{tuple(live.shape)} {live.dtype} on {live.device}",
            "Make it where the rewards are: reading it from a device would wait.",
        )  # fmt: skip
    if grad_weight is not None:
        require(
            grad_weight.shape == weight.shape and grad_weight.device == weight.device
            and grad_weight.dtype == accumulator(weight.dtype),
            f"grad_weight must be {tuple(weight.shape)} float32 on {weight.device}",
            f"{tuple(grad_weight.shape)} {grad_weight.dtype} on {grad_weight.device}", "Allocate it with torch.zeros.",
        )  # fmt: skip
