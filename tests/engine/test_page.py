"""The page about runs: whole, honest about what it was given, and safe to open whatever a model wrote."""

import html.parser
import json
import math
import os
import re

import pytest
import recorded_run

from fuserl.engine import figures, lookup, page

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Reader(html.parser.HTMLParser):
    """Collects a page's text, tags and attributes, and refuses tags that do not balance."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.text = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attributes]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attributes]

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, (self.open[-3:], tag)
        self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text.append(data)

    @property
    def said(self):
        return re.sub(r"\s+", " ", " ".join(self.text))


@pytest.fixture
def every_panel():
    """Asks for all panels."""


@pytest.fixture(autouse=True)
def quick(monkeypatch, request):
    """Lay out few panels where a test does not ask for all: drawing takes the time."""
    if "every_panel" not in request.fixturenames:
        kept = figures.panels.PANELS[:2] + figures.panels.PANELS[-4:]
        monkeypatch.setattr(figures.panels, "PANELS", kept)
        monkeypatch.setattr(figures.panels, "_OTHERS", 0)


def read(path):
    text = path.read_text(encoding="utf-8")
    return Reader(text), text


def run(folder, metrics=None, told=None, described=None):
    return recorded_run.write(folder, recorded_run.rows(9) if metrics is None else metrics, told, described)


def test_a_page_has_the_run_its_figures_its_panels_settings_and_completions(tmp_path, every_panel):
    folder = run(tmp_path / "ppo", recorded_run.rows(), recorded_run.samples())
    before = set(os.listdir(folder))
    assert page.write([folder]) == folder / "report.html"
    assert set(os.listdir(folder)) - before == {"report.html", "report.png"}
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")
    found, text = read(folder / "report.html")
    for shown in (
        "ppo on SmolLM2-135M-Instruct", "reasoning_gym:chain_sum:max_terms=2,max_digits=2", "21 November 2026, 05:10",
        "NVIDIA H200, AMD EPYC, 16 cores, 128 GB", "torch 2.13.0", "0123456789ab+changes",
        "0.260 → 0.920", "95 %: 0.204\u20130.325 to 0.874\u20130.950; 184 of 200", "+0.660", "21.40 GB",
        "tokens/s", "3:16",
        "a GPU decodes 1024 rollouts at once", "the sum of the digits",
    ):  # fmt: skip
        assert shown in re.sub(r" +", " ", found.said), shown
    assert "vllm" not in found.said.lower()
    drawn = figures.figures({"": recorded_run.rows()})
    assert found.tags.count("svg") == found.tags.count("figure") == len(drawn)
    for panel, _ in drawn:
        assert panel.title in found.said
    assert len(text) < 1_000_000


def test_a_page_needs_nothing_from_elsewhere(tmp_path):
    hostile = [{"step": 1, "prompt": "<img src=http://a/b.png>", "completion": "<a href=https://x>", "reward": 1.0}]
    found, text = read(page.write([run(tmp_path / "run", told=hostile)]))
    assert not {"script", "img", "link", "iframe", "a", "object", "form"} & set(found.tags)
    for tag, name, value in found.attributes:
        assert name not in ("src", "srcset", "action", "onload") and not name.startswith("on"), (tag, name)
        assert name not in ("href", "xlink:href") or value.startswith("#"), value
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)[1]
    assert "url(" not in style and "@import" not in style and "prefers-color-scheme: dark" in style
    assert text.count("<style") == 1


HOSTILE = [
    "<script>alert(1)</script>", "</td></table><h1>gone</h1>", "&lt;b&gt; & \" ' `", "\ud800 alone \udfff",
    "nul \x00 bell \x07 esc \x1b[31m", "reordered \u202e txet", "\x85 \x9b \u2028", "]]>--><!-- <![CDATA[",
    "$\\frac{$ {x}", "\ufeff\uffff\ufffe", "", " ", "\n", "é 漢字 🙂",
]  # fmt: skip


def test_hostile_texts_are_shown_and_do_nothing(tmp_path):
    told = [{"step": 1, "prompt": t, "completion": t, "answer": t, "reward": 0.0, "finish": t} for t in HOSTILE[:4]]
    told += [{"step": 2, "prompt": t * 200, "completion": t * 200, "answer": t, "reward": None} for t in HOSTILE[4:8]]
    told += [{"step": 3, "prompt": t, "completion": t, "answer": t, "reward": 1.0} for t in HOSTILE[8:12]]
    for at, text in enumerate(HOSTILE):
        described = json.loads(json.dumps(recorded_run.DESCRIBED))
        described["config"] |= {"model": text, "task": text, "recipe": text, text: text}
        described |= {"commit": text, "started": text, "versions": {text: text}, "reasons": {text: text}}
        rows = [{"step": step, text or "name": 1.0, "reward": 0.5} for step in (1, 2)]
        found, written = read(page.write([run(tmp_path / f"run{at}", rows, told[at % 3 :], described)]))
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", written)
        assert {"script", "h1"} & set(found.tags) == {"h1"} and found.tags.count("h1") == 1
        assert "alert(1)" not in "".join(re.findall(r"<script.*", written))
    assert "<script>alert(1)</script>" in page_text(tmp_path / "run0")


def page_text(folder):
    return read(folder / "report.html")[0].said


def test_odd_characters_become_visible():
    assert page.clean("a\x00\x1b\x7f\u202e\ud800<&\"'") == "a␀␛⟨U+007F⟩⟨U+202E⟩\ufffd&lt;&amp;&quot;&#x27;"
    assert page.clean("two\nlines\tapart é 漢字 🙂") == "two\nlines\tapart é 漢字 🙂"


def test_settings_are_marked_explained_or_folded(tmp_path):
    _, text = read(page.write([run(tmp_path / "run")]))
    kinds = {name: kind for kind, name in re.findall(r'<tr class="(\w+)"><td><code>(\w+)</code>', text)}
    assert kinds["steps"] == kinds["max_new_tokens"] == "set" and kinds["groups"] == kinds["stop"] == "automatic"
    assert kinds["seed"] == kinds["data"] == "default"
    assert "default 40" in text and "an answer is one line" in text
    assert text.index("<code>stop</code>") < text.index("more at their defaults") < text.index("<code>seed</code>")


def test_completions_are_of_the_first_and_the_last_step_and_long_ones_are_folded(tmp_path):
    found, text = read(page.write([run(tmp_path / "run", told=recorded_run.samples(5))]))
    rows = re.findall(r'<tr><td data-label="step">(\d+)</td>', text)
    assert rows == ["1"] * 3 + ["5"] * 3
    assert found.tags.count("summary") == 7 and "… the final answer" in found.said  # and one of the settings
    chat = [{"step": 1, "prompt": [{"role": "user", "content": "hi <b>"}], "completion": {"odd": 1}, "reward": 0.25}]
    assert 'user: hi <b> {"odd": 1} 0.25' in read(page.write([run(tmp_path / "chat", told=chat)]))[0].said


def test_completions_have_the_credit_of_their_tokens_behind_them(tmp_path):
    asked = {"step": 1, "prompt": "?", "answer": "4", "reward": 1.0, "finish": "stop"}
    told = [
        {**asked, "completion": "a<b", "tokens": ["a", "<", "b"], "credit": [0.5, None, -2.0]},
        {**asked, "completion": "all of it", "credit": 1.0},
        {**asked, "completion": "unknown"},
        {**asked, "completion": "cut", "tokens": ["c"], "credit": [1.0, 2.0]},
    ]
    found, text = read(page.write([run(tmp_path / "run", told=told)]))
    spans = re.findall(r'<span class="(\w+)"(?: style="--much: (\d+)%")? title="([^"]*)">(.*?)</span>', text)
    assert spans == [
        ("gain", "15", "+0.5", "a"),
        ("told", "", "not its own", "&lt;"),
        ("loss", "60", "-2", "b"),
        ("gain", "30", "+1", "all of it"),
    ]
    assert "unknown" in found.said and "cut" in found.said and "2 the strongest" in found.said
    assert ".gain { background: color-mix(" in text and ".loss { background: color-mix(" in text
    for credit in ("x", [math.inf, "x"], {"a": 1}, [[1]]):  # by hand, or by a later version
        odd = [{**asked, "completion": "odd", "tokens": ["o", "d"], "credit": credit}]
        assert "odd" in read(page.write([run(tmp_path / "odd", told=odd)]))[0].said.replace(" ", "")
        assert "strongest" not in read(page.write([run(tmp_path / "odd", told=odd)]))[1]


def test_the_last_matrix_of_interference_is_drawn(tmp_path):
    rows = recorded_run.rows(6)
    for row, found in zip(
        (row for row in rows if "accuracy" in row), ([[9.0]], [[1.0, -2.0], [0.0, 0.5]], [[1.0], [2.0]]), strict=False
    ):
        row["interference"] = found  # the last one is none
    text = page.write([run(tmp_path / "run", rows)]).read_text()
    [table] = re.findall(r'<table class="matrix">(.*?)</table>', text)
    cells = re.findall(r'<td><span class="(\w+)" style="--much: (\d+)%" title="[^"]*">(.*?)</span></td>', table)
    assert cells == [("gain", "30", "+1"), ("loss", "60", "-2"), ("loss", "0", "+0"), ("gain", "15", "+0.5")]
    assert f"after step {[row['step'] for row in rows if 'accuracy' in row][1]};" in text
    assert 'class="matrix"' not in page.write([run(tmp_path / "none")]).read_text()


def test_several_runs_are_compared(tmp_path):
    folders = []
    for seed in range(3):
        described = json.loads(json.dumps(recorded_run.DESCRIBED))
        described["config"] |= {"seed": seed, "out": f"runs/{seed}"}
        folders.append(run(tmp_path / f"seed{seed}", recorded_run.rows(9, seed), None, described))
    found, text = read(page.write(folders, tmp_path / "all.html"))
    assert (tmp_path / "all.png").exists() and not (folders[0] / "report.html").exists()
    assert "3 runs compared" in re.sub(r" +", " ", found.said)
    assert [f"seed{n}" in found.said for n in range(3)] == [True] * 3
    assert re.findall(r"<tr><td><code>(\w+)</code>", text) == ["seed"]
    assert "0.260 → 0.920" in found.said and "0.270 → 0.920" in found.said
    same = re.sub(r" +", " ", read(page.write([folders[0], folders[0]], tmp_path / "same.html"))[0].said)
    assert "The same in every run." in same and f"{folders[0].resolve()} (2)" in same


def test_a_run_that_still_goes_and_one_that_was_resumed(tmp_path):
    described = json.loads(json.dumps(recorded_run.DESCRIBED))
    described["resumed"] = [{"step": 20, "time": "2026-11-22T08:00:00+0000", "changes": {}}]
    folder = run(tmp_path / "run", recorded_run.rows()[:30], recorded_run.samples(3), described)
    for name in ("metrics.jsonl", "samples.jsonl"):
        with (folder / name).open("a") as file:
            file.write('{"step": 99, "rew')
    found, text = read(page.write([folder]))
    assert "28 of 60 steps so far; resumed at step 20, 22 November 2026, 08:00" in found.said
    assert "99" not in re.findall(r'data-label="step">(\d+)', text)
    assert "so far" not in read(page.write([run(tmp_path / "whole", recorded_run.rows())]))[0].said


def test_what_is_no_run_is_one_sentence(tmp_path):
    empty, half = tmp_path / "empty", run(tmp_path / "half", [])
    empty.mkdir()
    broken = run(tmp_path / "broken")
    (broken / "config.json").write_text("{")
    odd = run(tmp_path / "odd", [["step"], {"reward": 1.0}])
    bad = run(tmp_path / "bad")
    (bad / "metrics.jsonl").write_bytes(b"\xff\xfe{}\n")
    for folder, says in (
        (empty, "has no config.json"), (tmp_path / "absent", "has no config.json"), (half, "has none yet"),
        (broken, "must hold a run that can be read"), (odd, "line 1 is not"), (bad, "must hold a run that can be read"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=says) as raised:
            page.write([folder])
        assert str(folder) in str(raised.value) and "\n" not in str(raised.value)
        assert not (folder / "report.html").exists()
    with pytest.raises(ValueError, match="at least one run"):
        page.write([])
    with pytest.raises(ValueError, match=r"must end in \.html"):
        page.write([run(tmp_path / "good")], tmp_path / "page.png")


def test_a_page_that_cannot_be_written_or_drawn_is_one_sentence(tmp_path, monkeypatch):
    folder = run(tmp_path / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(RuntimeError, match="must be writable"):
        page.write([folder], tmp_path / "file" / "page.html")

    def absent(name, extra):
        raise RuntimeError(f'{name} is not installed. Run: pip install "fuserl[{extra}]"')

    monkeypatch.setattr(lookup, "package", absent)
    with pytest.raises(RuntimeError, match="pip install"):
        page.write([folder])
    assert not (folder / "report.html").exists()


def test_an_old_page_stays_until_the_new_one_is_whole(tmp_path, monkeypatch):
    folder = run(tmp_path / "run")
    page.write([folder])
    old = (folder / "report.html").read_bytes()
    room = iter([True, True])  # for the picture and its folder

    def full(descriptor):
        if not next(room, False):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RuntimeError, match="No space left on device"):
        page.write([folder])
    assert (folder / "report.html").read_bytes() == old
    assert sorted(os.listdir(folder)) == ["config.json", "metrics.jsonl", "report.html", "report.png"]
