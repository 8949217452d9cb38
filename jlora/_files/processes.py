"""What one of several processes does for all of them, and what goes wrong there."""

import builtins
import json
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from .. import _errors

T = TypeVar("T")
_ROOM = 4096  # bytes of what is told of an error
_CUT = " ..."


def on_first(call: Callable[[], T]) -> T | None:
    """Calls a function on the first process, and raises its error on every one.

    All processes call this at the same place, and none returns before the first one is
    done: what it wrote is there for all.

    Args:
        call: the function.

    Returns:
        What it returns on the first process, and None on the others.

    Raises:
        Exception: what it raises; on the others an error of the same type and message.
    """
    if jax.process_count() == 1:
        return call()
    result, error = None, None
    if jax.process_index() == 0:
        try:
            result = call()
        except Exception as raised:  # or else the others would wait for ever
            error = raised
    told = multihost_utils.broadcast_one_to_all(packed(error))
    if error is not None:
        raise error
    if (error := unpacked(np.asarray(told))) is not None:
        raise error
    return result


def packed(error: Exception | None) -> np.ndarray:
    """Returns the type and the message of an error as numbers of a fixed count."""
    text = b""
    if error is not None:
        kind, message = type(error).__name__, str(error)
        text = _encoded(kind, message)
        while len(text) > _ROOM:
            message = message[: min(len(message), _ROOM) // 2]
            text = _encoded(kind, message + _CUT)
    return np.frombuffer(text.ljust(_ROOM), np.uint8).astype(np.int32)


def unpacked(numbers: np.ndarray) -> Exception | None:
    """Returns the error that `packed` was given, RuntimeError for an unknown type."""
    text = numbers.astype(np.uint8).tobytes().strip()
    if not text:
        return None
    kind, message = json.loads(text)
    known = getattr(_errors, kind, None) or getattr(builtins, kind, None)
    error: Exception = RuntimeError(f"{kind}: {message}")
    if isinstance(known, type) and issubclass(known, Exception):
        try:
            error = known(message)
        except TypeError:  # it takes more than a message
            pass
    error.add_note("This was raised on the first of the processes.")
    return error


def _encoded(kind: str, message: str) -> bytes:
    return json.dumps([kind, message]).encode()
