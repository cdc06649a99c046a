"""Conversions in a registry that takes as little as Unity Catalog does, and of models that were registered later."""

from __future__ import annotations

import mlflow
import networks
import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.models import infer_signature
from unity_catalog import unity_catalog

import mlflow_trt
from mlflow_trt.flavor.fetch import read_record
from mlflow_trt.flavor.undo import versions_of
from mlflow_trt.pipeline.options import ConversionOptions
from mlflow_trt.registry.convert_all import convert_all

CPU = {"runtime": "onnxruntime"}
SOURCE, TARGET = "main.ml.product", "main.ml.product-trt"


@pytest.fixture
def catalog(store, tmp_path, empty_database):
    with unity_catalog(tmp_path, empty_database):
        yield MlflowClient()


def register(name=SOURCE, width=16, **more):
    x = networks.rows(2, width)
    signature = infer_signature(x, networks.rows(2, 8))
    mlflow.onnx.log_model(networks.product(width=width), name="product", registered_model_name=name,
                          signature=signature, pip_requirements=["onnx"], **more)  # fmt: skip


def numbers(client, name):
    return [int(version.version) for version in versions_of(client, name)]


def statuses(outcomes):
    return {outcome.source: outcome.status for outcome in outcomes}


class TestUnityCatalog:
    def test_it_refuses_what_unity_catalog_refuses(self, catalog):
        register()
        for query in ({"order_by": ["version_number DESC"]}, {"filter_string": f"name = '{SOURCE}' and tags.a = 'b'"}):
            with pytest.raises(MlflowException, match=r"[Uu]nsupported"):
                catalog.search_model_versions(**query)
        with pytest.raises(MlflowException, match="'filter_string' is unsupported"):
            catalog.search_registered_models("name = 'a'")
        with pytest.raises(MlflowException, match="not allowed"):
            catalog.set_model_version_tag(SOURCE, "1", "mlflow_trt.precision", "fp32")
        with pytest.raises(MlflowException, match="all three levels"):
            register("product")
        with pytest.raises(MlflowException, match="signature"):
            mlflow.onnx.log_model(networks.product(), name="p", registered_model_name=SOURCE, pip_requirements=["onnx"])

    def test_a_second_conversion_is_found_and_another_recipe_makes_another_version(self, catalog, messages):
        register()
        first = mlflow_trt.convert_model_version(f"models:/{SOURCE}/1", TARGET, batch=(1, 4, 8), model_config=CPU)
        again = mlflow_trt.convert_model_version(f"models:/{SOURCE}/1", TARGET, batch=(1, 4, 8), model_config=CPU)
        assert (str(first.version), str(again.version)) == ("1", "1")
        other = mlflow_trt.convert_model_version(f"models:/{SOURCE}/1", TARGET, batch=(1, 2, 4), model_config=CPU)
        assert str(other.version) == "2"
        assert "The registry takes no tag mlflow_trt." in messages.text
        lineage = read_record(f"models:/{TARGET}/1").lineage
        assert (lineage["name"], lineage["version"]) == (SOURCE, "1")
        x = networks.rows(5)
        expected = mlflow.pyfunc.load_model(f"models:/{SOURCE}/1").predict(x)["y"]
        assert np.allclose(mlflow.pyfunc.load_model(f"models:/{TARGET}/2").predict(x)["y"], expected, atol=1e-5)

    @pytest.mark.exhaustive
    def test_of_two_sources_each_has_its_own_twin(self, catalog):
        register()
        register()
        versions = [
            mlflow_trt.convert_model_version(f"models:/{SOURCE}/{number}", TARGET, batch=(1, 4, 8))
            for number in (1, 2, 1, 2)
        ]
        assert [str(version.version) for version in versions] == ["1", "2", "1", "2"]

    def test_log_model_registers_there_and_keeps_the_users_tags(self, catalog):
        for _ in range(2):
            mlflow_trt.log_model(
                networks.product(), name="p", registered_model_name=TARGET, tags={"team": "vision"}, verify=False
            )
        assert numbers(catalog, TARGET) == [2, 1]
        assert catalog.get_model_version(TARGET, "2").tags == {"team": "vision"}

    def test_tags_of_the_user_that_it_refuses_are_an_error_and_leave_nothing(self, catalog, store):
        with pytest.raises(MlflowException, match="not allowed"):
            mlflow_trt.log_model(
                networks.product(), name="p", registered_model_name=TARGET, tags={"a.b": "c"}, verify=False
            )
        assert catalog.search_registered_models() == []
        assert store.logged_models() == []

    @pytest.mark.parametrize("there_before", [False, True])
    def test_a_failure_leaves_nothing(self, there_before, catalog, store):
        register()
        if there_before:
            mlflow_trt.convert_model_version(f"models:/{SOURCE}/1", TARGET, batch=(1, 4, 8))
        models = len(store.logged_models())
        with pytest.raises(MlflowException, match="alias"):
            mlflow_trt.convert_model_version(f"models:/{SOURCE}/1", TARGET, batch=(1, 2, 4), tags={"a.b": "c"},
                                             alias="not an alias: v1")  # fmt: skip
        with pytest.raises(MlflowException, match="not allowed"):
            mlflow_trt.convert_model_version(f"models:/{SOURCE}/1", TARGET, batch=(1, 2, 4), tags={"a.b": "c"})
        names = {model.name for model in catalog.search_registered_models()}
        assert names == ({SOURCE, TARGET} if there_before else {SOURCE})
        assert not there_before or numbers(catalog, TARGET) == [1]
        assert len(store.logged_models()) == models

    def test_an_alias_is_set(self, catalog):
        register()
        mlflow_trt.convert_model_version(f"models:/{SOURCE}/1", TARGET, batch=(1, 4, 8), alias="champion")
        assert str(catalog.get_model_version_by_alias(TARGET, "champion").version) == "1"

    def test_many_versions_in_no_order(self, catalog):
        for _ in range(11):
            register()
        assert numbers(catalog, SOURCE) == list(range(11, 0, -1))

    @pytest.mark.exhaustive
    def test_everything_that_a_filter_finds(self, catalog):
        for name in ("main.ml.first", "main.ml.second", "main.ml.third"):
            register(name)
        catalog.set_registered_model_tag("main.ml.first", "deploy", "gpu")
        catalog.set_registered_model_tag("main.ml.second", "deploy", "gpu")
        options = ConversionOptions(verify=False)
        outcomes = convert_all("tags.deploy = 'gpu'", options)
        assert statuses(outcomes) == {"models:/main.ml.first/1": "converted", "models:/main.ml.second/1": "converted"}
        assert set(statuses(convert_all("tags.deploy = 'gpu'", options)).values()) == {"exists"}
        everything = statuses(convert_all("name LIKE 'main.ml.%'", options))
        assert everything["models:/main.ml.third/1"] == "converted"
        assert everything["models:/main.ml.first-trt/1"] == "skipped"
        with pytest.raises(MlflowException, match="[Ii]nvalid"):
            convert_all("nonsense", options)

    def test_a_plan_finds_what_is_there(self, catalog):
        register()
        options = ConversionOptions(verify=False)
        assert statuses(convert_all("", options, dry_run=True)) == {f"models:/{SOURCE}/1": "planned"}
        convert_all("", options)
        assert statuses(convert_all("", options, dry_run=True))[f"models:/{SOURCE}/1"] == "exists"

    def test_one_more_engine(self, catalog):
        mlflow_trt.log_model(networks.product(), name="p", registered_model_name=TARGET, targets="sm86", verify=False)
        version = mlflow_trt.add_engine(f"models:/{TARGET}/1", targets="sm120")
        assert str(version.version) == "2"
        assert [engine.target for engine in read_record(f"models:/{TARGET}/2").engines] == ["sm86", "sm120"]


class TestRegisteredLater:
    """By `mlflow.register_model`, which puts no tags on the version."""

    def registered(self, name="later", **keywords):
        info = mlflow_trt.log_model(networks.product(), name="p", batch=(1, 4, 8), **keywords)
        return mlflow.register_model(info.model_uri, name)

    def test_it_is_not_converted_again_and_gets_its_tags(self, store):
        version = self.registered()
        assert not any(key.startswith("mlflow_trt.") for key in version.tags)
        assert statuses(convert_all("", ConversionOptions(verify=False))) == {"models:/later/1": "skipped"}
        tags = store.client.get_model_version("later", "1").tags
        logged = mlflow.get_logged_model(version.model_id or version.source.rsplit("/", 1)[-1]).tags
        ours = {key: value for key, value in logged.items()
                if key.startswith("mlflow_trt.") and key != "mlflow_trt.conversion"}  # fmt: skip
        assert ours.items() == {key: value for key, value in tags.items() if key.startswith("mlflow_trt.")}.items()
        assert store.client.search_model_versions("tags.`mlflow_trt.precision` = 'fp32'")
        assert store.client.get_model_version("later", "1").description == (
            "fp32, batch 1:4:8, sm80plus, error not measured"
        )

    def test_a_description_of_its_own_is_kept(self, store):
        self.registered()
        store.client.update_model_version("later", "1", "The one for the cameras.")
        convert_all("", ConversionOptions(verify=False))
        assert store.client.get_model_version("later", "1").description == "The one for the cameras."

    def test_a_conversion_whose_version_lost_its_tags_is_found_again(self, store):
        register("product")
        made = mlflow_trt.convert_model_version("models:/product/1", "product-trt", batch=(1, 4, 8))
        for key in made.tags:
            if key.startswith("mlflow_trt."):
                store.client.delete_model_version_tag("product-trt", "1", key)
        again = mlflow_trt.convert_model_version("models:/product/1", "product-trt", batch=(1, 4, 8))
        assert str(again.version) == "1"
        kept = {key: value for key, value in made.tags.items() if key != "mlflow_trt.conversion"}
        assert kept.items() <= store.client.get_model_version("product-trt", "1").tags.items()

    def test_models_of_other_flavors_get_none(self, store):
        register("product")
        convert_all("name = 'nothing'", ConversionOptions(verify=False))
        assert statuses(convert_all("", ConversionOptions(verify=False), dry_run=True)) == {
            "models:/product/1": "planned"
        }
        assert store.client.get_model_version("product", "1").tags == {}
