from __future__ import annotations

import pytest

ROWS: list[tuple[str, ...]] = []
HEADINGS = ("model", "precision", "rows", "largest absolute error", "relative error", "build s", "load s")


@pytest.fixture
def report():
    """Collects rows for the table that ends the run."""
    return ROWS.append


def pytest_terminal_summary(terminalreporter):
    if not ROWS:
        return
    terminalreporter.section("TensorRT through pyfunc, against ONNX Runtime")
    for row in (HEADINGS, *ROWS):
        terminalreporter.write_line(" | ".join(row))
