"""Ways in which the files of an adapter may be altered: by bytes, and as JSON."""

import json
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis.strategies as st
from hypothesis import HealthCheck, Phase, settings

# The same cases in every run, kept nowhere.
profile = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

# --- bytes ---


def flipped_bits(data: bytes) -> Iterator[bytes]:
    """Each bit of a byte at a time, of every third byte; one bit of the others."""
    for place in range(len(data)):
        for bit in range(8) if place % 3 == 0 else [place % 7]:
            yield data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]


def cut(data: bytes) -> Iterator[bytes]:
    """Each shorter length."""
    return (data[:length] for length in range(len(data)))


def moved(data: bytes) -> Iterator[bytes]:
    """Bytes put in, left out, doubled and swapped with others."""
    rng = random.Random(0)
    for _ in range(60):
        i, j, k = sorted(rng.sample(range(len(data) + 1), 3))
        chunk = rng.randbytes(rng.randint(1, 9))
        yield data[:i] + chunk + data[i:]
        yield data[:i] + rng.choice([b"{", b'"', b",", b"0", b" "]) + data[i:]
        yield data[:i] + data[j:]
        yield data[:i] + data[j:k] + data[i:j] + data[k:]
        yield data[:j] + data[i:]
        yield data[:i] + bytes(j - i) + data[j:]
    yield data + b"\0"
    yield data + data


def numbers(data: bytes) -> Iterator[bytes]:
    """Every number of the text becomes each of some others."""
    others = [b"-1", b"0", b"1", b"3", b"2.0", b"1e3", b"1e999", b"9" * 30, b"NaN"]
    for found in re.finditer(rb"(?<=[\[:, ])\d+(?:\.\d+)?", data):
        for other in others:
            changed = data[: found.start()] + other + data[found.end() :]
            yield changed
            if data[8:9] == b"{":  # and the header's length follows
                size = int.from_bytes(data[:8], "little") + len(changed) - len(data)
                yield size.to_bytes(8, "little") + changed[8:]


def texts(data: bytes) -> Iterator[bytes]:
    """Every two texts of the file change places."""
    found = [m.span() for m in re.finditer(rb'(?<!\\)"[^"]*[^\\"]"', data)]
    for number, (i, j) in enumerate(found):
        for k, m in found[number + 1 : number + 30 : 3]:
            yield data[:i] + data[k:m] + data[j:k] + data[i:j] + data[m:]


ALTER: dict[str, Callable[[bytes], Iterator[bytes]]] = {
    "flipped bits": flipped_bits,
    "cut": cut,
    "moved": moved,
    "numbers": numbers,
    "texts": texts,
}


# --- JSON ---

atoms = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 9),
    st.sampled_from([2**31, 2**63, 2**64, 10**30, -(2**63), 1e30, -0.0, 5e-324, 0.5]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from(["F32", "BF16", "F64", "I8", "q", "v", ".*", "(q", "all-linear"]),
    st.sampled_from(["", "LORA", "none", "all", "lora_only", "pissa", "\0", "\ud800"]),
    st.text(max_size=5),
)
values = st.recursive(
    atoms,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["q", "v", "^q", "x", ""]), inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def altered(draw: st.DrawFn, good: Any) -> Any:
    """The same JSON with one to three changes somewhere in it."""
    value = json.loads(json.dumps(good))
    for _ in range(draw(st.integers(1, 3))):
        place = value
        while isinstance(place, dict | list) and place:
            keys = list(place) if isinstance(place, dict) else range(len(place))
            key = draw(st.sampled_from(keys))
            inside = place[key]
            if not (isinstance(inside, dict | list) and inside and draw(st.booleans())):
                _change(draw, place, key)
                break
            place = inside
    return value


def _change(draw: st.DrawFn, place: Any, key: Any) -> None:
    kind = draw(st.sampled_from(["set", "set", "drop", "rename", "copy"]))
    if kind == "set":
        place[key] = draw(values)
    elif kind == "drop":
        del place[key]
    elif isinstance(place, dict):
        other = draw(st.sampled_from(list(place)) | st.text(max_size=4))
        place[other] = place[key] if kind == "copy" else place.pop(key)
    else:
        place.append(place[key])
