"""Is a completion right: its answer found in the text and compared with the reference, by letter or as mathematics.

Plain functions of `completion` and `answer`, usable as rewards by themselves: `--reward exact`.
"""

from __future__ import annotations

import functools
import re

from fuserl.engine import lookup, problems


def answer_in(completion: str, answer: str | None = None) -> str:
    """The answer that a completion gives: inside its last <answer> tags, else its first line.

    Where the reference `answer` has several lines (a grid, a board), or is not known, all of the completion counts.
    """
    tagged = re.findall(r"<answer>(.*?)</answer>", completion, re.DOTALL)
    if tagged:
        return tagged[-1].strip()
    text = completion.strip()
    return text if answer is None or "\n" in answer.strip() else text.partition("\n")[0].strip()


def exact(completion: str, answer: str) -> float:
    """1.0 when the completion's answer is the reference, letter for letter between the ends."""
    return float(answer_in(completion, answer) == answer.strip())


def math_equal(completion: str, answer: str) -> float:
    """1.0 when the completion's answer equals the reference as mathematics (`1/2` and `0.5`), judged by math-verify.

    math-verify limits its own time with a signal, which only the main thread of a process may set.
    """
    math_verify = lookup.package("math_verify", "tasks")
    return float(math_verify.verify(math_verify.parse(answer), math_verify.parse(answer_in(completion, answer))))


# Called once in every process that scores, before its first completion: importing counts against nobody's time.
math_equal.prepare = functools.partial(lookup.package, "math_verify", "tasks")


class Verifier:
    """The verifier of a generated task: 1.0 for a right answer, else 0.0.

    It travels to another process as its description, and is built anew there.

    Args:
        description: `DATASET:option=value,...`, as reasoning-gym's datasets are named in a task.
        partial_credit: give the verifier's own score between 0 and 1 instead.
        source: what the description describes, where it is built already.
    """

    def __init__(self, description: str, partial_credit: bool = False, source: problems.Generated | None = None):
        self.description, self.partial_credit = description, partial_credit
        self.source = source or problems.Generated(description)

    def __reduce__(self):
        return Verifier, (self.description, self.partial_credit)

    def __call__(self, completion: str, answer: str | None, metadata: dict) -> float:
        score = self.source.score(answer_in(completion, answer), metadata)
        return score if self.partial_credit else float(score == 1.0)


class ByTask:
    """The verifier of several tasks: each problem is judged by that of the task in its metadata.

    Args:
        verifiers: name of a task -> (its verifier, what that asks for among completion, answer and metadata).
    """

    def __init__(self, verifiers: dict[str, tuple]):
        self.verifiers = verifiers

    def __call__(self, completion: str, answer: str | None, metadata: dict) -> float:
        function, names = self.verifiers[metadata["task"]]
        known = {"completion": completion, "answer": answer, "metadata": metadata}
        return function(**{name: known[name] for name in names})
