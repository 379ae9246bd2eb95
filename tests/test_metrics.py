"""common/metrics.py against values worked out by hand."""

import math

import numpy as np
import pytest
import torch

from common import metrics as m

# Seven cases, three classes; predictions 0 1 1 1 1 2 0, counts [[1, 1, 0], [0, 3, 0], [1, 0, 1]].
LABELS = torch.tensor([0, 0, 1, 1, 1, 2, 2])
ROWS = "60 30 10  30 50 20  20 70 10  10 80 10  40 50 10  10 20 70  48 10 42"
PROBABILITIES = torch.tensor([int(percent) for percent in ROWS.split()]).view(7, 3) / 100


def approx(value: object) -> object:
    return pytest.approx(value, abs=1e-6, nan_ok=True)


def pair(scores: torch.Tensor) -> torch.Tensor:
    """The probabilities (N, 2) of scores for the positive class."""
    return torch.stack([1 - scores, scores], 1)


def threshold_at(labels: torch.Tensor, scores: torch.Tensor, *point: object) -> float:
    """Youden's threshold, or that of an operating point."""
    return m.best_threshold(labels, pair(scores), point or None)


def random_task(k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """40 labels of both classes, and scores in multiples of 1/8: many ties."""
    generator = torch.Generator().manual_seed(k)
    labels = torch.randint(2, (40,), generator=generator)
    return labels, (torch.randint(8, (40,), generator=generator) + labels) / 8


# --- classification ---


@pytest.mark.parametrize("k", range(5))
def test_auroc_and_average_precision_by_their_definitions(k):
    labels, scores = random_task(k)
    positives = scores[labels == 1].tolist()
    negatives = scores[labels == 0].tolist()
    wins = sum((p > n) + 0.5 * (p == n) for p in positives for n in negatives)
    assert m.auroc(labels, scores) == approx(wins / (len(positives) * len(negatives)))
    area = 0.0
    before = 0
    for threshold in sorted(set(scores.tolist()), reverse=True):
        chosen = scores >= threshold
        area += labels[chosen].double().mean().item() * (int(labels[chosen].sum()) - before)
        before = int(labels[chosen].sum())
    assert m.average_precision(labels, scores) == approx(area / len(positives))


def test_binary_metrics_by_hand():
    labels = torch.tensor([1, 1, 1, 0, 0, 0, 0, 0])
    # tp 2, fn 1, fp 2, tn 3; a score at the threshold is positive, one just below is not
    scores = torch.tensor(
        [0.9, 0.5, 0.2, 0.6, 0.7, 0.1, 0.3, math.nextafter(0.5, 0)], dtype=torch.float64
    )
    assert m.binary_metrics(labels, scores) == approx(
        {
            "accuracy": 5 / 8,
            "balanced_accuracy": (2 / 3 + 3 / 5) / 2,
            "sensitivity": 2 / 3,
            "specificity": 3 / 5,
            "precision": 2 / 4,
            "f1": 2 * 2 / (2 * 2 + 2 + 1),
        }
    )
    metrics = m.binary_metrics(torch.tensor([1, 0, 0]), torch.tensor([0.4, 0.1, 0.2]))
    assert math.isnan(metrics["precision"])  # nothing is predicted positive
    assert (metrics["sensitivity"], metrics["specificity"], metrics["f1"]) == (0, 1, 0)


@pytest.mark.parametrize(("label", "undefined"), [(0, "sensitivity"), (1, "specificity")])
def test_one_class_only_is_nan(label, undefined):
    labels = torch.full((4,), label)
    metrics = m.classification_metrics(labels, pair(torch.tensor([0.2, 0.6, 0.7, 0.9])))
    expected = {undefined, "balanced_accuracy", "auroc", "average_precision", "precision", "f1"}
    expected |= {"sensitivity_at_95_specificity", "specificity_at_95_sensitivity"}
    assert {name for name, value in metrics.items() if math.isnan(value)} == expected
    assert metrics["accuracy"] == (1 / 4 if label == 0 else 3 / 4)


def test_no_cases_and_a_score_that_is_nan_leave_no_metric():
    labels = torch.tensor([0, 1, 0, 1])
    scores = torch.tensor([0.1, 0.9, math.nan, 0.8])
    broken = PROBABILITIES.clone()
    broken[3, 0] = math.nan
    values = [threshold_at(labels[:0], scores[:0])]
    for truth in (labels, 1 - labels):  # by the order of the cases it would be 1 or 0
        values += [m.auroc(truth, scores), m.average_precision(truth, scores)]
        values.append(threshold_at(truth, scores))
    boxes = torch.tensor([[0.1, 0.1, 0.5, 0.5], [0.2, 0.2, 0.6, math.nan]])
    for metrics in (
        m.binary_metrics(labels, scores),
        m.binary_metrics(labels, torch.rand(4), math.nan),
        m.classification_metrics(labels[:0], torch.zeros(0, 2)),
        m.classification_metrics(labels, pair(scores)),
        m.classification_metrics(LABELS, broken),
        m.detection_metrics(boxes, boxes[[0, 0]]),
        m.detection_metrics(boxes[:0], boxes[:0]),
    ):
        values += metrics.values()
    assert all(map(math.isnan, values))


@pytest.mark.parametrize("k", range(8))
def test_a_threshold_keeps_its_promise(k):
    labels, scores = random_task(k)
    if k >= 4:  # scores that are neighbours in float32, as saturated probabilities are
        scores = (torch.tensor(0.99).view(torch.int32) + (8 * scores).int()).view(torch.float32)
    fpr, tpr, _ = m.roc_curve(labels, scores)
    metrics = m.binary_metrics(labels, scores, threshold_at(labels, scores))
    assert metrics["sensitivity"] + metrics["specificity"] - 1 == approx((tpr - fpr).max().item())
    for least in (0.3, 0.9, 0.95, 1):
        at = m.binary_metrics(labels, scores, threshold_at(labels, scores, "sensitivity", least))
        assert at["sensitivity"] >= least - 1e-9
        assert at["specificity"] == approx(m.specificity_at_sensitivity(labels, scores, least))
        at = m.binary_metrics(labels, scores, threshold_at(labels, scores, "specificity", least))
        assert at["specificity"] >= least - 1e-9
        assert at["sensitivity"] == approx(m.sensitivity_at_specificity(labels, scores, least))


def test_thresholds_lie_halfway_to_the_next_lower_score():
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    scores = torch.tensor([0.1, 0.2, 0.3, 0.8, 0.25, 0.5, 0.6, 0.9])
    for point, between in (
        ((), (0.5, 0.3)),  # Youden's: 3/4 - 1/4; 1 - 1/2 at 0.25 is as much, but comes later
        (("sensitivity", 0.75), (0.5, 0.3)),
        (("sensitivity", 0.76), (0.25, 0.2)),
        (("specificity", 0.75), (0.5, 0.3)),
        (("specificity", 0.76), (0.9, 0.8)),
    ):
        assert threshold_at(labels, scores, *point) == approx(sum(between) / 2)
    # Above the highest score, which a negative has: nothing is positive
    above = threshold_at(1 - labels, scores, "specificity", 1)
    assert m.binary_metrics(1 - labels, scores, above)["specificity"] == 1
    assert math.isnan(threshold_at(torch.ones(8), scores, "sensitivity", 0.9))
    tied = torch.full((3,), 0.7)
    assert threshold_at(torch.tensor([0, 1, 1]), tied) == tied[0].item()  # all or none: all


def test_sensitivity_at_specificity_by_hand():
    labels = torch.tensor([0] * 20 + [1] * 5)
    scores = torch.cat([torch.arange(20) / 20, torch.tensor([0.99, 0.93, 0.92, 0.85, 0.07])])
    # Of 20 negatives (0.00 to 0.95) 95 % allow one above the threshold: 0.99, 0.93 and 0.92. At 0.07
    # two negatives are below; 1 - 18/20 is 0.09999999999999998 and is meant to be 0.1.
    for least, expected in ((0.95, 3 / 5), (0.951, 1 / 5), (0.1, 1), (0.11, 4 / 5)):
        assert m.sensitivity_at_specificity(labels, scores, least) == approx(expected)
        assert m.specificity_at_sensitivity(1 - labels, -scores, least) == approx(expected)
    assert m.sensitivity_at_specificity(torch.tensor([0, 1]), torch.zeros(2), 0.95) == 0  # all tied


def test_brier_by_hand():
    two = torch.tensor([[0.3, 0.7], [0.6, 0.4]])
    assert m.brier(torch.tensor([1, 0]), two) == approx((0.3**2 + 0.4**2) / 2)
    three = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]])
    # (0.5^2 + 0.3^2 + 0.2^2 + 0.1^2 + 0.2^2 + 0.3^2) / 2
    assert m.brier(torch.tensor([0, 2]), three) == approx(0.52 / 2)


def test_metrics_of_two_classes_and_the_tuned_threshold():
    labels, scores = random_task(0)
    probabilities = pair(scores)
    plain = m.classification_metrics(labels, probabilities)
    assert plain == {
        **m.binary_metrics(labels, scores),
        "auroc": m.auroc(labels, scores),
        "average_precision": m.average_precision(labels, scores),
        "sensitivity_at_95_specificity": m.sensitivity_at_specificity(labels, scores, 0.95),
        "specificity_at_95_sensitivity": m.specificity_at_sensitivity(labels, scores, 0.95),
        "brier": m.brier(labels, probabilities),
    }
    own = m.binary_metrics(labels, scores, 0.7)
    assert own["f1"] != plain["f1"]
    tuned = m.classification_metrics(labels, probabilities, 0.7)
    assert tuned == plain | {f"{name}_tuned": value for name, value in own.items()}


def test_macro_metrics_of_three_classes():
    metrics = m.classification_metrics(LABELS, PROBABILITIES, names=["a", "b", "c"])
    # pairs won: 5 + 3 of 10; 4 + 4 + 3.5 of 12 (0.5 ties with 0.5); 10 of 10
    by_class = {
        "sensitivity": (1 / 2, 1, 1 / 2),
        "specificity": (4 / 5, 3 / 4, 1),
        "precision": (1 / 2, 3 / 4, 1),
        "f1": (2 / 4, 6 / 7, 2 / 3),
        "auroc": (8 / 10, 11.5 / 12, 1),
        # precision at each positive: 1, 2/4; 1, 1, 3/4 (the tie); 1, 1
        "average_precision": (1.5 / 2, 2.75 / 3, 1),
    }
    for name, values in by_class.items():
        assert [metrics[f"{name}_{k}"] for k in "abc"] == approx(list(values)), name
        assert metrics[name] == approx(sum(values) / 3), name
    assert metrics["accuracy"] == approx(5 / 7)
    assert metrics["balanced_accuracy"] == metrics["sensitivity"]
    assert metrics["brier"] == m.brier(LABELS, PROBABILITIES)


def test_an_absent_class_is_left_out_of_the_means():
    metrics = m.classification_metrics(LABELS[:5], PROBABILITIES[:5])  # no case of class 2
    assert metrics["accuracy"] == approx(4 / 5)
    assert math.isnan(metrics["auroc_2"]) and math.isnan(metrics["sensitivity_2"])
    for name in ("auroc", "sensitivity", "precision", "f1", "average_precision"):
        assert metrics[name] == approx((metrics[f"{name}_0"] + metrics[f"{name}_1"]) / 2), name


# --- intervals ---


def mean_of(values: torch.Tensor):
    return lambda rows: {"mean": values[rows].double().mean().item()}


def numbers(count: int, times: int = 1) -> list[str]:
    """Names of as many groups, each of which has `times` rows."""
    return [str(k // times) for k in range(count * times)]


def test_below_ten_patients_or_without_a_width_there_is_no_interval(capsys):
    for count in (1, 9, 10):
        summary = m.bootstrap(mean_of(torch.arange(2 * count)), numbers(count) * 2, 50)["mean"]
        assert summary["value"] == count - 0.5
        has_interval = summary["low"] < summary["value"] < summary["high"]
        assert has_interval == (count == 10)
        m.print_notes({"mean": summary}, count)
        note = f"note: {count} patients, so no intervals: they take at least 10\n"
        assert capsys.readouterr().out == ("" if has_interval else note)
    constant = m.bootstrap(mean_of(torch.full((12,), 0.9)), numbers(12))["mean"]
    assert math.isnan(constant["low"]) and math.isnan(constant["high"])
    assert m.with_interval(constant) == "0.9000"
    m.print_notes({"auroc": {"value": 0.99}}, 12)
    assert "near 1 the interval of AUROC lies too high" in capsys.readouterr().out


def test_values_of_a_column_are_row_sets():
    values = ["10", "9", "9"] * 8
    nine, ten = m.summarise_by(mean_of(torch.arange(24.0)), values, numbers(12, 2))  # as numbers
    assert (nine["value"], nine["n"], nine["patients"]) == ("9", 16, 12)
    assert (ten["value"], ten["n"], ten["patients"]) == ("10", 8, 8)
    assert nine["summary"]["mean"]["low"] < nine["summary"]["mean"]["high"]
    words = m.summarise_by(lambda rows: {"n": len(rows)}, ["b", "", "10", "b"], list("abcd"))
    assert [row["value"] for row in words] == ["", "10", "b"]


def test_the_interval_of_a_mean_has_the_normal_width_of_independent_patients():
    values = torch.arange(1000) % 10 < 3  # 300 ones
    result = m.bootstrap(mean_of(values), numbers(1000))["mean"]
    assert result["value"] == approx(0.3) and result["undefined"] == 0
    half = 1.96 * math.sqrt(0.3 * 0.7 / 1000)
    assert result["low"] == pytest.approx(0.3 - half, abs=0.1 * half)
    assert result["high"] == pytest.approx(0.3 + half, abs=0.1 * half)


def test_bootstrap_draws_whole_groups_by_its_seed_alone():
    def draw(seed: int) -> list[list[int]]:
        torch.rand(seed + 1)  # what others draw does not matter
        drawn = []
        add = lambda rows: drawn.append(rows.tolist()) or {}  # noqa: E731
        m.bootstrap(add, numbers(10) * 2, samples=200, seed=seed)
        return drawn

    first, *samples = draw(1)
    assert first == list(range(20))  # the value itself
    assert len(samples) == 200
    for rows in samples:
        counts = [rows.count(k) for k in range(20)]
        assert counts[:10] == counts[10:] and sum(counts) == 20
    assert len({tuple(sorted(rows)) for rows in samples}) > 190
    assert draw(1) == draw(1) != draw(2)


def test_bootstrap_leaves_out_and_counts_undefined_samples():
    seen = []
    labels = torch.tensor([1] + [0] * 9)

    def metrics(rows: torch.Tensor) -> dict[str, float]:
        seen.append(m.auroc(labels[rows], labels[rows].float()))
        return {"auroc": seen[-1], "never": math.nan}

    summary = m.bootstrap(metrics, numbers(10), samples=400)
    undefined = sum(map(math.isnan, seen))  # without the one positive: 0.9 ** 10 = 0.35 of them
    assert 100 < undefined < 180 and summary["auroc"]["undefined"] == undefined
    assert summary["auroc"]["value"] == 1
    expected = {"value": math.nan, "low": math.nan, "high": math.nan, "undefined": 400}
    assert summary["never"] == approx(expected)


# --- detection ---


def test_box_iou_by_hand():
    truth = torch.tensor([[0.0, 0.0, 0.5, 0.5]])
    for pred, expected in (
        ([0.0, 0.0, 0.5, 0.5], 1),
        ([0.25, 0.0, 0.75, 0.5], 1 / 3),  # half of each: 0.125 of 0.375
        ([0.1, 0.1, 0.2, 0.2], 0.04),  # inside: 0.01 of 0.25
        ([0.5, 0.5, 0.9, 0.9], 0),  # touches
        ([0.4, 0.4, 0.1, 0.1], 0),  # inverted
        ([0.2, 0.2, 0.2, 0.4], 0),  # empty
    ):
        pred = torch.tensor([pred])
        assert m.box_iou(pred, truth).item() == approx(expected)
        assert m.box_iou(truth, pred).item() == approx(expected)
    nothing = torch.zeros(1, 4)
    assert m.box_iou(nothing, nothing).item() == 0


def test_detection_metrics_by_hand():
    truth = torch.tensor([[0.0, 0.0, 0.5, 0.5]]).repeat(3, 1)
    pred = torch.tensor([[0.0, 0.0, 0.5, 0.5], [0.0, 0.0, 0.5, 0.4], [0.25, 0.0, 0.75, 0.5]])
    expected = {
        "mean_iou": (1 + 0.8 + 1 / 3) / 3,
        "median_iou": 0.8,
        "iou_50": 2 / 3,
        "iou_75": 2 / 3,
        "iou_90": 1 / 3,
        "mse_224": (22.4**2 + 2 * 56**2) / 12,
        "median_se_224": 22.4**2 / 4,
    }
    assert m.detection_metrics(pred, truth) == pytest.approx(expected, rel=1e-5)


# --- segmentation ---


def box(shape: tuple, *corners: tuple[int, int]) -> torch.Tensor:
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[tuple(slice(*ends) for ends in corners)] = True
    return mask


def test_dice_and_iou_by_hand():
    truth = box((4, 4, 4), (0, 2), (0, 2), (0, 2))
    found = box((4, 4, 4), (1, 3), (0, 2), (0, 2))
    empty = torch.zeros_like(truth)
    assert m.overlap(truth, found) == {"dice": 0.5, "iou": approx(1 / 3)}
    assert m.overlap(empty, found) == {"dice": 0, "iou": 0} == m.overlap(truth, empty)
    assert m.overlap(empty, empty) == approx({"dice": math.nan, "iou": math.nan})
    # 3 = both, 4 = nowhere
    scores = m.dice_scores(truth.long() + 2 * found, truth.long() + 2 * truth, 5)
    assert scores.tolist() == approx([0, 0, 2 * 4 / (4 + 8), math.nan])
    scores = torch.tensor([[1.0, 0.5], [math.nan, 0.25], [math.nan, math.nan]], dtype=torch.float64)
    expected = {"dice": 0.5, "dice_a": 1.0, "dice_b": 0.375}
    assert m.dice_metrics(scores, ["background", "a", "b"]) == expected


def test_distances_of_shifted_planes():
    truth = box((9, 4, 4), (2, 3), (0, 4), (0, 4))
    found = box((9, 4, 4), (5, 6), (0, 4), (0, 4))
    metrics = m.segmentation_metrics(truth, found, [1.5, 2.0, 3.0])
    assert metrics == {"dice": 0, "iou": 0, "hd95_mm": 4.5, "assd_mm": 4.5, "volume_error_ml": 0}
    more = m.segmentation_metrics(truth, truth | found, [1.5, 2.0, 3.0])
    assert more["volume_error_ml"] == approx(16 * 9 / 1000)
    assert more["assd_mm"] == approx(16 * 4.5 / 48)  # 16 there at 0, 16 back at 0, 16 back at 4.5


def test_one_mask_empty_is_the_diagonal_and_both_is_nan():
    mask = box((3, 2, 12), (0, 2), (0, 2), (0, 2))
    empty = torch.zeros_like(mask)
    metrics = m.segmentation_metrics(mask, empty, [1.0, 2.0, 1.0])
    assert metrics["hd95_mm"] == metrics["assd_mm"] == 13 and metrics["dice"] == 0
    both = m.segmentation_metrics(empty, empty, [1.0, 1.0, 1.0])
    assert all(math.isnan(both[name]) for name in ("dice", "iou", "hd95_mm", "assd_mm"))


@pytest.mark.parametrize("shape", [(9, 7, 5), (6, 1, 8), (1, 1, 4), (12, 11, 13)])
@pytest.mark.parametrize("density", [0.02, 0.3, 0.9])
def test_surface_distances_equal_brute_force(shape, density):
    """A surface is inside the mask, and what lies beyond the volume is outside."""
    generator = torch.Generator().manual_seed(int(100 * density) + sum(shape))
    spacing = torch.tensor([0.7, 2.0, 1.3], dtype=torch.float64)
    a, b = (torch.rand(shape, generator=generator) < density for _ in range(2))
    a[0, 0, 0] = b[-1, -1, -1] = True
    # An axis of one voxel has no neighbours: the surface of a picture is its outline.
    steps = [step for step in np.eye(3, dtype=int) if shape[step.argmax()] > 1]
    steps += [-step for step in steps]

    def points(mask: torch.Tensor) -> torch.Tensor:
        voxels = mask.nonzero().numpy()
        inside = set(map(tuple, voxels))
        outline = [p for p in voxels if any(tuple(p + step) not in inside for step in steps)]
        return torch.from_numpy(np.array(outline)) * spacing

    apart = (points(a)[:, None] - points(b)).square().sum(2).sqrt()
    expected = torch.cat([apart.amin(1), apart.amin(0)])
    found = m.surface_distances(a, b, spacing.tolist())
    assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-12)
    hd95 = m.segmentation_metrics(a, b, spacing.tolist())["hd95_mm"]
    assert hd95 == approx(expected.quantile(0.95).item())
