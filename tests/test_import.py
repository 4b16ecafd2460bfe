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
