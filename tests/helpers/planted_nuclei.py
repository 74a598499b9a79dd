"""Maps of instances with a known truth."""

import numpy as np


def touching_nuclei(size=128):
    """Ellipses as large as nuclei at 40x, (S, S) int64: in touching pairs, alone, and cut by the border."""
    y, x = np.mgrid[:size, :size]
    image = np.zeros((size, size), np.int64)
    for number, (row, column) in enumerate((r, c) for r in range(4, size, 30) for c in range(0, size, 42)):
        for side in (0, 1):
            alone = number % 3 == 2 and side
            a, b = 9 + number % 3, 12 - number % 2
            inside = ((x - column - 19 * side) / a) ** 2 + ((y - row - 3 * side) / b) ** 2 <= 1
            image[inside & (image == 0) & (not alone)] = 3 * number + side + 1
    return image


def agreement(truth, found):
    """Intersection over union of each nucleus of the truth and the found one that covers most of it, (n,)."""
    values = []
    for nucleus in np.unique(truth)[1:]:
        mask = truth == nucleus
        covered = np.bincount(found[mask], minlength=2)
        other = found == 1 + covered[1:].argmax()
        values.append((mask & other).sum() / (mask | other).sum())
    return np.array(values)
