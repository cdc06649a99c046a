"""The command line: parse, call, render. Whatever takes time to import is imported by the command that needs it."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from typing import Any, NoReturn

import typer

from mlflow_trt.cli.add_engine import add_engine
from mlflow_trt.cli.benchmark import benchmark
from mlflow_trt.cli.cache import cache
from mlflow_trt.cli.command import Command
from mlflow_trt.cli.compare import compare
from mlflow_trt.cli.convert import convert
from mlflow_trt.cli.dockerfile import dockerfile
from mlflow_trt.cli.doctor import doctor
from mlflow_trt.cli.export_triton import export_triton
from mlflow_trt.cli.import_engine import import_engine
from mlflow_trt.cli.inspect import inspect
from mlflow_trt.cli.kubernetes import kubernetes
from mlflow_trt.cli.registry import registry
from mlflow_trt.cli.serve import serve
from mlflow_trt.cli.sign import sign, verify_signature
from mlflow_trt.cli.verify import verify
from mlflow_trt.cli.wording import in_own_words
from mlflow_trt.core.printable import printable

app = typer.Typer(
    name="mlflow-trt",
    help="ONNX models as TensorRT engines in MLflow.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command(cls=Command)(convert)
app.command(cls=Command)(add_engine)
app.command(cls=Command)(import_engine)
app.command(cls=Command)(inspect)
app.command(cls=Command)(verify)
app.command(cls=Command)(benchmark)
app.command(cls=Command)(compare)
app.command(cls=Command)(serve)
app.command(cls=Command)(export_triton)
app.command(cls=Command)(dockerfile)
app.command(cls=Command)(kubernetes)
app.command(cls=Command)(sign)
app.command(cls=Command)(verify_signature)
app.command(cls=Command)(doctor)
app.add_typer(cache)
app.add_typer(registry, name="registry")


_shows_traceback = False
_INTERRUPTED = {128 + number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}


@app.callback(invoke_without_command=True)
def _options(
    version: bool = typer.Option(False, "--version", help="Print the version and exit."),
    traceback: bool = typer.Option(False, "--traceback", help="Print where an error was raised, too."),
) -> None:
    global _shows_traceback  # noqa: PLW0603  # main() catches what the command raises, after the context is gone
    _shows_traceback = traceback
    if version:
        from mlflow_trt._version import __version__

        typer.echo(__version__)
        raise typer.Exit


def _terminated(number: int, _frame: object) -> NoReturn:
    """End as Ctrl-C does, with what was begun taken back; asked a second time, at once."""
    signal.signal(number, signal.SIG_DFL)
    sys.exit(128 + number)


def _log_record(*args: Any, **keywords: Any) -> logging.LogRecord:
    """What this package logs, in the words of the command line."""
    record = logging.LogRecord(*args, **keywords)
    if record.name.startswith("mlflow.mlflow_trt"):
        record.msg, record.args = in_own_words(record.getMessage()), None
    return record


def _end_now(code: int) -> NoReturn:
    """End without waiting for threads, such as those in which MLflow uploads and, for minutes, tries again."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or none at all
            stream.flush()
    os._exit(code)


def _print_traceback() -> None:
    if _shows_traceback:
        import traceback

        traceback.print_exc()


def main() -> None:
    """Run the command line. Errors that users can act on are printed in a line or a few, without a traceback."""
    signal.signal(signal.SIGTERM, _terminated)
    logging.setLogRecordFactory(_log_record)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup leaves it
        signal.signal(signal.SIGHUP, _terminated)
    try:
        app()
    except SystemExit as end:
        if end.code in _INTERRUPTED:
            _end_now(int(end.code))
        raise
    except (OSError, ImportError) as error:  # ImportError: a store that wants a package, such as boto3
        _print_traceback()
        typer.echo(printable(f"Error: {error}"), err=True)
        sys.exit(1)
    except Exception as error:
        # Importing mlflow to name its base class would take seconds; if one was raised, it is imported already.
        exceptions = sys.modules.get("mlflow.exceptions")
        if exceptions is None or not isinstance(error, exceptions.MlflowException):
            raise
        _print_traceback()
        message = in_own_words(error.message)
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            from mlflow_trt.flavor.tracking import name_stores

            message = f"{message.removesuffix('.')}. {name_stores()}"
        typer.echo(printable(f"Error: {message}"), err=True)
        sys.exit(1)
