"""Answers found in completions, compared by letter and as mathematics, and what a generated task's verifier is."""

import pickle
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuserl.engine import problems, verifiers

CHAIN = "chain_sum:max_terms=2,max_digits=1"


@pytest.mark.parametrize(
    ("completion", "answer", "found"),
    [
        (" 7\n8 + 1 = 9", "7", "7"),
        ("\n7", "7", "7"),
        ("let me see <answer> 3 </answer> or <answer>\n4\n</answer>", "4", "4"),
        ("1 2\n3 4", "1 2\n3 4", "1 2\n3 4"),
        ("1 2\n3 4\n", None, "1 2\n3 4"),
        ("", "7", ""),
        ("<answer>7", "7", "<answer>7"),
    ],
)
def test_answer_in(completion, answer, found):
    assert verifiers.answer_in(completion, answer) == found


@given(st.text(), st.none() | st.text())
def test_an_answer_is_a_part_of_the_completion_without_blanks_around(completion, answer):
    found = verifiers.answer_in(completion, answer)
    assert found in completion and found == found.strip()


@given(st.text())
def test_the_reference_itself_is_exact(answer):
    assert verifiers.exact(f"<answer>{answer}</answer>", answer) == float("</answer>" not in answer)


def test_built_in_verifiers():
    assert [verifiers.exact(text, "42") for text in (" 42\n", "42.0")] == [1.0, 0.0]
    texts = ("0.5", "<answer>$\\frac{1}{2}$</answer>", "2", "", "\\frac{")
    assert [verifiers.math_equal(text, "1/2") for text in texts] == [1, 1, 0, 0, 0]


@pytest.mark.parametrize("call", [lambda: verifiers.math_equal("1", "1"), verifiers.math_equal.prepare])
def test_a_missing_package_names_its_pip_line(call, monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(RuntimeError, match=r'math_verify is not installed. Run: pip install "fuserl\[tasks\]"'):
        call()


@pytest.mark.parametrize("partial_credit", [False, True])
def test_a_verifier_travels_as_its_description(partial_credit):
    source = problems.Generated(CHAIN)
    judge = verifiers.Verifier(CHAIN, partial_credit, source)
    sent = pickle.dumps(judge)
    assert len(sent) < 200 and CHAIN.encode() in sent
    arrived = pickle.loads(sent)
    assert judge.source is source and arrived.source is not source
    for problem in source.distinct(0, 20):
        for text in (problem.answer, f"{problem.answer} I think", "x", ""):
            given = {"completion": text, "answer": problem.answer, "metadata": problem.metadata}
            assert arrived(**given) == judge(**given)
        assert judge(problem.answer, problem.answer, problem.metadata) == 1.0
        near = judge(f"{problem.answer} I think", problem.answer, problem.metadata)
        assert (0.0 < near < 1.0) if partial_credit else near == 0.0
