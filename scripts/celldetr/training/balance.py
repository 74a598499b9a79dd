"""Sampling of training patches that balances cell classes and tissues."""

import numpy as np
from numpy.typing import NDArray


def sampling_weights(
    classes_present: NDArray[np.bool_], tissues: NDArray[np.integer], balance: float
) -> NDArray[np.float64]:
    """Weights with which patches are drawn, with replacement, so that rare classes and tissues come more often.

    The sampling "cell+tissue" of CellViT (Hoerst et al. 2024), as its code (TIO-IKIM/CellViT, pannuke.py) has it. With
    g = `balance`, n_c the patches that have class c and n their sum over the classes, m_t the patches of tissue t and
    m their number::

        cell   = (1 - g) max_c(p_c) + g sum_c(p_c n / (g n_c + (1 - g) n))    p_c = 1 if the patch has class c, else 0
        tissue = m / (g m_t + (1 - g) m)
        weight = cell / max(cell) + tissue / max(tissue)

    The maxima are over the patches. A patch without nuclei has the smallest value of `cell` of those with nuclei.
    All weights are equal if g = 0.

    Parameters
    ----------
    classes_present
        (N, K): whether a patch has a nucleus of a class.
    tissues
        (N,): a number for each tissue; patches of unknown tissue have a number of their own.
    balance
        In [0, 1].

    Returns
    -------
    NDArray
        (N,) > 0, at most 2. Only their ratios count.
    """
    patches_of_class = classes_present.sum(0)
    total = patches_of_class.sum()
    of_class = total / np.maximum(balance * patches_of_class + (1 - balance) * total, 1)
    cell = (1 - balance) * classes_present.any(1) + balance * (classes_present @ of_class)
    filled = classes_present.any(1)
    cell[~filled] = cell[filled].min() if filled.any() else 1

    _, tissue, patches_of_tissue = np.unique(tissues, return_inverse=True, return_counts=True)
    of_tissue = len(tissues) / (balance * patches_of_tissue + (1 - balance) * len(tissues))
    weights: NDArray[np.float64] = cell / cell.max() + of_tissue[tissue] / of_tissue.max()
    return weights
