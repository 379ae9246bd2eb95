"""A torchvision ResNet for gray images, or for colour.

In the shapes below B is the batch, S the side of an image in pixels, C the number of classes.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from classification.preprocess import DataError, is_multi_label

ARCHITECTURES = ("resnet18", "resnet34", "resnet50")
HEAD = ("fc.",)  # what --freeze trains: names of weights begin so
# One mean and std for the one channel (the averages of ImageNet's three): with three different
# ones the summed stem would not equal the RGB network on a gray picture.
PRETRAINED_MEAN = 0.449
PRETRAINED_STD = 0.226


def build_model(
    arch: str,
    num_classes: int,
    size: int,
    pretrained: bool = False,
    channels: int = 1,
    width: int = 64,
) -> nn.Module:
    """ResNet (He et al., CVPR 2016) from float images (B, channels, S, S) to logits (B, C).

    `width` are the features of its first stage, doubled in each next; torchvision has 64.

    Images of at most 64 px get a 3x3 stem without stride and pooling, which keeps their few pixels,
    as for CIFAR in the paper. `pretrained` takes torchvision's ImageNet weights, the stem's filters
    summed over RGB for gray images. Raises DataError if it cannot.
    """
    is_small = size <= 64
    if pretrained and is_small:
        problem = f"images of {size} px, expected more than 64; preprocess with --size 224"
        raise DataError(f"--pretrained: {problem}")
    try:
        model = torchvision.models.get_model(arch, weights="DEFAULT" if pretrained else None)
    except (OSError, RuntimeError) as error:  # no network, no place for the file, a broken download
        problem = f"could not fetch the ImageNet weights of {arch} ({error})"
        raise DataError(f"--pretrained: {problem}") from error
    rgb_stem = model.conv1.weight  # (64, 3, 7, 7)
    if width != 64:  # torchvision builds no other
        narrow(model, width / 64)
    if is_small:
        model.conv1 = nn.Conv2d(channels, width, 3, stride=1, padding=1, bias=False)  # (S, S)
    else:
        model.conv1 = nn.Conv2d(channels, width, 7, stride=2, padding=3, bias=False)  # (S/2, S/2)
    # As torchvision starts its convolutions
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    if is_small:  # pooling would halve the few pixels once more
        model.maxpool = nn.Identity()
    if pretrained and channels == 3:  # as it was trained
        model.conv1.weight = rgb_stem
    elif pretrained:
        # A gray picture has one value in all three channels: the sum gives the same response.
        gray_stem = rgb_stem.detach().sum(1, keepdim=True)  # (64, 1, 7, 7)
        model.conv1.weight = nn.Parameter(gray_stem)
    features = round(model.fc.in_features * width / 64)  # of the last stage
    model.fc = nn.Linear(features, num_classes)  # a new head: ImageNet's has 1000 classes
    return model


def narrow(net: nn.Module, share: float) -> None:
    """Give every convolution and norm in a ResNet that share of its channels, with random weights.

    torchvision's ResNets have one width, made for ImageNet. On a CPU half of it takes a quarter of
    the time, and finds boxes better for the same time.
    """
    for name, part in net.named_children():
        if isinstance(part, nn.Conv2d):
            inputs = round(part.in_channels * share)
            outputs = round(part.out_channels * share)
            if inputs == 0:  # the stem's three colours: build_model puts its own in this place
                continue
            shape = (part.kernel_size, part.stride, part.padding)
            conv = nn.Conv2d(inputs, outputs, *shape, bias=False)
            # As torchvision starts its convolutions
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            setattr(net, name, conv)
        elif isinstance(part, nn.BatchNorm2d):
            setattr(net, name, nn.BatchNorm2d(round(part.num_features * share)))
        else:  # a stage, a block or a shortcut
            narrow(part, share)


def make_criterion(
    weighting: str, counts: Tensor, smoothing: float, device: torch.device
) -> Callable[[Tensor, Tensor], Tensor]:
    """`weighted_loss` of logits and labels, with the weights of --class-weights on the device."""
    weights = class_weights(weighting, counts).to(device)
    return partial(weighted_loss, weights=weights, smoothing=smoothing)


def class_weights(kind: str, counts: Tensor) -> Tensor:
    """Weights (C,) of the loss; "balanced" has mean 1 over the images of the training set.

    `counts` (C,) are images of each class, or, of several labels an image, (C, 2) those without and
    with each label: "balanced" then weighs its positives so that they count as much as the others.
    """
    if kind == "balanced" and counts.ndim == 2:
        return counts[:, 0] / counts[:, 1].clamp(min=1)  # a label that nobody has: no division by 0
    if kind == "balanced":
        return counts.sum() / (len(counts) * counts)
    return torch.ones(len(counts))


def weighted_loss(logits: Tensor, labels: Tensor, weights: Tensor, smoothing: float) -> Tensor:
    """Mean over the batch of the weighted cross entropy; logits float32 (B, C), labels int64 (B,).

    A plain mean, not one divided by the weights of the batch: so the gradient does not depend on
    how the batch is shared out among processes. Labels (B, C): `multi_label_loss`.
    """
    if labels.ndim == 2:
        return multi_label_loss(logits, labels, weights, smoothing)
    losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)  # (B,)
    return (losses * weights[labels]).mean()


def multi_label_loss(logits: Tensor, labels: Tensor, weights: Tensor, smoothing: float) -> Tensor:
    """Mean over batch and labels of the binary cross entropy; logits float32 (B, C).

    `labels` int64 (B, C) are 1, 0, or -1 for unknown, which adds nothing; `weights` (C,) are those
    of the positives.
    """
    targets = (labels == 1).float() * (1 - smoothing) + smoothing / 2
    losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")  # (B, C)
    weights = torch.where(labels == 1, weights, (labels == 0).float())  # (B, C), unknown: 0
    return (losses * weights).mean()


def validation_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss without weights and smoothing, mean over the images or over the known labels."""
    if labels.ndim == 2:
        known = labels >= 0
        targets = labels[known].float()
        return F.binary_cross_entropy_with_logits(logits[known], targets)
    return F.cross_entropy(logits, labels)


def to_probabilities(logits: Tensor, meta: dict) -> Tensor:
    """Probabilities (N, C) of classes, which add up to 1, or of several labels, each by itself."""
    if is_multi_label(meta):
        return logits.sigmoid()
    return logits.softmax(1)


def class_activation_maps(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (B, C) and class activation maps (B, C, h, w) (Zhou et al., CVPR 2016).

    With global pooling and a linear head the map is the head's weights times the last features; its
    mean plus the bias is the logit. Grad-CAM gives the same for this network. `images` are float
    (B, channels, S, S), normalised; h and w are S / 32, or S / 8 with the small stem.
    """
    features = images
    for name, layer in model.named_children():
        if name == "avgpool":  # the pooling and the head are what the maps replace
            break
        features = layer(features)  # at the end (B, F, h, w)
    maps = torch.einsum("bfhw,cf->bchw", features, model.fc.weight)  # (B, C, h, w)
    logits = maps.mean((2, 3)) + model.fc.bias  # (B, C), as forward() gives them
    return logits, maps
