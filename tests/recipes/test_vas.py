"""vas: without weighted draws a run is GRPO's, bit for bit; scores come from the policy and are counted."""

import dataclasses

import pytest
import tiny_runs
import torch
from batches import config, gradient, made, ragged, recipe
from tiny_runs import numbers, run

from fuserl.engine import loop, prompts
from fuserl.engine.meter import Meter

SHORT = "tiny_runs:shortness"


def half(completion):
    """Right for half of what a random model writes."""
    return float(len(completion) % 2)


tiny_runs.half = half
HALF = "tiny_runs:half"


def test_with_lam_0_prompts_and_the_whole_run_are_grpos(tmp_path, monkeypatch):
    tiny_runs.use(monkeypatch)
    plain = prompts.sampler(config(tmp_path, "vas", groups=3))
    ours = recipe(tmp_path, "vas", groups=3, lam=0.0)
    assert all(ours.prompts(step) == plain(step) for step in range(1, 30))
    vas = run(tmp_path, "vas", recipe="vas", lam=0.0, reward=SHORT)
    assert numbers(vas) == numbers(run(tmp_path, "grpo", recipe="grpo", beta=0.01, reward=SHORT))


def test_scores_are_made_every_t_upd_steps_and_survive_a_stop(tmp_path, monkeypatch):
    tiny_runs.use(monkeypatch)
    settings = dict(recipe="vas", reward=HALF, n=3, t_upd=2, beta=0.0, steps=4, save_every=2, eval_every=0)
    for overlap in (False, True):
        whole = run(tmp_path, f"whole{overlap}", overlap=overlap, **settings)
        assert [row["refresh_rollouts"] for row in whole if "tokens" in row] == [12, 12, 24, 24]
        given = tiny_runs.config(tmp_path, f"run{overlap}", overlap=overlap, **{**settings, "steps": 2})
        folder = loop.train(given)
        loop.train(given.replace(steps=4, out=str(folder)), resume=folder)
        assert numbers(tiny_runs.rows(folder))[-2:] == numbers(whole)[-2:]


@pytest.mark.parametrize("options", [{"lam": 1.0}, {"a": 0.0}, {"n": 2}, {"t_upd": 1}])
def test_options_change_which_prompts_are_drawn_or_when(tmp_path, monkeypatch, options):
    tiny_runs.use(monkeypatch)
    settings = dict(recipe="vas", reward=HALF, t_upd=2, n=4, steps=5, groups=4, beta=0.0, min_max=False)
    plain = numbers(run(tmp_path, "plain", **settings))
    assert numbers(run(tmp_path, "run", **{**settings, **options})) != plain


class Saying:
    """A policy that answers its first prompt with one of two texts in turn, and all others with the first."""

    def __init__(self, *texts):
        self.texts, self.meter = texts, Meter()

    def generate(self, asked, *, group_size):
        texts = [self.texts[0]] * (len(asked) * group_size)
        texts[1:group_size:2] = [self.texts[1]] * (group_size // 2)
        group = torch.arange(len(asked)).repeat_interleave(group_size)
        return dataclasses.replace(made([prompt.text for prompt in asked], group, texts), prompts=asked)


@pytest.mark.parametrize(
    ("name", "same", "other"),
    [("self_bleu", 0, 1), ("similarity", 1, 0), ("edit_distance", 0, 1), ("distinct", 1 / 2, 1)],
)
def test_scores_are_of_right_answers_and_of_the_diversity_asked_for(tmp_path, name, same, other):
    vas = recipe(tmp_path, "vas", n=2, diversity=name, min_max=False, a=0.0, b=2.0, group_size=2)
    asked = vas.prompts(1)
    found = vas.rollout(Saying("abc", "def"), asked)
    scores = vas.state["sampler"].scores
    assert scores[:2].tolist() == pytest.approx([2 * other, 2 * same]) and scores[1:].unique().numel() == 1
    assert found.prompts == asked and found.scores[1]["refresh_rollouts"] == 36 * 2
    right = recipe(tmp_path, "vas", n=2, diversity=name, min_max=False, a=2.0, b=0.0, group_size=2)
    answers = {prompt.answer for prompt in right.prompts(1)}
    first = prompts.pool(config(tmp_path, "vas"), 1)[0].answer
    right.rollout(Saying("x", first), right.prompts(1))
    assert answers and right.state["sampler"].scores.tolist() == [0.5] + [0.0] * 35


def test_the_other_options_reach_their_places(tmp_path):
    assert recipe(tmp_path, "vas").state["sampler"].min_max
    assert not recipe(tmp_path, "vas", min_max=False).state["sampler"].min_max
    assert recipe(tmp_path, "vas", momentum=0.5).state["sampler"].momentum == 0.5
    batch = ragged((3, 2, 4, 1), (0, 0, 1, 1))
    logprob = batch.old_logprobs + torch.linspace(-1, 1, 10)
    plain = gradient(recipe(tmp_path, "vas"), batch, logprob)
    for options in ({"low": 0.5}, {"high": 0.5}, {"beta": 0.5}):
        assert not torch.allclose(gradient(recipe(tmp_path, "vas", **options), batch, logprob), plain)
    for name, words in (("n", "n must be"), ("t_upd", "t_upd must be"), ("pool", "pool: count must be")):
        with pytest.raises(ValueError, match=f"{words} an integer >= 1; got 0"):
            recipe(tmp_path, "vas", **{name: 0})
    with pytest.raises(ValueError, match=r"diversity must be one of .* Did you mean 'distinct'"):
        recipe(tmp_path, "vas", diversity="distnct")


def test_a_generator_is_a_data_set_of_as_many_problems_as_pool(tmp_path):
    settings = dict(data=None, reward=None, task="reasoning_gym:chain_sum:max_terms=2", few_shot=0, eval_problems=8)
    asked = prompts.pool(config(tmp_path, "vas", **settings), 20)
    assert len({prompt.text for prompt in asked}) == 20
    held = prompts.held_out(config(tmp_path, "vas", **settings))
    assert not {prompt.text for prompt in asked} & {prompt.text for prompt in held}
