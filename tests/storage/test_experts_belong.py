"""Check that experts are used with the images and the options they were trained with, and others refused by name."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from mtt_fast import SyntheticDataset, TrajectoryStore
from mtt_fast.baselines.command import main as baselines
from mtt_fast.commands import cli
from mtt_fast.compress import main as compress
from mtt_fast.convert.command import main as convert
from mtt_fast.distill.command import main as distill
from mtt_fast.experts.command import main as experts
from mtt_fast.interop import export_experts
from mtt_fast.storage.file_locks import acquire
from mtt_fast.storage.text_files import read_toml
from mtt_fast.storage.trajectories import write_expert
from mtt_fast.training.experts import ExpertTraining
from tests.storage.belonging import DISTILLED, EVALUATED, EXPERTS, MODEL, TRAINED, distil, refused

pytestmark = pytest.mark.usefixtures("no_curves")


def test_experts_are_used_as_they_were_asked_for(working_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expert = EXPERTS / "expert_0000.safetensors"
    for dry in ([], ["--dry_run"]):
        error = refused(capsys, distill, *distil("--mom", "0.9", "--l2", "0.1", "--expert_lr", "0.5", *dry))
        assert f"{expert}: trained with lr 0.01, not 0.5; choose another --buffer_path, or give" in error
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
    working_folder: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    for dry in (["--dry_run"], []):
        error = refused(capsys, distill, *distil(*flags, "--num_experts", "3", *dry))
        assert f"{EXPERTS}/expert_0000.safetensors: {message}" in error
    assert cli.run(distill, distil(*TRAINED, "--num_experts", "3")) == 0
    assert len(TrajectoryStore(EXPERTS)) == 3


def test_what_is_recorded_is_what_the_experts_are(working_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    assert cli.run(distill, [*used, "--Iteration", "3"]) == 0  # the same command continues
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
    ({"whitening": "zca"}, "whitened in another way"),
    ({"dataset": "MNIST", "fingerprint": "beef"}, "made from another data set: expected digits, found MNIST"),
    ({"network": {"kind": "ConvNetD1W4BN"}}, "another network: expected ConvNetD1W4ARINAP, found ConvNetD1W4ARBNAP"),
    ({"network": {"kind": "ConvNetD1W4AL"}}, "another network: expected ConvNetD1W4ARINAP, found ConvNetD1W4ALINAP"),
    (
        {"hyperparameters": ExpertTraining(lr=0.5, train_epochs=3).record()},
        "trained with lr 0.5, but expert_0000.safetensors with 0.01",
    ),
]


@pytest.mark.parametrize(("changes", "message"), ODD_EXPERTS)
def test_every_expert_is_looked_at(
    working_folder: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
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
        assert main is distill or "--max_experts" not in error  # which others do not have
    assert message in refused(capsys, distill, *distil())
    assert sorted(EXPERTS.iterdir()) == before
    assert cli.run(distill, distil("--max_experts", "1")) == 0  # it does not take turns


def test_a_longer_expert_is_another_one_to_a_run_that_uses_last_epochs(
    working_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = rewrite(
        EXPERTS, 1, hyperparameters=TrajectoryStore(EXPERTS).metadata(1).hyperparameters | {"train_epochs": 4}
    )
    assert cli.run(distill, distil("--dry_run")) == 0
    error = refused(capsys, distill, *distil("--dry_run", "--label_init", "experts", "--lr_y", "1"))
    assert f"{odd}: trained with train_epochs 4, but expert_0000.safetensors with 3" in error


def test_experts_of_other_images_may_be_used_on_purpose(
    working_folder: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree("buffers/folder-pets", "buffers/folder-toys")
    toys = distil(data=("--dataset", "./toys"))
    error = refused(capsys, distill, *toys)
    assert "expert_0000.safetensors: made from another data set: expected folder-toys, found folder-pets" in error
    assert error.endswith("or give --other_data to use it with these")
    caplog.set_level("INFO")
    assert cli.run(distill, [*toys, "--other_data"]) == 0
    assert (
        "ConvNetD1W4: made from another data set: folder-pets, used with folder-toys, as other data are allowed"
        in caplog.text
    )
    assert read_toml(Path("new/config.toml"))["other_data"] is True
    summary = json.loads(Path("new/summary.json").read_text())
    assert (summary["data"]["name"], summary["experts"]["data"]["name"]) == ("folder-toys", "folder-pets")
    assert "experts" not in summary["accuracy"]  # theirs are of the test images of pets
    tested = summary["accuracy"]["experts_on_their_own_data"]["mean"]
    accuracies = [
        TrajectoryStore("buffers/folder-pets/ConvNetD1W4").metadata(expert).accuracy[-1] for expert in range(2)
    ]
    assert tested == pytest.approx(sum(accuracies) / 2)
    assert f"experts on their own data {100 * tested:.2f} %" in summary["text"]
    assert cli.run(distill, ["--out", "new", "--resume", "--Iteration", "3"]) == 0
    Path("buffers/folder-words").mkdir()
    shutil.copytree("buffers/folder-pets/ConvNetD1W4", "buffers/folder-words/ConvNetD1W4")
    error = refused(capsys, distill, *distil("--other_data", data=("--dataset", "./words"), out="words-run"))
    assert "expert_0000.safetensors: made from another data set: expected folder-words, found folder-pets" in error


def test_the_network_of_grad_cam_may_be_of_other_images_on_purpose(
    working_folder: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree("buffers/folder-pets", "buffers/folder-toys")
    toys = distil("--model", "ConvNetD1W5", "--cam_model", "ConvNetD1W4", data=("--dataset", "./toys"))
    error = refused(capsys, distill, *toys)
    assert (
        "ConvNetD1W4/expert_0000.safetensors: made from another data set: expected folder-toys, found folder-pets"
        in error
    )
    caplog.set_level("INFO")
    assert cli.run(distill, [*toys, "--other_data"]) == 0
    told = "ConvNetD1W4: made from another data set: folder-pets, used with folder-toys, as other data are allowed"
    assert told in caplog.text
    assert "--other_data: has no effect" not in caplog.text


def test_a_run_goes_on_with_its_own_experts(working_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    store = TrajectoryStore("same/digits/ConvNetD1W4")
    rows = torch.stack([store.read(1, epoch) for epoch in range(4)])
    write_expert(store.folder, 1, rows + 0.01, store.metadata(1))  # the same training gives others on another machine
    for dry in ([], ["--dry_run"]):
        words = ["--Iteration", "5", "--buffer_path", "same", "--num_experts", "3", *dry]
        assert f"error: {store.path(1)}: another expert" in refused(capsys, distill, *more[:-2], *words)
    assert len(TrajectoryStore(store.folder)) == 2  # none was trained beside them


def test_a_run_goes_on_with_its_own_experts_where_others_were_added_between_them(
    working_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    flags = ["--dataset", "digits", *MODEL, "--train_epochs", "3", "--batch_train", "128", "--num_experts", "3"]
    assert cli.run(experts, flags) == 0
    added = (EXPERTS / "expert_0001.safetensors").rename("other")  # as another process that trains it more slowly
    for out in ("added", "alone"):
        assert cli.run(distill, distil(out=out)) == 0
    assert cli.run(distill, ["--out", "alone", "--resume", "--Iteration", "6"]) == 0
    added.rename(EXPERTS / "expert_0001.safetensors")
    assert cli.run(distill, ["--out", "added", "--resume", "--Iteration", "6"]) == 0
    assert "the run began with 2 of the 3 experts, and matches no others" in caplog.messages
    assert cli.run(distill, ["--out", "added", "--resume", "--Iteration", "7", "--dry_run"]) == 0
    sets = [SyntheticDataset.load(f"{out}/synthetic.safetensors").images for out in ("added", "alone")]
    assert torch.equal(*sets)


def test_waypoints_are_of_the_experts_that_are_there(working_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
        assert error.endswith("delete that folder, or compress into another one")


def test_the_students_augmentation_and_seed_are_not_the_experts(
    working_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Use experts with another augmentation and seed: one option names both where experts are trained, and the log names the difference."""
    caplog.set_level("INFO")
    assert cli.run(distill, distil("--dsa", "False", "--seed", "7")) == 0
    assert "trained with --seed 0; 7 is that of the student and of evaluations" in caplog.text
    told = (
        "trained with augmentation color_crop_cutout_flip_scale_rotate; none is that of the student and of evaluations"
    )
    assert told in caplog.text


def test_experts_trained_otherwise_are_used_and_the_log_says_so(
    working_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Use experts with SAM and momentum in a run that would train without, and leave out what does not reach that far."""
    caplog.set_level("INFO")
    flags = ["--dataset", "digits", *MODEL, "--train_epochs", "4", "--batch_train", "128", "--num_experts", "1"]
    assert cli.run(experts, [*flags, "--rho_max", "0.01", "--mom", "0.5", "--buffer_path", "sharp"]) == 0
    assert cli.run(distill, distil("--buffer_path", "sharp", "--num_experts", "1", "--batch_real", "128")) == 0
    told = (
        "sharp/digits/ConvNetD1W4: used as they are, trained with --mom 0.5 (not 0.0), --rho_max 0.01 (not 0.0), "
        "--rho_min 0.01 (not 0.0), --adaptive True (not False)"
    )
    assert told in caplog.messages
    caplog.clear()
    asked = ["--mom", "0.5", "--rho_max", "0.01", "--batch_real", "128"]
    assert cli.run(distill, distil("--buffer_path", "sharp", "--num_experts", "1", *asked, out="asked")) == 0
    assert cli.run(distill, ["--out", "new", "--resume", "--Iteration", "3"]) == 0
    assert "used as they are" not in caplog.text


def test_who_writes_a_folder_of_experts_has_it_alone(
    working_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mtt_fast.storage.expert_locks._WAIT", 0.01)
    files = {path: path.read_bytes() for path in EXPERTS.iterdir()}
    trains = ["--dataset", "digits", *MODEL, "--train_epochs", "3", "--batch_train", "128"]
    (EXPERTS / "waypoints_3").mkdir()
    list(export_experts(TrajectoryStore(EXPERTS), "theirs"))
    with FileLock(EXPERTS / ".lock"), FileLock(EXPERTS / "waypoints_3" / ".lock"):
        for main, place, words in (
            (experts, "--buffer_path", [*trains, "--num_experts", "3"]),
            (experts, "--buffer_path", [*trains, "--num_experts", "3", "--buffer_path", "./buffers"]),
            (distill, "--buffer_path", distil(*TRAINED, "--num_experts", "3")),
            (compress, "--out", [str(EXPERTS), "--num_interpolation", "3"]),
            (convert, "destination", ["theirs", "buffers", "--dataset", "digits", *MODEL]),
        ):
            error = refused(capsys, main, *words)
            said = "another process is training or writing experts here; wait for it or choose another"
            assert f"{said} {place}" in error
        assert cli.run(distill, distil()) == 0  # a reader does not wait
        assert cli.run(experts, [*trains, "--num_experts", "2"]) == 0
    assert {path: path.read_bytes() for path in files} == files
    (EXPERTS / ".lock").touch()  # as a killed process leaves it
    assert cli.run(experts, [*trains, "--num_experts", "3"]) == 0
    assert not (EXPERTS / ".lock").exists()
    error = refused(capsys, experts, *trains, "--num_experts", "4", "--seed", "1")
    assert f"{EXPERTS}/expert_0000.safetensors: trained with seed 0, not 1" in error


def test_a_distillation_waits_for_another_one_that_compresses_the_experts(
    working_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    (EXPERTS / "waypoints_3").mkdir()
    with open(EXPERTS / "waypoints_3" / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        timer = threading.Timer(0.1, file.close)

        def acquire_in_the_end(lock: FileLock, timeout: float = -1) -> None:
            if timeout < 0:
                timer.start()  # only now, however long the way to the lock took
            acquire(lock, timeout)

        monkeypatch.setattr("mtt_fast.storage.run_folder.acquire", acquire_in_the_end)
        assert cli.run(distill, distil("--num_interpolation", "3")) == 0
        timer.join()
    assert (
        f"{EXPERTS}/waypoints_3: waiting for another process, which is training or writing experts here" in caplog.text
    )


@pytest.fixture
def imported(working_folder: Path) -> Path:
    """Make the folder of converted experts of the public code, for which no --num_experts is known."""
    list(export_experts(TrajectoryStore(EXPERTS), "theirs"))
    assert cli.run(convert, ["theirs", "my_buffers", "--dataset", "digits", *MODEL]) == 0
    return Path("my_buffers/digits/ConvNetD1W4")


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
    assert told.partition("imported experts, used as they are, 2 in my_buffers/digits/ConvNetD1W4")[1]
    assert "to train" not in told
    assert cli.run(distill, [*words, *flags]) == 0
    assert sorted(imported.glob("*.safetensors")) == before
    number = flags[flags.index("--num_experts") + 1] if "--num_experts" in flags else "100"
    used = f"used as they are: all 2 that are there; --num_experts {number} trains none beside them"
    assert used in caplog.text
    assert ("not known, so there is no effect of --expert_lr, --mom" in caplog.text) == ("--mom" in flags)
    summary = json.loads(Path("new/summary.json").read_text())
    assert summary["experts"]["number"] == (1 if flags == ["--max_experts", "1"] else 2)
    assert "imported_from" in summary["experts"]["hyperparameters"]
    digests = map(TrajectoryStore(summary["experts"]["folder"]).digest, range(summary["experts"]["number"]))
    # `analysis tables` knows by it which runs matched the same experts
    assert summary["experts"]["digest"] == hashlib.sha256(" ".join(digests).encode()).hexdigest()
    assert cli.run(distill, [*words, *flags, "--Iteration", "3"]) == 0  # and continues


def test_no_flag_brings_back_imported_experts(
    imported: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    words = ["--dataset", "digits", *MODEL, *DISTILLED[:-2], *EVALUATED, "--buffer_path", "my_buffers"]
    assert cli.run(distill, [*words, "--out", "new"]) == 0
    (imported / "expert_0001.safetensors").unlink()
    line = refused(capsys, distill, *words, "--out", "new", "--Iteration", "3")
    assert f"was started with 2 experts, found 1; restore its --buffer_path, {imported}" in line
    assert (
        cli.run(
            baselines,
            ["herding", "--dataset", "digits", *MODEL, *EVALUATED, "--buffer_path", "my_buffers", "--mom", "0.3"],
        )
        == 0
    )
    assert (
        f"{imported}/expert_0000.safetensors: how they were trained is not known, so there is no effect of --mom"
        in caplog.text
    )


def test_none_is_trained_in_place_of_imported_experts(imported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--dataset", "digits", *MODEL, *DISTILLED[:-2], *EVALUATED, "--buffer_path", "my_buffers", "--out", "new"]
    more = ["--out", "new", "--resume", "--Iteration", "3"]
    assert cli.run(distill, words) == 0
    shutil.rmtree(imported)
    expected = f"error: {imported}: expected the 2 imported experts with which the run in new began, found"
    mend = (
        "restore them, convert them again with `python -m mtt_fast.convert`, or give the --buffer_path that they are in"
    )
    for flags in ([], ["--dry_run"], ["--train_epochs", "1"]):  # 1: too few if they were trained
        assert refused(capsys, distill, *more, *flags) == f"{expected} none; {mend}"
    assert not imported.exists()
    imported.mkdir()
    shutil.copy(EXPERTS / "expert_0000.safetensors", imported)
    assert refused(capsys, distill, *more) == f"{expected} 1 trained here; {mend}"
    assert [path.name for path in imported.iterdir()] == ["expert_0000.safetensors"]
    shutil.rmtree(imported)
    assert cli.run(convert, ["theirs", "my_buffers", "--dataset", "digits", *MODEL]) == 0
    assert cli.run(distill, more) == 0
    assert cli.run(distill, [*more[:-1], "4", "--num_experts", "2"]) == 0  # the next checkpoint says so too
    shutil.rmtree(imported)
    assert refused(capsys, distill, *more[:-1], "5") == f"{expected} none; {mend}"


def test_a_run_that_goes_on_elsewhere_trains_no_experts_anew(
    working_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Resume from another folder, where a relative --buffer_path names nothing: hours of training would begin."""
    run, elsewhere = working_folder / "new", tmp_path / "elsewhere"
    assert cli.run(distill, distil()) == 0
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    more = ["--out", str(run), "--resume", "--Iteration", "3"]
    for flags in ([], ["--dry_run"]):
        assert refused(capsys, distill, *more, *flags) == (
            f"error: {EXPERTS}: expected the 2 experts with which the run in {run} began, found none; start in the folder "
            "where the run was started, give the --buffer_path that they are in, or restore them"
        )
    assert not (elsewhere / "buffers").exists()
    assert cli.run(distill, [*more, "--buffer_path", str(working_folder / "buffers")]) == 0


def test_a_run_that_died_in_its_first_evaluation_trains_no_experts_anew(
    working_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def dies(*_: object) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patched:
        patched.setattr("mtt_fast.distill.command.evaluate_sets", dies)
        with pytest.raises(ZeroDivisionError):
            cli.run(distill, distil())
    EXPERTS.rename("away")
    assert "expected the 2 experts with which the run in new began, found none" in refused(capsys, distill, *distil())
    Path("away").rename(EXPERTS)
    assert cli.run(distill, distil()) == 0


def test_experts_of_the_other_whitening_are_pointed_out(
    imported: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    words = [
        "--dataset",
        "digits",
        *MODEL,
        *DISTILLED[:-2],
        *EVALUATED,
        "--buffer_path",
        "my_buffers",
        "--out",
        "new",
        "--zca",
    ]
    words += ["--num_experts", "1", "--train_epochs", "3"]
    remark = "digits_ZCA/ConvNetD1W4: no experts yet; those in my_buffers/digits/ConvNetD1W4 were trained on normalised images; leave out --zca to use them"
    assert cli.run(distill, [*words, "--dry_run"]) == 0
    assert remark in capsys.readouterr().out
    assert cli.run(distill, words) == 0
    assert remark in caplog.text
    assert cli.run(distill, [*words, "--dry_run"]) == 0
    assert "no experts yet" not in capsys.readouterr().out


def test_experts_are_not_trained_beside_imported_ones(imported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--dataset", "digits", *MODEL, "--num_experts", "3", "--buffer_path", "my_buffers"]
    assert f"{imported}/expert_0000.safetensors: was imported" in refused(capsys, experts, *flags)
    assert len(TrajectoryStore(imported)) == 2


@pytest.mark.usefixtures("working_folder")
def test_a_run_ends_if_the_accuracy_of_its_experts_is_not_known() -> None:
    for expert in range(2):
        rewrite(EXPERTS, expert, accuracy=[math.nan] * 4)
    assert cli.run(distill, distil()) == 0
    accuracies = json.loads(Path("new/summary.json").read_text())["accuracy"]
    assert {"distilled", "random_real_images"} <= accuracies.keys()
    assert "experts" not in accuracies
