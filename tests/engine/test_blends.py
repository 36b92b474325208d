"""Several tasks in one run: whose turn it is, what is held out, how each is shown and judged."""

import json

import pytest
from batches import config

from fuserl.engine import blends, prompts, rewards
from fuserl.engine.prompts import configured

SUMS, GCD = "reasoning_gym:chain_sum:max_terms=2,max_digits=1", "reasoning_gym:gcd"


def rows(folder, name, count=12):
    path = folder / f"{name}.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"{name}{n}=", "answer": f"{name}-{n}"}) + "\n" for n in range(count))
    )
    return str(path)


def both(tmp_path, name, **changes):
    given = dict(data=None, task=name, reward=None, few_shot=1, eval_problems=6)
    return configured(config(tmp_path, "grpo", **{**given, **changes}))


@pytest.mark.parametrize(
    ("name", "expected"),
    [("A", [(1, "A")]), ("A + B", [(1, "A"), (1, "B")]), ("2 A + B + 10 C", [(2, "A"), (1, "B"), (10, "C")])],
)
def test_a_name_is_of_tasks_with_shares(name, expected):
    assert blends.parts(name) == expected


def test_a_files_name_is_one_task(tmp_path):
    path = rows(tmp_path, "a + b")
    assert blends.parts(path) == [(1, path)]
    with pytest.raises(ValueError, match="a mixture must read A"):
        blends.parts("0 A + B")


def test_draws_go_round_the_tasks_and_each_walks_on(tmp_path):
    a, b = rows(tmp_path, "a"), rows(tmp_path, "b")
    blend = configured(config(tmp_path, "grpo", data=f"2 {a} + {b}", eval_problems=4))
    walk = [prompt.metadata["question"] for prompt in blend.drawn(0, 0, 24)]
    assert [question[0] for question in walk] == ["a", "a", "b"] * 8
    pieces = [each.metadata["question"] for start in range(0, 24, 4) for each in blend.drawn(0, start, 4)]
    assert pieces == walk
    for part in blend.source.tasks:  # as if it were alone
        alone = [each.question for each in part.source.take(0, 0, 16, blend.apart)]
        own = [question for question in walk if question[0] == alone[0][0]]
        assert own == alone[: len(own)]
    held = {prompt.metadata["question"] for prompt in blend.held_out()}
    assert len(held) == 4 and {question[0] for question in held} == {"a", "b"}
    seen = {question for question in walk if question[0] == "a"}
    assert len(seen) == 10 and not held & set(walk)  # every one that is left, before any comes again
    for name, path in (("a", a), ("b", b)):
        assert all(prompt.metadata["task"] == path for prompt in blend.held_out() if prompt.text.startswith(name))


def test_each_task_has_its_own_examples_and_verifier(tmp_path):
    blend = both(tmp_path, f"{SUMS} + {GCD}")
    first, second = blend.drawn(0, 0, 2)
    assert (first.metadata["task"], second.metadata["task"]) == (SUMS, GCD)
    alone = configured(config(tmp_path, "grpo", data=None, task=SUMS, reward=None, few_shot=1, eval_problems=3))
    example = alone.prompt(alone.held[0]).text.splitlines()[0]
    assert first.text.startswith(example) and not second.text.startswith(example)
    verifier = rewards.verifier(blend)
    for prompt in (first, second):
        assert verifier(prompt.answer, prompt.answer, prompt.metadata) == 1.0
        assert verifier("x", prompt.answer, prompt.metadata) == 0.0
    assert [each.metadata["task"] for each in blend.held_out()] == [SUMS, GCD] * 3
    blend.require("answer", "chosen", "rejected")
    assert blend.source.size is None and blend.source.unverifiable is None


def test_a_mixture_of_files_and_generators_is_scored_in_workers(tmp_path):
    path = rows(tmp_path, "a")
    blend = both(tmp_path, f"{path} + {GCD}", few_shot=0)
    asked = blend.drawn(0, 0, 2)
    from test_rewards import rollouts

    given = rollouts(
        [each.answer for each in asked], [each.answer for each in asked], [each.metadata for each in asked]
    )
    with rewards.Scorer(rewards.verifier(blend), workers=1) as scorer:
        assert scorer(given)[0].tolist() == [1.0, 1.0]


def test_what_a_mixture_cannot_be(tmp_path):
    with pytest.raises(ValueError, match="each task once"):
        both(tmp_path, f"{GCD} + {GCD}")
    with pytest.raises(ValueError, match="must go with one task"):
        both(tmp_path, f"{GCD} + {SUMS}", eval_data=rows(tmp_path, "a"))


def test_a_mixture_is_the_same_whenever_it_is_made(tmp_path):
    one = both(tmp_path, f"{SUMS} + {GCD}").drawn(3, 5, 7)
    prompts._built.cache_clear()
    assert both(tmp_path, f"{SUMS} + {GCD}").drawn(3, 5, 7) == one
    assert both(tmp_path, f"{SUMS} + {GCD}").drawn(4, 5, 7) != one
