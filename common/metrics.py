"""Metrics as pure functions on tensors: counts or per-case values of a whole split, divided once.

Shapes: `labels` int64 (N,) with values 0..C-1, `scores` float (N,) for the positive class of a binary
task, `probabilities` float (N, C), boxes float (N, 4). A figure that is not defined (one class only, nothing
predicted, no cases at all, a score that is NaN) is NaN, never 0 or 1.
"""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from common.checkpoint import write_json

FEW_GROUPS = 10  # below this, an interval promises more than it holds
# The 97.5 % quantiles of Student's t for 1 to 18 degrees of freedom.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145,
           2.131, 2.120, 2.110, 2.101)  # fmt: skip


def divide(a: float, b: float) -> float:
    return float(a) / float(b) if b else math.nan


def confusion_matrix(labels: Tensor, predictions: Tensor, num_classes: int) -> Tensor:
    """Counts int64 (C, C): rows are the truth, columns the prediction."""
    counts = torch.bincount(labels * num_classes + predictions, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes)


def roc_curve(labels: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """False positive rate, true positive rate and threshold (predict 1 where score >= threshold).

    Float64, one of each per distinct score, from (0, 0, inf) to (1, 1, smallest score). Rates of a class
    without cases are NaN, and all rates if a score is NaN: it has no place in the order.
    """
    undefined = scores.isnan().any()
    scores, order = scores.double().sort(descending=True)
    positive = labels[order].double()
    last = torch.ones_like(positive, dtype=torch.bool)
    last[:-1] = scores[1:] != scores[:-1]  # ties move together
    tp, fp = positive.cumsum(0)[last], (1 - positive).cumsum(0)[last]
    start = torch.zeros(1, dtype=torch.float64)
    fpr, tpr = (
        torch.cat([start, fp]) / (1 - positive).sum(),
        torch.cat([start, tp]) / positive.sum(),
    )
    if undefined:
        fpr, tpr = torch.full_like(fpr, math.nan), torch.full_like(tpr, math.nan)
    return fpr, tpr, torch.cat([start + math.inf, scores[last]])


def auroc(labels: Tensor, scores: Tensor) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative, ties half."""
    fpr, tpr, _ = roc_curve(labels, scores)
    return torch.trapezoid(tpr, fpr).item() if len(labels) else math.nan


def average_precision(labels: Tensor, scores: Tensor) -> float:
    """Sum of precision times the step in recall over the distinct scores (no interpolation)."""
    scores, order = scores.double().sort(descending=True)
    positive = labels[order].double()
    last = torch.ones_like(positive, dtype=torch.bool)
    last[:-1] = scores[1:] != scores[:-1]
    tp, n = positive.cumsum(0)[last], torch.arange(1, len(labels) + 1)[last]
    step = torch.diff(tp, prepend=torch.zeros(1, dtype=torch.float64))
    if scores.isnan().any():
        return math.nan
    return divide((tp / n * step).sum(), positive.sum())


def binary_metrics(labels: Tensor, scores: Tensor, threshold: float = 0.5) -> dict[str, float]:
    """Figures at one threshold (1 where score >= threshold)."""
    predictions = (scores.double() >= threshold).long()  # in float32 the threshold would be rounded
    (tn, fp), (fn, tp) = confusion_matrix(labels, predictions, 2).tolist()
    sensitivity, specificity = divide(tp, tp + fn), divide(tn, tn + fp)
    figures = {
        "accuracy": divide(tp + tn, len(labels)),
        "balanced_accuracy": (sensitivity + specificity) / 2,
        "sensitivity": sensitivity,
        "specificity": specificity,
        "precision": divide(tp, tp + fp),
        "f1": divide(2 * tp, 2 * tp + fp + fn),
    }
    if scores.isnan().any() or math.isnan(threshold):
        return dict.fromkeys(figures, math.nan)
    return figures


def youden_threshold(labels: Tensor, scores: Tensor) -> float:
    """Threshold with the largest sensitivity + specificity (Youden 1950), halfway to the next lower score."""
    fpr, tpr, thresholds = roc_curve(labels, scores)
    if (tpr - fpr).isnan().any():
        return math.nan
    best = int((tpr - fpr)[1:].argmax()) + 1
    return thresholds[best : best + 2].mean().item()


def best_threshold(labels: Tensor, probabilities: Tensor) -> float | None:
    """Youden's threshold for probabilities (N, 2) of the positive class; None for more classes."""
    if probabilities.shape[1] != 2:
        return None
    return youden_threshold(labels, probabilities[:, 1])


def sensitivity_at_specificity(labels: Tensor, scores: Tensor, specificity: float) -> float:
    """Largest sensitivity among the thresholds whose specificity is at least this."""
    fpr, tpr, _ = roc_curve(labels, scores)
    return tpr[1 - fpr >= specificity - 1e-9].max().item() if fpr.isfinite().all() else math.nan


def specificity_at_sensitivity(labels: Tensor, scores: Tensor, sensitivity: float) -> float:
    """Largest specificity among the thresholds whose sensitivity is at least this."""
    return sensitivity_at_specificity(1 - labels, -scores, sensitivity)


def brier(labels: Tensor, probabilities: Tensor) -> float:
    """Mean squared error of the probabilities (Brier 1950); binary: of the positive class alone."""
    truth = torch.nn.functional.one_hot(labels, probabilities.shape[1]).double()
    error = (probabilities.double() - truth).square().sum(1).mean().item()
    return error / 2 if probabilities.shape[1] == 2 else error


def classification_metrics(
    labels: Tensor, probabilities: Tensor, threshold: float | None = None
) -> dict[str, float]:
    """All figures of a split. Binary: at 0.5 and, with the suffix _tuned, at `threshold`.

    More than two classes: the prediction is the largest probability, and auroc, average_precision,
    sensitivity, specificity, precision and f1 are means over the classes, each against the rest (macro); NaN
    if they are not defined for one of the classes.
    """
    classes = probabilities.shape[1]
    if classes == 2:
        scores = probabilities[:, 1]
        figures = {
            **binary_metrics(labels, scores),
            "auroc": auroc(labels, scores),
            "average_precision": average_precision(labels, scores),
            "sensitivity_at_95_specificity": sensitivity_at_specificity(labels, scores, 0.95),
            "specificity_at_95_sensitivity": specificity_at_sensitivity(labels, scores, 0.95),
        }
        if threshold is not None:
            figures |= {
                f"{k}_tuned": v for k, v in binary_metrics(labels, scores, threshold).items()
            }
    else:
        predictions = probabilities.argmax(1)
        rest = []
        for k in range(classes):
            truth = (labels == k).long()
            one = binary_metrics(truth, (predictions == k).double())
            rest.append({**one, "auroc": auroc(truth, probabilities[:, k]),
                         "average_precision": average_precision(truth, probabilities[:, k])})  # fmt: skip
        figures = {name: sum(one[name] for one in rest) / classes for name in rest[0]}
        figures["accuracy"] = (predictions == labels).double().mean().item()
        figures["balanced_accuracy"] = figures["sensitivity"]  # mean recall over the classes
    if probabilities.isnan().any():
        figures = dict.fromkeys(figures, math.nan)
    return {**figures, "brier": brier(labels, probabilities)}


def box_iou(pred: Tensor, truth: Tensor) -> Tensor:
    """Intersection over union (N,) of boxes (N, 4), each with that of the same row (torchvision: all pairs).

    Inverted or empty boxes have IoU 0.
    """
    overlap = (
        (torch.minimum(pred, truth)[:, 2:] - torch.maximum(pred, truth)[:, :2]).clamp(min=0).prod(1)
    )
    area = [(boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1) for boxes in (pred, truth)]
    iou = overlap / (area[0] + area[1] - overlap)
    return torch.where(overlap == 0, 0, iou)  # NaN stays NaN


def detection_metrics(pred: Tensor, truth: Tensor) -> dict[str, float]:
    """Figures of one box per image; boxes (N, 4) xmin ymin xmax ymax in fractions of the image.

    iou_75 is the share of the images with an IoU of at least 0.75; mse_224 the mean squared error of the four
    coordinates in pixels of the image squashed to 224x224.
    """
    iou = box_iou(pred, truth)
    shares = {f"iou_{k}": (iou >= k / 100).double().mean().item() for k in (50, 75, 90)}
    mse = (224 * (pred - truth)).double().square().mean().item()
    median = iou.quantile(0.5).item() if len(iou) else math.nan
    figures = {"mean_iou": iou.mean().item(), "median_iou": median, **shares, "mse_224": mse}
    return dict.fromkeys(figures, math.nan) if iou.isnan().any() else figures


def bootstrap(
    function: Callable[[Tensor], dict[str, float]],
    groups: list[str],
    samples: int = 1000,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Value, 95 % percentile interval and number of undefined samples for every figure of `function(rows)`.

    Whole groups (patients) are drawn with replacement, because images of one patient are not independent
    (Davison & Hinkley 1997, section 3.8). Samples in which a figure is NaN are left out of it and counted.
    One group has no interval, nor has a figure that is the same in all samples: the ends are NaN.

    Below 20 groups the quantiles are taken further out, by as much as Student's t is wider than the normal
    distribution (the expanded percentile interval of Hesterberg, The American Statistician 2015).
    """
    names = {group: k for k, group in enumerate(dict.fromkeys(groups))}
    if len(names) == 1:
        samples = 0
    members = torch.tensor([names[group] for group in groups])
    rows = members.argsort(stable=True)
    starts = torch.bincount(members, minlength=len(names)).cumsum(0).tolist()
    by_group = [rows[a:b] for a, b in zip([0, *starts], starts, strict=False)]
    generator = torch.Generator().manual_seed(seed)
    value = function(torch.arange(len(groups)))
    tail = 0.025
    if 2 <= len(names) < 20:
        z = STUDENT[len(names) - 2] * math.sqrt(len(names) / (len(names) - 1))
        tail = 0.5 * math.erfc(z / math.sqrt(2))
    drawn = []
    for _ in range(samples):
        picks = torch.randint(len(by_group), (len(by_group),), generator=generator).tolist()
        drawn.append(function(torch.cat([by_group[k] for k in picks])))
    summary = {}
    for name in value:
        sample = torch.tensor([figures[name] for figures in drawn], dtype=torch.float64)
        finite = sample[sample.isfinite()]
        low, high = (
            finite.quantile(q).item() if len(finite) else math.nan for q in (tail, 1 - tail)
        )
        if high - low < 1e-12 * max(1.0, abs(high)):
            low = high = math.nan
        undefined = len(sample) - len(finite)
        summary[name] = {"value": value[name], "low": low, "high": high, "undefined": undefined}
    return summary


def print_summary(summary: dict[str, dict[str, float]], groups: list[str]) -> None:
    """Print every metric of `bootstrap` with its interval, and what that is worth with few groups."""
    count = len(set(groups))
    for name, metric in summary.items():
        interval = (
            "({low:.4f} to {high:.4f})".format(**metric) if math.isfinite(metric["low"]) else ""
        )
        print(f"{name:30} {metric['value']:.4f}  {interval}".rstrip())
    if count == 1:
        print("note: one patient, so no intervals")
    elif count < FEW_GROUPS:
        print(f"note: the intervals rest on {count} patients and are too narrow: "
              "over 5, about 88 % of such intervals hold the true value, not 95 %")  # fmt: skip
    if "auroc" in summary and summary["auroc"]["value"] > 0.95 and count < 600:
        print("note: near 1 the interval of AUROC lies too high: at 0.99, with 50 patients of each class, "
              "84 % of such intervals hold the true value")  # fmt: skip


def write_report(out: Path, summary: dict, groups: list[str], cases: list[dict], run: dict) -> None:
    """Print the metrics of `bootstrap` and write metrics.json: {"summary", "cases", "run"}.

    `cases` has a row per case, in the order of `groups` (its patient), `run` says how they came about.
    """
    print_summary(summary, groups)
    write_json(out / "metrics.json", {"summary": summary, "cases": cases, "run": run})


def overlap(truth: Tensor, prediction: Tensor) -> dict[str, float]:
    """Dice and IoU of two bool masks. Both empty: NaN; only the truth empty: 0."""
    common, total = int((truth & prediction).sum()), int(truth.sum()) + int(prediction.sum())
    return {"dice": divide(2 * common, total), "iou": divide(common, total - common)}


def dice_scores(truth: Tensor, prediction: Tensor, num_classes: int) -> Tensor:
    """Dice float64 (num_classes - 1,) of the foreground classes of two maps of class numbers."""
    masks = ((truth == k, prediction == k) for k in range(1, num_classes))
    return torch.tensor([overlap(*pair)["dice"] for pair in masks], dtype=torch.float64)


def dice_figures(scores: Tensor, classes: list[str]) -> dict[str, float]:
    """dice: mean over the cases of the mean over the classes; dice_NAME: of each class. NaN are left out.

    `scores` float64 (N, classes - 1); the first class is the background.
    """
    figures = {"dice": scores.nanmean(1).nanmean().item()}
    return figures | {
        f"dice_{name}": scores[:, k].nanmean().item() for k, name in enumerate(classes[1:])
    }


def surface(mask: Tensor) -> Tensor:
    """Voxels of a bool mask (X, Y, Z) with a face neighbour outside; beyond the volume is outside."""
    padded = torch.nn.functional.pad(mask, [1] * 6)
    core = padded.clone()
    for axis in range(3):
        core &= padded.roll(1, axis) & padded.roll(-1, axis)
    return mask & ~core[1:-1, 1:-1, 1:-1]


def distances_to(points: Tensor, feature: Tensor, spacing: list[float]) -> Tensor:
    """Distance in mm, float64 (N,), from voxels `points` (N, 3) to the nearest one of `feature` (X, Y, Z).

    Exact: squared distances are separable (Felzenszwalb & Huttenlocher, Theory of Computing 2012), so one
    axis after the other takes the minimum along its lines of the value plus the squared way to it. The first
    only has to look for the nearest feature on both sides, and the last one is needed at the points only.
    """
    middle, last, first = sorted(range(3), key=lambda axis: feature.shape[axis])
    feature, points = feature.permute(first, last, middle), points[:, [first, last, middle]]
    steps = [spacing[axis] for axis in (first, last, middle)]

    far = (
        2**14
    )  # voxels, farther than any volume is long; int16 is a quarter of the traffic of float64
    index = torch.arange(len(feature), dtype=torch.int16).view(-1, 1, 1)
    away = index - torch.where(feature, index, -far).cummax(0).values
    after = torch.where(feature, index, far).flip(0).cummin(0).values.flip(0)
    away = torch.minimum(away, after.sub_(index), out=after)
    squared = away.double().mul_(steps[0]).square_().masked_fill_(away > far // 2, math.inf)
    squared = squared.view(-1, feature.shape[2])

    for lines in squared.split(1024):  # small enough for the cache of the processor
        start, farthest = lines.clone(), lines.amax().item()
        for k in range(1, lines.shape[1]):
            cost = (k * steps[2]) ** 2
            if cost >= farthest:  # from here on nothing can get smaller
                break
            torch.minimum(lines[:, k:], start[:, :-k] + cost, out=lines[:, k:])
            torch.minimum(lines[:, :-k], start[:, k:] + cost, out=lines[:, :-k])
            if k % 8 == 0:
                farthest = lines.amax().item()
    squared = squared.view(feature.shape)

    way = torch.arange(feature.shape[1], dtype=torch.float64) * steps[1]
    cost = (way[:, None] - way).square()
    found = [
        (squared[x, :, z] + cost[y]).amin(1)
        for x, y, z in (p.unbind(1) for p in points.split(16384))
    ]
    return torch.cat(found).sqrt()


def surface_distances(truth: Tensor, prediction: Tensor, spacing: list[float]) -> Tensor:
    """Distances in mm, both ways in one tensor, between the surfaces of bool masks (X, Y, Z) with content."""
    box = []
    for axis in range(3):
        others = tuple(k for k in range(3) if k != axis)
        used = (truth | prediction).any(others[1]).any(others[0]).nonzero()
        box.append(slice(int(used[0]), int(used[-1]) + 1))
    truth, prediction = surface(truth[tuple(box)]), surface(prediction[tuple(box)])
    there = distances_to(truth.nonzero(), prediction, spacing)
    return torch.cat([there, distances_to(prediction.nonzero(), truth, spacing)])


def segmentation_metrics(
    truth: Tensor, prediction: Tensor, spacing: list[float]
) -> dict[str, float]:
    """Figures of one structure: bool masks (X, Y, Z), voxels of `spacing` mm.

    hd95_mm is the 95th percentile and assd_mm the mean of both directed sets of surface distances pooled;
    volume_error_ml is the absolute difference. Both masks empty: NaN but for the volume; one empty: distances
    are the volume's diagonal.
    """
    figures = {**overlap(truth, prediction), "hd95_mm": math.nan, "assd_mm": math.nan}
    sizes = int(truth.sum()), int(prediction.sum())
    if all(sizes):
        distances = surface_distances(truth, prediction, spacing)
        figures |= {"hd95_mm": distances.quantile(0.95).item(), "assd_mm": distances.mean().item()}
    elif any(sizes):
        diagonal = math.dist([0] * 3, [n * s for n, s in zip(truth.shape, spacing, strict=True)])
        figures |= {"hd95_mm": diagonal, "assd_mm": diagonal}
    return figures | {"volume_error_ml": abs(sizes[0] - sizes[1]) * math.prod(spacing) / 1000}
