"""Test ImageNet, its subsets and Tiny ImageNet in the layouts in which people have them."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mtt_fast.data import load
from mtt_fast.data.class_lists import SUBSETS
from mtt_fast.data.class_names import imagenet_wnids
from mtt_fast.errors import InputError

# The public code's class numbers: the rank of each id among ImageNet's sorted 1000.
RANKS = {
    "imagenette": [0, 217, 482, 491, 497, 566, 569, 571, 574, 701],
    "imagewoof": [193, 182, 258, 162, 155, 167, 159, 273, 207, 229],
    "imagemeow": [281, 282, 283, 284, 285, 291, 292, 290, 289, 287],
    "imagesquawk": [84, 130, 88, 144, 145, 22, 96, 9, 100, 89],
    "imagefruit": [953, 954, 949, 950, 951, 957, 952, 945, 943, 948],
    "imageyellow": [309, 986, 954, 951, 987, 779, 599, 291, 72, 11],
    "imagenet-a": [255, 376, 984, 364, 500, 986, 333, 576, 148, 135],
    "imagenet-b": [129, 916, 90, 275, 995, 874, 102, 259, 685, 139],
    "imagenet-c": [565, 94, 554, 535, 92, 392, 291, 136, 324, 11],
    "imagenet-d": [9, 258, 13, 262, 19, 339, 321, 24, 93, 322],
    "imagenet-e": [816, 96, 100, 145, 739, 713, 783, 76, 688, 326],
}


def flat(path: Path, level: int, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> None:
    """Write an image of one colour, so that no resizing changes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, (level, level // 2, 0) if mode == "RGB" else level).save(path)


def tree(root: Path, wnids: Sequence[str]) -> Path:
    """Write one PNG a class and split, called .JPEG as in ImageNet; its red is the class's place in `wnids`."""
    for number, wnid in enumerate(wnids):
        for split in ("train", "val"):
            path = root / split / wnid / f"{wnid}_1.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (6, 4), (number % 256, number // 256, 0)).save(path, format="PNG")
    return root


def ids(subset: str) -> list[str]:
    return list(SUBSETS[subset])


def test_ids_and_ranks_have_the_same_order() -> None:
    pairs = sorted(
        {pair for subset in SUBSETS for pair in zip(RANKS[subset], ids(subset), strict=True)} | {(999, "n15075141")}
    )
    wnids = [wnid for _, wnid in pairs]
    assert wnids == sorted(wnids)
    assert len(set(wnids)) == len(pairs) == 100
    assert all(len(names) == len(set(names.values())) == 10 for names in SUBSETS.values())


@pytest.mark.parametrize("subset", SUBSETS)
def test_subsets_come_in_the_public_order_from_a_larger_tree(tmp_path: Path, subset: str) -> None:
    tree(tmp_path / "ImageNet", sorted({*ids(subset), *ids("imagenette"), *ids("imagewoof"), "n09999999"}))
    everything = sorted(path.name for path in (tmp_path / "ImageNet" / "train").iterdir())
    (tmp_path / "ImageNet" / "test").mkdir()  # the official test images have no labels
    data = load("ImageNet", subset=subset.upper(), data_path=tmp_path, res=4, progress=False)
    assert data.class_names == tuple(SUBSETS[subset].values())
    assert (data.name, data.path) == (f"{subset}-4", tmp_path / "packed" / f"{subset}-4.safetensors")
    assert data.train.labels.tolist() == data.test.labels.tolist() == list(range(10))
    assert data.train.images[:, 0, 0, 0].tolist() == [everything.index(wnid) for wnid in ids(subset)]
    assert (data.mean, data.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.mark.parametrize("below", [".", "imagenette", "imagenette2", "imagenette2-320", "imagenette2-160"])
def test_folders_of_fastai_are_found_by_the_subsets_name(tmp_path: Path, below: str) -> None:
    tree(tmp_path / below, ids("imagenette"))
    data = load("ImageNette", data_path=tmp_path, progress=False)
    assert (data.name, data.image_shape) == ("imagenette-128", (3, 128, 128))
    assert data.train.images[:, 0, 64, 64].tolist() == list(range(10))
    woof = tree(tmp_path / "woof", ids("imagewoof"))
    data = load("imagewoof", data_path=woof, res=4, progress=False)
    assert data.train.images[:, 0, 0, 0].tolist() == list(range(10)), "not sorted: the public order"


@pytest.mark.parametrize("subset", [*SUBSETS, None])
def test_images_are_squeezed_as_mtt_does_it_and_those_of_glad_cropped(tmp_path: Path, subset: str | None) -> None:
    wnids = ids(subset) if subset else [f"n{number:08}" for number in range(1000)]
    root, first = tree(tmp_path, wnids), wnids[0]
    ramp = np.broadcast_to(np.arange(48, dtype=np.uint8)[None, :, None] * 5, (16, 48, 3))
    picture = Image.fromarray(np.ascontiguousarray(ramp))
    picture.save(root / "train" / first / f"{first}_1.JPEG", format="PNG")
    image = load(subset or "ImageNet", data_path=tmp_path, res=8, progress=False).train.images[0]
    if subset and subset.startswith("imagenet-"):
        expected = np.asarray(picture.resize((24, 8), Image.Resampling.BILINEAR))[:, 8:16]
    else:
        expected = np.asarray(picture.resize((8, 8), Image.Resampling.BILINEAR))
    assert torch.equal(image.permute(1, 2, 0), torch.tensor(expected))


def test_all_of_imagenet_is_read(tmp_path: Path) -> None:
    wnids = [f"n{number:08}" for number in range(1000)]
    data = load("imagenet", data_path=tree(tmp_path, wnids), res=2, progress=False)
    assert data.name == "ImageNet-2"
    assert data.class_names == tuple(wnids)
    assert data.train.labels.tolist() == list(range(1000))
    assert torch.equal(data.test.images[:, 0, 0, 0] + 256 * data.test.images[:, 1, 0, 0].int(), data.test.labels)


def renamed(root: Path, names: dict[str, str], splits: Sequence[str] = ("train", "val")) -> Path:
    """Give the class folders other names."""
    for split in splits:
        for old, new in names.items():
            (root / split / old).rename(root / split / new)
    return root


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("form", ["names", "words", "indices", "ranks"])
def test_a_subset_goes_by_names(tmp_path: Path, subset: str, form: str) -> None:
    root, wnids = tree(tmp_path, ids(subset)), ids(subset)
    spelt = {
        "names": list(SUBSETS[subset].values()),
        "words": [name.replace("_", " ").lower() for name in SUBSETS[subset].values()],
        "indices": [str(number) for number in range(10)],
        "ranks": [str(rank) for rank in RANKS[subset]],
    }[form]
    renamed(root, dict(zip(wnids, spelt, strict=True)), ("train",) if form == "names" else ("train", "val"))
    data = load(subset, data_path=root, res=4, progress=False)
    assert data.class_names == tuple(SUBSETS[subset].values())
    assert data.train.images[:, 0, 0, 0].tolist() == data.test.images[:, 0, 0, 0].tolist() == list(range(10))


@pytest.mark.parametrize("form", ["numbers", "words"])
def test_all_of_imagenet_is_read_by_number_or_word(tmp_path: Path, form: str) -> None:
    wnids = imagenet_wnids()
    lines = (resources.files("mtt_fast.data") / "imagenet_classes.tsv").read_text().splitlines()
    words = [line.split("\t")[2].split("; ")[0] for line in lines]
    spelt = " " + " ".join(
        line.split("\t")[2].casefold() + ";" for line in lines
    )  # "Cardigan" is a dog, "cardigan" is none
    words = [word if spelt.count(f" {word.casefold()};") < 2 else wnid for word, wnid in zip(words, wnids, strict=True)]
    root = tree(tmp_path, list(map(str, range(1000))) if form == "numbers" else words)
    data = load("ImageNet", data_path=root, res=2, progress=False)
    assert data.class_names == tuple(wnids)
    for images in (data.train.images, data.test.images):
        assert torch.equal(images[:, 0, 0, 0] + 256 * images[:, 1, 0, 0].int(), torch.arange(1000))
    for subset in SUBSETS:
        images = load(subset, data_path=root, res=2, progress=False).train.images
        assert (images[:, 0, 0, 0] + 256 * images[:, 1, 0, 0].int()).tolist() == RANKS[subset]


def check_refused(root: Path, message: str, dataset: str = "ImageNet", **options: Any) -> None:
    with pytest.raises(InputError, match=message) as raised:
        load(dataset, data_path=root, progress=False, **options)
    assert "\n" not in str(raised.value)
    assert not list(root.glob("packed/*"))


def test_mistakes_are_named(tmp_path: Path) -> None:
    check_refused(tmp_path, r"ImageNet: expected train/WNID/ and val/WNID/")
    check_refused(tmp_path, r"imagemeow: expected train/WNID/.*for 10 of 10 classes", subset="imagemeow")
    check_refused(tmp_path, r"`subset`: expected one of .*'imagenet'; did you mean imagenette", subset="imagenet")
    tree(tmp_path, ids("imagenette")[:-1])
    check_refused(tmp_path, r"for 1 of 10 classes \(n03888257…\)", subset="imagenette")
    check_refused(tmp_path, r"expected ImageNet's 1000 class folders, found 9; give `subset`")
    tree(tmp_path, ids("imagenette"))
    (tmp_path / "val" / "n03888257" / "n03888257_1.JPEG").unlink()
    check_refused(tmp_path, r"expected test images .*found none of 'n03888257'", subset="imagenette")


WNIDS = ("n01443537", "n01629819", "n02085620")


def tiny(root: Path, rearranged: str | None = None) -> Path:
    """Write three classes of Tiny ImageNet: 2 training and 1 validation image each, the second training image grey."""
    root = root / "tiny-imagenet-200"
    for number, wnid in enumerate(WNIDS):
        flat(root / "train" / wnid / "images" / f"{wnid}_0.JPEG", 40 * number, (64, 64))
        flat(root / "train" / wnid / "images" / f"{wnid}_1.JPEG", 40 * number + 20, (64, 64), "L")
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t0\t62\t62\n")
    lines = []
    for number, wnid in reversed(list(enumerate(WNIDS))):
        place = root / "val" / (rearranged.format(wnid) if rearranged else "images")
        flat(place / f"val_{7 - number}.JPEG", 40 * number + 10, (64, 64))
        lines.append(f"val_{7 - number}.JPEG\t{wnid}\t0\t32\t44\t62\n")
    if rearranged:
        (root / "val" / "images").mkdir(exist_ok=True)  # what a rearranging script leaves
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    (root / "test" / "images").mkdir(parents=True)
    (root / "wnids.txt").write_text("\n".join(reversed(WNIDS)) + "\n")
    words = ["n01443537\tgoldfish, Carassius auratus", "n01629819\tcrane, a bird", "n02085620\tcrane, another"]
    (root / "words.txt").write_text("\n".join(words) + "\n")
    return root


def test_subset_folders_that_are_unclear_are_refused(tmp_path: Path) -> None:
    root = tree(tmp_path, [*ids("imagenette"), "tench"])
    check_refused(
        root, r"train: expected one name for each class, found 'n01440764' and 'tench', which both mean", "imagenette"
    )
    renamed(root, {"tench": "other"})
    renamed(root, {"n02102040": "springer spaniel?"}, ("val",))
    check_refused(
        root, r"same classes in training and test images, found 1 in only one of them \(n02102040\)", "imagenette"
    )


def test_unsorted_validation_images_are_explained(tmp_path: Path) -> None:
    root = tree(tmp_path, ids("imagenette"))
    shutil.rmtree(root / "val")
    flat(root / "val" / "ILSVRC2012_val_00000001.JPEG", 1)
    check_refused(root, r"val: expected a folder a class, found ILSVRC2012_val_00000001\.JPEG; move", "imagenette")


@pytest.mark.parametrize("layout", [None, "{}", "{}/images"])
def test_tiny_imagenet_is_read_in_both_layouts(tmp_path: Path, layout: str | None) -> None:
    root = tiny(tmp_path, layout)
    if layout:
        (root / "val" / "val_annotations.txt").unlink()
    data = load("tiny", data_path=tmp_path, progress=False)
    assert (data.name, data.image_shape) == ("Tiny", (3, 64, 64))
    assert data.class_names == ("goldfish", "n01629819", "n02085620"), "a word that two classes share names neither"
    assert data.train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert data.test.labels.tolist() == [0, 1, 2]
    assert data.test.images[:, 0].float().mean((1, 2)).tolist() == pytest.approx([10, 50, 90], abs=2)
    assert data.train.images[:, 0].float().mean((1, 2)).tolist() == pytest.approx([0, 20, 40, 60, 80, 100], abs=2)
    grey = data.train.images[1::2]
    assert torch.equal(grey[:, 0], grey[:, 2])
    assert data.mean == (0.485, 0.456, 0.406)
    assert load("Tiny", data_path=root, progress=False).fingerprint == data.fingerprint, "the folder itself will do"


def test_tiny_imagenet_is_resized(tmp_path: Path) -> None:
    tiny(tmp_path)
    data = load("Tiny", data_path=tmp_path, res=32, progress=False)
    assert (data.name, data.image_shape) == ("Tiny-32", (3, 32, 32))


@pytest.mark.parametrize("names", [("goldfish", "European_fire_salamander", "chihuahua"), ("0", "1", "24")])
def test_tiny_imagenet_is_read_by_words_or_numbers(tmp_path: Path, names: tuple[str, ...]) -> None:
    expected = load("Tiny", data_path=tiny(tmp_path / "a", "{}"), progress=False)
    root = tiny(tmp_path / "b", "{}")
    renamed(root, dict(zip(WNIDS, names, strict=True)))
    assert load("Tiny", data_path=root, progress=False).fingerprint == expected.fingerprint


def test_corrected_annotations_are_read_again(tmp_path: Path) -> None:
    """Move one image to the next class, which leaves all images, class after class, in the same order."""
    root = tiny(tmp_path)
    images, annotations = root / "val" / "images", root / "val" / "val_annotations.txt"
    flat(images / "val_6b.JPEG", 1, (64, 64))
    lines = annotations.read_text().splitlines(keepends=True)  # of the classes 2, 1, 0
    for wnid, expected in ((WNIDS[0], [0, 0, 1, 2]), (WNIDS[1], [0, 1, 1, 2])):
        annotations.write_text(f"{lines[0]}{lines[2]}val_6b.JPEG\t{wnid}\n{lines[1]}")
        assert load("Tiny", data_path=tmp_path, progress=False).test.labels.tolist() == expected


def test_annotations_that_do_not_fit_are_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    annotations = tiny(tmp_path) / "val" / "val_annotations.txt"
    whole = annotations.read_text()
    first = whole.splitlines()[0]
    cases = {
        whole + first + "\n": "line 4: expected each image once, found val_5.JPEG again",
        whole + first.replace("n02085620", "n01443537") + "\n": "line 4: expected each image once",
        whole.replace("val_7", "../../train/n01443537/images/n01443537_0"): "line 3: expected an image and its class",
        whole.replace("val_7.JPEG", "notes.txt"): "line 3: expected an image and its class",
        whole.replace("val_7", "val_\0"): r"val_annotations\.txt: expected text",
        whole + "x" * 20_000: r"val_annotations\.txt: expected text",
        whole + "\n\n": "line 4: expected an image and its class in train/, found ''",
    }
    for text, message in cases.items():
        annotations.write_text(text)
        check_refused(tmp_path, message, "Tiny")
    annotations.write_bytes(b"\xef\xbb\xbf" + whole.replace("\n", "\r\n").encode())
    flat(annotations.parent / "images" / "val_0.JPEG", 3, (64, 64))
    with caplog.at_level(logging.INFO):
        assert load("Tiny", data_path=tmp_path, progress=False).test.labels.tolist() == [0, 1, 2]
    assert "skipped besides the images: 3 .txt, 1 images that val_annotations.txt does not name" in caplog.text


@pytest.mark.parametrize("name", ["wnids.txt", "words.txt", "val/val_annotations.txt"])
@pytest.mark.parametrize("kind", ["fifo", "folder", "device", "large"])
def test_files_that_are_no_text_are_refused(tmp_path: Path, name: str, kind: str) -> None:
    path = tiny(tmp_path) / name
    path.unlink()
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "device":
            path.symlink_to("/dev/zero")
        case "large":
            with open(path, "wb") as file:
                file.truncate(1 << 40)
    check_refused(tmp_path, rf"{name}: expected (a file, found a|at most)", "Tiny")


def test_mistakes_in_tiny_imagenet_are_named(tmp_path: Path) -> None:
    check_refused(tmp_path, r"Tiny: expected tiny-imagenet-200/.*tiny-imagenet-200\.zip", "Tiny")
    root = tiny(tmp_path)
    annotations = root / "val" / "val_annotations.txt"
    whole = annotations.read_text()
    annotations.write_text(whole + "val_9.JPEG\tn99999999\t0\n")
    check_refused(tmp_path, r"val_annotations\.txt: line 4: .*n99999999", "Tiny")
    annotations.write_text(whole + "nonsense\n")
    check_refused(tmp_path, r"line 4: expected an image and its class", "Tiny")
    annotations.write_text(whole.replace("val_7", "val_8"))
    check_refused(tmp_path, r"val_8\.JPEG: cannot be read", "Tiny")
    annotations.write_text(whole.splitlines()[0] + "\n")
    check_refused(tmp_path, r"expected test images .*found none of 'n01443537'", "Tiny")
    annotations.unlink()
    check_refused(tmp_path, r"val: expected the names of the data set's 200 classes, .* found 'images'", "Tiny")
    annotations.write_bytes(b"\xff\xfe\x00")
    check_refused(tmp_path, r"val_annotations\.txt: expected text", "Tiny")
    (root / "wnids.txt").write_text("n01443537\n")
    check_refused(tmp_path, r"expected the classes of wnids\.txt, found 2 in only one of them", "Tiny")
