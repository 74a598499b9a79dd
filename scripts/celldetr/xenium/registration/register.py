"""Register the H&E of a sample: try the file, the file refined, its likely mistakes, then the images; check each."""

import logging
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from celldetr.config.xenium import RegistrationSettings
from celldetr.runtime.errors import InputError
from celldetr.slides.pyramid import Pyramid
from celldetr.xenium.registration.affine import Floats, decompose, scaling
from celldetr.xenium.registration.alignment import Alignment, Plausibility, check_plausible
from celldetr.xenium.registration.distortion import estimate_field
from celldetr.xenium.registration.estimate import MapPair, estimate, estimate_nearby, make_maps
from celldetr.xenium.registration.field import DisplacementField
from celldetr.xenium.registration.gain import gain
from celldetr.xenium.registration.gate import check
from celldetr.xenium.registration.maps import inside
from celldetr.xenium.registration.measure import he_nuclei, window_shifts
from celldetr.xenium.registration.messages import Refused, best_attempt, origin_of, refusal, warnings_of
from celldetr.xenium.registration.nuclei import DapiNuclei, Region
from celldetr.xenium.registration.own_image import check_outlines
from celldetr.xenium.registration.refine import refine_nuclei, refine_windows
from celldetr.xenium.registration.result import Attempt, Keypoints, Quality, Registration

log = logging.getLogger(__name__)

_SANE_SCALES = (0.2, 10.0)  # Xenium px per H&E px, of matrices that are worth a check
_SCALE_STEP = 0.05  # relative step of the search for the scale
_NEAR, _NEAR_Z = (
    0.85,
    10.0,
)  # share of the chance level, and z of the contrast, of a matrix that is right but for a field
_MIN_IN_DAPI = 0.9  # share of the nuclei inside their own image
_HELD = " as if it held "  # in the name of an attempt, before a mistake of the file


def register(
    he: Pyramid,
    dapi: Pyramid,
    outlines: NDArray[np.object_],
    pixel_size: float,
    alignment: Alignment | None,
    settings: RegistrationSettings,
    *,
    name: str,
    seed: int,
    workers: int = 1,
) -> Registration:
    """Find a matrix from the H&E (whose `mpp` may be None) to the Xenium image that passes the gate.

    `outlines` are the DAPI nuclei (n,), polygons in um of the Xenium frame; `pixel_size` is um per Xenium px; `name` is
    the sample's, for messages; `seed` that of the robust fits; `workers` are threads. Raises Refused if no matrix
    passes (the log has all attempts), InputError if the nuclei are not those of the image or mirrored against it, or
    the H&E is not in colour.
    """
    if he.channels != 3:
        raise InputError(
            f"{name}: {he.path}: got an image with one channel, expected colour (H&E); is it the DAPI image?"
        )
    try:
        nuclei = DapiNuclei(outlines)
        regions = nuclei.regions(settings)
        notes = check_outlines(dapi, nuclei, regions, pixel_size, settings)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    share = inside(dapi, scaling(1 / pixel_size), nuclei.centroids).mean()
    if share < _MIN_IN_DAPI:
        raise InputError(
            f"{name}: got {share:.0%} of the nuclei inside the DAPI image {dapi.path}, expected {_MIN_IN_DAPI:.0%} or "
            "more; are image, nuclei and pixel size of the same run?"
        )
    run = _Run(he, dapi, nuclei, regions, pixel_size, settings, seed, workers, alignment)
    found = run.from_file(alignment) if alignment else None
    found = run.bend(found) if found else run.rescue()
    if found is None:
        found = run.from_images()
        found = run.bend(found) if found else run.rescue()
    if found is None:
        best = best_attempt(run.attempts)
        text = refusal(name, run.attempts, alignment, he, dapi, pixel_size, settings, notes)
        raise Refused(text, run.result(best))
    warnings = notes + warnings_of(found, alignment, run.mistake, he, dapi, settings)
    for text in warnings:
        log.warning("warning: %s", text)
    return found.model_copy(update={"warnings": tuple(warnings)})


@dataclass
class _Run:
    """One registration: images, nuclei, and all attempts so far."""

    he: Pyramid
    dapi: Pyramid
    nuclei: DapiNuclei
    regions: list[Region]
    pixel_size: float
    settings: RegistrationSettings
    seed: int
    workers: int
    alignment: Alignment | None
    attempts: list[Attempt] = field(default_factory=list)
    before: Quality | None = None
    mistake: str | None = None  # of the file, undone in the last result

    @cached_property
    def maps(self) -> list[MapPair]:
        nominal = self.he.mpp or self.pixel_size * float(np.sqrt(np.prod(self.settings.scale_range)))
        return make_maps(self.he, self.dapi, nominal, self.pixel_size)

    def to_um(self, matrix: Floats) -> Floats:
        """Matrix to um of the Xenium frame instead of Xenium px."""
        return scaling(self.pixel_size) @ matrix

    def check(self, name: str, to_um: Floats, field: DisplacementField | None = None) -> Attempt:
        """Check a matrix, with its field, and keep it as an attempt."""
        quality = check(to_um, self.he, self.nuclei, self.regions, self.settings, field)
        digest = field.digest if field else None
        attempt = Attempt(name=name, matrix=scaling(1 / self.pixel_size) @ to_um, quality=quality, field=digest)
        log.info("%s: %s; %s", name, "passes" if quality.passed else "fails", quality.summary())
        self.attempts.append(attempt)
        return attempt

    def accept(self, name: str, to_um: Floats) -> Registration | None:
        """Registration by a matrix; None if it does not pass."""
        attempt = self.check(name, to_um)
        return self.result(attempt) if attempt.quality.passed else None

    def refine(self, to_um: Floats) -> Floats:
        to_um = refine_windows(to_um, self.he, self.dapi, self.pixel_size, self.regions, self.seed)
        for _ in range(2):
            to_um = refine_nuclei(to_um, self.he, self.nuclei, self.regions, self.settings)
        return to_um

    def from_file(self, alignment: Alignment) -> Registration | None:
        """Registration by the file's matrix or one near it; None if none passes."""
        if keypoints := self._keypoints():
            log.info("alignment file: keypoints and their fit, um: %s", keypoints.to_dict())
        matrix, to_um = alignment.matrix, self.to_um(alignment.matrix)
        plausible = check_plausible(matrix, self.he.mpp, self.pixel_size, self.settings, self.he.size, self.dapi.size)
        low, high = _SANE_SCALES
        if low < decompose(matrix).scale < high:
            # check even an implausible matrix: the pixel size of the H&E may be wrong instead
            first = self.check("file", to_um)
            self.before = first.quality
            if first.quality.passed:
                return self._refine_passing(first)
        if plausible.problems:
            return self._undo_mistake(plausible)
        found = self.accept("file, refined", self.refine(to_um)) or self._undo_mistake(plausible)
        nearby = [] if found else estimate_nearby(self.maps, to_um, self.seed)
        tries = (self.accept("file, refined on maps", self.refine(candidate)) for candidate in nearby)
        return found or next(filter(None, tries), None)

    def _refine_passing(self, first: Attempt) -> Registration:
        """Refine a file that passes, as far as `refine` asks for it."""
        if self.settings.refine == "never":
            return self.result(first)
        second = self.check("file, refined", self.refine(self.to_um(first.matrix)))
        wanted = second.quality.passed and (self.settings.refine == "always" or self._better(first, second))
        return self.result(second if wanted else first)

    def _better(self, first: Attempt, second: Attempt) -> bool:
        """Whether the second matrix is clearly better than the first one."""
        found = gain(self.to_um(first.matrix), self.to_um(second.matrix), self.he, self.regions, self.settings)
        log.info("%s instead of %s: %s", second.name, first.name, found.summary())
        return found.significant

    def _undo_mistake(self, plausible: Plausibility) -> Registration | None:
        """Registration by the file's matrix with a likely mistake undone; None if none passes."""
        for what, corrected in plausible.mistakes.items():
            attempt = self.check(f"file, repaired{_HELD}{what}", self.to_um(corrected))
            if attempt.quality.passed:
                name = f"file, repaired and refined{_HELD}{what}"
                refined = self.check(name, self.refine(self.to_um(attempt.matrix)))
                better = refined.quality.passed and self._better(attempt, refined)
                return self.result(refined if better else attempt)
        return None

    def from_images(self) -> Registration | None:
        """Registration without a file; None if none passes."""
        low, high = self.settings.scale_range
        count = max(int(np.ceil(np.log(high / low) / _SCALE_STEP)), 1) + 1
        scales = np.geomspace(low, high, count) * self.pixel_size / self.maps[0].he_mpp
        tries = [("estimated, any scale", scales.tolist())]
        if self.he.mpp:
            tries.insert(0, ("estimated", [1.0]))
        found = (
            self.accept(name, self.refine(candidate))
            for name, factors in tries
            for candidate in estimate(self.maps, factors, self.settings, self.seed)
        )
        return next(filter(None, found), None)

    def bend(self, found: Registration) -> Registration:
        """Add the field of local displacements to a registration, if that brings the nuclei closer."""
        if self.settings.local == "never":
            return found
        to_um = found.he_to_um()
        windows = window_shifts(to_um, self.he, self.dapi, self.nuclei, self.pixel_size, self.workers)
        blobs = he_nuclei(to_um, self.he, self.nuclei, self.settings, self.workers)
        points = windows, blobs, self.nuclei.centroids
        field, distortion = estimate_field(*points, seed=self.seed, workers=self.workers)
        if distortion:
            log.info("local distortion: %s", distortion.summary())
        if field is None:
            return found.model_copy(update={"distortion": distortion})
        attempt = self.check("with local displacements", to_um, field)
        better = (attempt.quality.distance or np.inf) < (found.quality.distance or np.inf)
        if not (attempt.quality.passed and better):
            distortion = distortion and distortion.model_copy(update={"kept": False})
            return found.model_copy(update={"distortion": distortion, "attempts": tuple(self.attempts)})
        update = {"quality": attempt.quality, "field": field, "distortion": distortion}
        return found.model_copy(update={**update, "attempts": tuple(self.attempts)})

    def rescue(self) -> Registration | None:
        """Registration by the best matrix that fails only for local displacements; None if there is none."""
        near = [item for item in self.attempts if item.field is None and self._is_near(item.quality)]
        if not near:
            return None
        best = min(near, key=lambda item: item.quality.distance or np.inf)
        found = self.bend(self.result(best))
        return found if found.quality.passed else None

    def _is_near(self, quality: Quality) -> bool:
        """Whether nuclei are clearly closer than by chance, so that a field may do the rest."""
        if quality.distance is None or quality.chance is None:
            return False
        return quality.distance < _NEAR * quality.chance and (quality.z or 0) > _NEAR_Z

    def result(self, attempt: Attempt) -> Registration:
        """Registration by an attempt, which may not pass."""
        self.mistake = attempt.name.partition(_HELD)[2] or None
        return Registration(
            matrix=attempt.matrix,
            pixel_size=self.pixel_size,
            origin=origin_of(attempt.name),
            quality=attempt.quality,
            quality_before=self.before,
            keypoints=self._keypoints(),
            attempts=tuple(self.attempts),
        )

    def _keypoints(self) -> Keypoints | None:
        """Fit of the keypoints of the file, if it holds some."""
        if self.alignment is None or not len(self.alignment.residuals):
            return None
        off = self.alignment.residuals * self.pixel_size
        return Keypoints(number=len(off), median=float(np.median(off)), worst=float(off.max()))
