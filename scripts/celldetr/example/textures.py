"""Random textures that are functions of position: any window of a texture equals the same part of the whole.

Values come from hashed integer coordinates, never from a generator that is drawn in sequence. Lengths in um.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]
Floats = NDArray[np.float32]
_UNIT = np.float32(2.0**-31)


def mixed(seed: int, *keys: int) -> int:
    """Seed of 32 bits made of a seed and further keys."""
    return int(np.random.SeedSequence([seed, *keys]).generate_state(1)[0])


def hashed(seed: int, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.uint32]:
    """Hash of integer coordinates, which broadcast against each other."""
    r = rows.astype(np.uint32) * np.uint32(0x9E3779B1) + np.uint32(seed)
    c = columns.astype(np.uint32) * np.uint32(0x85EBCA77)
    r ^= r >> np.uint32(15)
    value = (r * np.uint32(0x2C1B3C6D)) ^ (c + (c >> np.uint32(13)))
    value ^= value >> np.uint32(16)
    value *= np.uint32(0x7FEB352D)
    value ^= value >> np.uint32(15)
    value *= np.uint32(0x846CA68B)
    value ^= value >> np.uint32(16)
    return value


def white(seed: int, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> Floats:
    """(R, C) noise of mean 0 and standard deviation 1, independent for each pair of a row and a column."""
    value = hashed(seed, rows[:, None], columns[None, :])
    total = (value & np.uint32(0x7FF)) + ((value >> np.uint32(11)) & np.uint32(0x7FF)) + (value >> np.uint32(22)) * 2
    return (total.astype(np.float32) - np.float32(3070.0)) * np.float32(1 / 1023.5)


class Axis:
    """Points of one axis in a lattice of a given step: what a separable interpolation needs.

    Attributes
    ----------
    nodes
        Indices of the lattice points around the axis' points.
    low
        For each point, place in `nodes` of the lattice point before it.
    weight
        For each point, weight of the lattice point after it.
    """

    def __init__(self, points: Array, step: float, *, smooth: bool) -> None:
        scaled = points / step
        floor = np.floor(scaled).astype(np.int64)
        t = scaled - floor
        first = int(floor[0]) if floor.size else 0
        last = int(floor[-1]) if floor.size else 0
        self.nodes = np.arange(first, last + 2)
        self.low = floor - first
        self.weight = (t * t * (3.0 - 2.0 * t) if smooth else t).astype(np.float32)


def interpolate(values: Floats, rows: Axis, columns: Axis) -> Floats:
    """Interpolate (nodes of rows, nodes of columns) values at the points: (R, C)."""
    w = rows.weight[:, None]
    lower, upper = values[rows.low], values[rows.low + 1]
    bands = lower + w * (upper - lower)
    left, right = bands[:, columns.low], bands[:, columns.low + 1]
    return left + columns.weight * (right - left)


def noise(seed: int, y: Array, x: Array, cell: float) -> Floats:
    """(R, C) smooth noise in [-1, 1] with bumps of about `cell` um, at rows `y` and columns `x` (um, ascending)."""
    rows, columns = Axis(y, cell, smooth=True), Axis(x, cell, smooth=True)
    return interpolate(_lattice(seed, rows.nodes, columns.nodes), rows, columns)


def noise_along(seed: int, u: Floats, v: Floats, cell: tuple[float, float]) -> Floats:
    """Smooth noise in [-1, 1] at points (u, v) of any shape, stretched: bumps of `cell` um along u and v."""
    su, sv = u * np.float32(1 / cell[0]), v * np.float32(1 / cell[1])
    fu, fv = np.floor(su), np.floor(sv)
    iu, iv = fu.astype(np.int64), fv.astype(np.int64)
    first = int(iu.min()), int(iv.min())
    nodes = np.arange(first[0], int(iu.max()) + 2), np.arange(first[1], int(iv.max()) + 2)
    lattice = _lattice(seed, *nodes).ravel()
    place = (iu - first[0]) * nodes[1].size + (iv - first[1])
    tu, tv = su - fu, sv - fv
    tu, tv = tu * tu * (3 - 2 * tu), tv * tv * (3 - 2 * tv)
    near = lattice[place] * (1 - tv) + lattice[place + 1] * tv
    place += nodes[1].size
    far = lattice[place] * (1 - tv) + lattice[place + 1] * tv
    return near + tu * (far - near)


def step(values: Floats, low: float | Floats, high: float | Floats) -> Floats:
    """Smooth step from 0 at `low` to 1 at `high`."""
    t = np.clip((values - low) / (high - low), 0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


def _lattice(seed: int, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> Floats:
    return hashed(seed, rows[:, None], columns[None, :]).astype(np.float32) * _UNIT - np.float32(1.0)
