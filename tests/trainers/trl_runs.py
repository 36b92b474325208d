"""Ten steps of TRL's trainers on a tiny random Llama: as TRL computes them, on our ops, and as defined in float64.

Completions are drawn beforehand, so that all three runs see the same; the optimizer is plain SGD, whose step is linear
in the gradient: rounding is not blown up where a gradient is zero.
"""

import math
import random
import warnings
from contextlib import ExitStack
from unittest import mock

import pytest
import torch
import transformers

tokenizers = pytest.importorskip("tokenizers", reason="pip install transformers")
WORDS, LENGTH = 61, 7


def tokenizer():
    """One token per word w0, w1, ..."""
    model = tokenizers.models.WordLevel(
        {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{n}": n + 3 for n in range(WORDS)}}, unk_token="<pad>"
    )
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<pad>"
    )


def model(dtype, seed=3):
    """A Llama of two layers."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=WORDS + 3, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    made = transformers.LlamaForCausalLM(config)
    for parameter in made.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(4)
    return made.to(dtype)


def words(draw, low, high):
    return " ".join(f"w{draw.randrange(WORDS)}" for _ in range(draw.randrange(low, high)))


def completions(trainer, prompt_ids):
    """Completions and their sampler's log-probs, the same at a step whatever the weights are."""
    draw = random.Random(trainer.state.global_step)
    ids = [[draw.randrange(3, WORDS + 3) for _ in range(draw.randrange(2, LENGTH))] for _ in prompt_ids]
    ids = [[*each[:-1], 2] if draw.random() < 0.5 else each for each in ids]
    return ids, [[-math.log(WORDS) + 0.4 * draw.gauss(0, 1) for _ in each] for each in ids]


def rewards(completion_ids, **_):
    return [sum(token % 7 for token in each) / len(each) for each in completion_ids]


class Definition:
    """TRL's ChunkedLogProbFunction as defined, in the dtype of the hidden states."""

    @staticmethod
    def apply(hidden, weight, bias, targets, temperature, chunk_size, softcap, scale, outputs):
        logp = (hidden @ weight.T / temperature).log_softmax(-1)
        chosen = logp.gather(1, targets[:, None])[:, 0]
        entropy = -(logp.exp() * logp).sum(-1)
        sums, mean = (2 * logp).logsumexp(-1), (hidden @ weight.T / temperature).mean(-1)
        found = entropy, sums.detach(), mean.detach(), logp.argmax(-1) == targets
        names = "entropy", "log_sum_sq_probs", "mean_logits", "is_top1"
        return chosen, *(x if name in outputs else None for x, name in zip(found, names, strict=True))


def sampled(kind, dtype, folder, *, vllm=False, trainer=None, **options):
    """A GRPOTrainer or RLOOTrainer, or a `trainer` in its place."""
    import trl

    config, trainer = getattr(trl, f"{kind}Config"), trainer or getattr(trl, f"{kind}Trainer")
    options = {"num_generations": 4, "max_completion_length": LENGTH, "num_iterations": 2, **options}
    draw = random.Random(5)
    rows = [{"prompt": words(draw, 2, 6)} for _ in range(12)]
    model(dtype, seed=4).save_pretrained(folder / "reference")
    made = _made(trainer, config, dtype, folder, rows, options, reward_funcs=rewards)
    if made.ref_model is not None:
        made.ref_model.to(dtype)  # TRL loads it in float32
    made.use_vllm = vllm  # its log-probs are in `completions`; only the corrections by them are run

    def drawn(prompt_ids, *_):
        ids, logprobs = completions(made, prompt_ids)
        return ids if kind == "RLOO" else (ids, logprobs if vllm else None)

    made._generate_single_turn = drawn
    return made


def paired(kind, dtype, folder, **options):
    """A DPOTrainer, KTOTrainer or SFTTrainer."""
    import trl

    draw, rows = random.Random(5), []
    for at in range(40):
        row = {"prompt": words(draw, 2, 6), "label": at % 3 != 0}
        row |= {name: f" {words(draw, 2, 6)}" for name in ("completion", "chosen", "rejected")}
        wanted = {"DPO": "prompt chosen rejected", "KTO": "prompt completion label", "SFT": "prompt completion"}[kind]
        rows.append({name: row[name] for name in wanted.split()})
    trainer, config = getattr(trl, f"{kind}Trainer"), getattr(trl, f"{kind}Config")
    more = {} if kind == "SFT" else {"ref_model": model(dtype, seed=4)}
    return _made(trainer, config, dtype, folder, rows, options, **more)


def _made(trainer, config, dtype, folder, rows, options, **more):
    import datasets

    arguments = config(
        output_dir=str(folder), max_steps=10, per_device_train_batch_size=4, optim="sgd", max_grad_norm=100.0,
        lr_scheduler_type="constant", bf16=False, fp16=False, use_cpu=True, report_to="none", logging_steps=1,
        save_strategy="no", disable_tqdm=True, seed=1,
        **{"learning_rate": 0.05, "gradient_checkpointing": False, **options},
    )  # fmt: skip
    data = datasets.Dataset.from_list(rows)
    policy = model(dtype)
    policy.config._name_or_path = str(folder / "reference")  # where GRPO and RLOO load their reference
    return trainer(model=policy, args=arguments, train_dataset=data, processing_class=tokenizer(), **more)


TIMES = ("time", "runtime", "per_second", "flos", "epoch", "step")


def history(make, patches, dtype, folder):
    """Every metric that a run logs, by name, as the series of its ten steps."""
    import datasets

    datasets.disable_progress_bars()
    with ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for patch in patches:
            stack.enter_context(patch)
        trainer = make(dtype, folder)
        trainer.train()
    series = {}
    for entry in trainer.state.log_history[:-1]:
        for name, value in entry.items():
            if not any(word in name for word in TIMES):
                series.setdefault(name, []).append(float(value))
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in series.items()}


def defined():
    """TRL with the definition in the place of its function; its rows are taken out as ours are."""
    return [mock.patch("trl.trainer.utils._ChunkedLogProbFunction", Definition)]
