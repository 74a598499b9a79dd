"""Images per second in each epoch of a training run, to see whether the rate falls as the model learns.

Usage: python tests/benchmarks/epoch_rates.py [--mode MODE] [--epochs N] [--patches N] [--control] [--device D]
[--tiny]. A run of `celldetr.training.loop.train` from scratch on drawn patches with dark nuclei; 24 steps an epoch.
--control: with a learning rate of nearly 0, so that nothing is learned. If only the run that learns slows down, the
cause is where the points of the attention lie; if both do, it is the machine or its memory.
"""

import json
import statistics
import tempfile
from pathlib import Path

import pandas as pd
from ladder import draw_store, experiment_of, options, prepare

from celldetr.config.experiment import Experiment
from celldetr.training.loop import train
from celldetr.training.run import Run
from celldetr.training.stages import STAGES


def main() -> None:
    """Train, and print the log's rates."""
    parser = options(__doc__)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--patches", type=int, help="default: 24 steps an epoch")
    parser.add_argument("--control", action="store_true")
    args = parser.parse_args()
    prepare(args)
    if args.tiny:
        args.epochs, args.patches = 2, 8
    patches = args.patches or 24 * args.batch
    told = experiment_of(args).to_dict()
    told["model"]["backbone"]["norm"] = "group"
    rate = 1e-12 if args.control else 2e-4
    told["training"] |= {"epochs": args.epochs, "precision": "auto", "select": "last", "warmup_steps": 50}
    told["training"] |= {"lr": rate, "backbone_lr": rate, "compile": args.device.startswith("cuda")}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = draw_store(
            folder / "drawn.zarr", patches + args.batch, args.size, args.nuclei, told["model"]["classes"]
        )
        parts = ["train"] * patches + ["val"] * args.batch
        split = pd.DataFrame({"store": "drawn", "patch": range(len(parts)), "part": parts})
        experiment = Experiment.from_dict(told)
        run = Run(
            experiment,
            STAGES[experiment.stage],
            (store.path,),
            split,
            folder / "run",
            threads=args.threads,
            accelerator=args.device,
        )
        train(run)
        lines = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    trained = [line for line in lines if line["images_per_second"]]
    for line in trained:
        score = line["val"] and line["val"]["detection"]["f1"]
        print(f"epoch {line['epoch']:3}: {line['images_per_second']:8.1f} images/s, detection F {score}")
    rates = [line["images_per_second"] for line in trained]
    early, late = (statistics.median(part) for part in (rates[2:7] or rates, rates[-5:]))
    print(f"median of epochs 3 to 7: {early:.1f}, of the last five: {late:.1f} images/s, {late / early:.2f}x")


if __name__ == "__main__":
    main()
