"""Which patches of all slides pretrain: equal shares of the tissues, a seeded draw, and validation on other slides."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
    """Patches of a slide's store.

    Attributes
    ----------
    store
        Name of the store.
    group, tissue
        Slide or donor, and organ.
    x, y
        (N,) first pixels, px of level 0.
    nuclei
        (N,) nuclei in each.
    side
        Side of a patch, px of level 0.
    """

    store: str
    group: str
    tissue: str
    x: NDArray[np.int64]
    y: NDArray[np.int64]
    nuclei: NDArray[np.int64]
    side: float

    def __len__(self) -> int:
        return len(self.x)

    @classmethod
    def of(cls, store: PatchStore, group: str, tissue: str) -> "SlidePatches":
        """Patches of a slide's store; group and tissue as in the sheet, as an empty store has none."""
        image = store.attrs.get("image", {})
        side = store.patch_size * store.mpp / float(image.get("mpp", store.mpp))
        places = store.patches
        return cls(
            store.path.stem,
            group,
            tissue,
            places["x"].to_numpy(np.int64),
            places["y"].to_numpy(np.int64),
            np.diff(store.box_ptr),
            side,
        )


@dataclass(frozen=True)
class Choice:
    """Chosen patches (``store``, ``patch``, ``part``), and what there is beside what was taken, a row per slide."""

    split: pd.DataFrame
    summary: pd.DataFrame


def choose_patches(slides: Sequence[SlidePatches], *, total: int, val_share: float, seed: int) -> Choice:
    """Choose patches for training and validation.

    Each tissue gives the same number; one that has fewer gives all, and the others make up for it. Validation patches
    come from groups that do not train, where the others of that tissue have enough for its share; else from a strip at
    one side of a slide, and what overlaps with the strip is not used.

    Parameters
    ----------
    slides
        All slides; those without patches are counted and have no part.
    total
        Patches wanted. All are taken when there are fewer.
    val_share
        Share of them that validates.
    seed
        Seed of the draw.

    Raises
    ------
    InputError
        There are too few patches for both parts.
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
        there = {tissue: np.flatnonzero((pool == part) & (table["tissue"] == tissue).to_numpy()) for tissue in sizes}
        shares = _quotas({tissue: len(rows) for tissue, rows in there.items()}, count)
        drawn = np.concatenate([rng.permutation(rows)[: shares[tissue]] for tissue, rows in there.items()])
        if not len(drawn):
            raise InputError(f"slides: got no patch for {part!r} of {len(table)}; add slides to the sheet")
        table.loc[drawn, "part"] = part
    split = table[table["part"] != ""].sort_values(["store", "patch"], ignore_index=True)
    if len(split) < total:
        log.warning("slides: got %d patches, fewer than the %d wanted: add slides to the sheet", len(split), total)
    return Choice(split[list(COLUMNS)], _summary(table, slides, how, total))


def _table(slides: Sequence[SlidePatches]) -> pd.DataFrame:
    frames = [
        pd.DataFrame(
            {
                "store": slide.store,
                "patch": np.arange(len(slide)),
                "part": "",
                "tissue": slide.tissue,
                "group": slide.group,
                "x": slide.x,
                "y": slide.y,
                "nuclei": slide.nuclei,
                "side": slide.side,
            }
        )
        for slide in slides
        if len(slide)
    ]
    columns = ["store", "patch", "part", "tissue", "group", "x", "y", "nuclei", "side"]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=columns)


def _quotas(sizes: Mapping[str, int], total: int) -> dict[str, int]:
    """Share `total` evenly; one that is smaller than its share gives all, and the others make up for it."""
    quotas = {}
    left = total
    for rank, name in enumerate(sorted(sizes, key=lambda name: (sizes[name], name))):
        quotas[name] = min(sizes[name], left // (len(sizes) - rank))
        left -= quotas[name]
    return quotas


def _pools(
    table: pd.DataFrame, val: Mapping[str, int], train: Mapping[str, int], rng: np.random.Generator
) -> tuple[NDArray[np.object_], dict[str, str]]:
    """Part that each patch may be drawn for (empty: none); and a word on each slide that validates.

    Parameters
    ----------
    table
        All patches.
    val, train
        Patches that each tissue should give to either part.
    rng
        For groups of the same size.
    """
    sizes = table.groupby(["group", "tissue"]).size().unstack(fill_value=0)
    held: list[str] = []
    how: dict[str, str] = {}
    pool = np.full(len(table), "train", dtype=object)
    for tissue, share in val.items():
        order = rng.permutation(np.array(sizes.index, dtype=object))
        counts = {str(group): int(sizes.loc[group, tissue]) for group in order if sizes.loc[group, tissue]}
        lacking = share - sum(counts.get(group, 0) for group in held)
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
    """Whether every tissue has enough for training when the groups are held out."""
    left = sizes.drop(index=list(held)).sum()
    return all(left[tissue] >= count for tissue, count in train.items())


def _strip(table: pd.DataFrame, pool: NDArray[np.object_], chosen: pd.Series, share: int) -> dict[str, str]:
    """Give the last columns (or rows) of the largest of the slides to validation, and what overlaps them to no part."""
    stores = table.loc[chosen, "store"].value_counts()
    for store in stores.index:
        rows = np.flatnonzero((table["store"] == store).to_numpy())
        places = table.loc[rows, ["x", "y"]]
        axis = "x" if places["x"].nunique() >= places["y"].nunique() else "y"
        at = places[axis].to_numpy()
        others = np.sort(at)[::-1][min(share, len(at)) - 1]
        cut = others if others > at.min() else np.unique(at)[min(1, len(np.unique(at)) - 1)]
        if cut == at.min():
            continue
        side = float(table.loc[rows[0], "side"])
        pool[rows[(at < cut) & (at + side > cut + _ROUNDING)]] = ""
        pool[rows[at >= cut]] = "val"
        return {str(store): f"{axis} from {cut} px on validates"}
    return {}


def _summary(table: pd.DataFrame, slides: Sequence[SlidePatches], how: Mapping[str, str], total: int) -> pd.DataFrame:
    """Count all, each tissue and each slide, beside the paper's total."""
    rows = [_row("all", "all", table, {"paper": PAPER_TOTAL, "note": f"{total} wanted"})]
    for tissue in sorted({slide.tissue for slide in slides}):
        rows.append(_row("tissue", tissue, table[table["tissue"] == tissue], {}))
    for slide in slides:
        note = "no patches: damaged" if not len(slide) else how.get(slide.store, "")
        rows.append(_row("slide", slide.store, table[table["store"] == slide.store], {"note": note}))
    return pd.DataFrame(rows).astype({"paper": "Int64"})


def _row(level: str, name: str, table: pd.DataFrame, more: Mapping[str, object]) -> dict[str, object]:
    used = table[table["part"] != ""]
    return {
        "level": level,
        "name": name,
        "slides": table["store"].nunique(),
        "available": len(table),
        "chosen": len(used),
        "train": int((used["part"] == "train").sum()),
        "val": int((used["part"] == "val").sum()),
        "nuclei": int(used["nuclei"].sum()),
        "paper": None,
        "note": "",
        **more,
    }
