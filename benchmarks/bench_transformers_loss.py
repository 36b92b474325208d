"""A training step of transformers' Trainer on a patched model and on a plain one: loss and backward.

The model has SmolLM2-135M's width and vocabulary and four of its thirty layers, so that the head shows. The backbone
alone, forward and backward, is the floor. Weights are random; no time depends on them. TRL's fused head, which leaves
logits out too, runs on the same model.
"""

import copy

import pytest
import torch
import transformers
from measure import Provider, compare, gradients, near

from fuserl.trainers import transformers as drop_in

SHAPE = dict(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=4, num_attention_heads=9,
    num_key_value_heads=3, max_position_embeddings=2048, tie_word_embeddings=True, rope_theta=100000.0,
)  # fmt: skip
TINY = SHAPE | dict(vocab_size=640, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=3)


def trainer(model, folder):
    """A Trainer of a model; its data are never read."""
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), report_to="none", use_cpu=not torch.cuda.is_available(), disable_tqdm=True
    )
    made = transformers.Trainer(model=model, args=arguments, train_dataset=[])
    made.current_gradient_accumulation_steps = 1  # as train() sets it
    return made


@pytest.mark.parametrize("labelled", [1.0, 0.5], ids=["every_token", "half_of_them"])
def test_transformers_loss(benchmark, device, smoke, tmp_path, labelled):
    torch.manual_seed(0)
    rows, length = (2, 24) if smoke else (2, 512) if device == "cpu" else (8, 2048)
    plain = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(TINY if smoke else SHAPE))).to(device)
    patched, third = copy.deepcopy(plain), copy.deepcopy(plain)
    drop_in.patch(patched)
    ids = torch.randint(3, plain.config.vocab_size, (rows, length), device=device)
    labels = ids.masked_fill(torch.rand(ids.shape, device=device) >= labelled, -100)
    given, items = {"input_ids": ids, "labels": labels}, (labels[:, 1:] != -100).sum()

    def step(model):
        made = trainer(model, tmp_path)

        def run():
            loss = made.training_step(model, dict(given), items)
            return loss.detach(), *gradients(model)

        return run

    def trl():
        from trl.trainer.utils import add_fused_lm_head

        if "forward" not in vars(third):
            add_fused_lm_head(third)
        loss = third(**given, fused_lm_head=True, num_items_in_batch=items).loss
        loss.backward()
        return loss.detach(), *gradients(third)

    def backbone():
        states = third.model(input_ids=ids, use_cache=False).last_hidden_state
        states.backward(torch.ones_like(states))
        third.zero_grad()

    right = near(step(plain)(), rtol=1e-5, atol=1e-6, results=1)
    compare(
        benchmark,
        Provider("the backbone alone", backbone),
        Provider("fuserl", step(patched), right),
        Provider("transformers", step(plain), right),
        Provider("TRL's fused head", trl, right),
        rounds=3,
        smoke=smoke,
    )
