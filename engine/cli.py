"""The command line. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import threading
from argparse import SUPPRESS
from collections.abc import Iterator, Sequence
from pathlib import Path

from fuserl.engine import catalogue, flags, lookup, wording
from fuserl.engine.config import Config
from fuserl.engine.flags import Parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `fuserl ARGUMENTS` and return the exit status: 2 for a wrong argument, 1 for a failure of the machine.

    Such errors are one line on standard error; FUSERL_DEBUG=1 lets them through with their traceback. A run that is
    stopped by Ctrl-C or SIGTERM ends as by an error, with 130 or 143.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with _stoppable():
            status = _COMMANDS[_command(arguments)][0](arguments[1:])
            sys.stdout.flush()
        return status
    except BrokenPipeError:  # whoever read the output, as `head` does, has seen enough
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt as stop:
        number = signal.SIGTERM if stop.args == (signal.SIGTERM,) else signal.SIGINT
        _complain(f"stopped by {'SIGTERM' if number == signal.SIGTERM else 'Ctrl-C'}.", stop)
        return 128 + number
    except (ValueError, RuntimeError, OSError, MemoryError) as error:
        if os.environ.get("FUSERL_DEBUG"):
            raise
        _complain(_words(error), error)
        if not isinstance(error, ValueError):
            print("fuserl: FUSERL_DEBUG=1 shows where", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    finally:
        _drop_unread()


def train(arguments: Sequence[str]) -> int:
    """Train: every setting and every option of the recipe is a flag, over a file of settings when one is given."""
    parser = train_parser(_recipe(arguments))
    values = flags.given(parser.known(arguments))
    folder, path = values.pop("resume", None), values.pop("config", None)
    if folder is not None:
        if path is not None or "out" in values:
            parser.error("--resume goes on with a run's own settings in its own folder; leave out --config and --out")
        path = Path(folder) / "config.json"
        if not path.is_file():
            parser.error(f"--resume must name a run's folder; {folder} has no config.json. `ls runs` shows yours")
    config = Config() if path is None else Config.read(path)
    if folder is not None and values.get("recipe", config.recipe) != config.recipe:
        given = values["recipe"]
        parser.error(f"--resume goes on with the run's own recipe, {config.recipe}; got {given}. Leave it out")
    if {"overlap", "rollout"} & values.keys():
        values.setdefault("importance", None)  # what a file says of it was chosen for who drew before
    config = config.replace(**values)
    _require_engine()
    from fuserl.engine import loop

    loop.train(config, resume=None if folder is None else Path(folder))
    return 0


def train_parser(recipe: str = Config.recipe) -> Parser:
    """The parser of `fuserl train RECIPE`, generated from the fields of Config and the recipe's signature."""
    usage = "fuserl train [RECIPE] [--flag value]..."
    parser = Parser(prog="fuserl train", usage=usage, description="Train a language model with a recipe.")
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", default=SUPPRESS)
    for name, metavar, doc in (
        ("config", "FILE", "settings as TOML or JSON (a run's config.json); flags win"),
        ("resume", "RUN", "the folder of a run to go on with, from its newest checkpoint"),
    ):
        parser.add_argument(f"--{name}", metavar=metavar, default=SUPPRESS, help=doc)
    parser.add_argument("--recipe", dest="recipe", default=SUPPRESS, help=SUPPRESS)
    flags.add_options(parser, recipe)
    flags.add_settings(parser, recipe)
    return parser


def evaluate(arguments: Sequence[str]) -> int:
    """Judge a run's newest checkpoint, or any model, on held-out problems."""
    parser = Parser(
        prog="fuserl eval", usage="fuserl eval RUN|MODEL [--flag value]...",
        description="Held-out accuracy, greedy, and pass@k with --eval-samples, of a run or of a model.",
    )  # fmt: skip
    parser.add_argument("target", metavar="RUN|MODEL", help="a run's folder, a model folder, or a hub name")
    flags.add_settings(parser)
    values = flags.given(parser.known(arguments))
    _require_engine()
    from fuserl.engine import trained

    return trained.evaluate(values.pop("target"), values)


def export(arguments: Sequence[str]) -> int:
    """Write a run's weights as an ordinary transformers folder."""
    parser = Parser(prog="fuserl export", description="Write a run's weights as a transformers folder, LoRA merged.")
    parser.add_argument("run", metavar="RUN", help="a run's folder")
    parser.add_argument("--out", required=True, metavar="DIR", help="a new folder")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16", help="of the weights"
    )
    given = parser.known(arguments)
    _require_engine()
    from fuserl.engine import trained

    return trained.export(given.run, given.out, given.dtype)


def listed(arguments: Sequence[str]) -> int:
    """Print the recipes: number, name, phrase."""
    _no_options("list", arguments)
    width = max(map(len, catalogue.RECIPES))
    for number, (name, phrase) in enumerate(catalogue.RECIPES.items(), 1):
        print(f"{number:>3}  {name:<{width}}  {phrase}")
    return 0


def check(arguments: Sequence[str]) -> int:
    """Print each figure of a recipe's check beside the expected one; return 1 when one falls outside."""
    parser = Parser(prog="fuserl check", description="Compare what a recipe must reduce to with what it does.")
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="one of `fuserl list`; all without")
    given = parser.known(arguments)
    status = 0
    for name in catalogue.RECIPES if given.recipe is None else [given.recipe]:
        figures = catalogue.show(name)
        print(name)
        for figure in figures:
            status = status if figure.holds else 1
            verdict = "ok " if figure.holds else "NO "
            print(f"  {verdict} {figure}")
    return status


def bench(arguments: Sequence[str]) -> int:
    """Run the benchmarks of the checkout in the current folder."""
    parser = Parser(prog="fuserl bench", description="Run the benchmarks of a checkout, correctness first.")
    parser.add_argument("only", nargs="?", help="run the cases whose name contains this")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes and one round: shows that every case runs")
    parser.add_argument("--save", action="store_true", help="append the rows to benchmarks/results")
    given = parser.known(arguments)
    lookup.package("rich", "engine")
    from fuserl.engine import bench as benchmarks

    return benchmarks.main(given.only, smoke=given.smoke, save=given.save)


def report(arguments: Sequence[str]) -> int:
    """Write a run's metrics, or several runs' in one, as a page and as a picture."""
    parser = Parser(prog="fuserl report", description="Write report.html and report.png into a run's folder.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs; several are drawn together")
    parser.add_argument("--out", metavar="FILE", help="the page; default report.html in the first run's folder")
    given = parser.known(arguments)
    _require_engine()
    from fuserl.engine import page

    print(page.write([Path(run) for run in given.runs], Path(given.out) if given.out else None))
    return 0


def doctor(arguments: Sequence[str]) -> int:
    """Print versions, machine, and which op runs in which backend."""
    _no_options("doctor", arguments)
    from fuserl.engine import doctor as report

    return report.main()


_COMMANDS = {
    "train": (train, "train a model: fuserl train grpo --steps 40"),
    "eval": (evaluate, "judge a run or a model on held-out problems"),
    "export": (export, "write a run's weights as a transformers folder"),
    "report": (report, "draw a run, or compare several, as a page"),
    "list": (listed, "name the recipes"),
    "check": (check, "compare a recipe with what it must reduce to"),
    "bench": (bench, "measure every op on this machine"),
    "doctor": (doctor, "say what runs here, and why the rest does not"),
}


def _command(arguments: list[str]) -> str:
    parser = Parser(prog="fuserl", usage="fuserl COMMAND ...", add_help=False)
    if arguments and arguments[0] in _COMMANDS:
        return arguments[0]
    lines = "\n".join(f"  {name:<8} {phrase}" for name, (_, phrase) in _COMMANDS.items())
    usage = f"usage: fuserl COMMAND ...\n\n{lines}\n\nfuserl COMMAND --help shows a command's flags.\n"
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        parser.exit(0 if arguments else 2, usage)
    if arguments[0] == "--version":
        import fuserl

        parser.exit(0, f"fuserl {fuserl.__version__}\n")
    parser.error(f"unknown command {arguments[0]!r}. {lookup.nearest(arguments[0], _COMMANDS)}")


def _recipe(arguments: Sequence[str]) -> str:
    """The recipe that a command line of `train` means: named in it, in the file of settings, or in the run resumed."""
    named = flags.recipe_of(arguments)
    if named is None:
        early = Parser(prog="fuserl train", add_help=False)
        for name in ("config", "resume"):
            early.add_argument(f"--{name}")
        files, _ = early.parse_known_args(arguments)
        path = files.config or (files.resume and Path(files.resume) / "config.json")
        named = Config.read(path).recipe if path and Path(path).is_file() else Config.recipe
    if named not in catalogue.RECIPES:
        Parser(prog="fuserl train").error(f"unknown recipe {named!r}. {lookup.nearest(named, catalogue.RECIPES)}")
    return named


def _no_options(command: str, arguments: Sequence[str]) -> None:
    Parser(prog=f"fuserl {command}", description=_COMMANDS[command][1]).known(arguments)


def _require_engine() -> None:
    """Refuse to start without a package that is certain to be needed later."""
    for name in ("transformers", "safetensors", "rich"):
        lookup.package(name, "engine")


def _words(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f" for {error.filename}" if error.filename else ""
        return f"the system must do what it is asked; it does not{where} ({error.strerror})."
    short = isinstance(error, MemoryError) or re.search("out of memory|allocate memory", str(error))
    advice = " Take smaller --groups, --group-size or --micro-tokens, or --checkpoint-activations." if short else ""
    return wording.sentence(f"memory ran out: {error}" if short else error) + advice


def _complain(words: str, error: BaseException) -> None:
    print(f"fuserl: {wording.sentence(' '.join([words, *getattr(error, '__notes__', ())]))}", file=sys.stderr)


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM, with which batch systems stop a job, as an interrupt; only a main thread can have it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt(signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _drop_unread() -> None:
    """Drop what nobody can read any more, about which Python would complain at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
