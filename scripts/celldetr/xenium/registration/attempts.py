"""From what is known to a matrix that passes: the file, the file refined, the file's likely mistake, the images."""

import logging
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from celldetr.config.xenium import RegistrationSettings
from celldetr.runtime.errors import InputError
from celldetr.slides.pyramid import Pyramid
from celldetr.xenium.registration.estimate import estimate, estimate_nearby, scales
from celldetr.xenium.registration.gate import check
from celldetr.xenium.registration.images import inside
from celldetr.xenium.registration.maps import MapPair, make_maps
from celldetr.xenium.registration.nuclei import Nuclei
from celldetr.xenium.registration.plausible import Plausibility, check_plausible
from celldetr.xenium.registration.refine import refine_nuclei, refine_windows
from celldetr.xenium.registration.result import Attempt, Keypoints, Origin, Quality, Registration
from celldetr.xenium.registration.transform import Alignment, as_matrix, decompose, scaling

log = logging.getLogger(__name__)

_WRONG_KEYPOINT = 20.0  # um
_SANE_SCALES = (0.2, 10.0)  # Xenium px per H&E px, of matrices that are worth a look
_IN_DAPI = 0.9  # share of the nuclei that must lie inside their own image


def register(
    he: Pyramid,
    dapi: Pyramid,
    nuclei_um: Any,
    pixel_size: float,
    alignment: Alignment | NDArray[np.float64] | None,
    settings: RegistrationSettings | None = None,
    *,
    name: str = "sample",
    seed: int = 0,
) -> Registration:
    """Find a matrix from the H&E to the Xenium image that passes the gate.

    Parameters
    ----------
    he
        H&E image; its `mpp` may be None.
    dapi
        DAPI image of the sample.
    nuclei_um
        Polygons (n,) of shapely or centroids (n, 2), um of the Xenium frame.
    pixel_size
        um per Xenium px.
    alignment
        What `read_alignment` read, or a matrix (3, 3) H&E level-0 px -> Xenium px; None without a file.
    settings
        How to judge and to search; the defaults when None.
    name
        Name of the sample, for messages.
    seed
        Of the choices that robust fits begin with.

    Raises
    ------
    InputError
        Nothing passes; with the figures of every attempt.
    """
    try:
        nuclei = Nuclei(nuclei_um)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    share = inside(dapi, scaling(1 / pixel_size), nuclei.centroids).mean()
    if share < _IN_DAPI:
        raise InputError(
            f"{name}: got {share:.0%} of the nuclei inside the DAPI image {dapi.path}, expected {_IN_DAPI:.0%} or "
            "more; are image, nuclei and pixel size of the same run?"
        )
    run = _Run(he, dapi, nuclei, pixel_size, settings or RegistrationSettings(), seed)
    if alignment is not None:
        file = alignment if isinstance(alignment, Alignment) else Alignment(np.asarray(alignment), np.empty(0))
        found = run.from_file(as_matrix(file.matrix, f"{name}: alignment"), file.residuals)
        if found:
            return found
    found = run.from_images()
    if found:
        return found
    raise InputError(_message(name, he, run))


class _Run:
    """One registration: images, nuclei, and all that was tried so far."""

    def __init__(
        self,
        he: Pyramid,
        dapi: Pyramid,
        nuclei: Nuclei,
        pixel_size: float,
        settings: RegistrationSettings,
        seed: int,
    ) -> None:
        self.he, self.dapi, self.nuclei = he, dapi, nuclei
        self.pixel_size, self.settings, self.seed = pixel_size, settings, seed
        self.regions = nuclei.regions(settings)
        self.attempts: list[Attempt] = []
        self.warnings: list[str] = []
        self.before: Quality | None = None
        self.keypoints: Keypoints | None = None

    @cached_property
    def maps(self) -> list[MapPair]:
        return make_maps(self.he, self.dapi, self.nominal, self.pixel_size)

    @property
    def nominal(self) -> float:
        """Size of an H&E pixel that the maps are made for, um."""
        return self.he.mpp or self.pixel_size * float(np.sqrt(np.prod(self.settings.scale_range)))

    def judge(self, name: str, to_um: NDArray[np.float64]) -> Attempt:
        """Check a matrix and remember it."""
        quality = check(to_um, self.he, self.nuclei, self.regions, self.settings)
        attempt = Attempt(name=name, matrix=scaling(1 / self.pixel_size) @ to_um, quality=quality)
        log.info("%s: %s; %s", name, "passes" if quality.passed else "fails", quality.summary())
        self.attempts.append(attempt)
        return attempt

    def refined(self, to_um: NDArray[np.float64], *, rounds: int = 2) -> NDArray[np.float64]:
        """Matrix after the windows and the nuclei were brought together."""
        to_um = refine_windows(to_um, self.he, self.dapi, self.pixel_size, self.regions, self.seed)
        for _ in range(rounds):
            to_um = refine_nuclei(to_um, self.he, self.nuclei, self.regions, self.settings)
        return to_um

    def from_file(self, matrix: NDArray[np.float64], residuals: NDArray[np.float64]) -> Registration | None:
        """Registration by the file's matrix or one near it, if any passes."""
        self._keypoints(residuals)
        to_um = scaling(self.pixel_size) @ matrix
        plausible = check_plausible(matrix, self.he.mpp, self.pixel_size, self.settings, self.he.size, self.dapi.size)
        self.warnings += [f"alignment file: {note}" for note in plausible.notes]
        self.warnings += [f"alignment file: {problem}" for problem in plausible.problems]
        low, high = _SANE_SCALES
        if low < decompose(matrix).scale < high:
            # the images decide: it may be the pixel size of the H&E that is wrong
            first = self.judge("file", to_um)
            self.before = first.quality
            if first.quality.passed:
                return self._better(first)
        if not plausible.problems:
            second = self.judge("file, refined", self.refined(to_um))
            if second.quality.passed:
                return self._result("file, refined", second)
        found = self._mistaken(plausible)
        if found or plausible.problems:
            return found
        for candidate in estimate_nearby(self.maps, to_um, self.seed):
            attempt = self.judge("file, refined on maps", self.refined(candidate))
            if attempt.quality.passed:
                return self._result("file, refined", attempt)
        return None

    def _keypoints(self, residuals: NDArray[np.float64]) -> None:
        """Remember how well keypoints fit; they are Xenium px away from the fit."""
        if not len(residuals):
            return
        typical, worst = (float(value) * self.pixel_size for value in (np.median(residuals), residuals.max()))
        self.keypoints = Keypoints(number=len(residuals), median=typical, worst=worst)
        log.info("alignment file: %d keypoints, %.1f um from the fit, at most %.1f", len(residuals), typical, worst)
        if worst > _WRONG_KEYPOINT:
            self.warnings.append(
                f"alignment file: keypoint {int(residuals.argmax()) + 1} is {worst:.1f} um from the fit of all: "
                "correct it"
            )

    def _better(self, first: Attempt) -> Registration:
        """Registration by a file that passes, refined when the settings want it and it is worth it."""
        if self.settings.refine == "never":
            return self._result("file", first)
        second = self.judge("file, refined", self.refined(scaling(self.pixel_size) @ first.matrix))
        gain = (first.quality.distance or 0) - (second.quality.distance or np.inf)
        wanted = self.settings.refine == "always" or gain >= self.settings.min_gain
        if second.quality.passed and wanted:
            return self._result("file, refined", second)
        return self._result("file", first)

    def _mistaken(self, plausible: Plausibility) -> Registration | None:
        """Registration by the file's matrix with a likely mistake undone."""
        for mistake in plausible.mistakes:
            attempt = self.judge(f"file, if it holds {mistake.what}", scaling(self.pixel_size) @ mistake.corrected)
            if attempt.quality.passed:
                self.warnings.append(f"alignment file: it holds {mistake.what}; that was undone: correct the file")
                return self._result("file, refined", self._best_of(attempt))
        return None

    def _best_of(self, attempt: Attempt) -> Attempt:
        refined = self.judge(f"{attempt.name}, refined", self.refined(scaling(self.pixel_size) @ attempt.matrix))
        better = (refined.quality.distance or np.inf) < (attempt.quality.distance or np.inf)
        return refined if refined.quality.passed and better else attempt

    def from_images(self) -> Registration | None:
        """Registration without a file, if any passes."""
        low, high = self.settings.scale_range
        all_scales = scales(low, high) * self.pixel_size / self.nominal
        tries: list[tuple[str, Sequence[float]]] = [("estimated, any scale", list(all_scales))]
        if self.he.mpp:
            tries.insert(0, ("estimated", [1.0]))
        for name, factors in tries:
            for candidate in estimate(self.maps, factors, self.settings, self.seed):
                attempt = self.judge(name, self.refined(candidate))
                if attempt.quality.passed:
                    return self._result("estimated", attempt)
        return None

    def _result(self, origin: Origin, attempt: Attempt) -> Registration:
        effective = decompose(attempt.matrix).scale * self.pixel_size
        known = self.he.mpp
        if known and abs(effective / known - 1) > self.settings.scale_tolerance:
            self.warnings.append(
                f"H&E: got {known:g} um per px, but the matrix means {effective:.4g}; correct the pixel size"
            )
        return Registration(
            matrix=attempt.matrix,
            pixel_size=self.pixel_size,
            he_mpp=effective,
            origin=origin,
            quality=attempt.quality,
            quality_before=self.before,
            keypoints=self.keypoints,
            attempts=tuple(self.attempts),
            warnings=tuple(self.warnings),
        )


def _message(name: str, he: Pyramid, run: _Run) -> str:
    lines = [f"{name}: no registration passes. Tried:"]
    for attempt in run.attempts:
        lines.append(f"  {attempt.name}: {'; '.join(attempt.quality.failures)} ({attempt.quality.summary()})")
    lines += [f"  {warning}" for warning in run.warnings]
    size = f"{he.mpp:g} um per px" if he.mpp else "um per px unknown"
    lines.append(
        f"  Is {he.path} ({size}) the H&E of this very section? Give its um per px, set keypoints by hand (alignment "
        "file), or leave the sample out."
    )
    return "\n".join(lines)
