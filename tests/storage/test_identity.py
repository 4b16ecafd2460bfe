"""Test the identity of images: a difference is reported in the user's words, and an allowed one needs its option."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from mtt_fast import Whitening
from mtt_fast.data import from_tensors, load
from mtt_fast.data.catalogue import dataset_info
from mtt_fast.data.whitening import check_same_whitening
from mtt_fast.errors import InputError
from mtt_fast.storage.identity import UNKNOWN, DatasetIdentity, check_same_data, describe_other_data

PETS = DatasetIdentity("pets", ("cat", "dog"), (3, 8, 8), (0.5, 0.4, 0.3), (0.2, 0.2, 0.2), "none", "f00d")
OTHER = replace(PETS, fingerprint="beef")


def test_a_record_comes_back() -> None:
    assert DatasetIdentity.from_record(json.loads(json.dumps(PETS.record()))) == PETS
    for broken in (
        {"colour": "red"}, {"name": 5}, {"mean": "x"}, {"class_names": [1]}, {"class_names": "cat"}, {"image_shape": None},
    ):  # fmt: skip
        with pytest.raises(TypeError):
            DatasetIdentity.from_record(broken)


def test_it_is_made_of_real_images(tmp_path_factory: pytest.TempPathFactory) -> None:
    data = load("digits", data_path=tmp_path_factory.mktemp("data"), progress=False)
    identity = data.identity(zca=True)
    assert (identity.name, identity.class_names, identity.image_shape) == ("digits", tuple("0123456789"), (1, 8, 8))
    assert (identity.whitening, identity.fingerprint, identity.mean) == ("zca", data.fingerprint, data.mean)
    check_same_data(identity, dataset_info("digits").identity(zca=True), "here")  # as far as it is known beforehand
    with pytest.raises(InputError, match="another data set: expected digits, found MNIST"):
        check_same_data(dataset_info("MNIST").identity(zca=False), data.identity(zca=False), "here")


@pytest.mark.parametrize(
    "found",
    [
        PETS,
        UNKNOWN,
        replace(PETS, name="renamed", class_names=("a", "b")),  # the same content, whatever it is called
        replace(PETS, fingerprint="", class_names=(), mean=()),
        replace(PETS, fingerprint="", mean=(0.5, 0.4, 0.3 + 1e-7)),
    ],
)
def test_the_same_images_pass(found: DatasetIdentity) -> None:
    check_same_data(found, PETS, "here")
    check_same_data(PETS, found, "here")


@pytest.mark.parametrize(
    ("found", "message", "deliberate"),
    [
        (replace(OTHER, name="toys"), "made from another data set: expected pets, found toys; give the `dataset`", True),
        (replace(OTHER, name="toys", image_shape=(1, 8, 8)), "made from another data set: expected pets, found toys", False),
        (replace(OTHER, image_shape=(3, 9, 9)), "images of another size: expected 3×8×8, found 3×9×9", False),
        (replace(OTHER, class_names=("cat",)), "another number of classes: expected 2, found 1", False),
        (replace(OTHER, class_names=("dog", "cat")), "the classes in another order: expected 'cat' as class 0, found 'dog'", False),
        (replace(OTHER, class_names=("cat", "fox")), "other classes: expected 'dog' as class 1, found 'fox'", False),
        (replace(PETS, whitening="zca"), "whitened in another way: expected normalised images, found ZCA-whitened images; give `zca`", False),
        (replace(OTHER, fingerprint="", mean=(0.1, 0.4, 0.3)), "normalised by another mean: expected 0.5, 0.4, 0.3, found 0.1, 0.4, 0.3", True),
        (OTHER, "made from other images: expected pets with fingerprint f00d, found pets with fingerprint beef", True),
        (replace(OTHER, fingerprint="", std=(1.0, 1.0, 1.0)), "normalised by another std", True),
        (replace(OTHER, fingerprint="", mean=(0.5,)), "normalised by another mean: expected 0.5, 0.4, 0.3, found 0.5; ", True),
        (replace(OTHER, fingerprint="", mean=(0.5002, 0.4, 0.3)), "normalised by another mean: expected 0.5, 0.4, 0.3, found 0.5002, ", True),
    ],
)  # fmt: skip
def test_what_differs_is_told(found: DatasetIdentity, message: str, deliberate: bool) -> None:
    def problem(**how: str | bool) -> str:
        with pytest.raises(InputError) as raised:
            check_same_data(found, PETS, "set.safetensors", **how)  # type: ignore[arg-type]
        assert "\n" not in str(raised.value)
        return str(raised.value)

    assert f"set.safetensors: {message}" in problem()
    assert "other_data" not in problem()
    assert problem(fix="go away").endswith("; go away")
    assert ("or give `other_data` to use it with these" in problem(other_data=False)) == deliberate
    if not deliberate:
        assert f"set.safetensors: {message.partition(': ')[0]}" in problem(other_data=True)
        return
    check_same_data(found, PETS, "set.safetensors", other_data=True)
    told = describe_other_data(found, PETS)
    assert told.startswith(message.partition(":")[0])
    assert told.endswith("as other data are allowed")


def test_images_without_fingerprints_are_compared_by_what_is_known() -> None:
    with pytest.raises(InputError, match="made from another data set: expected pets, found toys"):
        check_same_data(replace(OTHER, name="toys", fingerprint=""), replace(PETS, fingerprint=""), "here")


def test_an_allowed_difference_is_told_for_the_log() -> None:
    told = "made from another data set: toys, used with pets, as other data are allowed"
    assert describe_other_data(replace(OTHER, name="toys"), PETS) == told
    assert describe_other_data(PETS, PETS) == ""


def test_whitened_images_are_the_same_whatever_they_would_be_normalised_by() -> None:
    whitened = replace(PETS, whitening="zca", fingerprint="")
    check_same_data(replace(whitened, mean=(0.1, 0.2, 0.3), std=(0.3, 0.3, 0.3)), whitened, "here")


def test_other_images_that_are_whitened_are_no_others_that_are_normalised() -> None:
    with pytest.raises(InputError, match=r"made from another data set: expected pets, found toys; .* made from$"):
        check_same_data(replace(OTHER, name="toys", whitening="zca"), PETS, "here", other_data=False)
    with pytest.raises(InputError, match="whitened in another way"):
        check_same_data(replace(OTHER, name="toys", whitening="zca"), PETS, "here", other_data=True)


def test_a_whitening_is_the_same_up_to_rounding() -> None:
    images = torch.rand(50, 1, 4, 4)
    fitted = Whitening.fit(images)
    noise = 1e-5 * torch.randn_like(fitted.matrix)
    check_same_whitening(Whitening(fitted.mean, fitted.matrix + noise, fitted.inverse), fitted, "here")
    for other in (Whitening.fit(images, eps=0.01), Whitening.fit(images[:25]), Whitening.fit(torch.rand(9, 1, 3, 3))):
        with pytest.raises(InputError, match=r"set\.safetensors: whitened in another way: .* give `other_data`"):
            check_same_whitening(other, fitted, "set.safetensors")
    for name in ("mean", "matrix"):  # either alone: brighter images have another mean and the same matrix
        other = replace(fitted, **{name: 1.01 * getattr(fitted, name)})
        with pytest.raises(InputError, match=f"whitened in another way: .* found another {name}"):
            check_same_whitening(other, fitted, "set.safetensors")


def test_statistics_do_not_depend_on_the_order_of_a_sum() -> None:
    """Check numbers that go into the fingerprint, which has to be the same on every machine."""
    images = torch.randint(0, 256, (64, 3, 8, 8), dtype=torch.uint8)
    labels = torch.arange(64) % 4
    one, other = (from_tensors((images[:, c], labels), (images[:, c], labels)) for c in ([0, 1, 2], [2, 1, 0]))
    assert one.mean == other.mean[::-1]
    assert one.std == other.std[::-1]
    exact = images[:, 0].long()
    count, total, squares = exact.numel(), int(exact.sum()), int((exact**2).sum())
    assert one.mean[0] == total / (255 * count)
    assert one.std[0] == ((count * squares - total**2) / (255 * count) ** 2) ** 0.5
