"""Every form that data comes in, and everything that may be wrong with it: the table of docs/inputs.md, by cell."""

from __future__ import annotations

import asyncio
import io
import json
import re

import httpx
import mlflow
import networks
import numpy as np
import pandas as pd
import pytest
from mlflow.pyfunc import scoring_server
from onnx import TensorProto
from repository import ROOT

import mlflow_trt
from mlflow_trt import InputError

CPU = {"runtime": "onnxruntime"}
PAGE = ROOT / "docs" / "inputs.md"
LABELS = [7, 3, 9]  # of a DataFrame that was filtered: no 0 among them

# What is given, in three rows of two: for which input, the rows, and which of them is to blame.
CASES = {
    "the input's own dtype": ("int64", [[1, 2], [3, 4], [5, 6]], None),
    "300, for uint8": ("uint8", [[1, 2], [300, 4], [5, 6]], 1),
    "-1, for uint8": ("uint8", [[1, 2], [3, 4], [5, -1]], 2),
    "255 as int64, for uint8": ("uint8", [[1, 2], [3, 4], [5, 255]], None),
    "2.0, for int64": ("int64", [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], None),
    "1.5, for int64": ("int64", [[1.0, 2.0], [3.0, 4.0], [1.5, 6.0]], 2),
    "2**40, for int32": ("int32", [[1, 2], [3, 4], [5, 2**40]], 2),
    "2**53 + 1 beside 4.0, for int64": ("int64", [[1, 2], [2**53 + 1, 4.0], [5, 6]], 1),
    "2**70, for int64": ("int64", [[1, 2], [3, 4], [5, 2**70]], 2),
    "a missing value, for int64": ("int64", [[1, 2], [3, None], [5, 6]], 1),
    "0.1 as float64, for float32": ("float32", [[0.1, 2.5], [3.25, 4.0], [5.0, 6.0]], None),
    "3 as int64, for float32": ("float32", [[1, 2], [3, 4], [5, 6]], None),
    "2**24 + 1, for float32": ("float32", [[1, 2], [2**24 + 1, 4], [5, 6]], 1),
    "1e300, for float32": ("float32", [[1.0, 2.0], [3.0, 1e300], [5.0, 6.0]], 1),
    "NaN, for float32": ("float32", [[1.0, 2.0], [3.0, float("nan")], [5.0, 6.0]], None),
    "a missing value, for float32": ("float32", [[1.0, 2.0], [3.0, None], [5.0, 6.0]], 1),
    "text": ("float32", [["one", "two"], ["three", "four"], ["five", "six"]], 0),
    "rows of 3 by 2, for 2 by 3": ("image", np.arange(18.0).reshape(3, 3, 2).tolist(), None),
    "rows of 2 by 3, for 2 by 3": ("image", np.arange(18.0).reshape(3, 2, 3).tolist(), None),
    "rows of 2 and of 1": ("int64", [[1, 2], [3], [5, 6]], 1),
}
TYPES = {
    "int64": (TensorProto.INT64, 2),
    "int32": (TensorProto.INT32, 2),
    "uint8": (TensorProto.UINT8, 2),
    "float32": (TensorProto.FLOAT, 2),
    "image": (TensorProto.FLOAT, 2, 3),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, (dtype, *row) in TYPES.items():
        mlflow_trt.save_model(networks.doubled(dtype, *row), folder / name, batch=(1, 2, 4), verify=False)
    return {name: mlflow.pyfunc.load_model(str(folder / name), model_config=CPU) for name in TYPES}


@pytest.fixture
def post(models, monkeypatch):
    """Ask MLflow's scoring server over the model for an input, in this process."""
    monkeypatch.setenv("_MLFLOW_IS_IN_SERVING_ENVIRONMENT", "true")  # which it sets, and nobody takes back

    def post(type_, **request):
        async def answered():
            transport = httpx.ASGITransport(app=scoring_server.init(models[type_]))
            async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
                return await client.post("/invocations", **request)

        return asyncio.run(answered())

    return post


def columns(rows):
    """A DataFrame with a column for each number of a row, and the labels of one that was filtered."""
    return pd.DataFrame(records(rows), index=LABELS)


def cells(rows, form):
    frame = pd.DataFrame({"x": pd.Series([form(row) for row in rows], dtype=object)})
    frame.index = LABELS
    return frame


def parquet(frame):
    body = io.BytesIO()
    frame.to_parquet(body)
    return {"content": body.getvalue(), "headers": {"Content-Type": "application/vnd.apache.parquet"}}


def posted(body):
    return {"content": json.dumps(body), "headers": {"Content-Type": "application/json"}}


def records(rows):
    return [dict(zip(("first", "second"), row, strict=False)) for row in rows]


# How rows are given in each form: to the model here, or as a request to its server.
HERE = {
    "array": np.array,
    "dict": lambda rows: {"x": np.array(rows)},
    "DataFrame of numbers": columns,
    "of lists": lambda rows: cells(rows, list),
    "of arrays": lambda rows: cells(rows, np.array),
}
THERE = {
    "`inputs`": lambda rows: posted({"inputs": {"x": rows}}),
    "`instances`": lambda rows: posted({"instances": [{"x": row} for row in rows]}),
    "`dataframe_split`": lambda rows: posted(
        {"dataframe_split": {"columns": ["x"], "index": LABELS, "data": [[row] for row in rows]}}
    ),
    "`dataframe_records`": lambda rows: posted({"dataframe_records": records(rows)}),
    "CSV": lambda rows: {"content": columns(rows).to_csv(index=False), "headers": {"Content-Type": "text/csv"}},
    "parquet": lambda rows: parquet(cells(rows, list)),
}


def table() -> list[tuple[str, str, str]]:
    """(what is given, form, what the page says happens), for each cell that says something."""
    lines = PAGE.read_text().partition("| given |")[2].partition("\n\n")[0].splitlines()
    forms = [form.strip().split(", ") for form in lines[0].strip(" |").split("|")]
    found = []
    for line in lines[2:]:
        given, *said = (cell.strip() for cell in line.strip("|").split("|"))
        assert len(said) == len(forms)
        found += [
            (given, form, answer) for several, answer in zip(forms, said, strict=True) for form in several if answer
        ]
    return found


TABLE = table()


def test_the_table_is_of_all_forms_and_all_cases():
    assert {given for given, _, _ in TABLE} == set(CASES)
    assert {form for _, form, _ in TABLE} == {*HERE, *THERE}
    # What has no such form: numbers that are no rows of two, which an array of numpy cannot hold, or parquet.
    assert len(TABLE) > 0.9 * len(CASES) * (len(HERE) + len(THERE))


@pytest.mark.parametrize(("given", "form", "said"), TABLE, ids=[f"{given}, {form}" for given, form, _ in TABLE])
def test_as_the_page_says(given, form, said, models, post):
    type_, rows, blamed = CASES[given]
    if form in HERE:
        data = HERE[form](rows)
        if said == "error":
            with pytest.raises(InputError) as caught:
                models[type_].predict(data)
            check_error(str(caught.value), form, rows, blamed)
            return
        answer = models[type_].predict(data)
        if isinstance(data, pd.DataFrame):
            assert list(answer.index) == LABELS
            answer = {"y": np.stack(answer["y"])}
    else:
        response = post(type_, **THERE[form](rows))
        assert response.status_code == (400 if said == "error" else 200), response.text
        if said == "error":
            check_error(response.json()["message"], form, rows, blamed)
            return
        predictions = response.json()["predictions"]
        answer = predictions if isinstance(predictions, dict) else {"y": [row["y"] for row in predictions]}
    assert said in {"computed", "NaN"}
    expected = 2 * np.array(rows, np.float32)
    assert np.isnan(expected).any() == (said == "NaN" or "NaN" in given)
    assert np.array_equal(np.array(answer["y"], np.float32), expected, equal_nan=True)


def check_error(message, form, rows, blamed):
    """It names the input or the column, and the row, where one is to blame, and quotes no value."""
    if "inhomogeneous" not in message:  # MLflow's own error, for JSON that is no array
        assert re.search(r"'(x|first|second)'", message)
        if blamed is not None:
            # pandas makes text of a column of CSV with a number that no integer type holds: of each value, or of all.
            is_text = form == "CSV" and "the value is of type str" in message
            assert f"row {blamed}" in message or is_text or "is of dtype <U5" in message
    for row in rows:
        for value in row:
            if isinstance(value, (int, float)) and abs(value) > 256:
                assert str(value) not in message
