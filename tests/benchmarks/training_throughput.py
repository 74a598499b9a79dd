"""Training images per second: from the way the published code is built, one improvement after the other.

Usage: python tests/benchmarks/training_throughput.py [--mode MODE] [--device D] [--size PX] [--batch N] [--rounds N]
[--compile yes|no] [--tiny]. The paper's model at full width, drawn patches, steps of the training loop. The first
variant: `grid_sample` sampling in fp32, costs of all images by all boxes, one loader process that reads and augments
image by image. The step is compiled, on CUDA also into captured graphs, if there is a GPU or with --compile yes: on a
CPU that takes minutes. Prints images/s, the ratio to the first, peak memory (CUDA), where the time of the last
uncompiled variant goes, and the share of the measured matrix-product ceiling that the last one reaches.
"""

import contextlib
import itertools
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pandas as pd
import torch
from ladder import Parts, Variant, ceiling, climb, draw_store, experiment_of, options, prepare, seconds_of
from scipy.optimize import linear_sum_assignment
from torch._inductor import config as inductor
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from celldetr.config.experiment import Experiment, MatchingSettings
from celldetr.model.boxes import cxcywh_to_xyxy, pairwise_giou
from celldetr.model.celldetr import Detections, float_images
from celldetr.model.compiled import no_more_compiling
from celldetr.model.deformable_attention import use_sampling
from celldetr.training import detection as stages
from celldetr.training import prefetch
from celldetr.training.augment import augment_images, augment_targets, draw
from celldetr.training.data import Batch, PatchData, Targets
from celldetr.training.loop import Training
from celldetr.training.matching import Matching
from celldetr.training.processes import Group
from celldetr.training.run import Run
from celldetr.training.stages import STAGES

BATCHES = 8


class AllByAll:
    """Matching as Deformable DETR does it: per layer, the costs of all queries for all nuclei of the batch."""

    settings = MatchingSettings()

    def __init__(self, given: tuple[Detections, Targets], counts: torch.Tensor) -> None:
        self.detections, self.targets = given
        self.counts = counts.tolist()

    def result(self) -> torch.Tensor:
        """Match: the query (L, B, R) of each nucleus, -1 without one."""
        targets, settings = self.targets, self.settings
        true, labels = targets.boxes[targets.valid], targets.labels[targets.valid].clamp(min=0)
        found = torch.full((len(self.detections.boxes), *targets.labels.shape), -1)
        for layer, (of_layer, box) in enumerate(zip(*self.detections, strict=True)):
            p, box = of_layer.flatten(0, 1).float().sigmoid(), box.flatten(0, 1).float()
            negative = 0.75 * p**2 * -(1 - p + 1e-8).log()
            positive = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log()
            label = labels if p.shape[-1] > 1 else torch.zeros_like(labels)
            cost = (
                settings.l1 * torch.cdist(box, true, p=1)
                + settings.nucleus * (positive[:, label] - negative[:, label])
                - settings.giou * pairwise_giou(cxcywh_to_xyxy(box), cxcywh_to_xyxy(true))
            )
            parts = cost.view(len(self.counts), -1, len(true)).cpu().split(self.counts, dim=-1)
            for image, part in enumerate(parts):
                query, nucleus = map(torch.from_numpy, linear_sum_assignment(part[image]))
                found[layer, image, nucleus] = query
        return found.to(targets.labels.device)


class AugmentedImages(Dataset):
    """Images read and augmented one by one, as a loader process does it: (S, S, 3) uint8 and its nuclei."""

    def __init__(self, data: PatchData, experiment: Experiment) -> None:
        self.data, self.settings = data, experiment.training

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Targets]:
        patch = torch.tensor([index]).numpy()
        draws = draw(self.settings.augmentation, 0, index, 1)
        targets = augment_targets(self.data.targets(patch), draws)
        image = augment_images(self.data.read(patch)[0], draws, self.settings.augmentation)
        return (image.permute(0, 2, 3, 1) * 255).round().byte(), targets


def collate(items: list[tuple[torch.Tensor, Targets]]) -> Batch:
    """Pad single images to a batch."""
    images, targets = zip(*items, strict=True)
    slots = max(each.labels.shape[1] for each in targets)
    whole = torch.tensor([0.5, 0.5, 1.0, 1.0])
    boxes = [torch.cat([t.boxes, whole.expand(1, slots - t.boxes.shape[1], 4)], dim=1) for t in targets]
    labels = [torch.nn.functional.pad(t.labels, (0, slots - t.labels.shape[1]), value=-1) for t in targets]
    counts = torch.cat([t.counts for t in targets])
    joined = Targets(torch.cat(boxes), torch.cat(labels), counts, torch.ones(len(counts), dtype=torch.bool))
    patches, everything = torch.arange(len(images)).numpy(), slice(0, len(images))
    return Batch(torch.cat(images), joined, patches, 0, everything, counts.numpy().copy())


class Steps:
    """Training steps in one form, with a model of its own; `step` takes one.

    sampling: plain, portable, compiled, auto. matcher: all, own. loader: whether a process reads and augments images
    one by one. fused: the optimiser. ahead: whether batches are prepared beside the step, in fused kernels. compiling:
    no, yes, graphs (captured, on CUDA), combined (captured, small kernels that do not depend on each other in one).
    """

    def __init__(
        self,
        args,
        store,
        folder: Path,
        *,
        sampling: str = "auto",
        matcher: str = "own",
        loader: bool = False,
        fused: bool = True,
        ahead: bool = True,
        compiling: str = "no",
        bf16: bool = False,
        experiment: Experiment | None = None,
    ) -> None:
        self.device, self.compiling = args.device, compiling
        told = (experiment or experiment_of(args)).to_dict()
        told["training"] |= {"precision": "bf16" if bf16 else "tf32", "cache": "none" if loader else "gpu"}
        told["training"]["compile"] = ahead and args.device.startswith("cuda")  # the augmentation; the step: warm_up
        told["model"]["kernel"] = "reference" if sampling == "plain" else "auto"
        experiment = Experiment.from_dict(told)
        split = pd.DataFrame({"store": "drawn", "patch": range(store.n_patches), "part": "train"})
        stage, out = STAGES[experiment.stage], Path(tempfile.mkdtemp(dir=folder))
        run = Run(experiment, stage, (store.path,), split, out, threads=args.threads)
        torch.manual_seed(0)
        self.training = training = Training(run, args.device, Group())
        self.stage = training.stage
        self.stage.train()
        use_sampling(training.model, args.device, compiled={"auto": "auto", "compiled": True}.get(sampling, False))
        self.matching = AllByAll if matcher == "all" else Matching
        if matcher == "all":
            self.stage.costs = lambda detections, targets: (detections, targets)
        if not fused:
            for group in training.optimizer.param_groups:
                group["fused"], group["foreach"] = False, False
        self.batches = self._loaded() if loader else self._read(ahead)
        if compiling != "no":
            self.warm_up()

    def _loaded(self) -> Iterator[Batch]:
        images = AugmentedImages(self.stage.train_data, self.training.run.experiment)
        options = {"num_workers": 1, "collate_fn": collate, "drop_last": True, "persistent_workers": True}
        batches = DataLoader(images, self.stage.settings.batch_size, **options)
        for batch in itertools.chain.from_iterable(itertools.repeat(batches)):
            batch.images = float_images(batch.to(self.device).images)
            yield batch

    def _read(self, ahead: bool) -> Iterator[Batch]:
        read = (self.training.batches[step] for step in itertools.cycle(range(BATCHES)))
        if ahead:
            return self.training.prepared(read)
        return (prefetch.prepare(batch, self.device, self.stage.settings) for batch in read)

    def warm_up(self) -> None:
        """Compile, and print how long that took and what it holds of the GPU's memory."""
        start = time.perf_counter()
        if self.compiling == "yes":  # as on a CPU: not captured
            compile_all = self.stage.compile
            self.stage.compile = lambda device: compile_all("cpu")
        before = torch.cuda.memory_reserved() if self.device.startswith("cuda") else 0
        with inductor.patch(combo_kernels=self.compiling == "combined"):
            self.training.warm_up()
        self.training.optimizer.zero_grad()
        held = f", {(torch.cuda.memory_reserved() - before) / 1e9:.1f} GB more are reserved" if before else ""
        print(f"compiled ({self.compiling}) in {time.perf_counter() - start:.0f} s{held}", flush=True)

    def next_batch(self) -> Batch:
        """Augmented batch on the device."""
        return next(self.batches)

    def step(self) -> None:
        """Take one whole step."""
        done = contextlib.nullcontext() if self.compiling == "no" else no_more_compiling()
        with mock.patch.object(stages, "Matching", self.matching), done:
            self.training.take_step(self.next_batch())


def rungs_of(args) -> list[tuple[str, dict[str, object]]]:
    """Name of each rung, and what it changes."""
    on_cpu = args.device == "cpu"
    first = {"sampling": "plain", "matcher": "all", "loader": True, "fused": False, "ahead": False}
    rungs = [
        ("as the published code is built", first),
        ("+ costs of an image's own nuclei", {"matcher": "own"}),
        ("+ patches in memory, augmented in batches", {"loader": False}),
        ("+ fused AdamW", {"fused": True}),
        ("+ model.kernel: portable sampling, channels last", {"sampling": "portable"}),
        ("+ what the device has: kernels or torch.compile", {"sampling": "compiled" if on_cpu else "auto"}),
        ("+ prefetched, fused augmentation", {"ahead": True}),
        ("+ bf16", {"bf16": True}),
    ]
    if args.compile == "yes":
        rungs += [("compiled step, not in bf16", {"compiling": "yes", "bf16": False}), ("+ bf16", {"bf16": True})]
        if not on_cpu:
            rungs.append(("+ CUDA graphs", {"compiling": "graphs"}))
    return rungs


def parts_of(steps: Steps, device: str) -> str:
    """Where the time of a step goes."""
    parts, model = Parts(device), steps.training.model
    parts.watch(steps, "next_batch", "data and augmentation")
    parts.watch(model.backbone, "forward", "backbone")
    parts.watch(model.encoder, "forward", "encoder")
    parts.watch(model.decoder, "forward", "detection decoder")
    if hasattr(model, "representation"):
        parts.watch(model.representation, "forward", "representation decoder")
    parts.watch(Matching, "result", "matching")
    parts.watch(torch.Tensor, "backward", "backward")
    parts.watch(steps.training.optimizer, "step", "optimiser")
    return parts.describe(seconds_of(lambda: [steps.step() for _ in range(3)], device))


def main() -> None:
    """Climb."""
    parser = options(__doc__)
    parser.add_argument("--compile", choices=["yes", "no"], default="yes" if torch.cuda.is_available() else "no")
    args = parser.parse_args()
    prepare(args)
    with tempfile.TemporaryDirectory() as name:
        folder, classes = Path(name), experiment_of(args).model.classes
        store = draw_store(folder / "drawn.zarr", BATCHES * args.batch, args.size, args.nuclei, classes)
        where = torch.cuda.get_device_name() if args.device.startswith("cuda") else f"{args.threads} CPU threads"
        print(f"torch {torch.__version__}, {where}, {args.mode}, {args.batch} patches of {args.size} px a step")
        given, ladder = {}, []
        for rung, change in rungs_of(args):
            given = given | change
            try:
                ladder.append((rung, Steps(args, store, folder, **given)))
            except Exception:  # whatever a compiler raises: the other forms are still of interest
                traceback.print_exc()
        measured = [Variant(rung, steps.step) for rung, steps in ladder]
        climb(measured, args.rounds, args.device, args.batch)
        plain = [steps for _, steps in ladder if steps.compiling == "no"][-1]
        counter = FlopCounterMode(display=False)
        with counter:
            plain.step()
        seconds = sorted(measured[-1].seconds)[len(measured[-1].seconds) // 2]
        top, flops = ceiling(args.device, torch.bfloat16), counter.get_total_flops()
        share = 100 * flops / seconds / top
        print(f"{flops / args.batch / 1e9:.0f} GFLOP an image; {share:.0f} % of {top / 1e12:.2f} TFLOP/s (bf16)")
        print(f"last uncompiled variant: {parts_of(plain, args.device)}")


if __name__ == "__main__":
    main()
