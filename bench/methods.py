"""Compare every method of the package under one protocol and with one set of experts, by one command.

Each method runs as a user runs it, by one command in a process of its own, so that its peak memory is its own; its results
are read from its run folder. A method that fails fills the last column of its row, and the others continue.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench.parsing import RecipeOptions
from bench.records import publish
from bench.tables import percent
from mtt_fast.commands.earlier_run import check_comparable
from mtt_fast.commands.options import EvaluationOptions, buffer_folder
from mtt_fast.data.catalogue import dataset_info
from mtt_fast.distill.command_line import parse_options
from mtt_fast.distill.options import DistillOptions
from mtt_fast.engine.students.choice import precision_on
from mtt_fast.errors import InputError, did_you_mean
from mtt_fast.experts.missing import train_missing_experts
from mtt_fast.runtime.interrupts import Stopped, stop_request
from mtt_fast.runtime.numerics import numerics
from mtt_fast.runtime.provenance import peak_memory_bytes
from mtt_fast.storage.run_files import SUMMARY
from mtt_fast.training.evaluation import Accuracy
from mtt_fast.training.images import real_images

log = logging.getLogger("mtt_fast")


@dataclass(frozen=True)
class Method:
    """A row of the table: a command, and the accuracy that counts."""

    title: str
    command: str
    """the words after `python -m mtt_fast.`"""
    flags: str = ""
    """flags beside the setting's, with the names of `_numbers` in braces"""
    needs: tuple[str, ...] = ()
    """options of the setting that the command takes, besides those of data, network and evaluation"""
    accuracy: str = "distilled"
    """the accuracy's name in summary.json"""


# per channel: FreD's number for CIFAR-10 with the storage of one image per class; images with fewer pixels keep half of their frequencies
_FREQUENCIES = 64
_EXPERT, _ITERATIONS = ("buffer_path",), ("Iteration", "eval_it")
_DISTILL_OPTIONS = tuple(
    field.name
    for field in dataclasses.fields(DistillOptions)
    if field.name not in ("recipe", "config", "out", "resume", "dry_run")
)


def _mtt(title: str, flags: str = "", accuracy: str = "distilled") -> Method:
    return Method(title, "distill", flags, _DISTILL_OPTIONS, accuracy)


METHODS = {
    "random": Method("Random", "baselines random"),
    "random-labels": Method("Random, labels of experts", "baselines random", "--labels experts", _EXPERT),
    "herding": Method("Herding", "baselines herding", needs=_EXPERT),
    "forgetting": Method("Forgetting", "baselines forgetting", needs=_EXPERT),
    "kmeans": Method("K-means", "baselines kmeans", needs=_EXPERT),
    "dm": Method("DM", "baselines dm", needs=_ITERATIONS),
    "dc": Method("DC", "baselines dc", needs=_ITERATIONS),
    "dsa": Method("DSA", "baselines dsa", needs=_ITERATIONS),
    "dd": Method("DD", "baselines dd", "--pix_init real --lr_img 0.1", _ITERATIONS),
    "ld": Method("LD", "baselines ld", "--lr_y 0.01", _ITERATIONS),
    "ratbptt": Method(
        "RaT-BPTT",
        "baselines ratbptt",
        "--pix_init real --lr_img 0.03 --batch_real 512 --window 20 --totwindow 60",
        _ITERATIONS,
    ),
    "atbptt": Method(
        "AT-BPTT",
        "baselines atbptt",
        "--pix_init real --lr_img 0.03 --batch_real 512 --window 20 --d 5 --totwindow 60",
        _ITERATIONS,
    ),
    "mtt": _mtt("MTT"),
    "mtt-tesla": _mtt("MTT with TESLA's gradient (approximate)", "--gradient truncated"),
    "mtt-teacher": _mtt("MTT with TESLA's labels of a teacher", "--teacher_label"),
    "mtt-labels": _mtt("MTT with DATM's labels", "--lr_y 1 --label_init experts"),
    "mtt-ftd": _mtt("MTT with FTD's average of the images", "--ema_decay 0.99", "ema"),
    "mtt-datm": _mtt(
        "MTT with DATM's labels, start and range",
        "--lr_y 1 --label_init experts --pix_init samples_predicted_correctly --current_max_start_epoch {half_start} "
        "--expansion_end_epoch {half_way}",
    ),
    "mtt-att": _mtt("MTT with ATT's nearest step", "--match_step nearest"),
    "mtt-pad": _mtt("MTT with PAD's mask", "--depth_ratio 0.25"),
    "mtt-edf-mask": _mtt("MTT with EDF's mask", "--loss_ratio 0.25"),
    "mtt-edf": _mtt("MTT with EDF's weights of the pixels", "--cam_model ConvNetD2W32 --cam_interval 50"),
    "mtt-mct": _mtt("MTT with MCT's waypoints", "--num_interpolation 4"),
    "mtt-fred": _mtt(
        "MTT with FreD's frequencies",
        "--ipc {images_of_frequencies} --msz_per_channel {frequencies} --lr_img {frequency_lr}",
    ),
    "mtt-speed": _mtt(
        "MTT with SPEED's images",
        "--ipc 17 --batch_syn 64 --parametrisation speed --parametrisation_options "
        "'num_saet=16 dim_saet=32 num_head=2 decoder_depth=1 top_k=48 l1_weight=3e-6' "
        "--student_mom 0.9 --student_dampening 0.9 --mom_img 0.95 --lr_img 100",
    ),
}
"""The rows in the table's order. The learning rates of DD, LD, RaT-BPTT and AT-BPTT suit hundreds of iterations; those of the papers suit tens of thousands."""


@dataclass(frozen=True)
class Options(RecipeOptions):
    """Make a set by every method in one setting, and evaluate all by one protocol.

    Every method takes data, network, images per class and protocol of --recipe; those that learn their images, its iterations too.
    """

    packed_path: str | None = None
    """folder of the packed data sets, if not DATA_PATH/packed"""
    res: int | None = None
    """resolution, if not the recipe's"""
    model: str | None = None
    """network, if not the recipe's"""
    ipc: int | None = None
    """number of images per class, if not the recipe's"""
    protocol: str | None = None
    """protocol of evaluation, if not the recipe's"""
    seed: int = 0
    """seed of every random number"""
    methods: str = ",".join(name for name in METHODS if name != "mtt-speed")
    """methods to run, joined by commas; mtt-speed, whose sizes are SPEED's for CIFAR-10 with the storage of one image per class, only if named"""
    buffer_path: str | None = None
    """folder of the experts; default RUNS/buffers"""
    runs: str | None = None
    """folder of the run folders; finished runs are not repeated. Without it they are deleted"""

    def setting(self, buffer_path: Path) -> DistillOptions:
        """Return the options of plain MTT. Raises `InputError` for an invalid one."""
        setting = parse_options(
            [*self.flags_without("methods", "buffer_path", "runs"), "--buffer_path", str(buffer_path)]
        )
        return dataclasses.replace(setting, eval_it=max(1, setting.Iteration))


def main(options: Options, command: str) -> None:
    """Train the experts, run every method, print the table, write the record."""
    chosen = _chosen(options.methods)
    device = options.torch_device()
    with _folder(options.runs) as folder:
        setting = options.setting(Path(options.buffer_path or folder / "buffers"))
        rows = [_experts(setting, device)]
        for name in (bar := tqdm(chosen, unit="method")):
            bar.set_postfix_str(name)
            rows.append(_row(METHODS[name], setting, folder / name))
            log.info("%s: %s", rows[-1]["method"], rows[-1]["problem"] or percent(rows[-1]["accuracy"]))
    data = Path(setting.subset or setting.dataset).name
    conditions = {
        "case": f"{data}, {setting.ipc} per class, {setting.model}, {setting.Iteration} iterations of each learned set",
        "seconds": "of making the set: without its evaluations, and without the experts, which Herding, Forgetting, "
        "K-means and MTT need",
        "peak_memory": "of the whole process",
        "evaluation": setting.evaluation_protocol().describe(),
        "load": f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} processors",
    }
    publish(options, "methods", f"methods-{data}-ipc{setting.ipc}-{device.type}", device, conditions, rows, command)


def _chosen(names: str) -> list[str]:
    chosen = names.split(",")
    for name in chosen:
        if name not in METHODS:
            raise InputError(
                f"--methods {name}: expected some of {', '.join(METHODS)}{did_you_mean(name, list(METHODS))}"
            )
    return chosen


@contextlib.contextmanager
def _folder(runs: str | None) -> Iterator[Path]:
    """Yield the folder of the runs: `runs`, or a temporary one that is deleted afterwards."""
    if runs is not None:
        yield Path(runs)
        return
    with tempfile.TemporaryDirectory(prefix="mtt_fast-") as temporary:
        yield Path(temporary)


def _experts(setting: DistillOptions, device: torch.device) -> dict[str, Any]:
    """Train the experts that are missing; return their row: the accuracy of all the data."""
    with numerics(device, setting.precision):
        data = setting.load_data()
        network = setting.network(data)
        setting.evaluated_networks(data)
        folder = buffer_folder(setting.buffer_path, data, setting.model, zca=setting.zca)
        complete = len(list(folder.glob("*.safetensors"))) >= setting.num_experts
        real = real_images(data, device, zca=setting.zca)
        start = time.monotonic()
        store = train_missing_experts(
            folder, setting.num_experts, real, network, setting.experts(), seed=setting.seed,
            precision=precision_on(device, network, setting.precision), at_once=setting.networks_at_once,
            memory_budget=setting.memory_budget,
        )  # fmt: skip
    final = Accuracy(tuple(store.metadata(expert).accuracy[-1] for expert in range(len(store))))
    return {
        "method": "all the data: the experts",
        "options": f"--num_experts {len(store)} --train_epochs {setting.train_epochs}",
        "accuracy": final.record(),
        "seconds": None if complete else time.monotonic() - start,
        "peak": None if complete else peak_memory_bytes(device),
        "problem": None,
    }


def _row(method: Method, setting: DistillOptions, folder: Path) -> dict[str, Any]:
    """Run a method to its end; return its row."""
    words = [*command_of(method, setting), "--out", str(folder)]
    row: dict[str, Any] = {
        "method": method.title,
        "options": shlex.join(own_flags(method, setting)),
        "command": shlex.join(["python", "-m", *words]),
        "problem": _run(words, folder.with_suffix(".log")),
    }
    if row["problem"] is None:
        check_comparable(folder, setting)
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        row |= {
            "accuracy": summary["accuracy"][method.accuracy],
            "seconds": sum(summary["seconds"].get(part, 0.0) for part in ("first_iteration", "iterations")),
            "seconds_evaluations": summary["seconds"]["evaluations"],
            "peak": summary["peak_memory_bytes"],
        }
    return row


def own_flags(method: Method, setting: DistillOptions) -> list[str]:
    """Return the method's flags besides the setting's."""
    return shlex.split(method.flags.format_map(_numbers(setting)))


def _numbers(setting: DistillOptions) -> dict[str, float]:
    """Return numbers for flags, computed from the setting."""
    _, height, width = dataset_info(setting.dataset, setting.subset, setting.res, setting.data_path).image_shape
    places = height * width
    frequencies = min(_FREQUENCIES, places // 2)
    more_images = places // frequencies  # as many numbers
    return {
        "half_start": max(1, setting.max_start_epoch // 2),
        "half_way": max(1, setting.Iteration // 2),
        "images_of_frequencies": more_images * setting.ipc,
        "frequencies": frequencies,
        # an image has a smaller share of the student's loss, and a frequency's image has a squared length of 1/(4HW)
        "frequency_lr": more_images * 4 * places * setting.lr_img,
    }


def command_of(method: Method, setting: DistillOptions) -> list[str]:
    """Return the words after `python -m`, without the run folder: the setting's options that the command takes, then its own."""
    usual = DistillOptions()
    common = [field.name for field in dataclasses.fields(EvaluationOptions)]
    words: list[str] = []
    for name in dict.fromkeys([*common, "ipc", *method.needs]):
        value = getattr(setting, name)
        if (method.command != "distill" and name in method.needs) or value != getattr(usual, name):
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return [*f"mtt_fast.{method.command}".split(), *words, *own_flags(method, setting)]


def _run(words: Sequence[str], log_file: Path) -> str | None:
    """Run `python -m WORDS` to its end; return the last line of its output if it failed, or None.

    Raises `Stopped` on Ctrl-C or SIGTERM, after the run has saved its state.
    """
    log_file.parent.mkdir(parents=True, exist_ok=True)
    with stop_request() as stop, log_file.open("w", encoding="utf-8") as output:
        process = subprocess.Popen([sys.executable, "-m", *words], stdout=output, stderr=output, start_new_session=True)
        status = None
        while status is None:
            try:
                status = process.wait(timeout=0.5)
            except subprocess.TimeoutExpired:
                if stop:
                    process.send_signal(stop.signum)
                    status = process.wait()
        if stop:
            raise Stopped("stopped; with --runs FOLDER the same command continues", stop.signum)
    if status == 0:
        return None
    lines = log_file.read_text(encoding="utf-8").strip().splitlines()
    return lines[-1] if lines else f"ended with status {status}"
