"""From a map of instances and the probabilities of its pixels to nuclei: boxes, masks, scores, classes."""

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from celldetr.segmentation.system import SegmentedNuclei


def nuclei_of_map(
    instances: NDArray[np.integer],
    nucleus_probability: NDArray[np.floating],
    class_probability: NDArray[np.floating],
    min_area: int,
) -> SegmentedNuclei:
    """Nuclei of one image, in the order of their ids.

    All pixels of an id are one nucleus, also in several pieces: its box then holds all of them. The watersheds of
    this room flood from one piece each, so that their nuclei are of one piece.

    Parameters
    ----------
    instances
        (S, S): 0 background, other pixels the id of their nucleus (> 0, not necessarily consecutive).
    nucleus_probability
        (S, S) in [0, 1]. Its mean over the mask is the score of the nucleus.
    class_probability
        (K, S, S) of the classes without the background, on any scale that compares them. Each pixel votes for its
        largest class (the first of equal ones), so that no nucleus is without votes. The shares of the votes are the
        class scores, which sum to 1.
    min_area
        Nuclei of fewer pixels are dropped.
    """
    assert instances.shape == nucleus_probability.shape == class_probability.shape[1:]
    area = np.bincount(instances.ravel())
    ids = 1 + np.flatnonzero(area[1:] >= max(min_area, 1))
    index = np.full(len(area), -1)
    index[ids] = np.arange(len(ids))
    index = index[instances]
    inside = index >= 0
    of_pixel, count, classes = index[inside], len(ids), len(class_probability)

    score = np.bincount(of_pixel, nucleus_probability[inside], minlength=count) / area[ids]
    vote = class_probability[:, inside].argmax(0)
    votes = np.bincount(of_pixel * classes + vote, minlength=count * classes).reshape(count, classes)
    places = ndimage.find_objects(index + 1)
    return SegmentedNuclei(
        boxes=np.array([(x.start, y.start, x.stop, y.stop) for y, x in places], np.float32).reshape(-1, 4),
        masks=[index[place] == number for number, place in enumerate(places)],
        nucleus_score=score.astype(np.float32),
        class_scores=(votes / area[ids, None]).astype(np.float32),
    )
