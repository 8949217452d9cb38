"""A Python with torch and PEFT."""

import importlib.util
import os
import sys

import pytest

VARIABLE = "JLORA_ORACLE_PYTHON"
VARIABLE_4 = "JLORA_ORACLE_PYTHON_4"


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


def oracle_python_4() -> str:
    """Returns a Python with transformers 4.57 and the PEFT of its time, or skips."""
    given = os.environ.get(VARIABLE_4)
    if not given:
        pytest.skip(f"name a Python with transformers 4.57 in {VARIABLE_4}")
    return given
