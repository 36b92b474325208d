"""A worker's life beside its parent: it ends with it, prints through it, and imports little."""

import contextlib
import os
import select
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from reward_functions import ended


@contextlib.contextmanager
def script(tmp_path, body):
    """Run a training script in a process of its own; its functions live in reward_functions, as here."""
    path = tmp_path / "script.py"
    here = Path(__file__).parent
    head = f"import sys\nsys.path.insert(0, {str(here)!r})\nimport reward_functions\n"
    head += "from fuserl.engine import rewards\nfrom test_reward_pool import rollouts\n"
    path.write_text(head + textwrap.dedent(body))
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    program = [sys.executable, str(path)]
    with subprocess.Popen(program, text=True, process_group=0, env=environment, **streams) as process:
        try:
            yield process
        finally:
            process.kill()


HANGING = """
    import signal
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    for _ in range(2):  # needs no guard: workers do not run this file
        print("script", flush=True)
        scorer = rewards.Scorer(reward_functions.told, workers=2, timeout=600)
        scorer(rollouts(["say working", "say working", "hang", "hang", "say working"]))
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_end_with_their_parent(end, tmp_path):
    with script(tmp_path, HANGING) as process:
        assert [process.stdout.readline() for _ in range(3)] == ["script\n", "working\n", "working\n"]
        select.select([], [], [], 0.2)  # let both workers reach what hangs, which holds their interpreter
        os.killpg(process.pid, end)
        assert process.wait(60) == -end
        # The workers inherited both streams, so these end when the last worker does.
        assert ended(process.stdout.fileno())
        said = process.stderr.read()
    assert said.count("Traceback") == (end == signal.SIGINT)  # the script's own, and none of a worker


def test_importing_a_script_in_a_worker_does_not_train_again(tmp_path):
    (tmp_path / "unguarded.py").write_text(
        "from fuserl.engine import rewards\nimport reward_functions\n"
        "def f(completion): return 1.0\n"
        "scorer = rewards.Scorer(reward_functions.length, workers=1)\n"
    )
    body = """
        scorer = rewards.Scorer(rewards.load("unguarded:f"), workers=1)
        scorer(rollouts(["a"]))
    """
    with script(tmp_path, body) as process:
        said = process.communicate(timeout=60)[1].splitlines()[-1]
    assert said.startswith("fuserl.engine.rewards.RewardError") and 'under if __name__ == "__main__"' in said


def test_what_a_reward_prints_passes_through(tmp_path):
    body = """
        scorer = rewards.Scorer(reward_functions.told, workers=1, timeout=1.0)
        print(scorer(rollouts(["say hello", "say there", "hang"]))[1])
    """
    with script(tmp_path, body) as process:
        out, err = process.communicate(timeout=60)
    assert out == "hello\nthere\n{'timeouts': 1}\n"
    assert err.count("\n") == 1 and "stopped after 1 s for rollout 2 (prompt" in err and "completion 'hang'" in err


def test_a_worker_imports_little():
    listing = "import fuserl.engine.reward_worker, fuserl.engine.verifiers, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", listing], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "numpy", "asyncio", "reasoning_gym"} & set(loaded)
