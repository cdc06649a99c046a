from __future__ import annotations

import hashlib
import shutil

import networks
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import mlflow_trt
from mlflow_trt import OnnxModelError
from mlflow_trt.convert.onnx.model import read_onnx, sha256_of


def saved(model, path):
    path.write_bytes(model.SerializeToString())
    return path


def test_describes_inputs_and_outputs(tmp_path):
    model = read_onnx(networks.every_dtype(), tmp_path)
    assert [str(spec) for spec in model.inputs] == [
        "u8: uint8[batch, 4]",
        "b: bool[batch, 4]",
        "i64: int64[batch, 4]",
        "i32: int32[batch, 4]",
        "f16: float16[batch, 4]",
        "scale: float32[]",
    ]
    assert model.outputs[0].fixed == (None, 4)


def test_a_dimension_of_minus_one_varies(tmp_path):
    proto = networks.product(batch=-1)
    assert read_onnx(proto, tmp_path).inputs[0].shape == (None, 16)


def test_initializers_are_no_inputs(tmp_path):
    proto = networks.product()
    proto.ir_version = 3
    proto.graph.input.append(networks.value("w", networks.FLOAT, [16, 8]))
    assert [spec.name for spec in read_onnx(proto, tmp_path).inputs] == ["x"]


def test_never_changes_the_callers_proto(tmp_path):
    proto = networks.product()
    before = proto.SerializeToString()
    read_onnx(proto, tmp_path)
    assert proto.SerializeToString() == before


def test_digest_is_that_of_the_file(tmp_path):
    path = saved(networks.product(), tmp_path / "a.onnx")
    assert read_onnx(path, tmp_path).digest == hashlib.sha256(path.read_bytes()).hexdigest()


def test_external_data_counts_for_the_digest_and_is_copied(tmp_path):
    path = tmp_path / "net" / "model.onnx"
    path.parent.mkdir()
    networks.external(path, folder="weights/")
    model = read_onnx(path, tmp_path)
    assert model.external_files == ("weights/weights.bin",)
    model.copy_to(tmp_path / "copy")
    copied = onnx.load(tmp_path / "copy" / "model.onnx")
    assert np.array_equal(
        onnx.numpy_helper.to_array(copied.graph.initializer[0]),
        onnx.numpy_helper.to_array(networks.product().graph.initializer[0]),
    )
    weights = path.parent / "weights" / "weights.bin"
    weights.write_bytes(weights.read_bytes()[::-1])
    assert read_onnx(path, tmp_path).digest != model.digest


def of_type(kind):
    def change(proto):
        proto.graph.input[0].type.tensor_type.elem_type = kind

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (of_type(TensorProto.UINT16), "input 'x' is of type uint16, which TensorRT does not have"),
        (of_type(TensorProto.STRING), "input 'x' is of type string"),
        (lambda proto: proto.graph.node[0].input.__setitem__(0, "nowhere"), "no valid ONNX model"),
        (lambda proto: proto.graph.ClearField("node"), "has a graph without nodes"),
        (of_type(99), "input 'x' is of type 99, which TensorRT does not have"),
        (lambda proto: proto.graph.input[0].type.tensor_type.ClearField("shape"), "input 'x' has no shape"),
    ],
)
def test_refuses_models_that_cannot_be_right(change, message, tmp_path):
    proto = networks.product()
    change(proto)
    with pytest.raises(OnnxModelError, match=message):
        read_onnx(proto, tmp_path)


def reshaped_to_what_comes_in() -> onnx.ModelProto:
    """A model whose output has as many dimensions as the input `shape` has values, which varies, too."""
    model = networks.reshaped()
    model.graph.input[1].type.tensor_type.shape.dim[0].dim_param = "rank"
    return model


@pytest.mark.parametrize("said", ["shape", "type"])
@pytest.mark.parametrize("external", [False, True])
def test_outputs_without_a_shape_get_the_one_that_follows(external, said, tmp_path):
    proto = networks.product(width=64)
    proto.graph.output[0].ClearField("type")
    if said == "shape":
        proto.graph.output[0].type.tensor_type.elem_type = networks.FLOAT
    path = tmp_path / "m.onnx"
    onnx.save_model(proto, path, save_as_external_data=external, location="w.bin", size_threshold=0)
    model = read_onnx(path, tmp_path)
    assert [str(spec) for spec in model.outputs] == ["y: float32[batch, 8]"]
    assert model.path.read_bytes() == path.read_bytes()


def test_shapes_that_onnx_does_not_know_are_asked_of_onnxruntime(tmp_path):
    proto = networks.product()
    proto.graph.node.append(helper.make_node("Gelu", ["y"], ["z"], domain="com.microsoft"))
    proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    proto.graph.output.append(onnx.ValueInfoProto(name="z"))
    assert [str(spec) for spec in read_onnx(proto, tmp_path).outputs] == ["y: float32[batch, 8]", "z: float32[?, 8]"]


def test_an_output_of_any_rank_is_refused(tmp_path):
    proto = reshaped_to_what_comes_in()
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    with pytest.raises(OnnxModelError, match="output 'y' has no shape.* neither onnx nor ONNX Runtime can tell it"):
        read_onnx(proto, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_outputs_without_a_shape_are_converted(precision, tmp_path):
    proto = networks.product(width=64)
    proto.opset_import[0].version = 11  # which is raised
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    rows = {"x": networks.rows(40, 64)}
    mlflow_trt.save_model(proto, tmp_path / "model", precision=precision, calibration_data=rows)
    with mlflow_trt.load_model(str(tmp_path / "model"), runtime="onnxruntime") as session:
        assert session.outputs[0].shape == ("batch", 8)
        assert session.run(rows)["y"].shape == (40, 8)  # in pieces: more than the largest batch


def test_refuses_sequences(tmp_path):
    proto = networks.model(
        [helper.make_node("SequenceConstruct", ["x"], ["y"])],
        [networks.value("x", networks.FLOAT, [1])],
        [helper.make_tensor_sequence_value_info("y", networks.FLOAT, [1])],
    )
    with pytest.raises(OnnxModelError, match="output 'y' is a sequence; TensorRT has only tensors"):
        read_onnx(proto, tmp_path)


@pytest.mark.parametrize("extension", ["onnx", "json", "textproto", "onnxtxt", "pb"])
def test_the_extension_of_a_file_does_not_matter(extension, tmp_path):
    path = saved(networks.product(), tmp_path / f"model.{extension}")
    assert read_onnx(path, tmp_path).inputs[0].name == "x"
    path.write_text('{"layers": 3}')
    with pytest.raises(OnnxModelError, match="no ONNX model"):
        read_onnx(path, tmp_path)


@pytest.mark.parametrize("location", ["MLmodel", "engines/weights.bin", "mlflow_trt.json", "typed/w"])
def test_refuses_weights_where_the_model_folder_has_something_else(location, tmp_path):
    (tmp_path / location).parent.mkdir(exist_ok=True)
    path = tmp_path / "net.onnx"
    onnx.save_model(networks.product(), path, save_as_external_data=True, location=location, size_threshold=0)
    with pytest.raises(OnnxModelError, match="a name that a model folder uses for something else"):
        read_onnx(path, tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no graph"),
        (b"Just a text file, and not a short one at that.", "no ONNX model"),
        (networks.product().SerializeToString()[:-100], "no ONNX model, or a truncated one"),
    ],
)
def test_refuses_files_that_are_no_onnx(content, message, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(OnnxModelError, match=message) as caught:
        read_onnx(path, tmp_path)
    assert caught.value.path == path
    assert str(path) in caught.value.message


def test_refuses_paths_without_a_file(tmp_path):
    with pytest.raises(OnnxModelError, match="does not exist"):
        read_onnx(tmp_path / "nothing.onnx", tmp_path)
    with pytest.raises(OnnxModelError, match="is a folder"):
        read_onnx(tmp_path, tmp_path)
    with pytest.raises(OnnxModelError, match="got int"):
        read_onnx(3, tmp_path)


def test_refuses_external_data_that_is_missing_truncated_or_elsewhere(tmp_path):
    path = tmp_path / "net.onnx"
    networks.external(path)
    weights = tmp_path / "weights.bin"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1])
    with pytest.raises(OnnxModelError, match="truncated"):
        read_onnx(path, tmp_path)
    weights.unlink()
    with pytest.raises(OnnxModelError, match=r"'weights.bin' with the weights of 'w' is missing"):
        read_onnx(path, tmp_path)
    proto = onnx.load(path, load_external_data=False)
    entries = {entry.key: entry for entry in proto.graph.initializer[0].external_data}
    entries["offset"].value = "3.5"
    with pytest.raises(OnnxModelError, match=r"the weights of 'w' have the offset '3.5'; expected a number"):
        read_onnx(saved(proto, path), tmp_path)
    for location in ("../weights.bin", "."):
        entries["location"].value = location
        with pytest.raises(OnnxModelError, match="must be in the folder of the model"):
            read_onnx(saved(proto, path), tmp_path)


@pytest.mark.parametrize("kind", ["file", "folder", "hard"])
def test_external_data_may_be_linked_within_the_folder_that_is_named(kind, tmp_path):
    real, given = tmp_path / "real", tmp_path / "given"
    (real / "sub").mkdir(parents=True)
    onnx.save_model(
        networks.product(), real / "net.onnx", save_as_external_data=True, location="sub/w.bin", size_threshold=0
    )
    (given if kind == "folder" else given / "sub").mkdir(parents=True)
    shutil.copyfile(real / "net.onnx", given / "net.onnx")
    if kind == "folder":
        (given / "sub").symlink_to(real / "sub")
    elif kind == "file":
        (given / "sub" / "w.bin").symlink_to(real / "sub" / "w.bin")
    else:
        (given / "sub" / "w.bin").hardlink_to(real / "sub" / "w.bin")
    (tmp_path / "work").mkdir()
    if kind != "hard":
        for allowed in (None, given, tmp_path / "work"):
            with pytest.raises(OnnxModelError, match=r"is a symbolic link to .*w\.bin, outside of the folder"):
                read_onnx(given / "net.onnx", tmp_path / "work", allow_external_data_from=allowed)
    linked = read_onnx(given / "net.onnx", tmp_path / "work", allow_external_data_from=real)
    onnx.checker.check_model(str(linked.path))
    assert linked.files["sub/w.bin"] == sha256_of(real / "sub" / "w.bin")


def test_links_within_the_folder_of_the_model_are_followed(tmp_path):
    networks.external(tmp_path / "net.onnx")
    (tmp_path / "weights.bin").rename(tmp_path / "other.bin")
    (tmp_path / "weights.bin").symlink_to("other.bin")
    (tmp_path / "work").mkdir()
    assert read_onnx(tmp_path / "net.onnx", tmp_path / "work").files["weights.bin"] == sha256_of(tmp_path / "other.bin")


def test_a_loop_of_links_is_refused(tmp_path):
    networks.external(tmp_path / "net.onnx")
    (tmp_path / "weights.bin").unlink()
    (tmp_path / "weights.bin").symlink_to("weights.bin")
    with pytest.raises(OnnxModelError, match="weights.bin"):
        read_onnx(tmp_path / "net.onnx", tmp_path)


def test_external_data_inside_functions_counts(tmp_path):
    """Local functions hold tensors too, of which a copy without their files would be useless."""
    proto = networks.product()
    held = onnx.TensorProto(name="held", dims=[4], data_type=networks.FLOAT, data_location=TensorProto.EXTERNAL)
    held.external_data.add(key="location", value="held.bin")
    node = helper.make_node("Constant", [], ["c"], value=held)
    proto.functions.append(helper.make_function("local", "f", [], ["c"], [node], [helper.make_opsetid("", 17)]))
    with pytest.raises(OnnxModelError, match=r"'held.bin' with the weights of 'held' is missing"):
        read_onnx(saved(proto, tmp_path / "net.onnx"), tmp_path)


def test_refuses_a_proto_whose_weights_are_gone(tmp_path):
    networks.external(tmp_path / "net.onnx")
    emptied = onnx.load(tmp_path / "net.onnx", load_external_data=False)
    with pytest.raises(OnnxModelError, match="Pass the path of the ONNX file instead"):
        read_onnx(emptied, tmp_path)


@pytest.mark.parametrize("name", [b"product", b"network", b"MatMul", b"batch", b"\x01x", b"\x01w", b"\x01y"], ids=repr)
def test_names_that_are_no_text_are_refused(name, tmp_path):
    damaged = name.replace(name.lstrip(b"\x01"), b"\xff" * len(name.lstrip(b"\x01")))
    path = tmp_path / "damaged.onnx"
    path.write_bytes(networks.product().SerializeToString().replace(name, damaged))
    with pytest.raises(OnnxModelError, match="is no text in UTF-8"):
        read_onnx(path, tmp_path)


@pytest.mark.parametrize("shape", [["batch", 2**31], ["batch", *[1] * 8]], ids=["large", "many"])
def test_dimensions_that_tensorrt_has_not_are_refused(shape, tmp_path):
    model = networks.model(
        [helper.make_node("Relu", ["x"], ["y"])],
        [networks.value("x", networks.FLOAT, shape)],
        [networks.value("y", networks.FLOAT, shape)],
    )
    with pytest.raises(OnnxModelError, match=r"TensorRT has up to 8 dimensions, each below 2\*\*31"):
        read_onnx(model, tmp_path)


@pytest.mark.parametrize("offset", ["9" * 5000, "-1", "0x10", "\u0663"])
def test_offsets_that_are_no_numbers_are_refused(offset, tmp_path):
    path = tmp_path / "net.onnx"
    onnx.save_model(networks.product(), path, save_as_external_data=True, location="w.bin", size_threshold=0)
    proto = onnx.load(path, load_external_data=False)
    next(entry for entry in proto.graph.initializer[0].external_data if entry.key == "offset").value = offset
    with pytest.raises(OnnxModelError, match="expected a number of bytes"):
        read_onnx(saved(proto, path), tmp_path)
