"""What a policy is asked: tasks by name or from a file, split once into examples, held-out and trained problems.

task("reasoning_gym:chain_sum:max_terms=2,max_digits=1")    problems without end, with a verifier of their own
task("problems.jsonl")                                      a user's rows: prompt, answer, and metadata
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fuserl.engine import lookup
from fuserl.engine.problems import Generated, Problem, Rows, Source, questions

_GYM = "reasoning_gym:"


@dataclass(frozen=True)
class Prompt:
    """One question to a policy.

    Args:
        text: what the model reads, few-shot examples included.
        answer: the expected answer, when there is one.
        metadata: whatever a reward needs besides (a reasoning-gym problem keeps its `entry` here).
    """

    text: str
    answer: str | None = None
    metadata: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """A source of problems, split by question text: no text is on two sides.

    The split belongs to the task, not to a run: runs with different seeds are judged on the same problems.
    """

    name: str
    source: Source
    examples: tuple[Problem, ...]  # solved in front of every question
    held: tuple[Problem, ...]  # never trained on
    render: Callable  # (source, examples, question) -> the text that the model reads

    def held_out(self, count: int | None = None) -> list[Prompt]:
        """The first `count` (default all) of the problems that are never trained on."""
        if count is not None and count > len(self.held):
            raise ValueError(
                f"held_out: count must be at most the {len(self.held)} that {self.name} holds out; got {count}. "
                "Hold out more when making the task."
            )
        return [self.prompt(problem) for problem in self.held[:count]]

    def drawn(self, seed: int, start: int, count: int) -> list[Prompt]:
        """Training problems from draw number `start` on: a function of its arguments, so that a run can resume."""
        kept_apart = questions(self.examples, self.held)
        return [self.prompt(problem) for problem in self.source.take(seed, start, count, kept_apart)]

    def prompt(self, problem: Problem) -> Prompt:
        """The problem as the model reads it."""
        text = self.render(self.source, self.examples, problem.question)
        return Prompt(text, problem.answer, {"question": problem.question, **problem.metadata})


def completion(source: Source, examples: Sequence[Problem], question: str) -> str:
    """Solved examples and the question as one text to continue: `3 + 4 = 7`, a line each, then `5 - 9 =`."""
    solved = [f"{source.opening(example.question)} {example.answer}" for example in examples]
    blocks = [*solved, source.opening(question)]
    return ("\n\n" if any("\n" in block for block in blocks) else "\n").join(blocks)


def chat(tokenizer, instruction: str | None = None) -> Callable:
    """A renderer that puts examples and question through the tokenizer's chat template, as turns of a conversation."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("chat: tokenizer must have a chat template; it has none. Use completion prompts (--no-chat).")
    opens_itself = tokenizer.bos_token and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]

    def render(source: Source, examples: Sequence[Problem], question: str) -> str:
        turns = [{"role": "system", "content": instruction}] if instruction else []
        for example in examples:
            turns.append({"role": "user", "content": example.question})
            turns.append({"role": "assistant", "content": example.answer})
        turns.append({"role": "user", "content": question})
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        # A tokenizer that opens every text with its own mark would put a second one before the template's.
        return text.removeprefix(tokenizer.bos_token) if opens_itself else text

    return render


def task(name: str, *, shots: int = 4, held_out: int = 200, seed: int = 0, render: Callable = completion) -> Task:
    """Find or read a task and split it.

    Args:
        name: `reasoning_gym:DATASET:option=value,...`, or the path of a JSONL file.
        shots: solved examples in front of every question.
        held_out: problems kept from training; the same ones for every run of the same task.
        seed: of the split.
        render: `completion`, or `chat(tokenizer)`.

    Raises:
        ValueError: unknown name or option, malformed row, or too few problems for the split.
    """
    source = _source(name)
    found = source.distinct(seed, shots + held_out)
    examples, held = tuple(found[:shots]), tuple(found[shots:])
    unsolved = [example for example in examples if example.answer is None]
    if unsolved:
        raise ValueError(f"task: examples must have answers; those of {name} have none. Use --few-shot 0.")
    if len(found) < shots + held_out or not source.distinct(seed + 1, 1, questions(found)):
        raise ValueError(
            f"task: {name} must have more problems than {shots} examples and {held_out} held out; it has {len(found)}. "
            "Take a harder task or more rows, or a smaller --eval-problems."
        )
    return Task(name, source, examples, held, render)


def sampler(config) -> Callable[[int], list[Prompt]]:
    """The `prompts` slot of a recipe: step (from 1) -> `config.groups` training prompts, a function of the seed too."""
    chosen = configured(config)
    return lambda step: chosen.drawn(config.seed, (step - 1) * config.groups, config.groups)


def held_out(config) -> list[Prompt]:
    """The prompts that the configured run is judged on."""
    return configured(config).held_out()


def configured(config) -> Task:
    """The task of a resolved configuration, built once."""
    name, chat_model = config.data or config.task, config.model if config.chat else ""
    return _built(name, config.few_shot, config.eval_problems, chat_model)


@functools.lru_cache(maxsize=8)
def _built(name: str, shots: int, held: int, chat_model: str | None) -> Task:
    if chat_model == "":
        return task(name, shots=shots, held_out=held)
    from fuserl.engine import models

    tokenizer = models.load(chat_model)[1]  # its weights come along, and go at once
    return task(name, shots=shots, held_out=held, render=chat(tokenizer))


def _source(name: str) -> Source:
    if name.startswith(_GYM):
        return Generated(name.removeprefix(_GYM))
    if name.endswith(".jsonl") or Path(name).is_file():
        return Rows(name)
    known, bare = lookup.package("reasoning_gym.factory", "tasks").DATASETS, name.partition(":")[0]
    near = f"Did you mean '{_GYM}{name}'?" if bare in known else lookup.nearest(bare, known)
    raise ValueError(f"task: name must be {_GYM}DATASET or a .jsonl file; got {name!r}. {near}")
