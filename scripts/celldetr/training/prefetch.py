"""Batches made ready for a step: on the device, as float images, in training augmented.

On a GPU this runs in a stream of its own. The host comes back from a step long before the GPU has finished it; what it
launches here for the next batch runs beside the rest of that step. There is no thread: it would compile beside the
model's compilation, and allocate memory during the capture of CUDA graphs.
"""

from collections.abc import Iterable, Iterator

import torch

from celldetr.config.experiment import TrainingSettings
from celldetr.model.celldetr import float_images
from celldetr.training.augment import augment_images, augment_instances, augment_targets, draw
from celldetr.training.data import Batch


def prepare(batch: Batch, device: torch.device | str, settings: TrainingSettings, *, compiled: bool = False) -> Batch:
    """Augment a batch of a training step and move it to the device, in place; images become float.

    `compiled`: whether `torch.compile` fuses the augmentation, on a GPU.
    """
    if not batch.training:
        batch.images = float_images(batch.to(device).images)
        return batch
    draws = draw(settings.augmentation, settings.seed, batch.step, settings.batch_size).of(batch.rows)
    batch.targets = augment_targets(batch.targets, draws)
    batch.to(device)
    batch.images = augment_images(batch.images, draws, settings.augmentation, compiled=compiled)
    if batch.instances is not None:
        batch.instances = augment_instances(batch.instances, draws)
    return batch


class Prefetcher:
    """Prepares batches on their way to the steps; see `prepare`."""

    def __init__(self, device: torch.device | str, settings: TrainingSettings, *, compiled: bool = False) -> None:
        self._device, self._settings, self._compiled = torch.device(device), settings, compiled
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None

    def __call__(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield prepared batches; none is read before it is asked for."""
        if self._stream is None:
            for batch in batches:
                yield prepare(batch, self._device, self._settings)
            return
        steps, iterator = torch.cuda.current_stream(self._device), iter(batches)
        self._stream.wait_stream(steps)  # patches that the GPU keeps were written there
        while True:
            with torch.cuda.stream(self._stream):
                batch_or_end = next(iterator, None)
                if batch_or_end is None:
                    return
                batch = prepare(batch_or_end, self._device, self._settings, compiled=self._compiled)
            steps.wait_stream(self._stream)
            targets = batch.targets
            for tensor in (batch.images, targets.boxes, targets.labels, targets.complete, batch.instances):
                if tensor is not None:
                    tensor.record_stream(steps)  # its memory is not reused before the step has read it
            yield batch
