"""A torchvision ResNet for gray images, or for colour.

In the shapes below B is the batch, S the side of an image in pixels, C the number of classes.
"""

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur

ARCHITECTURES = ("resnet18", "resnet34", "resnet50")
# One mean and std (the averages of ImageNet's three channels): with three different ones the summed
# stem would not equal the RGB network on a gray image.
PRETRAINED_MEAN_STD = (0.449, 0.226)


def build_model(arch: str, meta: dict, width: int = 64, pretrained: bool = False) -> nn.Module:
    """ResNet (He et al., CVPR 2016) from float images (B, channels, S, S) to logits (B, C).

    Classes, channels and S are those of a meta.json. `width`: channels of the first stage; each
    later stage doubles them. torchvision has 64.

    Images of at most 64 px get a 3x3 stem without stride and pooling, which keeps their few pixels,
    as for CIFAR in the paper. `pretrained` loads torchvision's ImageNet weights, the stem's filters
    summed over RGB for gray images. Raises OSError if they are not available, or images are small.
    """
    channels = meta["channels"]
    is_small = meta["size"] <= 64
    if pretrained and is_small:
        raise OSError(f"pretrained weights take images of more than 64 px, not of {meta['size']}")
    try:
        model = torchvision.models.get_model(arch, weights="DEFAULT" if pretrained else None)
    except Exception as error:  # no network, full disk, truncated file: each has its own type
        raise OSError(f"no weights of {arch}: {type(error).__name__} {error}") from error
    rgb_stem = model.conv1.weight  # (64, 3, 7, 7)
    if width != 64:  # torchvision's only width
        narrow(model, width / 64)
    if is_small:
        model.conv1 = nn.Conv2d(channels, width, 3, stride=1, padding=1, bias=False)  # (S, S)
    else:
        model.conv1 = nn.Conv2d(channels, width, 7, stride=2, padding=3, bias=False)  # (S/2, S/2)
    # Same initialisation as torchvision
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    if is_small:  # pooling would halve the few pixels again
        model.maxpool = nn.Identity()
    if pretrained and channels == 3:  # as it was trained
        model.conv1.weight = rgb_stem
    elif pretrained:
        # A gray image has the same value in all three channels: the sum gives the same response.
        gray_stem = rgb_stem.detach().sum(1, keepdim=True)  # (64, 1, 7, 7)
        model.conv1.weight = nn.Parameter(gray_stem)
    features = round(model.fc.in_features * width / 64)  # channels of the last stage
    model.fc = nn.Linear(features, len(meta["classes"]))  # a new head: ImageNet's has 1000 classes
    return model


def narrow(net: nn.Module, share: float) -> None:
    """Give every convolution and norm in a ResNet that share of its channels, with random weights.

    torchvision's ResNets have one width, made for ImageNet. Half of it takes a quarter of the time
    on a CPU, and gave better boxes in the same time.
    """
    for name, part in net.named_children():
        if isinstance(part, nn.Conv2d):
            inputs = round(part.in_channels * share)
            outputs = round(part.out_channels * share)
            if inputs == 0:  # the stem, which build_model replaces
                continue
            shape = (part.kernel_size, part.stride, part.padding)
            conv = nn.Conv2d(inputs, outputs, *shape, bias=False)
            # Same initialisation as torchvision
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            setattr(net, name, conv)
        elif isinstance(part, nn.BatchNorm2d):
            setattr(net, name, nn.BatchNorm2d(round(part.num_features * share)))
        else:  # a stage, a block or a shortcut
            narrow(part, share)


# --- losses ---


def cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor, smoothing: float = 0) -> Tensor:
    """Mean over the batch of the weighted cross entropy; logits float32 (B, C), labels int64 (B,).

    A plain mean, not divided by the weights of the batch, so the gradient does not depend on how
    the batch is split among processes.

    Several labels per image, int64 (B, C): the mean over images and labels of the binary cross
    entropy. They are 1, 0, or -1 for unknown, which adds nothing; `weights` (C,) apply to the
    positives.
    """
    if labels.ndim == 1:
        losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
        return (losses * weights[labels]).mean()
    targets = (labels == 1).float() * (1 - smoothing) + smoothing / 2
    losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")  # (B, C)
    weights = torch.where(labels == 1, weights, (labels == 0).float())  # (B, C), unknown: 0
    return (losses * weights).mean()


def smooth_cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """`cross_entropy` with label smoothing of 0.1 (Szegedy et al., CVPR 2016)."""
    return cross_entropy(logits, labels, weights, smoothing=0.1)


LOSSES = {"ce": cross_entropy, "smooth_ce": smooth_cross_entropy}


def to_probabilities(logits: Tensor, multi_label: bool) -> Tensor:
    """Probabilities (N, C): of classes, which add up to 1, or of labels, each independent."""
    return logits.sigmoid() if multi_label else logits.softmax(1)


def class_weights(kind: str, counts: Tensor) -> Tensor:
    """Weights (C,) of the loss; "balanced" has mean 1 over the images of the training set.

    `counts` (C,) are the images of each class. For several labels they are (C, 2), images without
    and with each label; "balanced" then gives both the same total weight.
    """
    if kind == "balanced" and counts.ndim == 2:
        return counts[:, 0] / counts[:, 1].clamp(min=1)  # a label may have no positives
    if kind == "balanced":
        return counts.sum() / (len(counts) * counts)
    return torch.ones(len(counts))


# --- occlusion maps ---


@torch.no_grad()
def occlusion_map(model: nn.Module, image: Tensor, target: int, multi_label: bool) -> Tensor:
    """What the log-odds of class `target` lose if a square is blurred, float64 (6, 6).

    Squares of a quarter of the side, which overlap, in 6 rows and 6 columns (Zeiler & Fergus, ECCV
    2014); blurred, because gray would be something new, such as an opacity (Fong & Vedaldi, ICCV
    2017). `image` is float (1, channels, S, S), normalised; `model` is in eval mode.
    """
    size = image.shape[-1]
    pixels = (torch.arange(size) + 0.5) / size
    middles = (torch.arange(6) + 0.5) / 6
    inside = (pixels - middles[:, None]).abs() < 0.125  # (6, S)
    hidden = inside[:, None, :, None] & inside[:, None]  # (6, 6, S, S)
    hidden = F.pad(hidden.view(36, 1, size, size), (0, 0, 0, 0, 0, 0, 1, 0))  # first nothing
    blurred = gaussian_blur(image, 2 * (size // 8) + 1, size / 32)
    images = torch.where(hidden.to(image.device), blurred, image)  # (37, channels, S, S)
    logits = model(images).cpu().double()  # (37, C); float32 would end at log-odds of 17
    odds = to_probabilities(logits, multi_label)[:, target].logit(eps=1e-12)  # (37,)
    return (odds[0] - odds[1:]).view(6, 6)
