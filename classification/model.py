"""A torchvision ResNet for gray images."""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from classification.preprocess import DataError

ARCHITECTURES = ("resnet18", "resnet34", "resnet50")
# One mean and std for the one channel (the averages of ImageNet's three): with three different ones the
# summed stem would not equal the RGB network on a gray picture.
PRETRAINED_MEAN, PRETRAINED_STD = 0.449, 0.226


def build_model(arch: str, num_classes: int, size: int, pretrained: bool = False) -> nn.Module:
    """ResNet (He et al., CVPR 2016) from gray float images (B, 1, S, S) to logits (B, num_classes).

    Images of at most 64 px get a 3x3 stem without stride and pooling, which keeps their few pixels.
    `pretrained` takes torchvision's ImageNet weights, the stem's filters summed over RGB. Raises DataError if
    it cannot.
    """
    small = size <= 64
    if pretrained and small:
        raise DataError(
            f"--pretrained: images of {size} px, expected more than 64; preprocess with --size 224"
        )
    try:
        model = torchvision.models.get_model(arch, weights="DEFAULT" if pretrained else None)
    except (
        OSError,
        RuntimeError,
    ) as error:  # no network, no place to keep the file, a broken download
        raise DataError(
            f"--pretrained: could not fetch the ImageNet weights of {arch} ({error})"
        ) from error
    rgb_stem = model.conv1.weight
    model.conv1 = (
        nn.Conv2d(1, 64, 3, 1, 1, bias=False) if small else nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    )
    nn.init.kaiming_normal_(
        model.conv1.weight, mode="fan_out", nonlinearity="relu"
    )  # as torchvision does
    if small:
        model.maxpool = nn.Identity()
    if pretrained:
        model.conv1.weight = nn.Parameter(rgb_stem.detach().sum(1, keepdim=True))
    model.fc = nn.Linear(model.fc.in_features, num_classes)
    return model


def class_activation_maps(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (B, C) and class activation maps (B, C, h, w) (Zhou et al., CVPR 2016).

    With global pooling and a linear head the map is the head's weights times the last features; its mean plus
    the bias is the logit. Grad-CAM gives the same for this network.
    """
    features = images
    for name, layer in model.named_children():
        if name == "avgpool":
            break
        features = layer(features)
    maps = torch.einsum("bfhw,cf->bchw", features, model.fc.weight)
    return maps.mean((2, 3)) + model.fc.bias, maps


def class_weights(kind: str, counts: Tensor) -> Tensor:
    """Weights (classes,) of the loss; "balanced" has mean 1 over the images of the training set."""
    if kind == "balanced":
        return counts.sum() / (len(counts) * counts)
    return torch.ones(len(counts))


def weighted_loss(logits: Tensor, labels: Tensor, weights: Tensor, smoothing: float) -> Tensor:
    """Mean over the batch of the weighted cross entropy; logits float32 (B, C), labels int64 (B,).

    A plain mean, not one divided by the weights of the batch: so the gradient does not depend on
    how the batch is shared out among processes.
    """
    losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    return (losses * weights[labels]).mean()
