"""Test the analyses of the paper on toy runs: what they read, compute, draw and refuse."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from PIL.GifImagePlugin import GifImageFile

from mtt_fast import ConvNet, SyntheticDataset, TrajectoryStore
from mtt_fast.analysis.__main__ import COMMANDS, main
from mtt_fast.analysis.distance import (
    DistanceOptions,
    default_options,
    nearest_steps,
    read_distilled_sets,
    strategy_of,
    student_path,
)
from mtt_fast.analysis.evolution import CAPTION, evenly
from mtt_fast.commands import cli, parsing
from mtt_fast.data import load, transform_for
from mtt_fast.distill.command import main as distill
from mtt_fast.experts import ExpertTraining, expert_steps, train_expert
from mtt_fast.runtime.interrupts import Stopped
from mtt_fast.runtime.seeding import generator_for
from mtt_fast.storage.files import write_json
from mtt_fast.training.images import real_images

TOY = (
    "--dataset digits --model ConvNetD1W4 --num_experts 2 --train_epochs 4 --max_start_epoch 2 --Iteration 2 --eval_it 1 "
    "--num_eval 1 --epoch_eval_train 1 --batch_real 512 --lr_img 10 --save_seconds 0"
).split()


def run(*arguments: str) -> int:
    return cli.run(main, arguments)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with two toy experts, and a run distilled without augmentation in batches of six of ten images."""
    folder = tmp_path_factory.mktemp("toy")
    flags = [*TOY, *log_fields(folder), "--syn_steps", "2", "--expert_epochs", "1"]
    assert cli.run(distill, [*flags, "--no_aug", "--batch_syn", "6", "--out", str(folder / "run")]) == 0
    return folder


def log_fields(folder: Path) -> list[str]:
    return ["--data_path", str(folder / "data"), "--buffer_path", str(folder / "buffers")]


def read(path: Path) -> Any:
    return json.loads(path.read_text())


# ------------------------------------------------------------------ the entry


def test_commands_are_told_and_mistyped_ones_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    told = capsys.readouterr().out
    assert all(name in told for name in COMMANDS)
    assert run("gird") == 2
    assert "gird: no such analysis (did you mean grid?)" in capsys.readouterr().err


# ------------------------------------------------------------------ grid


@pytest.mark.slow
def test_grid_runs_every_cell_once_and_draws_them(toy: Path, tmp_path: Path) -> None:
    out = tmp_path / "grid"
    flags = [
        "grid",
        *TOY,
        *log_fields(toy),
        "--expert-epochs",
        "2,1",
        "--syn_steps=1,3",
        "--out",
        str(out),
        "--lr_lr",
        "1e-6",
    ]
    flags += ["--eval_it", "5"]
    assert run(*flags) == 0
    cells = read(out / "grid.json")["cells"]
    assert [(cell["expert_epochs"], cell["syn_steps"]) for cell in cells] == [(1, 1), (1, 3), (2, 1), (2, 3)]
    for cell in cells:
        summary = read(out / cell["run"] / "summary.json")
        assert cell["accuracy"] == summary["accuracy"]["distilled"]
        options = summary["options"]
        assert (options["expert_epochs"], options["syn_steps"], options["lr_lr"]) == (
            cell["expert_epochs"],
            cell["syn_steps"],
            1e-6,
        )
        assert (
            f" {100 * cell['accuracy']['mean']:.1f} |" in (out / "grid.md").read_text()
        )  # of one network: no deviation
    with Image.open(out / "grid.png") as picture:
        assert len(set(picture.convert("RGB").get_flattened_data())) > 50  # colours of the map
    before = {path: path.stat().st_mtime_ns for path in out.glob("M*/*")}
    assert run(*flags) == 0
    assert {path: path.stat().st_mtime_ns for path in out.glob("M*/*")} == before


def test_a_cell_that_diverges_is_left_open(toy: Path, tmp_path: Path) -> None:
    out = tmp_path / "grid"
    flags = ["grid", *TOY, *log_fields(toy), "--expert_epochs", "1", "--syn_steps", "1,2", "--out", str(out)]
    assert run(*flags, "--Iteration", "30", "--eval_it", "40", "--lr_teacher", "1e30") == 0
    assert [cell["accuracy"] for cell in read(out / "grid.json")["cells"]] == [None, None]
    assert "| M = 1 | — | — |" in (out / "grid.md").read_text()


def test_a_stopped_grid_keeps_what_is_finished(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def distilled_or_stopped(command: Sequence[str]) -> None:
        place = Path(command[-1])
        if place.name == "M1-N2":
            raise Stopped("stopped", 2)
        write_json(place / "summary.json", summary(0.5))

    monkeypatch.setattr("mtt_fast.distill.command.main", distilled_or_stopped)
    out = tmp_path / "grid"
    assert run("grid", *TOY, *log_fields(toy), "--expert_epochs", "1", "--syn_steps", "1,2", "--out", str(out)) == 130
    assert [cell["accuracy"] is None for cell in read(out / "grid.json")["cells"]] == [False, True]
    assert "| M = 1 | 50.0 ± 1.0 | — |" in (out / "grid.md").read_text()
    assert (out / "grid.png").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--syn_steps", "1,x"], "--syn_steps 1,x: expected numbers as in 1,10,100"),
        (["--expert_epochs", "0"], "--expert_epochs 0: expected numbers of at least 1"),
        (["--ipcc", "3"], "ipcc: unknown option (did you mean --ipc?)"),
        (["--expert_epochs", "1,3"], "reach epoch 5, but the expert ends at epoch 4"),
    ],
)
def test_grid_refuses_before_the_first_cell(
    flags: list[str], message: str, toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("grid", *TOY, *log_fields(toy), "--out", str(tmp_path / "grid"), *flags) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("summary.json"))


# ------------------------------------------------------------------ distance


def test_nearest_steps_by_hand() -> None:
    path = torch.tensor([[0.0, 0.0], [3.0, 0.0], [3.0, 4.0]], dtype=torch.float64)
    targets = torch.tensor([[4.0, 0.0], [3.0, 4.0], [0.0, -2.0]], dtype=torch.float64)
    assert nearest_steps(path, targets) == [(1 / 16, 1), (0.0, 2), (1.0, 0)]
    path[1] = torch.nan  # a student that diverges was somewhere before
    assert nearest_steps(path, targets) == [(1.0, 0), (0.0, 2), (1.0, 0)]


@pytest.mark.parametrize("seed", [0, 1])
def test_nearest_steps_against_a_written_out_loop(seed: int) -> None:
    generator = generator_for(seed, "nearest")
    path, targets = (torch.randn(n, 7, generator=generator, dtype=torch.float64) for n in (20, 4))
    for (distance, step), target in zip(nearest_steps(path, targets), targets, strict=True):
        errors = []
        for theta in path:
            errors.append(
                float(F.mse_loss(theta, target, reduction="sum") / F.mse_loss(path[0], target, reduction="sum"))
            )
        assert distance == pytest.approx(min(errors), rel=1e-12)
        assert step == errors.index(min(errors))


def sgd_step(net: ConvNet, theta: torch.Tensor, images: torch.Tensor, labels: torch.Tensor, lr: float) -> torch.Tensor:
    """Do a step of plain SGD in float64."""
    leaf = theta.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(net(leaf, images.double()), labels), leaf)
    return theta - lr * gradient


def written_out_path(
    net: ConvNet, start: torch.Tensor, synthetic: SyntheticDataset, generator: torch.Generator, steps: int
) -> list[torch.Tensor]:
    """Do steps on ten images in batches of six: a permutation's chunks from the end, the short one first."""
    path, batches = [start], list[torch.Tensor]()
    for _ in range(steps):
        if not batches:
            batches = list(torch.randperm(10, generator=generator).split(6))
        index = batches.pop()
        path.append(sgd_step(net, path[-1], synthetic.images[index], synthetic.labels[index], float(synthetic.lr)))
    return path


def written_out_training(
    net: ConvNet, data_path: Path, generator: torch.Generator, steps: int, lr: float
) -> list[torch.Tensor]:
    """Do steps on the digits in batches of 512: an epoch is a permutation's chunks in order, the short one last."""
    data = load("digits", data_path=data_path)
    images = transform_for(data, zca=False).apply(data.train.images.float() / 255)
    path, batches = [net.init(generator).double()], list[torch.Tensor]()
    for _ in range(steps):
        batches = batches or list(torch.randperm(len(images), generator=generator).split(512))
        index = batches.pop(0)
        path.append(sgd_step(net, path[-1], images[index], data.train.labels[index], lr))
    return path


def test_distance_against_written_out_steps(toy: Path, tmp_path: Path) -> None:
    """Compare with the paper's definition, in float64: targets after Δt steps on real images, squared errors, the closest step."""
    out = tmp_path / "distance"
    flags = [*"--steps 5 --deltas 7,1,4 --starts 2 --expert_lr 0.1 --dsa False".split(), "--out", str(out)]
    assert run("distance", f"short={toy / 'run'}", f"best={toy / 'run' / 'best.safetensors'}", *flags) == 0
    record = read(out / "distance.json")
    net = ConvNet(in_channels=1, num_classes=10, image_size=8, width=4, depth=1)
    for label, name in (("short", "synthetic"), ("best", "best")):
        synthetic = SyntheticDataset.load(toy / "run" / f"{name}.safetensors")
        wanted: dict[int, list[float]] = {1: [], 4: [], 7: []}
        for start in (0, 1):
            real = written_out_training(net, toy / "data", generator_for(0, "expert", start), 7, lr=0.1)
            path = written_out_path(net, real[0], synthetic, generator_for(0, "distance", start), 5)
            for delta, distances in wanted.items():
                target, moved = real[delta], (real[0] - real[delta]).square().sum()
                distances.append(min(float((theta - target).square().sum() / moved) for theta in path))
        points = record["curves"][label]
        assert [(point["real_steps"], point["n"]) for point in points] == [(1, 2), (4, 2), (7, 2)]
        for point in points:
            values = torch.tensor(wanted[point["real_steps"]])
            assert point["mean"] == pytest.approx(float(values.mean()), rel=1e-4)
            assert point["std"] == pytest.approx(float(values.std()), rel=1e-2, abs=1e-5)
    text = (out / "distance.md").read_text()
    assert "| Δt, steps on real images | 1 | 4 | 7 |" in text
    assert "Least squared distance over 5 steps on the distilled set" in text
    with Image.open(out / "distance.png") as picture:
        assert picture.width > 400


def test_distance_is_the_papers_by_default() -> None:
    options = DistanceOptions()
    assert (options.steps, options.starts) == (1000, 1)
    deltas = parsing.integers(options.deltas, "--deltas")
    assert deltas == sorted(deltas)
    assert deltas[0] <= 10  # short
    assert deltas[-1] >= 3 * 196  # long: beyond the three epochs of CIFAR-100 that its sets were matched over


def test_real_training_is_that_of_the_experts(toy: Path) -> None:
    """Compare whole epochs bit for bit: with augmentation, and beyond the epoch where --decay begins a new optimiser."""
    store = TrajectoryStore(toy / "buffers" / "digits" / "ConvNetD1W4")
    net = ConvNet(in_channels=1, num_classes=10, image_size=8, width=4, depth=1)
    real = real_images(load("digits", data_path=toy / "data"), torch.device("cpu"), zca=False)
    recorded = ExpertTraining(**store.metadata(1).hyperparameters)
    decaying = dataclasses.replace(recorded, decay=True, mom=0.9, l2=0.01, rho_max=0.05, rho_min=0.01)
    rows = {}
    for training in (recorded, decaying):
        rows[training], _ = train_expert(real, net, training, seed=0, index=1)
        steps = list(itertools.islice(expert_steps(real, net, training, seed=0, index=1), 13))
        assert all(steps[3 * epoch].equal(row) for epoch, row in enumerate(rows[training]))  # 1437 images, 512 a batch
    for epoch, row in enumerate(rows[recorded]):
        torch.testing.assert_close(row, store.read(1, epoch))  # trained with another number of threads
    undiminished, _ = train_expert(real, net, dataclasses.replace(decaying, decay=False, rho_min=0.05), seed=0, index=1)
    assert undiminished[3].equal(rows[decaying][3])
    assert undiminished[4].equal(rows[decaying][4])  # of four epochs none is behind the drop
    drops = dataclasses.replace(decaying, train_epochs=2)
    late = list(itertools.islice(expert_steps(real, net, drops, seed=0, index=1), 13))
    assert late[9].equal(rows[decaying][3])
    assert not late[12].equal(rows[decaying][4])


def test_a_stopped_distance_goes_on(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, seen = tmp_path / "out", list[str]()

    def counted(
        network: Any, start: torch.Tensor, synthetic: SyntheticDataset, options: Any, generator: torch.Generator
    ) -> torch.Tensor:
        if len(seen) == 1:
            raise Stopped("stopped", 2)
        seen.append("student")
        return student_path(network, start, synthetic, options, generator)

    synthetic = SyntheticDataset.load(toy / "run" / "synthetic.safetensors")
    dataclasses.replace(synthetic, lr=synthetic.lr / 2).save(tmp_path / "slow.safetensors")
    sets = [f"a={toy / 'run'}", f"b={tmp_path / 'slow.safetensors'}"]
    flags = ["--steps", "3", "--deltas", "2,5"]
    assert run("distance", *sets, *flags, "--out", str(tmp_path / "whole")) == 0
    monkeypatch.setattr("mtt_fast.analysis.distance.student_path", counted)
    assert run("distance", *sets, *flags, "--out", str(out)) == 130
    assert list(read(out / "distance.json")["curves"]) == ["a"]
    seen.clear()
    assert run("distance", *sets, *flags, "--out", str(out)) == 0  # one student was left
    assert read(out / "distance.json")["curves"] == read(tmp_path / "whole" / "distance.json")["curves"]
    assert (out / "distance.md").read_text() == (tmp_path / "whole" / "distance.md").read_text()
    assert run("distance", *sets, *flags, "--out", str(out)) == 0  # and now none
    assert run("distance", *sets, *flags, "--steps", "4", "--out", str(out)) == 130  # another question


def test_augmentation_is_that_of_the_distillation() -> None:
    options = DistanceOptions(dsa_strategy="flip")
    for recipe, strategy in (
        ({}, "flip"),  # from elsewhere
        ({"dsa_strategy": "crop", "dsa": True}, "crop"),
        ({"dsa_strategy": "crop", "dsa": False}, "none"),
        ({"dsa_strategy": "crop", "no_aug": True}, "none"),
        ({"dsa_strategy": "crop", "method": "DC"}, "none"),
        ({"dsa_strategy": "crop", "method": "DSA"}, "crop"),
    ):
        assert strategy_of(recipe, options) == strategy


def test_options_of_real_training_are_those_of_the_set_that_matched_trajectories() -> None:
    dsa = {"dataset": "CIFAR100", "seed": 3, "device": "cuda:1", "method": "DSA", "batch_real": 128, "lr_img": 0.1}
    mtt = {"dataset": "CIFAR10", "expert_epochs": 3, "expert_lr": 0.02, "batch_real": 256, "mom": 0.9, "ipc": 1}
    assert default_options([dsa, mtt]) == {
        "dataset": "CIFAR100", "seed": 3, "expert_lr": 0.02, "batch_real": 256, "mom": 0.9,
    }  # fmt: skip
    assert default_options([dsa]) == {"dataset": "CIFAR100", "seed": 3}


def test_students_step_as_in_the_distillation(toy: Path) -> None:
    """Use a rate for each of two steps in turn, momentum and weight decay, against torch's optimiser."""
    synthetic = SyntheticDataset.load(toy / "run" / "synthetic.safetensors")
    recipe = synthetic.recipe | {"student_mom": 0.5, "student_l2": 0.01}
    synthetic = dataclasses.replace(synthetic, lr_per_step=torch.tensor([0.1, 0.3]), recipe=recipe)
    net = ConvNet(in_channels=1, num_classes=10, image_size=8, width=4, depth=1)
    start = net.init(generator_for(0, "start"))
    options = DistanceOptions(steps=5)
    path = student_path(net, start, synthetic, options, generator_for(0, "student"))

    theta, batches, generator = start.clone().requires_grad_(), list[torch.Tensor](), generator_for(0, "student")
    optimiser = torch.optim.SGD([theta], momentum=0.5, weight_decay=0.01)
    assert len(path) == 6
    for step in range(5):
        if not batches:
            batches = list(torch.randperm(10, generator=generator).split(6))
        index = batches.pop()
        optimiser.param_groups[0]["lr"] = (0.1, 0.3)[step % 2]
        optimiser.zero_grad()
        F.cross_entropy(net(theta, synthetic.images[index]), synthetic.labels[index]).backward()
        optimiser.step()
        torch.testing.assert_close(path[step + 1], theta.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "expected run folders, plain or as LABEL=FOLDER"),
        (["RUN", "RUN"], "there is another run with the label run; give labels as LABEL=FOLDER"),
        (["RUN", "--deltas", "1,x"], "--deltas 1,x: expected numbers as in 1,10,100"),
        (["RUN", "--deltas", "0,1"], "--deltas 0,1: expected numbers of at least 1"),
        (["RUN", "--starts", "0"], "--starts 0: expected at least 1"),
        (["RUN", "--expert_lr", "0"], "--expert_lr 0.0: expected more than 0"),
        (
            ["RUN", "--zca"],
            "run: whitened otherwise: expected ZCA-whitened images, found normalised images; leave out --zca",
        ),
        (["RUN", "--steps", "0"], "--steps 0: expected at least 1"),
    ],
)
def test_distance_refuses(
    flags: list[str], message: str, toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(toy / "run") if word == "RUN" else word for word in flags]
    assert run("distance", *words, "--out", str(tmp_path / "out")) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("lr", "message"),
    [
        ("1e38", "diverged within 9 steps; give a smaller --expert_lr"),
        ("1e-46", "--expert_lr 1e-46: expected more than 0 in float32"),
    ],
)
def test_real_training_that_leads_nowhere(
    lr: str, message: str, toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--deltas", "9", "--steps", "1", "--expert_lr", lr, "--out", str(tmp_path / "out")]
    assert run("distance", str(toy / "run"), *flags) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "distance.json").exists()


@pytest.mark.parametrize("text", ["{", "[]", '{"curves": {}}'])
def test_a_broken_record_of_distances(text: str, toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "distance.json").write_text(text)
    assert run("distance", str(toy / "run"), "--deltas", "1", "--out", str(tmp_path)) == 2
    error = capsys.readouterr().err
    assert "distance.json: expected a record of this command, found" in error
    assert "delete it or choose another --out" in error
    assert (tmp_path / "distance.json").read_text() == text


def test_labels_and_paths_of_sets(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "N=2").symlink_to(toy / "run")
    found = read_distilled_sets(["N=2", "short=N=2", "x=N=2/synthetic.safetensors"])
    assert list(found) == ["N=2", "short", "x"]


# ------------------------------------------------------------------ tables


def summary(mean: float, *, method: str | None = None, random: float | None = None, **options: Any) -> dict[str, Any]:
    accuracy = {"distilled": {"mean": mean, "std": 0.01, "n": 5}}
    if random is not None:
        accuracy["random_real_images"] = {"mean": random, "std": 0.02, "n": 5}
    settings = {"dataset": "CIFAR10", "model": "ConvNet", "ipc": 1, "seed": 0} | options
    return {"accuracy": accuracy, "options": settings} | ({} if method is None else {"method": method})


def by_network(*networks: str, accuracy: float = 0.7) -> dict[str, Any]:
    return {"accuracy_by_network": {"distilled": {name: {"mean": accuracy, "std": 0.0, "n": 5} for name in networks}}}


def test_tables_put_what_was_measured_beside_the_paper(tmp_path: Path) -> None:
    runs = {
        "a/seed0": summary(0.40, random=0.15, out="a/seed0", device="cpu", recipe="mine"),
        "a/seed1": summary(0.44, seed=1, random=0.17, out="a/seed1", memory_budget="2GiB"),
        "b": summary(0.30, Iteration=7),
        "datm": summary(0.50, random=0.35, protocol="datm"),
        "best": summary(0.60, best_epoch=True),
        "vgg": summary(0.70, ipc=50, eval_mode="B") | by_network("ConvNetBN", "VGG11BN"),
        "cross": summary(0.48, ipc=10, eval_mode="C") | by_network("VGG11", accuracy=0.48),
        "dm": summary(0.25, method="DM", ipc=10),
        "nette": summary(0.5, dataset="ImageNet", subset="imagenette", res=128, model="ConvNetD5"),
        "small": summary(0.6, dataset="ImageNet", subset="imagenette", res=64, model="ConvNetD5"),
        "textures": summary(0.2, texture=True),
        "digits": summary(0.9, dataset="digits", model="ConvNetD2W32"),
        "folder": summary(0.3, dataset="/some/where/CIFAR10"),
    }
    for name, content in runs.items():
        write_json(tmp_path / "runs" / name / "summary.json", content)
    assert run("tables", str(tmp_path / "runs"), "--out", str(tmp_path / "out")) == 0
    tables = read(tmp_path / "out" / "tables.json")

    def rows(table: str, dataset: str, method: str) -> list[dict[str, Any]]:
        return [row for row in tables[table]["rows"] if (row["dataset"], row["method"]) == (dataset, method)]

    seeds, other, *tested_on_others = rows("1", "CIFAR10", "MTT")
    assert [(row["model"], row["measured"]["50"]["mean"]) for row in tested_on_others] == [
        ("ConvNetBN", 0.70),
        ("VGG11BN", 0.70),
    ]
    assert seeds["measured"]["1"]["mean"] == pytest.approx(0.42)
    assert seeds["measured"]["1"]["std"] == pytest.approx(math.sqrt(2) * 0.02)
    assert [Path(path).name for path in seeds["measured"]["1"]["runs"]] == ["seed0", "seed1"]
    assert seeds["paper"]["accuracy"]["50"] == pytest.approx({"mean": 0.716, "std": 0.002})
    assert other["measured"]["1"]["mean"] == 0.30
    assert other["paper"] is None
    (random,) = rows("1", "CIFAR10", "Random")
    assert random["measured"]["1"]["mean"] == pytest.approx(0.16)
    for method, mean in (("MTT, protocol datm", 0.50), ("Random, protocol datm", 0.35), ("MTT, best epoch", 0.60)):
        (row,) = rows("1", "CIFAR10", method)
        assert (row["measured"]["1"]["mean"], row["paper"]) == (mean, None)
    assert rows("2", "CIFAR10", "MTT")[0]["measured"]["1"]["n"] == 2
    assert rows("2", "CIFAR10", "KIP")[0]["paper"]["quoted"]
    by_model = {row["model"]: row for row in rows("3", "CIFAR10", "MTT")}
    assert list(by_model) == ["ConvNet", "ResNet18", "VGG11", "AlexNet"]
    assert by_model["VGG11"]["measured"]["10"]["mean"] == 0.48
    assert by_model["VGG11"]["paper"]["accuracy"]["10"] == pytest.approx({"mean": 0.503, "std": 0.008})
    assert by_model["VGG11"]["elsewhere"][0]["accuracy"]["50"] == pytest.approx({"mean": 0.554})
    assert seeds["elsewhere"][0]["source"] == "the text of the paper"
    assert rows("4", "imagenette", "MTT")[0]["measured"]["1"]["mean"] == 0.5
    assert rows("1", "imagenette at 64 px", "MTT")[0]["measured"]["1"]["mean"] == 0.6
    assert rows("1", "CIFAR10", "MTT, textures")[0]["measured"]["1"]["mean"] == 0.2
    assert rows("1", "digits", "MTT")[0]["paper"] is None
    assert [row["model"] for row in rows("1", "CIFAR10 (folder)", "MTT")] == ["ConvNet"]
    text = (tmp_path / "out" / "tables.md").read_text()
    for line in (
        "| CIFAR10 | MTT | ConvNet | 42.0 ± 2.8 (2 runs) | 46.3 ± 0.8* | — | 65.3 ± 0.7* | — | 71.6 ± 0.2 | — | — |",
        "| CIFAR10 | DM | ConvNet | — | 26.0 ± 0.8‡ | 25.0 ± 1.0 | 48.9 ± 0.6 |",
        "| CIFAR10 | MTT (b) | ConvNet | 30.0 ± 1.0 | — |",
        "| CIFAR10 | CAFE | ConvNet | — | 30.3 ± 1.1†‡ | — |",
        "| CIFAR10 | DD | AlexNet | — | none | — | 36.8 ± 1.2 | — | none |",
        "| CIFAR10 | MTT | VGG11 | — | — | 48.0 ± 0.0 | 50.3 ± 0.8 | — | 55.4‡ |",
        "| imagesquawk | all real images | ConvNetD5 | — | — | — | — | — | 87.5 ± 0.3 |",
        "\n- Herding (CIFAR10, CIFAR100): Table 1 of AutoPalette",
        "\n- CIFAR10, MTT, ConvNet, 1: 46.2 ± 0.8 in Table 1 of PAD (arXiv 2408.03360)\n",
        "\n- CIFAR100, MTT, ConvNet, 10: 39.4 in Table 2 of the paper\n",
        "\n- CIFAR10: 0.02 % at 1, 0.2 % at 10, 1 % at 50\n",
        "\n- ImageNet subsets: 11 s an epoch, 15 GPU hours for 100, 120 MB each\n",
    ):
        assert line in text
    assert "MTT, ConvNet, 50: 71.6" not in text  # PAD says what the table says


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "expected a finished run in it or below, found no summary.json"),
        ({"summary.json": "{"}, "summary.json: expected the summary of a run"),
        (
            {"summary.json": '{"accuracy": {"distilled": {"mean": 0.5, "std": 0.1, "n": 2}}, "options": {}}'},
            "expected 'dataset' among the options",
        ),
    ],
)
def test_tables_refuse(files: dict[str, str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    assert run("tables", str(folder), "--out", str(tmp_path / "out")) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------ score


def write_evaluation(path: Path, mean: float, **others: str) -> str:
    record = {
        "dataset": "CIFAR10",
        "model": "ConvNet",
        "protocol": {"name": others.pop("protocol", "ddranking")},
    } | others
    write_json(path, record | {"accuracy": {"mean": mean, "std": 0.0, "n": 5}})
    return str(path)


@pytest.mark.parametrize("hard", [None, "40"])
def test_score_of_accuracies(hard: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    out = tmp_path / "score.json"
    files = ["--distilled", write_evaluation(tmp_path / "set.json", 0.6), "--random"]
    files += [write_evaluation(tmp_path / "random.json", 0.3), "--full", "85", "--out", str(out)]
    assert run("score", *files, *(["--hard", hard] if hard else [])) == 0
    record = read(out)
    hlr = 0.85 - (0.4 if hard else 0.6)
    assert (record["hard_label_recovery"], record["improvement_over_random"]) == pytest.approx((hlr, 0.3))
    score = (math.exp(0.5 * 0.3 - 0.5 * hlr) - math.exp(-1)) / (math.exp(1) - math.exp(-1))
    assert record["label_robust_score"] == pytest.approx(score)
    assert (record["protocol"], record["dataset"], record["model"]) == ("ddranking", "CIFAR10", "ConvNet")
    assert f"label-robust score {score:.3f} (weight 0.5)" in caplog.text


def test_score_of_the_board(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    assert run("score", "--hlr", "23.73", "--ior", "30.90") == 0
    assert "HLR 23.73 %, IOR 30.90 %, label-robust score 0.284" in caplog.text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "--full: expected an accuracy, found none; or give --hlr"),
        ("--full 85", "--distilled: expected an accuracy, found none; or give --hlr"),
        ("--full 85 --distilled 60", "--random: expected an accuracy, found none; or give --ior"),
        ("--hlr 20", "--distilled: expected an accuracy, found none; or give --ior"),
        ("--hlr 20 --ior 30 --distilled 50", "--distilled: has no effect beside --hlr or --ior"),
        ("--hlr 20 --full 80 --distilled 50 --random 30", "--full: has no effect beside --hlr or --ior"),
        ("--full 80 --distilled 50 --ior 3 --random 2", "--random: has no effect beside --hlr or --ior"),
        ("--full 0.85 --distilled 60 --random 30", "--full 0.85: expected an accuracy in per cent, as 84.8"),
        ("--full 850 --distilled 60 --random 30", "--full 850: expected an accuracy in per cent, 0 to 100"),
        ("--full nan --distilled 60 --random 30", "--full nan: expected an accuracy in per cent, 0 to 100"),
        ("--hlr 200 --ior 30", "--hlr 200.0: expected per cent, -100 to 100"),
        ("--hlr 20 --ior nan", "--ior nan: expected a finite number"),
        ("--hlr 20 --ior 30 --weight 2", "--weight 2.0: expected 0 to 1"),
        (
            "--full 85 --distilled no.json --random 30",
            "--distilled no.json: expected a number in per cent or a file (No such",
        ),
        (
            "--full 85 --distilled list.json --random 30",
            "list.json: expected what mtt_fast.evaluate --out writes, found",
        ),
        ("--full 85 --distilled a.json --random b.json", "--random: expected the protocol ddranking as in the files"),
    ],
)
def test_score_refuses(
    flags: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("list.json").write_text("[1]")
    write_evaluation(Path("a.json"), 0.6)
    write_evaluation(Path("b.json"), 0.3, protocol="mtt")
    assert run("score", *flags.split(), "--out", "score.json") == 2
    assert message in capsys.readouterr().err
    assert not Path("score.json").exists()


# ------------------------------------------------------------------ evolution


def test_evolution_shows_every_snapshot(toy: Path, tmp_path: Path) -> None:
    assert run("evolution", str(toy / "run"), "--out", str(tmp_path), "--rows", "2", "--seconds", "0.1") == 0
    snapshots = []
    for path in sorted((toy / "run" / "history").iterdir()):
        with Image.open(path) as image:
            snapshots.append(image.convert("RGB"))
    assert len(snapshots) == 3
    width, height = (6 * side for side in snapshots[0].size)  # 80 pixels wide, enlarged to 480
    with Image.open(tmp_path / "evolution.gif") as gif:
        assert isinstance(gif, GifImageFile)
        assert gif.n_frames == 3
        shown = []
        for place, snapshot in enumerate(snapshots):
            gif.seek(place)
            shown.append(gif.info["duration"])
            frame = (
                gif.convert("RGB")
                .crop((0, CAPTION, width, CAPTION + height))
                .resize(snapshot.size, Image.Resampling.NEAREST)
            )
            difference = pixels(frame) - pixels(snapshot)
            assert float(difference.abs().max()) <= 8  # a GIF has 256 colours
        assert shown == [100, 100, 500]
    with Image.open(tmp_path / "evolution.png") as strip:
        assert strip.size == (width, 2 * (CAPTION + height))
        for place, snapshot in enumerate((snapshots[0], snapshots[2])):
            top = place * (CAPTION + height) + CAPTION
            part = strip.crop((0, top, width, top + height)).resize(snapshot.size, Image.Resampling.NEAREST)
            assert pixels(part).equal(pixels(snapshot))


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.tensor(list(image.tobytes()), dtype=torch.int16)


def test_frames_of_a_strip_are_evenly_spaced() -> None:
    frames = [Image.new("L", (1, 1), place) for place in range(11)]
    assert [frame.getpixel((0, 0)) for frame in evenly(frames, 3)] == [0, 5, 10]
    assert evenly(frames, 20) == frames


def test_evolution_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("evolution", str(tmp_path)) == 2
    assert "history: expected snapshots iteration_NNNNNN.png of a run, found none" in capsys.readouterr().err
    history = tmp_path / "history"
    history.mkdir()
    Image.new("RGB", (4, 4)).save(history / "iteration_000000.png")
    Image.new("RGB", (5, 4)).save(history / "iteration_000010.png")
    assert run("evolution", str(tmp_path)) == 2
    assert (
        "iteration_000010.png: expected (4, 4) pixels as in the first snapshot, found (5, 4)" in capsys.readouterr().err
    )
    (history / "iteration_000010.png").write_bytes(b"no")
    assert run("evolution", str(tmp_path)) == 2
    assert "iteration_000010.png: not a picture" in capsys.readouterr().err


def test_a_dry_run_of_a_grid_writes_nothing(toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*TOY, *log_fields(toy), "--out", str(tmp_path / "grid"), "--expert_epochs", "1", "--syn_steps", "1,2"]
    assert run("grid", *flags, "--dry_run") == 0
    assert capsys.readouterr().out.count("data set  digits") == 2
    assert not (tmp_path / "grid").exists()
