"""Test options, exit statuses, recipes, random numbers by purpose."""

from __future__ import annotations

import ast
import errno
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pytest
import torch

from mtt_fast import InputError, recipes
from mtt_fast.augmentation.siamese import SiameseAugment
from mtt_fast.commands import cli, parsing
from mtt_fast.distill.command_line import parse_options
from mtt_fast.networks.by_name import network_by_name
from mtt_fast.recipes import recipe_about, recipe_names, recipe_options, recipe_text
from mtt_fast.recipes.__main__ import listing
from mtt_fast.runtime.interrupts import Stopped
from mtt_fast.runtime.seeding import generator_for
from mtt_fast.storage.text_files import read_toml


@dataclass(frozen=True)
class Options:
    lr_img: float = 1.0
    ipc: int = 1
    name: str | None = None
    size: int | None = None
    gradient: Literal["exact", "truncated"] = "exact"


def test_flags_may_be_spelt_with_hyphens_or_underscores() -> None:
    assert parsing.parse(Options, ["--lr-img", "3"], "x") == parsing.parse(Options, ["--lr_img=3"], "x") == Options(3.0)
    assert parsing.parse(Options, [], "x", {"ipc": 4, "name": "n"}) == Options(1.0, 4, "n")
    assert parsing.parse(Options, ["--size", "None"], "x", {"size": 4}) == Options()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--ipc two", "--ipc: expected a whole number, found 'two'; see x --help"),
        ("--lr-img=1,5", "--lr_img: expected a number, found '1,5'; see x --help"),
        ("--ipc", "--ipc: expected a value after it, found none; see x --help"),
        ("--size 3.5", "--size: expected a whole number, found '3.5'; see x --help"),
        ("--gradient trunc", "--gradient: expected one of 'exact', 'truncated', found 'trunc'; see x --help"),
        ("--grad exact", "--grad: unknown option (did you mean --gradient?); see --help"),
        ("--g exact", "--g: unknown option (did you mean --gradient?); see --help"),
        ("--quiet=1", "--quiet=1: unknown option; see --help"),
        ("--lr_imgs=3", "--lr_imgs=3: unknown option (did you mean --lr_img?); see --help"),
        ("True", "True: expected an option, which begins with --"),
    ],
)
def test_a_mistake_is_one_line(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(lambda argv: print(parsing.parse(Options, argv, "x")), arguments.split()) == 2
    told = capsys.readouterr()
    assert told.err.startswith(f"error: {message}")
    assert (told.out, told.err.count("\n")) == ("", 1)


def test_each_way_to_end_has_its_exit_status(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def failing(error: BaseException) -> int:
        def job(argv: Sequence[str]) -> None:
            raise error

        return cli.run(job, [])

    assert cli.run(lambda argv: None, []) == 0
    assert failing(InputError("--ipc 0: expected at least 1")) == 2
    assert capsys.readouterr().err == "error: --ipc 0: expected at least 1\n"
    assert failing(Stopped("continue with: this", 15)) == 143
    assert failing(KeyboardInterrupt()) == 130
    with pytest.raises(RuntimeError, match="a bug"):
        failing(RuntimeError("a bug"))


def test_libraries_tell_their_warnings_alone() -> None:
    for name in ("matplotlib", "PIL"):
        logging.getLogger(name).setLevel(logging.NOTSET)
    assert cli.run(lambda argv: None, []) == 0
    assert {logging.getLogger(name).level for name in ("matplotlib", "PIL")} == {logging.WARNING}


def failing_with(error: Exception) -> Callable[[Sequence[str]], None]:
    def job(argv: Sequence[str]) -> None:
        raise error

    return job


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOENT, "check the path"),
        (errno.ENOTDIR, "check the path"),
        (errno.EISDIR, "check the path"),
        (errno.EACCES, "check the permissions"),
        (errno.EPERM, "check the permissions"),
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "free some of your quota"),
        (errno.EROFS, "choose a place that is not read-only"),
        (errno.EMFILE, "raise the limit of open files"),
        (errno.ENFILE, "close other programs"),
        (errno.ENAMETOOLONG, "choose a shorter name"),
        (errno.EIO, "check the disk"),
    ],
)
def test_what_the_system_refuses_is_told_with_its_own_remedy(
    number: int, remedy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    error = OSError(number, os.strerror(number), "run/x")
    assert cli.run(failing_with(error), []) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: run/x: {os.strerror(number)}; {remedy}")
    assert ("space" in told) == (number == errno.ENOSPC)
    assert ("path" in told) == (remedy == "check the path")


def test_an_error_of_two_files_or_of_none_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(failing_with(OSError(errno.EXDEV, "Invalid cross-device link", "a", None, "b")), []) == 2
    assert capsys.readouterr().err.startswith("error: a -> b: Invalid cross-device link; ")
    assert cli.run(failing_with(OSError("no such thing")), []) == 2
    assert capsys.readouterr().err.startswith("error: a file: no such thing; ")
    assert cli.run(failing_with(OSError()), []) == 2
    assert capsys.readouterr().err == "error: a file: OSError; check the path\n"


@pytest.mark.parametrize("name", ["a\nb", "a\r\nb", "a\x1b[2Jb", "a\u2028b", "a\x85b", "a\udcffb", "a\tb", "a\x00b"])
def test_an_error_is_one_line_whatever_a_file_is_called(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for error in (
        FileNotFoundError(2, "No such file or directory", name),
        FileNotFoundError(2, "No such file or directory", os.fsencode(name)) if "\0" not in name else OSError(name),
        OSError(f"cannot open {name}"),
        InputError(f"{name}: expected a file"),
        Stopped(f"stopped; continue with {name}", 15),
    ):
        assert cli.run(failing_with(error), []) in (2, 143)
        told = capsys.readouterr().err
        assert told.endswith("\n")
        assert told[:-1].isprintable()


def test_a_library_names_arguments_and_a_command_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match=r"^`model` VGG99: expected ConvNet"):
        network_by_name("VGG99", (3, 32, 32), 10)
    assert cli.run(lambda argv: print(network_by_name("VGG99", (3, 32, 32), 10)), []) == 2
    assert capsys.readouterr().err.startswith("error: --model VGG99: expected ConvNet")
    assert cli.run(lambda argv: print(SiameseAugment("spin")), []) == 2
    assert capsys.readouterr().err.startswith("error: --dsa_strategy spin: expected operations among")


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("`lr_teacher` 0: expected more", "--lr_teacher 0: expected more"),
        ("give them (`model`, `res`), or give `zca`.", "give them (--model, --res), or give --zca."),
        ("x: run `python -m mtt_fast.experts`", "x: run `python -m mtt_fast.experts`"),
        ("a/`b`.pt: broken", "a/`b`.pt: broken"),
        ("`rm`.pt: broken", "`rm`.pt: broken"),
    ],
)
def test_arguments_in_backquotes_are_flags(message: str, shown: str) -> None:
    assert cli.with_flags(message) == shown


LIBRARY = ("engine", "networks", "augmentation", "training", "storage", "data", "interop", "runtime")


def test_no_error_of_the_library_names_a_flag() -> None:
    root = Path(cli.__file__).parents[1]
    modules = {folder: list((root / folder).rglob("*.py")) for folder in LIBRARY}
    assert all(modules.values()), "a folder was renamed"
    for path in (path for paths in modules.values() for path in paths):
        for raised in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Raise)):
            texts = [node.value for node in ast.walk(raised) if isinstance(node, ast.Constant)]
            assert not any(re.search(r"(^|\W)--\w", text) for text in texts if isinstance(text, str)), (
                f"{path}:{raised.lineno}"
            )


def test_a_job_without_options_has_help() -> None:
    command = [sys.executable, "-m", "mtt_fast", "env"]
    process = subprocess.run([*command, "--help"], capture_output=True, text=True, timeout=60, check=True)
    assert process.stdout.startswith("usage: python -m mtt_fast.env\n")
    wrong = subprocess.run([*command, "--x"], capture_output=True, text=True, timeout=60, check=False)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: --x: ")


def test_out_of_memory_is_told_with_its_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(lambda argv: torch.ones(2**55), []) == 2  # type: ignore[arg-type]
    error = capsys.readouterr().err
    assert error.startswith("error: out of memory; free some, or give a smaller --networks_at_once or")
    assert "to a distillation, --memory_budget" in error  # which no other command has


@pytest.mark.slow
def test_the_command_env_tells_what_runs_here() -> None:
    command = [sys.executable, "-m", "mtt_fast.env"]
    output = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert f"torch                      {torch.__version__}" in output
    assert "student of ConvNet" in output
    assert subprocess.run([*command, "--x"], capture_output=True, timeout=60, check=False).returncode == 2


@pytest.mark.parametrize("job", ["experts", "buffer", "distill", "evaluate"])
def test_every_command_has_help(job: str) -> None:
    command = [sys.executable, "-m", f"mtt_fast.{job}", "--help"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "--dsa_strategy" in process.stdout
    assert process.stderr == ""


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_complete(name: str) -> None:
    options = parse_options(["--recipe", name])
    assert options.recipe == name
    assert options.max_start_epoch + options.expert_epochs <= options.train_epochs
    assert all(recipe_about(name).values())


def test_the_recipes_are_listed() -> None:
    process = subprocess.run(
        [sys.executable, "-m", "mtt_fast.recipes"], capture_output=True, text=True, timeout=60, check=True
    )
    names = [path.stem for path in Path(recipes.__file__).parent.glob("*.toml")]
    assert recipe_names() == sorted(names)
    assert all(name in process.stdout for name in names)
    assert "\nDATM: DATM (ICLR 2024)" in process.stdout


def names_in(listed: str) -> list[str]:
    return [line.split()[0] for line in listed.splitlines() if line.startswith("  ")]


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ("datm cifar10", [f"datm-cifar10-ipc{ipc}" for ipc in (1, 10, 50, 500, 1000)]),
        ("DATM CIFAR-100 ipc1", ["datm-cifar100-ipc1"]),
        ("mtt tiny", ["tiny-ipc1", "tiny-ipc10", "tiny-ipc50"]),
        ("imagenet tesla", ["tesla-imagenet-ipc1"]),
    ],
)
def test_recipes_are_chosen_by_words(words: str, names: list[str]) -> None:
    assert names_in(listing(words.split())) == names


def test_images_of_imagenet_are_found_by_its_name() -> None:
    assert "imagefruit-ipc10" in names_in(listing(["imagenet", "ipc10"]))


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_by_its_name_is_a_file_of_its_options(name: str, tmp_path: Path) -> None:
    text = listing([name])
    assert f'# source = "{recipe_about(name)["source"]}"' in text
    (tmp_path / "x.toml").write_text(text)
    assert read_toml(tmp_path / "x.toml") == recipe_options(name)
    assert parse_options(["--config", str(tmp_path / "x.toml")]) == replace(
        parse_options(["--recipe", name]), recipe=None, config=str(tmp_path / "x.toml")
    )


def test_recipes_that_lead_back_to_themselves_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipes, "_folder", lambda: tmp_path)
    (tmp_path / "bases").mkdir()
    bases = {"own": "own", "a": "b", "b": "bases-c", "bases/bases-c": "a", "lost": "gone", "last": "bases-d"}
    for name, base in bases.items():
        (tmp_path / f"{name}.toml").write_text(f'base = "{base}"\nipc = 2\n')
    (tmp_path / "bases" / "bases-d.toml").write_text("ipc = 1\nseed = 3\n")
    for name, message in (
        ("own", r"^recipe own: expected a base that is not based on it, found own \(own -> own\); name another base$"),
        ("a", r"^recipe bases-c: .* found a \(a -> b -> bases-c -> a\);"),
        ("lost", r"gone\.toml: cannot be read"),
    ):
        for read in (recipe_options, recipe_text):
            with pytest.raises(InputError, match=message):
                read(name)
    assert recipe_options("last") == {"ipc": 2, "seed": 3}
    assert recipe_text("last") == '# ipc = 1\nseed = 3\n\n# over bases-d\n# base = "bases-d"\nipc = 2\n'


def test_an_unknown_recipe_is_refused() -> None:
    with pytest.raises(InputError, match=r"dtam cifar10: no recipe has all of these words \(did you mean datm\?\)"):
        listing(["dtam", "cifar10"])


@pytest.mark.parametrize("words", ["mtt_fast --help", "mtt_fast.recipes", "mtt_fast.recipes --help"])
def test_a_reader_that_leaves_early_is_no_error(words: str) -> None:
    """Close the output early, as `… | head` does."""
    process = subprocess.Popen([sys.executable, "-m", *words.split()], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    _, errors = process.communicate(timeout=60)
    assert errors == b""
    assert process.returncode == 141


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_do_no_harm(tmp_path: Path, closed: str) -> None:
    """Start a command without some of the standard streams: what it prints goes nowhere, and above all into no file."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "from tqdm import tqdm\n"
        "from mtt_fast.commands import cli\n"
        "def command(_):\n"
        "    with open('file', 'w') as file:\n"
        "        for _ in tqdm(range(2)):\n"
        "            print('a line')\n"
        "        file.write(str(file.fileno()))\n"
        "sys.exit(cli.run(command))\n"
    )
    command = ["bash", "-c", f'"$0" "$1" {closed}', sys.executable, str(script)]
    subprocess.run(command, capture_output=True, timeout=60, check=True, cwd=tmp_path)
    assert int((tmp_path / "file").read_text()) > 2


@pytest.mark.parametrize("words", ["mtt_fast --help", "mtt_fast.recipes", "mtt_fast.evaluate --help"])
def test_an_output_without_some_characters_gets_escapes(words: str) -> None:
    """Print to a terminal or a file of another encoding than UTF-8, as clusters and Windows have."""
    process = subprocess.run(
        [sys.executable, "-m", *words.split()],
        env=os.environ | {"PYTHONIOENCODING": "ascii:strict"}, capture_output=True, timeout=60, check=True,
    )  # fmt: skip
    assert process.stderr == b""
    assert b"\\" in process.stdout
    assert process.stdout.isascii()


def test_random_numbers_follow_from_seed_purpose_and_indices() -> None:
    def first(*place: int, purpose: str = "a", seed: int = 0) -> float:
        return float(torch.rand((), generator=generator_for(seed, purpose, *place)))

    assert first(3) == first(3)
    assert len({first(3), first(4), first(3, 0), first(3, purpose="b"), first(3, seed=1), first(0, 3)}) == 6
