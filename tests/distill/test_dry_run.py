"""Check that `--dry-run` predicts what happens, and that nothing else happens."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mtt_fast import InputError
from mtt_fast.commands import cli
from mtt_fast.data import DatasetInfo, load
from mtt_fast.data.catalogue import dataset_info
from mtt_fast.data.class_lists import CIFAR10, SUBSETS
from mtt_fast.distill import dry_run, estimates
from mtt_fast.distill.command import main
from mtt_fast.distill.dry_run import disk_in_words
from mtt_fast.distill.estimates import EstimatedBytes, SecondsPerImage, estimated_bytes, estimated_seconds
from mtt_fast.distill.options import DistillOptions
from mtt_fast.distill.planning import plan_steps
from mtt_fast.networks.by_name import network_by_name
from mtt_fast.recipes import recipe_names, recipe_options
from mtt_fast.storage.tensor_files import read_header

TOY = (
    "--dataset digits --model ConvNetD1W4 --num_experts 2 --train_epochs 3 --max_start_epoch 2 --expert_epochs 1 "
    "--syn_steps 3 --Iteration 2 --eval_it 2 --num_eval 1 --epoch_eval_train 1 --batch_real 512 --lr_img 10"
).split()


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, str]:
    assert cli.run(main, [*arguments, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    return {line[:10].strip(): line[10:] for line in lines}


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_has_a_dry_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    # What steps take and other processes leave differs from machine to machine.
    monkeypatch.setattr(
        estimates, "_measured_seconds", lambda *_, tangent: SecondsPerImage(1e-3, 1e-3 if tangent else 0.0)
    )
    monkeypatch.setattr("mtt_fast.engine.memory_plan.free_bytes", lambda _: 64 << 30)
    lines = told(capsys, "--recipe", name)
    assert lines["recipe"].startswith(f"{name}: ")
    assert "peak" in lines["memory"]
    assert "free" in lines["disk"]
    assert not list(tmp_path.iterdir())


PAD_IS_DATM_BUT_FOR: dict[str, dict[str, float]] = {
    "cifar10-ipc1": {},
    "cifar10-ipc10": {"depth_ratio": 0.5},
    "cifar10-ipc50": {"depth_ratio": 0.25, "expert_epochs": 3},
    "cifar10-ipc500": {
        "depth_ratio": 0.5, "current_max_start_epoch": 60, "max_start_epoch": 70, "expansion_end_epoch": 2000,
    },
    "cifar10-ipc1000": {"depth_ratio": 0.5},
    "cifar100-ipc1": {"depth_ratio": 0.5, "current_max_start_epoch": 20, "max_start_epoch": 30},
    "cifar100-ipc10": {"depth_ratio": 0.5},
    "cifar100-ipc50": {},
    "cifar100-ipc100": {"depth_ratio": 0.5},
    "tiny-ipc1": {"depth_ratio": 0.5},
    "tiny-ipc10": {"depth_ratio": 0.5},
    "tiny-ipc50": {"depth_ratio": 0.5},
}  # fmt: skip


@pytest.mark.parametrize("setting", PAD_IS_DATM_BUT_FOR)
def test_what_pads_configurations_change_of_datms(setting: str) -> None:
    pad, datm = (recipe_options(f"{method}-{setting}") for method in ("pad", "datm"))
    changed = {name: value for name, value in pad.items() if datm.get(name) != value}
    assert changed == PAD_IS_DATM_BUT_FOR[setting]
    assert set(datm) <= set(pad)
    assert pad["eval_it"] == (1000 if setting in ("cifar10-ipc500", "cifar10-ipc1000") else 500)


def test_sizes_are_those_of_the_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = ["--data_path", f"{tmp_path}/data", "--buffer_path", f"{tmp_path}/buffers", "--out", f"{tmp_path}/run"]
    before = told(capsys, *TOY, *folders)
    assert before["experts"].startswith("2 to train for 3 epochs, 0 in")
    assert f"into {tmp_path}/run" in before["run"]
    assert cli.run(main, [*TOY, *folders]) == 0
    capsys.readouterr()
    parts = dict(re.findall(r"(experts|packed data set) ([\d.]+) kB", before["disk"]))
    for name, pattern in (("experts", "buffers/**/*.safetensors"), ("packed data set", "data/packed/*.safetensors")):
        size = sum(path.stat().st_size for path in tmp_path.glob(pattern)) / 1e3
        assert size == pytest.approx(float(parts[name]), rel=0.4 if name == "experts" else 0.02), name  # headers
    after = told(capsys, *TOY, *folders)
    assert after["precision"].endswith("Student, fp32 (a CPU computes in float32)")
    assert after["experts"].startswith("0 to train for 3 epochs, 2 in")
    assert "is finished" in after["run"]


def test_the_training_of_existing_experts_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = ["--data_path", f"{tmp_path}/data", "--buffer_path", f"{tmp_path}/buffers", "--out"]
    assert cli.run(main, [*TOY, *folders, f"{tmp_path}/run", "--mom", "0.5", "--Iteration", "0"]) == 0
    for compressed in ([], ["--num_interpolation", "2"]):
        assert "--mom 0.5" in told(capsys, *TOY, *folders, f"{tmp_path}/other", *compressed)["options"]


def test_options_beside_the_plain_ones_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--lr_y", "2", "--texture", "--protocol", "datm", "--out", f"{tmp_path}/run"]
    told_options = told(capsys, "--dataset", "digits", "--model", "ConvNetD1W4", *flags)["options"]
    assert told_options == "--protocol datm --lr_y 2.0 --texture"


@pytest.mark.parametrize(
    "flags", ["--ipc 1000000000", "--ipc 40 --texture", "--ipc 1000 --dataset MNIST --texture --canvas_size 3"]
)
def test_more_images_than_the_data_set_has_are_refused_at_once(
    flags: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*TOY, *flags.split(), "--data_path", str(tmp_path), "--buffer_path", str(tmp_path), "--dry-run"]
    assert cli.run(main, command) == 2
    error = capsys.readouterr().err.strip()
    assert re.search(r"error: --ipc \d+.*: a class has only \d+ of the \d+ real images", error)
    assert error.endswith("use a smaller --ipc or --canvas_size" if "--texture" in flags else "use a smaller --ipc")


def test_the_facts_are_those_of_the_data(tmp_path: Path) -> None:
    info, data = dataset_info("digits"), load("digits", data_path=tmp_path, progress=False)
    assert (info.name, info.image_shape, info.num_classes) == (data.name, data.image_shape, data.num_classes)
    assert (info.num_train, info.num_test) == (len(data.train.labels), len(data.test.labels))


def test_an_image_folder_is_counted(tmp_path: Path) -> None:
    from PIL import Image

    for split, count in (("train", 3), ("test", 2)):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (6, 4)).save(tmp_path / split / name / f"{number}.png")
    info, data = dataset_info(str(tmp_path)), load(str(tmp_path), data_path=tmp_path / "data", progress=False)
    assert (info.num_train, info.num_test, info.image_shape) == (6, 4, (3, 4, 6))
    assert (info.name, info.image_shape) == (data.name, data.image_shape)
    assert dataset_info(str(tmp_path), res=8).image_shape == (3, 8, 8)


def pictures(
    root: Path, *, mode: str = "RGB", size: tuple[int, int] = (6, 4), classes: Sequence[str] = ("a", "b")
) -> Path:
    """Write three training images and two test images of each class."""
    from PIL import Image

    for split, count in (("train", 3), ("test", 2)):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                Image.new(mode, size).save(root / split / name / f"{number}.png")
    return root


@pytest.mark.parametrize("place", ["train/a/2.png", "train/b/0.png", "test/b/1.png"])
def test_all_images_tell_the_shape(tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Check that all images are read for their mode and size, not only the first."""
    from PIL import Image

    root = pictures(tmp_path / "x", mode="L")
    assert dataset_info(str(root)).image_shape == (1, 4, 6)
    Image.new("RGB", (6, 4)).save(root / place)
    assert dataset_info(str(root)).image_shape == (3, 4, 6)
    assert load(str(root), data_path=tmp_path / "data", progress=False).image_shape == (3, 4, 6)
    Image.new("RGB", (7, 4)).save(root / place)
    assert dataset_info(str(root), res=8).image_shape == (3, 8, 8)
    lines = []
    for flags in (["--dry-run"], ["--out", f"{tmp_path}/run", "--data_path", f"{tmp_path}/data"]):
        assert cli.run(main, ["--dataset", str(root), "--model", "ConvNetD1W4", *flags]) == 2
        lines.append(capsys.readouterr().err.splitlines()[-1])
    assert lines[0] == lines[1]
    assert f"{root / place}: expected 6x4 pixels as in the other images, found 7x4; give --res" in lines[0]


def test_a_known_data_set_that_is_there_is_counted(tmp_path: Path) -> None:
    root = pictures(tmp_path / "cifar", size=(32, 32), classes=CIFAR10)
    info, data = dataset_info("cifar10", data_path=str(root)), load("CIFAR10", data_path=root, progress=False)
    assert (info.name, info.image_shape, info.num_train, info.num_test) == (data.name, data.image_shape, 30, 20)
    root = pictures(tmp_path / "woof", size=(32, 32), classes=list(SUBSETS["imagewoof"]))
    (root / "test").rename(root / "val")
    info = dataset_info("ImageNet", "ImageWoof", 16, data_path=str(root))
    assert dataclasses.astuple(info) == ("imagewoof-16", (3, 16, 16), 10, 30, 20)


def test_what_the_run_refuses_is_refused(tmp_path: Path) -> None:
    few = pictures(tmp_path / "few", size=(32, 32), classes=CIFAR10[:4])
    odd = pictures(tmp_path / "odd", size=(32, 30), classes=CIFAR10)
    for root, message in ((few, "expected the 10 class folders of CIFAR10 in train/"), (odd, "expected 32x32 pixels")):
        for function in (dataset_info, load):
            with pytest.raises(InputError, match=message):
                function("CIFAR10", data_path=str(root))
    with pytest.raises(InputError, match="`subset`: expected only with `dataset` ImageNet"):
        dataset_info("digits", "imagewoof")


def test_a_missing_folder_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.run(main, ["--dataset", f"{tmp_path}/none", "--dry-run"]) == 2
    assert f"--dataset {tmp_path}/none: expected a data set by name or an image folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--batch_syn 11", "--batch_syn 11: expected at most the 10 synthetic images"),
        ("--model ConvNetD1W4BN --teacher_label", "--teacher_label: expected a network without batch norm"),
    ],
)
def test_what_does_not_fit_is_told(flags: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(main, [*TOY, *flags.split(), "--dry-run"]) == 2
    assert message in capsys.readouterr().err


INFO = DatasetInfo("toy", (1, 8, 8), 10, 100, 30)
OPTIONS = DistillOptions(
    ipc=2, train_epochs=5, syn_steps=4, Iteration=7, eval_it=3, num_eval=2, epoch_eval_train=9, num_trajectories=3, max_start_epoch=2
)  # fmt: skip


def test_the_time_is_that_of_every_image_in_every_step() -> None:
    cost, expert, evaluated = SecondsPerImage(gradient=2.0, tangent=5.0), 3.0, [3.0, 6.0]
    times = estimated_seconds(OPTIONS, INFO, 2, cost, share=0.5, expert=expert, evaluated=evaluated)
    assert times.experts == 2 * 5 * (100 * 3 + 30 * 1)  # a test is a third of a gradient
    assert times.iterations == 7 * 3 * 4 * 20 * (2 + 5) * 0.5
    one, other = 10 * 20 * 3 + 30 * 1, 10 * 20 * 6 + 30 * 2  # an epoch more, as in the public code
    assert times.evaluations == 2 * (4 * (one + other) + one)  # before, after 3, 6 and 7 iterations; random real images

    soft = dataclasses.replace(OPTIONS, lr_y=1.0)  # random real images are also evaluated with labels of experts
    of_soft = estimated_seconds(soft, INFO, 2, cost, share=0.5, expert=expert, evaluated=evaluated)
    assert of_soft == times._replace(evaluations=times.evaluations + 2 * one)

    of_maps = dataclasses.replace(OPTIONS, cam_model="ResNet18", cam_interval=3)
    with_maps = estimated_seconds(
        of_maps, INFO, 2, cost, share=0.5, expert=expert, evaluated=evaluated, cam=6.0, train_cam=True
    )
    assert with_maps.experts - times.experts == 5 * (100 * 6 + 30 * 2)
    assert with_maps.iterations - times.iterations == 3 * 20 * 6  # before iterations 1, 4 and 7
    there = estimated_seconds(of_maps, INFO, 2, cost, share=0.5, expert=expert, evaluated=evaluated, cam=6.0)
    assert there == with_maps._replace(experts=times.experts)

    more = dataclasses.replace(OPTIONS, rho_max=0.1, ema_decay=0.9, batch_syn=6, texture=True, canvas_samples=3)
    times = estimated_seconds(more, INFO, 2, cost, share=1.0, expert=expert, evaluated=evaluated)
    assert times.experts == 2 * 5 * (100 * 2 * 3 + 30 * 1)
    assert times.iterations == 7 * 3 * 4 * 18 * (2 + 5)
    one, other = 3 * (one - 30) + 30, 3 * (other - 60) + 60
    assert times.evaluations == 2 * (2 * 4 * (one + other) + one)


@pytest.mark.native  # another student has other numbers of passes
def test_the_time_is_scaled_from_the_fastest_of_some_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Let the fastest step of 16 images take a second, whatever is computed; saved activations leave 9 of 11 passes."""
    clock = itertools.accumulate(itertools.cycle((0.0, 50.0, 0.0, 3.0, 0.0, 1.0)))  # looks before and after each step
    monkeypatch.setattr("mtt_fast.distill.estimates.time.perf_counter", lambda: next(clock))
    flags = ["--Iteration", "4000", "--eval_it", "4000", "--memory_budget", "1GiB", "--out", f"{tmp_path}/run"]
    lines = told(capsys, *TOY, *flags, "--buffer_path", f"{tmp_path}/buffers")
    assert "9.0 convolution passes a step, 9 at least" in lines["memory"]
    experts = 2 * 3 * (1442 / 16 + 355 / 48) / 60
    iterations = 4000 * 3 * 10 * 2 / 16 * 9 / 11 / 3600
    evaluations = 3 * (2 * 10 / 16 + 355 / 48)  # of the initial and the last images, and of random real ones
    assert lines["time"].startswith(
        f"about {iterations + experts / 60 + evaluations / 3600:.1f} h: experts {experts:.1f} min, "
        f"iterations {iterations:.1f} h, evaluations {evaluations:.0f} s; scaled from steps of 16 images on cpu"
    )


def test_each_network_is_timed_in_its_own_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Let an image take as many seconds as the network has parameters, and half a second more in the precision of iterations."""
    monkeypatch.chdir(tmp_path)
    asked: list[dict[str, Any]] = []
    measured: list[tuple[int, str, bool]] = []

    def seconds(network: Any, precision: str, *_: Any, tangent: bool) -> SecondsPerImage:
        measured.append((network.num_parameters, precision, tangent))
        return SecondsPerImage(network.num_parameters + 0.5 * (precision == "fp16"), 1.0 if tangent else 0.0)

    def estimated(options: Any, info: Any, missing: int, cost: SecondsPerImage, **others: Any) -> Any:
        asked.append({"missing": missing, "cost": cost} | others)
        return estimated_seconds(options, info, missing, cost, **others)

    monkeypatch.setattr(estimates, "precision_on", lambda *_, iterations=False: "fp16" if iterations else "tf32")
    monkeypatch.setattr(
        dry_run, "plan_steps", lambda *given, **_: plan_steps(given[0], given[1], given[2], given[3], "fp32")
    )
    monkeypatch.setattr(estimates, "_measured_seconds", seconds)
    monkeypatch.setattr(estimates, "estimated_seconds", estimated)
    lines = told(capsys, *TOY, "--eval_mode", "C", "--cam_model", "ConvNetD2W4", "--batch_syn", "7")
    small, wide, maps = (
        network_by_name(name, (1, 8, 8), 10).num_parameters for name in ("ConvNetD1W4", "ConvNet", "ConvNetD2W4")
    )
    expected = [(small, "fp16", True), (small, "tf32", False), (wide, "tf32", False), (maps, "tf32", False)]
    assert measured == expected  # equal steps once, and the derivative of the student's alone
    (given,) = asked
    assert given.pop("share") == pytest.approx(1, abs=0.3)
    assert given == {
        "missing": 2, "cost": (small + 0.5, 1.0), "expert": small, "evaluated": [small, wide], "cam": maps, "train_cam": True,
    }  # fmt: skip
    assert "3 student steps on 7 of 10 synthetic images" in lines["run"]


def test_the_sizes_are_those_of_every_number() -> None:
    images, whitening, others = 4 * 20 * 64, 4 * 2 * 64**2, 3 * 8 * 20 + 4 * 4  # labels and learning rates
    assert estimated_bytes(OPTIONS, INFO, 1000, 3, 0) == (
        4 * 3 * 6 * 1000, 2 * images + 2 * images + others, 130 * (64 + 8),
    )  # fmt: skip
    assert estimated_bytes(OPTIONS, INFO, 1000, 3, 0, cam_parameters=700).experts == 4 * 6 * (3 * 1000 + 700)
    with_maps = estimated_bytes(dataclasses.replace(OPTIONS, cam_model="ResNet18"), INFO, 1000, 3, 0)
    assert with_maps.run_folder == 4 * images + images / INFO.image_shape[0] + others
    more = dataclasses.replace(OPTIONS, zca=True, ema_decay=0.9, texture=True, canvas_size=2, num_interpolation=4)
    experts, run, _ = estimated_bytes(more, INFO, 1000, 3, 5)
    assert experts == 4 * (3 * 6 + 5 * 4) * 1000
    assert run == 4 * (4 * images + whitening) + 3 * 4 * images + 5 * 8 * 20 + 6 * 4


@pytest.mark.parametrize(
    "flags",
    [
        "", "--lr_y 0.1", "--teacher_label", "--ema_decay 0.5 --zca", "--cam_model ConvNetD1W4", "--ipc 2 --msz_per_channel 9",
        "--parametrisation ddif --parametrisation_options 'num_layers=1 layer_size=2 epochs_init=1' --lr_img 0.01",
        "--parametrisation speed --parametrisation_options 'num_saet=4 dim_saet=8 num_head=2 decoder_depth=1 top_k=8 l1_weight=0'",
    ],
)  # fmt: skip
def test_the_size_of_the_run_folder_is_that_of_the_saved_tensors(
    flags: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[EstimatedBytes] = []

    def in_words(options: DistillOptions, size: EstimatedBytes) -> str:
        sizes.append(size)
        return ""

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dry_run, "disk_in_words", in_words)
    arguments = [*TOY, *shlex.split(flags), "--out", "run"]
    assert cli.run(main, [*arguments, "--dry-run"]) == 0
    assert cli.run(main, arguments) == 0
    saved = [entry for path in Path("run").glob("*.safetensors") for entry in read_header(path)[0].values()]
    assert sizes[0].run_folder == pytest.approx(sum(entry.end - entry.begin for entry in saved), rel=0.01)


@pytest.mark.parametrize(
    ("dataset", "subset", "res", "expected"),
    [
        ("cifar100", None, None, ("CIFAR100", (3, 32, 32), 100, 50_000, 10_000)),
        ("Tiny", None, None, ("Tiny", (3, 64, 64), 200, 100_000, 10_000)),
        ("Tiny", None, 32, ("Tiny-32", (3, 32, 32), 200, 100_000, 10_000)),
        ("ImageNet", None, 64, ("ImageNet-64", (3, 64, 64), 1000, 1_281_167, 50_000)),
        ("ImageNet", "imagewoof", None, ("imagewoof-128", (3, 128, 128), 10, 13_000, 500)),
        ("imagewoof", None, None, ("imagewoof-128", (3, 128, 128), 10, 13_000, 500)),
    ],
)
def test_a_data_set_has_its_published_numbers(
    dataset: str, subset: str | None, res: int | None, expected: tuple[Any, ...]
) -> None:
    assert dataclasses.astuple(dataset_info(dataset, subset, res)) == expected


def test_free_space_is_that_of_each_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk_of, stat = (lambda path: 1 + ("scratch" in str(path))), Path.stat

    def stat_on_disks(path: Path, **others: Any) -> os.stat_result:
        fields = list(stat(path, **others))
        return os.stat_result([*fields[:2], disk_of(path), *fields[3:]])

    monkeypatch.setattr(Path, "stat", stat_on_disks)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free={1: 5e9, 2: 1e6}[disk_of(path)]))
    monkeypatch.chdir(tmp_path)
    size, options = (
        EstimatedBytes(2e6, 1e6, 3e6),
        DistillOptions(out="run", buffer_path=str(tmp_path / "scratch" / "b")),
    )
    (tmp_path / "scratch").mkdir()
    needed = "about 6.0 MB: experts 2.0 MB, run folder 1.0 MB, packed data set 3.0 MB; free "
    assert (
        disk_in_words(options, size)
        == f"{needed}1.0 MB (not enough) for experts, 5.0 GB for run folder and packed data set"
    )
    assert disk_in_words(DistillOptions(out="run"), size) == f"{needed}5.0 GB"
