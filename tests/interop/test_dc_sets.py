"""Test the results of DC and the folders of DC-benchmark: read, written, and refused where they are none."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mtt_fast import InputError
from mtt_fast.interop import (
    TensorSet,
    as_tensor_set,
    read_set,
    set_kind_of,
    write_set,
)
from tests.interop.helpers import CLASSES, IPC, N, assert_same, distilled


def as_dc_saves(path: Path) -> list[list[Tensor]]:
    """Write a file as main.py of DC and main_DM.py write it: numpy's numbers among the accuracies, several experiments."""
    data_save = [[torch.randn(N, 3, 4, 4), torch.arange(CLASSES).repeat_interleave(IPC)] for _ in range(2)]
    accuracy = np.sum(np.equal([1, 2, 2], [1, 2, 3])) / 3
    torch.save({"data": data_save, "accs_all_exps": {"ConvNet": [accuracy, np.float32(accuracy)]}}, path)
    return data_save


def test_results_of_dc_are_read(tmp_path: Path) -> None:
    data = as_dc_saves(tmp_path / "res_DM_CIFAR10_ConvNet_2ipc.pt")
    distilled = read_set(tmp_path)
    assert_same(distilled, TensorSet(data[-1][0], data[-1][1], None, "indices"))


def test_results_that_numpy_1_wrote_are_read(tmp_path: Path) -> None:
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
def test_folders_of_dc_benchmark_come_back(tmp_path: Path, method: str) -> None:
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
        read_back = read_set(source, "dc_benchmark")
        assert torch.equal(read_back.images, synthetic.images)
        assert torch.equal(read_back.labels, synthetic.labels)
    with pytest.raises(InputError, match="holds a set already"):
        write_set(tmp_path, synthetic, "dc_benchmark", method=method)


@pytest.mark.parametrize("given", ["pets", "data/pets", "../elsewhere/pets/"])
@pytest.mark.parametrize(
    ("kind", "file"), [("dc", "res_TM_pets_ConvNet_2ipc.pt"), ("dc_benchmark", "TM/pets/IPC2/images_best.pt")]
)
def test_the_path_of_an_image_folder_leads_no_file_out_of_the_destination(
    kind: str, file: str, given: str, tmp_path: Path
) -> None:
    for number, path in enumerate((given, str(tmp_path / given))):
        root = tmp_path / "to" / str(number)
        by_recipe = distilled(recipe={"dataset": path}).export(kind, root / "recipe")
        by_name = write_set(root / "name", as_tensor_set(distilled()), kind, dataset=path)
        assert by_recipe[0] == root / "recipe" / file
        assert by_name[0] == root / "name" / file
    assert [path.name for path in tmp_path.iterdir()] == ["to"]


def test_tiny_imagenet_at_fifty_is_in_five_parts(tmp_path: Path) -> None:
    labels = torch.arange(2).repeat_interleave(50)
    synthetic = distilled(images=torch.randn(100, 3, 16, 16), labels=labels, recipe={"dataset": "Tiny"})
    files = synthetic.export("dc_benchmark", tmp_path)
    assert max(file.stat().st_size for file in files) < 100_000  # none holds what is in the others
    assert {file.name for file in files} == {f"{name}_best_{k}.pt" for name in ("images", "labels") for k in range(5)}
    images = [torch.load(tmp_path / f"TM/tinyimagenet/IPC50/images_best_{k}.pt", weights_only=True) for k in range(5)]
    assert torch.equal(torch.cat(images), synthetic.images)  # as its TMDataLoader puts them together
    assert torch.equal(read_set(tmp_path).images, synthetic.images)
    (file,) = write_set(tmp_path / "deeper", synthetic, "dc_benchmark", method="DC")
    assert file.name == "res_DC_tinyimagenet_ConvNetD4_50ipc.pt"


def test_random_kmeans_and_kip_of_dc_benchmark_are_read(tmp_path: Path) -> None:
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
    np.savez(kip / "kip_cifar10_ConvNet3_ssize6.npz", images=images.permute(0, 2, 3, 1).numpy(), labels=labels.numpy())
    with pytest.raises(InputError, match=r"expected images \(n, H, W, C\) and finite labels \(n, classes\), found"):
        read_set(kip)
    with pytest.raises(InputError, match="expected one set in METHOD/DATASET/IPCn, found random/CIFAR10/IPC2, KIP"):
        read_set(tmp_path)
    with pytest.raises(InputError, match="`method` KIP: expected TM, DC, DSA, DM, random, Kmeans"):
        write_set(tmp_path, distilled(), "dc_benchmark", method="KIP")


def test_of_several_files_one_is_to_be_named(tmp_path: Path) -> None:
    (tmp_path / "IPC2").mkdir()
    for folder, kind in ((tmp_path, "dc"), (tmp_path / "IPC2", "dc_benchmark")):
        for name in ("a", "b"):
            as_dc_saves(folder / f"res_{name}.pt")
        with pytest.raises(InputError, match=r"expected one res_\*\.pt, found 2; name the file"):
            read_set(folder, kind)
    with pytest.raises(InputError, match=r"expected one \*\.parquet, found 0; name the file"):
        read_set(tmp_path, "parquet")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"other": 1}, "found a dictionary with other"),
        ([1], r"found \[1\]"),
        ({"data": []}, "expected a dictionary with data"),
    ],
)
def test_files_that_are_no_result_of_dc_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "res_x.pt")
    with pytest.raises(InputError, match=message):
        read_set(tmp_path / "res_x.pt")
