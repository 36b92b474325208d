"""Liger's GRPO loss with one import line changed, on a toy model.

    python examples/liger_import.py

A tiny network reads a number and is rewarded for tokens of the number's parity: rollouts of unequal length, padded, and
the loss as any trainer calls Liger's. liger-kernel need not be installed.
"""

import torch

# was: from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
from fuserl.trainers.liger import LigerFusedLinearGRPOLoss

VOCABULARY, WIDTH, GROUPS, GROUP, LENGTH = 64, 32, 8, 8, 6


def main(steps: int = 120) -> float:
    """Train and return the mean reward of the last 20 steps."""
    torch.manual_seed(0)
    body = torch.nn.Sequential(torch.nn.Embedding(32, WIDTH), torch.nn.Linear(WIDTH, WIDTH), torch.nn.Tanh())
    head = torch.nn.Linear(WIDTH, VOCABULARY)
    optimizer = torch.optim.Adam([*body.parameters(), *head.parameters()], lr=1e-2)
    loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="dapo", epsilon_high=0.28)
    history = []
    for step in range(steps):
        numbers = torch.randint(32, (GROUPS,)).repeat_interleave(GROUP)
        hidden = body(numbers)[:, None].expand(-1, LENGTH, -1)
        with torch.no_grad():
            ids = torch.distributions.Categorical(logits=head(hidden)).sample()
        mask = (torch.arange(LENGTH) < torch.randint(1, LENGTH + 1, (len(numbers), 1))).float()
        right = (ids % 2 == numbers[:, None] % 2) * mask
        rewards = right.sum(1) / mask.sum(1)
        history.append(float(rewards.mean()))
        grouped = rewards.view(GROUPS, GROUP)
        advantages = ((grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)).flatten()
        value, metrics = loss(hidden, head.weight, ids, mask, advantages, bias=head.bias)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        if step % 40 == 0 or step == steps - 1:
            print(f"step {step:3d}  reward {rewards.mean():.3f}  clipped {metrics[-1]:.3f}")
    return sum(history[-20:]) / 20


if __name__ == "__main__":
    main()
