"""Check that a job can use the experts: a difference is reported with the expert's file, and equal experts pass."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mtt_fast import ConvNet, TrajectoryStore
from mtt_fast.distill.options import DistillOptions
from mtt_fast.errors import InputError
from mtt_fast.networks.by_name import full_name, network_by_name, short_name
from mtt_fast.storage.expert_checks import (
    CommonTraining,
    check_alike,
    check_as_requested,
    check_belongs,
    check_long_enough,
    check_one_kind,
    describe_other_training,
    with_training_of,
)
from mtt_fast.storage.expert_metadata import ExpertMetadata
from mtt_fast.storage.identity import DatasetIdentity
from mtt_fast.storage.trajectories import write_expert
from mtt_fast.training.experts import ExpertTraining

SHAPE = (3, 16, 16)
NET = network_by_name("ConvNetD1W4", SHAPE, 2)
DATA = DatasetIdentity("pets", ("cat", "dog"), SHAPE, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), "none", "f00d")
TRAINED: dict[str, Any] = {
    "train_epochs": 3, "lr": 0.01, "mom": 0.0, "l2": 0.0, "decay": False, "batch_size": 256, "augment": "flip",
    "rho_max": 0.0, "rho_min": 0.0, "alpha": 0.0, "adaptive": False,
}  # fmt: skip


def metadata_for(model: str = "ConvNetD1W4", identity: DatasetIdentity = DATA, **changes: Any) -> ExpertMetadata:
    network = network_by_name(model, SHAPE, 2)
    return ExpertMetadata.of(
        network, identity, hyperparameters=TRAINED | changes, seed=7, accuracy=[0.5] * 4, versions={}, precision="fp32"
    )


def store_of(folder: Path, *experts: ExpertMetadata) -> TrajectoryStore:
    for index, metadata in enumerate(experts):
        size = sum(int(torch.tensor([int(side) for side in entry.rpartition(":")[2].split("x")]).prod())
                   for entry in metadata.layout.split(";"))  # fmt: skip
        write_expert(folder, index, torch.randn(4, size), metadata)
    return TrajectoryStore(folder)


def test_an_expert_of_the_same_setting_passes(tmp_path: Path) -> None:
    store = store_of(tmp_path, metadata_for())
    assert store.metadata(0).identity == DATA
    check_belongs(store, 0, NET, DATA)
    check_belongs(store, 0, network_by_name("ConvNetD1W4ARINAP", SHAPE, 2), replace(DATA, name="renamed"))
    check_long_enough(store, 0, 3)
    check_one_kind(store)


def test_a_network_that_does_not_tell_is_compared_by_its_layout(tmp_path: Path) -> None:
    store = store_of(tmp_path, replace(metadata_for(), network={}), metadata_for())
    check_belongs(store, 0, NET, DATA)
    check_one_kind(store)
    layout = NET.layout.describe()
    shorter = store_of(tmp_path / "shorter", replace(metadata_for(), layout=layout.rpartition(";")[0]))
    count = len(layout.split(";"))
    with pytest.raises(
        InputError, match=f"another network: expected {count} parameter tensors, found {count - 1}; give"
    ):
        check_belongs(shorter, 0, NET, DATA)


@pytest.mark.parametrize(
    ("expert", "reason"),
    [
        (metadata_for("ConvNetD1W8"), r"another network: expected features\.0\.weight:4x3x3x3, found features\.0\.weight:8x3x3x3; .*`model`"),
        (metadata_for("ConvNetD1W4NN"), "another network: expected features"),
        (metadata_for("ConvNetD1W4BN"), "another network: expected ConvNetD1W4ARINAP, found ConvNetD1W4ARBNAP"),
        (metadata_for("ConvNetD1W4AS"), "another network: expected ConvNetD1W4ARINAP, found ConvNetD1W4ASINAP"),
        (metadata_for("ConvNetD1W4MP"), "another network: expected ConvNetD1W4ARINAP, found ConvNetD1W4ARINMP"),
        (metadata_for(identity=replace(DATA, name="toys", fingerprint="beef")), "made from another data set: expected pets, found toys; .*`data_path`"),
        (metadata_for(identity=replace(DATA, image_shape=(3, 17, 17), fingerprint="beef")), "images of another size: expected 3×16×16, found 3×17×17"),
        (metadata_for(identity=replace(DATA, class_names=("dog", "cat"), fingerprint="beef")), "the classes in another order: expected 'cat' as class 0, found 'dog'"),
        (metadata_for(identity=replace(DATA, whitening="zca")), "whitened in another way: expected normalised images, found ZCA-whitened images; give `zca`"),
        (metadata_for(identity=replace(DATA, fingerprint="beef")), "made from other images: expected pets with fingerprint f00d, found pets with fingerprint beef; .*`data_path`"),
    ],
)  # fmt: skip
def test_an_expert_of_another_setting_is_refused(tmp_path: Path, expert: ExpertMetadata, reason: str) -> None:
    store = store_of(tmp_path, metadata_for(), expert)
    with pytest.raises(InputError, match=rf"^{re.escape(str(store.path(1)))}: .*{reason}"):
        check_belongs(store, 1, NET, DATA)
    difference, mend = reason.partition(";")[0], r"; keep those of one (network|data set) in the folder$"
    with pytest.raises(InputError, match=rf"^{re.escape(str(store.path(1)))}: .*{difference}.*{mend}"):
        check_one_kind(store)


def test_epochs_beyond_the_recorded_ones_are_refused_with_the_flags(tmp_path: Path) -> None:
    flags = "`max_start_epoch` and `expert_epochs` reach epoch 4, but the expert ends at epoch 3; .*`train_epochs` 4"
    with pytest.raises(InputError, match=flags):
        check_long_enough(store_of(tmp_path, metadata_for()), 0, 4)


@pytest.mark.parametrize(
    ("asked", "to_the_end", "problem"),
    [
        ({}, True, ""),
        ({"lr": 0.01, "mom": 0.0}, True, ""),
        ({"train_epochs": 2}, False, ""),  # the longer one goes the same way
        ({"train_epochs": 2}, True, "trained with train_epochs 3, not 2; choose another `buffer_path`, or give `train_epochs` 3"),
        ({"lr": 0.5, "mom": 0.9, "l2": 0.1}, False, "trained with lr 0.01, not 0.5; .* give `expert_lr` 0.01 `mom` 0.0 `l2` 0.0 to"),
        ({"decay": True}, False, "trained with decay False, not True; .* give `decay` False to"),
        ({"batch_size": 64}, False, "trained with batch_size 256, not 64; .* give `batch_real` 256"),
        ({"rho_max": 0.1}, False, "trained with rho_max 0.0, not 0.1"),
    ],
)  # fmt: skip
def test_experts_that_were_trained_otherwise_are_refused(
    tmp_path: Path, asked: dict[str, Any], to_the_end: bool, problem: str
) -> None:
    store = store_of(tmp_path, metadata_for())
    if not problem:
        return check_as_requested(store, 0, asked, to_the_end=to_the_end)
    with pytest.raises(InputError, match=rf"expert_0000\.safetensors: {problem}"):
        check_as_requested(store, 0, asked, to_the_end=to_the_end)


def test_the_number_of_epochs_counts_where_the_rate_decays(tmp_path: Path) -> None:
    store = store_of(tmp_path, metadata_for(decay=True))
    with pytest.raises(InputError, match="trained with train_epochs 3, not 2"):
        check_as_requested(store, 0, {"train_epochs": 2}, to_the_end=False)


LATER: dict[str, Any] = {"rho_max": 0.1, "rho_min": 0.2, "alpha": 0.3, "adaptive": True, "sort_method": "sha256:f00d"}
"""Hyperparameters that the first experts do not record, with values that they do not have."""


def test_the_first_experts_are_those_of_plain_sgd_on_all_images(tmp_path: Path) -> None:
    few = {name: value for name, value in TRAINED.items() if name not in LATER}
    store = store_of(tmp_path, replace(metadata_for(), hyperparameters=few), metadata_for(), metadata_for(**LATER))
    check_alike(store, range(2), to_the_end=True)
    check_alike(store, (1, 0), to_the_end=True)
    CommonTraining(NET, DATA, TRAINED, 7, torch.float32, "fp32").check(store, 0)
    for name, value in LATER.items():
        plain = None if name == "sort_method" else TRAINED[name]
        with pytest.raises(InputError, match=f"trained with {name} {plain}, not {value}"):
            CommonTraining(NET, DATA, TRAINED | {name: value}, 7, torch.float32, "fp32").check(store, 0)
        if name in TRAINED:
            with pytest.raises(
                InputError, match=f"trained with {name} {value}, not {plain}; .* give `{name}` {value} to"
            ):
                check_as_requested(store, 2, {name: plain}, to_the_end=False)
    without = {name: value for name, value in LATER.items() if name != "sort_method"}
    with pytest.raises(InputError, match=r"trained with sort_method sha256:f00d, not None"):
        CommonTraining(NET, DATA, few | without, 7, torch.float32, "fp32").check(store, 2)


def test_a_run_records_the_hyperparameters_of_its_experts() -> None:
    given = DistillOptions()
    trained: dict[str, Any] = {
        "train_epochs": 3, "lr": 0.5, "mom": 0.6, "l2": 0.7, "decay": True, "batch_size": 64, "rho_max": 0.1,
        "rho_min": 0.2, "alpha": 0.3, "adaptive": True, "augment": "flip",
    }  # fmt: skip
    renamed = {"lr": "expert_lr", "batch_size": "batch_real"}
    options = with_training_of(given, given.experts().record(), metadata_for(**trained))
    del trained["augment"]  # which the student shares
    assert options == replace(given, **{renamed.get(name, name): value for name, value in trained.items()})
    used = with_training_of(ExpertTraining(), ExpertTraining().record(), metadata_for(mom=0.5, lr=0.5))
    assert (used.mom, used.lr) == (0.5, 0.01)  # these options have no `expert_lr`
    assert with_training_of(given, given.experts().record(), replace(metadata_for(), hyperparameters={})) == given


def test_what_experts_were_trained_with_otherwise_is_told() -> None:
    expert = metadata_for(lr=0.5, train_epochs=9, augment="none")  # a remark of its own tells the augmentation
    assert (
        describe_other_training(expert, TRAINED, to_the_end=False)
        == "used as they are, trained with --expert_lr 0.5 (not 0.01)"
    )
    told = "used as they are, trained with --train_epochs 9 (not 3), --expert_lr 0.5 (not 0.01)"
    assert describe_other_training(expert, TRAINED, to_the_end=True) == told
    assert describe_other_training(metadata_for(), TRAINED, to_the_end=True) == ""
    imported = replace(metadata_for(), hyperparameters={"imported_from": "replay_buffer_0.pt, expert 0"})
    assert describe_other_training(imported, TRAINED, to_the_end=True) == ""


def test_experts_of_other_software_are_not_compared(tmp_path: Path) -> None:
    imported = replace(metadata_for(), hyperparameters={"imported_from": "replay_buffer_0.pt, expert 0"})
    store = store_of(tmp_path, imported, metadata_for(lr=0.5), imported)
    check_as_requested(store, 0, {"lr": 0.9}, to_the_end=True)
    check_alike(store, range(3), to_the_end=True)
    check_alike(store, (1, 2), to_the_end=True)
    with pytest.raises(InputError, match=r"expert_0000\.safetensors: was imported"):
        CommonTraining(NET, DATA, TRAINED, 7, torch.float32, "fp32").check(store, 0)


@pytest.mark.parametrize("hyperparameters", [{"lr": 1e-3}, {"lr": 1e-3, "optimizer": "AdamW", "train_epochs": 3}])
def test_hyperparameters_of_another_training_loop_are_not_compared(
    tmp_path: Path, hyperparameters: dict[str, Any]
) -> None:
    own = replace(metadata_for(), hyperparameters=hyperparameters)
    store = store_of(tmp_path, own, own)
    check_as_requested(store, 0, {"mom": 0.9, "lr": 0.5}, to_the_end=True)
    check_alike(store, range(2), to_the_end=True)
    assert describe_other_training(own, TRAINED, to_the_end=True) == ""
    with pytest.raises(InputError, match="no further experts can be trained in its folder"):
        CommonTraining(NET, DATA, TRAINED, 7, torch.float32, "fp32").check(store, 0)


def test_experts_of_different_trainings_in_one_folder_are_refused(tmp_path: Path) -> None:
    store = store_of(tmp_path, metadata_for(), replace(metadata_for(train_epochs=9), seed=8), metadata_for(lr=0.1))
    check_alike(store, range(2), to_the_end=False)  # other seeds, other lengths
    with pytest.raises(InputError, match=r"expert_0001\.safetensors: trained with train_epochs 9, but expert_0000"):
        check_alike(store, range(2), to_the_end=True)
    with pytest.raises(
        InputError,
        match=r"expert_0002\.safetensors: trained with lr 0\.1, but expert_0000\.safetensors with 0\.01; .*`max_experts` 2",
    ):
        check_alike(store, range(3), to_the_end=False, fewer="max_experts")
    with pytest.raises(
        InputError,
        match=r"expert_0002\.safetensors: trained with lr 0\.1, but expert_0000\.safetensors .* in the folder$",
    ):
        check_one_kind(store)  # whose commands take all experts


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, ""),
        ({"precision": "tf32"}, ""),  # rounds no worse than the order of a sum
        ({"precision": "fp16"}, ""),
        ({"precision": "bf16"}, "trained with precision fp32, tf32 or fp16, not bf16"),
        ({"seed": 8}, "trained with seed 7, not 8"),
        ({"dtype": torch.bfloat16}, "trained with store_dtype float32, not bfloat16"),
        ({"hyperparameters": TRAINED | {"train_epochs": 4}}, "trained with train_epochs 3, not 4"),
        ({"hyperparameters": TRAINED | {"augment": "none"}}, "trained with augment flip, not none"),
    ],
)
def test_what_lies_beside_it_is_trained_alike(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    store = store_of(tmp_path, metadata_for())
    training: dict[str, Any] = {"hyperparameters": TRAINED, "seed": 7, "dtype": torch.float32, "precision": "fp32"}
    if not problem:
        return CommonTraining(NET, DATA, **training | changes).check(store, 0)
    with pytest.raises(InputError, match=rf"expert_0000\.safetensors: {problem}"):
        CommonTraining(NET, DATA, **training | changes).check(store, 0)


def test_an_unknown_precision_is_any(tmp_path: Path) -> None:
    store = store_of(tmp_path, replace(metadata_for(), precision=""))
    for precision in ("fp32", "bf16"):
        CommonTraining(NET, DATA, TRAINED, 7, torch.float32, precision).check(store, 0)


@pytest.mark.parametrize(
    ("name", "full"),
    [
        ("ConvNet", "ConvNetD3W128ARINAP"),
        ("ConvNetD4NN", "ConvNetD4W128ARNNAP"),
        ("ConvNetKIP", "ConvNetD3W1024ARNNAP"),
        ("ConvNetBN", "ConvNetD3W128ARBNAP"),
        ("ConvNetD3W128BN", "ConvNetD3W128ARBNAP"),
        ("ConvNetASwishMP", "ConvNetD3W128ASwishINMP"),
        ("ResNet18BN_AP", "ResNet18BN_AP"),
    ],
)
def test_networks_are_compared_by_their_full_names(name: str, full: str) -> None:
    assert full_name(network_by_name(name, (3, 32, 32), 10).describe()) == full


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("ConvNet", "ConvNet"),
        ("ConvNetD2W32", "ConvNetD2W32"),
        ("ConvNetD3W128ARINAP", "ConvNet"),
        ("ConvNetKIP", "ConvNetW1024NN"),
        ("ConvNetASwishBNMP", "ConvNetASwishBNMP"),
        ("ResNet18BN_AP", "ResNet18BN_AP"),
    ],
)
def test_networks_have_a_shortest_name(name: str, short: str) -> None:
    described = network_by_name(name, (3, 32, 32), 10).describe()
    assert short_name(described) == short
    assert full_name(network_by_name(short, (3, 32, 32), 10).describe()) == full_name(described)


def test_a_network_that_does_not_tell_is_unknown() -> None:
    assert full_name({}) == full_name({"kind": "ConvNet"}) == full_name({"kind": "ConvNet", "width": 4}) == ""
    assert short_name({}) == ""


def test_the_name_of_kips_network_is_known() -> None:
    assert full_name({"kind": "ConvNetKIP"}) == full_name({"kind": "ConvNetW1024NN"}) == "ConvNetD3W1024ARNNAP"


@pytest.mark.parametrize(
    ("network", "found"), [(torch.nn.Linear(2, 3), "Linear"), (ConvNet, "type"), (None, "NoneType")]
)
def test_metadata_of_anything_but_a_network_are_refused(network: Any, found: str) -> None:
    with pytest.raises(
        InputError, match=f"^`network`: expected a ConvNet, or a FlatModule of a .*, found an object of {found}$"
    ):
        ExpertMetadata.of(network)
