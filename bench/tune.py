"""Write a new table of launch configurations for this machine's GPU: the fastest candidates that give the right values.

For the blocks of one setting the row in place and every candidate are compared with the reference, and only then timed, all
in turn. The row in place stays unless another is faster by more than the noise. Rows of other architectures, and of shapes that
the setting does not have, stay as they are. With TRITON_INTERPRET=1 a CPU rehearses the command; its times then mean nothing.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from bench.arguments import Block, block_arguments, blocks_of
from bench.candidates import BLOCKS, BOX_CORRELATIONS, BOX_TILES, CORRELATIONS, TILES, lines, text_of
from bench.kernels import FEW_SAMPLES, exact_results, in_parts, results_of
from bench.measuring import Spread, interleaved, repeated, seconds
from bench.parsing import CommonOptions
from bench.records import partial_rows, write_record
from bench.settings import BatchShape
from bench.tables import table as rendered
from mtt_fast import kernels
from mtt_fast.commands.option_fields import Checked
from mtt_fast.commands.options import Count
from mtt_fast.commands.parsing import integers
from mtt_fast.errors import InputError
from mtt_fast.kernels import ConvLayer, PartialPlanes
from mtt_fast.kernels.triton.configurations import closest_row
from mtt_fast.storage.outputs import check_output_file
from mtt_fast.testing import relative_error

log = logging.getLogger("mtt_fast")

Row = dict[str, Any]

TOLERANCES = {"fp32": 1e-3, "tf32": 3e-2, "bf16": 2e-1}
"""Allowed relative errors against float64; most errors come from units that rounding carries over ReLU's kink."""
_LEAST_SECONDS = 0.004  # an operation is repeated within a measurement until the host's calls take so long


@dataclass(frozen=True)
class Options(CommonOptions, BatchShape):
    """Write a new table of launch configurations for this machine's GPU and the blocks of a setting."""

    precision: str = "tf32"
    """precision of the products: tf32, bf16 or fp32"""
    blocks: str | None = None
    """blocks of the network, counted from 1, as in 1,2; default all"""
    operations: str | None = None
    """prefixes of the operations' names, as in conv3x3_weight,norm; default all"""
    candidates: Count | None = None
    """try at most this many candidates of each operation"""
    compile_only: bool = False
    """only compile all candidates into Triton's cache; several commands may do this at the same time, each for different blocks"""
    table: Annotated[str, Checked(check_output_file)] = "bench/results/configurations.toml"
    """file to write; rows that are not measured keep the values of this file, or of the table in use if there is no such file"""


@dataclass(frozen=True)
class Subject:
    """A row to find, and the operation whose time decides."""

    row: str
    classes: tuple[str, ...]
    """the class of shapes of the row, and the looser ones that it falls back to"""
    candidates: list[Row]
    operation: str
    arguments: tuple[Any, ...]

    def run(self) -> Any:
        """Call the operation; planes that it leaves in parts are added up, as their readers do."""
        result = getattr(kernels, self.operation)(*self.arguments)
        results = result if type(result) is tuple else (result,)
        partial = any(isinstance(each, PartialPlanes) for each in results)
        return kernels.add_planes(*results) if partial else result

    def expected(self) -> list[Tensor]:
        """Return the reference's results, in float64."""
        return exact_results(self.operation, self.arguments)


def main(options: Options, command: str) -> None:
    """Find the fastest rows, print them, write the record and the table. Both are also written after each row, so a stopped command continues there."""
    device, setting = options.torch_device(), options.resolve()
    if options.precision not in TOLERANCES:
        raise InputError(f"--precision {options.precision}: expected one of {', '.join(TOLERANCES)}")
    numbers = None if options.blocks is None else integers(options.blocks, "--blocks")
    blocks = [block for block in blocks_of(setting) if numbers is None or block.number in numbers]
    if numbers and len(blocks) < len(set(numbers)):
        raise InputError(
            f"--blocks {options.blocks}: expected some of 1 … {setting.net.depth}, the blocks of the network"
        )
    table = Table.of(device, Path(options.table))
    wanted = tuple((options.operations or "").split(","))
    conditions = {"case": str(setting), "precision": options.precision, "architecture": table.architecture}
    name = options.name or f"tune-{options.label()}-{options.precision}-{device.type}"
    place = (options.out, name, "tune", device, conditions)
    if options.compile_only:
        compiled = [
            {"block": block.number} | compile_candidates(subject, table, options)
            for block in blocks
            for subject in subjects(block, setting.batch, options.precision, device)
            if subject.row.startswith(wanted)
        ]
        _check_some(compiled, options)
        write_record(*place, compiled, command)
        return
    rows = partial_rows(options.out, name)
    for block in blocks:
        known = {(row["operation"], row["class"]) for row in rows if row["block"] == block.number}
        for subject in subjects(block, setting.batch, options.precision, device):
            if (subject.row, subject.classes[0]) in known or not subject.row.startswith(wanted):
                continue
            rows.append({"block": block.number} | tune(subject, table, options))
            log.info("block %d, %s: %s", block.number, subject.row, rows[-1]["chosen"] or rows[-1]["problem"])
            table.write()
            write_record(*place, rows, command, complete=False)
    _check_some(rows, options)
    print(rendered("tune", conditions, rows))
    write_record(*place, rows, command)


def _check_some(rows: list[Row], options: Options) -> None:
    """Raise `InputError` if no operation has one of the prefixes in `options`."""
    if not rows:
        raise InputError(
            f"--operations {options.operations}: expected prefixes of operations with candidates, found none"
        )


@dataclass(frozen=True)
class Table:
    """The table that the kernels of this process read, and its file."""

    rows: dict[str, dict[str, dict[str, Row]]]
    """by operation, class of shapes, architecture"""
    forget: Callable[[], None]
    """clears the cache of rows, so that the kernels read the table again"""
    architecture: str
    device: torch.device
    path: Path

    @classmethod
    def of(cls, device: torch.device, path: Path) -> Table:
        """Return the table in use, with the rows of `path` if the file exists. Raises `InputError` where no Triton kernel runs."""
        try:
            from mtt_fast.kernels.triton import configurations, launch
        except ImportError as error:
            raise InputError(str(error)) from error
        if device.type != "cuda" and not launch.INTERPRETED:
            raise InputError(f"--device {device}: expected a GPU; set TRITON_INTERPRET=1 to rehearse on a CPU")
        rows, forget = configurations.table(), configurations.row_of.cache_clear
        if path.exists():
            rows.update(tomllib.loads(path.read_text(encoding="utf-8")))
            forget()
        return cls(rows, forget, launch.architecture(device), device, path)

    def in_place(self, subject: Subject) -> Row:
        """Return the row that the kernels of this process use, without its times."""
        row = closest_row(self.rows[subject.row], self.architecture, subject.classes)
        assert row is not None, f"{subject.row}: no row for {subject.classes[-1]}"
        return {name: value for name, value in row.items() if not name.endswith("microseconds")}

    def put(self, subject: Subject, row: Row) -> None:
        """Set `row` as the one that the kernels of this process use."""
        self.rows[subject.row].setdefault(subject.classes[0], {})[self.architecture] = row
        self.forget()

    def write(self) -> None:
        """Write the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(text_of(self.rows), encoding="utf-8")
        log.info("%s", self.path)


def compile_candidates(subject: Subject, table: Table, options: Options) -> Row:
    """Compile the kernels of all candidates, several at a time, into Triton's cache; return a row of the record."""
    start = time.monotonic()
    candidates = _prepared(subject, table, options)

    def each() -> None:
        for row in candidates.values():
            table.put(subject, row)
            # an error, such as of a tile too large for this GPU, is raised again when the row is timed
            with contextlib.suppress(Exception):
                subject.run()
        table.put(subject, next(iter(candidates.values())))  # the row in place

    if table.device.type == "cuda":
        kernels.compile_ahead(each)
    return {
        "operation": subject.row, "class": subject.classes[0], "problem": None, "chosen": None,
        "compiled": len(candidates), "compile_seconds": time.monotonic() - start,
    }  # fmt: skip


def _prepared(subject: Subject, table: Table, options: Options) -> dict[str, Row]:
    """Return the candidates by name, first the row in place."""
    in_place = table.in_place(subject)
    others = (row if "num_warps" in row else in_place | row for row in subject.candidates)
    every = [in_place, *(row for row in others if row != in_place)]
    return {_text(row): row for row in every[: options.candidates]}


def tune(subject: Subject, table: Table, options: Options) -> Row:
    """Put the fastest of the right candidates into `table`; return a row of the record."""
    candidates, expected = _prepared(subject, table, options), subject.expected()
    in_place = next(iter(candidates))
    before = table.rows[subject.row].get(subject.classes[0], {}).get(table.architecture, candidates[in_place])
    errors, problems = {}, []
    for name, row in candidates.items():
        table.put(subject, row)
        try:
            results = results_of(subject.operation, subject.run())
            error = max(relative_error(a.double(), b, floor=1e-3) for a, b in zip(results, expected, strict=True))
        except Exception as failure:  # such as a tile too large for this GPU
            problems.append(f"{name}: {type(failure).__name__}: {failure}".splitlines()[0])
            continue
        if error <= TOLERANCES[options.precision]:
            errors[name] = error
        else:
            problems.append(f"{name}: wrong: error {error:.1e}")
    calls = 1
    if errors and table.device.type == "cuda":
        table.put(subject, candidates[next(iter(errors))])
        calls += int(_LEAST_SECONDS / seconds(subject.run, table.device))

    @functools.cache
    def several(name: str) -> Callable[[], object]:
        table.put(subject, candidates[name])
        return repeated(subject.run, calls, table.device)

    def measure(name: str) -> float:
        table.put(subject, candidates[name])
        return seconds(several(name), table.device) / calls

    times = interleaved(options.repetitions, errors, measure, lambda name, error: problems.append(f"{name}: {error}"))
    result: Row = {"operation": subject.row, "class": subject.classes[0], "problem": "; ".join(problems)}
    if not times:
        table.put(subject, before)
        return result | {"chosen": None, "seconds": None}
    order = by_speed(times, in_place)
    best = candidates[order[0]]
    row = fastest_tiles([candidates[name] for name in order], candidates[in_place])
    table.put(subject, row | {"microseconds": round(1e6 * times[order[0]]["median"], 1)})
    backend_times = {candidates[name].get("backend"): times[name]["median"] for name in reversed(order)}
    return result | {
        "chosen": order[0],
        "error": errors[order[0]],
        "seconds": times[order[0]],
        "in_place_seconds": times.get(in_place),
        "others": {name: median for name, median in backend_times.items() if name and name != best["backend"]},
    }


def by_speed(times: dict[str, Spread], in_place: str) -> list[str]:
    """Return the names from fast to slow; the one in place is first unless another's median is below all of its times."""
    order = sorted(times, key=lambda name: times[name]["median"])
    if in_place in times and times[in_place]["least"] <= times[order[0]]["median"]:
        order.sort(key=lambda name: name != in_place)  # stable
    return order


def fastest_tiles(rows: list[Row], in_place: Row) -> Row:
    """Return the first of `rows`, from fast to slow, with the fastest tile by pointers, and by boxes, that is among them."""
    row = dict(next((row for row in rows if row.get("backend") in (None, "triton")), in_place))
    boxes = next((row for row in rows if row.get("backend") == "tma"), None)
    if boxes is not None:
        row["tma"] = boxes["tma"]
    if "backend" in rows[0]:
        row["backend"] = rows[0]["backend"]
    return row


def subjects(block: Block, batch: int, precision: Any, device: torch.device) -> Iterator[Subject]:
    """Yield the rows to find at a block's shapes; parts of other operations come first."""
    from mtt_fast.kernels.triton.block import shape_classes as block_classes
    from mtt_fast.kernels.triton.channels_last_planes import shape_classes as line_classes
    from mtt_fast.kernels.triton.implicit_gemm import shape_classes
    from mtt_fast.kernels.triton.planes import Planes

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    arguments = block_arguments(block, batch, precision, torch.Generator(device).manual_seed(0), dtype)
    x, y = arguments["conv3x3"][0], arguments["norm_relu_pool"][0]
    forward = shape_classes(Planes.from_tensors(x), Planes.from_tensors(y), precision)
    back = shape_classes(Planes.from_tensors(y), Planes.from_tensors(x), precision)

    norm = ("norm_relu_pool", "norm_relu_pool_backward", "norm_relu_pool_dual", "norm_relu_pool_dual_backward")
    for name, partial in itertools.product(norm, (False, True) if batch <= FEW_SAMPLES else (False,)):
        classes = line_classes(Planes.from_tensors(y), dtype, partial)
        given = in_parts(name, arguments[name]) if partial else arguments[name]
        yield Subject(name, classes, lines(classes[-1]), name, given)

    tiles: list[Row] = [*({"backend": "triton"} | tile for tile in TILES[precision]), {"backend": "cudnn"}]
    correlations: list[Row] = [
        *({"backend": "triton"} | tile for tile in CORRELATIONS[precision]),
        {"backend": "cudnn"},
    ]
    if block.number > 1:  # boxes fit no images
        tiles += [{"backend": "tma", "tma": tile} for tile in BOX_TILES[precision]]
        correlations += [{"backend": "tma", "tma": tile} for tile in BOX_CORRELATIONS[precision]]
    for name in (name for name in arguments if name.startswith("conv3x3")):
        classes = back if "input_gradient" in name else forward
        candidates = correlations if name.endswith("weight_gradient") else tiles
        yield Subject(name, classes, candidates, name, arguments[name])

    layer = ConvLayer(block.channels, block.size, block.size, block.width, block.padding)
    if block.number == 1 and kernels.has_image_block(layer, device):
        classes = block_classes(precision, block.out_size**2, batch)
        for row, candidates in BLOCKS.items():
            # a part of an operation has a row of its own, and is timed with it
            operation = row if row in arguments else "conv_norm_relu_pool_dual_backward"
            yield Subject(row, classes, candidates, operation, arguments[operation])


def _text(row: Row) -> str:
    return " ".join(str(value) if name == "backend" else f"{name}={value}" for name, value in row.items())
