"""How large the table of a parquet body is before anything is unpacked: 39 kB can stand for gigabytes.

What the body says of itself is believed here: of each column, how many values it has.
"""

from __future__ import annotations

from mlflow_trt.deploy.serve.parquet_footer import ColumnChunk, read_columns
from mlflow_trt.deploy.serve.problems import Cause, HttpError


def check_unpacked(body: memoryview, limit: int) -> None:
    """Raise HttpError: 413 for a table that takes more than so many bytes, 400 for what is no parquet."""
    import pyarrow as pa

    try:
        columns = read_columns(body)
        # Numbers that a dictionary repeats count each time.
        size = sum(max(column.uncompressed, column.values * column.width) for column in columns)
        if size <= limit:
            repeated = {column.path for column in columns if _may_repeat(column, limit)}
            size += sum(_text_bytes(body, path, limit) for path in sorted(repeated))
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        text = str(error).partition("\n")[0][:200]
        raise HttpError(400, Cause.BAD_REQUEST, f"the body is no parquet that can be read: {text}") from error
    if size > limit:
        raise HttpError(
            413,
            Cause.TOO_LARGE,
            f"the table takes {size} bytes or more, and the server takes {limit} at most; send fewer rows",
        )


def _may_repeat(column: ColumnChunk, limit: int) -> bool:
    """Whether a dictionary might repeat texts or bytes to more than the limit, each as long as all of it."""
    return column.has_texts and column.has_dictionary and column.values * column.uncompressed > limit


def _text_bytes(body: memoryview, path: str, limit: int) -> int:
    """What the texts of a column take, counted by the dictionary that they come from; more than `limit` if more."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    file = pq.ParquetFile(pa.BufferReader(pa.py_buffer(body)), read_dictionary=[path])
    size = 0
    for batch in file.iter_batches(columns=[path]):
        values = batch.column(0)
        while not pa.types.is_dictionary(values.type):
            if not hasattr(values, "flatten") or not values.type.num_fields:
                return limit + 1  # in a form that no client of a model sends
            values = values.flatten()[0] if pa.types.is_struct(values.type) else values.flatten()
        size += pc.sum(pc.binary_length(values.dictionary).take(values.indices)).as_py() or 0
        if size > limit:
            break
    return size
