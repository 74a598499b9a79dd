"""Files of outlines and cells that users bring: which format they have, and outlines in Parquet."""

import contextlib
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import shapely
from numpy.typing import NDArray

from celldetr.runtime.errors import InputError
from celldetr.slides.geojson import GZIP, MOST_CORNERS

BOM = b"\xef\xbb\xbf"
_BLANK = b" \t\r\n\x1e"
_HEAD = 1 << 16  # bytes of a file in which the names of all columns must be
_MOST_WKB = 16 * MOST_CORNERS  # bytes
_IMAGES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"\x89PNG\r\n\x1a\n", b"\x93NUMPY")
Format = Literal["parquet", "geojson", "image", "text", "unknown"]
"""image: TIFF, PNG or NPY."""


def read_format(path: Path, expected: str) -> tuple[Format, bytes]:
    """Tell the format of a file, or of what is compressed in it, from its first bytes, which are returned too.

    Raises
    ------
    InputError
        It cannot be read; the message says what is `expected`.
    """
    try:
        with path.open("rb") as file:
            start = file.read(_HEAD)
        if start.startswith(GZIP):
            with gzip.open(path) as file:
                start = file.read(_HEAD)
    except (OSError, EOFError) as error:
        raise InputError(f"{path}: cannot be read ({error}); expected {expected}") from error
    return _format(start), start


def _format(start: bytes) -> Format:
    if start.startswith(b"PAR1"):
        return "parquet"
    if start.startswith(_IMAGES):
        return "image"
    if start.startswith(b"PK") or start.removeprefix(BOM).lstrip(_BLANK)[:1] in (b"{", b"["):
        return "geojson"
    return "unknown" if not start.strip() or b"\0" in start else "text"


@contextlib.contextmanager
def open_parquet(path: Path) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file; `InputError` if it cannot be read, also while it is open."""
    try:
        with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: cannot be read as Parquet ({error}); is the file complete?") from error


def geometry_column(path: Path, file: pq.ParquetFile) -> str:
    """Name of the column with the outlines; `InputError` if there is none, or not in WKB."""
    schema = file.schema_arrow
    binary = [name for name in schema.names if is_binary(schema.field(name).type)]
    try:
        geo = json.loads((schema.metadata or {})[b"geo"])
        name = str(geo["primary_column"])
        encoding = geo["columns"][name].get("encoding", "WKB")
    except KeyError:
        name = "geometry" if "geometry" in binary or len(binary) != 1 else binary[0]
        encoding = "WKB"
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: the GeoParquet metadata cannot be read ({error}); write the file again") from error
    if encoding != "WKB" or name not in binary:
        raise InputError(
            f"{path}: got no column {name!r} of geometry in WKB (columns: {', '.join(schema.names)}; encoding "
            f"{encoding}); expected GeoParquet with encoding WKB, or a binary column 'geometry'"
        )
    return name


def is_binary(kind: pa.DataType) -> bool:
    """Whether a column may hold WKB."""
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def from_wkb(column: pa.Array) -> NDArray[Any]:
    """Geometries (n,), None if missing, unreadable or too large."""
    values = [None if value is None or len(value) > _MOST_WKB else value for value in column.to_pylist()]
    shapes: NDArray[Any] = shapely.from_wkb(np.array(values, dtype=object), on_invalid="ignore")
    return shapes
