"""A session: one loaded model on one runtime. Arrays in, arrays out, closed explicitly."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, Protocol

import numpy as np
import numpy.typing as npt
from typing_extensions import Self

from mlflow_trt.core.arrays import Feeds, Outputs
from mlflow_trt.core.forking import check_not_forked, generation, keep_in_forks
from mlflow_trt.core.inputs import InputCheck
from mlflow_trt.core.nvtx import marked
from mlflow_trt.core.types import TensorSpec
from mlflow_trt.errors import NotPicklableError, RuntimeUnavailableError, SessionClosedError
from mlflow_trt.runtime.batching.shared_work import Work
from mlflow_trt.runtime.batching.submissions import Done, Submission

if TYPE_CHECKING:
    from mlflow_trt.runtime.cuda.device_array import DeviceArray


_OF_PROTOS = frozenset({"SerializeToString", "graph", "ir_version", "metadata_props", "opset_import"})
"""What is asked of a model where `mlflow.onnx.load_model` stood before."""


class Runner(Protocol):
    """What a session runs feeds with, which are checked already: a scheduler, or those of several GPUs as one."""

    @property
    def runs(self) -> dict[int, int]:
        """How often each batch size was run so far."""

    def run(self, feeds: Feeds) -> Outputs:
        """New arrays."""

    def submit(self, feeds: Feeds, done: Done) -> Submission:
        """Run feeds without letting the caller wait; `done` is told what came of it."""

    def work(self, feeds: Feeds) -> Work | None:
        """A batch that takes several runs, for several runners to take part in; None for any other feeds."""

    def take_part(self, work: Work) -> None:
        """Run pieces until none is left. Raises after giving back what was not finished."""

    def close(self) -> None:
        """Refuse new calls, and wait for those that run."""


class Session(abc.ABC):
    """A loaded model. May be shared between threads; close it, or use it in a `with` statement.

    Attributes:
        runtime: `tensorrt` or `onnxruntime`.
        inputs: the model's inputs, in the order of the graph.
        outputs: its outputs.
        fallback_reason: why TensorRT does not run it, where `runtime="auto"` chose another runtime; else None.
    """

    runtime: ClassVar[str]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def __init__(
        self,
        runner: Runner,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        *,
        taken: Sequence[TensorSpec] | None = None,
    ) -> None:
        """`taken` are the inputs as `runner` takes them: it may have float32 where the model has float64."""
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        self._taken = tuple(inputs if taken is None else taken)
        self._input_check = InputCheck(self._taken)
        self._wide = [spec.name for spec in outputs if spec.dtype == "float64"]
        self.fallback_reason: str | None = None
        self._runner = runner
        self._closed = False
        self._generation = generation()
        keep_in_forks(self)

    @marked("run")
    def run(self, inputs: Mapping[str, npt.ArrayLike]) -> dict[str, npt.NDArray[np.generic]]:
        """Run the model on arrays in host memory.

        Args:
            inputs: for each of `self.inputs` an array of its dtype and shape, or what numpy makes one of. Other numbers
                are converted where that loses nothing but a float's last digits: 3.0 for an integer, float64 for
                float32. A batch of any size is run in pieces, and padded, where rows do not depend on each other.

        Returns:
            For each of `self.outputs` a new array of its dtype, which the caller owns.

        Raises:
            InputError: an input is missing or unknown.
            InputDtypeError: one has a dtype that cannot be converted without loss, or NaN where an integer is expected.
            InputShapeError: one has a shape that no optimization profile takes.
            ExecutionError: the runtime failed.
            OutOfMemoryError: it lacked memory.
            SessionClosedError: after `close()`.
            RuntimeUnavailableError: in a process that was forked after the model was loaded.
        """
        self._check_open()
        return self._widened(self._runner.run(self._input_check.prepare(inputs)))

    def submit(self, inputs: Mapping[str, npt.ArrayLike], done: Done) -> Submission:
        """Run the model like `run`, but return at once: for servers, which need no thread for each request.

        Requests that come together run together, with those of threads that call `run`, too.

        Args:
            inputs: as for `run`. They must not change until `done` is called.
            done: called once, with the outputs and None, or with None and the error: what `run` returns or raises. A
                thread of the session or of another caller calls it, so it should not take long; where the system has
                no thread to give, this call does, before it returns. What it raises is logged.

        Returns:
            What can be cancelled: then `done` is not called, and nothing runs that does not run already.

        Raises:
            InputError: as `run` does.
            SessionClosedError: after `close()`. Requests that wait for their turn at that time end with this error.
        """
        self._check_open()
        return self._runner.submit(self._input_check.prepare(inputs), self._widening(done) if self._wide else done)

    def run_on_device(self, inputs: Mapping[str, Any]) -> dict[str, DeviceArray]:  # noqa: ARG002  # for those that can
        """Run the model on arrays that are on the session's GPU; the outputs stay there, one new array for each.

        Args:
            inputs: by name, contiguous and of the dtypes of `self.inputs`, with float32 for float64: anything with
                `__dlpack__` (torch, cupy, jax) or `__cuda_array_interface__`.

        Raises:
            RuntimeUnavailableError: the session does not run on TensorRT.
            InputError: an input is missing, unknown, elsewhere, or of a dtype, shape or layout that does not fit.
            ExecutionError: the runtime failed, or the engine has inputs or outputs on the host.
        """
        raise RuntimeUnavailableError(f"{self.description} takes no arrays on the GPU; only runtime='tensorrt' does")

    @property
    def runs(self) -> dict[int, int]:
        """How often each batch size was run so far: what padding, cutting and putting calls together came to.

        0 stands for runs of a model whose batch is not cut.
        """
        return self._runner.runs

    def warm_up(self) -> None:  # noqa: B027  # a runtime that compiles nothing has nothing to do
        """Do ahead of time what the first calls of each batch size would have to do."""

    def close(self) -> None:
        """Free everything this session holds, after the calls that run. May be called more than once."""
        if not self._closed:
            self._closed = True
            if self._generation == generation():  # what a forked process has is not its own to free
                self._release()

    def broken(self) -> str | None:
        """Why nothing can run any more until another process loads the model; None where nothing speaks against it."""
        return None

    @property
    @abc.abstractmethod
    def description(self) -> str:
        """What executes the model, for people: the runtime, its version and the device."""

    def _release(self) -> None:
        self._runner.close()

    def _widened(self, outputs: Outputs) -> Outputs:
        """With the float64 that the model has and TensorRT has not."""
        for name in self._wide:
            outputs[name] = outputs[name].astype(np.float64, copy=False)
        return outputs

    def _widening(self, done: Done) -> Done:
        return lambda outputs, error: done(None if outputs is None else self._widened(outputs), error)

    def _check_open(self) -> None:
        if self._closed:
            raise SessionClosedError
        check_not_forked(self._generation, "this model")

    if not TYPE_CHECKING:  # to a type checker, it would be an answer to every name

        def __getattr__(self, name: str) -> NoReturn:
            advice = "; mlflow.onnx.load_model returns the onnx.ModelProto, which has it" if name in _OF_PROTOS else ""
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}{advice}")

    def __reduce__(self) -> NoReturn:
        raise NotPicklableError(
            "a loaded model cannot be pickled or copied: it holds a runtime of this process. Pass its URI, and load it "
            "where it is used; threads may share one"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "open"
        return f"<{type(self).__name__} {state}: {self.description}>"
