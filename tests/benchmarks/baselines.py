"""The systems of Table 1 at the same number of training images, on folds in PanNuke's layout: one table.

Usage: python tests/benchmarks/baselines.py FOLDS OUT [--images N] [--size small|paper] [--systems NAME ...] [--seed N].
FOLDS holds fold_1.zip to fold_3.zip of patches of 256 px; fold 2 tests, the others train and validate (split 1 of the
paper). It needs the environment that `make baselines` makes. OUT keeps the runs: started again, the program continues.

Size paper takes the recipes of config/config.yaml, shortened: epochs, warm-up, frozen epochs and the steps and decay of
the learning rate shrink by the same factor. Size small, for a CPU, has small networks, and one recipe for all, on
quarters of the patches. All weights start random, also where the recipe has pretrained ones: CellDETR then
normalises by groups, and no encoder is frozen. Images per second are those of the log on a GPU, and of the time that
the process had on a CPU, which others may use, too.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import ndimage

from celldetr.config.base import merge
from celldetr.config.classes import PANNUKE_CLASSES
from celldetr.config.evaluation import ScoringSettings
from celldetr.config.experiment import Experiment, TrainedExperiment
from celldetr.config.load import load_config
from celldetr.config.segmentation import SegmentationExperiment
from celldetr.evaluation.panoptic import panoptic_quality
from celldetr.evaluation.predictions import read_predictions
from celldetr.evaluation.scoring import score_fold
from celldetr.inference.predict import predict_fold
from celldetr.inference.segment import segment_fold
from celldetr.model.weights import load_model
from celldetr.pannuke.convert import convert_fold
from celldetr.pannuke.splits import pannuke_split
from celldetr.segmentation.model_file import load_system
from celldetr.store import PatchStore, StoreWriter, open_store
from celldetr.training.loop import Training, train
from celldetr.training.processes import Group
from celldetr.training.run import Run
from celldetr.training.segmentation import SegmentationStage
from celldetr.training.stages import STAGES

ROOT = Path(__file__).resolve().parents[2]
MODES = {"celldetr_s": "sequential", "celldetr_p": "parallel"}
SYSTEMS = (*MODES, "hover_net", "mask_rcnn", "micro_net", "cellvit_256", "cellvit_sam_b")
SMALL_MODEL = {
    **{"d_model": 64, "heads": 4, "points": 4, "ffn": 128, "dropout": 0.0, "queries": 100},
    **{"encoder_layers": 1, "decoder_layers": 3, "representation": {"layers": 2, "offset_init": "spread"}},
    "backbone": {"block": "basic", "layers": [1, 1, 1, 1], "width": 16, "stages": [2, 3], "norm": "group"},
}
"""That of the example, with queries for the densest patch."""
SMALL_RECIPE = {
    **{"batch_size": 4, "lr": 1e-3, "backbone_lr": 1e-3, "warmup_steps": 50, "gradient_clip": 1.0, "precision": "fp32"},
    "augmentation": {"elastic": 0.0, "blur": 0.0},
}


def small(name: str, epochs: int, seed: int) -> TrainedExperiment:
    """Take the small network of a system, and its recipe."""
    given: dict[str, Any] = {"name": name, "training": {**SMALL_RECIPE, "epochs": epochs, "seed": seed}}
    if name in MODES:
        given["training"]["losses"] = {"classes": 1.6 if name == "celldetr_s" else 3.2}
        given["model"] = {**SMALL_MODEL, "mode": MODES[name], "classes": list(PANNUKE_CLASSES)}
        return Experiment.from_dict(given)
    given |= {"classes": list(PANNUKE_CLASSES), "segmentation": {"system": name, "size": "small"}}
    return SegmentationExperiment.from_dict(given)


def published(name: str, epochs: int, seed: int) -> TrainedExperiment:
    """Take the published network of a system, and its recipe shortened to some epochs."""
    known = load_config({}, ROOT).experiment(name)
    share, given = epochs / known.training.epochs, known.to_dict()
    shorter = {"epochs": epochs, "seed": seed, "warmup_steps": round(share * known.training.warmup_steps)}
    given = merge(given, {"training": shorter})
    if isinstance(known, Experiment):
        return Experiment.from_dict(merge(given, {"model": {"backbone": {"norm": "group"}}}))
    recipe = known.segmentation
    steps = {round(share * epoch): factor for epoch, factor in recipe.steps.items()}
    given["segmentation"] |= {"frozen_epochs": 0, "steps": steps, "decay": recipe.decay ** (1 / share)}
    return SegmentationExperiment.from_dict(given)


def quartered(source: PatchStore, path: Path) -> None:
    """Cut each patch of a store into four; nuclei at the cuts become several."""
    side, columns = source.patch_size // 2, source.patches[["source", "group", "tissue", "x", "y"]]
    with StoreWriter(path, patch_size=side, classes=source.classes, mpp=source.mpp) as writer:
        for patch in range(source.n_patches):
            of_patch = source.labels[source.box_ptr[patch] : source.box_ptr[patch + 1]]
            image, instances = source.images(np.array([patch]))[0], source.instances(np.array([patch]))[0]
            for place in product((slice(0, side), slice(side, None)), repeat=2):
                present, numbers = np.unique(np.append(0, instances[place]), return_inverse=True)
                quarter = numbers[1:].reshape(side, side)
                boxes = [(x.start, y.start, x.stop, y.stop) for y, x in ndimage.find_objects(quarter)]
                writer.append(
                    image[place][None],
                    [np.array(boxes, np.float32).reshape(-1, 4)],
                    [of_patch[present[1:].astype(int) - 1]],
                    instances=quarter[None].astype(np.uint16),
                    patches=columns.iloc[[patch]],
                )


def stores_of(folds: Path, out: Path, quarters: bool) -> dict[int, PatchStore]:
    """Convert the archives, unless OUT has their stores."""
    found = {}
    for fold in (1, 2, 3):
        full, cut = (out / kind / f"fold{fold}.zarr" for kind in ("patches", "quarters"))
        if not full.exists():
            full.parent.mkdir(parents=True, exist_ok=True)
            convert_fold(folds / f"fold_{fold}.zip", full, fold=fold)
        if quarters and not cut.exists():
            cut.parent.mkdir(exist_ok=True)
            quartered(open_store(full), cut)
        found[fold] = open_store(cut if quarters else full)
    return found


def images_per_second(run: Run, steps: int = 25) -> float:
    """Train some steps on a CPU, and divide their images by the CPU time; the first five steps do not count."""
    with tempfile.TemporaryDirectory() as folder:
        training, images, start = Training(replace(run, run_dir=Path(folder)), "cpu", Group()), 0, 0.0
        training.stage.train()
        for batch in training.prepared(training.batches[step] for step in range(steps)):
            training.take_step(batch)
            images += len(batch.patches)
            if training.step == 5:
                images, start = 0, time.process_time()
        rate = images / (time.process_time() - start)
        training.run_log.close()
    return rate


def measure(experiment: TrainedExperiment, stores: Mapping[int, PatchStore], split: pd.DataFrame, out: Path) -> dict:
    """Train a system, or take its finished run, and score it on the test fold."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    segments, files = isinstance(experiment, SegmentationExperiment), tuple(store.path for store in stores.values())
    run = Run(experiment, SegmentationStage if segments else STAGES[experiment.stage], files, split, out)
    file, test, path = train(run), stores[2], out / "fold2.parquet"
    how: dict[str, Any] = {"batch_size": 16, "device": device, "precision": "tf32" if device == "cuda" else "fp32"}
    load, scoring = load_system if segments else load_model, ScoringSettings()
    model = load(file, device, mpp=test.mpp, patch_size=test.patch_size)
    if segments:
        segment_fold(model, test, path, **how)
    else:
        predict_fold(model, test, path, nucleus_threshold=scoring.nucleus_threshold, **how)
    found = read_predictions(path, patch_size=test.patch_size)
    scores = score_fold(found, test, scoring, resamples=0, panoptic=panoptic_quality(found, test))
    rows = scores[scores["metric"] == "strict"].set_index("class")
    log = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    logged = statistics.median(line["images_per_second"] for line in log)
    detection, classes = rows.loc["Detection"], rows.drop("Detection")  # a class without truth has no F
    return {
        "system": experiment.name,
        "images": experiment.training.epochs * int((split["part"] == "train").sum()),
        "scores": [detection["f1"], classes["f1"].mean(), detection["pq"], detection["mpq"]],
        "rate": logged if device == "cuda" else images_per_second(run),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def table(rows: list[dict]) -> str:
    """Write the rows as Markdown."""
    head = "| system | images | detection F | class F | bPQ | mPQ | images/s, against the first | parameters |"
    lines = [head, "|" + "---|" * 8]
    for row in rows:
        scores = " | ".join(f"{score:.3f}" for score in row["scores"]).replace("nan", "")
        rate = f"{row['rate']:.1f}, {row['rate'] / rows[0]['rate']:.2f}"
        lines.append(f"| {row['system']} | {row['images']:,} | {scores} | {rate} | {row['parameters']:,} |")
    return "\n".join(lines)


def main() -> None:
    """Train and score one system after the other; the table is printed, and written, after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folds", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--images", type=int, default=4000, help="that each system trains on, in whole epochs")
    parser.add_argument("--size", choices=["small", "paper"], default="small")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    stores = stores_of(args.folds, args.out, quarters=args.size == "small")
    sizes = {f"fold{fold}": store.n_patches for fold, store in stores.items()}
    split = pannuke_split(sizes, 1, protocol="celldetr", train_share=0.8, seed=args.seed)
    epochs = max(1, round(args.images / (split["part"] == "train").sum()))
    recipe, rows = small if args.size == "small" else published, []
    for name in args.systems:
        rows.append(measure(recipe(name, epochs, args.seed), stores, split, args.out / f"{name}-{args.seed}"))
        (args.out / f"table-{args.seed}.md").write_text(table(rows) + "\n", encoding="utf-8")
        print(table(rows), flush=True)


if __name__ == "__main__":
    main()
