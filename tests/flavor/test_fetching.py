"""Models by path and by URI; test_flavor.py has those of the store and what is no model of this flavor."""

from __future__ import annotations

import shutil

import mlflow
import networks
import onnx
import pytest

from mlflow_trt.errors import ArtifactError
from mlflow_trt.flavor.fetch import fetch_folder, is_of_this_flavor, open_folder, read_record
from mlflow_trt.registry.sources.open import open_source
from mlflow_trt.store.folder import read_folder


@pytest.mark.parametrize("name", ["plain", "a%20b"])
@pytest.mark.parametrize("as_uri", [False, True])
def test_a_local_folder_is_read_where_it_is(magika_folder, tmp_path, name, as_uri):
    folder = shutil.copytree(magika_folder, tmp_path / name)
    uri = folder.as_uri() if as_uri else str(folder)
    record = read_folder(folder).record
    assert read_record(uri) == record
    assert is_of_this_flavor(uri)
    with open_folder(uri) as opened:
        assert (opened.path, opened.record) == (folder, record)
    assert fetch_folder(uri).path.samefile(folder)
    (tmp_path / "copies").mkdir()
    copied = fetch_folder(uri, str(tmp_path / "copies"))
    assert copied.record == record
    assert not copied.path.samefile(folder)


@pytest.mark.parametrize("name", ["plain", "a%20b"])
@pytest.mark.parametrize("as_uri", [False, True])
def test_a_local_source_may_have_any_name(tmp_path, name, as_uri):
    mlflow.onnx.save_model(networks.product(), tmp_path / name, pip_requirements=["onnx"])
    onnx.save(networks.product(), tmp_path / f"{name}.onnx")
    for path in (tmp_path / name, tmp_path / f"{name}.onnx"):
        with open_source(path.as_uri() if as_uri else str(path)) as source:
            assert onnx.load(source.path).graph == networks.product().graph


def test_what_is_not_of_this_flavor(magika_folder):
    assert not is_of_this_flavor(str(magika_folder / "MLmodel"))
    assert not is_of_this_flavor(str(magika_folder.parent))
    assert not is_of_this_flavor("no/such/file.onnx")


@pytest.mark.parametrize("read", [read_record, fetch_folder, lambda uri: open_folder(uri).__enter__()])
def test_a_path_of_nothing(read, tmp_path):
    with pytest.raises(ArtifactError, match="nothing does not exist; expected the folder of a model, or a URI like"):
        read(str(tmp_path / "nothing"))
