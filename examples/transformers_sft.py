"""transformers' Trainer on fuserl's ops: one name more than without, and no logits in training.

    pip install "transformers>=5.5" accelerate; python examples/transformers_sft.py

A tiny random Llama learns to count on. Put a model and a data set of yours in; from_pretrained is patched the same way.
"""

import tempfile

import torch
import transformers

from fuserl.trainers.transformers import AutoFuserlModelForCausalLM, report

WORDS, LENGTH = 16, 8


class Counting(torch.utils.data.Dataset):
    """Eight numbers, each one more than the one before, around the clock."""

    def __len__(self) -> int:
        return 512

    def __getitem__(self, at: int) -> dict:
        ids = (torch.arange(LENGTH) + at) % WORDS
        return {"input_ids": ids, "labels": ids}


def main(steps: int = 60) -> float:
    """Train and return the probability that the model gives the right next number."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=WORDS, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    model = AutoFuserlModelForCausalLM.from_config(config)
    print(report(model))
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=32, learning_rate=1e-2, logging_steps=20,
            report_to="none", save_strategy="no", use_cpu=not torch.cuda.is_available(), disable_tqdm=True,
        )  # fmt: skip
        transformers.Trainer(model=model, args=arguments, train_dataset=Counting()).train()
    ids = torch.stack([Counting()[at]["input_ids"] for at in range(WORDS)]).to(model.device)
    with torch.no_grad():
        found = model.eval()(input_ids=ids, labels=ids, outputs=("logprob",))
    return found.logprob[:, :-1].exp().mean().item()


if __name__ == "__main__":
    print(f"{main():.3f}")
