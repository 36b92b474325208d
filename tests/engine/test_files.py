"""Users' files: good rows come back the same from every format, and whatever is wrong is one line that says where."""

import copy
import json
import random

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuserl.engine import files

TURN = {"role": "user", "content": "2 + 2?"}
REPLY = {"role": "assistant", "content": "4"}
WRONG = {"role": "assistant", "content": "5"}


def written(folder, rows, suffix=".jsonl"):
    path = folder / f"rows{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def refusal(path, columns=()):
    """What is said of a file that must be refused: one line that ends in a stop, names the file and can be printed."""
    with pytest.raises(ValueError) as caught:
        files.read(path, columns)
    says = str(caught.value)
    assert type(caught.value) is ValueError and path.name in says
    assert "\n" not in says and says.endswith(".") and len(says) < 600 and says.encode()
    return says


texts = st.text(st.characters(codec="utf-8"), max_size=12)
asked = texts.filter(str.strip)
answers = st.sampled_from([texts, st.integers(-(2**60), 2**60), st.floats(allow_nan=False, allow_infinity=False)])
turns = st.builds(
    lambda opening, exchanges, last: [*opening, *(turn for pair in exchanges for turn in pair), last],
    st.sampled_from([[], [{"role": "system", "content": "Be brief."}]]),
    st.lists(st.tuples(st.just(TURN), st.just(REPLY)), max_size=2),
    asked.map(lambda text: {"role": "user", "content": text}),
)


@st.composite
def good_rows(draw):
    prompts, answer = draw(st.sampled_from([asked, turns])), draw(answers)
    row = {"prompt": prompts, "answer": answer, "chosen": texts, "rejected": texts, "level": st.integers(0, 9)}
    return draw(st.lists(st.fixed_dictionaries(row), min_size=1, max_size=4))


@settings(max_examples=60, derandomize=True, deadline=None)
@given(rows=good_rows())
def test_rows_are_the_same_from_every_format(rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    read = [files.read(written(folder, rows, suffix)).problems for suffix in files.SUFFIXES]
    assert read[0] == read[1] == read[2] and len(read[0]) == len(rows)
    for row, problem in zip(rows, read[0], strict=True):
        assert problem.turns == (() if isinstance(row["prompt"], str) else tuple(row["prompt"]))
        assert (row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]) in problem.question
        assert problem.answer == problem.metadata["answer"] == str(row["answer"])
        assert (problem.chosen, problem.rejected) == (row["chosen"], row["rejected"])
        assert problem.metadata["level"] == row["level"] and set(problem.metadata) == {"answer", "level"}


def test_rows_know_their_places(tmp_path):
    rows = [{"prompt": "a"}, {"prompt": "b"}]
    path = tmp_path / "spaced.jsonl"
    path.write_text('\n{"prompt": "a"}\n\n{"prompt": "b"}')
    assert [problem.place for problem in files.read(path).problems] == [f"{path}:2", f"{path}:4"]
    for suffix in (".json", ".parquet"):
        path = written(tmp_path, rows, suffix)
        assert [problem.place for problem in files.read(path).problems] == [f"{path}, row 1", f"{path}, row 2"]


def test_a_mark_that_opens_a_file_is_no_part_of_it(tmp_path):
    path = tmp_path / "windows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n{"prompt": "b"}\r\n')
    assert [problem.question for problem in files.read(path).problems] == ["a", "b"]


@pytest.mark.parametrize("suffix", files.SUFFIXES)
def test_columns_may_be_called_otherwise(tmp_path, suffix):
    path = written(tmp_path, [{"question": "2 + 2 =", "solution": 4, "level": 1}], suffix)
    problem = files.read(path, ["prompt=question", "answer=solution"]).problems[0]
    assert (problem.question, problem.answer) == ("2 + 2 =", "4")
    assert problem.metadata == {"level": 1, "answer": "4"}
    says = refusal(path, ["prompt=qestion", "answer=solution"])
    assert "column that prompt is to be; got 'qestion'. Did you mean 'question'? Its columns are question, so" in says
    assert "got 'xyz'. Known: question, solution, level." in refusal(path, ["prompt=question", "answer=xyz"])
    assert '"question"; got 7' in refusal(written(tmp_path, [{"question": 7}], suffix), ["prompt=question"])


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        (["prompt"], "must read ours=theirs; got 'prompt'"),
        (["prompt="], "must read ours=theirs"),
        (["promt=question"], "got 'promt'. Did you mean 'prompt'?"),
        (["prompt=question", "prompt=solution"], "prompt must be named once"),
    ],
)
def test_columns_must_be_renamed_to_what_there_is(tmp_path, columns, says):
    with pytest.raises(ValueError) as caught:
        files.read(written(tmp_path, [{"question": "a", "solution": "b"}]), columns)
    assert says in str(caught.value)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [TURN], "chosen": "4", "rejected": "5"},
        {"prompt": [TURN], "chosen": [REPLY], "rejected": [WRONG]},
        {"prompt": [TURN], "chosen": [TURN, REPLY], "rejected": [TURN, WRONG]},
        {"prompt": "2 + 2?", "chosen": [TURN, REPLY], "rejected": [TURN, WRONG]},
        {"prompt": None, "chosen": [TURN, REPLY], "rejected": [TURN, WRONG]},
        {"chosen": [TURN, REPLY], "rejected": [TURN, WRONG]},
    ],
)
def test_a_preference_may_be_written_in_many_ways(tmp_path, row, suffix):
    problem = files.read(written(tmp_path, [row], suffix)).problems[0]
    assert problem.turns == (TURN,) and problem.question == "2 + 2?" and problem.answer is None
    assert (problem.chosen, problem.rejected) == ("4", "5")


def test_completions_of_a_text_stay_with_the_text(tmp_path):
    rows = [{"prompt": "2 + 2 =", "chosen": [REPLY], "rejected": [WRONG]}, {"prompt": "2 + 2 =", "chosen": " 4"}]
    first, second = files.read(written(tmp_path, rows)).problems
    assert (first.turns, first.chosen, first.rejected) == ((), "4", "5")
    assert (second.turns, second.chosen, second.rejected) == ((), " 4", None)


def test_a_question_is_told_by_the_whole_conversation(tmp_path):
    first = [{"role": "system", "content": "Add."}, TURN]
    rows = files.read(written(tmp_path, [{"prompt": first}, {"prompt": [TURN]}, {"prompt": "2 + 2?"}]))
    assert [each.question for each in rows.problems] == ["system: Add.\n\nuser: 2 + 2?", "2 + 2?", "2 + 2?"]
    assert rows.conversational and rows.size == 2 and rows.unverifiable.endswith("rows.jsonl:1 has no answer")


BAD_ROWS = [
    ({}, "text or messages"),
    ({"text": "a", "b": 1}, "Its columns are text, b"),
    ({"prompt": ""}, "text or messages"),
    ({"prompt": " \n"}, "text or messages"),
    ({"prompt": 3}, "got 3"),
    ({"prompt": {"role": "user"}}, "text or messages"),
    ({"prompt": []}, "at least one message"),
    ({"prompt": ["a"]}, "role (system, user, assistant)"),
    ({"prompt": [{"role": "human", "content": "a"}]}, "'human'"),
    ({"prompt": [{"role": "user"}]}, "text as content"),
    ({"prompt": [{"role": "user", "content": 4}]}, "text as content"),
    ({"prompt": [{"role": ["user"], "content": "a"}]}, "text as content"),
    ({"prompt": [{"role": "user", "content": " "}]}, "not empty"),
    ({"prompt": [TURN, REPLY]}, "the last message must be a user's"),
    ({"prompt": "half \ud83d"}, "half characters"),
    ({"prompt": [{"role": "user", "content": "half \ud83d"}]}, "half characters"),
    ({"prompt": "a", "answer": True}, "text or a number"),
    ({"prompt": "a", "answer": ["b"]}, "text or a number"),
    ({"prompt": "a", "answer": "\udc00"}, "half characters"),
    ({"prompt": "a", "chosen": 4}, 'text or messages under "chosen"'),
    ({"prompt": "a", "chosen": "b", "rejected": {}}, 'text or messages under "rejected"'),
    ({"prompt": "a", "rejected": "\udc00"}, "half characters"),
    ({"prompt": "a", "chosen": []}, "at least one message"),
    ({"prompt": [TURN], "chosen": [TURN]}, "the assistant's"),
    ({"prompt": "other", "chosen": [TURN, REPLY]}, "must be those of the prompt"),
    ({"prompt": [TURN, REPLY, TURN], "chosen": [TURN, REPLY]}, "must be those of the prompt"),
    ({"chosen": [TURN, REPLY], "rejected": [{**TURN, "content": "3 + 3?"}, WRONG]}, "all messages but the last"),
    ({"chosen": [REPLY], "rejected": [WRONG]}, 'text or messages under "prompt"'),
    ({"chosen": "Human: a", "rejected": "Human: a"}, 'text or messages under "prompt"'),
    ({"chosen": [REPLY, REPLY], "rejected": [REPLY, WRONG]}, "the last message must be a user's"),
]


@pytest.mark.parametrize(("row", "says"), BAD_ROWS, ids=[str(row)[:60] for row, _ in BAD_ROWS])
def test_a_bad_row_is_named(tmp_path, row, says):
    before = copy.deepcopy(row)
    told = refusal(written(tmp_path, [{"prompt": "fine"}, row]))
    assert told.startswith(f"{tmp_path}/rows.jsonl:2: ") and says in told and row == before
    told = refusal(written(tmp_path, [{"prompt": "fine"}, row], ".json"))
    assert told.startswith(f"{tmp_path}/rows.json, row 2: ") and says in told


LINES = [
    b"{oops",
    b'{"prompt": "a"',
    b'{"prompt": "\xff"}',
    b"\x00\x01",
    b"[1]",
    b"7",
    b'"prompt"',
    b"null",
    b'{"prompt": "a", "level": NaN}',
    b'{"prompt": "a", "answer": -Infinity}',
    b'{"prompt": "a", "answer": 1e999}',
    b'{"prompt": "a", "answer": ' + b"9" * 5000 + b"}",
    b'{"prompt": ' + b"[" * 100_000,
    b'{"prompt": ' + b"[" * 500 + b"]" * 500 + b"}",
    b'{"two\\nlines\\ud83d": 1}',
    b'{"' + b"long" * 999 + b'": 1}',
]
FINE = b'{"prompt": "fine", "answer": 4}\n'


def parquet_bytes(folder, table):
    pyarrow.parquet.write_table(table, folder / "made.parquet")
    return (folder / "made.parquet").read_bytes()


def odd_tables():
    """Columns that a Parquet file can hold, and a row cannot."""
    array, fine = pyarrow.array, pyarrow.array(["fine", "too"])
    named = pyarrow.Table.from_arrays
    yield pyarrow.table({"prompt": array([], pyarrow.string())})
    yield pyarrow.table({})
    yield named([fine, fine], ["prompt", "prompt"])
    yield pyarrow.table({"text": fine})
    for odd in (
        array([b"a", b"b"]),
        array([1, 2]),
        array([True, None]),
        array([{"a": 1}, None]),
        array([["a"], ["b"]]),
        array([[], None], pyarrow.list_(pyarrow.string())),
    ):
        yield pyarrow.table({"prompt": odd})
    for odd in (array([b"a", b"b"]), array([True, None]), array([float("nan"), 1.0]), array([["a"], None])):
        yield pyarrow.table({"prompt": fine, "answer": odd})


@st.composite
def malformed(draw, folder):
    """A suffix, and the content of a file that no reader may take."""
    kind = draw(st.sampled_from(["row", "line", "empty", "suffix", "cut", "table", "whole", "rubbish"]))
    before, after = FINE * draw(st.integers(0, 3)), FINE * draw(st.integers(0, 2))
    if kind == "row":
        row = json.dumps(draw(st.sampled_from(BAD_ROWS))[0]).encode()
        return ".jsonl", before + row + b"\n" + after
    if kind == "line":
        return ".jsonl", before + draw(st.sampled_from(LINES)) + b"\n" + after
    if kind == "empty":
        return draw(st.sampled_from(files.SUFFIXES)), draw(st.sampled_from([b"", b"\n", b" \r\n\t\n", b"\xef\xbb\xbf"]))
    if kind == "suffix":
        return draw(st.sampled_from([".csv", ".txt", "", ".jsonl.gz"])), FINE
    if kind == "cut":
        whole = parquet_bytes(folder, pyarrow.table({"prompt": ["a", "b"], "answer": [1, 2]}))
        return ".parquet", whole[: draw(st.integers(0, len(whole) - 1))]
    if kind == "table":
        return ".parquet", parquet_bytes(folder, draw(st.sampled_from(list(odd_tables()))))
    if kind == "whole":
        return ".json", draw(st.sampled_from([b"[", b"[]", b"[1]", b'[{"prompt": "a"}', b'[{"prompt": "a"}] b', b"{}"]))
    return draw(st.sampled_from(files.SUFFIXES)), b"\xfe" + draw(st.binary(max_size=60))


@settings(max_examples=200, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_malformed_file_is_one_sentence(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("malformed")
    suffix, content = data.draw(malformed(folder))
    path = folder / f"data{suffix}"
    path.write_bytes(content)
    refusal(path)


def test_damage_is_refused_or_read_and_nothing_else(tmp_path):
    """Bytes overwritten anywhere: some of it cannot be noticed, none of it may end in another kind of error."""
    rows = [{"prompt": f"{n} + 1 =", "answer": n, "chosen": [TURN, REPLY], "when": 1.5 * n} for n in range(50)]
    whole = {suffix: written(tmp_path, rows, suffix).read_bytes() for suffix in files.SUFFIXES}
    chance, refused = random.Random(0), 0
    for number in range(600):
        suffix = files.SUFFIXES[number % 3]
        content = bytearray(whole[suffix])
        for _ in range(chance.randint(1, 4)):
            # Half of it near the end, where Parquet keeps what it knows of itself.
            content[-chance.randint(1, len(content) if number % 2 else 400)] = chance.randrange(256)
        path = tmp_path / f"damaged{suffix}"
        path.write_bytes(content)
        try:
            files.read(path)
        except ValueError:
            refused += 1
            refusal(path)
    assert refused > 200


@pytest.mark.parametrize("name", ["missing.jsonl", "missing.parquet", "folder.jsonl", "folder.parquet"])
def test_a_file_that_is_not_there_is_named(tmp_path, name):
    if name.startswith("folder"):
        (tmp_path / name).mkdir()
    assert "readable file" in refusal(tmp_path / name)


def test_pyarrow_is_asked_for_where_it_is_needed(tmp_path, monkeypatch):
    path = written(tmp_path, [{"prompt": "a"}], ".parquet")

    def absent(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name="pyarrow")

    monkeypatch.setattr(files.lookup.importlib, "import_module", absent)
    with pytest.raises(RuntimeError, match=r'pip install "fuserl\[tasks\]"'):
        files.read(path)
