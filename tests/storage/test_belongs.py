"""Check that every command compares a file with the images it was made from, and refuses others in one line that names the file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from mtt_fast import SyntheticDataset, Whitening
from mtt_fast.analysis.__main__ import main as analysis
from mtt_fast.baselines.command import main as baselines
from mtt_fast.commands import cli
from mtt_fast.convert.command import main as convert
from mtt_fast.cross.command import main as cross
from mtt_fast.data import load
from mtt_fast.distill.command import main as distill
from mtt_fast.evaluate import main as evaluate
from tests.storage.belonging import EVALUATED, MODEL, TRAINED, distil, refused, save_folder

pytestmark = pytest.mark.usefixtures("no_curves")


SETS = [
    (["run", "--zca"], "run/synthetic.safetensors: whitened in another way: expected ZCA-whitened images, found normalised images; leave out --zca", False),
    (["zrun", "--no_zca"], "zrun/synthetic.safetensors: whitened in another way: expected normalised images, found ZCA-whitened images; give --zca", False),
    (["run", "--dataset", "./pets"], "run/synthetic.safetensors: made from another data set: expected folder-pets, found digits; give the --dataset, --subset, --res and --data_path that it was made from, or give --other_data", True),
    (["run", "--dataset", "./words"], "run/synthetic.safetensors: made from another data set: expected folder-words, found digits; give the", False),
    (["run", "--dataset", "./words", "--other_data"], "made from another data set: expected folder-words, found digits", False),
    (["run", "--dataset", "./pets", "--res", "16", "--other_data"], "made from another data set: expected folder-pets-16, found digits", False),
    (["run", "--dataset", "./pets", "--zca", "--other_data"], "run/synthetic.safetensors: whitened in another way", False),
    (["prun", "--res", "16"], "prun/synthetic.safetensors: made from another data set: expected folder-pets-16, found folder-pets", False),
    (["prun", "--dataset", "./toys"], "prun/synthetic.safetensors: made from another data set: expected folder-toys, found folder-pets", True),
    (["order.safetensors"], "order.safetensors: the classes in another order: expected '0' as class 0, found '9'", False),
    (["eps.safetensors"], "eps.safetensors: whitened in another way: expected the ZCA whitening that is fitted to these images with eps 0.1", True),
    (["random", "--dataset", "digits", "--other_data"], "--other_data: expected a set that records its images, found", False),
]  # fmt: skip


def save_odd_sets() -> None:
    data = load("digits", progress=False)
    run, zrun = (SyntheticDataset.load(f"{name}/synthetic.safetensors") for name in ("run", "zrun"))
    replace(run, class_names=run.class_names[::-1], fingerprint="").save("order.safetensors")
    eps = Whitening.fit(data.train.images.float() / 255, eps=0.01)
    replace(zrun, whitening=eps).save("eps.safetensors")


@pytest.mark.parametrize(("words", "message", "on_purpose"), SETS)
def test_a_set_is_tested_on_its_own_images(
    working_folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str, on_purpose: bool
) -> None:
    save_odd_sets()
    for main in (evaluate, cross):
        error = refused(capsys, main, *words, *MODEL, *EVALUATED, *(["--eval_mode", "S"] if main is cross else []))
        assert message in error
        assert ("give --other_data" in error) == on_purpose  # what can be used all the same, by who says so


def test_changed_images_are_others(working_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_folder(working_folder / "pets", seed=9)
    assert "prun/synthetic.safetensors: made from other images: expected folder-pets with fingerprint" in refused(
        capsys, evaluate, "prun"
    )
    error = refused(capsys, distill, "--out", "prun", "--resume", "--Iteration", "4")
    assert "expert_0000.safetensors: made from other images" in error
    for command in (["dm", "--Iteration", "1"], ["random"]):
        flags = [*command, "--dataset", "./pets", *MODEL, *EVALUATED, "--out", command[0]]
        assert cli.run(baselines, flags) == 0
    save_folder(working_folder / "pets", seed=8)
    flags = ["dm", "--dataset", "./pets", *MODEL, *EVALUATED, "--out", "dm", "--Iteration", "2"]
    assert "dm/checkpoint.safetensors: made from other images: expected" in refused(capsys, baselines, *flags)


def test_a_checkpoint_goes_on_with_its_own_images(working_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Train the experts anew, so that only the checkpoint names the images with which it began."""
    save_folder(working_folder / "pets", seed=9)
    new = [*TRAINED, "--buffer_path", "others"]
    assert cli.run(distill, distil(*new, data=("--dataset", "./pets"), out="another")) == 0
    flags = distil(*new, "--Iteration", "4", data=("--dataset", "./pets"), out="prun")
    assert "prun/checkpoint.safetensors: made from other images: expected folder-pets with" in refused(
        capsys, distill, *flags
    )


def test_a_dry_run_too_sees_that_a_checkpoint_is_of_images_of_another_size(
    working_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Train experts on the larger images, so that only the checkpoint names the size with which it began."""
    for path in Path("pets").rglob("*.png"):
        with Image.open(path) as picture:
            larger = picture.resize((16, 16))
        larger.save(path)
    new = [*TRAINED, "--buffer_path", "others"]
    assert cli.run(distill, distil(*new, data=("--dataset", "./pets"), out="another")) == 0
    flags = distil(*new, "--Iteration", "4", "--dry-run", data=("--dataset", "./pets"), out="prun")
    assert "prun/checkpoint.safetensors: images of another size: expected 1×16×16, found 1×8×8" in refused(
        capsys, distill, *flags
    )


def test_sets_may_be_used_with_their_own_images(working_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for words in (["run"], ["zrun"], ["run", "--model", "MLP"], ["run", "--protocol", "datm"], ["prun"]):
        assert cli.run(evaluate, [*words, *EVALUATED]) == 0
    (working_folder / "pets").rename(working_folder / "renamed")  # the same images, whatever they are called
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


def test_other_images_may_be_used_on_purpose(working_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
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


def test_conversions_compare_too(working_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (
            ["run", "out", "--zca"],
            "run: whitened in another way: expected ZCA-whitened images, found normalised images; leave out",
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
        (["plain", "out", "--dataset", "digits", "--zca"], "labels.json: whitened in another way"),
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


def test_analyses_compare_too(working_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(capsys, analysis, "distance", "run", "prun", "--steps", "2")
    assert "prun: made from another data set: expected digits, found folder-pets" in error
    assert "zrun: whitened in another way" in refused(capsys, analysis, "distance", "run", "zrun", "--steps", "2")


def test_one_name_and_two_data_sets_are_two_rows_of_a_table(working_folder: Path) -> None:
    (working_folder / "elsewhere").mkdir()
    save_folder(working_folder / "elsewhere" / "pets", seed=5)
    for place, seed in (("./pets", "1"), ("./elsewhere/pets", "2")):
        words = ["random", "--dataset", place, *MODEL, *EVALUATED, "--seed", seed, "--out", f"runs/{seed}"]
        assert cli.run(baselines, words) == 0
    assert cli.run(analysis, ["tables", "runs", "--out", "tables"]) == 0
    rows = json.loads(Path("tables/tables.json").read_text())["1"]["rows"]
    random_rows = [row for row in rows if row["dataset"] == "pets (folder)"]
    assert len(random_rows) == 2


def test_a_run_goes_on_where_its_image_folder_has_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    pets, moved, other = save_folder(Path("pets"), 0), Path("elsewhere/pets"), save_folder(Path("other/pets"), 1)
    assert cli.run(distill, distil(*TRAINED, data=["--dataset", str(pets.absolute())], out="run")) == 0
    moved.parent.mkdir()
    pets.rename(moved)
    go_on = ["--out", "run", "--resume", "--Iteration", "3"]
    for dataset in ("digits", str(save_folder(Path("cats"), 1))):
        assert "run: holds a run with --dataset" in refused(capsys, distill, *go_on, "--dataset", dataset)
    assert "made from other images" in refused(capsys, distill, *go_on, "--dataset", str(other))
    assert cli.run(distill, [*go_on, "--dataset", str(moved)]) == 0
    assert (
        cli.run(distill, ["--out", "run", "--resume", "--Iteration", "4"]) == 0
    )  # where it is from now on is recorded
