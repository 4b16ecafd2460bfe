"""Test `python -m mtt_fast.baselines` end to end on the embedded digits at toy size: files, sets, summaries, mistakes."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mtt_fast import SyntheticDataset, TrajectoryStore
from mtt_fast.analysis.measured import finished_runs, measurements
from mtt_fast.baselines.catalogue import METHODS
from mtt_fast.commands import cli, run_loop
from mtt_fast.compress import compress
from mtt_fast.evaluate import main as evaluate
from mtt_fast.storage.tensor_files import load_tensors
from mtt_fast.training.evaluation import Accuracy
from tests.baselines.command_runs import CHOSEN, LEARNED, TOY, flags, run, set_of, summary_of


def test_a_rate_in_place_of_which_the_protocol_has_one_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO")
    words = [*"random --lr_net 0.3 --protocol selmatch".split(), *TOY]
    assert run(*words, "--out", "run") == 0
    assert "--lr_net 0.3: evaluations use the learning rate of --protocol selmatch, 0.1" in caplog.text
    caplog.clear()
    assert run(*words, "--out", "other", "--protocol", "mtt") == 0
    assert "--lr_net" not in caplog.text


@pytest.mark.usefixtures("curves")
@pytest.mark.parametrize("method", [*CHOSEN, *LEARNED])
def test_a_run_leaves_its_files(method: str, shared: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run(*flags(method, shared), "--out", str(out)) == 0
    summary, made = summary_of(out), set_of(out)
    assert summary["method"] == METHODS[method].title
    assert 0 < summary["accuracy"]["distilled"]["mean"] <= 1
    assert summary["accuracy"]["distilled"]["n"] == 2
    assert summary["text"].startswith(
        f"{METHODS[method].title} {100 * summary['accuracy']['distilled']['mean']:.2f} % ±"
    )
    assert summary["accuracy_by_network"] == {"distilled": {"ConvNetD1W4": summary["accuracy"]["distilled"]}}
    assert summary["protocol"]["name"] == "mtt"
    assert summary["options"]["ipc"] == 2
    assert summary["command"].startswith(f"python -m mtt_fast.baselines {method} --dataset digits")
    assert summary["versions"]["torch"] == torch.__version__
    assert summary["peak_memory_bytes"] > 2**20
    assert summary["seconds"]["evaluations"] > 0
    assert summary["seconds"]["first_iteration" if method in LEARNED else "iterations"] > 0
    assert summary["learning_rate"] == pytest.approx(float(made.lr))
    assert made.images.shape == (20, 1, 8, 8)
    assert made.recipe["method"] == METHODS[method].title
    if method == "ld":
        assert made.label_kind == "probabilities"
        assert made.labels.shape == (20, 10)
    else:
        assert made.labels.tolist() == [label for label in range(10) for _ in range(2)]
    names = {"config.toml", "history", "images.png", "seconds.json", "summary.json", "synthetic.safetensors"}
    if method in LEARNED:
        names |= {"best.safetensors", "checkpoint.safetensors", "curves.png", "events", "metrics.jsonl"}
        assert summary["iterations"] == 2
        assert [path.name for path in sorted((out / "history").iterdir())] == [
            f"iteration_{iteration:06d}.png" for iteration in (0, 2)
        ]
        records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert [record["kind"] for record in records] == ["evaluation", "step", "step", "evaluation"]
        assert records[2]["lr"] == pytest.approx(float(made.lr))
    assert {path.name for path in out.iterdir()} - {".lock"} == names
    assert ("own_training" in summary["accuracy"]) == (method in ("dd", "ld", "ratbptt", "atbptt"))
    with Image.open(out / "images.png") as picture:
        assert picture.height > 500


@pytest.mark.parametrize(("model", "tested"), [("MLP", ""), ("ConvNetD1W4BN", "ConvNetD1W4")])
def test_a_summary_names_a_tested_network_only_if_it_is_another(
    model: str, tested: str, shared: Path, tmp_path: Path
) -> None:
    out = ["--out", str(tmp_path / "run"), "--num_eval", "1", "--epoch_eval_train", "1"]
    assert run(*flags("random", shared), "--model", model, *out) == 0
    text = json.loads((tmp_path / "run/summary.json").read_text())["text"]
    assert text.partition("; the images were tested on ")[2] == tested


@pytest.mark.parametrize("method", ["random", "kmeans --pick centres"])
def test_chosen_images_get_labels_of_experts(method: str, shared: Path, tmp_path: Path) -> None:
    """Compare the set with that of the classes; the tables name the labels."""
    plain, out = tmp_path / "plain", tmp_path / "run"
    words = [*method.split(), *TOY, "--data_path", str(shared / "data")]
    labelled = [*words, "--labels", "experts", "--buffer_path", str(shared / "buffers"), "--train_epochs", "3"]
    assert run(*words, "--out", str(plain)) == 0
    assert run(*labelled, "--out", str(out)) == 0
    made, hard = set_of(out), set_of(plain)
    assert made.label_kind == "probabilities"
    assert torch.equal(made.images, hard.images)
    assert hard.labels.tolist() == [label for label in range(10) for _ in range(2)]
    torch.testing.assert_close(made.labels.sum(1), torch.ones(20))
    summary = summary_of(out)
    assert summary["accuracy"]["distilled"] != summary_of(plain)["accuracy"]["distilled"]
    (setting,) = {setting.method for setting in measurements(finished_runs([out]))}
    assert setting == f"{METHODS[method.split()[0]].title}, labels of experts"
    assert run(*labelled, "--label_epoch", "1", "--out", str(out)) == 2  # another set in the same folder


def test_an_epoch_that_no_expert_will_have_is_refused_before_the_training(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*"random --labels experts --train_epochs 3 --label_epoch 4".split(), *TOY]
    words += ["--data_path", str(shared / "data"), "--buffer_path", str(tmp_path / "buffers")]
    assert run(*words, "--out", str(tmp_path / "run")) == 2
    assert "error: --label_epoch 4: expected at most 3, the epochs of the expert to train" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.safetensors"))


def test_an_epoch_that_an_expert_does_not_have_is_refused_before_the_run_begins(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*"random --labels experts --train_epochs 1".split(), *TOY, "--data_path", str(shared / "data")]
    words += ["--buffer_path", str(tmp_path / "buffers"), "--out"]
    assert run(*words, str(tmp_path / "first")) == 0
    assert run(*words, str(tmp_path / "run"), "--label_epoch", "2") == 2
    assert "error: --label_epoch 2: expected at most 1, the epochs of" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_labels_of_a_network_of_batch_statistics_are_refused(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*"random --labels experts".split(), *TOY, "--model", "ConvNetD1W4BN", "--data_path", str(shared / "data")]
    assert run(*words, "--out", str(tmp_path / "run")) == 2
    assert "error: --model ConvNetD1W4BN: expected a network that does not mix the images" in capsys.readouterr().err


def test_chosen_images_are_real_ones_of_their_class(shared: Path, tmp_path: Path) -> None:
    from mtt_fast.data import load

    data = load("digits", data_path=shared / "data")
    for method in CHOSEN:
        out = tmp_path / method
        assert run(*flags(method, shared), "--out", str(out)) == 0
        made = set_of(out)
        pictures = (made.pictures() * 255).round().byte()
        for picture, label in zip(pictures, made.labels, strict=True):
            members = data.train.images[data.train.labels == label]
            assert (members == picture).all(dim=(1, 2, 3)).any()
        assert len(pictures.flatten(1).unique(dim=0)) == 20
    assert len(TrajectoryStore(shared / "buffers" / "digits" / "ConvNetD1W4")) == 1


def test_experts_that_do_not_fit_are_refused(shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*flags("herding", shared), "--out", str(tmp_path / "herding")) == 0  # there is an expert now
    experts = shared / "buffers" / "digits" / "ConvNetD1W4"
    compress(experts, tmp_path / "few" / "digits" / "ConvNetD1W4", 2)
    words = [*flags("forgetting", shared), "--buffer_path", str(tmp_path / "few"), "--out", str(tmp_path / "run")]
    assert run(*words) == 2
    assert "the expert is compressed" in capsys.readouterr().err
    shutil.copytree(experts, tmp_path / "other" / "digits" / "ConvNetD1W5")
    words = [*words, "--model", "ConvNetD1W5", "--buffer_path", str(tmp_path / "other")]
    assert run(*words, "--out", str(tmp_path / "other-run")) == 2
    assert "the expert is of another network" in capsys.readouterr().err


def test_the_centres_of_pixels_are_the_means_of_their_clusters(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    monkeypatch.chdir(tmp_path)
    assert run("kmeans", *flags("random", shared)[1:], "--pick", "centres", "--ipc", "1", "--out", str(out)) == 0
    assert not Path("buffers").exists()  # no network is asked, so none is trained
    from mtt_fast.data import load

    data = load("digits", data_path=shared / "data")
    for label, picture in enumerate(set_of(out).pictures()):  # of one cluster: the mean of the class
        members = data.train.images[data.train.labels == label].double() / 255
        torch.testing.assert_close(picture.double(), members.mean(0), rtol=0, atol=1e-5)


def test_a_method_without_a_network_takes_one_of_batch_statistics_to_evaluate(shared: Path, tmp_path: Path) -> None:
    words = ["kmeans", *flags("random", shared)[1:], "--pick", "centres", "--model", "ConvNetD1W4BN"]
    assert run(*words, "--out", str(tmp_path / "run")) == 0
    assert list(summary_of(tmp_path / "run")["accuracy_by_network"]["distilled"]) == ["ConvNetD1W4"]


@pytest.mark.parametrize("method", ["kmeans", "dm", "dsa", "dd", "ld", "ratbptt"])
def test_other_networks_and_pools_are_evaluated(method: str, shared: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = [*flags(method, shared), "--model", "MLP", "--eval_mode", "C", "--protocol", "datm", "--Iteration", "1"]
    words = words[:-2] if method == "kmeans" else words
    assert run(*words, "--out", str(out)) == 0
    assert list(summary_of(out)["accuracy_by_network"]["distilled"]) == ["MLP", "ConvNet"]
    assert summary_of(out)["protocol"]["batch_size"] == 128


def test_a_set_is_evaluated_again_to_the_same_end(
    shared: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "run"
    assert run(*flags("ld", shared), "--out", str(out)) == 0
    caplog.set_level("INFO")
    assert cli.run(evaluate, [str(out), "--seed", "3"]) == 0
    assert re.search(r"% ± .* \(n = 2\)", caplog.text)


def test_the_pictures_show_the_first_images_above_the_learned_ones(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[list[torch.Tensor]] = []
    monkeypatch.setattr(
        run_loop, "save_grid", lambda path, panels, *_: drawn.append([pictures for _, pictures in panels])
    )
    assert run(*flags("dm", shared), "--out", str(tmp_path)) == 0
    (first, _), (above, below) = drawn
    assert torch.equal(above, first)
    assert not torch.equal(above, below)
    assert torch.equal(below, set_of(tmp_path).pictures())


def test_an_expert_that_was_trained_otherwise_is_told_by_the_flags_of_baselines(
    shared: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    words = [*flags("herding", shared), "--buffer_path", str(tmp_path), "--out"]
    assert run(*words, str(tmp_path / "first"), "--batch_train", "200") == 0
    assert run(*words, str(tmp_path / "other"), "--batch_train", "300") == 0  # which an evaluation may have
    assert "used as they are, trained with --batch_train 200 (not 300)" in caplog.text
    assert "is that of evaluations" not in caplog.text
    assert run(*words, str(tmp_path / "seed"), "--batch_train", "200", "--seed", "1", "--dsa", "False") == 0
    assert "expert_0000.safetensors: trained with --seed 0; 1 is that of evaluations" in caplog.text
    assert "trained with augmentation color_crop_cutout_flip_scale_rotate; none is that of evaluations" in caplog.text


def test_no_expert_is_trained_beside_buffers_of_the_public_code(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "digits" / "ConvNetD1W4"
    folder.mkdir(parents=True)
    (folder / "replay_buffer_0.pt").touch()
    words = [*flags("herding", shared), "--buffer_path", str(tmp_path), "--out", str(tmp_path / "run")]
    assert run(*words) == 2
    assert "found buffers of the public code such as replay_buffer_0.pt; convert them" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["replay_buffer_0.pt"]


@pytest.mark.parametrize(("save_seconds", "iterations"), [("0", 1), ("1000", 0)])
def test_a_diverged_run_ends_and_its_checkpoints_are_as_often_as_asked_for(
    save_seconds: str, iterations: int, shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    more = ["--out", str(out), "--lr_img", "1e38", "--save_seconds", save_seconds]
    assert run(*flags("dm", shared), *more) == 2
    assert re.search(r"iteration 2 diverged \(loss (inf|nan)\); start again with smaller", capsys.readouterr().err)
    assert not (out / "summary.json").exists()
    _, metadata = load_tensors(out / "checkpoint.safetensors")
    assert json.loads(metadata["progress"])["iteration"] == iterations


@pytest.mark.parametrize(("accuracies", "first"), [((0.3, 0.5, 0.4), 1), ((0.3, 0.5, 0.5), 1), ((0.0, 0.0, 0.0), 0)])
def test_the_best_set_is_that_of_the_first_of_the_best_evaluations(
    accuracies: tuple[float, ...], first: int, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check it where the second network, which decides nothing, finds the best set to be the worst."""

    def measured(*_: Any, name: str, indices: tuple[int], **__: Any) -> Accuracy:
        (iteration,) = indices
        return Accuracy((accuracies[iteration] if name == "ConvNetD1W4" else 1 - accuracies[iteration],))

    monkeypatch.setattr("mtt_fast.commands.run_loop.evaluate", measured)
    assert run(*flags("dm", shared), "--out", str(tmp_path / "run"), "--eval_it", "1", "--eval_mode", "C") == 0
    assert SyntheticDataset.load(tmp_path / "run" / "best.safetensors").recipe["iterations"] == first
    assert set_of(tmp_path / "run").recipe["iterations"] == 2
    accuracy_records = summary_of(tmp_path / "run")["accuracy"]
    assert accuracy_records["distilled"]["mean"] == accuracies[2]
    best = accuracy_records["best_evaluation_chosen_on_the_test_images"]
    assert (best["mean"], best["iteration"]) == (accuracies[first], first)


@pytest.mark.parametrize(
    ("method", "measures", "result"),
    [
        ("random", "commands.run_loop.evaluate", Accuracy((0.5,))),
        ("dm", "commands.run_loop.evaluate", Accuracy((0.5,))),
        ("dd", "baselines.learning.accuracy", 0.5),  # after the method's own training
        ("herding", "baselines.command.first_expert", None),  # after the expert's
    ],
)
def test_an_evaluation_leaves_a_new_run_in_the_place_of_its_moved_folder_alone(
    method: str,
    measures: str,
    result: Accuracy | float | None,
    shared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"

    def replaced(*_: Any, **__: Any) -> Accuracy | float | None:
        out.rename(tmp_path / "moved")
        out.mkdir()
        (out / ".lock").touch()
        return result

    monkeypatch.setattr(f"mtt_fast.{measures}", replaced)
    assert run(*flags(method, shared), "--out", str(out), "--num_eval", "1") == 2
    assert f"{out}: another run has taken this folder" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == [".lock"]


MISTAKES = [
    pytest.param(["herdin"], r"herdin: expected a method, .* \(did you mean herding\?\)", id="method"),
    pytest.param(["dm", "--lr_imgs", "3"], r"unknown option \(did you mean --lr_img\?\)", id="flag"),
    pytest.param(["random", "--ipc", "5000"], r"ipc 5000: class 0 has only", id="too-many"),
    pytest.param(["herding", "--ipc", "5000"], r"ipc 5000: class 0 has only", id="too-many-before-the-expert"),
    pytest.param(["dc", "--ipc", "3"], r"--ipc 3: the papers name loops", id="loops"),
    pytest.param(["dsa", "--ipc", "1", "--dsa", "False"], r"--dsa False: .* run dc instead", id="dsa"),
    pytest.param(
        ["dsa", "--ipc", "1", "--dsa_strategy", "none"], r"--dsa_strategy none: .* run dc instead", id="dsa-strategy"
    ),
    pytest.param(
        ["dc", "--model", "ConvNetD1W4BN", "--ipc", "1"],
        r"--model ConvNetD1W4BN: expected a network that does not mix the images of a batch, as batch norm does",
        id="norm",
    ),
    pytest.param(["random", "--protocol", "mine"], r"--protocol mine: expected mtt", id="protocol"),
    pytest.param(["dm", "--lr_img", "0"], r"--lr_img 0.0: expected more than 0", id="rate"),
    pytest.param(["ld", "--inner_batch_size", "0"], r"--inner_batch_size 0: expected at least 1", id="batch"),
    pytest.param(
        ["dd", "--resume"], r"--resume: expected the run's folder with --out, found none", id="resume-without-a-folder"
    ),
    pytest.param(["dd", "--dsa_strategy", "blur"], r"--dsa_strategy blur", id="augmentation"),
    pytest.param(["forgetting", "--expert_lr", "0"], r"--expert_lr 0.0: expected more than 0", id="expert"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES)
def test_mistakes_are_told_in_one_line(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    method, *rest = words
    out = [] if "--resume" in words else ["--out", str(tmp_path / "run")]
    assert run(method, *TOY, "--data_path", str(shared / "data"), *out, *rest) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert re.search(message, error)
    assert not (tmp_path / "run").exists()


def test_help_lists_the_methods_with_their_papers(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    said = capsys.readouterr().out
    for name, method in METHODS.items():
        assert re.search(rf"^  {name} +{re.escape(method.paper)}$", said, re.MULTILINE)
    with pytest.raises(SystemExit) as ended:
        run("ld", "--help")
    assert ended.value.code == 0
    assert "--inner-batch-size" in capsys.readouterr().out.replace("_", "-")


@pytest.mark.parametrize("method", METHODS)
def test_the_default_options_of_each_method_are_valid(method: str) -> None:
    METHODS[method].options().check()
