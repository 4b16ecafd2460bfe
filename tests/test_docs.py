"""What docs/ tells to run, and to type, is so."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from mtt_fast.distillation.options import DistillOptions
from mtt_fast.experts import ExpertOptions
from mtt_fast.testing import assert_close

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def _float64() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("_float64")
def test_the_call_leaves_the_gradients_of_the_loop_that_it_replaces() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/migrating.md").read_text(), re.DOTALL | re.MULTILINE)
    setup, loop, call = blocks
    space: dict[str, Any] = {}
    gradients = []
    exec(setup, space)
    for way in (loop, call):
        exec(way, space)
        gradients.append({name: space[name].grad.clone() for name in ("images", "lr")} | {"loss": space["grand_loss"]})
        space["images"].grad = space["lr"].grad = None
    for name, expected in gradients[0].items():
        assert_close(name, gradients[1][name], expected, 1e-9)


def test_flags_that_are_said_to_be_the_same_are_there() -> None:
    text = (ROOT / "docs/migrating.md").read_text()
    lines = text[text.index("Names, meanings and defaults") : text.index("What differs")]
    both, distill, experts = (re.findall(r"--(\w+)", line) for line in lines.split("\n- ")[1:])
    fields = [{field.name for field in dataclasses.fields(options)} for options in (DistillOptions, ExpertOptions)]
    assert len(both) > 5
    assert len(distill) > 5
    assert len(experts) > 5
    assert fields[0] >= {*both, *distill}
    assert fields[1] >= {*both, *experts}
