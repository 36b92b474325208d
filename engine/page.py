"""One page about a run, or about several side by side: facts, panels, settings and completions, in one HTML file.

The file needs nothing else: no network, no script. It follows the reader's choice of a light or a dark face.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

from fuserl.engine import atomic, catalogue, figures, heat, metrics, panels, report
from fuserl.engine.config import settings
from fuserl.engine.heat import clean, legible
from fuserl.engine.models import DEFAULT

_SECTIONS = {
    "learning": "Learning", "policy": "Policy", "optimizer": "Optimizer", "machine": "Machine", "more": "More",
}  # fmt: skip
_LARGE = 2  # panels on top, larger than the rest
_DASHES = {"-": "solid", "--": "dashed", ":": "dotted", "-.": "dashed"}
_PARTS = {"config": dict, "reasons": dict, "versions": dict, "machine": dict, "resumed": list}  # of config.json


@dataclass(frozen=True)
class Record:
    """What a run's folder holds: what was set and on what it ran, its rows, and completions."""

    folder: Path
    described: dict
    rows: list[dict]
    samples: list[dict]

    @property
    def config(self) -> dict:
        """The settings by name."""
        return self.described.get("config", {})


def write(folders: list[Path], out: Path | None = None) -> Path:
    """Write the page about runs, and beside it all its panels as one picture (the same name in .png).

    Args:
        folders: the folders of the runs; they may still be going.
        out: the page's path; None is report.html in the first folder.

    Returns:
        The path of the page.

    Raises:
        ValueError: a folder holds no run, or one that has measured nothing yet; or `out` is no .html.
        RuntimeError: matplotlib is not installed, or the page cannot be written.
    """
    if not folders:
        raise ValueError("report: folders must name at least one run; got none. Write fuserl report runs/NAME.")
    records = [_record(Path(folder)) for folder in folders]
    out = Path(out) if out is not None else records[0].folder / "report.html"
    if out.suffix not in (".html", ".htm"):
        raise ValueError(f"report: out must end in .html; got {str(out)!r}. Its picture goes beside it, in .png.")
    runs = dict(zip(_names(records), [record.rows for record in records], strict=True))
    image = figures.png(figures.overview(runs, _title(records)), dots=110)
    try:
        atomic.write_bytes(out.with_suffix(".png"), image)
        atomic.write_text(out, page(records))
    except OSError as error:
        raise RuntimeError(f"report: {out} must be writable; it is not ({error.strerror}). Choose another.") from error
    return out


def page(records: list[Record]) -> str:
    """The HTML of the page about these runs."""
    names = _names(records)
    runs = dict(zip(names, [record.rows for record in records], strict=True))
    several = len(records) > 1
    body = [
        _comparison(records, names) if several else _head(records[0]),
        *_panels(runs),
        _differences(records, names) if several else _settings(records[0]),
        *([] if several else [heat.interference(records[0].rows), heat.completions(records[0].samples)]),
        f"<footer>Bold lines are centred means over about a fifth of the run. Intervals are 95 %: Wilson's for an "
        f"accuracy, Newcombe's for a rise. Written by fuserl on {clean(time.strftime('%d %B %Y, %H:%M'))}.</footer>",
    ]
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{clean(_title(records))}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _record(folder: Path) -> Record:
    told = {name: folder / name for name in ("config.json", "metrics.jsonl")}
    missing = [name for name, path in told.items() if not path.is_file()]
    if missing:
        raise ValueError(f"report: {folder} must be the folder of a run; it has no {missing[0]}. Name a run's folder.")
    try:
        described, rows = json.loads(told["config.json"].read_text(encoding="utf-8")), metrics.read(folder)
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"report: {folder} must hold a run that can be read; it does not ({error}).") from error
    if not rows:
        raise ValueError(f"report: {folder} must hold a run with metrics; it has none yet. Wait for its first step.")
    parts = described.items() if isinstance(described, dict) else ()
    whole = {name: value for name, value in parts if isinstance(value, _PARTS.get(name, object))}
    return Record(folder, whole, rows, _lines(folder / "samples.jsonl"))


def _lines(path: Path) -> list[dict]:
    """The rows of a JSONL file that may be missing or have a half line at its end."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            found.append(json.loads(line))
        except (ValueError, RecursionError):
            continue
    return [row for row in found if isinstance(row, dict)]


def _names(records: list[Record]) -> list[str]:
    """The folders' own names, or their whole paths where two are called alike."""
    folders = [record.folder.resolve() for record in records]
    alike = len({folder.name for folder in folders}) < len(folders)
    names = [legible(str(folder) if alike else folder.name) for folder in folders]
    return [name if name not in names[:at] else f"{name} ({at + 1})" for at, name in enumerate(names)]


def _title(records: list[Record]) -> str:
    if len(records) > 1:
        return f"{len(records)} runs compared"
    config = records[0].config
    return legible(f"{config.get('recipe', 'run')} · {_model(config)} · {_subject(config)}")


def _model(config: dict) -> str:
    return Path(str(config["model"])).name if config.get("model") else DEFAULT


def _subject(config: dict) -> str:
    return str(config.get("data") or config.get("task") or "")


def _head(record: Record) -> str:
    config = record.config
    done, planned = max(row["step"] for row in record.rows), config.get("steps")
    short = isinstance(planned, int) and done < planned
    resumed = [each for each in record.described.get("resumed", []) if isinstance(each, dict)]
    notices = [f"{done:g} of {planned} steps so far"] if short else []
    notices += [f"resumed at step {each.get('step')}, {_date(each.get('time'))}" for each in resumed]
    origin = "".join(f"<div><dt>{name}</dt><dd>{clean(value)}</dd></div>" for name, value in _origin(record).items())
    return (
        f'<header>\n<p class="over">fuserl · training report</p>\n'
        f"<h1>{clean(config.get('recipe', 'run'))} <span>on</span> {clean(_model(config))}</h1>\n"
        f'<p class="task"><code>{clean(_subject(config))}</code></p>\n<dl class="origin">{origin}</dl>\n'
        + (f'<p class="notice">{clean("; ".join(notices))}</p>\n' if notices else "")
        + f'<dl class="facts">{"".join(map(_fact, _merged(report.facts(record.rows))))}</dl>\n</header>'
    )


def _origin(record: Record) -> dict[str, str]:
    machine, versions = record.described.get("machine", {}), record.described.get("versions", {})
    gpus = machine.get("gpus")
    gpus = [str(gpu) for gpu in gpus] if isinstance(gpus, list) else []
    place = [f"{len(gpus)} x {gpus[0]}" if len(gpus) > 1 else gpus[0]] if gpus else []
    place += [str(machine["processor"])] if machine.get("processor") else []
    place += [
        f"{machine[name]:g} {unit}"
        for name, unit in (("cores", "cores"), ("memory_gb", "GB"))
        if isinstance(machine.get(name), int | float)
    ]
    told = {
        "date": _date(record.described.get("started")),
        "machine": ", ".join(place),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        "commit": record.described.get("commit") or "",
        "folder": str(record.folder),
    }
    return {name: value for name, value in told.items() if value}


def _date(stamp: object) -> str:
    try:
        return time.strftime("%d %B %Y, %H:%M", time.strptime(str(stamp)[:19], "%Y-%m-%dT%H:%M:%S")).lstrip("0")
    except ValueError:
        return str(stamp or "")


def _merged(facts: list[report.Fact]) -> list[report.Fact]:
    """Before and after as one fact, with an arrow."""
    named = {fact.name: fact for fact in facts}
    before, after = (named.get(f"held-out accuracy {when}") for when in ("before", "after"))
    if before is None or after is None:
        return facts
    intervals = [fact.detail.rpartition("95 %: ")[2].replace(" to ", "\u2013") for fact in (before, after)]
    detail = f"95 %: {intervals[0]} to {intervals[1]}; {after.detail.partition(';')[0]}" if all(intervals) else ""
    both = report.Fact("held-out accuracy", f"{before.value} to {after.value}", detail)
    return [both, *(fact for fact in facts if fact not in (before, after))]


def _fact(fact: report.Fact) -> str:
    value = clean(fact.value).replace(" to ", "<i>→</i>")
    detail = f'<dd class="detail">{clean(fact.detail)}</dd>' if fact.detail else ""
    return f'<div><dt>{clean(fact.name)}</dt><dd class="value">{value}</dd>{detail}</div>'


def _comparison(records: list[Record], names: list[str]) -> str:
    facts = [{fact.name: fact for fact in _merged(report.facts(record.rows))} for record in records]
    columns = list(dict.fromkeys(name for each in facts for name in each))
    keys = [(name, panels.SERIES[at % len(panels.SERIES)], "-") for at, name in enumerate(names)]
    lines = []
    for name, each in zip(names, facts, strict=True):
        cells = [
            f'<td class="number" data-label="{clean(column)}">{_fact_cell(each[column])}</td>'
            if column in each
            else "<td></td>"
            for column in columns
        ]
        lines.append(f"<tr><td><strong>{clean(name)}</strong></td>{''.join(cells)}</tr>")
    heads = "".join(f'<th class="number">{clean(column)}</th>' for column in columns)
    return (
        '<header>\n<p class="over">fuserl · training report</p>\n'
        f"<h1>{len(records)} runs <span>compared</span></h1>\n"
        f'<p class="task">{clean(", ".join(dict.fromkeys(_title([record]) for record in records)))}</p>'
        f"</header>\n{_keys(keys, 'runs')}\n<h2>Figures</h2>\n"
        f'<div class="scroll"><table class="stacked"><thead><tr><th>run</th>{heads}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _fact_cell(fact: report.Fact) -> str:
    value = clean(fact.value).replace(" to ", " → ")
    short = fact.detail.partition(";")[0] if "95 %" in fact.detail else ""
    return f"{value}<small>{clean(short)}</small>" if short else value


def _panels(runs: dict[str, list[dict]]) -> list[str]:
    prepared, parts, section = panels.prepared(runs), [], None
    for at, (panel, figure) in enumerate(figures.figures(runs, large=_LARGE)):
        if panel.section != section:
            parts += ["</div>"] if parts else []
            note = " <small>over steps</small>" if section is None else ""
            parts.append(f"<h2>{_SECTIONS[panel.section]}{note}</h2>")
            parts.append(f'<div class="grid{" large" if at < _LARGE else ""}">')
        elif at == _LARGE:
            parts += ["</div>", '<div class="grid">']
        section = panel.section
        note = f"<p>{clean(panel.note)}</p>" if panel.note else ""
        drawn = figures.svg(figure, panel.name).replace("<svg ", f'<svg aria-label="{clean(panel.title)}" ', 1)
        parts.append(
            f"<figure><figcaption><h3>{clean(panel.title)}</h3>{note}{_keys(panel.keys(prepared))}</figcaption>{drawn}</figure>"
        )
    return [*parts, "</div>"] if parts else []


def _keys(keys: list[tuple[str, str, str]], kind: str = "") -> str:
    lines = "".join(
        f'<li style="--colour: var(--{colour}); --dash: {_DASHES[dash]}">{clean(label)}</li>'
        for label, colour, dash in keys
    )
    return f'<ul class="keys {kind}">{lines}</ul>' if keys else ""


def _settings(record: Record) -> str:
    """Settings that were chosen, by the user or automatically with their reasons; the defaults under a fold."""
    reasons, usual = record.described.get("reasons", {}), _defaults(record.config.get("recipe"))
    lines = {"set": [], "automatic": [], "default": []}
    for name, value in record.config.items():
        plain = name not in usual or json.dumps(usual[name]) == json.dumps(value)
        kind = "automatic" if name in reasons else "default" if plain else "set"
        why = {
            "automatic": reasons.get(name),
            "default": "",
            "set": f"default {_value(usual.get(name))}" if usual.get(name) is not None else "",
        }[kind]
        lines[kind].append(
            f'<tr class="{kind}"><td><code>{clean(name)}</code></td><td><code>{clean(_value(value))}</code></td>'
            f'<td class="why">{clean(why)}</td></tr>'
        )
    if not record.config:
        return ""
    chosen, plain = "".join(lines["set"] + lines["automatic"]), "".join(lines["default"])
    head = "<thead><tr><th>setting</th><th>value</th><th>default, or why it was chosen</th></tr></thead>"
    folded = (
        f'<details class="more"><summary>{len(lines["default"])} more at their defaults</summary>'
        f'<div class="scroll"><table>{head}<tbody>{plain}</tbody></table></div></details>'
    )
    return (
        "<h2>Settings <small>marked: other than the default</small></h2>\n"
        f'<div class="scroll"><table>{head}<tbody>{chosen}</tbody></table></div>\n{folded if plain else ""}'
    )


def _differences(records: list[Record], names: list[str]) -> str:
    """The settings in which the runs differ."""
    known = list(dict.fromkeys(name for record in records for name in record.config if name != "out"))
    rows = {name: [_value(record.config.get(name)) for record in records] for name in known}
    differing = {name: values for name, values in rows.items() if len(set(values)) > 1}
    if not differing:
        return "<h2>Settings</h2>\n<p>The same in every run.</p>"
    heads = "".join(f"<th>{clean(name)}</th>" for name in names)
    lines = "".join(
        f"<tr><td><code>{clean(name)}</code></td>"
        + "".join(f"<td><code>{clean(value)}</code></td>" for value in values)
        + "</tr>"
        for name, values in differing.items()
    )
    return (
        "<h2>Settings <small>in which the runs differ</small></h2>\n"
        f'<div class="scroll"><table><thead><tr><th>setting</th>{heads}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )


def _defaults(recipe: object) -> dict[str, object]:
    usual = {setting.name: setting.default for setting in settings()}
    known = isinstance(recipe, str) and recipe in catalogue.RECIPES
    options = catalogue.options(recipe).values() if known else ()
    usual |= {option.name: option.default for option in options}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in usual.items()}


def _value(value: object) -> str:
    return value if isinstance(value, str) and value.strip() == value != "" else json.dumps(value, ensure_ascii=False)
