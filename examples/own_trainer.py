"""A trainer of your own around one op: REINFORCE on a toy model, in plain torch.

    python examples/own_trainer.py

A tiny network reads a number and is rewarded for naming its double. Nothing of fuserl but `linear_policy_loss` is used.
"""

import torch

import fuserl

VOCABULARY, WIDTH, BATCH = 64, 32, 256


def main(steps: int = 200) -> float:
    """Train and return the last mean reward."""
    torch.manual_seed(0)
    body = torch.nn.Sequential(torch.nn.Embedding(32, WIDTH), torch.nn.Linear(WIDTH, WIDTH), torch.nn.Tanh())
    head = torch.nn.Linear(WIDTH, VOCABULARY, bias=False)
    optimizer = torch.optim.Adam([*body.parameters(), *head.parameters()], lr=1e-2)
    for step in range(steps):
        numbers = torch.randint(32, (BATCH,))
        hidden = body(numbers)
        with torch.no_grad():
            answers = torch.distributions.Categorical(logits=head(hidden)).sample()
        rewards = (answers == 2 * numbers).float()
        advantages = fuserl.group_advantage(rewards, numbers.clone(), scale=None)

        def loss(out, rows, advantages=advantages):
            return (-advantages[rows] * out.logprob - 0.01 * out.entropy) / BATCH

        value, out, _ = fuserl.linear_policy_loss(hidden, head.weight, answers, loss, outputs=("logprob", "entropy"))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:3d}  reward {rewards.mean():.3f}  entropy {out.entropy.mean():.3f}")
    return float(rewards.mean())


if __name__ == "__main__":
    main()
