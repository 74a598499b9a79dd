"""A model that reads batch after batch of images: prediction, embedding and the cells of slides all run here.

On a GPU a batch has three turns in `Predictor.read`: its images are sent and looked at; nuclei that were found are
represented, where that is a step of its own; its results are taken. Between them the other batches have theirs, so that
the GPU always has work while the host reads, waits and writes. Copies in both directions run beside the computation.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_map_only

from celldetr.config.base import Precision
from celldetr.inference.batch import (
    MOST_PAIRS,
    Boxes,
    Chosen,
    FoundNuclei,
    GivenNuclei,
    Group,
    grouped,
    normalised,
    padded_group,
    require_finite,
    ungrouped,
)
from celldetr.model.celldetr import CellDETR, Features, float_images
from celldetr.model.compiled import Compile, compiled, compiles
from celldetr.model.device import computing_in, evaluating, to_device
from celldetr.model.sampling import Shapes
from celldetr.runtime.errors import InputError

COMPILING_PAYS = 50_000
"""Images from which on ``auto`` compiles: minutes of compiling against the 1.6 ms an image that it is to save."""
_FEWEST = 32  # boxes of an image, with padding, that the model is compiled for; then twice as many, and so on

_CACHED = 16
"""Images that a CPU looks at together: 64 took 1.3 times as long for each (the paper's model, 128 px)."""

Key = TypeVar("Key")
log = logging.getLogger(__name__)


class Arriving:
    """Tensors on their way to the host: one transfer, as float32, on a stream of its own if there is one."""

    def __init__(self, tensors: Sequence[Tensor], stream: torch.cuda.Stream | None) -> None:
        self._shapes = [tuple(values.shape) for values in tensors]
        self._source = torch.cat([values.float().flatten() for values in tensors])
        self._arrived: torch.cuda.Event | None = None
        if stream is None:
            self._values = self._source.cpu()
            return
        stream.wait_stream(torch.cuda.current_stream(self._source.device))
        with torch.cuda.stream(stream):
            self._values = self._source.to("cpu", non_blocking=True)  # pinned
            self._arrived = torch.cuda.Event(blocking=True)
            self._arrived.record()

    def arrays(self) -> list[NDArray[np.float32]]:
        """Return them, once they have arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()
        ends = np.cumsum([int(np.prod(shape)) for shape in self._shapes])
        pieces = np.split(self._values.numpy(), ends[:-1])
        return [piece.reshape(shape) for piece, shape in zip(pieces, self._shapes, strict=True)]


@dataclass
class _Work(Generic[Key]):
    """A batch on its way."""

    key: Key
    images: int
    side: int
    seen: Arriving | None = None
    """What the model says of all queries (B, Q, ...), unless nothing is searched for; then rows of given nuclei."""
    features: Features | None = None
    """If nuclei that were found are still to be represented."""
    chosen: Chosen | None = None
    groups: list[Group] = field(default_factory=list)
    represented: Arriving | None = None


class Predictor:
    """Finds nuclei in batches of images, and embeds those that it finds or is given, with dropout and gradients off.

    Images do not influence each other. Given nuclei are embedded among the given nuclei of their image, as the model
    was trained; see `CellDETR.represent`.

    Parameters
    ----------
    model, device, precision
        The model is on `device`; see `celldetr.model.device.computing_in`.
    batch_size
        Most images of a batch.
    nucleus_threshold
        Smallest nucleus score of a nucleus that is found; None: none is searched for.
    embeds
        Which nuclei get class scores and embeddings: those that are ``found``, those that are ``given``, or ``none``.
    compiling, expected
        ``auto``: the model is compiled on a GPU with a C compiler if at least `COMPILING_PAYS` images are expected. If
        that fails, a warning is logged and it runs uncompiled; true: it is compiled, or fails. The last batch is then
        padded: all batches have one shape.

    Raises
    ------
    InputError
        Nuclei are given to a model without a representation decoder.
    ConfigError
        `compiling` is true and there is no compiler.
    """

    def __init__(
        self,
        model: CellDETR,
        *,
        batch_size: int,
        device: str = "cpu",
        precision: Precision = "fp32",
        nucleus_threshold: float | None = None,
        embeds: Literal["found", "given", "none"] = "found",
        compiling: Compile = False,
        expected: int = 0,
    ) -> None:
        if embeds == "given" and model.baseline:
            raise InputError(
                "the model is of mode baseline, which has no representation decoder and no embeddings; give a model of "
                "mode sequential or parallel"
            )
        self.model, self.device, self.precision = model, torch.device(device), precision
        self.batch_size, self.nucleus_threshold, self.embeds = batch_size, nucleus_threshold, embeds
        own_step = embeds == "found" and not model.baseline and model.settings.mode == "parallel"
        self._features = embeds == "given" or own_step
        """Whether representing is a step of its own."""
        self._required = compiling is True
        self._compiled: dict[Callable[..., Any], Callable[..., Any]] = {}
        if compiles(compiling, device, "inference.compile", pays=expected >= COMPILING_PAYS):
            self._compiled = {part: compiled(part, device) for part in (self._look, self._represent)}
        self._known: set[tuple[torch.Size, ...]] = set()
        on_gpu = self.device.type == "cuda"
        self._up, self._down = (torch.cuda.Stream(self.device) if on_gpu else None for _ in range(2))
        self._ahead = 2 if on_gpu else 0

    def read(
        self, batches: Iterable[tuple[Key, NDArray[np.uint8], Boxes | None]]
    ) -> Iterator[tuple[Key, FoundNuclei, GivenNuclei]]:
        """Yield the nuclei of batches in order; on a GPU, two more batches are taken first.

        A batch is a key, which is handed through, images (B, S, S, 3), and with ``embeds="given"`` for each image the
        boxes (n, 4) of its nuclei, xyxy px. No images and no boxes are legal.

        Raises
        ------
        InputError
            Values are not finite.
        """
        waiting: deque[_Work[Key]] = deque()
        for key, images, given in batches:
            waiting.append(self._begin(key, images, given))
            if len(waiting) > 1:
                self._go_on(waiting[-2])
            if len(waiting) > self._ahead:
                yield self._finish(waiting.popleft())
        while waiting:
            yield self._finish(waiting.popleft())

    def _begin(self, key: Key, images: NDArray[np.uint8], given: Boxes | None) -> _Work[Key]:
        """Send images, and look at them; given nuclei are represented at once."""
        work = _Work(key, len(images), images.shape[1])
        if not len(images):
            return work
        with computing_in(self.precision, self.device), evaluating(self.model):
            rows, features = self._looked(self._sent(images))
            arriving = [] if rows is None else [rows]
            if self.embeds == "given":
                assert given is not None
                assert features is not None
                arriving += self._embed(work, features, normalised(given, work.side))
            else:
                work.features = features
            work.seen = Arriving(arriving, self._down) if arriving else None
        return work

    def _go_on(self, work: _Work[Key]) -> None:
        """Choose the nuclei that were found, and represent them if that is a step of its own; once."""
        if work.seen is None or work.chosen is not None or self.nucleus_threshold is None:
            return
        work.chosen = Chosen.of(work.seen.arrays()[0][: work.images], self.nucleus_threshold)
        if work.features is not None:
            with computing_in(self.precision, self.device), evaluating(self.model):
                rows = self._embed(work, work.features, work.chosen.boxes(work.images))
                work.represented = Arriving(rows, self._down) if rows else None
            work.features = None

    def _finish(self, work: _Work[Key]) -> tuple[Key, FoundNuclei, GivenNuclei]:
        """Take the results."""
        self._go_on(work)
        settings, width = self.model.settings, 0 if self.model.baseline else self.model.settings.d_model
        classes = len(settings.classes)
        arrays = work.seen.arrays() if work.seen is not None else []
        searched, nothing = self.nucleus_threshold is not None, np.empty((0, 0), np.float32)
        chosen = work.chosen or Chosen(np.empty(0, np.int64), np.empty(0, np.int64), np.empty((0, 5), np.float32))
        own = np.empty((len(chosen.rows), 0), np.float32)
        given = GivenNuclei(nothing, nothing)
        if self.embeds == "given":
            given = GivenNuclei(*_split(ungrouped(work.groups, arrays[searched:], classes + width), classes))
        elif self._features:
            arrays = work.represented.arrays() if work.represented is not None else []
            own = ungrouped(work.groups, arrays, classes + width)
        elif self.embeds == "found":
            own = chosen.rows[:, 5:] if work.chosen is not None else np.empty((0, classes + width), np.float32)
        found = chosen.nuclei(*_split(own, classes), work.side)
        require_finite(*found[2:], *given)
        return work.key, found, given

    def _sent(self, images: NDArray[np.uint8]) -> Tensor:
        """Copy images to the device, beside its work."""
        pixels, rows = torch.from_numpy(images), self.batch_size if self._compiled else len(images)
        if self._up is not None or rows != len(images):
            pixels = torch.empty((rows, *images.shape[1:]), dtype=torch.uint8, pin_memory=self._up is not None)
            pixels[: len(images)], pixels[len(images) :] = torch.from_numpy(images), 0
        if self._up is None:
            return pixels.to(self.device)
        with torch.cuda.stream(self._up):
            sent = pixels.to(self.device, non_blocking=True)
        here = torch.cuda.current_stream(self.device)
        here.wait_stream(self._up)
        sent.record_stream(here)
        return sent

    def _looked(self, images: Tensor) -> tuple[Tensor | None, Features | None]:
        """Look at images; on a CPU a few at a time."""
        if self.device.type != "cpu" or self._compiled or len(images) <= _CACHED:
            found: tuple[Tensor | None, Features | None] = self._run(self._look, images)
            return found
        rows, features = zip(*map(self._look, images.split(_CACHED)), strict=True)
        together = None
        if features[0] is not None:
            together = Features(torch.cat([each.memory for each in features]), features[0].shapes)
        return None if rows[0] is None else torch.cat(rows), together

    def _run(self, part: Callable[..., Any], *args: Any) -> Any:
        """Run a part of the model as it is, or compiled."""
        if part not in self._compiled:
            return part(*args)
        shapes = tuple(value.shape for value in args if isinstance(value, Tensor))
        if shapes not in self._known:  # makes the constant tables, see `celldetr.model.compiled`
            part(*args)
            self._known.add(shapes)
        try:
            # copies, as the next run of a captured graph overwrites what this one returned
            return tree_map_only(Tensor, torch.clone, self._compiled[part](*args))
        except Exception as error:  # whatever a compiler, its cache or a driver may raise
            if self._required:
                raise
            log.warning("the model runs uncompiled, as compiling it failed: %s", str(error).strip().split("\n")[0])
            self._compiled = {}
            return part(*args)

    def _look(self, images: Tensor) -> tuple[Tensor | None, Features | None]:
        """Look at images (B, S, S, 3) uint8.

        Returns for every query the box, cxcywh in [0, 1], the nucleus score, and if they are wanted and known at once,
        class scores and embedding (B, Q, ...); None if nothing is searched for. Then the encoded
        images, if nuclei are represented in a step of its own.
        """
        pixels, model = float_images(images), self.model
        if self.nucleus_threshold is None:
            features = model.encode(pixels)
            return None, features
        if self._features or self.embeds == "none":
            features = model.encode(pixels)
            detections, more = model.detect(features), []
        else:
            features, detections, embeddings, logits = model(pixels)
            more = [detections.logits[-1].sigmoid()] if model.baseline else [logits.sigmoid(), embeddings]
        scores = detections.logits[-1].sigmoid().amax(dim=-1, keepdim=True)
        rows = torch.cat([values.float() for values in (detections.boxes[-1], scores, *more)], dim=-1)
        return rows, features if self._features else None

    def _represent(self, memory: Tensor, shapes: Shapes, boxes: Tensor, valid: Tensor | None) -> Tensor:
        """Class scores and embeddings (B, R, K + C) of nuclei in boxes (B, R, 4), cxcywh in [0, 1]."""
        embeddings = self.model.represent(Features(memory, shapes), boxes, valid)
        return torch.cat([self.model.classify(embeddings).sigmoid().float(), embeddings.float()], dim=-1)

    def _embed(self, work: _Work[Key], features: Features, boxes: Boxes) -> list[Tensor]:
        """Represent the nuclei in boxes, cxcywh in [0, 1], in groups of images."""
        memory, most = features.memory, max(map(len, boxes), default=0)
        size = max(_FEWEST, 1 << (most - 1).bit_length())
        if fits := bool(self._compiled) and most > 0 and len(memory) * size**2 <= MOST_PAIRS:
            work.groups = [padded_group(boxes, np.arange(len(memory)), size)]
        else:
            work.groups = grouped(boxes)
        found = []
        for images, given, real in work.groups:
            own = memory if len(images) == len(memory) else memory[self._upload(images)]
            valid = self._upload(real) if fits or not real.all() else None  # none: less memory
            run = self._run if fits else _plainly
            found.append(run(self._represent, own, features.shapes, self._upload(given), valid))
        return found

    def _upload(self, values: NDArray[Any]) -> Tensor:
        return to_device(torch.from_numpy(values), self.device)


def _plainly(part: Callable[..., Any], *args: Any) -> Any:
    return part(*args)


def _split(rows: NDArray[np.float32], classes: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    return rows[:, :classes], rows[:, classes:]
