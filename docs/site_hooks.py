"""Pages of the site that lie beside docs/, so that nothing is written twice: mkdocs.yml names this."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    "README.md": "index.md",
    "examples/README.md": "examples.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "SECURITY.md": "SECURITY.md",
    "CODE_OF_CONDUCT.md": "CODE_OF_CONDUCT.md",
}
SOURCES = "https://github.com/mlflow-trt/mlflow-trt/blob/main/"
_LINK = re.compile(r"(?<=\]\()[^)#\s]+")


def on_files(files: Files, config: Any) -> Files:
    """Add them."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links lead from and to where these pages are in the site, and to the repository for what it does not have."""
    name = page.file.src_uri
    source = next((file for file, generated in PAGES.items() if generated == name), f"docs/{name}")

    def target(link: re.Match[str]) -> str:
        if "://" in link[0] or link[0].startswith("mailto:"):
            return link[0]
        file = posixpath.normpath(posixpath.join(posixpath.dirname(source), link[0]))
        if file in PAGES:
            inside = PAGES[file]
        elif file.startswith("docs/"):
            inside = file.removeprefix("docs/")
        else:
            return SOURCES + file
        return posixpath.relpath(inside, posixpath.dirname(name) or ".")

    return _LINK.sub(target, markdown)
