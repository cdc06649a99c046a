"""A real tritonserver, from the wheel of nvidia-pytriton: with its Python backend, and no other.

It runs with packages of its own, not with those of the tests: it wants numpy below 2, and with numpy 2 its stub gives
empty outputs.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import requires, version
from pathlib import Path

import pytest
from installed import installed
from repository import ROOT

from examples.serving import ServerProcess, free_port

PACKAGES = ("nvidia-pytriton==0.7.0", "numpy==1.26.4")
SERVER = Path("pytriton", "tritonserver")


def triton_packages() -> Path:
    """The folder of what Triton runs with. Skips the test where it cannot be had."""
    if sys.version_info >= (3, 13):
        pytest.skip("there is no numpy below 2 for this Python, which this tritonserver needs")
    ours = [requirement for requirement in requires("mlflow-trt") or [] if "extra ==" not in requirement]
    return installed("tritonserver", *PACKAGES, f"onnxruntime=={version('onnxruntime')}", *sorted(ours))


class TritonServer(ServerProcess):
    """tritonserver on free ports of 127.0.0.1.

    Args:
        repository: of models.
        folder: for its backends, which needs the stub of this Python.
        options: of the command.
    """

    def __init__(self, repository: Path, folder: Path, options: list[str]) -> None:
        packages = triton_packages()
        backend = folder / "backends" / "python"
        if not backend.is_dir():
            shutil.copytree(packages / SERVER / "backends" / "python", backend)
            stub = packages / SERVER / "python_backend_stubs" / f"3.{sys.version_info.minor}"
            shutil.copy(stub / "triton_python_backend_stub", backend)
        self.http, self.grpc, metrics = (f"127.0.0.1:{free_port()}" for _ in range(3))
        command = [str(packages / SERVER / "bin" / "tritonserver"), f"--model-repository={repository}"]
        command += [f"--backend-directory={backend.parent}"]
        for name, address in {"http": self.http, "grpc": self.grpc, "metrics": metrics}.items():
            host, port = address.split(":")
            command += [f"--{name}-address={host}", f"--{name}-port={port}"]
        libraries = [str(packages / "nvidia_pytriton.libs"), sysconfig.get_config_var("LIBDIR")]
        # The stub takes the packages of the python3 that it finds first.
        path = os.pathsep.join([str(_environment(folder / "python", packages) / "bin"), os.environ["PATH"]])
        environment = {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(libraries)}
        super().__init__(
            ["env", f"PATH={path}", *command, *options], environment, ready=f"http://{self.http}/v2/health/ready"
        )


def _environment(folder: Path, packages: Path) -> Path:
    """A virtual environment with these packages and this repository."""
    if not folder.is_dir():
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        site = next(folder.glob("lib/python*/site-packages"))
        (site / "paths.pth").write_text(f"{packages}\n{ROOT}\n")
    return folder
