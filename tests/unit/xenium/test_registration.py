"""Registration: planted affines come back, wrong files are caught and named, nothing passes by chance."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import shapely
from PIL import Image
from xenium_scene import EXTENT, PIXEL, SWAP, ellipses, make_scene, planted, wave, write_image

import register_xenium
from celldetr.config.xenium import RegistrationSettings
from celldetr.example.xenium.sample import AffinePlan, write_xenium
from celldetr.report.registration import registration_figure
from celldetr.runtime.errors import InputError
from celldetr.slides.pyramid import Level, Pyramid, open_pyramid
from celldetr.slides.stains import hematoxylin
from celldetr.xenium.registration.affine import affine, apply, decompose, inverse, rotation, scaling
from celldetr.xenium.registration.alignment import Alignment, read_alignment
from celldetr.xenium.registration.estimate import make_maps
from celldetr.xenium.registration.field import DisplacementField
from celldetr.xenium.registration.gate import check
from celldetr.xenium.registration.maps import Grid, colour, sample
from celldetr.xenium.registration.measure import he_nuclei, window_shifts
from celldetr.xenium.registration.messages import Refused, warnings_of
from celldetr.xenium.registration.nuclei import DapiNuclei
from celldetr.xenium.registration.register import register
from celldetr.xenium.registration.result import Registration, read_registration

FOREIGN = DisplacementField(x=-50, y=-50, spacing=50.0, coefficients=np.ones((2, 8, 10)))
SETTINGS = RegistrationSettings(regions=3, window=120)


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    return make_scene(tmp_path_factory.mktemp("scene"), seed=4, angle=25, scale=1.288, shear=0.01, shift=(20, -15))


def run(scene, matrix, **settings):
    chosen = RegistrationSettings(**{"regions": 3, "window": 120, "angle_step": 15, **settings})
    alignment = None if matrix is None else Alignment(matrix, np.empty(0))
    return register(scene.he, scene.dapi, scene.nuclei, PIXEL, alignment, chosen, name="lung", seed=0)


def median_error(matrix, scene):
    """Median distance over the section between where a matrix puts nuclei and where they are, um."""
    points = shapely.get_coordinates(shapely.centroid(scene.nuclei))
    he = apply(inverse(scaling(PIXEL) @ scene.matrix), points)
    return float(np.median(np.linalg.norm(apply(scaling(PIXEL) @ matrix, he) - points, axis=1)))


def moved(scene, shift, degrees):
    """Return a file's matrix that is off by a shift (um) and by a rotation about the middle of the section."""
    middle = EXTENT / 2
    turn = rotation(degrees)
    return scaling(1 / PIXEL) @ affine(turn, middle - turn @ middle + np.array(shift)) @ scaling(PIXEL) @ scene.matrix


class Formula(Pyramid):
    """An image that is computed; remembers the largest region that was asked for."""

    def __init__(self, size, downs, value, channels=3):
        self.path, self.mpp, self.channels = Path("formula"), 0.25, channels
        self.dtype, self.background = np.dtype(np.uint8 if channels == 3 else np.uint16), 255 if channels == 3 else 0
        self.levels = tuple(Level(-(-size[0] // down), -(-size[1] // down), float(down)) for down in downs)
        self.value, self.largest = value, 0

    def _fill(self, level, box, out):
        x0, y0, x1, y1 = box
        self.largest = max(self.largest, (x1 - x0) * (y1 - y0))
        out[...] = self.value

    def close(self):
        pass


def test_hematoxylin_excludes_eosin_and_scanner_fill():
    stains = np.array([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105]])
    stains /= np.linalg.norm(stains, axis=1, keepdims=True)
    amounts = np.array([(0.0, 0.5), (0.3, 0.0), (0.3, 0.5), (0.6, 0.2), (0, 0)])
    pixels = np.round(256 * 10 ** -(amounts @ stains) - 1).clip(0, 255).astype(np.uint8)[None]
    assert hematoxylin(pixels)[0] == pytest.approx(amounts[:, 0], abs=0.02)
    assert hematoxylin(np.zeros((1, 1, 3), np.uint8)).item() == 0


def test_samples_are_averages_at_the_right_position(tmp_path):
    y, x = np.mgrid[:512, :640]
    ramp = (20 * x + 7 * y).astype(np.uint16)
    image = open_pyramid(write_image(tmp_path / "r.tif", ramp, 0.5))
    for spacing in (0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 4.0):  # um; levels have 0.5, 1 and 2 um
        grid = Grid(40.0, 30.0, spacing, 20, 24)
        values = sample(image, grid, scaling(2.0), lambda pixels: pixels.astype(np.float32))
        columns, rows = grid.centres(slice(0, 24), slice(0, 20))
        expected = 20 * (columns * 2 - 0.5) + 7 * (rows * 2 - 0.5)
        # levels that keep every second pixel are off by up to 1.5 px of level 0
        assert np.abs(values - expected).max() < (27 if spacing < 1 else 45), spacing


def test_a_gigapixel_image_is_never_held():
    he = Formula((60_000, 50_000), (1, 2, 4, 8, 16, 32), 200)
    dapi = Formula((70_000, 50_000), (1, 2, 4, 8, 16, 32, 64), 300, channels=1)
    maps = make_maps(he, dapi, 0.25, PIXEL)
    assert max(he.largest, dapi.largest) < 4000**2
    assert max(maps[-1].he.shape) < 4500
    assert maps[0].spacing > maps[-1].spacing
    plain = Formula((100_000, 100_000), (1,), 200)
    sample(plain, Grid(0, 0, 20.0, 30, 30), scaling(4), hematoxylin)
    assert plain.largest < 4000**2
    outside = sample(plain, Grid(-1000, -1000, 1.0, 4, 4), scaling(1), colour)
    assert np.array_equal(outside, np.full((4, 4, 3), 255))


def judge(scene, matrix):
    nuclei = DapiNuclei(scene.nuclei)
    return check(scaling(PIXEL) @ matrix, scene.he, nuclei, nuclei.regions(SETTINGS), SETTINGS)


def test_the_right_matrix_passes_with_all_regions(scene):
    quality = judge(scene, scene.matrix)
    assert quality.passed
    assert quality.regions_passed == quality.inside == 1
    assert quality.distance < 1
    assert quality.chance > 4
    assert quality.contrast > 1
    assert quality.z > 20


@pytest.mark.parametrize("shift", [(5, 0), (-14, 14), (60, 30)])
def test_a_shifted_matrix_fails(scene, shift):
    quality = judge(scene, moved(scene, shift, 0))
    assert not quality.passed
    assert "max_distance" in quality.failures[0]


def test_crowded_nuclei_do_not_pass_by_chance(scene):
    """With nuclei so dense that any place is near one, a wrong matrix has a short distance and fails nevertheless."""
    rng = np.random.default_rng(0)
    crowd = shapely.buffer(shapely.points(rng.random((9_700, 2)) * EXTENT), 3, quad_segs=4)
    quality = judge(scene._replace(nuclei=crowd), moved(scene, (30, 0), 0))
    assert quality.distance < SETTINGS.max_distance
    assert not quality.passed
    assert any("max_chance" in failure for failure in quality.failures)


def test_a_local_failure_is_seen(scene):
    centres = shapely.get_coordinates(shapely.centroid(scene.nuclei))
    right = centres[:, 0] > EXTENT[0] / 2 + 20
    torn = np.where(right, shapely.transform(scene.nuclei, lambda points: points + (8, -6)), scene.nuclei)
    for region in judge(scene._replace(nuclei=torn), scene.matrix).regions:
        if abs(region.x - EXTENT[0] / 2) > 80:
            assert region.passed == (region.x < EXTENT[0] / 2), region


def test_regions_beside_the_image_do_not_count_as_wrong(scene):
    """An H&E that shows a part of the section: the part that it shows is right, and the share inside tells the rest."""
    half = Formula((scene.he.size[0], scene.he.size[1] // 2), (1,), 255)
    half._fill = scene.he._fill
    quality = judge(scene._replace(he=half), scene.matrix)
    assert 0.2 < quality.inside < 0.8
    assert quality.regions_passed == 1
    assert any(not region.passed for region in quality.regions)


def test_a_section_without_nuclei_is_refused(scene):
    with pytest.raises(InputError, match="lung: got 3 nuclei"):
        run(scene._replace(nuclei=scene.nuclei[:3]), None)
    with pytest.raises(InputError, match="of the nuclei inside the DAPI image"):
        run(scene._replace(nuclei=shapely.transform(scene.nuclei, lambda p: p + 1000)), None)


PLANTS = {
    "half turn, unknown scale": {"angle": 180.0, "scale": 1.75, "shift": (10, -10), "known": False},
    "quarter turn": {"angle": -97.0, "scale": 1.3, "shift": (120, -90), "shear": 0.03},
    "mirrored and sheared": {"angle": 37.0, "scale": 1.5, "flip": True, "shear": -0.03},
}


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_affine_is_found_without_a_file(tmp_path, name):
    scene = make_scene(tmp_path, seed=7, **PLANTS[name])
    found = run(scene, None)
    assert found.origin == "estimated"
    assert found.quality_before is None
    assert median_error(found.matrix, scene) < 0.5
    assert found.he_mpp == pytest.approx(decompose(scene.matrix).scale * PIXEL, rel=2e-3)


@pytest.mark.parametrize(("shift", "degrees"), [((-40, 30), -2.0), ((2, -2.5), 0.3)])
def test_a_slightly_wrong_file_is_refined(scene, shift, degrees):
    found = run(scene, moved(scene, shift, degrees))
    assert found.origin == "file, refined"
    assert not found.quality_before.passed
    assert median_error(found.matrix, scene) < 0.5


def test_a_right_file_is_kept_and_refining_is_a_setting(scene):
    assert run(scene, scene.matrix).origin == "file"
    off = moved(scene, (1.2, 1.0), 0)
    assert median_error(run(scene, off, refine="never").matrix, scene) == pytest.approx(np.hypot(1.2, 1.0))
    refined = run(scene, off)
    assert refined.origin == "file, refined"
    assert median_error(refined.matrix, scene) < 0.3
    assert np.array_equal(run(scene, off).matrix, refined.matrix)  # same seed


def test_a_file_that_is_half_good_is_refined(scene):
    """The nuclei come closer by less than 0.2 um, but clearly."""
    off = run(scene, moved(scene, (0.2, -0.2), 0))
    assert off.origin == "file, refined"
    assert off.quality_before.distance - off.quality.distance < 0.2
    assert median_error(off.matrix, scene) < 0.1


@pytest.mark.parametrize(
    ("change", "what"), [(inverse, "the inverse"), (lambda matrix: matrix @ SWAP, "x and y of the H&E swapped")]
)
def test_a_wrong_file_is_caught_named_and_undone(scene, change, what, caplog):
    found = run(scene, change(scene.matrix))
    [warning] = found.warnings  # none of what the wrong matrix would mean
    assert what in warning
    assert warning in caplog.text
    assert warning in drawn(found, scene)
    repaired, refined = found.attempts[-2:]
    assert (found.origin == "file, repaired and refined") == np.array_equal(found.matrix, refined.matrix)
    assert (found.origin == "file, repaired") == np.array_equal(found.matrix, repaired.matrix)
    assert found.attempts[0].name == "file"
    assert not found.quality_before.passed
    assert median_error(found.matrix, scene) < 0.5


def test_a_repaired_file_that_refinement_does_not_improve_is_not_called_refined(scene, monkeypatch):
    monkeypatch.setattr("celldetr.xenium.registration.register._Run.refine", lambda self, to_um: to_um)
    assert run(scene, inverse(scene.matrix), local="never").origin == "file, repaired"


def drawn(found, scene):
    """All texts of the picture of a registration, without line breaks."""
    figure = registration_figure(found, scene.he, scene.nuclei, SETTINGS, name="lung")
    return " ".join(text.get_text().replace("\n", " ") for axes in figure.axes for text in axes.texts)


def test_a_gray_image_in_place_of_the_stained_one_is_named(scene):
    with pytest.raises(InputError, match=r"lung: .*: got an image with one channel, expected colour"):
        register(scene.dapi, scene.dapi, scene.nuclei, PIXEL, None, SETTINGS, name="lung", seed=0)


@pytest.mark.parametrize("number", [8, 4])
def test_a_wrong_keypoint_is_named_in_log_and_picture(scene, caplog, number):
    """Also one of four, whose fit of all does not tell which one it is."""
    moving = np.random.default_rng(1).uniform(0.1, 0.9, (number, 2)) * scene.he.size
    fixed = apply(scene.matrix, moving)
    fixed[2] += 200  # px, 60 um
    path = Path(scene.he.path).with_name("keypoints.csv")
    header = "fixedX,fixedY,alignmentX,alignmentY"
    np.savetxt(path, np.hstack([fixed, moving]), delimiter=",", header=header, comments="")
    chosen = RegistrationSettings(regions=3, window=120, angle_step=15)
    found = register(scene.he, scene.dapi, scene.nuclei, PIXEL, read_alignment(path), chosen, name="lung", seed=0)
    assert median_error(found.matrix, scene) < 0.5
    [warning] = [text for text in found.warnings if "keypoint" in text]
    assert f"1 of {number} keypoints (number 3) lie up to 60 um" in warning
    assert warning in caplog.text
    assert warning in drawn(found, scene)


@pytest.mark.parametrize("case", ["far off", "another sample"])
def test_the_images_decide_if_the_file_cannot_be_refined(scene, case):
    found = run(scene, moved(scene, (-90, 120), 3.0) if case == "far off" else planted(-60, 1.288, (-50, 30))[0])
    assert not found.quality_before.passed
    assert found.origin == "estimated" or case == "far off"
    assert any("does not fit" in text for text in found.warnings) == (found.origin == "estimated")
    assert median_error(found.matrix, scene) < 0.5


def test_images_that_do_not_belong_together_are_refused_in_three_lines(scene, caplog):
    caplog.set_level("INFO")
    stranger = scene._replace(nuclei=ellipses(np.random.default_rng(99)))
    with pytest.raises(Refused) as error:
        run(stranger, scene.matrix, regions=2, window=80, scale_range=(1.28, 1.3))
    best, why, what = str(error.value).split("\n")
    attempts = error.value.best.attempts
    assert f"lung: no registration passes; best of {len(attempts)} attempts" in best
    assert error.value.best.quality.summary() in best
    assert "max_distance" in why
    assert all(word in what for word in (str(scene.he.path), "0.2737 um per px", "he_mpp", "alignment", "use: no"))
    assert {"file", "estimated"} <= {item.name for item in attempts}
    assert all(f"{item.name}: fails; {item.quality.summary()}" in caplog.text for item in attempts)
    assert not error.value.best.quality.passed
    assert "registration FAILS" in drawn(error.value.best, stranger)


def test_a_right_file_wins_over_a_wrong_pixel_size_of_the_image(scene):
    found = run(scene._replace(he=open_pyramid(scene.he.path, 0.5)), scene.matrix, refine="never")
    assert found.origin == "file"
    [warning] = found.warnings  # none on the file, which is right
    assert "got 0.5 um per px, but the matrix means 0.2737: correct he_mpp in the sheet" in warning
    assert warning in drawn(found, scene)


def test_a_smooth_distortion_is_corrected_and_comes_back_from_the_file(tmp_path):
    scene = make_scene(tmp_path, seed=2, angle=12, bend=wave(4, 300))
    found = run(scene, scene.matrix)
    assert found.distortion.kept
    assert found.quality.regions_passed == 1
    points = shapely.get_coordinates(shapely.centroid(scene.nuclei))
    he = apply(inverse(scaling(PIXEL) @ scene.matrix), points + wave(4, 300)(points))
    off = found.he_mpp * np.linalg.norm(apply(found.um_to_he(), found.on_affine(points)) - he, axis=1)
    plain = found.he_mpp * np.linalg.norm(apply(found.um_to_he(), points) - he, axis=1)
    assert np.median(off) < 0.3 < 1 < np.median(plain)
    assert np.percentile(off, 95) < 1
    found.write(tmp_path / "r.json", "lung")
    again = read_registration(tmp_path / "r.json", "lung")
    assert np.array_equal(again.on_affine(points), found.on_affine(points))
    content = json.loads((tmp_path / "r.json").read_text())
    for change in ({"field": None}, {"field": FOREIGN.to_dict()}):
        (tmp_path / "r.json").write_text(json.dumps(content | change))
        with pytest.raises(InputError, match="with the displacement field"):
            read_registration(tmp_path / "r.json", "lung")
    figure = registration_figure(found, scene.he, scene.nuclei, SETTINGS, name="lung")
    assert any("local distortion: corrected" in text.get_text() for text in figure.axes[0].texts)
    labels = [text.get_text() for text in figure.axes[2].get_legend().get_texts()]
    assert labels == ["shifted (chance)", "as registered", "without displacements"]
    assert found.warnings == ()
    farther = found.model_copy(update={"distortion": found.distortion.model_copy(update={"largest": 9.0})})
    [warning] = warnings_of(farther, None, None, scene.he, scene.dapi, SETTINGS)
    assert "displacements of up to 9.0 um" in warning
    without = run(scene, scene.matrix, local="never")
    assert (without.field, without.distortion) == (None, None)


def test_threads_measure_the_same(scene):
    nuclei, to_um = DapiNuclei(scene.nuclei), scaling(PIXEL) @ scene.matrix
    one, three = (window_shifts(to_um, scene.he, scene.dapi, nuclei, PIXEL, workers) for workers in (1, 3))
    assert len(one.score) > 20
    assert np.median(np.linalg.norm(one.shifts, axis=1)) < 0.5
    for name in ("centres", "shifts", "score"):
        assert np.array_equal(getattr(one, name), getattr(three, name))
    blobs, again = (he_nuclei(to_um, scene.he, nuclei, SETTINGS, workers) for workers in (1, 3))
    assert np.array_equal(blobs, again)
    assert np.median(nuclei.tree.query(blobs)[0]) < 0.5


def test_a_distortion_that_hides_the_right_matrix_from_the_gate_is_corrected(tmp_path):
    scene = make_scene(tmp_path, seed=2, angle=12, bend=wave(6, 300))
    with pytest.raises(InputError, match="no registration passes"):
        run(scene, scene.matrix, local="never", max_distance=2)
    assert run(scene, scene.matrix, max_distance=2).field is not None


def test_regions_that_fail_are_known_by_their_area(scene):
    centres = shapely.get_coordinates(shapely.centroid(scene.nuclei))
    right = centres[:, 0] > EXTENT[0] / 2 + 20
    torn = np.where(right, shapely.transform(scene.nuclei, lambda points: points + (8, -6)), scene.nuclei)
    quality = judge(scene._replace(nuclei=torn), scene.matrix)
    found = Registration(matrix=scene.matrix, pixel_size=PIXEL, origin="file", quality=quality)
    assert found.failed(centres)[centres[:, 0] > 0.7 * EXTENT[0]].all()
    assert not found.failed(centres)[centres[:, 0] < 0.3 * EXTENT[0]].any()


def test_a_registration_comes_back_from_its_file(scene, tmp_path):
    found = run(scene, scene.matrix, refine="never")
    found.write(tmp_path / "r.json", "lung")
    again = read_registration(tmp_path / "r.json", "lung")
    assert np.array_equal(again.matrix, found.matrix)
    assert again.to_dict() == found.to_dict()
    assert np.allclose(again.he_to_um() @ again.um_to_he(), np.eye(3))
    point = np.array([[1000.0, 500.0]])
    assert np.allclose(apply(again.he_to_um(), point), apply(again.matrix, point) * PIXEL)


@pytest.fixture(scope="module")
def written(scene):
    return {"sample": "lung", **run(scene, scene.matrix, refine="never").to_dict()}


def turned(content):
    """Another matrix, with the parts that belong to it."""
    found = Registration.model_validate(content)
    return found.model_copy(update={"matrix": found.matrix @ affine(rotation(1.0))}).to_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: {"matrix": [[1, 0, 0], [0, 1, 0]]}, "no readable registration"),
        (lambda content: {"quality": {**content["quality"], "passed": False}}, "that does not pass"),
        (lambda content: {"quality": {**content["quality"], "failures": ["too far"]}}, r"not pass \(too far\)"),
        (lambda content: {"matrix": (SWAP @ content["matrix"]).tolist()}, "whose rotation_degrees is"),
        (lambda content: {"pixel_size": 0.4}, "whose he_mpp is 0.27"),
        (lambda content: {"he_mpp": None}, "whose he_mpp is None"),
        (lambda content: {"quality": {**content["quality"], "regions_passed": 0.5}}, "whose regions_passed is 0.5"),
        (turned, "none of its attempts"),
        (lambda content: {"format": "celldetr registration 1"}, "of format 'celldetr registration 1'"),
        (lambda content: {"field": FOREIGN.to_dict()}, "with the displacement field .* are those of None"),
        (lambda content: {"field": {**FOREIGN.to_dict(), "coefficients": [[[1.0]], [[2.0]]]}}, "no readable reg"),
        (lambda content: {"field": {**FOREIGN.to_dict(), "format": "field 0"}}, "no readable registration"),
        (lambda content: {"sample": "breast"}, "of sample 'breast', expected that of 'lung'"),
    ],
)
def test_a_registration_that_failed_or_contradicts_itself_is_refused(written, tmp_path, change, message):
    (tmp_path / "r.json").write_text(json.dumps(written))
    assert read_registration(tmp_path / "r.json", "lung").matrix.tolist() == written["matrix"]
    (tmp_path / "r.json").write_text(json.dumps(written | change(written)))
    with pytest.raises(InputError, match=rf"r\.json: got .*{message}.*run .* again"):
        read_registration(tmp_path / "r.json", "lung")


def test_the_script_registers_a_xenium_folder_and_draws_the_outlines(tmp_path):
    """Before, it refuses the image of another section: that attempt is drawn beside the outputs until one passes."""
    plan = {"affine": AffinePlan(12.0), "file_error": AffinePlan(0.5, (15.0, -12.0)), "alignment": "keypoints"}
    truth = write_xenium(tmp_path, seed=3, size_um=(300, 260), rim_um=30, **plan)
    other = write_xenium(tmp_path / "other", seed=4, size_um=(300, 260), rim_um=30, alignment=None)
    names = {"json": "r.json", "picture": "r.png", "provenance": "p.json"}
    output = SimpleNamespace(**{key: tmp_path / name for key, name in names.items()})
    refused = tmp_path / "registration_refused.png"

    def script(**changes):
        files = {"outs": truth.outs, "he": truth.he_image, "alignment": [truth.alignment], **changes}
        source = SimpleNamespace(**files, get=files.get)
        settings = {"regions": 3, "window": 120, "scale_range": [1.8, 2.0], "angle_step": 15}
        own = {"he": "my/he.svs", "alignment": "my/points.csv"}
        given = {key: {"path": path, "place": f"row lung of the sheet, column {key}"} for key, path in own.items()}
        params = SimpleNamespace(settings=settings, he_mpp=None, sample="lung", seed=1, given=given)
        register_xenium.main(SimpleNamespace(input=source, params=params, output=output, threads=2))

    wrong = tmp_path / "wrong.csv"
    wrong.write_text("9,0,0\n0,9,0\n0,0,1\n")
    text = f"^lung: no registration passes.*\nWhy: .*; alignment file my/points.csv: scale 9 .*\n.*Look at {refused}"
    with pytest.raises(InputError, match=text):
        script(he=other.he_image, alignment=[wrong])
    assert Image.open(refused).size[0] > 1000
    assert not any((tmp_path / name).exists() for name in names.values())
    script()
    assert not refused.exists()
    found = read_registration(output.json, "lung")
    points = np.concatenate(truth.nuclei_he)
    off = apply(found.he_to_um(), points) - apply(scaling(PIXEL) @ truth.matrix, points)
    assert np.median(np.linalg.norm(off, axis=1)) < 0.5
    assert found.keypoints.number == 12
    assert json.loads(output.provenance.read_text())["seed"] == 1
    picture = np.asarray(Image.open(output.picture).convert("RGB")).astype(int)
    assert (np.abs(picture - (0, 229, 255)).sum(axis=2) < 60).sum() > 500  # px of outlines
