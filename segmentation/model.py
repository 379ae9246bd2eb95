"""A U-Net for slices and volumes, its loss, and the prediction of whole volumes by overlapping windows."""

import itertools
import math
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from segmentation.dataset import box_slices, cut, in_batches, patch_axes, window_size


def default_patch(dims: int, meta: dict) -> list[int]:
    """A whole slice or volume of median size, as far as 2^18 voxels go; the longest side in mm gives way."""
    patch, spacing = (
        patch_axes(meta[name], dims, meta["slice_axis"]) for name in ("shape", "spacing")
    )
    while math.prod(patch) > 2**18:
        patch[max(range(dims), key=lambda axis: patch[axis] * spacing[axis])] -= 1
    return patch


def plan_stages(patch: list[int], spacing: list[float]) -> list[tuple[list[int], list[int]]]:
    """Kernel and stride of each stage, the first at full resolution.

    An axis is halved as long as 4 voxels of the patch are left and its voxels are not twice as long as the
    finest that can be halved; until then its kernels are 1, if they are that long (as in nnU-Net, Isensee et
    al., Nature Methods 2021).
    """
    size, spacing, stages, stride = list(patch), list(spacing), [], [1] * len(patch)
    while len(stages) < 6:
        stages.append(([1 if s >= 2 * min(spacing) else 3 for s in spacing], stride))
        fine = [s for s, n in zip(spacing, size, strict=True) if n >= 8]
        if not fine:
            break
        stride = [
            2 if n >= 8 and s < 2 * min(fine) else 1 for s, n in zip(spacing, size, strict=True)
        ]
        size = [n // k for n, k in zip(size, stride, strict=True)]
        spacing = [s * k for s, k in zip(spacing, stride, strict=True)]
    return stages


def conv_unit(
    inputs: int, outputs: int, kernel: list[int], stride: list[int], norm: bool = True
) -> nn.Sequential:
    """Convolution, instance norm unless told otherwise, leaky ReLU."""
    conv, norms = (
        (nn.Conv2d, nn.InstanceNorm2d) if len(kernel) == 2 else (nn.Conv3d, nn.InstanceNorm3d)
    )
    first = conv(inputs, outputs, kernel, stride, [k // 2 for k in kernel], bias=not norm)
    middle = [norms(outputs, affine=True)] if norm else []
    return nn.Sequential(first, *middle, nn.LeakyReLU(0.01, inplace=True))


class ResidualUnit(nn.Module):
    """Two convolutions beside a shortcut (He et al., CVPR 2016); the first may stride.

    The shortcut averages instead of striding: it sees every voxel, and on the CPU a strided 1x1 convolution
    of few channels in channels-last order writes beyond its memory (torch 2.15).
    """

    def __init__(self, inputs: int, outputs: int, kernel: list[int], stride: list[int]) -> None:
        super().__init__()
        ones = [1] * len(kernel)
        pool = nn.AvgPool2d if len(kernel) == 2 else nn.AvgPool3d
        self.first = conv_unit(inputs, outputs, kernel, stride)
        self.second = conv_unit(outputs, outputs, kernel, ones)[:2]
        self.shortcut = nn.Sequential()
        if max(stride) > 1:
            self.shortcut.append(pool(stride, ceil_mode=True, count_include_pad=False))
        if inputs != outputs:
            self.shortcut.extend(conv_unit(inputs, outputs, ones, ones)[:2])

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.second(self.first(x)) + self.shortcut(x), 0.01, inplace=True)


class UNet(nn.Module):
    """U-Net (Ronneberger et al., MICCAI 2015) from images (B, C, *S) to logits (B, K, *S), for any S.

    Full resolution costs nearly all the time, so the first stage is thin: half of `channels`, a single
    convolution on the way down and on the way up. Below are residual units of `channels`, twice as many, ...
    up to 256. `patch` and `spacing` have two or three axes and decide how deep it is. The last convolution
    before the head has no norm: brought to the same deviation in every image, features of a structure that an
    image lacks look as if it were there.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        channels: int,
        patch: list[int],
        spacing: list[float],
    ) -> None:
        super().__init__()
        stages = plan_stages(patch, spacing)
        widths = [
            max(1, channels // 2),
            *(min(channels * 2**k, 256) for k in range(len(stages) - 1)),
        ]
        flat = len(patch) == 2
        transposed, conv = (
            (nn.ConvTranspose2d, nn.Conv2d) if flat else (nn.ConvTranspose3d, nn.Conv3d)
        )
        self.down, self.up, self.merge = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for k, (kernel, stride) in enumerate(stages):
            down, merge = (
                (ResidualUnit, ResidualUnit) if k else (conv_unit, partial(conv_unit, norm=False))
            )
            self.down.append(down(widths[k - 1] if k else in_channels, widths[k], kernel, stride))
            if k + 1 < len(stages):
                stride = stages[k + 1][1]
                self.up.append(transposed(widths[k + 1], widths[k], stride, stride))
                self.merge.append(merge(2 * widths[k], widths[k], kernel, [1] * len(kernel)))
        self.head = conv(widths[0], num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for unit in self.down:
            x = unit(x)
            skips.append(x)
        skips.pop()
        for up, merge, skip in zip(
            reversed(self.up), reversed(self.merge), reversed(skips), strict=True
        ):
            # an odd size was rounded up on the way down
            x = up(x)[(..., *(slice(n) for n in skip.shape[2:]))]
            x = merge(torch.cat([x, skip], 1))
        return self.head(x)


def build_model(meta: dict, channels: int, patch: list[int]) -> UNet:
    """The U-Net for the channels, classes and spacing of a cache, slices or volumes as the patch has axes."""
    spacing = patch_axes(meta["spacing"], len(patch), meta["slice_axis"])
    model = UNet(len(meta["channels"]), len(meta["classes"]), channels, patch, spacing)
    return model.to(
        memory_format=torch.channels_last if len(patch) == 2 else torch.channels_last_3d
    )


def segmentation_loss(logits: Tensor, masks: Tensor, kind: str) -> Tensor:
    """Soft Dice loss, plus cross entropy if "dice_ce"; logits float32 (B, K, *S), masks int64 (B, *S).

    Dice (Milletari et al., 3DV 2016) is taken per image and foreground class and then averaged. Where a class
    is absent Dice is not defined; there the loss is the share of voxels it is predicted on.
    """
    probabilities = logits.softmax(1)[:, 1:].flatten(2)
    truth = F.one_hot(masks, logits.shape[1]).movedim(-1, 1)[:, 1:].flatten(2)
    common, size, predicted = (probabilities * truth).sum(2), truth.sum(2), probabilities.sum(2)
    dice = 2 * common / (size + predicted).clamp(min=1e-6)
    loss = torch.where(size > 0, 1 - dice, predicted / truth.shape[2]).mean()
    return loss + F.cross_entropy(logits, masks) if kind == "dice_ce" else loss


def window_weights(length: int, size: int) -> list[tuple[int, Tensor]]:
    """Where windows of `size` begin on an axis of `length`, overlapping by half, and their weights (size,).

    Weights are bells (sigma an eighth of the window) that add up to one at every voxel. An axis shorter than
    the window lies in its middle.
    """
    count = max(1, math.ceil((length - size) / max(1, size // 2)) + 1)
    starts = [round(k * (length - size) / max(1, count - 1)) for k in range(count)]
    if length <= size:
        starts = [(length - size) // 2]
    bell = torch.exp(-0.5 * ((torch.arange(size) - (size - 1) / 2) / (size / 8)).square())
    total = torch.zeros(length + 2 * size)
    for start in starts:
        total[start + size : start + 2 * size] += bell
    return [(start, bell / total[start + size : start + 2 * size]) for start in starts]


@torch.no_grad()
def predict_volume(
    model: nn.Module, image: np.ndarray, patch: list[int], slice_axis: int, device: torch.device,
    amp: torch.dtype | None, batch_size: int, mirror: bool = False
) -> Tensor:  # fmt: skip
    """Class probabilities float16 (K, X, Y, Z), on the CPU, of a volume (C, X, Y, Z).

    Windows have the size of the patch; with a patch of two axes they are whole slices. As the windows lie
    on a lattice, their weights are known beforehand to add up to one, so that one array of the result's size
    is all that is kept. `mirror` averages over all ways to flip the axes.
    """
    size, dims = window_size(patch, slice_axis), len(patch)
    flat = slice_axis - 3 if dims == 2 else None
    if flat is not None:
        size = [1 if k == slice_axis else max(s, image.shape[k + 1]) for k, s in enumerate(size)]
    windows = list(
        itertools.product(
            *(window_weights(n, s) for n, s in zip(image.shape[1:], size, strict=True))
        )
    )
    flips = [
        axes for n in range(dims + 1) for axes in itertools.combinations(range(2, dims + 2), n)
    ]
    result = None
    for batch in in_batches(windows, batch_size):
        cuts = np.stack([cut(image, [start for start, _ in window], size) for window in batch])
        images = torch.from_numpy(cuts).to(device, non_blocking=True).float()
        images, mean = images if flat is None else images.squeeze(flat), 0
        for axes in flips if mirror else [()]:
            with torch.autocast(device.type, amp, enabled=amp is not None):
                logits = model(images.flip(axes))
            mean = mean + logits.float().softmax(1).flip(axes) / (len(flips) if mirror else 1)
        mean = (mean if flat is None else mean.unsqueeze(flat)).cpu()
        if result is None:
            result = torch.zeros(mean.shape[1], *image.shape[1:], dtype=torch.float16)
        for window, probabilities in zip(batch, mean, strict=True):
            (x, a), (y, b), (z, c) = window
            inside, place = box_slices([x, y, z], size, image.shape[1:])
            weighted = probabilities * (a[:, None, None] * b[:, None] * c)
            result[(slice(None), *inside)] += weighted[(slice(None), *place)].half()
    return result
