"""Check distillations of the parameters from which images are computed."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch

from mtt_fast import SyntheticDataset
from mtt_fast.commands import cli
from mtt_fast.data import load
from mtt_fast.distill.command import main
from mtt_fast.parametrisations.by_name import make_parametrisation
from mtt_fast.storage.checkpoint import load_checkpoint
from mtt_fast.storage.tensor_files import load_tensors, save_tensors

TOY = (
    "--dataset digits --model ConvNetD1W4 --num_experts 1 --train_epochs 3 --max_start_epoch 1 --expert_epochs 1 --ipc 2 "
    "--syn_steps 2 --Iteration 4 --eval_it 2 --num_eval 1 --epoch_eval_train 1 --batch_real 128 --save_seconds 0 --lr_img 50"
).split()
SPEED = "num_saet=4 dim_saet=6 num_head=2 decoder_depth=1 top_k=3 l1_weight=1e-3 saet_rate=0.5 freenet_rate=1e-3"
DDIF = ["ddif", "--parametrisation_options", "num_layers=2 layer_size=4 epochs_init=5", "--lr_img", "1e-3"]
OWN = """
import torch
import mtt_fast


class Pixels(mtt_fast.Parametrisation):
    def __init__(self, images, num_classes):
        super().__init__()
        self.pixels = torch.nn.Parameter(images.clone())

    def forward(self, index):
        return self.pixels[index]


class Mirrored(Pixels):
    def __init__(self, images, num_classes, count=2):
        super().__init__(images[::count], num_classes)
        self.count = count

    def forward(self, index):
        images = self.pixels[index // self.count]
        return torch.where((index % self.count == 0).view(-1, 1, 1, 1), images, images.flip(3))
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    load("digits", data_path="data", progress=False)
    Path("own.py").write_text(OWN)
    return tmp_path


def distilled(out: str, *flags: str) -> SyntheticDataset:
    assert cli.run(main, [*TOY, "--out", out, *flags]) == 0
    return SyntheticDataset.load(Path(out) / "synthetic.safetensors")


def test_learned_pixels_are_the_run_without_a_parametrisation() -> None:
    plain = distilled("plain", "--lr_decay")
    parametrised = distilled("own", "--lr_decay", "--parametrisation", "own.py:Pixels")
    assert torch.equal(plain.images, parametrised.images)
    assert torch.equal(plain.lr, parametrised.lr)
    assert torch.equal(parametrised.parameters["pixels"], plain.images)
    logs = [
        [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
        for out in ("plain", "own")
    ]
    assert [line.get("loss") for line in logs[0]] == [line.get("loss") for line in logs[1]]


@pytest.mark.parametrize(
    "flags", [["speed", "--parametrisation_options", SPEED], ["own.py:Mirrored"], DDIF], ids=["speed", "own", "ddif"]
)
def test_a_resumed_run_is_the_same(flags: list[str]) -> None:
    whole = distilled("whole", "--parametrisation", *flags)
    distilled("parts", "--parametrisation", *flags, "--Iteration", "2")
    assert cli.run(main, "--out parts --resume --Iteration 4".split()) == 0
    parts = SyntheticDataset.load("parts/synthetic.safetensors")
    assert torch.equal(whole.images, parts.images)
    states = [load_checkpoint(Path(out), torch.device("cpu")) for out in ("whole", "parts")]
    for name in ("parameters", "parameters_velocity", "parameters_square"):
        first, second = (getattr(state, name) for state in states)
        if name == "parameters_square" and flags[0] != "ddif":
            assert (first, second) == (None, None)
            continue
        assert first
        assert all(torch.equal(each, second[key]) for key, each in first.items())


def test_random_numbers_of_a_fit_are_those_of_the_seed() -> None:
    """Check it where images depend on a buffer, of which a checkpoint holds nothing: a run could not go on with another one."""
    fit = "\n    def fit(self, images):\n        self.offset.copy_(torch.rand(()))\n\n"
    text = OWN.replace("(images.clone())", "(images.clone())\n        self.register_buffer('offset', torch.zeros(()))")
    Path("own.py").write_text(text.replace("pixels[index]\n", f"pixels[index] + self.offset\n{fit}", 1))
    first, again, other = (
        distilled(out, "--parametrisation", "own.py:Pixels", "--seed", seed).images
        for out, seed in (("first", "0"), ("again", "0"), ("other", "1"))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert cli.run(main, "--out first --resume --Iteration 5".split()) == 0


def test_an_error_of_a_fit_is_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    fit = "\n    def fit(self, images):\n        images.nothing\n\n"
    Path("own.py").write_text(OWN.replace("pixels[index]\n", f"pixels[index]\n{fit}", 1))
    assert cli.run(main, [*TOY, "--out", "own", "--parametrisation", "own.py:Pixels"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert (
        error
        == "error: --parametrisation own.py:Pixels: AttributeError: 'Tensor' object has no attribute 'nothing' (own.py, line 15)"
    )


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("self.pixels.requires_grad_(False)", "none in place of pixels torch.float32 (20, 1, 8, 8)"),
        ("self.pixels = torch.nn.Parameter(images[:1])", "pixels torch.float32 (1, 1, 8, 8) in place of pixels torch"),
        ("self.more = torch.nn.Parameter(torch.zeros(2))", "more torch.float32 (2,) in place of none"),
    ],
)
def test_a_fit_to_other_parameters_is_refused(line: str, found: str, capsys: pytest.CaptureFixture[str]) -> None:
    fit = f"\n    def fit(self, images):\n        {line}\n\n"
    Path("own.py").write_text(OWN.replace("pixels[index]\n", f"pixels[index]\n{fit}", 1))
    assert cli.run(main, [*TOY, "--out", "own", "--parametrisation", "own.py:Pixels"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "--parametrisation own.py:Pixels: fit: expected the learned parameters of __init__, found " + found in error


def test_a_fit_may_replace_a_parameter_by_one_of_its_shape() -> None:
    fit = "\n    def fit(self, images):\n        self.pixels = torch.nn.Parameter(images.clone())\n\n"
    Path("own.py").write_text(OWN.replace("pixels[index]\n", f"pixels[index]\n{fit}", 1))
    assert torch.equal(distilled("fitted", "--parametrisation", "own.py:Pixels").images, distilled("plain").images)


@pytest.mark.usefixtures("default_signals")
def test_a_fit_that_is_stopped_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.optim.Adam, "zero_grad", lambda _: signal.raise_signal(signal.SIGTERM))
    assert cli.run(main, [*TOY, "--out", "own", "--parametrisation", *DDIF]) == 128 + signal.SIGTERM
    assert "stopped while the fields were fitted; the same command continues" in capsys.readouterr().err


def test_the_saved_parameters_give_the_saved_images() -> None:
    saved = distilled("runs", "--parametrisation", "speed", "--parametrisation_options", SPEED)
    module = make_parametrisation("speed", SPEED, saved.images, 10, torch.Generator()).eval()
    module.load_state_dict(saved.parameters)
    with torch.no_grad():
        torch.testing.assert_close(module(torch.arange(20)), saved.images)
    best = SyntheticDataset.load("runs/best.safetensors")
    assert best.parameters.keys() == saved.parameters.keys()


def test_the_log_tells_the_storage(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    distilled("own", "--parametrisation", "own.py:Mirrored", "--Iteration", "0")
    assert (
        "images: computed by own.py:Mirrored from 640 stored numbers of 32 bits, as many as 1 images per class"
        in caplog.text
    )


def test_a_class_of_the_users_own_is_made_twice_for_its_trial_and_once_for_the_run() -> None:
    """Make what may be slow, such as a generator that is loaded, no more often."""
    Path("own.py").write_text(
        OWN.replace(
            "(images.clone())", "(images.clone())\n        with open('made', 'a') as file:\n            file.write('x')"
        )
    )
    for more in ([], ["--Iteration", "6"]):
        distilled("own", "--parametrisation", "own.py:Pixels", *more)
        assert Path("made").read_text() == "xxx"
        Path("made").unlink()


def test_the_dry_run_takes_a_class_that_counts_values(capsys: pytest.CaptureFixture[str]) -> None:
    count = "\n    def stored_numbers(self):\n        return int((self.pixels != 0).sum())\n"
    Path("own.py").write_text(OWN.replace("class Mirrored", f"class Counted(Pixels):{count}\n\nclass Mirrored"))
    assert cli.run(main, [*TOY, "--out", "own", "--parametrisation", "own.py:Counted", "--dry-run"]) == 0
    assert "the log of the run will tell the numbers that have to be stored" in capsys.readouterr().out


def test_the_dry_run_quotes_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--parametrisation", "speed", "--parametrisation_options", SPEED]
    assert cli.run(main, [*TOY, "--out", "own", *flags, "--dry-run"]) == 0
    assert f"--parametrisation_options '{SPEED}'" in capsys.readouterr().out


def test_parameters_that_do_not_fit_in_memory_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*TOY, "--out", "own", "--parametrisation", "own.py:Pixels", "--dry-run"]
    for free in (20_000, 40_000):  # less than the parameters take, and hardly more
        monkeypatch.setattr("mtt_fast.engine.memory_plan.free_bytes", lambda _, free=free: free)
        assert cli.run(main, flags) == 2
        said = capsys.readouterr().err
        assert "--memory_budget auto: expected at least 5 MiB for 2 steps of 20 images, found 1 MiB, 80% of the" in said
        assert "or --ipc or the sizes of --parametrisation, whose 1,280 parameters take 1 MiB" in said


def test_a_class_may_group_the_images_of_a_class() -> None:
    text = OWN.replace("images.clone()", "images.view(num_classes, -1, 4, *images.shape[1:])[:, :, 0].flatten(0, 1)")
    Path("own.py").write_text(text.replace("self.pixels[index]\n\n\n", "self.pixels[index // 4]\n\n\n"))
    saved = distilled("own", "--ipc", "4", "--parametrisation", "own.py:Pixels")
    assert len(saved.parameters["pixels"]) == 10
    assert len(saved.images) == 40


def test_the_dry_run_names_the_parametrisation(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(main, [*TOY, "--out", "own", "--parametrisation", "own.py:Pixels", "--dry-run"]) == 0
    assert "images    computed by own.py:Pixels" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--parametrisation own.py:Pixels --ema_decay 0.9",
            "--parametrisation own.py:Pixels, --ema_decay: expected one of them",
        ),
        (
            "--parametrisation own.py:Pixels --msz_per_channel 9",
            "--parametrisation own.py:Pixels, --msz_per_channel: expected one",
        ),
        (
            "--parametrisation own.py:Pixels --distilled_share 0.5",
            "--parametrisation own.py:Pixels, --distilled_share: expected",
        ),
        (
            "--parametrisation own.py:Pixels --texture",
            "--parametrisation own.py:Pixels, --texture: expected one of them",
        ),
        ("--parametrisation speed", "--parametrisation_options: expected num_saet, "),
        ("--parametrisation own.py:Pixel", "--parametrisation own.py:Pixel: expected a class Pixel that inherits"),
        ("--parametrisation_options a=1", "--parametrisation_options a=1: has no effect without --parametrisation"),
        ("--student_dampening 0.9", "--student_dampening 0.9: has no effect without --student_mom"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(
    flags: str, message: str, folder: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(main, [*TOY, "--out", "new", *flags.split()]) == 2
    assert message in caplog.text + capsys.readouterr().err
    assert not (folder / "buffers").exists()
    assert not (folder / "new").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "own.py:Mirrored --parametrisation_options count=4",
            "holds a run with --parametrisation_options , not count=4",
        ),
        ("own.py:Pixels", "holds a run with --parametrisation own.py:Mirrored, not own.py:Pixels"),
    ],
)
def test_a_run_does_not_continue_with_another_parametrisation(
    flags: str, message: str, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    distilled("run", "--parametrisation", "own.py:Mirrored")
    assert cli.run(main, [*TOY, "--out", "run", "--Iteration", "6", "--parametrisation", *flags.split()]) == 2
    assert message in caplog.text + capsys.readouterr().err


def test_a_checkpoint_of_other_parameters_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    distilled("run", "--parametrisation", "own.py:Mirrored")
    Path("own.py").write_text(OWN.replace("self.pixels", "self.colours"))
    assert cli.run(main, [*TOY, "--out", "run", "--Iteration", "6", "--resume"]) == 2
    assert "checkpoint.safetensors: colours: expected float32 (10, 1, 8, 8)" in capsys.readouterr().err


def test_code_that_was_changed_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    distilled("run", "--parametrisation", "own.py:Mirrored")
    Path("own.py").write_text(OWN.replace("images.flip(3)", "images.flip(2)"))
    config = Path("run/config.toml").read_text()
    assert cli.run(main, [*TOY, "--out", "run", "--Iteration", "6", "--resume"]) == 2
    assert Path("run/config.toml").read_text() == config
    assert (
        "expected the images with which the run in run stopped, found others at the same parameters"
        in capsys.readouterr().err
    )


def test_code_with_other_rates_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    distilled("run", "--parametrisation", "own.py:Pixels")
    rates = "    def relative_rate(self, name):\n        return 100.0\n\n"
    Path("own.py").write_text(OWN.replace("    def forward", rates + "    def forward", 1))
    assert cli.run(main, [*TOY, "--out", "run", "--Iteration", "6", "--resume"]) == 2
    assert "own.py:Pixels: expected the file with which the run in run began" in capsys.readouterr().err
    Path("own.py").write_text(OWN)
    assert cli.run(main, [*TOY, "--out", "run", "--Iteration", "6", "--resume"]) == 0
    assert json.loads(Path("run/summary.json").read_text())["code_digest"]


def test_a_checkpoint_of_pixels_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    distilled("plain")
    distilled("run", "--parametrisation", "own.py:Pixels")
    tensors, metadata = load_tensors("plain/checkpoint.safetensors")
    save_tensors("run/checkpoint.safetensors", tensors, {key: metadata[key] for key in metadata if key != "checksums"})
    assert cli.run(main, [*TOY, "--out", "run", "--Iteration", "6", "--resume"]) == 2
    assert (
        "expected parameters that are learned, as --parametrisation asks for, found others" in capsys.readouterr().err
    )
