"""Test the distance of students from the expert and from real training, against steps that are written out."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from mtt_fast import ConvNet, SyntheticDataset, TrajectoryStore
from mtt_fast.analysis.distance import (
    DistanceOptions,
    batch_size_of,
    default_options,
    nearest_steps,
    read_distilled_sets,
    strategy_of,
    student_path,
)
from mtt_fast.augmentation.texture import Canvas
from mtt_fast.commands import parsing
from mtt_fast.data import load, transform_for
from mtt_fast.runtime.interrupts import Stopped
from mtt_fast.runtime.seeding import generator_for
from mtt_fast.training.experts import ExpertTraining, expert_job, expert_steps
from mtt_fast.training.images import real_images
from tests.analysis.helpers import read, run
from tests.training.jobs import finished


def test_the_nearest_steps_are_those_counted_by_hand() -> None:
    path = torch.tensor([[0.0, 0.0], [3.0, 0.0], [3.0, 4.0]], dtype=torch.float64)
    targets = torch.tensor([[4.0, 0.0], [3.0, 4.0], [0.0, -2.0]], dtype=torch.float64)
    assert nearest_steps(path, targets) == [(1 / 16, 1), (0.0, 2), (1.0, 0)]
    path[1] = torch.nan  # a student that diverges was somewhere before
    assert nearest_steps(path, targets) == [(1.0, 0), (0.0, 2), (1.0, 0)]


@pytest.mark.parametrize("seed", [0, 1])
def test_the_nearest_steps_are_those_of_a_written_out_loop(seed: int) -> None:
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


def test_the_distances_are_those_of_written_out_steps(
    toy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Compare with the paper's definition, in float64: targets after Δt steps on real images, squared errors, the closest step."""
    caplog.set_level("INFO")
    out = tmp_path / "distance"
    flags = [*"--steps 5 --deltas 7,1,4 --starts 2 --seed 3 --expert_lr 0.1 --dsa False".split(), "--out", str(out)]
    assert run("distance", f"short={toy / 'run'}", f"best={toy / 'run' / 'best.safetensors'}", *flags) == 0
    record = read(out / "distance.json")
    net = ConvNet(in_channels=1, num_classes=10, image_size=8, width=4, depth=1)
    for label, name in (("short", "synthetic"), ("best", "best")):
        synthetic = SyntheticDataset.load(toy / "run" / f"{name}.safetensors")
        expected: dict[int, list[tuple[float, int]]] = {1: [], 4: [], 7: []}
        for start in (0, 1):
            real = written_out_training(net, toy / "data", generator_for(3, "expert", start), 7, lr=0.1)
            path = written_out_path(net, real[0], synthetic, generator_for(3, "distance", start), 5)
            for delta, nearest in expected.items():
                target, moved = real[delta], (real[0] - real[delta]).square().sum()
                nearest.append(min((float((theta - target).square().sum() / moved), k) for k, theta in enumerate(path)))
        points = record["curves"][label]
        assert [(point["real_steps"], point["n"]) for point in points] == [(1, 2), (4, 2), (7, 2)]
        for point in points:
            values, steps = torch.tensor(expected[point["real_steps"]]).T
            assert point["student_step"] == float(steps.mean())
            assert point["mean"] == pytest.approx(float(values.mean()), rel=1e-4)
            assert point["std"] == pytest.approx(float(values.std()), rel=1e-2, abs=1e-5)
        least = min(points, key=lambda point: float(point["mean"]))
        line = f"{label}: closest {least['mean']:.3f} ± {least['std']:.3f}, Δt = {least['real_steps']}"
        assert line in caplog.messages
    text = (out / "distance.md").read_text()
    assert "| Δt, steps on real images | 1 | 4 | 7 |" in text
    assert "Least squared distance over 5 steps on the distilled set" in text
    with Image.open(out / "distance.png") as picture:
        assert picture.width > 400


def test_what_was_trained_otherwise_is_told(toy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = SyntheticDataset.load(toy / "run" / "synthetic.safetensors")
    dataclasses.replace(plain, recipe=plain.recipe | {"sort_method": "sha256:f00d"}).save(tmp_path / "pad.safetensors")
    dataclasses.replace(plain, recipe=plain.recipe | {"method": "RaT-BPTT"}).save(tmp_path / "rat.safetensors")
    sets = [f"MTT={toy / 'run'}", *(f"{name.upper()}={tmp_path / name}.safetensors" for name in ("pad", "rat"))]
    assert run("distance", *sets, "--steps", "1", "--deltas", "1", "--out", str(tmp_path / "out")) == 0
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == [
        "PAD: its experts were trained on a curriculum of images (PAD); the real training here takes all images in each epoch",
        "RAT: its distillation trained networks by Adam; the student here takes steps of SGD",
    ]


def test_the_default_options_are_those_of_the_paper() -> None:
    options = DistanceOptions()
    assert (options.steps, options.starts) == (1000, 1)
    deltas = parsing.integers(options.deltas, "--deltas")
    assert deltas == sorted(deltas)
    assert deltas[0] <= 10  # short
    assert deltas[-1] >= 3 * 196  # long: beyond the three epochs of CIFAR-100 that its sets were matched over


def test_real_training_is_that_of_the_experts(toy: Path) -> None:
    """Compare whole epochs bit for bit: with augmentation, and beyond the epoch where --decay begins a new optimizer."""
    store = TrajectoryStore(toy / "buffers" / "digits" / "ConvNetD1W4")
    net = ConvNet(in_channels=1, num_classes=10, image_size=8, width=4, depth=1)
    real = real_images(load("digits", data_path=toy / "data"), torch.device("cpu"), zca=False)
    recorded = ExpertTraining(**store.metadata(1).hyperparameters)
    decaying = dataclasses.replace(recorded, decay=True, mom=0.9, l2=0.01, rho_max=0.05, rho_min=0.01)
    rows = {}
    for training in (recorded, decaying):
        rows[training], _ = finished(expert_job(real, net, training, seed=0, index=1))
        steps = list(itertools.islice(expert_steps(real, net, training, seed=0, index=1), 13))
        assert all(steps[3 * epoch].equal(row) for epoch, row in enumerate(rows[training]))  # 1437 images, 512 a batch
    for epoch, row in enumerate(rows[recorded]):
        torch.testing.assert_close(row, store.read(1, epoch))  # trained with another number of threads
    undiminished, _ = finished(
        expert_job(real, net, dataclasses.replace(decaying, decay=False, rho_min=0.05), seed=0, index=1)
    )
    assert undiminished[3].equal(rows[decaying][3])
    assert undiminished[4].equal(rows[decaying][4])  # of four epochs none is behind the drop
    drops = dataclasses.replace(decaying, train_epochs=2)
    late = list(itertools.islice(expert_steps(real, net, drops, seed=0, index=1), 13))
    assert late[9].equal(rows[decaying][3])
    assert not late[12].equal(rows[decaying][4])


def test_a_stopped_measurement_goes_on(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_distance_is_taken_from_the_record_for_the_same_question_alone(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Change one thing at a time of all on which a distance depends: options of the command, and what the set says."""
    own = SyntheticDataset.load(toy / "run" / "synthetic.safetensors")
    logits = dataclasses.replace(own, labels=torch.full((10, 10), 0.1), label_kind="logits")
    canvases = dataclasses.replace(own, images=own.images.repeat(1, 1, 2, 2), canvas=Canvas(2, 1))
    sets = {"own": own, "logits": logits, "canvases": canvases}
    other_sets = [dataclasses.replace(own, recipe=own.recipe | change) for change in (
        {"batch_syn": 5}, {"method": "DSA", "batch_train": 5}, {"student_mom": 0.5}, {"student_l2": 0.01}, {"no_aug": False},
    )]  # fmt: skip
    other_sets += [
        dataclasses.replace(own, images=own.images + 1),
        dataclasses.replace(own, labels=own.labels.flip(0)),
        dataclasses.replace(own, lr_per_step=torch.tensor([0.1, 0.2])),
        dataclasses.replace(logits, label_kind="probabilities"),
        dataclasses.replace(canvases, canvas=Canvas(2, 2)),
    ]
    flags = ["--deltas", "2", "--steps", "3", "--out", str(tmp_path / "out")]
    for name, synthetic in sets.items():
        synthetic.save(tmp_path / name / "synthetic.safetensors")
        assert run("distance", str(tmp_path / name), *flags) == 0

    def asked(*arguments: Any) -> torch.Tensor:
        raise Stopped("a student was asked for", 2)

    monkeypatch.setattr("mtt_fast.analysis.distance.student_path", asked)
    for name in sets:
        assert run("distance", str(tmp_path / name), *flags) == 0
    for number, synthetic in enumerate(other_sets):
        synthetic.save(tmp_path / f"other{number}" / "synthetic.safetensors")
        assert run("distance", str(tmp_path / f"other{number}"), *flags) == 130, number
    for change in (
        "--deltas 3", "--steps 4", "--seed 1", "--model ConvNetD1W8", "--expert_lr 0.02", "--batch_real 128",
    ):  # fmt: skip
        assert run("distance", str(tmp_path / "own"), *flags, *change.split()) == 130, change


def test_augmentation_is_that_of_the_distillation() -> None:
    options = DistanceOptions(dsa_strategy="flip")
    for recipe, strategy in (
        ({}, "flip"),  # from elsewhere
        ({"dsa_strategy": "crop", "dsa": True}, "crop"),
        ({"dsa_strategy": "crop", "dsa": False}, "none"),
        ({"dsa_strategy": "crop", "no_aug": True}, "none"),
        ({"dsa_strategy": "crop", "method": "DC"}, "none"),
        ({"dsa_strategy": "crop", "method": "DD"}, "none"),
        ({"dsa_strategy": "crop", "method": "LD"}, "none"),
        ({"dsa_strategy": "crop", "method": "DSA"}, "crop"),
        ({"dsa_strategy": "crop", "method": "RaT-BPTT", "syn_strategy": "flip_rotate"}, "flip_rotate"),
        ({"dsa_strategy": "crop", "method": "AT-BPTT", "syn_strategy": "none", "dsa": False}, "none"),
    ):
        assert strategy_of(recipe, options) == strategy


def test_the_batch_size_is_that_of_the_distillation() -> None:
    for recipe, size in (
        ({}, None),
        ({"batch_syn": 6, "batch_train": 5}, 6),
        ({"method": "DM", "batch_train": 5}, None),  # whose distillation trains no network
        ({"method": "DC", "batch_train": None}, 256),
        ({"method": "DSA", "batch_train": 5}, 5),
    ):
        assert batch_size_of(recipe) == size


def test_options_of_real_training_are_those_of_the_set_that_matched_trajectories() -> None:
    dsa = {
        "dataset": "CIFAR100",
        "seed": 3,
        "device": "cuda:1",
        "method": "DSA",
        "batch_real": 128,
        "lr_img": 0.1,
        "dsa": False,
    }
    mtt = {
        "dataset": "CIFAR10",
        "expert_epochs": 3,
        "dsa": True,
        "expert_lr": 0.02,
        "batch_real": 256,
        "mom": 0.9,
        "ipc": 1,
    }
    assert default_options([dsa, mtt]) == {
        "dataset": "CIFAR100", "seed": 3, "expert_lr": 0.02, "batch_real": 256, "mom": 0.9, "dsa": True,
    }  # fmt: skip
    assert default_options([dsa]) == {"dataset": "CIFAR100", "seed": 3, "dsa": False}


def test_students_step_as_in_the_distillation(toy: Path) -> None:
    """Use a rate for each of two steps in turn, momentum and weight decay, against torch's optimizer."""
    synthetic = SyntheticDataset.load(toy / "run" / "synthetic.safetensors")
    recipe = synthetic.recipe | {"student_mom": 0.5, "student_l2": 0.01}
    synthetic = dataclasses.replace(synthetic, lr_per_step=torch.tensor([0.1, 0.3]), recipe=recipe)
    net = ConvNet(in_channels=1, num_classes=10, image_size=8, width=4, depth=1)
    start = net.init(generator_for(0, "start"))
    options = DistanceOptions(steps=5)
    path = student_path(net, start, synthetic, options, generator_for(0, "student"))

    theta, batches, generator = start.clone().requires_grad_(), list[torch.Tensor](), generator_for(0, "student")
    optimizer = torch.optim.SGD([theta], momentum=0.5, weight_decay=0.01)
    assert len(path) == 6
    for step in range(5):
        if not batches:
            batches = list(torch.randperm(10, generator=generator).split(6))
        index = batches.pop()
        optimizer.param_groups[0]["lr"] = (0.1, 0.3)[step % 2]
        optimizer.zero_grad()
        F.cross_entropy(net(theta, synthetic.images[index]), synthetic.labels[index]).backward()
        optimizer.step()
        torch.testing.assert_close(path[step + 1], theta.detach(), rtol=1e-4, atol=1e-5)


def test_dampened_students_step_as_in_the_distillation(toy: Path) -> None:
    """Write the velocity out; torch's optimizer does not dampen the first gradient."""
    synthetic = SyntheticDataset.load(toy / "run" / "synthetic.safetensors")
    recipe = synthetic.recipe | {"student_mom": 0.9, "student_dampening": 0.75, "student_l2": 0.01, "batch_syn": None}
    synthetic = dataclasses.replace(synthetic, lr=torch.tensor(0.4), recipe=recipe)
    net = ConvNet(in_channels=1, num_classes=10, image_size=8, width=4, depth=1)
    theta = net.init(generator_for(0, "start"))
    path = student_path(net, theta, synthetic, DistanceOptions(steps=4), generator_for(0, "student"))
    velocity = torch.zeros_like(theta)
    for row in path[1:]:
        leaf = theta.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(net(leaf, synthetic.images), synthetic.labels), leaf)
        velocity = 0.9 * velocity + 0.25 * (gradient + 0.01 * theta)
        theta = theta - 0.4 * velocity
        torch.testing.assert_close(row, theta, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "expected run folders, plain or as LABEL=FOLDER"),
        (["RUN", "RUN"], "there is another run with the label run; give labels as LABEL=FOLDER"),
        (["nowhere"], "nowhere: cannot be read"),
        (["=RUN"], "expected a label before =, found none; give LABEL=FOLDER"),
        (["RUN", "--deltas", "1,x"], "--deltas 1,x: expected numbers as in 1,10,100"),
        (["RUN", "--deltas", "1,0"], "--deltas 1,0: expected numbers of at least 1"),
        (["RUN", "--starts", "0"], "--starts 0: expected at least 1"),
        (["RUN", "--expert_lr", "0"], "--expert_lr 0.0: expected more than 0"),
        (
            ["RUN", "--zca"],
            "run: whitened in another way: expected ZCA-whitened images, found normalised images; leave out --zca",
        ),
        (["RUN", "--steps", "0"], "--steps 0: expected at least 1"),
    ],
)
def test_wrong_options_are_refused(
    flags: list[str], message: str, toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word.replace("RUN", str(toy / "run")) for word in flags]
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
def test_real_training_that_leads_nowhere_is_refused(
    lr: str, message: str, toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--deltas", "9", "--steps", "1", "--expert_lr", lr, "--out", str(tmp_path / "out")]
    assert run("distance", str(toy / "run"), *flags) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "distance.json").exists()


@pytest.mark.parametrize("text", ["{", "[]", '{"curves": {}}'])
def test_a_broken_record_of_distances_is_refused(
    text: str, toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "distance.json").write_text(text)
    assert run("distance", str(toy / "run"), "--deltas", "1", "--out", str(tmp_path)) == 2
    error = capsys.readouterr().err
    assert "distance.json: expected a record of this command, found" in error
    assert "delete it or choose another --out" in error
    assert (tmp_path / "distance.json").read_text() == text


def test_a_set_is_labelled_by_its_argument_or_its_folder(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "N=2").symlink_to(toy / "run")
    sets = read_distilled_sets(["N=2", "short=N=2", "x=N=2/synthetic.safetensors"])
    assert list(sets) == ["N=2", "short", "x"]
    monkeypatch.chdir(tmp_path / "N=2")  # a link to the folder run
    for place in (".", "synthetic.safetensors"):
        assert list(read_distilled_sets([place])) == ["run"]
    sets["short"].save(tmp_path / "synthetic.safetensors")
    monkeypatch.chdir(tmp_path)
    Path("inner").mkdir()
    for place in ("inner/..", "inner/../synthetic.safetensors"):
        assert list(read_distilled_sets([place])) == [tmp_path.name]


def test_a_set_whose_name_begins_with_an_underscore_is_in_the_legend(toy: Path, tmp_path: Path) -> None:
    """Check that matplotlib has a label to show: it warns where it leaves all out."""
    flags = ["--deltas", "1", "--steps", "1", "--out", str(tmp_path)]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="No artists with labels")
        assert run("distance", f"_old={toy / 'run'}", *flags) == 0
