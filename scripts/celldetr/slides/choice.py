"""Choice of the pretraining patches: equal numbers per tissue, validation on separate slides."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from celldetr.runtime.errors import InputError
from celldetr.store import PatchStore
from celldetr.store.splits import COLUMNS

PAPER_TOTAL = 64_000
"""Patches that the paper pretrains on (4.1)."""

log = logging.getLogger(__name__)

_ROUNDING = 1.0  # px; places of patches are whole pixels, their sides are not


@dataclass(frozen=True)
class SlidePatches:
    """Patches (N) in the store of a slide."""

    store: str
    group: str  # slide or donor
    tissue: str  # organ
    x: NDArray[np.int64]  # (N,) first columns, px of level 0
    y: NDArray[np.int64]  # (N,) first rows
    nuclei: NDArray[np.int64]  # (N,) nuclei in each patch
    side: float  # of a patch, px of level 0

    def __len__(self) -> int:
        return len(self.x)

    @classmethod
    def of(cls, store: PatchStore, group: str, tissue: str) -> "SlidePatches":
        """Read the patches of a store; group and tissue come from the sheet, since an empty store has none."""
        side = store.patch_size * store.mpp / float(store.attrs.get("image", {}).get("mpp", store.mpp))
        x, y = (store.patches[axis].to_numpy(np.int64) for axis in ("x", "y"))
        return cls(store.path.stem, group, tissue, x, y, np.diff(store.box_ptr), side)


class Choice(NamedTuple):
    """Chosen patches (``store``, ``patch``, ``part``), and counts for all, each tissue and each slide."""

    split: pd.DataFrame
    summary: pd.DataFrame


def choose_patches(slides: Sequence[SlidePatches], *, total: int, val_share: float, seed: int) -> Choice:
    """Choose `total` patches (all if there are fewer) for training and validation.

    Each tissue gives the same number of patches; a tissue with fewer gives all, and the others make up for it.
    Validation patches come from groups that are not used for training, if the other groups of the tissue have enough
    patches. Otherwise they come from a strip along one side of a slide, and patches that overlap the strip are not
    used. A slide without patches only appears in the summary.

    Raises
    ------
    InputError
        There are too few patches for two parts.
    """
    table = _table(slides)
    if len(table) < 2:
        raise InputError(f"slides: got {len(table)} patches in {len(slides)} slides, expected at least 2")
    wanted = min(total, len(table))
    rng = np.random.default_rng(seed)
    n_val = min(max(1, round(val_share * wanted)), wanted - 1)
    sizes = {str(tissue): int(count) for tissue, count in table.groupby("tissue").size().items()}
    val, all_parts = _quotas(sizes, n_val), _quotas(sizes, wanted)
    train = {tissue: max(0, count - val[tissue]) for tissue, count in all_parts.items()}
    pool, how = _pools(table, val, train, rng)
    for part, count in (("val", n_val), ("train", wanted - n_val)):
        rows_of = {tissue: np.flatnonzero((pool == part) & (table["tissue"] == tissue).to_numpy()) for tissue in sizes}
        quotas = _quotas({tissue: len(rows) for tissue, rows in rows_of.items()}, count)
        drawn = np.concatenate([rng.permutation(rows)[: quotas[tissue]] for tissue, rows in rows_of.items()])
        if not len(drawn):
            raise InputError(f"slides: got no patch for {part!r} of {len(table)}; add slides to the sheet")
        table.loc[drawn, "part"] = part
    split = table[table["part"] != ""].sort_values(["store", "patch"], ignore_index=True)
    if len(split) < total:
        log.warning("slides: got %d patches, fewer than the %d wanted: add slides to the sheet", len(split), total)
    return Choice(split[list(COLUMNS)], _summary(table, slides, how, total))


def _table(slides: Sequence[SlidePatches]) -> pd.DataFrame:
    """One row for each patch of all slides, in no part yet."""
    frames = []
    for slide in slides:
        frame = pd.DataFrame({"x": slide.x, "y": slide.y, "nuclei": slide.nuclei})
        names = {"store": slide.store, "part": "", "tissue": slide.tissue, "group": slide.group}
        frames.append(frame.assign(**names, side=slide.side, patch=np.arange(len(slide))))
    full = [frame for frame in frames if len(frame)]
    return pd.concat(full, ignore_index=True) if full else frames[0]


def _quotas(sizes: Mapping[str, int], total: int) -> dict[str, int]:
    """Divide `total` evenly; a small tissue gives all it has, and the others make up for it."""
    quotas = {}
    left = total
    for rank, name in enumerate(sorted(sizes, key=lambda name: (sizes[name], name))):
        quotas[name] = min(sizes[name], left // (len(sizes) - rank))
        left -= quotas[name]
    return quotas


def _pools(
    table: pd.DataFrame, val: Mapping[str, int], train: Mapping[str, int], rng: np.random.Generator
) -> tuple[NDArray[np.object_], dict[str, str]]:
    """Part that each patch may be drawn for (empty: none); and a note on each slide used for validation.

    `val` and `train` are the quotas of each tissue; `rng` decides between groups of the same size.
    """
    sizes = table.groupby(["group", "tissue"]).size().unstack(fill_value=0)
    held: list[str] = []
    how: dict[str, str] = {}
    pool = np.full(len(table), "train", dtype=object)
    for tissue, quota in val.items():
        order = rng.permutation(np.array(sizes.index, dtype=object))
        counts = {str(group): int(sizes.loc[group, tissue]) for group in order if sizes.loc[group, tissue]}
        lacking = quota - sum(counts.get(group, 0) for group in held)
        while lacking > 0:
            spare = [group for group in counts if group not in held and _spare(sizes, [*held, group], train)]
            if not spare:
                how |= _strip(table, pool, ~table["group"].isin(held) & (table["tissue"] == tissue), lacking)
                break
            enough = [group for group in spare if counts[group] >= lacking]
            held.append(min(enough, key=counts.__getitem__) if enough else max(spare, key=counts.__getitem__))
            lacking -= counts[held[-1]]
    whole = table["group"].isin(held).to_numpy()
    pool[whole] = "val"
    how |= {str(store): "held out for validation" for store in table.loc[whole, "store"].unique()}
    return pool, how


def _spare(sizes: pd.DataFrame, held: Sequence[str], train: Mapping[str, int]) -> bool:
    """Whether every tissue keeps enough patches for training if the groups are held out."""
    left = sizes.drop(index=list(held)).sum()
    return all(left[tissue] >= count for tissue, count in train.items())


def _strip(table: pd.DataFrame, pool: NDArray[np.object_], chosen: pd.Series, quota: int) -> dict[str, str]:
    """Give the last columns (or rows) of the largest chosen slide to validation, and what overlaps them to no part."""
    stores = table.loc[chosen, "store"].value_counts()
    for store in stores.index:
        rows = np.flatnonzero((table["store"] == store).to_numpy())
        places = table.loc[rows, ["x", "y"]]
        axis = "x" if places["x"].nunique() >= places["y"].nunique() else "y"
        at = places[axis].to_numpy()
        others = np.sort(at)[::-1][min(quota, len(at)) - 1]
        cut = others if others > at.min() else np.unique(at)[min(1, len(np.unique(at)) - 1)]
        if cut == at.min():
            continue
        side = float(table.loc[rows[0], "side"])
        pool[rows[(at < cut) & (at + side > cut + _ROUNDING)]] = ""
        pool[rows[at >= cut]] = "val"
        return {str(store): f"{axis} from {cut} px on validates"}
    return {}


def _summary(table: pd.DataFrame, slides: Sequence[SlidePatches], how: Mapping[str, str], total: int) -> pd.DataFrame:
    """Count the patches of all slides (beside the paper's number), of each tissue and of each slide."""
    counts: list[tuple[str, str, pd.DataFrame, int | None, str]] = [
        ("all", "all", table, PAPER_TOTAL, f"{total} wanted")
    ]
    for tissue in sorted({slide.tissue for slide in slides}):
        counts.append(("tissue", tissue, table[table["tissue"] == tissue], None, ""))
    for slide in slides:
        note = how.get(slide.store, "") if len(slide) else "no patches: damaged"
        counts.append(("slide", slide.store, table[table["store"] == slide.store], None, note))
    rows = []
    for level, name, patches, paper, note in counts:
        used = patches[patches["part"] != ""]
        row = {"level": level, "name": name, "slides": patches["store"].nunique(), "available": len(patches)}
        row |= {"chosen": len(used), **{part: (used["part"] == part).sum() for part in ("train", "val")}}
        rows.append({**row, "nuclei": used["nuclei"].sum(), "paper": paper, "note": note})
    return pd.DataFrame(rows).astype({"paper": "Int64"})
