"""Whatever comes from outside ends in a result or in a typed error: what hypothesis makes, and all that fuzzing found.

`make fuzz` runs the same targets for as long as you like, led by what their code does.
"""

from __future__ import annotations

import copy
import json
import shutil
import string

import fuzz_targets as targets
import networks
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

# The same inputs each time, however slow the machine is; `make fuzz` is for others.
FEW, MANY = (
    settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
    )
    for count in (200, 1000)
)

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)
VALUES = JSON | st.binary(max_size=8) | st.tuples(st.integers(), st.integers(), st.integers()) | st.just(1j)
SYNTAX = st.text(st.sampled_from("xy1290:,.-+x=\"' ") | st.characters(), max_size=40)


@st.composite
def damaged(draw, content: bytes) -> bytes:
    """The content with a few of its bytes exchanged, left out or repeated."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        kind = draw(st.sampled_from(["set", "cut", "insert", "repeat"]))
        if kind == "set" and data:
            data[at] = draw(st.integers(0, 255))
        elif kind == "cut":
            del data[at : at + draw(st.integers(1, 64))]
        elif kind == "insert":
            data[at:at] = draw(st.binary(max_size=16))
        else:
            data[at:at] = data[at : at + draw(st.integers(1, 64))]
    return bytes(data)


@st.composite
def changed(draw, value):
    """JSON in which a few places hold something else."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        inner = value
        while True:
            keys = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if not isinstance(inner[key], (dict, list)) or draw(st.integers(0, 3)) == 0:
                inner[key] = draw(JSON)
                break
            inner = inner[key]
    return value


@pytest.fixture(scope="module")
def record(cls_folder) -> dict:
    return json.loads((cls_folder / "mlflow_trt.json").read_text())


@FEW
@given(damaged(networks.product().SerializeToString()) | damaged(networks.transformer(1).SerializeToString()[:4000]))
def test_onnx_files(data):
    targets.onnx_file(data)


@pytest.mark.exhaustive
@pytest.mark.slow
@MANY
@given(st.data())
def test_records(record, data):
    targets.record(json.dumps(data.draw(changed(record))).encode())


@FEW
@given(st.data())
def test_mlmodels(cls_folder, data):
    targets.mlmodel(data.draw(damaged((cls_folder / "MLmodel").read_bytes())))


@FEW
@given(st.data())
def test_golden_samples(cls_folder, data):
    targets.golden(data.draw(damaged((cls_folder / "golden.npz").read_bytes()[:20_000])))


@pytest.mark.slow
@MANY
@given(
    st.dictionaries(
        st.sampled_from(sorted(targets.Recipe.__dataclass_fields__)),
        VALUES | st.sampled_from(["fp16", "int8", "best", (1, 2, 3), [[1], [2], [3]]]),
        max_size=3,
    )
)
def test_recipes(options):
    targets.recipe(options)


@pytest.mark.slow
@MANY
@given(st.dictionaries(st.sampled_from(sorted(targets.LoadSettings.__dataclass_fields__)), VALUES, max_size=3))
def test_load_settings(values):
    targets.settings(values)


@pytest.mark.slow
@MANY
@given(SYNTAX)
def test_syntaxes_of_the_command_line(text):
    targets.command_line(text)


@FEW
@given(st.lists(st.sampled_from([o.name for o in targets.translate.__globals__["OPTIONS"]]), max_size=4), SYNTAX)
def test_lines_of_trtexec(options, value):
    targets.command_line(" ".join(f"{option}={value}" for option in options))


CELLS = (
    SCALARS
    | st.binary(max_size=70)
    | st.lists(SCALARS, max_size=17)
    | st.lists(st.lists(st.floats(width=32), max_size=3), max_size=3)
    | st.just(np.zeros(16, np.float32))
    | st.sampled_from([pd.NaT, pd.NA, np.datetime64("nat"), 2**70, np.float16(1), 1j, object()])
)


@pytest.mark.slow
@MANY
@given(st.lists(CELLS, min_size=1, max_size=4), st.sampled_from(["x", 0, None, "y"]))
def test_frames(cells, column):
    targets.pyfunc_input(pd.DataFrame({column: pd.Series(cells, dtype=object)}))


@FEW
@given(st.dictionaries(st.sampled_from(["x", "y", ""]), CELLS, max_size=2) | CELLS)
def test_other_inputs(data):
    targets.pyfunc_input(data)


@pytest.mark.exhaustive
@pytest.mark.slow
@MANY
@given(st.data())
def test_bodies_of_open_inference(data):
    targets.infer_body(json.dumps(data.draw(changed(targets.REQUEST))).encode())


@FEW
@given(st.data(), st.integers(0, 400))
def test_binary_bodies_of_open_inference(data, length):
    header = copy.deepcopy(targets.REQUEST)
    del header["inputs"][0]["data"]
    header["inputs"][0]["parameters"]["binary_data_size"] = data.draw(st.integers(-1, 70))
    text = json.dumps(header).encode()
    targets.infer_body(text + data.draw(st.binary(max_size=70)), data.draw(st.sampled_from([length, len(text)])))


@FEW
@given(st.data())
def test_bodies_of_mlflow(data):
    body = data.draw(
        changed({"inputs": {"x": [[0.5] * 16]}})
        | changed({"instances": [{"x": [0.5] * 16}]})
        | changed({"dataframe_split": {"columns": ["x"], "data": [[[0.5] * 16]]}})
    )
    targets.invocations_body(json.dumps(body).encode())


@pytest.mark.exhaustive
@pytest.mark.slow
@MANY
@given(JSON | st.dictionaries(st.sampled_from(["predictions", "message", "detail"]), JSON))
def test_answers(value):
    targets.answer(json.dumps(value).encode())


@FEW
@given(st.binary(max_size=200) | st.text(string.printable, max_size=200).map(str.encode))
def test_bytes_that_are_nothing(data):
    for target in targets.BY_BYTES.values():
        target(data)


FOUND = [
    # MLflow quotes the data in its error, which pandas cannot show with such columns.
    ("invocations", b'{"dataframe_split": {"columns": [{}], "data": [null]}}'),
    ("invocations", b'{"dataframe_split": {"columns": [{}], "data": [[{}]]}}'),
    ("invocations", b'{"dataframe_split": {"columns": [{}], "data": [[1.5]]}}'),
]
"""Inputs for which something else than a typed error was raised."""


@pytest.mark.parametrize(("target", "data"), FOUND, ids=repr)
def test_what_fuzzing_found(target, data):
    targets.BY_BYTES[target](data)


def test_what_fuzzing_begins_with():
    for name, contents in targets.seeds().items():
        for content in contents:
            targets.BY_BYTES[name](content)


def teardown_module():
    shutil.rmtree(targets.folder(), ignore_errors=True)
