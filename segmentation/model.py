"""A U-Net for slices and volumes, its losses, and the prediction of whole volumes by windows.

The same code serves two and three dimensions: the number of axes of `patch` decides. In the shapes
below B is the batch, C the channels, K the classes (0 is the background), *S the two or three axes
of a patch, (X, Y, Z) the axes of a volume in RAS: to the right, front and top.
"""

import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The layers by the number of axes: slices and volumes.
CONV = {2: nn.Conv2d, 3: nn.Conv3d}
UP_CONV = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORM = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
POOL = {2: nn.AvgPool2d, 3: nn.AvgPool3d}
MEMORY_FORMAT = {2: torch.channels_last, 3: torch.channels_last_3d}

MAX_PATCH = 2**18  # voxels: 512 x 512, or 64 x 64 x 64
MAX_STAGES = 6
MAX_WIDTH = 256  # channels
MAX_ON_DEVICE = 2**30  # bytes of probabilities; larger ones are collected on the CPU


def default_patch(dims: int, meta: dict) -> list[int]:
    """Voxels per axis of a slice (`dims` 2) or volume (3) of median size, by a meta.json."""
    patch = patch_axes(meta["shape"], dims, meta["slice_axis"])
    spacing = patch_axes(meta["spacing"], dims, meta["slice_axis"])
    while math.prod(patch) > MAX_PATCH:  # shorten the side that is longest in mm
        lengths = [voxels * mm for voxels, mm in zip(patch, spacing, strict=True)]
        patch[lengths.index(max(lengths))] -= 1
    return patch


def build_model(meta: dict, channels: int, patch: list[int]) -> "UNet":
    """The U-Net for a meta.json; `channels` is the width of the first residual unit."""
    dims = len(patch)
    spacing = patch_axes(meta["spacing"], dims, meta["slice_axis"])
    model = UNet(len(meta["channels"]), len(meta["classes"]), channels, patch, spacing)
    # The memory layout of cuDNN and oneDNN saves two copies per layer.
    return model.to(memory_format=MEMORY_FORMAT[dims])


# --- patches: boxes of voxels, one voxel thick if they are slices ---


def patch_axes(values: list, dims: int, slice_axis: int) -> list:
    """The values for x, y and z of the axes of a patch: in 2D all but the slice axis."""
    return [value for axis, value in enumerate(values) if dims == 3 or axis != slice_axis]


def window_size(patch: list[int], slice_axis: int) -> list[int]:
    """The patch as a box of voxels (x, y, z): a slice has one voxel along the slice axis."""
    size = list(patch)
    if len(size) == 2:
        size.insert(slice_axis, 1)
    return size


def cut(volume: np.ndarray, corner: list[int], size: list[int]) -> np.ndarray:
    """The box of `size` at `corner` of (..., X, Y, Z), zeros where it reaches out of the volume."""
    inside, place = box_slices(corner, size, volume.shape[-3:])
    box = np.zeros((*volume.shape[:-3], *size), volume.dtype)  # (..., *size)
    box[(..., *place)] = volume[(..., *inside)]
    return box


def box_slices(
    corner: list[int], size: list[int], shape: tuple[int, ...]
) -> tuple[list[slice], list[slice]]:
    """The part of a box that lies in a volume of `shape`: slices of the volume, and of the box."""
    inside = []
    place = []
    for start, length, end in zip(corner, size, shape, strict=True):
        low = max(0, start)
        high = max(0, min(end, start + length))
        inside.append(slice(low, high))
        place.append(slice(low - start, high - start))
    return inside, place


# --- the network ---


class UNet(nn.Module):
    """U-Net (Ronneberger et al., MICCAI 2015): images (B, C, *S) to logits (B, K, *S), any size S.

    A stage is one resolution. On the way down each block computes a stage from the one above; on
    the way up a transposed convolution doubles the resolution, and a block merges the result with
    the features of the same stage on the way down.

    Full resolution costs nearly all the time, so the first stage is thin: half of `channels`, a
    single convolution each way. The stages below are residual units of `channels`, twice as many,
    ... up to 256. `patch` (voxels) and `spacing` (mm) have two or three axes and decide the number
    of stages.
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
        dims = len(patch)
        ones = [1] * dims
        stages = plan_stages(patch, spacing)
        widths = [max(1, channels // 2)]
        widths += [min(channels * 2**k, MAX_WIDTH) for k in range(len(stages) - 1)]

        self.down = nn.ModuleList()  # down[k]: stage k - 1 to stage k, the finest first
        self.up = nn.ModuleList()  # up[k]: stage k + 1 to the resolution of stage k
        self.merge = nn.ModuleList()  # merge[k]: up[k] and down[k], concatenated, to stage k

        # Built stage by stage: the order decides the random weights of each layer.
        for k, (kernel, stride) in enumerate(stages):
            width = widths[k]
            if k == 0:
                self.down.append(conv_unit(in_channels, width, kernel, stride))
            else:
                self.down.append(ResidualUnit(widths[k - 1], width, kernel, stride))
            if k == len(stages) - 1:
                break  # no stage below
            _, scale = stages[k + 1]
            self.up.append(UP_CONV[dims](widths[k + 1], width, scale, scale))
            if k == 0:
                # No norm before the head: it would amplify the features of a structure that an
                # image lacks until they look like the structure.
                self.merge.append(conv_unit(2 * width, width, kernel, ones, norm=False))
            else:
                self.merge.append(ResidualUnit(2 * width, width, kernel, ones))
        self.head = CONV[dims](widths[0], num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []  # the output of each stage on the way down
        for block in self.down:
            # (B, widths[k], *S of stage k): halved where strided, odd sizes rounded up
            x = block(x)
            skips.append(x)
        for k in reversed(range(len(self.up))):
            skip = skips[k]
            x = self.up[k](x)  # (B, widths[k], *S of stage k, or one voxel more where it was odd)
            inside = [slice(voxels) for voxels in skip.shape[2:]]
            x = x[(..., *inside)]  # (B, widths[k], *S of stage k)
            x = torch.cat([x, skip], 1)  # (B, 2 * widths[k], *S of stage k)
            x = self.merge[k](x)  # (B, widths[k], *S of stage k)
        return self.head(x)  # (B, K, *S)


def plan_stages(patch: list[int], spacing: list[float]) -> list[tuple[list[int], list[int]]]:
    """Kernel and stride of each stage for patches of this size (voxels) and spacing (mm).

    Full resolution comes first; a stride is that of the step from the stage above. As in nnU-Net
    (Isensee et al., Nature Methods 2021) an axis of long voxels keeps its resolution, and has
    kernels of 1, until the voxels of the other axes are as long.
    """
    size = list(patch)
    spacing = list(spacing)
    stages = []
    stride = [1] * len(patch)
    while len(stages) < MAX_STAGES:
        thickest = 2 * min(spacing)
        kernel = [1 if mm >= thickest else 3 for mm in spacing]
        stages.append((kernel, stride))

        # An axis is halved as long as at least 4 voxels of the patch remain.
        halvable = [axis for axis, voxels in enumerate(size) if voxels >= 8]
        if not halvable:
            break
        finest = min(spacing[axis] for axis in halvable)
        stride = [1] * len(patch)
        for axis in halvable:
            if spacing[axis] < 2 * finest:
                stride[axis] = 2
                size[axis] //= 2
                spacing[axis] *= 2
    return stages


class ResidualUnit(nn.Module):
    """Two convolutions beside a shortcut (He et al., CVPR 2016).

    From (B, inputs, *S) to (B, outputs, *S / stride): the first convolution strides. The shortcut
    averages instead, so it sees every voxel. A strided 1x1 convolution of few channels in
    channels-last order also writes beyond its memory on a CPU (torch 2.15).
    """

    def __init__(self, inputs: int, outputs: int, kernel: list[int], stride: list[int]) -> None:
        super().__init__()
        dims = len(kernel)
        ones = [1] * dims
        self.first = conv_unit(inputs, outputs, kernel, stride)
        self.second = conv_unit(outputs, outputs, kernel, ones)[:2]  # ReLU comes after the sum
        self.shortcut = nn.Sequential()  # empty: identity
        if max(stride) > 1:
            # Rounds up like the convolution; padding does not count.
            self.shortcut.append(POOL[dims](stride, ceil_mode=True, count_include_pad=False))
        if inputs != outputs:
            self.shortcut.extend(conv_unit(inputs, outputs, ones, ones)[:2])

    def forward(self, x: Tensor) -> Tensor:
        residual = self.second(self.first(x))
        return F.leaky_relu(residual + self.shortcut(x), 0.01, inplace=True)


def conv_unit(
    inputs: int, outputs: int, kernel: list[int], stride: list[int], norm: bool = True
) -> nn.Sequential:
    """Convolution, instance norm, leaky ReLU: a side of S voxels becomes ceil(S / stride)."""
    dims = len(kernel)
    padding = [side // 2 for side in kernel]
    layers = [CONV[dims](inputs, outputs, kernel, stride, padding, bias=not norm)]
    if norm:
        # Instance norm: a batch of volumes may hold only one or two.
        layers.append(NORM[dims](outputs, affine=True))
    layers.append(nn.LeakyReLU(0.01, inplace=True))
    return nn.Sequential(*layers)


# --- losses ---


def dice_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Soft Dice loss (Milletari et al., 3DV 2016).

    Logits float32 (B, K, *S): sums would overflow in half precision. Masks int64 (B, *S).

    Dice is computed per image and foreground class, then averaged: a small structure counts as much
    as a large one. If a class is absent Dice is undefined; the loss is then the share of voxels
    predicted as this class, which has a gradient and is 0 for none.
    """
    truth = F.one_hot(masks, logits.shape[1]).movedim(-1, 1)  # (B, *S) to int64 (B, K, *S)
    truth = truth[:, 1:].flatten(2)  # (B, K - 1, voxels), without the background
    probabilities = logits.softmax(1)  # (B, K, *S)
    probabilities = probabilities[:, 1:].flatten(2)  # (B, K - 1, voxels)

    intersection = (probabilities * truth).sum(2)  # (B, K - 1)
    size = truth.sum(2)  # (B, K - 1)
    predicted = probabilities.sum(2)  # (B, K - 1)
    dice = 2 * intersection / (size + predicted).clamp(min=1e-6)
    false_share = predicted / truth.shape[2]
    return torch.where(size > 0, 1 - dice, false_share).mean()


def dice_ce_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """`dice_loss` plus the cross entropy, which has a gradient in every voxel."""
    return dice_loss(logits, masks) + F.cross_entropy(logits, masks)


LOSSES = {"dice_ce": dice_ce_loss, "dice": dice_loss}


# --- whole volumes ---


@torch.no_grad()
def predict_volume(
    model: nn.Module,
    image: np.ndarray,
    patch: list[int],
    slice_axis: int,
    device: torch.device,
    amp: torch.dtype | None,
    batch_size: int,
) -> Tensor:
    """Class probabilities float16 (K, X, Y, Z) of a volume (C, X, Y, Z).

    The model sees overlapping windows of the size of the patch, `batch_size` at a time; with a
    patch of two axes they are whole slices. Their weights add up to one, so a single array of the
    size of the result is enough. It is on the device, or on the CPU above MAX_ON_DEVICE bytes.
    """
    shape = image.shape[1:]
    is_slice = len(patch) == 2
    thin = slice_axis - 3  # the axis that a slice lacks, counted from the end
    size = window_size(patch, slice_axis)  # voxels in x, y and z
    if is_slice:
        size = np.maximum(size, shape).tolist()
        size[slice_axis] = 1
    along_axes = []  # start and weights of the windows along each axis
    for axis_windows in map(window_weights, shape, size):
        along_axes.append([(start, weights.to(device)) for start, weights in axis_windows])
    windows = list(itertools.product(*along_axes))

    result = None
    for first in range(0, len(windows), batch_size):
        batch = windows[first : first + batch_size]
        cuts = []
        for window in batch:
            corner = [start for start, _ in window]
            cuts.append(cut(image, corner, size))  # (C, *size)
        images = torch.from_numpy(np.stack(cuts))  # (B, C, *size)
        images = images.to(device, non_blocking=True).float()
        if is_slice:
            images = images.squeeze(thin)  # (B, C, *S)
        with torch.autocast(device.type, amp, enabled=amp is not None):
            logits = model(images)  # (B, K, *S)
        probabilities = logits.float().softmax(1)
        if is_slice:
            probabilities = probabilities.unsqueeze(thin)  # (B, K, *size)
        if result is None:  # the first output tells the number of classes
            result_shape = (probabilities.shape[1], *shape)
            is_large = 2 * math.prod(result_shape) > MAX_ON_DEVICE
            place = "cpu" if is_large else device
            result = torch.zeros(result_shape, dtype=torch.float16, device=place)
        for window, values in zip(batch, probabilities, strict=True):
            add_window(result, window, values)
    return result


def window_weights(length: int, size: int) -> list[tuple[int, Tensor]]:
    """Start and weights (size,) of the windows of `size` on an axis of `length` voxels.

    Windows overlap by half. Their Gaussian weights, because a window is least reliable at its edge,
    add up to one at every voxel. An axis shorter than the window lies in the middle of it.
    """
    if length <= size:
        starts = [(length - size) // 2]  # negative: the window begins before the axis
    else:
        step = max(1, size // 2)
        count = math.ceil((length - size) / step) + 1
        starts = [round(k * (length - size) / (count - 1)) for k in range(count)]

    distance = torch.arange(size) - (size - 1) / 2  # voxels from the window's middle
    sigma = size / 8  # as in nnU-Net
    bell = torch.exp(-0.5 * (distance / sigma).square())  # (size,)
    # The sum of all bells, with a margin for windows that reach beyond the axis
    total = torch.zeros(length + 2 * size)
    for start in starts:
        total[start + size : start + 2 * size] += bell
    return [(start, bell / total[start + size : start + 2 * size]) for start in starts]


def add_window(
    result: Tensor, window: tuple[tuple[int, Tensor], ...], probabilities: Tensor
) -> None:
    """Add the probabilities of a window, (K, *size), to those of the volume, (K, X, Y, Z).

    `window` has the start and the weights for each of x, y and z.
    """
    (x, weights_x), (y, weights_y), (z, weights_z) = window
    weights = weights_x[:, None, None] * weights_y[:, None] * weights_z  # (*size)
    inside, place = box_slices([x, y, z], list(weights.shape), result.shape[1:])
    weighted = (probabilities * weights).half()  # (K, *size)
    result[(slice(None), *inside)] += weighted[(slice(None), *place)].to(result.device)
