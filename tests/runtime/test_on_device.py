"""Inputs and outputs that stay on a GPU, on one that exists only here."""

from __future__ import annotations

import concurrent.futures

import fake_gpu
import numpy as np
import pytest

from mlflow_trt.errors import InputShapeError, OutOfMemoryError
from mlflow_trt.runtime.cuda import dlpack
from mlflow_trt.runtime.cuda.device_array import view
from mlflow_trt.runtime.engine.engine import Engine


def rows(count, columns=2):
    return np.arange(count * columns, dtype=np.float32).reshape(count, columns)


@pytest.mark.parametrize("late", [False, True], ids=["shapes known", "shapes late"])
@pytest.mark.parametrize("count", [1, 3, 16, 37])
def test_the_same_as_on_the_host(count, late):
    with fake_gpu.session(late=late) as (session, driver, _):
        outputs = session.run_on_device({"x": fake_gpu.Lent(driver, rows(count))})
        assert np.array_equal(outputs["y"].numpy(), rows(count) * 2)
        assert np.array_equal(outputs["z"].numpy(), rows(count)[:, 0])
        del outputs


def test_pieces_whose_outputs_have_rows_of_different_sizes_are_refused():
    with fake_gpu.session(late=True) as (session, driver, tensorrt):
        tensorrt.late_shape = lambda rows: (rows, 1 if rows == 16 else 64)
        with pytest.raises(InputShapeError, match="its size depends on the data"):
            session.run_on_device({"x": fake_gpu.Lent(driver, rows(20))})


def test_inputs_are_kept_until_nothing_reads_them_any_more():
    with fake_gpu.session() as (session, driver, _):
        session.run({"x": rows(16)})
        x = fake_gpu.Lent(driver, rows(16))
        driver.room = 0
        with pytest.raises(OutOfMemoryError):
            session.run_on_device({"x": x})


class TestWhatNobodyMayDoDuringACapture:
    @staticmethod
    def meanwhile(session, action):
        """Do it again and again while graphs are captured."""
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            captures = pool.submit(lambda: [session.run({"x": rows(4, n // 4)}) for n in range(4, 100)])
            while not captures.done():
                action()
            captures.result()

    def test_reading_an_output(self):
        with fake_gpu.session() as (session, driver, _):
            outputs = session.run_on_device({"x": fake_gpu.Lent(driver, rows(3))})
            self.meanwhile(session, outputs["y"].numpy)
            del outputs

    def test_waiting_for_an_input_of_unknown_origin(self):
        class Foreign:
            def __init__(self, array):
                self.__cuda_array_interface__ = array.__cuda_array_interface__

        with fake_gpu.session() as (session, driver, _):
            x = session.run_on_device({"x": fake_gpu.Lent(driver, rows(3))})["y"]
            self.meanwhile(session, lambda: view(Foreign(x), session.inputs[0], session._device, None))
            x = None

    def test_loading_another_model(self):
        with fake_gpu.session() as (session, _, tensorrt):

            def load():
                with session._device.current():
                    Engine(b"", tensorrt, session._device).close()

            self.meanwhile(session, load)


class Capsule:
    """What numpy takes a DLPack capsule from."""

    def __init__(self, capsule):
        self.capsule = capsule

    def __dlpack__(self, **_):
        return self.capsule

    def __dlpack_device__(self):
        return dlpack.CPU, 0


class TestDlpackOfAnOutput:
    def test_on_the_host_where_that_is_asked_for(self):
        with fake_gpu.session() as (session, driver, _):
            output = session.run_on_device({"x": fake_gpu.Lent(driver, rows(3))})["y"]
            assert np.array_equal(np.from_dlpack(Capsule(output.__dlpack__(dl_device=(1, 0)))), rows(3) * 2)
            assert np.array_equal(np.from_dlpack(Capsule(output.__dlpack__(dl_device=(1, 0), copy=True))), rows(3) * 2)
            del output

    def test_a_copy_where_that_is_asked_for(self):
        with fake_gpu.session() as (session, driver, _):
            output = session.run_on_device({"x": fake_gpu.Lent(driver, rows(3))})["y"]
            shared = dlpack.read(output.__dlpack__(copy=False, dl_device=output.__dlpack_device__()))
            copied = dlpack.read(output.__dlpack__(copy=True))
            assert shared.address == output.address
            assert copied.address != output.address
            assert driver.at(copied.address, output.nbytes).tobytes() == (rows(3) * 2).tobytes()
            for tensor in (shared, copied):
                tensor.release()
            del output

    @pytest.mark.parametrize("asked", [{"dl_device": (1, 0), "copy": False}, {"dl_device": (2, 7)}])
    def test_what_cannot_be_is_refused(self, asked):
        with fake_gpu.session() as (session, driver, _):
            output = session.run_on_device({"x": fake_gpu.Lent(driver, rows(3))})["y"]
            with pytest.raises(BufferError):
                output.__dlpack__(**asked)
            del output
