"""Check that each family of operations is complete in every layer, and that the layers import only downwards."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from bench import kernels as bench
from bench.settings import Setting
from mtt_fast import ConvNet, kernels
from mtt_fast.kernels import native, ops, reference, triton

SOURCES = Path(kernels.__file__).parent
FAMILIES = {"norm", "bias", "conv", "block", "classifier", "flat", "warp"}
BACK_ENDS: dict[str, ModuleType] = {"reference": reference, "native": native, "triton": triton}
WITHOUT = {("native", "block"), ("cpp", "block")}  # on a CPU a block's parts are as fast one after the other
LAYERS = {"types": 0, "reference": 1, "native": 1, "triton": 1, "checks": 1, "dispatch": 2, "ops": 3, "__init__": 4}
SETTING = Setting(ConvNet(3, 2, 8, 4, 2), images=2, steps=1, batch=2)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_family_has_one_name_in_each_layer(family: str) -> None:
    for layer in ("ops", *BACK_ENDS, "cpp"):
        names = {path.stem for path in (SOURCES / layer).iterdir()}
        assert (family in names) != ((layer, family) in WITHOUT), layer
    assert Path(__file__).with_name(f"test_{family}.py").exists()


@pytest.mark.parametrize("operation", ops.__all__)
def test_each_operation_is_in_every_layer(operation: str) -> None:
    """Check that a back end without a kernel for an operation lists it in NOT_IMPLEMENTED."""
    family = getattr(ops, operation).__module__.rpartition(".")[2]
    assert family in FAMILIES
    assert operation in kernels.__all__
    for name, back_end in BACK_ENDS.items():
        assert (operation in back_end.OPERATIONS) != (operation in back_end.NOT_IMPLEMENTED), name
        assert set(ops.__all__) == back_end.OPERATIONS | back_end.NOT_IMPLEMENTED, name
    assert not reference.NOT_IMPLEMENTED
    assert operation in {case.name for case in bench.operations(SETTING, torch.device("cpu"))}
    assert operation in Path(__file__).with_name(f"test_{family}.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("operation", sorted(triton.OPERATIONS))
def test_triton_takes_the_arguments_that_the_reference_takes(operation: str) -> None:
    """Check their signatures, since the dispatch hands both the same arguments."""
    pytest.importorskip("triton", reason="Triton is not installed: it comes only for Linux")
    actual, expected = (inspect.signature(getattr(back_end, operation)).parameters for back_end in (triton, reference))
    assert list(actual) == list(expected)


def test_layers_import_only_downwards() -> None:
    """Check that no back end imports another or `ops`, and that `kernels` imports no other part of mtt_fast."""
    for path in SOURCES.rglob("*.py"):
        place = path.relative_to(SOURCES).with_suffix("").parts
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not any(alias.name.startswith("mtt_fast") for alias in node.names), path
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert not (node.module or "").startswith("mtt_fast"), path
            elif isinstance(node, ast.ImportFrom) and node.level == len(place):  # from the package itself
                for layer in [node.module.partition(".")[0]] if node.module else [alias.name for alias in node.names]:
                    assert LAYERS[layer] < LAYERS[place[0]], f"{path} imports {layer}"


def test_importing_needs_no_triton() -> None:
    """Check also that an operation of Triton's does need it, and says so when it is looked up."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from mtt_fast.kernels import triton as operations\n"
        "try:\n    operations.conv3x3_dual\n"
        "except ImportError as error:\n    print(error)\n"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "need Triton" in answer.stdout
