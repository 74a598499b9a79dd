"""The model that finds and embeds the cells of slides, with what its file says about it."""

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from celldetr.config.base import Precision
from celldetr.model.celldetr import CellDETR
from celldetr.model.compiled import Compile
from celldetr.model.weights import load_model, model_facts
from celldetr.runtime.errors import InputError
from celldetr.runtime.provenance import sha256


@dataclass(frozen=True)
class CellModel:
    """A model in evaluation mode on its device."""

    net: CellDETR
    mpp: float
    """um per px of the tiles that it sees."""
    size: int
    """Side of a tile, px."""
    device: str = "cpu"
    precision: Precision = "fp32"
    compiling: Compile = "auto"
    source: Mapping[str, Any] | None = None
    """What `CellsInfo.model` says about it; ``trained_on`` is None if unknown."""

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        mpp: float | None = None,
        size: int | None = None,
        device: str = "cpu",
        precision: Precision = "fp32",
        compiling: Compile = "auto",
        trained_on: Collection[str] | None = None,
    ) -> Self:
        """Load a model file.

        Parameters
        ----------
        path
            Model file.
        mpp, size
            Pixel size (um) and side (px) of its patches if the file does not say them.
        device, precision, compiling
            See `celldetr.inference.predictor.Predictor`.
        trained_on
            Groups that it has seen besides those that its file names.

        Raises
        ------
        InputError
            See `load_model`; or neither the file nor the caller says what its patches are.
        """
        facts = model_facts(path)
        mpp, size = facts.mpp or mpp, facts.size or size
        if mpp is None or size is None:
            raise InputError(
                f"{path}: does not say the size of its patches and of their pixels, and no value is guessed; give "
                "patch.mpp and patch.size (command line: --model-mpp and --model-size)"
            )
        known = facts.trained_on is not None or trained_on is not None
        source = {
            "file": Path(path).name,
            "sha256": sha256(path),
            "experiment": facts.experiment,
            "trained_on": sorted({*(facts.trained_on or ()), *(trained_on or ())}) if known else None,
        }
        net = load_model(path, device, mpp=mpp, patch_size=size)
        return cls(net, mpp, size, device, precision, compiling, source)

    def require_types(self) -> None:
        """Refuse a model that cannot tell types or embed; `InputError`."""
        name = (self.source or {}).get("file", "the model")
        if self.net.baseline:
            raise InputError(
                f"{name}: got a model of mode baseline, which has no representation decoder and no embeddings; "
                "expected one of mode sequential or parallel"
            )
        if not self.net.settings.classes:
            raise InputError(
                f"{name}: got a model without classes (from pretraining), expected one with cell types; train an "
                "experiment of stage supervised from it and use that model"
            )
