"""The patch store: patches, the boxes of their nuclei, and the origin of both, for all data (a Zarr v3 group).

    images     uint8   (N, S, S, 3)  RGB; one chunk per patch (plane after plane), many per shard (file)
    instances  uint16  (N, S, S)     optional: 0 background, k = the pixel is of the k-th box of the patch (from 1);
                                     chunks and shards as those of the images
    boxes      float32 (M, 4)        xyxy px, half-open (xmax = last pixel + 1), clipped to the patch
    labels     int8    (M,)          index into `classes`; -1 = nucleus without a label
    centroids  float32 (M, 2)        mean x, y of the pixel centres of the nucleus, px; NaN = unknown
    box_ptr    int64   (N + 1,)      nuclei of patch i are box_ptr[i]:box_ptr[i + 1]
    patches/   source, group, tissue (text) and x, y (int64): (N,) each; optional complete (bool): False where nuclei
               are visible that have no box
    attributes                       format, classes, mpp, counts per class, what was dropped and why, provenance, and
                                     digest: SHA-256 of the content, the identity of the store

A pixel has one number: where masks overlap, the smaller nucleus has it, and a nucleus that others cover has none. The
centre of a pixel is at +0.5, so that the centre of a one-pixel box is its centroid. N = 0 and M = 0 are legal.
"""

from celldetr.store.reader import NO_LABEL, Patch, PatchStore, class_counts, open_store
from celldetr.store.shards import EncodedImage, encode_image
from celldetr.store.writer import StoreWriter, select

__all__ = [
    "NO_LABEL",
    "EncodedImage",
    "Patch",
    "PatchStore",
    "StoreWriter",
    "class_counts",
    "encode_image",
    "open_store",
    "select",
]
