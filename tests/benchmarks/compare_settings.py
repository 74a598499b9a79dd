"""Settings against each other on real tissue: the same images, folds and number of training steps for all.

Usage: python tests/benchmarks/compare_settings.py FOLD_1.zip FOLD_2.zip FOLD_3.zip [--variants NAME ...]
[--folds N ...] [--seeds N ...] [--epochs N] [--threads N] [--out DIR]. The zips are in PanNuke's layout; their patches
are halved to 0.5 um/px. Each fold tests once, as in the paper's protocol. The model is a reduced CellDETR-S that trains
from scratch, on a CPU in minutes: only the differences between variants mean something. Prints the mean F of detection
and of each class over folds and seeds, and the minutes of training; a run that is finished below DIR is not repeated.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from celldetr.config.base import merge
from celldetr.config.classes import PANNUKE_CLASSES
from celldetr.config.experiment import Experiment
from celldetr.evaluation.predictions import ScoreRule, read_predictions
from celldetr.evaluation.scoring import score_fold
from celldetr.inference.predict import predict_fold
from celldetr.model.weights import load_model
from celldetr.pannuke.convert import convert_fold
from celldetr.pannuke.splits import fold_parts, pannuke_split
from celldetr.store import PatchStore, StoreWriter, open_store
from celldetr.training.loop import train

BASE = {
    "name": "base",
    "model": {
        "mode": "sequential",
        "classes": list(PANNUKE_CLASSES),
        "d_model": 64,
        "heads": 4,
        "ffn": 128,
        "encoder_layers": 2,
        "queries": 150,
        "backbone": {"block": "basic", "layers": [1, 1, 1, 1], "width": 16, "stages": [1, 2, 3], "norm": "group"},
        "representation": {"layers": 2},
    },
    "training": {"batch_size": 8, "lr": 8.0e-4, "backbone_lr": 8.0e-4, "warmup_steps": 100, "select": "last"},
}
VARIANTS = {
    "base": {},
    "dropout_0": {"model": {"dropout": 0.0}},
    "spread": {"model": {"representation": {"offset_init": "spread"}}},
    "balance": {"training": {"losses": {"class_balance": 0.5}}},
    "stain": {"training": {"augmentation": {"hed": 0.5}}},
    "encoder_1": {"model": {"encoder_layers": 1}},
}


def halve(store: PatchStore, path: Path) -> None:
    """Write a store at half the resolution."""
    images = store.images(np.arange(store.n_patches)).astype(np.uint16)
    small = (images[:, ::2, ::2] + images[:, 1::2, ::2] + images[:, ::2, 1::2] + images[:, 1::2, 1::2] + 2) // 4
    nuclei = [store.boxes_of(patch) for patch in range(store.n_patches)]
    columns = {name: ["whole"] * store.n_patches for name in ("source", "group", "tissue")}
    columns |= {name: np.arange(store.n_patches) for name in ("x", "y")}
    with StoreWriter(path, patch_size=small.shape[1], classes=store.classes, mpp=2 * store.mpp) as writer:
        boxes, labels = zip(*((boxes / 2, labels) for boxes, labels in nuclei), strict=True)
        writer.append(small.astype(np.uint8), list(boxes), list(labels), patches=columns)


def experiment_of(names: list[str], epochs: int, seed: int) -> Experiment:
    """Build the experiment of a variant, or of several together."""
    told = merge(BASE, {"training": {"epochs": epochs, "seed": seed}})
    for name in names:
        told = merge(told, VARIANTS[name])
    return Experiment.from_dict({**told, "name": "_".join(names)})


def run(names: list[str], fold: int, seed: int, stores: dict, told: argparse.Namespace) -> dict[str, float]:
    """Train and test one variant on one fold."""
    folder = told.out / f"{'+'.join(names)}_{told.epochs}_{seed}" / f"split{fold}"
    result = folder / "scores.json"
    if result.exists():
        return json.loads(result.read_text(encoding="utf-8"))
    used = fold_parts(fold, "celldetr")
    sizes = {name: store.n_patches for name, store in stores.items()}
    split = pannuke_split(sizes, fold, protocol="celldetr", train_share=0.8, seed=42)
    training = [stores[f"fold{number}"] for number in used["train"]]
    test = stores[f"fold{used['test'][0]}"]
    start = time.perf_counter()
    experiment = experiment_of(names, told.epochs, seed)
    path = train(experiment, training, split, folder, threads=told.threads, radius=6.0, accelerator="cpu")
    minutes = (time.perf_counter() - start) / 60
    predictions = folder / "predictions.parquet"
    predict_fold(load_model(path), test, predictions, nucleus_threshold=0.4, batch_size=8)
    table = score_fold(read_predictions(predictions), test, rule=ScoreRule(), radius=6.0, resamples=1)
    table = table[table["metric"] == "strict"].set_index("class")
    scores = {**table["f1"].to_dict(), "minutes": minutes}
    result.write_text(json.dumps(scores), encoding="utf-8")
    return scores


def main() -> None:
    """Compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("archives", nargs=3, type=Path)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), help="names, or several joined by +")
    parser.add_argument("--folds", nargs="+", type=int, default=[1, 2, 3], help="splits to run")
    parser.add_argument("--seeds", nargs="+", type=int, default=[42], help="of the training runs")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "compare_settings")
    told = parser.parse_args()
    torch.set_num_threads(told.threads)
    stores = {}
    for number, archive in enumerate(told.archives, start=1):
        path = told.out / f"fold{number}.zarr"
        if not path.exists():
            whole = told.out / "whole" / path.name
            convert_fold(archive, whole, fold=number)
            halve(open_store(whole), path)
        stores[path.stem] = open_store(path)
    rows = {}
    for names in told.variants:
        runs = [run(names.split("+"), fold, seed, stores, told) for fold in told.folds for seed in told.seeds]
        rows[names] = pd.DataFrame(runs).mean()
        print(pd.DataFrame(rows).T.round(3).to_string(), flush=True)


if __name__ == "__main__":
    main()
