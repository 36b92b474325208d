"""Runs of the loop on a tiny random model and a file of problems, for tests."""

import json
import pathlib
import types

import tiny_models

from fuserl.engine import atomic, catalogue, loop, models
from fuserl.engine.config import Config

LETTERS = "0123456789+-= \n"
SETTINGS = dict(
    steps=3, groups=2, group_size=4, max_new_tokens=4, eval_problems=4, lr=0.01, few_shot=0, threads=1,
    reward_workers=0,
)  # fmt: skip
ENDING = dict(stop=tuple("+-= \n"), max_new_tokens=30)  # so that many completions end by themselves, with a text
SHORTER = {"advantage_alignment": {"rounds": 2}}  # games are long
MACHINE = ("_s", "_gb", "_tflops", "_share", "seconds", "elapsed")  # how names of figures end that no two runs share


class Characters:
    """A tokenizer of arithmetic, one token per character, the same for any other one; token 2 ends a text."""

    eos_token_id = 2

    def __call__(self, text, add_special_tokens=True):
        # What it does not know reads as a line break.
        return types.SimpleNamespace(input_ids=[LETTERS.find(letter) % len(LETTERS) + 3 for letter in text])

    def save_pretrained(self, folder):
        """Leave a mark that `from_pretrained` looks for."""
        (pathlib.Path(folder) / "letters.txt").write_text(LETTERS)

    @classmethod
    def from_pretrained(cls, folder):
        """The tokenizer, out of a folder that it was saved to."""
        if (pathlib.Path(folder) / "letters.txt").read_text() != LETTERS:
            raise OSError("another tokenizer")
        return cls()

    def decode(self, tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False):
        return "".join(LETTERS[t - 3] for t in tokens if 3 <= t < 3 + len(LETTERS))


def problems(folder, count=8):
    """A file of sums with right and wrong answers."""
    rows = [
        {"prompt": f"{n}+1=", "answer": str(n + 1), "chosen": str(n + 1), "rejected": str(n + 2)} for n in range(count)
    ]
    path = folder / "problems.jsonl"
    atomic.write_text(path, "".join(json.dumps(row) + "\n" for row in rows))  # other ranks may be reading it
    return str(path)


def config(folder, name, **changes):
    """The configuration of a run in folder/name; options of the recipe among the changes."""
    recipe = changes.get("recipe", "grpo")
    settings = {**SETTINGS, **catalogue.fixed(recipe), **SHORTER.get(recipe, {}), **changes}
    return Config.from_dict(dict(data=problems(folder), out=str(folder / name), **settings))


def run(folder, name, **changes):
    """The metrics of a run."""
    return rows(loop.train(config(folder, name, **changes)))


def rows(folder):
    """The rows of a run's metrics."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def numbers(rows):
    """The rows without what no two runs share."""
    return [{name: value for name, value in row.items() if not name.endswith(MACHINE)} for row in rows]


def use(monkeypatch, make=tiny_models.model):
    """Let models.load give a tiny model."""
    monkeypatch.setattr(models, "load", lambda *_: (make(), Characters()))


def shortness(completion):
    """Reward for few characters: something that a random model gets different amounts of."""
    return 1.0 - len(completion) / 4


def modest(completion):
    """As shortness, and never all right."""
    return 0.9 * shortness(completion)


def perfect(completion):
    """All right, whatever it is."""
    return 1.0


def constant(completion):
    """The same for all: a group-relative method learns nothing from it."""
    return 0.5
