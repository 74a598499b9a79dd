"""Settings of the readout of frozen embeddings; read without the libraries that measure it."""

from typing import Annotated

from pydantic import Field

from celldetr.settings import Settings


class ReadoutSettings(Settings):
    """Simple classifiers on frozen embeddings of true boxes; they tell classes apart and detect nothing."""

    k: Annotated[int, Field(ge=1)] = Field(20, description="nearest training nuclei that vote on the class")
    max_nuclei: Annotated[int, Field(ge=2)] = Field(
        20_000, description="most nuclei that train, drawn with the seed in the proportions of their classes"
    )
