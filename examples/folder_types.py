"""What is in a folder? magika tells the type of each file by its content, in batches as large as the folder.

    python examples/folder_types.py            # this repository
    python examples/folder_types.py ~/Downloads

The engine is for 1 to 64 rows. More are cut into batches, which overlap on a GPU; the caller need not know.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import mlflow
from file_types import Magika, model_path
from rich.console import Console
from rich.table import Table

import mlflow_trt


def files_in(folder: Path, most: int = 5000) -> list[Path]:
    """Files that have something in them, and are not in hidden folders."""
    found = (
        path for path in sorted(folder.rglob("*")) if not any(part[0] == "." for part in path.relative_to(folder).parts)
    )
    return [path for path in found if path.is_file() and not path.is_symlink() and path.stat().st_size >= 8][:most]


def main(folder: Path) -> None:
    magika, files = Magika(), files_in(folder)
    features = magika.features(files)
    with tempfile.TemporaryDirectory() as temporary:
        converted = Path(temporary) / "magika"
        mlflow_trt.save_model(model_path(), converted, batch=(1, 32, 64), calibration_data={"bytes": features[:64]})
        model = mlflow.pyfunc.load_model(str(converted), model_config={"runtime": "auto"})
        begin = time.perf_counter()
        scores = model.predict({"bytes": features})["target_label"]
        seconds = time.perf_counter() - begin

    by_label: dict[str, list[tuple[float, Path]]] = defaultdict(list)
    for path, (label, score) in zip(files, magika.best(scores), strict=True):
        by_label[label].append((score, path))
    table = Table(title=f"{folder.resolve().name}, by {model.get_raw_model().description}", title_justify="left")
    for heading in ("type", "files", "kB", "of which the model is least sure"):
        table.add_column(heading, justify="right" if heading in {"files", "kB"} else "left", overflow="fold")
    for label, found in sorted(by_label.items(), key=lambda item: -len(item[1])):
        score, path = min(found)
        size = sum(path.stat().st_size for _, path in found) / 1000
        table.add_row(label, str(len(found)), f"{size:.1f}", f"{path.relative_to(folder)} ({score:.4f})")
    console = Console(width=100)
    console.print(table)
    console.print(f"{len(files)} files in {seconds:.2f} s, {len(files) / seconds:,.0f} files/s")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent)
