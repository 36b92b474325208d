"""What the command line says to what it cannot take, for tests: one sentence, nothing trained, nothing left behind."""

import contextlib
import io
from pathlib import Path

import tiny_runs

from fuserl.engine import cli, loop

HINT = "fuserl: FUSERL_DEBUG=1 shows where"
LONGEST = 1300  # letters of a line

started = []  # steps of training that have begun


def stage(monkeypatch, folder):
    """Work in a new folder, with a tiny model for every name and with `started` watching the loop."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delenv("FUSERL_DEBUG", raising=False)
    tiny_runs.use(monkeypatch)
    real = loop.step
    monkeypatch.setattr(loop, "step", lambda *arguments: started.append(1) or real(*arguments))
    started.clear()
    tiny_runs.problems(folder)


def training(*changes, recipe="grpo", **settings):
    """The words of a command that trains in the folder `out`; a setting of None is left out."""
    usual = {**tiny_runs.SETTINGS, "data": "problems.jsonl", "out": "out", "steps": 1, **settings}
    words = [(f"--{name.replace('_', '-')}", str(value)) for name, value in usual.items() if value is not None]
    return ["train", recipe, *[word for pair in words for word in pair], *changes]


def outcome(words):
    """(status, standard output, standard error) of a command line run in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = cli.main(words)
        except SystemExit as leaving:
            status = leaving.code
    return status, out.getvalue(), err.getvalue()


def sentence(err, status, notes=0):
    """The one sentence of an error's output, which may follow `notes` lines about what was passed over."""
    lines = err.splitlines()
    assert len(lines) == notes + (2 if status == 1 else 1), err
    assert all(line.startswith("fuserl") and line.isprintable() for line in lines), err
    assert status != 1 or lines.pop() == HINT
    line = lines[notes]
    assert line.endswith((".", "?")) and len(line) < LONGEST and "Traceback" not in line, line
    return line


def refused(words, *says, status=2, notes=0):
    """The sentence with which a command line is refused, before anything is trained and with nothing left behind."""
    got, _, err = outcome(words)
    assert got == status and not started, (words, got, err)
    line = sentence(err, status, notes)
    for each in says:
        assert each in line, (each, line)
    assert not Path("out").exists() and not Path("runs").exists(), words
    return line
