"""Check that every command compares a file with the images it was made from, and refuses others in one line that names the file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from PIL import Image

from mtt_fast import SyntheticDataset, TrajectoryStore, Whitening
from mtt_fast.analysis.__main__ import main as analysis
from mtt_fast.baselines.command import main as baselines
from mtt_fast.commands import cli
from mtt_fast.compress import main as compress
from mtt_fast.convert.command import main as convert
from mtt_fast.cross.command import main as cross
from mtt_fast.data import load
from mtt_fast.distill.command import main as distill
from mtt_fast.evaluate import main as evaluate
from mtt_fast.experts import main as experts
from mtt_fast.interop import export_experts
from mtt_fast.storage.files import read_toml
from mtt_fast.storage.trajectories import write_expert

pytestmark = pytest.mark.usefixtures("no_curves")

Main = Callable[[Sequence[str]], None]
MODEL = "--model ConvNetD1W4".split()
EVALUATED = "--num_eval 1 --epoch_eval_train 1".split()
TRAINED = "--train_epochs 3 --batch_real 128".split()
DISTILLED = (
    "--max_start_epoch 2 --expert_epochs 1 --syn_steps 2 --Iteration 2 --eval_it 2 --lr_img 10 --num_experts 2"
).split()


def save_folder(root: Path, seed: int, names: Sequence[str] = tuple("0123456789")) -> Path:
    """Write an image folder of 8×8 grey images of ten classes, as the digits have."""
    generator = torch.Generator().manual_seed(seed)
    for split, count in (("train", 4), ("test", 1)):
        for name in names:
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                pixels = torch.randint(0, 256, (8, 8), generator=generator, dtype=torch.uint8).numpy()
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, no_curves: None) -> Path:
    """Make a folder with runs on the digits (run, zrun) and on the image folder pets (prun), with their experts in buffers."""
    root = tmp_path_factory.mktemp("made")
    save_folder(root / "pets", seed=0)
    save_folder(root / "toys", seed=1)
    save_folder(root / "words", seed=2, names=[f"c{digit}" for digit in range(10)])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for out, flags in {"run": ["digits"], "zrun": ["digits", "--zca"], "prun": ["./pets"]}.items():
            words = ["--dataset", *flags, *MODEL, *TRAINED, *DISTILLED, *EVALUATED, "--out", out]
            assert cli.run(distill, words) == 0
    return root


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a copy of that folder the working directory."""
    shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def refused(capsys: pytest.CaptureFixture[str], main: Main, *words: str) -> str:
    """Return the one line that the command ends with, having said that it cannot be."""
    capsys.readouterr()
    assert cli.run(main, words) == 2
    *_, error = capsys.readouterr().err.strip().splitlines()
    assert error.startswith("error: ")
    return error


def distil(*flags: str, data: Sequence[str] = ("--dataset", "digits"), out: str = "new") -> list[str]:
    return [*data, *MODEL, *DISTILLED, *EVALUATED, "--out", out, *flags]


EXPERTS = Path("buffers/digits/ConvNetD1W4")


# Distilled sets


SETS = [
    (["run", "--zca"], "run/synthetic.safetensors: whitened otherwise: expected ZCA-whitened images, found normalised images; leave out --zca", False),
    (["zrun", "--no_zca"], "zrun/synthetic.safetensors: whitened otherwise: expected normalised images, found ZCA-whitened images; give --zca", False),
    (["run", "--dataset", "./pets"], "run/synthetic.safetensors: made from another data set: expected folder-pets, found digits; give the --dataset, --subset, --res and --data_path that it was made from, or say --other_data", True),
    (["run", "--dataset", "./words"], "run/synthetic.safetensors: made from another data set: expected folder-words, found digits; give the", False),
    (["run", "--dataset", "./words", "--other_data"], "made from another data set: expected folder-words, found digits", False),
    (["run", "--dataset", "./pets", "--res", "16", "--other_data"], "made from another data set: expected folder-pets-16, found digits", False),
    (["run", "--dataset", "./pets", "--zca", "--other_data"], "run/synthetic.safetensors: whitened otherwise", False),
    (["prun", "--res", "16"], "prun/synthetic.safetensors: made from another data set: expected folder-pets-16, found folder-pets", False),
    (["prun", "--dataset", "./toys"], "prun/synthetic.safetensors: made from another data set: expected folder-toys, found folder-pets", True),
    (["order.safetensors"], "order.safetensors: the classes in another order: expected '0' as class 0, found '9'", False),
    (["eps.safetensors"], "eps.safetensors: whitened otherwise: expected the ZCA whitening that is fitted to these images with eps 0.1", True),
    (["random", "--dataset", "digits", "--other_data"], "--other_data: expected a distilled set, found", False),
]  # fmt: skip


def save_odd_sets() -> None:
    data = load("digits", progress=False)
    run, zrun = (SyntheticDataset.load(f"{name}/synthetic.safetensors") for name in ("run", "zrun"))
    replace(run, class_names=run.class_names[::-1], fingerprint="").save("order.safetensors")
    eps = Whitening.fit(data.train.images.float() / 255, eps=0.01)
    replace(zrun, whitening=eps).save("eps.safetensors")


@pytest.mark.parametrize(("words", "message", "on_purpose"), SETS)
def test_a_set_is_tested_on_its_own_images(
    here: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str, on_purpose: bool
) -> None:
    save_odd_sets()
    for main in (evaluate, cross):
        error = refused(capsys, main, *words, *MODEL, *EVALUATED, *(["--eval_mode", "S"] if main is cross else []))
        assert message in error
        assert ("say --other_data" in error) == on_purpose  # what can be used all the same, by who says so


def test_changed_images_are_others(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_folder(here / "pets", seed=9)
    assert "prun/synthetic.safetensors: made from other images: expected folder-pets with fingerprint" in refused(
        capsys, evaluate, "prun"
    )
    error = refused(capsys, distill, "--out", "prun", "--resume", "--Iteration", "4")
    assert "expert_0000.safetensors: made from other images" in error
    for command in (["dm", "--Iteration", "1"], ["random"]):
        flags = [*command, "--dataset", "./pets", *MODEL, *EVALUATED, "--out", command[0]]
        assert cli.run(baselines, flags) == 0
    save_folder(here / "pets", seed=8)
    flags = ["dm", "--dataset", "./pets", *MODEL, *EVALUATED, "--out", "dm", "--Iteration", "2"]
    assert "dm/checkpoint.safetensors: made from other images: expected" in refused(capsys, baselines, *flags)


def test_a_checkpoint_goes_on_with_its_own_images(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Train the experts anew, so that the checkpoint alone names the images with which it began."""
    save_folder(here / "pets", seed=9)
    flags = distil(*TRAINED, "--Iteration", "4", "--buffer_path", "others", data=("--dataset", "./pets"), out="prun")
    assert "prun/checkpoint.safetensors: made from other images: expected folder-pets with" in refused(
        capsys, distill, *flags
    )


def test_legal_uses_of_sets(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    for words in (["run"], ["zrun"], ["run", "--model", "MLP"], ["run", "--protocol", "datm"], ["prun"]):
        assert cli.run(evaluate, [*words, *EVALUATED]) == 0
    (here / "pets").rename(here / "renamed")  # the same images, whatever they are called
    assert cli.run(evaluate, ["prun", "--dataset", "./renamed", *EVALUATED]) == 0
    set_ = SyntheticDataset.load("zrun/synthetic.safetensors")
    assert set_.whitening is not None
    noise = 1e-5 * torch.randn_like(set_.whitening.matrix)
    replace(set_, whitening=replace(set_.whitening, matrix=set_.whitening.matrix + noise)).save(
        "zrun/other.safetensors"
    )
    assert cli.run(evaluate, ["zrun/other.safetensors", *EVALUATED]) == 0  # whitened on another machine
    replace(set_, dataset="", fingerprint="").save("old.safetensors")
    assert cli.run(evaluate, ["old.safetensors", *EVALUATED]) == 0  # it does not know more


def test_other_images_on_purpose(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Check that other images are transformed as the set's own were, which is logged and recorded."""
    caplog.set_level("INFO")
    other = ["--dataset", "./pets", "--other_data", *EVALUATED]
    assert cli.run(evaluate, ["run", *other, "--out", "result.json"]) == 0
    assert (
        "run/synthetic.safetensors: made from another data set: digits, used with folder-pets, as other data are allowed"
        in caplog.text
    )
    result = json.loads(Path("result.json").read_text())
    assert result["other_data"] is True
    assert (result["data"]["name"], result["made_from"]["name"]) == ("folder-pets", "digits")
    assert (
        cli.run(cross, ["run", "zrun", "--zca", *other, *MODEL, "--out", "table"]) == 2
    )  # one of them was not whitened
    assert cli.run(cross, ["run", *other, "--models", "ConvNetD1W4", "--out", "table"]) == 0
    (cell,) = json.loads(Path("table/cross.json").read_text())["cells"]
    assert cell["question"]["seen_as"]["name"] == "digits"
    assert cell["question"]["dataset"] == "folder-pets"
    assert cell["accuracy"]["mean"] == result["accuracy"]["mean"]


# Experts


def test_experts_are_used_as_they_were_asked_for(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expert = EXPERTS / "expert_0000.safetensors"
    for dry in ([], ["--dry_run"]):
        error = refused(capsys, distill, *distil("--mom", "0.9", "--l2", "0.1", "--expert_lr", "0.5", *dry))
        assert f"{expert}: trained with lr 0.01, not 0.5; choose another --buffer_path, or say" in error
        assert "--expert_lr 0.01 --mom 0.0 --l2 0.0 to use the experts that are there" in error
    assert not Path("new").exists()
    error = refused(capsys, distill, *distil("--batch_real", "64"))
    assert f"{expert}: trained with batch_size 128, not 64" in error
    Path("asked.toml").write_text("mom = 0.5\n")
    assert f"{expert}: trained with mom 0.0, not 0.5" in refused(capsys, distill, *distil("--config", "asked.toml"))
    error = refused(capsys, baselines, "herding", "--dataset", "digits", *MODEL, *EVALUATED, "--expert_lr", "0.5")
    assert f"{expert}: trained with lr 0.01, not 0.5" in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train_epochs", "3"], "trained with batch_size 128, not 256"),
        ([*TRAINED, "--seed", "1"], "trained with seed 0, not 1"),
        (["--batch_real", "128", "--train_epochs", "4"], "trained with train_epochs 3, not 4"),
    ],
)
def test_those_that_are_missing_are_trained_like_the_others(
    here: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    for dry in (["--dry_run"], []):
        error = refused(capsys, distill, *distil(*flags, "--num_experts", "3", *dry))
        assert f"{EXPERTS}/expert_0000.safetensors: {message}" in error
    assert cli.run(distill, distil(*TRAINED, "--num_experts", "3")) == 0
    assert len(TrajectoryStore(EXPERTS)) == 3


def test_what_is_recorded_is_what_the_experts_are(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--dataset", "digits", *MODEL, "--num_experts", "2", "--buffer_path", "long"]
    trained = "--train_epochs 5 --lr_teacher 0.02 --mom 0.5 --batch_train 256".split()
    assert cli.run(experts, [*flags, *trained]) == 0
    used = distil("--buffer_path", "long", "--train_epochs", "3")  # longer ones go the same way
    assert cli.run(distill, used) == 0
    config = read_toml(Path("new/config.toml"))
    told = ("expert_lr", "mom", "train_epochs", "batch_real", "l2")
    assert [config[name] for name in told] == [0.02, 0.5, 5, 256, 0.0]
    summary = json.loads(Path("new/summary.json").read_text())
    assert (summary["options"]["mom"], summary["experts"]["hyperparameters"]["mom"]) == (0.5, 0.5)
    assert (summary["data"]["name"], summary["experts"]["number"]) == ("digits", 2)
    assert SyntheticDataset.load("new/synthetic.safetensors").recipe["expert_lr"] == 0.02
    assert cli.run(distill, [*used, "--Iteration", "3"]) == 0  # the same command goes on
    assert cli.run(distill, ["--out", "new", "--resume", "--Iteration", "4"]) == 0
    assert "holds a run with --mom 0.5, not 0.0" in refused(capsys, distill, *used, "--mom", "0", "--Iteration", "5")
    assert cli.run(baselines, ["herding", *flags[:4], *EVALUATED, "--buffer_path", "long", "--out", "herded"]) == 0
    assert read_toml(Path("herded/config.toml"))["mom"] == 0.5
    error = refused(
        capsys,
        baselines,
        "herding",
        *flags[:4],
        *EVALUATED,
        "--buffer_path",
        "long",
        "--train_epochs",
        "3",
        "--out",
        "x",
    )
    assert "trained with train_epochs 5, not 3" in error  # it looks at the last epoch
    error = refused(capsys, distill, *used, "--pix_init", "samples_predicted_correctly", "--out", "other")
    assert "trained with train_epochs 5, not 3" in error


def rewrite(folder: Path, expert: int, **changes: Any) -> Path:
    """Write an expert of `folder` again with other metadata; return its file."""
    store = TrajectoryStore(folder)
    rows = torch.stack([store.read(expert, epoch) for epoch in range(store.epochs(expert) + 1)])
    return write_expert(folder, store.indices[expert], rows, replace(store.metadata(expert), **changes))


ODD_EXPERTS: list[tuple[dict[str, Any], str]] = [
    ({"whitening": "zca"}, "whitened otherwise"),
    ({"dataset": "MNIST", "fingerprint": "beef"}, "made from another data set: expected digits, found MNIST"),
    ({"network": {"kind": "ConvNetD1W4BN"}}, "another network: expected ConvNetD1W4ARINAP, found ConvNetD1W4ARBNAP"),
    ({"network": {"kind": "ConvNetD1W4AL"}}, "another network: expected ConvNetD1W4ARINAP, found ConvNetD1W4ALINAP"),
    ({"hyperparameters": {"lr": 0.5, "train_epochs": 3}}, "trained with lr 0.5, but expert_0000.safetensors with 0.01"),
]


@pytest.mark.parametrize(("changes", "message"), ODD_EXPERTS)
def test_every_expert_is_looked_at(
    here: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    odd = rewrite(EXPERTS, 1, **changes)
    trains = ["--dataset", "digits", *MODEL, "--train_epochs", "3", "--batch_train", "128"]
    asked = {
        "the run": (distill, distil()),
        "a dry run": (distill, distil("--dry_run")),
        "waypoints": (distill, distil("--num_interpolation", "3")),
        "compress": (compress, [str(EXPERTS), "--num_interpolation", "3"]),
        "export": (convert, [str(EXPERTS), "out"]),
        "more experts": (experts, [*trains, "--num_experts", "3"]),
    }
    before = sorted(EXPERTS.iterdir())
    for name, (main, words) in asked.items():
        error = refused(capsys, main, *words)
        assert f"error: {odd}: " in error, name
        assert message.partition(":")[0].partition(",")[0].partition(" 0.5")[0] in error, name
    assert message in refused(capsys, distill, *distil())
    assert sorted(EXPERTS.iterdir()) == before
    assert cli.run(distill, distil("--max_experts", "1")) == 0  # it does not take turns


def test_experts_of_other_images_on_purpose(
    here: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree("buffers/folder-pets", "buffers/folder-toys")
    toys = distil(data=("--dataset", "./toys"))
    error = refused(capsys, distill, *toys)
    assert "expert_0000.safetensors: made from another data set: expected folder-toys, found folder-pets" in error
    assert error.endswith("or say --other_data to use it with these")
    caplog.set_level("INFO")
    assert cli.run(distill, [*toys, "--other_data"]) == 0
    assert (
        "ConvNetD1W4: made from another data set: folder-pets, used with folder-toys, as other data are allowed"
        in caplog.text
    )
    assert read_toml(Path("new/config.toml"))["other_data"] is True
    summary = json.loads(Path("new/summary.json").read_text())
    assert (summary["data"]["name"], summary["experts"]["data"]["name"]) == ("folder-toys", "folder-pets")
    assert cli.run(distill, ["--out", "new", "--resume", "--Iteration", "3"]) == 0
    Path("buffers/folder-words").mkdir()
    shutil.copytree("buffers/folder-pets/ConvNetD1W4", "buffers/folder-words/ConvNetD1W4")
    error = refused(capsys, distill, *distil("--other_data", data=("--dataset", "./words"), out="words-run"))
    assert "expert_0000.safetensors: made from another data set: expected folder-words, found folder-pets" in error


def test_a_run_goes_on_with_its_own_experts(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--out", "run", "--resume", "--Iteration", "4"]
    flags = ["--dataset", "digits", *MODEL, "--train_epochs", "3", "--batch_train", "128", "--num_experts", "2"]
    assert cli.run(experts, [*flags, "--seed", "1", "--buffer_path", "others"]) == 0
    for dry in ([], ["--dry_run"]):
        error = refused(capsys, distill, *more, "--buffer_path", "others", *dry)
        assert (
            "error: others/digits/ConvNetD1W4/expert_0000.safetensors: another expert than the one with which" in error
        )
    other = Path("others/digits/ConvNetD1W4/expert_0001.safetensors")
    shutil.copy(other, EXPERTS)
    assert f"error: {EXPERTS}/expert_0001.safetensors: another expert" in refused(capsys, distill, *more)
    assert cli.run(experts, [*flags, "--buffer_path", "same"]) == 0
    assert cli.run(distill, [*more, "--buffer_path", "same"]) == 0  # the same experts, elsewhere


def test_waypoints_are_of_the_experts_that_are_there(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(distill, distil("--num_interpolation", "3")) == 0
    assert cli.run(compress, [str(EXPERTS), "--num_interpolation", "3"]) == 0  # they are there already
    few = TrajectoryStore(EXPERTS / "waypoints_3")
    assert few.metadata(0).made_of == TrajectoryStore(EXPERTS).digest(0)
    store = TrajectoryStore(EXPERTS)
    rows = torch.stack([store.read(1, epoch) for epoch in range(4)])
    write_expert(EXPERTS, 1, rows + 0.01, store.metadata(1))
    for main, words in (
        (distill, distil("--num_interpolation", "3", out="other")),
        (compress, [str(EXPERTS), "--num_interpolation", "3"]),
    ):
        error = refused(capsys, main, *words)
        assert (
            f"{EXPERTS}/waypoints_3/expert_0001.safetensors: made from another expert than {EXPERTS}/expert_0001"
            in error
        )


def test_the_students_augmentation_is_not_the_experts(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Use experts with another augmentation: one option names both where experts are trained, and the log names the difference."""
    caplog.set_level("INFO")
    assert cli.run(distill, distil("--dsa", "False")) == 0
    told = (
        "trained with augmentation color_crop_cutout_flip_scale_rotate; none is that of the student and of evaluations"
    )
    assert told in caplog.text


# Two jobs in one folder


def test_one_process_writes_experts(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {path: path.read_bytes() for path in EXPERTS.iterdir()}
    trains = ["--dataset", "digits", *MODEL, "--train_epochs", "3", "--batch_train", "128"]
    (EXPERTS / "waypoints_3").mkdir()
    list(export_experts(TrajectoryStore(EXPERTS), "theirs"))
    with FileLock(EXPERTS / ".lock"), FileLock(EXPERTS / "waypoints_3" / ".lock"):
        for main, words in (
            (experts, [*trains, "--num_experts", "3"]),
            (experts, [*trains, "--num_experts", "3", "--buffer_path", "./buffers"]),
            (distill, distil(*TRAINED, "--num_experts", "3")),
            (compress, [str(EXPERTS), "--num_interpolation", "3"]),
            (convert, ["theirs", "buffers", "--dataset", "digits", *MODEL]),
        ):
            error = refused(capsys, main, *words)
            assert "another process is training or writing experts here; wait for it or choose another" in error
        assert cli.run(distill, distil()) == 0  # a reader does not wait
        assert cli.run(experts, [*trains, "--num_experts", "2"]) == 0
    assert {path: path.read_bytes() for path in files} == files
    (EXPERTS / ".lock").touch()  # as a killed process leaves it
    assert cli.run(experts, [*trains, "--num_experts", "3"]) == 0
    assert not (EXPERTS / ".lock").exists()
    error = refused(capsys, experts, *trains, "--num_experts", "4", "--seed", "1")
    assert f"{EXPERTS}/expert_0000.safetensors: trained with seed 0, not 1" in error


# The documented import


@pytest.fixture
def imported(here: Path) -> Path:
    """Make the folder of converted experts of the public code, for which no --num_experts is known."""
    list(export_experts(TrajectoryStore(EXPERTS), "theirs"))
    assert cli.run(convert, ["theirs", "my_buffers", "--dataset", "digits", *MODEL]) == 0
    return Path("my_buffers/digits/ConvNetD1W4")


USED = ["--dataset", "digits", *MODEL, *(word for word in DISTILLED if word not in ("--num_experts",)), *EVALUATED]


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--num_experts", "50"],
        ["--max_experts", "1"],
        ["--max_experts", "50"],
        ["--num_interpolation", "3"],
        ["--num_interpolation", "3", "--num_experts", "50"],
        ["--mom", "0.9", "--expert_lr", "0.5"],  # nothing is known of them
    ],
)
def test_imported_experts_are_used_as_they_are(
    imported: Path, flags: list[str], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    words = ["--dataset", "digits", *MODEL, *DISTILLED[:-2], *EVALUATED, "--buffer_path", "my_buffers", "--out", "new"]
    before = sorted(imported.glob("*.safetensors"))
    assert cli.run(distill, [*words, *flags, "--dry_run"]) == 0
    told = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("experts"))
    assert told.partition("experts from elsewhere, used as they are, 2 in my_buffers/digits/ConvNetD1W4")[1]
    assert "to train" not in told
    assert cli.run(distill, [*words, *flags]) == 0
    assert sorted(imported.glob("*.safetensors")) == before
    number = flags[flags.index("--num_experts") + 1] if "--num_experts" in flags else "100"
    used = f"used as they are: all 2 that are there; --num_experts {number} trains none beside them"
    assert used in caplog.text
    assert ("not known: --expert_lr, --mom has no effect" in caplog.text) == ("--mom" in flags)
    summary = json.loads(Path("new/summary.json").read_text())
    assert summary["experts"]["number"] == (1 if flags == ["--max_experts", "1"] else 2)
    assert "imported_from" in summary["experts"]["hyperparameters"]
    assert cli.run(distill, [*words, *flags, "--Iteration", "3"]) == 0  # and goes on


def test_experts_are_not_trained_beside_imported_ones(imported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--dataset", "digits", *MODEL, "--num_experts", "3", "--buffer_path", "my_buffers"]
    assert f"{imported}/expert_0000.safetensors: comes from elsewhere" in refused(capsys, experts, *flags)
    assert len(TrajectoryStore(imported)) == 2


# Conversions and analyses


def test_conversions_compare_too(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (
            ["run", "out", "--zca"],
            "run: whitened otherwise: expected ZCA-whitened images, found normalised images; leave out",
        ),
        (["run", "out", "--dataset", "MNIST"], "run: made from another data set: expected MNIST, found digits"),
        (["zrun", "out", "--dataset", "CIFAR10"], "zrun: made from another data set: expected CIFAR10, found digits"),
    ):
        assert message in refused(capsys, convert, *words)
        assert not Path("out").exists()
    assert cli.run(convert, ["zrun", "pictures", "--to", "png"]) == 0
    assert cli.run(convert, ["run", "plain", "--to", "png"]) == 0
    for words, message in (
        (
            ["pictures", "out", "--dataset", "./pets", "--zca"],
            "labels.json: made from another data set: expected folder-pets, found digits",
        ),
        (["plain", "out", "--dataset", "digits", "--zca"], "labels.json: whitened otherwise"),
    ):
        assert message in refused(capsys, convert, *words)
    assert cli.run(convert, ["pictures", "back", "--dataset", "digits", "--zca"]) == 0
    back, set_ = (SyntheticDataset.load(f"{name}/synthetic.safetensors") for name in ("back", "zrun"))
    assert back.identity == set_.identity
    for name in ("run", "zrun"):
        flags = ["--zca"] if name == "zrun" else []
        assert cli.run(convert, [name, f"{name}-mtt"]) == 0
        assert cli.run(convert, [f"{name}-mtt", f"{name}-back", "--dataset", "digits", *flags]) == 0
        assert SyntheticDataset.load(f"{name}-back/synthetic.safetensors").fingerprint == set_.fingerprint
        assert cli.run(evaluate, [f"{name}-back", *EVALUATED]) == 0
    torch.save(torch.randn(10, 1, 16, 16), "run-mtt/images_best.pt")
    error = refused(capsys, convert, "run-mtt", "out", "--dataset", "digits")
    assert "expected images (1, 8, 8) of digits, found (1, 16, 16)" in error


def test_analyses_compare_too(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(capsys, analysis, "distance", "run", "prun", "--steps", "2")
    assert "prun: made from another data set: expected digits, found folder-pets" in error
    assert "zrun: whitened otherwise" in refused(capsys, analysis, "distance", "run", "zrun", "--steps", "2")


def test_one_name_and_two_data_sets_are_two_rows_of_a_table(here: Path) -> None:
    (here / "elsewhere").mkdir()
    save_folder(here / "elsewhere" / "pets", seed=5)
    for place, seed in (("./pets", "1"), ("./elsewhere/pets", "2")):
        words = ["random", "--dataset", place, *MODEL, *EVALUATED, "--seed", seed, "--out", f"runs/{seed}"]
        assert cli.run(baselines, words) == 0
    assert cli.run(analysis, ["tables", "runs", "--out", "tables"]) == 0
    rows = json.loads(Path("tables/tables.json").read_text())["1"]["rows"]
    of_random = [row for row in rows if row["dataset"] == "pets (folder)"]
    assert len(of_random) == 2
