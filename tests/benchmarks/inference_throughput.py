"""Prediction of patches per second: from the way the published code is built, one improvement after the other.

Usage: python tests/benchmarks/inference_throughput.py [--mode MODE] [--device D] [--size PX] [--batch N] [--rounds N]
[--compile yes|no] [--tiny]. The paper's model at full width with random weights, drawn patches, a threshold that about
as many queries pass as there are nuclei. The first variant: `grid_sample` sampling in fp32, patches read when they are
needed. From "batches of" on, a batch is four times as large (64 on CUDA). The model is compiled, on CUDA into captured
graphs, if there is a GPU or with --compile yes: on a CPU that takes minutes. Prints images/s, the ratio to the first,
peak memory (CUDA), where the time of the last uncompiled variant goes, and the share of the measured matrix-product
ceiling that the last one reaches.
"""

import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from ladder import Parts, Variant, ceiling, climb, draw_store, experiment_of, options, prepare, synchronize
from torch.utils.flop_counter import FlopCounterMode

from celldetr.inference.predict import predict_fold
from celldetr.model.celldetr import CellDETR, float_images
from celldetr.model.deformable_attention import DeformableAttention, use_sampling
from celldetr.model.device import computing_in

LARGER = 4
"""Times as many patches in the larger batches."""


class Prediction:
    """One variant of prediction; the weights are the same in all."""

    def __init__(self, args, store, folder, *, sampling, ahead, precision, larger, compiling) -> None:
        self.args, self.store, self.ahead = args, store, ahead
        self.path, self.precision, self.compiling = folder / "predictions.parquet", precision, compiling
        self.batch = args.batch * (LARGER if larger else 1)
        torch.manual_seed(0)
        settings = experiment_of(args).model.model_copy(
            update={"kernel": "reference" if sampling == "plain" else "auto"}
        )
        self.model = CellDETR(settings).to(args.device).eval().requires_grad_(False)
        for module in self.model.modules():
            if isinstance(module, DeformableAttention):
                torch.nn.init.normal_(module.sampling_offsets.weight, std=0.03)  # points are spread, as after training
        use_sampling(self.model, args.device, compiled="auto" if sampling == "auto" else False)
        self.threshold = 0.0

    def aim(self) -> float:
        """Find the threshold that as many queries pass as a patch has nuclei."""
        found = self.model.predict(self.images(0), 0.0)
        scores = torch.cat([image.nucleus_score for image in found]).sort(descending=True).values
        return float(scores[self.args.nuclei * self.args.batch])

    def images(self, number: int) -> torch.Tensor:
        """Patches of a batch on the device."""
        pixels = self.store.images(np.arange(number * self.batch, (number + 1) * self.batch))
        return float_images(torch.from_numpy(pixels).to(self.args.device))

    def work(self) -> None:
        """Predict all patches."""
        if self.ahead:
            given = {"nucleus_threshold": self.threshold, "batch_size": self.batch, "device": self.args.device}
            how = {"precision": self.precision, "compiling": self.compiling}
            predict_fold(self.model, self.store, self.path, **given, **how)
            return
        for number in range(self.store.n_patches // self.batch):
            with computing_in(self.precision, self.args.device):
                found = self.model.predict(self.images(number), self.threshold)
            for image in found:
                for values in image:
                    if values is not None:
                        values.cpu()


def parts_of(variant: Prediction, device: str) -> str:
    """Where the time goes."""
    parts, model = Parts(device), variant.model
    parts.watch(model.backbone, "forward", "backbone")
    parts.watch(model.encoder, "forward", "encoder")
    parts.watch(model.decoder, "forward", "detection decoder")
    if hasattr(model, "representation"):
        parts.watch(model.representation, "forward", "representation decoder")
    start = time.perf_counter()
    variant.work()
    synchronize(device)
    return parts.describe(time.perf_counter() - start)


def rungs_of(args) -> list[tuple[str, dict[str, object]]]:
    """Name of each rung, and what it changes."""
    on_cpu = args.device == "cpu"
    first = {"sampling": "plain", "ahead": False, "precision": "fp32", "larger": False, "compiling": False}
    rungs = [
        ("as the published code is built", first),
        ("+ model.kernel: portable sampling, channels last", {"sampling": "portable"}),
        ("+ batches sent, taken and written beside the model", {"ahead": True}),
    ]
    if not on_cpu:
        rungs += [("+ kernels of the device", {"sampling": "auto"}), ("+ TF32", {"precision": "tf32"})]
    rungs.append((f"+ batches of {LARGER * args.batch}", {"larger": True}))
    if args.compile == "yes":
        rungs.append(("+ compiled" if on_cpu else "+ compiled and captured", {"compiling": True}))
    return [*rungs, ("+ bf16", {"precision": "bf16"})]


def main() -> None:
    """Climb."""
    parser = options(__doc__)
    parser.add_argument("--compile", choices=["yes", "no"], default="yes" if torch.cuda.is_available() else "no")
    args = parser.parse_args()
    prepare(args)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        classes = experiment_of(args).model.classes
        patches = LARGER * args.batch * (1 if args.device == "cpu" else 8)
        store = draw_store(folder / "drawn.zarr", patches, args.size, args.nuclei, classes)
        given, ladder = {}, []
        for rung, change in rungs_of(args):
            given = given | change
            ladder.append((rung, Prediction(args, store, folder, **given)))
        threshold = ladder[1][1].aim()
        for _, variant in ladder:
            variant.threshold = threshold
        where = torch.cuda.get_device_name() if args.device.startswith("cuda") else f"{args.threads} CPU threads"
        print(f"torch {torch.__version__}, {where}, {args.mode}, batches of {args.batch} patches of {args.size} px")
        measured = [Variant(rung, variant.work) for rung, variant in ladder]
        climb(measured, args.rounds, args.device, store.n_patches)
        plain = [variant for _, variant in ladder if not variant.compiling][-1]
        counter = FlopCounterMode(display=False)
        with counter:
            plain.work()
        seconds = sorted(measured[-1].seconds)[len(measured[-1].seconds) // 2]
        top, flops = ceiling(args.device, torch.bfloat16), counter.get_total_flops()
        share = 100 * flops / seconds / top
        print(f"{flops / store.n_patches / 1e9:.0f} GFLOP an image; {share:.0f} % of {top / 1e12:.2f} TFLOP/s (bf16)")
        print(f"last uncompiled variant: {parts_of(plain, args.device)}")


if __name__ == "__main__":
    main()
