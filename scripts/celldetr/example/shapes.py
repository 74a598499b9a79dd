"""Outlines of nuclei and glands in um, and their masks on a pixel grid."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]


@dataclass(frozen=True)
class Window:
    """The part of an image that a shape covers.

    Attributes
    ----------
    rows, columns
        Where the window lies in the image.
    mask
        (rows, columns) bool, True inside the shape.
    """

    rows: slice
    columns: slice
    mask: NDArray[np.bool_]

    @property
    def index(self) -> tuple[slice, slice]:
        """What to index the image with."""
        return self.rows, self.columns


def outline(
    rng: np.random.Generator,
    centre: Array,
    half: tuple[float, float],
    angle: float,
    *,
    irregular: float = 0.0,
    bend: float = 0.0,
    taper: float = 0.0,
    vertices: int = 36,
) -> Array:
    """Draw a closed outline: an ellipse with random bumps, bent and tapered along its long axis.

    Parameters
    ----------
    rng
        Source of the bumps.
    centre
        (2,) x, y in um.
    half
        Half of the length and half of the width in um.
    angle
        Direction of the long axis in radians, from x towards y.
    irregular
        Relative size of the bumps.
    bend
        Sagitta of the long axis as a share of its half length.
    taper
        0 for an ellipse, towards 1 for pointed ends.
    vertices
        Number of corners.

    Returns
    -------
    Array
        (vertices, 2) x, y in um.
    """
    t = np.linspace(0.0, 2.0 * np.pi, vertices, endpoint=False)
    order = np.arange(2, 7)
    size = irregular * rng.standard_normal(order.size) / order**0.7
    phase = rng.uniform(0.0, 2.0 * np.pi, order.size)
    radius = np.clip(1.0 + (size[:, None] * np.cos(order[:, None] * t + phase[:, None])).sum(axis=0), 0.5, 1.6)
    x = half[0] * radius * np.cos(t)
    y = half[1] * radius * np.sin(t) * np.abs(np.sin(t)) ** taper
    y = y + bend * half[0] * (0.5 - (x / half[0]) ** 2)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return np.stack([x, y], axis=1) @ turn.T + centre


def rasterise(polygon: Array, mpp: float, origin: tuple[float, float], shape: tuple[int, int]) -> Window | None:
    """Mask of the pixels whose centre lies inside a polygon (even-odd rule).

    Parameters
    ----------
    polygon
        (V, 2) x, y in um.
    mpp
        Pixel size in um.
    origin
        x, y in um of the image's upper left corner.
    shape
        Rows and columns of the image.

    Returns
    -------
    Window or None
        None when no pixel of the image lies inside.
    """
    px = (polygon - np.asarray(origin)) / mpp - 0.5
    low = np.maximum(np.ceil(px.min(axis=0)).astype(int), 0)
    high = np.minimum(np.floor(px.max(axis=0)).astype(int) + 1, (shape[1], shape[0]))
    if np.any(high <= low):
        return None
    columns, rows = np.arange(low[0], high[0]), np.arange(low[1], high[1])
    start, end = px, np.roll(px, -1, axis=0)
    straddles = (start[:, 1] <= rows[:, None]) != (end[:, 1] <= rows[:, None])
    rise = np.where(start[:, 1] == end[:, 1], 1.0, end[:, 1] - start[:, 1])
    crossing = start[:, 0] + (rows[:, None] - start[:, 1]) * (end[:, 0] - start[:, 0]) / rise
    crossing = np.sort(np.where(straddles, crossing, np.inf), axis=1)[:, : max(2, int(straddles.sum(axis=1).max()))]
    mask = (crossing[:, :, None] < columns).sum(axis=1) % 2 == 1
    if not mask.any():
        return None
    return Window(slice(int(low[1]), int(high[1])), slice(int(low[0]), int(high[0])), mask)


def reach(half: tuple[float, float], angle: float, direction: float) -> float:
    """Distance in um from the centre of an ellipse to its rim in a direction (radians)."""
    turned = direction - angle
    return half[0] * half[1] / math.hypot(half[1] * math.cos(turned), half[0] * math.sin(turned))
