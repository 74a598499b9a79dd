"""The model: images in, nuclei with classes and embeddings out (paper, 3 and A.1)."""

import contextlib
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from celldetr.config.experiment import ModelSettings
from celldetr.model.backbone import Backbone
from celldetr.model.boxes import cxcywh_to_xyxy
from celldetr.model.constants import constant
from celldetr.model.deformable_attention import SamplingPoints
from celldetr.model.position import Shape, sine_code
from celldetr.model.representation import RepresentationDecoder
from celldetr.model.transformer import DetectionDecoder, Encoder, class_head, full_precision

IMAGE_MEAN = (0.70478431, 0.57330757, 0.74134993)
IMAGE_STD = (0.1786614, 0.22592805, 0.19027899)


class Features(NamedTuple):
    """What the encoder knows of a batch of images.

    Attributes
    ----------
    memory
        Encoded tokens (B, T, C), level after level, rows first.
    shapes
        Height and width of each level; T is the sum of their products.
    """

    memory: Tensor
    shapes: tuple[Shape, ...]


class Detections(NamedTuple):
    """What the detection decoder found, layer by layer; the last one counts.

    Attributes
    ----------
    logits
        (L, B, Q, 1) "is a nucleus", or (L, B, Q, K) classes in mode ``baseline``.
    boxes
        (L, B, Q, 4), cxcywh in [0, 1].
    """

    logits: Tensor
    boxes: Tensor


class ImagePredictions(NamedTuple):
    """The D nuclei found in one image, in the order of their queries.

    Attributes
    ----------
    query
        Query that found it (D,) int64.
    boxes
        (D, 4) float, xyxy px; a box may reach beyond the image.
    nucleus_score
        (D,) in [0, 1]; the highest class score in mode ``baseline``.
    class_scores
        (D, K) in [0, 1].
    embeddings
        (D, C), none in mode ``baseline``.
    """

    query: Tensor
    boxes: Tensor
    nucleus_score: Tensor
    class_scores: Tensor
    embeddings: Tensor | None


class InputProjection(nn.Module):
    """Feature maps of the backbone and of further strided convolutions, all with the channels of the model."""

    def __init__(self, settings: ModelSettings, inputs: list[int]) -> None:
        super().__init__()
        channels, self.extra = settings.d_model, settings.backbone.extra_levels
        sources = [*inputs, inputs[-1], *[channels] * (self.extra - 1)][: len(inputs) + self.extra]
        self.levels = nn.ModuleList()
        for index, source in enumerate(sources):
            extra = index >= len(inputs)
            layer = nn.Conv2d(source, channels, 3, 2, 1) if extra else nn.Conv2d(source, channels, 1)
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
            self.levels.append(nn.Sequential(layer, nn.GroupNorm(math.gcd(32, channels), channels)))

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Project maps (B, c, h, w) to (B, C, h, w); a further level halves the map before it."""
        projected = [level(x) for level, x in zip(self.levels, maps, strict=False)]
        x = maps[-1]
        for level in list(self.levels)[len(maps) :]:
            x = level(x)
            projected.append(x)
        return projected


class CellDETR(nn.Module):
    """Deformable DETR with a representation decoder.

    Parameters
    ----------
    settings
        Sizes and options, the mode, and the classes. Heads exist for what they are used for: a class head where there
        are classes, a projection head where it has a width.
    """

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.settings = settings
        self.baseline = settings.mode == "baseline"
        classes = len(settings.classes)
        self.register_buffer("image_mean", torch.tensor(IMAGE_MEAN).view(3, 1, 1))
        self.register_buffer("image_std", torch.tensor(IMAGE_STD).view(3, 1, 1))
        self.image_mean: Tensor
        self.image_std: Tensor
        self.backbone = Backbone(settings.backbone)
        self.input_projection = InputProjection(settings, self.backbone.channels)
        levels = len(self.input_projection.levels)
        self.level_embed = nn.Parameter(torch.randn(levels, settings.d_model))
        self.encoder = Encoder(settings, levels)
        self.decoder = DetectionDecoder(settings, levels, classes if self.baseline else 1)
        if not self.baseline:
            self.representation = RepresentationDecoder(settings, levels)
        if not self.baseline and classes:
            self.class_head = class_head(settings.d_model, classes)
        if settings.projection:
            self.projection = projection_head(settings.d_model, settings.projection)
        self.layout = torch.channels_last if settings.fast else torch.contiguous_format
        for part in (self.backbone, self.input_projection):  # convolutions, which are faster so
            part.to(memory_format=self.layout)  # type: ignore[call-overload]

    def encode(self, images: Tensor) -> Features:
        """Encode images (B, 3, h, w), RGB in [0, 1]."""
        tokens, position, shapes = self.tokens(images)
        memory = self.encoder(tokens, position, shapes)
        kind = memory.device.type
        if torch.is_autocast_enabled(kind):  # once, instead of in each layer of the decoders
            memory = memory.to(torch.get_autocast_dtype(kind))
        return Features(memory, shapes)

    def tokens(self, images: Tensor) -> tuple[Tensor, Tensor, tuple[Shape, ...]]:
        """Tokens (B, T, C) before the encoder, their position code (T, C), and the shapes of the levels."""
        normed = ((images - self.image_mean) / self.image_std).contiguous(memory_format=self.layout)
        maps = self.input_projection(self.backbone(normed))
        shapes = tuple((int(x.shape[-2]), int(x.shape[-1])) for x in maps)
        kind, channels, offset = self.level_embed.dtype, self.settings.d_model, self.settings.position_offset
        codes = [sine_code(shape, channels, offset, images.device).to(kind) for shape in shapes]
        position = torch.cat([code + level for code, level in zip(codes, self.level_embed, strict=True)])
        tokens = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], dim=1).to(kind)
        return tokens, position, shapes

    def detect(self, features: Features) -> Detections:
        """Find nuclei; every layer's result is returned, for auxiliary losses."""
        logits, boxes, _ = self.decoder(*features)
        return Detections(logits, boxes)

    def represent(
        self,
        features: Features,
        boxes: Tensor,
        valid: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        positions: bool = True,
    ) -> Tensor:
        """Embed the nuclei in given boxes; not in mode ``baseline``.

        Parameters
        ----------
        features
            From `encode`.
        boxes
            (B, R, 4), cxcywh in [0, 1]; R = 0 is legal. They are detached.
        valid
            (B, R), False at padding, which has no influence; none: all are nuclei.
        mask, positions
            Who attends to whom and whether by location: see `RepresentationDecoder.forward`.

        Returns
        -------
        Tensor
            (B, R, C), zero at padding.
        """
        embeddings, _ = self.representation(
            features.memory, features.shapes, boxes, valid, mask=mask, positions=positions
        )
        return embeddings

    def classify(self, embeddings: Tensor) -> Tensor:
        """Turn embeddings (..., C) into class logits (..., K), K = 0 without classes; not in mode ``baseline``."""
        if not self.settings.classes:
            return embeddings.new_zeros((*embeddings.shape[:-1], 0))
        with full_precision(embeddings):
            logits: Tensor = self.class_head(embeddings.to(self.class_head.weight.dtype))
        return logits

    def project(self, embeddings: Tensor) -> Tensor:
        """Turn embeddings (..., C) into what contrastive pretraining compares (..., P); with a projection head only."""
        with full_precision(embeddings):
            projected: Tensor = self.projection(embeddings.to(self.level_embed.dtype))
        return projected

    def predict(self, images: Tensor, nucleus_threshold: float) -> list[ImagePredictions]:
        """Find nuclei with a score of at least the threshold, with dropout and gradients off.

        Parameters
        ----------
        images
            (B, 3, h, w), RGB in [0, 1].
        nucleus_threshold
            In [0, 1].
        """
        return [found for found, _ in self.attention(images, nucleus_threshold)]

    def attention(self, images: Tensor, nucleus_threshold: float) -> list[tuple[ImagePredictions, SamplingPoints]]:
        """Predict, and tell where the last decoder layer looked for each nucleus.

        Returns
        -------
        list of (ImagePredictions, SamplingPoints)
            For each image, D nuclei and their points: locations (D, H, L, P, 2), weights (D, H, L, P). The points are
            those of the representation decoder, in mode ``baseline`` of the detection decoder.
        """
        with torch.no_grad(), _evaluating(self):
            features = self.encode(images)
            logits, boxes, points = self.decoder(*features)
            scores = logits[-1].sigmoid()
            keep = scores.amax(dim=-1) >= nucleus_threshold
            kept = [image.nonzero().squeeze(1) for image in keep]
            size = constant((images.shape[-1], images.shape[-2]) * 2, boxes.device, boxes.dtype)
            found = [
                (query, cxcywh_to_xyxy(box[query]) * size, score[query].amax(dim=-1), score[query])
                for query, box, score in zip(kept, boxes[-1], scores, strict=True)
            ]
            if self.baseline:
                return [
                    (
                        ImagePredictions(*item, None),
                        SamplingPoints(points.locations[image, item[0]], points.weights[image, item[0]]),
                    )
                    for image, item in enumerate(found)
                ]
            represented = self._represent_kept(features, boxes[-1], kept)
            return [
                (ImagePredictions(*item[:3], self.classify(embeddings).sigmoid(), embeddings), points)
                for item, (embeddings, points) in zip(found, represented, strict=True)
            ]

    def _represent_kept(
        self, features: Features, boxes: Tensor, kept: list[Tensor]
    ) -> list[tuple[Tensor, SamplingPoints]]:
        """Embeddings (D, C) and points of the kept queries of each image.

        In mode ``sequential`` all queries are represented and see each other, as in training; in mode ``parallel`` only
        the kept ones, padded to the largest count.
        """
        valid, rows = None, kept
        if self.settings.mode == "parallel":
            largest = max((len(query) for query in kept), default=0)
            padded = torch.stack([nn.functional.pad(query, (0, largest - len(query))) for query in kept])
            boxes = boxes.gather(1, padded[..., None].expand(-1, -1, 4))
            counts = torch.tensor([len(query) for query in kept]).to(boxes.device, non_blocking=True)
            valid = torch.arange(largest, device=boxes.device) < counts[:, None]
            rows = [torch.arange(len(query), device=boxes.device) for query in kept]
        embeddings, points = self.representation(features.memory, features.shapes, boxes, valid)
        return [
            (embeddings[image, row], SamplingPoints(points.locations[image, row], points.weights[image, row]))
            for image, row in enumerate(rows)
        ]


def projection_head(channels: int, outputs: int) -> nn.Sequential:
    """Two linear layers with ReLU between, twice as wide inside (paper, 3.3)."""
    return nn.Sequential(nn.Linear(channels, 2 * channels), nn.ReLU(), nn.Linear(2 * channels, outputs))


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode inside the block, afterwards to what it was."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
