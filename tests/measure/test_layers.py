"""Layers of engines, from answers in the form that TensorRT's engine inspector documents."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import networks
import pytest
from command_line import run

import mlflow_trt
from mlflow_trt import ExecutionError
from mlflow_trt.measure.layers import Layer, LayerReport, page, parse, with_times

DETAILED = json.dumps(
    {
        "Layers": [
            {
                "Name": "conv1 + relu<1>",
                "LayerType": "CaskConvolution",
                "Inputs": [
                    {"Name": "x", "Location": "Device", "Dimensions": [8, 3, 224, 224], "Format/Datatype": "Row major"}
                ],
                "Outputs": [{"Name": "y", "Location": "Device", "Dimensions": [8, 64, 112, 112], "Format": "Half"}],
                "ParameterType": "Convolution",
                "TacticName": "sm80_xmma_fprop",
                "StreamId": 0,
                "Metadata": "[ONNX Layer: conv1]",
            },
            {"Name": "shape", "LayerType": "Constant", "Inputs": [], "Outputs": [{"Name": "s", "Dimensions": []}]},
        ],
        "Bindings": ["x", "y"],
    }
)


def report() -> LayerReport:
    layers = with_times(parse(DETAILED), {"conv1 + relu<1>": 0.75, "reformat": 0.25})
    return LayerReport(model="models:/m/1", description="TensorRT on a GPU", rows=8, layers=layers)


def test_objects():
    first, second = parse(DETAILED)
    assert (first.name, first.kind, first.tactic) == ("conv1 + relu<1>", "CaskConvolution", "sm80_xmma_fprop")
    assert str(first.inputs[0]) == "x 8x3x224x224 Row major"
    assert str(first.outputs[0]) == "y 8x64x112x112 Half"
    assert second.inputs == ()


def test_names_alone():
    assert parse(json.dumps({"Layers": ["a", "b"], "Bindings": []})) == (Layer(name="a"), Layer(name="b"))


@pytest.mark.parametrize("answer", ["", "[]", "{}", '{"Layers": [{}]}', '{"Layers": 5}'])
def test_other_forms_are_an_error(answer):
    with pytest.raises(ExecutionError, match="in a form that is not known"):
        parse(answer)


def test_times_find_their_layers():
    assert [(layer.name, layer.milliseconds) for layer in report().layers] == [
        ("conv1 + relu<1>", 0.75),
        ("shape", None),
        ("reformat", 0.25),
    ]


def test_the_slowest_come_first_with_their_place_in_the_engine():
    assert [(place, layer.name) for place, layer in report().slowest_first()] == [
        (0, "conv1 + relu<1>"),
        (2, "reformat"),
        (1, "shape"),
    ]


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text.append(data.strip())


def test_the_page_stands_alone():
    parsed = Page()
    parsed.feed(page(report()))
    assert {"conv1 + relu<1>", "models:/m/1", "75.0%", "0.2500"} <= set(parsed.text)
    assert parsed.tags.count("tr") == 4
    assert not {"script", "link", "img", "iframe"} & set(parsed.tags)
    assert not {"src", "href"} & {name for name, _ in parsed.attributes}


def test_without_times_there_are_no_bars():
    assert "<div" not in page(LayerReport(model="m", description="d", rows=1, layers=parse(DETAILED)))


def test_without_a_gpu_the_layers_are_those_of_the_network(tmp_path):
    mlflow_trt.save_model(networks.product(), tmp_path / "model", batch=4, precision="fp16", verify=False)
    code, output, errors = run("inspect", tmp_path / "model", "--layers", "--json", CUDA_VISIBLE_DEVICES="")
    assert code == 0, errors
    assert "the layers before TensorRT fuses them" in errors
    found = json.loads(output)
    assert found["rows"] is None
    (product,) = [layer for layer in found["layers"] if layer["kind"] == "MATRIX_MULTIPLY"]
    assert product["name"] == "product"
    assert [tensor["format"] for tensor in product["outputs"]] == ["float16"]
    assert product["outputs"][0]["shape"] == [-1, 8]
    code, output, errors = run("inspect", tmp_path / "model", "--layers", "--html", tmp_path / "l.html",
                               CUDA_VISIBLE_DEVICES="", COLUMNS="80")  # fmt: skip
    assert code == 0, errors
    assert "MATRIX_MULTIPLY" in output
    assert "product" in (tmp_path / "l.html").read_text()


def test_a_model_of_another_flavor_has_no_layers(tmp_path):
    (tmp_path / "m.onnx").write_bytes(networks.product().SerializeToString())
    code, _, errors = run("inspect", tmp_path / "m.onnx", "--layers", CUDA_VISIBLE_DEVICES="")
    assert code == 1
    assert "no engine with layers" in errors
