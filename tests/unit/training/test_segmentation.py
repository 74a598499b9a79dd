"""Training of systems that segment: maps follow the images, recipes hold, runs continue, models are told apart."""

import numpy as np
import pytest
import torch
from tiny_system import TinySystem, experiment_of, mapped_store
from tiny_training import CLASSES, make_experiment, make_split, make_store, train

from celldetr.config.evaluation import ScoringSettings
from celldetr.config.experiment import AugmentationSettings
from celldetr.config.segmentation import SystemSettings
from celldetr.evaluation.predictions import read_predictions
from celldetr.evaluation.scoring import score_fold
from celldetr.inference.segment import segment_fold
from celldetr.model.weights import load_model, read_checkpoint
from celldetr.runtime.errors import InputError, Interrupted
from celldetr.segmentation import model_file, systems
from celldetr.segmentation.model_file import load_system
from celldetr.training import segmentation
from celldetr.training.augment import augment_images, augment_instances, draw
from celldetr.training.data import PatchData, TrainingBatches
from celldetr.training.loop import Training
from celldetr.training.processes import Group
from celldetr.training.segmentation import SegmentationStage


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return mapped_store(tmp_path_factory.mktemp("store") / "s.zarr", 40)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    for module in (systems, segmentation, model_file):
        monkeypatch.setattr(module, "build_system", TinySystem)


def stage_of(store, experiment, group=None):
    data = [PatchData([store], make_split(store, 32, 8), part, instances=True) for part in ("train", "val")]
    model = SegmentationStage.build_model(experiment, data[0], None, None, "cpu")
    return SegmentationStage(experiment, model, *data, ScoringSettings(), group)


@pytest.mark.parametrize("chosen", [{"flip": 1.0}, {"flip": 0.5}, {"elastic": 1.0}, {"elastic": 0.6, "flip": 0.5}])
def test_maps_move_with_the_images(store, chosen):
    """Images whose values are the ids are moved as the maps are: pixels inside of nuclei, away from edges, agree."""
    settings = AugmentationSettings(**{"elastic": 0.0, "flip": 0.0, "blur": 0.0, "jitter": 0.0, **chosen})
    maps = torch.from_numpy(store.instances(np.arange(24)).astype(np.int16))
    draws = draw(settings, 0, 3, 24)
    moved = augment_instances(maps, draws)
    seen = augment_images((40 * maps.byte())[..., None].repeat(1, 1, 1, 3), draws, settings)[:, 0] * 255 / 40
    whole = (seen - seen.round()).abs() < 1e-3
    assert whole.float().mean() > 0.8
    agree = moved[whole] == seen[whole].round().short()
    assert agree.float().mean() > 0.999
    assert (moved != maps).any()


def test_a_system_learns_and_its_nuclei_are_scored(store, tmp_path):
    run = train(experiment_of(), [store], make_split(store, 32, 8), tmp_path, stage=SegmentationStage)
    facts = read_checkpoint(run)
    assert facts["settings"]["tissues"] == ["s"]
    test = mapped_store(tmp_path / "test.zarr", 12, seed=1, group="t")
    model = load_system(run, mpp=test.mpp, patch_size=test.patch_size)
    assert segment_fold(model, test, tmp_path / "p.parquet", batch_size=5) > 10
    scores = score_fold(read_predictions(tmp_path / "p.parquet"), test, ScoringSettings(radius_um=3.0), resamples=0)
    assert scores.query("metric == 'strict'")["f1"].min() > 0.9
    untrained = TinySystem(model.settings).eval()
    segment_fold(untrained, test, tmp_path / "u.parquet", batch_size=5)
    scores = score_fold(read_predictions(tmp_path / "u.parquet"), test, ScoringSettings(radius_um=3.0), resamples=0)
    assert scores.query("metric == 'strict'")["f1"].min() < 0.5


def test_a_stopped_run_ends_with_the_same_weights(store, tmp_path, monkeypatch):
    experiment, split = experiment_of({"balance": 0.85, "frozen_epochs": 1}, epochs=3), make_split(store, 32, 8)
    whole = read_checkpoint(train(experiment, [store], split, tmp_path / "whole", stage=SegmentationStage))["state"]
    take_step, steps = Training.take_step, iter(range(100))

    def interrupted(self, batch):
        take_step(self, batch)
        if next(steps) == 11:
            self.save_state()
            self.writer.check(wait=True)
            raise Interrupted("stop")

    monkeypatch.setattr(Training, "take_step", interrupted)
    with pytest.raises(Interrupted):
        train(experiment, [store], split, tmp_path / "parts", stage=SegmentationStage)
    monkeypatch.setattr(Training, "take_step", take_step)
    again = read_checkpoint(train(experiment, [store], split, tmp_path / "parts", stage=SegmentationStage))["state"]
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_a_frozen_encoder_stays_as_it_is(store, tmp_path):
    experiment = experiment_of({"frozen_epochs": 2}, epochs=2)
    start = TinySystem(SystemSettings(segmentation=experiment.segmentation, classes=CLASSES, tissues=("s",)))
    torch.save(start.features.state_dict(), tmp_path / "encoder.pt")
    options = {"stage": SegmentationStage, "backbone": tmp_path / "encoder.pt"}
    run = train(experiment, [store], make_split(store, 32, 8), tmp_path / "frozen", **options)
    state = read_checkpoint(run)["state"]
    assert all(torch.equal(state[f"features.{name}"], value) for name, value in start.features.state_dict().items())
    free = train(experiment_of(epochs=2), [store], make_split(store, 32, 8), tmp_path / "free", **options)
    assert not torch.equal(read_checkpoint(free)["state"]["features.0.weight"], start.features[0].weight)


def test_a_system_knows_the_epoch(store, tmp_path, monkeypatch):
    seen, losses = [], TinySystem.losses
    monkeypatch.setattr(TinySystem, "losses", lambda self, *given: seen.append(self.epoch) or losses(self, *given))
    train(experiment_of(epochs=3), [store], make_split(store, 32, 8), tmp_path, stage=SegmentationStage)
    assert seen == sorted(seen)
    assert {*seen} == {1, 2, 3}


def test_learning_rates_follow_the_recipe(store):
    def rates(**recipe):
        stage = stage_of(store, experiment_of(recipe, epochs=4))
        return [stage.learning_rate_factor(step, 32) for step in range(0, 32, 8)]

    assert rates(schedule="exponential", decay=0.5) == [1, 0.5, 0.25, 0.125]
    assert rates(schedule="steps", steps={1: 0.1, 3: 0.5}) == [1, 0.1, 0.1, 0.5]
    assert rates()[::3] == pytest.approx([1, 0.1464], abs=1e-3)
    kinds = [
        type(stage_of(store, experiment_of({"optimizer": kind})).make_optimizer()).__name__ for kind in ("sgd", "adam")
    ]
    assert kinds == ["SGD", "Adam"]


def test_rare_patches_are_drawn_more_often(store):
    """Drawn with replacement in proportion to the weights, the same again after an interruption."""
    data = PatchData([store], make_split(store, 32, 8), "train")
    weights = np.where(np.arange(32) < 4, 7.0, 1.0)
    batches = TrainingBatches(data, 4, 0, weights=weights)
    drawn = np.concatenate([batches.order(epoch) for epoch in range(200)])
    assert np.isin(drawn, range(4)).mean() == pytest.approx(0.5, abs=0.02)
    assert np.array_equal(TrainingBatches(data, 4, 0, weights=weights).order(7), batches.order(7))


def test_processes_share_the_loss_of_a_batch(store):
    """The parts of two processes add up to the loss of one, and so do their gradients."""
    experiment, found = experiment_of(), []
    for world in (1, 2):
        gradients = []
        for rank in range(world):
            stage = stage_of(store, experiment, Group(rank, world))
            batch = TrainingBatches(stage.train_data, 4, 0, rank, world)[0]
            batch.images = batch.images.permute(0, 3, 1, 2) / 255
            stage.training_losses(batch)[1].backward()
            gradients.append(stage.model.head.weight.grad)
        found.append(torch.stack(gradients).sum(0))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_models_of_other_kinds_are_refused(store, tmp_path):
    segments = train(experiment_of(epochs=1), [store], make_split(store, 8, 8), tmp_path / "a", stage=SegmentationStage)
    detects = train(make_experiment(epochs=1), [store], make_split(store, 8, 8), tmp_path / "b")
    with pytest.raises(InputError, match="got a model of micro_net, which segments nuclei, expected one of CellDETR"):
        load_model(segments)
    with pytest.raises(InputError, match="got a model of CellDETR or Deformable DETR, expected one of a system that"):
        load_system(detects, mpp=0.5, patch_size=32)
    with pytest.raises(InputError, match=r"was trained at 0.5 um per px, expected 0.25 \(patch.mpp\)"):
        load_system(segments, mpp=0.25, patch_size=32)


def test_stores_that_cannot_be_segmented_are_refused(tmp_path):
    plain = make_store(tmp_path / "plain.zarr", 8)
    with pytest.raises(InputError, match="plain.zarr: instances: got none"):
        train(experiment_of(), [plain], make_split(plain, 4, 4), tmp_path / "run", stage=SegmentationStage)
    assert not (tmp_path / "run" / "model.pt").exists()
