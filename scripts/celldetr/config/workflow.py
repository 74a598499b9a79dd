"""The whole configuration: every block with types, ranges, units and the defaults of the paper.

The settings of one training run are in `celldetr.config.experiment`. The JSON schemas in
workflow/schemas are written by `python -m celldetr.config.workflow FOLDER` (a test compares).
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, model_validator

from celldetr.config.base import Count, Positive, Settings, merge, partial
from celldetr.config.classes import PANNUKE_CLASSES, ST_TYPES
from celldetr.config.evaluation import EvaluationSettings, FrozenFeatureSettings, InferenceSettings
from celldetr.config.experiment import (
    BackboneSettings,
    Experiment,
    Mode,
    ModelConfig,
    ModelSettings,
    TrainingConfig,
    TrainingSettings,
)
from celldetr.config.sheets import Name, ReferenceRow, SlideRow, XeniumRow
from celldetr.config.slides import SlideSettings
from celldetr.config.xenium import XeniumSettings
from celldetr.runtime.errors import ConfigError


class Source(Settings):
    """A raw file: where it can be had, and how to know that it is whole."""

    urls: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        min_length=1, description="http(s) or file URLs or local paths, tried in order"
    )
    bytes: Count | None = Field(None, description="size")
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{8,64}$")] | None = Field(
        None, description="checksum in hex; the first 8 digits or more"
    )


class PatchConfig(Settings):
    """Patches that models see."""

    size: Annotated[int, Field(ge=32, multiple_of=32)] = Field(256, description="px")
    mpp: Positive = Field(0.25, description="um per px")


class PanNukeConfig(Settings):
    """PanNuke archives and how they are split."""

    protocol: Literal["celldetr", "official"] = Field("celldetr", description="which folds train, validate and test")
    splits: tuple[Annotated[int, Field(ge=1, le=3)], ...] = Field((1, 2, 3), min_length=1)
    train_share: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.8, description="share of the two other folds that trains (celldetr protocol)"
    )
    fold1: Source
    fold2: Source
    fold3: Source

    def fold(self, number: int) -> Source:
        """Archive of fold 1, 2 or 3."""
        source: Source = getattr(self, f"fold{number}")
        return source


class ExperimentConfig(Settings):
    """A named training run, or use of one: what differs from the shared settings."""

    title: str = Field(description="name in tables and figures")
    stage: Literal["supervised", "st", "ssl", "zero_shot"] = Field(
        "supervised",
        description="supervised: on PanNuke; st: on the cell types of Xenium; ssl: contrastive pretraining on slides "
        "without labels; zero_shot: no training, the model of another experiment with its classes mapped to PanNuke's",
    )
    mode: Mode | None = Field(None, description="how boxes reach the representation decoder; of every trained model")
    initial: str = Field(
        "imagenet",
        description="none, imagenet (backbone), the name of an experiment, or a model file (.pt), e.g. an imported one",
    )
    model: partial(ModelConfig) = Field(default_factory=partial(ModelConfig))  # type: ignore[valid-type]
    training: partial(TrainingConfig) = Field(default_factory=partial(TrainingConfig))  # type: ignore[valid-type]

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


class TableConfig(Settings):
    """A table: measured rows and the published ones beside them."""

    experiments: tuple[str, ...] = Field(min_length=1)
    ours: tuple[str, ...] = Field((), description="experiments beyond the paper, in rows that say so")
    published: str = Field(description="file with the published rows, from the root of the workflow")
    frozen_features: tuple[str, ...] = Field(
        (), description="experiments whose frozen embeddings are evaluated, in rows of their own"
    )

    @property
    def systems(self) -> tuple[str, ...]:
        """Experiments of the measured rows, in their order."""
        return self.experiments + self.ours


class Figure3Config(Settings):
    """Attention of a few test nuclei."""

    experiments: tuple[str, ...] = Field(min_length=1)
    split: Annotated[int, Field(ge=1, le=3)] = 1
    nuclei: Count = Field(4, description="nuclei drawn")


class Figure4Config(Settings):
    """Similarity of noised boxes to the nuclei of their patch."""

    patches: Count = Field(4, description="patches drawn")


class OverlayConfig(Settings):
    """Pictures of predictions beside the truth."""

    patches: Count = Field(12, description="test patches drawn per experiment and split")


class ExampleSample(Settings):
    """A synthetic Xenium sample, and how wrong its alignment file is."""

    version: str = Field(description="of Xenium Onboard Analysis, e.g. 3.0.0")
    size_um: tuple[Positive, Positive] = Field(description="width and height of the tissue")
    rotation: float = Field(description="of the Xenium frame against the H&E image, degrees")
    alignment: Literal["matrix", "keypoints"] = Field("matrix", description="kind of the alignment file")
    wrong_shift: Annotated[float, Field(ge=0)] = Field(0.0, description="error of the file, um along x and y")
    wrong_rotation: float = Field(0.0, description="error of the file, degrees")


class ExampleConfig(Settings):
    """Synthetic raw data in the original formats."""

    images: tuple[Count, Count, Count] = Field(description="images of the three folds")
    xenium: dict[Name, ExampleSample] = Field(default_factory=dict, description="Xenium samples by name")
    slides: dict[Name, tuple[Positive, Positive]] = Field(
        default_factory=dict, description="slides: name -> width and height of the tissue, um"
    )
    reference_cells: Count = Field(3000, description="cells of the scRNA-seq reference")
    seed: Annotated[int, Field(ge=0)] = 0


class Config(Settings):
    """A whole configuration file."""

    seed: Annotated[int, Field(ge=0)] = Field(42, description="of splits, training and bootstrap")
    patch: PatchConfig = PatchConfig()
    pannuke: PanNukeConfig
    imagenet: Source
    xenium: XeniumSettings | None = None
    slides: SlideSettings | None = None
    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()
    inference: InferenceSettings = InferenceSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    experiments: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")], ExperimentConfig] = Field(min_length=1)
    tables: dict[Annotated[str, Field(pattern=r"^table[0-9]+$")], TableConfig] = Field(default_factory=dict)
    figure3: Figure3Config | None = None
    frozen_features: FrozenFeatureSettings = FrozenFeatureSettings()
    figure4: Figure4Config = Figure4Config()
    overlays: OverlayConfig = OverlayConfig()
    example: ExampleConfig | None = Field(None, description="makes the archives instead of downloading them")

    @model_validator(mode="after")
    def _known(self) -> Self:
        named = {f"tables.{name}.experiments": table.experiments for name, table in self.tables.items()}
        named |= {f"tables.{name}.ours": table.ours for name, table in self.tables.items()}
        for name, table in self.tables.items():
            if twice := set(table.experiments) & set(table.ours):
                raise ValueError(f"tables.{name}.ours: got {sorted(twice)}, which are in experiments too")
        if self.figure3 is not None:
            named["figure3.experiments"] = self.figure3.experiments
        frozen = {f"tables.{name}.frozen_features": table.frozen_features for name, table in self.tables.items()}
        for key, names in (named | frozen).items():
            unknown = [name for name in names if name not in self.experiments]
            if unknown:
                raise ValueError(f"{key}: got {unknown}, expected names of experiments: {sorted(self.experiments)}")
            elsewhere = [name for name in names if self.experiments[name].stage in ("st", "ssl")]
            if elsewhere and key in named:
                raise ValueError(f"{key}: got {elsewhere}, expected experiments that are tested on PanNuke")
            without = [name for name in names if self.experiments[name].mode == "baseline"]
            if without and key in frozen:
                raise ValueError(f"{key}: got {without}, expected experiments with a representation decoder")
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

    def _check_initial(self, name: str) -> None:
        """Refuse initial models that cannot be had, or that have seen the patches that the experiment is tested on."""
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

    def classes(self, name: str) -> tuple[str, ...]:
        """Classes of an experiment's patches; slides have none."""
        return {"st": ST_TYPES, "ssl": ()}.get(self.experiments[name].stage, PANNUKE_CLASSES)

    def splits(self, name: str) -> tuple[int, ...]:
        """Return the splits that an experiment is run on: those of PanNuke, or the one of Xenium or the slides."""
        return (1,) if self.experiments[name].stage in ("st", "ssl") else self.pannuke.splits

    def experiment(self, name: str) -> Experiment:
        """Shared settings with those of one experiment laid over them.

        Raises
        ------
        ConfigError
            The combination is not legal.
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
            weightless["representation"] = {"global_tokens": 0}
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
    """Only what a file says, none of the defaults."""
    values: dict[str, Any] = block.model_dump(mode="json", exclude_unset=True)
    return values


def schemas() -> dict[str, str]:
    """Texts of the JSON schemas of workflow/schemas by file name: the configuration, and a row of each sheet."""
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
