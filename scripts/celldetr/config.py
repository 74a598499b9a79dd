"""Settings: what may stand in a configuration, with types, ranges, units and defaults (those of the paper).

`Config` is a whole configuration file, `Experiment` what one training run is told. Both are frozen. The JSON
schema in workflow/schemas is written from these classes by `python -m celldetr.config FILE` (a test compares).
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, model_validator

from celldetr.classes import PANNUKE_CLASSES
from celldetr.errors import ConfigError
from celldetr.settings import Settings, merge, partial

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Range = Annotated[tuple[NotNegative, NotNegative], Field(description="smallest and largest value")]


class BackboneSettings(Settings):
    """Residual network that turns a patch into feature maps (paper default: ResNet-50)."""

    block: Literal["bottleneck", "basic"] = Field("bottleneck", description="kind of residual block")
    layers: tuple[Count, Count, Count, Count] = Field((3, 4, 6, 3), description="blocks in stages 1 to 4")
    width: Count = Field(64, description="channels of the first stage; doubled by each further stage")
    stages: tuple[Annotated[int, Field(ge=1, le=4)], ...] = Field(
        (1, 2, 3, 4),
        min_length=1,
        description="stages whose features are used; stage s has stride 2^(s+1) px",
    )
    extra_levels: Annotated[int, Field(ge=0, le=2)] = Field(
        0,
        description="levels by further 3x3 convolutions of stride 2 (COCO Deformable DETR: 1)",
    )
    norm: Literal["frozen_batch", "group"] = Field(
        "frozen_batch",
        description="frozen batch norm for pretrained weights, group norm to train from scratch",
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if list(self.stages) != sorted(set(self.stages)):
            raise ValueError(f"stages: got {list(self.stages)}, expected increasing stages")
        return self


class RepresentationSettings(Settings):
    """Representation decoder (paper, 3.2)."""

    layers: Count = Field(3, description="layers; the first has no self-attention")
    self_attention: Literal["after_first", "none"] = Field(
        "after_first",
        description="after_first: from layer 2 on; none: an embedding depends on its box and image alone",
    )
    offset_init: Literal["authors", "spread"] = Field(
        "authors", description="authors: saturated through tanh; spread: points at 1/8 to 7/8 of the half box"
    )
    global_tokens: Annotated[int, Field(ge=0)] = Field(
        0, description="full-image boxes appended as context tokens (parallel mode)"
    )


class ModelConfig(Settings):
    """Sizes and options of the model that all experiments share."""

    d_model: Count = Field(256, description="channels of tokens and cell embeddings")
    heads: Count = Field(8, description="attention heads; divides d_model")
    points: Count = Field(4, description="sampling points per head and level")
    ffn: Count = Field(1024, description="hidden channels of the feed-forward layers")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.1, description="dropout in the transformer")
    encoder_layers: Count = 6
    decoder_layers: Count = Field(3, description="layers of the detection decoder")
    queries: Annotated[int, Field(ge=1, le=32767)] = Field(900, description="most nuclei found in one patch")
    position_offset: Share = Field(
        0.0, description="o in the position code: 0 (CellDETR) or 0.5 (COCO Deformable DETR checkpoints)"
    )
    sampling: Literal["fast", "reference"] = Field("fast", description="form of the deformable sampling; same result")
    backbone: BackboneSettings = BackboneSettings()
    representation: RepresentationSettings = RepresentationSettings()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.d_model % self.heads:
            raise ValueError(f"d_model: got {self.d_model}, expected a multiple of heads ({self.heads})")
        if self.d_model % 4:
            raise ValueError(f"d_model: got {self.d_model}, expected a multiple of 4 (sine code of y and x)")
        return self


Mode = Literal["baseline", "sequential", "parallel"]


class ModelSettings(ModelConfig):
    """One model: sizes, how boxes reach the representation decoder (paper, A.1), and its classes."""

    mode: Mode = Field(description="baseline: no representation decoder; sequential: CellDETR-S; parallel: CellDETR-P")
    classes: tuple[str, ...] = Field(min_length=1, description="class names in the order of the logits")


class NoiseSettings(Settings):
    """Noise on boxes (paper, A.2)."""

    share: Share = Field(0.0, description="share of the boxes that get noise")
    low: Share = Field(0.1, description="smallest relative change")
    high: Share = Field(0.4, description="largest relative change")
    enlarge: Share = Field(0.5, description="rho: probability that a size grows")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"low: got {self.low}, expected at most high ({self.high})")
        return self


class LossSettings(Settings):
    """Weights of the losses; nucleus, l1 and giou are the costs of the matching as well."""

    nucleus: NotNegative = Field(2.0, description="focal loss of the detection decoder")
    l1: NotNegative = Field(5.0, description="L1 of normalised boxes")
    giou: NotNegative = Field(2.0, description="1 - generalised IoU")
    classes: NotNegative = Field(0.2, description="class loss of the representation decoder")
    class_scale: NotNegative = Field(8.0, description="scale of the class loss (sequential 8, parallel 16)")


class AugmentationSettings(Settings):
    """Augmentation of training patches: probabilities and ranges."""

    elastic: Share = 0.2
    flip: Share = Field(0.5, description="of each of the horizontal and the vertical flip")
    blur: Share = 0.2
    blur_kernel: Annotated[int, Field(ge=3, multiple_of=1)] = Field(9, description="px, odd")
    blur_sigma: Range = (0.2, 1.0)
    jitter: Share = Field(0.2, description="of the colour jitter")
    brightness: Share = 0.25
    contrast: Share = 0.1
    saturation: Share = 0.25
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.05
    hed: Share = Field(0.0, description="of the stain jitter in hematoxylin-eosin space")
    hed_alpha: Share = Field(0.05, description="stains are multiplied by 1 +- this")
    hed_beta: Share = Field(0.05, description="and shifted by +- this")

    @model_validator(mode="after")
    def _odd(self) -> Self:
        if self.blur_kernel % 2 == 0:
            raise ValueError(f"blur_kernel: got {self.blur_kernel}, expected an odd number")
        return self


class TrainingConfig(Settings):
    """Recipe of a training run."""

    epochs: Count = 100
    batch_size: Count = Field(16, description="patches per step over all devices")
    lr: Positive = 8e-5
    backbone_lr: NotNegative = 8e-6
    warmup_steps: Annotated[int, Field(ge=0)] = Field(600, description="linear from warmup_from to 1, then cosine to 0")
    warmup_from: Share = 0.1
    weight_decay: NotNegative = 1e-4
    gradient_clip: NotNegative = Field(0.1, description="largest norm of the gradient; 0 = no limit")
    select: Literal["best_val", "last"] = Field("best_val", description="which epoch's weights become the model")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 on GPUs that have it, else fp32")
    cache: Literal["gpu", "ram", "none"] = Field(
        "gpu",
        description="where the patches are kept; gpu falls back to ram when they do not fit, none streams",
    )
    workers: Annotated[int, Field(ge=0)] = Field(4, description="loader processes when cache is none")
    gpus: Count = Field(1, description="devices that share a batch")
    compile: bool = Field(False, description="torch.compile the deformable sampling (needs a compiler)")
    losses: LossSettings = LossSettings()
    augmentation: AugmentationSettings = AugmentationSettings()
    noise: NoiseSettings = NoiseSettings()

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        if self.batch_size % self.gpus:
            raise ValueError(f"batch_size: got {self.batch_size}, expected a multiple of gpus ({self.gpus})")
        return self


class TrainingSettings(TrainingConfig):
    """Recipe of one run with its seed."""

    seed: Annotated[int, Field(ge=0)] = 42


class Experiment(Settings):
    """What one training run is told."""

    name: str
    stage: Literal["supervised"] = "supervised"
    model: ModelSettings
    training: TrainingSettings = TrainingSettings()


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


class InferenceConfig(Settings):
    """How a trained model predicts."""

    nucleus_threshold: Share = Field(0.4, description="smallest nucleus score of a detection")
    batch_size: Count = Field(16, description="patches at once")


class EvaluationConfig(Settings):
    """How predictions are scored."""

    metric: Literal["strict", "hovernet_compat"] = Field(
        "strict", description="metric of the tables; both are in *_splits.tsv"
    )
    score: Literal["both_thresholds", "class", "product"] = "both_thresholds"
    class_threshold: Share = 0.4
    radius: Positive = Field(12.0, description="largest distance of a pair of centres, px")
    centres: Literal["box", "mask"] = Field("box", description="centres of the truth")
    resamples: Annotated[int, Field(ge=0)] = Field(1000, description="bootstrap resamples of the intervals")


class ExperimentConfig(Settings):
    """A named training run: what differs from the shared settings."""

    title: str = Field(description="name in tables and figures")
    stage: Literal["supervised"] = "supervised"
    mode: Mode
    initial: str = Field(
        "imagenet",
        description="none, imagenet (backbone), or a model file (.pt), e.g. an imported checkpoint",
    )
    model: partial(ModelConfig) = Field(default_factory=partial(ModelConfig))  # type: ignore[valid-type]
    training: partial(TrainingConfig) = Field(default_factory=partial(TrainingConfig))  # type: ignore[valid-type]


class TableConfig(Settings):
    """A table: measured rows and the published ones beside them."""

    experiments: tuple[str, ...] = Field(min_length=1)
    published: str = Field(description="file with the published rows, from the root of the workflow")


class Figure3Config(Settings):
    """Attention of a few test nuclei."""

    experiments: tuple[str, ...] = Field(min_length=1)
    split: Annotated[int, Field(ge=1, le=3)] = 1
    nuclei: Count = Field(4, description="nuclei drawn")


class OverlayConfig(Settings):
    """Pictures of predictions beside the truth."""

    patches: Count = Field(12, description="test patches drawn per experiment and split")


class ExampleConfig(Settings):
    """Synthetic raw data in the original formats."""

    images: tuple[Count, Count, Count] = Field(description="images of the three folds")
    seed: Annotated[int, Field(ge=0)] = 0


class Config(Settings):
    """A whole configuration file."""

    seed: Annotated[int, Field(ge=0)] = Field(42, description="of splits, training and bootstrap")
    patch: PatchConfig = PatchConfig()
    pannuke: PanNukeConfig
    imagenet: Source
    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()
    inference: InferenceConfig = InferenceConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    experiments: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")], ExperimentConfig] = Field(min_length=1)
    tables: dict[Annotated[str, Field(pattern=r"^table[0-9]+$")], TableConfig] = Field(default_factory=dict)
    figure3: Figure3Config | None = None
    overlays: OverlayConfig = OverlayConfig()
    example: ExampleConfig | None = Field(None, description="makes the archives instead of downloading them")

    @model_validator(mode="after")
    def _known(self) -> Self:
        named = {f"tables.{name}.experiments": table.experiments for name, table in self.tables.items()}
        if self.figure3 is not None:
            named["figure3.experiments"] = self.figure3.experiments
            if self.figure3.split not in self.pannuke.splits:
                raise ValueError(
                    f"figure3.split: got {self.figure3.split}, expected one of {list(self.pannuke.splits)}"
                )
        for key, names in named.items():
            unknown = [name for name in names if name not in self.experiments]
            if unknown:
                raise ValueError(f"{key}: got {unknown}, expected names of experiments: {sorted(self.experiments)}")
        for name in self.experiments:
            self.experiment(name)
        return self

    def experiment(self, name: str) -> Experiment:
        """Shared settings with those of one experiment laid over them.

        Raises
        ------
        ConfigError
            The combination is not legal.
        """
        block = self.experiments[name]
        where = f"experiments.{name}"
        model = merge(self.model.to_dict(), _given(block.model))
        training = merge(self.training.to_dict(), _given(block.training))
        if block.initial == "imagenet" and model["backbone"] | {"stages": 0, "extra_levels": 0} != (
            BackboneSettings(norm="frozen_batch").to_dict() | {"stages": 0, "extra_levels": 0}
        ):
            raise ConfigError(f"{where}.initial: got 'imagenet', expected 'none': these are weights of a ResNet-50")
        return Experiment(
            name=name,
            stage=block.stage,
            model=ModelSettings.from_dict({**model, "mode": block.mode, "classes": PANNUKE_CLASSES}, f"{where}.model"),
            training=TrainingSettings.from_dict({**training, "seed": self.seed}, f"{where}.training"),
        )


def _given(block: BaseModel) -> dict[str, Any]:
    """Only what a file says, none of the defaults."""
    values: dict[str, Any] = block.model_dump(mode="json", exclude_unset=True)
    return values


def json_schema() -> str:
    """Text of workflow/schemas/config.schema.json."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}
    return json.dumps(schema, indent=2) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json_schema(), encoding="utf-8")
