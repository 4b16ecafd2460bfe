"""Print versions, devices and kernels of this installation, and which code runs: `python -m mtt_fast.env`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from mtt_fast.commands import cli
from mtt_fast.commands.options import CommonOptions
from mtt_fast.engine.students.choice import describe_numerics, precision_on
from mtt_fast.engine.students.generic import GenericStudent
from mtt_fast.errors import InputError
from mtt_fast.kernels import native_available
from mtt_fast.networks.convnet import ConvNet
from mtt_fast.runtime.provenance import choose_device, device_name, usable_gpus, versions, why_no_gpu


def main(argv: Sequence[str]) -> None:
    """Print versions, devices, kernels, and the student that ConvNet gets."""
    if argv and argv[0] in ("-h", "--help"):
        print(
            "usage: python -m mtt_fast.env\n\nPrint versions, devices and kernels, and which code and precision compute student steps."
        )
        return
    if argv:
        raise InputError(f"{argv[0]}: python -m mtt_fast.env takes no options")
    lines, device = versions(), choose_device("auto")
    lines["processor"] = device_name(torch.device("cpu"))
    devices = [device_name(torch.device("cuda", index)) for index in range(usable_gpus())]
    lines["CUDA devices"] = ", ".join(devices) or f"none: {why_no_gpu()}"
    lines["device auto"] = str(device)
    lines["native CPU kernels"] = (
        "in use" if native_available() else "not in use: not compiled, or turned off by MTT_FAST_NATIVE=0"
    )
    lines["student of ConvNet"] = describe_numerics(device, ConvNet(), CommonOptions.precision, iterations=True)
    lines["student of other networks"] = (
        f"{GenericStudent.__name__}, {precision_on(device, ConvNet(), CommonOptions.precision)}"
    )
    for name, value in lines.items():
        print(f"{name:26} {value}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
