"""Prediction of patches per second: from the way the published code is built, one improvement after the other.

Usage: python tests/benchmarks/inference_throughput.py [--mode MODE] [--device D] [--size PX] [--batch N] [--rounds N].
The paper's model at full width with random weights, drawn patches, a threshold that about as many queries pass as there
are nuclei. The first variant: `grid_sample` sampling in fp32, patches read when they are needed. Prints images/s, the
ratio to the first, peak memory (CUDA), where the time of the last variant goes, and the share of the measured
matrix-product ceiling that it reaches.
"""

import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from ladder import Parts, Variant, ceiling, climb, draw_store, options, prepare, synchronize
from torch.utils.flop_counter import FlopCounterMode
from training_throughput import experiment_of

from celldetr.inference.predict import predict_fold
from celldetr.model.celldetr import CellDETR
from celldetr.model.deformable_attention import DeformableAttention, use_sampling
from celldetr.model.device import computing_in

BATCHES = 4


class Prediction:
    """One variant of prediction; the weights are the same in all."""

    def __init__(self, args, store, folder, *, sampling, ahead, bf16) -> None:
        self.args, self.store, self.ahead = args, store, ahead
        self.path = folder / "predictions.parquet"
        self.precision = "bf16" if bf16 else "fp32"
        torch.manual_seed(0)
        settings = experiment_of(args.mode, args.batch).model.model_copy(
            update={"kernel": "reference" if sampling == "plain" else "auto"}
        )
        self.model = CellDETR(settings).to(args.device).eval().requires_grad_(False)
        for module in self.model.modules():
            if isinstance(module, DeformableAttention):
                torch.nn.init.normal_(module.sampling_offsets.weight, std=0.03)  # points are spread, as after training
        use_sampling(self.model, args.device, compiled={"auto": "auto", "compiled": True}.get(sampling, False))
        self.threshold = 0.0

    def aim(self) -> float:
        """Find the threshold that as many queries pass as a patch has nuclei."""
        found = self.model.predict(self.images(0), 0.0)
        scores = torch.cat([image.nucleus_score for image in found]).sort(descending=True).values
        return float(scores[self.args.nuclei * self.args.batch])

    def images(self, number: int) -> torch.Tensor:
        """Patches of a batch on the device."""
        pixels = self.store.images(np.arange(number * self.args.batch, (number + 1) * self.args.batch))
        return torch.from_numpy(pixels).to(self.args.device).permute(0, 3, 1, 2).float() / 255

    def work(self) -> None:
        """Predict all patches."""
        if self.ahead:
            given = {"nucleus_threshold": self.threshold, "batch_size": self.args.batch}
            predict_fold(self.model, self.store, self.path, **given, device=self.args.device, precision=self.precision)
            return
        for number in range(BATCHES):
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


def main() -> None:
    """Climb."""
    args = options(__doc__).parse_args()
    prepare(args)
    on_cpu = args.device == "cpu"
    rungs = [
        ("as the published code is built", {"sampling": "plain", "ahead": False, "bf16": False}),
        ("+ model.kernel: portable sampling, channels last", {"sampling": "portable"}),
        ("+ patches read ahead, written as they come", {"ahead": True}),
        ("+ what the device has: kernels or torch.compile", {"sampling": "compiled" if on_cpu else "auto"}),
        ("+ bf16", {"bf16": True}),
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        classes = experiment_of(args.mode, args.batch).model.classes
        store = draw_store(folder / "drawn.zarr", BATCHES * args.batch, args.size, args.nuclei, classes)
        given, ladder = {}, []
        for rung, change in rungs:
            given = given | change
            ladder.append((rung, Prediction(args, store, folder, **given)))
        threshold = ladder[1][1].aim()
        for _, variant in ladder:
            variant.threshold = threshold
        where = torch.cuda.get_device_name() if args.device.startswith("cuda") else f"{args.threads} CPU threads"
        print(f"torch {torch.__version__}, {where}, {args.mode}, batches of {args.batch} patches of {args.size} px")
        measured = [Variant(rung, variant.work) for rung, variant in ladder]
        climb(measured, args.rounds, args.device, store.n_patches)
        last = ladder[-1][1]
        counter = FlopCounterMode(display=False)
        with counter:
            last.work()
        seconds = sorted(measured[-1].seconds)[len(measured[-1].seconds) // 2]
        top, flops = ceiling(args.device, torch.bfloat16), counter.get_total_flops()
        share = 100 * flops / seconds / top
        print(f"{flops / store.n_patches / 1e9:.0f} GFLOP an image; {share:.0f} % of {top / 1e12:.2f} TFLOP/s (bf16)")
        print(f"last variant: {parts_of(last, args.device)}")


if __name__ == "__main__":
    main()
