"""Check SelMatch's window of difficulty and its distillation of a part of the images."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mtt_fast import SyntheticDataset
from mtt_fast.commands import cli, run_loop
from mtt_fast.convert.command import main as convert
from mtt_fast.data import ImageData, load
from mtt_fast.distill.command import main
from mtt_fast.distill.difficulty import read_difficulty
from mtt_fast.distill.labels import class_logits
from mtt_fast.distill.options import DistillOptions
from mtt_fast.distill.updates import mask_real_images
from mtt_fast.errors import InputError
from mtt_fast.evaluate import main as evaluate
from mtt_fast.interop.scores import read_scores
from mtt_fast.recipes import recipe_names, recipe_options
from mtt_fast.storage.checkpoint import load_checkpoint
from mtt_fast.storage.trajectories import TrajectoryStore
from mtt_fast.testing import assert_close, module_function, reference_convnet
from mtt_fast.training.evaluation import Accuracy
from mtt_fast.training.images import as_training_images, real_images
from mtt_fast.training.subsets import window_of_difficulty

TOY = (
    "--dataset digits --model ConvNetD1W4BN --num_experts 2 --train_epochs 3 --max_start_epoch 2 --expert_epochs 1 --eval_mode SS "
    "--syn_steps 2 --Iteration 4 --eval_it 2 --num_eval 1 --epoch_eval_train 1 --batch_real 128 --lr_img 100 --ipc 5 --save_seconds 0"
).split()
WINDOW = (
    "--pix_init window --score_path scores.npz --window_start 0.5 --distilled_share 0.7 --protocol selmatch".split()
)


@pytest.fixture
def digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ImageData:
    monkeypatch.chdir(tmp_path)
    data = load("digits", data_path="data", progress=False)
    scores = np.random.default_rng(0).integers(0, 30, len(data.train.labels))  # with many equal ones
    np.savez("scores.npz", scores=scores / 30.0, labels=data.train.labels.numpy())
    np.save("scores.npy", scores)
    return data


def expected_window(data: ImageData, *, reverse: bool, first: int, last: int) -> list[int]:
    """Return the places of a window's images, as SelMatch's code finds them, but the easiest first."""
    scores, labels = np.load("scores.npy"), data.train.labels.tolist()
    chosen = []
    for label in range(10):
        of_class = [place for place, other in enumerate(labels) if other == label]
        chosen += sorted(of_class, key=lambda place: scores[place], reverse=reverse)[first:last][::-1]
    return chosen


@pytest.mark.parametrize(("score", "path"), [("cscore", "scores.npz"), ("forgetting", "scores.npy")])
def test_the_window_is_that_of_selmatchs_code(score: Any, path: str, digits: ImageData) -> None:
    options = DistillOptions(
        dataset="digits",
        ipc=7,
        pix_init="window",
        score=score,
        score_path=path,
        window_start=0.5,
    )
    assert options.window_start_image == 3
    real = real_images(digits, torch.device("cpu"), zca=False)
    window = window_of_difficulty(real, read_difficulty(options, digits), 7, 3)
    expected = expected_window(digits, reverse=score == "forgetting", first=3, last=10)
    assert torch.equal(window.pixels, real.train.subset(torch.tensor(expected)).pixels)
    assert torch.equal(window.labels, torch.arange(10).repeat_interleave(7))
    smallest = int(real.train.labels.bincount().min())
    assert len(window_of_difficulty(real, read_difficulty(options, digits), 7, smallest - 7)) == 70
    with pytest.raises(
        InputError, match=r"`ipc` 7, `window_start` \(leaves 140 out\): class 0 has only 143 of the 147 "
    ):
        window_of_difficulty(real, read_difficulty(options, digits), 7, 140)


def test_the_hardest_images_stay_as_they_are_and_the_others_are_distilled(digits: ImageData) -> None:
    assert cli.run(main, [*TOY, *WINDOW, "--ema_decay", "0.5", "--out", "run"]) == 0
    real = real_images(digits, torch.device("cpu"), zca=False)
    first = real.train.subset(torch.tensor(expected_window(digits, reverse=False, first=2, last=7))).pixels
    for name in ("synthetic.safetensors", "ema.safetensors"):
        distilled = SyntheticDataset.load(Path("run") / name)
        kept = torch.arange(50) % 5 >= 3  # ⌊5 · 0.7⌋ of each class are distilled
        assert torch.equal(distilled.images[kept], first[kept])
        assert (distilled.images != first)[~kept].flatten(1).any(1).all()
        real_mask = as_training_images(distilled, torch.device("cpu")).real
        assert real_mask is not None
        assert torch.equal(real_mask, kept)
    state = load_checkpoint(Path("run"), torch.device("cpu"))
    assert state is not None
    assert state.images_velocity is not None
    assert not state.images_velocity[kept].any()
    assert state.images_velocity[~kept].any()


def test_experts_label_the_images_that_are_not_distilled_too(digits: ImageData) -> None:
    words = "--model ConvNetD1W4 --num_experts 1 --teacher_label --Iteration 1 --out run"
    assert cli.run(main, [*TOY, *WINDOW, *words.split()]) == 0
    distilled, store = SyntheticDataset.load("run/synthetic.safetensors"), TrajectoryStore("buffers/digits/ConvNetD1W4")
    net = module_function(reference_convnet(1, 10, 8, 4, 1))
    assert_close("labels", distilled.labels, net(store.read(0, 2), distilled.images).softmax(1), 1e-4)


def test_networks_of_a_run_are_trained_at_the_protocols_rate(
    digits: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = []

    def measured(network: Any, train: Any, test: Any, lr: float, *_: Any, **__: Any) -> Accuracy:
        rates.append(lr)
        return Accuracy((0.5,))

    monkeypatch.setattr(run_loop, "evaluate", measured)
    assert cli.run(main, [*TOY, *WINDOW, "--Iteration", "0", "--out", "run"]) == 0
    assert rates == [0.1, 0.1]  # of the set, and of random real images


def test_files_of_other_software_are_told_which_images_are_real(
    digits: ImageData, caplog: pytest.LogCaptureFixture
) -> None:
    """Compare files as this software writes them, and in SelMatch's order: the distilled images of all classes, then the real ones."""
    assert cli.run(main, [*TOY, *WINDOW, "--Iteration", "0", "--out", "run"]) == 0

    def evaluated(words: str) -> Any:
        assert cli.run(evaluate, [*words.split(), "--out", "result.json"]) == 0
        return json.loads(Path("result.json").read_text())["accuracy"]["values"]

    assert cli.run(convert, "run ours --to mtt".split()) == 0
    assert "20 of the 50 images are real, the last ones of each class" in caplog.text
    real = torch.arange(50) % 5 >= 3
    Path("theirs").mkdir()
    for name in ("images", "labels"):
        saved = torch.load(f"ours/{name}_best.pt")
        torch.save(torch.cat([saved[~real], saved[real]]), f"theirs/{name}_best.pt")
    expected = evaluated("run --epoch_eval_train 9")
    settings = (
        "--protocol selmatch --dataset digits --model ConvNetD1W4BN --eval_mode SS --num_eval 1 --epoch_eval_train 9"
    )
    for folder in ("ours", "theirs"):
        assert evaluated(f"{folder}/images_best.pt {settings} --distilled_share 0.7") == expected
        assert "all images count as distilled" not in caplog.text
        assert cli.run(convert, f"{folder} {folder}_back --dataset digits --distilled_share 0.7".split()) == 0
        back = SyntheticDataset.load(f"{folder}_back/synthetic.safetensors")
        assert back.real is not None
        assert torch.equal(back.real, real)
        assert torch.equal(back.images, SyntheticDataset.load("run/synthetic.safetensors").images)
    assert evaluated(f"theirs/images_best.pt {settings}") != expected
    assert "all images count as distilled" in caplog.text


def test_the_gradients_of_the_other_images_are_untouched() -> None:
    images, rate, labels = torch.randn(6, 1, 2, 2), torch.randn(()), torch.randn(6, 2)
    masked = mask_real_images(DistillOptions(ipc=3, distilled_share=0.67), [images, rate, labels])
    assert masked[1] is rate
    for after, before in zip(masked[::2], (images, labels), strict=True):
        assert [bool(image.any()) for image in after] == [True, True, False] * 2
        assert torch.equal(after[[0, 1, 3, 4]], before[[0, 1, 3, 4]])
    assert len(mask_real_images(DistillOptions(ipc=3, distilled_share=0.67), [images, rate])) == 2
    assert mask_real_images(DistillOptions(ipc=3), [images, rate]) == [images, rate]


def test_learned_labels_of_real_images_stay_as_they_begin(digits: ImageData) -> None:
    assert cli.run(main, [*TOY, *WINDOW, "--lr_y", "10", "--out", "run"]) == 0
    distilled = SyntheticDataset.load("run/synthetic.safetensors")
    assert distilled.real is not None
    changed = (distilled.labels != class_logits(distilled.classes, 10)).any(1)
    assert torch.equal(changed, ~distilled.real)


def test_a_stopped_run_ends_in_the_same_bits(digits: ImageData) -> None:
    assert cli.run(main, [*TOY, *WINDOW, "--out", "whole"]) == 0
    assert cli.run(main, [*TOY, *WINDOW, "--Iteration", "2", "--out", "halves"]) == 0
    shutil.move("scores.npz", "moved.npz")
    assert cli.run(main, "--resume --out halves --Iteration 4 --score_path moved.npz".split()) == 0
    whole, halves = (SyntheticDataset.load(f"{name}/synthetic.safetensors") for name in ("whole", "halves"))
    assert torch.equal(whole.images, halves.images)
    digests = [json.loads(Path(name, "summary.json").read_text())["scores_digest"] for name in ("whole", "halves")]
    assert digests[0] == digests[1]
    assert digests[0]


def test_a_run_goes_on_with_its_own_scores_only(digits: ImageData, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(main, [*TOY, *WINDOW, "--Iteration", "0", "--out", "run"]) == 0
    before = Path("run/config.toml").read_bytes()
    scores = np.load("scores.npz")["scores"]
    np.savez("others.npz", scores=scores[::-1])
    capsys.readouterr()
    assert cli.run(main, "--resume --out run --Iteration 2 --score_path others.npz".split()) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--score_path others.npz: expected the scores with which the run began, found others" in error
    assert Path("run/config.toml").read_bytes() == before
    shutil.move("others.npz", "scores.npz")
    assert cli.run(main, "--resume --out run --Iteration 2".split()) == 2


def test_scores_are_read_once(digits: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def counted(*arguments: Any) -> Any:
        asked.append(arguments)
        return read_scores(*arguments)

    monkeypatch.setattr("mtt_fast.distill.difficulty.read_scores", counted)
    assert cli.run(main, [*TOY, *WINDOW, "--out", "run"]) == 0
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--pix_init window", "--pix_init window: expected --score_path with it"),
        ("--score_path scores.npz", "--score_path scores.npz: expected --pix_init window with it, found real"),
        ("--distilled_share 0.1", "--distilled_share 0.1: expected at least one distilled image of the 5 of a class"),
        ("--distilled_share 0.5 --pix_init noise", "--distilled_share 0.5, --pix_init noise: expected real images"),
        ("--distilled_share 0.5 --texture", "--texture, --distilled_share: expected one of them"),
        ("--pix_init window --score_path none.npz", "--score_path none.npz: expected a file such as"),
        (
            "--pix_init window --score_path scores.npz --window_start 50",
            "--ipc 5, --window_start (leaves 250 out): class 0 has only 143 of the 255 real images",
        ),
        (
            "--pix_init window --score_path scores.npy",
            "expected C-scores, from 0 (hard) to 1, found 0 to 29; give --score",
        ),
        ("--pix_init window --score_path negative.npy", "expected C-scores, from 0 (hard) to 1, found -1 to 0"),
        ("--pix_init window --score_path negative.npy --score forgetting", "expected whole numbers from 0 (easy) on"),
        ("--pix_init window --score_path scores.npz --score forgetting", "found fractions or negative numbers (0 to"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_the_experts(
    words: str, message: str, digits: ImageData, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save("negative.npy", -(np.load("scores.npy") > 20).astype(float))
    assert cli.run(main, [*TOY, *words.split(), "--out", "run"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert not Path("buffers").exists()


def written(name: str, **arrays: Any) -> Path:
    """Write arrays, or the one called scores to a .npy file."""
    if name.endswith(".npy"):
        np.save(name, arrays["scores"])
    else:
        np.savez(name, **arrays)
    return Path(name)


def test_scores_are_one_number_for_each_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    labels = torch.tensor([1, 0, 1])
    for name, dtype in (("a.npy", np.uint8), ("b.npz", np.float32)):
        read = read_scores(written(name, scores=np.array([3, 1, 2], dtype=dtype)), labels)
        assert read.dtype == torch.float64
        assert read.tolist() == [3, 1, 2]
    wrong: list[tuple[str, Any, str]] = [
        ("long.npy", [1.0, 2, 3, 4], r"one finite score for each of the 3 training images, found an array \(4,\)"),
        ("square.npz", [[1.0], [2], [3]], r"found an array \(3, 1\)"),
        ("nan.npy", [1.0, np.nan, 3], "found 1 that are infinite or NaN"),
        ("infinite.npy", [np.inf, -np.inf, 3], "found 2 that are infinite or NaN"),
        ("text.npy", ["a", "b", "c"], "expected a numpy array, found a broken or foreign file"),
    ]
    for name, scores, words in wrong:
        with pytest.raises(InputError, match=f"{name}: .*{words}"):
            read_scores(written(name, scores=scores), labels)
    with pytest.raises(InputError, match=r"other\.npz: expected scores in the order of the training images"):
        read_scores(written("other.npz", scores=[1.0, 2, 3], labels=np.array([1, 1, 0])), labels)
    with pytest.raises(InputError, match=r"names\.npz: expected arrays scores"):
        read_scores(written("names.npz", score=[1.0, 2, 3]), labels)
    Path("cut.npy").write_bytes(Path("a.npy").read_bytes()[:-1])
    Path("long.npy").write_bytes(Path("a.npy").read_bytes() + b"0")
    for name in ("cut.npy", "absent.npy", "long.npy"):
        with pytest.raises(InputError, match=name):
            read_scores(name, labels)


SETTINGS = {  # of SelMatch's scripts: alpha, beta, the evaluation's epochs, the rate of the pixels, student steps
    "cifar10-ipc250": (0.6, 0.5, 1000, 1000, 55),
    "cifar10-ipc500": (0.2, 0.3, 500, 1000, 55),
    "cifar10-ipc1000": (0.1, 0.2, 250, 10000, 55),
    "cifar10-ipc1500": (0.1, 0.2, 167, 10000, 55),
    "cifar100-ipc25": (0.8, 0.8, 1000, 1000, 55),
    "cifar100-ipc50": (0.6, 0.7, 500, 1000, 55),
    "cifar100-ipc100": (0.3, 0.6, 250, 1000, 55),
    "cifar100-ipc150": (0.2, 0.4, 167, 1000, 55),
    "tiny-ipc50": (0.6, 0.8, 500, 1000, 20),
    "tiny-ipc100": (0.5, 0.7, 250, 1000, 20),
}


def test_the_recipes_are_the_settings_of_selmatchs_scripts() -> None:
    assert {name.removeprefix("selmatch-") for name in recipe_names() if name.startswith("selmatch-")} == set(SETTINGS)
    for name, settings in SETTINGS.items():
        options: Any = DistillOptions(**recipe_options(f"selmatch-{name}"))
        assert (
            options.distilled_share, options.window_start, options.epoch_eval_train, options.lr_img, options.syn_steps,
        ) == settings  # fmt: skip
        tiny = name.startswith("tiny")
        assert (options.model, options.score) == (("ConvNetD4BN", "forgetting") if tiny else ("ConvNetBN", "cscore"))
        assert options.ipc == int(name.partition("-ipc")[2])
        assert (options.lr_lr, options.lr_teacher, options.batch_syn, options.Iteration) == (1e-5, 0.001, 125, 10000)
        assert (options.expert_epochs, options.max_start_epoch, options.train_epochs) == (2, 80, 100)
        assert (options.pix_init, options.protocol, options.zca) == ("window", "selmatch", False)
