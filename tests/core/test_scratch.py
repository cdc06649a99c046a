"""What processes leave when they are killed, and who removes it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import networks
import pytest
from repository import SUPPORT
from tiers import exhaustive

import mlflow_trt
from mlflow_trt.core.files import write_whole
from mlflow_trt.core.output_folder import write_aside
from mlflow_trt.core.scratch import scratch_folder

pytestmark = pytest.mark.slow

STOP = "(Path(sys.argv[1]) / 'made').touch(); print('made', flush=True); sys.stdin.read()"
FOLDER = f"""
with scratch_folder() as folder:
    (folder / "weights").write_bytes(b"0" * 1000)
    {STOP}
"""
OUTPUT = f"""
with write_aside(Path(sys.argv[1]) / "model") as folder:
    (folder / "weights").write_bytes(b"0" * 1000)
    {STOP}
"""
FILE = f"""
class Slow(bytearray):
    pass
import mlflow_trt.core.files as files
held = files.held
@contextlib.contextmanager
def stopped(path):
    with held(path):
        {STOP}
        yield
files.held = stopped
write_whole(Path(sys.argv[1]) / "plan", b"plan")
"""
PREAMBLE = """
import contextlib, sys
from pathlib import Path
from mlflow_trt.core.files import write_whole
from mlflow_trt.core.output_folder import write_aside
from mlflow_trt.core.scratch import scratch_folder
"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def test_a_conversion_that_was_killed_leaves_nothing_to_the_next(folder):
    """Killed by the kernel, which asks nobody: while TensorRT builds."""
    script = f"""
import os, signal, sys
sys.path[:0] = {[str(SUPPORT)]}
import mlflow_trt, networks
mlflow_trt.save_model(networks.product(), sys.argv[1], precision="fp16",
                      progress=lambda event: os.kill(os.getpid(), signal.SIGKILL))
"""
    killed = subprocess.run([sys.executable, "-c", script, str(folder / "model")], check=False)
    assert killed.returncode == -signal.SIGKILL
    left = list(folder.glob("mlflow-trt-*"))
    assert len(left) > 1
    mlflow_trt.save_model(networks.product(), folder / "model")
    names = {path.name for path in folder.iterdir()}
    assert "model" in names
    assert not [name for name in names if name.startswith(("mlflow-trt-", ".model."))]


def begun(what: str, folder: Path) -> subprocess.Popen[str]:
    """A process that is in the middle of something."""
    process = subprocess.Popen(
        [sys.executable, "-c", PREAMBLE + what, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "made\n"
    (folder / "made").unlink()
    return process


def ended(process: subprocess.Popen[str], number: int) -> None:
    process.send_signal(number)
    process.communicate()


def the_next(what: str, folder: Path) -> None:
    if what == FOLDER:
        with scratch_folder():
            pass
    elif what == OUTPUT:
        with write_aside(folder / "model") as aside:
            (aside / "weights").touch()
    else:
        write_whole(folder / "plan", b"plan")


@pytest.mark.parametrize("what", [FOLDER, *exhaustive(OUTPUT, FILE)], ids=["temporary folder", "output folder", "file"])
def test_what_a_killed_process_left_is_removed_by_the_next(what, folder):
    process = begun(what, folder)
    (left,) = folder.iterdir()
    assert f"{process.pid}-" in left.name
    the_next(what, folder)
    assert left.exists()  # its process is at work
    ended(process, signal.SIGKILL)
    the_next(what, folder)
    assert not left.exists()
    assert {path.name for path in folder.iterdir()} <= {"model", "plan"}


@pytest.mark.exhaustive
def test_what_another_container_holds_stays(folder):
    """The number in its name is that of no process here, as seen from another container; its lock tells."""
    process = begun(FOLDER, folder)
    (left,) = folder.iterdir()
    foreign = left.rename(folder / f"mlflow-trt-{2**22 + 1}-abcdefgh")
    the_next(FOLDER, folder)
    assert foreign.exists()
    ended(process, signal.SIGKILL)
    the_next(FOLDER, folder)
    assert not foreign.exists()


@pytest.mark.parametrize("name", ["mlflow-trt-abcdefgh", f"mlflow-trt-{2**22 + 1}", f"other-{2**22 + 1}-abcdefgh"])
def test_what_has_another_name_stays(name, folder):
    (folder / name).mkdir()
    the_next(FOLDER, folder)
    assert (folder / name).is_dir()


def test_what_a_link_leads_to_stays(folder):
    (folder / "precious").mkdir()
    (folder / "precious" / "file").touch()
    (folder / f"mlflow-trt-{2**22 + 1}-abcdefgh").symlink_to(folder / "precious")
    the_next(FOLDER, folder)
    assert (folder / "precious" / "file").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user")
def test_what_another_user_left_stays(folder):
    left = folder / f"mlflow-trt-{2**22 + 1}-abcdefgh"
    left.mkdir()
    os.chown(left, 12345, 12345)
    the_next(FOLDER, folder)
    assert left.exists()


def test_an_empty_folder_on_another_device_is_filled(tmp_path):
    elsewhere = Path("/dev/shm")  # a device of its own, where there is one
    if not elsewhere.is_dir() or elsewhere.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second device")
    target = Path(tempfile.mkdtemp(dir=elsewhere))
    try:
        (tmp_path / "model").symlink_to(target)
        with write_aside(tmp_path / "model") as folder:
            (folder / "engines").mkdir()
            (folder / "engines" / "plan").write_bytes(b"plan")
            (folder / "MLmodel").write_text("flavors")
        assert (target / "engines" / "plan").read_bytes() == b"plan"
        assert (target / "MLmodel").read_text() == "flavors"
        assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
    finally:
        shutil.rmtree(target)
