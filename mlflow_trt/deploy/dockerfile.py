"""A model as the context of a container image: `docker build` on it, with nothing else at hand.

`mlflow models generate-dockerfile` knows nothing of CUDA, so its image has none.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from mlflow_trt._version import __version__
from mlflow_trt.core.output_folder import check_target, write_aside
from mlflow_trt.core.settings import LoadSettings
from mlflow_trt.core.types import Distribution
from mlflow_trt.errors import OptionError
from mlflow_trt.flavor.fetch import open_folder

CUDA_IMAGE = "nvidia/cuda:13.0.1-{kind}-ubuntu24.04"
"""Where the image starts from: `kind` is `runtime`, or `devel` to compile pycuda for a model that wants it."""
CACHE = "/var/cache/mlflow-trt"
"""Where the image keeps what is made on its host."""

_HEALTH = "import urllib.request; urllib.request.urlopen('http://127.0.0.1:{port}/ping', timeout=5)"
SERVERS = ("mlflow-trt", "mlflow")
_PACKAGE = "mlflow-trt"
# For either server: without uvloop, several workers of MLflow's answer each call 45 ms too late.
_SERVER_REQUIREMENTS = f"{_PACKAGE}[serve]\n"
_SERVER_REQUIREMENTS_FILE = "server-requirements.txt"

# Two stages: what installs packages, and for pycuda the toolkit, which is gigabytes, is not needed to run.
_TEMPLATE = """\
FROM {build_image} AS build
# hadolint ignore=DL3008
RUN apt-get update \\
 && apt-get install --yes --no-install-recommends {build_packages} \\
 && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:/usr/local/cuda/bin:$PATH
{copies}
WORKDIR /tmp/requirements
RUN pip install --no-cache-dir {find_links}--requirement requirements.txt --requirement {server_requirements}

FROM {image}
# hadolint ignore=DL3008
RUN apt-get update \\
 && apt-get install --yes --no-install-recommends python3 \\
 && rm -rf /var/lib/apt/lists/* \\
 && useradd --create-home --uid 10001 mlflow \\
 && install --directory --owner=mlflow {cache}
COPY --from=build /opt/venv /opt/venv
COPY model/ /opt/model/
ENV PATH=/opt/venv/bin:$PATH \\
    MLFLOW_TRT_CACHE_DIR={cache}{settings}
# Engines that are rebuilt for the GPU of this host, and the kernels that it compiled, are kept here.
VOLUME {cache}
# By number, so that Kubernetes can tell that it is not root.
USER 10001
EXPOSE {port}
{stop_signal}HEALTHCHECK --start-period=10m --interval=30s --timeout=10s CMD {health}
# One worker: each more would load the engine once more.
ENTRYPOINT {command}
"""


_MLFLOW_STOPS = """\
# As the first process, MLflow's command ignores SIGTERM, and Docker would wait for it until it kills it.
STOPSIGNAL SIGINT
"""


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """What the user decides about the image.

    Args:
        port: what the server listens on.
        server: `mlflow-trt` for the Open Inference Protocol beside MLflow's wire, `mlflow` for MLflow's server.
        name: what `mlflow-trt serve` calls the model.
        base: the image to start from, with `{kind}` where `devel` and `runtime` differ.
        model_config: load settings.
        wheels: wheels to install from before any index, such as one of mlflow-trt that is on none.

    Raises:
        OptionError: a value makes no sense, or a wheel does not exist.
    """

    port: int = 8080
    server: str = "mlflow-trt"
    name: str = "model"
    base: str = CUDA_IMAGE
    model_config: Mapping[str, Any] | None = None
    wheels: Sequence[str | Path] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.port < 2**16:
            raise OptionError(f"port is {self.port}; expected 1 to 65535", option="port")
        if self.server not in SERVERS:
            raise OptionError(f"server is {self.server!r}; choose one of {', '.join(SERVERS)}", option="server")
        if not re.fullmatch(r"[\w.-]*\w[\w.-]*", self.name):
            raise OptionError(f"name is {self.name!r}; expected letters, digits, and any of _ . -", option="name")
        if not re.fullmatch(r"[\w./:@-]+", self.base.replace("{kind}", "")):
            raise OptionError(f"base is {self.base!r}; expected an image like {CUDA_IMAGE}", option="base")
        LoadSettings.of(self.model_config)
        for wheel in map(Path, self.wheels):
            if wheel.suffix != ".whl" or not wheel.is_file():
                raise OptionError(f"wheels: {wheel} is no wheel; give a .whl file that exists", option="wheels")


def write_image_context(model_uri: str, path: str | Path, options: ImageOptions | None = None) -> list[str]:
    """Write a folder for `docker build`, whole or not at all: a Dockerfile, the model, and the wheels.

    Returns remarks: what to know before it is built and run.

    Raises:
        OptionError: the folder cannot be written, or has something in it.
        ArtifactError: it is no model of this flavor.
    """
    options = options or ImageOptions()
    target = Path(path)
    check_target(target)
    with open_folder(model_uri) as folder, write_aside(target) as aside:
        shutil.copytree(folder.path, aside / "model")
        for entry in (aside / "model", *(aside / "model").rglob("*")):
            # Docker keeps the modes and gives all to root, while the image runs as a user of its own.
            entry.chmod(entry.stat().st_mode | (0o555 if entry.is_dir() else 0o444))
        for wheel in map(Path, options.wheels):
            (aside / "wheels").mkdir(exist_ok=True)
            shutil.copyfile(wheel, aside / "wheels" / wheel.name)
        (aside / _SERVER_REQUIREMENTS_FILE).write_text(_SERVER_REQUIREMENTS)
        has_constraints = (aside / "model" / "constraints.txt").is_file()
        compiles = _wants_pycuda(aside / "model" / "requirements.txt")
        (aside / "Dockerfile").write_text(dockerfile_text(options, has_constraints=has_constraints, compiles=compiles))
        engines = folder.record.engines
    remarks = [f"engine for {engine.target}, {engine.distribution.label} {engine.version}" for engine in engines]
    if all(engine.distribution is Distribution.TENSORRT for engine in engines):
        remarks.append("TensorRT itself is installed from NVIDIA's index by its package: the build needs a network")
    if not any(canonicalize_name(Path(wheel).name.partition("-")[0]) == _PACKAGE for wheel in options.wheels):
        remarks += _where_ours_is()
    return remarks


def _where_ours_is() -> list[str]:
    """A remark where this package did not come from an index, where `docker build` would look for it."""
    try:
        distribution = importlib.metadata.distribution(_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        came, version = "runs here without being installed", __version__
    else:
        origin = distribution.read_text("direct_url.json")  # of PEP 610: not there for what came from an index
        if origin is None:
            return []
        came, version = f"was installed here from {json.loads(origin)['url']}", distribution.version
    return [
        (
            f"{_PACKAGE} {version} {came}, not from a package index. If no index has it, docker build fails: "
            "give its wheel with --wheel; `python -m build --wheel` makes one from the sources"
        )
    ]


def _wants_pycuda(requirements: Path) -> bool:
    if not requirements.is_file():
        return False
    for line in requirements.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(InvalidRequirement):  # an option of pip's, or a comment
            requirement = Requirement(line.partition("#")[0].strip())
            if requirement.name == "pycuda" or (requirement.name == "mlflow-trt" and "cuda" in requirement.extras):
                return True
    return False


def dockerfile_text(options: ImageOptions, *, has_constraints: bool = False, compiles: bool = False) -> str:
    """The Dockerfile. The model is at /opt/model, its environment at /opt/venv.

    `compiles` brings the CUDA toolkit to where packages are installed.
    """
    settings = json.dumps(dict(options.model_config)) if options.model_config else ""
    is_ours = options.server == "mlflow-trt"
    listen = ["--host", "0.0.0.0", "--port", str(options.port)]  # noqa: S104  # in a container
    if is_ours:
        command = ["mlflow-trt", "serve", f"{options.name}=/opt/model", *listen]
        command += ["--model-config", settings] if settings else []
    else:
        command = ["mlflow", "models", "serve", "--model-uri", "/opt/model", "--env-manager", "local"]
        command += [*listen, "--workers", "1"]
    requirements = [
        _SERVER_REQUIREMENTS_FILE,
        "model/requirements.txt",
        *(["model/constraints.txt"] if has_constraints else []),
    ]
    copies = [f"COPY {' '.join(requirements)} /tmp/requirements/"]
    if options.wheels:
        copies.append("COPY wheels/ /tmp/wheels/")
    return _TEMPLATE.format(
        build_image=options.base.replace("{kind}", "devel" if compiles else "runtime"),
        build_packages="g++ python3-dev python3-venv" if compiles else "python3-venv",
        image=options.base.replace("{kind}", "runtime"),
        copies="\n".join(copies),
        cache=CACHE,
        find_links="--find-links /tmp/wheels " if options.wheels else "",
        settings=f" \\\n    MLFLOW_PYFUNC_INFERENCE_CONFIG={shlex.quote(settings)}" if settings and not is_ours else "",
        server_requirements=_SERVER_REQUIREMENTS_FILE,
        stop_signal="" if is_ours else _MLFLOW_STOPS,
        port=options.port,
        health=json.dumps(["python3", "-c", _HEALTH.format(port=options.port)]),
        command=json.dumps(command),
    )
