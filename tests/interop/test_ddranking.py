"""Test the call of DD-Ranking 0.2.0 that `convert` prints: Python that runs, with arguments that it has; and its score from fractions."""

from __future__ import annotations

import inspect
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from mtt_fast import SyntheticDataset
from mtt_fast.augmentation.texture import Canvas
from mtt_fast.commands.cli import run
from mtt_fast.convert import command as convert
from mtt_fast.data.class_lists import SUBSETS
from mtt_fast.errors import InputError
from mtt_fast.interop import TensorSet, ddranking_call, label_robust_score, write_set

# The parameters of its classes, and of the function whose call soft_label.py gets wrong, as its sources 0.2.0 have them.
COMMON_PARAMETERS = (
    "config dataset real_data_path ipc model_name data_aug_func aug_params optimizer lr_scheduler step_size weight_decay momentum "
    "use_zca num_eval im_size num_epochs real_batch_size syn_batch_size num_workers save_path custom_train_trans custom_val_trans "
    "device dist random_data_format random_data_path eval_full_data"
)
HARD_PARAMETERS = f"{COMMON_PARAMETERS} use_torchvision"
SOFT_PARAMETERS = (
    f"{COMMON_PARAMETERS} soft_label_criterion loss_fn_kwargs soft_label_mode use_aug_for_hard stu_use_torchvision tea_use_torchvision "
    "teacher_dir teacher_model_names"
)
COMPUTE_PARAMETERS = "self image_tensor image_path {} syn_lr lrs_lambda"
DRAW_PARAMETERS = "dataset_name dataset class_to_indices n_images_per_class class_map eval_iter saved_path"
WHAT_IT_NEEDS = {  # its defaults of these cannot run
    "aug_params", "step_size", "eval_full_data", "random_data_format", "num_workers", "real_data_path", "device",
}  # fmt: skip
MTTS_SUBSETS = [subset for subset in SUBSETS if not subset.startswith("imagenet-")]  # the others are GLaD's
SIZES = {"CIFAR10": (10, 32), "CIFAR100": (100, 32), "Tiny": (200, 64), **dict.fromkeys(MTTS_SUBSETS, (10, 128))}


def signature(names: str) -> inspect.Signature:
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Signature([inspect.Parameter(name, kind, default=None) for name in names.split()])


class Metric:
    """A stand-in for one of DD-Ranking's classes, which takes the same arguments and keeps them."""

    def __init__(self, names: str, labels: str) -> None:
        self._names, self._labels = set(names.split()), labels
        self.teacher_models = ["teacher"]
        self.class_map: Any = {0: 0}

    def __call__(self, **arguments: Any) -> Metric:
        assert set(arguments) <= self._names
        self.arguments = arguments
        return self

    def compute_metrics(self, **arguments: Any) -> dict[str, float]:
        signature(COMPUTE_PARAMETERS.format(self._labels)).bind(None, **arguments)
        self.metrics = arguments
        return {}


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Put modules in the place of DD-Ranking's, with the names that a call imports from them."""
    top, metrics, utils = (ModuleType(name) for name in ("ddranking", "ddranking.metrics", "ddranking.utils"))
    hard, soft = ModuleType("ddranking.metrics.hard_label"), ModuleType("ddranking.metrics.soft_label")

    def draw(
        dataset_name: Any, dataset: Any, class_to_indices: Any, n_images_per_class: Any, class_map: Any, eval_iter: Any,
        saved_path: Any = None,
    ) -> tuple[Any, ...]:  # fmt: skip
        return dataset_name, dataset, class_to_indices, n_images_per_class, class_map, eval_iter, saved_path

    assert list(inspect.signature(draw).parameters) == DRAW_PARAMETERS.split()
    soft.get_random_data_tensors = draw  # type: ignore[attr-defined]
    hard.save_results = lambda results, path: (results, path)  # type: ignore[attr-defined]
    hard.metric, soft.metric = Metric(HARD_PARAMETERS, "hard_labels"), Metric(SOFT_PARAMETERS, "soft_labels")  # type: ignore[attr-defined]
    metrics.hard_label, metrics.soft_label = hard, soft  # type: ignore[attr-defined]
    metrics.LabelRobustScoreHard = hard.metric  # type: ignore[attr-defined]
    metrics.LabelRobustScoreSoft = soft.metric  # type: ignore[attr-defined]
    known = {f"CIFAR{classes}-ConvNet-3": {"lr": 0.01} for classes in (10, 100)}
    utils.REAL_DATA_TRAINING_CONFIG = known  # type: ignore[attr-defined]
    for module in (top, metrics, utils):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return metrics


def plain(classes: int, size: int, kind: str = "indices", ipc: int = 2, lr: float | None = 0.02) -> TensorSet:
    images, labels = torch.randn(classes * ipc, 3, size, size), torch.arange(classes).repeat_interleave(ipc)
    if kind != "indices":
        labels = torch.randn(len(images), classes)
        labels = labels.softmax(1) if kind == "probabilities" else labels
    return TensorSet(images, labels, None if lr is None else torch.tensor(lr), kind)


def executed(call: str) -> dict[str, Any]:
    space: dict[str, Any] = {}
    exec(compile(call, "call", "exec"), space)
    return space


CASES = [
    (dataset, kind, zca)
    for dataset in SIZES
    for kind in ("indices", "logits", "probabilities")
    for zca in (False, True, None)
    if not (zca and not dataset.startswith("CIFAR")) and not (kind != "indices" and dataset.startswith("image"))
]


@pytest.mark.parametrize(("dataset", "kind", "zca"), CASES)
def test_the_call_runs_with_the_arguments_that_it_has(
    dataset: str, kind: str, zca: bool | None, stand_in: Any, tmp_path: Path
) -> None:
    classes, size = SIZES[dataset]
    distilled, folder = plain(classes, size, kind, ipc=1), tmp_path / "o'clock"
    write_set(folder, distilled, "ddranking")
    subset = dataset if dataset in SUBSETS else None
    call = ddranking_call(folder, distilled, "ImageNet" if subset else dataset, zca, subset, data_path="my data")
    assert max(map(len, call.splitlines())) < 200
    assert ("True if the images are whitened: their files do not say" in call) == (zca is None)
    space = executed(call)
    metric = space["metric"]
    assert metric is (stand_in.hard_label if kind == "indices" else stand_in.soft_label).metric
    asked = metric.arguments
    assert asked.keys() >= WHAT_IT_NEEDS
    names = {"CIFAR10": "CIFAR10", "CIFAR100": "CIFAR100", "Tiny": "TinyImageNet", "imagenette": "ImageNette"}
    assert asked["dataset"] == names.get(dataset, asked["dataset"])
    depth = {32: 3, 64: 4, 128: 5}[size]
    assert (asked["model_name"], asked["ipc"], asked["im_size"]) == (f"ConvNet-{depth}", 1, (size, size))
    assert f"{asked['dataset']}-{asked['model_name']}" in sys.modules["ddranking.utils"].REAL_DATA_TRAINING_CONFIG
    assert asked["real_data_path"] == ("my data/tiny-imagenet-200" if dataset == "Tiny" else "my data")
    assert asked["use_zca"] is bool(zca)
    assert (asked["eval_full_data"], asked["dist"], asked["num_workers"]) == (True, False, 0)
    assert asked["random_data_format"] == "tensor"
    assert asked["aug_params"] == {  # as in the code of DSA
        "flip": 0.5, "rotate": 15.0, "saturation": 2.0, "brightness": 1.0, "contrast": 0.5, "scale": 1.2, "crop": 0.125,
        "cutout": 0.5,
    }  # fmt: skip
    assert metric.metrics["image_tensor"].equal(distilled.images)
    assert metric.metrics["syn_lr"].item() == pytest.approx(0.02)
    if kind == "indices":
        assert metric.metrics["hard_labels"].equal(distilled.labels)
        saved, path = stand_in.hard_label.save_results(
            {"hard_label_recovery": [1.0], "improvement_over_random": [2.0], "lrs": [3.0, 3.0]}, "x.csv"
        )
        assert saved == {"hard_label_recovery": [1.0], "improvement_over_random": [2.0]}  # of one length
        assert path == "x.csv"
        if zca:
            assert [metric.class_map[torch.tensor(label)] for label in (0, classes - 1)] == [0, classes - 1]
    else:
        truth = distilled.labels if kind == "probabilities" else distilled.labels.softmax(1)
        torch.testing.assert_close(metric.metrics["soft_labels"].softmax(1), truth)
        drawn = stand_in.soft_label.get_random_data_tensors(
            dataset, "real", "indices", 1, 3, None
        )  # as soft_label.py calls it
        assert drawn == (dataset, "real", "indices", 1, range(classes), 3, None)
        assert metric.teacher_model == "teacher"
        assert asked["teacher_model_names"] == [asked["model_name"]]
        assert (asked["soft_label_mode"], asked["soft_label_criterion"]) == ("S", "sce")
        assert asked["loss_fn_kwargs"] == {"temperature": 1.0, "scale_loss": False}


def test_a_set_without_a_rate_leaves_it_to_be_searched(stand_in: Any, tmp_path: Path) -> None:
    distilled = plain(10, 32, lr=None)
    write_set(tmp_path, distilled, "ddranking")
    assert executed(ddranking_call(tmp_path, distilled, "cifar10", None))["metric"].metrics["syn_lr"] is None


def test_the_call_has_the_arguments_of_dd_ranking_where_it_is_installed() -> None:
    ddranking = pytest.importorskip("ddranking", exc_type=ImportError)
    for kind, names in (("Hard", HARD_PARAMETERS), ("Soft", SOFT_PARAMETERS)):
        theirs = getattr(ddranking, f"LabelRobustScore{kind}")
        assert set(inspect.signature(theirs).parameters) == set(names.split())
        metrics = inspect.signature(theirs.compute_metrics).parameters
        assert list(metrics) == COMPUTE_PARAMETERS.format(f"{kind.lower()}_labels").split()
    assert list(inspect.signature(ddranking.utils.get_random_data_tensors).parameters) == DRAW_PARAMETERS.split()


@pytest.mark.parametrize(
    ("distilled", "dataset", "zca", "message"),
    [
        (plain(10, 32), None, False, "is not known; give `dataset`"),
        (plain(10, 32), "digits", False, "it has CIFAR10, CIFAR100, Tiny, ImageNet and six of its subsets, not digits"),
        (plain(10, 32), "/my/CIFAR10", False, "and six of its subsets, not /my/CIFAR10"),
        (plain(10, 128), "imagenet-a", False, "and six of its subsets, not imagenet-a"),
        (plain(10, 28), "CIFAR10", False, r"images \(3, 32, 32\) of 10 classes of CIFAR10, found \(3, 28, 28\) of 10"),
        (plain(9, 32), "CIFAR10", False, r"of 10 classes of CIFAR10, found \(3, 32, 32\) of 9"),
        (plain(200, 32, ipc=1), "Tiny", False, r"images \(3, 64, 64\) of 200 classes of TinyImageNet"),
        (plain(200, 64, ipc=1), "Tiny", True, "it whitens only CIFAR10 and CIFAR100, and the images of TinyImageNet are"),
        (plain(10, 64, "logits"), "imagewoof", False, "no soft labels for ImageWoof; `hard_labels` writes the set with classes"),
    ],
)  # fmt: skip
def test_sets_that_dd_ranking_cannot_take_are_refused(
    distilled: TensorSet, dataset: str | None, zca: bool, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        ddranking_call("out", distilled, dataset, zca)


@pytest.mark.parametrize(
    ("dataset", "size", "canvas", "words"),
    [
        ("CIFAR10", 32, None, "takes it with\nimport torch\nfrom ddranking.metrics import LabelRobustScoreHard"),
        (
            "digits",
            32,
            None,
            "cannot take the set: it has CIFAR10, CIFAR100, Tiny, ImageNet and six of its subsets, not digits",
        ),
        (
            "imagenette",
            64,
            Canvas(2, 1),
            "cannot take the set: DD-Ranking has no random crops, which the canvases of --texture",
        ),
    ],
)
def test_convert_tells_the_call(
    dataset: str, size: int, canvas: Canvas | None, words: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    distilled = plain(10, size)
    source, out = tmp_path / "synthetic.safetensors", tmp_path / "out"
    names = tuple(f"class {number}" for number in range(10))
    SyntheticDataset(
        distilled.images, distilled.labels, torch.tensor(0.02), names, (0.5,) * 3, (0.2,) * 3, canvas=canvas,
        recipe={"dataset": dataset, "data_path": "there"},
    ).save(source)  # fmt: skip
    caplog.set_level("INFO")
    assert run(convert.main, [str(source), str(out), "--to", "ddranking"]) == 0
    assert f"DD-Ranking 0.2.0 {words}" in caplog.text
    if dataset == "CIFAR10":
        assert "real_data_path='there'" in caplog.text
    caplog.clear()
    assert run(convert.main, [str(out), str(tmp_path / "again"), "--to", "ddranking"]) == 0
    assert "cannot take the set: the data set that the set was made from is not known; give --dataset" in caplog.text


@pytest.mark.parametrize(
    ("hlr", "ior", "score"),
    [
        (0.2373, 0.3090, 0.285),
        (0.2684, 0.3505, 0.287),
        (0.1652, 0.2052, 0.277),
    ],  # MTT, DATM, MTT at 10, 10, 50 per class
)
def test_the_score_is_that_of_the_boards_numbers(hlr: float, ior: float, score: float) -> None:
    assert label_robust_score(hlr, ior) == pytest.approx(score, abs=1e-3)


def test_the_score_is_that_of_its_definition() -> None:
    assert label_robust_score(-1, 1) == pytest.approx(1)
    assert label_robust_score(1, -1) == 0
    alpha = 0.3 * 0.25 - 0.7 * 0.4
    assert label_robust_score(0.4, 0.25, weight=0.3) == pytest.approx(
        (math.exp(alpha) - math.exp(-1)) / (math.exp(1) - math.exp(-1)), rel=1e-12
    )
    for wrong in ((23.7, 0.3, 0.5), (0.2, 30.9, 0.5), (0.2, 0.3, 1.5), (math.nan, 0.3, 0.5)):
        with pytest.raises(InputError, match="expected a fraction from"):
            label_robust_score(*wrong)
