"""Altered files of other formats: each is refused by a typed error, or read.

A few hundred for each format, thousands with `--whole`; the same in every run.
"""

import random
import struct
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from format_files import FILES
from safetensors.numpy import save_file

import jlora
from jlora._files.gguf import gguf_bytes
from jlora._formats import diffusers, gguf, kohya

READ: dict[str, Callable[..., Any]] = {
    "diffusers": diffusers.read,
    "kohya": kohya.read,
    "gguf": gguf.read,
}
FEW, MANY = 300, 5000


def small(case: str, file: Path) -> Path:
    """A good file of a case, as small as it comes: each byte is altered often."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 3)), rng.normal(size=(4, 2))
    a, b = a.astype(np.float32), b.astype(np.float32)
    if case == "gguf":
        names = (f"blk.{i}.attn_v.weight.lora_" for i in range(2))
        tensors = {n + end: x for n in names for end, x in {"a": a, "b": b}.items()}
        fields = {"general.type": "adapter", "adapter.type": "lora"}
        fields |= {"general.architecture": "qwen2", "adapter.lora.alpha": 3.0}
        file.write_bytes(gguf_bytes(fields, tensors))
    elif case == "kohya":
        own = {"lora_down.weight": a, "lora_up.weight": b, "alpha": np.array(3.0, "f4")}
        tensors = {f"lora_unet_{n}.{end}": x for n in "qv" for end, x in own.items()}
        save_file(tensors, file)
    else:
        axes = jlora.KernelAxes((), (0,), (1,))
        factors = [jlora.LoraFactors(a.T, b.T, axes, s) for s in (1.5, 2.5)]
        paths = [f"params/unet/{name}/kernel" for name in "qv"]
        diffusers.write(file, dict(zip(paths, factors, strict=True)), ())
    return file


def altered(data: bytes, count: int, rng: random.Random) -> Iterator[bytes]:
    """Bits that flip, bytes put in, left out, doubled or swapped, lengths that lie."""
    lies = [0, 1, 3, 0xFF, 1 << 16, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 64) - 1]
    for number in range(count):
        i, j, k = sorted(rng.sample(range(len(data) + 1), 3))
        kind = number % 8
        if kind == 0:
            place = rng.randrange(len(data))
            bit = 1 << rng.randrange(8)
            yield data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :]
        elif kind == 1:
            yield data[:i]
        elif kind == 2:
            yield data[:i] + rng.randbytes(rng.randint(1, 9)) + data[i:]
        elif kind == 3:
            yield data[:i] + data[j:k] + data[i:j] + data[k:]
        elif kind == 4:
            yield data[:i] + data[j:]
        elif kind == 5:
            yield data[:j] + data[i:]
        else:  # a length, a count, a size or a type
            size, largest = ("<I", (1 << 32) - 1) if kind == 6 else ("<Q", 1 << 64)
            lie = struct.pack(size, min(rng.choice(lies), largest))
            place = rng.randrange(max(len(data) // (kind - 5), 9))
            yield data[:place] + lie + data[place + len(lie) :]
    yield data + b"\0"
    yield data + data


def outcome(case: str, file: Path) -> str:
    """What becomes of a file: "read", or the name of a typed error."""
    try:
        READ[case](file)
    except jlora.AdapterError as error:
        assert len(str(error)) < 10_000
        return type(error).__name__
    except Exception as error:
        raise AssertionError(f"{file.read_bytes()!r} raises {error!r}") from error
    return "read"


@pytest.mark.parametrize("golden", [False, True], ids=["small", "golden"])
@pytest.mark.parametrize("case", READ)
def test_altered_files_are_refused_or_read(
    case: str, golden: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    count = MANY if request.config.getoption("--whole") else FEW
    file = tmp_path / f"a{FILES[case].suffix}"
    good = (FILES[case] if golden else small(case, file)).read_bytes()
    file.write_bytes(good)
    assert outcome(case, file) == "read"
    rng, found = random.Random(1 + golden), set()
    for data in altered(good, count // (1 + golden), rng):
        file.write_bytes(data)
        found.add(outcome(case, file))
    assert {"CorruptFileError", "AdapterError"} & found


def head(fields: int, tensors: int, rest: bytes) -> bytes:
    """The beginning of a GGUF file."""
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, fields) + rest


HUGE = struct.pack("<Q", 1 << 62)
KEY = struct.pack("<Q", 1) + b"k"
BOMBS = {
    "no rest": head(0, 0, b"")[:20],
    "fields": head(1 << 60, 0, b""),
    "tensors": head(0, 1 << 60, b""),
    "a long name": head(1, 0, HUGE + bytes(40)),
    "a long text": head(1, 0, KEY + struct.pack("<I", 8) + HUGE + bytes(40)),
    "a long array": head(1, 0, KEY + struct.pack("<II", 9, 4) + HUGE + bytes(40)),
    "many texts": head(1, 0, KEY + struct.pack("<II", 9, 8) + HUGE + bytes(40)),
    "nested arrays": head(
        1, 0, KEY + struct.pack("<II", 9, 9) + struct.pack("<Q", 3) + bytes(40)
    ),
    "many axes": head(0, 1, KEY + struct.pack("<I", 1 << 31) + bytes(40)),
    "a large shape": head(
        0, 1, KEY + struct.pack("<IQQIQ", 2, 1 << 33, 1 << 33, 0, 0) + bytes(40)
    ),
    "zeros of a large shape": head(
        0, 1, KEY + struct.pack("<IQQIQ", 2, 0, 1 << 62, 0, 0) + bytes(40)
    ),
    "a far offset": head(
        0, 1, KEY + struct.pack("<IQIQ", 1, 4, 0, 1 << 60) + bytes(40)
    ),
    "more than there is": head(
        0, 1, KEY + struct.pack("<IQIQ", 1, 1 << 38, 0, 0) + bytes(40)
    ),
    "other byte order": b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(40),
    "version 1": b"GGUF" + struct.pack("<IQQ", 1, 0, 0) + bytes(40),
    "two of a field": head(2, 0, (KEY + struct.pack("<IB", 0, 1)) * 2 + bytes(40)),
    "two of a tensor": head(
        0, 2, (KEY + struct.pack("<IQIQ", 1, 0, 0, 0)) * 2 + bytes(40)
    ),
    "odd alignment": head(
        1,
        0,
        struct.pack("<Q", 17) + b"general.alignment" + struct.pack("<II", 4, 3),
    ),
    "a flag of 2": head(1, 0, KEY + struct.pack("<IB", 7, 2) + bytes(40)),
    "no text": head(1, 0, KEY + struct.pack("<IQ", 8, 2) + b"\xff\xfe" + bytes(40)),
}


@pytest.mark.parametrize("name", BOMBS)
def test_claims_of_a_gguf_file_take_no_memory_and_no_time(
    name: str, tmp_path: Path
) -> None:
    file = tmp_path / "a.gguf"
    file.write_bytes(BOMBS[name])
    gguf.holds(file)
    outcome("gguf", FILES["gguf"])  # what is imported first counts for nothing
    start = time.monotonic()
    tracemalloc.start()
    try:
        assert outcome("gguf", file) == "CorruptFileError"
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20
    assert time.monotonic() - start < 5


def test_many_blocks_make_no_large_table(tmp_path: Path) -> None:
    tensor = np.ones((2, 2), np.float32)
    fields = {"general.type": "adapter", "adapter.type": "lora"}
    fields["general.architecture"] = "qwen2"
    for block in ("9" * 4, "9" * 40, "-1", "01"):
        names = [f"blk.{block}.attn_v.weight.lora_{end}" for end in "ab"]
        file = tmp_path / "a.gguf"
        file.write_bytes(gguf_bytes(fields, dict.fromkeys(names, tensor)))
        assert outcome("gguf", file) == "UnsupportedFeatureError"


@pytest.mark.parametrize("case", READ)
def test_links_and_pickles_are_refused(case: str, tmp_path: Path) -> None:
    link = tmp_path / f"link{FILES[case].suffix}"
    link.symlink_to(FILES[case])
    assert outcome(case, link) == "UnsafeFormatError"
    pickle = tmp_path / "a.bin"
    pickle.write_bytes(FILES[case].read_bytes())
    assert outcome(case, pickle) == "UnsafeFormatError"
