"""Test baselines that are stopped, that die, that are continued, and the checkpoints that they continue from."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from mtt_fast import SyntheticDataset
from mtt_fast.baselines.catalogue import METHODS
from mtt_fast.baselines.method import LearnedSet
from mtt_fast.commands import cli, run_loop
from mtt_fast.distill.command import main as distill
from mtt_fast.networks.protocol import Trainable
from mtt_fast.runtime.interrupts import Stopped
from mtt_fast.storage.tensor_files import load_tensors, save_tensors
from mtt_fast.training.images import Images, RealImages
from tests.baselines.command_runs import LEARNED, flags, run, set_of, summary_of


@pytest.mark.parametrize("method", LEARNED)
def test_resumed_is_bit_identical_to_uninterrupted(method: str, shared: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(*flags(method, shared), "--out", str(whole)) == 0
    assert run(*flags(method, shared), "--out", str(parts), "--Iteration", "1") == 0
    assert run(method, "--out", str(parts), "--resume", "--Iteration", "2") == 0
    one, other = (load_tensors(folder / "checkpoint.safetensors")[0] for folder in (whole, parts))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name
    recipe = SyntheticDataset.load(parts / "synthetic.safetensors").recipe
    assert recipe | {"out": str(whole)} == SyntheticDataset.load(whole / "synthetic.safetensors").recipe
    for kind in ("distilled", "own_training"):
        assert summary_of(whole)["accuracy"].get(kind) == summary_of(parts)["accuracy"].get(kind)


@pytest.mark.usefixtures("curves")
@pytest.mark.parametrize("writer", ["save_grid", "save_snapshot", "save_curves"])
def test_a_run_that_dies_between_an_evaluation_and_its_pictures_draws_them_when_it_goes_on(
    writer: str, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(*flags("dm", shared), "--out", str(whole)) == 0
    draw, calls = getattr(run_loop, writer), itertools.count()

    def dying_every_other_time(*arguments: Any) -> None:
        if next(calls) % 2 == 0:
            raise SystemExit
        draw(*arguments)

    monkeypatch.setattr(run_loop, writer, dying_every_other_time)
    for _ in range(2):  # at the first evaluation, and at the last
        with pytest.raises(SystemExit):
            run(*flags("dm", shared), "--out", str(parts))
    assert run(*flags("dm", shared), "--out", str(parts)) == 0
    for name in ("images.png", "curves.png", "history/iteration_000000.png", "history/iteration_000002.png"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes()
    assert (parts / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_a_run_goes_on_with_the_evaluation_it_began_with(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*flags("dm", shared), "--out", str(tmp_path), "--Iteration", "0") == 0
    assert run("dm", "--out", str(tmp_path), "--resume", "--Iteration", "1", "--protocol", "datm") == 2
    assert "with --protocol mtt, not datm, and compares all its evaluations" in capsys.readouterr().err
    assert run("dm", "--out", str(tmp_path), "--resume", "--protocol", "datm") == 0  # nothing is left to evaluate


def test_a_finished_run_is_not_repeated(shared: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for method in ("random", "dm"):
        out = tmp_path / method
        assert run(*flags(method, shared), "--out", str(out)) == 0
        before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
        caplog.set_level("INFO")
        assert run(*flags(method, shared), "--out", str(out)) == 0
        assert f"{out} is finished: {METHODS[method].title}" in caplog.text
        assert "its evaluations were made with" not in caplog.text
        assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    others = ["--protocol", "datm", "--best_epoch", "--Iteration", "1"]
    assert run(*flags("dm", shared), "--out", str(out), *others) == 0
    assert (
        "its evaluations were made with --protocol mtt, --best_epoch False; python -m mtt_fast.evaluate" in caplog.text
    )


@pytest.mark.usefixtures("default_signals")
def test_a_stopped_run_continues(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert run(*flags("dm", shared), "--out", str(whole)) == 0
    method = METHODS["dm"]

    def interrupted(options: Any, real: RealImages, network: Trainable) -> Images | LearnedSet:
        learning = method.make(options, real, network)
        assert isinstance(learning, LearnedSet)

        def step(iteration: int) -> float:
            if iteration == 0:
                signal.raise_signal(signal.SIGTERM)
            return learning.step(iteration)

        return dataclasses.replace(learning, step=step)

    monkeypatch.setitem(METHODS, "dm", dataclasses.replace(method, make=interrupted))
    words = [*flags("dm", shared), "--save_seconds", "1000", "--out", str(stopped)]
    assert run(*words) == 128 + signal.SIGTERM
    assert "stopped at iteration 1 of 2" in (said := capsys.readouterr().err)
    assert f"continue with: python -m mtt_fast.baselines dm --out {stopped} --resume" in said
    assert not (stopped / "summary.json").exists()
    monkeypatch.setitem(METHODS, "dm", method)
    assert run(*words) == 0  # the same command continues
    assert torch.equal(set_of(whole).images, set_of(stopped).images)


def test_a_run_goes_on_in_the_precision_with_which_it_began(shared: Path, tmp_path: Path) -> None:
    words = [*flags("dm", shared), "--out", str(tmp_path)]
    assert run(*words, "--precision", "tf32") == 0
    assert run(*words, "--Iteration", "3") == 0
    assert 'precision = "tf32"' in (tmp_path / "config.toml").read_text()
    assert summary_of(tmp_path)["iterations"] == 3


def test_a_stopped_evaluation_of_a_chosen_set_says_how_to_go_on(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise Stopped("stopped during an evaluation", signal.SIGINT)

    out = tmp_path / "run"
    monkeypatch.setattr("mtt_fast.baselines.choosing.evaluate_set", interrupted)
    assert run(*flags("random", shared), "--out", str(out)) == 128 + signal.SIGINT
    assert f"the set is in {out}, and the same command evaluates it again" in capsys.readouterr().err
    monkeypatch.undo()
    before = set_of(out).images
    assert run(*flags("random", shared), "--out", str(out)) == 0
    assert torch.equal(set_of(out).images, before)
    assert summary_of(out)["iterations"] == 0


def test_another_run_is_not_overwritten(shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert run(*flags("random", shared), "--out", str(out)) == 0
    before = (out / "synthetic.safetensors").read_bytes()
    assert run(*flags("random", shared), "--out", str(out), "--ipc", "1") == 2
    assert "holds a run with --ipc 2, not 1" in capsys.readouterr().err
    assert run(*flags("herding", shared), "--out", str(out)) == 2
    assert "holds a run of random, not herding" in capsys.readouterr().err
    assert run("herding", "--resume", "--out", str(out)) == 2
    assert "holds a run of random, not herding; choose another --out" in capsys.readouterr().err
    for words in (["--resume"], ["--dataset", "digits"]):
        assert cli.run(distill, [*words, "--out", str(out)]) == 2
        assert "holds a run of random, not mtt_fast.distill; choose another --out" in capsys.readouterr().err
    assert (out / "synthetic.safetensors").read_bytes() == before


def test_a_distillation_is_no_baseline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.toml").write_text('dataset = "digits"\n')
    assert run("dm", "--resume", "--out", str(tmp_path)) == 2
    assert "holds a run of mtt_fast.distill, not dm" in capsys.readouterr().err


def test_a_checkpoint_of_something_else_is_named(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for method in ("dm", "dd"):
        assert run(*flags(method, shared), "--out", str(tmp_path / method)) == 0
    shutil.copy(tmp_path / "dm" / "checkpoint.safetensors", tmp_path / "dd" / "checkpoint.safetensors")
    assert run("dd", "--out", str(tmp_path / "dd"), "--resume", "--Iteration", "8") == 2
    assert "checkpoint.safetensors: not a checkpoint of this method" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["dm", "dd", "ld"])
def test_a_checkpoint_with_a_tensor_of_another_form_or_without_one_is_refused(
    method: str, shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*flags(method, shared), "--out", str(tmp_path)) == 0
    path = tmp_path / "checkpoint.safetensors"
    saved, metadata = load_tensors(path)
    assert any(name.startswith("optimiser.0.") for name in saved)  # the names that older checkpoints have too
    tensors = {name: tensor.clone() for name, tensor in saved.items()}
    for name, tensor in tensors.items():
        for other in (tensor[None], tensor.half()):
            save_tensors(path, tensors | {name: other}, metadata)
            assert run(method, "--out", str(tmp_path), "--resume", "--Iteration", "3") == 2
            assert "checkpoint.safetensors: not a checkpoint of this method" in capsys.readouterr().err
    save_tensors(path, {name: tensor for name, tensor in tensors.items() if name != "labels"}, metadata)
    assert run(method, "--out", str(tmp_path), "--resume", "--Iteration", "3") == 2
    assert "checkpoint.safetensors: not a checkpoint of this method" in capsys.readouterr().err
    save_tensors(path, tensors, metadata)
    assert run(method, "--out", str(tmp_path), "--resume", "--Iteration", "3") == 0


def test_a_checkpoint_from_before_the_steps_of_earlier_networks_were_kept_is_read(shared: Path, tmp_path: Path) -> None:
    assert run(*flags("ld", shared), "--out", str(tmp_path)) == 0
    path = tmp_path / "checkpoint.safetensors"
    saved, metadata = load_tensors(path)
    save_tensors(path, {name: tensor.clone() for name, tensor in saved.items() if name != "lifetimes"}, metadata)
    assert run("ld", "--out", str(tmp_path), "--resume", "--Iteration", "3") == 0
    assert load_tensors(path)[0]["lifetimes"].shape == (0,)
