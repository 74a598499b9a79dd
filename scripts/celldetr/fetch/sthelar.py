"""Get the patches of one section of STHELAR, from Hugging Face or from a copy on this machine.

The data set has the patches of all sections in Parquet files (``data/``), a table of the places of all patches
(``patches_overview_*.parquet``) and a table of the cells of each section (``cell_metadata/``). Only the rows of the
section are transferred: row groups whose statistics exclude it are not read.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import requests
from huggingface_hub import HfApi, get_token, hf_hub_url

from celldetr.config.sthelar import CELLS, PLACES, SOURCE
from celldetr.fetch.download import stop_if_full
from celldetr.fetch.http import TransferError
from celldetr.fetch.members import NoRanges, RemoteFile
from celldetr.runtime.errors import InputError
from celldetr.runtime.files import atomic, held, write_json

log = logging.getLogger(__name__)

SECTION = "slide_id"
PATCH_COLUMNS = ("file_name", "image", SECTION, "cell_id_map", "Dice", "Jaccard", "bPQ")
PLACE_COLUMNS = ("file_name", SECTION, "xmin", "ymin", "xmax", "ymax")
_ROWS = 64  # read at a time: a row has about 0.1 MB
_OVERVIEW = re.compile(r"[^/]*patches_overview[^/]*\.parquet")
_PATCHES = re.compile(r"data/[^/]*\.parquet")
_OF = re.compile(r"-of-(\d+)\.parquet$")  # how many files of patches there are


@dataclass(frozen=True)
class _Source:
    """A data set: what identifies it, the names of its files, and how one is opened."""

    identity: dict[str, str]
    names: tuple[str, ...]
    open: Callable[[str], IO[bytes]]


def fetch_section(
    section: str,
    destination: str | os.PathLike[str],
    *,
    repository: str,
    revision: str,
    folder: str | None = None,
) -> Path:
    """Get a section (`slide_id`) as a folder: its rows of the patches and of the places, and the table of its cells.

    What was received of a `revision` is kept in ``.{name}.part`` beside the `destination` and not requested again.
    With a `folder`, that copy of the data set is read, and nothing is requested. A Hugging Face token is sent if there
    is one; the data set does not need it.

    Raises
    ------
    InputError
        The data set cannot be reached or read, lacks files or columns, does not have the section or all of its patches.
    """
    final = Path(destination)
    staging = final.with_name(f".{final.name}.part")
    staging.mkdir(parents=True, exist_ok=True)
    with held(staging), ExitStack() as stack:
        source = _copy(Path(folder)) if folder else _hub(repository, revision, stack)
        record = staging / SOURCE
        same = record.exists() and json.loads(record.read_text(encoding="utf-8")) == source.identity
        if folder or not same:  # a copy may have changed
            for path in staging.iterdir():
                path.unlink()
        write_json(record, source.identity)
        try:
            _get(source, section, staging)
        except (OSError, pa.ArrowException) as error:
            stop_if_full(error, final)
            raise InputError(f"STHELAR: {section}: cannot be read ({type(error).__name__}: {error})") from error
        if final.exists():
            shutil.rmtree(final)
        os.replace(staging, final)
    return final


def _copy(folder: Path) -> _Source:
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.parquet"))
    if not names:
        raise InputError(
            f"STHELAR: {folder}: got no Parquet file, expected a copy of the data set: data/, cell_metadata/ and "
            "patches_overview_*.parquet; correct xenium.sthelar.folder"
        )
    return _Source({"folder": folder.name}, tuple(names), lambda name: (folder / name).open("rb"))


def _hub(repository: str, revision: str, stack: ExitStack) -> _Source:
    """List the files of a revision; they are read by range requests."""
    token = get_token()
    try:
        stated = HfApi().dataset_info(repository, revision=revision, token=token, timeout=60)
    except Exception as error:  # of the Hub, or of the HTTP library below, which differs between versions
        reason = str(error).replace(token, "(token)") if token else str(error)
        raise InputError(
            f"STHELAR: {repository} at revision {revision} cannot be listed ({type(error).__name__}: {reason}); check "
            "xenium.sthelar.repository and revision, the connection, HF_ENDPOINT and HF_HUB_OFFLINE, and start again; "
            "or get a copy by other means and give its path in xenium.sthelar.folder"
        ) from None  # its traceback could show the token
    commit = stated.sha or revision
    session = stack.enter_context(requests.Session())
    if token:
        session.headers["Authorization"] = f"Bearer {token}"

    def read(name: str) -> IO[bytes]:
        file: Any = RemoteFile(hf_hub_url(repository, name, repo_type="dataset", revision=commit), session)
        return file

    names = sorted(file.rfilename for file in stated.siblings or ())
    return _Source({"repository": repository, "revision": commit}, tuple(names), read)


def _get(source: _Source, section: str, staging: Path) -> None:
    overviews = [name for name in source.names if _OVERVIEW.fullmatch(name)]
    shards = [name for name in source.names if _PATCHES.fullmatch(name)]
    cells = f"cell_metadata/{section}_cell_metadata.parquet"
    stated = {int(match[1]) for name in shards if (match := _OF.search(name))}
    if len(overviews) != 1 or not shards or stated - {len(shards)}:
        raise InputError(
            f"STHELAR: got the tables of places {overviews or 'none'} and {len(shards)} files data/*.parquet, expected "
            f"one patches_overview_*.parquet and {max(stated, default='some')} files; is it STHELAR, and complete?"
        )
    places = _read(source, overviews[0], lambda file: _rows(file, section, PLACE_COLUMNS, staging / PLACES))
    if not places:
        raise InputError(
            f"STHELAR: {section}: {overviews[0]} has no row of it; expected in column sample of the sheet one of "
            f"{', '.join(_read(source, overviews[0], _sections)) or 'none'}"
        )
    if cells not in source.names:
        raise InputError(f"STHELAR: {section}: got no {cells}, expected the table of its cells")
    _read(source, cells, lambda file: _whole(file, staging / CELLS))
    found = 0
    for number, name in enumerate(shards):
        kept = staging / f"patches-{number:05}.parquet"
        if not kept.exists():
            _read(source, name, lambda file, kept=kept: _rows(file, section, PATCH_COLUMNS, kept))  # type: ignore[misc]
        found += pq.read_metadata(kept).num_rows if kept.exists() else 0
        log.info("%s: %d of %d patches (%s)", section, found, places, name)
        if found == places:
            break
    if not found or found > places:
        raise InputError(
            f"STHELAR: {section}: got {found} patches in data/, but {places} places in {overviews[0]}; expected a "
            "place for each: the files are not of one revision"
        )
    if found < places:
        log.warning("%s: %d places of %s have no patch in data/", section, places - found, overviews[0])


def _read(source: _Source, name: str, action: Callable[[pq.ParquetFile], Any]) -> Any:
    """Open a file and do something with it; InputError with its name if that fails."""
    try:
        with source.open(name) as file:
            return action(pq.ParquetFile(file))
    except NoRanges:
        raise InputError(
            f"STHELAR: {name}: the server does not send parts of files; get a copy of the data set by other means and "
            "give its path in xenium.sthelar.folder"
        ) from None
    except TransferError as failure:
        raise InputError(
            f"STHELAR: {name}: {failure}; start again later (received data is kept), or get a copy of the data set by "
            "other means and give its path in xenium.sthelar.folder"
        ) from failure
    except InputError as error:
        raise InputError(f"STHELAR: {name}: {error}") from error
    except pa.ArrowInvalid as error:
        raise InputError(f"STHELAR: {name}: got no whole Parquet file ({error}); get it again") from error


def _rows(file: pq.ParquetFile, section: str, columns: Sequence[str], out: Path) -> int:
    """Write the rows of a section; returns how many, and writes nothing if there are none."""
    missing = [name for name in columns if name not in file.schema_arrow.names]
    if missing:
        raise InputError(f"got no columns {missing}, only {file.schema_arrow.names}; expected the layout of STHELAR")
    groups = [group for group in range(file.num_row_groups) if _may_hold(file, group, section)]
    groups = [group for group in groups if section in file.read_row_group(group, [SECTION])[SECTION].to_pylist()]
    if not groups:
        return 0
    schema, count = pa.schema([file.schema_arrow.field(name) for name in columns]), 0
    with atomic(out) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        for batch in _batches(file, groups, columns):
            table = pa.Table.from_batches([batch]).select(list(columns))
            table = table.filter(pc.equal(table[SECTION].cast(pa.string()), section))
            if table.num_rows:
                writer.write_table(table)
                count += table.num_rows
    return count


def _batches(file: pq.ParquetFile, groups: Iterable[int], columns: Sequence[str] | None) -> Iterator[pa.RecordBatch]:
    """Yield a few rows at a time; row group by row group, as PyArrow would hold all that it is asked for at once."""
    for group in groups:
        yield from file.iter_batches(_ROWS, row_groups=[group], columns=columns and list(columns))


def _may_hold(file: pq.ParquetFile, group: int, section: str) -> bool:
    """Whether the statistics of a row group allow a section, which may lie between the least and the greatest."""
    columns = file.metadata.row_group(group)
    place = next(i for i in range(columns.num_columns) if columns.column(i).path_in_schema == SECTION)
    stated = columns.column(place).statistics
    return stated is None or not stated.has_min_max or bool(stated.min <= section <= stated.max)


def _sections(file: pq.ParquetFile) -> list[str]:
    return sorted({str(name) for name in file.read([SECTION])[SECTION].unique().to_pylist()})


def _whole(file: pq.ParquetFile, out: Path) -> None:
    with atomic(out) as temporary, pq.ParquetWriter(temporary, file.schema_arrow, compression="zstd") as writer:
        for batch in _batches(file, range(file.num_row_groups), None):
            writer.write_batch(batch)
