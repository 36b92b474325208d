"""Matches: who is asked what in which call, which turns are kept, and branches that differ in one agent's move only."""

import dataclasses
from types import SimpleNamespace

import pytest
import tiny_models
import torch
import torch.distributed as dist
from batches import made
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from fuserl.engine import games
from fuserl.engine.batch import batch_of
from fuserl.engine.matches import Arena, Match, branched, collected, play, scripted
from fuserl.engine.past_selves import PastSelves, speaking
from fuserl.engine.policy import Policy
from fuserl.engine.policy_settings import Sampling, Updating
from fuserl.engine.prompts import Prompt


class Speaker:
    """Says 2 where the other one was last seen to say 2, else 1, or what it is told to; counts its calls."""

    def __init__(self, says=None):
        self.says, self.calls = says, []

    def __call__(self, prompts, _games):
        self.calls.append([prompt.text for prompt in prompts])
        lines = [prompt.text.splitlines()[-2:] for prompt in prompts]
        texts = [self.says or ("2" if line[0].endswith("2") else "1") for line in lines]
        group = torch.arange(len(prompts))
        return dataclasses.replace(made([prompt.text for prompt in prompts], group, texts), prompts=prompts)


def everyone(match, agent):
    return True


def dilemmas(count, rounds=3):
    return [Match(games.maker("ipd", rounds)(at), start=at // 2, number=at) for at in range(count)]


def test_all_who_are_to_move_speak_in_one_call_and_each_turn_has_its_seat():
    own, some = Speaker(), dilemmas(4)
    turns = play(some, (own, own), kept=everyone)
    assert [len(call) for call in own.calls] == [8, 8, 8] and not turns.before
    rollouts = collected(turns, some)
    assert len(rollouts) == 24 and rollouts.group.tolist() == list(range(24))
    seats = rollouts.facts["seat"].tolist()
    assert sorted(seats) == [[m // 2, m, a, t] for m in range(4) for a in (0, 1) for t in range(3)]
    for b, (_, m, a, t) in enumerate(seats):
        assert rollouts.prompts[b].text.splitlines()[-1] == f"{t + 1}: you"
        points = some[m].game.payoffs[t]
        assert float(rollouts.scores[0][b]) == points[a] and float(rollouts.facts["other"][b]) == points[1 - a]
    assert rollouts.scores[1] == {"unread": 0}
    batch = batch_of(rollouts, rollouts.scores[0])
    assert len(batch.tokens) == 24


def test_only_the_turns_asked_for_are_kept():
    own, some = Speaker(), dilemmas(2)
    turns = play(some, (own, scripted("2")), kept=lambda match, agent: agent == 0)
    assert {(agent, at) for _, _, agent, at in turns.seats} == {(0, 0), (0, 1), (0, 2)}
    assert some[0].game.payoffs == [(0, 5), (1, 1), (1, 1)] and [len(call) for call in own.calls] == [2, 2, 2]


def test_branches_differ_in_one_agents_move_and_go_on_from_there():
    own, some = Speaker("1"), dilemmas(1)
    turns = play(some, (own, own), kept=everyone, meet=True)
    assert len(turns.before) == 3 and [game.round for _, game, _ in turns.before] == [0, 1, 2]
    other = Speaker("2")
    found = branched(turns, (other, scripted("1")), count=2, gamma=0.5)
    assert found.keys() == {(0, agent, at) for agent in (0, 1) for at in range(3)}
    # Agent 0 defects at once; agent 1 still says what it is scripted to, and agent 0 only from the next round on.
    assert found[0, 0, 0] == [5 * 1.75] * 2 and found[0, 0, 2] == [5.0] * 2
    assert found[0, 1, 0] == [3 + 0 + 0] * 2 and found[0, 1, 2] == [3.0] * 2
    assert some[0].game.payoffs == [(3, 3)] * 3  # the matches themselves are as they were
    alternatives = collected(turns, some, found).facts["alternatives"]
    assert alternatives.shape == (6, 2)


def policy():
    return Policy(tiny_models.model(), Words(), Sampling(max_new_tokens=3), Updating(lr=0.1))


class Words(tiny_models.Letters):
    """The tokenizer of the tiny models, for any letters."""

    def __call__(self, text):
        return super().__call__("".join(chr(48 + ord(letter) % 60) for letter in text))


def arena(past=0, **options):
    selves = PastSelves(most=past, every=1, seed=0)
    return Arena(games.maker("ipd", 2), 3, 0, selves, **options)


def test_a_step_of_self_play_has_all_turns_and_starts_are_a_function_of_the_step():
    one = arena()
    assert one.starts(2, 4) == arena().starts(2, 4) != one.starts(3, 4)
    rollouts = one.rollout(policy(), one.starts(1, 2))
    assert len(rollouts) == 2 * 3 * 2 * 2 and not one.past.weights
    assert set(rollouts.facts["seat"][:, 0].tolist()) == {0, 1}
    tried = arena(alternatives=2).rollout(policy(), one.starts(1, 2))
    assert tried.facts["alternatives"].shape == (24, 2)


def test_against_its_past_the_policy_changes_seats_and_gets_its_weights_back():
    one, own = arena(past=2), policy()
    before = {name: x.detach().clone() for name, x in own.parameters().items()}
    assert len(one.rollout(own, one.starts(1, 2))) == 24 and list(one.past.weights) == [1]
    with torch.no_grad():
        for x in own.parameters().values():
            x.add_(0.5)
    now = {name: x.detach().clone() for name, x in own.parameters().items()}
    rollouts = one.rollout(own, one.starts(2, 2))
    assert all(torch.equal(x, now[name]) for name, x in own.parameters().items())
    assert {(start, agent) for start, _, agent, _ in rollouts.facts["seat"].tolist()} == {(0, 0), (1, 1)}
    with speaking(own, one.past.weights[1]):
        assert all(torch.equal(x, before[name]) for name, x in own.parameters().items())
    one.rollout(own, one.starts(3, 2))
    assert list(one.past.weights) == [2, 3]  # the newest ones
    other = PastSelves(most=2, every=1, seed=0)
    other.load_state_dict(one.past.state_dict())
    assert other.drawn(9) == one.past.drawn(9) and torch.equal(
        *(next(iter(each.weights[3].values())) for each in (other, one.past))
    )
    found = one.evaluate(own, [], 2)
    assert set(found) == {"payoff_self", "payoff_of_self", "payoff_greedy", "payoff_of_greedy"}


def test_weights_of_a_checkpoint_speak_where_the_model_is_cut():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        cut = distribute_tensor(torch.zeros(4), init_device_mesh("cpu", (1,)), [Shard(0)])
        own = SimpleNamespace(parameters=lambda: {"a": cut}, source=SimpleNamespace(apart=False))
        with speaking(own, {"a": torch.ones(4)}):
            assert torch.equal(cut.full_tensor(), torch.ones(4))
        assert torch.equal(cut.full_tensor(), torch.zeros(4))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(("name", "value"), [("most", -1), ("every", 0)])
def test_numbers_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"PastSelves: {name} must be"):
        PastSelves(**{"most": 1, "every": 1, "seed": 0, name: value})


def test_a_chat_model_reads_its_template_and_one_mark_in_front():
    class Chat:
        bos_token, bos_token_id = "<s>", 1

        def __call__(self, text):
            return {"input_ids": [1]}

        def apply_chat_template(self, turns, tokenize, add_generation_prompt):
            return f"<s><{turns[0]['role']}>{turns[0]['content']}<assistant>"

    policy = SimpleNamespace(tokenizer=Chat(), generate=lambda prompts, stream: [each.text for each in prompts])
    arena = Arena(None, size=1, seed=0, past=None, chat=True)
    assert arena.speaker(policy)([Prompt("1: you")], []) == ["<user>1: you<assistant>"]
