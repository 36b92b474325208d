"""OpenRLHF's Actor and PolicyLoss on fuserl's ops: one line more than without.

    pip install "openrlhf>=0.11.2,<0.12"; python examples/openrlhf_ppo.py

A tiny random Llama is rewarded for one token, in one process. OpenRLHF's own runs train in Ray's workers, each of which
is patched by the hook that `launched` gives to ray.init; what follows is OpenRLHF's command line as ever.
"""

import torch
import transformers

import fuserl.trainers.openrlhf

WORDS, WANTED, PROMPT, LENGTH = 8, 3, 2, 6


def launched() -> None:
    """Start Ray so that every worker is patched; then call openrlhf.cli.train_ppo_ray.train(args)."""
    import ray

    ray.init(runtime_env={"worker_process_setup_hook": fuserl.trainers.openrlhf.patch_worker})


def rollouts(model: torch.nn.Module, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Drawn sequences (rows, PROMPT + LENGTH), and the mask of their drawn tokens (rows, LENGTH)."""
    prompts = torch.zeros(rows, PROMPT, dtype=torch.int64) + 2
    ids = model.generate(prompts, max_new_tokens=LENGTH, do_sample=True, top_k=0, pad_token_id=0, eos_token_id=None)
    return ids, torch.ones(rows, LENGTH, dtype=torch.int64)


def main(steps: int = 60) -> float:
    """Train and return the last share of wanted tokens."""
    from openrlhf.models.actor import Actor
    from openrlhf.models.loss import PolicyLoss

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=WORDS, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    actor = Actor(transformers.LlamaForCausalLM(config))
    actor.packing_samples = False  # as Actor sets it where it loads a model by name
    loss_of, optimizer = PolicyLoss(), torch.optim.AdamW(actor.parameters(), lr=3e-3)
    with fuserl.trainers.openrlhf.patch():
        print(fuserl.trainers.openrlhf.report())
        for _ in range(steps):
            ids, drawn = rollouts(actor.model, rows=32)
            rewards = (ids[:, PROMPT:] == WANTED).float().mean(1)
            advantages = ((rewards - rewards.mean()) / (rewards.std() + 1e-6))[:, None].expand(drawn.shape)
            attention = torch.ones_like(ids)
            with torch.no_grad():
                old = actor(ids, drawn, attention)
            for _ in range(2):
                logprobs = actor(ids, drawn, attention)
                loss = loss_of(logprobs, old, advantages, action_mask=drawn)[0]
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return rewards.mean().item()


if __name__ == "__main__":
    print(f"{main():.3f}")
