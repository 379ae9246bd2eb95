"""The three model.py: networks, losses, occlusion maps, windows of volumes."""

import copy
import math
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.transforms.functional import gaussian_blur

from classification import model as xrays
from detection import model as boxes
from segmentation import model as volumes
from segmentation.model import default_patch, plan_stages, predict_volume, window_weights

CPU = torch.device("cpu")


def meta(size: int, classes: int = 3, channels: int = 1) -> dict:
    names = [str(k) for k in range(classes)]
    return {"size": size, "classes": names, "channels": channels}


# --- networks of X-rays ---


@pytest.mark.parametrize(
    ("arch", "size", "stem"), [("resnet18", 28, 3), ("resnet34", 65, 7), ("resnet50", 32, 3)]
)
def test_small_images_have_a_small_stem(arch, size, stem):
    torch.manual_seed(0)
    model = xrays.build_model(arch, meta(size)).eval()
    assert model.conv1.weight.shape == (64, 1, stem, stem)
    assert isinstance(model.maxpool, torch.nn.Identity) == (stem == 3)
    logits = model(torch.randn(2, 1, size, size))
    assert logits.shape == (2, 3) and logits.std() > 1e-3


@pytest.mark.parametrize("multi_label", [False, True])
def test_an_occlusion_map_shows_the_log_odds_that_hiding_costs(multi_label):
    """One pixel says 20 for class 1, another -2: nothing else matters where it is blurred."""

    def network(images: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(len(images), 3)
        logits[:, 1] = 20 * images[:, 0, 7, 17] - 2 * images[:, 0, 23, 0]
        return logits

    image = torch.zeros(1, 1, 24, 24)
    image[0, 0, [7, 23], [17, 0]] = 1
    left = gaussian_blur(image, 7, 0.75)[0, 0]  # of a point
    found = xrays.occlusion_map(network, image, 1, multi_label)
    # Squares of 6 pixels about 2, 6, 10, ...: row 7 lies in two of them, all others in one.
    expected = torch.zeros(6, 6)
    expected[1:3, 4] = 20 * (1 - left[7, 17])
    expected[5, 0] = -2 * (1 - left[23, 0])
    assert torch.allclose(found.float(), expected, atol=1e-3)


def test_the_summed_stem_equals_the_rgb_network(monkeypatch):
    torch.manual_seed(0)
    imagenet = torchvision.models.resnet18().eval()  # random, and handed out as if downloaded
    for name, buffer in imagenet.named_buffers():
        if "running_var" in name:
            buffer.uniform_(0.5, 1.5)
        elif "running_mean" in name:
            buffer.normal_(0, 0.1)
    state = copy.deepcopy(imagenet.state_dict())
    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", lambda *_, **__: state)
    model = xrays.build_model("resnet18", meta(96, 2), pretrained=True).eval()
    assert model.conv1.weight.shape == (64, 1, 7, 7) and model.fc.weight.shape == (2, 512)
    colour = xrays.build_model("resnet18", meta(96, 2, 3), pretrained=True).eval()
    imagenet.fc = model.fc
    colour.fc = model.fc
    mean, std = xrays.PRETRAINED_MEAN_STD
    images = (torch.rand(2, 1, 96, 96) - mean) / std
    assert xrays.PRETRAINED_MEAN_STD == boxes.PRETRAINED_MEAN_STD == (0.449, 0.226)
    with torch.no_grad():
        expected = imagenet(images.expand(-1, 3, -1, -1))
        assert (expected[0] - expected[1]).abs().max() > 1e-2  # not the biases alone
        assert torch.allclose(model(images), expected, atol=1e-4)
        images = torch.randn(2, 3, 96, 96)
        assert torch.equal(colour(images), imagenet(images))
    detector = boxes.build_model("resnet18", 64, pretrained=True)
    assert torch.equal(detector.backbone.conv1.weight, model.conv1.weight)
    assert torch.equal(detector.backbone.layer3[1].conv2.weight, imagenet.layer3[1].conv2.weight)


def test_pretrained_weights_that_are_not_to_be_had_are_one_line(monkeypatch):
    def fail(*_: object, **__: object) -> dict:
        raise URLError("no route to host")

    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", fail)
    for build, argument, message in (
        (xrays.build_model, meta(64), "more than 64 px"),
        (xrays.build_model, meta(65), "no weights of resnet18: URLError"),
        (boxes.build_model, 64, "no weights of resnet18: URLError"),
    ):
        with pytest.raises(OSError, match=message):
            build("resnet18", argument, pretrained=True)
    xrays.build_model("resnet18", meta(65))  # needs no network


@pytest.mark.parametrize(("arch", "channels"), [("resnet18", 32), ("resnet50", 20)])
def test_the_first_box_lies_inside_the_image(arch, channels):
    torch.manual_seed(0)
    model = boxes.build_model(arch, channels)
    found = model(torch.randn(2, 1, 64, 64))
    assert found.shape == (2, 4) and (found > 0).all() and (found < 1).all()
    assert model.backbone.layer4[0].conv1.out_channels == 8 * channels


def test_edge_positions_are_means_under_the_softmax():
    maps = torch.full((1, 4, 8, 16), -50.0)
    for edge, y, x in ((0, 3, 2), (1, 5, 9), (2, 3, 12), (3, 6, 1), (3, 7, 1)):
        maps[0, edge, y, x] = 50
    expected = torch.tensor([[2.5 / 16, 5.5 / 8, 12.5 / 16, 7 / 8]])
    assert torch.allclose(boxes.edge_positions(maps), expected)


# --- losses ---


def test_cross_entropy_by_hand():
    logits = torch.tensor([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0]])
    labels = torch.tensor([0, 0, 1])
    no, yes = (-logits[0].log_softmax(0)).tolist()
    ones = torch.ones(2)
    assert xrays.cross_entropy(logits, labels, ones).item() == pytest.approx((2 * no + yes) / 3)
    weights = xrays.class_weights("balanced", torch.tensor([2, 1]))
    assert weights.tolist() == pytest.approx([3 / 4, 3 / 2])
    found = xrays.cross_entropy(logits, labels, torch.tensor([1.0, 5.0])).item()
    assert found == pytest.approx((2 * no + 5 * yes) / 3)  # not divided by the weights
    smooth_no = 0.9 * no + 0.1 * (no + yes) / 2
    smooth_yes = 0.9 * yes + 0.1 * (no + yes) / 2
    found = xrays.smooth_cross_entropy(logits, labels, ones).item()
    assert found == pytest.approx((2 * smooth_no + smooth_yes) / 3)
    assert {"ce": xrays.cross_entropy, "smooth_ce": xrays.smooth_cross_entropy} == xrays.LOSSES


def test_unknown_labels_add_nothing_to_the_loss():
    logits = torch.tensor([[0.0, 2.0], [-1.0, 3.0]], requires_grad=True)
    labels = torch.tensor([[1, -1], [0, 1]])
    losses = [math.log(2), math.log(1 + math.exp(-1)), math.log(1 + math.exp(-3))]
    ones = torch.ones(2)
    assert xrays.cross_entropy(logits, labels, ones).item() == pytest.approx(sum(losses) / 4)
    xrays.smooth_cross_entropy(logits, labels, ones).backward()
    assert logits.grad[0, 1] == 0 and (logits.grad != 0).sum() == 3
    assert torch.equal(xrays.to_probabilities(logits, True), logits.sigmoid())
    weights = torch.tensor([5.0, 2.0])  # those of the positives
    weighted = 5 * losses[0] + losses[1] + 2 * losses[2]
    assert xrays.cross_entropy(logits, labels, weights).item() == pytest.approx(weighted / 4)
    counts = torch.tensor([[30, 10], [5, 0]])
    assert xrays.class_weights("balanced", counts).tolist() == [3, 5]
    assert xrays.class_weights("none", counts).tolist() == [1, 1]


def test_generalized_iou_is_that_of_torchvision():
    corners = torch.rand(50, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    pred, truth = torch.cat([corners.amin(2), corners.amax(2)], 2).unbind(1)
    giou = torchvision.ops.generalized_box_iou_loss(pred, truth, reduction="mean")
    expected = giou + F.smooth_l1_loss(pred, truth, beta=0.02)
    assert torch.allclose(boxes.smooth_l1_giou(pred, truth), expected)
    nothing = torch.zeros(1, 4, requires_grad=True)  # no side: the loss stays finite
    boxes.smooth_l1_giou(nothing, nothing.detach()).backward()
    assert nothing.grad.isfinite().all()


def test_dice_loss_by_hand():
    logits = torch.zeros(1, 2, 2, 2)
    logits[:, 1] = torch.tensor([[30.0, 30.0], [-30.0, -30.0]])
    masks = torch.tensor([[[1, 0], [0, 0]]])
    assert volumes.dice_loss(logits, masks).item() == pytest.approx(1 - 2 / 3, abs=1e-5)
    assert volumes.dice_loss(logits, 0 * masks).item() == pytest.approx(0.5, abs=1e-5)  # absent
    assert volumes.dice_ce_loss(logits, masks).item() == pytest.approx(1 / 3 + 30 / 4, abs=1e-4)


# --- U-Net and windows ---


VOLUMES = {"spacing": [1.0, 1.0, 1.0], "slice_axis": 2, "shape": [9, 8, 7]}


def test_stages_and_patches_are_planned_by_size_and_spacing():
    strides = [stride for _, stride in plan_stages([35, 50, 36], [1.0, 1.0, 1.0])]
    assert strides == [[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2]]
    stages = plan_stages([64, 64, 16], [1.0, 1.0, 4.0])
    assert stages[0] == ([3, 3, 1], [1, 1, 1]) and stages[1] == ([3, 3, 1], [2, 2, 1])
    assert stages[2][1] == [2, 2, 1] and stages[3] == ([3, 3, 3], [2, 2, 2])
    assert len(plan_stages([4, 4], [1.0, 1.0])) == 1
    assert default_patch(2, VOLUMES | {"shape": [1000, 900, 5]}) == [512, 512]
    assert np.prod(default_patch(3, VOLUMES | {"shape": [500, 500, 90]})) <= 2**18


@pytest.mark.parametrize(("length", "size"), [(20, 8), (21, 8), (8, 8), (5, 8), (30, 7), (9, 1)])
def test_window_weights_add_up_to_one(length, size):
    total = torch.zeros(length + 2 * size)
    for start, weights in window_weights(length, size):
        assert 0 <= start <= length - size or start == (length - size) // 2 <= 0
        total[start + size : start + 2 * size] += weights
    assert total[size : size + length].allclose(torch.ones(length), atol=1e-6)


def test_window_weights_are_gaussians_of_an_eighth_of_the_window():
    _, weights = window_weights(20, 8)[0]
    near, far = math.exp(-0.5 * 0.5**2), math.exp(-0.5 * 3.5**2)  # of both windows at voxel 4
    assert weights[4].item() == pytest.approx(near / (near + far), abs=1e-6)


@pytest.mark.parametrize("patch", [[8, 8, 8], [7, 5, 30], [16, 8]])
@pytest.mark.parametrize("axis", [0, 2])
def test_windows_of_a_pointwise_network_are_the_whole(patch, axis, monkeypatch):
    torch.manual_seed(0)
    model = (nn.Conv2d if len(patch) == 2 else nn.Conv3d)(2, 3, 1)
    image = np.random.default_rng(0).normal(size=(2, 19, 9, 11)).astype(np.float16)
    whole = torch.einsum("kc,cxyz->kxyz", model.weight.flatten(1), torch.from_numpy(image).float())
    whole = (whole + model.bias.view(-1, 1, 1, 1)).softmax(0)
    for most in (2**30, 0):  # a large result is added up on the CPU
        monkeypatch.setattr(volumes, "MAX_ON_DEVICE", most)
        found = predict_volume(model, image, patch, axis, CPU, None, 3)
        assert found.dtype == torch.float16 and (found.float() - whole).abs().max() < 2e-3


def test_one_window_is_the_network_itself():
    known = VOLUMES | {"channels": ["MRI"], "classes": ["background", "a", "b"]}
    model = volumes.build_model(known, 8, [13, 10, 8]).eval()
    image = np.random.default_rng(0).normal(size=(1, 13, 10, 8)).astype(np.float16)
    with torch.no_grad():
        expected = model(torch.from_numpy(image).float()[None]).softmax(1)[0].half()
    assert torch.equal(predict_volume(model, image, [13, 10, 8], 2, CPU, None, 2), expected)
