"""The whole configuration: every block with its types, ranges, units and the defaults of the paper.

The settings of one training run are in `celldetr.config.experiment`. `python -m celldetr.config.workflow FOLDER` writes
the JSON schemas of workflow/schemas; a test compares them.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, Field, model_validator

from celldetr.config.base import Seed, Settings, merge
from celldetr.config.blocks import (
    ExampleSettings,
    ExperimentSettings,
    Figure3Settings,
    Figure4Settings,
    OverlaySettings,
    PatchSizeSettings,
    TableSettings,
)
from celldetr.config.cells import CellSettings
from celldetr.config.classes import PANNUKE_CLASSES, ST_TYPES
from celldetr.config.evaluation import EvaluationSettings, FrozenFeatureSettings, InferenceSettings, ScoringSettings
from celldetr.config.experiment import (
    BackboneSettings,
    Experiment,
    ModelSettings,
    SharedModelSettings,
    SharedTrainingSettings,
    TrainingSettings,
)
from celldetr.config.pannuke import FOLDS, PanNukeSettings, SourceSettings, fold_parts
from celldetr.config.segmentation import SegmentationExperiment
from celldetr.config.sheets import CellRow, ReferenceRow, SlideRow, XeniumRow
from celldetr.config.slides import SlideSettings
from celldetr.config.sthelar import SthelarRow
from celldetr.config.xenium import XeniumSettings
from celldetr.runtime.errors import ConfigError


def _not_a_word(name: str) -> str:
    if name in ("none", "imagenet"):
        raise ValueError(f"got {name!r}, which is a value of `initial`; expected another name")
    return name


_OF_CELLDETR = ("matching", "losses", "noise", "contrastive", "probe", "compile", "activation_checkpointing")
"""Keys of `training` that stage segmentation does not read."""
ExperimentName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=100), AfterValidator(_not_a_word)]


class Config(Settings):
    """The whole configuration."""

    base: Literal["paper", "none"] = Field(
        "paper",
        description="paper: this file is laid over config/config.yaml; none: this file stands alone, and a key that it "
        "leaves out takes its default",
    )
    seed: Seed = Field(42, description="seed of splits, training and bootstrap")
    patch: PatchSizeSettings = Field(PatchSizeSettings(), description="size of the patches")
    pannuke: PanNukeSettings = Field(description="PanNuke archives and splits")
    imagenet: SourceSettings = Field(description="ResNet-50 weights of torchvision, for `initial: imagenet`")
    weights: dict[ExperimentName, SourceSettings] = Field(
        default_factory=dict, description="published weights by name, for `initial` of stage segmentation"
    )
    xenium: XeniumSettings | None = Field(None, description="Xenium samples; null: none")
    slides: SlideSettings | None = Field(None, description="whole slides for pretraining; null: none")
    cells: CellSettings | None = Field(
        None, description="cells of slides with types and embeddings, for other tools; null: none"
    )
    model: SharedModelSettings = Field(SharedModelSettings(), description="the model that experiments share")
    training: SharedTrainingSettings = Field(SharedTrainingSettings(), description="the recipe that experiments share")
    inference: InferenceSettings = Field(InferenceSettings(), description="how models predict")
    evaluation: EvaluationSettings = Field(EvaluationSettings(), description="how predictions are scored")
    experiments: dict[ExperimentName, ExperimentSettings] = Field(min_length=1, description="training runs by name")
    tables: dict[Annotated[str, Field(pattern=r"^table[0-9]{1,3}$")], TableSettings] = Field(
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
        for name in self.experiments:
            self._check_initial(name)
            self._check_data(name)
            if self.experiments[name].stage != "zero_shot":
                self.experiment(name)
        self._check_names()
        if taken := sorted(set(self.weights) & {*self.experiments, "resnet50"}):
            raise ValueError(f"weights: got {taken}, names of experiments or of `imagenet`; expected others")
        if self.figure3 is not None and self.figure3.split not in self.pannuke.splits:
            raise ValueError(f"figure3.split: got {self.figure3.split}, expected one of {list(self.pannuke.splits)}")
        half = self.patch.size * self.patch.mpp / 2
        margins = {} if self.slides is None else {"slides.detection": self.slides.detection.margin_um}
        margins |= {} if self.cells is None else {"cells": self.cells.margin_um}
        for where, margin in margins.items():
            if margin > half - self.patch.mpp:
                raise ValueError(
                    f"{where}.margin_um: got {margin}, expected less than half the side of a patch ({half:g} um)"
                )
        no_samples = self.xenium is None or self.xenium.samples is None
        if self.cells is not None and self.cells.sheet is None and self.slides is None and no_samples:
            raise ValueError("cells.sheet: got null, but there are no slides and no Xenium samples; expected a sheet")
        for fold in FOLDS if self.example is not None else ():
            if all("://" in url for url in self.pannuke.fold(fold).urls):
                raise ValueError(f"pannuke.fold{fold}.urls: got URLs, expected a path to which the example writes")
        self._check_seen()
        return self

    def _check_names(self) -> None:
        """Refuse tables, figures, detection and cells with experiments that do not exist or cannot do it."""
        stages = {name: block.stage for name, block in self.experiments.items()}
        tested = {name for name, stage in stages.items() if stage in ("supervised", "zero_shot")}
        supervised = {name for name in tested if stages[name] == "supervised"}
        segments = {name for name, stage in stages.items() if stage == "segmentation"}
        embeds = {name for name, block in self.experiments.items() if block.mode in ("sequential", "parallel")}
        uses: list[tuple[str, tuple[str, ...], set[str], str]] = []
        for name, table in self.tables.items():
            if twice := set(table.experiments) & set(table.ours):
                raise ValueError(f"tables.{name}.ours: got {sorted(twice)}, which are in experiments too")
            uses.append((f"tables.{name}.others", table.others, segments, "of stage segmentation"))
            for key in ("experiments", "ours"):
                uses.append((f"tables.{name}.{key}", getattr(table, key), tested, "that are tested on PanNuke"))
            uses.append(
                (f"tables.{name}.frozen_features", table.frozen_features, embeds, "with a representation decoder")
            )
        if self.figure3 is not None:
            uses.append(("figure3.experiments", self.figure3.experiments, supervised, "trained on PanNuke's classes"))
        if self.slides is not None and not self.slides.detection.model.endswith(".pt"):
            free = {name for name in stages if all(stages[each] != "ssl" for each in self._line(name))} - segments
            uses.append(
                ("slides.detection.model", (self.slides.detection.model,), free, "that need no patches of these slides")
            )
        if self.cells is not None and not self.cells.model.endswith(".pt"):
            typed = {name for name in embeds if self.classes(name)}
            uses.append(("cells.model", (self.cells.model,), typed, "with classes and a representation decoder"))
        for key, names, fit, expected in uses:
            if unknown := [name for name in names if name not in stages]:
                raise ValueError(f"{key}: got {unknown}, expected names of experiments: {sorted(stages)}")
            if wrong := [name for name in names if name not in fit]:
                raise ValueError(f"{key}: got {wrong}, expected experiments {expected}")
        if self.cells is not None and self.cells.model in stages:
            splits = self.splits(self.cells.model)
            if self.cells.split not in splits:
                raise ValueError(
                    f"cells.split: got {self.cells.split}, expected one of {list(splits)}, the splits of experiment "
                    f"{self.cells.model}"
                )

    def _line(self, name: str) -> list[str]:
        """Return an experiment, the one that it starts from, and so on."""
        line = [name]
        while (initial := self.experiments[line[-1]].initial) in self.experiments:
            if initial in line:
                raise ValueError(f"experiments.{name}.initial: got {' <- '.join([*line, initial])}, expected no circle")
            line.append(initial)
        return line

    def _check_initial(self, name: str) -> None:
        """Refuse initial models that do not exist, train nothing, or cannot do what this experiment needs."""
        where, block = f"experiments.{name}.initial", self.experiments[name]
        line = self._line(name)
        stages = [self.experiments[initial].stage for initial in line[1:]]
        for stage, why in (("zero_shot", "trains no model"), ("segmentation", "trains another system")):
            if stage in stages:
                got = line[1 + stages.index(stage)]
                raise ValueError(f"{where}: got {got!r}, which {why}; expected an experiment that trains CellDETR")
        if block.segmentation is not None:
            fit = block.segmentation.starts(self.weights)
            if block.initial not in fit:
                raise ValueError(
                    f"{where}: got {block.initial!r}, expected one of {fit} for {block.segmentation.system} of size "
                    f"{block.segmentation.size}"
                )
            return
        last = self.experiments[line[-1]].initial
        if last not in ("none", "imagenet") and Path(last).suffix != ".pt":
            raise ValueError(
                f"{where}: got {last!r}, expected none, imagenet, a file name ending in .pt, or one of the "
                f"experiments {sorted(self.experiments)}"
            )
        if block.stage == "zero_shot" and stages[:1] == ["ssl"]:
            raise ValueError(f"{where}: got {line[1]!r}, whose model has no classes; expected one of stage st")

    def _check_data(self, name: str) -> None:
        """Refuse an experiment without the patches that it needs."""
        block = self.experiments[name]
        for stage, source in (("st", "xenium"), ("ssl", "slides")):
            if block.stage == stage and getattr(self, source) is None:
                raise ValueError(f"experiments.{name}.stage: got {stage!r}, but the block {source} is missing")
        unread = {
            "training.noise": block.stage != "ssl" and block.mode != "parallel",
            "training.contrastive": block.stage != "ssl",
            "model.representation.global_tokens": block.mode != "parallel",
        }
        if block.segmentation is not None:
            unread = dict.fromkeys(("mode", "model", *(f"training.{key}" for key in _OF_CELLDETR)), True)
            unread |= {f"segmentation.{key}": True for key in block.segmentation.unread()}
        for key, nothing_reads_it in unread.items():
            if nothing_reads_it and _holds(_given(block), key):
                system = f"in mode {block.mode}" if block.segmentation is None else f"with {block.segmentation.system}"
                raise ValueError(
                    f"experiments.{name}.{key}: got a value, but stage {block.stage} {system} does not read it; leave "
                    "it out"
                )
        without = block.stage == "st" and self.xenium is not None and self.xenium.split.val == 0
        if without and self.experiment(name).training.select == "best_val":
            raise ValueError(f"xenium.split.val: got 0, expected more: experiment {name} has training.select: best_val")

    def _seen(self, name: str, split: int) -> dict[str, set[str]]:
        """Folds and declared groups that the model of an experiment, and each that it started from, has seen."""
        found = {}
        while name in self.experiments:
            block = self.experiments[name]
            split = split if split in self.splits(name) else self.splits(name)[0]
            if block.stage in ("supervised", "segmentation"):
                parts = fold_parts(split, self.pannuke.protocol)
                found[name] = {f"fold{fold}" for fold in (*parts["train"], *parts["val"])}
            if block.trained_on is not None:
                found[block.initial] = set(block.trained_on)
            name = block.initial
        return found

    def _check_seen(self) -> None:
        """Refuse to test on a fold of PanNuke that a model, or one that it started from, has seen."""
        frozen = {name for table in self.tables.values() for name in table.frozen_features}
        for name, block in self.experiments.items():
            tested = block.stage in ("supervised", "zero_shot", "segmentation") or name in frozen
            for split in self.pannuke.splits if tested else ():
                test = {f"fold{fold}" for fold in fold_parts(split, self.pannuke.protocol)["test"]}
                for model, seen in self._seen(name, split).items():
                    if test & seen:
                        raise ValueError(
                            f"experiments.{name}.initial: got {block.initial!r}, but split {split} tests on "
                            f"{', '.join(sorted(test))}, on which {model} was trained or validated; expected a model "
                            "that has not seen it"
                        )

    def check_groups(self, samples: Mapping[str, XeniumRow | SthelarRow], slides: Mapping[str, SlideRow]) -> None:
        """Refuse to test cell types on a donor whose slides pretrained the model.

        Raises
        ------
        ConfigError
            A sample and a slide have the same group, and an experiment of stage st starts from one of stage ssl.
        """
        shared = sorted({row.group for row in samples.values()} & {row.group for row in slides.values()})
        for name, block in self.experiments.items():
            pretrained = [each for each in self._line(name) if self.experiments[each].stage == "ssl"]
            if block.stage == "st" and pretrained and shared:
                raise ConfigError(
                    f"experiments.{name}.initial: got {block.initial!r}, but {pretrained[0]} trains on slides of "
                    f"groups {shared}, which are groups of Xenium samples, too, and may be tested; leave these slides "
                    "out of the sheet, or start from another model"
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

    def experiment(self, name: str) -> Experiment | SegmentationExperiment:
        """Lay the settings of one experiment over the shared ones.

        Raises
        ------
        ConfigError
            The combination is not valid.
        """
        block = self.experiments[name]
        assert block.stage != "zero_shot"
        where = f"experiments.{name}"
        given = {**merge(self.training.to_dict(), _given(block.training)), "seed": self.seed}
        if block.segmentation is not None:  # a change of what it does not read must not train it again
            given = {key: value for key, value in given.items() if key not in _OF_CELLDETR}
        training = TrainingSettings.from_dict(given, f"{where}.training")
        if block.segmentation is not None:
            block.segmentation.check_epochs(training.epochs, f"{where}.segmentation")
            return SegmentationExperiment(
                name=name, classes=self.classes(name), segmentation=block.segmentation, training=training
            )
        assert block.stage != "segmentation"
        model = merge(self.model.to_dict(), _given(block.model))
        if block.initial == "imagenet" and model["backbone"] | {"stages": 0, "extra_levels": 0} != (
            BackboneSettings(norm="frozen_batch").to_dict() | {"stages": 0, "extra_levels": 0}
        ):
            raise ConfigError(f"{where}.initial: got 'imagenet', expected 'none': these are weights of a ResNet-50")
        if training.probe != "none":
            start = self.experiments.get(block.initial)
            if block.initial in ("none", "imagenet") or (start is not None and start.mode == "baseline"):
                raise ConfigError(
                    f"{where}.training.probe: got {training.probe!r} with initial {block.initial!r}, expected none, "
                    "or an initial model with a representation decoder: the rest of the model keeps its weights"
                )
        if block.initial in self.experiments:
            theirs = merge(self.model.to_dict(), _given(self.experiments[block.initial].model))
            weightless: dict[str, Any] = {"dropout": 0, "kernel": 0, "projection": 0}
            if training.probe != "head":  # a frozen decoder is used as it was trained
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
            training=training,
        )


def _holds(values: Any, key: str) -> bool:
    first, _, rest = key.partition(".")
    return isinstance(values, dict) and first in values and (not rest or _holds(values[first], rest))


def _given(block: BaseModel) -> dict[str, Any]:
    """Return the keys that a file gives, without defaults."""
    values: dict[str, Any] = block.model_dump(mode="json", exclude_unset=True)
    return values


def schemas() -> dict[str, str]:
    """Return the JSON schemas of workflow/schemas by file name: the configuration and a row of each sheet."""
    kinds: dict[str, type[Settings]] = {
        "config": Config,
        "xenium": XeniumRow,
        "sthelar": SthelarRow,
        "references": ReferenceRow,
        "slides": SlideRow,
        "cells": CellRow,
    }
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return {
        f"{name}.schema.json": json.dumps({**head, **kind.model_json_schema()}, indent=2) + "\n"
        for name, kind in kinds.items()
    }


if __name__ == "__main__":
    for name, text in schemas().items():
        Path(sys.argv[1], name).write_text(text, encoding="utf-8")
