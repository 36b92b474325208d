"""An update of TRL's GRPOTrainer on a model of SmolLM2-135M's shape: loss and backward, with the patch and without.

Completions are drawn beforehand, as generation and AdamW are the same in both. The backbone alone, forward and
backward, is the floor of TRL's pass: no head, no loss. FuserlGRPOTrainer may fall below it, since it runs a prompt once
and no padding. Weights are random; no time depends on them.
"""

import contextlib
import importlib

import pytest
import torch
import transformers
from measure import Provider, compare, gradients, near
from rivals import rival

SMOLLM2 = dict(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, max_position_embeddings=2048, tie_word_embeddings=True, rope_theta=100000.0,
)  # fmt: skip
TINY = SMOLLM2 | dict(vocab_size=640, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=3)


def trainer(kind, config, folder, **options):
    """A GRPOTrainer, or another `kind`, of a random Llama."""
    import baselines_trl
    import datasets
    import trl

    torch.manual_seed(0)
    arguments = trl.GRPOConfig(
        output_dir=str(folder), per_device_train_batch_size=8, num_generations=4, bf16=False, report_to="none",
        gradient_checkpointing=False, use_cpu=not torch.cuda.is_available(), **options,
    )  # fmt: skip
    return (kind or trl.GRPOTrainer)(
        model=transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)),
        args=arguments,
        train_dataset=datasets.Dataset.from_list([{"prompt": "1"}] * 8),
        processing_class=baselines_trl.tokenizer(),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
    )


def rollouts(config, prompt, completion, device):
    """Eight padded completions of two prompts, as the trainer keeps them between sampling and updates."""
    ids = torch.randint(3, config["vocab_size"], (8, prompt + completion), device=device)
    ids[:, :prompt] = ids[:2, :prompt].repeat_interleave(4, 0)
    lengths = torch.tensor([completion // 4 * (1 + n % 4) for n in range(8)], device=device)
    mask = (torch.arange(completion, device=device) < lengths[:, None]).long()
    return {
        "prompt_ids": ids[:, :prompt], "prompt_mask": torch.ones_like(ids[:, :prompt]),
        "completion_ids": ids[:, prompt:], "completion_mask": mask, "num_items_in_batch": mask.sum(),
        "advantages": torch.tensor([1.0, -1, 0.5, -0.5, 1, -1, 2, -2], device=device),
    }  # fmt: skip


@pytest.mark.parametrize(("prompt", "completion"), [(64, 64), (16, 112)])
def test_trl_step(benchmark, device, smoke, tmp_path, prompt, completion):
    rival("trl", "trl.trainer.grpo_trainer")
    drop_in = importlib.import_module("fuserl.trainers.trl")
    config = TINY if smoke else SMOLLM2
    sharing = trainer(importlib.import_module("fuserl.trainers.trl_grpo").FuserlGRPOTrainer, config, tmp_path)
    drop_in.unpatch()
    made = trainer(None, config, tmp_path)
    with drop_in.patch():
        patched = trainer(None, config, tmp_path)
    model, inputs = made.model, rollouts(config, prompt, completion, made.model.device)
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)

    def update(patch, made=made):
        made.current_gradient_accumulation_steps = 1  # as train() sets it
        with patch:
            loss = made._compute_loss(made.model, inputs)
            loss.backward()
        return loss.detach(), *gradients(made.model)

    def backbone():
        states = model.model(input_ids=ids, use_cache=False).last_hidden_state
        states.backward(torch.ones_like(states))
        model.zero_grad()

    right = near(update(contextlib.nullcontext()), atol=1e-5, results=1, limit=1e-3)
    compare(
        benchmark,
        Provider("the backbone alone", backbone),
        Provider("fuserl, prompts once", lambda: update(drop_in.patch(), sharing), right),
        Provider("fuserl", lambda: update(drop_in.patch(), patched), right),
        Provider("trl", lambda: update(contextlib.nullcontext()), right),
        rounds=3,
        smoke=smoke,
    )
