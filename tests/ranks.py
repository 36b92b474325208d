"""Functions run by several processes that form a gloo group: each call has its own, and none outlives it."""

import importlib.util
import multiprocessing
import multiprocessing.connection
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

TIMEOUT = 90  # seconds in which the ranks must end; they need two

# Ranks are forked from a process that has loaded torch and run nothing: at once, and without threads to lose.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([
    "pytest", "torch._inductor.config", "torch.distributed.fsdp", "torch.distributed.tensor", "fuserl._C",
    "fuserl.kernels.linear_logprob", "fuserl.kernels.linear_policy_loss",
])  # fmt: skip


def on_ranks(world, function, *arguments, seconds=TIMEOUT):
    """Run function(*arguments), of any file of tests, on ranks 0 to world - 1; the first failure is raised."""
    with tempfile.TemporaryDirectory() as folder:
        place = function.__code__.co_filename, function.__name__
        ranks = [
            _CONTEXT.Process(target=_rank, args=(rank, world, folder, place, arguments), daemon=True)
            for rank in range(world)
        ]
        try:
            for process in ranks:
                process.start()
            deadline, running = time.monotonic() + seconds, list(ranks)
            while running and time.monotonic() < deadline:
                multiprocessing.connection.wait([process.sentinel for process in running], timeout=1)
                failed = any(process.exitcode for process in ranks)
                running = [] if failed else [process for process in running if process.is_alive()]
        finally:
            for process in ranks:
                process.kill()
                process.join()
        failures = sorted(Path(folder).glob("*.txt"))
        assert not failures, failures[0].read_text()
        assert all(process.exitcode == 0 for process in ranks), [process.exitcode for process in ranks]


def _rank(rank, world, folder, place, arguments):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)  # as for every test
    try:
        limit = timedelta(seconds=TIMEOUT / 2)
        store = dist.FileStore(f"{folder}/store", world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=limit)
        specification = importlib.util.spec_from_file_location("on_ranks", place[0])
        module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
        getattr(module, place[1])(*arguments)
        dist.destroy_process_group()
    except BaseException:
        Path(f"{folder}/{rank}.txt").write_text(f"rank {rank}\n{traceback.format_exc()}")
        raise SystemExit(1) from None
