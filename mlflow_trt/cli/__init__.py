"""The command line: parse, call, render. Whatever takes time to import is imported by the command that needs it."""

from __future__ import annotations

import logging
import signal
import sys
from typing import Any, NoReturn

import typer

from mlflow_trt.cli.add_engine import add_engine
from mlflow_trt.cli.benchmark import benchmark
from mlflow_trt.cli.compare import compare
from mlflow_trt.cli.convert import convert
from mlflow_trt.cli.dockerfile import dockerfile
from mlflow_trt.cli.doctor import doctor
from mlflow_trt.cli.export_triton import export_triton
from mlflow_trt.cli.import_engine import import_engine
from mlflow_trt.cli.inspect import inspect
from mlflow_trt.cli.serve import serve
from mlflow_trt.cli.verify import verify
from mlflow_trt.cli.wording import in_own_words


class Command(typer.core.TyperCommand):
    """A command whose help says nothing of the type of a flag, which takes no value."""

    def get_params(self, ctx: Any) -> list[Any]:
        params = super().get_params(ctx)
        for param in params:
            if getattr(param, "is_flag", False):
                param.metavar = " "
        return params


app = typer.Typer(
    name="mlflow-trt",
    help="ONNX models as TensorRT engines in MLflow.",
    no_args_is_help=True,
    add_completion=False,
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
app.command(cls=Command)(doctor)


_shows_traceback = False


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


def _print_traceback() -> None:
    if _shows_traceback:
        import traceback

        traceback.print_exc()


def main() -> None:
    """Run the command line. Errors that users can act on are printed in a line or a few, without a traceback."""
    signal.signal(signal.SIGTERM, _terminated)
    logging.setLogRecordFactory(_log_record)
    try:
        app()
    except (OSError, ImportError) as error:  # ImportError: a store that wants a package, such as boto3
        _print_traceback()
        typer.echo(f"Error: {error}", err=True)
        sys.exit(1)
    except Exception as error:
        # Importing mlflow to name its base class would take seconds; if one was raised, it is imported already.
        exceptions = sys.modules.get("mlflow.exceptions")
        if exceptions is None or not isinstance(error, exceptions.MlflowException):
            raise
        _print_traceback()
        typer.echo(f"Error: {in_own_words(error.message)}", err=True)
        sys.exit(1)
