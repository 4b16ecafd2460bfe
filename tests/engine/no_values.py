"""Refuse what waits for a device: tensors without values take the code path of a GPU."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class NoValues(TorchDispatchMode):
    """A mode that refuses whatever waits for a device: values read by the host, shapes that depend on values, copies from the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select"), name
        result = func(*args, **(kwargs or {}))
        flat = [one for one in (*args, *(kwargs or {}).values()) if isinstance(one, Tensor)]
        places = {one.device.type for one in (*flat, *([result] if isinstance(result, Tensor) else []))}
        assert places <= {"meta"}, f"{name} on {places}"
        return result
