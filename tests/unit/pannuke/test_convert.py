"""Conversion of PanNuke archives: planted truth comes back, what is odd is kept and counted, bad input is named."""

import io
import re
import subprocess
import sys
import zipfile
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage

from celldetr.config.classes import PANNUKE_CLASSES
from celldetr.example.pannuke import write_fold
from celldetr.pannuke.convert import CHANNELS, OFFICIAL, FoldSummary, check_official, convert_fold, nuclei_of
from celldetr.report.pannuke import write_counts, write_html
from celldetr.runtime.errors import InputError
from celldetr.store import open_store

SIZE = 16
NAMES = {
    "images": "Fold 1/images/fold1/images.npy",
    "types": "Fold 1/images/fold1/types.npy",
    "masks": "Fold 1/masks/fold1/masks.npy",
}


def arrays(count=3):
    """Return a small valid fold: one nucleus of id 7 and class i in image i, and its background."""
    masks = np.zeros((count, SIZE, SIZE, CHANNELS))
    for i in range(count):
        masks[i, 2:5, 3:7, i % 5] = 7
    masks[..., -1] = masks[..., :-1].max(axis=-1) == 0
    images = np.random.default_rng(0).integers(0, 256, (count, SIZE, SIZE, 3)).astype(float)
    return {"images": images, "types": np.array(["Breast"] * count), "masks": masks}


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def write(path, contents, extra=()):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for key, value in contents.items():
            archive.writestr(NAMES.get(key, key), value if isinstance(value, bytes) else npy(value))
        for name in extra:
            archive.writestr(name, b"text")
    return path


def convert(tmp_path, contents, extra=(), **options):
    path = write(tmp_path / "fold_1.zip", contents, extra)
    summary = convert_fold(path, tmp_path / "fold1.zarr", fold=1, patch_size=SIZE, **options)
    return summary, open_store(tmp_path / "fold1.zarr")


def instances_by_pixel(mask):
    """Instance map of an image, pixel after pixel, and its counts of lost pixels and hidden nuclei."""
    nuclei = [(c, number) for c in range(5) for number in sorted(set(mask[..., c].ravel()) - {0})]
    area = [(mask[..., c] == number).sum() for c, number in nuclei]
    found, lost = np.zeros(mask.shape[:2], int), 0
    for place in zip(*mask[..., :5].any(axis=-1).nonzero(), strict=True):
        claims = [k for k, (c, number) in enumerate(nuclei) if mask[(*place, c)] == number]
        found[place] = min(claims, key=lambda k: (area[k], -k)) + 1
        lost += len(claims) - 1
    return found, {"lost pixels": lost, "hidden nuclei": len(nuclei) - len(set(found.ravel()) - {0})}


def brute_force(mask):
    """(x0, y0, x1, y1, channel) of each nucleus of an image, and counts of what is odd, one id after the other."""
    found, odd = [], Counter()
    for channel in range(5):
        for number in sorted(set(mask[..., channel].ravel()) - {0}):
            nucleus = mask[..., channel] == number
            rows, columns = np.nonzero(nucleus)
            found.append((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1, channel))
            odd["split nuclei"] += ndimage.label(nucleus, np.ones((3, 3)))[1] > 1
            odd["one-pixel nuclei"] += rows.size == 1
    claims = (mask[..., :5] > 0).sum(axis=-1)
    odd["empty images"] = not found
    odd["overlap pixels"] = (claims > 1).sum()
    odd["void pixels"] = ((claims == 0) & (mask[..., 5] == 0)).sum()
    return np.array(found).reshape(-1, 5), odd


def test_a_drawn_fold_is_read_as_id_after_id_would_be(tmp_path):
    write_fold(tmp_path / "fold_2.zip", 2, 24, 64, seed=5, mpp=0.5)
    summary = convert_fold(tmp_path / "fold_2.zip", tmp_path / "fold2.zarr", fold=2, patch_size=64, mpp=0.5)
    store = open_store(tmp_path / "fold2.zarr")
    with zipfile.ZipFile(tmp_path / "fold_2.zip") as archive:
        types, masks = (np.load(io.BytesIO(archive.read(NAMES[key].replace("1", "2")))) for key in ("types", "masks"))
    assert store.patches["tissue"].tolist() == types.tolist()
    labels, counted = [], Counter()
    for index, mask in enumerate(masks):
        nuclei, odd = brute_force(mask)
        assert np.array_equal(np.column_stack(store.boxes_of(index)), nuclei)
        instances, lost = instances_by_pixel(mask)
        assert np.array_equal(store.instances([index])[0], instances)
        odd.update(lost)
        labels += nuclei[:, 4].tolist()
        counted.update(odd)
    assert counted == {name: summary.odd[name] for name in counted}
    assert min(counted[name] for name in counted if name != "hidden nuclei") > 0
    assert store.attrs["nuclei_without_pixels"] == counted["hidden nuclei"]
    assert summary.nuclei == {name: labels.count(index) for index, name in enumerate(PANNUKE_CLASSES)}
    assert store.attrs["odd"] == summary.odd


def test_boxes_are_half_open_and_centroids_are_means_of_pixel_centres(tmp_path):
    _, store = convert(tmp_path, arrays())
    assert store.boxes.tolist() == [[3, 2, 7, 5]] * 3
    assert store.labels.tolist() == [0, 1, 2]
    assert store.centroids.tolist() == [[5, 3.5]] * 3


def test_one_pixel_pieces_overlaps_and_borders():
    masks = np.zeros((SIZE, SIZE, CHANNELS), np.int32)
    masks[0, 0, 0] = 3  # one pixel in the corner
    masks[15, 15, 1] = 3  # the same id in another class is another nucleus
    masks[4, 4, 2] = masks[9, 12, 2] = 1  # two pieces of one nucleus
    masks[4, 4, 4] = 900  # overlap
    found = nuclei_of(masks)
    assert found.labels.tolist() == [0, 1, 2, 4]
    assert found.boxes.tolist() == [[0, 0, 1, 1], [15, 15, 16, 16], [4, 4, 13, 10], [4, 4, 5, 5]]
    assert found.centroids[0].tolist() == [0.5, 0.5]
    assert found.odd["split nuclei"] == 1
    assert found.odd["one-pixel nuclei"] == 3
    assert found.odd["overlap pixels"] == 1
    assert found.odd["void pixels"] == SIZE * SIZE - 4


@settings(max_examples=60, deadline=None)
@given(masks=hnp.arrays(np.int8, (6, 6, CHANNELS), elements=st.integers(0, 2)))
def test_a_pixel_claimed_twice_goes_to_the_smaller_nucleus(masks):
    found = nuclei_of(masks)
    instances, lost = instances_by_pixel(masks)
    assert np.array_equal(found.instances, instances)
    assert {name: found.odd.get(name, 0) for name in lost} == lost


def test_a_nucleus_below_others_keeps_its_box_and_is_counted(tmp_path):
    fold = arrays(1)
    fold["masks"][0, 2:5, 3:7, 3] = 1  # as large as the nucleus of class 0, and later
    fold["masks"][0, 4:6, 3:5, 4] = 900
    summary, store = convert(tmp_path, fold)
    assert store.boxes.tolist() == [[3, 2, 7, 5], [3, 2, 7, 5], [3, 4, 5, 6]]
    instances = np.zeros((SIZE, SIZE), int)
    instances[2:5, 3:7] = 2
    instances[4:6, 3:5] = 3
    assert np.array_equal(store.instances([0])[0], instances)
    assert [summary.odd[name] for name in ("overlap pixels", "lost pixels", "hidden nuclei")] == [12, 14, 1]
    assert store.attrs["nuclei_without_pixels"] == 1


@pytest.mark.parametrize("dtype", ["uint8", "int64", ">f8"])
def test_any_integer_valued_type(tmp_path, dtype):
    contents = {**arrays(), "masks": arrays()["masks"].astype(dtype), "images": arrays()["images"].astype(dtype)}
    _, store = convert(tmp_path, contents)
    assert store.boxes.tolist() == [[3, 2, 7, 5]] * 3
    assert np.array_equal(store.images(range(3)), arrays()["images"])


def test_empty_images_and_an_empty_fold(tmp_path):
    contents = arrays()
    contents["masks"][:] = 0
    summary, store = convert(tmp_path, contents)
    assert summary.odd["empty images"] == 3
    assert len(store.boxes) == 0
    assert not store.instances(range(3)).any()
    _, store = convert(tmp_path, {key: value[:0] for key, value in arrays().items()})
    assert store.n_patches == 0


def test_text_files_beside_the_arrays_are_ignored(tmp_path):
    convert(tmp_path, arrays(), extra=["Fold 1/README.md", "Fold 1/masks/by-nc-sa.md", "__MACOSX/._masks.npy"])


def broken(key, change):
    contents = arrays()
    contents[key] = change(contents[key])
    return contents


def class_maps(masks):
    masks[:, 9:12, 9:12] = masks[:, 2:5, 3:6]
    return masks


def header(dtype, count):
    """Bytes of an array without its data."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": dtype, "fortran_order": False, "shape": (count,)})
    return buffer.getvalue()


BAD = {
    "no masks": (lambda: {k: v for k, v in arrays().items() if k != "masks"}, "missing: .*masks.npy"),
    "more arrays": (lambda: {**arrays(), "Fold 1/more.npy": np.zeros(1)}, "not expected: .*more.npy"),
    "channels": (lambda: broken("masks", lambda a: a[..., :5]), r"masks.npy: got shape \(3, 16, 16, 5\)"),
    "size": (lambda: broken("images", lambda a: a[:, :8]), r"images.npy: got shape \(3, 8, 16, 3\)"),
    "lengths": (lambda: broken("masks", lambda a: a[:2]), "masks.npy: got 2 masks, expected 3"),
    "tissues": (lambda: broken("types", lambda a: a[:2]), "types.npy: got 2 tissues, expected 3"),
    "tissue type": (lambda: broken("types", lambda a: np.arange(3)), "types.npy: got int64"),
    "above 255": (lambda: broken("images", lambda a: a + 300), "images.npy, image 0: got values"),
    "fractions": (lambda: broken("images", lambda a: a + 0.5), "expected whole numbers 0 to 255"),
    "negative id": (lambda: broken("masks", lambda a: -a), "masks.npy, image 0: got the id -7"),
    "text masks": (lambda: broken("masks", lambda a: a.astype(str)), "masks.npy: got <U"),
    "pickle": (lambda: broken("types", lambda a: a.astype(object)), "types.npy: got Python objects.*astype"),
    "fortran": (lambda: broken("masks", np.asfortranarray), "masks.npy: got Fortran order"),
    "no header": (lambda: broken("masks", lambda a: b"nothing"), "masks.npy: cannot be read as an array"),
    "background first": (lambda: broken("masks", lambda a: np.roll(a, 1, axis=-1)), "in 3 of 3 images an id covers"),
    "class maps": (lambda: broken("masks", class_maps), "3 of 3 ids lie in several pieces: they look like maps of"),
    "long texts": (lambda: broken("types", lambda a: header("<U99999999", 3)), "types.npy: got <U99999999 .* 1144 MiB"),
    "many texts": (lambda: broken("types", lambda a: header("<U4", 1 << 40)), "types.npy: got <U4 .*at most 256 MiB"),
    "long header": (lambda: broken("types", lambda a: b"\x93NUMPY\2\0" + b"\xff" * 4), "a header of 4294967295 bytes"),
    "ends early": (lambda: broken("masks", lambda a: npy(a)[:-100]), "masks.npy: the data ends early"),
    "too long": (lambda: broken("masks", lambda a: npy(a) + b"x"), "masks.npy: more data than its header says"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_archives_are_refused_with_the_member(tmp_path, name):
    contents, message = BAD[name]
    with pytest.raises(InputError, match=message):
        convert(tmp_path, contents())
    assert not (tmp_path / "fold1.zarr").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["fold_1.zip"]


def test_archive_of_another_fold_is_named(tmp_path):
    path = write(tmp_path / "fold.zip", arrays())
    with pytest.raises(InputError, match="it looks like the archive of fold 1"):
        convert_fold(path, tmp_path / "x.zarr", fold=2, patch_size=SIZE)


def test_damaged_bytes_are_noticed(tmp_path):
    path = write(tmp_path / "fold_1.zip", arrays())
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(NAMES["images"])
    data = bytearray(path.read_bytes())
    middle = info.header_offset + info.compress_size // 2
    data[middle : middle + 20] = bytes(20)
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"images\.npy"):
        convert_fold(path, tmp_path / "x.zarr", fold=1, patch_size=SIZE)


@pytest.mark.parametrize("data", [b"", b"not a zip", None])
def test_no_archive(tmp_path, data):
    path = write(tmp_path / "fold_1.zip", arrays())
    path.write_bytes(path.read_bytes()[:-40] if data is None else data)
    with pytest.raises(InputError, match="cannot be read as a zip archive"):
        convert_fold(path, tmp_path / "x.zarr", fold=1, patch_size=SIZE)


def test_counts_of_official_archives_are_enforced(tmp_path):
    sha256 = next(iter(OFFICIAL)) + "0" * 32
    with pytest.raises(InputError, match=r"official PanNuke archive 6e19ad380300: got \{'images': 3,"):
        convert(tmp_path, arrays(), sha256=sha256)
    assert not (tmp_path / "fold1.zarr").exists()


def test_official_counts_add_up_to_the_published_total_and_pass():
    assert sum(sum(classes) for _, classes, _, _ in OFFICIAL.values()) == 189_744
    for sha256, (images, classes, empty, most) in OFFICIAL.items():
        summary = FoldSummary(images=images, most=most, nuclei=dict(zip(PANNUKE_CLASSES, classes, strict=True)))
        summary.odd["empty images"] = empty
        check_official(summary, sha256)


def test_summary_for_people(tmp_path):
    write_fold(tmp_path / "fold_1.zip", 1, 12, 64, seed=2, mpp=0.5)
    summary = convert_fold(tmp_path / "fold_1.zip", tmp_path / "f.zarr", fold=1, patch_size=64)
    write_counts(tmp_path / "s.tsv", summary)
    write_html(tmp_path / "s.html", summary, open_store(tmp_path / "f.zarr"), "PanNuke fold 1")
    lines = dict(line.split("\t")[1:3] for line in (tmp_path / "s.tsv").read_text().splitlines()[1:])
    assert int(lines["nuclei"]) == sum(summary.nuclei.values()) > 0
    html = (tmp_path / "s.html").read_text()
    assert len(re.findall("data:image/jpeg;base64,", html)) >= 6
    assert "images without a nucleus (kept)" in html


def test_masks_that_do_not_lie_on_the_nuclei_of_their_images_are_refused(tmp_path):
    fold = arrays(24)
    places = np.random.default_rng(0).integers(0, SIZE - 4, (24, 2))
    fold["images"][:], fold["masks"][:] = 200, np.eye(CHANNELS)[-1]
    for image, mask, (x, y) in zip(fold["images"], fold["masks"], places, strict=True):
        image[y : y + 4, x : x + 4, 0] = 100
        image[12 - y : 16 - y, x : x + 4, 0] = 250
        mask[y : y + 4, x : x + 4] = np.eye(CHANNELS)[1]
    summary, _ = convert(tmp_path, fold)
    assert summary.nuclei["inflammatory"] == 24
    turned = fold | {"masks": fold["masks"][:, ::-1]}
    with pytest.raises(InputError, match=r"masks.npy: in \d+ of 24 images the nuclei are paler.*same order"):
        convert(tmp_path, turned)
    few = {name: array[:5] for name, array in turned.items()}
    assert convert(tmp_path, few)[0].odd["pale nuclei"] > 2  # too few to judge


def test_memory_does_not_grow_with_the_fold(tmp_path):
    """A fold whose arrays would take 280 MB is converted within 180 MB more than an empty process needs."""
    code = (
        "import sys, resource; from celldetr.pannuke.convert import convert_fold\n"
        "base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "convert_fold(sys.argv[1], sys.argv[2], fold=1, patch_size=256)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base)"
    )
    image = np.zeros((256, 256, 3))
    masks = np.zeros((256, 256, CHANNELS))
    masks[10:20, 10:20, 0] = 1
    with zipfile.ZipFile(tmp_path / "f.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, item in ((NAMES["images"], image), (NAMES["masks"], masks)):
            with archive.open(name, "w", force_zip64=True) as stream:
                header = {"descr": "<f8", "fortran_order": False, "shape": (60, *item.shape)}
                np.lib.format.write_array_header_1_0(stream, header)
                for _ in range(60):
                    stream.write(item.tobytes())
        archive.writestr(NAMES["types"], npy(np.array(["Breast"] * 60)))
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "f.zip", tmp_path / "x.zarr"],
        capture_output=True,
        text=True,
        check=True,
    )
    unit = 1024 if sys.platform != "darwin" else 1
    assert int(done.stdout) * unit < 180e6
