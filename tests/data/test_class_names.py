"""Test the classes that names mean: official orders, spellings, WordNet ids, numbers; and names that are refused."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

import pytest
import torch

from mtt_fast.data.class_lists import CIFAR10, CIFAR100, FASHION_MNIST, MNIST, SUBSETS
from mtt_fast.data.class_names import class_indices, imagenet_wnids, in_order, relabelled, tiny_wnids
from mtt_fast.errors import InputError

KNOWN: dict[str, Sequence[str]] = {
    "CIFAR10": CIFAR10,
    "CIFAR100": CIFAR100,
    "MNIST": MNIST,
    "FashionMNIST": FASHION_MNIST,
    "Tiny": tiny_wnids(),
    "ImageNet": imagenet_wnids(),
    **{subset: list(names.values()) for subset, names in SUBSETS.items()},
}


def test_the_tables_are_whole() -> None:
    assert [len(set(names)) for names in KNOWN.values()] == [10, 100, 10, 10, 200, 1000] + [10] * 11
    assert list(CIFAR100) == sorted(CIFAR100)
    assert imagenet_wnids() == sorted(imagenet_wnids())
    assert set(tiny_wnids()) < set(imagenet_wnids())
    assert {wnid for subset in SUBSETS.values() for wnid in subset} < set(imagenet_wnids())


@pytest.mark.parametrize("dataset", KNOWN)
@pytest.mark.parametrize(
    "spell",
    [
        str,
        str.upper,
        lambda name: name.replace("_", " ").replace("/", "-"),
        lambda name: re.sub(r"\W|_", "", name),
    ],
    ids=["as it is", "upper", "spaces", "joined"],
)
def test_every_name_of_every_data_set_in_any_order(dataset: str, spell: object) -> None:
    names = KNOWN[dataset]
    order = random.Random(1).sample(range(len(names)), len(names))
    assert class_indices([spell(names[i]) for i in order], names, "x") == order  # type: ignore[operator]
    numbered = [f"{i:03d}-{names[i]}" for i in order]  # as `write_image_folder` calls them
    assert class_indices(numbered, names, "x") == order


@pytest.mark.parametrize("dataset", KNOWN)
@pytest.mark.parametrize("form", ["{}", "{:05d}", "class_{}", "new{:03d}", "Class {}"])
def test_numbers_are_indices_not_ranks_of_text(dataset: str, form: str) -> None:
    names = KNOWN[dataset]
    assert class_indices(sorted(form.format(i) for i in range(len(names))), names, "x") == sorted(
        range(len(names)), key=form.format
    )


@pytest.mark.parametrize("subset", SUBSETS)
def test_a_subset_goes_by_wordnet_ids_words_and_ranks(subset: str) -> None:
    names, wnids = list(SUBSETS[subset].values()), list(SUBSETS[subset])
    assert class_indices(sorted(wnids), names, "x") == [wnids.index(wnid) for wnid in sorted(wnids)]
    assert class_indices([f"{wnid}-{name}" for wnid, name in SUBSETS[subset].items()], names, "x") == list(range(10))
    ranks = [str(imagenet_wnids().index(wnid)) for wnid in wnids]
    assert class_indices(sorted(ranks), names, "x") == [ranks.index(rank) for rank in sorted(ranks)]
    assert class_indices(wnids, wnids, "x") == list(range(10)), "a folder of one's own, called by ids"
    assert class_indices(names, wnids, "x") == list(range(10))


@pytest.mark.parametrize(
    ("dataset", "name", "expected"),
    [
        ("CIFAR10", ["plane", "car", "Aeroplane "][:2], ["airplane", "automobile"]),
        ("CIFAR10", ["aeroplane", "03_cat", "SHIP"], ["airplane", "cat", "ship"]),
        ("CIFAR100", ["cra", "maple", "Aquarium Fish"], ["crab", "maple_tree", "aquarium_fish"]),
        ("MNIST", ["0 - zero", "three", "07"], ["0", "3", "7"]),
        ("FashionMNIST", ["T-shirt", "ankle_boot", "Trousers"], ["T-shirt/top", "Ankle boot", "Trouser"]),
        ("imagenette", ["tench, Tinca tinca", "chainsaw", "petrol pump"], ["tench", "chain_saw", "gas_pump"]),
        ("imagewoof", ["Samoyede", "bobtail", "Shih Tzu"], ["Samoyed", "Old_English_sheepdog", "Shih-Tzu"]),
        ("Tiny", ["goldfish", "n01629819", "alp"], ["n01443537", "n01629819", "n09193705"]),
        ("ImageNet", ["tench", "great white shark"], ["n01440764", "n01484850"]),
    ],
)
def test_a_class_is_known_by_each_of_its_spellings(dataset: str, name: list[str], expected: list[str]) -> None:
    names = KNOWN[dataset]
    assert [names[i] for i in class_indices(name, names, "x")] == expected


@pytest.mark.parametrize(
    ("dataset", "folders", "message"),
    [
        ("CIFAR10", ["cat", "doge"], r"here: expected the names .* found 'doge' \(nearest: dog, .*\); rename it"),
        ("CIFAR10", ["cat", "zebra!"], r"found 'zebra!' \(the classes are airplane, automobile"),
        ("CIFAR10", ["plane", "airplane"], "'plane' and 'airplane', which both mean 'airplane'; merge them"),
        ("CIFAR10", ["1", "01"], "both mean 'automobile'"),
        ("CIFAR10", [str(i) for i in range(1, 11)], "or numbers from 0 to 9, found '1'"),
        ("CIFAR10", ["-1"], "found '-1'"),
        ("CIFAR10", ["cat", "3"], "found '3'"),
        ("MNIST", ["3 - 2"], "found '3 - 2'"),
        ("CIFAR10", ["9" * 400], "expected the names"),
        ("CIFAR10", ["1-" * 2000 + "cat"], "expected the names"),
        ("CIFAR10", [""], "expected the names"),
        ("CIFAR10", ["²"], "expected the names"),
        ("CIFAR10", ["a\nb"], "expected the names"),
        ("ImageNet", ["crane"], r"found 'crane' \(which may be n02012849 or n03126707\)"),  # the bird, or the machine
        ("imagesquawk", ["9"], "found 9, which may be both"),  # the tenth class, or ImageNet's ostrich
    ],
)
def test_what_means_no_class_is_refused_in_a_line(dataset: str, folders: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        class_indices(folders, KNOWN[dataset], "here")
    assert "\n" not in str(raised.value)


def test_folders_are_matched_to_class_names_of_the_user() -> None:
    assert class_indices(["dog", "Cat"], ["cat", "dog"], "x") == [1, 0]
    assert class_indices(["C", "c"], ["c", "C"], "x") == [1, 0], "as they are, before all other spellings"
    assert class_indices(["1", "0"], ["cat", "dog"], "x") == [1, 0]
    assert class_indices(["2", "10"], ["1", "2", "10"], "x") == [1, 2], "names that are numbers are names"
    assert class_indices(["class_02"], ["class_1", "class_2"], "x") == [1]
    for folders, names in ((["0"], ["1", "2"]), (["a-b"], ["ab", "a_b"]), (["cat1", "cat0"], ["cat", "dog"])):
        with pytest.raises(InputError, match="expected the names"):
            class_indices(folders, names, "x")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["10", "2", "1"], ["1", "2", "10"]),
        (["c10", "c9"], ["c9", "c10"]),
        (["10", "2", "x"], ["10", "2", "x"]),
        (["a10", "b9"], ["a10", "b9"]),
        (["01", "1", "0"], ["0", "01", "1"]),
        (["n02", "n01"], ["n01", "n02"]),
    ],
)
def test_folders_are_ordered_by_number_where_they_are_numbered(names: list[str], expected: list[str]) -> None:
    assert in_order(names) == expected


def test_labels_follow_their_classes() -> None:
    assert relabelled(torch.tensor([0, 2, 1]), [4, 0, 2], 5, "x").tolist() == [4, 2, 0]
    soft = torch.tensor([[0.1, 0.2, 0.7]])
    assert relabelled(soft, [2, 0, 1], 3, "x").tolist() == [pytest.approx([0.2, 0.7, 0.1])]
    for labels, message in ((torch.tensor([3]), r"labels in \[0, 3\)"), (torch.ones(2, 4), "soft labels of")):
        with pytest.raises(InputError, match=message):
            relabelled(labels, [2, 0, 1], 3, "x")
