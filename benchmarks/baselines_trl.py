"""TRL's own trainers on the toy problem of baselines.py: the figure that each baseline is held against.

    pip install trl datasets; python benchmarks/baselines_trl.py [RECIPE ...]     appends rows to the same file

Weights, problems and their order, steps, batches, learning rate, AdamW's settings, clipping and losses' options are
those of our run, and the weights are judged as ours are. What differs is said in a row's note.
"""

from __future__ import annotations

import contextlib
import functools
import io
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import baselines
import datasets
import tokenizers
import torch
import transformers
import trl

from fuserl.engine import catalogue, learners, loop, prompts, verifiers
from fuserl.engine.config import Config

PROVIDER = f"trl {trl.__version__}"
NONE = {"max_rl": "no such scaling of rewards", "reinforce_pp": "no trainer", "ppo": "no trainer"}
CUT = "an optimizer step sees rollouts of all groups; ours, whole groups"
NOTES = {
    "dapo": "prompts whose rewards agree are not replaced",
    "gspo": CUT,
    "cispo": CUT,
}


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """The numbering of Digits; a line break ends a text, as it stops our completions."""
    numbers = {letter: at + 3 for at, letter in enumerate(baselines.LETTERS)}
    model = tokenizers.models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2, **numbers}, unk_token="<pad>")
    letters = tokenizers.Tokenizer(model)
    letters.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    letters.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=letters, pad_token="<pad>", eos_token="\n", clean_up_tokenization_spaces=False
    )


def sampled(trainer, settings, config: Config, folder: Path, **options):
    """A trainer that samples completions and has them rewarded, ready to train."""
    options = {"epsilon": config.options["low"], "epsilon_high": config.options["high"], **options}
    rollouts = config.groups * config.group_size
    arguments = settings(
        **_shared(config, folder, rollouts // config.minibatches),
        steps_per_generation=config.minibatches,
        num_generations=config.group_size,
        max_completion_length=config.max_new_tokens,
        temperature=config.temperature,
        beta=config.options.get("beta", 0.0),
        shuffle_dataset=False,
        **options,
    )
    rows = [{"prompt": prompt.text, "answer": prompt.answer} for prompt in _drawn(config)]
    return _made(trainer, baselines.started(config.seed), arguments, rows, reward_funcs=_rewards)


def cispo(config: Config, folder: Path):
    """CISPO; TRL's epsilon_high is the bound of the ratio itself."""
    bound = {"epsilon_high": 1 + config.options["high"], "loss_type": "cispo"}
    return sampled(trl.GRPOTrainer, trl.GRPOConfig, config, folder, **bound)


def dpo(config: Config, folder: Path):
    """DPO of our pairs."""
    arguments = trl.DPOConfig(**_shared(config, folder, config.groups), beta=config.options["beta"])
    reference = baselines.started(config.seed)
    return _made(trl.DPOTrainer, baselines.started(config.seed), arguments, _pairs(config), ref_model=reference)


def reward_model(config: Config, folder: Path):
    """A reward model of our pairs, whose head starts at 0 as ours does."""
    start = baselines.started(config.seed)
    start.config.num_labels = 1
    model = transformers.LlamaForSequenceClassification(start.config)
    model.model.load_state_dict(start.model.state_dict())
    torch.nn.init.zeros_(model.score.weight)
    arguments = trl.RewardConfig(**_shared(config, folder, config.groups))
    return _made(trl.RewardTrainer, model, arguments, _pairs(config))


def sft(config: Config, folder: Path):
    """Maximum likelihood of our answers."""
    rows = [{"prompt": prompt.text, "completion": f" {prompt.answer}"} for prompt in _drawn(config)]
    arguments = trl.SFTConfig(**_shared(config, folder, config.groups))
    return _made(trl.SFTTrainer, baselines.started(config.seed), arguments, rows)


grpo = functools.partial(sampled, trl.GRPOTrainer, trl.GRPOConfig)
TRAINERS = {
    "grpo": functools.partial(grpo, loss_type="grpo"),
    "dr_grpo": functools.partial(grpo, loss_type="dr_grpo", scale_rewards="none"),
    "dapo": functools.partial(grpo, loss_type="dapo"),
    "gspo": functools.partial(grpo, loss_type="grpo", importance_sampling_level="sequence"),
    "cispo": cispo,
    "rloo": functools.partial(sampled, trl.RLOOTrainer, trl.RLOOConfig),
    "dpo": dpo,
    "reward_model": reward_model,
    "sft": sft,
}


def judged(recipe: str, seed: int) -> tuple[dict, dict, float]:
    """The evaluations before and after training with TRL, taken as those of our runs, and the seconds of its steps."""
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(io.StringIO()):
        config = baselines.configured(Path(scratch), recipe, seed).resolved()
        torch.set_num_threads(config.threads)
        judge, trainer = JUDGES.get(recipe, completing)(config), TRAINERS[recipe](config, Path(scratch))
        before = judge(trainer.model)
        seconds = trainer.train().metrics["train_runtime"]
        return before, judge(trainer.model), seconds


def completing(config: Config) -> Callable:
    """A judge that gives a model's weights to our policy, which our loop evaluates."""
    ours, held_out = catalogue.recipe(config), prompts.configured(config).held_out()
    with baselines.loading(baselines.started(config.seed)):
        policy, _ = learners.of(config, ours)

    def judge(model) -> dict:
        policy.model.load_state_dict(model.state_dict())
        return loop.evaluated(policy, ours, held_out, 0)

    return judge


def scoring(config: Config) -> Callable:
    """A judge of a reward model: the share of held-out pairs that its scores put in order."""
    held_out, words = prompts.configured(config).held_out(), tokenizer()

    @torch.no_grad()
    def judge(model) -> dict:
        model.eval()
        right = 0
        for each in held_out:
            chosen, rejected = (words(f"{each.text} {side}\n").input_ids for side in (each.chosen, each.rejected))
            right += bool(model(torch.tensor([chosen])).logits > model(torch.tensor([rejected])).logits)
        return {"accuracy": right / len(held_out), "pair_accuracy": right / len(held_out)}

    return judge


JUDGES = {"reward_model": scoring}


def main(recipes) -> None:
    """Train with TRL's trainers, print a table and keep the rows."""
    for recipe in recipes or catalogue.RECIPES:
        if recipe in NONE:
            print(f"{recipe:<14} {PROVIDER:<11} {NONE[recipe]}")
            continue
        note = {"note": NOTES[recipe]} if recipe in NOTES else {}
        baselines.keep(recipe, PROVIDER, [judged(recipe, seed) for seed in baselines.SEEDS], **note)


def _shared(config: Config, folder: Path, batch: int) -> dict:
    """Settings that every trainer of TRL's has, for batches of so many rows."""
    return dict(
        output_dir=str(folder / "trl"), max_steps=config.steps * config.minibatches, seed=config.seed,
        per_device_train_batch_size=batch, train_sampling_strategy="sequential", learning_rate=config.lr,
        lr_scheduler_type=config.schedule, weight_decay=config.weight_decay, adam_beta1=0.9, adam_beta2=0.95,
        max_grad_norm=config.max_grad_norm, bf16=False, gradient_checkpointing=False, use_cpu=True, report_to="none",
        logging_strategy="no", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip


def _drawn(config: Config) -> list[prompts.Prompt]:
    """The prompts of all our steps, in their order."""
    return prompts.configured(config).drawn(config.seed, 0, config.steps * config.groups)


def _pairs(config: Config) -> list[dict]:
    drawn = _drawn(config)
    return [{"prompt": each.text, "chosen": f" {each.chosen}", "rejected": f" {each.rejected}"} for each in drawn]


def _made(trainer, model, arguments, rows: list[dict], **more):
    data = datasets.Dataset.from_list(rows)
    return trainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer(), **more)


def _rewards(completions: list[str], answer: list[str], **_) -> list[float]:
    return [verifiers.exact(*each) for each in zip(completions, answer, strict=True)]


if __name__ == "__main__":
    warnings.simplefilter("ignore", FutureWarning)
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    main(sys.argv[1:])
