"""Files of other code bases, read and written: distilled sets, and experts' trajectories.

`python -m mtt_fast convert SOURCE DESTINATION` is the command over it. Pickles are only ever read with `weights_only`,
so nothing in them is run. Files of tensors come back bit for bit; pictures are 8-bit, see `picture_record`.
"""

from mtt_fast.interop.buffers import buffer_files, export_experts, read_buffer
from mtt_fast.interop.datasets import SyntheticView, image_data_from
from mtt_fast.interop.ddranking import ddranking_call, label_robust_score
from mtt_fast.interop.experts import import_experts
from mtt_fast.interop.sets import SET_KINDS, read_set, set_kind_of, set_kinds_of, write_set
from mtt_fast.interop.tensor_set import SourceInfo, TensorSet, as_synthetic, as_tensor_set, class_major, source_info
from mtt_fast.interop.waypoints import export_waypoints, read_waypoints

__all__ = [
    "SET_KINDS",
    "SourceInfo",
    "SyntheticView",
    "TensorSet",
    "as_synthetic",
    "as_tensor_set",
    "buffer_files",
    "class_major",
    "ddranking_call",
    "export_experts",
    "export_waypoints",
    "image_data_from",
    "import_experts",
    "label_robust_score",
    "read_buffer",
    "read_set",
    "read_waypoints",
    "set_kind_of",
    "set_kinds_of",
    "source_info",
    "write_set",
]
