"""Batches for tests: ragged rollouts in groups of any order, shapes for hypothesis, and a recipe's gradient on one."""

import itertools
import json
from types import SimpleNamespace

import torch
from hypothesis import settings, strategies

from fuserl.engine import catalogue, checks
from fuserl.engine.batch import Batch, Counts, Rollouts, batch_of
from fuserl.engine.config import Config
from fuserl.engine.prompts import Prompt

steady = settings(deadline=None, derandomize=True)  # the same examples each time, on a machine however slow


def rollouts():
    """Two prompts, three completions of 2, 1 and 3 tokens."""
    return Rollouts(
        prompts=[Prompt("a"), Prompt("b")],
        prompt_tokens=[torch.tensor([1, 2]), torch.tensor([3])],
        group=torch.tensor([0, 0, 1]),
        tokens=torch.arange(10, 16),
        offsets=torch.tensor([0, 2, 3, 6]),
        rollout_logprobs=-torch.arange(6.0),
        texts=["x", "y", "z"],
        finish=["stop", "length", "stop"],
    )


def made(questions, group, texts):
    """Rollouts of these texts, a token a letter, each token with a log-prob of its own."""
    lengths = torch.tensor([len(text) for text in texts], dtype=torch.int64)
    tokens = torch.tensor([ord(letter) for text in texts for letter in text], dtype=torch.int64)
    return Rollouts(
        prompts=[Prompt(text) for text in questions],
        prompt_tokens=[torch.tensor([ord(letter) for letter in text], dtype=torch.int64) for text in questions],
        group=group,
        tokens=tokens,
        offsets=torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        rollout_logprobs=-torch.arange(float(len(tokens))),
        texts=texts,
        finish=["length" if len(text) > 2 else "stop" for text in texts],
    )


def three():
    """Their batch, with a reward each."""
    return batch_of(rollouts(), torch.tensor([1.0, 3.0, 5.0]))


def ragged(lengths, group, prompt_lengths=None, seed=0):
    """A batch whose every field is there: rollouts of these lengths in these groups, random numbers in the rest.

    A third of the rollouts have advantage 0, and so do some tokens of the others. Tokens count up from 0.
    """
    random = torch.Generator().manual_seed(seed)
    sizes, group = torch.tensor(lengths, dtype=torch.int64), torch.tensor(group, dtype=torch.int64)
    count, groups = int(sizes.sum()), int(group.max()) + 1
    rollout = torch.arange(len(sizes)).repeat_interleave(sizes)

    def noise(scale=1.0, size=count):
        return scale * torch.randn(size, generator=random)

    logprobs = -torch.rand(count, generator=random) - 0.1
    advantages = torch.where((torch.arange(len(sizes)) % 3 == 1)[rollout] | (noise() > 1), 0.0, noise())
    return Batch(
        tokens=torch.arange(count),
        rollout=rollout,
        offsets=torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)]),
        group=group,
        rewards=noise(size=len(sizes)),
        rollout_logprobs=logprobs,
        counts=Counts(count, len(sizes), len(group.unique())),
        prompt_tokens=[torch.zeros(length, dtype=torch.int64) for length in prompt_lengths or [1] * groups],
        advantages=advantages,
        old_logprobs=logprobs + noise(0.4),
        ref_logprobs=logprobs + noise(0.4),
        values=noise(),
        returns=noise(),
        extra={"weight": noise()},
    )


def pairs(lengths, seed=0):
    """A batch of len(lengths) / 2 pairs: the first half of the rollouts answer each prompt, then the other half do."""
    half = len(lengths) // 2
    batch = ragged(lengths, [*range(half)] * 2, seed=seed)
    chosen = torch.randint(2, (half,), generator=torch.Generator().manual_seed(seed)).float()
    return batch.replace(rewards=torch.cat([chosen, 1 - chosen]))


@strategies.composite
def batches(draw, most=6):
    """Batches of up to twelve rollouts of up to `most` tokens, some without, in groups of any size and order."""
    lengths = draw(strategies.lists(strategies.integers(0, most), min_size=1, max_size=12))
    drawn = draw(strategies.lists(strategies.integers(0, 4), min_size=len(lengths), max_size=len(lengths)))
    chosen = torch.tensor(drawn).unique(return_inverse=True)[1].tolist()
    prompts = draw(strategies.lists(strategies.integers(1, 9), min_size=5, max_size=5))
    return ragged(lengths, chosen, prompts[: max(chosen) + 1], seed=draw(strategies.integers(0, 9)))


def each_rollout(batch):
    """The rows of each rollout, as slices."""
    return [slice(begin, end) for begin, end in itertools.pairwise(batch.offsets.tolist())]


def config(folder, name, **changes):
    """The resolved configuration of a recipe on a file of sums, rewarded where the answer is exact."""
    path = folder / "problems.jsonl"
    sums = [{"prompt": f"{n}+1=", "answer": str(n + 1), "chosen": str(n + 1), "rejected": "x"} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in sums))
    settings = dict(data=str(path), reward="exact", reward_workers=0, eval_problems=4, max_new_tokens=16, device="cpu")
    return Config.from_dict({"recipe": name, **settings, **changes}).resolved()


def recipe(folder, name, **changes):
    """A recipe as `config` asks for it."""
    return catalogue.recipe(config(folder, name, **changes))


def losses(recipe, batch, **outputs):
    """A recipe's loss of each token, for advantages of its own, at outputs that may require a gradient."""
    return recipe.loss(SimpleNamespace(**outputs), checks.credited(batch, recipe.advantage))[0]


def gradient(recipe, batch, logprob, **others):
    """The gradient of a recipe's loss of a batch in the log-probs, (N,)."""
    leaf = logprob.clone().requires_grad_()
    return torch.autograd.grad(losses(recipe, batch, logprob=leaf, **others).sum(), leaf)[0]
