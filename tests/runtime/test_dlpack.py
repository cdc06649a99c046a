"""DLPack capsules: numpy's are read, ours are handed out and let go of."""

from __future__ import annotations

import gc
import subprocess
import sys
import textwrap
import weakref

import numpy as np
import pytest

from mlflow_trt.runtime.cuda import dlpack


class Owner:
    pass


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "int32", "int64", "uint8", "bool"])
def test_reads_what_numpy_lends(dtype):
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    found = dlpack.read(array.__dlpack__())
    assert found.address == array.ctypes.data
    assert (found.dtype, found.shape) == (dtype, (2, 3, 4))
    assert found.device[0] == 1  # the host
    assert found.strides in (None, (12, 4, 1))
    found.release()


def test_strides_tell_what_is_not_contiguous():
    found = dlpack.read(np.zeros((4, 6), np.float32)[:, ::2].__dlpack__())
    assert (found.shape, found.strides) == ((4, 3), (6, 2))
    found.release()


def test_numpy_gets_its_array_back():
    array = np.zeros(4, np.float32)
    reference = weakref.ref(array)
    found = dlpack.read(array.__dlpack__())
    del array
    gc.collect()
    assert reference() is not None
    found.release()
    gc.collect()
    assert reference() is None


def test_what_tensorrt_does_not_have_is_refused():
    with pytest.raises(ValueError, match="64 bits is no dtype that TensorRT has"):
        dlpack.read(np.zeros(3, np.float64).__dlpack__())
    capsule = np.zeros(3, np.float32).__dlpack__()
    dlpack.read(capsule).release()
    with pytest.raises(ValueError, match="was used before"):
        dlpack.read(capsule)


def test_hands_out_a_tensor_and_keeps_its_owner_until_it_is_let_go():
    owner = Owner()
    reference = weakref.ref(owner)
    found = dlpack.read(dlpack.export(owner, 4096, "bfloat16", (3, 5), 1))
    assert found[:5] == (4096, (dlpack.CUDA, 1), "bfloat16", (3, 5), None)
    del owner
    gc.collect()
    assert reference() is not None
    found.release()
    assert reference() is None


def test_a_capsule_that_nobody_takes_lets_go_by_itself():
    owner = Owner()
    reference = weakref.ref(owner)
    capsule = dlpack.export(owner, 4096, "float32", (), 0)
    del owner
    assert reference() is not None
    del capsule
    gc.collect()
    assert reference() is None
    assert not dlpack._lent


def test_a_tensor_that_is_refused_lets_go_by_itself():
    """Whoever refuses it destroys the capsule while its own error is on the way."""

    class Array(Owner):
        def __dlpack_device__(self):
            return dlpack.CUDA, 0

        def __dlpack__(self, **_):
            return dlpack.export(self, 4096, "float32", (3,), 0)

    array = Array()
    reference = weakref.ref(array)
    with pytest.raises((SystemError, RuntimeError, BufferError)):
        np.from_dlpack(array)
    del array
    gc.collect()
    assert reference() is None
    assert not dlpack._lent


@pytest.mark.parametrize("keeper", ["sys", "numpy"])
def test_a_tensor_may_outlive_python(keeper):
    program = textwrap.dedent(f"""
        import sys
        import numpy
        from mlflow_trt.runtime.cuda import dlpack
        dlpack.CUDA = 3  # pinned memory, which numpy takes

        class Array:
            array = numpy.arange(4.0, dtype=numpy.float32)
            def __dlpack_device__(self):
                return 3, 0
            def __dlpack__(self, **_):
                return dlpack.export(self, self.array.ctypes.data, "float32", (4,), 0)

        {keeper}.kept = numpy.from_dlpack(Array())
        assert numpy.array_equal({keeper}.kept, Array.array)
    """)
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
