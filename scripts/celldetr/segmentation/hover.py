"""Horizontal and vertical maps of nuclei (HoVer maps, Graham et al. 2019): targets, their loss, and the way back."""

import numpy as np
import torch
from cellseg_models_pytorch.postproc.functional.hovernet import post_proc_hovernet
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

_PIXEL = 0.25  # um, of the images of PanNuke and CoNSeP, for which the post-processing is published


def hover_maps(instances: Tensor) -> Tensor:
    """Signed distances of nuclear pixels from the centroid of their nucleus, along x and along y.

    Parameters
    ----------
    instances
        (B, S, S) int64: 0 background, other pixels the id of their nucleus in the image.

    Returns
    -------
    Tensor
        (B, 2, S, S) float32: the horizontal map, then the vertical one. In each nucleus, distances on either side are
        divided by the largest there, so that they reach from -1 to 1; 0 in the background and along an axis in
        which a nucleus is one pixel wide.
    """
    batch, height, width = instances.shape
    ids = int(instances.max()) + 1
    of_pixel = (instances + ids * torch.arange(batch, device=instances.device).view(-1, 1, 1)).flatten()
    y, x = torch.meshgrid(*(torch.arange(size, device=instances.device) for size in (height, width)), indexing="ij")
    # float64: the sums of whole numbers are exact, in whatever order a GPU adds them
    place = torch.stack([x, y]).double().expand(batch, 2, height, width).transpose(0, 1).flatten(1)

    empty = place.new_zeros(2, batch * ids)
    area = torch.bincount(of_pixel, minlength=batch * ids)
    centroid = empty.index_add(1, of_pixel, place) / area
    offset = place - centroid[:, of_pixel]
    of_both = of_pixel.expand(2, -1)
    low = empty.scatter_reduce(1, of_both, offset, "amin")
    high = empty.scatter_reduce(1, of_both, offset, "amax")
    reach = torch.where(offset < 0, -low.gather(1, of_both), high.gather(1, of_both))
    maps = torch.where((offset != 0) & (instances.flatten() > 0), offset / reach, 0)
    return maps.float().view(2, batch, height, width).transpose(0, 1)


def gradient_loss(maps: Tensor, target: Tensor, inside: Tensor) -> Tensor:
    """Mean squared error of the gradients of HoVer maps over nuclear pixels (Graham et al. 2019, equation 3).

    The gradient of the horizontal map along x, and of the vertical map along y, is a convolution with x / (x^2 + y^2)
    resp. y / (x^2 + y^2) over 5 x 5 px, not divided by its sum: the gradient of a slope of 1 is 12. The published
    weights of this loss (HoVer-Net 1, CellViT 8) are those for this kernel. MONAI's HoVerNetLoss normalises Sobel
    kernels, so that the same weight would count 144 times less.

    Parameters
    ----------
    maps, target
        (B, 2, S, S) float32: horizontal, vertical.
    inside
        (B, S, S) bool: pixels of nuclei. Without any the loss is 0.
    """
    size, error = maps.shape[-1], maps - target
    along = torch.stack([error[:, 0], error[:, 1].mT], 1)  # for both the last axis is that of the gradient
    padded = functional.pad(along, (2, 2, 2, 2))
    # sums of views: 7 times faster on a CPU than a convolution of one channel
    near, far = padded[..., 3:-1] - padded[..., 1:-3], padded[..., 4:] - padded[..., :-4]
    gradient = torch.zeros_like(along)
    for row in range(-2, 3):
        rows = slice(row + 2, row + 2 + size)
        gradient = gradient + near[:, :, rows] / (1 + row**2) + far[:, :, rows] * 2 / (4 + row**2)
    weight = torch.stack([inside, inside.mT], 1)
    return (gradient.square() * weight).sum() / weight.sum().clamp(min=1)


def instances_of_maps(nuclear: NDArray[np.bool_], maps: NDArray[np.float32], mpp: float) -> NDArray[np.int32]:
    """Nuclei of HoVer maps by a watershed that starts where the maps fall slowly (Graham et al. 2019, section 3.2).

    A nucleus is of one piece. Parts of the mask are lost in which no disc of 5 px fits, and nuclei under 18 px. These
    sizes, and that of the kernels, are for pixels of 0.25 um. Larger pixels are enlarged to about that: at 0.5 um the
    kernels would take small nuclei for one, and find half of those in exact maps.

    Parameters
    ----------
    nuclear
        (S, S): mask of all nuclei.
    maps
        (2, S, S) horizontal, vertical, on any scale: each is stretched to its smallest and largest value.
    mpp
        Size of a pixel, um.

    Returns
    -------
    NDArray
        (S, S): 0 background, other pixels the id of their nucleus.
    """
    # Of the kept libraries this one has the published Sobel kernels of 21 px. Those of 5 px in MONAI find more on exact
    # maps and far less on noisy ones.
    times = max(1, round(mpp / _PIXEL))
    large = [values.repeat(times, axis=-2).repeat(times, axis=-1) for values in (nuclear, maps[::-1])]
    found: NDArray[np.int32] = post_proc_hovernet(*large, enhance=False)
    return found[::times, ::times]
