"""Hours of training that a configuration asks of this machine, from steps that are measured here.

Usage: python tests/benchmarks/cost_table.py [--config FILE] [--experiments NAME ...] [--device D] [--batch N]
[--rounds N] [--xenium-patches N]. For each experiment that trains: real steps and validation of its own model and
recipe on drawn patches, in the fastest form that the device has (bf16 on GPUs). Prints a Markdown table. The patches of
PanNuke are those of the official folds, those of the slides the configuration's; those of Xenium are known when they
are cut.
"""

import argparse
import math
import platform
import statistics
import tempfile
from pathlib import Path

import torch
import yaml
from ladder import draw_store, seconds_of
from training_throughput import BATCHES, Steps

from celldetr.config.experiment import Experiment
from celldetr.config.pannuke import FOLDS
from celldetr.config.workflow import Config
from celldetr.model.device import has_bf16
from celldetr.pannuke.convert import OFFICIAL
from celldetr.pannuke.splits import pannuke_split

CONFIG = Path(__file__).resolve().parents[2] / "config" / "config.yaml"


def patches(config: Config, name: str, xenium: int) -> tuple[float, float]:
    """Patches that train and that validate in an epoch, over all runs of an experiment."""
    stage = config.experiments[name].stage
    if stage == "ssl":
        assert config.slides is not None
        val = config.slides.val_share * config.slides.total
        return config.slides.total - val, val
    if stage == "st":
        assert config.xenium is not None
        return config.xenium.split.train * xenium, config.xenium.split.val * xenium
    sizes = {f"fold{fold}": OFFICIAL[getattr(config.pannuke, f"fold{fold}").sha256[:32]][0] for fold in FOLDS}
    args = {"protocol": config.pannuke.protocol, "train_share": config.pannuke.train_share, "seed": config.seed}
    parts = [pannuke_split(sizes, split, **args)["part"] for split in config.pannuke.splits]
    return float(sum((part == "train").sum() for part in parts)), float(sum((part == "val").sum() for part in parts))


def median_seconds(work, args: argparse.Namespace) -> float:
    """Median time of a piece of work, after two rounds of warm-up."""
    return statistics.median([seconds_of(work, args.device) for _ in range(args.rounds + 2)][2:])


def measure(experiment: Experiment, args: argparse.Namespace) -> tuple[float, float, float]:
    """Seconds of a trained patch and of a validated one, and the peak memory in GB (CUDA)."""
    on_gpu = args.device.startswith("cuda")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = draw_store(
            folder / "drawn.zarr", BATCHES * args.batch, args.size, args.nuclei, experiment.model.classes
        )
        told = experiment.to_dict()
        told["training"]["batch_size"] = args.batch
        how = {"bf16": on_gpu and has_bf16(), "compiling": "graphs" if on_gpu else "no"}
        steps = Steps(args, store, folder, experiment=Experiment.from_dict(told), **how)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        train = median_seconds(steps.step, args)
        peak = torch.cuda.max_memory_allocated() / 1e9 if on_gpu else math.nan
        steps.stage.val_data, training = steps.stage.train_data, steps.training
        batches = training.validation_batches()
        validate = median_seconds(lambda: training.validate_batches([batches[0]]), args)
        return train / args.batch, validate / args.batch, peak


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--experiments", nargs="+", help="default: all that train, those beyond the paper as well")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, help="patches at once; default that of the recipe on CUDA, 2 on a CPU")
    parser.add_argument("--threads", type=int, default=2, help="of a CPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--nuclei", type=int, default=24, help="mean number in a patch (PanNuke: 24)")
    parser.add_argument("--xenium-patches", type=int, default=21000, help="of all samples together")
    args = parser.parse_args()
    config = Config.from_dict(yaml.safe_load(args.config.read_text(encoding="utf-8")))
    on_gpu = args.device.startswith("cuda")
    args.size = config.patch.size
    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("high")
    where = torch.cuda.get_device_name() if on_gpu else f"{args.threads} threads of {platform.processor() or 'a CPU'}"
    print(f"torch {torch.__version__}, {where}, patches of {args.size} px\n")
    print("| experiment | runs | million images trained | trained images/s | validated images/s | hours | peak GB |")
    print("|---|---|---|---|---|---|---|")
    batch, total = args.batch, 0.0
    for name in args.experiments or config.experiments:
        if config.experiments[name].stage == "zero_shot":
            continue
        experiment = config.experiment(name)
        args.batch = batch or (experiment.training.batch_size if on_gpu else 2)
        train, val, peak = measure(experiment, args)
        n_train, n_val = (experiment.training.epochs * number for number in patches(config, name, args.xenium_patches))
        hours = (n_train * train + n_val * val) / 3600
        total += hours
        memory = f"{peak:.1f}" if on_gpu else "-"
        rates = f"{1 / train:.3g} | {1 / val:.3g}"
        print(
            f"| `{name}` | {len(config.splits(name))} | {n_train / 1e6:.2f} | {rates} | {hours:.3g} | {memory} |",
            flush=True,
        )
    print(f"| together | | | | | {total:.3g} | |")


if __name__ == "__main__":
    main()
