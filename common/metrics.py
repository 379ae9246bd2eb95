"""Metrics as pure functions on tensors: counts or per-case values of a whole split, divided once.

Shapes: `labels` int64 (N,) with values 0..C-1, `scores` float (N,) for the positive class of a
binary task, `probabilities` float (N, C), boxes float (N, 4). A metric that is not defined (one
class only, nothing predicted, no cases at all, a score that is NaN) is NaN, never 0 or 1.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from common.checkpoint import write_json

FEW_GROUPS = 10  # below this, an interval promises more than it holds
FEW_CASES = 5  # below this, a value of --by has no metrics
# Columns of the printed table of folds: those of them that a task has
FOLD_COLUMNS = (
    "accuracy",
    "balanced_accuracy",
    "auroc",
    "sensitivity",
    "specificity",
    "mean_iou",
    "iou_75",
    "mae_px",
    "mae_mm",
    "dice",
    "iou",
    "hd95_mm",
    "assd_mm",
)
# 97.5 % quantiles of Student's t for 1 to 18 degrees of freedom
STUDENT = """
    12.706 4.303 3.182 2.776 2.571 2.447 2.365 2.306 2.262
    2.228 2.201 2.179 2.160 2.145 2.131 2.120 2.110 2.101
"""


def divide(a: float, b: float) -> float:
    """a / b, and NaN where b is 0: a metric of nothing is not defined."""
    return float(a) / float(b) if b else math.nan


# --- classification ---


def classification_metrics(
    labels: Tensor,
    probabilities: Tensor,
    threshold: float | Tensor | None = None,
    names: list[str] | None = None,
) -> dict[str, float]:
    """All metrics of a split. Binary: at 0.5 and, with the suffix _tuned, at `threshold`.

    `threshold` is one for all images, or float64 (N,), one for each (folds have their own).
    Several labels an image, int64 (N, C): `multi_label_metrics` with their `names`.
    More than two classes: the prediction is the largest probability, and auroc, average_precision,
    sensitivity, specificity, precision and f1 are means over the classes, each against the others
    (macro); NaN if they are not defined for one of the classes.
    """
    if labels.ndim == 2:
        return multi_label_metrics(labels, probabilities, threshold, names)
    if probabilities.shape[1] == 2:
        scores = probabilities[:, 1]
        metrics = binary_metrics(labels, scores)
        metrics["auroc"] = auroc(labels, scores)
        metrics["average_precision"] = average_precision(labels, scores)
        metrics["sensitivity_at_95_specificity"] = sensitivity_at_specificity(labels, scores, 0.95)
        metrics["specificity_at_95_sensitivity"] = specificity_at_sensitivity(labels, scores, 0.95)
        if threshold is not None:
            for name, value in binary_metrics(labels, scores, threshold).items():
                metrics[f"{name}_tuned"] = value
    else:
        metrics = macro_metrics(labels, probabilities)
    if probabilities.isnan().any():
        metrics = dict.fromkeys(metrics, math.nan)
    return {**metrics, "brier": brier(labels, probabilities)}


def multi_label_metrics(
    labels: Tensor, probabilities: Tensor, thresholds: Tensor | None, names: list[str]
) -> dict[str, float]:
    """The metrics of each of several labels, with its name at the end, and their means.

    `labels` int64 (N, C) are 1, 0, or -1 for unknown: such images are left out of that label.
    `thresholds` float64 (N, C) are those of the metrics called _tuned. The means are over labels of
    which there are both values, and NaN if a metric is not defined for one of these.
    """
    of_each_label = []
    of_whole_labels = []  # those with both values
    for k in range(len(names)):
        known = labels[:, k] >= 0
        truth = labels[known, k]  # (M,), M <= N
        positive = probabilities[known, k]
        pair = torch.stack([1 - positive, positive], 1)  # (M, 2): a binary task
        threshold = None if thresholds is None else thresholds[known, k]
        metrics = classification_metrics(truth, pair, threshold)
        of_each_label.append(metrics)
        if len(truth) and truth.min() < truth.max():
            of_whole_labels.append(metrics)
    means = {}
    for name in of_each_label[0]:
        values = [metrics[name] for metrics in of_whole_labels]
        means[name] = divide(sum(values), len(values))
    for label, metrics in zip(names, of_each_label, strict=True):
        means |= {f"{name}_{label}": value for name, value in metrics.items()}
    return means


def binary_metrics(
    labels: Tensor, scores: Tensor, threshold: float | Tensor = 0.5
) -> dict[str, float]:
    """Metrics at one threshold (1 where score >= threshold), or at one for each score (N,)."""
    threshold = torch.as_tensor(threshold, dtype=torch.float64)  # float32 would round it
    predictions = (scores.double() >= threshold).long()
    (tn, fp), (fn, tp) = confusion_matrix(labels, predictions, 2).tolist()
    sensitivity = divide(tp, tp + fn)
    specificity = divide(tn, tn + fp)
    metrics = {
        "accuracy": divide(tp + tn, len(labels)),
        "balanced_accuracy": (sensitivity + specificity) / 2,
        "sensitivity": sensitivity,
        "specificity": specificity,
        "precision": divide(tp, tp + fp),
        "f1": divide(2 * tp, 2 * tp + fp + fn),
    }
    if scores.isnan().any() or threshold.isnan().any():
        return dict.fromkeys(metrics, math.nan)
    return metrics


def macro_metrics(labels: Tensor, probabilities: Tensor) -> dict[str, float]:
    """Means over the classes, each against the others; accuracy over all images."""
    classes = probabilities.shape[1]
    predictions = probabilities.argmax(1)
    of_each_class = []
    for k in range(classes):
        truth = (labels == k).long()
        metrics = binary_metrics(truth, (predictions == k).double())
        metrics["auroc"] = auroc(truth, probabilities[:, k])
        metrics["average_precision"] = average_precision(truth, probabilities[:, k])
        of_each_class.append(metrics)
    means = {}
    for name in of_each_class[0]:
        means[name] = sum(metrics[name] for metrics in of_each_class) / classes
    means["accuracy"] = (predictions == labels).double().mean().item()
    means["balanced_accuracy"] = means["sensitivity"]  # mean recall over the classes
    return means


def confusion_matrix(labels: Tensor, predictions: Tensor, num_classes: int) -> Tensor:
    """Counts int64 (C, C): rows are the truth, columns the prediction."""
    # The pair (truth, prediction) as one number, so that one pass counts all pairs
    counts = torch.bincount(labels * num_classes + predictions, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes)


def roc_curve(labels: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """False positive rate, true positive rate and threshold (predict 1 where score >= threshold).

    Float64, one of each per distinct score, from (0, 0, inf) to (1, 1, smallest score). Rates of a
    class without cases are NaN, and all rates if a score is NaN: it has no place in the order.
    """
    thresholds, tp, fp = count_by_threshold(labels, scores)
    start = torch.zeros(1, dtype=torch.float64)
    positives = labels.double().sum()
    fpr = torch.cat([start, fp]) / (len(labels) - positives)
    tpr = torch.cat([start, tp]) / positives
    if scores.isnan().any():
        fpr = torch.full_like(fpr, math.nan)
        tpr = torch.full_like(tpr, math.nan)
    return fpr, tpr, torch.cat([start + math.inf, thresholds])


def count_by_threshold(labels: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Distinct scores, falling, and the true and false positives at each; float64 (T,)."""
    scores, order = scores.double().sort(descending=True)
    positive = labels[order].double()
    is_last = torch.ones_like(positive, dtype=torch.bool)
    is_last[:-1] = scores[1:] != scores[:-1]  # of a tie only the last: ties move together
    true_positives = positive.cumsum(0)[is_last]
    false_positives = (1 - positive).cumsum(0)[is_last]
    return scores[is_last], true_positives, false_positives


def auroc(labels: Tensor, scores: Tensor) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative, ties half."""
    fpr, tpr, _ = roc_curve(labels, scores)
    return torch.trapezoid(tpr, fpr).item() if len(labels) else math.nan


def average_precision(labels: Tensor, scores: Tensor) -> float:
    """Sum of precision times the step in recall over the distinct scores (no interpolation)."""
    if scores.isnan().any():
        return math.nan
    _, tp, fp = count_by_threshold(labels, scores)
    precision = tp / (tp + fp)
    new_positives = torch.diff(tp, prepend=torch.zeros(1, dtype=torch.float64))
    return divide((precision * new_positives).sum(), labels.sum())


def best_threshold(
    labels: Tensor, probabilities: Tensor, point: tuple[str, float] | None = None
) -> float | list[float] | None:
    """Threshold for probabilities (N, 2) of the positive class; None for more classes.

    That of the operating point, such as ("sensitivity", 0.95), or without one Youden's. Of several
    labels an image, (N, C), one for each; NaN without images that have and that lack it.
    """
    if labels.ndim == 2:
        thresholds = []
        for truth, scores in zip(labels.T, probabilities.T, strict=True):
            known = truth >= 0
            pair = torch.stack([1 - scores, scores], 1)[known]
            thresholds.append(best_threshold(truth[known], pair, point))
        return thresholds
    if probabilities.shape[1] != 2:
        return None
    if point is None:
        return youden_threshold(labels, probabilities[:, 1])
    return threshold_at(labels, probabilities[:, 1], *point)


def youden_threshold(labels: Tensor, scores: Tensor) -> float:
    """Threshold of the largest sensitivity + specificity (Youden 1950).

    It lies halfway to the next lower score.
    """
    fpr, tpr, thresholds = roc_curve(labels, scores)
    youden = tpr - fpr  # sensitivity + specificity - 1
    if youden.isnan().any():
        return math.nan
    best = int(youden[1:].argmax()) + 1  # the first threshold is infinite
    return thresholds[best : best + 2].mean().item()


def threshold_at(labels: Tensor, scores: Tensor, name: str, least: float) -> float:
    """Threshold where "sensitivity" or "specificity" is at least this and the other is largest.

    It lies halfway to the next lower score, or just above all scores if it has to.
    """
    fpr, tpr, thresholds = roc_curve(labels, scores)
    if (tpr - fpr).isnan().any():
        return math.nan
    if name == "sensitivity":
        chosen = int((tpr >= least - 1e-9).nonzero()[0])  # it rises along the curve
    else:
        chosen = int((1 - fpr >= least - 1e-9).nonzero()[-1])  # it falls
    if chosen == 0:  # nothing is positive there
        return math.nextafter(thresholds[1].item(), math.inf)
    return thresholds[chosen : chosen + 2].mean().item()


def sensitivity_at_specificity(labels: Tensor, scores: Tensor, specificity: float) -> float:
    """Largest sensitivity among the thresholds whose specificity is at least this."""
    fpr, tpr, _ = roc_curve(labels, scores)
    if not fpr.isfinite().all():
        return math.nan
    return tpr[1 - fpr >= specificity - 1e-9].max().item()  # 1 - 0.05 is not quite 0.95


def specificity_at_sensitivity(labels: Tensor, scores: Tensor, sensitivity: float) -> float:
    """Largest specificity among the thresholds whose sensitivity is at least this."""
    # With the classes exchanged one is called the other.
    return sensitivity_at_specificity(1 - labels, -scores, sensitivity)


def brier(labels: Tensor, probabilities: Tensor) -> float:
    """Mean squared error of the probabilities (Brier 1950); binary: of the positive class alone."""
    truth = torch.nn.functional.one_hot(labels, probabilities.shape[1]).double()
    error = (probabilities.double() - truth).square().sum(1).mean().item()
    return error / 2 if probabilities.shape[1] == 2 else error


# --- detection ---


def detection_metrics(pred: Tensor, truth: Tensor) -> dict[str, float]:
    """Metrics of one box per image; boxes (N, 4) xmin ymin xmax ymax in fractions of the image.

    iou_75 is the share of the images with an IoU of at least 0.75; mse_224 the mean squared error
    of the four coordinates in pixels of the image squashed to 224x224, and median_se_224 the median
    of the images, because one wrong label can be half of the mean.
    """
    iou = box_iou(pred, truth)
    squared_error = (224 * (pred - truth)).double().square().mean(1)  # (N,)
    metrics = {
        "mean_iou": iou.mean().item(),
        "median_iou": iou.quantile(0.5).item() if len(iou) else math.nan,
        "iou_50": (iou >= 0.50).double().mean().item(),
        "iou_75": (iou >= 0.75).double().mean().item(),
        "iou_90": (iou >= 0.90).double().mean().item(),
        "mse_224": squared_error.mean().item(),
        "median_se_224": squared_error.quantile(0.5).item() if len(iou) else math.nan,
    }
    return dict.fromkeys(metrics, math.nan) if iou.isnan().any() else metrics


def box_iou(pred: Tensor, truth: Tensor) -> Tensor:
    """Intersection over union (N,) of boxes (N, 4), each with that of the same row.

    Inverted or empty boxes have IoU 0. (torchvision's box_iou is that of all pairs.)
    """
    top_left = torch.maximum(pred, truth)[:, :2]  # (N, 2), of the intersection
    bottom_right = torch.minimum(pred, truth)[:, 2:]
    overlap = (bottom_right - top_left).clamp(min=0).prod(1)  # (N,), 0 where they do not meet
    areas = [(boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1) for boxes in (pred, truth)]
    iou = overlap / (areas[0] + areas[1] - overlap)
    return torch.where(overlap == 0, 0, iou)  # NaN stays NaN


# --- segmentation ---


def segmentation_metrics(
    truth: Tensor, prediction: Tensor, spacing: list[float]
) -> dict[str, float]:
    """Metrics of one structure: bool masks (X, Y, Z), voxels of `spacing` mm.

    hd95_mm is the 95th percentile and assd_mm the mean of both directed sets of surface distances
    pooled; volume_error_ml is the absolute difference. Both masks empty: NaN but for the volume;
    one empty: distances are the volume's diagonal.
    """
    metrics = {**overlap(truth, prediction), "hd95_mm": math.nan, "assd_mm": math.nan}
    true_size = int(truth.sum())
    predicted_size = int(prediction.sum())
    if true_size and predicted_size:
        distances = surface_distances(truth, prediction, spacing)
        metrics["hd95_mm"] = distances.quantile(0.95).item()
        metrics["assd_mm"] = distances.mean().item()
    elif true_size or predicted_size:
        lengths = [n * mm for n, mm in zip(truth.shape, spacing, strict=True)]
        diagonal = math.hypot(*lengths)
        metrics |= {"hd95_mm": diagonal, "assd_mm": diagonal}
    error_ml = abs(true_size - predicted_size) * math.prod(spacing) / 1000
    return metrics | {"volume_error_ml": error_ml}


def overlap(truth: Tensor, prediction: Tensor) -> dict[str, float]:
    """Dice and IoU of two bool masks. Both empty: NaN; only the truth empty: 0."""
    common = int((truth & prediction).sum())
    total = int(truth.sum()) + int(prediction.sum())
    return {"dice": divide(2 * common, total), "iou": divide(common, total - common)}


def dice_scores(truth: Tensor, prediction: Tensor, num_classes: int) -> Tensor:
    """Dice float64 (num_classes - 1,) of the foreground classes of two maps of class numbers."""
    scores = [overlap(truth == k, prediction == k)["dice"] for k in range(1, num_classes)]
    return torch.tensor(scores, dtype=torch.float64)


def dice_metrics(scores: Tensor, classes: list[str]) -> dict[str, float]:
    """dice: mean over the cases of the mean over the classes; dice_NAME: of each class.

    `scores` float64 (N, classes - 1), NaN are left out; the first class is the background.
    """
    metrics = {"dice": scores.nanmean(1).nanmean().item()}
    for k, name in enumerate(classes[1:]):
        metrics[f"dice_{name}"] = scores[:, k].nanmean().item()
    return metrics


def surface_distances(truth: Tensor, prediction: Tensor, spacing: list[float]) -> Tensor:
    """Distances in mm between the surfaces of bool masks (X, Y, Z) with content, both ways.

    Of a volume of one slice, a picture, the surfaces are outlines.
    """
    # A picture has no neighbours in front and behind; taken as borders they would be surface.
    axes = [axis for axis in range(3) if truth.shape[axis] > 1] or [0]
    box = []  # the part of the volume that holds both: distances do not look beyond it
    for axis in range(3):
        others = tuple(k for k in range(3) if k != axis)
        used = (truth | prediction).any(others[1]).any(others[0]).nonzero()
        box.append(slice(int(used[0]), int(used[-1]) + 1))
    truth = surface(truth[tuple(box)], axes)
    prediction = surface(prediction[tuple(box)], axes)
    from_truth = distances_to(truth.nonzero(), prediction, spacing)
    from_prediction = distances_to(prediction.nonzero(), truth, spacing)
    return torch.cat([from_truth, from_prediction])


def surface(mask: Tensor, axes: Sequence[int] = (0, 1, 2)) -> Tensor:
    """Voxels of a bool mask (X, Y, Z) with a face neighbour outside; the border counts as such."""
    padded = torch.nn.functional.pad(mask, [1] * 6)  # so that roll() brings in False
    core = padded.clone()  # voxels whose neighbours all belong to the mask
    for axis in axes:
        core &= padded.roll(1, axis) & padded.roll(-1, axis)
    return mask & ~core[1:-1, 1:-1, 1:-1]


def distances_to(points: Tensor, feature: Tensor, spacing: list[float]) -> Tensor:
    """Distance in mm, float64 (N,), from voxels (N, 3) to the nearest one of `feature` (X, Y, Z).

    Exact: squared distances are separable (Felzenszwalb & Huttenlocher, Theory of Computing 2012),
    so one axis after the other takes the minimum along its lines of the value plus the squared way
    to it. The first only has to look for the nearest feature on both sides, and the last one is
    needed at the points only.
    """
    middle, last, first = sorted(range(3), key=lambda axis: feature.shape[axis])
    feature = feature.permute(first, last, middle)
    points = points[:, [first, last, middle]]
    steps = [spacing[axis] for axis in (first, last, middle)]  # mm

    squared = square_along_first(feature, steps[0])
    lines = squared.view(-1, feature.shape[2])
    for some in lines.split(1024):  # small enough for the cache of the processor
        lower_envelope(some, steps[2])
    squared = lines.view(feature.shape)

    position = torch.arange(feature.shape[1], dtype=torch.float64) * steps[1]  # mm
    cost = (position[:, None] - position).square()  # (Y, Y): of the way from one to the other
    nearest = []
    for some in points.split(16384):
        x, y, z = some.unbind(1)
        nearest.append((squared[x, :, z] + cost[y]).amin(1))  # (P, Y) to (P,)
    return torch.cat(nearest).sqrt()


def square_along_first(feature: Tensor, step: float) -> Tensor:
    """Squared distance in mm2 to the nearest feature on the line along the first axis, or inf."""
    far = 2**14  # voxels, more than any volume has; int16 is a quarter of the traffic of float64
    index = torch.arange(len(feature), dtype=torch.int16).view(-1, 1, 1)
    # The last feature before each voxel is the running maximum of the features' indices, and the
    # next one after it the running minimum from the other end.
    away = index - torch.where(feature, index, -far).cummax(0).values
    after = torch.where(feature, index, far).flip(0).cummin(0).values.flip(0)
    away = torch.minimum(away, after.sub_(index), out=after)
    squared = away.double().mul_(step).square_()
    return squared.masked_fill_(away > far // 2, math.inf)


def lower_envelope(lines: Tensor, step: float) -> None:
    """In place: the minimum over each line (L, N) of the value plus the squared way to it."""
    start = lines.clone()
    farthest = lines.amax().item()
    for k in range(1, lines.shape[1]):
        cost = (k * step) ** 2
        if cost >= farthest:  # from here on nothing can get smaller
            break
        torch.minimum(lines[:, k:], start[:, :-k] + cost, out=lines[:, k:])
        torch.minimum(lines[:, :-k], start[:, k:] + cost, out=lines[:, :-k])
        if k % 8 == 0:
            farthest = lines.amax().item()


# --- intervals and the report ---


def bootstrap(
    function: Callable[[Tensor], dict[str, float]],
    groups: list[str],
    samples: int = 1000,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Value, 95 % interval and number of undefined samples for every metric of `function(rows)`.

    Whole groups (patients) are drawn with replacement, because images of one patient are not
    independent (Davison & Hinkley 1997, section 3.8). Samples in which a metric is NaN are left
    out of it and counted. One group has no interval, nor has a metric that is the same in all
    samples: the ends are NaN.
    """
    number_of = {group: k for k, group in enumerate(dict.fromkeys(groups))}
    members = torch.tensor([number_of[group] for group in groups])  # (N,) number of the group
    counts = torch.bincount(members, minlength=len(number_of))
    rows_of = members.argsort(stable=True).split(counts.tolist())  # of each group
    generator = torch.Generator().manual_seed(seed)
    values = function(torch.arange(len(groups)))
    drawn = []
    for _ in range(samples if len(rows_of) > 1 else 0):
        picks = torch.randint(len(rows_of), (len(rows_of),), generator=generator).tolist()
        drawn.append(function(torch.cat([rows_of[k] for k in picks])))

    summary = {}
    tail = tail_probability(len(rows_of))
    for name, value in values.items():
        sample = torch.tensor([metrics[name] for metrics in drawn], dtype=torch.float64)
        finite = sample[sample.isfinite()]
        low = finite.quantile(tail).item() if len(finite) else math.nan
        high = finite.quantile(1 - tail).item() if len(finite) else math.nan
        if high - low < 1e-12 * max(1.0, abs(high)):  # no two samples differ
            low = math.nan
            high = math.nan
        undefined = len(sample) - len(finite)
        summary[name] = {"value": value, "low": low, "high": high, "undefined": undefined}
    return summary


def tail_probability(groups: int) -> float:
    """The part of the samples that lies beyond either end of a 95 % interval.

    Below 20 groups the ends are taken further out, by as much as Student's t is wider than the
    normal distribution (expanded percentile interval, Hesterberg, The American Statistician 2015).
    """
    if not 2 <= groups < 20:
        return 0.025
    quantile = float(STUDENT.split()[groups - 2])
    # The spread of samples of n values is too small by sqrt((n - 1) / n).
    z = quantile * math.sqrt(groups / (groups - 1))
    return 0.5 * math.erfc(z / math.sqrt(2))  # the normal distribution beyond z


def split_by(values: list[str], bands: bool = True) -> dict[str, list[int]]:
    """Numbers of the rows that have each value of a column, numbers in rising order, "" last.

    With `bands` more than 8 different numbers are cut at their quartiles; each band is called by
    its smallest and its largest member.
    """
    rows_of = defaultdict(list)
    for k, value in enumerate(values):
        is_empty = value.strip().lower() in ("", "nan")
        rows_of["(empty)" if is_empty else value].append(k)
    empty = rows_of.pop("(empty)", [])
    if all(is_number(value) for value in rows_of):
        rows_of = {value: rows_of[value] for value in sorted(rows_of, key=float)}
        if bands and len(rows_of) > 8:
            rows_of = cut_into_bands(rows_of)
    else:
        rows_of = {value: rows_of[value] for value in sorted(rows_of)}
    if empty:
        rows_of["(empty)"] = empty
    return rows_of


def is_number(text: str) -> bool:
    """Whether a cell of a table is a finite number."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def cut_into_bands(rows_of: dict[str, list[int]]) -> dict[str, list[int]]:
    """The rows of rising numbers in four bands of about as many rows each; ties stay together."""
    count = sum(len(rows) for rows in rows_of.values())
    members = defaultdict(list)  # numbers in each band
    before = 0
    for value, rows in rows_of.items():
        middle = before + len(rows) / 2  # of the rows with this number, among all
        members[int(4 * middle / count)].append(value)
        before += len(rows)
    bands = {}
    for numbers in members.values():
        name = f"{numbers[0]} to {numbers[-1]}" if len(numbers) > 1 else numbers[0]
        bands[name] = []
        for number in numbers:
            bands[name] += rows_of[number]
    return bands


def tabulate(
    function: Callable[[Tensor], dict[str, float]],
    folds: list[str],
    groups: list[str],
    by: tuple[str, dict[str, list[int]]] | None = None,
    samples: int = 1000,
) -> dict:
    """What metrics.json holds of parts of the cases: "folds" if there are several, "by" with --by.

    `folds` and `groups` have the fold and the patient of every case, `function` is that of
    `bootstrap`, `by` a column and what `split_by` gives for it.
    """
    tables = {}
    if len(set(folds)) > 1:
        tables["folds"] = []
        for fold, rows in split_by(folds, bands=False).items():
            row = {"fold": fold, "n": len(rows)}
            tables["folds"].append(row | function(torch.tensor(rows)))
    if by:
        column, rows_of = by
        tables["by"] = summarise_by(function, column, rows_of, groups, samples)
    return tables


def summarise_by(
    function: Callable[[Tensor], dict[str, float]],
    column: str,
    rows_of: dict[str, list[int]],
    groups: list[str],
    samples: int,
) -> dict:
    """Every metric for each value of a column, and the largest difference between two values.

    Values of fewer than FEW_CASES rows have NaN. Of two values the difference has the interval of
    bootstrap samples of the patients of both, at least FEW_GROUPS of each. Of more it has none: the
    two were chosen because they are far apart, which an interval would have to make up for.
    """
    values = []
    for value, rows in rows_of.items():
        patients = [groups[k] for k in rows]
        of_value = restrict(function, torch.tensor(rows))
        summary = bootstrap(of_value, patients, samples if len(rows) >= FEW_CASES else 0)
        if len(rows) < FEW_CASES:
            for metric in summary.values():
                metric["value"] = math.nan
        row = {"value": value, "n": len(rows), "patients": len(set(patients))}
        values.append(row | {"summary": summary})

    intervals = {}
    large = [row for row in values if row["n"] >= FEW_CASES]
    if len(large) == 2 and min(row["patients"] for row in large) >= FEW_GROUPS:
        first, second = (rows_of[row["value"]] for row in large)
        intervals = bootstrap_difference(function, first, second, groups, samples)
    differences = {}
    for name in values[0]["summary"]:
        defined = {}  # the metric of each value that has it
        for row in values:
            if math.isfinite(row["summary"][name]["value"]):
                defined[row["value"]] = row["summary"][name]["value"]
        differences[name] = largest_difference(defined, intervals.get(name))
    return {"column": column, "values": values, "differences": differences}


def largest_difference(defined: dict[str, float], interval: dict[str, float] | None) -> dict:
    """The highest minus the lowest of some metrics, and their names.

    `interval` is that of the first one minus the second.
    """
    difference = {"value": math.nan, "low": math.nan, "high": math.nan}
    if len(defined) < 2:
        return difference
    highest = max(defined, key=defined.get)
    lowest = min(defined, key=defined.get)
    difference["value"] = defined[highest] - defined[lowest]
    if interval and highest == next(iter(defined)):
        difference |= {"low": interval["low"], "high": interval["high"]}
    elif interval:
        difference |= {"low": -interval["high"], "high": -interval["low"]}
    return difference | {"highest": highest, "lowest": lowest}


def restrict(function: Callable, rows: Tensor) -> Callable[[Tensor], dict[str, float]]:
    """`function` of row numbers that count within `rows`."""
    return lambda chosen: function(rows[chosen])


def bootstrap_difference(
    function: Callable[[Tensor], dict[str, float]],
    first: list[int],
    second: list[int],
    groups: list[str],
    samples: int,
) -> dict[str, dict[str, float]]:
    """`bootstrap` of the metrics of some rows minus those of others, which may share patients."""
    rows = torch.tensor(first + second)
    is_first = torch.arange(len(rows)) < len(first)

    def difference(chosen: Tensor) -> dict[str, float]:
        ours = function(rows[chosen[is_first[chosen]]])
        theirs = function(rows[chosen[~is_first[chosen]]])
        return {name: value - theirs[name] for name, value in ours.items()}

    return bootstrap(difference, [groups[k] for k in first + second], samples)


def write_report(
    out: Path,
    summary: dict,
    groups: list[str],
    cases: list[dict],
    run: dict,
    tables: dict | None = None,
    shown: list[str] | None = None,
) -> None:
    """Print the metrics of `bootstrap` and write metrics.json: {"summary", "cases", "run"}.

    `cases` has a row per case, in the order of `groups` (its patient); `run` says how they arose;
    `tables` is what `tabulate` gives of parts of the cases; `shown` are the metrics to print, all
    without it.
    """
    tables = tables or {}
    shown = shown or list(summary)
    unit = run.get("unit", "mm")
    if "folds" in tables:
        print_folds(tables["folds"], unit)
    print_summary({name: summary[name] for name in shown}, groups, unit)
    if "by" in tables:
        print_by(tables["by"], shown, unit)
    report = {"summary": summary, **tables, "cases": cases, "run": run}
    write_json(out / "metrics.json", report)


def print_folds(folds: list[dict], unit: str) -> None:
    """Print the main metrics of each fold, a row a fold."""
    names = [name for name in FOLD_COLUMNS if name in folds[0]]
    print("fold       n" + "".join(f"  {in_unit(name, unit):>8}" for name in names))
    for row in folds:
        cells = [f"  {show(row[name]):>{max(8, len(name))}}" for name in names]
        print(f"{row['fold']:5} {row['n']:6}" + "".join(cells))


def show(value: float) -> str:
    """A metric in four digits, "-" where it is not defined."""
    return f"{value:.4f}" if math.isfinite(value) else "-"


def print_by(by: dict, shown: list[str], unit: str) -> None:
    """Print some metrics for each value of a column, and the largest difference."""
    print(f"\nby {by['column']}{'n':>{38 - len(by['column'])}}")
    for name in [name for name in shown if name in by["differences"]]:
        difference = by["differences"][name]
        print(in_unit(name, unit))
        for row in by["values"]:
            print(f"  {row['value'][:30]:30} {row['n']:8}  {with_interval(row['summary'][name])}")
        if difference["value"] > 0:  # not with one value only, which has NaN
            pair = f"{difference['highest']} above {difference['lowest']}"
            print(f"  {'largest difference':39}  {with_interval(difference)}  {pair}")
    few = [row for row in by["values"] if row["patients"] < FEW_GROUPS]
    if few:
        names = ", ".join(f"{row['value']} ({row['patients']})" for row in few)
        print(f"note: fewer than {FEW_GROUPS} patients, which show little: {names}")


def with_interval(metric: dict[str, float]) -> str:
    """A metric with its interval, if it has one."""
    text = show(metric["value"])
    if math.isfinite(metric["low"]):
        text += f"  ({metric['low']:.4f} to {metric['high']:.4f})"
    return text


def in_unit(name: str, unit: str) -> str:
    """The name of a metric for the screen: of pictures without a resolution hd95_mm is hd95_px."""
    return name.replace("_mm", f"_{unit}")


def print_summary(
    summary: dict[str, dict[str, float]], groups: list[str], unit: str = "mm"
) -> None:
    """Print every metric with its interval, and what that is worth with few groups."""
    count = len(set(groups))
    for name, metric in summary.items():
        print(f"{in_unit(name, unit):30} {with_interval(metric)}")
    if count == 1:
        print("note: one patient, so no intervals")
    elif count < FEW_GROUPS:
        print(f"note: the intervals rest on {count} patients and are too narrow:")
        print("      over 5, about 88 % of such intervals hold the true value, not 95 %")
    if "auroc" in summary and summary["auroc"]["value"] > 0.95 and count < 600:
        print("note: near 1 the interval of AUROC lies too high: at 0.99, with 50 patients")
        print("      of each class, 84 % of such intervals hold the true value")
