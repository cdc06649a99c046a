"""What a TensorRT session does with every kind of input, output and misuse."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import subprocess
import sys
import textwrap
import threading
import time
from typing import ClassVar

import networks
import numpy as np
import pytest
from compare import relative_error
from helpers import PATIENCE, convert_in, read, reference, wait_for
from lost_gpu import left_free

import mlflow_trt
from mlflow_trt import (
    EngineMismatchError,
    ExecutionError,
    InputDtypeError,
    InputShapeError,
    OutOfMemoryError,
    Recipe,
    SessionClosedError,
)
from mlflow_trt.backends import tensorrt as trt
from mlflow_trt.runtime import native
from mlflow_trt.runtime.batching.scheduler import MOST_SLOTS
from mlflow_trt.runtime.cuda.device import open_device
from mlflow_trt.runtime.engine import contexts as bindings
from mlflow_trt.runtime.engine import slot as slot_module
from mlflow_trt.runtime.tensorrt_session import TensorRTSession

pytestmark = pytest.mark.gpu

STRESS_SECONDS = float(os.environ.get("STRESS_SECONDS", "15"))
TF32 = 2e-3  # what TensorRT-RTX makes of float32 products


@pytest.fixture
def opened(tmp_path):
    """Convert a network and open a session on it and one on ONNX Runtime."""
    with contextlib.ExitStack() as stack:

        def open_both(model, *, on_cpu=True, settings=None, **recipe):
            folder = tmp_path / str(len(list(tmp_path.iterdir())))
            folder.mkdir()
            conversion = convert_in(folder, read(model, folder), Recipe(**recipe))
            session = TensorRTSession(
                conversion.plan.read_bytes(),
                tensorrt=trt.load(),
                device=open_device(0),
                inputs=conversion.source.inputs,
                outputs=conversion.source.outputs,
                batch_axis=conversion.profiles.batch_axis,
                **(settings or {}),
            )
            stack.enter_context(session)
            return session, stack.enter_context(reference(conversion.source)) if on_cpu else None

        yield open_both


class Store:
    """Keeps kernels for another session of this process."""

    kept = None

    def read(self):
        return [self.kept] if self.kept else []

    def update(self, merge):
        self.kept = merge(self.read())


def same(session, expected, feeds, tolerance=TF32):
    outputs = session.run(feeds)
    assert relative_error(outputs, expected.run(feeds)) <= tolerance
    return outputs


class TestShapes:
    @pytest.mark.parametrize("rows", [1, 2, 5, 8, 9, 17])
    def test_any_number_of_rows(self, rows, opened):
        same(*opened(networks.product(), batch=(2, 4, 8)), {"x": networks.rows(rows)})

    @pytest.mark.parametrize("rows", [1, 4, 6])
    def test_a_static_batch(self, rows, opened):
        same(*opened(networks.product(), batch=4), {"x": networks.rows(rows)})

    def test_no_rows(self, opened):
        session, _ = opened(networks.product(), batch=(1, 4, 8))
        assert session.run({"x": networks.rows(0)})["y"].shape == (0, 8)

    def test_buffers_grow_and_are_used_again(self, opened):
        session, expected = opened(networks.product(), batch=(1, 4, 64))
        for rows in (1, 64, 3, 32, 1):
            same(session, expected, {"x": networks.rows(rows, seed=rows)})

    def test_the_profile_that_fits_best(self, opened):
        small, large = ((1, 16), (1, 16), (2, 16)), ((2, 16), (32, 16), (64, 16))
        session, expected = opened(networks.product(), shapes=[{"x": small}, {"x": large}])
        for rows in (1, 64, 2, 40, 1, 70):
            same(session, expected, {"x": networks.rows(rows)})

    def test_a_model_of_fixed_shapes(self, opened):
        session, expected = opened(networks.product(batch=3))
        same(session, expected, {"x": networks.rows(3)})
        with pytest.raises(InputShapeError, match="expected 3 at axis 0"):
            session.run({"x": networks.rows(2)})

    def test_outside_of_every_profile(self, opened):
        shapes = {"input_ids": ((-1, 4), (-1, 8), (-1, 16))}
        session, _ = opened(networks.transformer(), batch=(1, 2, 4), shapes=shapes)
        with pytest.raises(InputShapeError, match=r"built for input_ids 1x4:2x8:4x16.* and got input_ids \(2, 20\)"):
            session.run(networks.sentences(2, 20))

    def test_rows_that_cannot_be_split(self, opened):
        session, _ = opened(networks.product(batch="sequence"), shapes={"x": ((1, 16), (4, 16), (8, 16))})
        with pytest.raises(InputShapeError, match=r"built for x 1x16:4x16:8x16 \(min:opt:max\), and got x \(9, 16\)"):
            session.run({"x": networks.rows(9)})


class TestTensors:
    @pytest.mark.parametrize("rows", [2, 3, 7])
    def test_every_dtype(self, rows, opened):
        session, expected = opened(networks.every_dtype(), batch=(1, 2, 4))
        feeds = networks.every_dtype_feeds(rows)
        outputs, wanted = session.run(feeds), expected.run(feeds)
        for name, array in wanted.items():
            assert outputs[name].dtype == array.dtype
            assert np.array_equal(outputs[name], array), name

    def test_float64_is_computed_in_float32(self, opened):
        session, expected = opened(networks.wide_product(), batch=(1, 2, 4))
        outputs = same(session, expected, {"x": np.random.default_rng(0).standard_normal((7, 4))})
        assert outputs["y"].dtype == np.float64

    def test_bfloat16(self, opened):
        session, _ = opened(networks.bfloat16_product(), on_cpu=False, batch=(1, 2, 4))
        x = networks.rows(3)
        weights = np.random.default_rng(1).standard_normal((16, 8)).astype(np.float32)
        outputs = session.run({"x": x})["y"]
        assert outputs.dtype.name == "bfloat16"
        assert relative_error({"y": outputs.astype(np.float32)}, {"y": x @ weights}) < 2e-2

    def test_shape_tensors_are_read_on_the_host(self, opened):
        shapes = {"x": ((1, 16), (4, 16), (8, 16)), "shape": ((1, 1), (8, 8), (128, 128))}
        session, expected = opened(networks.reshaped(), shapes=shapes)
        for shape in ((8, 8), (4, 16), (2, 32)):
            same(session, expected, {"x": networks.rows(4), "shape": np.array(shape)}, 0)
        with pytest.raises(InputShapeError, match=r"shape 1x1:8x8:128x128.*shape \(0, 64\)"):
            session.run({"x": networks.rows(4), "shape": np.array((0, 64))})

    def test_shape_outputs_are_written_on_the_host(self, opened):
        session, _ = opened(networks.shape_output(), shapes={"x": ((1, 16), (4, 16), (8, 16))})
        outputs = session.run({"x": networks.rows(3)})
        assert outputs["s"].tolist() == [3, 16]
        assert np.array_equal(outputs["y"], np.maximum(networks.rows(3), 0))

    def test_outputs_through_the_allocator(self, opened, monkeypatch):
        """TensorRT-RTX has no operator whose output size depends on data, but its allocator works for any output."""
        session, _ = opened(networks.product(), batch=(1, 4, 8))
        plain = {rows: session.run({"x": networks.rows(rows)})["y"] for rows in (4, 8, 11)}
        monkeypatch.setattr(bindings, "depends_on_data", lambda shape: True)
        for rows, expected in plain.items():
            assert np.array_equal(session.run({"x": networks.rows(rows)})["y"], expected)

    def test_shapes_that_do_not_go_together_are_an_input_error(self, opened):
        model = networks.model(
            [networks.helper.make_node("Add", ["a", "b"], ["c"])],
            [networks.value("a", networks.FLOAT, [None, 4]), networks.value("b", networks.FLOAT, [None, 4])],
            [networks.value("c", networks.FLOAT, [None, 4])],
        )
        ranges = ((2, 4), (3, 4), (8, 4))
        session, expected = opened(model, shapes={"a": ranges, "b": ranges})
        for rows in ((2, 3), (5, 4)):
            with pytest.raises(InputShapeError, match=r"could not|rows"):
                session.run({"a": networks.rows(rows[0], 4), "b": networks.rows(rows[1], 4)})
        same(session, expected, {"a": networks.rows(3, 4), "b": networks.rows(3, 4, seed=1)}, 1e-6)

    def test_results_are_the_callers(self, opened):
        session, _ = opened(networks.product(), batch=(1, 4, 8))
        first = session.run({"x": networks.rows(4)})["y"]
        kept = first.copy()
        session.run({"x": networks.rows(4, seed=9)})
        assert np.array_equal(first, kept)

    def test_wrong_inputs_leave_the_session_usable(self, opened):
        session, expected = opened(networks.product(), batch=(1, 4, 8))
        for bad, error in ((np.array([["a"] * 16]), InputDtypeError), (networks.rows(2)[:, :3], InputShapeError)):
            with pytest.raises(error):
                session.run({"x": bad})
        same(session, expected, {"x": networks.rows(4)})


class TestThreadsAndLife:
    def test_loaded_in_one_thread_used_in_others_closed_in_another(self, opened):
        with concurrent.futures.ThreadPoolExecutor(1) as loader:
            session, expected = loader.submit(opened, networks.product(), batch=(1, 4, 8)).result()
        batches = [networks.rows(n % 11 + 1, seed=n) for n in range(200)]
        alone = [session.run({"x": batch})["y"] for batch in batches]
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            together = list(pool.map(lambda batch: session.run({"x": batch})["y"], batches))
            pool.submit(session.close).result()
        assert all(np.array_equal(one, two) for one, two in zip(alone, together, strict=True))
        assert relative_error({"y": alone[3]}, expected.run({"x": batches[3]})) < TF32
        with pytest.raises(SessionClosedError):
            session.run({"x": batches[0]})

    def test_close_waits_for_calls_in_flight(self, opened):
        session, _ = opened(networks.product(), batch=(1, 4, 8))
        started, results = threading.Barrier(9), []

        def work():
            started.wait()
            for n in range(100):
                try:
                    results.append(session.run({"x": networks.rows(n % 8 + 1)})["y"].shape[0])
                except SessionClosedError:
                    results.append(0)

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        started.wait()
        session.close()
        session.close()
        for thread in threads:
            thread.join(timeout=PATIENCE)
        assert len(results) == 800
        assert 0 in results

    def test_two_sessions_side_by_side(self, opened):
        first, second = (opened(networks.product(), batch=(1, 4, 8)) for _ in range(2))
        same(*first, {"x": networks.rows(4)})
        first[0].close()
        same(*second, {"x": networks.rows(4)})

    @pytest.mark.alone_on_gpu
    def test_too_little_memory_means_smaller_pieces_or_429_and_passes(self, opened):
        width = 1 << 20
        relu = networks.model(
            [networks.helper.make_node("Relu", ["x"], ["y"])],
            [networks.value("x", networks.FLOAT, ["batch", width])],
            [networks.value("y", networks.FLOAT, ["batch", width])],
        )
        session, _ = opened(relu, batch=(1, 2, 256))
        x = np.arange(100 * width, dtype=np.float32).reshape(100, width) - 5
        with left_free(200 << 20):
            assert np.array_equal(session.run({"x": x})["y"], np.maximum(x, 0))
        assert 0 < max(session.runs) < 64
        another, _ = opened(relu, batch=(4, 8, 256))
        with left_free(8 << 20), pytest.raises(OutOfMemoryError, match="send smaller batches") as caught:
            another.run({"x": x})
        assert caught.value.get_http_status_code() == 429
        assert np.array_equal(another.run({"x": x})["y"], np.maximum(x, 0))

    def test_bytes_that_are_no_plan(self, opened):
        source = opened(networks.product())[0]
        for plan in (b"", b"x" * 5000):
            with pytest.raises((EngineMismatchError, ExecutionError), match="could not load|cannot run"):
                TensorRTSession(
                    plan, tensorrt=trt.load(), device=open_device(0), inputs=source.inputs, outputs=source.outputs
                )

    @pytest.mark.parametrize(
        "end",
        [
            "",
            "session.close()",
            "threading.Thread(target=use).start()",
            "threading.Thread(target=use_again_and_again, daemon=True).start(); used.wait()",
        ],
    )
    def test_the_process_ends_well(self, end, tmp_path):
        program = textwrap.dedent(f"""
            import sys, threading, time
            sys.path[:0] = {sys.path!r}
            import networks, numpy as np, mlflow_trt
            mlflow_trt.save_model(networks.product(), {str(tmp_path / "model")!r}, batch=(1, 4, 8))
            session = mlflow_trt.load_model({str(tmp_path / "model")!r})
            def use():
                print(session.run({{"x": networks.rows(5)}})["y"].shape, flush=True)
            used = threading.Event()
            def use_again_and_again():
                while True:
                    use()
                    used.set()
            use()
            thread = threading.Thread(target=use)
            thread.start()
            thread.join()
            {end}
        """)
        result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("(5, 8)") >= 2


class TestSpeedChangesNothing:
    """Overlap, CUDA graphs, batches of several callers and threads: the same numbers."""

    @pytest.fixture
    def batches(self):
        return [{"x": networks.rows(n % 23 + 1, seed=n)} for n in range(60)]

    def test_graphs(self, opened, batches):
        plain, _ = opened(networks.product(), batch=(1, 4, 8), settings={"cuda_graphs": False})
        graphs, _ = opened(networks.product(), batch=(1, 4, 8))
        for _ in range(4):  # captured, then replayed
            for feeds in batches[:25]:
                assert np.array_equal(graphs.run(feeds)["y"], plain.run(feeds)["y"])

    @pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "no graphs"])
    @pytest.mark.parametrize("delay", [0, 2.0], ids=["each by itself", "together"])
    def test_stress(self, graphs, delay, opened, batches):
        """Threads, sizes and bad inputs mixed, for a minute in all."""
        # Kernels are compiled, and read to be kept, while the threads run.
        settings = {"cuda_graphs": graphs, "max_batch_delay_ms": delay, "kernel_store": Store()}
        session, _ = opened(networks.product(), batch=(1, 4, 8), settings=settings)
        alone, _ = opened(networks.product(), batch=(1, 4, 8), settings={"cuda_graphs": False})
        expected = [alone.run(feeds)["y"] for feeds in batches]
        end, counts = time.monotonic() + STRESS_SECONDS, [0] * 16

        def work(thread):
            n = thread
            while time.monotonic() < end:
                n = (n * 7 + 3) % len(batches)
                if counts[thread] % 20 == 7:
                    with pytest.raises(InputShapeError):
                        session.run({"x": batches[n]["x"][:, :5]})
                y = session.run(batches[n])["y"]
                if delay:
                    assert relative_error({"y": y}, {"y": expected[n]}) < TF32
                else:
                    assert np.array_equal(y, expected[n])
                counts[thread] += 1

        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            list(pool.map(work, range(16)))
        assert min(counts) > 20

    def test_calls_at_the_same_time_run_together(self, opened, monkeypatch):
        monkeypatch.setattr(native, "extension", None)
        session, expected = opened(networks.product(), batch=(1, 4, 32), settings={"max_batch_delay_ms": 5.0})
        session.warm_up()
        feeds = [{"x": networks.rows(1, seed=n)} for n in range(64)]
        scheduler = session._scheduler
        with concurrent.futures.ThreadPoolExecutor(64) as pool:
            # Such a small network is done before the next caller comes: hold the GPU up until all of them have.
            with contextlib.ExitStack() as held:
                for _ in range(MOST_SLOTS):
                    held.enter_context(scheduler.slots.borrow())
                calls = [pool.submit(session.run, one) for one in feeds]
                wait_for(lambda: scheduler._batcher._callers == len(feeds))
            results = [call.result(PATIENCE) for call in calls]
        for one, result in zip(feeds, results, strict=True):
            assert relative_error(result, expected.run(one)) < TF32
        assert session.runs == {32: 2}

    def test_warm_means_no_new_contexts(self, opened, monkeypatch):
        session, expected = opened(networks.product(), batch=(1, 4, 16))
        session.warm_up()
        engine = session._scheduler.slots._free[0].engine
        monkeypatch.setattr(engine, "new_context", None)
        monkeypatch.setattr(engine, "keep_kernels", None)
        for rows in range(1, 40):
            same(session, expected, {"x": networks.rows(rows)})

    def test_kernels_are_kept_for_the_next_session(self, opened, tmp_path):
        store = Store()
        first, expected = opened(networks.product(), batch=(1, 4, 8), settings={"kernel_store": store})
        same(first, expected, {"x": networks.rows(4)})
        size = len(store.kept)
        assert size > 0
        second, _ = opened(networks.product(), batch=(1, 4, 8), settings={"kernel_store": store})
        same(second, expected, {"x": networks.rows(4)})
        same(second, expected, {"x": networks.rows(8)})
        assert len(store.kept) >= size


@pytest.mark.skipif(native.extension is None, reason=native.why_not)
class TestAroundPython:
    """Calls that the extension runs give what Python's give in the same size, bit for bit, and nobody else's rows."""

    SETTINGS: ClassVar = {"max_batch_delay_ms": 2.0}

    @staticmethod
    def natively(session):
        return sum(count for _, count in session._scheduler._native.runs)

    @pytest.fixture
    def sessions(self, opened, monkeypatch):
        """One that goes around Python, and one that does not."""

        def open_both(model, *, rows_in_graph=None, **recipe):
            if rows_in_graph is not None:
                monkeypatch.setattr(slot_module, "GRAPH_INPUT_BYTES", networks.rows(rows_in_graph).nbytes)
            session, _ = opened(model, on_cpu=False, settings=self.SETTINGS, **recipe)
            with monkeypatch.context() as patch:
                patch.setattr(native, "extension", None)
                alone, _ = opened(model, on_cpu=False, **recipe)
            return session, alone

        return open_both

    @pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
    def test_one_caller(self, warm, sessions):
        session, alone = sessions(networks.product(), batch=(1, 4, 16))
        if warm:
            session.warm_up()
        for seed in range(3):
            for rows in range(1, 17):
                x = networks.rows(rows, seed=seed)
                assert np.array_equal(session.run({"x": x})["y"], alone.run({"x": x})["y"])
        assert session.runs == alone.runs
        assert self.natively(session) >= (48 if warm else 16)

    def test_several_inputs(self, sessions):
        shapes = {"input_ids": ((-1, 4), (-1, 8), (-1, 16))}
        session, alone = sessions(networks.transformer(), batch=(1, 2, 4), shapes=shapes)
        session.warm_up()
        for rows in (1, 2, 3, 4):
            feeds = networks.sentences(rows, 8)
            outputs = session.run(feeds)
            for name, array in alone.run(feeds).items():
                assert outputs[name].dtype == array.dtype
                assert np.array_equal(outputs[name], array), name
        assert self.natively(session) == 4

    def test_rows_of_megabytes(self, opened):
        """Which are uploaded as they are copied."""
        width = 1 << 18
        relu = networks.model(
            [networks.helper.make_node("Relu", ["x"], ["y"])],
            [networks.value("x", networks.FLOAT, ["batch", width])],
            [networks.value("y", networks.FLOAT, ["batch", width])],
        )
        session, _ = opened(relu, on_cpu=False, batch=(1, 2, 8), settings=self.SETTINGS)
        session.warm_up()
        with concurrent.futures.ThreadPoolExecutor(8) as pool:

            def call(n):
                x = np.random.default_rng(n).standard_normal((n % 5 + 1, width)).astype(np.float32)
                assert np.array_equal(session.run({"x": x})["y"], np.maximum(x, 0))

            for n in range(5):
                call(n)
            list(pool.map(call, range(200)))
        assert self.natively(session) > 20

    @pytest.mark.parametrize("rows_in_graph", [1000, 3])
    def test_threads(self, rows_in_graph, sessions):
        """With rows of many numbers; meanwhile the slots are wanted for what only Python does."""
        sizes = (1, 2, 4, 8, 16, 32)
        session, alone = sessions(networks.product(), batch=(1, 8, 32), rows_in_graph=rows_in_graph)
        batches = [networks.rows(n % 7 + 1, seed=n) for n in range(64)]
        expected = []
        for batch in batches:
            padded = (np.concatenate([batch, batch[-1:].repeat(size - len(batch), 0)]) for size in sizes
                      if size >= len(batch))  # fmt: skip
            expected.append([alone.run({"x": x})["y"][: len(batch)].tobytes() for x in padded])
        large = networks.rows(70)
        expected_large = alone.run({"x": large})["y"]
        end, counts = time.monotonic() + STRESS_SECONDS, [0] * 32

        def work(thread):
            n = thread
            while time.monotonic() < end:
                n = (n * 5 + 3) % len(batches)
                assert session.run({"x": batches[n]})["y"].tobytes() in expected[n]
                counts[thread] += 1
                if thread == 0 and counts[0] % 50 == 0:
                    assert np.array_equal(session.run({"x": large})["y"], expected_large)
                if thread == 1 and counts[1] % 200 == 0:
                    session._scheduler.slots.trim()

        with concurrent.futures.ThreadPoolExecutor(32) as pool:
            list(pool.map(work, range(32)))
        assert min(counts) > 20
        assert self.natively(session) > sum(counts) / 100

    def test_callers_who_wait_get_their_own_rows(self, opened):
        session, expected = opened(networks.product(), batch=(1, 4, 32), settings=self.SETTINGS)
        session.warm_up()
        feeds = [{"x": networks.rows(1, seed=n)} for n in range(64)]
        with concurrent.futures.ThreadPoolExecutor(64) as pool:
            results = list(pool.map(session.run, feeds * 50))
        for n, result in enumerate(results):
            assert relative_error(result, expected.run(feeds[n % 64])) < TF32
        assert self.natively(session) == sum(session.runs.values())
        assert sum(size * runs for size, runs in session.runs.items()) >= len(results)

    def test_closing_while_they_run(self, opened):
        session, _ = opened(networks.product(), batch=(1, 4, 16), settings=self.SETTINGS)
        session.warm_up()
        done = []

        def call(n):
            x = networks.rows(n % 5 + 1, seed=n)
            while True:
                try:
                    done.append(session.run({"x": x})["y"].shape)
                except SessionClosedError:
                    return

        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            calls = [pool.submit(call, n) for n in range(16)]
            wait_for(lambda: len(done) > 1000)
            session.close()
            for each in calls:
                each.result(PATIENCE)


class TestOnTheGpu:
    """Arrays of other libraries go in, and out, without a copy on the host."""

    torch = property(lambda self: pytest.importorskip("torch"))

    @pytest.mark.parametrize("rows", [1, 3, 8, 21])
    def test_torch(self, rows, opened):
        session, _ = opened(networks.product(), batch=(2, 4, 8))
        x = networks.rows(rows)
        outputs = session.run_on_device({"x": self.torch.from_numpy(x).cuda()})
        expected = session.run({"x": x})["y"]
        taken = self.torch.from_dlpack(outputs["y"])
        assert taken.is_cuda
        assert np.array_equal(taken.cpu().numpy(), expected)
        assert np.array_equal(outputs["y"].numpy(), expected)
        assert np.array_equal(self.torch.as_tensor(outputs["y"], device="cuda").cpu().numpy(), expected)
        del outputs
        assert np.array_equal(taken.cpu().numpy(), expected)  # kept alive by whoever took it

    def test_what_was_computed_just_before_is_waited_for(self, opened):
        session, _ = opened(networks.product(), batch=(1, 64, 64))
        x = self.torch.from_numpy(networks.rows(64)).cuda()
        expected = session.run({"x": (x * 3).cpu().numpy()})["y"]
        for _ in range(50):
            y = x
            for _ in range(30):
                y = y * 1.0
            assert np.array_equal(session.run_on_device({"x": y * 3})["y"].numpy(), expected)

    def test_cupy(self, opened):
        cupy = pytest.importorskip("cupy")
        session, _ = opened(networks.every_dtype(), batch=(1, 2, 4))
        feeds = networks.every_dtype_feeds(3)
        outputs = session.run_on_device({name: cupy.asarray(array) for name, array in feeds.items()})
        for name, array in session.run(feeds).items():
            assert np.array_equal(cupy.asnumpy(cupy.from_dlpack(outputs[name])), array), name

    def test_bfloat16(self, opened):
        session, _ = opened(networks.bfloat16_product(), on_cpu=False, batch=(1, 2, 4))
        x = networks.rows(3)
        given = self.torch.from_numpy(x).cuda()
        given = given.bfloat16() if session.inputs[0].dtype == "bfloat16" else given
        taken = self.torch.from_dlpack(session.run_on_device({"x": given})["y"])
        assert taken.dtype == self.torch.bfloat16
        assert np.array_equal(taken.float().cpu().numpy(), session.run({"x": x})["y"].astype(np.float32))

    def test_what_does_not_fit_says_so(self, opened):
        session, _ = opened(networks.product(), batch=(2, 4, 8))
        x = self.torch.from_numpy(networks.rows(4)).cuda()
        for bad, message in (
            (x.cpu(), "is on the host"),
            (x.double(), "is of dtype float64|no dtype that TensorRT has"),
            (self.torch.cat([x, x], 1)[:, ::2], "is not contiguous"),
            (x[:, :5], "has the shape"),
            (networks.rows(4).tolist(), "is a list; expected an array on the GPU"),
        ):
            with pytest.raises(mlflow_trt.InputError, match=message):
                session.run_on_device({"x": bad})
        with pytest.raises(mlflow_trt.InputError, match="missing or unknown"):
            session.run_on_device({"z": x})
        assert session.run_on_device({"x": x})["y"].shape == (4, 8)
