"""The context of an image: linted, and its steps run where no image is needed for them."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import networks
import numpy as np
import pytest
from command_line import run
from tiers import exhaustive

import mlflow_trt
from examples.serving import ServerProcess, free_port, running
from mlflow_trt import OptionError
from mlflow_trt.client import Client
from mlflow_trt.deploy.dockerfile import CUDA_IMAGE, SERVERS, ImageOptions, dockerfile_text, write_image_context

SETTINGS = {"runtime": "onnxruntime", "answers": "base64"}
HADOLINT = Path(sys.executable).with_name("hadolint")


@pytest.fixture
def folder(tmp_path):
    mlflow_trt.save_model(networks.product(), tmp_path / "product", batch=(1, 4, 8), verify=False)
    return tmp_path / "product"


@pytest.fixture
def wheel(tmp_path):
    path = tmp_path / "mlflow_trt-9-py3-none-any.whl"
    path.write_bytes(b"a wheel")
    return path


def instructions(text):
    """The arguments of each instruction, in order, with continued lines put together and comments left out."""
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if line:
            name, _, argument = line.partition(" ")
            yield name, argument


@pytest.mark.skipif(not HADOLINT.exists(), reason="there is no hadolint for this platform")
@pytest.mark.parametrize("has_constraints", [True, False])
def test_hadolint_has_nothing_to_say(has_constraints, wheel):
    options = ImageOptions(model_config=SETTINGS, wheels=[wheel])
    text = dockerfile_text(options, has_constraints=has_constraints)
    result = subprocess.run([HADOLINT, "-"], input=text, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "")


def test_the_context_has_all_that_is_copied(folder, wheel, tmp_path):
    remarks = write_image_context(str(folder), tmp_path / "image", ImageOptions(wheels=[wheel], port=9000))
    assert re.fullmatch("engine for sm80plus, TensorRT-RTX [0-9.]+", remarks[0])
    text = (tmp_path / "image" / "Dockerfile").read_text()
    copied = [argument.split()[:-1] for name, argument in instructions(text) if name == "COPY"]
    sources = [source for sources in copied for source in sources if not source.startswith("--from")]
    assert sources == ["server-requirements.txt", "model/requirements.txt", "wheels/", "/opt/venv", "model/"]
    assert all((tmp_path / "image" / source).exists() for source in sources if source != "/opt/venv")
    assert "mlflow-trt[cuda-core,rtx]" in (tmp_path / "image" / "model" / "requirements.txt").read_text()
    assert ("EXPOSE", "9000") in instructions(text)
    for name, argument in instructions(text):
        if name == "RUN":
            subprocess.run(["sh", "-n", "-c", argument], check=True)


@pytest.mark.parametrize(
    ("origin", "remark"),
    [
        (
            '{"url": "file:///src/mlflow-trt", "dir_info": {"editable": true}}',
            "installed here from file:///src/mlflow-trt",
        ),
        (
            '{"url": "https://example.org/m.git", "vcs_info": {}}',
            "installed here from https://example.org/m.git, not from a",
        ),
        (None, None),  # from an index
    ],
)
def test_where_docker_would_find_this_package(origin, remark, folder, wheel, tmp_path, monkeypatch):
    info = tmp_path / "site" / "mlflow_trt-7.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.4\nName: mlflow-trt\nVersion: 7.0\n")
    if origin:
        (info / "direct_url.json").write_text(origin)
    monkeypatch.syspath_prepend(info.parent)
    remarks = write_image_context(str(folder), tmp_path / "image")
    if remark:
        assert remark in remarks[-1]
        assert "mlflow-trt 7.0" in remarks[-1]
        assert "--wheel" in remarks[-1]
    else:
        assert len(remarks) == 1
    assert len(write_image_context(str(folder), tmp_path / "other", ImageOptions(wheels=[wheel]))) == 1


@pytest.mark.parametrize("requirement", ["mlflow-trt[cuda,rtx]==0.1.0", "pycuda>=2024.1  # ours"])
def test_the_toolkit_is_there_for_a_model_that_wants_pycuda(folder, tmp_path, requirement):
    model = shutil.copytree(folder, tmp_path / "model")
    (model / "requirements.txt").write_text(f"--extra-index-url https://example.org\n{requirement}\n")
    write_image_context(str(model), tmp_path / "image")
    text = (tmp_path / "image" / "Dockerfile").read_text()
    assert f"FROM {CUDA_IMAGE.replace('{kind}', 'devel')} AS build" in text
    assert "g++" in text
    assert f"FROM {CUDA_IMAGE.replace('{kind}', 'runtime')}\n" in text


def test_the_user_of_the_image_may_read_the_model(folder, tmp_path):
    """Docker keeps modes; a folder that was downloaded is 0700, and so is what a strict umask made."""
    folder.chmod(0o700)
    (folder / "engines").chmod(0o700)
    (folder / "model.onnx").chmod(0o600)
    write_image_context(str(folder), tmp_path / "image")
    for path in (tmp_path / "image" / "model", *(tmp_path / "image" / "model").rglob("*")):
        wanted = 0o555 if path.is_dir() else 0o444
        assert path.stat().st_mode & wanted == wanted, path
    assert (folder / "model.onnx").stat().st_mode & 0o777 == 0o600


@pytest.mark.server
@pytest.mark.parametrize("kind", [SERVERS[0], *exhaustive(*SERVERS[1:])])
def test_what_the_image_runs_serves_the_model(kind, folder, tmp_path, request):
    port = free_port()
    options = ImageOptions(model_config=SETTINGS, port=port, server=kind, name="product")
    write_image_context(str(folder), tmp_path / "image", options)
    found = dict(instructions((tmp_path / "image" / "Dockerfile").read_text()))
    variables = dict(item.split("=", 1) for item in shlex.split(found["ENV"]))
    healthy = json.loads(found["HEALTHCHECK"].partition("CMD ")[2])
    healthy[0] = sys.executable
    command = json.loads(found["ENTRYPOINT"])
    assert command[0] == kind
    path = str(tmp_path / "image" / "model")
    local = {"/opt/model": path, "product=/opt/model": f"product={path}", "0.0.0.0": "127.0.0.1"}
    environment = {
        **os.environ,
        **{name: value for name, value in variables.items() if name == "MLFLOW_PYFUNC_INFERENCE_CONFIG"},
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'mlflow.db'}",
    }
    assert subprocess.run(healthy, capture_output=True, check=False).returncode == 1
    address = f"http://127.0.0.1:{port}"
    x = networks.rows(3)
    command = [local.get(part, part) for part in command]
    # Where this runs in the background of a shell, SIGINT is ignored, by what is started, too.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    server = ServerProcess(command, environment, ready=f"{address}/ping")
    with running(server), Client(address) as client:
        # Linux keeps signals from the first process of a container for which it has no handler.
        caught = int(re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{server.pid}/status").read_text())[1], 16)
        assert caught & 1 << signal.Signals[found.get("STOPSIGNAL", "SIGTERM")] - 1
        assert subprocess.run(healthy, capture_output=True, check=False).returncode == 0
        served = client.predict({"x": x})["y"]
    with mlflow_trt.load_model(str(folder), runtime="onnxruntime") as session:
        assert np.array_equal(served, session.run({"x": x})["y"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"port": 0}, "port is 0; expected 1 to 65535"),
        ({"server": "triton"}, "server is 'triton'; choose one of mlflow-trt, mlflow"),
        ({"name": "a b"}, "name is 'a b'; expected letters"),
        ({"base": "image\nRUN evil"}, "base is .*; expected an image like nvidia/cuda"),
        ({"model_config": {"runtim": "auto"}}, "unknown load setting 'runtim'"),
        ({"wheels": ["nowhere.whl"]}, "wheels: nowhere.whl is no wheel"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(OptionError, match=message):
        ImageOptions(**options)


def test_nothing_is_written_over(folder, tmp_path):
    (tmp_path / "image").mkdir()
    (tmp_path / "image" / "Dockerfile").write_text("mine")
    with pytest.raises(OptionError, match="exists already"):
        write_image_context(str(folder), tmp_path / "image")
    assert [path.name for path in (tmp_path / "image").iterdir()] == ["Dockerfile"]


def test_from_the_command_line(folder, tmp_path):
    target = tmp_path / "my image"
    code, output, errors = run("dockerfile", folder, "--output", target, "--base", "my/cuda:1-{kind}")
    assert code == 0, errors
    assert ["docker", "build", "--tag", "NAME", str(target)] in [shlex.split(line) for line in output.splitlines()]
    text = (target / "Dockerfile").read_text()
    assert "FROM my/cuda:1-runtime AS build" in text
    found = dict(instructions(text))
    cache = dict(item.split("=", 1) for item in shlex.split(found["ENV"]))["MLFLOW_TRT_CACHE_DIR"]
    assert found["VOLUME"] == cache
    assert f"docker run --gpus all -p 8080:8080 -v NAME-cache:{cache} NAME" in output
    code, _, errors = run("dockerfile", folder, "--output", tmp_path / "other", "--model-config", "auto")
    assert code == 2
    assert 'expected JSON like {"runtime": "auto"}' in " ".join(errors.split())
