"""Settings of the steps that turn Xenium samples into patches."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from celldetr.experiment import Positive, Share
from celldetr.settings import Settings


class XeniumSplitConfig(Settings):
    """Which patches train, validate and test."""

    by: Literal["auto", "slide", "block", "random"] = Field(
        "auto",
        description="slide: whole groups of the sheet; block: squares of tissue; auto: slide when there are enough "
        "groups, else block; random: patches (the paper)",
    )
    train: Share = Field(0.8, description="share of the patches")
    val: Share = 0.1
    test: Share = 0.1
    block_um: Positive = Field(1000.0, description="side of a block")
    margin_um: Annotated[float, Field(ge=0)] = Field(
        0.0, description="strip between blocks of different parts whose patches are left out"
    )

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if abs(self.train + self.val + self.test - 1) > 1e-6 or min(self.train, self.test) <= 0:
            raise ValueError(
                f"train, val, test: got {self.train}, {self.val}, {self.test}, expected shares that sum to 1, "
                "train and test above 0"
            )
        return self
