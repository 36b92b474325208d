"""Rewards: reasoning-gym's own verdicts, a user's function, whole groups, and errors that name the rollout."""

import asyncio
import dataclasses
import fractions
import math
import sys
import types

import numpy
import pytest
import reward_functions
import torch
from hypothesis import given
from hypothesis import strategies as st

from fuserl.engine import prompts, reward_worker, rewards
from fuserl.engine.batch import Rollouts
from fuserl.engine.prompts import Prompt

LARGEST = torch.finfo(torch.float32).max


def rollouts(texts, answers, metadata=None):
    """One prompt per completion."""
    count = len(texts)
    return Rollouts(
        prompts=[Prompt(f"question {n} =", answer, (metadata or [{}] * count)[n]) for n, answer in enumerate(answers)],
        prompt_tokens=[torch.tensor([1])] * count,
        group=torch.arange(count),
        tokens=torch.arange(count),
        offsets=torch.arange(count + 1),
        rollout_logprobs=torch.zeros(count),
        texts=texts,
        finish=["stop"] * count,
    )


def asked(name, count=1):
    task = prompts.task(name, shots=0, held_out=count)
    return task, task.held_out()


def test_verifier_is_reasoning_gyms_own():
    task, [prompt] = asked("reasoning_gym:chain_sum:max_terms=2,max_digits=2")
    right = prompt.answer
    texts = [f" {right}", f"+{right}" if int(right) >= 0 else right, f"{right}.00\nmore", f"{right}7", "x", ""]
    scored = rewards.score(rewards.verifier(task), rollouts(texts, [right] * 6, [prompt.metadata] * 6))
    assert scored.tolist() == [1, 1, 1, 0, 0, 0] and scored.dtype == torch.float32


def test_partial_credit_is_kept_only_when_asked_for():
    task, [prompt] = asked("reasoning_gym:gcd")
    near = rollouts([f"{prompt.answer} I think"], [prompt.answer], [prompt.metadata])
    assert rewards.score(rewards.verifier(task), near).item() == 0.0
    assert 0.0 < rewards.score(rewards.verifier(task, partial_credit=True), near).item() < 1.0


@pytest.mark.parametrize("name", ["prime_factorization", "chain_sum", "spiral_matrix", "countdown", "time_intervals"])
def test_verifiers_judge_whatever_a_policy_writes(name):
    task, held = asked(f"reasoning_gym:{name}", 3)
    judge = rewards.verifier(task)
    for prompt in held:
        junk = ["", "zzz", "- -", "1/0", "[", "None", "9" * 40, "\u221e"]
        scored = rewards.score(judge, rollouts(junk, [prompt.answer] * len(junk), [prompt.metadata] * len(junk)))
        assert scored.sum() <= 1  # some junk may be right by accident
        assert judge(completion=f" {prompt.answer}\n", answer=prompt.answer, metadata=prompt.metadata) == 1.0


def test_a_function_is_given_what_it_declares():
    seen = []

    def spying(completion, *, prompt, finish, weight=2.0):
        seen.append((prompt, completion, finish))
        return weight

    def whole(**everything):
        return len(everything)

    both = rollouts(["a", "b"], ["1", "2"])
    assert rewards.score(spying, both).tolist() == [2.0, 2.0] and seen[1] == ("question 1 =", "b", "stop")
    assert rewards.score(whole, both).tolist() == [5.0, 5.0]


def test_an_unknown_argument_is_refused_before_anything_runs():
    with pytest.raises(ValueError, match=r"ask for prompt, completion, answer, metadata, finish only; got 'solution'"):
        rewards.wanted(lambda completion, solution: 0.0)


@pytest.mark.parametrize(
    "value",
    [math.nan, math.inf, 1e39, 10**400, None, "1", [1.0], torch.tensor(1.0), 1j, numpy.ones(1), numpy.float64("nan")],
)
def test_what_is_not_one_finite_number_names_the_rollout(value):
    says = r"one finite number; got .* for rollout 1 \(prompt 'question 1 =', completion 'b', answer '2'\)\.$"
    with pytest.raises(rewards.RewardError, match=says):
        rewards.score(lambda completion: value if completion == "b" else True, rollouts(["a", "b"], ["1", "2"]))


NUMBERS = st.one_of(
    st.booleans(),
    st.integers(),
    st.floats(),
    st.fractions(),
    st.sampled_from([numpy.float32, numpy.float16, numpy.float64]).flatmap(lambda kind: st.floats(width=16).map(kind)),
    st.booleans().map(numpy.bool_),
    st.integers(-128, 127).map(numpy.int8),
)
ANYTHING = st.one_of(
    NUMBERS,
    st.none() | st.text() | st.binary() | st.complex_numbers() | st.dates() | st.decimals(),
    st.lists(NUMBERS) | st.dictionaries(st.text(), NUMBERS),
    st.builds(object),
)


def in_float32(value):
    return math.isfinite(value) and abs(fractions.Fraction(value)) <= LARGEST


@given(ANYTHING)
def test_whatever_comes_back_is_a_float_or_a_sentence(value):
    found = reward_worker.checked(value)
    is_number = isinstance(value, bool | int | float | fractions.Fraction | numpy.number | numpy.bool_)
    plain = value.item() if isinstance(value, numpy.generic) else value
    if is_number and in_float32(plain):
        assert found == [float(plain)] and type(found[0]) is float
    else:
        assert "must return one finite number; got" in found.says and "\n" not in found.says and len(found.says) < 300


@given(st.one_of(ANYTHING, st.lists(ANYTHING), st.lists(NUMBERS, max_size=3).map(tuple)), st.integers(1, 3))
def test_a_group_gets_a_number_for_each_or_a_sentence(value, size):
    found = reward_worker.checked(value, ["text"] * size)
    several = isinstance(value, list | tuple)
    if not several or len(value) != size:
        assert f"must return a list of {size} numbers, one per completion; got" in found.says and found.member is None
        return
    each = [reward_worker.checked(member) for member in value]
    wrong = [member for member, one in enumerate(each) if isinstance(one, reward_worker.Failure)]
    if wrong:
        assert "must return finite numbers; got" in found.says and found.member == wrong[0]
    else:
        assert found == [one[0] for one in each]


def in_groups(texts, group):
    """Completions of two prompts, in any order."""
    several = rollouts(texts, ["1", "2"] + ["-"] * (len(texts) - 2), [{"name": n} for n in range(len(texts))])
    return Rollouts(**{**vars(several), "prompts": several.prompts[:2], "group": torch.tensor(group)})


def test_a_whole_group_is_seen_at_once():
    seen = []

    def ranked(completions, prompt, answer, metadata, finishes):
        seen.append((prompt, completions, answer, metadata, finishes))
        return numpy.argsort(completions).argsort()

    found = rewards.score(ranked, in_groups(["b", "z", "c", "a", "y"], [0, 1, 0, 0, 1]))
    assert found.tolist() == [1, 1, 2, 0, 0]
    assert seen[0] == ("question 0 =", ["b", "c", "a"], "1", {"name": 0}, ["stop"] * 3)
    assert seen[1] == ("question 1 =", ["z", "y"], "2", {"name": 1}, ["stop"] * 2)


@pytest.mark.parametrize(
    ("returned", "says"),
    [
        (
            [1.0],
            r"a list of 2 numbers, one per completion; got 1 of them for rollout 1 and 1 more of its group \(prompt",
        ),
        (1.0, r"a list of 2 numbers, one per completion; got 1\.0 for rollout 1 and 1 more"),
        ("12", r"got '12' for rollout 1"),
        ({0: 1.0, 1: 2.0}, r"got \{0: 1\.0, 1: 2\.0\} for rollout 1"),
        (torch.ones(2), r"got tensor\(\[1\., 1\.\]\) for rollout 1"),
        (numpy.ones((2, 1)), r"finite numbers; got \[1\.0\] for rollout 1 \(prompt"),
        ([1.0, None], r"finite numbers; got None for rollout 4 \(prompt 'question 1 =', completion 'y'"),
        ([1.0, math.nan], r"finite numbers; got nan for rollout 4 \(prompt"),
    ],
)
def test_a_group_that_is_scored_wrongly_is_named(returned, says):
    group = in_groups(["b", "z", "c", "a", "y"], [0, 1, 0, 0, 1])
    with pytest.raises(rewards.RewardError, match=says) as caught:
        rewards.score(lambda completions: [2, 3, 4] if len(completions) == 3 else returned, group)
    known = caught.value.rewards
    assert known[[0, 2, 3]].tolist() == [2, 3, 4] and known[[1, 4]].isnan().all() and caught.value.rollouts is group


@pytest.mark.parametrize(
    ("function", "refused"),
    [
        (lambda completions, completion: 0.0, "completion'"),
        (lambda completions, finish: 0.0, "finish'"),
        (lambda finishes: 0.0, "finishes'"),
        (lambda completion, /: 0.0, "completion'"),
    ],
)
def test_single_and_group_arguments_are_not_mixed(function, refused):
    with pytest.raises(ValueError, match=f"only; got '{refused}. Rename that parameter"):
        rewards.wanted(function)


def test_everything_is_offered_by_the_kind_of_function():
    assert rewards.wanted(lambda **everything: 0.0) == rewards.SINGLE
    assert rewards.wanted(lambda completions, **everything: 0.0) == rewards.GROUP
    with pytest.raises(ValueError, match="type must be a function that declares its arguments; no signature"):
        rewards.wanted(type)


def test_an_exception_names_the_rollout_and_keeps_its_cause():
    says = r"raised KeyError: 'level' \(.*test_rewards\.py:\d+\) for rollout 1 \(prompt 'question 1 ='"
    with pytest.raises(RuntimeError, match=says) as caught:
        rewards.score(lambda metadata: metadata["level"], rollouts(["a", "b" * 500], ["1", "2"], [{"level": 3}, {}]))
    assert isinstance(caught.value.__cause__, KeyError) and len(str(caught.value)) < 400
    assert isinstance(caught.value, rewards.RewardError)
    assert caught.value.rewards[0] == 3.0 and caught.value.rewards[1].isnan() and len(caught.value.rollouts) == 2


@pytest.mark.parametrize(
    ("deed", "says"),
    [
        ("raise x", r"raised KeyError: 'first line x\\nsecond line' \(.*reward_functions\.py:\d+\) for rollout 1"),
        ("odd", r"raised Odd: of a class that no other process knows \(.*reward_functions\.py:\d+\) for rollout 1"),
        ("exit 3", r"raised SystemExit: 3 \(.*reward_functions\.py:\d+\) for rollout 1"),
        (
            "return x",
            r"raised ValueError: could not convert string to float: 'x' \(.*reward_functions\.py:\d+\) for rollout 1",
        ),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_is_one_line(deed, says, workers):
    group = rollouts(["return 1", deed, "return 2"], ["1"] * 3)
    scorer = rewards.Scorer(reward_functions.told, workers=workers)
    with scorer, pytest.raises(rewards.RewardError, match=says) as caught:
        scorer(group)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(").")


def test_long_words_of_an_error_are_cut():
    def verbose(completion):
        raise ValueError("many\nwords " * 100)

    says = r"raised ValueError: many words many .*\.\.\. \(.*:\d+\) for rollout 0"
    with pytest.raises(rewards.RewardError, match=says) as caught:
        rewards.score(verbose, rollouts(["a"], ["1"]))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_async_errors_keep_what_the_others_found():
    group = rollouts(["return 1", "raise x", "return 2"], ["1"] * 3)
    with rewards.Scorer(reward_functions.told_later) as scorer:
        with pytest.raises(rewards.RewardError, match=r"raised KeyError: .* for rollout 1") as caught:
            scorer(group)
        assert caught.value.rewards[[0, 2]].tolist() == [1.0, 2.0] and isinstance(caught.value.__cause__, KeyError)
        assert scorer(rollouts(["return 3"], ["1"]))[0].item() == 3.0


def test_async_calls_keep_their_event_loop():
    loops = set()

    async def where(completion):
        loops.add(asyncio.get_running_loop())
        return 1.0

    with rewards.Scorer(where) as scorer:
        for _ in range(3):
            scorer(rollouts(["a", "b"], ["1", "2"]))
    assert len(loops) == 1


def test_async_calls_inside_an_event_loop_need_a_worker():
    async def notebook(workers):
        with rewards.Scorer(reward_functions.length_later, workers=workers) as scorer:
            return scorer(rollouts(["abc"], ["1"]))[0].item()

    assert asyncio.run(notebook(1)) == 3.0
    with pytest.raises(RuntimeError, match="inside an event loop"):
        asyncio.run(notebook(0))


def test_an_interrupt_goes_through_unchanged():
    def interrupted(completion):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rewards.score(interrupted, rollouts(["a"], ["1"]))


def test_a_users_function_is_found_in_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "def longer(completion, answer): return len(completion) > len(answer)\ndef bad(text): return 0\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    try:
        assert rewards.score(rewards.load("my_rewards:longer"), rollouts(["ab", "a"], ["1", "1"])).tolist() == [1, 0]
        with pytest.raises(ValueError, match="Did you mean 'longer'"):
            rewards.load("my_rewards:langer")
        with pytest.raises(ValueError, match="got 'text'"):
            rewards.load("my_rewards:bad")
    finally:
        sys.modules.pop("my_rewards", None)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("exakt", "Did you mean 'exact'"),
        ("no_such_module_of_mine:f", r"Start fuserl in the folder of no_such_module_of_mine\.py"),
        ("math:", "must read module:function"),
        ("math:pi", "must name a function of math"),
    ],
)
def test_bad_reward_names(name, says):
    with pytest.raises(ValueError, match=says):
        rewards.load(name)


def test_configured_reads_the_configuration(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "1 + 1 =", "answer": "2"}\n{"prompt": "1 + 2 =", "answer": 3}\n')
    asked = {"task": "", "data": str(path), "eval_data": None, "columns": (), "few_shot": 0, "eval_problems": 1}
    read = {"chat": False, "system": None, "model": None}
    judged = {"reward": None, "partial_credit": False, "reward_workers": 2, "reward_timeout": 20.0}
    config = types.SimpleNamespace(**asked, **read, **judged)
    rows = prompts.configured(config).held_out()
    group = rollouts([f" {rows[0].answer}\n", "x"], [rows[0].answer] * 2, [rows[0].metadata] * 2)
    with rewards.scorer(config) as scorer:
        found, statistics = scorer(group)
        assert found.tolist() == [1.0, 0.0] and statistics == {"timeouts": 0}
        assert len(scorer._pool._workers) == 2 and scorer._pool._limit == 20.0
    config.reward = "exact"
    assert rewards.configured(config) is rewards.exact


def test_rows_without_an_answer_need_a_reward(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "answer": "2"}\n{"prompt": "b"}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl:2 has no answer\. Add it, or name a reward"):
        rewards.verifier(prompts.task(str(path), shots=0, held_out=1))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_reward_may_say_more_of_a_completion(workers):
    """Facts by name, NaN where a completion has none; the reward is a number as ever."""
    with rewards.Scorer(reward_functions.told_more, workers=workers) as scorer:
        scores, facts = scorer(rollouts(["a b", "c", "d e f"], ["1", "2", "3"]))
    assert scores.tolist() == [0.5, 0.5, 0.5] and facts.pop("timeouts") == 0
    assert {name: x.tolist() for name, x in facts.items() if name == "words"} == {"words": [2, 1, 3]}
    assert facts["commas"].isnan().tolist() == [False, True, False] and facts["commas"].dtype == torch.float32


def test_a_group_reward_may_say_more_of_each():
    def both(completions):
        return [{"reward": len(text), "rank": number} for number, text in enumerate(completions[:-1])] + [0.25]

    together = rollouts(["a", "bb", "c"], ["1"] * 3)
    together = dataclasses.replace(together, group=torch.zeros(3, dtype=torch.int64))
    scores, facts = rewards.Scorer(both)(together)
    assert scores.tolist() == [1, 2, 0.25] and facts["rank"][:2].tolist() == [0, 1] and facts["rank"][2].isnan()


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"words": 1}, r"one finite number; got \{'words': 1\}, a dict without \"reward\" for rollout 0"),
        ({"reward": 1, "words": math.nan}, r"one finite number; got \{.*nan\} for rollout 0"),
        ({"reward": "1"}, r"one finite number; got .* for rollout 0"),
        ({"reward": 1, 2: 3}, r"one finite number; got .* for rollout 0"),
    ],
)
def test_what_is_said_must_be_numbers(value, says):
    with pytest.raises(rewards.RewardError, match=says):
        rewards.score(lambda completion: value, rollouts(["a"], ["1"]))
