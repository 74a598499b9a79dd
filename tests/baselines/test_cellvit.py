"""CellViT: the published sizes, losses, encoders and their weights, and the way from maps to nuclei."""

import argparse

import numpy as np
import pytest
import torch

from celldetr.config.segmentation import SegmentationSettings, SystemSettings
from celldetr.runtime.errors import InputError
from celldetr.segmentation.cellvit import CellViT, nuclei_of_maps
from celldetr.segmentation.cellvit_losses import cellvit_losses
from celldetr.segmentation.cellvit_network import Maps
from celldetr.segmentation.hover import hover_maps
from celldetr.segmentation.system import Truth

SYSTEMS = ["cellvit_256", "cellvit_sam_b"]
ROWS, COLUMNS = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
NUCLEI = [(14, 14, 2), (14, 31, 0), (44, 20, 1), (40, 48, 2)]  # y, x, class; the first two touch


def cellvit(system="cellvit_256", size="small", classes=3, tissues=4, **settings):
    torch.manual_seed(0)
    segmentation = SegmentationSettings(system=system, size=size, **settings)
    names = (tuple(f"{kind}{number}" for number in range(count)) for kind, count in (("c", classes), ("t", tissues)))
    return CellViT(SystemSettings(segmentation=segmentation, **dict(zip(("classes", "tissues"), names, strict=True))))


@pytest.fixture
def truth():
    """Two images of 64 px: one with discs of radius 8, one without nuclei."""
    instances = torch.zeros(2, 64, 64, dtype=torch.int64)
    for number, (y, x, _) in enumerate(NUCLEI, 1):
        instances[0][(ROWS - y) ** 2 + (COLUMNS - x) ** 2 <= 72] = number
    labels = torch.tensor([[label for *_, label in NUCLEI], [-1] * len(NUCLEI)])
    return Truth(instances, labels, torch.tensor([2, -1]))


def exact_maps(truth, classes=3, certainty=12.0):
    def logits(wanted, count):
        return certainty * torch.nn.functional.one_hot(wanted, count).movedim(-1, 1).float()

    tissues = certainty * torch.eye(4)[truth.tissues.clamp(min=0)]
    nuclei = logits((truth.instances > 0).long(), 2)
    return Maps(nuclei, hover_maps(truth.instances), logits(truth.classes, 1 + classes), tissues)


def images_of(truth):
    return torch.rand(len(truth.instances), 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("system", "published"), [("cellvit_256", 46_750_349), ("cellvit_sam_b", 146_094_557)])
def test_full_size_has_the_published_number_of_parameters(system, published):
    with torch.device("meta"):
        model = cellvit(system, "paper", classes=5, tissues=19)
    assert sum(parameter.numel() for parameter in model.parameters()) == published


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("shape", [(64, 64), (48, 80)])
def test_maps_have_the_size_of_the_image(system, shape):
    maps = cellvit(system).eval().maps(torch.rand(2, 3, *shape))
    assert [tuple(values.shape) for values in maps] == [(2, 2, *shape), (2, 2, *shape), (2, 4, *shape), (2, 4)]


@pytest.mark.parametrize(("system", "side"), [("cellvit_256", 72), ("cellvit_sam_b", 72), ("cellvit_sam_b", 1040)])
def test_other_sizes_are_refused(system, side):
    with pytest.raises(InputError, match=rf"got images of \({side}, 16\) px, expected"):
        cellvit(system).maps(torch.rand(1, 3, side, 16))


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
def test_training_lowers_all_losses(system, truth, autocast):
    model, images = cellvit(system).train(), images_of(truth)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    history = []
    for _ in range(12):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            losses = model.losses(images, truth)
        total = sum(losses.values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        history.append(torch.stack([*losses.values()]).detach())
        assert history[-1].dtype == torch.float32
        assert history[-1].isfinite().all()
    assert (history[-1] < history[0]).all(), dict(zip(losses, zip(*history, strict=True), strict=True))


@pytest.mark.parametrize("system", SYSTEMS)
def test_all_weights_have_gradients_and_a_frozen_encoder_none(system, truth):
    model = cellvit(system, tissues=0).train()
    unknown = truth._replace(tissues=torch.tensor([-1, -1]))
    encoder = model.get_submodule(model.encoder)
    for frozen in (False, True):
        encoder.requires_grad_(not frozen)
        model.zero_grad()
        sum(model.losses(images_of(truth), unknown).values()).backward()
        names = {name for name, parameter in model.named_parameters() if parameter.grad is None}
        assert names == {f"{model.encoder}.{name}" for name, _ in encoder.named_parameters() if frozen}


def test_losses_are_those_of_a_direct_count(truth):
    generator = torch.Generator().manual_seed(3)
    maps = Maps(*(torch.randn(values.shape, generator=generator) for values in exact_maps(truth)))
    p, q = (values.double().softmax(1).numpy() for values in (maps.nuclei, maps.classes))
    inside = truth.instances.numpy() > 0
    wanted = np.eye(4)[truth.classes.numpy()].transpose(0, 3, 1, 2)
    over = (0, 2, 3)

    def dice(found, target):
        overlap = (found * target).sum(over)
        return (1 - (2 * overlap + 1e-3) / (found.sum(over) + target.sum(over) + 1e-3)).sum()

    again = (np.exp(values) / np.exp(values).sum(1, keepdims=True) for values in (p, q))
    p_again, q_again = again
    hit, missed, added = (
        (a * b).sum(over) for a, b in ((q_again, wanted), (1 - q_again, wanted), (q_again, 1 - wanted))
    )
    expected = {
        "nucleus_tversky": (1 - np.where(inside, p_again[:, 1], p_again[:, 0]).mean()) ** (4 / 3),
        "nucleus_dice": dice(p, np.stack([~inside, inside], 1)),
        "hover": 2.5 * ((maps.hover - hover_maps(truth.instances)).numpy() ** 2).mean(),
        "class_entropy": -0.5 * np.log((q * wanted).sum(1)).mean(),
        "class_dice": 0.2 * dice(q, wanted),
        "class_tversky": 0.5 * ((1 - hit / (hit + 0.7 * missed + 0.3 * added)) ** (4 / 3)).sum(),
        "tissue": -0.1 * maps.tissues.double().log_softmax(1)[0, 2],
    }
    losses = cellvit_losses(maps, truth)
    for name, value in expected.items():
        assert float(losses.pop(name)) == pytest.approx(float(value), rel=1e-4), name
    assert [*losses] == ["hover_gradient"]


@pytest.mark.parametrize(
    ("loss", "change"),
    {
        "nucleus_dice": lambda maps: maps._replace(nuclei=maps.nuclei.flip(1)),
        "nucleus_tversky": lambda maps: maps._replace(nuclei=maps.nuclei.roll(4, 3)),
        "hover": lambda maps: maps._replace(hover=maps.hover.flip(1)),
        "hover_gradient": lambda maps: maps._replace(hover=-maps.hover),
        "class_entropy": lambda maps: maps._replace(classes=maps.classes.roll(1, 1)),
        "class_dice": lambda maps: maps._replace(classes=maps.classes.roll(4, 2)),
        "class_tversky": lambda maps: maps._replace(classes=maps.classes[:, [0, 2, 1, 3]]),
        "tissue": lambda maps: maps._replace(tissues=maps.tissues.flip(1)),
    }.items(),
)
def test_swapped_and_shifted_maps_cost(truth, loss, change):
    exact = exact_maps(truth)
    assert cellvit_losses(change(exact), truth)[loss] > cellvit_losses(exact, truth)[loss] + 0.01


def test_losses_do_not_depend_on_autocast(truth):
    maps = exact_maps(truth, certainty=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        inside = cellvit_losses(maps, truth)
    assert inside == cellvit_losses(maps, truth)


def test_exact_maps_give_the_planted_nuclei_back(truth):
    nuclei, nothing = nuclei_of_maps(exact_maps(truth), cellvit(min_area=10).settings)
    found = {}
    for box, mask, scores in zip(nuclei.boxes.astype(int), nuclei.masks, nuclei.class_scores, strict=True):
        painted = np.zeros((64, 64), dtype=bool)
        painted[box[1] : box[3], box[0] : box[2]] = mask
        planted = truth.instances[0].numpy()
        number = np.bincount(planted[painted]).argmax()
        found[number] = scores.argmax()
        assert (painted & (planted == number)).sum() / (painted | (planted == number)).sum() > 0.9
    assert found == {number: label for number, (*_, label) in enumerate(NUCLEI, 1)}
    assert nuclei.nucleus_score == pytest.approx(1, abs=1e-3)
    assert not len(nothing.boxes)


def test_segment_keeps_to_the_smallest_area(truth):
    for min_area, left in ((0, 4), (10_000, 0)):
        model = cellvit(min_area=min_area).eval()
        model.maps = lambda _: exact_maps(truth)
        assert len(model.segment(images_of(truth))[0].boxes) == left


@pytest.mark.parametrize("system", SYSTEMS)
def test_an_image_has_the_same_maps_alone_and_in_a_batch(system, truth):
    model, images = cellvit(system).eval(), images_of(truth)
    with torch.no_grad():
        together, alone = model.maps(images), model.maps(images[1:])
    for both, one in zip(together, alone, strict=True):
        assert both[1:].allclose(one, atol=1e-4)


def test_sam_sees_an_image_as_the_corner_of_a_larger_one():
    model = cellvit("cellvit_sam_b").eval()
    positions = model.network.encoder.vit.pos_embed.data
    assert positions.shape[1:3] == (64, 64)
    positions[:, 4:] = positions[:, :, 4:] = torch.nan
    assert all(values.isfinite().all() for values in model.maps(torch.rand(1, 3, 64, 64)))
    assert model.maps(torch.rand(1, 3, 64, 80)).nuclei.isnan().any()


# Files of the published layouts, of the small encoders


def published_names(system, blocks):
    """Names of the weights as the authors of the encoder write them, without prefixes."""
    sam = system == "cellvit_sam_b"
    of_block = [
        "norm1",
        "attn.qkv",
        "attn.proj",
        "norm2",
        *(["mlp.lin1", "mlp.lin2"] if sam else ["mlp.fc1", "mlp.fc2"]),
    ]
    names = [f"blocks.{n}.{layer}.{part}" for n in range(blocks) for layer in of_block for part in ("weight", "bias")]
    names += ["pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"]
    if not sam:
        return {*names, "cls_token", "norm.weight", "norm.bias"}
    neck = ["neck.0.weight", "neck.1.weight", "neck.1.bias", "neck.2.weight", "neck.3.weight", "neck.3.bias"]
    return {*names, *neck, *(f"blocks.{n}.attn.rel_pos_{axis}" for n in range(blocks) for axis in "hw")}


def authors_name(system, name):
    return name.replace("mlp.fc", "mlp.lin") if system == "cellvit_sam_b" else name


def own_weights(model):
    return model.network.encoder.vit.state_dict()


def encoder_weights(system):
    weights = own_weights(cellvit(system))
    return {authors_name(system, name): torch.rand(tensor.shape) for name, tensor in weights.items()}


def hipt_file(path, weights):
    """Write what DINO saves: two networks with their heads, the optimiser, the command line."""
    head = {"head.mlp.0.weight": torch.rand(8, 96), "head.last_layer.weight_g": torch.rand(8, 1)}
    teacher = {f"backbone.{name}": tensor for name, tensor in weights.items()}
    student = {f"module.{name}": torch.zeros_like(tensor) for name, tensor in (teacher | head).items()}
    moments = {0: {"step": 4, "exp_avg": torch.rand(3), "exp_avg_sq": torch.rand(3)}}
    content = {
        "student": student,
        "teacher": teacher | head,
        "optimizer": {
            "state": moments,
            "param_groups": [{"lr": np.float64(5e-4), "betas": (0.9, 0.999), "params": [0]}],
        },
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_small", global_crops_scale=(0.4, 1.0), output_dir="."),
        "dino_loss": {"center": torch.rand(1, 8)},
        "fp16_scaler": {"scale": 65536.0, "growth_factor": 2.0},
    }
    torch.save(content, path)
    return path


def sam_file(path, weights):
    others = {
        "prompt_encoder.no_mask_embed.weight": torch.rand(1, 4),
        "mask_decoder.iou_token.weight": torch.rand(1, 4),
    }
    torch.save({f"image_encoder.{name}": tensor for name, tensor in weights.items()} | others, path)
    return path


def published_file(system, path, weights):
    return (sam_file if system == "cellvit_sam_b" else hipt_file)(path, weights)


@pytest.mark.parametrize("system", SYSTEMS)
def test_full_size_has_the_tensors_of_the_published_encoder(system):
    with torch.device("meta"):
        model = cellvit(system, "paper")
    shapes = {authors_name(system, name): tuple(tensor.shape) for name, tensor in own_weights(model).items()}
    assert set(shapes) == published_names(system, 12)
    if "sam" in system:
        assert shapes["pos_embed"] == (1, 64, 64, 768)
        sides = [shapes[f"blocks.{n}.attn.rel_pos_h"] for n in range(12)]
        assert sides == [(27, 64), (27, 64), (127, 64)] * 4
    else:
        assert shapes["pos_embed"] == (1, 197, 384)


@pytest.mark.parametrize("system", SYSTEMS)
def test_pretrained_weights_are_those_of_the_file(system, tmp_path):
    weights = encoder_weights(system)
    model = cellvit(system)
    random = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kept = model.load_pretrained(published_file(system, tmp_path / "encoder.pth", weights))
    prefix = f"{model.encoder}.vit."
    for name, tensor in model.state_dict().items():
        own = authors_name(system, name.removeprefix(prefix))
        expected = random[name] if name in kept else weights[own]
        assert torch.equal(tensor, expected), name
    assert set(kept) == {name for name in random if not name.startswith(prefix)}


RESNET = {"conv1.weight": torch.rand(2, 3, 7, 7), "layer1.0.bn1.bias": torch.rand(2)}


@pytest.mark.parametrize(("system", "other"), [SYSTEMS, SYSTEMS[::-1]])
def test_files_of_other_networks_are_refused(system, other, tmp_path):
    files = [published_file(other, tmp_path / "other.pth", encoder_weights(other)), tmp_path / "resnet.pth"]
    torch.save(RESNET, files[1])
    for path, got in zip(
        files, ["teacher" if other == "cellvit_256" else "image_encoder", "conv1.weight"], strict=True
    ):
        expected = r"vit256_small_dino.pth" if system == "cellvit_256" else r"sam_vit_b_01ec64.pth"
        with pytest.raises(InputError, match=rf"{path.name}: got keys .*{got}.*, expected {expected} .* for {system}"):
            cellvit(system).load_pretrained(path)


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("blocks.1.norm1.bias"), r"blocks.1.norm1.bias: missing, expected \(96,\)"),
        (lambda weights: weights.update({"blocks.4.norm1.bias": torch.rand(96)}), "blocks.4.norm1.bias: not in this"),
        (lambda weights: weights.update(pos_embed=torch.rand(1, 257, 96)), r"pos_embed: got \(1, 257, 96\), expected"),
        (lambda weights: weights["pos_embed"].fill_(torch.nan), "pos_embed: holds values that are not finite"),
    ],
    ids=["missing", "deeper", "other size", "not finite"],
)
def test_encoders_that_differ_are_refused_and_change_nothing(system, change, message, tmp_path):
    weights = encoder_weights(system)
    change(weights)
    model = cellvit(system)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError, match=message):
        model.load_pretrained(published_file(system, tmp_path / "encoder.pth", weights))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
