"""What a model has to be before anything of it is used: the one that is expected, and signed by whom it should be."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import mlflow
import networks
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from sklearn.linear_model import LogisticRegression
from typer.testing import CliRunner

import mlflow_trt
from mlflow_trt import IntegrityError, LoadSettings, OptionError, SignatureError
from mlflow_trt.backends import tensorrt as trt
from mlflow_trt.cli import app
from mlflow_trt.deploy.serve.model_source import resolve_source
from mlflow_trt.deploy.serve.served_model import load_served_model
from mlflow_trt.errors import ArtifactError, MissingDependencyError
from mlflow_trt.flavor.fetch import read_record
from mlflow_trt.store import load, signature

CPU = {"runtime": "onnxruntime"}


def digest_of(folder: Path) -> str:
    return hashlib.sha256((folder / "mlflow_trt.json").read_bytes()).hexdigest()


@pytest.fixture
def model(cls_folder, tmp_path) -> Path:
    return Path(shutil.copytree(cls_folder, tmp_path / "model"))


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> Path:
    """Two pairs of keys, `mine` and `other`."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("mine", "other"):
        key = ec.generate_private_key(ec.SECP256R1())
        form = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        (folder / f"{name}.pem").write_bytes(key.private_bytes(serialization.Encoding.PEM, *form))
        public = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        (folder / f"{name}.pub").write_bytes(key.public_key().public_bytes(*public))
    return folder


@pytest.fixture
def signed(model, keys, tmp_path) -> dict[str, str]:
    """The load settings for a model that was signed."""
    signature.sign_folder(model, tmp_path / "model.sig", private_key=keys / "mine.pem")
    return {"signature": str(tmp_path / "model.sig"), "signed_by": str(keys / "mine.pub")}


class TestExpectedDigest:
    def test_the_model_that_is_expected_loads(self, model):
        mlflow_trt.load_model(str(model), **CPU, expected_digest=digest_of(model)).close()
        config = {**CPU, "expected_digest": digest_of(model)}
        mlflow.pyfunc.load_model(str(model), model_config=config).get_raw_model().close()

    def test_another_is_refused_by_every_way_to_load(self, model, monkeypatch):
        wrong = digest_of(model)
        file = model / "mlflow_trt.json"
        file.write_text(json.dumps(json.loads(file.read_text())))  # the same, and not to the byte
        with pytest.raises(IntegrityError, match=f"is {digest_of(model)}, and expected_digest {wrong}"):
            mlflow_trt.load_model(str(model), **CPU, expected_digest=wrong)
        with pytest.raises(IntegrityError, match="is not the model that was expected"):
            mlflow.pyfunc.load_model(str(model), model_config={**CPU, "expected_digest": wrong})
        monkeypatch.setenv("MLFLOW_PYFUNC_INFERENCE_CONFIG", json.dumps({"expected_digest": wrong}))
        with pytest.raises(IntegrityError, match="is not the model that was expected"):
            mlflow_trt.load_model(str(model), **CPU)
        with pytest.raises(IntegrityError, match="is not the model that was expected"):
            load_served_model(resolve_source(f"m={model}"), CPU)

    def test_it_stands_for_every_file(self, model):
        """Files are compared with the record, and the record with the digest."""
        expected = digest_of(model)
        (model / "model.onnx").write_bytes((model / "model.onnx").read_bytes() + b"\0")
        with pytest.raises(IntegrityError, match="model.onnx is not the file that was logged"):
            mlflow_trt.load_model(str(model), **CPU, expected_digest=expected)

    def test_inspect_tells_it(self, model):
        shown = CliRunner().invoke(app, ["inspect", "--json", str(model)])
        assert json.loads(shown.stdout)["digest"] == digest_of(model)


class TestSignature:
    def test_what_was_signed_loads(self, model, signed):
        mlflow_trt.load_model(str(model), **CPU, **signed).close()
        (model / "registered_model_meta").write_text("model_name: x\n")  # MLflow's, of a download
        mlflow.pyfunc.load_model(str(model), model_config={**CPU, **signed}).get_raw_model().close()

    @pytest.mark.parametrize("file", ["MLmodel", "mlflow_trt.json", "model.onnx", "requirements.txt"])
    def test_what_was_changed_is_refused(self, file, model, signed):
        (model / file).write_bytes((model / file).read_bytes() + b"\n")
        with pytest.raises(SignatureError, match=r"is not what .*mine.pub signed"):
            mlflow_trt.load_model(str(model), **CPU, **signed)

    def test_what_was_added_or_removed_is_refused(self, model, signed):
        (model / "code").mkdir()
        (model / "code" / "evil.py").touch()
        with pytest.raises(SignatureError):
            mlflow_trt.load_model(str(model), **CPU, **signed)
        shutil.rmtree(model / "code")
        (model / "golden.npz").unlink()
        with pytest.raises(SignatureError):
            mlflow_trt.load_model(str(model), **CPU, **signed)

    def test_somebody_elses_signature_is_refused(self, model, signed, keys):
        with pytest.raises(SignatureError):
            mlflow_trt.load_model(str(model), **CPU, **{**signed, "signed_by": str(keys / "other.pub")})

    @pytest.mark.parametrize("content", [b"", b"{}", b"[" * 100_000, b"\xff", b'{"verificationMaterial": 5}'], ids=repr)
    def test_what_is_no_signature_is_refused(self, content, model, signed):
        Path(signed["signature"]).write_bytes(content)
        with pytest.raises(SignatureError):
            mlflow_trt.load_model(str(model), **CPU, **signed)
        Path(signed["signature"]).unlink()
        with pytest.raises(SignatureError, match="there is no signature"):
            mlflow_trt.load_model(str(model), **CPU, **signed)

    def test_keys_that_are_none(self, model, signed, keys, tmp_path):
        (tmp_path / "none.pem").write_text("no key")
        for key in (tmp_path / "none.pem", tmp_path / "nowhere"):
            with pytest.raises(OptionError, match="signed_by is"):
                mlflow_trt.load_model(str(model), **CPU, **{**signed, "signed_by": key})
            with pytest.raises(OptionError, match="cannot be used"):
                signature.sign_folder(model, tmp_path / "x.sig", private_key=key)
        with pytest.raises(ArtifactError, match="cannot be signed into"):
            signature.sign_folder(model, tmp_path / "no" / "x.sig", private_key=keys / "mine.pem")
        assert not (tmp_path / "x.sig").exists()

    def test_the_commands(self, model, keys, tmp_path):
        file = ["--signature", str(tmp_path / "model.sig")]
        run = CliRunner()
        made = run.invoke(app, ["sign", str(model), *file, "--private-key", str(keys / "mine.pem")])
        assert made.exit_code == 0, made.exception
        assert digest_of(model) in made.stdout
        verify = ["verify-signature", str(model), *file, "--signed-by"]
        assert run.invoke(app, [*verify, str(keys / "mine.pub")]).exit_code == 0
        assert isinstance(run.invoke(app, [*verify, str(keys / "other.pub")]).exception, SignatureError)

    def test_without_the_library(self, model, signed, monkeypatch):
        monkeypatch.setattr(signature, "is_installed", lambda name: False)
        with pytest.raises(MissingDependencyError, match=r"mlflow-trt\[signing\]"):
            mlflow_trt.load_model(str(model), **CPU, **signed)


def test_engines_that_are_not_trusted_are_not_used(model):
    engine = read_record(str(model)).engines[0]
    reason = load._why_not_used(engine, trt.load(), None, LoadSettings(trust_engines=False))
    assert reason == "trust_engines is false, so nothing that came with the model is deserialized"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"expected_digest": "a" * 63}, "expected a sha256"),
        ({"expected_digest": 5}, "expected a sha256"),
        ({"trust_engines": "no"}, "expected true or false"),
        ({"signature": "x.sig"}, "signature says nothing without signed_by"),
        ({"signed_by": "x.pub"}, "signed_by says nothing without signature"),
        ({"signature": 5, "signed_by": "x"}, "signature is 5; expected text"),
        ({"signature": "x", "signed_by": "a\0"}, "expected text"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(OptionError, match=message):
        LoadSettings(**settings)


def test_mlflows_switch_against_pickles_holds(store, tmp_path, monkeypatch):
    """A source of flavor sklearn is a pickle, which MLflow refuses where it is told to."""
    x = networks.rows(20)
    estimator = LogisticRegression().fit(x, [0, 1] * 10)
    mlflow.sklearn.save_model(estimator, tmp_path / "source", serialization_format="cloudpickle")
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    with pytest.raises(mlflow.MlflowException, match="(?i)pickle"):
        mlflow_trt.convert_model_version(str(tmp_path / "source"), "never")
    assert not mlflow.search_registered_models()
