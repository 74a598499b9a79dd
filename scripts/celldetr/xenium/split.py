"""Split Xenium patches into train, val and test.

Patches of one slide look alike, and neighbours share tissue. A split by slide keeps whole slides (or donors) together;
a split by block keeps squares of tissue together and leaves out the patches on the border between two parts. The split
of the paper is random, patch by patch. Patches that show nuclei without a box are for training alone: who finds these
nuclei would seem wrong.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from celldetr.config.xenium import XeniumSplitSettings
from celldetr.runtime.errors import InputError
from celldetr.store import PatchStore
from celldetr.store.splits import COLUMNS, PARTS, split_groups

log = logging.getLogger(__name__)

_ADVICE = {"slide": "use block", "block": "lower xenium.split.block_um", "random": "cut more patches"}


@dataclass(frozen=True)
class XeniumSplit:
    """A split."""

    table: pd.DataFrame  # store, patch (index in the store), part; a row per patch that is in a part
    by: str  # slide, block or random
    left_out: Mapping[str, int]  # store -> patches in no part: not complete, or at a border of blocks
    warnings: tuple[str, ...]  # for the user


def xenium_split(stores: Sequence[PatchStore], settings: XeniumSplitSettings, seed: int) -> XeniumSplit:
    """Split the patches of all samples.

    By block, patches of different parts of a sample are at least `margin_um` apart; at 0 they share no pixel. Blocks
    are whole steps of a sample's grid, so patches that lie side by side never cross a border. Auto is by slide if there
    are at least as many groups as parts, else by block. Each store lies in a folder ``{sample}.zarr``. Raises
    InputError if two stores have the same name, there are too few groups or blocks, or a part would be empty.
    """
    names = [store.path.stem for store in stores]
    if len(set(names)) < len(names):
        raise InputError(f"stores: got {names}, expected different names: the split table tells stores apart by name")
    tables = [
        store.patches.assign(store=name, patch=np.arange(len(store))) for store, name in zip(stores, names, strict=True)
    ]
    patches = pd.concat(tables, ignore_index=True)
    shares = {part: getattr(settings, part) for part in PARTS}
    wanted = [part for part, share in shares.items() if share > 0]
    by: str = settings.by
    if by == "auto":
        by = "slide" if patches["group"].nunique() >= len(wanted) else "block"
    if by == "block":
        part, left_out = _split_blocks(stores, patches["store"].to_numpy(), shares, settings, seed)
    else:
        groups = patches["group"].tolist() if by == "slide" else [str(index) for index in range(len(patches))]
        part, left_out = _parts(groups, shares, seed, by), np.zeros(len(patches), dtype=bool)
    incomplete = ~patches["complete"].to_numpy() & (part != "train")
    left_out |= incomplete
    table = patches.loc[~left_out, ["store", "patch"]].assign(part=part[~left_out])[list(COLUMNS)]
    for name in wanted:
        if not (table["part"] == name).any():
            raise InputError(
                f"split by {by}: got no patches for {name!r}; {int((left_out & ~incomplete).sum())} lie on borders "
                f"between blocks, and {int(incomplete.sum())} show nuclei without a box, so they are for training "
                "alone; cut more patches, or change xenium.split.block_um and margin_um"
            )
    counts = patches["store"][left_out].value_counts()
    return XeniumSplit(
        table.sort_values(["store", "patch"], ignore_index=True),
        by,
        {name: int(counts.get(name, 0)) for name in names},
        _warnings(patches, part, by),
    )


def _parts(groups: Sequence[str], shares: Mapping[str, float], seed: int, by: str) -> NDArray[np.object_]:
    """Part of each patch (N,)."""
    try:
        indices = split_groups(groups, shares, seed)
    except InputError as error:
        raise InputError(f"xenium.split.by: {by}: {error}; {_ADVICE[by]}") from error
    part = np.empty(len(groups), dtype=object)
    for name, members in indices.items():
        part[members] = name
    return part


def _split_blocks(
    stores: Sequence[PatchStore],
    store_of: NDArray[np.object_],
    shares: Mapping[str, float],
    settings: XeniumSplitSettings,
    seed: int,
) -> tuple[NDArray[np.object_], NDArray[np.bool_]]:
    """Part of each patch (N,), and mask (N,) of those left out; `store_of` (N,) are the names of their stores.

    Patches are left out that, grown by half the margin, reach into a block of another part; the other patches of
    different parts are then at least the margin apart.
    """
    placed = [_place(store, settings.block_um) for store in stores]
    boxes, side = (np.concatenate(values) for values in zip(*placed, strict=True))
    centres = boxes.reshape(-1, 2, 2).sum(axis=1) // (2 * side[:, None])
    blocks = [f"{name} {x} {y}" for name, (x, y) in zip(store_of, centres.tolist(), strict=True)]
    part = _parts(blocks, shares, seed, "block")
    margin = math.ceil(settings.margin_um / stores[0].mpp / 2)
    first = (boxes[:, :2] - margin) // side[:, None]
    last = (boxes[:, 2:] + margin - 1) // side[:, None]
    rows = [
        (index, f"{store_of[index]} {x} {y}")
        for index in np.flatnonzero((first != last).any(axis=1)).tolist()
        for x in range(first[index, 0], last[index, 0] + 1)
        for y in range(first[index, 1], last[index, 1] + 1)
    ]
    reached = pd.DataFrame(rows, columns=["patch", "block"])
    own = part[reached["patch"].to_numpy(np.int64)]
    # a block without the centre of a patch belongs to the part that reaches into it most
    most = pd.Series(own, dtype=object).groupby(reached["block"]).agg(lambda parts: parts.mode()[0])
    owner = reached["block"].map(dict(zip(blocks, part, strict=True))).fillna(reached["block"].map(most))
    return part, np.isin(np.arange(len(boxes)), reached["patch"][owner.to_numpy() != own])


def _place(store: PatchStore, block_um: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Box (N, 4) of each patch on its slide, xyxy, and side (N,) of its block: whole steps of the grid; px of patches.

    The store holds rounded level-0 corners; patches lie on a grid, so their exact place is known.
    """
    step = max(1, round(store.attrs["settings"]["stride"] * store.patch_size))
    places = store.patches[["x", "y"]].to_numpy(dtype=np.float64) * (store.attrs["image"]["mpp"] / store.mpp / step)
    low = np.rint(places).astype(np.int64) * step
    side = max(1, round(block_um / store.mpp / step)) * step
    return np.concatenate([low, low + store.patch_size], axis=1), np.full(len(store), side)


def _warnings(patches: pd.DataFrame, part: NDArray[np.object_], by: str) -> tuple[str, ...]:
    shared = patches.assign(part=part).groupby("store")["part"].nunique()
    several = ", ".join(shared[shared > 1].index)
    if by == "slide" or not several:
        return ()
    warning = f"tissue of one slide is in several parts ({several}): the test scores hold for known slides only"
    if by == "random":
        warning = (
            f"patches of the same tissue, even neighbours, are in several parts ({several}): the test scores are too "
            "high for new slides"
        )
    log.warning(warning)
    return (warning,)


def part_counts(stores: Sequence[PatchStore], split: XeniumSplit) -> pd.DataFrame:
    """Count the patches and nuclei of each part.

    Returns a row for each of train, val and test: ``part``, ``patches``, ``nuclei``, ``labelled`` (share of the
    nuclei), a column per class, ``samples`` and ``groups`` (numbers of them).
    """
    tables = []
    for store in stores:
        counts = pd.crosstab(np.repeat(np.arange(len(store)), np.diff(store.box_ptr)), store.labels)
        counts = counts.reindex(index=range(len(store)), columns=range(-1, len(store.classes)), fill_value=0)
        tables.append(counts.assign(store=store.path.stem, patch=np.arange(len(store)), group=store.patches["group"]))
    grouped = split.table.merge(pd.concat(tables), on=["store", "patch"]).groupby("part")
    sums = grouped[list(range(-1, len(stores[0].classes)))].sum().reindex(PARTS, fill_value=0)
    numbers = grouped.agg(patches=("patch", "size"), samples=("store", "nunique"), groups=("group", "nunique"))
    numbers = numbers.reindex(PARTS, fill_value=0)
    nuclei, typed = sums.sum(axis=1), sums.drop(columns=-1).set_axis(list(stores[0].classes), axis=1)
    shares = (typed.sum(axis=1) / nuclei.clip(lower=1)).round(4)
    first = pd.DataFrame({"part": PARTS, "patches": numbers["patches"], "nuclei": nuclei, "labelled": shares})
    return pd.concat([first, typed, numbers[["samples", "groups"]]], axis=1).reset_index(drop=True)
