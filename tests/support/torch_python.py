"""A Python with torch and PEFT."""

import importlib.util
import os
import sys

import pytest

VARIABLE = "JLORA_ORACLE_PYTHON"


def oracle_python() -> str:
    """Returns a Python with torch and PEFT, or skips."""
    given = os.environ.get(VARIABLE)
    if given:
        return given
    missing = [m for m in ("torch", "peft") if importlib.util.find_spec(m) is None]
    if missing:
        pytest.skip(
            f"{' and '.join(missing)} not installed here; name a Python that has them "
            f"in {VARIABLE}"
        )
    return sys.executable
