"""What the documentation says is so: its code runs, its commands exist, its links lead somewhere."""

from __future__ import annotations

import contextlib
import os
import re
import runpy
import shlex
import shutil
import sqlite3
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import doc_blocks
import mlflow
import pytest
import typer
from doc_blocks import PAGES, Block, BlockError, name_of
from helpers import Store
from repository import ROOT

import mlflow_trt
from mlflow_trt.cli import app

LINKED = sorted({*ROOT.glob("*.md"), *PAGES})
COMMAND: Any = typer.main.get_command(app)
COMMANDS = COMMAND.commands
PROGRAM = re.compile(r"^(\$ |>>> |pip install|mlflow(-trt)? |import |from \w+ import )", re.MULTILINE)


LONG = {
    f"docs/howto/{name}.md"
    for name in (
        "benchmark",
        "calibrate",
        "existing-plan",
        "many-models",
        "offline",
        "precision",
        "run-elsewhere",
        "serve",
    )
}
LONG |= {"docs/quickstart.md", "docs/settings.md", "docs/troubleshooting.md"}
"""Pages that take seconds, with commands that other tests run too: for `make test-all`."""


def pages(wanted) -> list[Any]:
    return [
        pytest.param(page, id=name_of(page), marks=[pytest.mark.exhaustive] * (name_of(page) in LONG))
        for page in PAGES
        if any(block.runs and wanted(block) for block in doc_blocks.blocks_of(page))
    ]


class Desk:
    """A folder where pages run one after the other, and an MLflow store; each page finds what it takes for granted.

    What several pages take for granted is made once, kept, and put back: model files name where they lie, so it has to
    be the same place.
    """

    def __init__(self, folder: Path, empty_database: Path) -> None:
        self._home = folder / "home"
        self._kept = folder / "kept"
        self._home.mkdir()
        self.folder = self._home / "work"
        self.folder.mkdir()
        self._store = Store(self._home, empty_database)
        self.variables = {"MLFLOW_TRACKING_URI": self._store.uri, "MLFLOW_EXPERIMENT_ID": self._store.experiment_id}
        self._names: dict[tuple[Block, ...], dict[str, Any]] = {(): {}}
        self._keep(())

    def prepare(self, page: Path, environment: dict[str, str]) -> dict[str, Any]:
        """Leave nothing but what the page takes for granted. Returns the names that Python has then."""
        mlflow.set_tracking_uri(self._store.uri)
        mlflow.set_experiment(experiment_id=self._store.experiment_id)
        needed = tuple(doc_blocks.needed_by(page))
        done = next(needed[:count] for count in range(len(needed), -1, -1) if needed[:count] in self._names)
        self._put_back(done)
        os.chdir(self.folder)
        for count in range(len(done), len(needed)):
            runner = doc_blocks.Page(page, self.folder, environment, names=self._names[needed[:count]])
            runner.run_only([needed[count]])
            self._names[needed[: count + 1]] = runner.names
            self._keep(needed[: count + 1])
        return self._names[needed]

    def _keep(self, blocks: tuple[Block, ...]) -> None:
        shutil.copytree(self._home, self._place(blocks))

    def _put_back(self, blocks: tuple[Block, ...]) -> None:
        kept = self._place(blocks)
        for name in ("work", "artifacts"):
            shutil.rmtree(self._home / name, ignore_errors=True)
            if (kept / name).exists():
                shutil.copytree(kept / name, self._home / name)
        # MLflow keeps connections open, so the database is not replaced but written to.
        with (
            contextlib.closing(sqlite3.connect(kept / "mlflow.db")) as source,
            contextlib.closing(sqlite3.connect(self._home / "mlflow.db")) as target,
        ):
            source.backup(target)

    def _place(self, blocks: tuple[Block, ...]) -> Path:
        return self._kept / str(list(self._names).index(blocks))


@pytest.fixture(scope="module")
def desk(tmp_path_factory, empty_database) -> Desk:
    return Desk(tmp_path_factory.mktemp("pages"), empty_database)


@pytest.fixture
def run_page(desk, tmp_path, monkeypatch):
    """Runs a page in an empty folder, but for what it takes for granted."""
    environment = {**doc_blocks.command_environment(tmp_path), **desk.variables}
    monkeypatch.setenv("PATH", environment["PATH"])
    monkeypatch.chdir(tmp_path)  # and back, in the end

    def run(page: Path, *, has_gpu: bool = False) -> Counter[str]:
        names = desk.prepare(page, environment)
        return doc_blocks.Page(page, desk.folder, environment, has_gpu=has_gpu, names=names).run()

    return run


@pytest.mark.slow
@pytest.mark.server
@pytest.mark.parametrize("page", pages(lambda block: "gpu" not in block.marks))
# Users do not turn warnings into errors; what the page shows is compared all the same.
@pytest.mark.filterwarnings("default")
def test_the_blocks_of_a_page_run(page, run_page):
    assert run_page(page)["run"] > 0


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.server
@pytest.mark.parametrize("page", pages(lambda block: "gpu" in block.marks))
@pytest.mark.filterwarnings("default")
def test_the_blocks_of_a_page_run_with_a_gpu(page, run_page):
    assert run_page(page, has_gpu=True)["run"] > 0


def test_every_block_runs_or_has_a_reason():
    for page in PAGES:
        for block in doc_blocks.blocks_of(page):
            # What looks like a command or a program is not passed off as text.
            if block.language == "text" and "output" not in block.marks:
                assert not PROGRAM.search(block.text), block.where


def test_blocks_are_counted_where_nothing_is_installed():
    command = [sys.executable, "-S", ROOT / "tests" / "tools" / "doc_blocks.py"]
    counted = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert {name_of(page) for page in PAGES if any(doc_blocks.blocks_of(page))} <= set(re.findall(r"\S+\.md", counted))


class TestTheRunner:
    @pytest.fixture
    def run(self, tmp_path, run_page, monkeypatch):
        monkeypatch.setattr(doc_blocks, "ROOT", tmp_path)

        def run(text: str) -> Any:
            page = tmp_path / "page.md"
            page.write_text(text)
            return run_page(page)

        return run

    def test_it_runs_and_compares(self, run):
        page = """
```python
x = 3
print("x is", x)
```

<!-- output -->
```text
x is ...
```

```bash
echo 1 && pwd
```

<!-- output -->
```text
1
...work
```
"""
        assert run(page) == {"run": 2, "compared": 2}

    def test_a_server_goes_on_until_the_page_ends(self, run):
        page = """
<!-- server: http://127.0.0.1:8765/ -->
```bash
python -m http.server --bind 127.0.0.1 8765
```

```python
import urllib.request

print(urllib.request.urlopen("http://127.0.0.1:8765/").status)
```

<!-- output -->
```text
200
```
"""
        assert run(page) == {"run": 2, "compared": 1}

    @pytest.mark.parametrize(
        ("page", "said"),
        [
            ("```python\nraise ValueError('this')\n```\n", "ValueError: this"),
            ("```bash\nfalse\ntrue\n```\n", "it ended with 1"),
            ("```python\nprint(1)\n```\n\n<!-- output -->\n```text\n2\n```\n", "what is printed is\n1"),
            ("<!-- fails -->\n```bash\ntrue\n```\n", "it ended with 0"),
            ("<!-- fails -->\n```python\nprint(1)\n```\n", "it does not fail"),
            ("```sh\ntrue\n```\n", "the language is 'sh'"),
            ("```\ntrue\n```\n", "the language is ''"),
            ("<!-- output -->\n```text\n1\n```\n", "no block before it runs"),
            ("<!-- not run -->\n```bash\ntrue\n```\n", "the reason is missing"),
            ("```bash\ntrue\n", "has 1 fences, and 0 blocks"),
        ],
    )
    def test_it_finds_what_is_not_so(self, run, page, said):
        with pytest.raises(BlockError, match=re.escape(said)):
            run(page)

    def test_what_cannot_run_is_left_out_and_told(self, run, tmp_path, monkeypatch):
        assert run("<!-- not run: needs Docker -->\n```bash\nfalse\n```\n\n<!-- gpu -->\n```bash\nfalse\n```\n") == {}
        monkeypatch.setattr(doc_blocks, "PAGES", [tmp_path / "page.md"])
        assert "page.md:2: needs Docker" in doc_blocks.tally()

    def test_a_page_may_need_a_block_of_another(self, run, tmp_path):
        (tmp_path / "first.md").write_text("<!-- id: x -->\n```bash\necho made >> made\n```\n")
        (tmp_path / "second.md").write_text("<!-- after: first.md#x -->\n<!-- id: y -->\n```bash\ncat made\n```\n")
        page = (
            "<!-- after: first.md#x, second.md#y -->\n```bash\ncat made\n```\n\n<!-- output -->\n```text\nmade\n```\n"
        )
        assert run(page) == {"run": 1, "compared": 1}


def test_the_page_of_the_command_line_is_up_to_date():
    generator = runpy.run_path(str(ROOT / "docs" / "generate_cli_page.py"))
    assert (ROOT / "docs" / "cli.md").read_text() == generator["page"](), "run `make docs`"


def commands():
    """Every `mlflow-trt ...` in a block of code or between backticks, with a command after it."""
    for page in LINKED:
        for text in re.findall(r"(?:^|`)(mlflow-trt (?!is )[a-z][^`#\n|\\]*)", page.read_text(), re.MULTILINE):
            yield pytest.param(text.strip(), id=f"{page.name}: {text.strip()[:50]}")


@pytest.mark.parametrize("text", list(commands()))
def test_commands_and_options_exist(text):
    _, name, *arguments = shlex.split(text)
    command = COMMANDS[name]
    if hasattr(command, "commands"):  # a group of commands, such as cache
        command = command.commands[arguments[0]]
    options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    assert {argument for argument in arguments if argument.startswith("--")} <= options


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as both GitHub and the site make them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKED, ids=name_of)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_the_table_of_errors_is_complete():
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    assert {name for name in mlflow_trt.__all__ if name.endswith("Error")} <= set(re.findall(r"`(\w+Error)`", text))


def test_the_table_of_load_settings_is_complete():
    from mlflow_trt import LoadSettings

    text = (ROOT / "docs" / "settings.md").read_text()
    for name, default in LoadSettings().to_dict().items():
        assert re.search(rf"^\| `{name}` \| `{re.escape(str(default))}` \|", text, re.MULTILINE), name


def test_the_texts_in_troubleshooting_are_those_of_the_package():
    source = "\n".join(path.read_text() for path in sorted((ROOT / "mlflow_trt").rglob("*.py")))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # texts over several lines, as one
    headings = re.findall(r"^### `(.*)`$", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(headings) > 20
    for heading in headings:
        assert all(part.strip() in source for part in heading.split("…")), heading


def test_the_readme_of_the_repository_is_a_page_of_the_site():
    """Pages lie in three folders; what links them may not lead out of what the site holds."""
    hooks = (ROOT / "docs" / "site_hooks.py").read_text()
    assert {page.name for page in ROOT.glob("*.md")} <= set(re.findall(r'"([A-Z_]+\.md)":', hooks))
