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
from celldetr.model.device import ExactLinear, cached_tensor, call_cast, cast_together, evaluating, padded_size
from celldetr.model.representation import RepresentationDecoder
from celldetr.model.sampling import Shapes
from celldetr.model.transformer import DetectionDecoder, Encoder, class_head, sine_code

IMAGE_MEAN = (0.70478431, 0.57330757, 0.74134993)
IMAGE_STD = (0.1786614, 0.22592805, 0.19027899)

_CHANNELS_LAST = 16
"""Width of the backbone from which its maps have channels last. With two threads of a CPU with AVX-512, gradients of
strided 1 x 1 convolutions of fewer such channels are written outside of their memory (oneDNN of PyTorch 2.13)."""


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


class Seen(NamedTuple):
    """All that the model computes of images alone, in tensors whose shapes depend on no value."""

    features: Features
    detections: Detections
    embeddings: Tensor | None
    """(B, Q, C) of the queries' last boxes in mode ``sequential``, else None."""
    class_logits: Tensor | None
    """(B, Q, K) of these embeddings."""


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
                ExactLinear(settings.d_model, wide), nn.ReLU(), ExactLinear(wide, settings.projection)
            )
        fast = settings.kernel == "auto" and settings.backbone.width >= _CHANNELS_LAST
        self.layout = torch.channels_last if fast else torch.contiguous_format
        for part in (self.backbone, self.input_projection):  # convolutions are faster with channels last
            part.to(memory_format=self.layout)  # type: ignore[call-overload, unused-ignore]  # needed up to torch 2.13

    def forward(self, images: Tensor) -> Seen:
        """Look at images (B, 3, h, w), RGB in [0, 1]."""
        features = self.encode(images)
        detections = self.detect(features)
        if self.settings.mode != "sequential":
            return Seen(features, detections, None, None)
        embeddings = self.represent(features, detections.boxes[-1])
        return Seen(features, detections, embeddings, self.classify(embeddings))

    def encode(self, images: Tensor) -> Features:
        """Encode images (B, 3, h, w), RGB in [0, 1]."""
        normed = ((images - self.image_mean) / self.image_std).contiguous(memory_format=self.layout)
        maps = call_cast(self.input_projection, self.backbone(normed))
        shapes = tuple((int(x.shape[-2]), int(x.shape[-1])) for x in maps)
        exact, channels, offset = self.level_embed.dtype, self.settings.d_model, self.settings.position_offset
        codes = [sine_code(shape, channels, offset, images.device).to(exact) for shape in shapes]
        position = torch.cat([code + level for code, level in zip(codes, self.level_embed, strict=True)])
        tokens = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], dim=1).to(exact)
        memory = call_cast(self.encoder, tokens, position, shapes)
        return Features(cast_together([memory])[0], shapes)  # once, instead of in each layer of the decoders

    def detect(self, features: Features) -> Detections:
        """Find nuclei; returns the result of every layer, for the auxiliary losses."""
        logits, boxes, _ = call_cast(self.decoder, *features)
        return Detections(logits, boxes)

    def represent(
        self, features: Features, boxes: Tensor, valid: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Embed the nuclei in given boxes: (B, R, C), zero at padding; not in mode ``baseline``.

        Training, prediction and every evaluation of embeddings have the same self-attention: whether it sees positions
        and global tokens is part of the model's settings. For arguments see `RepresentationDecoder.forward`.
        """
        embeddings: Tensor = call_cast(self.representation, *features, boxes, valid, mask)[0]
        return embeddings

    def classify(self, embeddings: Tensor) -> Tensor:
        """Turn embeddings (..., C) into class logits (..., K), K = 0 without classes; not in mode ``baseline``."""
        if not self.settings.classes:
            return embeddings.new_zeros((*embeddings.shape[:-1], 0))
        logits: Tensor = self.class_head(embeddings)
        return logits

    def project(self, embeddings: Tensor) -> Tensor:
        """Turn embeddings (..., C) into vectors (..., P) for the contrastive loss; needs a projection head."""
        projected: Tensor = self.projection(embeddings)
        return projected

    def predict(self, images: Tensor, nucleus_threshold: float) -> list[ImagePredictions]:
        """Find nuclei in images (B, 3, h, w), RGB in [0, 1], with dropout and gradients off."""
        with evaluating(self):
            seen = self(images)
            return self.select(seen, self.keep(seen.detections, images.shape[-2:], nucleus_threshold))

    def attention(self, images: Tensor, nucleus_threshold: float) -> list[tuple[ImagePredictions, SamplingPoints]]:
        """Predict, and return the points that the last decoder layer sampled for each nucleus.

        For each image, D nuclei and their points: locations (D, H, L, P, 2), weights (D, H, L, P). The decoder is the
        representation decoder, or the detection decoder in mode ``baseline``.
        """
        with evaluating(self):
            seen = self(images)
            kept = self.keep(seen.detections, images.shape[-2:], nucleus_threshold)
            if self.baseline:
                row, points = kept.query, self.decoder(*seen.features)[2]
            else:
                row, *given = self._given(seen, kept)
                points = self.representation(*seen.features, *given)[1]
            columns = [values[kept.image, row].split(kept.counts) for values in points]
            return list(zip(self.select(seen, kept), map(SamplingPoints, *columns), strict=True))

    def keep(self, detections: Detections, size: Sequence[int], nucleus_threshold: float) -> Kept:
        """Choose the queries that found a nucleus in images of a size (height, width).

        A score that is not a number is kept, so that whoever takes the results sees it.
        """
        logits, boxes = (values[-1] for values in detections)
        scores = logits.sigmoid()
        kept = ~(scores.amax(dim=-1) < nucleus_threshold)
        counts = kept.sum(dim=1).tolist()
        image, query = kept.nonzero().unbind(1)
        side = cached_tensor((size[1], size[0]) * 2, boxes.device, boxes.dtype)
        return Kept(counts, image, query, cxcywh_to_xyxy(boxes[image, query]) * side, scores[image, query])

    def select(self, seen: Seen, kept: Kept) -> list[ImagePredictions]:
        """Classify the kept nuclei of each image.

        In mode ``sequential`` all queries have entered the decoder and attended to each other, as in training; in mode
        ``parallel`` only the kept ones do.
        """
        at, classes = (kept.image, kept.query), kept.scores
        own: Sequence[Tensor | None] = [None] * len(kept.counts)
        if not self.baseline:
            embeddings, logits = seen.embeddings, seen.class_logits
            if embeddings is None or logits is None:
                row, boxes, valid = self._given(seen, kept)
                at, embeddings = (kept.image, row), self.represent(seen.features, boxes, valid)
                logits = self.classify(embeddings)
            classes, own = logits[at].sigmoid(), embeddings[at].split(kept.counts)
        columns = [values.split(kept.counts) for values in (kept.query, kept.boxes, kept.scores.amax(dim=-1), classes)]
        return [ImagePredictions(*values) for values in zip(*columns, own, strict=True)]

    def _given(self, seen: Seen, kept: Kept) -> tuple[Tensor, Tensor, Tensor | None]:
        """Kept nuclei as the representation decoder takes them: the row (D,) of each, boxes (B, R, 4), valid (B, R)."""
        boxes = seen.detections.boxes[-1]
        if self.settings.mode == "sequential":
            return kept.query, boxes, None
        first = torch.tensor([0, *kept.counts[:-1]]).cumsum(0).to(boxes.device, non_blocking=True)
        row = torch.arange(len(kept.query), device=boxes.device) - first[kept.image]
        given = boxes.new_zeros(len(kept.counts), padded_size(max(kept.counts, default=0)), 4)
        valid = torch.zeros(given.shape[:2], dtype=torch.bool, device=boxes.device)
        given[kept.image, row], valid[kept.image, row] = boxes[kept.image, kept.query], True
        return row, given, valid
