from __future__ import annotations

import concurrent.futures

import networks
import numpy as np
import onnx.reference
import pytest
from helpers import read, reference
from onnx import helper

from mlflow_trt import ExecutionError, InputError, RuntimeUnavailableError, SessionClosedError
from mlflow_trt.backends.onnxruntime_worker import saturates
from mlflow_trt.convert.onnx.reference import reference_outputs


def test_runs_every_dtype(tmp_path):
    model = networks.every_dtype()
    feeds = networks.every_dtype_feeds(3)
    with reference(read(model, tmp_path)) as session:
        outputs = session.run(feeds)
    expected = onnx.reference.ReferenceEvaluator(model).run(None, feeds)
    for spec, array in zip(session.outputs, expected, strict=True):
        assert outputs[spec.name].dtype.name == spec.dtype
        assert np.allclose(outputs[spec.name], array, rtol=1e-2)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("fpu sse2 avx2", True), ("avx2 avx512f avx512_vnni", False), ("avx2 avx_vnni", False), (None, False)],
)
def test_cpus_whose_integer_kernels_saturate_are_told_apart(flags, expected):
    line = "" if flags is None else f"flags\t\t: {flags}\n"
    assert saturates(f"processor\t: 0\nmodel name\t: a CPU\n{line}bugs\t\t: avx512_vnni\n") is expected


def test_the_reference_of_what_comes_quantized_is_computed_node_by_node(tmp_path):
    """The kernels that ONNX Runtime fuses such nodes into saturate on CPUs without VNNI; onnx's reference has none."""
    model = networks.quantized_twice()
    model.opset_import[0].version = 21  # the oldest that onnx's reference computes
    rows = networks.rows(64) * 3
    (outputs,) = reference_outputs(read(model, tmp_path), [{"x": rows}])
    (expected,) = onnx.reference.ReferenceEvaluator(model).run(None, {"x": rows})
    assert np.array_equal(outputs["y"], expected)


def test_close_may_be_called_twice_and_ends_use(tmp_path):
    session = reference(read(networks.product(), tmp_path))
    assert "open" in repr(session)
    session.close()
    session.close()
    with pytest.raises(SessionClosedError, match="load the model again"):
        session.run({"x": networks.rows(1)})
    assert "closed" in repr(session)


def test_many_threads_one_session(tmp_path):
    with reference(read(networks.product(), tmp_path)) as session:
        batches = [networks.rows(n % 7 + 1, seed=n) for n in range(64)]
        expected = [session.run({"x": batch})["y"] for batch in batches]
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            actual = list(pool.map(lambda batch: session.run({"x": batch})["y"], batches))
    assert all(np.array_equal(one, two) for one, two in zip(expected, actual, strict=True))


def test_what_onnxruntime_refuses_is_an_input_error(tmp_path):
    model = networks.model(
        [helper.make_node("Add", ["a", "b"], ["c"])],
        [networks.value("a", networks.FLOAT, [None]), networks.value("b", networks.FLOAT, [None])],
        [networks.value("c", networks.FLOAT, [None])],
    )
    with reference(read(model, tmp_path)) as session, pytest.raises((InputError, ExecutionError), match="ONNX Runtime"):
        session.run({"a": np.ones(2, np.float32), "b": np.ones(3, np.float32)})


def test_what_onnxruntime_cannot_load_is_an_error(tmp_path):
    model = networks.product()
    model.graph.node[0].domain = "no.such.domain"
    model.opset_import.append(helper.make_opsetid("no.such.domain", 1))
    with pytest.raises(ExecutionError, match="cannot run this model"):
        reference(read(model, tmp_path))


def test_bfloat16_inputs_need_tensorrt(tmp_path):
    with pytest.raises(RuntimeUnavailableError, match="cannot exchange bfloat16 arrays with Python, which 'x' needs"):
        reference(read(networks.bfloat16_product(), tmp_path))


def test_arrays_on_the_gpu_are_for_tensorrt(tmp_path):
    with (
        reference(read(networks.product(), tmp_path)) as session,
        pytest.raises(RuntimeUnavailableError, match="takes no arrays on the GPU; only runtime='tensorrt' does"),
    ):
        session.run_on_device({"x": networks.rows(1)})
