"""One model on several servers, with requests that are written beforehand."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
import requests
from onnx import TensorProto, helper
from typing_extensions import Self

import mlflow_trt
from benchmarks.load import Connection, as_bytes
from examples.serving import Server, ServerProcess, TensorServer
from mlflow_trt.core import open_inference as oip
from mlflow_trt.core import tensor_wire, wire

Arrays = dict[str, npt.NDArray[np.generic]]
NAME = "model"
_PREFIX = "mlflow-trt-benchmark-"
_TOLERANCE = 0.02  # of the largest value: fp16 passes, another model's numbers do not


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is asked: a model's folder, what goes in, and what has to come out."""

    name: str
    folder: Path
    feeds: Arrays
    expected: Arrays
    own_ms: float
    """The median of a call of the session itself, without a server."""


def nothing(row: Sequence[int], outputs: int) -> onnx.ModelProto:
    """A model that does nothing: it answers the first numbers of each row."""
    nodes = [
        helper.make_node("Flatten", ["x"], ["numbers"]),  # also of no rows
        helper.make_node("Slice", ["numbers", "start", "end", "axis"], ["y"]),
    ]
    constants = {"start": [0], "end": [outputs], "axis": [1]}
    graph = helper.make_graph(
        nodes,
        "nothing",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *row])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", outputs])],
        [helper.make_tensor(name, TensorProto.INT64, [len(value)], value) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


@dataclass(kw_only=True)
class Target:
    """A server, what each of its clients sends, and how an answer is read."""

    name: str
    server: ServerProcess
    requests: wire.Request | Sequence[wire.Request]
    read: Callable[[bytes], Arrays]

    @property
    def first(self) -> wire.Request:
        return self.requests if isinstance(self.requests, wire.Request) else self.requests[0]

    def check(self, expected: Arrays) -> None:
        """Compare an answer with what has to come out. Raises RuntimeError."""
        status, body = Connection(self.server.address).ask(as_bytes(self.first, self.server.address))
        if status != 200:
            raise RuntimeError(f"{self.name} answers {status}: {body[:2000].decode(errors='replace')}")
        answer = self.read(body)
        for name, array in expected.items():
            off = float(np.abs(np.subtract(answer[name], array)).max() / np.abs(array).max())
            if answer[name].shape != array.shape or not off < _TOLERANCE:
                raise RuntimeError(f"{self.name} answers {name!r} with an error of {off:.2g} of the largest value")


def mlflow_server(folder: Path, settings: Mapping[str, Any], workdir: Path) -> ServerProcess:
    """`mlflow models serve`, with what makes it fastest."""
    return Server(
        str(folder),
        f"sqlite:///{workdir / 'mlflow.db'}",
        {**settings, "answers": "base64"},
        workers=1,
        environment={"UVICORN_LOOP": "uvloop"},
    )


def our_server(folder: Path, settings: Mapping[str, Any], front_ends: int = 0) -> ServerProcess:
    """`mlflow-trt serve`."""
    options = ["--shared-memory-prefix", _PREFIX, "--front-ends", str(front_ends)]
    return TensorServer(f"{NAME}={folder}", model_config=settings, options=options)


def triton_server(folder: Path, settings: Mapping[str, Any], workdir: Path) -> ServerProcess | None:
    """A tritonserver with `--backend mlflow_trt`, where one can be had."""
    sys.path[:0] = [str(Path(__file__).resolve().parent.parent / "tests" / "support")]
    import pytest
    import triton_server as real

    from mlflow_trt.deploy.triton import export_triton

    export_triton(str(folder), workdir / "models", name=NAME, backend="mlflow_trt", model_config=settings)
    try:
        server = real.TritonServer(workdir / "models", workdir, [])
    except pytest.skip.Exception as reason:
        print(f"Left out: Triton: {reason}")
        return None
    server.address = f"http://{server.http}"
    return server


def parquet_target(server: ServerProcess, feeds: Arrays) -> Target:
    return Target(
        name="mlflow models serve", server=server, requests=wire.parquet_request(feeds), read=wire.decode_answer
    )


def binary_target(name: str, server: ServerProcess, feeds: Arrays) -> Target:
    described = requests.get(f"{server.address}/v2/models/{NAME}", timeout=60).content
    request = tensor_wire.infer_request(feeds, tensor_wire.described_model(NAME, described))

    def read(body: bytes) -> Arrays:
        return tensor_wire.decode_answer(body, _header_length(body), {})

    return Target(name=name, server=server, requests=request, read=read)


@contextlib.contextmanager
def shared_target(name: str, server: ServerProcess, case: Case, clients: int) -> Iterator[Target]:
    """A server of ours, with inputs and outputs of each client in memory of its own, written beforehand."""
    with contextlib.ExitStack() as stack:
        regions = [stack.enter_context(_Region(server, case)) for _ in range(clients)]
        asked = [region.request for region in regions]
        yield Target(name=name, server=server, requests=asked, read=lambda _: regions[0].outputs())


@dataclass
class _Region:
    """Memory that one client shares, with its inputs in it and room for its outputs."""

    server: ServerProcess
    case: Case
    name: str = field(default_factory=lambda: str(uuid.uuid4()))

    def __post_init__(self) -> None:
        self._places: dict[str, int] = {}
        size = 0
        for name, array in (*self.case.feeds.items(), *self.case.expected.items()):
            self._places[name] = size
            size += -(-array.nbytes // 64) * 64
        self._memory = SharedMemory(f"{_PREFIX}{self.name}", create=True, size=size)
        for name, array in self.case.feeds.items():
            start = self._places[name]
            self._memory.buf[start : start + array.nbytes] = oip.raw(array)
        self._tell("register", {"key": f"/{_PREFIX}{self.name}", "offset": 0, "byte_size": size})

    @property
    def request(self) -> wire.Request:
        inputs = [self._described(name, array) for name, array in self.case.feeds.items()]
        outputs = [self._described(name, array) for name, array in self.case.expected.items()]
        content = json.dumps({"inputs": inputs, "outputs": outputs}).encode()
        return wire.Request(content=content, content_type=wire.JSON, path=f"/v2/models/{NAME}/infer")

    def outputs(self) -> Arrays:
        found = {}
        for name, array in self.case.expected.items():
            start = self._places[name]
            data = bytes(self._memory.buf[start : start + array.nbytes])
            found[name] = np.frombuffer(data, array.dtype).reshape(array.shape)
        return found

    def _described(self, name: str, array: npt.NDArray[np.generic]) -> dict[str, Any]:
        place = {
            "shared_memory_region": self.name,
            "shared_memory_offset": self._places[name],
            "shared_memory_byte_size": array.nbytes,
        }
        datatype = oip.DATATYPES[array.dtype.name]
        return {"name": name, "datatype": datatype, "shape": list(array.shape), "parameters": place}

    def _tell(self, what: str, content: dict[str, Any]) -> None:
        address = f"{self.server.address}/v2/systemsharedmemory/region/{self.name}/{what}"
        requests.post(address, json=content, timeout=60).raise_for_status()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._tell("unregister", {})
        self._memory.close()
        self._memory.unlink()


class CpuSeconds(NamedTuple):
    """What a server's processes, those of its group and its front ends, used of the CPU so far; the first one alone."""

    all: float
    first: float

    @classmethod
    def of(cls, server: ServerProcess) -> CpuSeconds:
        ticks = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
            except OSError:  # it ended
                continue
            parent, group = fields[1:3]
            if str(server.pid) in (parent, group):
                ticks[int(stat.parent.name)] = int(fields[11]) + int(fields[12])
        second = os.sysconf("SC_CLK_TCK")
        return cls(sum(ticks.values()) / second, ticks.get(server.pid, 0) / second)

    def since(self, before: CpuSeconds) -> CpuSeconds:
        return CpuSeconds(self.all - before.all, self.first - before.first)


def resident_bytes(pid: int | str = "self") -> int:
    """Memory of a process, this one if none is named."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def save(model: Path | onnx.ModelProto, folder: Path, recipe: Mapping[str, Any]) -> None:
    mlflow_trt.save_model(model, folder, verify=False, **recipe)


def _header_length(body: bytes) -> str | None:
    """How long the JSON is that a body begins with: what the header of the answer says, which is not kept."""
    _, end = json.JSONDecoder().raw_decode(body.decode("latin-1"))
    return str(end)
