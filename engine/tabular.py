"""A softmax policy in a table, trained by a recipe's own slots: what a recipe claims, where it can be enumerated.

    logprob[n] = log_softmax(logits[state[n]])[tokens[n]]

A rollout of T tokens passes through T states. Batches are those of the engine, in float64, with the state of each token
in `extra["state"]`; advantages and losses are the ones that train language models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

from fuserl.engine.batch import Batch, Counts, offsets_of
from fuserl.engine.distilling import HeadInput
from fuserl.engine.losses import Loss
from fuserl.kernels.divergence import divergence
from fuserl.kernels.divergence_terms import KINDS
from fuserl.kernels.second_head import Reference


def only(context: int, _tokens: Tensor) -> int:
    """The state of a bandit: its context, whatever has been said."""
    return context


class Table:
    """Logits (S, V) in float64 with an optimizer, which draws rollouts and is updated.

    Args:
        logits: at the start; copied.
        state: (context, tokens so far (t,)) -> which row of the table the next token is drawn from.
        length: tokens of a rollout.
        lr, optimizer: of the updates; torch.optim.SGD or Adam, say.
        epochs: steps on each batch.
        seed: of what is drawn.
    """

    def __init__(
        self,
        logits: Tensor,
        *,
        state: Callable[[int, Tensor], int] = only,
        length: int = 1,
        lr: float = 0.5,
        optimizer: Callable = torch.optim.SGD,
        epochs: int = 1,
        seed: int = 0,
    ):
        self.logits = logits.double().clone().requires_grad_()
        self.state, self.length, self.epochs, self.updates = state, length, epochs, 0
        self.optimizer = optimizer([self.logits], lr=lr)
        self.random = torch.Generator().manual_seed(seed)

    @property
    def probabilities(self) -> Tensor:
        """(S, V) float64."""
        return self.logits.detach().softmax(-1)

    @torch.no_grad()
    def drawn(self, contexts: list[int], group_size: int, reward: Callable[[int, Tensor], float]) -> Batch:
        """`group_size` rollouts of each context, with reward(context, tokens (T,))."""
        tokens, states, each = [], [], self.probabilities
        for context in (context for context in contexts for _ in range(group_size)):
            said = torch.zeros(0, dtype=torch.int64)
            for _ in range(self.length):
                states.append(self.state(context, said))
                said = torch.cat([said, torch.multinomial(each[states[-1]], 1, generator=self.random)])
            tokens.append(said)
        rewards = [float(reward(contexts[b // group_size], said)) for b, said in enumerate(tokens)]
        return self.given(torch.stack(tokens), torch.tensor(states), torch.tensor(rewards), group_size)

    @torch.no_grad()
    def given(self, tokens: Tensor, states: Tensor, rewards: Tensor, group_size: int) -> Batch:
        """The batch of rollouts (B, T) through states (B T,) with rewards (B,), `group_size` of each group in turn."""
        rollouts, length = tokens.shape
        group = torch.arange(rollouts) // group_size
        batch = Batch(
            tokens=tokens.reshape(-1),
            rollout=torch.arange(rollouts).repeat_interleave(length),
            offsets=offsets_of(torch.full((rollouts,), length)),
            group=group,
            rewards=rewards.double(),
            rollout_logprobs=torch.zeros(tokens.numel(), dtype=torch.float64),
            counts=Counts(tokens.numel(), rollouts, int(group[-1]) + 1),
            prompt_tokens=[torch.zeros(1, dtype=torch.int64)] * (int(group[-1]) + 1),
            extra={"state": states},
            step=self.updates + 1,
        )
        return batch.replace(rollout_logprobs=self.outputs(batch).logprob)

    def outputs(
        self,
        batch: Batch,
        logits: Tensor | None = None,
        *,
        teacher: Tensor | None = None,
        kinds: Sequence[str] = KINDS,
        **numbers: float,
    ) -> SimpleNamespace:
        """The head's outputs at a batch's tokens, (n,) float64 each, of this table or of other logits (S, V).

        With the logits of a teacher (S, V), divergences from it too, of these kinds, with beta and alpha among the
        numbers; `extra["taught"]` has its states where they are not the table's.
        """
        rows = (self.logits if logits is None else logits)[batch.extra["state"]]
        logs = rows.log_softmax(-1)
        found = {
            "logprob": logs.gather(-1, batch.tokens[:, None]).squeeze(-1),
            "entropy": -(logs.exp() * logs).sum(-1),
            "mean_logprob": logs.mean(-1),
            "sum_sq_prob": logs.exp().square().sum(-1),
        }
        if teacher is not None:
            given = rows, teacher[batch.extra.get("taught", batch.extra["state"])]
            found |= {kind: divergence(*given, kind, **numbers, backend="reference")[0] for kind in kinds}
        return SimpleNamespace(**found)

    def loss(self, batch: Batch, loss: Loss, *, teacher: Tensor | None = None) -> Tensor:
        """The loss of a batch at this table, a scalar with its graph."""
        kinds = [kind for kind in loss.outputs if kind in KINDS]
        out = self.outputs(batch, teacher=teacher, kinds=kinds, **(loss.divergence or {}))
        if loss.made:
            head = torch.eye(self.logits.shape[1], dtype=torch.float64)  # whose states are the logits themselves
            theirs = Reference(teacher[batch.extra.get("taught", batch.extra["state"])], head)
            terms = {
                "bias": None,
                "softcap": None,
                "logit_scale": None,
                "lora": None,
                "temperature": 1.0,
                "chunk": None,
            }
            given = HeadInput(self.logits[batch.extra["state"]], head, batch.tokens, terms, None, theirs)
            vars(out).update({name: make(given) for name, make in loss.made.items()})
        return loss(out, batch)[0].sum()

    def gradient(self, batch: Batch, loss: Loss, *, teacher: Tensor | None = None) -> Tensor:
        """d loss / d logits, (S, V)."""
        return torch.autograd.grad(self.loss(batch, loss, teacher=teacher), self.logits)[0]

    def update(self, batch: Batch, loss: Loss, *, teacher: Tensor | None = None) -> None:
        """The steps of one batch; with several epochs its old_logprobs are those of now."""
        if self.epochs > 1 and batch.old_logprobs is None:
            batch = batch.replace(old_logprobs=self.outputs(batch).logprob.detach())
        for _ in range(self.epochs):
            self.optimizer.zero_grad()
            self.loss(batch, loss, teacher=teacher).backward()
            self.optimizer.step()
        self.updates += 1


def learnt(table: Table, batch: Batch, advantage: Callable, loss: Loss) -> Batch:
    """One update on a batch with a recipe's advantage and loss; returns the batch with its advantages."""
    found = advantage(batch)
    batch = batch.with_advantages(found) if isinstance(found, Tensor) else found
    table.update(batch, loss)
    return batch
