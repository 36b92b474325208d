"""Worker processes: the same numbers as without, and what happens when a reward hangs, dies, or cannot be sent."""

import contextlib
import functools
import os
import sys

import pytest
import reward_functions
import torch

from fuserl.engine import prompts, reward_worker, rewards
from fuserl.engine.batch import Rollouts
from fuserl.engine.prompts import Prompt

LIMIT = 1.0  # far above what a call takes that does not hang, on a busy machine too


def rollouts(texts, *, group_size=1, metadata=None):
    """Completions of `group_size` a prompt."""
    groups = len(texts) // group_size
    return Rollouts(
        prompts=[Prompt(f"question {n} =", str(n), metadata or {}) for n in range(groups)],
        prompt_tokens=[torch.tensor([1])] * groups,
        group=torch.arange(groups).repeat_interleave(group_size),
        tokens=torch.arange(len(texts)),
        offsets=torch.arange(len(texts) + 1),
        rollout_logprobs=torch.zeros(len(texts)),
        texts=texts,
        finish=["stop"] * len(texts),
    )


@pytest.fixture
def pool():
    """A maker of scorers with workers, closed when the test ends."""
    with contextlib.ExitStack() as stack:
        yield lambda function, workers=1, timeout=30.0: stack.enter_context(
            rewards.Scorer(function, workers=workers, timeout=timeout)
        )


@pytest.mark.parametrize(
    "function",
    [
        reward_functions.length,
        reward_functions.length_later,
        reward_functions.shares,
        reward_functions.out_of_order,
        reward_functions.Counting(0.5),
        functools.partial(reward_functions.Counting.__call__, reward_functions.Counting(2)),
        rewards.exact,
        rewards.math_equal,
    ],
    ids=lambda function: getattr(function, "__name__", type(function).__name__),
)
def test_workers_give_what_one_process_gives(function, pool):
    group = rollouts([str(n) for n in range(24)], group_size=4, metadata={"bonus": 0.5})
    alone = rewards.Scorer(function)(group)
    assert len(alone[0].unique()) > 1 and alone[1] == {"timeouts": 0}
    scorer = pool(function, workers=2)
    for _ in range(3):
        shared = scorer(group)
        assert torch.equal(shared[0], alone[0]) and shared[1] == alone[1] and shared[0].dtype == torch.float32


def test_generated_tasks_are_judged_in_workers(pool):
    task = prompts.task("reasoning_gym:chain_sum:max_terms=2,max_digits=2", shots=0, held_out=8)
    held = task.held_out()
    group = rollouts([prompt.answer if n % 2 else "x" for n, prompt in enumerate(held)])
    group = Rollouts(**{**vars(group), "prompts": held})
    for partial in (False, True):
        judge = rewards.verifier(task, partial_credit=partial)
        alone = rewards.score(judge, group)
        assert alone[1::2].tolist() == [1.0] * 4 and (alone[::2] < 1.0).all()
        assert torch.equal(pool(judge, workers=2)(group)[0], alone)


def test_workers_stay_between_calls_and_share_the_work(pool):
    scorer = pool(reward_functions.process, workers=2)
    group = rollouts(["a"] * 400)
    scorer(group)
    workers = {worker.process.pid for worker in scorer._pool._workers}
    seen = set()
    while len(seen) < 2:  # one may still be starting
        seen |= set(scorer(group)[0].tolist())
    assert seen == workers and os.getpid() not in seen


def test_a_worker_has_no_torch(pool):
    assert "torch" in sys.modules
    assert pool(reward_functions.torch_is_there)(rollouts(["a"]))[0].item() == 0.0


@pytest.mark.parametrize("workers", [0, 1])
def test_a_reward_is_prepared_once_before_its_first_call(workers, pool, monkeypatch):
    monkeypatch.setattr(reward_functions, "_readied", 0)
    scorer = pool(reward_functions.prepared, workers)
    for _ in range(2):
        found, statistics = scorer(rollouts(["a"] * 3))
        assert found.tolist() == [1.0] * 3 and statistics == {"timeouts": 0}


@pytest.mark.parametrize("group_size", [1, 3])
def test_a_call_past_its_limit_is_stopped_and_counted(group_size, pool, tmp_path):
    function = reward_functions.told if group_size == 1 else reward_functions.told_group
    good = "return 1" if group_size == 1 else "list 1 2 3"
    texts = [good] * 40 * group_size
    texts[7 * group_size] = f"hang {tmp_path / 'tried'}"  # with others behind it in the batch of its worker
    scorer = pool(function, workers=2, timeout=LIMIT)
    found, statistics = scorer(rollouts(texts, group_size=group_size))
    kept = [1.0] if group_size == 1 else [1.0, 2.0, 3.0]
    assert found.tolist() == kept * 7 + [0.0] * group_size + kept * 32
    assert statistics == {"timeouts": group_size}
    assert len((tmp_path / "tried").read_text().splitlines()) == 1
    again, statistics = scorer(rollouts([good] * 9 * group_size, group_size=group_size))
    assert again.tolist() == kept * 9 and statistics == {"timeouts": 0}


def test_the_limit_is_of_one_call_and_not_of_all(pool):
    # The first ones are quick, so that the slow ones come to the worker in one batch.
    slow = rollouts([*["return 1"] * 5, *[f"block {LIMIT / 4}"] * 5, *["return 1"] * 40])
    found, statistics = pool(reward_functions.told, timeout=LIMIT)(slow)
    assert found.tolist() == [1.0] * 50 and statistics == {"timeouts": 0}


def test_the_start_of_a_worker_counts_against_no_call(pool, tmp_path, monkeypatch):
    (tmp_path / "slow_to_import.py").write_text(
        f"import time\ntime.sleep({1.5 * LIMIT})\ndef f(completion): return 1.0\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    function = rewards.load("slow_to_import:f")
    assert pool(function, timeout=LIMIT)(rollouts(["a", "b"]))[1] == {"timeouts": 0}
    sys.modules.pop("slow_to_import")


def test_what_a_stopped_call_started_is_stopped_too(pool, tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    ours = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    found, statistics = pool(reward_functions.told, timeout=LIMIT)(rollouts([f"spawn {fifo}"]))
    assert found.tolist() == [0.0] and statistics == {"timeouts": 1}
    assert reward_functions.ended(ours)
    os.close(ours)


@pytest.mark.parametrize(
    ("deed", "how"),
    [
        ("end 3", r"exit status 3"),
        ("end 0", r"exit status 0"),
        ("segfault", "SIGSEGV"),
        ("kill", "SIGKILL, out of memory perhaps"),
    ],
)
def test_a_worker_that_dies_names_the_rollout(deed, how, pool):
    scorer = pool(reward_functions.told)
    with pytest.raises(
        rewards.RewardError, match=rf"worker process ended \({how}\) for rollout 2 \(prompt 'qu"
    ) as error:
        scorer(rollouts(["return 5", "return 6", deed, "return 8"]))
    assert error.value.rewards[:2].tolist() == [5.0, 6.0] and error.value.rewards[2:].isnan().all()
    assert scorer(rollouts(["return 7"]))[0].tolist() == [7.0]


def test_a_worker_that_dies_between_calls_is_replaced(pool):
    scorer = pool(reward_functions.told)
    assert scorer(rollouts(["later"]))[0].item() == 1.0
    [worker] = scorer._pool._workers
    worker.process.wait(10)
    assert scorer(rollouts(["return 2"]))[0].item() == 2.0


def test_an_exception_comes_with_the_workers_traceback(pool):
    scorer = pool(reward_functions.told)
    with pytest.raises(
        rewards.RewardError, match=r"raised KeyError: .* for rollout 1 \(prompt 'question 1 ='"
    ) as error:
        scorer(rollouts(["return 5", "raise x", "return 6"]))
    assert "\n" not in str(error.value) and str(error.value).endswith("answer '1').")
    assert isinstance(error.value.__cause__, rewards.WorkerTraceback)
    assert "reward_functions.py" in str(error.value.__cause__) and "in _raise" in str(error.value.__cause__)
    assert error.value.rewards[0] == 5.0 and error.value.rewards[1:].isnan().all()
    assert scorer(rollouts(["return 7"]))[0].tolist() == [7.0]


def test_an_early_end_leaves_no_answers_behind(pool):
    scorer = pool(reward_functions.told, workers=2)
    scorer.start()
    while not all(worker.ready for worker in scorer._pool._workers):
        scorer(rollouts(["return 1"] * 2))
    with pytest.raises(rewards.RewardError, match="rollout 2 "):
        scorer(rollouts(["block 0.3", "block 0.6", "raise x", *["return 3"] * 5]))
    # The last call outlasts those that were stopped, whose answers would come now.
    assert scorer(rollouts([*["return 7"] * 7, "block 0.8"]))[0].tolist() == [*[7.0] * 7, 1.0]


@pytest.mark.parametrize("workers", [0, 1])
def test_async_calls_wait_together(workers, pool, monkeypatch):
    monkeypatch.setattr(reward_functions, "_in_flight", 0)
    found, statistics = pool(reward_functions.together, workers)(rollouts(["16"] * 16))
    assert found.tolist() == [1.0] * 16 and statistics == {"timeouts": 0}


@pytest.mark.parametrize("workers", [0, 1])
def test_async_calls_in_flight_are_limited(workers, pool):
    found, _ = pool(reward_functions.crowd, workers)(rollouts(["a"] * 200))
    assert found.max() == reward_worker.CONCURRENT


def test_async_calls_have_a_limit_each_and_share_the_workers(pool):
    scorer = pool(reward_functions.told_later, workers=2, timeout=LIMIT)
    found, statistics = scorer(rollouts(["return 1", "wait", "return 2", "wait", "return 3"]))
    assert found.tolist() == [1.0, 0.0, 2.0, 0.0, 3.0] and statistics == {"timeouts": 2}
    workers = [worker.process.pid for worker in scorer._pool._workers]
    assert scorer(rollouts(["return 4"] * 4))[0].tolist() == [4.0] * 4
    assert [worker.process.pid for worker in scorer._pool._workers] == workers  # a call that waits costs no worker


def test_an_async_call_that_blocks_its_loop_is_stopped(pool, monkeypatch):
    monkeypatch.setattr("fuserl.engine.reward_pool._GRACE", 0.1)
    scorer = pool(reward_functions.told_later, timeout=LIMIT)
    found, statistics = scorer(rollouts(["return 1", "hang", "return 2"]))
    assert found.tolist()[:2] == [1.0, 0.0] and statistics["timeouts"] >= 1
    assert scorer(rollouts(["return 4"] * 4))[0].tolist() == [4.0] * 4


def test_a_timeout_error_of_the_rewards_own_is_an_error(pool):
    with pytest.raises(rewards.RewardError, match=r"raised TimeoutError: of its own \(.*:\d+\) for rollout 0"):
        pool(reward_functions.told_later)(rollouts(["timeout"]))


def local():
    def inner(completion):
        return 1.0

    return inner


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda completion: 1.0, "lambda"),
        (local(), "inner"),
        (functools.partial(reward_functions.length, completion=local()), "partial"),
    ],
    ids=["lambda", "closure", "partial"],
)
def test_what_a_worker_cannot_import_is_refused(function, reason):
    with pytest.raises(ValueError, match=rf"{reason}.* must be importable .* Move it to a module of its own, or use"):
        rewards.Scorer(function, workers=1)
    assert rewards.Scorer(function, workers=0)


def test_what_is_defined_in_the_script_is_refused(monkeypatch):
    monkeypatch.setattr(reward_functions.length, "__module__", "__main__")
    monkeypatch.setattr(sys.modules["__main__"], "length", reward_functions.length, raising=False)
    with pytest.raises(ValueError, match=r"length must be importable .*; it is part of the script or notebook"):
        rewards.Scorer(reward_functions.length, workers=1)


def test_metadata_that_cannot_be_sent_is_refused(pool):
    with pytest.raises(ValueError, match="must be picklable"):
        pool(reward_functions.shares)(rollouts(["a"], metadata={"lock": lambda: 0}))


def test_a_module_that_fails_in_the_worker_says_so(pool, tmp_path, monkeypatch):
    (tmp_path / "picky.py").write_text(
        "import sys\nif sys.argv[0] == '-c': raise OSError('not here')\ndef f(answer): ...\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    scorer = pool(rewards.load("picky:f"))
    sys.modules.pop("picky")
    for _ in range(2):
        with pytest.raises(
            rewards.RewardError,
            match=r"reward: a worker process must be able to import it; .* not here \(.*picky\.py:2\)\.$",
        ):
            scorer(rollouts(["a"]))


def test_a_module_that_ends_the_worker_says_so(pool, tmp_path, monkeypatch):
    (tmp_path / "ending.py").write_text("import os, sys\nif sys.argv[0] == '-c': os._exit(5)\ndef f(answer): ...\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    scorer = pool(rewards.load("ending:f"))
    sys.modules.pop("ending")
    with pytest.raises(rewards.RewardError, match=r"must start; it ended at once \(exit status 5\)\.$"):
        scorer(rollouts(["a"]))


def test_a_closed_scorer_is_not_used_again(pool):
    scorer = pool(reward_functions.length, workers=2)
    scorer.start()
    processes = [worker.process for worker in scorer._pool._workers]
    assert len(processes) == 2
    scorer.close()
    scorer.close()
    assert all(process.returncode is not None for process in processes)
    with pytest.raises(RuntimeError, match="it was closed"):
        scorer(rollouts(["a"]))


def test_a_forgotten_scorer_ends_its_workers():
    scorer = rewards.Scorer(reward_functions.length, workers=1)
    scorer(rollouts(["a"]))
    [worker] = scorer._pool._workers
    del scorer
    assert worker.process.returncode is not None


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"workers": -1}, "workers must be an integer >= 0; got -1"),
        ({"workers": True}, "workers must be an integer"),
        ({"workers": 1, "timeout": 0}, "timeout must be a number of seconds > 0; got 0"),
        ({"workers": 1, "timeout": float("inf")}, "got inf"),
    ],
)
def test_bad_settings(settings, says):
    with pytest.raises(ValueError, match=says):
        rewards.Scorer(reward_functions.length, **settings)
