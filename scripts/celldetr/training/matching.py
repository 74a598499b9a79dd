"""One-to-one assignment of queries to nuclei, per image and decoder layer (paper, 3.1; DETR's set matching).

The cost of a query for a nucleus is a weighted sum of the focal classification cost, the L1 distance of the
normalised boxes and the negated generalised IoU. Costs are computed for an image's own nuclei only, for all images and
layers at once, in float32, and cross to the CPU in one transfer, the only one that a training step waits for. Meanwhile
the device computes what needs no matches; the assignments run in CPU threads.
"""

import functools
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional

from celldetr.config.experiment import MatchingSettings
from celldetr.model.boxes import cxcywh_to_xyxy, pairwise_giou
from celldetr.model.device import to_device
from celldetr.runtime.errors import NonFinite
from celldetr.training.data import Targets

FOCAL_ALPHA = 0.25
FOCAL_GAMMA = 2.0


def costs(logits: Tensor, boxes: Tensor, targets: Targets, settings: MatchingSettings) -> Tensor:
    """Cost of every query for every nucleus of its own image.

    Parameters
    ----------
    logits
        Class logits (L, B, Q, C); C = 1 is the nucleus logit, else one logit per class.
    boxes
        Predicted boxes (L, B, Q, 4), cxcywh in [0, 1].
    targets
        Nuclei of the B images, padded to R slots. With C > 1 an unlabelled nucleus costs its cheapest class.
    settings
        Weights of the three terms.

    Returns
    -------
    Tensor
        Costs (L, B, R, Q) float32; at padding they have no meaning.
    """
    with torch.no_grad(), torch.autocast(logits.device.type, enabled=False):
        logits = logits.float()
        p = logits.sigmoid()
        focal = FOCAL_ALPHA * (1 - p) ** FOCAL_GAMMA * -functional.logsigmoid(logits)  # of a positive query
        focal -= (1 - FOCAL_ALPHA) * p**FOCAL_GAMMA * -functional.logsigmoid(-logits)  # of a negative one
        by_class = focal.transpose(-1, -2)  # (L, B, C, Q)
        if by_class.shape[2] > 1:
            layers, _, _, queries = by_class.shape
            index = targets.labels.clamp(min=0)[None, :, :, None].expand(layers, -1, -1, queries)
            known = (targets.labels >= 0)[None, :, :, None]
            by_class = torch.where(known, by_class.gather(2, index), by_class.amin(dim=2, keepdim=True))
        predicted, true = boxes.float().unsqueeze(2), targets.boxes.unsqueeze(2)  # (L, B, 1, Q, 4), (B, R, 1, 4)
        l1 = (predicted[..., 0] - true[..., 0]).abs()
        for coordinate in range(1, 4):  # one at a time: no (..., 4) intermediate
            l1 += (predicted[..., coordinate] - true[..., coordinate]).abs()
        cost = settings.l1 * l1
        cost += settings.nucleus * by_class
        cost -= settings.giou * pairwise_giou(cxcywh_to_xyxy(targets.boxes), cxcywh_to_xyxy(boxes))
        return cost


def assign(cost: NDArray[np.float32], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Cheapest assignment of every layer and image: the query (L, B, R) of each nucleus, -1 without one.

    `cost` is (L, B, R, Q); the slots behind the `counts` (B,) of nuclei are padding. If an image has more nuclei than
    queries, the most expensive nuclei get no query.
    """
    found = np.full(cost.shape[:3], -1, dtype=np.int64)

    def solve(at: tuple[int, int]) -> None:
        nucleus, query = linear_sum_assignment(cost[at][: counts[at[1]]])
        found[at][nucleus] = query

    problems = [(layer, image) for layer in range(len(cost)) for image in range(len(counts)) if counts[image]]
    list(_threads().map(solve, problems))
    return found


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="assignment")


class Matching:
    """Matches in progress: the costs (L, B, R, Q) cross to the CPU while the caller continues."""

    def __init__(self, costs: Tensor, counts: Tensor) -> None:
        self._counts = counts.numpy()
        self._device = costs.device
        self._costs = costs.to("cpu", non_blocking=True)
        self._arrived = torch.cuda.Event() if costs.is_cuda else None
        if self._arrived is not None:
            self._arrived.record()

    def result(self) -> Tensor:
        """Wait for the costs and assign: the query (L, B, R) int64 of each nucleus, -1 without one and at padding.

        Raises
        ------
        NonFinite
            A cost is not a finite number.
        """
        if self._arrived is not None:
            self._arrived.synchronize()
        table = self._costs.numpy()
        if not all(np.isfinite(table[:, image, :count]).all() for image, count in enumerate(self._counts)):
            raise NonFinite("costs of the matching")
        return to_device(torch.from_numpy(assign(table, self._counts)), self._device)
