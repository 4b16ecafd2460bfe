"""Compare options with those of the run that a folder holds."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import pytest

from mtt_fast.commands.earlier_run import (
    check_same_evaluation,
    check_same_run,
    earlier_options,
    in_precision_of_run,
    is_finished,
)
from mtt_fast.commands.option_fields import Role
from mtt_fast.errors import InputError
from mtt_fast.storage.run_folder import write_config


@dataclass(frozen=True)
class Options:
    dataset: str = "CIFAR10"
    precision: str = "auto"
    lr_img: float = 1.0
    zca: bool = False
    threshold: float | None = None
    num_eval: Annotated[int, Role.EVALUATION] = 5
    protocol: Annotated[str, Role.EVALUATION] = "mtt"
    iterations: Annotated[int, Role.EXTENT] = 10


MEND = r"; choose another --out \(or delete the folder\)$"


@pytest.mark.parametrize(("recorded", "name"), [({}, None), ({"method": "dm"}, "dm")])
def test_a_folder_is_of_one_method(tmp_path: Path, recorded: dict[str, str], name: str | None) -> None:
    assert earlier_options(tmp_path, "any") is None  # the folder is empty
    write_config(tmp_path, {"lr_img": 1.0} | recorded)
    assert earlier_options(tmp_path, name) == {"precision": "tf32", "lr_img": 1.0} | recorded
    for other in {None, "dm", "dc"} - {name}:
        told = f"holds a run of {name or 'mtt_fast.distill'}, not {other or 'mtt_fast.distill'}{MEND}"
        with pytest.raises(InputError, match=told):
            earlier_options(tmp_path, other)


def test_a_run_keeps_its_precision_unless_one_is_given(tmp_path: Path) -> None:
    options = Options(precision="bf16")
    assert in_precision_of_run(options, None, ()) == options
    for recorded, precision in (({}, "tf32"), ({"precision": "fp16"}, "fp16")):
        write_config(tmp_path, {"lr_img": 1.0} | recorded)
        earlier = earlier_options(tmp_path, None)
        assert in_precision_of_run(options, earlier, ("lr_img",)) == replace(options, precision=precision)
        assert in_precision_of_run(options, earlier, ("precision",)) == options


@pytest.mark.parametrize(
    ("recorded", "now", "told"),
    [
        ({}, {}, None),
        ({"iterations": 3}, {}, None),  # which may differ
        ({"dataset": "cifar10"}, {}, None),
        ({"dataset": "CIFAR100"}, {}, "with --dataset CIFAR100, not CIFAR10"),
        ({"dataset": "CIFAR10"}, {"dataset": "/old/CIFAR10"}, "with --dataset CIFAR10, not /old/CIFAR10"),
        ({"dataset": "/old/pets"}, {"dataset": "new/pets"}, None),
        ({"dataset": "/old/pets"}, {"dataset": "/old/cats"}, "with --dataset /old/pets, not /old/cats"),
        ({"lr_img": 0.0}, {}, "with --lr_img 0.0, not 1.0"),
        ({"zca": True}, {}, "with --zca, not without --zca"),
        ({}, {"zca": True}, "without --zca, not with --zca"),
        ({"threshold": 2.0}, {}, "with --threshold 2.0, not without --threshold"),
        (
            {},
            {"threshold": 2.0},
            "without --threshold, not with --threshold 2.0",
        ),  # the option may be younger than the run
        ({}, {"lr_img": 2.0}, "with --lr_img 1.0, not 2.0"),
    ],
)
def test_other_values_are_told_with_those_of_the_run(
    tmp_path: Path, recorded: dict[str, object], now: dict[str, object], told: str | None
) -> None:
    check_same_run(tmp_path, None, Options(lr_img=9.0), {"iterations"})  # the folder is empty
    earlier = {"precision": "auto"} | recorded
    options = replace(Options(), **now)  # type: ignore[arg-type]
    if told is None:
        return check_same_run(tmp_path, earlier, options, {"iterations"})
    with pytest.raises(InputError, match=f"holds a run {told}{MEND}"):
        check_same_run(tmp_path, earlier, options, {"iterations"})


@pytest.mark.parametrize(
    ("recorded", "told"),
    [
        ({"num_eval": 3}, "with --num_eval 3, not 5"),
        ({"protocol": "datm"}, "with --protocol datm, not mtt"),
        ({"iterations": 3}, None),
        ({}, None),
    ],
)
def test_a_run_goes_on_with_the_evaluation_it_began_with(
    tmp_path: Path, recorded: dict[str, object], told: str | None
) -> None:
    earlier = {"precision": "auto"} | recorded
    check_same_evaluation(tmp_path, earlier, Options())  # nothing is evaluated yet
    (tmp_path / "checkpoint.safetensors").touch()
    if told is None:
        return check_same_evaluation(tmp_path, earlier, Options())
    with pytest.raises(InputError, match=f"holds a run {told}, and compares all its evaluations"):
        check_same_evaluation(tmp_path, earlier, Options())


def test_a_run_is_finished_once_it_has_all_iterations(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    assert not is_finished(tmp_path, Options(), 0)
    evaluated = {"num_eval": 3, "lr_img": 7.0, "iterations": 9}  # older than --protocol
    summary = {"accuracy": {}, "text": "43 %", "iterations": 10}
    (tmp_path / "summary.json").write_text(json.dumps(summary | {"options": evaluated}))
    assert not is_finished(tmp_path, Options(), 11)
    assert not caplog.messages
    assert is_finished(tmp_path, Options(num_eval=3), 9)
    assert caplog.messages == [f"{tmp_path} is finished: 43 %"]
    assert is_finished(tmp_path, Options(), 10)
    assert caplog.messages[2] == (
        f"its evaluations were made with --num_eval 3; python -m mtt_fast.evaluate {tmp_path} makes others"
    )
    (tmp_path / "summary.json").write_text(json.dumps(summary))  # as it was before it had options
    assert is_finished(tmp_path, Options(), 10)
    (tmp_path / "summary.json").write_text(json.dumps({"accuracy": {}}))
    with pytest.raises(InputError, match=r"summary\.json: expected the summary of a run"):
        is_finished(tmp_path, Options(), 10)
