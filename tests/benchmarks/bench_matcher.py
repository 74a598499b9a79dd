"""Matching at batch 16, 900 queries, 100 nuclei per image: own-image costs against all images by all boxes.

Usage: python tests/benchmarks/bench_matcher.py [--repeats N] [--layers L]. One thread; both forms in turn;
medians. The assignments must be identical.
"""

import argparse
import os
import statistics
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from scipy.optimize import linear_sum_assignment

from celldetr.config.experiment import LossSettings
from celldetr.model.boxes import cxcywh_to_xyxy, pairwise_giou
from celldetr.training.data import Targets
from celldetr.training.matching import Matches, match

BATCH, QUERIES, NUCLEI = 16, 900, 100
WEIGHTS = LossSettings()


def inputs(layers: int) -> tuple[torch.Tensor, torch.Tensor, Targets]:
    """Logits, boxes and nuclei; the predictions are as scattered as those of an untrained model."""
    torch.manual_seed(0)
    boxes = torch.cat([torch.rand(layers, BATCH, QUERIES, 2), torch.rand(layers, BATCH, QUERIES, 2) * 0.1], dim=-1)
    true = torch.cat([torch.rand(BATCH, NUCLEI, 2), torch.rand(BATCH, NUCLEI, 2) * 0.1], dim=-1)
    targets = Targets(true, torch.zeros(BATCH, NUCLEI, dtype=torch.long), torch.full((BATCH,), NUCLEI))
    return torch.randn(layers, BATCH, QUERIES, 1), boxes, targets


def assign_all_by_all(logits: torch.Tensor, boxes: torch.Tensor, targets: Targets, weights: LossSettings) -> Matches:
    """Match as Deformable DETR does: per layer the costs of all queries for all nuclei of the batch."""
    counts = targets.counts.tolist()
    true, labels = targets.boxes[targets.valid], targets.labels[targets.valid].clamp(min=0)
    rows = []
    for layer, (of_layer, box) in enumerate(zip(logits, boxes, strict=True)):
        p, box = of_layer.flatten(0, 1).float().sigmoid(), box.flatten(0, 1).float()
        negative = 0.75 * p**2 * -(1 - p + 1e-8).log()
        positive = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log()
        label = labels if p.shape[-1] > 1 else torch.zeros_like(labels)
        cost = (
            weights.l1 * torch.cdist(box, true, p=1)
            + weights.nucleus * (positive[:, label] - negative[:, label])
            - weights.giou * pairwise_giou(cxcywh_to_xyxy(box), cxcywh_to_xyxy(true))
        )
        parts = cost.view(len(counts), -1, len(true)).cpu().split(counts, dim=-1)
        for image, part in enumerate(parts):
            query, nucleus = linear_sum_assignment(part[image])
            rows.extend((layer, image, q, n) for q, n in zip(query.tolist(), nucleus.tolist(), strict=True))
    return Matches(*torch.tensor(rows, dtype=torch.long).reshape(-1, 4).T.to(logits.device))


def pairs(matches: Matches) -> list[tuple[int, ...]]:
    """Pairs in a fixed order."""
    return sorted(zip(*(column.tolist() for column in matches), strict=True))


def seconds(form, *given) -> float:
    """Wall seconds of one call."""
    start = time.perf_counter()
    form(*given)
    return time.perf_counter() - start


def main() -> None:
    """Compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    given = inputs(options.layers)
    given = (*given, WEIGHTS)
    same = pairs(assign_all_by_all(*given)) == pairs(match(*given))
    times = [(seconds(assign_all_by_all, *given), seconds(match, *given)) for _ in range(options.repeats)]
    ratio = statistics.median(a / b for a, b in times)
    slow, fast = (statistics.median(column) for column in zip(*times, strict=True))
    print(f"{options.layers} layers: own-image costs {1e3 * fast:.0f} ms, all by all {1e3 * slow:.0f} ms, {ratio:.1f}x")
    print(f"assignments identical: {same}")
    if not same:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
