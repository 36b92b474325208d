"""verl's functions of a GRPO step on fuserl's ops, in the order in which its workers call them, on one process.

    pip install "verl>=0.9.1,<0.10"; python examples/verl_grpo.py

A tiny random Llama is rewarded for saying "yes". A run of verl's own takes these lines more than without:

    python -m verl.trainer.main_ppo ...
        actor_rollout_ref.model.external_lib=fuserl.trainers.verl
        actor_rollout_ref.model.use_fused_kernels=True        # no logits in memory
        actor_rollout_ref.actor.policy_loss.loss_mode=fuserl_grpo
        algorithm.adv_estimator=fuserl_rloo                   # gae and grpo are ours under their own names
"""

import uuid

import numpy as np
import torch
import transformers
from verl.models.transformers.monkey_patch import patch_forward_with_backends
from verl.trainer.ppo import core_algos

import fuserl.trainers.verl  # what external_lib does

WORDS = ("<pad>", "</s>", "say", "yes", "no", "maybe", "never", "always")
PROMPTS, SAMPLES, LENGTH = 4, 8, 6


class Actor(transformers.LlamaForCausalLM):
    """A class of its own, since verl replaces the forward of the model's class."""


class Settings(dict):
    """What the losses read of verl's ActorConfig."""

    __getattr__ = dict.__getitem__


CONFIG = Settings(
    clip_ratio=0.2, clip_ratio_low=None, clip_ratio_high=0.28, clip_ratio_c=3.0, loss_agg_mode="token-mean",
    global_batch_info={"dp_size": 1, "batch_num_tokens": PROMPTS * SAMPLES * LENGTH},
)  # fmt: skip


@torch.no_grad()
def sampled(model: Actor) -> torch.Tensor:
    """(B, 1 + LENGTH) tokens after the prompt "say", the stand-in of verl's rollout engine."""
    ids = torch.full((PROMPTS * SAMPLES, 1), WORDS.index("say"))
    for _ in range(LENGTH):
        logits = model.lm_head(model.model(ids).last_hidden_state[:, -1])
        ids = torch.cat([ids, logits.softmax(-1).multinomial(1)], 1)
    return ids


def log_probs(model: Actor, ids: torch.Tensor) -> torch.Tensor:
    """(B, LENGTH) of the response, as the actor's worker takes them from its fused forward."""
    return model(input_ids=ids, temperature=1.0, return_dict=True, use_cache=False).log_probs[:, :-1]


def main(steps: int = 60) -> float:
    """Train and return the last mean reward."""
    torch.manual_seed(0)
    fuserl.trainers.verl.patch()  # it is, unless something has taken it out since the import
    print(fuserl.trainers.verl.report())
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    )  # fmt: skip
    model = Actor(config)
    patch_forward_with_backends(model, use_fused_kernels=True, fused_kernels_backend="torch")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    uids = np.array([str(uuid.UUID(int=n)) for n in range(PROMPTS)], dtype=object).repeat(SAMPLES)
    for _ in range(steps):
        ids = sampled(model)
        with torch.no_grad():
            old = log_probs(model, ids)
        mask = torch.ones_like(old)
        rewards = torch.zeros_like(old)
        rewards[:, -1] = (ids[:, 1:] == WORDS.index("yes")).float().mean(1)
        estimator = core_algos.get_adv_estimator_fn("fuserl_rloo")
        advantages, _ = estimator(rewards, mask, index=uids, config=Settings())
        for _ in range(2):
            loss, _ = core_algos.get_policy_loss_fn("fuserl_grpo")(
                old, log_probs(model, ids), advantages, mask,
                loss_agg_mode=CONFIG.loss_agg_mode, config=CONFIG, rollout_is_weights=None,
            )  # fmt: skip
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return rewards.sum(1).mean().item()


if __name__ == "__main__":
    print(f"mean reward {main():.2f}")
