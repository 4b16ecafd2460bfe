"""Test buffers and waypoints that hold no experts: one line that names the file, at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mtt_fast.storage.expert_metadata import ExpertMetadata
from tests.interop.buffers import NET, Epochs, metadata, trained
from tests.interop.hostile import refused, rows_of

pytestmark = pytest.mark.usefixtures("bounded")


def buffers(expert: Epochs) -> dict[str, Any]:
    def each(change: Callable[[Tensor], Any]) -> list[Any]:
        return [[change(tensor) for tensor in epoch] for epoch in expert]

    point = [torch.ones_like(tensor) for tensor in expert[0]]
    return {
        "nothing": None, "no experts": [], "no epochs": [[]], "one epoch": [[expert[0]]], "text": ["a"],
        "a dictionary": {"a": expert}, "a tuple": (expert,), "tuples for lists": [tuple(expert)],
        "tuples for epochs": [[tuple(epoch) for epoch in expert]], "ragged": [[expert[0], expert[1][:-1]]],
        "numbers": [[[1, 2], [3, 4]]], "nothing in it": [[None, None]], "nothing and a list": [[None, [torch.ones(1)]]], "empty tensors": [[[torch.ones(0)], [torch.ones(0)]]],
        "whole": [each(Tensor.int)], "complex": [each(lambda tensor: tensor.to(torch.complex64))],
        "sparse": [[[torch.eye(3).to_sparse()]] * 2], "nowhere": [each(lambda tensor: tensor.to("meta"))],
        "NaN": [expert, [expert[0], [tensor * float("nan") for tensor in expert[1]]]],
        "too large": [each(lambda tensor: tensor.double() * 1e300)], "one expert often": [expert] * 1000,
        "one epoch often": [[expert[0], expert[1]] * 10_000], "one tensor often": [[list(point) for _ in range(5000)]],
        "a claim": [each(lambda _: torch.zeros(1).expand(10**6, 10**6))],
        "expanded": [each(lambda tensor: torch.zeros(1).expand(tensor.shape))],
        "numbers as tensors": [[[torch.tensor(1.0)] for _ in range(3)]],
    }  # fmt: skip


def test_buffers_that_hold_no_experts_are_refused(tmp_path: Path) -> None:
    for content in buffers(trained(0)).values():
        torch.save(content, tmp_path / "replay_buffer_0.pt")
        refused(lambda: rows_of(tmp_path / "replay_buffer_0.pt"), "replay_buffer_0.pt")
    torch.save(
        [[[torch.nn.Parameter(tensor).half() for tensor in epoch] for epoch in trained(0)]],
        tmp_path / "replay_buffer_0.pt",
    )
    assert len(rows_of(tmp_path / "replay_buffer_0.pt")) == 1


def test_an_expert_with_nan_is_named_with_its_epoch(tmp_path: Path) -> None:
    one, other = trained(0), trained(1)
    other[2][3][0] = float("inf")
    torch.save([one, other], tmp_path / "replay_buffer_7.pt")
    message = refused(lambda: rows_of(tmp_path / "replay_buffer_7.pt"), "replay_buffer_7.pt: expert 1: ")
    assert f"after epoch 2 are not finite (in {NET.layout.names[3]})" in message
    assert "--lr" not in message


def test_steps_that_do_not_fit_waypoints_are_refused(tmp_path: Path) -> None:
    expert = trained(0)
    size, points = len(expert[0]), expert[:3]
    rest = [[0.0] * size, [1.0] * size]

    def with_middle(row: Any) -> list[Any]:
        return [[[[0.0] * size, row, [1.0] * size], rest]]

    steps: list[Any] = [
        with_middle([float("nan")] * size), with_middle([5.0] * size), with_middle([-0.5] * size), with_middle([0.5] * (size - 1)),
        with_middle([[0.5]] * size), with_middle([10**400] * size), with_middle([0.5j] * size), with_middle("a"), with_middle(None),
        with_middle([torch.eye(2).to_sparse()] * size), with_middle([torch.zeros(1).expand(10**9)] * size),
        ["a"], [None], [3], [[]], [[[], []]], [{"a": 1}], torch.ones(3), [torch.ones(3, 3)], {}, None, [[[[0.0] * size] * 100_000, rest]],
    ]  # fmt: skip
    file = tmp_path / "waypoint_buffer_ip3_0.pt"
    torch.save([points], file)
    for content in steps:
        torch.save(content, tmp_path / "step_buffer_ip3_0.pt")
        refused(lambda: rows_of(file), "buffer_ip3_0.pt")
    torch.save(with_middle([0.5] * size), tmp_path / "step_buffer_ip3_0.pt")
    assert len(rows_of(file)) == 1
    second_of_numbers = [points[0], [3] * size, points[2]]
    for content in ([3], [[1, 2, 3]], [None], {"a": 1}, [[points[0]]], [points[:2]], [second_of_numbers]):
        torch.save(content, file)
        refused(lambda: rows_of(file), "waypoint_buffer_ip3_0.pt")


@pytest.mark.parametrize("text", ["a:2xx", "a:2xb", "a:x;b:-y", "a:1.5"])
def test_a_text_that_is_no_layout_is_refused(text: str) -> None:
    written = metadata().to_text() | {"layout": json.dumps(text.replace("xx", "x½"))}
    refused(lambda: ExpertMetadata.from_text(written, "an expert's layout"), "layout")
