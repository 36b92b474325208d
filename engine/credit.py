"""Which tokens of a completion earned its reward, by a policy trained on preferences and its reference.

rhat[t] = beta (logprob - ref_logprob)[t]

Sums of it order completions of a prompt as the preferences do, and each says what that token changed
(arXiv:2404.12358): a map of credit, a dense reward for another policy, and what is to be watched while one trains.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from fuserl.engine.advantages import implicit
from fuserl.engine.batch import Batch, Rollouts, batch_of
from fuserl.engine.evaluation import EVALUATION
from fuserl.engine.prompts import Prompt
from fuserl.engine.rollouts import from_reference


def token_rewards(policy, batch: Batch, beta: float) -> Tensor:
    """The rewards of a batch's tokens that a policy with a reference implies now, (N,) float32."""
    return implicit(_scored(policy, batch), beta)


def judged_by(policy, beta: float) -> Callable:
    """Those rewards as the `dense` of `advantages.generalised` or `advantages.rewards_to_go`: (Batch) -> (N,).

    Args:
        policy: another one than is trained with them, which was trained on preferences at `beta`, with its reference.
    """
    return lambda batch: token_rewards(policy, batch, beta)


def heat_map(policy, rollouts: Rollouts, beta: float) -> list[dict]:
    """What each token of each completion earned: a row per completion, as JSON holds it.

    Returns:
        rows of "prompt", "completion", "tokens" (each as text) and "token_rewards".
    """
    batch = batch_of(rollouts, torch.zeros(len(rollouts)))
    each = token_rewards(policy, batch, beta).split(batch.offsets.diff().tolist())
    tokens = batch.tokens.split(batch.offsets.diff().tolist())
    return [
        {
            "prompt": rollouts.prompt_of(b).text,
            "completion": rollouts.texts[b],
            "tokens": [policy.tokenizer.decode([token]) for token in tokens[b].tolist()],
            "token_rewards": each[b].tolist(),
        }
        for b in range(len(rollouts))
    ]


def kept(batch: Batch, rollouts: Rollouts, tokenizer, count: int) -> list[dict]:
    """The advantages of the first `count` completions' tokens, a row per completion, as samples.jsonl holds it.

    Returns:
        rows of "credit", one number where all tokens have the same; else of "tokens" (each as text) and "credit", NaN
        for what others put in. No rows where the batch is of other tokens than the rollouts.
    """
    own = rollouts.trained
    if batch.advantages is None or not torch.equal(batch.tokens.cpu(), rollouts.tokens[own]):
        return []
    found = torch.full(own.shape, torch.nan, dtype=torch.float64)
    found[own] = batch.advantages.detach().double().cpu()
    rows = []
    for begin, end in itertools.pairwise(rollouts.offsets[: count + 1].tolist()):
        credit = found[begin:end]
        if len(credit) and (credit == credit[0]).all():
            rows.append({"credit": float(credit[0])})
        else:
            tokens = [tokenizer.decode([token]) for token in rollouts.tokens[begin:end].tolist()]
            rows.append({"tokens": tokens, "credit": credit.tolist()})
    return rows


def of_reference(policy, prompts: list[Prompt], *, beta: float, samples: int) -> dict[str, float]:
    """The mean implicit reward of completions that the reference draws, the same ones each time.

    Its expectation is -beta KL(reference || policy), at most 0: where the reference was tuned on the chosen
    completions, their rewards must fall as well.

    Args:
        policy: one with a reference.
        prompts: held-out problems.
        samples: completions of each; 0 draws none.
    """
    if not samples or not prompts:
        return {}
    drawn = from_reference(policy, prompts, group_size=samples, stream=EVALUATION)
    batch = batch_of(drawn, torch.zeros(len(drawn)))
    return {"reference_reward": float(batch.rollout_sum(token_rewards(policy, batch, beta)).mean())}


def _scored(policy, batch: Batch) -> Batch:
    """The batch with the log-probs of the policy as it is and of its reference."""
    return policy.score(batch.replace(old_logprobs=None, ref_logprobs=None), ("old_logprobs", "ref_logprobs"))
