"""Test distilled sets in the files of other software: exact round trips, order and kinds of labels, refusals."""

from __future__ import annotations

import importlib
import io
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from mtt_fast import InputError, SyntheticDataset, Whitening
from mtt_fast.data.class_names import CIFAR10, CIFAR100, MNIST, SUBSETS, imagenet_wnids
from mtt_fast.interop import (
    SET_KINDS,
    SyntheticView,
    TensorSet,
    as_tensor_set,
    class_major,
    image_data_from,
    read_set,
    set_kind_of,
    write_set,
)
from mtt_fast.interop.tensor_set import SourceInfo, hardened, in_place, tensor_set

CLASSES, IPC = 3, 2
N = CLASSES * IPC


def distilled(label_kind: str = "indices", whitening: Whitening | None = None, **changes: Any) -> SyntheticDataset:
    soft = torch.randn(N, CLASSES)
    kinds = {
        "indices": torch.arange(CLASSES).repeat_interleave(IPC),
        "probabilities": soft.softmax(1),
        "logits": soft,
    }
    arguments: dict[str, Any] = {
        "images": torch.randn(N, 3, 4, 5),
        "labels": kinds[label_kind],
        "lr": torch.tensor(0.0123),
        "class_names": ("cat", "dog / wolf", "owl"),
        "mean": (0.5, 0.4, 0.3),
        "std": (0.2, 0.25, 0.3),
        "whitening": whitening,
        "label_kind": label_kind,
        "recipe": {"dataset": "CIFAR10", "ipc": IPC},
        "versions": {"torch": torch.__version__},
    }
    return SyntheticDataset(**arguments | changes)


def assert_same(found: SyntheticDataset | TensorSet, expected: SyntheticDataset | TensorSet) -> None:
    assert found.label_kind == expected.label_kind
    for name in ("images", "labels", "lr"):
        one, other = getattr(found, name), getattr(expected, name)
        if other is None:
            assert one is None
        else:
            assert (one.dtype, one.shape) == (other.dtype, other.shape)
            assert torch.equal(one, other), name


@pytest.mark.parametrize("labels", ["indices", "probabilities", "logits"])
@pytest.mark.parametrize("kind", ["mtt", "ddranking", "dc", "synthetic"])
def test_tensors_come_back_bit_for_bit(tmp_path: Path, kind: str, labels: str) -> None:
    synthetic = distilled(labels)
    expected = as_tensor_set(synthetic)
    files = synthetic.export(kind, tmp_path / "x")
    assert all(file.exists() for file in files)
    assert set_kind_of(tmp_path / "x") == kind
    found = read_set(tmp_path / "x")
    if kind == "dc":  # keeps no learning rate
        expected = TensorSet(expected.images, expected.labels, None, labels)
    if kind == "ddranking" and labels == "probabilities":  # their logarithms are written
        torch.testing.assert_close(found.labels.softmax(1), expected.labels, rtol=1e-6, atol=1e-7)
        expected = TensorSet(expected.images, found.labels, expected.lr, "logits")
    assert_same(found, expected)


def test_the_files_are_those_of_the_public_code(tmp_path: Path) -> None:
    synthetic = distilled("logits", labels=torch.randn(N, CLASSES, requires_grad=True))
    folder = tmp_path / "set"
    assert [file.name for file in synthetic.export("mtt", folder)] == ["images_best.pt", "labels_best.pt", "lr_best.pt"]
    labels = torch.load(folder / "labels_best.pt", weights_only=True)
    assert torch.equal(labels, synthetic.labels)
    assert not labels.requires_grad
    assert torch.load(folder / "lr_best.pt", weights_only=True).item() == pytest.approx(0.0123)

    hard = distilled()
    (result,) = hard.export("dc", tmp_path / "dc")
    assert result.name == f"res_TM_CIFAR10_ConvNet_{IPC}ipc.pt"
    content = torch.load(result, weights_only=False)
    assert set(content) == {"data", "accs_all_exps"}
    images, targets = content["data"][-1]
    assert torch.equal(images, hard.images)
    assert torch.equal(targets, hard.labels)


def test_a_view_is_written_without_what_it_is_cut_from(tmp_path: Path) -> None:
    many = torch.randn(1000 * N, 3, 4, 5)
    files = distilled(images=many[:N]).export("mtt", tmp_path)
    assert files[0].stat().st_size < 20_000


def as_the_public_code_saves(
    folder: Path, images: str, labels: str, classes: int = CLASSES, ipc: int = IPC
) -> tuple[Tensor, Tensor]:
    """Save the tensors that distill.py has in memory as it saves them."""
    label_syn = torch.tensor([np.ones(ipc) * i for i in range(classes)], dtype=torch.long, requires_grad=False).view(-1)
    image_syn = torch.randn(size=(classes * ipc, 3, 4, 4), dtype=torch.float).detach().requires_grad_(True)
    with torch.no_grad():
        torch.save(image_syn.cpu(), folder / images)
        torch.save(label_syn.cpu(), folder / labels)
    return image_syn.detach(), label_syn


@pytest.mark.filterwarnings("ignore:Creating a tensor from a list of numpy")
@pytest.mark.parametrize(
    ("images", "labels", "lr"),
    [
        ("images_best.pt", "labels_best.pt", None),
        ("images_100.pt", "labels_100.pt", None),
        ("images_best.pt", "labels_best.pt", "lr_best.pt"),
        ("images_best.pt", "labels_best.pt", "best_lr.pt"),
        ("ema_images_100.pt", "ema_labels_100.pt", "lr_100.pt"),
        ("images_ipc-2_best.pt", "labels_ipc-2_best.pt", None),
        ("CIFAR10_IPC2_normalize_images.pt", "CIFAR10_IPC2_normalize_labels.pt", None),
    ],
)
def test_names_of_the_field(tmp_path: Path, images: str, labels: str, lr: str | None) -> None:
    pixels, targets = as_the_public_code_saves(tmp_path, images, labels)
    if lr:
        torch.save(torch.tensor(0.02, requires_grad=True), tmp_path / lr)
    for source in (tmp_path / images, tmp_path):
        found = read_set(source, "mtt")
        assert not found.images.requires_grad
        assert_same(found, TensorSet(pixels, targets, torch.tensor(0.02) if lr else None, "indices"))


@pytest.mark.parametrize("rate", [0.02, np.float64(0.02), np.float32(0.02), torch.tensor([0.02])])
def test_learning_rates_in_other_forms(tmp_path: Path, rate: Any) -> None:
    distilled().export("mtt", tmp_path)
    torch.save(rate, tmp_path / "lr_best.pt")
    found = read_set(tmp_path)
    assert found.lr is not None
    assert found.lr.dim() == 0
    assert float(found.lr) == pytest.approx(0.02)
    torch.save([0.02, 0.03], tmp_path / "lr_best.pt")
    with pytest.raises(InputError, match=r"lr_best\.pt: expected one learning rate, found \[0\.02, 0\.03\]"):
        read_set(tmp_path)


@pytest.mark.filterwarnings("ignore:Creating a tensor from a list of numpy")
def test_the_best_of_a_folder_is_meant(tmp_path: Path) -> None:
    for name in ("0", "100", "best"):
        pixels, targets = as_the_public_code_saves(tmp_path, f"images_{name}.pt", f"labels_{name}.pt")
        torch.save(pixels, tmp_path / f"images_zca_{name}.pt")
        torch.save(pixels, tmp_path / f"ema_images_{name}.pt")
    assert_same(read_set(tmp_path), TensorSet(pixels, targets, None, "indices"))
    (tmp_path / "images_best.pt").unlink()
    with pytest.raises(InputError, match=r"expected one set .*ema_images_0\.pt, ema_images_100\.pt.*name its file"):
        read_set(tmp_path)
    with pytest.raises(InputError, match=r"for looking at.* name images_100\.pt instead"):
        read_set(tmp_path / "images_zca_100.pt")


@pytest.mark.filterwarnings("ignore:Creating a tensor from a list of numpy")
def test_a_set_in_parts(tmp_path: Path) -> None:
    pixels, targets = as_the_public_code_saves(tmp_path, "images_best.pt", "labels_best.pt", 10, 1)
    (tmp_path / "images_best.pt").unlink()
    for part in range(5):
        torch.save(pixels[2 * part : 2 * part + 2], tmp_path / f"images_best_{part}.pt")
        torch.save(targets[2 * part : 2 * part + 2], tmp_path / f"labels_best_{part}.pt")
    for source in (tmp_path, tmp_path / "images_best.pt", tmp_path / "images_best_3.pt"):
        assert_same(read_set(source, "mtt"), TensorSet(pixels, targets, None, "indices"))
    (tmp_path / "images_best_2.pt").unlink()
    with pytest.raises(InputError, match=r"images_best_2\.pt: expected this part of the set"):
        read_set(tmp_path)


def as_dc_saves(path: Path) -> list[list[Tensor]]:
    """Write a file as main.py of DC and main_DM.py write it: numpy's numbers among the accuracies, several experiments."""
    data_save = [[torch.randn(N, 3, 4, 4), torch.arange(CLASSES).repeat_interleave(IPC)] for _ in range(2)]
    accuracy = np.sum(np.equal([1, 2, 2], [1, 2, 3])) / 3
    torch.save({"data": data_save, "accs_all_exps": {"ConvNet": [accuracy, np.float32(accuracy)]}}, path)
    return data_save


def test_results_of_dc(tmp_path: Path) -> None:
    data = as_dc_saves(tmp_path / "res_DM_CIFAR10_ConvNet_2ipc.pt")
    found = read_set(tmp_path)
    assert_same(found, TensorSet(data[-1][0], data[-1][1], None, "indices"))


def test_results_that_numpy_1_wrote(tmp_path: Path) -> None:
    as_dc_saves(tmp_path / "new.pt")
    with zipfile.ZipFile(tmp_path / "new.pt") as new, zipfile.ZipFile(tmp_path / "res_old.pt", "w") as old:
        for name in new.namelist():
            content = new.read(name)
            if name.endswith("data.pkl"):
                assert b"numpy._core.multiarray" in content
                content = content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
            old.writestr(name, content)
    assert len(read_set(tmp_path / "res_old.pt").images) == N


@pytest.mark.parametrize("method", ["TM", "DC", "DSA", "DM", "random", "Kmeans"])
def test_folders_of_dc_benchmark(tmp_path: Path, method: str) -> None:
    synthetic = distilled()
    files = write_set(tmp_path, synthetic, "dc_benchmark", method=method)
    folder = tmp_path / method / "CIFAR10" / f"IPC{IPC}"
    pairs = {"TM": "{}_best.pt", "random": "CIFAR10_IPC2_normalize_{}.pt", "Kmeans": "CIFAR10_IPC2_{}.pt"}
    result = {f"res_{method}_CIFAR10_ConvNet_{IPC}ipc.pt"}
    expected = {pairs[method].format(name) for name in ("images", "labels", "lr")} if method in pairs else result
    assert {file.name for file in files} == expected
    assert all(file.parent == folder for file in files)
    for source in (tmp_path, tmp_path / method, folder):
        assert set_kind_of(source) is not None
        found = read_set(source, "dc_benchmark")
        assert torch.equal(found.images, synthetic.images)
        assert torch.equal(found.labels, synthetic.labels)
    with pytest.raises(InputError, match="holds a set already"):
        write_set(tmp_path, synthetic, "dc_benchmark", method=method)


def test_tiny_imagenet_at_fifty_is_in_five_parts(tmp_path: Path) -> None:
    labels = torch.arange(2).repeat_interleave(50)
    synthetic = distilled(images=torch.randn(100, 3, 2, 2), labels=labels, recipe={"dataset": "Tiny"})
    files = synthetic.export("dc_benchmark", tmp_path)
    assert {file.name for file in files} == {f"{name}_best_{k}.pt" for name in ("images", "labels") for k in range(5)}
    images = [torch.load(tmp_path / f"TM/tinyimagenet/IPC50/images_best_{k}.pt", weights_only=True) for k in range(5)]
    assert torch.equal(torch.cat(images), synthetic.images)  # as its TMDataLoader puts them together
    assert torch.equal(read_set(tmp_path).images, synthetic.images)


def test_random_kmeans_and_kip_of_dc_benchmark(tmp_path: Path) -> None:
    images, labels = torch.rand(N, 3, 4, 4), torch.arange(CLASSES).repeat_interleave(IPC)
    folder = tmp_path / "random" / "CIFAR10" / "IPC2"
    folder.mkdir(parents=True)
    torch.save(images, folder / "CIFAR10_IPC2_normalize_images.pt")
    torch.save(labels.float(), folder / "CIFAR10_IPC2_normalize_labels.pt")
    assert_same(read_set(tmp_path), TensorSet(images, labels, None, "indices"))

    kip = tmp_path / "KIP" / "CIFAR10" / "IPC2"
    kip.mkdir(parents=True)
    one_hot = torch.nn.functional.one_hot(labels).numpy() - 1 / CLASSES
    np.savez(kip / "kip_cifar10_ConvNet3_ssize6.npz", images=images.permute(0, 2, 3, 1).numpy(), labels=one_hot)
    assert_same(read_set(kip), TensorSet(images, labels, None, "indices"))
    with pytest.raises(InputError, match="expected one set in METHOD/DATASET/IPCn, found random/CIFAR10/IPC2, KIP"):
        read_set(tmp_path)


@pytest.mark.parametrize("labels", ["probabilities", "logits"])
def test_dd_ranking_sees_the_same_soft_labels(tmp_path: Path, labels: str) -> None:
    synthetic = distilled(labels)
    if labels == "probabilities":
        synthetic.labels[0] = torch.tensor([1.0, 0.0, 0.0])
    truth = synthetic.labels if labels == "probabilities" else synthetic.labels.softmax(1)
    synthetic.export("ddranking", tmp_path)
    written = torch.load(tmp_path / "labels.pt", weights_only=True)
    assert written.isfinite().all()
    outputs = torch.randn(N, CLASSES)
    its_loss = -(written.softmax(1) * outputs.log_softmax(1)).sum(1)  # its soft cross entropy, temperature 1
    torch.testing.assert_close(its_loss, -(truth * outputs.log_softmax(1)).sum(1))


def test_dd_ranking_wants_as_many_images_of_every_class(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="DD-Ranking: expected as many images of every class"):
        write_set(tmp_path, distilled(labels=torch.tensor([0, 0, 0, 1, 1, 2])), "ddranking")


def test_hard_labels_are_put_in_order_and_soft_ones_are_left(tmp_path: Path) -> None:
    images = torch.arange(6.0).view(6, 1, 1, 1)
    mixed = tensor_set(images, torch.tensor([2, 0, 1, 0, 2, 1]), None, "x")
    ordered = class_major(mixed)
    assert ordered.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert ordered.images.flatten().tolist() == [1, 3, 2, 5, 0, 4]
    assert (in_place(mixed), in_place(ordered)) == (3, 6)
    write_set(tmp_path, mixed, "mtt")
    assert_same(read_set(tmp_path), ordered)

    soft = tensor_set(images, 9.0 * torch.nn.functional.one_hot(mixed.labels), None, "x")
    assert class_major(soft) is soft
    assert class_major(soft, reorder_soft=True).images.flatten().tolist() == [1, 3, 2, 5, 0, 4]
    assert hardened(soft).labels.tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("labels", "kind"),
    [
        (torch.tensor([[0.2, 0.8], [1.0, 0.0]]), "probabilities"),
        (torch.tensor([[0.2, 0.8], [1.0, 0.1]]), "logits"),
        (torch.tensor([[0.2, 0.8], [1.5, -0.5]]), "logits"),
        (torch.tensor([0.0, 1.0]), "indices"),
        (torch.tensor([0, 1], dtype=torch.int32), "indices"),
    ],
)
def test_kinds_of_labels(labels: Tensor, kind: str) -> None:
    assert tensor_set(torch.zeros(2, 1, 2, 2), labels, None, "x").label_kind == kind


@pytest.mark.parametrize(
    ("images", "labels", "lr", "message"),
    [
        (
            torch.zeros(2, 4, 4),
            torch.zeros(2).long(),
            None,
            r"expected images \(n, C, H, W\) with n labels, found \(2, 4, 4\)",
        ),
        (
            torch.zeros(2, 1, 4, 4),
            torch.zeros(3).long(),
            None,
            r"with n labels, found \(2, 1, 4, 4\) and labels \(3,\)",
        ),
        (torch.zeros(2, 1, 4, 4).byte(), torch.zeros(2).long(), None, "expected images"),
        (torch.zeros(2, 1, 4, 4), torch.tensor([0.5, 1.0]), None, "expected labels that are class indices"),
        (torch.zeros(2, 1, 4, 4), torch.tensor([-1, 0]), None, "expected class indices, counted from 0, found -1 to 0"),
        (torch.zeros(2, 1, 4, 4), torch.zeros(2, 3, 3), None, "expected labels that are class indices"),
        (
            torch.full((2, 1, 4, 4), float("nan")),
            torch.zeros(2).long(),
            None,
            "images: expected finite numbers, found 32 of 32",
        ),
        (
            torch.zeros(2, 1, 4, 4),
            torch.zeros(2).long(),
            torch.tensor(-0.1),
            "expected one learning rate, finite and above 0",
        ),
    ],
)
def test_what_is_no_set(tmp_path: Path, images: Tensor, labels: Tensor, lr: Tensor | None, message: str) -> None:
    torch.save(images, tmp_path / "images_best.pt")
    torch.save(labels, tmp_path / "labels_best.pt")
    if lr is not None:
        torch.save(lr, tmp_path / "lr_best.pt")
    with pytest.raises(InputError, match=rf"images_best\.pt: .*{message}"):
        read_set(tmp_path)


class Hostile:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (Path.touch, (self.target,))


@pytest.mark.parametrize("name", ["images_best.pt", "res_DC_CIFAR10_ConvNet_1ipc.pt", "x.npz"])
def test_hostile_files_do_not_run(tmp_path: Path, name: str) -> None:
    hostile = Hostile(tmp_path / "touched")
    folder = tmp_path / "DC" / "CIFAR10" / "IPC1"
    folder.mkdir(parents=True)
    if name.endswith(".npz"):
        np.savez(folder / name, images=np.array([hostile], dtype=object), labels=np.zeros((1, 2)))
    else:
        torch.save({"data": [[hostile]], "accs_all_exps": hostile}, folder / name)
        torch.save(torch.zeros(1).long(), folder / "labels_best.pt")
    with pytest.raises(InputError, match="broken or foreign"):
        read_set(folder, "dc_benchmark")
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"other": 1}, "found a dictionary with other"),
        ([1], r"found \[1\]"),
        ({"data": []}, "expected a dictionary with data"),
    ],
)
def test_what_is_no_result_of_dc(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "res_x.pt")
    with pytest.raises(InputError, match=message):
        read_set(tmp_path / "res_x.pt")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("labels", ["indices", "probabilities", "logits"])
@pytest.mark.parametrize("kind", ["png", "parquet"])
def test_pictures_come_back_exactly_and_with_their_facts(tmp_path: Path, kind: str, labels: str, channels: int) -> None:
    info: dict[str, Any] = {"mean": (0.5,) * channels, "std": (0.2,) * channels, "lr_per_step": torch.rand(4)}
    synthetic = distilled(labels, images=torch.randn(N, channels, 4, 5), **info)
    synthetic.export(kind, tmp_path / "x")
    assert set_kind_of(tmp_path / "x") == kind
    back = read_set(tmp_path / "x")
    assert isinstance(back, SyntheticDataset)
    eight_bits = (synthetic.pictures() * 255).round()
    assert torch.equal((back.pictures() * 255).round(), eight_bits)
    torch.testing.assert_close(back.pictures(), eight_bits / 255, rtol=0, atol=1e-6)
    assert torch.equal(back.labels, synthetic.labels)
    assert torch.equal(back.lr, synthetic.lr)
    assert back.lr_per_step is not None
    assert torch.equal(back.lr_per_step, info["lr_per_step"])
    assert (back.class_names, back.mean, back.std) == (synthetic.class_names, synthetic.mean, synthetic.std)
    assert (back.label_kind, back.recipe, back.versions) == (labels, synthetic.recipe, synthetic.versions)


@pytest.mark.parametrize("kind", ["png", "parquet"])
def test_pictures_of_whitened_images_need_the_whitening(tmp_path: Path, kind: str) -> None:
    whitening = Whitening.fit(torch.rand(200, 3, 4, 5))
    synthetic = distilled(whitening=whitening, images=whitening.apply(torch.rand(N, 3, 4, 5)))
    synthetic.export(kind, tmp_path)
    with pytest.raises(InputError, match=r"the set was whitened.*`zca`"):
        read_set(tmp_path)
    info = SourceInfo(synthetic.class_names, synthetic.mean, synthetic.std, whitening)
    back = read_set(tmp_path, info=info)
    assert isinstance(back, SyntheticDataset)
    assert back.whitening is whitening
    assert torch.equal((back.pictures() * 255).round(), (synthetic.pictures() * 255).round())


@pytest.mark.parametrize(
    ("kind", "module", "fails_at"),
    [("png", "image_folder", "write_json"), ("mtt", "pairs", "save_pickle"), ("ddranking", "pairs", "save_pickle")],
)
def test_a_stop_leaves_no_half_of_a_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, module: str, fails_at: str
) -> None:
    writer = importlib.import_module(f"mtt_fast.interop.{module}")
    write, calls = getattr(writer, fails_at), []

    def stopped(path: Path, value: Any) -> Any:
        calls.append(path)
        if fails_at == "write_json" or len(calls) == 2:
            raise KeyboardInterrupt
        return write(path, value)

    (tmp_path / "mine.txt").write_text("x")
    monkeypatch.setattr(writer, fails_at, stopped)
    with pytest.raises(KeyboardInterrupt):
        distilled().export(kind, tmp_path)
    assert calls
    assert [path.name for path in tmp_path.rglob("*")] == ["mine.txt"]


def test_an_image_folder_of_another_method(tmp_path: Path) -> None:
    for label, name in enumerate(("ape", "bee")):
        (tmp_path / name).mkdir()
        for number in range(2):
            values = np.full((4, 4, 3), 100 * label + number, np.uint8)
            Image.fromarray(values).save(tmp_path / name / f"{number}.png")
    with pytest.raises(InputError, match=r"expected labels\.json"):
        read_set(tmp_path)
    info = SourceInfo(("ape", "bee"), (0.5,) * 3, (0.25,) * 3, None)
    found = read_set(tmp_path, info=info, lr=0.05)
    assert isinstance(found, SyntheticDataset)
    assert found.labels.tolist() == [0, 0, 1, 1]
    assert (found.pictures()[:, 0, 0, 0] * 255).round().tolist() == [0, 1, 100, 101]
    assert found.lr == pytest.approx(0.05)


def coloured_folder(root: Path, names: Sequence[str], value_of: Sequence[int]) -> Path:
    """Write one picture a class folder, whose red is the class that it shows."""
    for name, value in zip(names, value_of, strict=True):
        (root / name).mkdir(parents=True)
        Image.new("RGB", (4, 4), (value, 0, 0)).save(root / name / "0.png")
    return root


WOOF = SUBSETS["imagewoof"]


@pytest.mark.parametrize(
    ("class_names", "names"),
    [
        (tuple(WOOF.values()), tuple(WOOF)),
        (tuple(WOOF.values()), tuple(str(imagenet_wnids().index(wnid)) for wnid in WOOF)),
        (tuple(WOOF), tuple(WOOF.values())),
        (CIFAR10, ("plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")),
        (CIFAR100, tuple(map(str, range(100)))),
        (CIFAR100, tuple(f"new{number:03d}" for number in range(100))),
        (("10", "9", "cat"), ("10", "9", "cat")),
        (MNIST, tuple(f"{n} - {word}" for n, word in enumerate("zero one two three four five six seven eight nine".split()))),
    ],
    ids=["ids", "ranks", "words of ids", "cifar", "numbers", "numbers with a word", "own", "torchvision's digits"],
)  # fmt: skip
def test_folders_of_another_method_go_by_name(
    tmp_path: Path, class_names: tuple[str, ...], names: tuple[str, ...]
) -> None:
    coloured_folder(tmp_path, names, range(len(names)))
    found = read_set(tmp_path, info=SourceInfo(class_names, (0.5,) * 3, (0.25,) * 3, None))
    assert isinstance(found, SyntheticDataset)
    assert (found.pictures()[:, 0, 0, 0] * 255).round().tolist() == found.labels.tolist()
    assert sorted(found.labels.tolist()) == list(range(len(names)))
    assert found.class_names == class_names


def test_folders_that_mean_no_class_or_are_missing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    info = SourceInfo(CIFAR10, (0.5,) * 3, (0.25,) * 3, None)
    with pytest.raises(InputError, match=r"a: expected the names of .*found 'dogg' \(nearest: dog.*\); rename it"):
        read_set(coloured_folder(tmp_path / "a", ["cat", "dogg"], [3, 5]), info=info)
    found = read_set(coloured_folder(tmp_path / "b", [*CIFAR10[:7], "boat"], range(8)), "png", info=info)
    assert found.labels.tolist()[-1] in (6, 8)
    assert "no pictures of 2 classes: horse, truck" in caplog.text


@pytest.mark.parametrize("labels", ["indices", "probabilities", "logits"])
@pytest.mark.parametrize("kind", ["png", "parquet"])
def test_a_set_with_its_classes_in_another_order_is_put_in_the_datas(tmp_path: Path, kind: str, labels: str) -> None:
    synthetic = distilled(labels)
    synthetic.export(kind, tmp_path)
    order = [2, 0, 1]
    info = SourceInfo(tuple(synthetic.class_names[i] for i in order), synthetic.mean, synthetic.std, None)
    found = read_set(tmp_path, info=info)
    assert isinstance(found, SyntheticDataset)
    assert found.class_names == info.class_names
    if labels == "indices":
        assert [info.class_names[i] for i in found.labels] == [synthetic.class_names[i] for i in synthetic.labels]
    else:
        assert torch.equal(found.labels, synthetic.labels[:, order])
    other = SourceInfo(("cat", "fox", "owl"), synthetic.mean, synthetic.std, None)
    with pytest.raises(InputError, match="found 'dog / wolf'"):
        read_set(tmp_path, info=other)


def foreign_parquet(path: Path, labels: list[Any], names: list[str] | None) -> Path:
    """Write a file as `datasets` writes it; the red of each picture is the number of its row."""
    import pyarrow
    from pyarrow import parquet

    rows = []
    for number in range(len(labels)):
        file = io.BytesIO()
        Image.new("RGB", (4, 4), (number, 0, 0)).save(file, format="PNG")
        rows.append({"bytes": file.getvalue(), "path": None})
    features = {"label": {"names": names, "_type": "ClassLabel"}} if names else {"label": {"dtype": "int64"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    parquet.write_table(pyarrow.table({"image": rows, "label": labels}).replace_schema_metadata(metadata), path)
    return path


@pytest.mark.parametrize(
    ("labels", "names", "expected"),
    [
        ([0, 1, 2], ["car", "truck", "plane"], [1, 9, 0]),
        (["car", "truck", "plane"], None, [1, 9, 0]),
        ([0, 1, 2], None, [0, 1, 2]),
    ],
)
def test_parquet_files_go_by_the_names_of_their_classes(
    tmp_path: Path, labels: list[Any], names: list[str] | None, expected: list[int]
) -> None:
    info = SourceInfo(CIFAR10, (0.5,) * 3, (0.25,) * 3, None)
    found = read_set(foreign_parquet(tmp_path / "x.parquet", labels, names), info=info)
    assert found.labels.tolist() == expected


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        ([0], ["zebra"], "found 'zebra'"),
        ([3], ["car"], r"expected labels in \[0, 1\), one for each class name, found 3 to 3"),
        ([0], ["car", "automobile"], "which both mean 'automobile'"),
    ],
)
def test_parquet_files_of_other_classes(tmp_path: Path, labels: list[Any], names: list[str], message: str) -> None:
    info = SourceInfo(CIFAR10, (0.5,) * 3, (0.25,) * 3, None)
    with pytest.raises(InputError, match=rf"x\.parquet: .*{message}"):
        read_set(foreign_parquet(tmp_path / "x.parquet", labels, names), info=info)


def test_transparent_pictures_lie_on_white(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    Image.new("RGBA", (4, 4), (10, 20, 30, 0)).save(tmp_path / "cat" / "0.png")
    found = read_set(tmp_path, info=SourceInfo(CIFAR10, (0.5,) * 3, (0.25,) * 3, None))
    assert isinstance(found, SyntheticDataset)
    assert (found.pictures() * 255).round().unique().tolist() == [255]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda record: record.update(format="other"), "expected the format"),
        (lambda record: record.pop("files"), "expected the labels of pictures, found a broken file"),
        (lambda record: record["labels"].pop(), "expected a label for each file, found 6 and 5"),
        (lambda record: record.pop("mean"), "expected the record of a distilled set"),
        (lambda record: record.update(mean=[0.5]), "expected the record of a distilled set"),
        (
            lambda record: record.update(label_kind="logits"),
            r"labels: expected logits, float32 \(n, classes\) of two or more classes, found Tensor float32 \(6,\)",
        ),
        (lambda record: record["labels"].__setitem__(0, 3), "labels: expected class indices from 0 to 2, found 0 to 3"),
        (
            lambda record: record["labels"].__setitem__(0, [1, 2]),
            "expected the record of a distilled set, found it broken",
        ),
        (lambda record: record["files"].__setitem__(0, 7), "expected the labels of pictures, found a broken file"),
        (lambda record: record["files"].__setitem__(0, "/etc/x.png"), "expected files in its own folder, found /etc/x"),
        (lambda record: record["files"].__setitem__(0, "a/../../x.png"), "expected files in its own folder, found a/"),
    ],
)
def test_a_broken_labels_file_is_named(tmp_path: Path, spoil: Any, message: str) -> None:
    distilled().export("png", tmp_path)
    record = json.loads((tmp_path / "labels.json").read_text())
    spoil(record)
    (tmp_path / "labels.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match=rf"labels\.json: {message}"):
        read_set(tmp_path)


def test_the_schema_of_datasets(tmp_path: Path) -> None:
    from pyarrow import parquet

    (file,) = distilled("logits").export("parquet", tmp_path)
    schema = parquet.read_schema(file)
    assert str(schema.field("image").type) == "struct<bytes: binary, path: string>"
    assert (str(schema.field("label").type), str(schema.field("soft_label").type)) == ("int64", "list<element: float>")
    features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert features["image"] == {"_type": "Image"}
    assert features["label"] == {"names": ["cat", "dog / wolf", "owl"], "_type": "ClassLabel"}
    assert set(features) == {"image", "label", "soft_label"}


def test_a_foreign_parquet_file(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"x": [1]}), tmp_path / "x.parquet")
    (tmp_path / "y.parquet").write_text("hello")
    for name in ("x", "y"):
        with pytest.raises(InputError, match=rf"{name}\.parquet: expected columns image"):
            read_set(tmp_path / f"{name}.parquet")
    with pytest.raises(InputError, match=r"z\.parquet: cannot be read"):
        read_set(tmp_path / "z.parquet")
    (file,) = distilled().export("parquet", tmp_path / "spoilt.parquet")
    parquet.write_table(parquet.read_table(file).replace_schema_metadata({"mtt_fast": "{"}), file)
    with pytest.raises(InputError, match=r"spoilt\.parquet: expected columns image"):
        read_set(file)


@pytest.mark.parametrize("labels", ["indices", "probabilities", "logits"])
def test_a_dataset_of_torch(labels: str) -> None:
    synthetic = distilled(labels)
    view = SyntheticView(synthetic)
    truth = synthetic.labels.softmax(1) if labels == "logits" else synthetic.labels
    images, targets = next(iter(DataLoader(view, batch_size=N)))
    assert torch.equal(images, synthetic.images)
    assert torch.equal(targets, truth)
    assert view.images.data_ptr() == synthetic.images.data_ptr()
    torch.nn.functional.cross_entropy(torch.randn(N, CLASSES), targets)


def test_any_map_style_dataset_becomes_real_images() -> None:
    pixels, labels = torch.randint(0, 256, (6, 3, 4, 5), dtype=torch.uint8), torch.arange(6) % 3
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels]
    pairs = list(zip(pictures, labels.tolist(), strict=True))
    records = [{"img": image, "label": label} for image, label in pairs]
    floats, raw = TensorDataset(pixels / 255, labels), TensorDataset(pixels, labels)
    for dataset in (pairs, records, floats, raw):
        data = image_data_from(dataset, dataset)
        assert torch.equal(data.train.images, pixels)
        assert torch.equal(data.test.labels, labels)

    class Named(list[Any]):
        """A data set like torchvision's ImageFolder, whose classes are the sorted folders of one split."""

        def __init__(self, classes: list[str]) -> None:
            super().__init__(pairs)
            self.classes = classes

    mixed = image_data_from(Named(["ape", "bee", "cow"]), Named(["cow", "ape", "Bee"]))
    assert mixed.test.labels.tolist() == [2, 0, 1] * 2
    assert mixed.class_names == ("ape", "bee", "cow")
    with pytest.raises(InputError, match=r"test: expected the names of .* found 'dog'"):
        image_data_from(Named(["ape", "bee", "cow"]), Named(["cow", "ape", "dog"]))
    grey = [(Image.fromarray(np.full((4, 5), 7, np.uint8)), 0)]
    assert image_data_from(grey, grey, class_names=["seven"]).train.images.shape == (1, 1, 4, 5)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ([], "expected images, found none"),
        ([(torch.full((3, 4, 4), 1.5), 0)], r"expected values in \[0, 1\], found 1\.5 to 1\.5; leave Normalize out"),
        ([(torch.zeros(3, 4, 4), 0), (torch.zeros(3, 4, 5), 0)], "image 1: expected shape"),
        ([(torch.zeros(4, 4), 0)], r"expected \(C, H, W\)"),
        ([(torch.zeros(3, 4, 4).int(), 0)], "expected uint8 or floating point"),
        ([{"picture": 1}], r"expected image \(or img\) and label, found picture"),
        ([7], r"expected \(image, label\), found int"),
    ],
)
def test_datasets_that_cannot_be_read(dataset: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        image_data_from(dataset, dataset, name="mine")


def test_kinds_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"`to` pgn: expected one of .*\(did you mean png\?\)"):
        distilled().export("pgn", tmp_path)
    with pytest.raises(InputError, match=r"expected a distilled set .*found nothing there"):
        read_set(tmp_path / "nothing")
    with pytest.raises(InputError, match="expected the properties of the real images for kind png"):
        write_set(tmp_path, as_tensor_set(distilled()), "png")
    with pytest.raises(InputError, match="`dataset`: expected the data set's name"):
        write_set(tmp_path, as_tensor_set(distilled()), "dc_benchmark")
    with pytest.raises(InputError, match="expected class indices, as dc_benchmark makes all labels whole numbers"):
        distilled("logits").export("dc_benchmark", tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert len(SET_KINDS) == 7
