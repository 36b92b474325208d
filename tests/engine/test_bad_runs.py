"""Folders that cannot hold a run, damaged runs, and what stops one half-way: the last checkpoint stays whole."""

import contextlib
import dataclasses
import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import refusals
import tiny_models
import tiny_runs
import torch
from refusals import outcome, refused, sentence, training

from fuserl.engine import catalogue, checkpoint, cli, metrics, models, report, state

SHORT = ["--reward", "tiny_runs:shortness"]


@pytest.fixture(autouse=True)
def staged(monkeypatch, tmp_path):
    refusals.stage(monkeypatch, tmp_path)
    torch.set_num_threads(1)  # before any fork: an OpenMP team does not survive one


@pytest.fixture
def run(tmp_path):
    """The folder of a run of two steps, a checkpoint after each."""
    assert outcome(training(*SHORT, steps=2, save_every=1, out="run"))[0] == 0
    refusals.started.clear()
    return tmp_path / "run"


def going_on(*changes, steps=3):
    return ["train", "--resume", "run", "--steps", str(steps), *changes]


OUT = {
    "problems.jsonl": "problems.jsonl must be writable; it is not (File exists)",
    "problems.jsonl/x": "(Not a directory)",
    "/proc/x": "/proc/x",
    "/sys/x": "/sys/x",
    "link": "link must be writable",
    "a" * 300: "(File name too long)",
}


@pytest.mark.parametrize("out", OUT, ids=lambda out: out[:20])
def test_folders_that_cannot_hold_a_run(out):
    os.symlink("link", "link")
    refused(training(out=out), OUT[out])


def test_folders_that_are_taken_or_in_use(run):
    refused(training(out="run"), "run is taken")
    refused(training(out="../" + Path.cwd().name + "/run"), "run is taken")
    with (run / "run.lock").open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        refused(going_on(), f"process {os.getpid()} does")
    Path("mine").mkdir()
    (Path("mine") / "notes.txt").write_text("")
    refused(training("--model", "/absent", "--reward", "tiny_runs:absent", out="mine"), "got 'absent'")
    refused(training("--lora-rank", "2", "--lora-targets", "x", out="mine"), "got 'x'")
    assert os.listdir("mine") == ["notes.txt"]


def test_a_folder_that_cannot_be_written():
    if os.geteuid() or not shutil.which("mount"):
        pytest.skip("only root can mount a read-only file system")
    Path("still").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,size=64k", "none", "still"], check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        for out in ("still", "still/x"):
            refused(training(out=out), "Read-only file system")
    finally:
        subprocess.run(["umount", "still"], check=True)


def test_what_resume_cannot_go_on_with(run):
    for name in ("absent", "problems.jsonl", "run/config.json", ".", ""):
        refused(["train", "--resume", name, "--steps", "3"], "--resume must name a run's folder")
    refused(going_on("--out", "x"), "leave out --config and --out")
    refused([*going_on(), "--recipe", "ppo"], "own recipe, grpo; got ppo")
    refused(going_on("--freeze", "*mlp*"), "must hold the parameters that this run trains")
    refused(going_on("--lora-rank", "2"), "must hold the parameters that this run trains")
    assert len(tiny_runs.rows(run)) == 4


@pytest.mark.parametrize("change", [{"hidden_size": 16}, {"family": "qwen3"}, {"num_hidden_layers": 2}])
def test_checkpoints_of_another_model(run, change, monkeypatch):
    tiny_runs.use(monkeypatch, lambda: tiny_models.model(**change))
    for words in (going_on(), ["eval", "run"], ["export", "run", "--out", "new"]):
        refused(words, "step-00000002 of run must hold the parameters that this run trains")
    assert len(tiny_runs.rows(run)) == 4


CONFIGS = {
    "": "config.json",
    "{": "config.json",
    "[]": "got list",
    "3": "got int",
    '"reasons"': "got str",
    '{"config": {"recipe": "nope"}, "reasons": {}}': "got 'nope'",
    '{"config": {"steps": "x"}, "reasons": {}}': "got 'x'",
    '{"config": {"future": 1}, "reasons": {}}': "got 'future'",
    "[" * 100_000: "recursion",
}


@pytest.mark.parametrize("text", CONFIGS, ids=lambda text: text[:30])
def test_settings_that_are_damaged(run, text):
    (run / "config.json").write_text(text)
    for words in (going_on(), ["eval", "run"], ["export", "run", "--out", "new"]):
        refused(words, CONFIGS[text])


@pytest.mark.parametrize("value", [3, [[]], {"gpus": 1, "cores": "x", "recipe": []}, None])
def test_parts_of_config_json_that_are_something_else(run, value, monkeypatch):
    monkeypatch.setattr(report, "plot", lambda *_, **__: "none")
    whole = json.loads((run / "config.json").read_text())
    for part in ("config", "reasons", "resumed"):
        (run / "config.json").write_text(json.dumps({**whole, part: value}))
        for words in (["eval", "run"], going_on(steps=2)):
            status, _, err = outcome(words)
            assert status == 0 or (status == 2 and sentence(err, status)), err
    for parts in ({"config": value}, dict.fromkeys(whole.keys() - {"config"}, value)):
        (run / "config.json").write_text(json.dumps({**whole, **parts}))
        assert outcome(["report", "run"])[::2] == (0, "")


def checkpoints():
    return sorted(Path("run/checkpoints").iterdir())


def half(path):
    os.truncate(path, path.stat().st_size // 2)


DAMAGE = {
    "half": (lambda path: half(path / "policy.safetensors"), "policy.safetensors does not match its checksum"),
    "format": (lambda path: change(path / "checksums.json", '"format":1', '"format":9'), "its format is 9"),
    "list": (lambda path: (path / "checksums.json").write_text("[]"), "checksums.json is not of a checkpoint"),
    "no state": (lambda path: (path / "state.json").unlink(), "state.json is missing"),
    "no sums": (lambda path: (path / "checksums.json").unlink(), "checksums.json is missing"),
}


def change(path, old, new):
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize("damage", DAMAGE)
def test_checkpoints_that_are_damaged(run, damage):
    spoil, says = DAMAGE[damage]
    spoil(checkpoints()[-1])
    status, _, err = outcome(["eval", "run"])
    assert status == 0 and err.count("\n") == 1 and says in err  # the one before it is taken
    spoil(checkpoints()[0])
    for words in (going_on(), ["eval", "run"], ["export", "run", "--out", "new"]):
        refused(words, "must hold a checkpoint that is whole; none of its 2 is", notes=2)
    assert len(tiny_runs.rows(run)) == 4


def test_checkpoints_that_are_gone(run):
    change(run / "config.json", '"save_every": 1', '"save_every": 20')
    shutil.rmtree(run / "checkpoints")
    for words in (["eval", "run"], ["export", "run", "--out", "new"]):
        refused(words, "run has none yet")
    change(run / "config.json", '"save_every": 20', '"save_every": 1')
    refused(going_on(), "its metrics reach step 2 and there is none")
    assert len(tiny_runs.rows(run)) == 4


def test_foreign_files_among_the_checkpoints(run):
    for name in ("step-x", "notes.txt", "step-3"):
        (run / "checkpoints" / name).mkdir()
    assert outcome(["eval", "run"])[::2] == (0, "")
    (run / "checkpoints" / "step-99999999").write_text("")
    status, _, err = outcome(going_on())
    assert status == 0 and "step-99999999 is left out" in err and tiny_runs.rows(run)[-1]["step"] == 3


def test_metrics_that_are_damaged(run):
    half(run / "metrics.jsonl")
    status, _, err = outcome(going_on())
    assert status == 0 and err.count("\n") == 1 and "metrics.jsonl has lost lines" in err
    for content in (b"\xff\n" * 20_000, b"3\n" * 20_000, b'{"step": 1e999}\n' * 20_000):
        (run / "metrics.jsonl").write_bytes(content)
        refusals.started.clear()
        status, _, err = outcome(going_on(steps=4))
        assert "line 1 is not" in sentence(err, status, notes=err.count("has lost lines")) and not refusals.started
        refused(["report", "run"], "line 1 is not")


def test_a_taken_folder_is_known_before_the_model_is_loaded(run, monkeypatch):
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("loaded"))
    refused(["export", "run", "--out", "run"], "must not exist yet or be empty")
    refused(training(out="run"), "run is taken")


def test_what_cannot_be_judged_exported_or_drawn(run):
    refused(["eval", "run", "--eval-problems", "0"], "got --eval-problems 0")
    refused(["eval", "run", "--lr", "x"], "got 'x'")
    refused(["eval", "run", "--max-new-tokens", "300"], "must fit the 256 tokens")
    refused(["export", "run", "--out", "problems.jsonl"], "must not exist yet or be empty")
    refused(["export", ".", "--out", "new"], "got '.'")
    refused(["report", "run", "--out", "page.pdf"], "got 'page.pdf'")
    refused(["report", "run", "--out", "absent/page.html"], "absent/page.html must be writable", status=1)
    refused(["report", "problems.jsonl"], "has no config.json")
    (run / "config.json").write_text("{")
    refused(["report", "run"], "must hold a run that can be read")


def test_a_page_without_its_package(run, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("matplotlib.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    refused(["report", "run"], "matplotlib", "pip install", status=1)


def test_room_for_checkpoints_is_known_before_training(monkeypatch):
    monkeypatch.setattr(state.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 100_000))
    refused(training(*SHORT, eval_problems=0), "must have room for 3 checkpoints of", "0.0001 GB are free", status=1)


def test_gradients_that_are_not_finite(monkeypatch):
    real = catalogue.recipe

    def poisoned(config):
        return dataclasses.replace(real(config), advantage=lambda batch: torch.full_like(batch.rewards, torch.nan))

    monkeypatch.setattr(catalogue, "recipe", poisoned)
    status, _, err = outcome(training(*SHORT, steps=9, max_skipped=2, save_every=1))
    assert status == 1 and "those of the last 3 steps were not" in sentence(err, status)
    assert checkpoint.newest(Path("out")).step == 2


@contextlib.contextmanager
def child(words, prepared=lambda: None):
    """A forked process that runs a command line; what it writes is in child.out and child.err."""
    number = os.fork()
    if number == 0:
        status = 99
        try:
            sys.stdout, sys.stderr = open("child.out", "w"), open("child.err", "w")  # noqa: SIM115
            signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell takes from jobs in the background
            prepared()
            status = cli.main(words)
            sys.stderr.flush()
        finally:
            os._exit(status)
    try:
        yield number
    finally:
        with contextlib.suppress(ChildProcessError):
            if os.waitpid(number, os.WNOHANG)[0] == 0:
                os.kill(number, signal.SIGKILL)


def ended(number):
    """The exit status of a child, within a minute, and what it wrote to standard error."""
    deadline, gone = time.monotonic() + 60, (0, 0)
    while gone[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
        gone = os.waitpid(number, os.WNOHANG)
    return os.waitstatus_to_exitcode(gone[1]), Path("child.err").read_text()


@pytest.mark.parametrize(("stop", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_is_stopped_says_how_to_go_on(stop, status):
    with child(training(*SHORT, steps=100_000, save_every=1, eval_every=0)) as number:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not Path("out/checkpoints/step-00000002").exists():
            time.sleep(0.01)
        os.kill(number, stop)
        got, err = ended(number)
    assert got == status and "fuserl train --resume out goes on." in sentence(err, status)
    newest = checkpoint.newest(Path("out")).step
    assert outcome(["train", "--resume", "out", "--steps", str(newest + 1)])[0] == 0
    assert [row["step"] for row in metrics.read("out") if "reward" in row] == list(range(1, newest + 2))


def test_a_disk_that_fills_up_leaves_the_last_checkpoint(run):
    largest = max(path.stat().st_size for path in run.rglob("*.safetensors"))
    with child(going_on(steps=4), lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (largest // 2,) * 2)) as number:
        status, err = ended(number)
    assert status == 1 and "must take the checkpoint of step 3; it does not (File too large)" in sentence(err, status)
    assert checkpoint.newest(run).step == 2 and not list(run.rglob("*.draft"))
    assert outcome(going_on(steps=4))[0] == 0
    assert [row["step"] for row in tiny_runs.rows(run) if "reward" in row] == [1, 2, 3, 4]


def test_a_reward_that_fails_half_way_leaves_what_was_made(run, monkeypatch):
    calls = []
    monkeypatch.setattr(tiny_runs, "shortness", lambda completion: calls.append(1) or [None, 1.0][len(calls) < 15])
    status, _, err = outcome(going_on(steps=9))
    assert status == 1 and "failed-step-4.jsonl" in sentence(err, status) and "--resume run goes on" in err
    assert len(Path("run/failed-step-4.jsonl").read_text().splitlines()) == 8


COMMAND = [sys.executable, "-m", "fuserl.engine.cli"]
BUFFERED = {**os.environ, "PYTHONUNBUFFERED": ""}


@pytest.mark.parametrize("words", [["list"], ["train", "--help"]], ids=" ".join)
def test_a_reader_that_has_seen_enough_hears_nothing(words):
    pipe = subprocess.PIPE
    with subprocess.Popen([*COMMAND, *words], stdout=pipe, stderr=pipe, env=BUFFERED) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() in (0, 128 + signal.SIGPIPE)


def test_output_that_nobody_can_keep():
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*COMMAND, "list"], stdout=full, stderr=subprocess.PIPE, env=BUFFERED, text=True, check=False
        )
    assert done.returncode == 1 and "No space left on device" in sentence(done.stderr, 1)


def test_the_traceback_is_there_for_those_who_ask(monkeypatch):
    monkeypatch.setenv("FUSERL_DEBUG", "1")
    for words, kind in ((training(data="absent.jsonl"), ValueError), (training("--device", "cuda:9"), RuntimeError)):
        with pytest.raises(kind):
            cli.main(words)


def test_memory_that_runs_out(monkeypatch):
    for error in (MemoryError("8 GB"), RuntimeError("DefaultCPUAllocator: can't allocate memory"), OSError(28, "full")):

        def fail(config, error=error):
            raise error

        monkeypatch.setattr(catalogue, "recipe", fail)
        line = refused(training(), status=1)
        assert ("--micro-tokens" in line) == (not isinstance(error, OSError)) and json.dumps(line)
