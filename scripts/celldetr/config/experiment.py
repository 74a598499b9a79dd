"""Settings of one training run: model, recipe and seed, with ranges, units and the defaults of the paper."""

from typing import Annotated, Any, Literal, Protocol, Self

from pydantic import Field, field_validator, model_validator

from celldetr.config.base import (
    PRECISION,
    BatchSize,
    Channels,
    NotNegative,
    NotNegativeInt,
    Positive,
    Precision,
    Seed,
    Settings,
    Share,
    SmallCount,
)
from celldetr.config.classes import column_name
from celldetr.runtime.errors import ConfigError

Kernel = Literal["auto", "reference"]


class BackboneSettings(Settings):
    """Residual network that turns a patch into feature maps (paper: ResNet-50)."""

    block: Literal["bottleneck", "basic"] = Field("bottleneck", description="kind of residual block")
    layers: tuple[SmallCount, SmallCount, SmallCount, SmallCount] = Field(
        (3, 4, 6, 3), description="blocks in stages 1 to 4"
    )
    width: Channels = Field(64, description="channels of the first stage; doubled by each further stage")
    stages: tuple[Annotated[int, Field(ge=1, le=4)], ...] = Field(
        (1, 2, 3, 4), min_length=1, description="stages whose features are used; stage s has stride 2^(s+1) px"
    )
    extra_levels: int = Field(
        0, ge=0, le=2, description="coarser levels from 3x3 convolutions of stride 2 (COCO Deformable DETR: 1)"
    )
    norm: Literal["frozen_batch", "group"] = Field(
        "frozen_batch", description="frozen_batch: for pretrained weights; group: to train from scratch"
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if list(self.stages) != sorted(set(self.stages)):
            raise ValueError(f"stages: got {list(self.stages)}, expected increasing stages")
        return self


class RepresentationSettings(Settings):
    """Representation decoder (paper, 3.2)."""

    layers: SmallCount = Field(3, description="number of layers; the first has no self-attention")
    self_attention: Literal["after_first", "none"] = Field(
        "after_first",
        description="after_first: from layer 2 on (published numbers); none: each embedding depends on its box and "
        "image alone (text of the paper)",
    )
    offset_init: Literal["authors", "spread"] = Field(
        "authors",
        description="start of the sampling points; authors: saturated tanh; spread: over 1/8 to 7/8 of the half box",
    )
    positions: bool = Field(
        True,
        description="self-attention sees the locations of nuclei; false in contrastive pretraining (paper, 3.3) and in "
        "all that uses its frozen decoder",
    )
    global_tokens: int = Field(
        0,
        ge=0,
        le=1000,
        description="context tokens: boxes of the whole image (mode parallel); without positions, nuclei do not attend "
        "to them",
    )


class SharedModelSettings(Settings):
    """Sizes and options of the model that all experiments share."""

    d_model: Channels = Field(256, description="channels of tokens and cell embeddings")
    heads: SmallCount = Field(8, description="attention heads; divides d_model")
    points: SmallCount = Field(4, description="sampling points per head and level")
    ffn: Channels = Field(1024, description="hidden channels of the feed-forward layers")
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout in the transformer")
    encoder_layers: SmallCount = Field(6, description="layers of the encoder")
    decoder_layers: SmallCount = Field(3, description="layers of the detection decoder")
    queries: int = Field(
        900, ge=1, le=32767, description="queries of the detection decoder: most nuclei found in a patch"
    )
    position_offset: Share = Field(
        0.0, description="offset in the position code; 0.5 for COCO Deformable DETR checkpoints"
    )
    kernel: Kernel = Field(
        "auto",
        description="deformable sampling; auto: the fastest form for the device, with channels-last convolutions; "
        "reference: plain grid_sample, same result, slower",
    )
    projection: int = Field(
        0, ge=0, le=16_384, description="outputs of the projection head (stage ssl; paper: 128); 0: no head"
    )
    backbone: BackboneSettings = Field(BackboneSettings(), description="residual network")
    representation: RepresentationSettings = Field(RepresentationSettings(), description="representation decoder")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.d_model % self.heads:
            raise ValueError(f"d_model: got {self.d_model}, expected a multiple of heads ({self.heads})")
        if self.d_model % 4:
            raise ValueError(f"d_model: got {self.d_model}, expected a multiple of 4 (sine code of y and x)")
        return self


Mode = Literal["baseline", "sequential", "parallel"]


class ModelSettings(SharedModelSettings):
    """One model: sizes, how boxes reach the representation decoder (paper, A.1), and its classes."""

    mode: Mode = Field(description="baseline: no representation decoder; sequential: CellDETR-S; parallel: CellDETR-P")
    classes: tuple[str, ...] = Field(description="class names in the order of the logits; none: no class head")

    @field_validator("classes")
    @classmethod
    def _columns_of_their_own(cls, classes: tuple[str, ...]) -> tuple[str, ...]:
        columns = [column_name(name).lower() for name in classes]  # SpatialData takes T and t for the same
        if same := [name for name, column in zip(classes, columns, strict=True) if columns.count(column) > 1]:
            raise ValueError(
                f"got {same}, which would be the same column of a file of cells (case does not count, and signs become "
                "_); expected names that differ in letters or digits"
            )
        return classes

    @model_validator(mode="after")
    def _heads(self) -> Self:
        if self.mode == "baseline" and (self.projection or not self.classes):
            raise ValueError(
                f"mode: got baseline with {len(self.classes)} classes and projection {self.projection}, expected "
                "classes and projection 0: without a representation decoder its detection decoder classifies"
            )
        return self


class NoiseSettings(Settings):
    """Noise on boxes (paper, A.2)."""

    share: Share = Field(
        0.0, description="share of boxes with noise (mode parallel); in contrastive pretraining all anchors have noise"
    )
    low: Share = Field(0.1, description="smallest relative change of a box")
    high: float = Field(0.4, ge=0, lt=1, description="largest relative change of a box")
    enlarge: Share = Field(0.5, description="probability that a side grows rather than shrinks (rho)")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"low: got {self.low}, expected at most high ({self.high})")
        return self


class MatchingSettings(Settings):
    """Costs of the one-to-one matching of queries and nuclei (paper, 3.1), the same in every stage."""

    nucleus: NotNegative = Field(2.0, description="focal classification cost")
    l1: NotNegative = Field(5.0, description="L1 distance of normalised boxes")
    giou: NotNegative = Field(2.0, description="negated generalised IoU")

    @model_validator(mode="after")
    def _any(self) -> Self:
        if not any(self.to_dict().values()):
            raise ValueError("got 0 for all costs, expected at least one above 0")
        return self


class LossSettings(Settings):
    """Weights of the losses."""

    nucleus: NotNegative = Field(2.0, description="focal loss of the detection decoder")
    l1: NotNegative = Field(5.0, description="L1 of normalised boxes")
    giou: NotNegative = Field(2.0, description="1 - generalised IoU")
    classes: NotNegative = Field(1.6, description="class loss (paper: sequential 1.6, parallel 3.2)")
    class_balance: Share = Field(
        0.0, description="exponent of the inverse class frequency in the class loss; 0: every nucleus weighs the same"
    )


class AugmentationSettings(Settings):
    """Augmentation of training patches: probabilities and ranges."""

    elastic: Share = Field(0.2, description="probability of an elastic deformation")
    flip: Share = Field(0.5, description="probability of a horizontal and of a vertical flip, each")
    blur: Share = Field(0.2, description="probability of a Gaussian blur")
    blur_kernel: int = Field(9, ge=3, le=31, description="side of the blur kernel, px, odd")
    blur_sigma: tuple[Positive, Positive] = Field((0.2, 1.0), description="smallest and largest sigma of the blur, px")
    jitter: Share = Field(0.2, description="probability of a colour jitter")
    brightness: Share = Field(0.25, description="largest relative change of brightness")
    contrast: Share = Field(0.1, description="largest relative change of contrast")
    saturation: Share = Field(0.25, description="largest relative change of saturation")
    hue: float = Field(0.05, ge=0, le=0.5, description="largest change of hue, turns")
    hed: Share = Field(0.0, description="probability of a stain jitter in hematoxylin-eosin-DAB space")
    hed_alpha: Share = Field(0.05, description="stains are multiplied by 1 +- hed_alpha")
    hed_beta: Share = Field(0.05, description="stains are shifted by +- hed_beta")

    @model_validator(mode="after")
    def _blur(self) -> Self:
        if self.blur_kernel % 2 == 0:
            raise ValueError(f"blur_kernel: got {self.blur_kernel}, expected an odd number")
        if self.blur_sigma[0] > self.blur_sigma[1]:
            raise ValueError(f"blur_sigma: got {list(self.blur_sigma)}, expected the smaller one first")
        return self


class ContrastiveSettings(Settings):
    """Loss of contrastive pretraining (paper, 3.3)."""

    temperature: float = Field(0.1, ge=0.001, description="divides the cosine similarities")
    negatives: Literal["image", "batch"] = Field(
        "image", description="negatives of an anchor: nuclei of its image (paper), or of all images of a step"
    )
    weight: NotNegative = Field(1.0, description="weight of the contrastive loss")


class SharedTrainingSettings(Settings):
    """Recipe of a training run."""

    epochs: int = Field(100, ge=1, le=100_000, description="epochs")
    batch_size: BatchSize = Field(16, description="patches per step, over all GPUs")
    lr: Positive = Field(8e-5, description="learning rate")
    backbone_lr: NotNegative = Field(8e-6, description="learning rate of the backbone")
    warmup_steps: NotNegativeInt = Field(600, description="steps of linear warm-up; then cosine to 0")
    warmup_from: Share = Field(0.1, description="share of the learning rate at the first step")
    weight_decay: NotNegative = Field(1e-4, description="weight decay of AdamW")
    gradient_clip: NotNegative = Field(0.1, description="largest norm of the gradient; 0: no limit")
    select: Literal["best_val", "last"] = Field(
        "best_val", description="epoch whose weights become the model: best validation score, or last"
    )
    precision: Precision = Field("auto", description=PRECISION)
    cache: Literal["gpu", "ram", "none"] = Field(
        "gpu",
        description="where the patches are kept; gpu: or ram if they do not fit; none: read from disk in each epoch",
    )
    workers: int = Field(4, ge=0, le=1000, description="loader processes with cache: none")
    gpus: int = Field(1, ge=1, le=1000, description="GPUs of one training run, which share a batch")
    compile: Literal["auto"] | bool = Field(
        "auto",
        description="torch.compile of the training step, with CUDA graphs on a GPU; it takes minutes before the first "
        "step; auto: on GPUs with a C compiler, for 5,000 steps or more",
    )
    activation_checkpointing: bool = Field(
        False, description="compute layers again in the backward pass: a fifth of the memory, slower, same result"
    )
    probe: Literal["none", "head", "representation"] = Field(
        "none",
        description="what trains; none: everything; head: the class head (linear probe); representation: the class "
        "head and the representation decoder",
    )
    matching: MatchingSettings = Field(MatchingSettings(), description="costs of the matching")
    losses: LossSettings = Field(LossSettings(), description="weights of the losses")
    augmentation: AugmentationSettings = Field(AugmentationSettings(), description="augmentation of patches")
    noise: NoiseSettings = Field(NoiseSettings(), description="noise on boxes")
    contrastive: ContrastiveSettings = Field(ContrastiveSettings(), description="contrastive loss (stage ssl)")

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        if self.batch_size % self.gpus:
            raise ValueError(f"batch_size: got {self.batch_size}, expected a multiple of gpus ({self.gpus})")
        return self


class TrainingSettings(SharedTrainingSettings):
    """Recipe of one run with its seed."""

    seed: Seed = 42


TrainedStage = Literal["supervised", "st", "ssl"]


class NetworkSettings(Protocol):
    """What a model file is built from, whatever it holds."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the labels."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-like values."""


class TrainedExperiment(Protocol):
    """What the training loop reads of an experiment, whatever it trains."""

    @property
    def name(self) -> str:
        """Name of the run."""

    @property
    def stage(self) -> str:
        """What is trained."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the labels."""

    @property
    def training(self) -> TrainingSettings:
        """Recipe."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-like values."""


class Experiment(Settings):
    """Everything that defines one training run of CellDETR."""

    name: str
    stage: TrainedStage = "supervised"
    model: ModelSettings
    training: TrainingSettings = TrainingSettings()

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the labels."""
        return self.model.classes

    @model_validator(mode="after")
    def _stage_fits(self) -> Self:
        """Refuse parts of a model that the stage would never train, or lacks."""
        model, probe, where = self.model, self.training.probe, f"experiments.{self.name}"
        if self.stage == "ssl":
            wrong = {
                "model.mode": (model.mode, "parallel", model.mode == "parallel"),
                "model.projection": (model.projection, "at least 1 (paper: 128)", model.projection > 0),
                "model.classes": (list(model.classes), "none, nothing is labelled", not model.classes),
                "model.representation.positions": (
                    model.representation.positions,
                    "false (paper, 3.3)",
                    not model.representation.positions,
                ),
                "training.probe": (probe, "none, there is no class head", probe == "none"),
            }
        else:
            wrong = {
                "model.projection": (model.projection, "0, only stage ssl trains this head", not model.projection),
                "model.classes": (list(model.classes), "at least one", bool(model.classes)),
                "training.probe": (probe, "none in mode baseline", probe == "none" or model.mode != "baseline"),
            }
        lines = [f"{where}.{key}: got {got!r}, expected {want}" for key, (got, want, good) in wrong.items() if not good]
        if lines:
            raise ConfigError("\n".join(lines))
        return self
