"""The command line: parses arguments, runs a command, turns a UserError into exit code 2."""

from __future__ import annotations

import _thread
import argparse
import atexit
import contextlib
import errno
import itertools
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from nemo_megacpp import __version__
from nemo_megacpp.commands import (
    checkpoint,
    compare,
    completion,
    data,
    demo,
    doctor,
    evaluate,
    gathers,
    generate,
    ladder,
    layouts,
    measure_machine,
    megatron_args,
    placement,
    plan,
    recipes,
    report,
    settings,
    train,
    verify,
)
from nemo_megacpp.errors import RankFailed, UserError, nearest
from nemo_megacpp.printable import screenful
from nemo_megacpp.runtime.imports import importing

COMMANDS = (
    *(train, demo, generate, evaluate, verify, gathers, ladder, recipes, plan, layouts, compare),
    *(
        data,
        checkpoint,
        megatron_args,
        settings,
        doctor,
        measure_machine,
        placement,
        report,
        completion,
    ),
)
"""In the order of the help."""

_STACK = ("torch", "megatron", "nemo", "nemo_run", "lightning", "einops")
"""Packages that a bare installation does not have."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a write, which names no file."""


class _Once(argparse.Action):
    """Stores an option's value; refuses a second one, which argparse's own action would take."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        given = vars(namespace).setdefault("given_options", {})
        if option_string is not None and self.dest in given:
            parser.error(f"{option_string} is given twice, {given[self.dest]!r} and {values!r}")
        given[self.dest] = values
        setattr(namespace, self.dest, values)


class _Parser(argparse.ArgumentParser):
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.register("action", None, _Once)

    def error(self, message: str) -> NoReturn:
        super().error(screenful(message))


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of ``nemo-megacpp``; building it loads neither torch nor NeMo."""
    parser: argparse.ArgumentParser = _Parser(
        prog="nemo-megacpp",
        description="Hybrid A/M/E/F/R language models for Megatron-Core and NeMo.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands)
    return parser


def read_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line; ``key=value`` settings may stand before, between or after options."""
    parser = build_parser()
    words = sys.argv[1:] if arguments is None else list(arguments)
    for before, word in itertools.pairwise(["", *words]):
        if not word.strip() or (word.startswith("--") and word.rstrip().endswith("=")):
            parser.error(f"{word.strip() or f'the argument after {before}'} is empty")
    _suggest_command(parser, words)
    args, rest = parser.parse_known_args(words)
    strange = [word for word in rest if word.startswith("-") or "=" not in word]
    if strange or (rest and not hasattr(args, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(strange or rest)}{_as_setting(strange)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def _suggest_command(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Exit with the nearest command where there is none of this name."""
    names = [command.__name__.rpartition(".")[2].replace("_", "-") for command in COMMANDS]
    first = next(iter(words), "-")
    if not first.startswith("-") and first not in names:
        known = ", ".join(names)
        parser.error(f"there is no command {first!r}.{nearest(first, names)} Commands: {known}")


def _as_setting(strange: Sequence[str]) -> str:
    """Return how to write a setting that was given as an option, such as ``--tp 2``."""
    from nemo_megacpp.recipes.names import full_name

    for word, following in itertools.pairwise([*strange, "--"]):
        name, _, value = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if word.startswith("--"):
            value = value or ("VALUE" if following.startswith("--") else following)
            with contextlib.suppress(UserError):
                full_name(name)
                return f". {name} is a setting: write {name}={value}"
    return ""


def _run(args: argparse.Namespace) -> int:
    """Run the command; as a rank of torchrun, whose summary names the root cause, record it."""
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        return args.run(args)
    from nemo_megacpp.runtime.rank_errors import record_failure

    return record_failure(args.run)(args)


def main() -> None:
    """Entry point of the console script."""
    args = read_arguments()
    warnings.simplefilter("ignore")  # libraries warn of what is not installed,
    if "ignore" not in sys.warnoptions:
        sys.warnoptions.append("ignore")  # in the processes started from here as well
    try:
        # Most of a short command is imports; a long one works in processes of its own.
        with _no_interrupt_lost(), importing():
            code = _run(args)
        sys.stdout.flush()
    except UserError as error:
        print(screenful(f"nemo-megacpp: {error}"), file=sys.stderr)
        code = 2
    except RankFailed as failure:
        print(screenful(str(failure)), file=sys.stderr)
        code = 2 if failure.user_error else 1
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in _STACK:
            raise
        print(screenful(f"nemo-megacpp: {error}; see nemo-megacpp doctor."), file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # the reader, such as head, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        code = 128 + signal.SIGPIPE
    except OSError as error:
        if error.filename is None and error.errno not in _FULL:
            raise
        where = "" if error.filename is None else f"{error.filename}: "
        print(screenful(f"nemo-megacpp: {where}{error.strerror}."), file=sys.stderr)
        code = 2
    # Runs first of all at the exit, which an interrupt then ends without a traceback.
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_DFL)
    sys.exit(code)


@contextlib.contextmanager
def _no_interrupt_lost() -> Iterator[None]:
    """Raise a KeyboardInterrupt again that arrived where Python can only print it, in a destructor
    for example: the command would go on."""

    def report(unraisable: Any) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            # By a thread, and a moment later: here it would be raised, and lost, once more.
            threading.Timer(0.05, _thread.interrupt_main).start()
        else:
            previous(unraisable)

    previous, sys.unraisablehook = sys.unraisablehook, report
    try:
        yield
    finally:
        sys.unraisablehook = previous


if __name__ == "__main__":
    main()
