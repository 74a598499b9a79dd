"""Find and embed the cells of a slide: a folder of parts, from which `celldetr.cells.join` makes one file."""

import dataclasses
import hashlib
import json
import logging
import math
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import shapely
import torch
from numpy.typing import NDArray

from celldetr.cells.given import GivenCells
from celldetr.cells.given_tiles import AGREEMENT_UM, GivenTiles, Shown, compare
from celldetr.cells.model import CellModel
from celldetr.cells.parts import OUTSIDE_PART, SUMMARY, PartWriter, Tally, parts_of, read_summary, unfinished
from celldetr.cells.plan import Plan, plan_tiles
from celldetr.cells.rows import DAMAGED, OUTSIDE, READ, Rows
from celldetr.cells.stitching import repeated
from celldetr.cells.table import ROWS, CellsInfo, Floats, writer
from celldetr.cells.tiling import Tiles, Tiling
from celldetr.inference.batch import Boxes, FoundNuclei, GivenNuclei
from celldetr.inference.predictor import Predictor
from celldetr.model.device import resolve_precision
from celldetr.runtime.files import atomic, write_json
from celldetr.runtime.provenance import origin
from celldetr.slides.cutting import Block, read_blocks
from celldetr.slides.damage import log_damage, open_slide
from celldetr.slides.pyramid import Pyramid
from celldetr.store.seen import has_seen

log = logging.getLogger(__name__)

_WAITING = 4  # batches whose rows are not written yet, or whose given cells are ready
_UNIT = 64
"""Jobs begin at multiples of as many tiles: batches of sizes that divide it are the same for any number of jobs."""
_LOGGED = 1000  # tiles between two messages
_COARSE = 1.3  # times the model's um per px, from which on a slide's pixels are said to be coarse


@dataclass(frozen=True)
class Slide:
    """A slide to be read."""

    name: str
    file: Path
    mpp: float | None = None
    """um per px of level 0; None: as the file says."""
    group: str = ""
    """Group of its patches, to tell whether the model was trained on it; empty: none."""


@dataclass(frozen=True)
class FindSettings:
    """How cells are found; see `celldetr.config.cells.CellSettings`."""

    margin_um: float
    nucleus_threshold: float
    batch_size: int
    on_damage: Literal["stop", "skip"] = "stop"
    embeddings: Floats | None = "float32"
    """Their type; None: boxes and nucleus scores alone, by any model."""


def find_cells(
    slide: Slide,
    model: CellModel,
    out: str | os.PathLike[str],
    settings: FindSettings,
    *,
    given: GivenCells | None = None,
    region: NDArray[Any] | None = None,
    job: tuple[int, int] = (1, 1),
    workers: int = 1,
    identity: Mapping[str, Any] | None = None,
) -> None:
    """Write the cells of a slide, or of one job's share of it, as a folder of parts.

    Parameters
    ----------
    slide, model, settings
        What is read, by which model, and how.
    out
        Folder that is made; it is complete when it has its name. What a killed job has written lies beside it, and the
        next call goes on from there if the slide, the model, the settings and `identity` are the same.
    given
        Cells of the user, which are embedded in place of those that the model finds.
    region
        Polygons (n,) on the slide, px of level 0: only cells whose centre lies in one of them. None: the whole slide.
    job
        Number of this job, from 1, and how many share the slide.
    workers
        Threads that read.
    identity
        JSON values that the result depends on besides the other arguments, e.g. the hash of the code.

    Raises
    ------
    InputError
        The model has no classes or embeddings; the slide cannot be read, see `celldetr.slides.damage.open_slide`;
        there is no tissue (`NothingFound`); a tile cannot be decoded.
    """
    if settings.embeddings:
        model.require_types()
    out, start = Path(out), time.perf_counter()
    with open_slide(slide.file, slide.mpp, slide.name, skip=settings.on_damage == "skip") as image:
        tiles = Tiles.over(Tiling.of(model.size, model.mpp, settings.margin_um), image.size, float(image.mpp or 0))
        depends = _depends_on(slide, tiles, model, settings, given, region)
        own: dict[str, Any] = {**depends, "more": dict(identity or {}), "job": list(job), "tiles": None}
        if (out / SUMMARY).exists() and {**read_summary(out).get("identity", {}), "tiles": None} == own:
            log.info("%s: complete already", out)
            return
        plan = plan_tiles(image, tiles, slide.name, given=given, region=region)
        log_damage(slide.name, image.damage())  # there, no tissue can be found
        own["tiles"] = hashlib.sha256(plan.tiles.cores.tobytes()).hexdigest()  # their numbers mean the same
        info = _info(slide, image, model, settings, plan, given is not None)
    tally = Tally(seconds={"tissue": time.perf_counter() - start})
    _warn_if_coarse(slide, tiles)
    first, last = _share(len(plan.tiles), *job)
    rows = Rows(plan.tiles, info, settings.embeddings or "float32", plan.region)
    with unfinished(out, own) as folder:
        done = list(parts_of(folder, first))
        begin = done[-1].stop if done else first
        if done:
            log.info("%s: going on after %d of %d tiles", slide.name, begin - first, last - first)
        read_tiles = _Reading(slide, model, settings, plan, rows, workers)
        read_tiles.run(PartWriter(folder, rows.schema, begin, own), begin, last)
        if job[0] == 1 and plan.given is not None and len(plan.given.outside):
            _write_outside(folder, rows, plan.given)
        for part in parts_of(folder, first):
            tally.add(part.tally)
        log_damage(slide.name, tally.damaged)
        spent = ", ".join(f"{stage} {value:.0f} s" for stage, value in tally.seconds.items())
        log.info("%s: %d tiles read (%s)", slide.name, tally.counts["tiles"], spent)
        content = {"identity": own, "range": [first, last], "info": dataclasses.asdict(info), **vars(tally)}
        write_json(folder / SUMMARY, {**content, "given": plan.expected})


def identity_of(
    slide: Slide,
    model: CellModel,
    settings: FindSettings,
    *,
    given: GivenCells | None = None,
    region: NDArray[Any] | None = None,
) -> dict[str, Any]:
    """Name what the cells that `find_cells` would find depend on (JSON values); `InputError` for a broken slide."""
    with open_slide(slide.file, slide.mpp, slide.name, skip=settings.on_damage == "skip") as image:
        tiles = Tiles.over(Tiling.of(model.size, model.mpp, settings.margin_um), image.size, float(image.mpp or 0))
        return _depends_on(slide, tiles, model, settings, given, region)


def _warn_if_coarse(slide: Slide, tiles: Tiles) -> None:
    if tiles.ratio < 1 / _COARSE:
        log.warning(
            "%s: its pixels of %.3g um are enlarged to the %.3g um of the model, which has seen finer images; look at "
            "the page before you use the types",
            slide.name,
            tiles.image_mpp,
            tiles.tiling.mpp,
        )


def _share(tiles: int, job: int, jobs: int) -> tuple[int, int]:
    """First tile of a job, counted from 1, and the first that is not its own."""
    units = math.ceil(tiles / _UNIT)
    first, last = (min(units * number // jobs * _UNIT, tiles) for number in (job - 1, job))
    return first, last


def _depends_on(
    slide: Slide,
    tiles: Tiles,
    model: CellModel,
    settings: FindSettings,
    given: GivenCells | None,
    region: NDArray[Any] | None,
) -> dict[str, Any]:
    """Name what the cells depend on, apart from the code (JSON values)."""
    state, source = slide.file.stat(), model.source or {}
    values = {
        "slide": [slide.name, state.st_size, state.st_mtime_ns, *tiles.image_size],
        "group": slide.group,
        "mpp": tiles.image_mpp,
        "model": [source.get("sha256"), model.size, model.mpp],
        "precision": resolve_precision(model.precision, model.device),
        # with another size of batches a job may go on: values change by rounding only
        "settings": {key: value for key, value in dataclasses.asdict(settings).items() if key != "batch_size"},
        "given": None if given is None else _digest(given.outlines, given.ids.tolist()),
        "region": None if region is None else _digest(region),
    }
    found: dict[str, Any] = json.loads(json.dumps(values))
    return found


def _digest(outlines: NDArray[Any], names: Sequence[str] = ()) -> str:
    digest = hashlib.sha256("\0".join(names).encode())
    for start in range(0, len(outlines), ROWS):
        digest.update(b"\0".join(shapely.to_wkb(outlines[start : start + ROWS]).tolist()))
    return digest.hexdigest()


def _info(slide: Slide, image: Pyramid, model: CellModel, settings: FindSettings, plan: Plan, given: bool) -> CellsInfo:
    source = dict(model.source or {})
    trained_on, began = source.get("trained_on"), origin()
    device = torch.cuda.get_device_name(model.device) if model.device.startswith("cuda") else "cpu"
    return CellsInfo(
        slide=slide.name,
        file=slide.file.name,
        mpp=plan.tiles.image_mpp,
        size=image.size,
        origin=image.origin,
        classes=tuple(model.net.settings.classes) if settings.embeddings else (),
        width=model.net.settings.d_model if settings.embeddings else 0,
        given=given,
        model={**source, "seen": has_seen(trained_on, slide.group) if trained_on is not None and slide.group else None},
        settings={
            **dataclasses.asdict(settings),
            "mpp": model.mpp,
            "patch_size": model.size,
            "precision": resolve_precision(model.precision, model.device),
            "region": plan.region is not None,
        },
        areas=plan.areas,
        provenance={**{key: began[key] for key in ("git_revision", "versions", "started")}, "device": device},
    )


def _write_outside(folder: Path, rows: Rows, given: GivenTiles) -> None:
    """Write the given cells that lie outside of the slide as one more part."""
    with atomic(folder / OUTSIDE_PART) as temporary, writer(temporary, rows.schema) as file:
        for start in range(0, len(given.outside), ROWS):
            index = given.outside[start : start + ROWS]
            file.write_table(rows.given(given.cells, index, np.full(len(index), -1), OUTSIDE))


@dataclass(frozen=True)
class _Reading:
    """The work of a job: threads read tiles, this thread runs the model, and one thread writes."""

    slide: Slide
    model: CellModel
    settings: FindSettings
    plan: Plan
    rows: Rows
    workers: int

    def run(self, parts: PartWriter, start: int, stop: int) -> None:
        """Read the tiles from `start` to `stop`."""
        size, given = self.settings.batch_size, self.plan.given
        grid, skip = self.plan.tiles.grid(start, stop), self.settings.on_damage == "skip"
        spans = [range(begin, min(begin + size, stop)) for begin in range(start, stop, size)]
        predictor, taken = self._predictor(stop - start), list[_Batch]()
        waiting: deque[Future[None]] = deque()
        writing = ThreadPoolExecutor(1)
        with (
            closing(read_blocks(self.slide.file, grid, size=size, workers=self.workers, skip=skip)) as blocks,
            closing(_ahead((lambda _: None) if given is None else given.shown, spans)) as shown,
        ):
            try:
                now = time.perf_counter()
                for batch, nuclei, embedded in predictor.read(_batches(spans, blocks, shown, start, taken)):
                    reading = sum(one.tally.seconds["read"] for one in taken)
                    taken.clear()
                    batch.tally.seconds["model"] = time.perf_counter() - now - reading
                    waiting.append(writing.submit(self._write, parts, batch, nuclei, embedded))
                    if len(waiting) > _WAITING:
                        waiting.popleft().result()
                    if batch.span.stop // _LOGGED > batch.span.start // _LOGGED:
                        log.info("%s: %d of %d tiles", self.slide.name, batch.span.stop - start, stop - start)
                    now = time.perf_counter()
                for future in waiting:
                    future.result()
            finally:
                writing.shutdown()  # after an error, too: what was read is written
        parts.flush(stop)

    def _predictor(self, tiles: int) -> Predictor:
        embeds: Literal["found", "given", "none"] = "found" if self.settings.embeddings is not None else "none"
        return Predictor(
            self.model.net,
            batch_size=self.settings.batch_size,
            device=self.model.device,
            precision=self.model.precision,
            nucleus_threshold=self.settings.nucleus_threshold,
            embeds=embeds if self.plan.given is None else "given",
            compiling=self.model.compiling,
            expected=tiles,
        )

    def _table(self, batch: "_Batch", nuclei: FoundNuclei, embedded: GivenNuclei) -> tuple[pa.Table, Counter[str]]:
        if not len(batch.numbers):
            return self.rows.schema.empty_table(), Counter()
        if batch.shown is None:
            return self.rows.found(batch.numbers, nuclei)
        return self._given_rows(batch.numbers, batch.shown, nuclei, embedded)

    def _given_rows(
        self, numbers: NDArray[np.int64], shown: Sequence[Shown], nuclei: FoundNuclei, embedded: GivenNuclei
    ) -> tuple[pa.Table, Counter[str]]:
        assert self.plan.given is not None
        once = ~repeated(nuclei.boxes, nuclei.nucleus_score, nuclei.image)
        nuclei = FoundNuclei._make(values[once] for values in nuclei)
        counted = self.rows.detections(numbers, nuclei)
        scores, counts = compare(shown, nuclei, counted, AGREEMENT_UM / self.model.mpp)
        own = np.concatenate([tile.own for tile in shown])
        index = np.concatenate([tile.cells for tile in shown])[own]
        tile = np.repeat(numbers, [int(tile.own.sum()) for tile in shown])
        mine = GivenNuclei(*(values[own] for values in embedded))
        return self.rows.given(self.plan.given.cells, index, tile, READ, mine, scores), counts

    def _write(self, parts: PartWriter, batch: "_Batch", nuclei: FoundNuclei, embedded: GivenNuclei) -> None:
        now, tally = time.perf_counter(), batch.tally
        table, tally.counts = self._table(batch, nuclei, embedded)
        damaged = np.setdiff1d(batch.span, batch.numbers)
        if self.plan.given is not None and len(damaged):
            own = [self.plan.given.of(int(number)) for number in damaged]
            tile = np.repeat(damaged, [len(cells) for cells in own])
            lost = self.rows.given(self.plan.given.cells, np.concatenate(own), tile, DAMAGED)
            table = pa.concat_tables([table, lost])
        tally.counts.update({"tiles": len(batch.numbers), "tiles damaged": len(damaged)})
        tally.read_mm2 = float(self.plan.mm2[batch.numbers].sum())
        tally.seconds["write"] = time.perf_counter() - now
        parts.add(table, tally, batch.span.start, batch.span.stop)


class _Batch(NamedTuple):
    """Tiles of a span, of which `numbers` (B,) were read; the others are damaged."""

    span: range
    numbers: NDArray[np.int64]
    shown: Sequence[Shown] | None
    """Given cells of each tile, if there are any."""
    tally: Tally


def _batches(
    spans: Sequence[range],
    blocks: Iterable[Block],
    shown: Iterable[Sequence[Shown] | None],
    start: int,
    taken: list[_Batch],
) -> Iterator[tuple[_Batch, NDArray[np.uint8], Boxes | None]]:
    """Yield batches for `Predictor.read`, and note those that were taken."""
    now = time.perf_counter()
    for span, block, cells in zip(spans, blocks, shown, strict=True):
        tally = Tally(seconds={"read": time.perf_counter() - now}, damaged=list(block.damaged.values()))
        numbers = block.numbers + start
        own = cells and [cells[number - span.start] for number in numbers]
        taken.append(_Batch(span, numbers, own, tally))
        yield taken[-1], block.pixels, own if own is None else [tile.boxes for tile in own]
        now = time.perf_counter()


def _ahead(make: Callable[[range], Any], spans: Sequence[range]) -> Generator[Any, None, None]:
    """Yield what `make` returns for each span; a thread is a few ahead."""
    with ThreadPoolExecutor(1) as pool:
        waiting: deque[Future[Any]] = deque()
        for span in spans:
            waiting.append(pool.submit(make, span))
            if len(waiting) > _WAITING:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
