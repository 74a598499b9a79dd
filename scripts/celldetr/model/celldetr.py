"""The model: images in, nuclei with classes and embeddings out (paper, 3 and A.1)."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from celldetr.config.experiment import ModelSettings
from celldetr.model.backbone import Backbone
from celldetr.model.boxes import cxcywh_to_xyxy
from celldetr.model.deformable_attention import SamplingPoints
from celldetr.model.device import cached_tensor, evaluating, full_precision
from celldetr.model.representation import RepresentationDecoder
from celldetr.model.sampling import Shapes
from celldetr.model.transformer import DetectionDecoder, Encoder, class_head, sine_code

IMAGE_MEAN = (0.70478431, 0.57330757, 0.74134993)
IMAGE_STD = (0.1786614, 0.22592805, 0.19027899)


def float_images(images: Tensor) -> Tensor:
    """Turn images (B, S, S, 3) uint8 into (B, 3, S, S) float32 in [0, 1], as the model takes them."""
    return images.permute(0, 3, 1, 2).float() / 255


class Features(NamedTuple):
    """Encoded tokens of a batch of images."""

    memory: Tensor
    """(B, T, C), level after level, rows first."""
    shapes: Shapes
    """Height and width of each level; T is the sum of their products."""


class Detections(NamedTuple):
    """Output of each layer of the detection decoder; the last layer's is the result."""

    logits: Tensor
    """(L, B, Q, 1) of the nucleus score, or (L, B, Q, K) of the classes in mode ``baseline``."""
    boxes: Tensor
    """(L, B, Q, 4), cxcywh in [0, 1]."""


class Kept(NamedTuple):
    """The D queries that found a nucleus in a batch of images, image after image."""

    counts: list[int]
    """How many each image has."""
    image: Tensor
    """Index of the image (D,) int64."""
    query: Tensor
    """Index of the query (D,) int64."""
    boxes: Tensor
    """(D, 4) float, xyxy px."""
    scores: Tensor
    """(D, 1) in [0, 1], or (D, K) in mode ``baseline``."""


class ImagePredictions(NamedTuple):
    """The D nuclei found in one image, in the order of their queries."""

    query: Tensor
    """Query that found it (D,) int64."""
    boxes: Tensor
    """(D, 4) float, xyxy px; a box may reach beyond the image."""
    nucleus_score: Tensor
    """(D,) in [0, 1]; the highest class score in mode ``baseline``."""
    class_scores: Tensor
    """(D, K) in [0, 1]."""
    embeddings: Tensor | None
    """(D, C), None in mode ``baseline``."""


class InputProjection(nn.Module):
    """Project the maps of the backbone to the channels of the model; strided convolutions add further levels."""

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
    """Deformable DETR with a representation decoder (but in mode ``baseline``).

    There is a class head only if there are classes, and a projection head only if it has a width.
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
            wide = 2 * settings.d_model  # two layers with a ReLU (paper, 3.3)
            self.projection = nn.Sequential(
                nn.Linear(settings.d_model, wide), nn.ReLU(), nn.Linear(wide, settings.projection)
            )
        self.layout = torch.channels_last if settings.kernel == "auto" else torch.contiguous_format
        for part in (self.backbone, self.input_projection):  # convolutions are faster with channels last
            part.to(memory_format=self.layout)  # type: ignore[call-overload]

    def encode(self, images: Tensor) -> Features:
        """Encode images (B, 3, h, w), RGB in [0, 1]."""
        normed = ((images - self.image_mean) / self.image_std).contiguous(memory_format=self.layout)
        maps = self.input_projection(self.backbone(normed))
        shapes = tuple((int(x.shape[-2]), int(x.shape[-1])) for x in maps)
        exact, channels, offset = self.level_embed.dtype, self.settings.d_model, self.settings.position_offset
        codes = [sine_code(shape, channels, offset, images.device).to(exact) for shape in shapes]
        position = torch.cat([code + level for code, level in zip(codes, self.level_embed, strict=True)])
        tokens = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], dim=1).to(exact)
        memory = self.encoder(tokens, position, shapes)
        kind = memory.device.type
        if torch.is_autocast_enabled(kind):  # cast once, instead of in each layer of the decoders
            memory = memory.to(torch.get_autocast_dtype(kind))
        return Features(memory, shapes)

    def detect(self, features: Features) -> Detections:
        """Find nuclei; returns the result of every layer, for the auxiliary losses."""
        logits, boxes, _ = self.decoder(*features)
        return Detections(logits, boxes)

    def represent(
        self, features: Features, boxes: Tensor, valid: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Embed the nuclei in given boxes: (B, R, C), zero at padding; not in mode ``baseline``.

        Training, prediction and every evaluation of embeddings have the same self-attention: whether it sees positions
        and global tokens is part of the model's settings. For arguments see `RepresentationDecoder.forward`.
        """
        return self.representation(*features, boxes, valid, mask)[0]

    def classify(self, embeddings: Tensor) -> Tensor:
        """Turn embeddings (..., C) into class logits (..., K), K = 0 without classes; not in mode ``baseline``."""
        if not self.settings.classes:
            return embeddings.new_zeros((*embeddings.shape[:-1], 0))
        with full_precision(embeddings):
            logits: Tensor = self.class_head(embeddings.to(self.class_head.weight.dtype))
        return logits

    def project(self, embeddings: Tensor) -> Tensor:
        """Turn embeddings (..., C) into vectors (..., P) for the contrastive loss; needs a projection head."""
        with full_precision(embeddings):
            projected: Tensor = self.projection(embeddings.to(self.level_embed.dtype))
        return projected

    def predict(self, images: Tensor, nucleus_threshold: float) -> list[ImagePredictions]:
        """Find nuclei in images (B, 3, h, w), RGB in [0, 1], with dropout and gradients off."""
        with evaluating(self):
            features = self.encode(images)
            size = images.shape[-1], images.shape[-2]
            return self.select(features, self.detect(features), size, nucleus_threshold)[0]

    def attention(self, images: Tensor, nucleus_threshold: float) -> list[tuple[ImagePredictions, SamplingPoints]]:
        """Predict, and return the points that the last decoder layer sampled for each nucleus.

        For each image, D nuclei and their points: locations (D, H, L, P, 2), weights (D, H, L, P). The decoder is the
        representation decoder, or the detection decoder in mode ``baseline``.
        """
        with evaluating(self):
            features = self.encode(images)
            logits, boxes, points = self.decoder(*features)
            size = images.shape[-1], images.shape[-2]
            nuclei, rows, inner = self.select(features, Detections(logits, boxes), size, nucleus_threshold)
            points = inner or points
            sampled = [
                SamplingPoints(points.locations[image, row], points.weights[image, row])
                for image, row in enumerate(rows)
            ]
            return list(zip(nuclei, sampled, strict=True))

    def keep(self, detections: Detections, size: tuple[int, int], nucleus_threshold: float) -> Kept:
        """Choose the queries that found a nucleus in images of a size (width, height).

        A score that is not a number is kept, so that whoever takes the results sees it.
        """
        logits, boxes = (values[-1] for values in detections)
        scores = logits.sigmoid()
        kept = ~(scores.amax(dim=-1) < nucleus_threshold)
        counts = kept.sum(dim=1).tolist()
        image, query = kept.nonzero().unbind(1)
        side = cached_tensor(size * 2, boxes.device, boxes.dtype)
        return Kept(counts, image, query, cxcywh_to_xyxy(boxes[image, query]) * side, scores[image, query])

    def select(
        self, features: Features, detections: Detections, size: tuple[int, int], nucleus_threshold: float
    ) -> tuple[list[ImagePredictions], tuple[Tensor, ...], SamplingPoints | None]:
        """Select the nuclei of images of a size (width, height) from what was detected, and classify them.

        Returns also the rows (D,) of each image's nuclei in the decoder that classifies, and the points that this
        decoder sampled (None in mode ``baseline``: those of `detections`).
        """
        counts, image, query, corners, classes = self.keep(detections, size, nucleus_threshold)
        nucleus_score, row, points = classes.amax(dim=-1), query, None
        own: Sequence[Tensor | None] = [None] * len(counts)
        if not self.baseline:
            row, padded, points = self._represent_kept(features, detections.boxes[-1], counts, image, query)
            embeddings = padded[image, row]
            classes = self.classify(embeddings).sigmoid()
            own = embeddings.split(counts)
        columns = [values.split(counts) for values in (query, corners, nucleus_score, classes)]
        return [ImagePredictions(*values) for values in zip(*columns, own, strict=True)], row.split(counts), points

    def _represent_kept(
        self, features: Features, boxes: Tensor, counts: list[int], image: Tensor, query: Tensor
    ) -> tuple[Tensor, Tensor, SamplingPoints]:
        """Represent the kept queries: the row (D,) of each in its image's result, embeddings (B, R, C) and points.

        In mode ``sequential`` all queries enter the decoder and attend to each other, as in training; in mode
        ``parallel`` only the kept ones do, padded to the largest count.
        """
        valid, row = None, query
        if self.settings.mode == "parallel":
            first = torch.tensor([0, *counts[:-1]]).cumsum(0).to(boxes.device, non_blocking=True)
            row = torch.arange(len(query), device=boxes.device) - first[image]
            kept = boxes[image, query]
            boxes = boxes.new_zeros(len(counts), max(counts, default=0), 4)
            valid = torch.zeros(boxes.shape[:2], dtype=torch.bool, device=boxes.device)
            boxes[image, row], valid[image, row] = kept, True
        return row, *self.representation(*features, boxes, valid)
