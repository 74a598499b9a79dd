"""Outlines that do not fit their slide are found, and what would make them fit; those that fit are taken."""

import re
from pathlib import Path

import numpy as np
import pytest
import shapely
from slide_files import drawn_slide

from celldetr.slides.boxes import SlideNuclei
from celldetr.slides.outline_check import OutlineCheck, require_fit

MPP = 0.4
OFFSET = (300, 170)


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    """Draw a slide with a stroke of blue pen: its image, and 589 outlines in px of level 0."""
    with drawn_slide(tmp_path_factory.mktemp("slide"), MPP) as found:
        yield found


def test_outlines_that_fit_are_taken(slide):
    image, outlines = slide
    for some in (outlines, outlines[:20]):
        fit = OutlineCheck(image, some, MPP).measure()
        assert fit.good
        assert max(map(abs, fit.shift)) <= 0.5
    boxes = shapely.box(*shapely.bounds(outlines).T)  # as a detector finds them
    assert OutlineCheck(image, boxes, MPP).measure().good


@pytest.mark.parametrize(
    ("fault", "remedies"),
    [
        (lambda xy: xy * 0.5, r"multiplied by about (1\.99|2).*"),
        (lambda xy: xy * 0.91, r"multiplied by about 1\.(09[789]|1).*"),
        (lambda xy: xy * MPP, r"multiplied by about 2\.(49|5).*px of (0\.99\d|1) um"),  # um given as px
        (lambda xy: xy + [64, 0], "moved by -64, 0 px of level 0"),
        (lambda xy: xy + [900, -700], r"moved by -9\d\d, [67]\d\d px of level 0"),
        (lambda xy: xy[:, ::-1], "with x and y swapped"),
        (lambda xy: xy * [1, -1], "with y negated"),
        (lambda xy: xy - OFFSET, r"moved by 300, 170 px of level 0 \(openslide.bounds-x.*"),
        (lambda xy: [0, 1225] + xy * [1, -1], "with y counted from the bottom"),
        (lambda xy: [1450, 0] + xy * [-1, 1], ""),  # left and right swapped
    ],
    ids=["half", "0.91", "um", "shifted", "far", "swapped", "negated", "QuPath", "upside down", "mirrored"],
)
def test_outlines_that_do_not_fit_are_refused_and_the_remedy_named(slide, monkeypatch, fault, remedies):
    image, outlines = slide
    monkeypatch.setattr(image, "origin", OFFSET)
    check = OutlineCheck(image, shapely.transform(outlines, fault), MPP)
    fit = check.measure()
    assert fit.judged == (fit.nuclei > 0)  # negated ones lie off the slide
    assert not fit.good
    assert re.fullmatch(remedies, " or ".join(check.remedies(MPP)))


def test_few_outlines_that_do_not_fit_are_not_judged(slide):
    image, outlines = slide
    for some in (outlines[:20], outlines[:0]):
        fit = OutlineCheck(image, shapely.transform(some, lambda xy: xy[:, ::-1]), MPP).measure()
        assert not fit.judged
        assert fit.nuclei == len(some)


def test_parts_that_do_not_fit_are_named_although_all_together_do(slide, caplog):
    image, outlines = slide
    moved = outlines.copy()
    half = len(outlines) // 2
    for some, shift, expected in ((slice(0), 0, ""), (slice(half, None), 30, r"-12, \S+ um away")):
        moved[some] = shapely.transform(outlines[some], lambda xy, shift=shift: xy + [shift, 0])
        nuclei = SlideNuclei(moved, np.zeros(len(moved), np.int8))
        caplog.clear()
        require_fit(image, nuclei, MPP, name="s", file=Path("f"), unit="px")
        assert re.search(rf"{len(outlines)} of those that are given.* do not fit.*{expected}", caplog.text) or not shift
        assert bool(caplog.text) == bool(shift)
