"""Read documents from Parquet files, row group by row group."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dwt_jax.errors import UserError, did_you_mean
from dwt_jax.files import LFS_POINTER_PREFIX, reject_lfs_pointer

_BATCH_ROWS = 256


def read_parquet_documents(
    path: Path, field: str, on_bytes_read: Callable[[int], None]
) -> Iterator[tuple[str | bytes, str]]:
    """Yield the texts of a column, and where each is.

    Args:
        path: the file.
        field: name of the column; `a.b` is the member b of the structs a. Nulls are empty texts.
        on_bytes_read: called with parts of the file's size, in proportion to the rows that were read.

    Raises:
        UserError: the file is damaged or no Parquet file, or has no such column of text.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    size, position, row = path.stat().st_size, 0, 0
    try:
        with open(path, "rb") as raw:
            reject_lfs_pointer(path, raw.read(len(LFS_POINTER_PREFIX)))
            raw.seek(0)
            file = pq.ParquetFile(raw)
            names = _find_column(file.schema_arrow, field, path)
            for batch in file.iter_batches(_BATCH_ROWS, columns=[field], use_threads=False):
                column = batch.column(names[0])
                for text in (pc.struct_field(column, names[1:]) if names[1:] else column).to_pylist():
                    row += 1
                    yield text or "", f"{path}, row {row}"
                new_position = size * row // file.metadata.num_rows
                on_bytes_read(new_position - position)
                position = new_position
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split())[:200]
        raise UserError(f"{path}: {reason}, expected a Parquet file that can be read") from None
    on_bytes_read(size - position)


def _find_column(schema: Any, field: str, path: Path) -> list[str]:
    """Return the names from the column to the member of its structs that `field` is.

    Raises:
        UserError: there is no such column, or it holds no text.
    """
    import pyarrow.types as types

    names = [field] if field in schema.names else field.split(".")
    if schema.names.count(names[0]) > 1:
        raise UserError(f"{path}: several columns '{names[0]}', expected one")
    kind: Any = schema
    for name in names:
        members = (
            {member.name: member.type for member in kind} if kind is schema or types.is_struct(kind) else {}
        )
        if name not in members:
            raise UserError(f"{path}: no column '{field}'{did_you_mean(name, members)}")
        kind = members[name]
    value = kind.value_type if types.is_dictionary(kind) else kind
    checks = (types.is_string, types.is_large_string, types.is_string_view, types.is_binary)
    if not any(check(value) for check in (*checks, types.is_large_binary)):
        raise UserError(f"{path}: column '{field}' is {kind}, expected a column of strings")
    return names
