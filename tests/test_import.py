"""Check that importing mtt_fast is silent, cheap beside `import torch`, and leaves the GPU alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

RUNS = 5
SHARE = 0.1  # of the processor time of `import torch`, since other tests run at the same time
HEAVY = {"kornia", "matplotlib", "PIL", "pynvml", "scipy", "sklearn", "tensorboard", "tqdm", "triton", "tyro"}

IMPORT = """
import gc, json, sys, time
gc.disable()  # a pass over all of torch's objects takes as long as the package's import, and falls into either
begin = time.process_time()
import torch
torch_done = time.process_time()
before = {name.partition(".")[0] for name in sys.modules}
import mtt_fast
done = time.process_time()
report = json.dumps({
    "share": (done - torch_done) / (torch_done - begin),
    "packages": sorted({name.partition(".")[0] for name in sys.modules} - before),
    "cuda": torch.cuda.is_initialized(),
})
open(sys.argv[1], "w").write(report)
"""


def measure_import(report: Path) -> dict[str, Any]:
    """Import the package in a new process. Its findings come by a file, so that whatever it prints is seen."""
    command = [sys.executable, "-c", IMPORT, str(report)]
    cached = os.environ | {"PYTHONDONTWRITEBYTECODE": ""}  # else each run compiles the package, which triples its share
    answer = subprocess.run(command, capture_output=True, text=True, check=True, env=cached)
    findings: dict[str, Any] = json.loads(report.read_text())
    return findings | {"printed": answer.stdout + answer.stderr}


def test_import_is_silent_cheap_and_leaves_the_gpu_alone(tmp_path: Path) -> None:
    runs = [measure_import(tmp_path / "report") for _ in range(RUNS)]
    for run in runs:
        assert run["printed"] == ""
        assert not run["cuda"]
        assert HEAVY.isdisjoint(run["packages"]), "imported with the package; import it where it is used"
    assert min(run["share"] for run in runs) < SHARE  # the least disturbed of the runs


def test_the_folder_of_kernels_may_be_imported_by_its_own_name() -> None:
    """Check that transformers can be imported in the repository's folder: it imports a package `kernels`, and asks its version."""
    code = "import mtt_fast, kernels; print(getattr(kernels, '__version__', 'none'))"
    command, root = [sys.executable, "-W", "error", "-c", code], Path(__file__).resolve().parents[1]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    assert (answer.stdout, answer.stderr) == ("none\n", "")


def test_torchs_compiler_is_not_imported(tmp_path: Path) -> None:
    """Run a network's steps, a GPU's settings and a distillation: the import takes seconds, and nothing is compiled."""
    code = """
import sys, torch, mtt_fast
from mtt_fast.commands import cli
from mtt_fast.distill.command import main
from mtt_fast.runtime.numerics import numerics

net, images = mtt_fast.FlatModule(torch.nn.Linear(4, 2)), torch.rand(2, 4, requires_grad=True)
path = mtt_fast.unroll(net, net.init(), images, torch.tensor([0, 1]), 0.1, torch.tensor([[0, 1]]))
path[-1].sum().backward()
with numerics(torch.device("cuda"), "tf32"):
    assert torch.are_deterministic_algorithms_enabled()
toy = "--dataset digits --model ConvNetD1W4 --num_experts 1 --train_epochs 2 --max_start_epoch 1 --expert_epochs 1 --syn_steps 2"
assert cli.run(main, [*toy.split(), *"--Iteration 1 --num_eval 1 --epoch_eval_train 1 --batch_real 512".split()]) == 0
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
