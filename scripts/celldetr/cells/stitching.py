"""Each nucleus once: which findings near the border of two cores count.

Two tiles do not place a nucleus at exactly the same position, so findings within a rim outside the core are looked at
as well. Findings of two tiles that overlap are one nucleus, and the one deeper in its core counts, even if both lie
outside of their cores. A finding without such a partner counts in its core alone: if it counted in the rim, too, nuclei
near borders would have two tiles that may find them and others one, and the density of cells would show the grid.
"""

import numpy as np
import shapely
from numpy.typing import NDArray

RIM_UM = 3.0
"""Width of the rim outside a core, um; at most the margin. Figures: tests/benchmarks/README.md."""
SAME = 0.2
"""Smallest intersection over union of two boxes of one nucleus, by two tiles."""
_CHUNK = 200_000  # boxes that are compared with their neighbours at a time


def rim_um(margin_um: float) -> float:
    """Width of the rim outside a core, um."""
    return min(RIM_UM, margin_um)


def near_seams(depth: NDArray[np.floating], margin_um: float) -> NDArray[np.bool_]:
    """Whether another tile may have the findings (n,) that lie `depth` um inside their cores, in its core or rim."""
    return np.asarray(depth < 2 * rim_um(margin_um))


def left_to_others(
    boxes: NDArray[np.float64], depth: NDArray[np.float64], tile: NDArray[np.integer]
) -> NDArray[np.int64]:
    """Return the findings (their indices, sorted) that do not count: another tile has the nucleus, or should have it.

    Takes boxes (n, 4) xyxy, how deep each lies in the core of its tile (n,), and the tiles (n,). Pairs of boxes from
    two tiles are formed in order of their overlap, and a box is paired only once with each other tile, so that nuclei
    that lie over each other all remain.
    """
    one, two = _overlapping(boxes, tile)
    gone, paired = np.zeros(len(boxes), dtype=bool), np.zeros(len(boxes), dtype=bool)
    # a box and the other tile, of either side of each pair: what may be paired once
    sides = np.stack(
        [one * (int(tile.max(initial=0)) + 1) + tile[two], two * (int(tile.max(initial=0)) + 1) + tile[one]]
    )
    seats = np.unique(sides, return_inverse=True)[1].reshape(sides.shape)
    taken = np.zeros(seats.max(initial=-1) + 1, dtype=bool)
    first = np.empty(len(boxes), np.int64)
    while len(one):  # in a round, all pairs that come first for both of their boxes; there are few rounds
        order = np.arange(len(one))
        first[:] = len(one)
        for ends in (one, two):
            np.minimum.at(first, ends, order)
        chosen = (first[one] == order) & (first[two] == order)
        a, b = one[chosen], two[chosen]
        gone[np.where(depth[a] >= depth[b], b, a)] = True
        paired[a] = paired[b] = taken[seats[:, chosen]] = True
        left = ~(gone[one] | gone[two] | taken[seats[0]] | taken[seats[1]])
        one, two, seats = one[left], two[left], seats[:, left]
    return np.flatnonzero(gone | (~paired & (depth < 0)))


def _overlapping(boxes: NDArray[np.float64], tile: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs (P,), (P,) of boxes of two tiles that may be one nucleus; those that overlap most come first."""
    from_left = np.argsort(boxes[:, 0], kind="stable")
    left, found = boxes[from_left, 0], [np.empty((3, 0))]
    for start in range(0, len(boxes), _CHUNK):  # the boxes themselves take much more memory than the pairs
        members = from_left[start : start + _CHUNK]
        stop = int(np.searchsorted(left, boxes[members, 2].max(), side="right"))
        others = from_left[start:stop]
        one, two = shapely.STRtree(shapely.box(*boxes[others].T)).query(shapely.box(*boxes[members].T))
        one, two = members[one[one < two]], others[two[one < two]]
        one, two = np.sort([one, two], axis=0)[:, tile[one] != tile[two]]
        shared = np.minimum(boxes[one, 2:], boxes[two, 2:]) - np.maximum(boxes[one, :2], boxes[two, :2])
        inner = np.clip(shared, 0, None).prod(axis=1)
        area = [(boxes[side, 2:] - boxes[side, :2]).prod(axis=1) for side in (one, two)]
        overlap = inner / np.maximum(sum(area) - inner, 1e-9)
        found.append(np.stack([overlap, one, two])[:, overlap >= SAME])
    overlap, one, two = np.concatenate(found, axis=1)
    order = np.lexsort((two, one, -overlap))
    return one[order].astype(np.int64), two[order].astype(np.int64)
