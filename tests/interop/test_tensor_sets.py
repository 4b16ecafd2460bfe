"""Test distilled sets in tensor files of other software: exact round trips, order and kinds of labels, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mtt_fast import InputError
from mtt_fast.interop import (
    SET_KINDS,
    TensorSet,
    as_tensor_set,
    class_major,
    read_set,
    set_kind_of,
    set_kinds_of,
    write_set,
)
from mtt_fast.interop.tensor_set import count_in_class_order, hardened, tensor_set
from tests.interop.helpers import CLASSES, IPC, N, assert_same, distilled


@pytest.mark.parametrize("labels", ["indices", "probabilities", "weights", "logits"])
@pytest.mark.parametrize("kind", ["mtt", "ddranking", "dc", "synthetic"])
def test_tensors_come_back_bit_for_bit(tmp_path: Path, kind: str, labels: str) -> None:
    if (kind, labels) == ("ddranking", "weights"):
        with pytest.raises(
            InputError, match=r"expected classes, probabilities or logits.*found weights; `hard_labels`"
        ):
            distilled(labels).export(kind, tmp_path / "x")
        assert not (tmp_path / "x").exists()
        return
    synthetic = distilled(labels)
    expected = as_tensor_set(synthetic)
    files = synthetic.export(kind, tmp_path / "x")
    assert all(file.exists() for file in files)
    assert set_kind_of(tmp_path / "x") == kind
    told = labels if labels == "weights" and kind in ("mtt", "dc") else None  # such files do not say it
    read_back = read_set(tmp_path / "x", label_kind=told)
    if kind == "dc":  # keeps no learning rate
        expected = TensorSet(expected.images, expected.labels, None, labels)
    if kind == "ddranking" and labels == "probabilities":  # their logarithms are written
        torch.testing.assert_close(read_back.labels.softmax(1), expected.labels, rtol=1e-6, atol=1e-7)
        expected = TensorSet(expected.images, read_back.labels, expected.lr, "logits")
    assert_same(read_back, expected)


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


@pytest.mark.parametrize("labels", ["indices", "logits"])
def test_a_view_is_written_without_what_it_is_cut_from(tmp_path: Path, labels: str) -> None:
    many = torch.randn(1000 * N, 3, 4, 5)
    files = distilled(labels, images=many[:N]).export("mtt", tmp_path)
    assert files[0].stat().st_size < 20_000


def as_the_public_code_saves(
    folder: Path, images: str, labels: str, classes: int = CLASSES, ipc: int = IPC
) -> tuple[Tensor, Tensor]:
    """Save the tensors that distill.py has in memory as it saves them."""
    label_syn = torch.tensor(np.array([np.ones(ipc) * i for i in range(classes)]), dtype=torch.long).view(-1)
    image_syn = torch.randn(size=(classes * ipc, 3, 4, 4), dtype=torch.float).detach().requires_grad_(True)
    with torch.no_grad():
        torch.save(image_syn.cpu(), folder / images)
        torch.save(label_syn.cpu(), folder / labels)
    return image_syn.detach(), label_syn


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
def test_the_names_of_the_fields_code_bases_are_known(tmp_path: Path, images: str, labels: str, lr: str | None) -> None:
    pixels, targets = as_the_public_code_saves(tmp_path, images, labels)
    if lr:
        torch.save(torch.tensor(0.02, requires_grad=True), tmp_path / lr)
    for source in (tmp_path / images, tmp_path):
        distilled = read_set(source, "mtt")
        assert not distilled.images.requires_grad
        assert_same(distilled, TensorSet(pixels, targets, torch.tensor(0.02) if lr else None, "indices"))


@pytest.mark.parametrize("rate", [0.02, np.float64(0.02), np.float32(0.02), torch.tensor([0.02])])
def test_learning_rates_in_other_forms_are_read(tmp_path: Path, rate: Any) -> None:
    distilled().export("mtt", tmp_path)
    torch.save(rate, tmp_path / "lr_best.pt")
    read_back = read_set(tmp_path)
    assert read_back.lr is not None
    assert read_back.lr.dim() == 0
    assert float(read_back.lr) == pytest.approx(0.02)
    torch.save([0.02, 0.03], tmp_path / "lr_best.pt")
    with pytest.raises(InputError, match=r"lr_best\.pt: expected one learning rate, found \[0\.02, 0\.03\]"):
        read_set(tmp_path)


def test_the_learning_rate_of_another_set_is_not_taken(tmp_path: Path) -> None:
    synthetic = distilled()
    for name, lr in (("lr_best.pt", None), ("best_lr.pt", None), ("best_lr.pt", synthetic.lr)):
        folder = tmp_path / f"{name} {lr is None}"
        folder.mkdir()
        torch.save(torch.tensor(1.0), folder / name)
        plain = TensorSet(synthetic.images, synthetic.labels, lr, "indices")
        with pytest.raises(InputError, match=f"{name}: exists already, and would be taken for this set's learning"):
            write_set(folder, plain, "mtt")
        assert [path.name for path in folder.iterdir()] == [name]
    torch.save(torch.tensor(1.0), tmp_path / "lr_best.pt")
    synthetic.export("mtt", tmp_path)  # which has one of its own
    assert_same(read_set(tmp_path, "mtt"), as_tensor_set(synthetic))


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


def test_a_set_in_parts_is_put_together(tmp_path: Path) -> None:
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
    for odd in (torch.randn(2, 3, 5, 4), torch.randn(2, 3, 4, 4).double()):
        torch.save(odd, tmp_path / "images_best_2.pt")
        with pytest.raises(InputError, match=r"best\.pt: part 2: expected a tensor like .* \(2, 3, 4, 4\), found"):
            read_set(tmp_path)
    for part in range(5):
        torch.save(torch.tensor(1.0), tmp_path / f"images_best_{part}.pt")
    with pytest.raises(InputError, match=r"images_best\.pt: part 0: expected a tensor like"):
        read_set(tmp_path)
    torch.save(pixels, tmp_path / "images_best.pt")
    with pytest.raises(InputError, match=r"images_best_7\.pt: cannot be read"):
        read_set(tmp_path / "images_best_7.pt")


@pytest.mark.parametrize("name", ["best.pt", "images_zca_best.pt", "images_best_3.pt"])
def test_names_that_would_be_read_as_something_else_are_not_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=f"{name}: expected a file name that contains images, such as images_best.pt"):
        distilled().export("mtt", tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_file_that_fails_while_it_is_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "images_best.pt").symlink_to("/proc/self/mem")  # whose first page is not there
    with pytest.raises(InputError, match=r"images_best\.pt: cannot be read"):
        read_set(tmp_path)


def test_the_parts_of_a_set_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    """Check that part 10 comes after part 2, though not as text."""
    pixels, targets = torch.randn(12, 3, 4, 4), torch.arange(12)
    for part in range(12):
        torch.save(pixels[part : part + 1], tmp_path / f"images_best_{part}.pt")
        torch.save(targets[part : part + 1], tmp_path / f"labels_best_{part}.pt")
    assert_same(read_set(tmp_path, "mtt"), TensorSet(pixels, targets, None, "indices"))


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


def test_a_kind_that_is_named_goes_before_the_one_that_names_suggest(tmp_path: Path) -> None:
    distilled("probabilities").export("mtt", tmp_path / "images.pt")
    for source in (tmp_path, tmp_path / "images.pt"):
        assert read_set(source, "mtt").label_kind == "probabilities"
        assert read_set(source, "ddranking").label_kind == "logits"
        assert read_set(source, "ddranking", label_kind="probabilities").label_kind == "probabilities"


def test_dd_ranking_wants_as_many_images_of_every_class(tmp_path: Path) -> None:
    message = "DD-Ranking: expected the same number of images of every class, found 6 of 3 classes; remove some, or choose a kind"
    with pytest.raises(InputError, match=message):
        write_set(tmp_path, distilled(labels=torch.tensor([0, 0, 0, 1, 1, 2])), "ddranking")


def test_hard_labels_are_put_in_order_and_soft_ones_are_left(tmp_path: Path) -> None:
    images = torch.arange(6.0).view(6, 1, 1, 1)
    mixed = tensor_set(images, torch.tensor([2, 0, 1, 0, 2, 1]), None, "x")
    ordered = class_major(mixed)
    assert ordered.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert ordered.images.flatten().tolist() == [1, 3, 2, 5, 0, 4]
    assert (count_in_class_order(mixed), count_in_class_order(ordered)) == (3, 6)
    write_set(tmp_path, mixed, "mtt")
    assert_same(read_set(tmp_path), ordered)

    soft = tensor_set(images, 9.0 * torch.nn.functional.one_hot(mixed.labels), None, "x")
    assert class_major(soft) is soft
    assert class_major(soft, reorder_soft=True).images.flatten().tolist() == [1, 3, 2, 5, 0, 4]
    assert hardened(soft).labels.tolist() == [0, 0, 1, 1, 2, 2]

    learned = tensor_set(images, 9.0 * torch.nn.functional.one_hot(torch.tensor([0, 0, 1, 1, 2, 0])), None, "x")
    with pytest.raises(InputError, match="`reorder`: expected every class to be the largest label of as many images"):
        class_major(learned, reorder_soft=True)


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
def test_the_kind_of_soft_labels_is_guessed_or_given(labels: Tensor, kind: str) -> None:
    assert tensor_set(torch.zeros(2, 1, 2, 2), labels, None, "x").label_kind == kind
    with pytest.raises(InputError, match="`label_kind` soft: expected one of indices, probabilities, weights, logits"):
        tensor_set(torch.zeros(2, 1, 2, 2), labels, None, "x", "soft")


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
def test_files_that_hold_no_set_are_refused(
    tmp_path: Path, images: Tensor, labels: Tensor, lr: Tensor | None, message: str
) -> None:
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


def test_folders_without_pictures_are_no_image_folder(tmp_path: Path) -> None:
    (tmp_path / "CIFAR10" / "ConvNet").mkdir(parents=True)
    (tmp_path / "CIFAR10" / "ConvNet" / "replay_buffer_0.pt").touch()
    assert set_kind_of(tmp_path) is None
    (tmp_path / "cat" / "tabby").mkdir(parents=True)
    (tmp_path / "cat" / "tabby" / "0.JPEG").touch()
    assert set_kind_of(tmp_path) == "png"
    assert set_kind_of(tmp_path / "images.png") is None


@pytest.mark.parametrize(
    ("there", "kinds"),
    [
        (("mtt", "synthetic"), ["synthetic", "mtt"]),
        (("ddranking", "mtt"), ["ddranking", "mtt"]),
        (("mtt", "png"), ["mtt", "png"]),
        (("parquet", "dc", "dc_benchmark"), ["dc_benchmark", "dc", "parquet"]),
    ],
)
def test_of_several_kinds_in_a_folder_one_is_read_and_the_others_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, there: tuple[str, ...], kinds: list[str]
) -> None:
    sets = {kind: distilled() for kind in there}
    for kind, synthetic in sets.items():
        synthetic.export(kind, tmp_path)
    assert set_kinds_of(tmp_path) == kinds
    assert torch.equal(read_set(tmp_path).images, sets[kinds[0]].images)
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    expected = [
        f"{tmp_path}: other sets ({kind}: {SET_KINDS[kind]}) are not read; give `kind` to read them"
        for kind in kinds[1:]
    ]
    assert told == expected


def test_pictures_beside_tensors_are_told_but_not_those_of_a_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    distilled().export("mtt", tmp_path)
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "0.png").touch()
    assert set_kinds_of(tmp_path) == ["mtt", "png"]
    distilled().export("synthetic", tmp_path / "run")
    (tmp_path / "run" / "history").mkdir()
    (tmp_path / "run" / "history" / "iteration_000000.png").touch()
    read_set(tmp_path / "run")
    assert not caplog.records


def test_unknown_kinds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"`kind` pgn: expected one of .*\(did you mean png\?\)"):
        distilled().export("pgn", tmp_path)
    with pytest.raises(InputError, match=r"expected a distilled set .*found nothing there"):
        read_set(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"expected a distilled set .*found other files"):
        read_set(__file__)
    with pytest.raises(InputError, match="expected the properties of the real images for kind png"):
        write_set(tmp_path, as_tensor_set(distilled()), "png")
    for name in (None, "/"):
        with pytest.raises(InputError, match="`dataset`: expected the data set's name"):
            write_set(tmp_path, as_tensor_set(distilled()), "dc_benchmark", dataset=name)
    with pytest.raises(InputError, match="expected class indices, as dc_benchmark makes all labels whole numbers"):
        distilled("logits").export("dc_benchmark", tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert len(SET_KINDS) == 8
