"""The providers of judges: a model of this process, rules and functions of a user, a server; within a scorer."""

import asyncio

import pytest
import tiny_models
import tiny_runs
import torch
from loopback import Pauses, in_turn, said, serving

from fuserl.engine import judges, models
from fuserl.engine.answerers import LocalModel, Rule, Together, written
from fuserl.engine.config import Config
from fuserl.engine.endpoint import Endpoint
from fuserl.engine.generation import generate
from fuserl.engine.judges import Judge, JudgedScorer
from fuserl.engine.prompts import Prompt
from fuserl.engine.verifiers import exact


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No proxy, no key."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def run(coroutine):
    return asyncio.run(coroutine)


def test_questions_of_one_turn_are_answered_together():
    batches = []

    def answers(items):
        batches.append(items)
        return [item * 2 for item in items]

    together = Together(answers)

    async def twice(item):
        return await together(await together(item))

    async def several():
        return await asyncio.gather(*map(twice, (1, 2, 3)))

    assert run(several()) == [4, 8, 12] and batches == [[1, 2, 3], [2, 4, 6]]


@pytest.mark.parametrize("error", [KeyError("weights"), SystemExit(3), ValueError("small")])
def test_whoever_waits_is_told_of_a_failure(error):
    def fails(items):
        raise error

    together = Together(fails)

    async def both():
        return await asyncio.wait_for(asyncio.gather(together(1), together(2), return_exceptions=True), 60)

    if isinstance(error, SystemExit):
        with pytest.raises(SystemExit):
            run(both())
    else:
        assert run(both()) == [error, error]


def talker():
    """A model of the characters alone, nearly every token of which is seen."""
    return tiny_models.model(vocab_size=3 + len(tiny_runs.LETTERS))


def local(monkeypatch, **options):
    """A tiny random model as a judge."""
    tiny_runs.use(monkeypatch, talker)
    monkeypatch.setattr(models, "tokenizer", lambda name: tiny_runs.Characters())
    return LocalModel("tiny", **{"max_tokens": 5, **options})


def test_a_local_model_answers_greedily_and_all_at_once(monkeypatch):
    model, batches = local(monkeypatch), []
    monkeypatch.setattr("fuserl.engine.generation.generate", lambda *a, **o: batches.append(a[2]) or generate(*a, **o))
    asked = [[{"role": "user", "content": f"{n}+1="}] for n in (1, 2, 1)]
    asked.append([*asked[0], {"role": "assistant", "content": "3"}, {"role": "user", "content": "2="}])

    async def all_of_them():
        return await asyncio.gather(*map(model, asked))

    answers, texts = run(all_of_them()), ["1+1=\n", "2+1=\n", "1+1=\n\n3\n\n2=\n"]
    assert [[prompt.text for prompt in batch] for batch in batches] == [texts] and model.counts == {"calls": 4}
    alone = [
        generate(talker(), tiny_runs.Characters(), [Prompt(t)], max_new_tokens=5, temperature=0.0).texts[0]
        for t in texts
    ]
    assert answers == [alone[0], alone[1], alone[0], alone[2]] and len(set(alone)) == 3


def test_a_local_model_has_its_chat_template(monkeypatch):
    words = tiny_runs.Characters()
    words.chat_template, words.bos_token = "there is one", None
    words.apply_chat_template = lambda turns, **_: "".join(turn["content"] for turn in turns) + "="
    monkeypatch.setattr(models, "tokenizer", lambda name: words)
    assert LocalModel("tiny")._text([{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]) == "12="


def test_a_folder_that_is_none_is_refused_before_a_model_is_loaded(tmp_path):
    with pytest.raises(ValueError, match="there is no such folder"):
        LocalModel(str(tmp_path / "none"))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_rule_is_a_reward_function_of_one_completion(workers):
    rule = Rule(exact, workers=workers)
    judge = Judge(rule=rule, counts=rule.counts, close=rule.close)

    async def several():
        return await asyncio.gather(*(judge.verdict("?", text, "", answer="4") for text in ("4", "5", " 4 ")))

    assert run(several()) == [True, False, True]
    assert judge.statistics() == {
        "judge_calls": 3, "judge_timeouts": 0, "judge_unread": 0, "judge_fallbacks": 0
    }  # fmt: skip
    judge.close()


RULES = """
import asyncio, time

def outside(completion): return 2.0 if completion == "high" else -1.0
def hangs(completion, metadata):
    while completion == "late": time.sleep(1)
    return metadata["worth"]
def raises(completion): return 1 / len(completion)
def group(completions): return [0.0 for _ in completions]
async def waits(prompt, completion, answer, finish): return float(prompt + completion == answer and finish == "stop")
async def turns(completion):
    for _ in range(int(completion)): await asyncio.sleep(0)
    return int(completion) / 100
async def writes(messages): return '{"verdict": true}' if "fine" in messages[0]["content"] else "hm"
def wrong(messages): return 3
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """Rules in a module of a user's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "judge_rules.py").write_text(RULES)
    return lambda name, **changes: judges.configured(
        tiny_runs.config(tmp_path, "run", judge=f"judge_rules:{name}", **changes).resolved()
    )


def read(judge, *texts, **known):
    async def several():
        return await asyncio.gather(*(judge.scores("1", text, ["x"], **known) for text in texts))

    try:
        return [each[0] for each in run(several())]
    finally:
        judge.close()


def test_a_rule_is_held_to_its_range(mine):
    assert read(mine("outside"), "high", "low") == [5.0, 1.0]


def test_a_rule_that_hangs_in_a_worker_is_worth_nothing(mine):
    judge = mine("hangs", reward_workers=1, reward_timeout=0.3)
    assert read(judge, "a", "late", "b", metadata={"worth": 0.5}) == [3.0, 1.0, 3.0]
    assert judge.statistics()["judge_timeouts"] == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_rule_answers_last_may_have_been_asked_first(mine, workers):
    assert read(mine("turns", reward_workers=workers), "100", "50", "0") == [5.0, 3.0, 1.0]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_rule_may_be_async_and_one_that_fails_is_told(mine, workers):
    assert read(mine("waits", reward_workers=workers), "2", "3", answer="12") == [5.0, 1.0]
    with pytest.raises(RuntimeError, match=r"judge: it raised ZeroDivisionError: .*judge_rules\.py:8"):
        read(mine("raises", reward_workers=workers), "")
    with pytest.raises(ValueError, match="group must judge one completion"):
        mine("group", reward_workers=workers)


def test_a_function_of_messages_writes(mine):
    judge = mine("writes")
    assert judge.writes and run(judge.verdict("?", "fine", "It is.")) is True
    assert run(judge.verdict("?", "bad", "It is.", otherwise=False)) is False
    with pytest.raises(ValueError, match="a function of messages must return a text; got 3"):
        run(mine("wrong").verdict("?", "a", "It is."))
    assert run(written(lambda messages: messages[0]["content"], [{"content": "a"}])) == "a"


def test_without_a_judge_the_runs_own_reward_is_the_rule(tmp_path):
    judge = judges.configured(tiny_runs.config(tmp_path, "run").resolved())
    assert run(judge.pairwise("1+1=", "2", "3", answer="2")) == (10.0, 1.0)
    judge = judges.configured(tiny_runs.config(tmp_path, "run", reward="tiny_runs:constant").resolved())
    assert run(judge.pairwise("1+1=", "2", "3", answer="2")) == (5.5, 5.5)


def test_a_judge_can_be_a_folder(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(models, "tokenizer", lambda name: asked.append(name) or tiny_runs.Characters())
    config = Config(device="cpu", judge=str(tmp_path), judge_tokens=7).resolved()
    judge = judges.configured(config)
    assert judge.answer.max_tokens == 7 and judge.writes
    judges.configured(config.replace(judge=models.DEFAULT)).close()
    assert asked == [str(tmp_path), None]


def test_a_judge_at_a_server_is_asked_as_configured(tmp_path):
    with serving(in_turn(said("hm"), said('{"first": 7, "second": 2}'))) as server:
        settings = dict(judge=server.url, judge_tokens=9, judge_cache=str(tmp_path / "kept"))
        with pytest.raises(ValueError, match=r"judge: a server must be told its model; .* Add --judge-model NAME"):
            judges.configured(Config(device="cpu", **settings).resolved())
        config = Config(device="cpu", judge_model="small", **settings).resolved()
        judge = judges.configured(config)
        assert run(judge.pairwise("?", "a", "b")) == run(judge.pairwise("?", "a", "b")) == (7.0, 2.0)
        assert judge.statistics() == {
            "judge_calls": 2, "judge_retries": 0, "judge_cached": 2, "judge_unread": 2, "judge_fallbacks": 0
        }  # fmt: skip
        again = judges.configured(config)  # another run
        assert run(again.pairwise("?", "a", "b")) == (7.0, 2.0) and len(server.asked) == 2
    assert all(
        (asked.body["model"], asked.body["temperature"], asked.body["max_tokens"]) == ("small", 0.0, 9)
        for asked in server.asked
    )


def test_a_judged_scorer_scores_in_a_run_and_tells_its_counts():
    closed = []

    def answers(number, asked):
        return said(
            '{"clarity": 5}' if "2" in asked.body["messages"][0]["content"].partition("<answer")[2] else "I cannot say."
        )

    with serving(answers) as server:
        made = Endpoint(server.url, "small", sleep=Pauses())
        judge = Judge(made.answer, counts=made.counts, close=lambda: closed.append(1))

        async def clear(prompt, completion):
            return (await judge.scores(prompt, completion, ["clarity"], tries=2))[0]

        given = generate(
            tiny_models.model(), tiny_runs.Characters(), [Prompt("1+1=")], group_size=3, max_new_tokens=3, seed=1
        )
        given.texts[:] = ["2", "3", "2"]
        with JudgedScorer(clear, judge) as score:
            rewards, facts = score(given)
    assert torch.equal(rewards, torch.tensor([5.0, 3.0, 5.0])) and closed == [1]
    assert facts == {
        "timeouts": 0, "judge_calls": 3, "judge_retries": 0, "judge_cached": 1, "judge_unread": 2, "judge_fallbacks": 1
    }  # fmt: skip


def test_a_server_that_is_gone_ends_the_scoring_in_one_sentence():
    with serving(in_turn()) as server:
        url = server.url
    made = Endpoint(url, "small", retries=1, sleep=Pauses())

    async def clear(prompt, completion):
        return (await Judge(made.answer).scores(prompt, completion, ["clarity"]))[0]

    given = generate(tiny_models.model(), tiny_runs.Characters(), [Prompt("1+1=")], max_new_tokens=3)
    with (
        JudgedScorer(clear, Judge(made.answer)) as score,
        pytest.raises(RuntimeError, match=r"cannot be reached.*2 tri"),
    ):
        score(given)
