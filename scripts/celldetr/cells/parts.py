"""Parts of a slide's cells: files that are written while the slide is read, so that a killed job loses little.

A part holds the cells of some successive tiles. Its name is the number of its first tile; its metadata say where it
ends and what was counted. A folder of parts is complete when it has its name and a ``summary.json``.
"""

import contextlib
import hashlib
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from celldetr.cells.table import ROWS, writer
from celldetr.runtime.errors import InputError
from celldetr.runtime.files import atomic, held, remove, write_json

log = logging.getLogger(__name__)

SUMMARY = "summary.json"
OUTSIDE_PART = "outside.parquet"
"""Given cells that lie outside of the slide; of the first job."""
TILES, MOST_ROWS = 256, 65_536
"""Tiles of a part; it ends earlier when it has so many rows."""
_KEY = "celldetr.part"
_IDENTITY = "identity.json"


@dataclass
class Tally:
    """What was counted and timed while some tiles were read."""

    counts: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=dict)
    read_mm2: float = 0.0
    damaged: list[str] = field(default_factory=list)

    def add(self, other: "Tally") -> None:
        """Add another one."""
        for name in ("counts", "seconds"):
            mine = getattr(self, name)
            for key, value in getattr(other, name).items():
                mine[key] = mine.get(key, 0) + value
        self.read_mm2 += other.read_mm2
        self.damaged += other.damaged


class PartWriter:
    """Writes parts, one after the other, from tile `start` on; use it in one thread."""

    def __init__(self, folder: Path, schema: pa.Schema, start: int, identity: Mapping[str, Any]) -> None:
        self.folder, self.schema, self.start = folder, schema, start
        self._of = digest_of(identity)
        self._reached = start
        self._tables: list[pa.Table] = []
        self._tally = Tally()

    def add(self, table: pa.Table, tally: Tally, start: int, stop: int) -> None:
        """Add the rows of the tiles from `start` to `stop`; `RuntimeError` after an error: those before are missing."""
        if start != self._reached:
            raise RuntimeError(f"tiles before {start} were not written")
        self._reached = -1
        self._tables.append(table)
        self._tally.add(tally)
        if stop - self.start >= TILES or sum(map(len, self._tables)) >= MOST_ROWS:
            self.flush(stop)
        self._reached = stop

    def flush(self, stop: int) -> None:
        """Write the part that ends at tile `stop`."""
        if stop == self.start:
            return
        now = time.perf_counter()
        with atomic(self.folder / f"{self.start:09d}.parquet") as temporary, writer(temporary, self.schema) as file:
            file.write_table(pa.concat_tables([self.schema.empty_table(), *self._tables]), row_group_size=ROWS)
            self._tally.add(Tally(seconds={"write": time.perf_counter() - now}))
            place = {"of": self._of, "start": self.start, "stop": stop}
            file.add_key_value_metadata({_KEY: json.dumps({**place, **vars(self._tally)})})
        self.start, self._tables, self._tally = stop, [], Tally()


def digest_of(identity: Mapping[str, Any]) -> str:
    """Digest of what parts depend on (JSON values)."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Part:
    """A part that was written."""

    path: Path
    start: int
    stop: int
    tally: Tally
    of: str
    """Digest of what it depends on, see `digest_of`."""

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read the metadata of a part.

        Raises
        ------
        InputError
            Not a part, damaged, or renamed.
        """
        try:
            values = json.loads(pq.read_metadata(path).metadata[_KEY.encode()])
            start, stop = int(values["start"]), int(values["stop"])
            if not int(path.stem) == start < stop:
                raise ValueError(f"tiles {start} to {stop}")
            tally = Tally(Counter(values["counts"]), values["seconds"], values["read_mm2"], values["damaged"])
            return cls(path, start, stop, tally, str(values["of"]))
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: got {error!r}, expected a part of a slide's cells; find them again") from error


def parts_of(folder: Path, start: int) -> Iterator[Part]:
    """Yield the successive parts of a folder from tile `start` on, as far as they are there and can be read."""
    while (path := folder / f"{start:09d}.parquet").exists():
        try:
            part = Part.read(path)
        except InputError as error:
            log.warning("%s", error)
            return
        yield part
        start = part.stop


@contextlib.contextmanager
def unfinished(out: Path, identity: Mapping[str, Any]) -> Iterator[Path]:
    """Yield the folder beside `out` to which a job writes; it gets the name `out` at the end.

    What an earlier job left there is kept if its `identity`, what the result depends on, is the same.

    Raises
    ------
    InputError
        Another job is writing to it.
    """
    folder = out.with_name(f".{out.name}.unfinished")
    folder.mkdir(parents=True, exist_ok=True)
    with held(folder):
        if _read_json(folder / _IDENTITY) != identity:
            if any(folder.iterdir()):
                log.info("%s: the slide, the model or a setting has changed; starting anew", out)
            for item in folder.iterdir():
                remove(item)
            write_json(folder / _IDENTITY, identity)
        try:
            yield folder
        except BaseException:
            if [item.name for item in folder.iterdir()] == [_IDENTITY]:
                remove(folder)  # nothing was written yet
            raise
        (folder / _IDENTITY).unlink()
        remove(out)
        os.replace(folder, out)


def read_summary(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the summary of a complete folder of parts.

    Raises
    ------
    InputError
        There is none.
    """
    found = _read_json(Path(folder) / SUMMARY)
    if not isinstance(found, dict):
        raise InputError(f"{folder}: got no {SUMMARY}, expected a complete folder of a slide's cells; find them again")
    return found


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
