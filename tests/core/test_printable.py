"""Names and texts from models and servers do not steer a terminal, a log or what reads them."""

from __future__ import annotations

import json
import logging
import shutil

import numpy as np
import onnx
import pytest
from helpers import read, reference
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from mlflow_trt import InputError
from mlflow_trt.cli import app
from mlflow_trt.core.log import get_logger
from mlflow_trt.core.printable import printable

CLEAR_SCREEN = "\x1b[2J\x1b]0;title\x07"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, and two\nlines", "plain, and two\nlines"),
        ("größer 図 🚀 é", "größer 図 🚀 é"),
        (CLEAR_SCREEN, r"\x1b[2J\x1b]0;title\x07"),
        ("a\rb\x85c\x9b31m", r"a\rb\x85c\x9b31m"),
        ("\u202eevil\u2066", r"\u202eevil\u2066"),
        ("half \udc80", r"half \udc80"),
    ],
)
def test_printable(text, shown):
    assert printable(text) == shown
    shown.encode()


def test_inspect_escapes_what_a_record_says(cls_folder, tmp_path, capfd):
    folder = shutil.copytree(cls_folder, tmp_path / "model")
    file = folder / "mlflow_trt.json"
    record = json.loads(file.read_text())
    record["remarks"] = [CLEAR_SCREEN, "half \udc80"]
    record["lineage"] = {"source": CLEAR_SCREEN}
    record["precision_report"]["kept"] = [{"name": CLEAR_SCREEN, "operator": "\u202e", "reason": "\udc80"}]
    file.write_text(json.dumps(record))
    shown = CliRunner().invoke(app, ["inspect", str(folder)])
    assert shown.exit_code == 0, shown.exception
    printed = shown.stdout + capfd.readouterr().out
    assert not {"\x1b", "\x07", "\u202e"} & set(printed)
    assert r"\x1b[2J" in printed
    assert r"\udc80" in printed
    assert CliRunner().invoke(app, ["inspect", "--json", str(folder)]).exit_code == 0


def test_messages_are_escaped(messages):
    log = get_logger("mlflow_trt.test")
    log.setLevel(logging.INFO)
    log.info("The node %s stays in float32: %.0f", CLEAR_SCREEN, 3.0)
    assert messages.messages == [r"The node \x1b[2J\x1b]0;title\x07 stays in float32: 3"]


def test_a_bad_request_leaves_no_line_of_onnxruntimes_in_the_log(tmp_path, capfd):
    """It would have colours, and the client's numbers."""
    graph = helper.make_graph(
        [helper.make_node("Gather", ["w", "i"], ["y"])],
        "gather",
        [helper.make_tensor_value_info("i", TensorProto.INT64, ["n"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"])],
        [numpy_helper.from_array(np.arange(4, dtype=np.float32), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    with reference(read(model, tmp_path)) as session:
        with pytest.raises(InputError, match="out of data bounds"):
            session.run({"i": np.array([98765])})
        captured = capfd.readouterr()
        assert captured.out + captured.err == ""
