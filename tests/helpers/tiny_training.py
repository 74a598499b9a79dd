"""A tiny store and a tiny experiment, shared by the tests of training."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from celldetr.config.evaluation import ScoringSettings
from celldetr.config.experiment import Experiment, MatchingSettings
from celldetr.model.celldetr import CellDETR
from celldetr.model.weights import read_checkpoint
from celldetr.store import StoreWriter, open_store
from celldetr.training import loop
from celldetr.training.data import PatchData, Targets
from celldetr.training.loop import Run, Training
from celldetr.training.matching import Matching, costs
from celldetr.training.stages import STAGES

CLASSES = ("round", "long")
SIZE = 32


def draw_patch(rng, n):
    """Dark (class 0) and reddish (class 1) ellipses on a light background."""
    image = np.full((SIZE, SIZE, 3), 225, dtype=np.uint8)
    boxes, labels = [], []
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    for _ in range(n):
        label = int(rng.integers(2))
        half = rng.uniform(3, 5, 2)
        centre = rng.uniform(half, SIZE - half)
        inside = ((x - centre[0]) / half[0]) ** 2 + ((y - centre[1]) / half[1]) ** 2 <= 1
        image[inside] = (60, 30, 120) if label == 0 else (200, 60, 60)
        boxes.append([*(centre - half), *(centre + half)])
        labels.append(label)
    return image, np.array(boxes, np.float32).reshape(-1, 4), np.array(labels, np.int8)


def make_store(path, n_patches, seed=0, classes=CLASSES, unlabelled=False, group="s", mpp=0.5):
    """Write a store; every fifth patch is without nuclei."""
    rng = np.random.default_rng(seed)
    drawn = [draw_patch(rng, 0 if i % 5 == 4 else int(rng.integers(1, 4))) for i in range(n_patches)]
    if unlabelled or not classes:
        drawn = [(image, boxes, np.full_like(labels, -1)) for image, boxes, labels in drawn]
    images, boxes, labels = (list(column) for column in zip(*drawn, strict=True))
    return write_store(path, np.stack(images), boxes, labels, classes, group, mpp)


def write_store(path, images, boxes, labels, classes, group="s", mpp=0.5, instances=None):
    """Write patches of one group; of `instances`, the maps, too."""
    columns = {name: [group] * len(images) for name in ("source", "group", "tissue")}
    columns |= {name: np.arange(len(images)) for name in ("x", "y")}
    with StoreWriter(path, patch_size=SIZE, classes=classes, mpp=mpp) as writer:
        writer.append(images, boxes, labels, patches=columns, instances=instances)
    return open_store(path)


def make_split(store, train, val):
    """First patches train, the next ones validate."""
    parts = ["train"] * train + ["val"] * val
    return pd.DataFrame({"store": store.path.stem, "patch": np.arange(train + val), "part": parts})


def make_experiment(mode="sequential", model=None, **training):
    """Smallest model that learns; settings of training as given."""
    sizes = {
        "mode": mode,
        "classes": list(CLASSES),
        "d_model": 16,
        "heads": 2,
        "points": 2,
        "ffn": 16,
        "dropout": 0.1,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "queries": 6,
        "backbone": {"block": "basic", "layers": [1, 1, 1, 1], "width": 8, "stages": [1, 2], "norm": "group"},
        "representation": {"layers": 1, "offset_init": "spread"},
    }
    recipe = {
        "epochs": 3,
        "batch_size": 4,
        "lr": 1e-3,
        "backbone_lr": 1e-3,
        "warmup_steps": 2,
        "gradient_clip": 1.0,
        "precision": "fp32",
        "augmentation": {"elastic": 0.5, "blur": 0.5, "jitter": 0.5, "hed": 0.5},
    }
    return Experiment.from_dict(
        {"name": "tiny", "model": {**sizes, **(model or {})}, "training": {**recipe, **training}}
    )


def make_ssl_experiment(model=None, **training):
    """Smallest model of contrastive pretraining."""
    parts = {"classes": [], "projection": 8, "representation": {"layers": 2, "positions": False, "global_tokens": 1}}
    experiment = make_experiment("parallel", {"representation": {"layers": 2}}, **training).to_dict()
    experiment["model"] |= parts | (model or {})
    return Experiment.from_dict({**experiment, "stage": "ssl"})


def make_crowded_store(path, n_patches, seed=0):
    """Write a store of 16 discs of a colour each in every patch, without classes."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    corners = np.array([[8 * (cell % 4) + 4.0, 8 * (cell // 4) + 4.0] for cell in range(16)])
    images = np.full((n_patches, SIZE, SIZE, 3), 225, dtype=np.uint8)
    for image in images:
        for centre in corners:
            image[(x - centre[0]) ** 2 + (y - centre[1]) ** 2 <= 9] = rng.integers(20, 200, 3)
    boxes = np.concatenate([corners - 3, corners + 3], axis=1).astype(np.float32)
    return write_store(path, images, [boxes] * n_patches, [np.full(16, -1, np.int8)] * n_patches, ())


def make_stage(store, experiment, train=8, val=0):
    """Build the stage of an experiment on the first patches of a store."""
    data = [PatchData([store], make_split(store, train, val), part) for part in ("train", "val")]
    return STAGES[experiment.stage](experiment, CellDETR(experiment.model), *data, ScoringSettings())


def random_detections(counts, queries=7, classes=1, layers=2, seed=0):
    """Logits (L, B, Q, C), boxes (L, B, Q, 4) and the nuclei of images with these counts."""
    generator = torch.Generator().manual_seed(seed)
    slots = max(1, *counts)

    def boxes(*shape):
        values = torch.rand(*shape, 4, generator=generator)
        return torch.cat([values[..., :2] * 0.8 + 0.1, values[..., 2:] * 0.2 + 0.02], dim=-1)

    logits = torch.randn(layers, len(counts), queries, classes, generator=generator)
    labels = torch.randint(classes, (len(counts), slots), generator=generator)
    labels[torch.arange(slots) >= torch.tensor(counts)[:, None]] = -1
    found = boxes(layers, len(counts), queries)
    complete = torch.ones(len(counts), dtype=torch.bool)
    return logits, found, Targets(boxes(len(counts), slots), labels, torch.tensor(counts), complete)


def match(logits, boxes, targets):
    """Match with the costs of the paper: the query (L, B, R) of each nucleus, -1 without one."""
    return Matching(costs(logits.detach(), boxes.detach(), targets, MatchingSettings()), targets.counts).result()


def train(experiment, stores, split, run_dir, **options):
    """Train a run; options as those of `celldetr.training.loop.Run`."""
    stage = options.pop("stage", None) or STAGES[experiment.stage]
    return loop.train(Run(experiment, stage, tuple(store.path for store in stores), split, Path(run_dir), **options))


def read_log(run_dir):
    """Lines of log.jsonl without what differs from run to run."""
    lines = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.endswith(("seconds", "second"))} for line in lines]


def assert_same_result(first, second):
    """Two runs ended with the same weights and the same log."""
    a, b = (read_checkpoint(path / "model.pt") for path in (first, second))
    assert a["extra"] == b["extra"]
    assert [name for name in a["state"] if not torch.equal(a["state"][name], b["state"][name])] == []
    assert read_log(first) == read_log(second)


def stopping(monkeypatch, at, number=signal.SIGTERM):
    """Send a signal to this process in the middle of a step."""
    take_step = Training.take_step

    def stop(self, batch):
        if self.step == at:
            os.kill(os.getpid(), number)
        take_step(self, batch)

    monkeypatch.setattr(Training, "take_step", stop)
