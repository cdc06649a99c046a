"""What the footer of a parquet file says of its columns, read without pyarrow.

pyarrow ends the process where the metadata of a column contradicts itself, which a client may send. Source: the Thrift
compact protocol, https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md, and the structures
of https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift, whose field numbers these are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_MAGIC = b"PAR1"
_LARGEST_FOOTER = 1 << 20
_DEEPEST = 16

_SCHEMA, _ROW_GROUPS = 2, 4  # of FileMetaData
_TYPE_LENGTH, _CHILDREN = 2, 5  # of SchemaElement
_COLUMNS = 1  # of RowGroup
_META_DATA = 3  # of ColumnChunk
_TYPE, _ENCODINGS, _PATH, _VALUES, _UNCOMPRESSED = 1, 2, 3, 5, 6  # of ColumnMetaData

_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)

_WIDTHS = {0: 1, 1: 4, 2: 8, 3: 12, 4: 4, 5: 8, 6: 4}
"""Bytes of a value by physical type; of a text at least its offset in memory."""
_BYTE_ARRAY, _FIXED = 6, 7
_DICTIONARIES = frozenset({2, 8})


@dataclass(frozen=True)
class ColumnChunk:
    """One column of one group of rows. `width` is what a value takes in memory at least."""

    path: str
    values: int
    uncompressed: int
    width: int
    has_texts: bool
    has_dictionary: bool


def read_columns(body: memoryview) -> list[ColumnChunk]:
    """Every column of every group of rows. Raises ValueError for what is no parquet file."""
    if len(body) < 12 or bytes(body[-4:]) != _MAGIC:
        raise ValueError("it does not end as parquet does")
    length = int.from_bytes(body[-8:-4], "little")
    if length > min(_LARGEST_FOOTER, len(body) - 12):
        raise ValueError(f"its footer has {length} bytes")
    try:
        footer = _Reader(bytes(body[-8 - length : -8])).struct(_DEEPEST)
        leaves = [element for element in footer[_SCHEMA] if not element.get(_CHILDREN)]
        return [
            _column(column[_META_DATA], leaf)
            for group in footer[_ROW_GROUPS]
            for column, leaf in zip(group[_COLUMNS], leaves, strict=True)
        ]
    except (KeyError, IndexError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"its footer is damaged: {type(error).__name__} {error}") from error


def _column(column: dict[int, Any], leaf: dict[int, Any]) -> ColumnChunk:
    kind, values, uncompressed = column[_TYPE], column[_VALUES], column[_UNCOMPRESSED]
    width = leaf[_TYPE_LENGTH] if kind == _FIXED else _WIDTHS[kind]
    if min(values, uncompressed, width) < 0:
        raise ValueError("its footer has negative sizes")
    return ColumnChunk(
        path=b".".join(column[_PATH]).decode(),
        values=values,
        uncompressed=uncompressed,
        width=width,
        has_texts=kind == _BYTE_ARRAY,
        has_dictionary=not _DICTIONARIES.isdisjoint(column[_ENCODINGS]),
    )


class _Reader:
    """Thrift's compact protocol: structures as dicts by the numbers of their fields."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def struct(self, depth: int) -> dict[int, Any]:
        if not depth:
            raise ValueError("its footer is nested too deeply")
        fields: dict[int, Any] = {}
        number = 0
        while header := self._byte():
            step, kind = header >> 4, header & 15
            number = number + step if step else self._zigzag()
            fields[number] = kind == _TRUE if kind in {_TRUE, _FALSE} else self._value(kind, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        if kind in {_I16, _I32, _I64}:
            return self._zigzag()
        if kind == _BINARY:
            return self._take(self._varint())
        if kind in {_LIST, _SET, _MAP}:
            return self._map(depth) if kind == _MAP else self._list(depth)
        if kind == _STRUCT:
            return self.struct(depth - 1)
        if kind in {_BYTE, _TRUE, _FALSE, _DOUBLE}:  # the truth as elements of lists
            return self._take(8 if kind == _DOUBLE else 1)
        raise ValueError(f"its footer has a field of type {kind}")

    def _list(self, depth: int) -> list[Any]:
        header = self._byte()
        size = header >> 4
        size = self._varint() if size == 15 else size
        if not depth or size > len(self._data) - self._at:  # each element takes a byte or more
            raise ValueError("its footer is cut off, or nested too deeply")
        return [self._value(header & 15, depth - 1) for _ in range(size)]

    def _map(self, depth: int) -> dict[Any, Any]:
        size = self._varint()
        if not size:
            return {}
        if not depth or size > len(self._data) - self._at:
            raise ValueError("its footer is cut off, or nested too deeply")
        kinds = self._byte()
        for _ in range(size):
            self._value(kinds >> 4, depth - 1)
            self._value(kinds & 15, depth - 1)
        return {}  # nothing that is asked for stands in one

    def _byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1]

    def _take(self, size: int) -> bytes:
        if size > len(self._data) - self._at:
            raise ValueError("its footer is cut off")
        self._at += size
        return self._data[self._at - size : self._at]

    def _varint(self) -> int:
        number = shift = 0
        while True:
            byte = self._byte()
            number |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return number
            if shift > 63:
                raise ValueError("its footer has a number of more than 64 bits")

    def _zigzag(self) -> int:
        number = self._varint()
        return (number >> 1) ^ -(number & 1)
