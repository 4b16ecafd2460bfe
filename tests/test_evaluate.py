"""Test the evaluation of sets: their sources, settings and soft labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from PIL import Image

from mtt_fast import InputError, SyntheticDataset, Whitening
from mtt_fast.analysis.__main__ import main as analysis
from mtt_fast.augmentation.texture import Canvas
from mtt_fast.commands import cli, evaluated_set
from mtt_fast.commands.evaluated_set import EvaluatedSet, check_any_trained, read_synthetic, settings_of
from mtt_fast.convert.command import main as convert
from mtt_fast.data import ImageData, load
from mtt_fast.engine.students.choice import describe_numerics
from mtt_fast.errors import Diverged
from mtt_fast.evaluate import EvaluateOptions, main
from mtt_fast.networks.by_name import network_by_name
from mtt_fast.runtime.provenance import device_name, versions
from mtt_fast.training.evaluation import Accuracy
from mtt_fast.training.images import Images, RealImages, real_images
from mtt_fast.training.subsets import random_subset

TOY = "--model ConvNetD1W4 --num_eval 2 --epoch_eval_train 3".split()


def test_an_accuracy_has_mean_and_deviation() -> None:
    result = Accuracy((0.5, 0.6, 0.7))
    assert result.mean == pytest.approx(0.6)
    assert result.std == pytest.approx(0.1)
    assert Accuracy((0.5,)).std == 0
    assert str(result) == "60.00 % ± 10.00 (n = 3)"


def test_random_subset_is_class_major_and_real() -> None:
    real = real_images(load("digits", data_path="data", progress=False), torch.device("cpu"), zca=False)
    chosen = random_subset(real, 3, torch.Generator().manual_seed(0))
    assert chosen.labels.tolist() == [label for label in range(10) for _ in range(3)]
    assert len(chosen.pixels.unique(dim=0)) == 30
    everything, labels = real.train.batch(slice(None))
    for image, label in zip(chosen.pixels, chosen.labels, strict=True):
        assert (everything[labels == label] == image).all(dim=(1, 2, 3)).any()


def distilled(**changes: Any) -> SyntheticDataset:
    data = load("digits", data_path="data", progress=False)
    arguments: dict[str, Any] = {
        "images": torch.randn(10, 1, 8, 8),
        "labels": torch.arange(10),
        "lr": torch.tensor(0.02),
        "class_names": data.class_names,
        "mean": data.mean,
        "std": data.std,
        "recipe": {"dataset": "digits", "model": "ConvNetD1W4", "num_eval": 2, "epoch_eval_train": 3},
    }
    return SyntheticDataset(**arguments | changes)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def result_of(*arguments: str) -> dict[str, Any]:
    assert cli.run(main, [*arguments, "--out", "result.json"]) == 0
    result: dict[str, Any] = json.loads(Path("result.json").read_text())
    return result


def test_a_file_brings_its_own_settings() -> None:
    distilled().save("set.safetensors")
    result = result_of("set.safetensors")
    assert result["accuracy"]["n"] == 2
    assert result["protocol"]["epochs"] == 3
    assert result["lr"] == pytest.approx(0.02)
    assert result["images"] == 10
    assert result_of("set.safetensors", "--num_eval", "1")["accuracy"]["n"] == 1


def test_a_set_brings_the_options_that_its_evaluation_shares_with_its_distillation() -> None:
    shared = {"dataset": "digits", "data_path": "there", "seed": 3, "num_eval": 2, "factor": 2}
    others = {"device": "cuda", "networks_at_once": 4, "lr_img": 5.0, "Iteration": 9, "out": "run"}
    assert settings_of(distilled(recipe=shared | others)) == shared | {"zca": False}
    whitening = Whitening.fit(torch.rand(20, 1, 8, 8))
    assert settings_of(distilled(recipe={}, whitening=whitening)) == {"zca": True}


def test_a_result_tells_what_was_measured_and_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtt_fast.evaluate.evaluate", lambda *_, **__: Accuracy((0.5,)))
    distilled().save("set.safetensors")
    result, cpu = result_of("set.safetensors", "--eval_mode", "C"), torch.device("cpu")
    networks = {name: network_by_name(name, (1, 8, 8), 10) for name in ("ConvNetD1W4", "ConvNet")}
    assert list(result["accuracy_by_network"]) == list(networks)
    first = networks["ConvNetD1W4"]
    assert (result["source"], result["model"], result["dataset"]) == ("set.safetensors", "ConvNetD1W4", "digits")
    assert (result["network"], result["numerics"]) == (first.describe(), describe_numerics(cpu, first, "auto"))
    assert (result["device"], result["versions"]) == (device_name(cpu), versions())


def test_images_of_smaller_ones_count_as_those_that_are_stored() -> None:
    """Check it in the score of such a set beside random real images, which are to be as many."""
    distilled(recipe={"dataset": "digits", "factor": 2}).save("set.safetensors")
    for source in ("set.safetensors", "random"):
        result_of(source, "--dataset", "digits", *TOY)
        Path("result.json").rename(f"{source}.json")
    assert json.loads(Path("set.safetensors.json").read_text())["images"] == 10
    words = "score --full 90 --distilled set.safetensors.json --random random.json".split()
    assert cli.run(analysis, words) == 0


def test_networks_are_trained_as_the_command_says(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def measured(network: Any, train: Any, test: Any, lr: float, protocol: Any, **others: Any) -> Accuracy:
        asked.append(
            (lr, protocol.epochs, *(others[name] for name in ("num_networks", "seed", "precision", "at_once")))
        )
        return Accuracy((0.5,))

    monkeypatch.setattr("mtt_fast.evaluate.evaluate", measured)
    monkeypatch.setattr("mtt_fast.evaluate.precision_on", lambda *_: "tf32")  # a CPU's is always fp32
    distilled().save("set.safetensors")
    for flags in ([], ["--lr_teacher", "0.5"]):
        result_of("set.safetensors", "--seed", "7", "--networks_at_once", "2", *flags)
    assert asked == [(pytest.approx(lr), 3, 2, 7, "tf32", 2) for lr in (0.02, 0.5)]


def test_other_images_are_normalised_as_those_of_the_set_were() -> None:
    data, cpu = load("digits", data_path="data", progress=False), torch.device("cpu")
    synthetic = distilled(mean=(0.25,), std=(0.5,))
    options = EvaluateOptions(dataset="digits", other_data=True)
    images, _ = EvaluatedSet("set", options, synthetic).real_images(data, cpu).train.batch(slice(0, 5))
    plain, _ = real_images(data, cpu, zca=False).train.batch(slice(0, 5))
    in_unit_range = plain * data.std[0] + data.mean[0]
    torch.testing.assert_close(images, (in_unit_range - 0.25) / 0.5)
    beside, _ = EvaluatedSet("random", options, None).real_images(data, cpu).train.batch(slice(0, 5))
    assert torch.equal(beside, plain)


@pytest.mark.parametrize(
    ("recorded", "message"),
    [
        ({"dataset": "mine"}, "made from another data set: expected digits, found mine"),
        ({"dataset": "digits", "fingerprint": "beef"}, "made from other images: expected digits with fingerprint"),
    ],
)
def test_other_images_than_those_of_the_set_are_taken_only_where_they_are_allowed(
    recorded: dict[str, str], message: str
) -> None:
    def loaded(*, other_data: bool) -> ImageData:
        options = EvaluateOptions(dataset="digits", data_path="data", other_data=other_data)
        return EvaluatedSet("set.safetensors", options, distilled(**recorded)).load_data()

    with pytest.raises(InputError, match=rf"set\.safetensors: {message}"):
        loaded(other_data=False)
    assert loaded(other_data=True).name == "digits"


@pytest.mark.parametrize("other_data", [False, True])
def test_other_images_that_are_allowed_in_vain_are_told(caplog: pytest.LogCaptureFixture, other_data: bool) -> None:
    caplog.set_level("INFO")
    options = EvaluateOptions(dataset="digits", data_path="data", other_data=other_data)
    EvaluatedSet("set.safetensors", options, distilled()).load_data()
    told = "--other_data: has no effect, as set.safetensors was made from these images"
    assert (told in caplog.messages) == other_data


def test_textures_in_files_are_cropped() -> None:
    torch.save(torch.randn(10, 1, 16, 16), "images_best.pt")
    torch.save(torch.arange(10), "labels_best.pt")
    data, cpu = load("digits", data_path="data", progress=False), torch.device("cpu")
    options = EvaluateOptions(dataset="digits", texture=True, canvas_size=2, canvas_samples=3)
    train, _ = EvaluatedSet("images_best.pt", options, None).training_images(real_images(data, cpu, zca=False))
    assert train(torch.Generator()).canvas == Canvas(2, 3)


def test_each_network_is_trained_on_random_images_of_its_own() -> None:
    options = EvaluateOptions(dataset="digits", data_path="data", ipc=2, lr_teacher=0.3)
    evaluated = EvaluatedSet("random", options, None)
    real = evaluated.real_images(evaluated.load_data(), torch.device("cpu"))
    train, lr = evaluated.training_images(real)
    assert lr == 0.3
    first, other = (train(torch.Generator().manual_seed(seed)).pixels for seed in (1, 2))
    assert torch.equal(first, random_subset(real, 2, torch.Generator().manual_seed(1)).pixels)
    assert not torch.equal(first, other)


def test_random_real_images_are_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []

    def counted(real: RealImages, ipc: int, generator: torch.Generator) -> Images:
        drawn.append(ipc)
        return random_subset(real, ipc, generator)

    monkeypatch.setattr(evaluated_set, "random_subset", counted)
    result = result_of("random", "--dataset", "digits", "--ipc", "2", *TOY)
    assert len(drawn) == result["accuracy"]["n"], "a set for each network, and none to plan or to count images"
    assert result["lr"] == 0.01
    assert result["images"] == 20
    assert 0 < result["accuracy"]["mean"] < 1


OF_PT = {"texture", "canvas_size", "canvas_samples", "label_kind", "distilled_share"}
"""Options of files of the public code alone."""


@pytest.mark.parametrize(
    ("sources", "settings", "names"),
    [
        (["random"], {}, {"factor", *OF_PT}),
        (["run"], {}, {"ipc", *OF_PT}),
        (["random", "run"], {}, OF_PT),
        (["images_a.pt"], {}, {"ipc", "distilled_share"}),
        (["run", "random", "images_a.pt"], {}, {"distilled_share"}),
        (["images_a.pt"], {"protocol": "selmatch"}, {"ipc"}),
        (["images_a.pt"], {"protocol": "selmatch", "texture": True}, {"ipc", "distilled_share"}),
    ],
)
def test_options_that_none_of_the_sets_uses_have_no_effect(
    sources: list[str], settings: dict[str, Any], names: set[str]
) -> None:
    assert set(EvaluateOptions(**settings).without_effect_on(sources)) == names


def test_a_rate_that_is_given_replaces_the_protocols() -> None:
    rates = [EvaluateOptions(protocol="selmatch", lr_teacher=lr).evaluation_protocol().lr for lr in (None, 0.5)]
    assert rates == [0.1, 0.5]


@pytest.mark.parametrize("labels", ["indices", "probabilities", "logits"])
def test_files_of_the_public_code_are_evaluated(labels: str) -> None:
    synthetic = distilled()
    hard = torch.nn.functional.one_hot(synthetic.labels, 10).float()
    stored = {"indices": synthetic.labels, "probabilities": hard, "logits": 40 * hard - 20}[labels]
    torch.save(synthetic.images, "images_best.pt")
    torch.save(stored.requires_grad_(stored.is_floating_point()), "labels_best.pt")
    result = result_of("images_best.pt", "--dataset", "digits", "--lr_teacher", "0.02", *TOY)
    # the three say the same of the images; only rounding differs
    synthetic.save("set.safetensors")
    assert result["accuracy"]["mean"] == pytest.approx(result_of("set.safetensors", *TOY)["accuracy"]["mean"], abs=0.01)


@pytest.mark.parametrize("kind", [None, "probabilities", "weights", "logits"])
def test_soft_labels_in_files_become_targets(
    kind: Literal["probabilities", "weights", "logits"] | None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    given = {"probabilities": torch.rand(10, 10).softmax(1), "weights": torch.rand(10, 10)}.get(
        kind or "", torch.randn(10, 10)
    )
    torch.save(distilled().images, "images_best.pt")
    torch.save(given, "labels_best.pt")
    real = real_images(load("digits", data_path="data", progress=False), torch.device("cpu"), zca=False)
    options = EvaluateOptions(dataset="digits", label_kind=kind)
    train, lr = EvaluatedSet("images_best.pt", options, None).training_images(real)
    is_target = kind in ("probabilities", "weights")
    expected = given if is_target else given.exp() / given.exp().sum(1, keepdim=True)
    torch.testing.assert_close(train(torch.Generator()).labels, expected)
    assert lr == 0.01
    assert ("labels are soft; taken as logits" in caplog.messages) == (kind is None)


def test_the_first_share_of_each_class_in_a_file_counts_as_distilled(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    pixels = torch.randn(20, 1, 8, 8)
    torch.save(pixels, "images_best.pt")
    torch.save(torch.arange(10).repeat(2), "labels_best.pt")
    real = real_images(load("digits", data_path="data", progress=False), torch.device("cpu"), zca=False)

    def images(share: float) -> Images:
        options = EvaluateOptions(dataset="digits", protocol="selmatch", distilled_share=share)
        train, _ = EvaluatedSet("images_best.pt", options, None).training_images(real)
        return train(torch.Generator())

    half = images(0.5)
    assert half.labels.tolist() == [label for label in range(10) for _ in range(2)]
    assert torch.equal(half.pixels, pixels.view(2, 10, 1, 8, 8).transpose(0, 1).flatten(0, 1))
    assert half.real is not None
    assert half.real.tolist() == [False, True] * 10
    assert not caplog.messages  # of soft labels, or of shares that are not known
    with pytest.raises(InputError, match=r"images_best\.pt: expected a `distilled_share` that is at least one"):
        images(0.1)


def test_an_accuracy_is_that_of_any_network_that_did_not_diverge() -> None:
    lost, found = Accuracy((0.0, 0.0), diverged=2), Accuracy((0.5, 0.0), diverged=1)
    check_any_trained([lost, found])
    with pytest.raises(Diverged, match=r"^all 4 networks diverged"):
        check_any_trained([lost, lost])


def test_other_sets_in_a_runs_folder_are_told(caplog: pytest.LogCaptureFixture) -> None:
    Path("run").mkdir()
    distilled().save("run/synthetic.safetensors")
    assert read_synthetic("run") is not None
    assert not caplog.messages
    distilled().export("mtt", "run")
    assert read_synthetic("run") is not None
    (told,) = caplog.messages
    assert told.startswith("run: ")
    assert told.endswith("name a file to evaluate it, or convert the folder with --from")


@pytest.mark.parametrize(
    ("images", "labels", "beside", "told"),
    [
        (torch.rand(10, 1, 8, 8), torch.arange(10), "", "look like pictures; those that networks see are normalised"),
        (torch.randn(10, 1, 8, 8), torch.arange(10), "images_zca_best.pt", "distilled from whitened images"),
        (
            torch.randn(10, 1, 8, 8),
            3 * torch.eye(10),
            "",
            "are they weights, as of cross-entropy, whose sums are not 1?",
        ),
        (torch.randn(10, 1, 8, 8), torch.randn(10, 10), "", ""),
    ],
    ids=["pictures", "whitened", "sums", "nothing"],
)
def test_what_files_of_the_public_code_are_taken_for_is_doubted(
    caplog: pytest.LogCaptureFixture, images: torch.Tensor, labels: torch.Tensor, beside: str, told: str
) -> None:
    torch.save(images, "images_best.pt")
    torch.save(labels, "labels_best.pt")
    if beside:
        Path(beside).touch()
    evaluated = ["images_best.pt", "--dataset", "digits", *TOY, "--num_eval", "1", "--epoch_eval_train", "0"]
    for command, arguments in (main, evaluated), (convert, ["images_best.pt", "set", "--dataset", "digits"]):
        caplog.clear()
        assert cli.run(command, arguments) == 0
        warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
        assert len(warnings) == bool(told)
        assert told in "".join(warnings)


def test_a_protocol_is_refused_before_images_are_read(capsys: pytest.CaptureFixture[str]) -> None:
    asked = "random --dataset CIFAR10 --data_path nowhere --protocol ddranking --epoch_eval_train 0"
    assert cli.run(main, asked.split()) == 2
    assert "--epoch_eval_train 0: expected at least 1" in capsys.readouterr().err


def test_an_exported_set_is_evaluated_alike() -> None:
    synthetic = distilled()
    assert [path.name for path in synthetic.export("mtt", "exported")] == [
        "images_best.pt",
        "labels_best.pt",
        "lr_best.pt",
    ]
    assert torch.equal(torch.load("exported/images_best.pt", weights_only=True), synthetic.images)
    result = result_of("exported/images_best.pt", "--dataset", "digits", *TOY)
    assert result["lr"] == pytest.approx(0.02)
    *pictures, labels = synthetic.export("png", "pictures")
    assert [path.suffix for path in pictures] == 10 * [".png"]
    assert labels.name == "labels.json"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected a run's folder, a file, or the word random"),
        (["nothing"], "nothing: cannot be read"),
        (
            ["folder"],
            "folder: expected a run's folder, with synthetic.safetensors in it, found other files; check the path",
        ),
        (
            ["theirs"],
            "found images_*.pt, labels_*.pt and lr_*.pt of MTT and its successors; name the file of images itself",
        ),
        (["pictures"], "found an image folder CLASS/NNNNN.png with labels.json; make a set of it"),
        (["text.safetensors"], "expected a safetensors file"),
        (["other.safetensors"], "expected a distilled set"),
        (
            ["ours.safetensors", "--dataset", "CIFAR10", "--data_path", "folder"],
            "another size: expected 3×32×32, found",
        ),
        (["images_x.pt", "--dataset", "digits"], "labels_x.pt: cannot be read"),
        (["images_text.pt", "--dataset", "digits"], "found a broken or foreign file"),
        (["images_size.pt", "--dataset", "digits"], "expected images (1, 8, 8) of digits, found (3, 4, 4)"),
        (
            ["images_bytes.pt", "--dataset", "digits"],
            "expected images of floating-point numbers, as networks see them, found",
        ),
        (["images_soft.pt", "--dataset", "digits", "--label_kind", "probabilities"], "expected rows of probabilities"),
        (
            ["images_size.pt", "--dataset", "digits", "--label_kind", "logits"],
            "--label_kind logits: has no effect on labels that are classes",
        ),
        (
            ["random", "--dataset", "few", "--ipc", "2"],
            "--ipc 2: class 7 has only 1 of the 2 real images that are needed; use a smaller",
        ),
        (["random", "--dataset", "digits", "--num_eval", "0"], "--num_eval 0: expected at least 1"),
    ],
)
def test_mistakes_are_told(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    from mtt_fast.storage.tensor_files import save_tensors

    for folder in ("folder", "theirs", "pictures"):
        Path(folder).mkdir()
    distilled().save("ours.safetensors")
    Path("pictures/labels.json").touch()
    for place in ("train/5/0.png", "train/5/1.png", "train/7/0.png", "test/5/0.png", "test/7/0.png"):
        Path("few", place).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(Path("few", place))
    for name in ("images_soft.pt", "theirs/images_best.pt"):
        torch.save(torch.randn(10, 1, 8, 8), name)
    torch.save(torch.randn(10, 10), "labels_soft.pt")
    torch.save(torch.zeros(10, 1, 8, 8, dtype=torch.uint8), "images_bytes.pt")
    torch.save(torch.arange(10), "labels_bytes.pt")
    Path("text.safetensors").write_text("hello")
    save_tensors("other.safetensors", {"x": torch.zeros(2)})
    torch.save(torch.zeros(10, 1, 8, 8), "images_x.pt")
    Path("images_text.pt").write_text("hello")
    torch.save(torch.zeros(2, 3, 4, 4), "images_size.pt")
    torch.save(torch.zeros(2, dtype=torch.long), "labels_size.pt")
    assert cli.run(main, arguments) == 2
    assert message in capsys.readouterr().err


def test_the_distilled_set_survives_its_file() -> None:
    whitening = Whitening.fit(torch.rand(20, 1, 8, 8))
    before = distilled(whitening=whitening, labels=torch.randn(10, 10), label_kind="logits", versions={"torch": "x"})
    before.save("set.safetensors")
    after = SyntheticDataset.load("set.safetensors")
    for name in ("images", "labels", "lr"):
        assert torch.equal(getattr(before, name), getattr(after, name))
    assert after.whitening is not None
    assert torch.equal(after.whitening.inverse, whitening.inverse)
    assert (after.label_kind, after.class_names, after.mean) == ("logits", before.class_names, before.mean)
    assert (after.recipe, after.versions) == (before.recipe, before.versions)
    real = torch.rand(3, 1, 8, 8)
    shown = distilled(whitening=whitening, images=whitening.apply(real)).pictures()
    torch.testing.assert_close(shown, real, rtol=0, atol=1e-3)


def test_the_default_data_set_is_said_where_the_set_names_none() -> None:
    """CIFAR10 is the public code's default; a file of images of the same shape from elsewhere would be tested on it silently."""
    said = ["without --dataset: CIFAR10, the public code's default"]
    for source in ("random", "images_best.pt"):
        assert EvaluateOptions(source=source).remarks(()) == said
        assert EvaluateOptions(source=source).remarks({"dataset"}) == []
    assert EvaluateOptions(source="runs/digits").remarks(()) == []
