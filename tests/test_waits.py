"""Nothing in a step of a training waits for the device, nor between the windows of a volume.

A GPU would stand still until the host goes on. Device "meta" has shapes but no values, so that there
every read raises: the real loops run on it, with the real networks, augmentation and optimizer.
"""

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from types import ModuleType

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.caches import draw_cache, module

pytestmark = pytest.mark.slow

TRAININGS = {
    "classification": ("classification", []),
    "classification, more": (
        "classification",
        ["--flip", "--class-weights", "balanced", "--label-smoothing", "0.1"],
    ),
    "detection": ("detection", []),
    "detection, linear": ("detection", ["--head", "linear", "--loss", "smooth_l1"]),
    "segmentation": ("segmentation", []),
    "segmentation, 3D": ("segmentation", ["--dims", "3", "--mirror", "--loss", "dice"]),
}


class StepsDone(Exception):
    pass


class RefuseWaits(TorchDispatchMode):
    """Raises where a GPU would make the host wait and device meta does not."""

    def __torch_dispatch__(
        self, operator: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        kwargs = kwargs or {}
        assert operator is not torch.ops.aten._linalg_check_errors.default  # of linalg.inv, solve
        if operator is torch.ops.aten._to_copy.default and kwargs.get("device") is not None:
            is_moved = args[0].device != kwargs["device"]
            assert not is_moved or kwargs.get("non_blocking"), "a copy without non_blocking"
        return operator(*args, **kwargs)


def replace_what_meta_lacks(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Generators, autocast, and the fused kernel of AdamW; none of them reads on a GPU."""
    generator = torch.Generator
    optimizer = script.AdamW

    def make_adamw(groups: list[dict], lr: float, fused: bool) -> torch.optim.Optimizer:
        assert fused  # the other kernels read the number of the step
        return optimizer(groups, lr=lr)

    monkeypatch.setattr(torch, "Generator", lambda device="cpu": generator("cpu"))
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(script, "AdamW", make_adamw)


@pytest.mark.parametrize("name", TRAININGS)
def test_a_step_reads_nothing_from_the_device(tmp_path, monkeypatch, name):
    task, options = TRAININGS[name]
    script = module(task, "train")
    set_training = script.checkpoint.set_training
    within = ExitStack()
    steps = []

    def begin(model: torch.nn.Module) -> None:
        set_training(model)
        within.enter_context(RefuseWaits())

    def stop(loss_sum: torch.Tensor, steps_per_epoch: int, *rest: object) -> None:
        assert loss_sum.device.type == "meta"  # so were the images, the network and the loss
        steps.append(steps_per_epoch)
        raise StepsDone

    monkeypatch.setattr(script.checkpoint, "set_training", begin)
    monkeypatch.setattr(script, "mean_over_processes", stop)
    replace_what_meta_lacks(script, monkeypatch)
    cache = draw_cache(tmp_path / "cache", task)
    command = ["--data", str(cache), "--out", str(tmp_path / "run"), "--device", "meta"]
    command += ["--workers", "0", "--batch-size", "2", "--epochs", "1"]
    with within, pytest.raises(StepsDone):
        script.main([*command, *options])
    assert 2 <= steps[0] < 20  # the loop reads the loss every 20 steps


def test_windows_are_added_up_on_the_device_unless_the_result_is_large(monkeypatch):
    network = module("segmentation", "model")
    meta = {"channels": ["MRI"], "classes": ["background", "cube"]}
    meta |= {"spacing": [1, 1, 1], "slice_axis": 2}
    model = network.build_model(meta, 2, [8, 8, 8]).to("meta")
    image = np.zeros((1, 20, 10, 8), np.float16)

    def predict() -> torch.Tensor:
        return network.predict_volume(model, image, [8, 8, 8], 2, torch.device("meta"), None, 2)

    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    assert predict().device.type == "meta"
    monkeypatch.setattr(network, "MAX_ON_DEVICE", 2 * 2 * image.size)
    assert predict().device.type == "meta"
    monkeypatch.setattr(network, "MAX_ON_DEVICE", 2 * 2 * image.size - 1)
    with pytest.raises(NotImplementedError, match="meta tensor"):  # which has no values to copy
        predict()
