"""Kernels that the compiler writes for a GPU, and the memory that they move, counted on a machine without one.

Usage: python tests/benchmarks/compiled_kernels.py [--mode MODE ...] [--batch N] [--patches N] [--precision P]
[--combine] [--tiny] [--json]. The paper's model at full width, compiled as `celldetr.model.compiled` does it, for an
H100 that is pretended: see `tests/helpers/pretended_gpu.py`. `--batch` is that of a training step, `--patches` that of
prediction (mode ``predict``). Prints for each graph the kernels that the compiler wrote, the operators of libraries and
of our own that are called between them, the GB of the tensors that all of them read and write, and the GB of results
that are held at once, without weights, gradients and optimiser. The last column divides the first GB by the memory
bandwidth of an H100, 3.35 TB/s. Nothing of it is measured: a tensor of which a part is read counts as a whole, and
no real kernel reaches that bandwidth. Needs Triton, a C++ compiler and PyTorch's build for CPUs; takes one or two
minutes for a mode.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "helpers"), str(HERE.parents[1] / "scripts")]

import pretended_gpu  # isort: skip - before PyTorch

import pandas as pd
import torch
from ladder import draw_store, experiment_of
from pretended_device import like, moved
from torch._inductor import config as inductor
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_map_only

from celldetr.config.evaluation import ScoringSettings
from celldetr.inference.predictor import Predictor
from celldetr.model.celldetr import CellDETR, Detections
from celldetr.model.compiled import compiled
from celldetr.model.deformable_attention import DeformableAttention
from celldetr.model.device import computing_in, evaluating
from celldetr.model.sampling_triton import sample_triton
from celldetr.training.data import PatchData, Targets, TrainingBatches
from celldetr.training.prefetch import prepare
from celldetr.training.stages import STAGES

MODES = ("baseline", "sequential", "parallel", "ssl", "st", "predict")
BANDWIDTH = 3.35e12
"""Bytes per second of an H100's memory."""
_NUCLEI, _PIXELS = 24, 256


def pretended(value: torch.Tensor) -> torch.Tensor:
    """Make a tensor of the same form on the pretended GPU."""
    return like(value, "cuda")


def move(model: CellDETR) -> None:
    """Move a model to the pretended GPU, which samples in the kernels of our own."""
    for part in moved(model, "cuda").modules():
        if isinstance(part, DeformableAttention):
            part.sample = sample_triton


def step(args: argparse.Namespace, folder: Path) -> None:
    """Compile a training step: forward and backward."""
    experiment, size = experiment_of(args), 64 if args.tiny else _PIXELS
    store = draw_store(folder / "drawn.zarr", args.batch, size, _NUCLEI, experiment.model.classes)
    split = pd.DataFrame({"store": "drawn", "patch": range(args.batch), "part": "train"})
    train, val = (PatchData([store], split, part) for part in ("train", "val"))
    stage = STAGES[experiment.stage](experiment, CellDETR(experiment.model), train, val, ScoringSettings())
    batch = prepare(TrainingBatches(train, args.batch, 0)[0], "cpu", experiment.training)
    given = stage.given_beside(batch.targets, batch)
    with FakeTensorMode(allow_non_fake_inputs=True), computing_in(args.precision, "cuda"):
        move(stage.model)
        stage.train()
        found = batch.targets
        images, divisors = pretended(batch.images), torch.empty(2, device="cuda")
        targets = Targets(*map(pretended, (found.boxes, found.labels, found.counts, found.complete)))
        beside = tree_map_only(torch.Tensor, pretended, given)

        def run() -> torch.Tensor:
            seen = stage.look(images)
            costs = stage.costs(Detections(*(values.detach() for values in seen.detections)), targets)
            inner = stage.inner(seen.features, targets.boxes, *beside) if beside else None
            query = torch.empty(costs.shape[:3], dtype=torch.int64, device="cuda")
            return stage.losses(seen, inner, targets, query, divisors)[1]

        run()  # makes the tables
        stage.compile("cpu")  # the same kernels as for a GPU, but not captured
        run().backward()


def prediction(args: argparse.Namespace) -> None:
    """Compile what a model says of a batch of images."""
    model = CellDETR(experiment_of(args).model)
    predictor = Predictor(model, batch_size=args.patches, nucleus_threshold=0.5)
    size = 64 if args.tiny else _PIXELS
    with FakeTensorMode(allow_non_fake_inputs=True), computing_in(args.precision, "cuda"), evaluating(model):
        move(model)
        images = torch.empty(args.patches, size, size, 3, dtype=torch.uint8, device="cuda")
        predictor._look(images)
        compiled(predictor._look, "cpu")(images)


def summary(graphs: Sequence[pretended_gpu.Written]) -> dict[str, Any]:
    """Count what all graphs launch and move together, and each."""
    rows = {}
    for number, graph in enumerate(graphs, start=1):
        counts = {"kernels": graph.kernels, "operators": len(graph.operators)}
        name = f"  {number} {'backward' if graph.backward else 'forward'}"
        rows[name] = counts | {"moved": graph.moved / 1e9, "held": graph.held / 1e9}
    total = {key: sum(row[key] for row in rows.values()) for key in ("kernels", "operators", "moved")}
    return total | {"held": max(row["held"] for row in rows.values()), "graphs": rows}


def main() -> None:
    """Count."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mode", nargs="+", choices=MODES, default=["sequential", "predict"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--patches", type=int, default=64)
    parser.add_argument("--precision", choices=["bf16", "tf32", "fp32"], default="bf16")
    parser.add_argument("--combine", action="store_true", help="small kernels that do not depend on each other in one")
    parser.add_argument("--tiny", action="store_true", help="a small model")
    parser.add_argument("--json", action="store_true")
    args, counted = parser.parse_args(), {}
    inductor.combo_kernels = args.combine
    for mode in args.mode:
        args.mode = "sequential" if mode == "predict" else mode
        pretended_gpu.WRITTEN.clear()
        with tempfile.TemporaryDirectory() as name:
            if mode == "predict":
                prediction(args)
            else:
                step(args, Path(name))
        counted[mode] = summary(pretended_gpu.WRITTEN)
    if args.json:
        print(json.dumps(counted))
        return
    print(f"{'':12}{'kernels':>9}{'operators':>11}{'GB moved':>10}{'GB held':>9}{'ms of it':>13}")
    for mode, found in counted.items():
        for name, row in {mode: found, **found["graphs"]}.items():
            ms = f"{row['moved'] / BANDWIDTH * 1e12:13.1f}"
            print(f"{name:12}{row['kernels']:9}{row['operators']:11}{row['moved']:10.1f}{row['held']:9.1f}{ms}")


if __name__ == "__main__":
    main()
