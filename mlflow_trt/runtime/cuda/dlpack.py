"""DLPack, as far as arrays on a GPU need it: read another library's tensor, and hand out one of ours.

Layout and rules: https://dmlc.github.io/dlpack/latest/c_api.html (`DLManagedTensor`) and
https://data-apis.org/array-api/latest/design_topics/data_interchange.html. numpy speaks DLPack for host memory only.
"""

from __future__ import annotations

import atexit
import ctypes
from collections.abc import Callable
from typing import Any, NamedTuple

CPU = 1  # kDLCPU
CUDA = 2  # kDLCUDA

_NAME = b"dltensor"
_USED = b"used_dltensor"
# DLPack's type code and bits for each dtype; booleans are of type code 6, bfloat16 of 4.
_TYPES = {
    "float32": (2, 32),
    "float16": (2, 16),
    "bfloat16": (4, 16),
    "int8": (0, 8),
    "int32": (0, 32),
    "int64": (0, 64),
    "uint8": (1, 8),
    "bool": (6, 8),
}
_DTYPES = {code: name for name, code in _TYPES.items()}


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class _Managed(ctypes.Structure):
    pass


_Deleter = ctypes.CFUNCTYPE(None, ctypes.POINTER(_Managed))
_Managed._fields_ = [("tensor", _Tensor), ("manager", ctypes.c_void_p), ("deleter", _Deleter)]

_CapsuleDestructor = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_new = ctypes.pythonapi.PyCapsule_New
_new.restype = ctypes.py_object
_new.argtypes = [ctypes.c_void_p, ctypes.c_char_p, _CapsuleDestructor]
_is_valid = ctypes.pythonapi.PyCapsule_IsValid
_is_valid.argtypes = [ctypes.py_object, ctypes.c_char_p]
_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype = ctypes.c_void_p
_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
_rename = ctypes.pythonapi.PyCapsule_SetName
_rename.argtypes = [ctypes.py_object, ctypes.c_char_p]
# A destructor gets the dying capsule by address: with a py_object, ctypes would raise it from the dead.
_is_valid_at = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(
    ("PyCapsule_IsValid", ctypes.pythonapi)
)
_pointer_at = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


class Imported(NamedTuple):
    """A tensor that another library owns until `release` is called. `strides` count elements; None: contiguous."""

    address: int
    device: tuple[int, int]
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    release: Callable[[], None]


def read(capsule: Any) -> Imported:
    """Take over the tensor in a capsule that `__dlpack__` gave. Raises ValueError for what is no tensor of ours."""
    if not _is_valid(capsule, _NAME):
        raise ValueError("this DLPack capsule was used before, or is of a version that is not understood")
    managed = ctypes.cast(_pointer(capsule, _NAME), ctypes.POINTER(_Managed))
    tensor = managed.contents.tensor
    dtype = _DTYPES.get((tensor.code, tensor.bits)) if tensor.lanes == 1 else None
    if dtype is None:
        raise ValueError(f"DLPack type code {tensor.code} with {tensor.bits} bits is no dtype that TensorRT has")
    _rename(capsule, _USED)

    def release() -> None:
        if managed.contents.deleter:
            managed.contents.deleter(managed)

    return Imported(
        address=(tensor.data or 0) + tensor.byte_offset,
        device=(tensor.device_type, tensor.device_id),
        dtype=dtype,
        shape=tuple(tensor.shape[axis] for axis in range(tensor.ndim)),
        strides=tuple(tensor.strides[axis] for axis in range(tensor.ndim)) if tensor.strides else None,
        release=release,
    )


_lent: dict[int, tuple[Any, ...]] = {}
"""What other libraries still use: the owner of the memory and the C structures, by the address of the latter."""


def export(owner: object, address: int, dtype: str, shape: tuple[int, ...], device_ordinal: int) -> Any:
    """A capsule for `__dlpack__` to return. `owner` lives until the other library lets go of it."""
    code, bits = _TYPES[dtype]
    sizes = (ctypes.c_int64 * len(shape))(*shape)
    managed = _Managed()
    managed.tensor = _Tensor(
        data=address, device_type=CUDA, device_id=device_ordinal, ndim=len(shape), code=code, bits=bits, lanes=1,
        shape=ctypes.cast(sizes, ctypes.POINTER(ctypes.c_int64)), strides=None, byte_offset=0,
    )  # fmt: skip
    managed.deleter = _deleter
    key = ctypes.addressof(managed)
    _lent[key] = (owner, managed, sizes)
    return _new(key, _NAME, _destructor)


def _delete(managed: Any) -> None:
    _lent.pop(ctypes.addressof(managed.contents), None)


def _destroy(capsule: int) -> None:
    """A capsule that nobody used takes its tensor along; one that was used is only a shell."""
    try:
        is_unused = _is_valid_at(capsule, _NAME)
    except BaseException:  # noqa: BLE001  # not ours: of a library that refuses the tensor, raised before it let go
        is_unused = _is_valid_at(capsule, _NAME)
    if is_unused:
        _lent.pop(_pointer_at(capsule, _NAME), None)


_deleter = _Deleter(_delete)
_destructor = _CapsuleDestructor(_destroy)

# Others may let go of a tensor after this module is gone: nothing of ours is called then, and what they read stays.
ctypes.pythonapi.Py_IncRef(ctypes.py_object(_lent))


@atexit.register
def _leave_the_rest() -> None:
    for _, managed, _ in list(_lent.values()):
        managed.deleter = _Deleter()
