"""The defects of PanNuke's masks, planted into clean ones.

A mask is (S, S, 5) integer ids per class channel, 0 where there is no nucleus.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Ids = NDArray[np.int32]
_AROUND = np.ones((3, 3), dtype=bool)  # pieces of a nucleus hang together over corners, too


@dataclass(frozen=True)
class Defects:
    """Shares of the images that carry each defect; a share above 0 gives at least one such image.

    The defaults are about the shares of the real data.

    Attributes
    ----------
    empty
        Images without any nucleus.
    one_pixel
        A nucleus of a single pixel where the image shows none.
    split
        One id in two pieces.
    overlap
        Pixels claimed by two classes.
    void
        Pixels that are neither nucleus nor background.
    shared
        Ids that start from 1 again in each channel.
    """

    empty: float = 0.043
    one_pixel: float = 0.05
    split: float = 0.027
    overlap: float = 0.073
    void: float = 0.021
    shared: float = 0.1


NO_DEFECTS = Defects(0, 0, 0, 0, 0, 0)


class Spoiler:
    """Plants defects into the masks of one fold, image after image.

    A defect that an image has no room for is left to the next image.

    Parameters
    ----------
    rng
        Source of the places.
    n_images
        Images of the fold.
    defects
        How many to plant.
    """

    def __init__(self, rng: np.random.Generator, n_images: int, defects: Defects) -> None:
        self._rng = rng
        shares = asdict(defects)
        order = rng.permutation(n_images)
        n_empty = _number(shares.pop("empty"), n_images)
        n_empty = n_empty if n_images > 1 else 0  # a single image shows nuclei
        self.empty = frozenset(int(i) for i in order[:n_empty])
        rest = order[n_empty:]
        self._planned = {
            name: frozenset(int(i) for i in rng.permutation(rest)[: _number(share, n_images)])
            for name, share in shares.items()
        }
        self._owed = dict.fromkeys(self._planned, 0)

    def spoil(self, index: int, masks: Ids) -> NDArray[np.bool_]:
        """Plant into `masks` what is due at image `index`; returns its (S, S) background."""
        for name, planned in self._planned.items():
            self._owed[name] += index in planned
            if name != "void" and self._owed[name] and masks.any() and _PLANT[name](self._rng, masks):
                self._owed[name] -= 1
        background: NDArray[np.bool_] = np.logical_not(masks.any(axis=2))
        if self._owed["void"] and masks.any():
            self._owed["void"] -= 1
            _void(self._rng, masks, background)
        return background


def pieces(mask: NDArray[np.bool_]) -> int:
    """Into how many pieces the pixels of one nucleus fall."""
    return int(ndimage.label(mask, structure=_AROUND)[1])


def _number(share: float, n_images: int) -> int:
    return min(n_images, max(1, round(share * n_images))) if share > 0 else 0


def _nuclei(rng: np.random.Generator, masks: Ids) -> list[tuple[int, int]]:
    """Channel and id of each nucleus, in random order."""
    found = [(c, int(i)) for c in range(masks.shape[2]) for i in np.unique(masks[..., c]) if i]
    return [found[k] for k in rng.permutation(len(found))]


def _plant_one_pixel(rng: np.random.Generator, masks: Ids) -> bool:
    free = np.argwhere(~masks.any(axis=2))
    if not len(free):
        return False
    row, column = free[rng.integers(len(free))]
    masks[row, column, rng.integers(masks.shape[2])] = masks.max() + 1
    return True


def _plant_split(rng: np.random.Generator, masks: Ids) -> bool:
    """Cut a nucleus across its longest extent."""
    for channel, number in _nuclei(rng, masks):
        mask = masks[..., channel] == number
        places = np.argwhere(mask).astype(float)
        if len(places) < 20:
            continue
        places -= places.mean(axis=0)
        long_axis = np.linalg.eigh(places.T @ places)[1][:, 1]
        gone = np.abs(places @ long_axis) < 0.9
        rows, columns = np.nonzero(mask)
        mask[rows[gone], columns[gone]] = False
        if pieces(mask) == 2:
            masks[rows[gone], columns[gone], channel] = 0
            return True
    return False


def _plant_overlap(rng: np.random.Generator, masks: Ids) -> bool:
    """Let a nucleus spill by a pixel into a touching one of another class; else mark a part of one in another class."""
    nuclei = _nuclei(rng, masks)
    for channel, number in nuclei:
        own = masks[..., channel]
        others = np.delete(masks, channel, axis=2).any(axis=2)
        spill = ndimage.binary_dilation(own == number, _AROUND) & others & (own == 0)
        if spill.any():
            own[spill] = number
            return True
    channel, number = nuclei[0]
    places = np.argwhere(masks[..., channel] == number)
    near = np.hypot(*(places - places[rng.integers(len(places))]).T) < 2.5
    other = (channel + int(rng.integers(1, masks.shape[2]))) % masks.shape[2]
    masks[*places[near].T, other] = masks.max() + 1
    return True


def _plant_shared(rng: np.random.Generator, masks: Ids) -> bool:
    """Start the ids of each channel from 1; only where two channels hold nuclei."""
    if np.count_nonzero(masks.any(axis=(0, 1))) < 2:
        return False
    for channel in range(masks.shape[2]):
        ids, place = np.unique(masks[..., channel], return_inverse=True)
        new = np.arange(ids.size) + (ids[0] != 0)
        masks[..., channel] = new[place].reshape(masks.shape[:2])
    return True


def _void(rng: np.random.Generator, masks: Ids, background: NDArray[np.bool_]) -> None:
    """Take the rim of a nucleus out of the background; a pixel anywhere when all is nucleus around it."""
    for channel, number in _nuclei(rng, masks):
        rim = ndimage.binary_dilation(masks[..., channel] == number, _AROUND) & background
        if rim.any():
            background[rim] = False
            return


_PLANT: Mapping[str, Callable[[np.random.Generator, Ids], bool]] = {
    "one_pixel": _plant_one_pixel,
    "split": _plant_split,
    "overlap": _plant_overlap,
    "shared": _plant_shared,
}
