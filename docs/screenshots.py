"""Take the pictures of docs/mlflow-ui.md: convert a real model, measure it, and look at MLflow's pages.

    pip install -e '.[rtx,screenshots]'
    python docs/screenshots.py --browser /usr/bin/chromium

Everything that it makes, but for the pictures, is in a folder that it removes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import mlflow  # noqa: E402
import numpy as np  # noqa: E402
import onnx  # noqa: E402
from file_types import Magika, model_path  # noqa: E402
from mlflow import MlflowClient  # noqa: E402
from PIL import Image  # noqa: E402
from playwright.sync_api import Page, sync_playwright  # noqa: E402

from examples.serving import ServerProcess, free_port, running  # noqa: E402
from mlflow_trt.flavor.register import model_id_of  # noqa: E402

IMAGES = Path(__file__).with_name("images")
EXPERIMENT = "file-types"
SIZE = {"width": 1400, "height": 860}
SETTLED = 1500
"""Milliseconds in which the pages, whose parts come one after the other, come to rest."""

# What a user has clicked away on the first day.
SEEN = {
    "mlflow.workflowType_v1": '"machine_learning"',
    "_mlflow_model_registry_promo_modal_dismissed_v1": "true",
    "mlflow.assistant.fab.autoOpenedOnFirstLoad_v1": "true",
    "mlflow.assistant.panelOpen_v1": "false",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--browser", help="the executable of Chromium; without it, the one that playwright installed")
    browser = parser.parse_args().browser
    with tempfile.TemporaryDirectory(prefix="demo-") as name:
        folder = Path(name)
        environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")},
            "MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}",
            "MLFLOW_EXPERIMENT_NAME": EXPERIMENT,
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "DO_NOT_TRACK": "true",
            "LOGNAME": "demo",  # the user that MLflow names
        }
        os.environ.update(environment)
        fill(folder, environment)
        address = f"http://127.0.0.1:{(port := free_port())}"
        command = [sys.executable, "-m", "mlflow", "ui", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
        command += ["--backend-store-uri", environment["MLFLOW_TRACKING_URI"]]
        with running(ServerProcess(command, environment, ready=f"{address}/health")):
            look(address, browser)


def fill(folder: Path, environment: Mapping[str, str]) -> None:
    """A registered model, three conversions of it, and two measurements."""
    mlflow.set_tracking_uri(environment["MLFLOW_TRACKING_URI"])
    mlflow.create_experiment(EXPERIMENT, artifact_location=(folder / "artifacts").as_uri())
    mlflow.set_experiment(EXPERIMENT)
    mlflow.onnx.log_model(
        onnx.load(model_path()), name="magika", registered_model_name="magika", pip_requirements=["onnx"]
    )
    files = sorted((ROOT / "docs").glob("*.md")) + sorted((ROOT / "mlflow_trt").rglob("*.py"))
    np.savez(folder / "files.npz", bytes=Magika().features(files[:64]))
    data = ("--data", "files.npz")
    for options in ((), ("--fp16", *data, "--alias", "champion"), ("--bf16", *data, "--target", "sm86")):
        run(folder, environment, "convert", "models:/magika/1", "--batch", "1:8:32", *options)
    run(folder, environment, "benchmark", "models:/magika-trt/2", *data, "--batch", "1:2:4:8:16:32", "--log")
    run(folder, environment, "compare", "models:/magika/1", "models:/magika-trt/2", *data, "--log")


def run(folder: Path, environment: Mapping[str, str], *arguments: str) -> None:
    command = [str(Path(sys.executable).with_name("mlflow-trt")), *arguments]
    subprocess.run(command, cwd=folder, env=environment, check=True)  # noqa: S603  # our own command


def look(address: str, browser: str | None) -> None:
    """Take the pictures."""
    client = MlflowClient()
    experiment = client.get_experiment_by_name(EXPERIMENT).experiment_id
    runs = {run.info.run_name: run.info.run_id for run in client.search_runs([experiment])}
    version = client.get_model_version("magika-trt", "2")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = chromium.new_page(viewport=SIZE)
        for key, value in SEEN.items():
            page.add_init_script(f"localStorage.setItem({key!r}, {value!r})")
        page.goto(f"{address}/#/models/magika-trt")
        save(page, "versions", "Version 3")
        page.goto(f"{address}/#/experiments/{experiment}/models/{model_id_of(version)}")
        save(page, "logged-model", "verification of magika-trt, fp16")
        page.goto(f"{address}/#/experiments/{experiment}/runs/{runs['compare magika-trt v2 with magika v1']}")
        save(page, "comparison", "Registered models")
        page.goto(f"{address}/#/experiments/{experiment}/runs/{runs['benchmark magika-trt v2']}/artifacts")
        page.get_by_text("latency.png").first.click()
        save(page, "benchmark", "latency.png")
        chromium.close()


def save(page: Page, name: str, text: str) -> None:
    """A picture of the page once it shows a text, with few colours so that it is small."""
    page.get_by_text(text).first.wait_for()
    page.wait_for_timeout(SETTLED)
    IMAGES.mkdir(exist_ok=True)
    image = Image.open(BytesIO(page.screenshot())).convert("RGB")
    image.quantize(256, dither=Image.Dither.NONE).save(IMAGES / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
