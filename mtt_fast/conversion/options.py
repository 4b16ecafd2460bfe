"""The options of a conversion."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from mtt_fast import cli
from mtt_fast.errors import InputError
from mtt_fast.experts import STORE_DTYPES
from mtt_fast.options import CommonOptions, at_least

PROGRAM = "python -m mtt_fast convert"


@dataclass(frozen=True)
class ConvertOptions:
    """Convert a distilled set, or experts' trajectories, to or from the files of other software."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")] = ""
    """a file or a folder"""
    destination: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DESTINATION")] = ""
    """a file or a folder that is not there yet; for experts the --buffer_path of who will read them"""
    from_: Annotated[str | None, tyro.conf.arg(name="from")] = None
    """kind of the source, where its names do not tell"""
    to: str | None = None
    """kind of the destination: synthetic, mtt, dc, dc_benchmark, ddranking, png, parquet; experts, buffer, waypoints. Without it:
    what the destination's name tells; else this software's kind, or from this software's the public code's. Experts of this software
become experts too, written anew, with --to experts"""

    dataset: str | None = None
    """the real images: foreign files do not say of which they are"""
    subset: str | None = None
    """of ImageNet"""
    res: int | None = None
    """resolution in pixels, where the data set has no one size"""
    data_path: str = "data"
    """where the data sets lie"""
    packed_path: str | None = None
    """where they are kept packed, if not in DATA_PATH/packed"""
    download: bool = False
    """fetch the data set if it is missing"""
    zca: bool = False
    """the source was made with ZCA-whitened images"""
    model: str = "ConvNet"
    """network of the experts"""
    device: str = "auto"
    """auto, cpu, cuda, …, where experts are measured"""

    lr_teacher: float = 0.01
    """learning rate of a set that comes without one"""
    label_kind: Literal["probabilities", "logits"] | None = None
    """what the source's soft labels are (guessed from their sums without this)"""
    reorder: bool = False
    """put a set with soft labels into the order of its largest labels"""
    hard_labels: bool = False
    """write each image's class in place of its soft label"""
    method: str | None = None
    """whose set it is, in names of dc_benchmark's and DC's files: TM, DC, DSA, DM, random, Kmeans; without it what the set's own
    record says, or TM"""

    measure: Literal["last", "all"] = "last"
    """epochs of each imported expert whose test accuracy is measured; that of the others is unknown (NaN)"""
    store_dtype: str = "float32"
    """of imported experts: float32, or bfloat16 at half the size"""
    experts_per_file: int = 10
    """experts in one replay_buffer_N.pt (the public code's --save_interval); they are in memory together"""

    def common(self) -> CommonOptions:
        """Return the options that name the real images and the network. Raises `InputError` without a data set."""
        if self.dataset is None:
            raise InputError(
                f"{self.source}: expected the real images that it belongs to, which its files do not name; say --dataset "
                "(and --data_path, --zca, --model where needed)"
            )
        names = {field.name for field in dataclasses.fields(CommonOptions)} & set(vars(self))
        return CommonOptions(**{name: getattr(self, name) for name in names})


def parse_options(argv: Sequence[str], defaults: dict[str, Any] | None = None) -> ConvertOptions:
    """Return the options of a command line, where `defaults` replace their own. Raises `InputError` for bad values."""
    options = cli.parse(ConvertOptions, argv, PROGRAM, defaults)
    if not options.source or not options.destination:
        raise InputError(f"expected a source and a destination; see {PROGRAM} --help")
    complaint = at_least(1, experts_per_file=options.experts_per_file)
    if complaint or not 0 < options.lr_teacher < math.inf:
        raise InputError(complaint or f"--lr_teacher {options.lr_teacher}: expected more than 0")
    if options.store_dtype not in STORE_DTYPES:
        raise InputError(f"--store_dtype {options.store_dtype}: expected {' or '.join(STORE_DTYPES)}")
    return options
