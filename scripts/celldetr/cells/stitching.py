"""Each nucleus once: which findings of a tile, and which near the border of two cores, count.

A detector may find a nucleus twice in one tile; of two such boxes, the one with the higher score counts.

Two tiles do not place a nucleus at exactly the same position, so findings within a rim outside the core are looked at
as well. Findings of two tiles that overlap are one nucleus, and the one deeper in its core counts, even if both lie
outside of their cores. A finding without such a partner counts in its core alone: if it counted in the rim, too, nuclei
near borders would have two tiles that may find them and others one, and the density of cells would show the grid.

The class scores of findings of one nucleus are averaged, as types are less often right near the edge of a tile. Their
embeddings are not: means lie closer to each other than to other embeddings, and neighbours would show the grid.
"""

import numpy as np
import shapely
from numpy.typing import NDArray

RIM_UM = 3.0
"""Width of the rim outside a core, um; at most the margin. Figures: tests/benchmarks/README.md."""
SAME = 0.2
"""Smallest intersection over union of two boxes of one nucleus, by two tiles."""
REPEATED = 0.5
"""The same for two boxes of one tile: of 5,251 true boxes of CoNSeP, three pairs reach it."""
_CHUNK = 200_000  # boxes that are compared with their neighbours at a time


def rim_um(margin_um: float) -> float:
    """Width of the rim outside a core, um."""
    return min(RIM_UM, margin_um)


def near_seams(depth: NDArray[np.floating], margin_um: float) -> NDArray[np.bool_]:
    """Whether another tile may have the findings (n,) that lie `depth` um inside their cores, in its core or rim."""
    return np.asarray(depth < 2 * rim_um(margin_um))


def counted(boxes: NDArray[np.float64], depth: NDArray[np.float64], tile: NDArray[np.integer]) -> NDArray[np.int64]:
    """Return for each finding (n,) the one that counts for its nucleus: itself, one of another tile, or none, -1.

    Takes boxes (n, 4) xyxy, how deep each lies in the core of its tile (n,), and the tiles (n,). Pairs of boxes from
    two tiles are formed in order of their overlap, and a box is paired only once with each other tile, so that nuclei
    that lie over each other all remain.
    """
    one, two, overlap = _pairs(boxes, tile, SAME, same=False)
    order = np.argsort(-overlap, kind="stable")  # those that overlap most come first
    one, two = one[order], two[order]
    counts, paired = np.arange(len(boxes)), np.zeros(len(boxes), dtype=bool)
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
        first_deeper = depth[a] >= depth[b]
        counts[np.where(first_deeper, b, a)] = np.where(first_deeper, a, b)
        paired[a] = paired[b] = taken[seats[:, chosen]] = True
        gone = counts != np.arange(len(boxes))
        left = ~(gone[one] | gone[two] | taken[seats[0]] | taken[seats[1]])
        one, two, seats = one[left], two[left], seats[:, left]
    while (counts[counts] != counts).any():  # one that counted for another may itself be left to a third
        counts = counts[counts]
    counts[~paired & (depth < 0)] = -1
    return counts


def mean_scores(
    counts: NDArray[np.int64], scores: NDArray[np.floating], edge: NDArray[np.floating]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Average the class scores (n, K) of findings of one nucleus, by their distance from the edge of their tile (n,).

    Returns the findings (m,), sorted, that count for others, too, see `counted`, and their scores (m, K).
    """
    others = np.flatnonzero((counts >= 0) & (counts != np.arange(len(counts))))
    members = np.concatenate([np.unique(counts[others]), others])
    several, place = np.unique(counts[members], return_inverse=True)
    sums = np.zeros((len(several), scores.shape[1]))
    np.add.at(sums, place, edge[members, None] * scores[members])
    return several, (sums / np.bincount(place, edge[members])[:, None]).astype(np.float32)


def repeated(boxes: NDArray[np.floating], score: NDArray[np.floating], image: NDArray[np.integer]) -> NDArray[np.bool_]:
    """Whether a finding (n,) is of a nucleus that the same image has with a higher score.

    Takes boxes (n, 4) xyxy, scores (n,), and the images (n,) that they are in.
    """
    one, two, _ = _pairs(boxes, image, REPEATED, same=True)
    first = score[one] >= score[two]
    better, worse = np.where(first, one, two), np.where(first, two, one)
    gone = np.zeros(len(boxes), dtype=bool)
    for pair in np.argsort(-score[better], kind="stable"):
        gone[worse[pair]] |= not gone[better[pair]]
    return gone


def _pairs(
    boxes: NDArray[np.floating], image: NDArray[np.integer], least: float, *, same: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Pairs (P,), (P,) of boxes of the `same` image, or of two, and their overlap (P,), which is at least `least`."""
    from_left = np.argsort(boxes[:, 0], kind="stable")
    left, found = boxes[from_left, 0], [np.empty((3, 0))]
    for start in range(0, len(boxes), _CHUNK):  # the boxes as shapes take much more memory than the pairs
        members = from_left[start : start + _CHUNK]
        others = from_left[start : int(np.searchsorted(left, boxes[members, 2].max(), side="right"))]
        one, two = shapely.STRtree(shapely.box(*boxes[others].T)).query(shapely.box(*boxes[members].T))
        one, two = members[one[one < two]], others[two[one < two]]
        one, two = np.sort([one, two], axis=0)[:, (image[one] == image[two]) == same]
        shared = np.minimum(boxes[one, 2:], boxes[two, 2:]) - np.maximum(boxes[one, :2], boxes[two, :2])
        inner = np.clip(shared, 0, None).prod(axis=1)
        area = [(boxes[side, 2:] - boxes[side, :2]).prod(axis=1) for side in (one, two)]
        overlap = inner / np.maximum(sum(area) - inner, 1e-9)
        found.append(np.stack([overlap, one, two])[:, overlap >= least])
    overlap, one, two = np.concatenate(found, axis=1)
    order = np.lexsort((two, one))
    return one[order].astype(np.int64), two[order].astype(np.int64), overlap[order]
