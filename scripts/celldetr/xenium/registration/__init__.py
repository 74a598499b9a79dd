"""Registration of H&E images to Xenium samples.

    matrix = read_alignment("he_imagealignment.csv").matrix
    registration = register(he, dapi, nuclei.geometry, 0.2125, matrix, RegistrationSettings(), name="lung")
    registration.write("registration.json")
    read_registration("registration.json").um_to_he()

A matrix (3, 3) always maps H&E level-0 px (x, y, 1) to Xenium px; um = Xenium px times `pixel_size`.
"""

from typing import TYPE_CHECKING, Any

from celldetr.config.xenium import RegistrationSettings
from celldetr.xenium.registration.result import Attempt, Quality, Registration, read_registration
from celldetr.xenium.registration.transform import Alignment, read_alignment

if TYPE_CHECKING:
    from celldetr.xenium.registration.attempts import register

__all__ = [
    "Alignment",
    "Attempt",
    "Quality",
    "Registration",
    "RegistrationSettings",
    "read_alignment",
    "read_registration",
    "register",
]


def __getattr__(name: str) -> Any:
    # those who read a registration do without the image libraries that making one needs
    if name == "register":
        from celldetr.xenium.registration.attempts import register

        return register
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
