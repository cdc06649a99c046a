"""The blocks of code of README and docs, run as they stand. `python tests/tools/doc_blocks.py` counts them.

A page runs from top to bottom, in one empty folder with one MLflow store, its Python blocks with the same names. A
comment right before a block says what is special about it:

    <!-- gpu -->             it needs a GPU: the tests marked gpu run it
    <!-- server: ADDRESS --> it goes on until the page ends; what follows runs once ADDRESS answers
    <!-- fails -->           it ends with an error, whose text may be shown
    <!-- not run: REASON --> it cannot run here
    <!-- output -->          a block of text: what the block before it prints, where ... stands for anything
    <!-- id: NAME -->        other pages may need it

and one at the top of a page, <!-- after: PAGE#NAME, ... -->, which blocks of other pages it takes for granted.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import traceback
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# Those of the site: docs/site_hooks.py names what lies beside docs/.
PAGES = [*sorted(ROOT.glob("*.md")), ROOT / "examples" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

RUN = ("bash", "python")
SHOWN = ("text", "json", "yaml")
MARKS = ("gpu", "server", "fails", "not run", "output", "id")

_FENCE = re.compile(
    r"^(?P<indent>[ \t]*)(?P<fence>```+|~~~+)(?P<info>[^\n]*)\n(?P<text>.*?)^[ \t]*(?P=fence)[ \t]*$",
    re.MULTILINE | re.DOTALL,
)
_COMMENTS = re.compile(r"((?:[ \t]*<!--[^>]*-->\s*?\n)*)\Z")
_AFTER = re.compile(r"<!-- after: ([^>]*) -->")
_PORT = re.compile(r"(?:127\.0\.0\.1:|--port[ =]|-C port=)(\d{4,5})\b")


@dataclass(frozen=True, kw_only=True)
class Block:
    """A block between fences, and what the comments before it say."""

    page: Path
    line: int
    language: str
    text: str
    marks: dict[str, str] = field(default_factory=dict, hash=False)

    @property
    def where(self) -> str:
        return f"{name_of(self.page)}:{self.line}"

    @property
    def runs(self) -> bool:
        return self.language in RUN and "not run" not in self.marks


class BlockError(Exception):
    """A block did not do what the page says."""


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks_of(page: Path) -> list[Block]:
    """All blocks of a page. Raises BlockError for one of a language that nobody here knows, or with an unknown mark."""
    text = page.read_text()
    found = []
    for match in _FENCE.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        comments = _COMMENTS.search(text[: match.start()])
        assert comments is not None
        marks = {}
        for comment in re.findall(r"<!-- (.*?) -->", comments[1]):
            name, _, value = comment.partition(": ")
            if name in MARKS:
                marks[name] = value
        block = Block(
            page=page,
            line=line,
            language=match["info"].strip(),
            text=textwrap.dedent(match["text"]),
            marks=marks,
        )
        _check(block, found)
        found.append(block)
    fences = len(re.findall(r"^[ \t]*(?:```|~~~)", text, re.MULTILINE))
    if fences != 2 * len(found):
        raise BlockError(f"{name_of(page)} has {fences} fences, and {len(found)} blocks between them")
    return found


def _check(block: Block, before: Sequence[Block]) -> None:
    if block.language not in RUN + SHOWN:
        raise BlockError(f"{block.where}: the language is {block.language!r}; take one of {', '.join(RUN + SHOWN)}")
    if "output" in block.marks:
        if block.language not in SHOWN or not before or not before[-1].runs:
            raise BlockError(f"{block.where}: no block before it runs whose output this could be")
    elif block.language in SHOWN and set(block.marks) - {"id"}:
        raise BlockError(f"{block.where}: nothing of {block.language} can be run")
    if block.marks.get("not run", "reason") == "":
        raise BlockError(f"{block.where}: the reason is missing why it is not run")
    if block.language == "json":
        json.loads(block.text)


def needed_by(page: Path) -> list[Block]:
    """The blocks of other pages that a page takes for granted, each after what it needs itself."""
    match = _AFTER.search(page.read_text())
    needed: list[Block] = []
    for name in match[1].split(", ") if match else []:
        other, _, wanted = name.partition("#")
        path = (page.parent / other).resolve()
        (block,) = [block for block in blocks_of(path) if block.marks.get("id") == wanted]
        needed += [one for one in (*needed_by(path), block) if one not in needed]
    return needed


class Page:
    """Runs the blocks of one page.

    Args:
        folder: where they run.
        environment: the variables of the commands.
        has_gpu: run those, too, that need a GPU.
        names: those that Python's blocks begin with.
    """

    def __init__(
        self,
        page: Path,
        folder: Path,
        environment: dict[str, str],
        *,
        has_gpu: bool = False,
        names: Mapping[str, Any] | None = None,
    ) -> None:
        self._blocks = blocks_of(page)
        self._folder = folder
        self._environment = environment
        self._has_gpu = has_gpu
        self.names: dict[str, Any] = {"__name__": "__main__", **(names or {})}
        ports = {port for block in self._blocks for port in _PORT.findall(block.text)}
        self._ports = {port: other for port in sorted(ports) if (other := _free_port(int(port))) != port}

    def run(self) -> Counter[str]:
        """Run them all; counts what was done. Raises BlockError for the first that does not do what the page says."""
        done: Counter[str] = Counter()
        printed: str | None = None
        with contextlib.ExitStack() as servers:
            for block in map(self._at_free_ports, self._blocks):
                if "output" in block.marks:
                    if printed is not None:
                        _compare(block, printed)
                        done["compared"] += 1
                elif block.runs and ("gpu" not in block.marks or self._has_gpu):
                    printed = self._run(block, servers)
                    done["run"] += 1
                else:
                    printed = None
        return done

    def run_only(self, blocks: Sequence[Block]) -> None:
        """Run these instead, which go on with nothing."""
        with contextlib.ExitStack() as servers:
            for block in blocks:
                self._run(block, servers)

    def _at_free_ports(self, block: Block) -> Block:
        """As it stands, unless another program of this machine has its port."""
        text, marks = block.text, dict(block.marks)
        for port, other in self._ports.items():
            text = text.replace(port, other)
            marks = {name: value.replace(port, other) for name, value in marks.items()}
        return replace(block, text=text, marks=marks)

    def _run(self, block: Block, servers: contextlib.ExitStack) -> str:
        if "server" in block.marks:
            servers.enter_context(self._server(block))
            return ""
        return self._run_python(block) if block.language == "python" else self._run_bash(block)

    def _run_python(self, block: Block) -> str:
        printed = io.StringIO()
        # The lines of the block are those of the page, for what a traceback shows.
        code = compile("\n" * block.line + block.text, str(block.page), "exec")
        try:
            with contextlib.redirect_stdout(printed):
                exec(code, self.names)
        except Exception as error:
            if "fails" in block.marks:
                return f"{type(error).__name__}: {error}"
            raise BlockError(f"{block.where}: {traceback.format_exc()}") from error
        if "fails" in block.marks:
            raise BlockError(f"{block.where}: it does not fail, as the page says, and prints {printed.getvalue()!r}")
        return printed.getvalue()

    def _run_bash(self, block: Block) -> str:
        result = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block.text],
            cwd=self._folder,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if (result.returncode != 0) != ("fails" in block.marks):
            raise BlockError(
                f"{block.where}: it ended with {result.returncode}\n{block.text}\n{result.stdout}\n{result.stderr}"
            )
        return result.stdout + (result.stderr if "fails" in block.marks else "")

    @contextlib.contextmanager
    def _server(self, block: Block) -> Iterator[None]:
        from helpers import wait_for  # here, so that counting blocks needs nothing installed

        log = self._folder / f"server-{block.line}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                ["bash", "-euo", "pipefail", "-c", block.text],
                cwd=self._folder,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            wait_for(lambda: process.poll() is not None or _answers(block.marks["server"]))
            if process.poll() is not None:
                raise BlockError(f"{block.where}: the server ended with {process.returncode}\n{log.read_text()}")
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            process.wait()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def _free_port(port: int) -> str:
    """This one, or another where it is taken."""
    for candidate in (port, 0):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", candidate))
            return str(probe.getsockname()[1])
    raise BlockError("this machine has no free port")


def _compare(block: Block, printed: str) -> None:
    """Raise BlockError unless this was printed, but for spaces at the ends of lines."""
    expected, actual = _lines(block.text), _lines(printed)
    pattern = ".*?".join(re.escape(part) for part in expected.split("..."))
    if re.fullmatch(pattern, actual, re.DOTALL) is None:
        raise BlockError(f"{block.where}: the page shows\n{expected}\n\nand what is printed is\n{actual}")


def _lines(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


def command_environment(folder: Path) -> dict[str, str]:
    """The environment of a terminal 80 columns wide in which this package is installed."""
    from command_line import write_program

    programs = folder / "bin"
    programs.mkdir()
    write_program(programs)
    return {
        **os.environ,
        "PATH": os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "COLUMNS": "80",
        "NO_COLOR": "1",
        "DO_NOT_TRACK": "true",
    }


def tally() -> str:
    """How many blocks run where, and why the others do not, as a table of Markdown."""
    lines = ["| page | run | their output compared | on a GPU | not run | shown only |", "| --- |" + " --- |" * 5]
    total: Counter[str] = Counter()
    reasons: list[str] = []
    for page in PAGES:
        blocks = blocks_of(page)
        counts = Counter(_kind(block) for block in blocks)
        reasons += [f"- {block.where}: {block.marks['not run']}" for block in blocks if "not run" in block.marks]
        if blocks:
            lines.append(_row(name_of(page), counts))
        total += counts
    return "\n".join([*lines, _row("**all**", total), "", "Not run:", "", *reasons])


def _kind(block: Block) -> str:
    for mark, kind in (("output", "compared"), ("not run", "not run"), ("gpu", "gpu")):
        if mark in block.marks:
            return kind
    return "run" if block.language in RUN else "shown"


def _row(name: str, counts: Counter[str]) -> str:
    return (
        f"| {name} | " + " | ".join(str(counts[kind]) for kind in ("run", "compared", "gpu", "not run", "shown")) + " |"
    )


if __name__ == "__main__":
    sys.stdout.write(tally() + "\n")
