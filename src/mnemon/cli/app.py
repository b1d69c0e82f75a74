"""The `mnemon` command: its subcommands, and how faults become one line and an exit code.

Exit codes: 0 success; 2 a mistake of the user (usage, configuration, data, checkpoint); 1 the machine failed (disk
full, closed pipe, a fault of ours); 130 interrupted. A traceback appears with `--debug` only.
"""

import importlib.metadata
import os
import platform
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from mnemon import __version__
from mnemon.cli.bench import bench_app
from mnemon.cli.chat import chat
from mnemon.cli.compare import compare
from mnemon.cli.convert import convert
from mnemon.cli.data import data_app
from mnemon.cli.demo import demo
from mnemon.cli.eval import evaluate
from mnemon.cli.generate import generate
from mnemon.cli.inspect import inspect
from mnemon.cli.memorize import memorize
from mnemon.cli.reproduce import reproduce
from mnemon.cli.rules import rules
from mnemon.cli.train import train
from mnemon.errors import MnemonError, PeerError
from mnemon.files import is_disk_full

EXIT_FAILURE, EXIT_USER_ERROR, EXIT_INTERRUPTED = 1, 2, 130

app = typer.Typer(
    name="mnemon",
    help="Give language models a memory: make data, train, evaluate, remember and generate. Start with `mnemon demo`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo")(demo)
app.add_typer(data_app, name="data")
app.command("train")(train)
app.command("eval")(evaluate)
app.command("compare")(compare)
app.command("generate")(generate)
app.command("inspect")(inspect)
app.command("memorize")(memorize)
app.command("chat")(chat)
app.command("convert")(convert)
app.add_typer(bench_app, name="bench")
app.command("reproduce")(reproduce)
app.command("rules")(rules)


def _print_version(wanted: bool) -> None:
    """Print the versions that a bug report needs, without importing the packages."""
    if wanted:
        parts = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers")]
        print(f"mnemon {__version__} ({', '.join(parts)}, Python {platform.python_version()})")
        raise typer.Exit


@app.callback()
def _global_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error (anywhere on the line).")
    ] = False,
) -> None:
    """Declare the options that belong to every command; `main` acts on `--debug`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: the words after `mnemon`; None takes them from the process.

    Returns:
        The exit code.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        code = app(args=words, prog_name="mnemon", standalone_mode=False)
        sys.stdout.flush()
    except Exception as error:
        return _report(error, debug)
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    if code == EXIT_INTERRUPTED:
        print("mnemon: interrupted", file=sys.stderr)
    return code if isinstance(code, int) else 0


def leave(code: int) -> NoReturn:
    """End this process with an exit code.

    One of several processes ends without Python's own shutdown, in which a thread of torch's connections that still
    wants to call Python aborts the process (seen rarely: exit code -6, "terminate called without an active exception").
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os._exit(code)
    sys.exit(code)


def _report(error: Exception, debug: bool) -> int:
    """Print what a user needs to know about an error and return the exit code."""
    if isinstance(error, BrokenPipeError):
        # The reader (such as `head`) has enough; without this Python complains again while it shuts down.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILURE
    if isinstance(error, typer.TyperException):
        return _report_usage(error)
    if debug:
        traceback.print_exception(error)
    if isinstance(error, PeerError):
        return EXIT_USER_ERROR  # the process that failed says why
    if isinstance(error, MnemonError):
        _print_error(str(error))
        return EXIT_USER_ERROR
    if is_disk_full(error):
        _print_error("the disk is full; free some space and run again")
    else:
        _print_error(f"{type(error).__name__}: {error} (not your mistake: please report it with the output of --debug)")
    return EXIT_FAILURE


def _report_usage(error: typer.TyperException) -> int:
    """Print a mistake in the command line in one line, with the place to look."""
    message = error.format_message()
    if not message:  # nothing was asked for, and the help has been printed
        return EXIT_USER_ERROR
    context = getattr(error, "ctx", None)
    if context is not None:
        message = f"{message.rstrip('.')} (see `{context.command_path} --help`)"
    _print_error(message)
    return EXIT_USER_ERROR


def _print_error(message: str) -> None:
    print(f"mnemon: error: {' '.join(message.split())}", file=sys.stderr)
