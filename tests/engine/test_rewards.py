"""Rewards: reasoning-gym's own verdicts, a user's function, and errors that name the rollout."""

import sys
import types

import pytest
import torch

from fuserl.engine import prompts, rewards
from fuserl.engine.batch import Rollouts
from fuserl.engine.prompts import Prompt


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


@pytest.mark.parametrize(
    ("completion", "answer", "found"),
    [
        (" 7\n8 + 1 = 9", "7", "7"),
        ("\n7", "7", "7"),
        ("let me see <answer> 3 </answer> or <answer>\n4\n</answer>", "4", "4"),
        ("1 2\n3 4", "1 2\n3 4", "1 2\n3 4"),
        ("1 2\n3 4\n", None, "1 2\n3 4"),
        ("", "7", ""),
    ],
)
def test_answer_in(completion, answer, found):
    assert rewards.answer_in(completion, answer) == found


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


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e39, None, "1", [1.0], torch.tensor(1.0)])
def test_what_is_not_one_finite_number_names_the_rollout(value):
    with pytest.raises(ValueError, match=r"one finite number; got .* for rollout 1 \(prompt 'question 1 ='.*'b'"):
        rewards.score(lambda completion: value if completion == "b" else True, rollouts(["a", "b"], ["1", "2"]))


def test_an_exception_names_the_rollout_and_keeps_its_cause():
    with pytest.raises(RuntimeError, match=r"raised KeyError: 'level' for rollout 0 \(prompt 'question 0 ='") as caught:
        rewards.score(lambda metadata: metadata["level"], rollouts(["a" * 500], ["1"]))
    assert isinstance(caught.value.__cause__, KeyError) and len(str(caught.value)) < 400


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


def test_built_in_rewards():
    assert [rewards.exact(text, "42") for text in (" 42\n", "42.0")] == [1.0, 0.0]
    assert [rewards.math_equal(text, "1/2") for text in ("0.5", "<answer>$\\frac{1}{2}$</answer>", "2")] == [1, 1, 0]


def test_configured_reads_the_configuration(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "1 + 1 =", "answer": "2"}\n{"prompt": "1 + 2 =", "answer": 3}\n')
    config = types.SimpleNamespace(
        task="", data=str(path), few_shot=0, eval_problems=1, chat=False, model=None, reward=None, partial_credit=False
    )
    rows = prompts.configured(config).held_out()
    group = rollouts([f" {rows[0].answer}\n", "x"], [rows[0].answer] * 2, [rows[0].metadata] * 2)
    assert rewards.score(rewards.configured(config), group).tolist() == [1.0, 0.0]
    config.reward = "exact"
    assert rewards.configured(config) is rewards.exact


def test_rows_without_an_answer_need_a_reward(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "answer": "2"}\n{"prompt": "b"}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl:2 has no answer\. Add it, or name a reward"):
        rewards.verifier(prompts.task(str(path), shots=0, held_out=1))


def test_a_missing_package_names_its_pip_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(RuntimeError, match=r'math_verify is not installed. Run: pip install "fuserl\[tasks\]"'):
        rewards.math_equal("1", "1")
