"""What pyproject.toml cannot say: the README as PyPI shows it, and the extension, which may fail to build.

PyPI has none of the files that the README links to, so that its links lead to those of this very release.
"""

import re
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).parent
REPOSITORY = "mlflow-trt/mlflow-trt"
PICTURE = re.compile(r"(!\[[^\]]*\]\()(?![a-z]+:)")
LINK = re.compile(r"(\]\(|^\[[^\]]+\]: +)(?![a-z]+:|#)", re.MULTILINE)


def readme(version: str) -> str:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = PICTURE.sub(rf"\1https://raw.githubusercontent.com/{REPOSITORY}/v{version}/", text)
    return LINK.sub(rf"\1https://github.com/{REPOSITORY}/blob/v{version}/", text)


version = re.findall(r'__version__ = "(.+)"', (ROOT / "mlflow_trt" / "_version.py").read_text(encoding="utf-8"))[0]

# Optional: without a C compiler, and elsewhere, the same is done in Python. The stable ABI makes one wheel for all
# versions of Python that there are; the builds of Python without its interpreter lock have none.
LOWEST = "310"
has_stable_abi = sys.platform == "linux" and not sysconfig.get_config_var("Py_GIL_DISABLED")
native = Extension(
    "mlflow_trt._native",
    sorted(str(path.relative_to(ROOT)) for path in (ROOT / "native").glob("*.c")),
    depends=sorted(str(path.relative_to(ROOT)) for path in (ROOT / "native").glob("*.h")),
    define_macros=[("Py_LIMITED_API", "0x030A0000")],
    extra_compile_args=["-std=c11", "-O2", "-fvisibility=hidden", "-pthread"],
    extra_link_args=["-pthread"],
    py_limited_api=True,
    optional=True,
)
setup(
    long_description=readme(version),
    long_description_content_type="text/markdown",
    ext_modules=[native] if has_stable_abi else [],
    options={"bdist_wheel": {"py_limited_api": f"cp{LOWEST}"}} if has_stable_abi else {},
)
