"""Small webs of pages that an agent reads by calls in its text, and questions over some hops in generated ones.

    search(WORDS)   pages that have one of the words: address, and the lines with them
    open(URL)       a page
    find(WORDS)     the lines of the page opened last that have one of the words

A call stands on a line of its own, and the text of its result behind it. A problem brings its pages in its metadata:
{"pages": {"https://...": "text", ...}}, so that a user's own rows can too. What an agent has seen is found again by
going through its text: a result that the web did not give is none.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from fuserl.engine import problems
from fuserl.engine.problems import Problem
from fuserl.engine.prompts import Prompt

_CALL = re.compile(r"^[ \t]*(search|open|find)\((.*)\)[ \t]*$", re.MULTILINE)
_FOUND = 5  # pages that a search shows
NOTHING = "Nothing is found."


@dataclass
class Episode:
    """An agent's text, gone through: what it was shown of each page by address, in order, and what it says at last."""

    seen: dict[str, list[str]] = field(default_factory=dict)
    page: str | None = None  # opened last
    response: str = ""

    def result(self, pages: Mapping[str, str], tool: str, words: str) -> tuple[str, dict[str, str]]:
        """What a call shows, and of which pages."""
        if tool == "open":
            url = words.strip()
            found = {url: pages[url]} if url in pages else {}
        elif tool == "find":
            found = _having(words, {self.page: pages[self.page]} if self.page in pages else {})
        else:
            found = dict(list(_having(words, pages).items())[:_FOUND])
        text = "\n".join(f"[{url}] {shown}" for url, shown in found.items())
        return (text or NOTHING), found


def episode(pages: Mapping[str, str], text: str) -> Episode:
    """Go through an agent's text: the calls whose results stand behind them, and the response after the last."""
    found, at, behind = Episode(), 0, 0
    while (call := _CALL.search(text, at)) is not None:
        shown, of_pages = found.result(pages, *call.groups())
        at = call.end()
        start = at + len(text[at:]) - len(text[at:].lstrip())
        if not text.startswith(shown, start):
            continue  # nobody answered this one
        at = behind = start + len(shown)
        for url, part in of_pages.items():
            found.seen.setdefault(url, []).append(part)
        if call[1] == "open" and of_pages:
            found.page = call[2].strip()
    found.response = text[behind:].strip()
    return found


def reply(prompt: Prompt, text: str) -> str | None:
    """The result of the call that an agent's text ends with, as a line of its own; None where it ends with none."""
    pages = prompt.metadata.get("pages", {})
    last = text.rstrip().rpartition("\n")[2]
    call = _CALL.fullmatch(last)
    if call is None:
        return None
    shown, _ = episode(pages, text).result(pages, *call.groups())
    return f"{'' if text.endswith(chr(10)) else chr(10)}{shown}\n"


def _having(words: str, pages: Mapping[str, str]) -> dict[str, str]:
    """The lines that have one of the words, by page; pages with most of the words come first."""
    wanted = {word for word in re.findall(r"\w+", words.lower()) if len(word) > 2}
    found, counts = {}, {}
    for url, text in pages.items():
        lines = [(line, wanted & set(re.findall(r"\w+", line.lower()))) for line in text.splitlines()]
        if any(common for _, common in lines):
            found[url] = " ".join(line for line, common in lines if common)
            counts[url] = len(set.union(*(common for _, common in lines)))
    return dict(sorted(found.items(), key=lambda item: -counts[item[0]]))


_NAMES = (
    "Ada", "Bela", "Cora", "Dana", "Edda", "Finn", "Gita", "Hugo", "Ines", "Jona", "Kira", "Liam", "Mona", "Nils",
    "Olga", "Paul", "Rosa", "Sven", "Tara", "Uwe", "Vera", "Yara",
)  # fmt: skip
_RELATIONS = ("a pupil", "a neighbour", "a cousin", "a doctor", "a rival", "a friend", "a tailor", "a partner")
_THINGS = [f"{colour} {thing}" for colour in ("blue", "red", "green") for thing in ("kite", "boat", "clock", "lamp")]
_HOW = """Answer a question from the web. Write one line at a time: search(WORDS), open(URL) or find(WORDS), and read \
what comes back. In the last line put the answer between <answer> and </answer>, and behind it every fact it rests on, \
with the page that says so: [1](URL).
Question: {question}
"""


class Web(problems.Endless):
    """Generated questions over `hops` hops, each with a web of its own: `web`, or `web:hops=3,others=4`.

    Each fact of the chain is on a page of its own. One more page tells the answer and nothing else, and `others` have
    facts beside the matter. Metadata: "pages"; "rubrics", a sentence a hop, with placeholders <E0> (the answer), <E1>,
    ... for what the question hides; "entities", the names behind these.

    Raises:
        ValueError: an option that is unknown or no number in its range.
    """

    place = "web"

    def __init__(self, description: str = ""):
        options = {"hops": "3", "others": "4"}
        for part in filter(None, description.split(",")):
            name, equals, value = part.partition("=")
            if name not in options or not equals:
                raise ValueError(f"task: an option of web must be hops=N or others=N; got {part!r}. Correct it.")
            options[name] = value
        for name, (least, most) in {"hops": (1, 8), "others": (0, 8)}.items():
            if not options[name].isdecimal() or not least <= int(options[name]) <= most:
                raise ValueError(f"task: web's {name} must be {least} to {most}; got {options[name]!r}. Correct it.")
        self.hops, self.others = int(options["hops"]), int(options["others"])

    def drawn(self, seed: int) -> Iterator[Problem]:
        """Questions, each with a web of its own."""
        draws = random.Random(problems.far_seed(seed, self.hops, self.others))
        while True:
            yield self._drawn(draws)

    def opening(self, question: str) -> str:
        """What there is to do, and the question."""
        return _HOW.format(question=question)

    def score(self, answer: str, problem: dict) -> float:
        """Whether `answer` is the name that the question asks for."""
        return float(answer.strip() == problem["entities"]["E0"])

    def _drawn(self, draws: random.Random) -> Problem:
        people = draws.sample(_NAMES, self.hops + self.others)
        chain, rest = people[: self.hops], people[self.hops :]
        relations = draws.sample(_RELATIONS, self.hops - 1)
        thing, *things = draws.sample(_THINGS, 1 + self.others)
        rubrics = [f"<E{at}> is {each} of <E{at + 1}>." for at, each in enumerate(relations)]
        rubrics.append(f"<E{self.hops - 1}> owns a {thing}.")
        entities = {f"E{at}": name for at, name in enumerate(chain)}
        facts = [re.sub(r"<(E\d+)>", lambda found: entities[found[1]], each) for each in rubrics]
        # The fact about two people is on the page of the one who is nearer to what the question names.
        owners = [*chain[1:], f"{thing}s".replace(" ", "-")]
        pages = {f"https://{owner.lower()}.net": fact for owner, fact in zip(owners, facts, strict=True)}
        pages["https://quiz.net"] = f"Solution of the riddle of the {thing}: {chain[0]}."
        pages |= {f"https://{n.lower()}.net": f"{n} owns a {other}." for n, other in zip(rest, things, strict=True)}
        addresses = draws.sample(list(pages), len(pages))
        question = (
            f"Who is {' of '.join(relations)} of the owner of a {thing}?" if relations else f"Who owns a {thing}?"
        )
        metadata = {"pages": {url: pages[url] for url in addresses}, "rubrics": rubrics, "entities": entities}
        return Problem(question, chain[0], metadata, place=self.place)
