"""A torch dispatch mode that is ready at once."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode


class DispatchMode(TorchDispatchMode):
    """Sees every operation, as `TorchDispatchMode` does, but does not import torch._dynamo when it is first used, which takes seconds."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # torch's name: whether to shield `__torch_dispatch__` from torch.compile
        return False
