"""A run whose reward asks a judge at a server: it learns from the scores, and tells what was asked."""

import functools

import pytest
import tiny_runs
from loopback import said, serving
from tiny_runs import numbers, rows

from fuserl.engine import judges, loop, rewards
from fuserl.engine.judges import JudgedScorer


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    tiny_runs.use(monkeypatch)


def scorer(closed, config):
    """A reward that a recipe may make: the better a judge likes a completion's style, the higher."""
    judge = judges.configured(config)
    judge.close = functools.partial(closed.append, 1)

    async def style(prompt, completion, answer):
        return (await judge.scores(prompt, completion, ["style"], answer=answer))[0] / 5

    return JudgedScorer(style, judge)


def liked(number, asked):
    """More to like in what has more odd digits."""
    text = asked.body["messages"][0]["content"].partition("<answer-")[2]
    return said(f'{{"style": {min(1 + sum(text.partition("</")[0].count(digit) for digit in "13579"), 5)}}}')


def test_a_judged_run_tells_its_questions_and_the_next_asks_none_of_them_again(tmp_path, monkeypatch):
    closed = []
    monkeypatch.setattr(rewards, "scorer", functools.partial(scorer, closed))
    with serving(liked) as server:
        settings = dict(judge=server.url, judge_model="small", save_every=1, judge_cache=str(tmp_path / "kept"))
        folder = loop.train(tiny_runs.config(tmp_path, "run", **settings))
        steps = [row for row in rows(folder) if "reward" in row]
        asked = len(server.asked)
        for row in steps:
            assert row["judge_calls"] + row["judge_cached"] == 8 and 0.2 <= row["reward"] <= 1.0
            assert row["judge_fallbacks"] == row["judge_unread"] == row["judge_retries"] == 0
        assert len(steps) == 3 and sum(row["judge_calls"] for row in steps) <= asked and closed == [1]
        again = loop.train(tiny_runs.config(tmp_path, "again", **settings))
        assert len(server.asked) == asked  # every answer is in the folder
    known = [
        [{k: v for k, v in row.items() if "judge" not in k} for row in numbers(rows(each))] for each in (folder, again)
    ]
    assert known[0] == known[1]
