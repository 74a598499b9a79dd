"""What the user is told of a registration: warnings on files and pixel sizes, and why all attempts were refused."""

from collections.abc import Sequence
from typing import get_args

import numpy as np

from celldetr.config.xenium import RegistrationSettings
from celldetr.runtime.errors import InputError
from celldetr.slides.pyramid import Pyramid
from celldetr.xenium.registration.affine import apply
from celldetr.xenium.registration.alignment import Alignment, check_plausible
from celldetr.xenium.registration.result import Attempt, Origin, Registration

_WRONG_KEYPOINT = 10.0  # um
_NAMED = 5  # keypoints
_TRIED = 6.5  # um; larger displacements were not found right where they were planted


class Refused(InputError):
    """No registration passes; `best` is the attempt whose nuclei are clearest, as a registration that does not pass."""

    def __init__(self, text: str, best: Registration) -> None:
        super().__init__(text)
        self.best = best


def origin_of(attempt: str) -> Origin:
    """Origin of the matrix of an attempt, with which its name begins."""
    found: Origin = max((name for name in get_args(Origin) if attempt.startswith(name)), key=len)
    return found


def best_attempt(attempts: Sequence[Attempt]) -> Attempt:
    """Attempt by a matrix alone under which hematoxylin shows the nuclei most clearly."""
    return max((item for item in attempts if item.field is None), key=lambda item: item.quality.z or 0)


def warnings_of(
    found: Registration,
    alignment: Alignment | None,
    mistake: str | None,
    he: Pyramid,
    dapi: Pyramid,
    settings: RegistrationSettings,
) -> list[str]:
    """List what the user should look at or correct, although a registration passes.

    `mistake` is what the file holds instead of a matrix from the H&E to the Xenium image; None if it holds one.
    """
    texts = []
    if alignment and mistake:
        texts.append(f"{alignment.name}: it holds {mistake}; that was undone: correct the file")
    elif alignment:
        if found.origin == "estimated":
            text = "it does not fit; the alignment was estimated from the images: correct or remove the file"
            texts.append(f"{alignment.name}: {text}")
        texts += _wrong_keypoints(alignment, found)
    if found.field is not None and found.distortion and found.distortion.largest > _TRIED:
        texts.append(
            f"local distortion: displacements of up to {found.distortion.largest:.1f} um; above about 6 um nuclei may "
            "be misplaced in regions that pass: compare outlines and nuclei in the picture and in patches.html"
        )
    own_size, known = found.he_mpp, he.mpp
    if known and abs(own_size / known - 1) > settings.scale_tolerance:
        text = f"got {known:g} um per px, but the matrix means {own_size:.4g}: correct he_mpp in the sheet"
        texts.append(f"H&E: {text}")
    plausible = check_plausible(found.matrix, own_size, found.pixel_size, settings, he.size, dapi.size)
    return [*texts, *(f"registration: {text}" for text in (*plausible.problems, *plausible.notes))]


def _wrong_keypoints(alignment: Alignment, found: Registration) -> list[str]:
    """Keypoints far from where a registration that passes puts them: the fit of all is drawn to a wrong one."""
    fixed, moving = alignment.keypoints[:, :2], alignment.keypoints[:, 2:]
    off = np.linalg.norm(apply(found.matrix, moving) - fixed, axis=1) * found.pixel_size
    wrong = np.flatnonzero(off > _WRONG_KEYPOINT)
    if not len(wrong):
        return []
    names = ", ".join(str(number + 1) for number in wrong[:_NAMED]) + (", ..." if len(wrong) > _NAMED else "")
    return [
        f"{alignment.name}: {len(wrong)} of {len(off)} keypoints (number {names}) lie up to {off.max():.0f} um beside "
        "their place: correct them"
    ]


def refusal(
    name: str,
    attempts: Sequence[Attempt],
    alignment: Alignment | None,
    he: Pyramid,
    dapi: Pyramid,
    pixel_size: float,
    settings: RegistrationSettings,
    notes: Sequence[str],
) -> str:
    """Three lines on a sample without a registration that passes: the best attempt, why it fails, what to do.

    `notes` are those of `check_outlines`.
    """
    best = best_attempt(attempts)
    reasons = [*notes, *best.quality.failures]
    remedy = "correct its he_mpp in the sheet, or set keypoints by hand in Xenium Explorer and give them as alignment"
    if alignment:
        plausible = check_plausible(alignment.matrix, he.mpp, pixel_size, settings, he.size, dapi.size)
        reasons += [f"{alignment.name}: {text}" for text in (*plausible.problems, *plausible.notes)]
        worst = alignment.residuals.max(initial=0) * pixel_size
        if worst > _WRONG_KEYPOINT:
            number = int(alignment.residuals.argmax()) + 1
            reasons.insert(0, f"{alignment.name}: the keypoints do not fit together (number {number}: {worst:.0f} um)")
            remedy = f"correct keypoint {number}, or the others if it is right, or leave alignment empty"
    size = f"{he.mpp:g} um per px" if he.mpp else "um per px unknown"
    return "\n".join(
        [
            f"{name}: no registration passes; best of {len(attempts)} attempts ({best.name}): {best.quality.summary()}",
            f"Why: {'; '.join(reasons)}",
            f"What to do: if {he.path} ({size}) is the H&E of this very section, {remedy}; else leave the sample out "
            "(use: no).",
        ]
    )
