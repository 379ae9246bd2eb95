"""A torchvision ResNet for gray images that gives one box.

In the shapes below B is the batch, S the side of an image in pixels, F a number of features, (h, w)
the size of a feature map. Boxes are xmin, ymin, xmax, ymax in fractions of the image.
"""

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

ARCHITECTURES = ("resnet18", "resnet34", "resnet50")
# One mean and std (the averages of ImageNet's three channels): with three different ones the summed
# stem would not equal the RGB network on a gray image.
PRETRAINED_MEAN_STD = (0.449, 0.226)
WIDTH = 128  # channels of the map from which the edges are read


def build_model(arch: str, channels: int, pretrained: bool = False) -> nn.Module:
    """A BoxNet with random weights.

    `channels`: those of the first stage; each later stage doubles them. torchvision has 64.
    `pretrained` loads its ImageNet weights (64 channels), the stem's filters summed over RGB.
    Raises OSError if they are not available.
    """
    try:
        net = torchvision.models.get_model(arch, weights="DEFAULT" if pretrained else None)
    except Exception as error:  # no network, full disk, truncated file: each has its own type
        raise OSError(f"no weights of {arch}: {type(error).__name__} {error}") from error
    rgb_stem = net.conv1.weight  # (64, 3, 7, 7)
    if channels != 64:
        narrow(net, channels / 64)
    net.conv1 = nn.Conv2d(1, channels, 7, stride=2, padding=3, bias=False)
    # Same initialisation as torchvision
    nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    if pretrained:
        # A gray image has the same value in all three channels: the sum gives the same response.
        gray_stem = rgb_stem.detach().sum(1, keepdim=True)  # (64, 1, 7, 7)
        net.conv1.weight = nn.Parameter(gray_stem)
    net.fc = nn.Identity()  # the head is not used
    return BoxNet(net)


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


class BoxNet(nn.Module):
    """ResNet (He et al., CVPR 2016) from gray float images (B, 1, S, S) to boxes (B, 4).

    The stages are fused to a map of 1/8 of the image (Lin et al., CVPR 2017); each edge of the box
    has a map, and is the mean coordinate under its softmax (Sun et al., ECCV 2018, integral
    regression). Positions stay positions in a map, which takes few images to learn.
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        channels = []
        for stage in (backbone.layer2, backbone.layer3, backbone.layer4):
            block = stage[-1]
            last_norm = getattr(block, "bn3", block.bn2)  # bottlenecks have a third one
            channels.append(last_norm.num_features)
        self.lateral = nn.ModuleList(nn.Conv2d(count, WIDTH, 1) for count in channels)
        self.smooth = nn.Sequential(
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False),
            nn.BatchNorm2d(WIDTH),
            nn.ReLU(),
        )
        self.out = nn.Conv2d(WIDTH, 4, 1)  # a map for each edge

    def forward(self, images: Tensor) -> Tensor:
        net = self.backbone
        features = net.relu(net.bn1(net.conv1(images)))  # (B, F, S / 2, S / 2)
        features = net.layer1(net.maxpool(features))  # (B, F, S / 4, S / 4)
        eighth = net.layer2(features)  # (B, 2 F, S / 8, S / 8)
        sixteenth = net.layer3(eighth)  # (B, 4 F, S / 16, S / 16)
        last = net.layer4(sixteenth)  # (B, 8 F, S / 32, S / 32)
        # From coarse to fine: each map is enlarged by repeating its values.
        fused = self.lateral[2](last)  # (B, WIDTH, S / 32, S / 32)
        fused = F.interpolate(fused, sixteenth.shape[2:]) + self.lateral[1](sixteenth)
        fused = F.interpolate(fused, eighth.shape[2:]) + self.lateral[0](eighth)
        maps = self.out(self.smooth(fused))  # (B, 4, S / 8, S / 8)
        # In half precision coordinates would be rounded to about a pixel.
        return edge_positions(maps.float())  # (B, 4)


def edge_positions(maps: Tensor) -> Tensor:
    """Mean coordinate (B, 4), in fractions, under the softmax of each of the maps (B, 4, h, w)."""
    height, width = maps.shape[2:]
    probability = maps.flatten(2).softmax(2).view_as(maps)
    # The middle of each column and row, in fractions of the image
    x = (torch.arange(width, device=maps.device) + 0.5) / width
    y = (torch.arange(height, device=maps.device) + 0.5) / height
    mean_x = (probability.sum(2) * x).sum(2)  # (B, 4)
    mean_y = (probability.sum(3) * y).sum(2)  # (B, 4)
    return torch.stack([mean_x[:, 0], mean_y[:, 1], mean_x[:, 2], mean_y[:, 3]], 1)


# --- losses ---


def smooth_l1(pred: Tensor, boxes: Tensor) -> Tensor:
    """Mean error of boxes (B, 4): squared within 2 % of the image, absolute beyond."""
    return F.smooth_l1_loss(pred, boxes, beta=0.02)


def smooth_l1_giou(pred: Tensor, boxes: Tensor) -> Tensor:
    """Smooth L1 plus the mean of 1 - generalized IoU (Rezatofighi et al., CVPR 2019), boxes (B, 4).

    torchvision's version writes through a mask, which synchronises with the GPU at every step.
    """
    overlap = torch.minimum(pred[:, 2:], boxes[:, 2:]) - torch.maximum(pred[:, :2], boxes[:, :2])
    hull_sides = torch.maximum(pred[:, 2:], boxes[:, 2:]) - torch.minimum(pred[:, :2], boxes[:, :2])
    intersection = area(overlap)  # (B,)
    union = area(pred[:, 2:] - pred[:, :2]) + area(boxes[:, 2:] - boxes[:, :2]) - intersection
    hull = area(hull_sides)
    tiny = 1e-7  # for boxes of size 0
    giou = intersection / (union + tiny) - (hull - union) / (hull + tiny)
    return smooth_l1(pred, boxes) + (1 - giou).mean()


def area(sides: Tensor) -> Tensor:
    """Areas (B,) of boxes by their width and height (B, 2); 0 if a side is negative."""
    width, height = sides.clamp(min=0).unbind(1)
    return width * height


LOSSES = {"mse": F.mse_loss, "smooth_l1": smooth_l1, "smooth_l1_giou": smooth_l1_giou}
