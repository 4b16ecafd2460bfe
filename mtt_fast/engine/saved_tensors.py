"""Notice what autograd does not: writes between the two sweeps through `.data`, or into a row that became a module's parameters."""

from __future__ import annotations

import xxhash
from torch import Tensor

from mtt_fast.errors import InputError
from mtt_fast.runtime.tensor_bytes import bytes_of


def checksums_of(**tensors: Tensor) -> dict[str, int]:
    """Return the checksum of each of the `tensors` by name, without those on a GPU, which is not waited for."""
    return {name: _checksum(tensor) for name, tensor in tensors.items() if tensor.device.type == "cpu"}


def check_unchanged(before: dict[str, int], **tensors: Tensor) -> None:
    """Raise `InputError` unless the `tensors` have the checksums that they had `before`."""
    for name, checksum in before.items():
        if _checksum(tensors[name]) != checksum:
            raise InputError(
                f"`{name}`: expected in the backward pass the numbers of the call, found others, written through `.data` or into a "
                "module's parameters; write after the backward pass, or into a clone()"
            )


def _checksum(tensor: Tensor) -> int:
    digest = xxhash.xxh3_64()
    # row by row, since a path is not contiguous, and may take most of the memory
    for part in [tensor] if tensor.is_contiguous() else tensor.unbind():
        digest.update(bytes_of(part.detach().resolve_conj().resolve_neg().contiguous()))
    return digest.intdigest()
