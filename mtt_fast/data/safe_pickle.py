"""Read the pickles of CIFAR: dicts of text, numbers, lists and byte arrays. No code in them is run, and memory is bounded."""

from __future__ import annotations

import io
import pickle
import pickletools
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mtt_fast.errors import InputError
from mtt_fast.storage.foreign import complaint_of

# Opcodes of plain values and of numpy's byte arrays, in any protocol. All others make other objects, or copy values.
_OPCODES = frozenset(
    "PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE INT LONG LONG1 LONG4 BININT BININT1 BININT2 FLOAT BINFLOAT "
    "STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 "
    "EMPTY_DICT DICT SETITEM SETITEMS EMPTY_LIST LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 "
    "PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE BUILD".split()
)
_MAX_OPCODES = 1_000_000  # the 50,000 images of CIFAR-100 take 200,000, or 350,000 in protocol 0
# Tuples, calls and states; an array takes 13. More would allow many arrays, and tuples so deep that hashing overflows the stack.
_MAX_OBJECTS = 30
_NESTING = frozenset("TUPLE TUPLE1 TUPLE2 TUPLE3 REDUCE BUILD GLOBAL STACK_GLOBAL".split())

_Bytes = np.ndarray[Any, np.dtype[np.uint8]]


def unpickle(raw: bytes, place: Path) -> dict[str, Any]:
    """Return the dict in a pickle such as CIFAR's: of strings, numbers, lists, byte arrays. Nothing in it is executed.

    Raises `InputError` if it holds anything else or breaks off; `place` is for the message.
    """
    try:
        _check_opcodes(raw)
        # Python 2 wrote the files, so strings may be bytes; "latin1" decodes them reversibly
        value = _Unpickler(io.BytesIO(raw), encoding="latin1").load()
        if isinstance(value, dict):
            return {key: item.array if isinstance(item, _Array) else item for key, item in value.items()}
    except Exception as error:  # a broken pickle raises nearly anything
        raise InputError(
            f"{place}: expected a pickle of CIFAR, found something else ({complaint_of(error)}); get its archive again"
        ) from error
    raise InputError(f"{place}: expected a pickled dict, found {type(value).__name__}; get its archive again")


def _check_opcodes(raw: bytes) -> None:
    """Raise `UnpicklingError` for a pickle that could take much more memory, or a deeper stack, than one of CIFAR."""
    objects = 0
    for count, (opcode, argument, _) in enumerate(pickletools.genops(raw)):
        if opcode.name not in _OPCODES:
            raise pickle.UnpicklingError(f"{opcode.name} is not admitted")
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and not 0 <= int(argument or 0) <= count + 1:
            raise pickle.UnpicklingError("a memo with gaps")
        objects += opcode.name in _NESTING
        if count > _MAX_OPCODES or objects > _MAX_OBJECTS:
            raise pickle.UnpicklingError("more objects than the images of CIFAR need")


class _Array:
    """Stand in for a numpy array of bytes: keep its pickled state, and make the array from it if the state is consistent."""

    def __init__(self, *_: object) -> None:
        self._state: tuple[Any, ...] = ()

    def __setstate__(self, state: Any) -> None:
        self._state = state

    @cached_property
    def array(self) -> _Bytes:
        """Return the array. Raises `ValueError` or `TypeError` if the state is not that of an array of bytes."""
        _, shape, dtype, by_columns, raw = self._state
        if not isinstance(dtype, _ByteType):
            raise TypeError("an array of other values than bytes")
        content = raw.encode("latin1") if isinstance(raw, str) else bytes(memoryview(raw))
        return np.frombuffer(content, np.uint8).reshape(shape, order="F" if by_columns else "C")


class _ByteType:
    """Stand in for numpy's dtype of unsigned bytes, the only one that is allowed."""

    def __init__(self, code: object, *_: object) -> None:
        if code not in ("u1", "|u1"):
            raise pickle.UnpicklingError(f"an array of {str(code)[:20]!r} is not admitted")

    def __setstate__(self, state: object) -> None:
        """Ignore byte order and the like, which bytes do not have."""


class _Unpickler(pickle.Unpickler):
    """Unpickle with only the three names by which numpy pickles an array, each replaced by a stand-in."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return _Array
        if (module, name) == ("numpy", "ndarray"):
            return "ndarray"  # only handed to _reconstruct
        if (module, name) == ("numpy", "dtype"):
            return _ByteType
        raise pickle.UnpicklingError(f"{module}.{name} is not admitted")
