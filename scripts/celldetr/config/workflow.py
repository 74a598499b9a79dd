"""The whole configuration: every block with its types, ranges, units and the defaults of the paper.

The settings of one training run are in `celldetr.config.experiment`. `python -m celldetr.config.workflow FOLDER` writes
the JSON schemas of workflow/schemas; a test compares them.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, Field, NonNegativeInt, model_validator

from celldetr.config.base import Count, NotNegative, Positive, Settings, merge, partial
from celldetr.config.classes import PANNUKE_CLASSES, ST_TYPES
from celldetr.config.evaluation import EvaluationSettings, FrozenFeatureSettings, InferenceSettings, ScoringSettings
from celldetr.config.experiment import (
    BackboneSettings,
    Experiment,
    Mode,
    ModelSettings,
    SharedModelSettings,
    SharedTrainingSettings,
    TrainingSettings,
)
from celldetr.config.pannuke import PanNukeSettings, SourceSettings
from celldetr.config.sheets import Name, ReferenceRow, SlideRow, XeniumRow
from celldetr.config.slides import SlideSettings
from celldetr.config.xenium import XeniumSettings
from celldetr.runtime.errors import ConfigError


class PatchSizeSettings(Settings):
    """Size and resolution of the patches that models see."""

    size: Annotated[int, Field(ge=32, multiple_of=32)] = Field(256, description="side of a patch, px; multiple of 32")
    mpp: Positive = Field(0.25, description="resolution, um per px")


class ExperimentSettings(Settings):
    """A named training run: what differs from the shared blocks `model` and `training`."""

    title: str = Field(description="name in tables and figures")
    stage: Literal["supervised", "st", "ssl", "zero_shot"] = Field(
        "supervised",
        description="supervised: PanNuke; ssl: contrastive pretraining on slides without labels; st: cell types of "
        "Xenium samples; zero_shot: no training, the model of another experiment with its types mapped to PanNuke",
    )
    mode: Mode | None = Field(
        None,
        description="baseline: Deformable DETR; sequential: CellDETR-S; parallel: CellDETR-P; every trained "
        "experiment needs it",
    )
    initial: str = Field(
        "imagenet",
        description="initial weights: none, imagenet (backbone only), another experiment, or a model file (.pt)",
    )
    model: partial(SharedModelSettings) = Field(  # type: ignore[valid-type]
        default_factory=partial(SharedModelSettings), description="keys of `model` that differ"
    )
    training: partial(SharedTrainingSettings) = Field(  # type: ignore[valid-type]
        default_factory=partial(SharedTrainingSettings), description="keys of `training` that differ"
    )

    @model_validator(mode="after")
    def _trained_or_not(self) -> Self:
        if self.stage == "zero_shot":
            settings = {"mode", "model", "training"} & self.model_fields_set
            if settings:
                raise ValueError(f"stage: got zero_shot with {sorted(settings)}, expected none: nothing is trained")
            if self.initial in ("none", "imagenet"):
                raise ValueError(f"initial: got {self.initial!r}, expected an experiment or a model file to use")
        elif self.mode is None:
            raise ValueError("mode: missing; expected baseline, sequential or parallel")
        return self


class TableSettings(Settings):
    """A table of measured rows beside the published ones."""

    experiments: tuple[str, ...] = Field(min_length=1, description="experiments with a row each")
    ours: tuple[str, ...] = Field((), description="experiments beyond the paper; their rows are marked as ours")
    published: str = Field(description="file with the published rows")
    frozen_features: tuple[str, ...] = Field(
        (), description="experiments whose frozen embeddings are classified, in extra rows"
    )

    @property
    def systems(self) -> tuple[str, ...]:
        """Experiments of the measured rows, in order."""
        return self.experiments + self.ours


class Figure3Settings(Settings):
    """Figure 3: attention of a few test nuclei."""

    experiments: tuple[str, ...] = Field(min_length=1, description="experiments shown")
    split: Annotated[int, Field(ge=1, le=3)] = Field(1, description="split whose test fold is used")
    nuclei: Count = Field(4, description="number of nuclei drawn")


class Figure4Settings(Settings):
    """Figure 4c: similarity of noised boxes to the nuclei of their patch."""

    patches: Count = Field(4, description="number of patches drawn")


class OverlaySettings(Settings):
    """Pictures of predictions beside the truth."""

    patches: Count = Field(12, description="test patches drawn per experiment and split")


class ExampleSampleSettings(Settings):
    """A synthetic Xenium sample and the error of its alignment file."""

    version: str = Field(description="version of Xenium Onboard Analysis, e.g. 3.0.0")
    size_um: tuple[Positive, Positive] = Field(description="width and height of the tissue, um")
    rotation: float = Field(description="rotation of the Xenium frame against the H&E image, degrees")
    alignment: Literal["matrix", "keypoints"] = Field("matrix", description="kind of the alignment file")
    wrong_shift: NotNegative = Field(0.0, description="error of the alignment file, um along x and y")
    wrong_rotation: float = Field(0.0, description="error of the alignment file, degrees")


class ExampleSettings(Settings):
    """Synthetic raw data in the original formats."""

    images: tuple[Count, Count, Count] = Field(description="number of images in each of the three folds")
    xenium: dict[Name, ExampleSampleSettings] = Field(default_factory=dict, description="Xenium samples by name")
    slides: dict[Name, tuple[Positive, Positive]] = Field(
        default_factory=dict, description="slides by name: width and height of the tissue, um"
    )
    reference_cells: Count = Field(3000, description="number of cells in the scRNA-seq reference")
    seed: NonNegativeInt = Field(0, description="seed of all drawings")


class Config(Settings):
    """The whole configuration."""

    base: Literal["paper", "none"] = Field(
        "paper",
        description="paper: this file is laid over config/config.yaml; none: this file stands alone, and a key that it "
        "leaves out takes its default",
    )
    seed: NonNegativeInt = Field(42, description="seed of splits, training and bootstrap")
    patch: PatchSizeSettings = Field(PatchSizeSettings(), description="size of the patches")
    pannuke: PanNukeSettings = Field(description="PanNuke archives and splits")
    imagenet: SourceSettings = Field(description="ResNet-50 weights of torchvision, for `initial: imagenet`")
    xenium: XeniumSettings | None = Field(None, description="Xenium samples; null: none")
    slides: SlideSettings | None = Field(None, description="whole slides for pretraining; null: none")
    model: SharedModelSettings = Field(SharedModelSettings(), description="the model that experiments share")
    training: SharedTrainingSettings = Field(SharedTrainingSettings(), description="the recipe that experiments share")
    inference: InferenceSettings = Field(InferenceSettings(), description="how models predict")
    evaluation: EvaluationSettings = Field(EvaluationSettings(), description="how predictions are scored")
    experiments: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")], ExperimentSettings] = Field(
        min_length=1, description="training runs by name"
    )
    tables: dict[Annotated[str, Field(pattern=r"^table[0-9]+$")], TableSettings] = Field(
        default_factory=dict, description="tables by name"
    )
    figure3: Figure3Settings | None = Field(None, description="attention maps; null: none")
    frozen_features: FrozenFeatureSettings = Field(
        FrozenFeatureSettings(), description="classifiers on frozen embeddings"
    )
    figure4: Figure4Settings = Field(Figure4Settings(), description="similarity matrices")
    overlays: OverlaySettings = Field(OverlaySettings(), description="pictures of predictions")
    example: ExampleSettings | None = Field(None, description="synthetic raw data; null: real data")

    @model_validator(mode="after")
    def _known(self) -> Self:
        self._check_names()
        if self.figure3 is not None and self.figure3.split not in self.pannuke.splits:
            raise ValueError(f"figure3.split: got {self.figure3.split}, expected one of {list(self.pannuke.splits)}")
        for name, block in self.experiments.items():
            for stage, source in (("st", "xenium"), ("ssl", "slides")):
                if block.stage == stage and getattr(self, source) is None:
                    raise ValueError(f"experiments.{name}.stage: got {stage!r}, but the block {source} is missing")
            self._check_initial(name)
            if block.stage != "zero_shot":
                self.experiment(name)
        return self

    def _check_names(self) -> None:
        """Refuse tables and figures of experiments that do not exist or cannot be shown there."""
        tested: dict[str, tuple[str, ...]] = {}
        frozen: dict[str, tuple[str, ...]] = {}
        for name, table in self.tables.items():
            if twice := set(table.experiments) & set(table.ours):
                raise ValueError(f"tables.{name}.ours: got {sorted(twice)}, which are in experiments too")
            tested |= {f"tables.{name}.experiments": table.experiments, f"tables.{name}.ours": table.ours}
            frozen[f"tables.{name}.frozen_features"] = table.frozen_features
        if self.figure3 is not None:
            tested["figure3.experiments"] = self.figure3.experiments
        for key, names in (tested | frozen).items():
            if unknown := [name for name in names if name not in self.experiments]:
                raise ValueError(f"{key}: got {unknown}, expected names of experiments: {sorted(self.experiments)}")
            elsewhere = [name for name in names if self.experiments[name].stage in ("st", "ssl")]
            if elsewhere and key in tested:
                raise ValueError(f"{key}: got {elsewhere}, expected experiments that are tested on PanNuke")
            without = [name for name in names if self.experiments[name].mode == "baseline"]
            if without and key in frozen:
                raise ValueError(f"{key}: got {without}, expected experiments with a representation decoder")

    def _check_initial(self, name: str) -> None:
        """Refuse initial models that do not exist, train nothing, or start from this experiment."""
        where, seen = f"experiments.{name}.initial", [name]
        while (initial := self.experiments[seen[-1]].initial) in self.experiments:
            if initial in seen:
                raise ValueError(f"{where}: got {' <- '.join([*seen, initial])}, expected no circle")
            if self.experiments[initial].stage == "zero_shot":
                raise ValueError(f"{where}: got {initial!r}, which trains no model; expected an experiment that does")
            seen.append(initial)
        if initial not in ("none", "imagenet") and not initial.endswith(".pt"):
            raise ValueError(
                f"{where}: got {initial!r}, expected none, imagenet, a file name ending in .pt, or one of the "
                f"experiments {sorted(self.experiments)}"
            )

    @property
    def scoring(self) -> ScoringSettings:
        """Which detections count, in validation and test."""
        threshold = {"nucleus_threshold": self.inference.nucleus_threshold}
        return ScoringSettings(**self.evaluation.model_dump(exclude={"metric", "centres", "resamples"}), **threshold)

    def classes(self, name: str) -> tuple[str, ...]:
        """Classes of an experiment's patches; none for slides."""
        return {"st": ST_TYPES, "ssl": ()}.get(self.experiments[name].stage, PANNUKE_CLASSES)

    def splits(self, name: str) -> tuple[int, ...]:
        """Return the splits that an experiment runs on: those of PanNuke, or the one of Xenium or slides."""
        return (1,) if self.experiments[name].stage in ("st", "ssl") else self.pannuke.splits

    def experiment(self, name: str) -> Experiment:
        """Lay the settings of one experiment over the shared ones.

        Raises
        ------
        ConfigError
            The combination is not valid.
        """
        block = self.experiments[name]
        assert block.stage != "zero_shot"
        where = f"experiments.{name}"
        model = merge(self.model.to_dict(), _given(block.model))
        training = merge(self.training.to_dict(), _given(block.training))
        if block.initial == "imagenet" and model["backbone"] | {"stages": 0, "extra_levels": 0} != (
            BackboneSettings(norm="frozen_batch").to_dict() | {"stages": 0, "extra_levels": 0}
        ):
            raise ConfigError(f"{where}.initial: got 'imagenet', expected 'none': these are weights of a ResNet-50")
        if block.initial in self.experiments:
            theirs = merge(self.model.to_dict(), _given(self.experiments[block.initial].model))
            weightless: dict[str, Any] = {"dropout": 0, "kernel": 0, "projection": 0}
            if training["probe"] != "head":  # a frozen decoder is used as it was trained
                weightless["representation"] = {"positions": True, "global_tokens": 0}
            differ = [key for key in model if merge(model, weightless)[key] != merge(theirs, weightless)[key]]
            if differ:
                raise ConfigError(
                    f"{where}.model: got other {', '.join(differ)} than experiment {block.initial}, from which it "
                    "starts; give both the same"
                )
        return Experiment(
            name=name,
            stage=block.stage,
            model=ModelSettings.from_dict(
                {**model, "mode": block.mode, "classes": self.classes(name)}, f"{where}.model"
            ),
            training=TrainingSettings.from_dict({**training, "seed": self.seed}, f"{where}.training"),
        )


def _given(block: BaseModel) -> dict[str, Any]:
    """Return the keys that a file gives, without defaults."""
    values: dict[str, Any] = block.model_dump(mode="json", exclude_unset=True)
    return values


def load_config(given: Mapping[str, Any], root: Path) -> Config:
    """Lay a user's settings over the paper's and check them.

    Mappings are merged key by key; lists and values replace those of the paper; null removes a block. With
    ``base: none`` the settings stand alone.

    Parameters
    ----------
    given
        Settings of the user's files and command line; empty for the paper itself.
    root
        Folder of the workflow; its config/config.yaml is the paper.

    Raises
    ------
    ConfigError
        As `Settings.from_dict`.
    """
    paper = yaml.safe_load((root / "config" / "config.yaml").read_text(encoding="utf-8"))
    config = dict(given) if given.get("base") == "none" else merge(paper, given)
    for key in ("experiments", "tables"):
        if isinstance(named := config.get(key), Mapping):
            config[key] = {name: block for name, block in named.items() if block is not None}
    return Config.from_dict(config)


def schemas() -> dict[str, str]:
    """Return the JSON schemas of workflow/schemas by file name: the configuration and a row of each sheet."""
    kinds: dict[str, type[Settings]] = {
        "config": Config,
        "xenium": XeniumRow,
        "references": ReferenceRow,
        "slides": SlideRow,
    }
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return {
        f"{name}.schema.json": json.dumps({**head, **kind.model_json_schema()}, indent=2) + "\n"
        for name, kind in kinds.items()
    }


if __name__ == "__main__":
    for name, text in schemas().items():
        Path(sys.argv[1], name).write_text(text, encoding="utf-8")
