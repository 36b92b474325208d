"""How good a policy is on problems that it never trained on: greedy accuracy, pass@k, and what a loss measures.

A completion is correct when its reward is at least 1.0: all right, whatever is given for style on top.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor

from fuserl.engine import adapters, report, sharding
from fuserl.engine.batch import batch_of
from fuserl.engine.beams import Beams
from fuserl.engine.losses import Loss
from fuserl.engine.prompts import Prompt

# The number of the random stream that evaluations draw from. Training numbers its calls from 1, so it gets here after
# two thousand million steps: with or without evaluations it draws the same completions. Every evaluation draws from the
# same stream, so two of them differ by the policy and not by luck.
EVALUATION = 2**31


def evaluate(policy, prompts: Sequence[Prompt], reward: Callable, samples: int = 0) -> dict[str, float]:
    """Accuracy, pass@k where `samples` is not 0, and the time that they took, as one row of metrics.

    Args:
        policy: has `generate(prompts, group_size=, greedy=, stream=) -> Rollouts`.
        prompts: G held-out problems; without any the row is empty.
        reward: (Rollouts) -> ((B,) rewards, statistics).
        samples: sampled completions of each problem.

    Returns:
        The keys of `accuracy`, those of `sampled`, and "eval_s" in seconds.
    """
    if not prompts:
        return {}
    started = time.perf_counter()
    row = accuracy(policy, prompts, reward)
    if samples:
        row |= sampled(policy, prompts, reward, samples)
    return {**row, "eval_s": time.perf_counter() - started}


def talked(reply: Callable, reward: Callable, samples: int) -> Callable:
    """An evaluate slot: `evaluate` of completions that are answered by `reply`, as of `Policy.generate`, as they go."""

    def evaluated(policy, prompts: Sequence[Prompt]) -> dict[str, float]:
        talking = SimpleNamespace(generate=functools.partial(policy.generate, reply=reply))
        return evaluate(talking, prompts, reward, samples)

    return evaluated


def accuracy(policy, prompts: Sequence[Prompt], reward: Callable) -> dict[str, float]:
    """Share of the problems whose greedy completion is correct, with Wilson's 95 % interval.

    Returns:
        "problems", "correct", "accuracy", "accuracy_low", "accuracy_high"; nothing where there are no prompts.
    """
    if not prompts:
        return {}
    correct = int(_correct(policy.generate(list(prompts), group_size=1, greedy=True), reward).sum())
    return _share(correct, len(prompts))


def sampled(policy, prompts: Sequence[Prompt], reward: Callable, samples: int) -> dict[str, float]:
    """pass@k from `samples` completions of each problem, drawn as in training: k = 1, 2, 4, ... and `samples`.

    Returns:
        "samples", and "pass@1", "pass@2", ... averaged over the problems; nothing where there are no prompts.
    """
    if samples < 1:
        raise ValueError(f"sampled: samples must be at least 1; got {samples}. Use accuracy for a greedy one alone.")
    if not prompts:
        return {}
    correct = _correct(policy.generate(list(prompts), group_size=samples, stream=EVALUATION), reward)
    ks = sorted({*(2**power for power in range(samples.bit_length())), samples})
    return {"samples": samples, **{f"pass@{k}": float(pass_at_k(correct, samples, k).mean()) for k in ks}}


def searched(
    policy, prompts: Sequence[Prompt], reward: Callable | None, widths: Sequence[int], *, beta: float | None = None
) -> dict[str, float]:
    """What beam search completes the problems with: see `beams`.

    Args:
        policy: has `generate(prompts, stream=, beams=, reference=)`, and given beta a reference.
        prompts: held-out problems.
        reward: (Rollouts) -> ((B,) rewards, statistics); None where there is none.
        widths: of the beams.
        beta: score by sums of beta log p / p_ref in the place of likelihood.

    Returns:
        For each width, "beam_5_logprob", the mean of a completion's, and where there is a reward "beam_5_reward" and
        "beam_5_accuracy"; "guided_5_..." given beta.
    """
    row, temperature = {}, policy.sampling.temperature or 1.0
    second = None if beta is None else policy.seconds["ref"]
    reference = None if second is None else partial(_plain, second)
    own = None if second is None else second.own
    with contextlib.nullcontext() if own is None else sharding.uncut(adapters.base(own)):
        for width in widths if prompts else ():
            beams = Beams(width, beta=beta or 1.0, temperature=temperature)
            found = policy.generate(list(prompts), stream=EVALUATION, beams=beams, reference=reference)
            name = f"{'beam' if beta is None else 'guided'}_{width}"
            row[f"{name}_logprob"] = float(found.rollout_logprobs.sum()) / len(found)
            if reward is not None:
                rewards, _ = reward(found)
                row[f"{name}_reward"] = float(rewards.mean())
                row[f"{name}_accuracy"] = float((rewards >= 1.0).float().mean())
    return row


@contextlib.contextmanager
def _plain(second) -> Iterator:
    """A second model to read, as transformers has it."""
    with second.reading() as model:
        yield adapters.base(model)


def of_completions(rollout: Callable, loss: Loss, policy, prompts: Sequence[Prompt]) -> dict[str, float]:
    """How the policy does on held-out completions that the data brings: a loss's statistics, without an update.

    Args:
        rollout: the slot that packs them: `rollouts.demonstrations` or `rollouts.pairs`.
        loss: of those; where it tells pairs apart, their share in the right order counts as accuracy.
        policy: has `measure(batch, loss)`.
        prompts: held-out problems.

    Returns:
        The statistics by name, and the keys of `accuracy` for pairs.
    """
    given = rollout(policy, list(prompts))
    batch = batch_of(given, given.scores[0])
    found = policy.measure(batch.with_advantages(torch.ones_like(batch.rewards)), loss)
    if "pair_accuracy" not in found:
        return found
    return {**found, **_share(round(found["pair_accuracy"] * len(prompts)), len(prompts))}


def pass_at_k(correct: Tensor, samples: int, k: int) -> Tensor:
    """Chance that k completions of a problem, drawn without replacement from n of which c are correct, include one.

        pass@k = 1 - C(n - c, k) / C(n, k) = 1 - prod_{j < c} (1 - k / (n - j))

    It is the unbiased estimator of the chance that k new completions include a correct one (Chen et al. 2021,
    arXiv:2107.03374, equation 1). The product has no large number in it and is exact to n roundings.

    Args:
        correct: (G,) integers, c of each problem.
        samples: n completions of each problem.
        k: how many are drawn.

    Returns:
        (G,) float64.

    Raises:
        ValueError: `k` is not in 1..n, or `correct` has numbers outside 0..n or that are no integers.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass_at_k: k must be 1 to samples = {samples}; got {k}. Draw more samples.")
    if correct.is_floating_point() or correct.is_complex():
        raise ValueError(f"pass_at_k: correct must be integers; got {correct.dtype}. Count completions.")
    if correct.numel() and not 0 <= int(correct.min()) <= int(correct.max()) <= samples:
        raise ValueError(
            f"pass_at_k: correct must be 0 to samples = {samples}; got {int(correct.min())} to {int(correct.max())}. "
            "Count the correct ones of each problem."
        )
    left = samples - torch.arange(samples, dtype=torch.float64)
    # Where fewer than k wrong ones remain, every draw has a correct one: a factor is 0 by then, and so is the product.
    missed = torch.cat([torch.ones(1, dtype=torch.float64), ((left - k) / left).cumprod(0)])
    return 1.0 - missed[correct.long()]


def _correct(rollouts, reward: Callable) -> Tensor:
    """How many completions of each prompt are correct, (G,) int64."""
    rewards, _ = reward(rollouts)
    return torch.zeros(len(rollouts.prompts), dtype=torch.int64).index_add(0, rollouts.group, (rewards >= 1.0).long())


def _share(correct: int, problems: int) -> dict[str, float]:
    low, high = report.interval(correct, problems)
    return {
        "problems": problems,
        "correct": correct,
        "accuracy": correct / problems,
        "accuracy_low": low,
        "accuracy_high": high,
    }
