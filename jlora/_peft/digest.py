"""What jlora notes in a file, so that any change to it shows when it is read."""

import hashlib
import json
import math
from collections.abc import Mapping

import numpy as np

from .._errors import CorruptFileError, FormatVersionError
from .._files.untrusted import parse_json
from .config import PeftConfig

VERSION = 1


def seal_of(tensors: Mapping[str, np.ndarray], scalings: Mapping[str, float]) -> str:
    """Returns the note: a digest of the tensors, and the scaling of each module."""
    seal = {
        "scaling": dict(scalings),
        "sha256": digest_of(tensors),
        "version": VERSION,
    }
    return json.dumps(seal, sort_keys=True, separators=(",", ":"))


def digest_of(tensors: Mapping[str, np.ndarray]) -> str:
    """Returns the SHA-256 of names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype.name} {tensor.shape}\n".encode())
        digest.update(np.ascontiguousarray(tensor).view(np.uint8).data)
    return digest.hexdigest()


def check_seal(
    metadata: Mapping[str, str],
    tensors: Mapping[str, np.ndarray],
    config: PeftConfig,
    where: str,
) -> dict[str, float]:
    """Compares the files with what jlora noted in them, if jlora wrote them.

    Returns:
        The scalings by module. Those that the config gives may differ in the last bit:
        not every float is some alpha by a rank.
    """
    if "jlora" not in metadata:
        return {}
    seal = parse_json(metadata["jlora"].encode(), f"the metadata of {where}")
    version = seal.get("version") if isinstance(seal, dict) else None
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise CorruptFileError(f"{where}: jlora's metadata has the version {version!r}")
    if version > VERSION:
        raise FormatVersionError(
            f"{where} has the format {version}, and this jlora reads up to {VERSION}; "
            "install a newer jlora"
        )
    if seal.get("sha256") != digest_of(tensors):
        raise CorruptFileError(
            f"{where}: the tensors are not those that were saved (their digest differs)"
        )
    scalings = seal.get("scaling")
    if not isinstance(scalings, dict):
        raise CorruptFileError(f"{where}: jlora's metadata has no scalings")
    said = {name: config.scaling(name, config.rank(name)) for name in scalings}
    changed = {n: (s, said[n]) for n, s in scalings.items() if not _same(s, said[n])}
    if changed:
        raise CorruptFileError(
            f"{where}: adapter_config.json is not the one saved; scalings were "
            f"and are {dict(list(changed.items())[:5])}"
        )
    return scalings


def _same(noted: object, said: float) -> bool:
    is_number = isinstance(noted, int | float)
    return is_number and math.isclose(noted, said, rel_tol=1e-14)
