"""Host time of a training step without a network: what the loop itself costs (order, batches, optimiser, log).

Usage: OMP_NUM_THREADS=1 python tests/benchmarks/loop_overhead.py [--steps N]. Real runs of `train` on a CPU with one
parameter in the losses, no augmentation and no validation; prints milliseconds per step of each epoch.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

from tiny_training import make_experiment, make_split, make_store, train

from celldetr.training.detection import Outputs
from celldetr.training.supervised import LOSSES, SupervisedStage


def compute(stage, images, targets, batch):
    """Losses that are 0 and reach one parameter."""
    zero = (stage.model.level_embed * 0).sum()
    return Outputs({name: zero for name in LOSSES[stage.mode][1:]}, zero, None, None)


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500, help="of an epoch")
    steps = parser.parse_args().steps
    SupervisedStage.compute = compute
    nothing = dict.fromkeys(("elastic", "flip", "blur", "jitter", "hed"), 0.0)
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder) / "fold1.zarr", 2 * steps)
        experiment = make_experiment(epochs=4, batch_size=2, augmentation=nothing, select="last")
        train(experiment, [store], make_split(store, 2 * steps, 0), Path(folder) / "run")
        lines = (Path(folder) / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    print("ms a step:", *(f"{1e3 * json.loads(line)['train_seconds'] / steps:.2f}" for line in lines))


if __name__ == "__main__":
    main()
