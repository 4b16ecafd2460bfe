"""Options, exit statuses, recipes, random numbers by place, atomic files."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from mtt_fast import InputError, cli
from mtt_fast.distillation.options import parse_options
from mtt_fast.files import atomic_path, load_tensors, read_header, save_tensors, write_text
from mtt_fast.interrupts import Stopped
from mtt_fast.recipes import recipe_about, recipe_names
from mtt_fast.recipes.__main__ import main as list_recipes
from mtt_fast.run_folder import read_config, write_config
from mtt_fast.seeding import generator_for


@dataclass(frozen=True)
class Options:
    lr_img: float = 1.0
    ipc: int = 1
    name: str | None = None


def test_hyphens_underscores_and_defaults() -> None:
    assert cli.parse(Options, ["--lr-img", "3"], "x") == cli.parse(Options, ["--lr_img=3"], "x") == Options(3.0)
    assert cli.parse(Options, [], "x", {"ipc": 4, "name": "n"}) == Options(1.0, 4, "n")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ipcc": 1}, r"unknown option 'ipcc' \(did you mean ipc\?\)"),
        ({"ipc": "many"}, "option ipc: expected int, found 'many'"),
    ],
)
def test_a_file_with_wrong_options(values: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        cli.apply(Options(), values, "mine.toml")


def test_broken_toml(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("lr_img = = 3")
    with pytest.raises(InputError, match=r"mine.toml: not valid TOML"):
        cli.read_toml(path)


def test_exit_statuses(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def failing(error: BaseException) -> int:
        def job(argv: Sequence[str]) -> None:
            raise error

        return cli.run(job, [])

    assert cli.run(lambda argv: None, []) == 0
    assert failing(InputError("--ipc 0: expected at least 1")) == 2
    assert capsys.readouterr().err == "error: --ipc 0: expected at least 1\n"
    assert failing(Stopped("continue with: this", 15)) == 143
    assert failing(KeyboardInterrupt()) == 130
    assert failing(OSError(28, "No space left on device", "run/x")) == 2
    assert "error: run/x: No space left on device" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="a bug"):
        failing(RuntimeError("a bug"))


@pytest.mark.parametrize("words", ["mtt_fast --help", "mtt_fast.recipes", "mtt_fast.recipes --help"])
def test_a_reader_that_has_seen_enough_is_no_error(words: str) -> None:
    command = f"{sys.executable} -m {words} | true"
    found = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=True)
    assert found.stderr == ""


@pytest.mark.parametrize("job", ["env", "recipes"])
def test_jobs_without_options_have_help(job: str) -> None:
    command = [sys.executable, "-m", "mtt_fast", job]
    found = subprocess.run([*command, "--help"], capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout.startswith(f"usage: python -m mtt_fast.{job}\n")
    wrong = subprocess.run([*command, "--x"], capture_output=True, text=True, timeout=60, check=False)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: --x: ")


def test_out_of_memory_is_told_with_its_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(lambda argv: torch.ones(2**55), []) == 2  # type: ignore[arg-type]
    assert capsys.readouterr().err.startswith("error: out of memory; set a smaller --memory_budget")


def test_what_runs_here() -> None:
    command = [sys.executable, "-m", "mtt_fast.env"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert f"torch                      {torch.__version__}" in found
    assert "student of ConvNet" in found
    assert subprocess.run([*command, "--x"], capture_output=True, timeout=60, check=False).returncode == 2


@pytest.mark.parametrize("job", ["experts", "buffer", "distill", "evaluate"])
def test_help(job: str) -> None:
    command = [sys.executable, "-m", f"mtt_fast.{job}", "--help"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "--dsa-strategy" in found.stdout.replace("_", "-")
    assert found.stderr == ""


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_complete(name: str) -> None:
    options = parse_options(["--recipe", name])
    assert options.recipe == name
    assert options.max_start_epoch + options.expert_epochs <= options.train_epochs
    assert all(recipe_about(name).values())


def test_the_recipes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(list_recipes, []) == 0
    found = capsys.readouterr().out
    assert all(name in found for name in recipe_names())
    assert cli.run(list_recipes, ["--x"]) == 2


def test_a_reader_that_has_had_enough_is_no_error() -> None:
    command = [sys.executable, "-m", "mtt_fast.recipes"]  # | head
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as listing:
        assert listing.stdout is not None
        assert listing.stderr is not None
        listing.stdout.close()
        assert listing.stderr.read() == ""
        assert listing.wait(60) == 128 + 13


def test_random_numbers_by_place() -> None:
    def first(*place: int, purpose: str = "a", seed: int = 0) -> float:
        return float(torch.rand((), generator=generator_for(seed, purpose, *place)))

    assert first(3) == first(3)
    assert len({first(3), first(4), first(3, 0), first(3, purpose="b"), first(3, seed=1), first(0, 3)}) == 6


def test_options_come_back_from_a_run_folder(tmp_path: Path) -> None:
    options = {"out": 'runs/é "x" 😀\\', "lr_lr": 1e-7, "ipc": 3, "zca": True, "subset": None}
    write_config(tmp_path, options, "gradient: exact")
    assert read_config(tmp_path) == {name: value for name, value in options.items() if value is not None}


def write_half(path: Path) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text("half of the n")
        raise RuntimeError("killed")


def test_atomic_files(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    write_text(path, "old")
    with pytest.raises(RuntimeError, match="killed"):
        write_half(path)
    assert path.read_text() == "old"
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]
    with pytest.raises(InputError, match=r"cannot be written"):
        write_text(path / "below a file", "x")


@pytest.mark.parametrize("size", [0, 5, 8, 40, -1])
def test_foreign_and_truncated_tensor_files(tmp_path: Path, size: int) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"x": torch.arange(100)}, {"key": "value"})
    tensors, metadata = load_tensors(path)
    assert torch.equal(tensors["x"], torch.arange(100))
    assert metadata == {"key": "value"}
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(InputError, match=r"x\.safetensors: "):
        read_header(path)
