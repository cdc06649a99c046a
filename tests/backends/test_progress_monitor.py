"""TensorRT reports phases by their names, which need not be unique."""

from __future__ import annotations

import tensorrt_rtx

from mlflow_trt.backends.tensorrt_callbacks import new_progress_monitor


def test_phases_of_one_name_go_on_and_end_one_after_the_other():
    told = []
    monitor = new_progress_monitor(tensorrt_rtx, lambda phase, fraction: told.append((phase, fraction)))
    monitor.phase_start("build", None, 2)
    monitor.phase_start("build", "build", 4)
    assert monitor.step_complete("build", 1)
    assert told[-1] == ("build", 0.25)  # half of the first of two steps
    monitor.phase_finish("build")
    assert monitor.step_complete("build", 0)
    assert told[-1] == ("build", 0.5)
    monitor.phase_finish("build")
    assert monitor.step_complete("build", 1)
    monitor.phase_finish("build")
    assert len(told) == 4
