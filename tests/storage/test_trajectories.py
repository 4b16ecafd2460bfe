"""Test expert trajectories: exact round trips, reads of one row, and files that are whole or refused by name."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mtt_fast.errors import InputError
from mtt_fast.networks.convnet import ConvNet
from mtt_fast.networks.layout import ParameterLayout
from mtt_fast.storage.expert_metadata import ExpertMetadata
from mtt_fast.storage.identity import UNKNOWN
from mtt_fast.storage.tensor_files import load_tensors, save_tensors
from mtt_fast.storage.trajectories import TrajectoryStore, expert_path, write_expert

EPOCHS = 3
LAYOUT = "features.0.weight:4x3x3x3;features.0.bias:4;classifier.weight:10x64"
P = 4 * 27 + 4 + 640


def metadata_for(rows: int = EPOCHS + 1, layout: str = LAYOUT) -> ExpertMetadata:
    return ExpertMetadata(
        network={"kind": "ConvNet", "width": 4, "image_size": 32},
        layout=layout,
        dataset="digits",
        fingerprint="f00d",
        whitening="none",
        hyperparameters={"lr": 0.01, "augment": "flip", "decay": False},
        seed=7,
        accuracy=[0.1 * row for row in range(rows)],
        versions={"torch": torch.__version__},
    )


@pytest.fixture
def parameters() -> Tensor:
    return torch.randn(EPOCHS + 1, P)


@pytest.fixture
def store(tmp_path: Path, parameters: Tensor) -> TrajectoryStore:
    write_expert(tmp_path, 0, parameters, metadata_for())
    return TrajectoryStore(tmp_path)


def test_float32_comes_back_bit_for_bit(store: TrajectoryStore, parameters: Tensor) -> None:
    assert store.epochs(0) == EPOCHS
    for epoch in range(EPOCHS + 1):
        assert torch.equal(store.read(0, epoch).view(torch.int32), parameters[epoch].view(torch.int32))


def test_parameters_may_lie_in_any_order_and_have_a_graph(tmp_path: Path, parameters: Tensor) -> None:
    write_expert(tmp_path, 0, parameters.t().contiguous().t().requires_grad_(), metadata_for())
    store = TrajectoryStore(tmp_path)
    assert torch.equal(torch.stack([store.read(0, epoch) for epoch in range(EPOCHS + 1)]), parameters)


def test_a_parameter_without_sides_is_one_number() -> None:
    assert ParameterLayout.from_text("scale:;features.0.weight:4x3x3x3;bias:5").sizes == [1, 108, 5]


@given(
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=2, max_size=20, unique=True)
)
def test_any_finite_float32_comes_back(tmp_path_factory: pytest.TempPathFactory, values: list[float]) -> None:
    folder = tmp_path_factory.mktemp("experts")
    parameters = torch.tensor(values, dtype=torch.float32)[:, None]
    if (parameters == parameters[0]).all():  # 0.0 and −0.0
        return
    write_expert(folder, 0, parameters, metadata_for(len(values), "weight:1"))
    store = TrajectoryStore(folder)
    back = torch.stack([store.read(0, epoch) for epoch in range(len(values))])
    assert torch.equal(back.view(torch.int32), parameters.view(torch.int32))


def test_bfloat16_is_rounded_to_nearest_at_half_the_size(tmp_path: Path, parameters: Tensor) -> None:
    full = write_expert(tmp_path, 0, parameters, metadata_for())
    half = write_expert(tmp_path, 1, parameters, metadata_for(), torch.bfloat16)
    assert half.stat().st_size < 0.7 * full.stat().st_size
    row = TrajectoryStore(tmp_path).read(1, 2)
    assert row.dtype == torch.float32
    assert torch.equal(row, parameters[2].to(torch.bfloat16).float())
    assert ((row - parameters[2]).abs() <= parameters[2].abs() * 2**-8).all()


def test_metadata_comes_back(store: TrajectoryStore) -> None:
    assert store.metadata(0) == metadata_for()


def test_the_file_is_plain_safetensors(store: TrajectoryStore, parameters: Tensor) -> None:
    with safe_open(expert_path(store.folder, 0), framework="pt") as file:
        assert list(file.keys()) == ["parameters"]
        assert torch.equal(file.get_tensor("parameters"), parameters)


def test_positions_follow_the_numbers_present(tmp_path: Path, parameters: Tensor) -> None:
    for index in (12345, 3, 10):
        write_expert(tmp_path, index, parameters + index, metadata_for())
    (tmp_path / "expert_0004.safetensors.bak").touch()
    (tmp_path / ".expert_0005.safetensors.abc.partial").touch()
    (tmp_path / "expert_6.safetensors").touch()
    store = TrajectoryStore(tmp_path)
    assert store.indices == (3, 10, 12345)
    assert len(store) == 3
    for position, index in enumerate(store.indices):
        assert torch.equal(store.read(position, 1), parameters[1] + index)


def test_experts_with_one_digest_all_stay_where_others_come_first(tmp_path: Path, parameters: Tensor) -> None:
    for index, rows in enumerate((parameters, parameters, 2 * parameters, 3 * parameters)):  # as of a copied buffer
        write_expert(tmp_path, index, rows, metadata_for())
    store = TrajectoryStore(tmp_path)
    digests = [store.digest(expert) for expert in (0, 3, 1)]
    first = store.starting_with(digests)
    assert first is not None
    assert first.indices == (0, 3, 1, 2)
    assert torch.equal(first.read(1, 2), 3 * parameters[2])
    assert first.first(2).indices == (0, 3)
    assert store.first(9).indices == store.indices
    with pytest.raises(IndexError, match="expected an expert from 0 to 1"):
        first.first(2).read(2, 2)
    assert store.starting_with([*digests, digests[0]]) is None, "two have this digest, not three"


@pytest.mark.parametrize(("expert", "epoch"), [(1, 0), (-1, 0), (0, EPOCHS + 1), (0, -1)])
def test_what_is_not_there_is_an_index_error(store: TrajectoryStore, expert: int, epoch: int) -> None:
    with pytest.raises(IndexError, match=r"expected an (expert|epoch) from 0 to"):
        store.read(expert, epoch)


@pytest.mark.parametrize(
    ("expert", "epoch", "message"),
    [
        (7, 0, "expected an expert from 0 to 0, found 7"),
        (0, 99, f"expected an epoch from 0 to {EPOCHS}, found 99"),
        (0, float("nan"), f"expected an epoch from 0 to {EPOCHS}, found nan"),
        ("0", 0, "`expert`: expected the position of an expert, a whole number, found '0'"),
        (0.0, 0, "`expert`: expected the position of an expert, a whole number, found 0.0"),
        (slice(1), 0, "`expert`: expected the position of an expert, a whole number, found slice"),
        (0, "1", "`epoch`: expected a number, found '1'"),
        (0, None, "`epoch`: expected a number, found None"),
        (0, torch.ones(2), "`epoch`: expected a number, found Tensor float32 (2,)"),
    ],
)
def test_what_is_no_position_is_named(store: TrajectoryStore, expert: Any, epoch: Any, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        store.read(expert, epoch)
    numbers: list[Any] = [np.int64(0), torch.tensor(0)]
    for number in numbers:
        assert torch.equal(store.read(number, number + 1), store.read(0, 1))


def test_an_empty_folder_is_an_empty_store(tmp_path: Path) -> None:
    store = TrajectoryStore(tmp_path)
    assert len(store) == 0
    with pytest.raises(
        InputError, match=r"expected experts \(expert_0000\.safetensors, …\), found none; .* `mtt_fast convert`"
    ):
        store.metadata(0)
    for folder in (None, 3):
        with pytest.raises(InputError, match=f"`folder`: expected the path of a folder of experts, found {folder}"):
            TrajectoryStore(folder)  # type: ignore[arg-type]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere: expected a folder of experts .*; check the path, or train some"):
        TrajectoryStore(tmp_path / "nowhere")


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs /proc/self/io to count the bytes read")
def test_a_read_touches_one_row_alone(tmp_path: Path) -> None:
    rows, size = 51, 1 << 18  # 1 MiB a row
    write_expert(tmp_path, 0, torch.randn(rows, size), metadata_for(rows, f"weight:{size}"))
    store = TrajectoryStore(tmp_path)
    store.epochs(0)

    def bytes_read() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])  # rchar, of all threads

    before = bytes_read()
    store.read(0, 30)
    assert (1 << 20) <= bytes_read() - before < (1 << 20) + (1 << 14)


def test_reads_from_many_threads(tmp_path: Path) -> None:
    experts, rows = 4, 11
    parameters = torch.randn(experts, rows, P)
    for index in range(experts):
        write_expert(tmp_path, index, parameters[index], metadata_for(rows))
    store = TrajectoryStore(tmp_path)
    start = threading.Barrier(8)

    def read_all(worker: int) -> bool:
        start.wait()
        order = [(i % experts, i % rows) for i in range(worker, worker + 200)]
        return all(torch.equal(store.read(expert, epoch), parameters[expert, epoch]) for expert, epoch in order)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read_all, range(8)))


def test_opening_200_experts_is_instantaneous(tmp_path: Path) -> None:
    for index in range(200):
        expert_path(tmp_path, index).write_bytes(b"no header, so opening must not look")
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        assert len(TrajectoryStore(tmp_path)) == 200
        times.append(time.perf_counter() - begin)
    assert min(times) < 0.05


@pytest.mark.parametrize("kept", [0, 5, 200, -1])
def test_a_truncated_file_is_named(store: TrajectoryStore, kept: int) -> None:
    path = expert_path(store.folder, 0)
    os.truncate(path, kept if kept >= 0 else path.stat().st_size + kept)
    with pytest.raises(InputError, match=re.escape(str(path))):
        TrajectoryStore(store.folder).read(0, 0)


def test_a_file_truncated_after_opening_is_named(store: TrajectoryStore) -> None:
    store.read(0, EPOCHS)
    path = expert_path(store.folder, 0)
    os.truncate(path, path.stat().st_size - 4)
    with pytest.raises(InputError, match=rf"{re.escape(str(path))}: truncated"):
        store.read(0, EPOCHS)


def test_a_file_that_vanished_is_named(store: TrajectoryStore) -> None:
    store.read(0, 0)
    path = expert_path(store.folder, 0)
    path.unlink()
    with pytest.raises(InputError, match=rf"{re.escape(str(path))}: cannot be read"):
        store.read(0, 0)


def test_another_safetensors_file_is_refused(tmp_path: Path) -> None:
    save_file({"parameters": torch.zeros(2, 3)}, expert_path(tmp_path, 0))
    with pytest.raises(InputError, match="expected a file in the format 'mtt_fast expert 2', found 'another'"):
        TrajectoryStore(tmp_path).read(0, 0)


def test_a_header_at_odds_with_its_bytes_is_refused(store: TrajectoryStore) -> None:
    path = expert_path(store.folder, 0)
    path.write_bytes(path.read_bytes().replace(b"[4,752]", b"[5,752]"))
    with pytest.raises(InputError, match=re.escape(str(path))):
        TrajectoryStore(store.folder).read(0, 4)


def test_verify_finds_one_changed_bit(store: TrajectoryStore) -> None:
    store.verify(0)
    path = expert_path(store.folder, 0)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"{re.escape(str(path))}: damaged: row {EPOCHS}: "):
        store.verify(0)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda p: p[0].expand_as(p), "the same in every epoch; were they saved as views"),
        (lambda p: p.index_fill(0, torch.tensor([2]), float("nan")), "after epoch 2 are not finite"),
        (lambda p: p.index_fill(0, torch.tensor([1]), float("inf")), "after epoch 1 are not finite"),
        (lambda p: p[:, :-1], "describes 752 parameters, found 751"),
        (lambda p: p[:1], "at least one epoch"),
        (lambda p: p[0], "shape"),
        (lambda p: p[:-1], "an accuracy for each of 3 rows, found 4"),
    ],
    ids=["constant", "nan", "inf", "too-few", "one-row", "a-vector", "accuracies"],
)
def test_what_is_no_trajectory_is_not_written(tmp_path: Path, parameters: Tensor, spoil, reason: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=reason):
        write_expert(tmp_path, 0, spoil(parameters), metadata_for())
    assert list(tmp_path.iterdir()) == []


def test_rows_that_are_no_tensor_are_not_written(tmp_path: Path, parameters: Tensor) -> None:
    with pytest.raises(InputError, match=r"one tensor \(epochs \+ 1, P\), found a list of 4; use torch.stack"):
        write_expert(tmp_path, 0, list(parameters), metadata_for())  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("changes", [{"accuracy": [torch.tensor(0.5)] * 4}, {"hyperparameters": {"path": Path()}}])
def test_metadata_that_json_cannot_hold_are_not_written(
    tmp_path: Path, parameters: Tensor, changes: dict[str, Any]
) -> None:
    with pytest.raises(InputError, match=r"expert_0000.safetensors: not written: .*use .tolist\(\) of an array"):
        write_expert(tmp_path, 0, parameters, replace(metadata_for(), **changes))
    assert list(tmp_path.iterdir()) == []


def test_only_the_network_of_an_expert_has_to_be_known(tmp_path: Path) -> None:
    net = ConvNet(1, 2, 4, 2, 1)
    write_expert(tmp_path, 0, torch.randn(3, net.num_parameters), ExpertMetadata.of(net))
    metadata = TrajectoryStore(tmp_path).metadata(0)
    assert (metadata.network, metadata.layout) == (net.describe(), net.layout.describe())
    assert [math.isnan(each) for each in metadata.accuracy] == [True] * 3
    assert metadata.identity == UNKNOWN
    assert metadata.imported
    assert metadata.versions["torch"] == torch.__version__


@pytest.mark.parametrize("rows", [[0, 1, 2, 0], [0, 0, 1, 2]], ids=["ends where it began", "stands still at first"])
def test_a_trajectory_in_which_two_epochs_are_alike_is_written(
    tmp_path: Path, parameters: Tensor, rows: list[int]
) -> None:
    write_expert(tmp_path, 0, parameters[rows], metadata_for())
    store = TrajectoryStore(tmp_path)
    assert torch.equal(torch.stack([store.read(0, epoch) for epoch in range(4)]), parameters[rows])


def test_a_value_beyond_the_stored_type_is_not_written(tmp_path: Path, parameters: Tensor) -> None:
    with pytest.raises(InputError, match="after epoch 0 are not finite"):
        write_expert(tmp_path, 0, parameters.double() * 1e300, metadata_for())


def test_a_row_is_read_where_its_numbers_are_finite_and_only_there(
    tmp_path: Path, parameters: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mtt_fast.storage.trajectories._problem_with", lambda *_: None)  # as other software may write
    parameters[1] = torch.finfo(torch.float32).max  # the sum of which is infinite
    for epoch, value in ((2, torch.nan), (3, torch.inf)):
        parameters[epoch, 5] = value
    write_expert(tmp_path, 0, parameters, metadata_for())
    store = TrajectoryStore(tmp_path)
    for epoch in (0, 1):
        assert torch.equal(store.read(0, epoch), parameters[epoch])
    for epoch in (2, 3):
        with pytest.raises(InputError, match=f"after epoch {epoch} are not finite"):
            store.read(0, epoch)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda tensor: {"parameters": tensor.double()}, f"F64 ({EPOCHS + 1}, {P})"),
        (lambda tensor: {"parameters": tensor.half()}, f"F16 ({EPOCHS + 1}, {P})"),
        (lambda tensor: {"parameters": tensor[0]}, f"F32 ({P},)"),
        (lambda tensor: {"others": tensor}, "none"),
    ],
)
def test_parameters_of_another_form_are_told(
    store: TrajectoryStore, parameters: Tensor, change: Callable[[Tensor], dict[str, Tensor]], found: str
) -> None:
    path = expert_path(store.folder, 0)
    _, metadata = load_tensors(path)
    save_tensors(path, change(parameters), metadata)
    message = f"{path}: parameters: expected F32 or BF16 of two dimensions, found {found}; delete it and train it again"
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        store.read(0, 0)


def test_another_stored_type_is_refused(tmp_path: Path, parameters: Tensor) -> None:
    with pytest.raises(InputError, match=r"float32 or bfloat16, found torch\.float16"):
        write_expert(tmp_path, 0, parameters, metadata_for(), torch.float16)


@pytest.mark.parametrize("name", ["network", "layout", "accuracy", "precision", "made_of", "data"])
@pytest.mark.parametrize("text", [None, "{broken"])
def test_broken_metadata_is_named(name: str, text: str | None) -> None:
    record = metadata_for().to_text()
    record.pop(name)
    if text is not None:
        record[name] = text
    with pytest.raises(InputError, match=r"^here: expected an expert's metadata"):
        ExpertMetadata.from_text(record, "here")


def test_the_first_format_lacks_what_was_not_recorded_then() -> None:
    record = metadata_for().to_text() | {"format": "mtt_fast expert 1"}
    for name in ("precision", "made_of", "data"):
        del record[name]
    assert ExpertMetadata.from_text(record, "here") == metadata_for()


@pytest.mark.parametrize(
    "changes",
    [
        {"layout": "weight:three"},
        {"layout": "weight:3"},
        {"accuracy": ["high"] * (EPOCHS + 1)},
        {"accuracy": [0.5]},
        {"seed": "seven"},
        {"network": []},
        {"data": {"colour": "red"}},
        {"data": {"mean": "half"}},
    ],
    ids=str,
)
def test_metadata_that_cannot_be_is_named(store: TrajectoryStore, changes: dict[str, object]) -> None:
    path = expert_path(store.folder, 0)
    tensors, text = load_tensors(path)
    save_tensors(
        path, tensors, text | {name: json.dumps(value) for name, value in changes.items()}, by_row=["parameters"]
    )
    with pytest.raises(InputError, match=re.escape(str(path))):
        TrajectoryStore(store.folder).metadata(0)


WRITE_UNTIL_KILLED = """
import sys, torch
from mtt_fast.storage.expert_metadata import ExpertMetadata
from mtt_fast.storage.trajectories import write_expert
rows, size = 51, 1 << 18
parameters = torch.randn(rows, size)
metadata = ExpertMetadata({}, f"weight:{size}", "", "", "none", {}, 0, [0.0] * rows, {})
for index in range(10_000):
    print(write_expert(sys.argv[1], index, parameters, metadata), flush=True)
"""


def test_kill_9_while_writing_leaves_whole_experts_only(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITE_UNTIL_KILLED, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        deadline = time.monotonic() + 60
        while not any(tmp_path.glob(".*.partial")):  # the second is being written
            assert time.monotonic() < deadline, "the writer stopped"
        process.send_signal(signal.SIGKILL)
        reported = [first, *process.stdout]
    store = TrajectoryStore(tmp_path)
    assert len(store) in (len(reported), len(reported) + 1)  # the last may be written and not yet reported
    for expert in range(len(store)):
        store.verify(expert)
