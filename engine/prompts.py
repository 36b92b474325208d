"""What a policy is asked: tasks by name or from a file, split once into examples, held-out and trained problems.

task("reasoning_gym:chain_sum:max_terms=2,max_digits=1")    problems without end, with a verifier of their own
task("web:hops=3,others=4")                                 questions to be answered from small generated webs
task("grid:size=5,slips=0.1")                               an arm on a grid, played a line a turn
task("symbolic_videos")                                     made-up videos, several kinds of questions
task("problems.jsonl")                                      a user's rows: prompt, answer, chosen, rejected, metadata

A run of several tasks names them all, `A + B`: see `blends`.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fuserl.engine import blends, files, lookup, symbolic_videos
from fuserl.engine.contracts import require
from fuserl.engine.problems import Generated, Problem, Rows, Source, questions

_GYM = "reasoning_gym:"
_HELD = 200  # held out where nothing else is said, of a small file a fifth


@dataclass(frozen=True)
class Prompt:
    """One question to a policy.

    Args:
        text: what the model reads, few-shot examples included.
        answer: the expected answer, when there is one.
        metadata: whatever a reward needs besides (a reasoning-gym problem keeps its `entry` here).
        chosen, rejected: a better and a worse completion of `text`, when there are such.
    """

    text: str
    answer: str | None = None
    metadata: dict = field(default_factory=dict)
    chosen: str | None = None
    rejected: str | None = None


@dataclass(frozen=True)
class Task:
    """A source of problems, split by question text: no text is on two sides.

    The split belongs to the task, not to a run: runs with different seeds are judged on the same problems.
    """

    name: str
    source: Source
    examples: tuple[Problem, ...]  # solved in front of every question
    held: tuple[Problem, ...]  # what a run is judged on
    apart: frozenset[str]  # questions that are never trained on: those of `examples`, `held` and all of an eval file
    render: Callable  # (source, examples, problem) -> the text that the model reads

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
        return [self.prompt(problem) for problem in self.source.take(seed, start, count, self.apart)]

    def prompt(self, problem: Problem) -> Prompt:
        """The problem as the model reads it."""
        text = self.render(self.source, self.examples, problem)
        metadata = {"question": problem.question, **problem.metadata}
        return Prompt(text, problem.answer, metadata, problem.chosen, problem.rejected)

    def require(self, *fields: str) -> None:
        """Check before training that the problems have what a recipe learns from, those held out included.

        Args:
            fields: among "answer", "chosen", "rejected".

        Raises:
            ValueError: some problem lacks one, its `rejected` is its `chosen`, or its verifier calls it right. Of a
                file every row is looked at, of a generator a sample.
        """
        shown = self.source.sample()
        for problem in (*shown, *self.held):
            for name in fields:
                if getattr(problem, name) is None:
                    raise ValueError(
                        f'{problem.place}: every problem must have "{name}" to learn from; this one has none. Add it, '
                        f"name its column with --columns {name}=COLUMN, or take another task."
                    )
        for problem in (*shown, *self.held) if "rejected" in fields else ():
            if problem.chosen == problem.rejected:
                raise ValueError(
                    f'{problem.place}: "rejected" must differ from "chosen"; both are {problem.chosen[-60:]!r}. Change '
                    "the row, or leave it out."
                )
        for problem in shown if "rejected" in fields else ():
            answered = problem.answer is not None
            if answered and self.source.score(problem.rejected.strip(), problem.metadata) == 1.0:
                raise ValueError(
                    f'{problem.place}: "rejected" must be a wrong completion; got {problem.rejected[-60:]!r}, which '
                    "the task's own verifier calls right. Change the row, or take another task."
                )


def completion(source: Source, examples: Sequence[Problem], problem: Problem) -> str:
    """Solved examples and the question as one text to continue: `3 + 4 = 7`, a line each, then `5 - 9 =`."""
    for each in (*examples, problem):
        if each.turns:
            raise ValueError(
                f"{each.place}: messages must go through a chat template; this task is made of plain text. "
                "Make it with render=chat(tokenizer)."
            )
    solved = [f"{source.opening(example.question)} {example.answer}" for example in examples]
    blocks = [*solved, source.opening(problem.question)]
    return ("\n\n" if any("\n" in block for block in blocks) else "\n").join(blocks)


def chat(tokenizer, instruction: str | None = None, *, texts: bool = True) -> Callable:
    """A renderer that puts examples and question through the tokenizer's chat template, as turns of a conversation.

    Args:
        tokenizer: a transformers tokenizer.
        instruction: a system turn in front, where the problem has none of its own.
        texts: a plain text is a user's turn; False leaves it as it is, and only messages become a conversation.

    Raises:
        ValueError: the tokenizer has no chat template; when called, the template refuses the messages.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "chat: tokenizer must have a chat template; it has none. Take an instruct model, or prompts of plain text "
            "without --chat."
        )
    refusals = lookup.package("jinja2.exceptions", "engine").TemplateError

    def render(source: Source, examples: Sequence[Problem], problem: Problem) -> str:
        if not (problem.turns or texts):
            return completion(source, examples, problem)
        system, asked = _turns(problem)
        if instruction and not system:
            system = [{"role": "system", "content": instruction}]
        solved = [[*_turns(each)[1], {"role": "assistant", "content": each.answer}] for each in examples]
        turns = [*system, *itertools.chain(*solved), *asked]
        try:
            return templated(tokenizer, turns)
        except refusals as error:
            says = " ".join(str(error).split()).rstrip(".")
            roles = ", ".join(turn["role"] for turn in turns)
            raise ValueError(
                f"{problem.place}: the messages must be such that the model's chat template takes them; got the roles "
                f"{roles}, and it says: {says}. Change the row, or take another model."
            ) from error

    return render


def templated(tokenizer, turns: list[dict]) -> str:
    """A conversation as a tokenizer's chat template writes it, to where the assistant speaks; it is then tokenized."""
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    # A tokenizer that opens every text with its own mark would put a second one before the template's.
    opens_itself = tokenizer.bos_token and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    return text.removeprefix(tokenizer.bos_token) if opens_itself else text


def task(
    name: str,
    *,
    shots: int = 4,
    held_out: int | None = _HELD,
    seed: int = 0,
    render: Callable = completion,
    held_from: str | None = None,
    columns: Sequence[str] = (),
) -> Task:
    """Find or read a task and split it.

    Args:
        name: `reasoning_gym:DATASET:option=value,...`, or the path of a file (see `files.read`).
        shots: solved examples in front of every question.
        held_out: problems kept from training, the same ones for every run of the same task; None is all that
            `held_from` has, and without such a file 200, or a fifth of a small file.
        seed: of the split.
        render: `completion`, or `chat(tokenizer)`.
        held_from: a file to hold out from instead; no question in it is trained on.
        columns: `ours=theirs` for both files.

    Raises:
        ValueError: unknown name or option, malformed row, or too few problems for the split.
    """
    source = _source(name, columns)
    judged = files.read(held_from, columns) if held_from else None
    return _split(name, source, judged, render, shots=shots, held_out=held_out, seed=seed)


def check_lengths(asked: Task, tokenizer, positions: int, new_tokens: int, *, completed: Sequence[str] = ()) -> None:
    """Check before training that prompts and completions fit the model.

    Args:
        asked: all its held-out problems are measured, and what its source shows: every row of a file, or a sample.
        tokenizer: the policy's.
        positions: tokens that the model can read.
        new_tokens: tokens that a generated completion may have.
        completed: fields that are trained on as completions, among "answer", "chosen", "rejected".

    Raises:
        ValueError: some problem is too long; the message names its row and its length.
    """
    for problem in (*asked.held, *asked.source.sample()):
        prompt = asked.prompt(problem)
        texts = [text for name in completed if (text := getattr(prompt, name)) is not None]
        if _most_tokens(prompt.text) + max([new_tokens, *map(_most_tokens, texts)]) <= positions:
            continue
        # A completion that is trained on gets one more token, which ends it.
        more = max([new_tokens, *(len(tokenizer(text).input_ids) + 1 for text in texts)])
        length = len(tokenizer(prompt.text).input_ids)
        if length + more > positions:
            raise ValueError(
                f"{problem.place}: prompt and completion must fit the {positions} tokens that the model can read; got "
                f"a prompt of {length} tokens and a completion of up to {more}. Shorten the row, leave it out, or take "
                "a smaller --max-new-tokens."
            )


def sampler(config) -> Callable[[int], list[Prompt]]:
    """The `prompts` slot of a recipe: step (from 1) -> `config.groups` training prompts, a function of the seed too."""
    asked = configured(config)
    return lambda step: asked.drawn(config.seed, (step - 1) * config.groups, config.groups)


def pool(config, count: int) -> list[Prompt]:
    """A data set of known size: all training prompts of the configured file, or `count` of a generator's."""
    require("pool", "count", count, count >= 1, "an integer >= 1")
    asked = configured(config)
    endless = asked.source.size is None
    found = asked.source.distinct(config.seed, count, asked.apart) if endless else asked.source.sample()
    return [asked.prompt(problem) for problem in found if problem.question not in asked.apart]


def repeated(config, number: int) -> Callable[[int], list[Prompt]]:
    """The `prompts` slot of a recipe that asks one training problem at every step: draw `number` of the task."""
    asked = configured(config)
    return lambda step: asked.drawn(config.seed, number, 1)


def held_out(config) -> list[Prompt]:
    """The prompts that the configured run is judged on."""
    return configured(config).held_out()


def configured(config) -> Task:
    """The task of a resolved configuration, built once for as long as its files do not change."""
    name = config.data or config.task
    several = blends.parts(name)
    return _built(
        tuple(several),
        held_from=config.eval_data,
        columns=tuple(config.columns),
        shots=config.few_shot,
        held_out=config.eval_problems,
        chats=config.chat,
        instruction=config.system,
        model=config.model,
        stamps=tuple(_stamp(path) for path in (*(part for _, part in several), config.eval_data)),
    )


@functools.lru_cache(maxsize=8)
def _built(several: tuple, *, held_from, columns, shots, held_out, chats, instruction, model, stamps) -> Task:
    if len(several) > 1:
        if held_from:
            raise ValueError(
                f"eval_data: it must go with one task; got {held_from} for {len(several)}. Leave it out: each task "
                "holds out problems of its own."
            )
        each = None if held_out is None else -(-held_out // len(several))
        given = dict(held_from=None, columns=columns, shots=shots, held_out=each, stamps=stamps)
        model_given = dict(chats=chats, instruction=instruction, model=model)
        tasks = [_built(((1, name),), **given, **model_given) for _, name in several]
        return blends.blended(tasks, [share for share, _ in several])
    [(_, name)] = several
    source = _source(name, columns)
    judged = files.read(held_from, columns) if held_from else None
    render = completion
    if chats or source.conversational or (judged and judged.conversational):
        from fuserl.engine import models

        render = chat(models.tokenizer(model), instruction, texts=chats)
    elif instruction:
        raise ValueError(
            f"system: it must go with chat prompts; got {instruction[:60]!r} for prompts of plain text. Add --chat."
        )
    return _split(name, source, judged, render, shots=shots, held_out=held_out, seed=0)


def _split(name: str, source: Source, judged: Rows | None, render: Callable, *, shots, held_out, seed) -> Task:
    if judged:
        held = judged.distinct(seed, judged.size if held_out is None else held_out)
        examples = source.distinct(seed, shots, questions(judged.problems))
        # The task's verifier is asked about both files.
        source.unverifiable = source.unverifiable or judged.unverifiable
        asked_for = f"{shots} examples beside the questions of {judged.path}"
    else:
        if held_out is None:
            held_out = _HELD if source.size is None else min(_HELD, source.size // 5)
        found = source.distinct(seed, shots + held_out)
        examples, held = found[:shots], found[shots:]
        asked_for = f"{shots} examples and {held_out} held out"
    if any(example.answer is None for example in examples):
        raise ValueError(f"task: examples must have answers; those of {name} have none. Use --few-shot 0.")
    apart = questions(examples, judged.problems if judged else held)
    enough = len(examples) == shots and (judged or len(held) == held_out)
    if not enough or not source.distinct(seed + 1, 1, apart):
        raise ValueError(
            f"task: {name} must have more problems than {asked_for}; it has {len(examples) + len(held)}. "
            "Take a harder task or more rows, or a smaller --eval-problems."
        )
    return Task(name, source, tuple(examples), tuple(held), apart, render)


def _turns(problem: Problem) -> tuple[list[dict], list[dict]]:
    """A problem's system turn, if it has one, and its other turns; plain text is one turn of a user."""
    turns = [*problem.turns] or [{"role": "user", "content": problem.question}]
    system = turns[:1] if turns[0]["role"] == "system" else []
    return system, turns[len(system) :]


def _source(name: str, columns: Sequence[str]) -> Source:
    if Path(name).suffix.lower() in files.SUFFIXES or Path(name).is_file():
        return files.read(name, columns)
    if name == symbolic_videos.NAME and not columns:
        return symbolic_videos.Videos()
    if columns:
        raise ValueError(f"columns: they must go with a file (--data); got {', '.join(columns)} for {name}.")
    if name.startswith(_GYM):
        return Generated(name.removeprefix(_GYM))
    if name.partition(":")[0] in ("web", "grid"):
        from fuserl.engine import grids, webs

        return {"web": webs.Web, "grid": grids.Grids}[name.partition(":")[0]](name.partition(":")[2])
    known, bare = lookup.package("reasoning_gym.factory", "tasks").DATASETS, name.partition(":")[0]
    near = f"Did you mean '{_GYM}{name}'?" if bare in known else lookup.nearest(bare, known)
    files_of = ", ".join(files.SUFFIXES)
    raise ValueError(
        f"task: name must be {_GYM}DATASET, web, grid, symbolic_videos or a {files_of} file; got {name!r}. {near}"
    )


def _most_tokens(text: str) -> float:
    """What a text's tokens cannot exceed, without counting them, which takes a while for a large file."""
    # A token holds at least one letter of plain ASCII, and a tokenizer puts a few marks around a text.
    return len(text) + 8 if text.isascii() else math.inf


def _stamp(path: str | None) -> tuple[int, int] | None:
    """What changes when a file is written again."""
    try:
        seen = Path(path or "").stat()
    except OSError:
        return None
    return seen.st_mtime_ns, seen.st_size
