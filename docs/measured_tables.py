"""Tables of what was measured, from the rows in benchmarks/results; no figure in them is typed."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from docstrings import slug, table

from fuserl.engine import catalogue

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
# Student's t of 95 % by the number of runs
_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
_PROVIDERS = {
    ("cpu", "cpu"): "fuserl, C++", ("cuda", "cuda"): "fuserl, CUDA C++", ("triton", "cuda"): "fuserl, Triton",
    ("triton", "cpu"): "fuserl, Triton (interpreter)", ("reference", "cpu"): "fuserl, torch reference",
    ("torch", "cpu"): "torch eager in the dtype",
}  # fmt: skip
# By the beginning of a case: the host, what of it is replaced, and by what.
_HOSTS = {
    "test_trl_step": ("trl", "GRPOTrainer's update", "linear_logprob"),
    "test_verl_gae": ("verl", "compute_gae_advantage_return", "gae"),
    "test_verl_advantages": ("verl", "advantage estimators", "group_advantage"),
    "test_verl_head": ("verl", "FusedLinearForPPO", "linear_logprob"),
    "test_verl_logprobs": ("verl", "logprobs_from_logits", "token_logprob"),
    "test_verl_policy_loss": ("verl", "policy losses", "policy_loss"),
    "test_openrlhf_gae": ("openrlhf", "get_advantages_and_returns", "gae"),
    "test_openrlhf_policy_loss": ("openrlhf", "PolicyLoss", "policy_loss"),
    "test_openrlhf_actor": ("openrlhf", "Actor.forward", "linear_logprob"),
    "test_liger_grpo": ("liger-kernel", "LigerFusedLinearGRPOLoss", "linear_policy_loss"),
    "test_liger_dpo": ("liger-kernel", "LigerFusedLinearDPOLoss", "linear_policy_loss"),
    "test_liger_jsd": ("liger-kernel", "LigerFusedLinearJSDLoss", "linear_policy_loss"),
    "test_transformers_loss": ("transformers", "head and loss", "linear_policy_loss"),
}
_BENCHMARKS = """\
# Benchmarks

`fuserl bench` takes these figures: correctness is checked before anything is timed, all providers of a case run in turn
in one process, and "times the floor" is the median of the ratios within the run to the first provider. Spread is the
interquartile range; peak memory is above the inputs. `make bench ARGS=--save` appends new rows; the newest count."""
_CHECKS = """\
# Checks

`fuserl check RECIPE` compares what a recipe must reduce to, and what its paper claims where that can be enumerated,
with what it does: each figure was made by the recipe's own advantage and loss. `python benchmarks/checks.py` takes the
rows below anew; a figure that does not hold says so here, and its cause stands in the recipe's docstring."""
_NUMERICS = """\
# Numerics

How far each op is from float64 of the same inputs, which are rounded to the dtype under test first. A cell has the
largest absolute error, and the largest over rows of the error's norm as a share of the row's norm. For outputs of one
number per token that is one row, each statistic is a row, and of a gradient's rows those below a thousandth of the
largest are left out of the second figure: in 16 bits they vanish. fuserl's results are float32 whatever the inputs'
dtype; gradients come in the dtype of what they belong to, whose rounding is most of their error. "torch eager in the
dtype" is what a trainer writes without fuserl. `python benchmarks/numerics.py` takes the rows anew."""
_PROMISES = """\
## What repeats, and what does not depend on neighbours

The tests compare bits: of the outputs of `token_logprob` for a row alone and among others (C++; Triton in its
interpreter), of `policy_loss` for a token alone and among others, over ten runs and one to three threads (C++; Triton
in its interpreter), of ten runs of one `linear_policy_loss` call (C++), of a rollout generated alone and among others
(CPU), and of the metrics of a run repeated with its seed, or killed and resumed (CPU). They compare up to rounding only
where `linear_policy_loss` runs with other chunks or without its dead rows: its matrix products then add in another
order."""
_PARITY = """\
Error: the largest |with - expected| / |expected|, norms of a whole output or gradient. Expected is float64 of the same
inputs for verl's functions and OpenRLHF's advantages and losses, and for the rest the host's own result."""
_CUT = "Triton's interpreter cuts float32 to bfloat16 where torch rounds: its gradients err by twice as much."


def learning() -> str:
    """The newest run of every seed of the default job, and their mean rise with its interval."""
    paths = sorted((RESULTS / "learning").glob("*.jsonl"))
    newest = _newest(paths, "recipe", "task", "processor", "seed")
    if not newest:
        return "No runs yet."
    headings = ["recipe, task", "seed", "greedy accuracy before", "after", "rise", "minutes", "peak GB"]
    rows = [
        [
            f"{row['recipe']}, `{row['task']}`", row["seed"], f"{row['before']:.3f}", f"{row['after']:.3f}",
            f"{row['after'] - row['before']:+.3f}", f"{row['seconds'] / 60:.1f}", f"{row['peak_gb']:.1f}",
        ]
        for row in newest
    ]  # fmt: skip
    rises, row = [r["after"] - r["before"] for r in newest], newest[0]
    mean, spread = statistics.mean(rises), statistics.stdev(rises) if len(rises) > 1 else math.nan
    half = _T.get(len(rises), math.nan) * spread / len(rises) ** 0.5
    return "\n".join([
        table(headings, rows), "",
        f"Mean rise over {len(rises)} seeds {mean:+.3f} (95 % interval {mean - half:+.3f} to {mean + half:+.3f}),",
        f"on {row['problems']} held-out problems; {row['cores']} cores of {row['processor']}, torch {row['torch']},",
        f"commit {row['commit']}.",
    ])  # fmt: skip


def baselines() -> str:
    """What every baseline learns of one toy problem in the same number of steps, and what TRL's trainer of it does."""
    newest = _newest([RESULTS / "baselines.jsonl"], "recipe", "provider")
    ours = {row["recipe"]: row for row in newest if row["provider"] == "fuserl"}
    theirs = {row["recipe"]: row for row in newest if row["provider"] != "fuserl"}
    if not ours:
        return "Not measured yet: `python benchmarks/baselines.py` takes the rows."
    ordered = [ours[name] for name in catalogue.RECIPES if name in ours]
    rows = [
        [
            f"[`{row['recipe']}`](docs/settings.md#{slug(row['recipe'])})", f"{statistics.mean(row['before']):.3f}",
            *_learned(row), *(_learned(theirs[row["recipe"]]) if row["recipe"] in theirs else ("no trainer", "")),
        ]
        for row in ordered
    ]  # fmt: skip
    facts = dict.fromkeys(_facts(row, "device") for row in ordered)
    rival = next((row["provider"] for row in theirs.values()), "TRL").replace("trl", "TRL")
    heads = ["recipe", "before", "fuserl", "each seed", rival, "each seed"]
    return f"{table(heads, rows)}\n\n{ordered[0]['steps']} steps. {'; '.join(facts)}."


def speed() -> str:
    """Tokens a second and the time split of every recipe, by device and model, with the picture of the last rows."""
    path = RESULTS / "recipes_speed.jsonl"
    ordered = sorted(_rows([path]), key=lambda row: not row.get("once"))
    newest = {(row["device"], row["model"], row["recipe"]): row for row in ordered}
    once = _updates_once(path)
    if not newest:
        return "Not measured yet: `python benchmarks/recipes_speed.py --save` takes the rows."
    order, phases = list(catalogue.RECIPES), ("generate", "reward", "score", "update", "other")
    rows = []
    for key, row in sorted(newest.items(), key=lambda each: (*each[0][:2], order.index(each[0][2]))):
        paces = [
            f"{row[f'{phase}_tokens_per_s']:,.0f} ({row[f'{phase}_share']:.0%})" if f"{phase}_share" in row else ""
            for phase in ("generate", "update")
        ]
        split = " / ".join(f"{row[f'{phase}_s'] / row['seconds']:.0%}" for phase in phases)
        work = f"{row['groups']} x {row['group_size']} x {row['max_new_tokens']}"
        memory = f"{row.get('gpu_gb', row.get('host_gb', 0.0)):.1f}"
        step = f"{row['seconds']:.3g}{' (one update)' if row.get('once') else ''}"
        rows.append([
            row["recipe"], row["model"], row["device"], work, *paces, step, split, once.get(key, ""), memory,
            row["commit"],
        ])  # fmt: skip
    heads = [
        "recipe", "model", "on", "prompts x completions x tokens", "generated tokens/s (of the machine's best)",
        "updated tokens/s", "seconds a step", " / ".join(phases), "one update, of grpo's", "peak GB", "commit",
    ]  # fmt: skip
    image = path.with_suffix(".png")
    drawn = f"\n\n![seconds of a step by phase](benchmarks/results/{image.name})" if image.is_file() else ""
    return table(heads, rows) + drawn


def _updates_once(path: Path) -> dict[tuple[str, ...], str]:
    """How long one optimizer step on a whole batch takes in the newest rows of it, over the median of grpo's."""
    rows, found = [row for row in _rows([path]) if row.get("once") and row.get("update_tokens_per_s")], {}
    for row in rows:
        alike = [each for each in rows if all(each[name] == row[name] for name in ("device", "model", "commit"))]
        plain = [each["update_s"] for each in alike if each["recipe"] == "grpo"]
        if plain:
            found[row["device"], row["model"], row["recipe"]] = f"{row['update_s'] / statistics.median(plain):.2f}"
    return found


def endtoend() -> str:
    """A whole step here and in TRL's trainer, by case: seconds, peak memory, and by how much ours is quicker."""
    newest = _newest([RESULTS / "endtoend.jsonl"], "device", "work", "side")
    cases: dict[tuple, dict] = {}
    for row in newest:
        cases.setdefault((row["device"], row["work"]), {})[row["side"]] = row
    rows = [
        [
            case, *(f"{side[name]['median_s']:.2f} ({side[name]['iqr_s']:.2f})" for name in ("fuserl", "trl")),
            f"{side['fuserl']['times_faster']:.1f}",
            f"{side['fuserl']['generate_s']:.2f} / {side['fuserl']['update_s']:.2f}",
            *(f"{side[name]['peak_gb']:.1f}" for name in ("fuserl", "trl")), side["fuserl"]["commit"],
        ]
        for (_, case), side in cases.items()
        if side.keys() == {"fuserl", "trl"}
    ]  # fmt: skip
    if not rows:
        return "Not measured yet: `python benchmarks/endtoend_trl.py --save` takes the rows."
    heads = [
        "case", "fuserl, s (spread)", "TRL", "times faster", "of ours, generation / update", "peak GB", "TRL's",
        "commit",
    ]  # fmt: skip
    facts = dict.fromkeys(f"{row['device']}, torch {row['torch']}, TRL {row['trl']}" for row in newest)
    return f"{table(heads, rows)}\n\n{'; '.join(facts)}."


def checks() -> dict[str, dict]:
    """The newest row of every recipe's check."""
    newest = {row["recipe"]: row for row in _newest([RESULTS / "checks.jsonl"], "recipe")}
    return {name: newest[name] for name in catalogue.RECIPES if name in newest}


def checks_page() -> str:
    """Every figure of every recipe's check, beside what was expected."""
    body = [_CHECKS]
    for name, row in checks().items():
        figures = [f"- {'' if figure['holds'] else '**does not hold:** '}{figure['what']}" for figure in row["figures"]]
        body += [f"## {name}", "\n".join(figures), f"{_facts(row, 'device')}; {row['seconds']:g} s."]
    return "\n\n".join(body) + "\n"


def objectives() -> str:
    """Every system whose idea is the objective on one toy problem, beside GRPO, with the picture."""
    path = RESULTS / "objectives.jsonl"
    found = {row["recipe"]: row for row in _newest([path], "recipe")}
    ordered = [found[name] for name in catalogue.RECIPES if name in found]
    if not ordered:
        return "Not measured yet: `python benchmarks/objectives.py --save` takes the rows."
    names = ("pass@1", "pass@16", "entropy", "steps")
    rows = [
        [f"[`{row['recipe']}`](docs/settings.md#{slug(row['recipe'])})", *(_over_seeds(row[name]) for name in names)]
        for row in ordered
    ]
    heads = ["recipe", "pass@1", "pass@16", "entropy at the end, nats", "steps to 0.8 of its own reward"]
    facts = dict.fromkeys(_facts(row, "device") for row in ordered)
    image = f"![pass@1 and pass@16 of every recipe](benchmarks/results/{path.with_suffix('.png').name})"
    counted = f"{ordered[0]['training_steps']} steps, {len(ordered[0]['pass@1'])} seeds."
    apart = (
        "`advantage_alignment` is not here: it learns games of two agents. Its "
        "[check](docs/checks.md#advantage_alignment) has what it earns of itself and of one who always defects."
    )
    return f"{table(heads, rows)}\n\n{counted} {'; '.join(facts)}.\n\n{apart}\n\n{image}"


def _over_seeds(values: list[float]) -> str:
    """The mean and its standard error; how many seeds never came there."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return "never" if values else ""
    error = f" ± {statistics.stdev(known) / len(known) ** 0.5:.2g}" if len(known) > 1 else ""
    missing = f" ({len(values) - len(known)} never)" if len(known) < len(values) else ""
    return f"{statistics.mean(known):.3g}{error}{missing}"


def curve() -> str:
    """The reward of GRPO as it trains, here and in TRL's trainer, over seeds, with the picture of both."""
    path = RESULTS / "learning_trl.jsonl"
    newest = _newest([path], "device", "steps", "rival")
    if not newest:
        return "Not measured yet: `python benchmarks/learning_trl.py --save` takes the row."
    rows = [
        [
            row["rival"].replace("trl", "TRL"), str(row["seeds"]), f"{row['reward']:.3f}", f"{row['rival_reward']:.3f}",
            f"{row['difference']:+.3f}", f"{row['standard_error']:.3f}", _facts(row, "device"),
        ]
        for row in newest
    ]  # fmt: skip
    heads = ["rival", "seeds", "fuserl", "rival", "difference", "its standard error", "on"]
    return f"{table(heads, rows)}\n\n![mean reward by step](benchmarks/results/{path.with_suffix('.png').name})"


def _learned(row: dict) -> tuple[str, str]:
    return f"{statistics.mean(row['after']):.3f}", " ".join(f"{each:.2f}" for each in row["after"])


def trainers() -> str:
    """A line for each thing that a drop-in replaces in its host: time and peak memory without it and with it."""
    rows = []
    for (device, case), found in _cases().items():
        name, _, sizes = case.partition("[")
        if name not in _HOSTS:
            continue
        host, replaced, op = _HOSTS[name]
        timed = [row for row in found if not row["reason"]]
        before = next((row for row in timed if row["provider"] == host), None)
        for after in timed if before else []:
            if not after["provider"].startswith("fuserl"):
                continue
            what = ", ".join(
                x for x in (sizes.rstrip("]"), after["provider"].removeprefix("fuserl, ")) if x != "fuserl"
            )
            times = [_time(row["median_s"]) for row in (before, after)]
            peaks = [row["peak_mb"] for row in (before, after)]
            less = f"{peaks[0] / peaks[1]:.1f}" if None not in peaks and min(peaks) >= 1 else ""
            peaks = ["" if peak is None else f"{peak:.0f}" for peak in peaks]
            ratio, error = f"{before['median_s'] / after['median_s']:.2f}", _share(after.get("error"))
            rows.append([host, replaced, what.strip(", "), f"`{op}`", device, error, *times, ratio, *peaks, less])
    headings = [
        "host", "in place of its", "case", "by", "on", "error", "without", "with", "times faster", "peak MB without",
        "with", "times less",
    ]  # fmt: skip
    return f"{table(headings, rows)}\n\n{_PARITY}" if rows else "No rows yet: `make bench ARGS=--save` takes them."


def benchmarks() -> str:
    """One line a case and device: fuserl, what it is held against, and by how much the rest is slower."""
    rows = []
    for (device, case), found in _cases().items():
        ours = next((row for row in found if row["provider"] == "fuserl" and not row["reason"]), None)
        if ours is None or case.partition("[")[0] in _HOSTS:
            continue
        floor, rest = found[0]["provider"], [row for row in found[1:] if not row["provider"].startswith("fuserl")]
        beside = [f"{row['provider']} {row['median_s'] / ours['median_s']:.1f}" for row in rest if not row["reason"]]
        time, times = _time(ours["median_s"]), f"{ours['ratio']:.2f}"
        rows.append([case.removeprefix("test_"), device, time, times, floor, "; ".join(beside)])
    headings = ["case", "on", "fuserl", "times the floor", "which is", "the others, times fuserl"]
    return table(headings, rows) if rows else "No rows yet: `make bench ARGS=--save` takes them."


def benchmarks_page() -> str:
    """The newest row of every provider of every case, by device."""
    body, devices = [_BENCHMARKS], {}
    for (device, _), found in _cases().items():
        devices.setdefault(device, []).extend(found)
    headings = ["case", "provider", "median", "spread", "times the floor", "peak MB", "commit"]
    for device, rows in devices.items():
        body += [f"## {device}", table(headings, [_benchmark(row) for row in rows])]
    return "\n\n".join(body) + "\n"


def numerics_page() -> str:
    """Errors of every op by output, dtype and inputs, in every backend that was measured."""
    newest = _newest([RESULTS / "numerics.jsonl"], "op", "inputs", "dtype", "output", "backend", "device")
    body = [_NUMERICS, _PROMISES]
    for op in dict.fromkeys(row["op"] for row in newest):
        body += [f"## {op}", *_errors([row for row in newest if row["op"] == op])]
    facts = dict.fromkeys(_facts(row, "machine") for row in newest)
    return "\n\n".join([*body, f"Measured on: {'; '.join(facts)}."]) + "\n"


def _errors(rows: list[dict]) -> Iterator[str]:
    """What the inputs are, and a table."""
    kinds = dict.fromkeys((row["inputs"], row["described"]) for row in rows)
    yield "Inputs: " + "; ".join(f"*{name}*: {what}" for name, what in kinds) + "."
    providers = [each for each in _PROVIDERS if any((row["backend"], row["device"]) == each for row in rows)]
    keys = sorted(
        {(row["output"], row["dtype"], row["inputs"]) for row in rows},
        key=lambda key: _first(rows, "output", key[0]) + _first(rows, "dtype", key[1]) + _first(rows, "inputs", key[2]),
    )
    cells = {(row["output"], row["dtype"], row["inputs"], row["backend"], row["device"]): _error(row) for row in rows}
    lines = [[*key, *(cells.get((*key, *provider), "") for provider in providers)] for key in keys]
    yield table(["output", "dtype", "inputs", *(_PROVIDERS[each] for each in providers)], lines)
    gradients = [row for row in rows if row["output"] == "dlogits" and row["dtype"] == "bfloat16"]
    if any((row["backend"], row["device"]) == ("triton", "cpu") for row in gradients):
        yield _CUT
    near = [row for row in rows if row["output"] == "mean_logprob" and row["inputs"] == "large"]
    worst = max((row["absolute"] for row in near if row["backend"] == "cpu" and row["dtype"] == "float32"), default=0)
    if worst:
        yield (
            "`mean_logprob`, the mean over the vocabulary, is the difference of two numbers of the logits' size: where "
            f"all logits are near 1e4 float32 leaves it {worst:.0e} off."
        )


def _first(rows: list[dict], name: str, value: str) -> tuple[int]:
    """Where a value stands in the order of the rows."""
    return (next(at for at, row in enumerate(rows) if row[name] == value),)


def _error(row: dict) -> str:
    return " / ".join("not finite" if row[name] is None else f"{row[name]:.1e}" for name in ("absolute", "relative"))


def _cases() -> dict[tuple[str, str], list[dict]]:
    """Rows of benchmarks by device and case, in the order in which providers ran."""
    rows = _newest(sorted(RESULTS.glob("*.jsonl")), "device", "case", "provider", only=lambda row: "case" in row)
    cases: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        cases.setdefault((row["device"], row["case"]), []).append(row)
    return cases


def _benchmark(row: dict) -> list[str]:
    if row["reason"]:
        return [row["case"], row["provider"], f"not timed: {row['reason']}", "", "", "", row["commit"]]
    peak = "" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}"
    if peak and row.get("returned_mb", 0) >= 0.5:
        peak += f", {row['returned_mb']:.0f} of it returned"
    times = _time(row["median_s"]), _time(row["iqr_s"]), f"{row['ratio']:.2f}"
    return [row["case"], row["provider"], *times, peak, row["commit"]]


def _newest(paths: Iterable[Path], *keys: str, only: Callable[[dict], bool] = bool) -> list[dict]:
    """The last row of each key, in the order in which keys came first."""
    return list({tuple(row[key] for key in keys): row for row in _rows(paths) if only(row)}.values())


def _rows(paths: Iterable[Path]) -> Iterator[dict]:
    return (json.loads(line) for path in paths if path.is_file() for line in path.read_text().splitlines())


def _facts(row: dict, device: str) -> str:
    return (
        f"{row[device]}, Python {row['python']}, torch {row['torch']}, triton {row['triton']}, commit {row['commit']}"
    )


def _share(value: float | None) -> str:
    """As 3e-7; nothing where it was not measured."""
    if not value:
        return "" if value is None else "0"
    digit, exponent = f"{value:.0e}".split("e")
    return f"{digit}e{int(exponent)}"


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"
