"""The command line: train, list, bench, doctor. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from fuserl.engine import catalogue, lookup
from fuserl.engine.config import Config, contract, kind, settings


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors name the nearest flag or command, on one line."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str):
        """Print one line and leave with status 2."""
        self.exit(2, f"{self.prog}: {message}\n")

    def refuse(self, leftover: Sequence[str]) -> None:
        """Leave with status 2 and the nearest known flag when arguments are left over."""
        if not leftover:
            return
        wrong = next((word for word in leftover if word.startswith("-")), leftover[0])
        flag = wrong.partition("=")[0]
        known = sorted(option for option in self._option_string_actions if option.startswith("--"))
        self.error(f"unknown argument {flag!r}. {lookup.nearest(flag, known)}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `fuserl ARGUMENTS` and return the exit status: 2 for a wrong argument, 1 for a failure of the machine.

    Such errors are one line on standard error; FUSERL_DEBUG=1 lets them through with their traceback.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _COMMANDS[_command(arguments)][0](arguments[1:])
    except (ValueError, RuntimeError) as error:
        if os.environ.get("FUSERL_DEBUG"):
            raise
        print(f"fuserl: {error}", file=sys.stderr)
        if isinstance(error, RuntimeError):
            print("fuserl: FUSERL_DEBUG=1 shows where", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    except KeyboardInterrupt:
        return 130


def train(arguments: Sequence[str]) -> int:
    """Train: every setting of Config is a flag, over a file of settings when one is given."""
    parser = train_parser()
    given, leftover = parser.parse_known_args([_dashed(word) for word in arguments])
    parser.refuse(leftover)
    flags = vars(given)
    path = flags.pop("config", None)
    base = Config.read(path) if path else Config()
    config = base.replace(**{name: _unescaped(value) for name, value in flags.items()})
    if config.recipe not in catalogue.RECIPES:
        parser.error(f"unknown recipe {config.recipe!r}. {lookup.nearest(config.recipe, catalogue.RECIPES)}")
    from fuserl.engine import loop

    loop.train(config)
    return 0


def train_parser() -> Parser:
    """The parser of `fuserl train`, generated from the fields of Config."""
    usage = "fuserl train [RECIPE] [--flag value]..."
    parser = Parser(prog="fuserl train", usage=usage, description="Train a language model with a recipe.")
    parser.add_argument(
        "--config", metavar="FILE", default=argparse.SUPPRESS, help="settings as JSON (a run's config.json); flags win"
    )
    sections = {}
    for setting in settings():
        section = setting.metadata["section"]
        if section not in sections:
            sections[section] = parser.add_argument_group(section)
        _add(sections[section], setting)
    return parser


def listed(arguments: Sequence[str]) -> int:
    """Print the recipes: number, name, phrase."""
    _no_options("list", arguments)
    width = max(map(len, catalogue.RECIPES))
    for number, (name, phrase) in enumerate(catalogue.RECIPES.items(), 1):
        print(f"{number:>3}  {name:<{width}}  {phrase}")
    return 0


def bench(arguments: Sequence[str]) -> int:
    """Run the benchmarks of the checkout in the current folder."""
    parser = Parser(prog="fuserl bench", description="Run the benchmarks of a checkout, correctness first.")
    parser.add_argument("only", nargs="?", help="run the cases whose name contains this")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes and one round: shows that every case runs")
    parser.add_argument("--save", action="store_true", help="append the rows to benchmarks/results")
    given, leftover = parser.parse_known_args(arguments)
    parser.refuse(leftover)
    from fuserl.engine import bench as benchmarks

    return benchmarks.main(given.only, smoke=given.smoke, save=given.save)


def doctor(arguments: Sequence[str]) -> int:
    """Print versions, machine, and which op runs in which backend."""
    _no_options("doctor", arguments)
    from fuserl.engine import doctor as report

    return report.main()


_COMMANDS = {
    "train": (train, "train a model: fuserl train grpo --steps 40"),
    "list": (listed, "name the recipes"),
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


def _add(group, setting) -> None:
    wanted, _ = kind(setting.name)
    doc, flag = setting.metadata["doc"], f"--{setting.name.replace('_', '-')}"
    if setting.default is not None:
        doc += f" (default {setting.default})"
    elif "default" not in doc:
        doc += " (default: chosen for the machine and the task)"
    options = {"default": argparse.SUPPRESS, "help": doc.replace("%", "%%")}
    if setting.name == "recipe":
        group.add_argument("recipe", nargs="?", metavar="RECIPE", **options)
    elif wanted is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, dest=setting.name, **options)
    elif wanted is tuple:
        group.add_argument(flag, nargs="*", metavar="TEXT", dest=setting.name, **options)
    else:
        metavar = {int: "N", float: "X"}.get(wanted, "TEXT")
        group.add_argument(flag, type=_reader(setting, wanted), metavar=metavar, dest=setting.name, **options)


def _dashed(word: str) -> str:
    """--group_size for --group-size, which means the same."""
    flag, equals, value = word.partition("=")
    return f"{flag.replace('_', '-')}{equals}{value}" if flag.startswith("--") else word


def _reader(setting, wanted: type):
    def read(text: str):
        try:
            return wanted(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be {contract(setting)}; got {text!r}") from None

    return read


def _unescaped(value: object) -> object:
    return tuple(text.replace("\\n", "\n") for text in value) if isinstance(value, list) else value


def _no_options(command: str, arguments: Sequence[str]) -> None:
    parser = Parser(prog=f"fuserl {command}", description=_COMMANDS[command][1])
    parser.refuse(parser.parse_known_args(arguments)[1])


if __name__ == "__main__":
    sys.exit(main())
