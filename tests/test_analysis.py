"""The analyses of the paper on toy runs: what they read, compute, draw and refuse."""

from __future__ import annotations

import dataclasses
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

from mtt_fast import ConvNet, SyntheticDataset, TrajectoryStore, cli
from mtt_fast.analysis.__main__ import COMMANDS, main
from mtt_fast.analysis.distance import DistanceOptions, _distilled_sets, nearest_steps, student_path
from mtt_fast.analysis.evolution import CAPTION, evenly
from mtt_fast.analysis.published import published
from mtt_fast.distill import main as distill
from mtt_fast.files import write_json
from mtt_fast.interrupts import Stopped
from mtt_fast.seeding import generator_for
from mtt_fast.trajectories import write_expert

TOY = (
    "--dataset digits --model ConvNetD1W4 --num_experts 2 --train_epochs 4 --max_start_epoch 2 --Iteration 2 --eval_it 1 "
    "--num_eval 1 --epoch_eval_train 1 --batch_real 512 --lr_img 10 --save_seconds 0"
).split()


def run(*arguments: str) -> int:
    return cli.run(main, arguments)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two toy experts, and a run distilled without augmentation in batches of six of ten images."""
    folder = tmp_path_factory.mktemp("toy")
    flags = [*TOY, *places(folder), "--syn_steps", "2", "--expert_epochs", "1"]
    assert cli.run(distill, [*flags, "--no_aug", "--batch_syn", "6", "--out", str(folder / "run")]) == 0
    return folder


def places(folder: Path) -> list[str]:
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


def test_grid_runs_every_cell_once_and_draws_them(toy: Path, tmp_path: Path) -> None:
    out = tmp_path / "grid"
    flags = [
        "grid",
        *TOY,
        *places(toy),
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
    flags = ["grid", *TOY, *places(toy), "--expert_epochs", "1", "--syn_steps", "1,2", "--out", str(out)]
    assert run(*flags, "--Iteration", "30", "--eval_it", "40", "--lr_teacher", "1e30") == 0
    assert [cell["accuracy"] for cell in read(out / "grid.json")["cells"]] == [None, None]
    assert "| M = 1 | — | — |" in (out / "grid.md").read_text()


def test_a_stopped_grid_keeps_what_is_finished(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def distilled_or_stopped(command: Sequence[str]) -> None:
        place = Path(command[-1])
        if place.name == "M1-N2":
            raise Stopped("stopped", 2)
        write_json(place / "summary.json", summary(0.5))

    monkeypatch.setattr("mtt_fast.distill.main", distilled_or_stopped)
    out = tmp_path / "grid"
    assert run("grid", *TOY, *places(toy), "--expert_epochs", "1", "--syn_steps", "1,2", "--out", str(out)) == 130
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
    assert run("grid", *TOY, *places(toy), "--out", str(tmp_path / "grid"), *flags) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("summary.json"))


# ------------------------------------------------------------------ distance


def test_nearest_steps_by_hand() -> None:
    path = torch.tensor([[0.0, 0.0], [3.0, 0.0], [3.0, 4.0]])
    expert = torch.tensor([[0.0, 0.0], [4.0, 0.0], [3.0, 4.0], [0.0, -2.0]])
    assert nearest_steps(path, expert) == {1: (0.25, 1), 2: (0.0, 2), 3: (1.0, 0)}


def written_out_path(
    net: ConvNet, start: torch.Tensor, synthetic: SyntheticDataset, seed: torch.Generator, steps: int
) -> list[torch.Tensor]:
    """Plain SGD in float64, in batches of six: a permutation's chunks from the end, the short one first."""
    path, batches = [start.double()], list[torch.Tensor]()
    for _ in range(steps):
        if not batches:
            batches = list(torch.randperm(10, generator=seed).split(6))
        index = batches.pop()
        theta = path[-1].clone().requires_grad_()
        loss = F.cross_entropy(net(theta, synthetic.images[index].double()), synthetic.labels[index])
        (gradient,) = torch.autograd.grad(loss, theta)
        path.append(path[-1] - float(synthetic.lr) * gradient)
    return path


def test_distance_against_written_out_steps(toy: Path, tmp_path: Path) -> None:
    out = tmp_path / "distance"
    flags = ["--steps", "5", "--start_epochs", "0,2", "--out", str(out)]
    assert run("distance", f"short={toy / 'run'}", f"best={toy / 'run' / 'best.safetensors'}", *flags) == 0
    record = read(out / "distance.json")
    store = TrajectoryStore(toy / "buffers" / "digits" / "ConvNetD1W4")
    net = ConvNet(in_channels=1, num_classes=10, image_size=8, width=4, depth=1)
    for label, name in (("short", "synthetic"), ("best", "best")):
        synthetic = SyntheticDataset.load(toy / "run" / f"{name}.safetensors")
        wanted: dict[int, list[float]] = {}
        for expert in (0, 1):
            for start in (0, 2):
                path = written_out_path(
                    net, store.read(expert, start), synthetic, generator_for(0, "distance", expert, start), 5
                )
                for delta in range(1, 5 - start):
                    target, begin = store.read(expert, start + delta).double(), store.read(expert, start).double()
                    nearest = min(float((theta - target).norm()) for theta in path)
                    wanted.setdefault(delta, []).append(nearest / float((begin - target).norm()))
        points = record["curves"][label]
        assert [point["n"] for point in points] == [4, 4, 2, 2]
        assert [point["real_steps"] for point in points] == [
            3 * delta for delta in (1, 2, 3, 4)
        ]  # 1437 images in batches of 512
        for point in points:
            values = torch.tensor(wanted[point["expert_epochs"]])
            assert point["mean"] == pytest.approx(float(values.mean()), rel=1e-4)
            assert point["std"] == pytest.approx(float(values.std()), rel=1e-2, abs=1e-5)
    text = (out / "distance.md").read_text()
    assert "| after expert epochs (real steps) | 1 (3) | 2 (6) | 3 (9) | 4 (12) |" in text
    with Image.open(out / "distance.png") as picture:
        assert picture.width > 400


def test_students_step_as_in_the_distillation(toy: Path) -> None:
    """A rate for each of two steps in turn, momentum and weight decay, against torch's optimiser."""
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
        (["RUN", "--start_epochs", "4"], "--start_epochs 4: expected epochs below 4, where the experts end"),
        (["RUN", "--model", "ConvNetD1W8"], "expected a folder of experts"),
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


def test_experts_of_different_lengths_go_as_far_as_the_shortest(toy: Path, tmp_path: Path) -> None:
    folder, store = tmp_path / "digits" / "ConvNetD1W4", TrajectoryStore(toy / "buffers" / "digits" / "ConvNetD1W4")
    for expert, last in ((0, 4), (1, 3)):
        rows = torch.stack([store.read(expert, epoch) for epoch in range(last + 1)])
        metadata = store.metadata(expert)
        write_expert(folder, expert, rows, dataclasses.replace(metadata, accuracy=metadata.accuracy[: last + 1]))
    flags = ["--steps", "2", "--buffer_path", str(tmp_path), "--out", str(tmp_path / "out")]
    assert run("distance", f"x={toy / 'run'}", *flags) == 0
    points = read(tmp_path / "out" / "distance.json")["curves"]["x"]
    assert [(point["expert_epochs"], point["n"]) for point in points] == [(1, 2), (2, 2), (3, 2)]


def test_labels_and_paths_of_sets(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "N=2").symlink_to(toy / "run")
    found = _distilled_sets(["N=2", "short=N=2", "x=N=2/synthetic.safetensors"])
    assert list(found) == ["N=2", "short", "x"]


# ------------------------------------------------------------------ tables


def summary(mean: float, *, method: str | None = None, random: float | None = None, **options: Any) -> dict[str, Any]:
    accuracy = {"distilled": {"mean": mean, "std": 0.01, "n": 5}}
    if random is not None:
        accuracy["random_real_images"] = {"mean": random, "std": 0.02, "n": 5}
    settings = {"dataset": "CIFAR10", "model": "ConvNet", "ipc": 1, "seed": 0} | options
    return {"accuracy": accuracy, "options": settings} | ({} if method is None else {"method": method})


def by_network(*networks: str) -> dict[str, Any]:
    return {"accuracy_by_network": {"distilled": {name: {"mean": 0.7, "std": 0.0, "n": 5} for name in networks}}}


def test_tables_put_what_was_measured_beside_the_paper(tmp_path: Path) -> None:
    runs = {
        "a/seed0": summary(0.40, random=0.15, out="a/seed0", device="cpu", recipe="mine"),
        "a/seed1": summary(0.44, seed=1, random=0.17, out="a/seed1", memory_budget="2GiB"),
        "b": summary(0.30, Iteration=7),
        "datm": summary(0.50, random=0.35, protocol="datm"),
        "best": summary(0.60, best_epoch=True),
        "vgg": summary(0.70, ipc=50, eval_mode="B") | by_network("ConvNetBN", "VGG11BN"),
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

    seeds, other, tested_on_another = rows("1", "CIFAR10", "MTT")
    assert (tested_on_another["model"], tested_on_another["measured"]["50"]["mean"]) == ("ConvNetBN", 0.70)
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
    assert rows("4", "imagenette", "MTT")[0]["measured"]["1"]["mean"] == 0.5
    assert rows("1", "imagenette at 64 px", "MTT")[0]["measured"]["1"]["mean"] == 0.6
    assert rows("1", "CIFAR10", "MTT, textures")[0]["measured"]["1"]["mean"] == 0.2
    assert rows("1", "digits", "MTT")[0]["paper"] is None
    assert [row["model"] for row in rows("1", "CIFAR10 (folder)", "MTT")] == ["ConvNet"]
    text = (tmp_path / "out" / "tables.md").read_text()
    assert (
        "| CIFAR10 | MTT | ConvNet | 42.0 ± 2.8 (2 runs) | 46.2 ± 0.8 | — | 65.4 ± 0.7 | — | 71.6 ± 0.2 | — | — |"
        in text
    )
    assert "| CIFAR10 | DM | ConvNet | — | 26.0 ± 0.8 | 25.0 ± 1.0 | 48.9 ± 0.6 |" in text
    assert "| CIFAR10 | MTT (b) | ConvNet | 30.0 ± 1.0 | — |" in text
    assert "- Herding (CIFAR10, CIFAR100): Table 1 of AutoPalette" in text
    assert "| CIFAR10 | CAFE | ConvNet | — | 30.3 ± 1.1† | — |" in text


def test_what_the_paper_says_is_whole() -> None:
    titles, rows = published()
    assert list(titles) == ["1", "2", "4"]
    for row in rows:
        assert row.table in titles
        assert row.source
        assert all(0 < value["mean"] < 1 for value in row.accuracy.values())
    assert {row.method for row in rows if row.quoted} == {"CAFE", "KIP"}


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
