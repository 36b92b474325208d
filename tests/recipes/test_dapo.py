"""dapo: groups that agree are replaced, completions near the limit lose reward, and every token weighs the same."""

import dataclasses

import pytest
import torch
from batches import config, gradient, made, ragged, recipe

from fuserl.engine import prompts
from fuserl.engine.meter import Meter


class Fixed:
    """A policy whose n-th prompt ever asked gets completions of the n-th row of texts."""

    def __init__(self, rows):
        self.rows, self.calls, self.meter = iter(rows), [], Meter()

    def generate(self, asked, *, group_size):
        self.calls.append(len(asked))
        texts = [text for _ in asked for text in next(self.rows)]
        rollouts = made(
            [prompt.text for prompt in asked], torch.arange(len(asked)).repeat_interleave(group_size), texts
        )
        return dataclasses.replace(rollouts, prompts=asked)


def test_prompts_whose_rewards_agree_are_replaced(tmp_path):
    settings = config(tmp_path, "dapo", groups=2, group_size=2, attempts=3)
    dapo = recipe(tmp_path, "dapo", groups=2, group_size=2, attempts=3)
    asked = dapo.prompts(1)
    assert [prompt.text for prompt in asked] == [
        prompt.text for prompt in prompts.sampler(settings.replace(groups=6))(1)
    ]
    right = [prompt.answer for prompt in asked]
    policy = Fixed([(right[0], right[0]), (right[1], "x"), ("x", "x"), ("x", right[3]), (right[4], "x")])
    rollouts = dapo.rollout(policy, asked)
    assert policy.calls == [2, 2] and [prompt.answer for prompt in rollouts.prompts] == [right[1], right[3]]
    assert rollouts.scores[0].tolist() == [1, 0, 0, 1] and rollouts.scores[1] == {"timeouts": 0}
    assert len(recipe(tmp_path, "dapo", groups=2, attempts=1).prompts(1)) == 2
    assert [prompt.text for prompt in dapo.prompts(2)] != [prompt.text for prompt in asked]


@pytest.mark.parametrize(
    ("length", "lost"), [(1, 0), (10, 0), (11, 0), (12, 0.2), (13, 0.4), (15, 0.8), (16, 1.0), (17, 1.0)]
)
def test_a_completion_in_the_buffer_loses_reward_in_proportion(length, lost, tmp_path):
    """Equation 13 of the paper: from max_new_tokens - overlong_buffer to max_new_tokens the penalty grows to 1."""
    options = dict(groups=1, group_size=2, max_new_tokens=16, overlong_buffer=5, overlong_penalty=0.5)
    dapo = recipe(tmp_path, "dapo", **options)
    rollouts = dapo.rollout(Fixed([("y" * length, "1")] * 3), dapo.prompts(1))
    right = float(rollouts.prompts[0].answer == "1")
    assert rollouts.scores[0].tolist() == pytest.approx([-0.5 * lost, right])
    assert dapo.reward(rollouts)[0].tolist() == [0, right]  # held-out problems are judged without it


def test_every_token_weighs_the_same_and_the_upper_clip_is_wider(tmp_path):
    batch = ragged((3, 1, 5, 2), (0, 1, 0, 1))
    batch = batch.replace(old_logprobs=batch.rollout_logprobs)
    dapo = recipe(tmp_path, "dapo")
    advantages = batch.to_tokens(dapo.advantage(batch))
    for ratio, gained, lost in ((1.0, 1, 1), (1.25, 1, 1), (1.3, 0, 1), (0.79, 1, 0)):
        got = gradient(dapo, batch, batch.old_logprobs + torch.tensor(ratio).log())
        kept = torch.where(advantages > 0, float(gained), float(lost))
        assert torch.allclose(got, -ratio * advantages * kept / 11)
