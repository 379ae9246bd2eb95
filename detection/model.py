"""A torchvision ResNet for gray images that gives one box."""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from detection.preprocess import DataError

ARCHITECTURES = ("resnet18", "resnet34", "resnet50")
HEADS = ("edges", "linear")
# One mean and std for the one channel (the averages of ImageNet's three): with three different ones the
# summed stem would not equal the RGB network on a gray picture.
PRETRAINED_MEAN, PRETRAINED_STD = 0.449, 0.226


class BoxNet(nn.Module):
    """ResNet (He et al., CVPR 2016) from gray float images (B, 1, S, S) to boxes (B, 4).

    Boxes are xmin ymin xmax ymax in fractions of the image. Head "linear" regresses them from the pooled
    features. Head "edges" fuses the stages to a map of 1/8 of the image (Lin et al., CVPR 2017), has one map
    for each edge, and takes the mean coordinate under its softmax (Sun et al., ECCV 2018, integral
    regression): where an edge is stays a question of place, which few images are enough to learn.
    """

    def __init__(self, backbone: nn.Module, head: str, width: int = 128) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head
        channels = [stage[-1].bn1.num_features * (4 if hasattr(stage[-1], "conv3") else 1)
                    for stage in (backbone.layer2, backbone.layer3, backbone.layer4)]  # fmt: skip
        if head == "linear":
            self.out = nn.Linear(channels[-1], 4)
            nn.init.zeros_(self.out.weight)
            self.out.bias = nn.Parameter(
                torch.tensor([0.25, 0.25, 0.75, 0.75])
            )  # start with half the image
        else:
            self.lateral = nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels)
            self.smooth = nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
            )
            self.out = nn.Conv2d(width, 4, 1)

    def forward(self, images: Tensor) -> Tensor:
        net = self.backbone
        features = net.layer1(net.maxpool(net.relu(net.bn1(net.conv1(images)))))
        stages = []
        for layer in (net.layer2, net.layer3, net.layer4):
            features = layer(features)
            stages.append(features)
        if self.head == "linear":
            return self.out(features.mean((2, 3)))
        fused = self.lateral[2](stages[2])
        for k in (1, 0):
            fused = F.interpolate(fused, size=stages[k].shape[2:], mode="nearest") + self.lateral[
                k
            ](stages[k])
        maps = self.out(self.smooth(fused)).float()
        return edge_positions(maps)


def edge_positions(maps: Tensor) -> Tensor:
    """Mean coordinate (B, 4), in fractions, under the softmax of each of the maps (B, 4, h, w)."""
    chance = maps.flatten(2).softmax(2).view_as(maps)
    x = (torch.arange(maps.shape[3], device=maps.device) + 0.5) / maps.shape[3]
    y = (torch.arange(maps.shape[2], device=maps.device) + 0.5) / maps.shape[2]
    along_x, along_y = (chance.sum(2) * x).sum(2), (chance.sum(3) * y).sum(2)
    return torch.stack([along_x[:, 0], along_y[:, 1], along_x[:, 2], along_y[:, 3]], 1)


def narrow(net: nn.Module, share: float) -> None:
    """Give every convolution and norm in a ResNet that share of its channels, with new random weights.

    torchvision's ResNets have one width, made for ImageNet. On a CPU half of it takes a quarter of the time,
    and finds boxes better for the same time.
    """
    for name, part in net.named_children():
        if isinstance(part, nn.Conv2d):
            inputs, outputs = round(part.in_channels * share), round(part.out_channels * share)
            if inputs == 0:  # the stem's three colours: build_model puts its own in this place
                continue
            conv = nn.Conv2d(
                inputs, outputs, part.kernel_size, part.stride, part.padding, bias=False
            )
            nn.init.kaiming_normal_(
                conv.weight, mode="fan_out", nonlinearity="relu"
            )  # as torchvision does
            setattr(net, name, conv)
        elif isinstance(part, nn.BatchNorm2d):
            setattr(net, name, nn.BatchNorm2d(round(part.num_features * share)))
        else:
            narrow(part, share)


def build_model(arch: str, head: str, channels: int, pretrained: bool = False) -> nn.Module:
    """A BoxNet with random weights, `channels` in the first stage (torchvision has 64), doubled in each next.

    `pretrained` takes torchvision's ImageNet weights (of 64 channels), the stem's filters summed over RGB.
    Raises DataError if it cannot.
    """
    try:
        net = torchvision.models.get_model(arch, weights="DEFAULT" if pretrained else None)
    except (
        OSError,
        RuntimeError,
    ) as error:  # no network, no place to keep the file, a broken download
        raise DataError(
            f"--pretrained: could not fetch the ImageNet weights of {arch} ({error})"
        ) from error
    rgb_stem = net.conv1.weight
    if channels != 64:
        narrow(net, channels / 64)
    net.conv1 = nn.Conv2d(1, channels, 7, 2, 3, bias=False)
    nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    if pretrained:
        net.conv1.weight = nn.Parameter(rgb_stem.detach().sum(1, keepdim=True))
    net.fc = nn.Identity()
    return BoxNet(net, head)
