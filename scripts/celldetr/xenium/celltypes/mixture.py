"""Cells as a multinomial mixture of expression profiles: known ones, and a free one found by expectation maximisation.

The shares of the known profiles are fit without the free one and then fixed among each other, so that a step takes one
product with the counts however many known profiles there are.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.special import expit, logit, logsumexp

Array = NDArray[np.float64]
_STEPS = 20  # of expectation maximisation, at most
_CONVERGED = 0.003  # share of its cells that a free profile exchanges in the last step
_SMOOTHING = 0.02  # share of the background in a profile
_FIRST_SHARE = 0.1  # of the free profile


@dataclass(frozen=True)
class Mixture:
    """A free profile beside known ones."""

    profile: Array  # (G,)
    share: float  # of the profile


@dataclass(frozen=True)
class Cells:
    """Cells and how known profiles, as a mixture, explain them."""

    counts: sparse.csr_matrix  # (N, G)
    profiles: list[Array]  # (G,) each
    shares: Array  # (C,) of the profiles
    explained: Array = field(init=False)  # (N,) log-likelihood

    def __post_init__(self) -> None:
        joint = self.counts @ np.log(self.profiles).T + np.log(np.maximum(self.shares, 1e-5))
        object.__setattr__(self, "explained", logsumexp(joint, axis=1))

    def posterior(self, mixture: Mixture) -> Array:
        """Posterior (N,) of the free profile of a mixture, which other cells may have given."""
        gain = self.counts @ np.log(mixture.profile) - self.explained
        return expit(gain + logit(np.clip(mixture.share, 1e-5, 1 - 1e-5)))


def fit_shares(fits: Array) -> Array:
    """Shares (C,) of profiles in a mixture, from the log-likelihoods (N, C) of cells."""
    shares = np.full(fits.shape[1], 1 / fits.shape[1])
    for _ in range(_STEPS):
        joint = fits + np.log(np.maximum(shares, 1e-5))
        shares = np.exp(joint - logsumexp(joint, axis=1)[:, None]).mean(axis=0)
    return shares


def fit_mixture(cells: Cells, start: NDArray[np.bool_]) -> Mixture:
    """Fit a free profile beside the known ones, from the cells of `start` (N,)."""
    background = np.asarray(cells.counts.sum(axis=0)).ravel() + 1
    background /= background.sum()
    weights, mixture = start.astype(np.float64), Mixture(background, _FIRST_SHARE)
    for _ in range(_STEPS):
        drawn = np.asarray(weights @ cells.counts).ravel()
        profile = (1 - _SMOOTHING) * drawn / max(drawn.sum(), 1e-9) + _SMOOTHING * background
        last, weights = weights, cells.posterior(Mixture(profile, mixture.share))
        mixture = Mixture(profile, float(weights.mean()))
        if np.abs(weights - last).sum() <= _CONVERGED * weights.sum():
            break
    return mixture


def smooth(share: Array) -> Array:
    """Profile (G,) that sums to 1 and has no zero."""
    share = share / share.sum()
    return (1 - _SMOOTHING) * share + _SMOOTHING / len(share)


def hellinger(one: Array, other: Array) -> float:
    """Squared Hellinger distance of two profiles (G,)."""
    return float(1 - np.sqrt(one * other).sum())
