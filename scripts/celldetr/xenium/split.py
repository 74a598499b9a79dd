"""Which Xenium patches train, validate and test.

Patches of one slide look alike, and neighbours share tissue. A split by slide keeps whole slides (or donors) together;
a split by block keeps squares of tissue together and leaves out the patches on the border between two parts. The split
of the paper is random, patch by patch.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from celldetr.runtime.errors import ConfigError, InputError
from celldetr.store import PatchStore
from celldetr.store.splits import COLUMNS, PARTS, split_groups

log = logging.getLogger(__name__)

WAYS = ("auto", "slide", "block", "random")


@dataclass(frozen=True)
class XeniumSplit:
    """A split.

    Attributes
    ----------
    table
        ``store``, ``patch`` (index in the store), ``part``; a row per patch that is in a part.
    by
        How it was made: slide, block or random.
    left_out
        Store -> patches in no part, as they touch the border between blocks of different parts.
    warnings
        What a person should know.
    """

    table: pd.DataFrame
    by: str
    left_out: Mapping[str, int]
    warnings: tuple[str, ...]


def xenium_split(
    stores: Sequence[PatchStore],
    *,
    by: str,
    shares: Mapping[str, float],
    block_um: float,
    margin_um: float,
    seed: int,
) -> XeniumSplit:
    """Split the patches of all samples.

    Parameters
    ----------
    stores
        Patch stores, each in a folder ``{sample}.zarr``.
    by
        ``slide``: whole groups; ``block``: squares of tissue; ``random``: patches; ``auto``: slide when there are at
        least as many groups as parts, else block.
    shares
        Part (train, val, test) -> share of the patches.
    block_um
        Side of a block.
    margin_um
        Smallest distance between patches of different parts of a sample (block). At 0 no pixel is shared.
        Blocks are whole steps of a sample's grid, so that patches that lie side by side are never on a border.
    seed
        Seed of the draw.

    Raises
    ------
    InputError
        Two stores of one name, too few groups or blocks, a store that does not say how large its slide's pixels are, or
        a part that would be empty.
    """
    names = [store.path.stem for store in stores]
    if len(set(names)) < len(names):
        raise InputError(f"stores: got {names}, expected one of each name: a split tells them apart by it")
    if by not in WAYS:
        raise ConfigError(f"xenium.split.by: got {by!r}, expected one of {', '.join(WAYS)}")
    patches = pd.concat(
        [
            store.patches.assign(store=name, patch=np.arange(len(store)))
            for store, name in zip(stores, names, strict=True)
        ],
        ignore_index=True,
    )
    wanted = [part for part, share in shares.items() if share > 0]
    if by == "auto":
        by = "slide" if patches["group"].nunique() >= len(wanted) else "block"
    left_out = np.zeros(len(patches), dtype=bool)
    if by == "slide":
        part = _parts(patches["group"].to_numpy(), shares, seed, "xenium.split.by: slide", "use block")
    elif by == "random":
        part = _parts(np.arange(len(patches)).astype(str), shares, seed, "xenium.split.by: random", "cut more patches")
    else:
        boxes = np.concatenate([_boxes(store) for store in stores])
        side = np.concatenate([np.full(len(store), _block_side(store, block_um)) for store in stores])
        blocks = boxes.reshape(-1, 2, 2).sum(axis=1) // (2 * side[:, None])
        keys = np.array(
            [f"{name} {x} {y}" for name, (x, y) in zip(patches["store"], blocks, strict=True)], dtype=object
        )
        part = _parts(keys, shares, seed, "xenium.split.by: block", "lower xenium.split.block_um")
        part_of = dict(zip(keys.tolist(), part.tolist(), strict=True))
        margin = math.ceil(margin_um / stores[0].mpp / 2) if stores else 0
        left_out = _touches(patches["store"].to_numpy(), boxes, part, part_of, side, margin)
    table = patches.loc[~left_out, ["store", "patch"]].assign(part=part[~left_out])[list(COLUMNS)]
    _check(table, wanted, by, int(left_out.sum()))
    counts = patches["store"][left_out].value_counts()
    return XeniumSplit(
        table.sort_values(["store", "patch"], ignore_index=True),
        by,
        {name: int(counts.get(name, 0)) for name in names},
        tuple(_warnings(patches, part, by)),
    )


def _parts(
    groups: NDArray[np.object_], shares: Mapping[str, float], seed: int, where: str, advice: str
) -> NDArray[np.object_]:
    """Part of each patch (N,)."""
    try:
        indices = split_groups(groups.tolist(), shares, seed)
    except InputError as error:
        raise InputError(f"{where}: {error}; {advice}") from error
    part = np.empty(len(groups), dtype=object)
    for name, members in indices.items():
        part[members] = name
    return part


def _step(store: PatchStore) -> int:
    """Distance of neighbouring patches of a sample's grid, px of the patches."""
    settings = store.attrs.get("settings")
    stride = settings.get("stride", 1.0) if isinstance(settings, dict) else 1.0
    return max(1, round(float(stride) * store.patch_size))


def _boxes(store: PatchStore) -> NDArray[np.int64]:
    """Place of each patch on its slide (N, 4), xyxy px of the patches, counted from the slide's corner.

    The store has the corners in level-0 pixels, rounded; patches lie on a grid, so that their exact place is known.
    """
    image = store.attrs.get("image")
    if not isinstance(image, dict) or "mpp" not in image:
        raise InputError(
            f"{store.path}: attribute image.mpp: got none, expected um per level-0 px; make the store again"
        )
    step = _step(store)
    places = store.patches[["x", "y"]].to_numpy(dtype=np.float64) * (float(image["mpp"]) / store.mpp / step)
    low = np.rint(places).astype(np.int64) * step
    return np.concatenate([low, low + store.patch_size], axis=1)


def _block_side(store: PatchStore, block_um: float) -> int:
    """Side of a block, px of the patches: whole steps of the grid."""
    step = _step(store)
    return max(1, round(block_um / store.mpp / step)) * step


def _touches(
    store: NDArray[np.object_],
    boxes: NDArray[np.int64],
    part: NDArray[np.object_],
    part_of: Mapping[str, str],
    side: NDArray[np.int64],
    margin: int,
) -> NDArray[np.bool_]:
    """Find patches (N,) that, grown by a margin (px), reach into a block of another part; `side` (N,) of their blocks.

    Patches that stay within the blocks of their part are at least twice the margin away from those of other parts.
    """
    first = (boxes[:, :2] - margin) // side[:, None]
    last = (boxes[:, 2:] + margin - 1) // side[:, None]
    reached = {
        int(index): [
            f"{store[index]} {x} {y}"
            for x in range(first[index, 0], last[index, 0] + 1)
            for y in range(first[index, 1], last[index, 1] + 1)
        ]
        for index in np.flatnonzero((first != last).any(axis=1))
    }
    # a block in which no patch is centred belongs to the part that reaches into it most
    claims = pd.DataFrame(
        [(key, part[index]) for index, keys in reached.items() for key in keys if key not in part_of],
        columns=["block", "part"],
    )
    counts = claims.value_counts(sort=False).sort_index().sort_values(ascending=False, kind="stable")
    owner = {**dict(reversed(counts.index.tolist())), **part_of}
    touching = np.zeros(len(boxes), dtype=bool)
    for index, keys in reached.items():
        touching[index] = any(owner[key] != part[index] for key in keys)
    return touching


def _check(table: pd.DataFrame, wanted: Sequence[str], by: str, left_out: int) -> None:
    for part in wanted:
        if not (table["part"] == part).any():
            raise InputError(
                f"split by {by}: got no patches for {part!r}, {left_out} lie on borders between blocks; cut more "
                "patches, or change xenium.split.block_um and margin_um"
            )


def _warnings(patches: pd.DataFrame, part: NDArray[np.object_], by: str) -> list[str]:
    if by == "slide":
        return []
    shared = patches.assign(part=part).groupby("store")["part"].nunique()
    several = shared[shared > 1].index.tolist()
    if not several:
        return []
    if by == "random":
        text = f"patches of one tissue, neighbours among them, are in several parts ({', '.join(several)}): figures of "
        warnings = [text + "the test part are too good for new slides"]
    else:
        text = f"tissue of one slide is in several parts ({', '.join(several)}): figures of the test part are those of "
        warnings = [text + "known slides"]
    for warning in warnings:
        log.warning(warning)
    return warnings


def part_counts(stores: Sequence[PatchStore], split: XeniumSplit) -> pd.DataFrame:
    """Count what is in each part.

    Returns
    -------
    DataFrame
        ``part`` (train, val, test), ``patches``, ``nuclei``, ``labelled`` (share of the nuclei), a column per class,
        and ``samples`` and ``groups`` (numbers of).
    """
    by_name = {store.path.stem: store for store in stores}
    rows = []
    for part in PARTS:
        chosen = split.table[split.table["part"] == part]
        labels, groups = [np.empty(0, np.int8)], set[str]()
        for name, rows_of in chosen.groupby("store"):
            store = by_name[str(name)]
            indices = rows_of["patch"].to_numpy()
            taken = np.zeros(len(store), dtype=bool)
            taken[indices] = True
            labels.append(store.labels[np.repeat(taken, np.diff(store.box_ptr))])
            groups |= set(store.patches["group"].iloc[indices])
        found = np.concatenate(labels)
        classes = stores[0].classes
        rows.append(
            {
                "part": part,
                "patches": len(chosen),
                "nuclei": len(found),
                "labelled": round(float((found >= 0).mean()), 4) if len(found) else 0.0,
                **{name: int((found == label).sum()) for label, name in enumerate(classes)},
                "samples": chosen["store"].nunique(),
                "groups": len(groups),
            }
        )
    return pd.DataFrame(rows)
