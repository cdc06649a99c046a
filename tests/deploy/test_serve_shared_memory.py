"""`mlflow-trt serve --shared-memory-prefix`: tensors in memory that Triton's client shares with the server."""

from __future__ import annotations

import os
import resource
import uuid
from contextlib import contextmanager, suppress
from pathlib import Path

import networks
import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.utils.shared_memory as shm
from servers import TensorServer

import mlflow_trt
from examples.serving import running
from mlflow_trt.deploy.serve.shared_memory import Region, SharedMemory
from mlflow_trt.errors import InputError, OptionError

pytestmark = pytest.mark.server

CPU = {"runtime": "onnxruntime"}
PREFIX = f"mlflow-trt-test-{os.getpid()}-"


@pytest.fixture(scope="module")
def server(product_folder):
    server = TensorServer(str(product_folder), model_config=CPU, options=["--shared-memory-prefix", PREFIX])
    with running(server):
        yield server


@pytest.fixture
def client(server):
    with triton.InferenceServerClient(server.address.removeprefix("http://")) as client:
        yield client
        client.unregister_system_shared_memory()


@contextmanager
def region(size, prefix=PREFIX):
    key = f"/{prefix}{uuid.uuid4()}"
    made = shm.create_shared_memory_region("a region", key, size)
    try:
        yield key, made
    finally:
        shm.destroy_shared_memory_region(made)


def tensor_in(name, rows, offset=0):
    tensor = triton.InferInput("x", [rows, 16], "FP32")
    tensor.set_shared_memory(name, rows * 64, offset)
    return tensor


def output_in(name, size, offset=0):
    output = triton.InferRequestedOutput("y")
    output.set_shared_memory(name, size, offset)
    return output


@pytest.mark.parametrize("rows", [1, 3, 65])
def test_inputs_and_outputs(rows, client, product_folder):
    x = networks.rows(rows)
    with mlflow_trt.load_model(str(product_folder), runtime="onnxruntime") as session:
        expected = session.run({"x": x})["y"]
    with region(rows * 64 + rows * 32 + 128) as (key, made):
        shm.set_shared_memory_region(made, [x], offset=64)
        client.register_system_shared_memory("all", key, rows * 96 + 128)
        (told,) = client.get_system_shared_memory_status()
        assert (told["name"], told["key"], told["byte_size"]) == ("all", key, rows * 96 + 128)
        place = 64 + rows * 64
        answer = client.infer("product", [tensor_in("all", rows, 64)], outputs=[output_in("all", rows * 32, place)])
        (output,) = answer.get_response()["outputs"]
        assert output["parameters"]["shared_memory_byte_size"] == rows * 32
        found = shm.get_contents_as_numpy(made, np.float32, [rows, 8], offset=place)
        assert found.tobytes() == expected.tobytes()
        mixed = client.infer("product", [tensor_in("all", rows, 64)]).as_numpy("y")
        assert mixed.tobytes() == expected.tobytes()
        client.unregister_system_shared_memory("all")
        with pytest.raises(triton.InferenceServerException, match="there is no shared memory region 'all'"):
            client.infer("product", [tensor_in("all", rows, 64)])


def test_what_is_refused(client):
    with region(256) as (key, _):
        client.register_system_shared_memory("small", key, 200, offset=56)
        for error, inputs, outputs in (
            ("beyond the 200 bytes", [tensor_in("small", 4)], None),
            ("beyond the 200 bytes", [tensor_in("small", 1, 190)], None),
            (
                "output 'y' has 32 bytes, and its place in shared memory 16",
                [tensor_in("small", 1)],
                [output_in("small", 16)],
            ),
            ("there is no shared memory region 'other'", [tensor_in("other", 1)], None),
        ):
            with pytest.raises(triton.InferenceServerException, match=error):
                client.infer("product", inputs, outputs=outputs)
        for error, name, wanted, size in (
            ("is registered already", "small", key, 8),
            ("has 256 bytes, and not 257", "more", key, 257),
            ("is not called as this server", "other", "/some-other", 8),
            ("is not called as this server", "other", f"/{PREFIX}/../passwd", 8),
            ("cannot be opened: No such file", "other", f"/{PREFIX}nothing", 8),
        ):
            with pytest.raises(triton.InferenceServerException, match=error):
                client.register_system_shared_memory(name, wanted, size)
        os.truncate(f"/dev/shm{key}", 100)
        with pytest.raises(triton.InferenceServerException, match="has 100 bytes, and not 256"):
            client.infer("product", [tensor_in("small", 1)])
        assert client.is_server_ready()
        os.truncate(f"/dev/shm{key}", 256)
        assert client.infer("product", [tensor_in("small", 1)]).as_numpy("y").shape == (1, 8)
    assert "system_shared_memory" in client.get_server_metadata()["extensions"]


def test_more_than_there_is_room_for(client):
    """What was made larger than it can become ends whoever writes there: a server that was given it for an output."""
    left = os.statvfs("/dev/shm")
    size = (left.f_blocks + 1) * left.f_frsize
    if not left.f_blocks:
        pytest.skip("/dev/shm has no limit")
    with region(64) as (key, _):
        os.truncate(f"/dev/shm{key}", size)
        with pytest.raises(triton.InferenceServerException, match="would take .* bytes more, and /dev/shm has .* left"):
            client.register_system_shared_memory("large", key, size)
        client.register_system_shared_memory("large", key, 64)
        assert client.infer("product", [tensor_in("large", 1)]).as_numpy("y").shape == (1, 8)


def test_a_name_that_no_file_has():
    with pytest.raises(InputError, match="cannot be opened: no file is called so"):
        SharedMemory(PREFIX).register("other", {"key": f"/{PREFIX}\ud800", "byte_size": 8})


def test_more_than_can_be_mapped(monkeypatch):
    with region(64) as (key, _):
        try:
            os.truncate(f"/dev/shm{key}", 1 << 48)
        except OSError:
            pytest.skip("/dev/shm takes no file of more than there are addresses for")
        monkeypatch.setattr(os, "fstatvfs", lambda file: os.statvfs_result([4096, 4096, *[0] * 8]))  # without a limit
        with pytest.raises(InputError, match=f"the shared memory '{key}' cannot be mapped"):
            Region(key, 0, 1 << 48)


def test_one_open_file_for_each_region():
    with region(64) as (key, _):

        def opened():
            count = 0
            for file in Path("/proc/self/fd").iterdir():
                with suppress(FileNotFoundError):
                    count += file.readlink() == Path(f"/dev/shm{key}")
            return count

        before = opened()
        regions = [Region(key, 0, 64) for _ in range(3)]
        assert opened() == before + 3
        view = regions[0].view(16, 8)
        del regions
        assert opened() == before + 1
        view[:] = b"12345678"  # memory that is used stays
        assert Path(f"/dev/shm{key}").read_bytes()[16:24] == b"12345678"
        del view
        assert opened() == before


def test_as_many_regions_as_files_allow(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (6, 6))
    few = SharedMemory(PREFIX)
    with region(64) as (key, _):
        for number in range(3):
            few.register(f"region {number}", {"key": key, "byte_size": 8})
        with pytest.raises(InputError, match="3 regions are registered, and no more may be; unregister some"):
            few.register("another", {"key": key, "byte_size": 8})


@pytest.mark.parametrize("prefix", ["", "/", "a/b"])
def test_prefixes_that_make_no_sense(prefix):
    with pytest.raises(OptionError, match="shared_memory_prefix"):
        SharedMemory(prefix)
