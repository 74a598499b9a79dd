"""Stains of H&E: their colours, and how much hematoxylin each pixel of an image holds.

Light falls off exponentially with the amount of a stain, so that optical density, -log10(value / white), is a sum over
the stains: density (3,) = amounts (3,) @ STAINS, and amounts = density @ UNMIXING.
"""

import numpy as np
from numpy.typing import NDArray

# Ruifrok and Johnston 2001 (Anal Quant Cytol Histol 23)
_DENSITIES = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
STAINS = _DENSITIES / np.linalg.norm(_DENSITIES, axis=1, keepdims=True)
"""Optical density of hematoxylin, eosin and a residual in red, green and blue; rows of unit length."""
UNMIXING = np.linalg.inv(STAINS)
"""(3, 3) matrix that turns the density of the colours into amounts of the stains."""
_LOOKUP = (UNMIXING[:, :1] * -np.log10((np.arange(256) + 1.0) / 256)).astype(np.float32)  # (colours, values)
_VOID = 8  # pixels darker than this in all colours are scanner fill, not tissue


def hematoxylin(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Hematoxylin (h, w) >= 0, in optical density, of an H&E image (h, w, 3) by colour deconvolution."""
    amount: NDArray[np.float32] = sum(table[pixels[..., colour]] for colour, table in enumerate(_LOOKUP))
    red, green, blue = np.moveaxis(pixels, -1, 0)
    amount[np.maximum(np.maximum(red, green), blue) < _VOID] = 0
    return np.maximum(amount, 0)
