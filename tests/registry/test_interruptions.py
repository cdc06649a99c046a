"""Interrupted, failing and simultaneous conversions against a real server behind a proxy that delays and fails."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlflow
import networks
import pytest
from command_line import started
from compare import relative_error
from helpers import wait_for
from mlflow import MlflowClient
from proxy import SECONDS, proxied
from registries import register, registry_state
from repository import ROOT, SUPPORT
from tiers import exhaustive
from tracking_server import tracking_server
from typer.testing import CliRunner

import mlflow_trt
from mlflow_trt import ServerUnavailableError
from mlflow_trt.cli import app
from mlflow_trt.convert.engine import builder
from mlflow_trt.flavor import tracking
from mlflow_trt.flavor import undo as undoing
from mlflow_trt.flavor.fetch import read_record
from mlflow_trt.flavor.register import model_id_of
from mlflow_trt.flavor.undo import Undo
from mlflow_trt.measure.publish import check_can_log
from mlflow_trt.pipeline.options import ConversionOptions
from mlflow_trt.registry import convert_version as converting
from mlflow_trt.registry.check import check_registered_model
from mlflow_trt.registry.convert_all import convert_all
from mlflow_trt.registry.lineage import point_to

pytestmark = pytest.mark.server

LOGGED_MODEL = "/mlflow/logged-models"
RUN = "/mlflow/runs/create"
REGISTERED_MODEL = "/mlflow/registered-models/create"
VERSION = "/mlflow/model-versions/create"
CREATIONS = [LOGGED_MODEL, *exhaustive(RUN, REGISTERED_MODEL, VERSION)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="module")
def server(folder, empty_database):
    with tracking_server(folder, empty_database) as address:
        yield address


@pytest.fixture
def proxy(server):
    with proxied(server) as found:
        yield found


@pytest.fixture(scope="module")
def source(server):
    """The URI of what is converted: version 1 of `s`."""
    mlflow.set_tracking_uri(server)
    mlflow.set_experiment("interruptions")
    register("s")
    return "models:/s/1"


@pytest.fixture
def client(source, server, proxy):
    """A client that goes around the proxy, for a test whose own conversions go through it."""
    mlflow.set_tracking_uri(server)
    mlflow.set_experiment("interruptions")
    found = MlflowClient()
    mlflow.set_tracking_uri(proxy.address)
    return found


class Conversion:
    """Converts the source, to a name that nobody else uses."""

    numbers = itertools.count()

    def __init__(self, source):
        self.source, self.name = source, f"t{next(self.numbers)}"

    def __call__(self, name=None, batch=4, **options):
        return mlflow_trt.convert_model_version(
            self.source, name or self.name, batch=batch, precision="fp16", **options
        )


@pytest.fixture
def convert(client, source):
    return Conversion(source)


@contextlib.contextmanager
def interrupted_at(held, *, answered):
    """Interrupt the main thread once the request is held back, and only then, if at all, let its answer through."""
    noticed = threading.Event()

    def interrupt():
        if held.arrived.wait(SECONDS):
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            noticed.wait(SECONDS)
            if answered:
                held.released.set()

    def handle(*_):
        noticed.set()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, handle)
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
        assert held.arrived.is_set()
    finally:
        thread.join()
        signal.signal(signal.SIGINT, before)


def loads(uri):
    model = mlflow.pyfunc.load_model(uri, model_config={"runtime": "onnxruntime"})
    x = networks.rows(4)
    weights = networks.onnx.numpy_helper.to_array(networks.product().graph.initializer[0])
    return relative_error(model.predict({"x": x}), {"y": x @ weights}) < 5e-3


class TestAnInterruptWhileARequestIsOnItsWay:
    @pytest.mark.parametrize("path", CREATIONS)
    def test_its_answer_is_awaited_and_what_it_made_is_taken_back(self, path, client, proxy, convert, messages):
        before = registry_state(client)
        with interrupted_at(proxy.hold("POST", path), answered=True):
            convert(alias="champion")
        assert registry_state(client) == before
        assert "taken back" not in messages.text

    @pytest.mark.parametrize("path", CREATIONS)
    def test_without_an_answer_what_it_made_is_looked_for(self, path, client, proxy, convert, monkeypatch, messages):
        before = registry_state(client)
        monkeypatch.setattr(undoing, "ANSWER_SECONDS", 2.0)
        with interrupted_at(proxy.hold("POST", path), answered=False):
            convert(alias="champion")
        assert registry_state(client) == before
        assert "Waiting for the server's answer, at most 2 s, to the request for: The " in messages.text

    @pytest.mark.parametrize("path", CREATIONS)
    def test_what_was_never_made_is_not_said_to_be_left(self, path, client, proxy, convert, monkeypatch, messages):
        before = registry_state(client)
        monkeypatch.setattr(undoing, "ANSWER_SECONDS", 1.0)
        held = proxy.hold("POST", path, answers=False)
        with interrupted_at(held, answered=False):
            convert(alias="champion")
        assert registry_state(client) == before
        assert "taken back" not in messages.text
        assert "may have been made" not in messages.text

    @pytest.mark.exhaustive
    def test_the_alias_stays_at_the_version_that_can_be_loaded(self, client, proxy, convert):
        convert(alias="champion")
        before = registry_state(client)
        with interrupted_at(proxy.hold("POST", VERSION), answered=True):
            convert(batch=8, alias="champion")
        assert registry_state(client) == before
        made = convert(batch=8, alias="champion")
        assert str(client.get_model_version_by_alias(convert.name, "champion").version) == str(made.version)
        assert loads(f"models:/{convert.name}@champion")


class TestATwin:
    """The version that was made before is only taken where it can be loaded."""

    def test_whose_logged_model_was_deleted_is_not_believed(self, client, convert, messages):
        first = convert(alias="champion")
        client.delete_logged_model(model_of(client, convert.name, "1").model_id)
        second = convert(alias="champion")
        assert (str(first.version), str(second.version)) == ("1", "2")
        assert "behind models:" in messages.text
        assert "was deleted" in messages.text
        assert loads(f"models:/{convert.name}@champion")

    @pytest.mark.exhaustive
    def test_that_lacks_a_file_is_not_believed(self, client, convert, folder, messages):
        convert()
        for number, name in enumerate(["mlflow_trt.json", "MLmodel", "model.onnx", "engines", "golden.npz"], 1):
            files = artifacts_of(client, folder, convert.name, str(number)) / name
            shutil.rmtree(files) if files.is_dir() else files.unlink()
            assert int(convert(alias="champion").version) == number + 1
            assert f"models:/{convert.name}/{number} lacks its file {name}" in messages.text
        assert loads(f"models:/{convert.name}@champion")

    @pytest.mark.exhaustive
    def test_whose_files_were_cut_short_or_damaged_is_not_believed(self, client, convert, folder):
        convert()
        (plan,) = (artifacts_of(client, folder, convert.name, "1") / "engines").iterdir()
        plan.write_bytes(plan.read_bytes()[:-1])
        assert str(convert().version) == "2"
        record = artifacts_of(client, folder, convert.name, "2") / "mlflow_trt.json"
        record.write_text(record.read_text()[:100])
        assert str(convert().version) == "3"
        assert str(convert().version) == "3"

    @pytest.mark.exhaustive
    def test_that_was_left_half_made_is_finished(self, client, server):
        mlflow.set_tracking_uri(server)
        register("half")
        client.update_model_version("half", "1", "What people need to know.")
        client.set_model_version_tag("half", "1", "team", "a")
        convert = Conversion("models:/half/1")
        convert()
        complete = client.get_model_version(convert.name, "1")
        assert complete.tags["team"] == "a"
        assert complete.description.endswith("\n\nWhat people need to know.")
        for key in ("team", "mlflow_trt.source"):
            client.delete_model_version_tag(convert.name, "1", key)
        client.update_model_version(convert.name, "1", "")
        client.delete_model_version_tag("half", "1", f"mlflow_trt.converted_to.{convert.name}.1")

        assert str(convert(alias="champion").version) == "1"

        again = client.get_model_version(convert.name, "1")
        assert (again.tags, again.description) == (complete.tags, complete.description)
        pointer = client.get_model_version("half", "1").tags[f"mlflow_trt.converted_to.{convert.name}.1"]
        assert pointer == f"models:/{convert.name}/1"

    @pytest.mark.exhaustive
    def test_whose_metrics_were_never_logged_gets_them(self, client, convert, monkeypatch):
        with monkeypatch.context() as patched:
            patched.setattr("mlflow_trt.flavor.conversions.log_metrics", lambda *_, **__: None)
            made = convert()
        model_id = model_of(client, made.name, "1").model_id
        assert not client.get_logged_model(model_id).metrics
        convert()
        names = {metric.key for metric in client.get_logged_model(model_id).metrics}
        assert "mlflow_trt/y/relative_error" in names
        runs = len(client.search_runs([client.get_logged_model(model_id).experiment_id]))
        convert()
        assert len(client.search_runs([client.get_logged_model(model_id).experiment_id])) == runs


def model_of(client, name, version):
    return client.get_logged_model(model_id_of(client.get_model_version(name, version)))


def artifacts_of(client, folder, name, version) -> Path:
    """Where the server keeps the files of a version."""
    model = model_of(client, name, version)
    return folder / "proxied" / model.artifact_location.removeprefix("mlflow-artifacts:/")


class TestALostAnswer:
    """MLflow's client repeats a request whose answer was lost, and the server does it a second time."""

    @pytest.mark.parametrize("loss", ["lose", *exhaustive("drop")])
    @pytest.mark.parametrize("path", CREATIONS)
    def test_makes_nothing_twice(self, path, loss, client, proxy, convert):
        lost = []

        def fault(method, requested):
            if method == "POST" and requested.endswith(path) and not lost:
                lost.append(requested)
                return loss
            return None

        before = registry_state(client)
        proxy.fault = fault
        made = convert()
        assert lost
        after = registry_state(client)
        for earlier, later in zip(before, after, strict=True):
            assert len({entry for entry in later - earlier if entry[0] != "s"}) == 1
        assert loads(f"models:/{made.name}/{made.version}")


class TestTheLastReads:
    @pytest.mark.parametrize("number", [1, *exhaustive(2, 3)])
    def test_are_part_of_what_is_taken_back(self, number, client, proxy, convert, monkeypatch):
        """Of the reads after the alias was set, each in turn fails."""
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        reads = itertools.count(1)

        def fault(method, requested):
            is_read = (
                method == "GET"
                and requested != "/health"
                and any(path.endswith("/registered-models/alias") for _, path in proxy.requests)
            )
            return "refuse" if is_read and next(reads) == number else None

        before = registry_state(client)
        proxy.fault = fault
        arguments = ["convert", convert.source, "--register-as", convert.name, "--batch", "4", "--alias", "x"]
        assert CliRunner().invoke(app, arguments).exit_code == 1
        assert registry_state(client) == before

    @pytest.mark.exhaustive
    def test_and_so_is_the_run_with_the_numbers(self, client, convert, monkeypatch):
        before = registry_state(client)

        def interrupt(*_, **__):
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(mlflow, "log_metrics", interrupt)
            with pytest.raises(KeyboardInterrupt):
                convert()
        with monkeypatch.context() as patched:
            patched.setattr(converting, "set_alias", interrupt)
            with pytest.raises(KeyboardInterrupt):
                convert(alias="champion")
        assert registry_state(client) == before


class TestAtTheSameTime:
    def test_identical_conversions_make_one_version(self, client, convert):
        with ThreadPoolExecutor(6) as pool:
            versions = {str(done.result().version) for done in [pool.submit(convert) for _ in range(6)]}
        assert versions == {"1"}
        assert [str(version.version) for version in client.search_model_versions(f"name = '{convert.name}'")] == ["1"]

    @pytest.mark.exhaustive
    def test_on_two_machines_the_later_gives_way(self, client, proxy, convert, monkeypatch):
        """Without the lock, which is one machine's: the second has registered before the first does."""
        monkeypatch.setattr(converting, "_alone", lambda *_: contextlib.nullcontext())
        models = len(registry_state(client)[2])
        held = proxy.hold("POST", VERSION, answers=False)
        with ThreadPoolExecutor(1) as pool:
            later = pool.submit(convert, alias="champion")
            assert held.arrived.wait(SECONDS)
            assert str(convert().version) == "1"
            held.released.set()
            assert str(later.result().version) == "1"
        assert [str(version.version) for version in client.search_model_versions(f"name = '{convert.name}'")] == ["1"]
        assert str(client.get_model_version_by_alias(convert.name, "champion").version) == "1"
        assert len(registry_state(client)[2]) == models + 1

    @pytest.mark.exhaustive
    def test_no_entry_of_converted_to_is_lost(self, client, convert):
        made = [convert(f"{convert.name}-{number}") for number in range(4)]
        before = set(client.get_model_version("s", "1").tags.values())
        assert before >= {f"models:/{version.name}/1" for version in made}
        for version in made:
            client.delete_model_version_tag("s", "1", f"mlflow_trt.converted_to.{version.name}.1")
        lineage = {"source": convert.source, "name": "s", "version": "1"}
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda version: point_to(Undo(), lineage, version), made))
        assert set(client.get_model_version("s", "1").tags.values()) == before

    @pytest.mark.exhaustive
    def test_only_the_own_entry_is_taken_back(self, client, convert, monkeypatch):
        before = client.get_model_version("s", "1").tags

        def somebody_else_converts_and_this_one_fails(*_):
            client.set_model_version_tag("s", "1", "mlflow_trt.converted_to.other.1", "models:/other/1")
            raise KeyboardInterrupt

        monkeypatch.setattr(converting, "set_alias", somebody_else_converts_and_this_one_fails)
        with pytest.raises(KeyboardInterrupt):
            convert(alias="champion")
        after = client.get_model_version("s", "1").tags
        assert after == {**before, "mlflow_trt.converted_to.other.1": "models:/other/1"}

    @pytest.mark.exhaustive
    def test_an_alias_that_somebody_moved_meanwhile_stays_there(self, client, convert, monkeypatch):
        convert(alias="champion")
        read = MlflowClient.get_model_version

        def moved_then_fails(self, name, version):
            champion = client.get_model_version_by_alias(convert.name, "champion")
            if name == convert.name and str(version) == str(champion.version) == "2":
                client.set_registered_model_alias(name, "champion", "1")
                raise KeyboardInterrupt
            return read(self, name, version)

        monkeypatch.setattr(MlflowClient, "get_model_version", moved_then_fails)
        with pytest.raises(KeyboardInterrupt):
            convert(batch=8, alias="champion")
        assert str(client.get_model_version_by_alias(convert.name, "champion").version) == "1"


COMMANDS = [
    ["convert", "models:/s/1"],
    ["convert", "--all", "name = 's'"],
    ["add-engine", "models:/s/1", "--target", "sm120"],
    ["inspect", "models:/s/1"],
    ["registry", "check", "models:/s"],
    ["verify", "models:/s/1"],
    ["benchmark", "models:/s/1"],
    ["export-triton", "models:/s/1", "--repository", "out"],
    ["serve", "models:/s/1", "--port", "0"],
]


@contextlib.contextmanager
def unheard():
    """An address at which nobody listens, and which nobody is given meanwhile: not the gateway that is to ask there."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


class TestAServerThatIsGone:
    @pytest.mark.parametrize(
        "call",
        [
            lambda: mlflow_trt.log_model(networks.product(), name="p"),
            lambda: mlflow_trt.convert_model_version("models:/s/1", "gone"),
            lambda: mlflow_trt.convert_model_version("no/such/file.onnx", "gone"),
            lambda: mlflow_trt.add_engine("models:/s/1", targets="sm120"),
            lambda: mlflow_trt.log_engine("no/such/file.plan", name="p"),
            lambda: check_can_log(wanted=True),
            lambda: mlflow_trt.load_model("models:/s/1"),
            lambda: read_record("models:/s/1"),
            lambda: convert_all("name = 's'", ConversionOptions()),
            lambda: check_registered_model("models:/s"),
        ],
    )
    @pytest.mark.parametrize("is_behind_a_gateway", [False, True])
    def test_is_found_out_before_the_work(self, call, is_behind_a_gateway, monkeypatch):
        monkeypatch.setattr(builder, "_WORKER", "raise SystemExit('nothing is built')")
        with unheard() as nobody, proxied(nobody) as gateway:
            mlflow.set_tracking_uri(gateway.address if is_behind_a_gateway else nobody)
            said = "answers 502" if is_behind_a_gateway else "cannot be reached"
            with pytest.raises(ServerUnavailableError, match=f"MLflow's server at http.* {said}"):
                call()
        assert gateway.requests == [("GET", "/health")] * is_behind_a_gateway

    def test_that_takes_requests_and_never_answers(self, monkeypatch):
        monkeypatch.setattr(tracking, "_SECONDS", 0.2)
        with socket.create_server(("127.0.0.1", 0)) as silent:
            mlflow.set_tracking_uri(f"http://127.0.0.1:{silent.getsockname()[1]}")
            with pytest.raises(ServerUnavailableError, match="cannot be reached"):
                mlflow_trt.convert_model_version("models:/s/1", "gone")

    def test_what_cannot_be_taken_back_is_told_and_no_more_is_awaited(
        self, client, proxy, convert, monkeypatch, messages
    ):
        monkeypatch.setattr(undoing, "ANSWER_SECONDS", 0.6)
        monkeypatch.setattr(undoing, "TOTAL_SECONDS", 1.0)
        gone = threading.Event()

        def interrupt(*_):
            proxy.fault = lambda method, path: gone.wait(SECONDS) and None
            raise KeyboardInterrupt

        monkeypatch.setattr(converting, "set_alias", interrupt)
        with pytest.raises(KeyboardInterrupt):
            convert(alias="champion")
        gone.set()
        assert "could not be taken back: the server did not answer within 1 s" in messages.text
        assert f"The version of {convert.name} could not be taken back: the 1 s for all of it are over" in messages.text
        assert "`mlflow-trt registry check models:/NAME` lists what was left behind" in messages.text

    @pytest.mark.parametrize(
        ("command", "number"),
        [
            *((command, signal.SIGINT) for command in COMMANDS),
            (COMMANDS[0], signal.SIGTERM),
            (COMMANDS[0], signal.SIGHUP),
        ],
        ids=lambda value: value.name if isinstance(value, signal.Signals) else value[0],
    )
    def test_every_command_ends_when_it_is_told_to(self, command, number, proxy, tmp_path):
        """The server answers whether it is there, and then nothing any more."""
        asked, over = threading.Event(), threading.Event()

        def fault(_, path):
            if path != "/health":
                asked.set()
                over.wait(SECONDS)

        proxy.fault = fault
        with started(*command, cwd=tmp_path, MLFLOW_TRACKING_URI=proxy.address, CUDA_VISIBLE_DEVICES="") as running:
            try:
                wait_for(lambda: asked.is_set() or running.has_ended)
                running.send_signal(number)
                code, _, errors = running.result()
            finally:
                over.set()
        assert code == 128 + number, errors


@pytest.mark.exhaustive
def test_the_sweep_of_make_faults_in_short(tmp_path):
    figures = tmp_path / "figures.json"
    options = ["--runs", "1", "--only", "SIGTERM before", "--seconds", "1", "--seed", "1", "--json", str(figures)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(SUPPORT)])}
    subprocess.run([sys.executable, "tests/tools/faults.py", *options], cwd=ROOT, env=environment, check=True)
    (score,) = json.loads(figures.read_text()).values()
    assert (score["left"], score["broken"], score["next_ok"], score["clean"]) == (0, 0, score["runs"], score["runs"])
