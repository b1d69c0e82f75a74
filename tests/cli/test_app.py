"""Faults become one line on standard error and the right exit code; help and version answer without work."""

import errno
import os
import subprocess
import sys

import pytest
import typer

from mnemon import __version__
from mnemon.cli import app as app_module
from mnemon.cli.app import main
from mnemon.errors import ConfigError, RunError


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Put one command into the command line that raises an error."""

    def broken() -> None:
        raise error

    replacement = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    replacement.command("broken")(broken)
    replacement.command("other")(lambda: None)
    monkeypatch.setattr(app_module, "app", replacement)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ConfigError("expected a,\n  got b"), 2, "mnemon: error: expected a, got b\n"),
        (RunError("loss is nan"), 2, "mnemon: error: loss is nan\n"),
        (OSError(errno.ENOSPC, "No space left"), 1, "mnemon: error: the disk is full; free some space and run again\n"),
        (KeyboardInterrupt(), 130, "mnemon: interrupted\n"),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    message: str,
) -> None:
    fail_with(monkeypatch, error)
    assert main(["broken"]) == code
    captured = capsys.readouterr()
    assert captured.err == message
    assert captured.out == ""


def test_a_fault_of_ours_is_reported_as_such(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_with(monkeypatch, ZeroDivisionError("division by zero"))
    assert main(["broken"]) == 1
    assert "please report" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["broken", "--debug"], ["--debug", "broken"]])
def test_debug_shows_the_traceback_wherever_it_stands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    fail_with(monkeypatch, ConfigError("expected a, got b"))
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert error.endswith("mnemon: error: expected a, got b\n")


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["trian"], "Did you mean 'train'"),
        (["train"], "Missing argument"),
        (["generate", "model", "--promt", "x"], "--prompt"),
        (["generate", "model", "--max-new-tokens", "many"], "max-new-tokens"),
        (["data", "bable"], "see `mnemon data --help`"),
    ],
)
def test_a_usage_error_is_one_line_that_helps(capsys: pytest.CaptureFixture[str], words: list[str], hint: str) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert hint in error
    assert error.count("\n") == 1


def test_the_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(command in text for command in ("demo", "data", "train", "eval", "generate"))


@pytest.mark.parametrize("words", [["demo"], ["data", "babi"], ["data", "babilong"], ["train"], ["eval"], ["generate"]])
def test_every_command_explains_itself(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert main([*words, "--help"]) == 0
    assert f"mnemon {' '.join(words)}" in capsys.readouterr().out


def test_no_command_at_all_shows_the_help_and_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "Usage" in capsys.readouterr().out


def test_the_version_names_what_a_bug_report_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in (f"mnemon {__version__}", "torch", "transformers", "Python"))


def test_a_reader_that_stops_reading_is_no_error() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "mnemon", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ
    )
    assert process.stdout is not None
    process.stdout.close()
    _, error = process.communicate(timeout=60)
    assert b"Traceback" not in error
    assert b"Exception" not in error
