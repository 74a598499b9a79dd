"""Batches of patches: order, shares of processes, nuclei as padded tensors."""

import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_training import make_split, make_store
from torch.utils.data import DataLoader

from celldetr.config.experiment import TrainingSettings
from celldetr.training import data as data_module
from celldetr.training.data import PatchData, TrainingBatches, ValidationBatches
from celldetr.training.prefetch import prepare


def test_an_epoch_has_every_patch_and_another_order_than_the_next(store):
    data = PatchData([store], make_split(store, 9, 0), "train")
    batches = TrainingBatches(data, 4, seed=3)
    epochs = [np.concatenate([batches[e * 3 + k].patches for k in range(3)]) for e in range(2)]
    for order in epochs:
        assert sorted(order[:9]) == list(range(9))
        assert np.array_equal(order[9:], order[:3])
    assert not np.array_equal(*epochs)


def test_shares_of_a_batch_are_the_batch(store):
    data = PatchData([store], make_split(store, 9, 0), "train")
    whole = TrainingBatches(data, 4, seed=3)[4]
    first, second = (TrainingBatches(data, 4, seed=3, rank=rank, world=2)[4] for rank in range(2))
    assert torch.equal(torch.cat([first.images, second.images]), whole.images)
    assert first.boxes_global == second.boxes_global == whole.boxes_global


def test_processes_validate_every_patch_once(store):
    data = PatchData([store], make_split(store, 0, 7), "val")
    shares = [ValidationBatches(data, 2, rank, 3) for rank in range(3)]
    found = np.concatenate([share[k].patches for share in shares for k in range(len(share))])
    assert sorted(found) == list(range(7))


def test_the_sizes_of_some_epochs_are_found(monkeypatch, store):
    monkeypatch.setattr(data_module, "padded_size", lambda count: max(1, int(count)))
    data = PatchData([store], make_split(store, 9, 0), "train")
    batches = TrainingBatches(data, 2, 3, rank=1, world=2)

    def size(step):
        return batches[step].targets.labels.shape[1], max(1, batches[step].counts_global.max())

    met = [size(step) for step in range(2 * batches.steps_per_epoch)]
    found = [size(step) for step in batches.steps_of_sizes(epochs=2)]
    assert len(found) == len(set(met)) > 2
    assert set(found) == set(met)
    val = ValidationBatches(data, 2)
    assert {val[number].targets.labels.shape for number in val.numbers_of_sizes()} == {
        val[number].targets.labels.shape for number in range(4)
    }


def test_patches_that_are_not_complete_stay_so_on_their_way_to_the_losses(store, tmp_path):
    known = np.arange(len(store)) % 3 > 0
    path = shutil.copytree(store.path, tmp_path / "b.zarr")
    names = [name for name in (store.path.stem, "b") for _ in range(len(store))]
    split = pd.DataFrame({"store": names, "patch": [*range(len(store))] * 2, "part": "train"})
    marked = replace(store, path=path, patches=store.patches.assign(complete=known))
    data = PatchData([store, marked], split, "train")
    assert data.complete.tolist() == [*[True] * len(store), *known]
    settings = TrainingSettings(epochs=1, batch_size=4)
    for step in range(3):
        batch = prepare(TrainingBatches(data, 4, seed=3)[step], "cpu", settings)
        assert batch.targets.complete.tolist() == data.complete[batch.patches].tolist()
    assert not all(ValidationBatches(data, 28)[0].targets.complete)


def test_targets_are_the_boxes_of_the_store(store):
    data = PatchData([store], make_split(store, 6, 0), "train")
    targets = data.targets(np.array([5, 4, 0]))
    for row, patch in enumerate((5, 4, 0)):
        boxes, labels = store.boxes_of(patch)
        assert targets.valid[row].sum() == len(labels) == targets.counts[row]
        centre = (boxes[:, :2] + boxes[:, 2:]) / 2 / store.patch_size
        assert np.allclose(targets.boxes[row, : len(labels), :2], centre, atol=1e-6)
        assert (targets.labels[row, len(labels) :] == -1).all()


@pytest.mark.parametrize("kind", [TrainingBatches, ValidationBatches])
def test_large_batches_arrive_from_a_loader_process_as_they_were(tmp_path, kind):
    store = make_store(tmp_path / "fold1.zarr", 320)
    data = PatchData([store], make_split(store, 0, 320), "val", cache="none")
    batches = kind(data, 160, 0) if kind is TrainingBatches else kind(data, 160)
    here = [batches[index].counts_global.tolist() for index in range(2)]
    loader = DataLoader(batches, batch_size=None, sampler=range(2), num_workers=1, collate_fn=lambda batch: batch)
    assert [batch.counts_global.tolist() for batch in loader] == here
