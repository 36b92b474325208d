"""Verdicts in a table, and of a small transformer that is to say a digit again, wrong half of the time.

Whether a sum modulo 7 is right, which is to be remembered pair by pair, such a model does not learn in 300 steps beside
its next token: balanced accuracy 0.5 with alpha .1 and 1, and 0.86 with 10.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fuserl.engine import verdicts
from fuserl.engine.batch import Batch, Counts, offsets_of
from fuserl.engine.checks import Figure, at_least, at_most
from fuserl.engine.losses import Loss, negative_logprob
from fuserl.engine.mixtures import mixture
from fuserl.engine.tabular import Table

MODULUS, SAY, END, VERDICT = 7, 7, 8, 9
VOCABULARY, BATCH, STEPS = 10, 128, 300
ALPHA, BETA_V, C_REF = 0.1, 0.1, -23.0


def gradient_apart(loss: Loss) -> float:
    """How far the gradient in the logits behind the end is from 2 alpha w (score - reward) beta_v (onehot - p)."""
    table, batch = _judged(torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0]), torch.ones(5))
    found = table.gradient(batch, mixture(negative_logprob(), loss))[5:]
    p = table.probabilities[5:]
    score, right = BETA_V * (p[:, VERDICT].log() - C_REF), torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0])
    weight = torch.where(right > 0, 5 / (2 * 2), 5 / (2 * 3)).double()
    onehot = torch.eye(VOCABULARY, dtype=torch.float64)[VERDICT]
    expected = (2 * ALPHA * weight * (score - right) * BETA_V)[:, None] * (onehot - p) / 5
    return float((found - expected).abs().max() / expected.abs().max())


def cut(loss: Loss) -> float:
    """The largest gradient behind answers that were cut, where others were not."""
    table, batch = _judged(torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0]), torch.tensor([1.0, 0, 1, 1, 0]))
    found = table.gradient(batch, mixture(negative_logprob(), loss))[5:]
    return float(found[[1, 4]].abs().max()) if found[[0, 2, 3]].any() else math.nan


def single(loss: Loss) -> float:
    """1 where the loss of a batch whose answers are all right is finite and not 0."""
    table, batch = _judged(torch.ones(5), torch.ones(5))
    value = float(table.loss(batch, mixture(negative_logprob(), loss)).detach())
    return float(math.isfinite(value) and value != 0)


def learnt(loss: Loss, *, seeds: Sequence[int], steps: int = STEPS) -> dict[str, float]:
    """A transformer trained on such texts, with the verdict's loss and without; means over the seeds.

    Returns:
        "accuracy", of the verdict, balanced, on texts whose wrong answers were never shown; "kl", of
        the next token between both models on texts as trained on, the average of its two places.
    """
    found = [_both(loss, seed, steps) for seed in seeds]
    return {name: statistics.mean(each[name] for each in found) for name in found[0]}


def figures(loss_of: Callable) -> list[Figure]:
    """The verifier at its best; the squared error's gradient; what is cut; a transformer that knows what is right."""
    log_z = math.log1p(math.exp(C_REF) * math.expm1(1 / BETA_V))
    best = verdicts.scores(1 / BETA_V + C_REF - log_z, None, beta_v=BETA_V, c_ref=C_REF)
    loss = loss_of(alpha=ALPHA, beta_v=BETA_V, c_ref=C_REF)
    found = learnt(loss, seeds=(0,))
    return [
        at_most("log Z where pi_ref(z) is e^-23", log_z, 1e-5),
        Figure("the score of the verifier's best for a right answer", best, 1.0, 1e-6),
        Figure("gradient apart from 2 alpha w (score - reward) beta_v (onehot - p)", gradient_apart(loss), 0),
        Figure("gradient of answers that were cut", cut(loss), 0, 0.0),
        Figure("whether the loss of right answers alone is finite (1 is yes)", single(loss), 1.0),
        at_least("balanced accuracy of the score, wrong answers never shown", found["accuracy"], 0.9),
        at_most("next-token KL to the model without the term", found["kl"], 0.02),
    ]


def _both(loss: Loss, seed: int, steps: int) -> dict[str, float]:
    with torch.random.fork_rng(devices=[]):
        models = [_transformer(seed) for _ in range(2)]
    for model, term in zip(models, (loss, replace(loss, live=_nothing)), strict=True):
        random = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            batch = verdicts.with_verdicts(_texts(random, held=False), temperature=1.0)
            batch = batch.replace(advantages=torch.ones(len(batch.tokens)))
            model.update(batch, mixture(negative_logprob(), term))
    held, usual = (
        verdicts.with_verdicts(_texts(torch.Generator().manual_seed(seed + 1), held=held), temperature=1.0)
        for held in (True, False)
    )
    scored = verdicts.scores(_logs(models[0], held)[:, 2, VERDICT], held, beta_v=BETA_V, c_ref=C_REF) > 0.5
    right = held.rewards > 0.5
    accuracy = (float(scored[right].float().mean()) + float((~scored[~right]).float().mean())) / 2
    ours, plain = (_logs(model, usual)[:, :2] for model in models)
    kl = (ours.exp() * (ours - plain)).sum(-1).mean()
    return {"accuracy": accuracy, "kl": float(kl)}


def _nothing(batch: Batch) -> Tensor:
    return torch.zeros(batch.tokens.shape, dtype=torch.bool)


def _transformer(seed: int):
    """A policy of 60 thousand random weights, without a tokenizer."""
    import transformers

    from fuserl.engine.policy import Policy, Sampling, Updating

    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=16, pad_token_id=END, bos_token_id=END, eos_token_id=END,
        )
    )  # fmt: skip
    return Policy(model, None, Sampling(), Updating(lr=3e-3), seed=seed)


def _texts(random: torch.Generator, *, held: bool) -> Batch:
    """A digit, an answer and the end; half are right: the digit again. For each digit one wrong answer is held."""
    digit, other = (torch.randint(most, (BATCH,), generator=random) for most in (MODULUS, MODULUS - 2))
    right = torch.rand(BATCH, generator=random) < 0.5
    answer = torch.where(right, digit, (digit + (MODULUS - 1 if held else 1 + other)) % MODULUS)
    lengths = torch.full((BATCH,), 2)
    return Batch(
        tokens=torch.stack([answer, torch.full_like(answer, END)], 1).flatten(),
        rollout=torch.arange(BATCH).repeat_interleave(2),
        offsets=offsets_of(lengths),
        group=torch.arange(BATCH),
        rewards=right.float(),
        rollout_logprobs=torch.full((2 * BATCH,), torch.nan),
        counts=Counts(2 * BATCH, BATCH, BATCH),
        prompt_tokens=list(torch.stack([torch.full_like(digit, SAY), digit], 1)),
        facts={"finished": torch.ones(BATCH), "verdict": torch.full((BATCH, 1), VERDICT)},
    )


@torch.no_grad()
def _logs(policy, batch: Batch) -> Tensor:
    """Log-probabilities of the next token at the last of the prompt, at the answer and at the end, (B, 3, V)."""
    answers = batch.tokens.view(len(batch.group), 3)[:, :2]
    texts = torch.cat([torch.stack(batch.prompt_tokens), answers], 1)
    policy.model.eval()
    return policy.model(texts, attention_mask=torch.ones_like(texts)).logits[:, 1:].log_softmax(-1)


def _judged(rewards: Tensor, finished: Tensor) -> tuple[Table, Batch]:
    """Five answers of one token in a table, a row for each and another one for what is behind it."""
    table = Table(torch.randn(10, VOCABULARY, generator=torch.Generator().manual_seed(0)))
    given = table.given(torch.arange(5)[:, None], torch.arange(5), rewards, 5)
    facts = {"finished": finished, "verdict": torch.full((5, 1), VERDICT)}
    batch = verdicts.with_verdicts(given.replace(extra={}, facts=facts), temperature=1.0)
    state = torch.where(batch.objective == 1, 5 + batch.rollout, batch.rollout)
    advantages = torch.zeros(len(batch.tokens), dtype=torch.float64)
    return table, batch.replace(extra=batch.extra | {"state": state}, advantages=advantages)
