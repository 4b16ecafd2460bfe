"""Check that every option of every command, by itself and with its partner, changes the output of a toy job, or is refused or logged.

A job's outcome is what it wrote (only numbers, without the options that the files repeat), where, and what it said of its plan.
The options' values and expected effects are listed in option_rows.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from mtt_fast import TrajectoryStore
from mtt_fast.baselines import command as baselines
from mtt_fast.commands import cli
from mtt_fast.commands.option_fields import fields_of
from mtt_fast.data import load
from mtt_fast.distill import command as distill
from mtt_fast.distill.options import DistillOptions
from mtt_fast.experts import command as experts
from mtt_fast.storage.tensor_files import load_tensors
from mtt_fast.testing import reference_convnet
from tests.commands.option_rows import COMMANDS, EVALUATION, NETWORK, NO_EFFECT, OWN, ROWS, RUN, option_cases

pytestmark = pytest.mark.slow  # hundreds of jobs


_PARAMETRISATION = """
import torch
import mtt_fast


class Scaled(mtt_fast.Parametrisation):
    def __init__(self, images, num_classes, scale=1.0):
        super().__init__()
        self.pixels, self.scale = torch.nn.Parameter(images.clone()), scale

    def forward(self, index):
        return self.scale * self.pixels[index]
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Make a folder with the inputs of the toy jobs: data, experts, a run, a baseline, sets and experts of the public code."""
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(folder):
        patch.setattr("mtt_fast.commands.run_loop.save_curves", lambda *_: None)
        patch.setattr("os.fsync", lambda _: None)  # nothing here has to outlive the test
        assert cli.run(distill.main, f"{RUN} --eval_it 1 --out run".split()) == 0
        assert cli.run(experts.main, f"{NETWORK} --train_epochs 5 --num_experts 3 --buffer_path three".split()) == 0
        learned = f"dm {EVALUATION} --Iteration 1 --batch_real 16 --out baseline"
        assert cli.run(baselines.main, learned.split()) == 0
        assert cli.run(baselines.main, f"random {EVALUATION} --out baselines/random".split()) == 0
        assert cli.run(distill.main, f"{RUN} --Iteration 0 --no_aug --out plain".split()) == 0
        _save_foreign_files()
        Path("mine.toml").write_text("student_l2 = 0.5\n")
        Path("mine.py").write_text(_PARAMETRISATION)
        Path("idle.toml").write_text("mom_y = 0.5\ncanvas_size = 2\n")
        yield folder


def _save_foreign_files() -> None:
    generator = torch.Generator().manual_seed(0)
    kinds: dict[str, tuple[int, Tensor]] = {
        "pair": (8, torch.arange(10)),
        "two": (8, torch.arange(10).repeat(2)),
        "canvases": (16, torch.arange(10)),
        "soft": (8, torch.randn(10, 10, generator=generator).softmax(1)),
    }
    for name, (side, labels) in kinds.items():
        Path(name).mkdir()
        torch.save(torch.randn(len(labels), 1, side, side, generator=generator), f"{name}/images_best.pt")
        torch.save(labels, f"{name}/labels_best.pt")
    store = TrajectoryStore("buffers/digits/ConvNetD1W4")
    module = reference_convnet(1, 10, 8, 4, 1)
    whole = []
    for epoch in range(3):
        nn.utils.vector_to_parameters(store.read(0, epoch), module.parameters())
        whole.append([parameter.detach().clone() for parameter in module.parameters()])
    Path("public").mkdir()
    torch.save([whole], "public/replay_buffer_0.pt")
    data = load("digits", data_path="data", progress=False)
    torch.save([(data.train.labels == label).nonzero()[:, 0] for label in range(10)], "order.pt")
    np.save("scores.npy", np.arange(len(data.train.labels)) // 7 % 2)
    for split, images in (("train", data.train), ("test", data.test)):
        for place in range(60):
            of_class = Path("pictures") / split / str(int(images.labels[place]))
            of_class.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images.images[place, 0].numpy()).save(of_class / f"{place}.png")


_DROPPED = {
    "versions", "seconds", "command", "options", "recipe", "device", "peak_memory_bytes", "arithmetic", "hyperparameters",
    "seed", "iteration_seconds", "question", "imported_from", "checksum",
}  # fmt: skip
"""Records that repeat the options, or differ from one run to the next."""


def _scrubbed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _scrubbed(each) for key, each in value.items() if key not in _DROPPED and "seconds" not in key}
    return [_scrubbed(each) for each in value] if isinstance(value, list) else value


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()


def _content(path: Path) -> Any:
    """Return what a file says, without what repeats the options."""
    if path.suffix == ".safetensors" and "checkpoint" not in path.name:
        tensors, metadata = load_tensors(path)
        told = {key: _scrubbed(json.loads(value)) for key, value in metadata.items() if value.startswith(("{", "["))}
        return told, {name: (str(tensor.dtype), _digest(tensor)) for name, tensor in tensors.items()}
    if path.suffix == ".json" and path.name != "seconds.json":
        return _scrubbed(json.loads(path.read_text()))
    if path.suffix in (".png", ".gif"):
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return None


Outcome = tuple[int, list[str], Any]


_ONLY_READ = ("pictures", "pair", "two", "soft", "canvases", "public")


class Toy:
    """A runner of toy jobs, each in a copy of the world."""

    def __init__(self, world: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
        self._world, self._caplog, self._capsys = world, caplog, capsys

    @contextlib.contextmanager
    def copy(self) -> Iterator[None]:
        """Make a fresh copy of the world the working directory within the block."""
        place = self._world.with_name("copy")
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        for entry in self._world.iterdir():
            if entry.name in _ONLY_READ:
                (place / entry.name).symlink_to(entry)
            else:
                (shutil.copytree if entry.is_dir() else shutil.copy2)(entry, place / entry.name)
        with contextlib.chdir(place):
            yield

    def _is_of_world(self, path: Path) -> bool:
        """Return whether a file is as it was before the job."""
        before = self._world / path
        return before.exists() and before.stat().st_mtime_ns == path.stat().st_mtime_ns

    def run(self, command: str, words: str) -> tuple[int, list[str], str]:
        """Return the exit status of a job, the lines that it said, and its error."""
        self._caplog.clear()
        with self._caplog.at_level(logging.INFO):
            status = cli.run(COMMANDS[command].main, words.split())
        printed = self._capsys.readouterr()
        error = next((line for line in printed.err.splitlines() if line.startswith("error: ")), "")
        return status, [*self._caplog.messages, *printed.out.splitlines(), error], error

    def outcome(self, command: str, words: str) -> Outcome:
        """Return the status of a job, what it said without what it told of options, and what it wrote."""
        with self.copy():
            status, said, _ = self.run(command, words)
            files = {
                str(path): _content(path)
                for path in sorted(Path().rglob("*"))
                if path.is_file() and "events" not in path.parts and not self._is_of_world(path)
            }
        free = re.compile(r" of \d+ MiB|(?<=: )\d+\.\d s: .*")  # memory that is free, and where the seconds went
        return status, [free.sub("", line) for line in said if not line.startswith("--")], files


@pytest.fixture
def toy(
    world: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> Toy:
    monkeypatch.setattr("mtt_fast.commands.run_loop.save_curves", lambda *_: None)
    monkeypatch.setattr("os.fsync", lambda _: None)
    monkeypatch.setattr("mtt_fast.baselines.truncated_bptt._OWN_STEPS", 5)  # a thousand steps would show no more
    _tell(monkeypatch, "mtt_fast.commands.options.load")
    for job in ("mtt_fast.experts.missing", "mtt_fast.training.evaluation"):
        _tell(monkeypatch, f"{job}.concurrency_for", of_result=True)
    for job in ("mtt_fast.distill.command", "mtt_fast.baselines.learning"):
        _tell(monkeypatch, f"{job}.save_checkpoint", arguments=False)
    return Toy(world, caplog, capsys)


def _tell(patch: pytest.MonkeyPatch, name: str, arguments: bool = True, of_result: bool = False) -> None:
    """Have a function say in the log that it is called: with its arguments by name, or with what it returns."""
    module, _, attribute = name.rpartition(".")
    function = getattr(__import__(module, fromlist=[attribute]), attribute)

    def telling(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs) if of_result else None
        logging.getLogger("told").info("%s %s", attribute, result if of_result else kwargs if arguments else "")
        return result if of_result else function(*args, **kwargs)

    patch.setattr(name, telling)


_KNOWN: dict[tuple[str, str], Outcome] = {}
"""Outcomes of jobs without the option that is looked at."""


def before(toy: Toy, command: str, words: str) -> Outcome:
    if (command, words) not in _KNOWN:
        _KNOWN[command, words] = toy.outcome(command, words)
    return _KNOWN[command, words]


@pytest.mark.parametrize("command", COMMANDS)
def test_no_option_is_missing(command: str) -> None:
    assert set(ROWS[command]) == set(fields_of(COMMANDS[command].options)), "each option has a row here"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_a_case(command: str) -> None:
    """Check that options that all methods have are shown of one of them."""
    cases = {tuple(case.values) for case in option_cases()}
    shown_of = (command, "random") if command in OWN else (command,)
    assert [option for option in ROWS[command] if not any((name, option) in cases for name in shown_of)] == []


@pytest.mark.parametrize(
    "command", [pytest.param(name, marks=[pytest.mark.slow] * (name in OWN), id=name) for name in COMMANDS]
)
def test_the_same_job_has_the_same_outcome(toy: Toy, command: str) -> None:
    """Check that outcomes repeat, since otherwise a different outcome would show nothing."""
    job = COMMANDS[command].job
    assert toy.outcome(command, job) == before(toy, command, job)


@pytest.mark.parametrize(("command", "option"), option_cases())
def test_an_option_has_an_effect_or_says_that_it_has_none(toy: Toy, command: str, option: str) -> None:
    row = ROWS[command][option]
    job = COMMANDS[command].job if row.job is None else row.job
    if row.message:
        with toy.copy():
            _, said, _ = toy.run(command, f"{job} {row.words}")
        assert any(row.message in line for line in said), said
    if row.partner or not row.message:
        status, said, files = toy.outcome(command, f"{job} {row.partner} {row.words}")
        other = f"{job} {row.partner}".strip() if row.words else COMMANDS[command].job
        known = before(toy, command, other)
        assert (status, said, files) != known
        assert 0 in (status, known[0]) or option in ("subset", "res", "download"), said  # those show at the loader
        assert not any("has no effect" in line for line in said)


@pytest.mark.parametrize(("command", "words", "message"), NO_EFFECT)
def test_what_has_no_effect_with_the_others_is_refused(toy: Toy, command: str, words: str, message: str) -> None:
    with toy.copy():
        status, _, error = toy.run(command, words)
    assert status == 2
    assert error.startswith(f"error: {message}")


def test_auto_is_right_on_a_cpu() -> None:
    asked = DistillOptions(precision="auto", device="cpu")
    assert "precision" not in asked.without_effect()
    assert "precision" in dataclasses.replace(asked, precision="tf32").without_effect()
