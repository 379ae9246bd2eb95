"""tests/benchmarks/stress.py: validation images that look like those of the other class."""

import json

import numpy as np
import pytest

from tests.benchmarks import stress
from tests.caches import copy, draw_cache, evaluate, read_rows, small_network, train

pytestmark = pytest.mark.slow


def smooth_image(seed: int, size: int = 48) -> np.ndarray:
    """Noise, blurred, uint8 (S, S)."""
    noise = stress.blur(np.random.default_rng(seed).normal(0, 1, (size, size)), 1.5)
    return np.rint(128 + 50 * noise / noise.std()).clip(0, 255).astype(np.uint8)


def test_the_histogram_becomes_that_of_the_other_image():
    image = smooth_image(0)
    donor = (smooth_image(1) // 4 + 90).astype(np.uint8)
    changed = stress.match_histogram(image, donor)
    for share in (0.05, 0.25, 0.5, 0.75, 0.95):
        assert np.quantile(changed, share) == pytest.approx(np.quantile(donor, share), abs=2)
    curve = {}
    for old, new in zip(image.ravel().tolist(), changed.ravel().tolist(), strict=True):
        assert curve.setdefault(old, new) == new  # one new value for each old one,
    assert sorted(curve.values()) == [curve[old] for old in sorted(curve)]  # in the same order


@pytest.mark.parametrize("sigma", [0.6, 1.0])
def test_the_sharpness_becomes_that_of_the_other_image(sigma):
    sharp = smooth_image(0)
    soft = stress.blur(smooth_image(1).astype(float), sigma).astype(np.uint8)
    for image, donor in ((sharp, soft), (soft, sharp)):
        before = stress.sharpness(image.astype(float))
        after = stress.sharpness(stress.match_sharpness(image, donor).astype(float))
        assert abs(before / stress.sharpness(donor.astype(float)) - 1) > 0.1
        assert after == pytest.approx(stress.sharpness(donor.astype(float)), rel=0.03)


def test_the_copies_change_the_fold_alone_and_are_evaluated(tmp_path):
    cache = draw_cache(tmp_path / "cache", "classification")
    stress.main(["--data", str(cache), "--out", str(tmp_path / "stress")])
    stress.main(["--data", str(cache), "--out", str(tmp_path / "again")])
    rows = read_rows(cache)
    in_fold = np.array([row["fold"] == "0" for row in rows])
    images = np.load(cache / "images.npy")
    with small_network():
        train("classification", cache, tmp_path / "run")
        for name in stress.COPIES:
            changed = np.load(tmp_path / "stress" / name / "images.npy")
            assert np.array_equal(changed, np.load(tmp_path / "again" / name / "images.npy"))
            assert np.array_equal(changed[~in_fold], images[~in_fold])
            assert (changed[in_fold] != images[in_fold]).any((1, 2)).mean() > 0.5
            options = ("--checkpoint", tmp_path / "run" / "best.pt", "--out", tmp_path / name)
            evaluate("classification", tmp_path / "stress" / name, *options)
            result = json.loads((tmp_path / name / "metrics.json").read_text())
            assert result["run"]["n"] == in_fold.sum()


def test_donors_are_of_another_class_and_need_one(tmp_path):
    labels = np.array([0, 1, 1, 2, 0])
    assert (labels[stress.choose_donors(labels, 0)] != labels).all()
    cache = copy(draw_cache(tmp_path / "cache", "classification"), tmp_path / "copy")
    with pytest.raises(SystemExit, match="0 images of fold 4, expected two classes"):
        stress.main(["--data", str(cache), "--out", str(tmp_path / "out"), "--fold", "4"])
