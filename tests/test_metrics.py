"""common/metrics.py against values worked out by hand."""

import math

import numpy as np
import pytest
import torch
import torchvision

from common.metrics import (
    auroc,
    average_precision,
    binary_metrics,
    bootstrap,
    box_iou,
    brier,
    classification_metrics,
    confusion_matrix,
    detection_metrics,
    dice_metrics,
    dice_scores,
    overlap,
    print_summary,
    roc_curve,
    segmentation_metrics,
    sensitivity_at_specificity,
    specificity_at_sensitivity,
    surface,
    surface_distances,
    threshold_at,
    youden_threshold,
)

EMPTY = torch.zeros(0, dtype=torch.long), torch.zeros(0)
TIED = torch.tensor([1, 0, 1, 0, 1]), torch.tensor([0.9, 0.8, 0.8, 0.3, 0.3])
# Seven cases, three classes; predictions 0 1 1 1 1 2 0, counts [[1, 1, 0], [0, 3, 0], [1, 0, 1]].
LABELS = torch.tensor([0, 0, 1, 1, 1, 2, 2])
PROBABILITIES = torch.tensor(
    [
        [0.6, 0.3, 0.1],
        [0.3, 0.5, 0.2],
        [0.2, 0.7, 0.1],
        [0.1, 0.8, 0.1],
        [0.4, 0.5, 0.1],
        [0.1, 0.2, 0.7],
        [0.48, 0.1, 0.42],
    ]
)


def approx(value: object) -> object:
    return pytest.approx(value, abs=1e-6, nan_ok=True)


def random_task(k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """40 labels of both classes, and scores in multiples of 1/8: many ties."""
    generator = torch.Generator().manual_seed(k)
    labels = torch.randint(2, (40,), generator=generator)
    return labels, (torch.randint(8, (40,), generator=generator) + labels) / 8


def test_confusion_matrix_rows_are_the_truth():
    counts = confusion_matrix(torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 1, 0]), 3)
    assert counts.tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]
    assert counts.dtype == torch.int64


def test_roc_curve_moves_ties_together():
    fpr, tpr, thresholds = roc_curve(*TIED)
    assert tpr.tolist() == approx([0, 1 / 3, 2 / 3, 1])
    assert fpr.tolist() == approx([0, 0, 1 / 2, 1])
    assert thresholds.tolist() == approx([math.inf, 0.9, 0.8, 0.3])
    assert fpr.dtype == tpr.dtype == thresholds.dtype == torch.float64


def test_auroc_by_hand():
    # 0.9 beats both negatives; 0.8 ties with 0.8 and beats 0.3; 0.3 ties with 0.3: (2 + 1.5 + 0.5) / 6
    assert auroc(*TIED) == approx(4 / 6)
    assert auroc(1 - TIED[0], TIED[1]) == approx(2 / 6)
    assert auroc(torch.tensor([0, 1, 0]), torch.ones(3)) == 0.5


@pytest.mark.parametrize("k", range(5))
def test_auroc_is_the_share_of_ordered_pairs(k):
    labels, scores = random_task(k)
    positives, negatives = scores[labels == 1].tolist(), scores[labels == 0].tolist()
    wins = sum((p > n) + 0.5 * (p == n) for p in positives for n in negatives)
    assert auroc(labels, scores) == approx(wins / (len(positives) * len(negatives)))


def test_average_precision_by_hand():
    # at 0.9, 0.8, 0.3 the precision is 1/1, 2/3, 3/5, and each time the recall grows by 1/3
    assert average_precision(*TIED) == approx((1 + 2 / 3 + 3 / 5) / 3)
    assert average_precision(torch.tensor([0, 1, 0, 0]), torch.ones(4)) == 1 / 4


@pytest.mark.parametrize("k", range(5))
def test_average_precision_does_not_depend_on_the_order_of_ties(k):
    labels, scores = random_task(k)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(k))
    value, before = 0.0, 0
    for threshold in sorted(set(scores.tolist()), reverse=True):
        chosen = scores >= threshold
        value += labels[chosen].double().mean().item() * (int(labels[chosen].sum()) - before)
        before = int(labels[chosen].sum())
    assert average_precision(labels[order], scores[order]) == approx(value / int(labels.sum()))


def test_binary_metrics_by_hand():
    labels = torch.tensor([1, 1, 1, 0, 0, 0, 0, 0])
    scores = torch.tensor([0.9, 0.5, 0.2, 0.6, 0.7, 0.1, 0.3, 0.4])  # tp 2, fn 1, fp 2, tn 3
    assert binary_metrics(labels, scores) == approx(
        {
            "accuracy": 5 / 8,
            "balanced_accuracy": (2 / 3 + 3 / 5) / 2,
            "sensitivity": 2 / 3,
            "specificity": 3 / 5,
            "precision": 2 / 4,
            "f1": 2 * 2 / (2 * 2 + 2 + 1),
        }
    )


def test_a_score_at_the_threshold_is_positive():
    half = torch.tensor(0.5)
    scores = torch.stack([half, torch.nextafter(half, half * 0)])
    assert binary_metrics(torch.tensor([1, 0]), scores)["accuracy"] == 1
    assert binary_metrics(torch.tensor([0, 1]), scores)["accuracy"] == 0


def test_nothing_predicted_positive_has_no_precision():
    figures = binary_metrics(torch.tensor([1, 0, 0]), torch.tensor([0.4, 0.1, 0.2]))
    assert math.isnan(figures["precision"])
    assert (figures["sensitivity"], figures["specificity"], figures["f1"]) == (0, 1, 0)


@pytest.mark.parametrize(
    ("label", "undefined"),
    [
        (0, {"balanced_accuracy", "sensitivity", "auroc", "average_precision"}),
        (1, {"balanced_accuracy", "specificity", "auroc"}),
    ],
)
def test_one_class_only_is_nan(label, undefined):
    labels, scores = torch.full((4,), label), torch.tensor([0.2, 0.6, 0.7, 0.9])
    figures = classification_metrics(labels, torch.stack([1 - scores, scores], 1))
    undefined = undefined | {"sensitivity_at_95_specificity", "specificity_at_95_sensitivity"}
    assert {name for name, value in figures.items() if math.isnan(value)} == undefined
    assert math.isnan(youden_threshold(labels, scores))


def test_no_cases_at_all_is_nan():
    assert math.isnan(auroc(*EMPTY)) and math.isnan(average_precision(*EMPTY))
    assert math.isnan(youden_threshold(*EMPTY)) and math.isnan(
        sensitivity_at_specificity(*EMPTY, 0.95)
    )
    assert math.isnan(brier(EMPTY[0], torch.zeros(0, 2)))
    assert all(map(math.isnan, binary_metrics(*EMPTY).values()))


def test_youden_threshold_lies_halfway_to_the_next_lower_score():
    labels, scores = (
        torch.tensor([0, 0, 0, 1, 1, 1, 1]),
        torch.tensor([0.1, 0.2, 0.4, 0.3, 0.6, 0.7, 0.8]),
    )
    # at 0.6: 3/4 - 0; at 0.3: 1 - 1/3, which is less
    assert youden_threshold(labels, scores) == approx((0.6 + 0.4) / 2)


def test_youden_threshold_at_the_edges():
    tied = torch.full((3,), 0.7)
    assert youden_threshold(torch.tensor([0, 1, 1]), tied) == tied[0].item()  # all or none: all
    lowest = youden_threshold(torch.tensor([1, 0, 1]), torch.tensor([0.5, 0.9, 0.25]))
    assert lowest == 0.25  # the best is to call everything positive
    assert (
        binary_metrics(torch.tensor([1, 0, 1]), torch.tensor([0.5, 0.9, 0.25]), lowest)[
            "sensitivity"
        ]
        == 1
    )


@pytest.mark.parametrize("k", range(8))
def test_youden_threshold_keeps_its_promise(k):
    labels, scores = random_task(k)
    if k >= 4:  # scores that are neighbours in float32, as saturated probabilities are
        scores = (torch.tensor(0.99).view(torch.int32) + (8 * scores).int()).view(torch.float32)
    fpr, tpr, _ = roc_curve(labels, scores)
    figures = binary_metrics(labels, scores, youden_threshold(labels, scores))
    assert figures["sensitivity"] + figures["specificity"] - 1 == approx((tpr - fpr).max().item())


def test_the_threshold_of_an_operating_point_by_hand():
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    scores = torch.tensor([0.1, 0.2, 0.3, 0.8, 0.25, 0.5, 0.6, 0.9])
    assert threshold_at(labels, scores, "sensitivity", 0.75) == approx((0.5 + 0.3) / 2)
    assert threshold_at(labels, scores, "sensitivity", 0.76) == approx((0.25 + 0.2) / 2)
    assert threshold_at(labels, scores, "specificity", 0.75) == approx((0.5 + 0.3) / 2)
    assert threshold_at(labels, scores, "specificity", 0.76) == approx((0.9 + 0.8) / 2)
    # Above the highest score, which a negative has: nothing is positive
    above = threshold_at(1 - labels, scores, "specificity", 1)
    assert binary_metrics(1 - labels, scores, above)["specificity"] == 1
    assert math.isnan(threshold_at(torch.ones(8), scores, "sensitivity", 0.9))


@pytest.mark.parametrize("least", [0.3, 0.9, 0.95, 1])
@pytest.mark.parametrize("k", range(4))
def test_an_operating_point_is_reached_at_the_least_cost(k, least):
    labels, scores = random_task(k)
    at = binary_metrics(labels, scores, threshold_at(labels, scores, "sensitivity", least))
    assert at["sensitivity"] >= least - 1e-9
    assert at["specificity"] == approx(specificity_at_sensitivity(labels, scores, least))
    at = binary_metrics(labels, scores, threshold_at(labels, scores, "specificity", least))
    assert at["specificity"] >= least - 1e-9
    assert at["sensitivity"] == approx(sensitivity_at_specificity(labels, scores, least))


def test_sensitivity_at_specificity_by_hand():
    labels = torch.tensor([0] * 20 + [1] * 5)
    scores = torch.cat([torch.arange(20) / 20, torch.tensor([0.99, 0.93, 0.92, 0.85, 0.07])])
    # of 20 negatives (0.00 to 0.95) 95 % allow one above the threshold, which leaves 0.99, 0.93 and 0.92
    assert sensitivity_at_specificity(labels, scores, 0.95) == approx(3 / 5)
    assert sensitivity_at_specificity(labels, scores, 0.951) == approx(1 / 5)
    # at 0.07 two negatives are below; 1 - 18/20 is 0.09999999999999998 in float64 and is meant to be 0.1
    assert sensitivity_at_specificity(labels, scores, 0.1) == 1
    assert sensitivity_at_specificity(labels, scores, 0.11) == approx(4 / 5)
    assert sensitivity_at_specificity(torch.tensor([0, 1]), torch.zeros(2), 0.95) == 0  # all tied


def test_specificity_at_sensitivity_by_hand():
    labels = torch.tensor([1] * 20 + [0] * 5)
    scores = torch.cat([torch.arange(1, 21) / 20, torch.tensor([0.01, 0.07, 0.08, 0.15, 0.9])])
    # of 20 positives (0.05 to 1.00) 95 % allow one to be missed: threshold 0.10, below it 0.01, 0.07 and 0.08
    assert specificity_at_sensitivity(labels, scores, 0.95) == approx(3 / 5)
    assert specificity_at_sensitivity(labels, scores, 0.951) == approx(1 / 5)


def test_brier_by_hand():
    two = torch.tensor([[0.3, 0.7], [0.6, 0.4]])
    assert brier(torch.tensor([1, 0]), two) == approx((0.3**2 + 0.4**2) / 2)
    three = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]])
    # (0.5^2 + 0.3^2 + 0.2^2 + 0.1^2 + 0.2^2 + 0.3^2) / 2
    assert brier(torch.tensor([0, 2]), three) == approx(0.52 / 2)


def test_binary_figures_and_the_tuned_threshold():
    labels, scores = random_task(0)
    probabilities = torch.stack([1 - scores, scores], 1)
    plain, tuned = (classification_metrics(labels, probabilities, t) for t in (None, 0.7))
    expected = binary_metrics(labels, scores, 0.7)
    assert expected != binary_metrics(labels, scores)
    assert tuned == plain | {f"{name}_tuned": value for name, value in expected.items()}
    assert plain.items() >= binary_metrics(labels, scores).items()
    assert (plain["auroc"], plain["brier"]) == (auroc(labels, scores), brier(labels, probabilities))
    assert plain["sensitivity_at_95_specificity"] == sensitivity_at_specificity(
        labels, scores, 0.95
    )
    assert plain["specificity_at_95_sensitivity"] == specificity_at_sensitivity(
        labels, scores, 0.95
    )


def test_macro_figures_of_three_classes():
    figures = classification_metrics(LABELS, PROBABILITIES)
    assert figures == approx(
        {
            "accuracy": 5 / 7,
            "balanced_accuracy": (1 / 2 + 1 + 1 / 2) / 3,
            "sensitivity": (1 / 2 + 1 + 1 / 2) / 3,
            "specificity": (4 / 5 + 3 / 4 + 1) / 3,
            "precision": (1 / 2 + 3 / 4 + 1) / 3,
            "f1": (2 / 4 + 6 / 7 + 2 / 3) / 3,
            # pairs won: 5 + 3 of 10; 4 + 4 + 3.5 of 12 (0.5 ties with 0.5); 10 of 10
            "auroc": (8 / 10 + 11.5 / 12 + 1) / 3,
            # precision at each positive: 1, 2/4; 1, 1, 3/4 (the tie); 1, 1
            "average_precision": (1.5 / 2 + 2.75 / 3 + 1) / 3,
            "brier": brier(LABELS, PROBABILITIES),
        }
    )


def test_an_absent_class_leaves_its_macro_figures_undefined():
    figures = classification_metrics(
        LABELS[:5], PROBABILITIES[:5]
    )  # no case of class 2, none predicted
    assert {name for name, value in figures.items() if not math.isnan(value)} == {
        "accuracy",
        "specificity",
        "brier",
    }
    assert figures["accuracy"] == approx(4 / 5)


def test_float32_and_float64_give_the_same():
    labels, scores = random_task(1)
    for truth, probabilities in (
        (labels, torch.stack([1 - scores, scores], 1)),
        (LABELS, PROBABILITIES),
    ):
        single = classification_metrics(truth, probabilities, 0.3)
        assert single == classification_metrics(truth, probabilities.double(), 0.3)


def test_a_score_that_is_nan_leaves_no_metric():
    labels, scores = torch.tensor([0, 1, 0, 1]), torch.tensor([0.1, 0.9, math.nan, 0.8])
    for truth in (labels, 1 - labels):  # by the order of the cases it was 1 or 0
        assert math.isnan(auroc(truth, scores)) and math.isnan(average_precision(truth, scores))
        assert math.isnan(youden_threshold(truth, scores))
    assert all(map(math.isnan, binary_metrics(labels, scores).values()))
    assert all(map(math.isnan, binary_metrics(labels, torch.rand(4), math.nan).values()))
    broken = PROBABILITIES.clone()
    broken[3, 0] = math.nan
    for truth, probabilities in ((labels, torch.stack([1 - scores, scores], 1)), (LABELS, broken)):
        assert all(map(math.isnan, classification_metrics(truth, probabilities).values()))
    boxes = torch.tensor([[0.1, 0.1, 0.5, 0.5], [0.2, 0.2, 0.6, math.nan]])
    assert all(
        map(math.isnan, detection_metrics(boxes, torch.tensor([[0.1, 0.1, 0.5, 0.5]] * 2)).values())
    )


def coverage(count: int, trials: int) -> float:
    """How often the interval over so many Dice-like values, of mean 0.9, holds that mean."""
    generator, held = np.random.default_rng(0), 0
    for _ in range(trials):
        values = torch.from_numpy(generator.beta(9, 1, count))
        groups = [str(k) for k in range(count)]
        mean = bootstrap(lambda rows, v=values: {"mean": v[rows].mean().item()}, groups, 300)[
            "mean"
        ]
        held += mean["low"] <= 0.9 <= mean["high"]
    return held / trials


@pytest.mark.slow
def test_intervals_over_few_patients_are_wider():
    assert coverage(5, 120) > 0.83  # 0.88 in 2,000 trials; the plain percentiles have 0.81
    values = torch.arange(20.0)

    def interval(count: int) -> dict[str, float]:
        groups = [str(k) for k in range(count)]
        return bootstrap(lambda rows: {"mean": values[rows].mean().item()}, groups)["mean"]

    drawn = []
    bootstrap(
        lambda rows: drawn.append(values[rows].mean().item()) or {}, [str(k) for k in range(20)]
    )
    plain = torch.tensor(drawn[1:], dtype=torch.float64)
    assert interval(20)["low"] == plain.quantile(0.025).item()
    assert interval(20)["high"] == plain.quantile(0.975).item()
    drawn.clear()
    bootstrap(
        lambda rows: drawn.append(values[rows].mean().item()) or {}, [str(k) for k in range(5)]
    )
    few = torch.tensor(drawn[1:], dtype=torch.float64)
    tail = 0.5 * math.erfc(2.776 * math.sqrt(5 / 4) / math.sqrt(2))  # Student's t of four degrees
    assert interval(5)["low"] == few.quantile(tail).item() < few.quantile(0.025).item()


def test_no_interval_has_a_width_of_zero(capsys):
    result = bootstrap(
        lambda rows: {"same": 0.9, "some": rows.double().mean().item()}, list("abcdefghijkl")
    )
    assert math.isnan(result["same"]["low"]) and math.isnan(result["same"]["high"])
    assert result["some"]["low"] < result["some"]["high"]
    print_summary(
        result | {"auroc": {"value": 0.99, "low": 0.98, "high": 1.0}}, list("abcdefghijkl")
    )
    printed = capsys.readouterr().out
    assert (
        f"{'same':30} 0.9000\n" in printed
        and "near 1 the interval of AUROC lies too high" in printed
    )


def test_bootstrap_interval_of_a_mean_has_the_normal_width():
    values = (torch.arange(1000) % 10 < 3).double()  # 300 ones
    groups = [str(k) for k in range(1000)]
    result = bootstrap(lambda rows: {"mean": values[rows].mean().item()}, groups)["mean"]
    assert result["value"] == approx(0.3) and result["undefined"] == 0
    half = 1.96 * math.sqrt(0.3 * 0.7 / 1000)
    assert result["low"] == pytest.approx(0.3 - half, abs=0.1 * half)
    assert result["high"] == pytest.approx(0.3 + half, abs=0.1 * half)


def test_bootstrap_knows_that_images_of_one_patient_are_not_independent():
    values = (torch.arange(100) % 10 < 3).double()
    four = values.repeat_interleave(4)
    patients = [str(k) for k in range(100)]
    mean = bootstrap(lambda rows: {"mean": values[rows].mean().item()}, patients)["mean"]
    grouped = bootstrap(
        lambda r: {"mean": four[r].mean().item()}, [p for p in patients for _ in range(4)]
    )
    assert grouped["mean"] == approx(mean)  # copies add no knowledge
    naive = bootstrap(lambda r: {"mean": four[r].mean().item()}, [str(k) for k in range(400)])[
        "mean"
    ]
    assert naive["high"] - naive["low"] < 0.6 * (mean["high"] - mean["low"])


def test_bootstrap_draws_whole_groups():
    drawn = []
    bootstrap(lambda rows: drawn.append(rows.tolist()) or {}, ["b", "a", "b", "c"], samples=200)
    assert drawn[0] == [0, 1, 2, 3]  # the value itself
    assert len(drawn) == 201
    counts = [[rows.count(k) for k in range(4)] for rows in drawn[1:]]
    assert all(b == b2 and a + b + c == 3 for b, a, b2, c in counts)
    assert len({tuple(c) for c in counts}) == 10  # all ways to draw 3 times from 3


def test_bootstrap_is_a_function_of_its_seed():
    values = torch.arange(30.0)
    state = torch.get_rng_state()

    def interval(seed: int) -> dict:
        torch.rand(seed + 1)  # what others draw does not matter
        groups = [str(k // 2) for k in range(30)]
        return bootstrap(
            lambda rows: {"mean": values[rows].mean().item()}, groups, samples=50, seed=seed
        )

    assert interval(1) == interval(1) != interval(2)
    torch.set_rng_state(state)
    bootstrap(lambda rows: {"n": len(rows)}, ["a"], samples=5)
    assert torch.equal(torch.get_rng_state(), state)


def test_bootstrap_leaves_out_and_counts_undefined_samples():
    seen = []

    def figures(rows: torch.Tensor) -> dict[str, float]:
        seen.append(auroc(torch.tensor([0, 1])[rows], torch.tensor([0.2, 0.8])[rows]))
        return {"auroc": seen[-1], "never": math.nan}

    summary = bootstrap(figures, ["a", "b"], samples=400)
    undefined = sum(map(math.isnan, seen))  # a twice or b twice: about half
    assert 150 < undefined < 250
    assert summary["auroc"] == approx(
        {"value": 1, "low": math.nan, "high": math.nan, "undefined": undefined}
    )
    assert summary["never"] == approx(
        {"value": math.nan, "low": math.nan, "high": math.nan, "undefined": 400}
    )


def test_bootstrap_without_groups_gives_no_interval():
    with pytest.raises(RuntimeError):
        bootstrap(lambda rows: {"n": len(rows)}, [])


def test_box_iou_by_hand():
    truth = torch.tensor([[0.0, 0.0, 0.5, 0.5]]).repeat(6, 1)
    pred = torch.tensor([
        [0.0, 0.0, 0.5, 0.5],
        [0.25, 0.0, 0.75, 0.5],  # half of each: 0.125 of 0.375
        [0.1, 0.1, 0.2, 0.2],  # inside: 0.01 of 0.25
        [0.5, 0.5, 0.9, 0.9],  # touches
        [0.4, 0.4, 0.1, 0.1],  # inverted
        [0.2, 0.2, 0.2, 0.4],  # empty
    ])  # fmt: skip
    expected = torch.tensor([1, 1 / 3, 0.04, 0, 0, 0])
    assert torch.allclose(box_iou(pred, truth), expected)
    assert torch.allclose(box_iou(truth, pred), expected)
    pairs = torch.rand(50, 2, 2, 2).sort(dim=2).values.reshape(50, 2, 4)
    known = torchvision.ops.box_iou(pairs[:, 0], pairs[:, 1]).diagonal()
    assert torch.allclose(box_iou(pairs[:, 0], pairs[:, 1]), known, atol=1e-6)


def test_detection_metrics_by_hand():
    truth = torch.tensor([[0.0, 0.0, 0.5, 0.5]]).repeat(3, 1)
    pred = torch.tensor([[0.0, 0.0, 0.5, 0.5], [0.0, 0.0, 0.5, 0.4], [0.25, 0.0, 0.75, 0.5]])
    figures = detection_metrics(pred, truth)
    expected = {"mean_iou": (1 + 0.8 + 1 / 3) / 3, "median_iou": 0.8, "iou_50": 2 / 3, "iou_75": 2 / 3,
                "iou_90": 1 / 3, "mse_224": (22.4**2 + 2 * 56**2) / 12,
                "median_se_224": 22.4**2 / 4}  # fmt: skip
    assert figures == pytest.approx(expected, rel=1e-5)
    assert all(math.isnan(value) for value in detection_metrics(pred[:0], truth[:0]).values())


# --- segmentation ---


def box(shape: tuple, *corners: tuple[int, int]) -> torch.Tensor:
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[tuple(slice(*pair) for pair in corners)] = True
    return mask


def test_dice_and_iou_by_hand():
    truth, found = box((4, 4, 4), (0, 2), (0, 2), (0, 2)), box((4, 4, 4), (1, 3), (0, 2), (0, 2))
    assert overlap(truth, found) == {"dice": 0.5, "iou": approx(1 / 3)}
    empty = torch.zeros_like(truth)
    assert overlap(empty, found) == {"dice": 0, "iou": 0} == overlap(truth, empty)
    assert overlap(empty, empty) == approx({"dice": math.nan, "iou": math.nan})
    scores = dice_scores(
        truth.long() + 2 * found, truth.long() + 2 * truth, 5
    )  # 3 = both, 4 = nowhere
    assert scores.tolist() == approx([0, 0, 2 * 4 / (4 + 8), math.nan])


def test_dice_metrics_leave_out_what_is_not_defined():
    scores = torch.tensor([[1.0, 0.5], [math.nan, 0.25], [math.nan, math.nan]], dtype=torch.float64)
    assert dice_metrics(scores, ["background", "a", "b"]) == {
        "dice": 0.5,
        "dice_a": 1.0,
        "dice_b": 0.375,
    }


def test_surface_is_inside_and_beyond_the_volume_is_outside():
    mask = box((5, 5, 5), (0, 3), (0, 3), (0, 3))
    assert surface(mask).sum() == 26 and not surface(mask)[1, 1, 1] and surface(mask)[0, 1, 1]


def test_distances_of_shifted_planes():
    truth, found = box((9, 4, 4), (2, 3), (0, 4), (0, 4)), box((9, 4, 4), (5, 6), (0, 4), (0, 4))
    figures = segmentation_metrics(truth, found, [1.5, 2.0, 3.0])
    assert figures == {"dice": 0, "iou": 0, "hd95_mm": 4.5, "assd_mm": 4.5, "volume_error_ml": 0}
    more = segmentation_metrics(truth, truth | found, [1.5, 2.0, 3.0])
    assert more["volume_error_ml"] == approx(16 * 9 / 1000)
    assert more["assd_mm"] == approx(16 * 4.5 / 48)  # 16 there at 0, 16 back at 0, 16 back at 4.5


def test_one_mask_empty_is_the_diagonal_and_both_is_nan():
    mask, empty = box((3, 4, 12), (0, 2), (0, 2), (0, 2)), torch.zeros((3, 4, 12), dtype=torch.bool)
    figures = segmentation_metrics(mask, empty, [1.0, 1.0, 1.0])
    assert figures["hd95_mm"] == figures["assd_mm"] == 13 and figures["dice"] == 0
    both = segmentation_metrics(empty, empty, [1.0, 1.0, 1.0])
    assert all(math.isnan(both[name]) for name in ("dice", "iou", "hd95_mm", "assd_mm"))


@pytest.mark.parametrize("shape", [(9, 7, 5), (6, 1, 8), (1, 1, 4), (12, 11, 13)])
@pytest.mark.parametrize("density", [0.02, 0.3, 0.9])
def test_surface_distances_equal_brute_force(shape, density):
    generator = torch.Generator().manual_seed(int(100 * density) + sum(shape))
    spacing = torch.tensor([0.7, 2.0, 1.3], dtype=torch.float64)
    a, b = (torch.rand(shape, generator=generator) < density for _ in range(2))
    a[0, 0, 0] = b[-1, -1, -1] = True

    def points(mask: torch.Tensor) -> torch.Tensor:
        inside = set(map(tuple, mask.nonzero().tolist()))
        steps = [(1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1)]
        # An axis of one voxel has no neighbours: the surface of a picture is its outline.
        steps = [step for step in steps if shape[np.flatnonzero(step)[0]] > 1]
        found = [
            p
            for p in inside
            if any((p[0] + x, p[1] + y, p[2] + z) not in inside for x, y, z in steps)
        ]
        return torch.tensor(sorted(found), dtype=torch.float64) * spacing

    apart = (points(a)[:, None] - points(b)).square().sum(2).sqrt()
    expected = torch.cat([apart.amin(1), apart.amin(0)])
    found = surface_distances(a, b, spacing.tolist())
    assert found.dtype == torch.float64 and found.tolist() == pytest.approx(
        expected.tolist(), abs=1e-12
    )
    assert segmentation_metrics(a, b, spacing.tolist())["hd95_mm"] == approx(
        expected.quantile(0.95).item()
    )


def test_one_patient_has_no_interval_and_few_have_a_note(capsys):
    def mean(rows):
        return {"mean": rows.double().mean().item()}

    one = bootstrap(mean, ["a"] * 4, 50)
    assert (
        one["mean"]["value"] == 1.5
        and math.isnan(one["mean"]["low"])
        and math.isnan(one["mean"]["high"])
    )
    print_summary(one, ["a"] * 4)
    assert capsys.readouterr().out == f"{'mean':30} 1.5000\nnote: one patient, so no intervals\n"
    for count, has_note in ((2, True), (9, True), (10, False)):
        groups = [str(k) for k in range(count)]
        summary = bootstrap(mean, groups, 50)
        assert summary["mean"]["low"] < summary["mean"]["value"] < summary["mean"]["high"]
        print_summary(summary, groups)
        printed = capsys.readouterr().out
        assert (f"note: the intervals rest on {count} patients" in printed) == has_note
        assert printed.startswith(f"{'mean':30} {(count - 1) / 2:.4f}  (")
