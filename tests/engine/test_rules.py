"""Rules: what each calls right and wrong, and what tested code can do to the process that tests it: nothing."""

import os
import sys
import threading

import pytest

from fuserl.engine import rewards, rules


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        ("The answer is 42.", "42", 1.0),
        ("first 41\nthen 42", "42", 1.0),
        ("42 and not 41", "42", 0.0),
        ("<answer>42</answer> I had 41 before", "42", 1.0),
        ("$1,234.50", "1234.5", 1.0),
        ("3/4", "0.75", 1.0),
        ("-3", "3", 0.0),
        ("5-3", "3", 1.0),
        ("x = -3", "-3", 1.0),
        (".5", "0.5", 1.0),
        ("1e-3", "0.001", 1.0),
        ("0.3333333", "1/3", 1.0),
        ("0.33333", "1/3", 0.0),
        ("none", "42", 0.0),
        ("42", "many", 0.0),
        ("1/0", "1", 0.0),
        ("9" * 5000, "1", 0.0),
        ("", "0", 0.0),
        ("0", "0", 1.0),
    ],
)
def test_the_last_number_counts(completion, answer, right):
    assert rules.numeric(completion, answer) == right


@pytest.mark.parametrize(("completion", "right"), [(" yes \n", 1.0), ("no", 1.0), ("yes!", 0.0), ("", 0.0)])
def test_a_pattern_is_of_all_of_the_text(completion, right):
    assert rules.matches(completion, {"pattern": "yes|no"}) == right


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        ("I'm sorry, but I can't help with that.", 0.0),
        ("I\u2019m sorry.", 0.0),
        ("As an AI language model, I ...", 0.0),
        ("Unfortunately I cannot say.", 0.0),
        ("Sure: " + "x" * 200 + " I cannot", 1.0),
        ("I can't wait to help: do it so.", 1.0),
        ("A cat is an animal.", 1.0),
        ("", 1.0),
    ],
)
def test_a_refusal_is_seen_where_it_stands(completion, right):
    assert rules.complies(completion) == right


KEPT = {
    "min_words": (2, "a b", "a"),
    "max_words": (2, "a b", "a b c"),
    "paragraphs": (2, "a\n \nb", "a\nb"),
    "bullets": (2, "- a\n * b", "- a -b"),
    "contains": (["A", "b"], "b a", "b"),
    "excludes": (["A", "b"], "c", "a c"),
    "begins": ("So", "So it is", "It is so"),
    "ends": ("so.", "It is so. ", "So it is"),
    "json": (True, '```json\n{"a": 1}\n```', "{a: 1}"),
    "lowercase": (True, "a", "A"),
    "uppercase": (True, "A", "a"),
    "commas": (False, "a", "a, b"),
}


@pytest.mark.parametrize("name", rules.INSTRUCTIONS)
def test_an_instruction_is_kept_or_not(name):
    value, good, bad = KEPT[name]
    assert rules.follows(good, {"instructions": {name: value}}) == 1.0
    assert rules.follows(bad, {"instructions": {name: value}}) == 0.0


def test_all_instructions_must_be_kept_and_known():
    assert rules.follows("a b", {"instructions": {"min_words": 1, "max_words": 2}}) == 1.0
    assert rules.follows("a b", {"instructions": {"min_words": 1, "max_words": 1}}) == 0.0
    assert rules.follows("a b", {"instructions": {}}) == 1.0
    with pytest.raises(ValueError, match=r"follows: instructions must be of min_words, .*; got 'words'"):
        rules.follows("a b", {"instructions": {"words": 1}})


GOOD = "def double(x):\n    return 2 * x"
TESTS = ["assert double(2) == 4", "assert double('a') == 'aa'"]


@pytest.mark.parametrize(
    ("completion", "passes"),
    [
        (GOOD, 1.0),
        (f"So:\n```python\ndouble = None\n```\nor\n```py\n{GOOD}\n```\nDone.", 1.0),
        (f"from __future__ import annotations\n{GOOD}\nif __name__ == '__main__':\n    raise SystemExit", 1.0),
        ("def double(x):\n    return x + x + 0", 0.0),
        ("def double(x):", 0.0),
        ("", 0.0),
        (f"{GOOD}\nraise SystemExit(0)", 0.0),
        (f"import os\n{GOOD}\nos._exit(0)", 0.0),
        (f"{GOOD}\nopen('large', 'w').write('x' * 2**21)", 0.0),
        (f"{GOOD}\nbytearray(2**33)", 0.0),
        (f"{GOOD}\nprint(input())", 0.0),
        ("\ud800", 0.0),
    ],
)
def test_code_passes_its_tests_or_not(completion, passes):
    assert rules.passes_tests(completion, {"tests": TESTS}) == passes
    if passes:
        assert rules.passes_tests(completion, {"tests": "\n".join(TESTS)}) == 1.0


def test_tested_code_sees_neither_our_environment_nor_our_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.chdir(tmp_path)
    code = f"import os\nassert 'secret' not in os.environ.values()\nassert os.getcwd() != {str(tmp_path)!r}"
    assert rules.passes_tests(code, {"tests": "open('made', 'w').close()"}) == 1.0 and os.listdir(tmp_path) == []


def test_code_that_hangs_is_stopped():
    assert rules.passes_tests("while True: pass", {"tests": ""}, seconds=0.3) == 0.0


def test_what_tested_code_started_ends_with_it(tmp_path):
    held = tmp_path / "held"
    os.mkfifo(held)
    child = f"import signal, sys; f = open({str(held)!r}, 'w'); print('x', flush=True); signal.pause()"
    code = f"import subprocess as s, sys\ns.Popen([sys.executable, '-c', {child!r}], stdout=s.PIPE).stdout.read(1)"
    read = []
    reader = threading.Thread(target=lambda: read.append(held.read_text()), daemon=True)  # until the writer is gone
    reader.start()
    assert rules.passes_tests(code, {"tests": ""}, seconds=60.0) == 1.0
    reader.join(60)
    assert read == [""]


@pytest.mark.parametrize("name", ["numeric", "matches", "complies", "follows", "passes_tests"])
def test_each_rule_is_a_reward(name):
    assert rewards.load(f"fuserl.engine.rules:{name}") is getattr(sys.modules[rules.__name__], name)
