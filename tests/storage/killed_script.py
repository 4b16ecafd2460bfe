"""Kill a process at each point of each writer in turn, run by tests/storage/test_killed.py in a folder of its own.

It forks before any parallel region, which a child could not enter otherwise; a child ends without any clean-up at the
given call of those that change a file system.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mtt_fast import ConvNet, InputError, SyntheticDataset, TrajectoryStore
from mtt_fast.compress import compress
from mtt_fast.data.packing import Contents, Part, Source, packed
from mtt_fast.interop import export_experts, export_waypoints, import_experts, read_buffer, read_set, write_set
from mtt_fast.interop.buffers import buffer_files
from mtt_fast.interop.experts import Trajectory
from mtt_fast.interop.tensor_set import as_tensor_set
from mtt_fast.storage.expert_metadata import ExpertMetadata
from mtt_fast.storage.run_folder import read_config, write_config
from mtt_fast.storage.trajectories import write_expert

CALLS = ("replace", "mkdir", "rmdir", "unlink")
"""What is counted: each is preceded, in one of the points, by the end of the process."""
NET = ConvNet(in_channels=1, num_classes=2, image_size=4, width=2, depth=1)
SET = SyntheticDataset(
    torch.arange(96.0).reshape(6, 1, 4, 4) / 96, torch.arange(2).repeat_interleave(3), torch.tensor(0.25), ("a", "b"),
    (0.5,), (0.5,), recipe={"dataset": "digits"},
)  # fmt: skip


def killed_at(point: int, work: Callable[[], object]) -> bool:
    """Do `work` in another process, which ends at once before its call number `point`; return whether it came so far."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        left = point

        def dying(call: Callable[..., Any]) -> Callable[..., Any]:
            def counted(*args: Any, **kwargs: Any) -> Any:
                nonlocal left
                if left == 0:
                    os._exit(9)
                left -= 1
                return call(*args, **kwargs)

            return counted

        for name in CALLS:
            setattr(os, name, dying(getattr(os, name)))
        work()
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9), status
    return status == 9


def at_each_point(
    name: str, work: Callable[[], object], found: Callable[[], object], prepare: Callable[[], object]
) -> None:
    """Check that whatever moment `work` is killed at, `found` then gives the whole or an `InputError`, and so on again."""
    point = 0
    while True:
        shutil.rmtree("place", ignore_errors=True)
        prepare()
        killed = killed_at(point, work)
        try:
            whole = bool(found())
        except (InputError, FileNotFoundError):
            whole = False
        assert killed or whole, f"{name}: not whole at the end"
        with contextlib.suppress(InputError) if whole else contextlib.nullcontext():  # it exists already
            work()
        assert found(), f"{name}: not whole after a kill at point {point} and the same again"
        left = [path for path in Path().rglob("*") if path.name.endswith(".partial")]
        assert not left, f"{name}: {left} after point {point}"
        if not killed:
            print(f"{name}: {point} points")
            return
        point += 1


def nothing() -> None:
    Path("place").mkdir()


def a_folder_with_others() -> None:
    Path("place/out").mkdir(parents=True)
    Path("place/out/mine.txt").write_text("x")


def an_empty_folder() -> None:
    Path("place/out").mkdir(parents=True)


def same(read: Callable[[], Any], with_lr: bool = True) -> Callable[[], bool]:
    def found() -> bool:
        plain = read()
        plain = as_tensor_set(plain) if isinstance(plain, SyntheticDataset) else plain
        assert torch.equal(plain.labels, SET.labels), "half of a set was read"
        assert len(plain.images) == len(SET.images), "half of a set was read"
        assert not with_lr or plain.lr is not None, "read without its learning rate"
        return True

    return found


def sets() -> None:
    anywhere: dict[str, Callable[[], None]] = {
        "nothing": nothing,
        "others": a_folder_with_others,
        "empty": an_empty_folder,
    }
    for kind in ("mtt", "png", "synthetic", "ddranking", "dc", "parquet"):
        for where in anywhere if kind in ("mtt", "png") else ["nothing"]:
            write, read = partial(write_set, "place/out", SET, kind), partial(read_set, "place/out", kind)
            at_each_point(f"{kind}, {where}", write, same(read, kind != "dc"), anywhere[where])
    file = "place/out/images_best.pt"
    at_each_point(
        "a pair by name", lambda: write_set(file, SET, "mtt"), same(lambda: read_set(file)), a_folder_with_others
    )
    for method in ("TM", "random"):
        write = partial(write_set, "place/out", SET, "dc_benchmark", dataset="CIFAR10", method=method)
        found = same(lambda: read_set("place/out", "dc_benchmark"), with_lr=False)
        at_each_point(f"dc_benchmark, {method}", write, found, nothing)


def metadata() -> ExpertMetadata:
    return ExpertMetadata({"kind": "ConvNet"}, NET.layout.describe(), "digits", "f00d", "none", {}, -1, [], {})


def trajectory(seed: int) -> torch.Tensor:
    return torch.randn(4, NET.num_parameters, generator=torch.Generator().manual_seed(seed))


def experts() -> None:
    for index in range(3):
        given = ExpertMetadata(**vars(metadata()) | {"accuracy": [0.0] * 4, "hyperparameters": {"lr": 0.1}})
        write_expert("ours", index, trajectory(index), given)
    whole, few = TrajectoryStore("ours"), compress(Path("ours"), Path("few"), 2)
    for where, prepare in {"nothing": nothing, "others": a_folder_with_others}.items():
        at_each_point(f"buffers, {where}", lambda: list(export_experts(whole, "place/out", 1)), three_buffers, prepare)
        at_each_point(
            f"waypoints, {where}", lambda: list(export_waypoints(few, "place/out", 1)), three_waypoints, prepare
        )
    list(export_experts(whole, "theirs", 2))
    at_each_point("import", import_theirs, three_experts, nothing)


def three_buffers() -> bool:
    read = [len(list(read_buffer(file))) for file in buffer_files("place/out")]
    assert not Path("place/out/replay_buffer_0.pt").exists() or read == [1, 1, 1], "half of the buffers"
    return read == [1, 1, 1]


def three_waypoints() -> bool:
    names = {path.name for path in Path("place/out").glob("*_buffer_*.pt")}
    wanted = {f"{kind}_buffer_{number}.pt" for kind in ("waypoint", "step") for number in range(3)}
    assert "waypoint_buffer_0.pt" not in names or names == wanted, "half of the buffers"
    return names == wanted


def import_theirs() -> TrajectoryStore:
    def all_of_them() -> Iterator[Trajectory]:
        for file in buffer_files("theirs"):
            yield from read_buffer(file)

    return import_experts(all_of_them, "place/out", NET.layout, metadata(), lambda rows: [math.nan] * len(rows))


def three_experts() -> bool:
    store = TrajectoryStore("place/out")
    assert len(store) in (0, 3), f"{len(store)} experts of three were taken for all"
    return len(store) == 3 and all(torch.equal(store.read(expert, 3), trajectory(expert)[3]) for expert in range(3))


def caches() -> None:
    labels = np.arange(6, dtype=np.int64) % 2
    images = np.arange(6 * 12, dtype=np.uint8).reshape(6, 3, 2, 2)

    def contents() -> Contents:
        return Contents(("a", "b"), (3, 2, 2), Part(labels, [images]), Part(labels, [images]))

    def pack() -> bool:
        return torch.equal(
            packed(Source("pets", "pets", "k", contents), Path("place/out"), progress=False).train.images[5], last
        )

    last = torch.from_numpy(images)[5]
    at_each_point("packed", pack, pack, nothing)
    options = {"dataset": "digits"}
    at_each_point(
        "options",
        lambda: write_config(Path("place/out"), options),
        lambda: read_config(Path("place/out")) == options,
        nothing,
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.freeze()  # what large pickles collect afterwards is not all that was imported
    {"sets": sets, "experts": experts, "caches": caches}[sys.argv[1]]()
