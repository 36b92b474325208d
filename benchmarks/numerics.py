"""How far every op is from the truth: `python benchmarks/numerics.py` appends rows to results/numerics.jsonl.

The inputs are rounded to the dtype under test first, and the truth is float64 of those values. Beside fuserl's backends
stands what a trainer writes without it, plain torch in the same dtype. Two figures an output: the largest absolute
error, and the largest over rows of the error's norm as a share of the row's. Triton runs on a GPU where there is one,
else in its interpreter, in a process of its own.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import attention_subjects
import divergence_subjects
import gaussian_subjects
import group_subjects
import preference_subjects
import sequence_subjects
import subjects
import torch
from subjects import FLOATS, Subject
from torch import Tensor

from fuserl.engine import bench, machine
from fuserl.kernels import (
    group_advantage,
    linear_logprob,
    linear_policy_loss,
    policy_loss,
    sample,
    surrogates,
    token_logprob,
)

RESULTS = Path(__file__).parent / "results" / "numerics.jsonl"
ROWS, TOKENS = 64, 8192
_SOFTCAP = 30.0


def logits_of(kind: str, rows: int) -> tuple[Tensor, ...]:
    """Logits, tokens, and the gradients that come from above."""
    x, ids = 4 * torch.randn(rows, subjects.VOCABULARY), torch.randint(subjects.VOCABULARY, (rows,))
    if kind == "peaky":
        x.scatter_(1, _peaks(ids)[:, None], 30.0)
    elif kind == "large":
        x += torch.where(x > 4, 1e4, -1e4)
    return x, ids, torch.randn(2, rows)


def token_logprob_run(backend: str, logits: Tensor, ids: Tensor, g: Tensor) -> dict[str, Tensor]:
    """The op, and autograd through it."""
    leaf = logits.clone().requires_grad_()
    return _logprobs(leaf, g, *token_logprob.token_logprob(leaf, ids, backend=backend))


def token_logprob_eager(logits: Tensor, ids: Tensor, g: Tensor) -> dict[str, Tensor]:
    """log_softmax in the logits' dtype."""
    leaf = logits.clone().requires_grad_()
    return _logprobs(leaf, g, *_plain(leaf, ids))


def states_of(kind: str, rows: int) -> tuple[Tensor, ...]:
    """Hidden states, a head, tokens, and what the loss needs of each token."""
    hidden, weight = (
        torch.randn(rows, subjects.WIDTH),
        torch.randn(subjects.VOCABULARY, subjects.WIDTH) * 4 / subjects.WIDTH**0.5,
    )
    ids = torch.randint(subjects.VOCABULARY, (rows,))
    if kind == "peaky":
        peaks = weight[_peaks(ids)]
        hidden += peaks * ((30 - (hidden * peaks).sum(1)) / peaks.square().sum(1))[:, None]
    elif kind == "large":
        hidden[:, 0] = weight[:, 0] = 100.0
    return hidden, weight, ids, 0.1 * torch.randn(rows), torch.randn(rows)


def linear_policy_loss_run(backend: str, hidden, weight, ids, drift, advantages) -> dict[str, Tensor]:
    """The op, with a loss of importance ratios and entropies; and the mean log-prob, which is not in that loss."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    old = _old(hidden, weight, ids, drift)

    def loss(out, rows):
        return _loss(out.logprob, out.entropy, old[rows], advantages[rows], len(ids))

    value, out, _ = linear_policy_loss.linear_policy_loss(
        hidden, weight, ids, loss, outputs=("logprob", "entropy", "mean_logprob"), backend=backend
    )
    value.backward()
    return {"loss": value, "mean_logprob": out.mean_logprob, "d_hidden": hidden.grad, "d_weight": weight.grad}


def linear_policy_loss_eager(hidden, weight, ids, drift, advantages) -> dict[str, Tensor]:
    """Logits by a product in the dtype, log_softmax in the dtype, the loss in float32."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    old, logits = _old(hidden, weight, ids, drift), hidden @ weight.T
    value = _loss(*_plain(logits, ids), old, advantages, len(ids)).sum()
    value.backward()
    mean = logits.log_softmax(-1).mean(-1)
    return {"loss": value, "mean_logprob": mean, "d_hidden": hidden.grad, "d_weight": weight.grad}


def linear_logprob_run(backend: str, hidden, weight, ids, _drift, g) -> dict[str, Tensor]:
    """The op on a head with a soft cap, and autograd through it."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    out = linear_logprob.linear_logprob(
        hidden, weight, ids, outputs=("logprob", "entropy"), softcap=_SOFTCAP, backend=backend
    )
    return _of_head(hidden, weight, out.logprob, out.entropy, g)


def linear_logprob_eager(hidden, weight, ids, _drift, g) -> dict[str, Tensor]:
    """Logits by a product in the dtype, the cap and log_softmax in the dtype."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logits = torch.tanh(hidden @ weight.T / _SOFTCAP) * _SOFTCAP
    return _of_head(hidden, weight, *_plain(logits, ids), g)


def rewards_of(kind: str, rows: int) -> tuple[Tensor, ...]:
    """Rewards of groups of eight."""
    rewards = {
        "usual": lambda: torch.randint(2, (rows,)).float(),
        "near": lambda: 0.1 + 1e-3 * torch.randn(rows),
        "large": lambda: 1e4 + 3 * torch.randn(rows),
    }[kind]()
    return rewards, torch.arange(rows) // 8


def group_advantage_run(backend: str, rewards: Tensor, group: Tensor) -> dict[str, Tensor]:
    """The op."""
    return {"advantage": group_advantage.group_advantage(rewards, group, backend=backend)}


def group_advantage_eager(rewards: Tensor, group: Tensor) -> dict[str, Tensor]:
    """Mean and standard deviation of a view with eight columns."""
    table = rewards.view(-1, 8)
    advantage = (table - table.mean(1, keepdim=True)) / (table.std(1, keepdim=True) + 1e-6)
    return {"advantage": advantage.flatten()}


def tokens_of(kind: str, rows: int) -> tuple[Tensor, ...]:
    """Log-probs of the policy, the old one and the reference, and advantages."""
    spread = {"usual": 0.1, "near": 1e-4, "far": 3.0}[kind]
    old = -3 * torch.rand(rows)
    return old + spread * torch.randn(rows), torch.randn(rows), old, old + spread * torch.randn(rows)


def policy_loss_run(backend: str, logprobs, advantages, old, reference) -> dict[str, Tensor]:
    """The op with a KL term and a dual clip, and autograd through it."""
    leaf = logprobs.clone().requires_grad_()
    losses, statistics = policy_loss.policy_loss(
        leaf,
        advantages,
        old_logprobs=old,
        ref_logprobs=reference,
        surrogate=surrogates.Clip(dual=3.0),
        beta=0.1,
        backend=backend,
    )
    (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    return {"losses": losses, "gradient": gradient, "statistics": _stacked(policy_loss.named(statistics))}


def policy_loss_eager(logprobs, advantages, old, reference) -> dict[str, Tensor]:
    """The loss as trainers write it, and the statistics that they log."""
    leaf = logprobs.clone().requires_grad_()
    log_ratio, d = leaf - old, reference - leaf
    ratio, kl = log_ratio.exp(), d.exp() - d - 1
    gain = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    losses = 0.1 * kl - torch.where(advantages < 0, torch.maximum(gain, 3 * advantages), gain)
    (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    ratio, log_ratio = ratio.detach(), log_ratio.detach()
    down, up = advantages < 0, advantages > 0
    means = {
        "ratio": ratio, "clipped_low": (down & (ratio < 0.8)).to(ratio), "clipped_high": (up & (ratio > 1.2)).to(ratio),
        "clipped_dual": (down & (ratio > 3)).to(ratio), "approx_kl": ratio - 1 - log_ratio, "kl": kl.detach(),
        "importance": torch.ones_like(ratio), "importance_cut": torch.zeros_like(ratio),
    }  # fmt: skip
    statistics = {name: value.mean() for name, value in means.items()}
    statistics["ess"] = ratio.sum().square() / (len(ratio) * ratio.square().sum())
    statistics |= {"ratio_max": ratio.amax(), "ratio_min": ratio.amin()}
    return {"losses": losses, "gradient": gradient, "statistics": _stacked(statistics)}


def draws_of(kind: str, rows: int) -> tuple[Tensor, ...]:
    """Logits, and the tokens that are drawn from their float32 values."""
    x, *_ = logits_of(kind, rows)
    return x, torch.arange(rows)


def sample_run(backend: str, logits: Tensor, names: Tensor) -> dict[str, Tensor]:
    """The op's log-probs, at top-p 0.9 and temperature 0.8; in float64, the definition's of the same tokens."""
    ids, logprob, full = _drawn(logits.float(), names, "cpu" if logits.dtype == torch.float64 else backend)
    if logits.dtype == torch.float64:
        logprob, full = _nucleus(logits, ids)
    return {"logprob": logprob, "full_logprob": full}


def sample_eager(logits: Tensor, names: Tensor) -> dict[str, Tensor]:
    """The log-probs of the same tokens by softmax and a sort in the logits' dtype."""
    ids = _drawn(logits.float(), names, None)[0]
    return dict(zip(("logprob", "full_logprob"), _nucleus(logits, ids), strict=True))


def _drawn(logits: Tensor, names: Tensor, backend: str | None) -> tuple[Tensor, ...]:
    return sample.sample(
        logits, temperature=0.8, top_p=0.9, seed=0, rollout_ids=names, positions=names, backend=backend
    )


def _nucleus(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    full = (logits / 0.8).log_softmax(-1)
    p, order = full.exp().sort(descending=True, stable=True)
    cut = full.masked_fill(torch.zeros_like(full).bool().scatter(-1, order, p.cumsum(-1) - p >= 0.9), -torch.inf)
    return tuple(x.gather(-1, ids[:, None])[:, 0] for x in (cut.log_softmax(-1), full))


_LOGITS = {
    "usual": "logits of standard deviation 4",
    "peaky": "the same, and one token of each row at 30; in every second row it is the chosen one",
}
SUBJECTS = {
    "token_logprob": Subject(
        logits_of, token_logprob_run, token_logprob_eager, token_logprob.IMPLS,
        {**_LOGITS, "large": "the same moved by 1e4, up for the larger sixth and down for the others"},
    ),
    "linear_policy_loss": Subject(
        states_of, linear_policy_loss_run, linear_policy_loss_eager, linear_policy_loss.IMPLS,
        {**_LOGITS, "large": "all logits near 1e4"},
    ),
    "linear_logprob": Subject(
        states_of, linear_logprob_run, linear_logprob_eager, linear_logprob.IMPLS,
        {name: f"{what}, before a soft cap of 30" for name, what in _LOGITS.items()},
    ),
    "policy_loss": Subject(
        tokens_of, policy_loss_run, policy_loss_eager, policy_loss.IMPLS,
        {"usual": "log-ratios of standard deviation 0.1", "near": "of 1e-4", "far": "of 3"}, (torch.float32,),
    ),
    "sample": Subject(
        draws_of, sample_run, sample_eager, sample.IMPLS,
        {"usual": _LOGITS["usual"], "peaky": "the same, and one token of each row at 30"},
    ),
    "group_advantage": Subject(
        rewards_of, group_advantage_run, group_advantage_eager, group_advantage.IMPLS,
        {"usual": "rewards of 0 and 1", "near": "0.1 and a spread of 1e-3", "large": "1e4 and a spread of 3"},
        (torch.float32,),
    ),
    **divergence_subjects.SUBJECTS,
    **gaussian_subjects.SUBJECTS,
    **group_subjects.SUBJECTS,
    **preference_subjects.SUBJECTS,
    **sequence_subjects.SUBJECTS,
    **attention_subjects.SUBJECTS,
}  # fmt: skip


def errors(got: Tensor, truth: Tensor) -> dict[str, float | None]:
    """The largest absolute error, and the largest over rows of |error| / |row| in norm; None where one is not finite.

    One number per row of the input, (N,), counts as one row; statistics, (K, 1), as a row each. Rows of a gradient
    below a thousandth of the largest one have no part in the second figure: in 16 bits they vanish.
    """
    got, truth = (x.detach().double().cpu() for x in (got, truth))
    wrong = (got - truth).reshape(-1, truth.shape[-1] if truth.dim() else 1)
    sizes, norms = truth.reshape(wrong.shape).norm(dim=1), wrong.norm(dim=1)
    if wrong.shape[1] > 1:
        norms, sizes = (x[sizes >= 1e-3 * sizes.amax()] for x in (norms, sizes))
    relative = torch.where(norms == 0, 0.0, norms / sizes).amax()
    found = {"absolute": float(wrong.abs().amax()), "relative": float(relative)}
    return {name: value if value < torch.inf else None for name, value in found.items()}


def measured(op: str, kind: str, dtype: torch.dtype, backend: str, *, device="cpu", rows=None) -> dict[str, dict]:
    """Errors of each output of an op, in one backend or in "torch", on one kind of inputs."""
    subject = SUBJECTS[op]
    torch.manual_seed(0)
    inputs = subject.inputs(kind, rows or (ROWS if subject.dtypes == FLOATS else TOKENS))
    given = inputs
    if subject.dtypes == FLOATS:  # 16 bits for logits, states and head, and never for numbers of the loss
        large = [x.is_floating_point() and x.shape[-1] in (subjects.VOCABULARY, subjects.WIDTH) for x in inputs]
        given = [x.to(dtype) if wide else x for x, wide in zip(inputs, large, strict=True)]
    truth = subject.run("reference", *(x.double() if x.is_floating_point() else x for x in given))
    there = [x.to(device) for x in given]
    got = subject.eager(*there) if backend == "torch" else subject.run(backend, *there)
    return {name: errors(got[name], value) for name, value in truth.items()}


def rows_of(backends: dict[str, str]) -> Iterator[dict]:
    """A row per op, kind, dtype and output in each of the backends, which are given with their devices."""
    for op, subject in SUBJECTS.items():
        for kind in subject.kinds:
            for dtype in subject.dtypes:
                for backend, device in backends.items():
                    if backend in (*subject.implemented, "torch"):
                        found = measured(op, kind, dtype, backend, device=device)
                        for output, figures in found.items():
                            named = {
                                "op": op,
                                "inputs": kind,
                                "described": subject.kinds[kind],
                                "dtype": str(dtype).removeprefix("torch."),
                            }
                            yield {**named, "output": output, "backend": backend, "device": device, **figures}


def main(arguments: list[str]) -> None:
    """Measure, and keep the rows with the machine and the versions; `--triton` prints Triton's own."""
    if arguments == ["--triton"]:
        for row in rows_of({"triton": "cpu"}):
            print(json.dumps(row), flush=True)
        return
    found = list(rows_of({"cpu": "cpu", "reference": "cpu", "torch": "cpu"}))
    if torch.cuda.is_available():
        found += rows_of({"triton": "cuda", "cuda": "cuda"})
    else:
        environment = os.environ | {"TRITON_INTERPRET": "1"}
        command = [sys.executable, __file__, "--triton"]
        process = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        found += map(json.loads, process.stdout.splitlines())
    facts = {"machine": bench.device(), **machine.versions(), "commit": machine.commit()}
    facts["date"] = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    with RESULTS.open("a") as file:
        for row in found:
            file.write(json.dumps(row | facts) + "\n")


def _peaks(ids: Tensor) -> Tensor:
    """Which token stands out in each row: the chosen one in every second, else its neighbour."""
    return (ids + torch.arange(len(ids)) % 2) % subjects.VOCABULARY


def _logprobs(leaf: Tensor, g: Tensor, logprob: Tensor, entropy: Tensor) -> dict[str, Tensor]:
    torch.autograd.backward([logprob, entropy], [g[0].to(logprob.dtype), g[1].to(entropy.dtype)])
    return {"logprob": logprob, "entropy": entropy, "dlogits": leaf.grad}


def _of_head(hidden: Tensor, weight: Tensor, logprob: Tensor, entropy: Tensor, g: Tensor) -> dict[str, Tensor]:
    torch.autograd.backward((logprob * g - 0.01 * entropy).sum())
    return {"logprob": logprob, "entropy": entropy, "d_hidden": hidden.grad, "d_weight": weight.grad}


def _plain(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    logp = logits.log_softmax(-1)
    return logp.gather(-1, ids[:, None]).squeeze(-1), -(logp.exp() * logp).sum(-1)


@torch.no_grad()
def _old(hidden: Tensor, weight: Tensor, ids: Tensor, drift: Tensor) -> Tensor:
    """Log-probs not far from the true ones, the same whatever is measured."""
    logits = hidden.double() @ weight.double().T
    return (_plain(logits, ids)[0] + drift.double()).float().to(drift.dtype)


def _loss(logprob: Tensor, entropy: Tensor, old: Tensor, advantages: Tensor, count: int) -> Tensor:
    return -((logprob - old).exp() * advantages + 0.01 * entropy) / count


def _stacked(statistics: dict[str, Tensor]) -> Tensor:
    return torch.stack([statistics[name] for name in sorted(statistics)])[:, None]


if __name__ == "__main__":
    main(sys.argv[1:])
