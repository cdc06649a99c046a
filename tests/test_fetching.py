"""Models by path and by URI; test_flavor.py has those of the store and what is no model of this flavor."""

from __future__ import annotations

import shutil

import pytest

from mlflow_trt.artifact import read_folder
from mlflow_trt.fetching import fetch_folder, is_of_this_flavor, opened_folder, read_record


@pytest.mark.parametrize("name", ["plain", "a%20b"])
@pytest.mark.parametrize("as_uri", [False, True])
def test_a_local_folder_is_read_where_it_is(magika_folder, tmp_path, name, as_uri):
    folder = shutil.copytree(magika_folder, tmp_path / name)
    uri = folder.as_uri() if as_uri else str(folder)
    record = read_folder(folder).record
    assert read_record(uri) == record
    assert is_of_this_flavor(uri)
    with opened_folder(uri) as opened:
        assert (opened.path, opened.record) == (folder, record)
    assert fetch_folder(uri).path.samefile(folder)


def test_what_is_not_of_this_flavor(magika_folder):
    assert not is_of_this_flavor(str(magika_folder / "MLmodel"))
    assert not is_of_this_flavor(str(magika_folder.parent))
    assert not is_of_this_flavor("no/such/file.onnx")
