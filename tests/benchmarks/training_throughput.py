"""Training images per second: from the way the published code is built, one improvement after the other.

Usage: python tests/benchmarks/training_throughput.py [--mode MODE] [--device D] [--size PX] [--batch N] [--rounds N].
The paper's model at full width, drawn patches, real training steps (`Stage.training_losses`, backward, clip, AdamW).
The first variant: `grid_sample` sampling in fp32, costs of all images by all boxes, one loader process that reads and
augments image by image. Prints images/s, the ratio to the first, peak memory (CUDA), where the time of the last
variant goes, and the share of the measured matrix-product ceiling that it reaches.
"""

import contextlib
import itertools
import tempfile
from pathlib import Path

import pandas as pd
import torch
from ladder import Parts, Variant, ceiling, climb, draw_store, experiment_of, options, prepare, seconds_of
from scipy.optimize import linear_sum_assignment
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from celldetr.config.classes import PANNUKE_CLASSES, ST_TYPES
from celldetr.config.evaluation import ScoringSettings
from celldetr.config.experiment import Experiment, MatchingSettings
from celldetr.model.boxes import cxcywh_to_xyxy, pairwise_giou
from celldetr.model.celldetr import CellDETR, float_images
from celldetr.model.compiled import compiles
from celldetr.model.deformable_attention import use_sampling
from celldetr.training import stage as stages
from celldetr.training.augment import augment_images, augment_targets, draw
from celldetr.training.data import Batch, PatchData, Targets, TrainingBatches
from celldetr.training.loop import STAGES, make_optimizer
from celldetr.training.matching import Matches, Matching
from celldetr.training.prefetch import Prefetcher
from celldetr.training.stage import Losses, Stage

BATCHES = 8


def assign_all_by_all(
    logits: torch.Tensor, boxes: torch.Tensor, targets: Targets, settings: MatchingSettings
) -> Matches:
    """Match as Deformable DETR does: per layer, the costs of all queries for all nuclei of the batch."""
    counts = targets.counts.tolist()
    true, labels = targets.boxes[targets.valid], targets.labels[targets.valid].clamp(min=0)
    rows = []
    for layer, (of_layer, box) in enumerate(zip(logits, boxes, strict=True)):
        p, box = of_layer.flatten(0, 1).float().sigmoid(), box.flatten(0, 1).float()
        negative = 0.75 * p**2 * -(1 - p + 1e-8).log()
        positive = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log()
        label = labels if p.shape[-1] > 1 else torch.zeros_like(labels)
        cost = (
            settings.l1 * torch.cdist(box, true, p=1)
            + settings.nucleus * (positive[:, label] - negative[:, label])
            - settings.giou * pairwise_giou(cxcywh_to_xyxy(box), cxcywh_to_xyxy(true))
        )
        parts = cost.view(len(counts), -1, len(true)).cpu().split(counts, dim=-1)
        for image, part in enumerate(parts):
            query, nucleus = linear_sum_assignment(part[image])
            rows.extend((layer, image, q, n) for q, n in zip(query.tolist(), nucleus.tolist(), strict=True))
    return Matches(*torch.tensor(rows, dtype=torch.long).reshape(-1, 4).T.to(logits.device))


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
        image = augment_images(self.data.read(patch), draws, self.settings.augmentation)
        return (image.permute(0, 2, 3, 1) * 255).round().byte(), targets


def collate(items: list[tuple[torch.Tensor, Targets]]) -> Batch:
    """Pad single images to a batch."""
    images, targets = zip(*items, strict=True)
    slots = max(each.labels.shape[1] for each in targets)
    whole = torch.tensor([0.5, 0.5, 1.0, 1.0])
    boxes = [torch.cat([t.boxes, whole.expand(1, slots - t.boxes.shape[1], 4)], dim=1) for t in targets]
    labels = [torch.nn.functional.pad(t.labels, (0, slots - t.labels.shape[1]), value=-1) for t in targets]
    counts = torch.cat([t.counts for t in targets])
    joined = Targets(torch.cat(boxes), torch.cat(labels), counts)
    return Batch(
        torch.cat(images),
        joined,
        torch.arange(len(images)).numpy(),
        step=0,
        rows=slice(0, len(images)),
        counts_global=counts.numpy().copy(),
    )


def on_device(batch: Batch, device: str) -> Batch:
    """Move a batch that a loader has augmented."""
    batch.images = float_images(batch.to(device).images)
    return batch


class AllByAll(Matching):
    """Matching over the costs of all images by all boxes, layer after layer."""

    def __init__(self, logits, boxes, targets, weights) -> None:
        self._given = logits, boxes, targets, weights

    def result(self):
        """Match."""
        return assign_all_by_all(*self._given)


class Run:
    """One variant of training with a model of its own."""

    def __init__(
        self,
        args,
        store,
        *,
        sampling: str,
        matcher: str,
        loader: bool,
        fused: bool,
        bf16: bool = False,
        experiment: Experiment | None = None,
    ) -> None:
        self.args, self.matcher, self.bf16 = args, matcher, bf16
        self.experiment = experiment or experiment_of(args.mode, args.batch)
        split = pd.DataFrame({"store": "drawn", "patch": range(store.n_patches), "part": "train"})
        train_data = PatchData([store], split, "train", cache="none" if loader else "gpu", device=args.device)
        nothing = PatchData([store], split, "val", cache="none")
        torch.manual_seed(0)
        settings = self.experiment.model.model_copy(update={"kernel": "reference" if sampling == "plain" else "auto"})
        kind, model = STAGES[self.experiment.stage], CellDETR(settings).to(args.device)
        self.stage: Stage = kind(self.experiment, model, train_data, nothing, ScoringSettings())
        self.stage.train()
        use_sampling(model, args.device, compiled={"auto": "auto", "compiled": True}.get(sampling, False))
        self.optimizer = make_optimizer(model, self.experiment.training)
        if not fused:
            for group in self.optimizer.param_groups:
                group["fused"], group["foreach"] = False, False
        if loader:
            images = AugmentedImages(train_data, self.experiment)
            loader_options = {"num_workers": 1, "collate_fn": collate, "drop_last": True, "persistent_workers": True}
            batches = DataLoader(images, args.batch, **loader_options)
            given = itertools.chain.from_iterable(itertools.repeat(batches))
            self.batches = (on_device(batch, args.device) for batch in given)
        else:
            ordered = TrainingBatches(train_data, args.batch, 0)
            prefetcher = Prefetcher(
                args.device, self.experiment.training, compiled=compiles("auto", args.device, "training.compile")
            )
            self.batches = prefetcher(ordered[step] for step in itertools.cycle(range(BATCHES)))

    def next_batch(self) -> Batch:
        """Augmented batch on the device."""
        return next(self.batches)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Loss of a step."""
        kind = self.args.device.split(":")[0]
        with torch.autocast(kind, torch.bfloat16, enabled=self.bf16):
            losses, total = self.stage.training_losses(batch)
        Losses(losses, total)
        return total

    def backward(self, loss: torch.Tensor) -> None:
        """Gradients, limited."""
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.stage.model.parameters(), self.experiment.training.gradient_clip)

    def update(self) -> None:
        """Step of the optimiser."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def step(self) -> None:
        """One whole step."""
        with self.as_told():
            self.backward(self.forward(self.next_batch()))
        self.update()

    @contextlib.contextmanager
    def as_told(self):
        """Matcher of the variant."""
        before = stages.Matching
        stages.Matching = AllByAll if self.matcher == "all" else Matching
        try:
            yield
        finally:
            stages.Matching = before


def variants(args, store) -> list[tuple[str, Run]]:
    """Build the ladder."""
    on_cpu = args.device == "cpu"
    rungs = [
        ("as the published code is built", {"sampling": "plain", "matcher": "all", "loader": True, "fused": False}),
        ("+ costs of an image's own nuclei", {"matcher": "own"}),
        ("+ patches in memory, augmented in batches", {"loader": False}),
        ("+ fused AdamW", {"fused": True}),
        ("+ model.kernel: portable sampling, channels last", {"sampling": "portable"}),
        ("+ what the device has: kernels or torch.compile", {"sampling": "compiled" if on_cpu else "auto"}),
        ("+ bf16", {"bf16": True}),
    ]
    given, built = {}, []
    for name, change in rungs:
        given = given | change
        built.append((name, Run(args, store, **given)))
    return built


def parts_of(run: Run, device: str) -> str:
    """Where the time of a step goes."""
    parts, model = Parts(device), run.stage.model
    parts.watch(run, "next_batch", "data and augmentation")
    parts.watch(model.backbone, "forward", "backbone")
    parts.watch(model.encoder, "forward", "encoder")
    parts.watch(model.decoder, "forward", "detection decoder")
    if hasattr(model, "representation"):
        parts.watch(model.representation, "forward", "representation decoder")
    parts.watch(Matching, "result", "matching")
    parts.watch(run, "backward", "backward")
    parts.watch(run, "update", "optimiser")

    def steps() -> None:
        for _ in range(3):
            run.backward(run.forward(run.next_batch()))
            run.update()

    return parts.describe(seconds_of(steps, device))


def main() -> None:
    """Climb."""
    args = options(__doc__).parse_args()
    prepare(args)
    classes = {"ssl": (), "st": ST_TYPES}.get(args.mode, PANNUKE_CLASSES)
    with tempfile.TemporaryDirectory() as folder:
        store = draw_store(Path(folder) / "drawn.zarr", BATCHES * args.batch, args.size, args.nuclei, classes)
        ladder = variants(args, store)
        where = torch.cuda.get_device_name() if args.device.startswith("cuda") else f"{args.threads} CPU threads"
        print(f"torch {torch.__version__}, {where}, {args.mode}, {args.batch} patches of {args.size} px a step")
        rungs = [Variant(name, run.step) for name, run in ladder]
        climb(rungs, args.rounds, args.device, args.batch)
        last = ladder[-1][1]
        counter = FlopCounterMode(display=False)
        with counter:
            last.step()
        seconds = sorted(rungs[-1].seconds)[len(rungs[-1].seconds) // 2]
        top = ceiling(args.device, torch.bfloat16)
        flops = counter.get_total_flops()
        share = 100 * flops / seconds / top
        print(f"{flops / args.batch / 1e9:.0f} GFLOP an image; {share:.0f} % of {top / 1e12:.2f} TFLOP/s (bf16)")
        print(f"last variant: {parts_of(last, args.device)}")


if __name__ == "__main__":
    main()
