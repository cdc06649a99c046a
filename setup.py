"""The README as PyPI shows it, where the files that it links to are not: links lead to those of this very release."""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
REPOSITORY = "mlflow-trt/mlflow-trt"
PICTURE = re.compile(r"(!\[[^\]]*\]\()(?![a-z]+:)")
LINK = re.compile(r"(\]\(|^\[[^\]]+\]: +)(?![a-z]+:|#)", re.MULTILINE)


def readme(version: str) -> str:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = PICTURE.sub(rf"\1https://raw.githubusercontent.com/{REPOSITORY}/v{version}/", text)
    return LINK.sub(rf"\1https://github.com/{REPOSITORY}/blob/v{version}/", text)


version = re.findall(r'__version__ = "(.+)"', (ROOT / "mlflow_trt" / "_version.py").read_text(encoding="utf-8"))[0]
setup(long_description=readme(version), long_description_content_type="text/markdown")
