"""Metrics as pure functions on tensors: counts or per-case values of a whole split, divided once.

Shapes: `labels` int64 (N,) with values 0..C-1, `scores` float (N,) for the positive class of a
binary task, `probabilities` float (N, C), boxes float (N, 4). An undefined metric (one class only,
nothing predicted, no cases, a NaN score) is NaN, never 0 or 1.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from common.checkpoint import write_json

FEW_GROUPS = 10  # with fewer patients an interval is too narrow to report

Measure = Callable[[Tensor], dict[str, float]]  # metrics of the rows of a table


def divide(a: float, b: float) -> float:
    """a / b, or NaN if b is 0: a metric without cases is undefined."""
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
    More than two classes: the prediction is the largest probability, and auroc, average_precision,
    sensitivity, specificity, precision and f1 are means over the classes that occur, each against
    the others (macro); with the suffix _NAME they are those of a class.
    Several labels an image, int64 (N, C): `multi_label_metrics` with their `names`.
    """
    names = names or [str(k) for k in range(probabilities.shape[1])]
    if labels.ndim == 2:
        return multi_label_metrics(labels, probabilities, threshold, names)
    if len(names) == 2:
        scores = probabilities[:, 1]
        metrics = binary_metrics(labels, scores) | ranking_metrics(labels, scores)
        metrics["sensitivity_at_95_specificity"] = sensitivity_at_specificity(labels, scores, 0.95)
        metrics["specificity_at_95_sensitivity"] = specificity_at_sensitivity(labels, scores, 0.95)
        if threshold is not None:
            for name, value in binary_metrics(labels, scores, threshold).items():
                metrics[f"{name}_tuned"] = value
    else:
        metrics = macro_metrics(labels, probabilities, names)
    if probabilities.isnan().any():
        metrics = dict.fromkeys(metrics, math.nan)
    if len(labels.unique()) < 2:  # they would depend on which class it is
        for name in metrics:
            if name.startswith(("precision", "f1", "average_precision")):
                metrics[name] = math.nan
    return {**metrics, "brier": brier(labels, probabilities)}


def multi_label_metrics(
    labels: Tensor, probabilities: Tensor, thresholds: Tensor | None, names: list[str]
) -> dict[str, float]:
    """Metrics of each of several labels, with the suffix _NAME, and their means over the labels.

    `labels` int64 (N, C) are 1, 0, or -1 for unknown, which is left out of that label.
    `thresholds` float64 (N, C) are for the metrics called _tuned. The means are over labels that
    have both values, and NaN if a metric is undefined for one of these.
    """
    by_label = {}
    averaged = []  # labels with both values
    for k, name in enumerate(names):
        is_known = labels[:, k] >= 0
        truth = labels[is_known, k]  # (M,), M <= N
        positive = probabilities[is_known, k]
        pair = torch.stack([1 - positive, positive], 1)  # (M, 2): a binary task
        threshold = None if thresholds is None else thresholds[is_known, k]
        by_label[name] = classification_metrics(truth, pair, threshold)
        if len(truth.unique()) == 2:
            averaged.append(name)
    return average_metrics(by_label, averaged)


def average_metrics(by_class: dict[str, dict], averaged: list[str]) -> dict[str, float]:
    """Means over the classes in `averaged`, and the metrics of each class with the suffix _NAME."""
    metrics = {}
    for name in next(iter(by_class.values())):
        values = [by_class[class_name][name] for class_name in averaged]
        metrics[name] = divide(sum(values), len(values))
    for class_name, class_metrics in by_class.items():
        metrics |= {f"{name}_{class_name}": value for name, value in class_metrics.items()}
    return metrics


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


def ranking_metrics(labels: Tensor, scores: Tensor) -> dict[str, float]:
    """Metrics that depend only on the order of the scores."""
    return {
        "auroc": auroc(labels, scores),
        "average_precision": average_precision(labels, scores),
    }


def macro_metrics(labels: Tensor, probabilities: Tensor, names: list[str]) -> dict[str, float]:
    """Means over the classes that occur, each against the others; accuracy over all images."""
    predictions = probabilities.argmax(1)
    by_class = {}
    averaged = []  # classes that occur
    for k, name in enumerate(names):
        truth = (labels == k).long()
        counted = binary_metrics(truth, (predictions == k).double())
        by_class[name] = counted | ranking_metrics(truth, probabilities[:, k])
        if truth.any():
            averaged.append(name)
    metrics = average_metrics(by_class, averaged)
    metrics["accuracy"] = (predictions == labels).double().mean().item()
    metrics["balanced_accuracy"] = metrics["sensitivity"]  # mean recall over the classes
    return metrics


def confusion_matrix(labels: Tensor, predictions: Tensor, num_classes: int) -> Tensor:
    """Counts int64 (C, C): rows are the truth, columns the prediction."""
    # The pair (truth, prediction) as one number, so that one pass counts all pairs
    counts = torch.bincount(labels * num_classes + predictions, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes)


def roc_curve(labels: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """False positive rate, true positive rate and threshold (predict 1 where score >= threshold).

    Float64, one of each per distinct score, from (0, 0, inf) to (1, 1, smallest score). Rates of a
    class without cases are NaN. A NaN score has no rank, so all rates are NaN.
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
    is_last[:-1] = scores[1:] != scores[:-1]  # ties move together
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
) -> float | list[float]:
    """Threshold for the positive class of probabilities (N, 2); for several labels (N, C) a list.

    It maximises sensitivity + specificity (Youden 1950). With an operating point, such as
    ("sensitivity", 0.95), it reaches that sensitivity (or specificity) and maximises the other. It
    lies halfway to the next lower score. NaN if a label has only one value.
    """
    if labels.ndim == 2:
        thresholds = []
        for truth, scores in zip(labels.T, probabilities.T, strict=True):
            is_known = truth >= 0
            pair = torch.stack([1 - scores, scores], 1)[is_known]
            thresholds.append(best_threshold(truth[is_known], pair, point))
        return thresholds
    fpr, tpr, thresholds = roc_curve(labels, probabilities[:, 1])
    if (tpr - fpr).isnan().any():
        return math.nan
    if point is None:
        chosen = int((tpr - fpr)[1:].argmax()) + 1  # the first threshold is infinite
    elif point[0] == "sensitivity":
        chosen = int((tpr >= point[1] - 1e-9).nonzero()[0])  # it rises along the curve
    else:
        chosen = int((1 - fpr >= point[1] - 1e-9).nonzero()[-1])  # it falls
    if chosen == 0:  # above the highest score: nothing is positive
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
    # Exchanging the classes exchanges sensitivity and specificity.
    return sensitivity_at_specificity(1 - labels, -scores, sensitivity)


def brier(labels: Tensor, probabilities: Tensor) -> float:
    """Mean squared error of the probabilities (Brier 1950); binary: of the positive class only."""
    truth = torch.nn.functional.one_hot(labels, probabilities.shape[1]).double()
    error = (probabilities.double() - truth).square().sum(1).mean().item()
    return error / 2 if probabilities.shape[1] == 2 else error


# --- detection ---


def detection_metrics(pred: Tensor, truth: Tensor) -> dict[str, float]:
    """Metrics of one box per image; boxes (N, 4) xmin ymin xmax ymax in fractions of the image.

    iou_75 is the share of the images with an IoU of at least 0.75; mse_224 the mean squared error
    of the coordinates in pixels of the image squashed to 224x224; median_se_224 the median over
    the images.
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
    """Intersection over union (N,) of boxes (N, 4), row by row; 0 for inverted and empty boxes."""
    top_left = torch.maximum(pred, truth)[:, :2]  # (N, 2), of the intersection
    bottom_right = torch.minimum(pred, truth)[:, 2:]
    intersection = (bottom_right - top_left).clamp(min=0).prod(1)  # (N,), 0 if disjoint
    areas = [(boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1) for boxes in (pred, truth)]
    iou = intersection / (areas[0] + areas[1] - intersection)
    return torch.where(intersection == 0, 0, iou)  # NaN stays NaN


# --- segmentation ---


def segmentation_metrics(
    truth: Tensor, prediction: Tensor, spacing: list[float]
) -> dict[str, float]:
    """Metrics of one structure: bool masks (X, Y, Z), voxels of `spacing` mm.

    hd95_mm is the 95th percentile and assd_mm the mean of both directed sets of surface distances
    pooled; volume_error_ml is the absolute difference. Both masks empty: NaN except for the volume
    error; one empty: the distances are the diagonal of the volume.
    """
    metrics = overlap(truth, prediction)
    true_size = int(truth.sum())
    predicted_size = int(prediction.sum())
    distances = torch.tensor([math.nan], dtype=torch.float64)
    if true_size and predicted_size:
        distances = surface_distances(truth, prediction, spacing)
    elif true_size or predicted_size:  # the diagonal
        distances[0] = math.hypot(*(n * mm for n, mm in zip(truth.shape, spacing, strict=True)))
    metrics["hd95_mm"] = distances.quantile(0.95).item()
    metrics["assd_mm"] = distances.mean().item()
    metrics["volume_error_ml"] = abs(true_size - predicted_size) * math.prod(spacing) / 1000
    return metrics


def overlap(truth: Tensor, prediction: Tensor) -> dict[str, float]:
    """Dice and IoU of two bool masks. Both empty: NaN; only the truth empty: 0."""
    intersection = int((truth & prediction).sum())
    total = int(truth.sum()) + int(prediction.sum())
    iou = divide(intersection, total - intersection)
    return {"dice": divide(2 * intersection, total), "iou": iou}


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
    """Distances in mm between the surfaces of two bool masks (X, Y, Z), not empty, both ways."""
    # A picture has no neighbours along z; as borders they would make every pixel surface.
    axes = [axis for axis in range(3) if truth.shape[axis] > 1] or [0]
    union = truth | prediction
    box = []  # crop to both masks: no distance depends on anything outside
    for axis in range(3):
        used = union.transpose(axis, 0).flatten(1).any(1).nonzero()
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
    so each axis in turn takes the minimum, along its lines, of the value plus the squared distance.
    """
    middle, last, first = sorted(range(3), key=lambda axis: feature.shape[axis])
    feature = feature.permute(first, last, middle)
    points = points[:, [first, last, middle]]
    steps = [spacing[axis] for axis in (first, last, middle)]  # mm

    squared = square_along_first(feature, steps[0])
    lines = squared.view(-1, feature.shape[2])
    for chunk in lines.split(1024):  # small enough for the cache of the processor
        lower_envelope(chunk, steps[2])
    squared = lines.view(feature.shape)

    position = torch.arange(feature.shape[1], dtype=torch.float64) * steps[1]  # mm
    cost = (position[:, None] - position).square()  # (Y, Y): squared distance between two places
    nearest = []  # the last axis at the points only
    for chunk in points.split(16384):
        x, y, z = chunk.unbind(1)
        nearest.append((squared[x, :, z] + cost[y]).amin(1))  # (P, Y) to (P,)
    return torch.cat(nearest).sqrt()


def square_along_first(feature: Tensor, step: float) -> Tensor:
    """Squared distance in mm2 to the nearest feature along the first axis, inf without one."""
    far = 2**14  # voxels, more than any volume has; int16 is a quarter of the traffic of float64
    index = torch.arange(len(feature), dtype=torch.int16).view(-1, 1, 1)
    # The previous feature is the running maximum of the features' indices, the next one the running
    # minimum from the other end.
    distance = index - torch.where(feature, index, -far).cummax(0).values
    following = torch.where(feature, index, far).flip(0).cummin(0).values.flip(0)
    distance = torch.minimum(distance, following.sub_(index), out=following)
    squared = distance.double().mul_(step).square_()
    return squared.masked_fill_(distance > far // 2, math.inf)


def lower_envelope(lines: Tensor, step: float) -> None:
    """In place: at each place of a line (L, N) the minimum of value plus squared distance to it."""
    start = lines.clone()
    farthest = lines.amax().item()
    for k in range(1, lines.shape[1]):
        cost = (k * step) ** 2
        if cost >= farthest:  # larger steps cannot lower any value
            break
        torch.minimum(lines[:, k:], start[:, :-k] + cost, out=lines[:, k:])
        torch.minimum(lines[:, :-k], start[:, k:] + cost, out=lines[:, :-k])
        if k % 8 == 0:
            farthest = lines.amax().item()


# --- intervals and the report ---


def bootstrap(
    function: Measure, groups: list[str], samples: int = 1000, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Value, 95 % interval and number of undefined samples for every metric of `function(rows)`.

    Whole groups (patients) are drawn with replacement, because images of one patient are not
    independent (Davison & Hinkley 1997, section 3.8). Samples in which a metric is NaN are left out
    and counted. The ends are NaN below FEW_GROUPS patients, and if no two samples differ.
    """
    number_of = {group: k for k, group in enumerate(dict.fromkeys(groups))}
    members = torch.tensor([number_of[group] for group in groups])  # (N,) number of the group
    counts = torch.bincount(members, minlength=len(number_of))
    rows_of = members.argsort(stable=True).split(counts.tolist())  # row numbers of each group
    generator = torch.Generator().manual_seed(seed)
    values = function(torch.arange(len(groups)))
    sample_metrics = []
    for _ in range(samples if len(rows_of) >= FEW_GROUPS else 0):
        picks = torch.randint(len(rows_of), (len(rows_of),), generator=generator).tolist()
        sample_metrics.append(function(torch.cat([rows_of[k] for k in picks])))

    summary = {}
    for name, value in values.items():
        sample = torch.tensor([one[name] for one in sample_metrics], dtype=torch.float64)
        finite = sample[sample.isfinite()]
        low = finite.quantile(0.025).item() if len(finite) else math.nan
        high = finite.quantile(0.975).item() if len(finite) else math.nan
        if high - low < 1e-12 * max(1.0, abs(high)):
            low = high = math.nan
        undefined = len(sample) - len(finite)
        summary[name] = {"value": value, "low": low, "high": high, "undefined": undefined}
    return summary


def summarise_by(function: Measure, values: list[str], groups: list[str]) -> list[dict]:
    """`bootstrap` for each value of a column: a list of value, n, patients, summary.

    `values` and `groups` are the value and the patient of every row. Numbers are sorted as such.
    """
    try:
        distinct = sorted(set(values), key=float)
    except ValueError:
        distinct = sorted(set(values))
    table = []
    for value in distinct:
        rows = torch.tensor([k for k, row_value in enumerate(values) if row_value == value])
        patients = [groups[k] for k in rows.tolist()]
        row = {"value": value, "n": len(rows), "patients": len(set(patients))}
        row["summary"] = bootstrap(lambda sample, rows=rows: function(rows[sample]), patients)
        table.append(row)
    return table


def write_report(
    out: Path,
    summary: dict,
    groups: list[str],
    cases: list[dict],
    run: dict,
    by: dict | None = None,
    names: list[str] | None = None,
) -> None:
    """Print the metrics of `bootstrap` and write metrics.json: {"summary", "by", "cases", "run"}.

    `cases` has a row per case, in the order of `groups` (its patient); `by` has a column and its
    `summarise_by`; `names` are the metrics to print (default: all).
    """
    # For pictures without a resolution hd95_mm is printed as hd95_px.
    titles = {name: name.replace("_mm", f"_{run.get('unit', 'mm')}") for name in names or summary}
    for name in titles if by else []:
        print(f"{titles[name]} by {by['column']}")
        for row in by["values"]:
            metric = with_interval(row["summary"][name])
            print(f"  {row['value'][:30] or '(empty)':30} {row['n']:8}  {metric}")
    for name, title in titles.items():
        print(f"{title:41}  {with_interval(summary[name])}")
    print_notes(summary, len(set(groups)))
    write_json(out / "metrics.json", {"summary": summary, "by": by, "cases": cases, "run": run})


def with_interval(metric: dict[str, float]) -> str:
    """A metric to four digits, "-" if it is undefined, and its interval if it has one."""
    if not math.isfinite(metric["value"]):
        return "-"
    text = f"{metric['value']:.4f}"
    if math.isfinite(metric["low"]):
        text += f"  ({metric['low']:.4f} to {metric['high']:.4f})"
    return text


def print_notes(summary: dict[str, dict[str, float]], patients: int) -> None:
    """Print why there is no interval, or in which case it is inaccurate."""
    if patients < FEW_GROUPS:
        print(f"note: {patients} patients, so no intervals: they take at least {FEW_GROUPS}")
    elif "auroc" in summary and summary["auroc"]["value"] > 0.95 and patients < 600:
        print("note: near 1 the interval of AUROC lies too high: at 0.99, with 50 patients")
        print("      of each class, 84 % of such intervals hold the true value")
