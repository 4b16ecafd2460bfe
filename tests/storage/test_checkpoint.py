"""Test checkpoints: a resumed run continues with all that it had when it was stopped."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mtt_fast.errors import InputError
from mtt_fast.storage.checkpoint import State, initial_num_experts, load_checkpoint, save_checkpoint
from mtt_fast.storage.identity import DatasetIdentity
from mtt_fast.storage.run_files import CHECKPOINT, CONFIG
from mtt_fast.storage.run_folder import read_config, write_config
from mtt_fast.storage.tensor_files import load_tensors, save_tensors


def test_every_field_of_a_state_comes_back(tmp_path: Path) -> None:
    images, logits, rates = torch.randn(4, 1, 8, 8), torch.randn(4, 10), torch.rand(3)
    state = State(
        iteration=7, num_experts=2, images=images, labels=logits, lr=rates, images_velocity=-images, lr_velocity=-rates,
        labels_velocity=-logits, ema=2 * images, pixel_weights=images[:, :1], frequencies=images[:, 0] > 0, skipped=3, repeated=6,
        above_threshold=4, lr_kept=5, parameters={"a.b": images}, parameters_velocity={"a.b": rates}, parameters_square={"c": rates}, data=DatasetIdentity(name="digits", image_shape=(1, 8, 8)), digests=("a", "b"), imported=True,
        cam_digest="c", scores_digest="d", code_digest="e",
    )  # fmt: skip
    plain = State(0, 0, images, logits, rates, images, rates)
    save_checkpoint(tmp_path, state)
    loaded = load_checkpoint(tmp_path, torch.device("cpu"))
    for field in dataclasses.fields(State):
        before, after = getattr(state, field.name), getattr(loaded, field.name)
        if isinstance(before, dict):
            assert before.keys() == after.keys()
            assert all(torch.equal(each, after[name]) for name, each in before.items()), field.name
            continue
        assert not isinstance(before, Tensor) or torch.equal(before, after), field.name
        assert isinstance(before, Tensor) or before == after != getattr(plain, field.name), field.name
    assert initial_num_experts(tmp_path) == (2, True)

    tensors, metadata = load_tensors(tmp_path / CHECKPOINT)
    numbers = json.loads(metadata["numbers"])
    del numbers["repeated"], metadata["scores_digest"]  # as in checkpoints of the first versions
    save_tensors(tmp_path / CHECKPOINT, tensors, metadata | {"numbers": json.dumps(numbers)})
    old = load_checkpoint(tmp_path, torch.device("cpu"))
    assert old is not None
    assert (old.iteration, old.repeated, old.scores_digest) == (7, 0, "")


@pytest.mark.parametrize("numbers", ["{}", "[]", '{"experts": "many"}', '{"experts": '])
def test_a_checkpoint_that_does_not_tell_its_experts_is_refused(tmp_path: Path, numbers: str) -> None:
    save_tensors(tmp_path / CHECKPOINT, {}, {"numbers": numbers})
    with pytest.raises(InputError, match=r"checkpoint\.safetensors: not a checkpoint of this version"):
        initial_num_experts(tmp_path)


@pytest.mark.parametrize("name", ["method", "recipe", "dataset", "model"])
def test_old_options_of_another_type_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / CONFIG).write_text(f"{name} = 5\n")  # as before there were checksums
    with pytest.raises(InputError, match=r"config\.toml: damaged or changed by hand"):
        read_config(tmp_path)


def test_every_option_comes_back_whatever_its_value(tmp_path: Path) -> None:
    """Check that an option that is off is written: its default may be on, and a resumed run would use that."""
    options: dict[str, Any] = {"dsa": False, "lr_lr": 0.0, "seed": 0, "eval_mode": "", "models": [], "zca": True}
    write_config(tmp_path, options | {"subset": None}, "a note")
    assert read_config(tmp_path) == options
