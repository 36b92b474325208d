"""Games: payoffs by hand, what each agent sees, and chance that is the same for all games of a seed."""

import itertools

import pytest

from fuserl.engine import games
from fuserl.engine.games import Dilemma, Split, TrustAndSplit, maker, split_points


def test_points_of_splits():
    assert split_points((10, 10), (10.0, 1.0)) == (50.0, 5.0) and split_points((10, 0), (10.0, 1.0)) == (100.0, 0.0)
    assert split_points((4, 5), (1.0, 10.0)) == (4.0, 50.0) and split_points((0, 0), (10.0, 1.0)) == (0.0, 0.0)
    both, best = sum(split_points((10, 10), (10.0, 1.0))) / 2, sum(split_points((10, 0), (10.0, 1.0))) / 2
    assert (both, best) == (27.5, 50.0)


@pytest.mark.parametrize(("said", "earned"), [("11", (3, 3)), ("12", (0, 5)), ("21", (5, 0)), ("22", (1, 1))])
def test_the_dilemma(said, earned):
    game = Dilemma(2, 0)
    game.move({0: f" {said[0]}\n", 1: f"{said[1]}, Ann 1"})
    assert game.payoffs == [earned] and not game.over and game.unread == 0
    assert game.text(0).splitlines()[1:] == [f"1: you {said[0]}, Bob {said[1]}", "2: you"]
    assert game.text(1).splitlines()[1:] == [f"1: you {said[1]}, Ann {said[0]}", "2: you"]
    assert game.text(0).startswith("You are Ann. Each round you and Bob")


def test_what_cannot_be_read_does_its_speaker_no_good():
    game = Dilemma(1, 0)
    game.move({0: "hello", 1: "2"})
    assert game.payoffs == [(0, 5)] and game.unread == 1 and game.over
    split = Split(1, 0)
    split.move({0: "all of them", 1: "I keep 10 coins"})
    assert split.payoffs == [(0.0, 10.0 * split.values[1])] and split.unread == 1


def test_chance_is_of_the_seed_and_a_copy_goes_on_alike():
    every = [maker("split", 8)(seed) for seed in (1, 1, 2)]
    for game in every:
        while not game.over:
            game.move({0: "5", 1: "5"})
    assert every[0].payoffs == every[1].payoffs != every[2].payoffs
    game = maker("trust", 6)(3)
    game.move({game.movers()[0]: "rock"})
    copy = game.copied()
    for each in (game, copy):
        while not each.over:
            each.move(dict.fromkeys(each.movers(), "4"))
    assert game.payoffs == copy.payoffs and game.history == copy.history


def test_trust_is_talked_about_in_turns_and_hands_are_hidden():
    game = TrustAndSplit(2, 5, quota=2)
    first = game.first
    assert game.movers() == (first,)
    for at in range(4):
        assert game.movers() == ((first + at) % 2,)
        game.move({game.movers()[0]: f" message {at}\nand more"})
    assert game.movers() == (0, 1) and len(game.messages) == 4 and game.messages[0] == "message 0 and more"
    for agent in (0, 1):
        text = game.text(agent)
        assert f"1: your hand is {game.hands[agent]}." in text and game.hands[1 - agent] not in text.partition("1: ")[2]
        assert text.endswith("You keep") and text.count("message") == 4
        assert ("you: message 0" in text) == (agent == first)
    upper = 0 if games.BEATS[game.hands[0]] == game.hands[1] else 1
    assert game.values[upper] == 10 and game.values[1 - upper] == 1
    game.move({0: "10", 1: "10"})
    assert sorted(game.payoffs[0]) == [5, 50] and game.first == 1 - first and game.messages == []


def test_hands_change_sides_where_asked():
    game = TrustAndSplit(20, 0, quota=0, alternate=True)
    seen = []
    while not game.over:
        seen.append(game.values)
        game.move({0: "1", 1: "1"})
    assert all(a == b[::-1] for a, b in itertools.pairwise(seen))


@pytest.mark.parametrize(
    ("name", "options", "wrong"),
    [("ipd", {"rounds": 0}, "rounds"), ("trust", {"quota": -1}, "quota"), ("chess", {}, "game")],
)
def test_numbers_out_of_range_are_refused(name, options, wrong):
    with pytest.raises(ValueError, match=f"games: {wrong} must be"):
        maker(name, **{"rounds": 2, **options})
