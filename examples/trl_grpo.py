"""TRL's GRPOTrainer on fuserl's ops: one line more than without.

    pip install "trl>=1.16,<1.17" datasets; python examples/trl_grpo.py

A tiny random Llama is rewarded for saying "yes". Put a model and a data set of yours in; the line stays the same.
"""

import tempfile

import datasets
import tokenizers
import torch
import transformers
import trl

import fuserl.trainers.trl

WORDS = ("<pad>", "</s>", "say", "yes", "no", "maybe", "never", "always")


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A token per word."""
    ids = {word: at for at, word in enumerate(WORDS)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<pad>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>")


def reward(completions: list[str], **_) -> list[float]:
    """The share of words that are "yes"."""
    return [text.split().count("yes") / max(1, len(text.split())) for text in completions]


def main(steps: int = 60) -> float:
    """Train and return the last mean reward."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, fuserl.trainers.trl.patch():
        print(fuserl.trainers.trl.report())
        trainer = trl.GRPOTrainer(
            model=transformers.LlamaForCausalLM(config),
            args=trl.GRPOConfig(
                output_dir=folder, max_steps=steps, per_device_train_batch_size=32, num_generations=8,
                max_completion_length=6, learning_rate=3e-3, logging_steps=20, report_to="none", save_strategy="no",
                bf16=False, gradient_checkpointing=False, use_cpu=not torch.cuda.is_available(), disable_tqdm=True,
            ),
            train_dataset=datasets.Dataset.from_list([{"prompt": "say"}] * 32),
            processing_class=tokenizer(),
            reward_funcs=reward,
        )  # fmt: skip
        trainer.train()
    return [entry["reward"] for entry in trainer.state.log_history if "reward" in entry][-1]


if __name__ == "__main__":
    main()
