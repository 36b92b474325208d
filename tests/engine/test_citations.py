"""Rubric rewards: what is named, cited, supported, and hangs together; and a group's rewards of it."""

import asyncio
import itertools
import json

import pytest

from fuserl.engine import citations, webs
from fuserl.engine.citations import Ruled, Written, connected, context_of, filled, mixed, rubric_share
from fuserl.engine.judges import Judge

CHAIN = ("<E0> is near <E1>.", "<E1> is near <E2>.", "<E2> owns a kite.")
KNOWN = {"E0": "Ada", "E1": "Bela", "E2": "Cora"}
PAGES = {
    "https://b.net": "Ada is near Bela.",
    "https://c.net": "Bela is near Cora.",
    "https://k.net": "Cora owns a kite.",
}
GOOD = (
    "<answer>Ada</answer>, near Bela [1](https://b.net), near Cora [2](https://c.net) with a kite [3](https://k.net)."
)


def share(response, *, seen=tuple(PAGES), reader=None, rubrics=CHAIN, **how):
    found = webs.Episode({url: [PAGES[url]] for url in seen}, None, response)
    return asyncio.run(rubric_share(reader or Ruled(KNOWN), "Who?", found, rubrics, **how))


class Scripted:
    """Answers one text after the other, the last for ever."""

    def __init__(self, *texts):
        self.texts, self.asked = texts, []

    async def __call__(self, messages):
        self.asked.append(messages[-1]["content"])
        return self.texts[min(len(self.asked), len(self.texts)) - 1]


def test_a_walk_from_the_answer_over_supported_rubrics():
    """Against the definition: E0 is reached, and what shares a supported rubric with something reached."""
    for supported in itertools.product((False, True), repeat=3):
        reached = {"E0"}
        for _ in range(3):
            for rubric, good in zip(CHAIN, supported, strict=True):
                names = set(citations.entities([rubric]))
                reached |= names if good and names & reached else set()
        expected = [
            good and bool(set(citations.entities([r])) & reached) for r, good in zip(CHAIN, supported, strict=True)
        ]
        assert connected(CHAIN, supported) == expected
    assert connected(("No entity at all.",), [True]) == [False]
    assert connected(("<E1> <E0>", "<E2> <E1>", "<E2> <E3>")[::-1], [True] * 3) == [True] * 3


def test_a_whole_chain_earns_everything_and_a_break_all_behind_it():
    assert share(GOOD) == 1.0
    assert share(GOOD, seen=["https://c.net", "https://k.net"]) == 0.0
    assert share(GOOD, seen=["https://c.net", "https://k.net"], connect=False) == pytest.approx(2 / 3)
    assert share(GOOD, seen=["https://b.net", "https://k.net"]) == pytest.approx(1 / 3)


def test_what_is_not_named_not_cited_or_not_there_earns_nothing():
    assert share(GOOD.replace("Bela", "Zoe")) == 0.0 and share(GOOD.replace("Cora", "Zoe")) == pytest.approx(1 / 3)
    assert share("Ada, Bela and Cora.") == 0.0 and share(GOOD, rubrics=()) == 0.0
    assert share(GOOD, seen=()) == 0.0  # addresses that it never saw
    assert share("Ada. ## References\nBela, Cora [1](https://b.net)") == 0.0
    assert share(GOOD, reader=Ruled({})) == 0.0


def test_citations_are_counted_once_and_only_so_many():
    seen = {f"u{n}": [f"text {n}", f"text {n}"] for n in range(30)}
    response = " ".join(f"[{n}](u{n})" for n in [3, *range(30)]) + " [9](view-source:u3) [1](https://gone.net)"
    context = context_of(response, seen)
    assert context.startswith("u3\ntext 3\n\nu0\n") and context.count("text") == 20
    assert context_of(response, seen, most=2) == "u3\ntext 3\n\nu0\ntext 0" and context_of("none", seen) == ""


def test_placeholders_are_filled_by_names():
    assert filled(CHAIN[0], KNOWN) == "Ada is near Bela." and filled(CHAIN[0], {"E0": "Ada", "E1": None}) is None
    assert citations.entities(CHAIN) == ["E0", "E1", "E2"]
    assert filled("<E1><E10>", {"E1": "<E10>", "E10": "x"}) == "<E10>x"


def test_a_model_reads_names_and_support():
    names = json.dumps(KNOWN)
    model = Scripted(f"So: {names}", '{"S1": true, "S2": false, "S3": true}')
    assert share(GOOD, reader=Written(Judge(model))) == pytest.approx(1 / 3)
    first, second = model.asked
    assert "<E1> is near <E2>." in first and GOOD in first and "Ada is near Bela." not in first
    assert "S3. Cora owns a kite." in second and PAGES["https://c.net"] in second and GOOD not in second
    model = Scripted('{"E0": "Ada", "E1": null, "E2": "Cora"}', '{"S1": true}')  # only what has all its names is asked
    assert share(GOOD, reader=Written(Judge(model)), connect=False) == pytest.approx(1 / 3)
    assert "S1. Cora owns a kite." in model.asked[1] and "S2" not in model.asked[1]


@pytest.mark.parametrize(
    "bad", ["no", '{"E0": "Ada"}', '{"E0": "Ada", "E1": "null", "E2": "C"}', '{"E0": 1, "E1": null, "E2": null}']
)
def test_names_that_cannot_be_read_are_asked_for_five_times(bad):
    model = Scripted(bad)
    assert share(GOOD, reader=Written(Judge(model))) == 0.0 and len(model.asked) == 5
    model = Scripted(json.dumps(KNOWN), '{"S1": true}')
    assert share(GOOD, reader=Written(Judge(model))) == 0.0 and len(model.asked) == 1 + 5


def test_rewards_of_a_group():
    right = [1.0] * 3
    assert mixed(right, [0.2, 0.4, 0.8], alpha=0.3) == pytest.approx([0.775, 0.85, 1.0], abs=1e-15)
    assert mixed([0.0, 1.0], [1.0, 0.5], alpha=0.3) == pytest.approx([0.0, 0.85])
    assert mixed(right, [0.2, 0.4, 0.8], alpha=0.3, normalize="release") == pytest.approx([0.76, 0.82, 0.94])
    for normalize in citations.NORMALIZE:  # the release normalises in both other branches
        assert mixed([1.0, 0.0], [0.1, 0.5], alpha=0.3, bonus="negative", normalize=normalize) == [1.0, 0.3]
        both = mixed([1.0, 0.0], [0.1, 0.5], alpha=0.3, bonus="both", normalize=normalize)
        assert both == pytest.approx([0.76, 0.3])
    assert mixed(right, [0.0] * 3, alpha=0.3) == [0.7] * 3
    assert mixed([1.0, 0.0], [0.3, 0.9], alpha=0.0) == [1.0, 0.0]


def test_an_episode_that_does_not_end_earns_nothing():
    async def right(arguments):
        return 1.0

    reward = citations.citation_aware(Judge(rule=right), alpha=0.3)
    calls = "".join(f"open({url})\n[{url}] {page}\n" for url, page in PAGES.items())
    texts = [calls + GOOD, calls + GOOD, calls, GOOD]
    metadata = {"pages": PAGES, "rubrics": list(CHAIN), "entities": KNOWN}
    found = asyncio.run(reward("?", texts, "Ada", metadata, ["stop", "length", "stop", "stop"]))
    assert [each["outcome"] for each in found] == [1, 0, 0, 1] and [each["rubric"] for each in found] == [1, 0, 0, 0]
    assert [each["reward"] for each in found] == pytest.approx([1.0, 0.0, 0.0, 0.7])
