"""Model repositories for Triton, read with Triton's own protobuf schema."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from dataclasses import replace

import networks
import numpy as np
import onnx
import pytest
from command_line import run
from engines import TENSORRT_PLAN, tensorrt_engine, with_engines
from google.protobuf import text_format
from onnx import TensorProto, helper
from wheel_files import wheel_file

import mlflow_trt
from mlflow_trt import EngineMismatchError, IntegrityError, OptionError, UnsupportedModelError
from mlflow_trt.backends.onnxruntime import CpuModel
from mlflow_trt.core.types import HardwareCompatibility, TensorSpec, Weights
from mlflow_trt.deploy.triton import export_triton
from mlflow_trt.deploy.triton_config import Layout, config_text
from mlflow_trt.store.folder import read_folder


@pytest.fixture(scope="session")
def schema():
    """Triton's model_config.proto, from the wheel of its client, whose other parts are not needed."""
    path = wheel_file("tritonclient==2.73.0", "tritonclient/grpc/model_config_pb2.py")
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def parse(schema):
    def parsed(text):
        return text_format.Parse(text, schema.ModelConfig())

    return parsed


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "ranks"
    mlflow_trt.save_model(networks.ranks(), path, batch=(1, 4, 8), verify=False)
    return path


def read(made, parse):
    return parse((made.path / "config.pbtxt").read_text())


def test_one_engine(folder, tmp_path, parse, schema):
    made = export_triton(with_engines(folder, tensorrt_engine()), tmp_path / "models", instances=2, queue_delay=500)
    assert made.files == ("1/model.plan", "config.pbtxt")
    assert made.remarks == ("needs a Triton with TensorRT 10.13.0",)
    assert (made.path / "1" / "model.plan").read_bytes() == TENSORRT_PLAN
    config = read(made, parse)
    assert (config.name, config.backend, config.max_batch_size) == ("ranks", "tensorrt", 8)
    assert config.default_model_filename == "model.plan"
    assert not config.cc_model_filenames
    inputs = {tensor.name: tensor for tensor in config.input}
    assert list(inputs["image"].dims) == [2, 3]
    assert inputs["image"].data_type == schema.TYPE_FP32
    # Triton has no tensors without dimensions: the batch axis of this one is all it has.
    assert list(inputs["count"].dims) == [1]
    assert inputs["count"].HasField("reshape")
    assert not inputs["count"].reshape.shape
    assert inputs["count"].data_type == schema.TYPE_INT64
    assert [(tensor.name, list(tensor.dims)) for tensor in config.output] == [
        ("scaled", [2, 3]), ("sums", [2]), ("total", [1]), ("doubled", [1]),
    ]  # fmt: skip
    (group,) = config.instance_group
    assert (group.count, group.kind, list(group.profile)) == (2, schema.ModelInstanceGroup.KIND_GPU, [])
    assert list(config.dynamic_batching.preferred_batch_size) == [4, 8]
    assert config.dynamic_batching.max_queue_delay_microseconds == 500
    assert [warmup.batch_size for warmup in config.model_warmup] == [4, 8]
    assert config.model_warmup[0].inputs["image"].random_data
    assert list(config.model_warmup[0].inputs["image"].dims) == [2, 3]
    assert config.model_warmup[0].inputs["count"].zero_data
    assert list(config.model_warmup[0].inputs["count"].dims) == [1]


def test_engines_by_compute_capability(folder, tmp_path, parse):
    everywhere = tensorrt_engine("sm80plus", compute_capabilities=("sm80",), file="engines/everywhere.plan",
                        hardware_compatibility=HardwareCompatibility.AMPERE_PLUS)  # fmt: skip
    uri = with_engines(
        folder,
        *read_folder(folder).record.engines,  # TensorRT-RTX's
        tensorrt_engine("sm86"),
        tensorrt_engine("sm86", file="engines/another-sm86.plan"),
        tensorrt_engine("sm90"),
        everywhere,
        tensorrt_engine("sm75", "10.12.0.1"),
        tensorrt_engine("sm89", weights=Weights.STRIPPED),
    )
    made = export_triton(uri, tmp_path / "models", name="model")
    config = read(made, parse)
    assert config.name == made.path.name == "model"
    assert dict(config.cc_model_filenames) == {
        "8.0": "everywhere.plan",
        "8.6": "tensorrt-10.13.0.35-sm86.plan",
        "9.0": "tensorrt-10.13.0.35-sm90.plan",
    }
    assert config.default_model_filename == "everywhere.plan"
    assert {f"1/{file}" for file in config.cc_model_filenames.values()} == set(made.files) - {"config.pbtxt"}
    for reason in ("built by TensorRT-RTX", "another-sm86.plan: .*sm86.plan is for sm86", "newer", "without weights"):
        assert any(re.search(f"left out .*{reason}", remark) for remark in made.remarks), reason


def test_engines_of_tensorrt_rtx_are_refused_with_the_reason(folder, tmp_path):
    with pytest.raises(EngineMismatchError, match="built by TensorRT-RTX.*backend='onnxruntime' exports") as caught:
        export_triton(str(folder), tmp_path / "models")
    assert len(caught.value.reasons) == 1
    assert not any((tmp_path / "models").rglob("*"))


def test_the_onnx_model_instead(folder, tmp_path, parse, schema):
    made = export_triton(str(folder), tmp_path / "models", backend="onnxruntime")
    config = read(made, parse)
    assert (config.backend, config.default_model_filename, config.max_batch_size) == ("onnxruntime", "model.onnx", 8)
    assert config.instance_group[0].kind == schema.ModelInstanceGroup.KIND_AUTO
    feeds = networks.ranks_feeds(3)
    outputs = CpuModel(made.path / "1" / "model.onnx").run(["total"], feeds)
    assert np.allclose(outputs["total"], (feeds["image"] * feeds["gain"][..., None]).sum((1, 2)), rtol=1e-5)


def test_outputs_as_onnx_runtime_infers_them(tmp_path, parse):
    """Triton compares them exactly, and exporters give names to sizes that can be inferred."""
    model = networks.product()
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_param = "Gemmy_dim_1"
    mlflow_trt.save_model(model, tmp_path / "product", batch=(1, 4, 8), verify=False)
    made = export_triton(str(tmp_path / "product"), tmp_path / "models", backend="onnxruntime")
    (output,) = read(made, parse).output
    assert list(output.dims) == [8]
    assert (made.max_batch_size, made.remarks) == (8, ())


def test_a_model_that_onnx_runtime_cannot_be_asked_about(tmp_path, parse, monkeypatch):
    mlflow_trt.save_model(networks.product(), tmp_path / "product", batch=(1, 4, 8), verify=False)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    made = export_triton(str(tmp_path / "product"), tmp_path / "models", backend="onnxruntime")
    assert list(read(made, parse).output[0].dims) == [8]
    assert re.search("the shapes of outputs have to be .*: ONNX Runtime is not installed", made.remarks[0])


@pytest.mark.slow
def test_the_model_of_the_precision_with_its_external_data(tmp_path):
    weights = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    model = networks.model(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        [networks.value("x", TensorProto.FLOAT, ["batch", 64])],
        [networks.value("y", TensorProto.FLOAT, ["batch", 64])],
        [networks.constant("w", weights)],
    )
    (tmp_path / "weights").mkdir()
    onnx.save(model, tmp_path / "big.onnx", save_as_external_data=True, size_threshold=0, location="weights/big.bin")
    mlflow_trt.save_model(tmp_path / "big.onnx", tmp_path / "model", batch=(1, 4, 8), verify=False)
    made = export_triton(str(tmp_path / "model"), tmp_path / "models", backend="onnxruntime")
    x = networks.rows(3, 64)
    assert np.allclose(CpuModel(made.path / "1" / "model.onnx").run(["y"], {"x": x})["y"], x @ weights, atol=1e-4)

    mlflow_trt.save_model(networks.product(), tmp_path / "half", batch=(1, 4, 8), precision="fp16", verify=False)
    made = export_triton(str(tmp_path / "half"), tmp_path / "models", backend="onnxruntime")
    initializers = onnx.load(made.path / "1" / "model.onnx").graph.initializer
    assert TensorProto.FLOAT16 in {initializer.data_type for initializer in initializers}
    mlflow_trt.save_model(networks.product(), tmp_path / "brain", batch=(1, 4, 8), precision="bf16", verify=False)
    made = export_triton(str(tmp_path / "brain"), tmp_path / "models", backend="onnxruntime")
    assert made.remarks == ("the source model, since ONNX Runtime has few kernels for bf16",)


def test_several_profiles(tmp_path, parse):
    shapes = [
        {"input_ids": ((1, 4), (4, 8), (8, 16))},
        {"input_ids": ((1, 16), (2, 32), (4, 64))},
    ]
    mlflow_trt.save_model(networks.transformer(), tmp_path / "text", shapes=shapes, verify=False)
    made = export_triton(with_engines(tmp_path / "text", tensorrt_engine()), tmp_path / "models")
    config = read(made, parse)
    assert list(config.instance_group[0].profile) == ["0", "1"]
    # Triton would put 8 requests of 32 tokens together, too, which fit no profile.
    assert config.max_batch_size == made.max_batch_size == 4
    assert any("takes 4 rows at once, and not 8" in remark for remark in made.remarks)
    assert list(config.dynamic_batching.preferred_batch_size) == [2, 4]
    assert {tensor.name: list(tensor.dims) for tensor in config.input} == {"input_ids": [-1], "attention_mask": [-1]}
    warmups = [(warmup.batch_size, list(warmup.inputs["input_ids"].dims)) for warmup in config.model_warmup]
    assert warmups == [(4, [8]), (2, [32]), (4, [32])]

    made = export_triton(str(tmp_path / "text"), tmp_path / "onnx", backend="onnxruntime")
    assert (made.max_batch_size, made.remarks) == (8, ())


@pytest.mark.parametrize(
    ("batches", "largest"),
    [
        ([(1, 1, 1), (1, 32, 64)], 64),
        ([(1, 1, 1), (2, 32, 64)], 64),
        ([(8, 16, 16), (1, 4, 8)], 16),
        ([(1, 2, 4), (8, 8, 16)], 4),  # none takes 5
        ([(2, 2, 4), (4, 8, 16)], 0),  # nor 1
    ],
)
def test_profiles_of_different_batches(batches, largest, tmp_path, parse):
    shapes = [{"x": ((low, 16), (usual, 16), (high, 16))} for low, usual, high in batches]
    mlflow_trt.save_model(networks.product(), tmp_path / "product", shapes=shapes, verify=False)
    config = read(export_triton(with_engines(tmp_path / "product", tensorrt_engine()), tmp_path / "models"), parse)
    assert config.max_batch_size == largest
    assert all(warmup.batch_size <= max(largest, 1) for warmup in config.model_warmup)
    assert all(size <= largest for size in config.dynamic_batching.preferred_batch_size)


def test_what_has_no_rows_in_common_is_not_put_together(tmp_path, parse):
    shapes = {"x": ((1, 1), (4, 4), (8, 8))}
    mlflow_trt.save_model(networks.scaled_by_a_scalar(), tmp_path / "scalar", shapes=shapes, verify=False)
    made = export_triton(str(tmp_path / "scalar"), tmp_path / "models", backend="onnxruntime")
    config = read(made, parse)
    assert config.max_batch_size == 0
    assert not config.HasField("dynamic_batching")
    assert {tensor.name: list(tensor.dims) for tensor in config.input} == {"x": [-1, -1], "k": [1]}
    # "cannot have empty reshape for non-batching model", says Triton, whose ONNX Runtime knows that k is a scalar.
    assert not any(tensor.HasField("reshape") for tensor in (*config.input, *config.output))
    assert [(warmup.batch_size, list(warmup.inputs["x"].dims)) for warmup in config.model_warmup] == [(1, [4, 4])]
    assert any("will not put requests together" in remark for remark in made.remarks)


def test_what_has_no_dimensions_is_not_for_tensorrt_there(tmp_path):
    shapes = {"x": ((1, 1), (4, 4), (8, 8))}
    mlflow_trt.save_model(networks.scaled_by_a_scalar(), tmp_path / "scalar", shapes=shapes, verify=False)
    with pytest.raises(UnsupportedModelError, match="'k' has no dimensions.*take backend='onnxruntime'"):
        export_triton(with_engines(tmp_path / "scalar", tensorrt_engine()), tmp_path / "models")
    assert not any((tmp_path / "models").rglob("*"))


def test_a_static_batch_is_not_padded_by_triton(tmp_path, parse):
    mlflow_trt.save_model(networks.product(), tmp_path / "product", batch=8, verify=False)
    config = read(export_triton(with_engines(tmp_path / "product", tensorrt_engine()), tmp_path / "models"), parse)
    assert config.max_batch_size == 0
    assert list(config.input[0].dims)[1:] == [16]
    assert list(config.model_warmup[0].inputs["x"].dims) == [8, 16]


def test_shape_tensors_are_warmed_up_with_their_values(tmp_path, parse):
    shapes = {"x": ((2, 16), (4, 16), (8, 16)), "shape": ((2, 1), (16, 4), (64, 16))}
    mlflow_trt.save_model(networks.reshaped(), tmp_path / "reshaped", shapes=shapes, verify=False)
    made = export_triton(with_engines(tmp_path / "reshaped", tensorrt_engine()), tmp_path / "models")
    config = read(made, parse)
    assert {tensor.name: tensor.is_shape_tensor for tensor in config.input} == {"x": False, "shape": True}
    warmup = config.model_warmup[0].inputs["shape"]
    content = (made.path / "warmup" / warmup.input_data_file).read_bytes()
    assert np.frombuffer(content, np.int64).tolist() == [16, 4]
    assert list(warmup.dims) == [2]


def test_names_with_quotes_and_types_that_triton_lacks(folder, parse):
    record = read_folder(folder).record
    odd = TensorSpec(name='a "b" \\ ü', dtype="float32", shape=("batch", 3))
    layout = Layout(name="m", backend="tensorrt", default_file="model.plan")
    assert parse(config_text(replace(record, outputs=(odd,)), layout)).output[0].name == odd.name
    with pytest.raises(UnsupportedModelError, match="'t' is of dtype float8_e4m3fn, which Triton does not have"):
        config_text(replace(record, outputs=(TensorSpec(name="t", dtype="float8_e4m3fn", shape=("batch",)),)), layout)


class TestNothingIsWritten:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"backend": "python"}, "backend is 'python'; choose one of tensorrt, onnxruntime"),
            ({"instances": 0}, "instances is 0; expected 1 or more"),
            ({"queue_delay": -1}, "queue_delay is -1; expected 0 or more"),
            *(
                ({"backend": "onnxruntime", "name": name}, "expected the name of a folder in the repository")
                for name in ("../x", "..", "a/b", "/proc/x")
            ),
        ],
    )
    def test_where_options_make_no_sense(self, options, message, folder, tmp_path):
        before = set(tmp_path.rglob("*"))
        with pytest.raises(OptionError, match=message):
            export_triton(str(folder), tmp_path / "models", **options)
        assert set(tmp_path.rglob("*")) == before

    def test_over_another_model(self, folder, tmp_path):
        export_triton(str(folder), tmp_path / "models", backend="onnxruntime")
        with pytest.raises(OptionError, match="exists already; name another repository, or another name="):
            export_triton(str(folder), tmp_path / "models", backend="onnxruntime")

    def test_when_a_plan_was_changed(self, folder, tmp_path):
        uri = with_engines(folder, tensorrt_engine(), tensorrt_engine("sm90"))
        (folder / tensorrt_engine("sm90").file).write_bytes(b"changed")
        with pytest.raises(IntegrityError):
            export_triton(uri, tmp_path / "models")
        assert not any((tmp_path / "models").rglob("*"))

    def test_without_a_name(self, tmp_path):
        with pytest.raises(OptionError, match="tells no name for the model; give one with name="):
            export_triton("runs:/1/model", tmp_path)


def test_from_the_command_line(store, tmp_path):
    mlflow_trt.log_model(networks.product(), name="p", registered_model_name="p-trt", batch=(1, 4, 8), verify=False)
    environment = {"MLFLOW_TRACKING_URI": store.uri}
    arguments = ("export-triton", "models:/p-trt/1", "--repository", tmp_path / "models")
    code, _, errors = run(*arguments, **environment)
    assert code == 1
    assert "--backend onnxruntime" in errors
    code, output, errors = run(*arguments, "--backend", "onnxruntime", "--json", **environment)
    assert code == 0, errors
    assert json.loads(output)["files"] == ["1/model.onnx", "config.pbtxt"]
    assert (tmp_path / "models" / "p-trt" / "config.pbtxt").is_file()


def test_float64_is_what_each_file_has_of_it(tmp_path, parse, schema):
    def told(backend, folder):
        made = export_triton(str(folder), tmp_path / backend / folder.name, backend=backend)
        config = parse((made.path / "config.pbtxt").read_text())
        return {tensor.data_type for tensor in (*config.input, *config.output)}

    for precision in ("fp32", "bf16"):
        mlflow_trt.save_model(
            networks.wide_product(), tmp_path / precision, batch=(1, 4, 8), precision=precision, verify=False
        )
    assert told("onnxruntime", tmp_path / "fp32") == {schema.TYPE_FP32}
    assert told("onnxruntime", tmp_path / "bf16") == {schema.TYPE_FP64}  # the source model
    assert told("mlflow_trt", tmp_path / "fp32") == {schema.TYPE_FP64}
    with_engines(tmp_path / "fp32", tensorrt_engine())
    assert told("tensorrt", tmp_path / "fp32") == {schema.TYPE_FP32}
