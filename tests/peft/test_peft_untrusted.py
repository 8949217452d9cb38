"""Adapters from strangers: whatever can be wrong is refused, and told by name."""

import dataclasses
import json
import os
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft_files as files
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from paths import PYTHONPATH
from peft_files import CONFIG, PARAMS, PREFIX, WEIGHTS, config, layout, pack, write

import jlora
import jlora.peft
from jlora import (
    AdapterError,
    FormatVersionError,
    LoraConfig,
    NonFiniteError,
)
from jlora import CorruptFileError as Corrupt
from jlora import UnsafeFormatError as Unsafe
from jlora import UnsupportedFeatureError as Unsupported

A, B = f"{PREFIX}q.lora_A.weight", f"{PREFIX}q.lora_B.weight"
SECOND_A = f"{PREFIX}v.lora_A.weight"


def refusal(folder: Path, error: type[Exception], *words: str, **options: Any) -> str:
    """The message of the error of exactly this type; it has all the words."""
    with pytest.raises(error) as caught:
        jlora.peft.load(folder, PARAMS, **options)
    assert type(caught.value) is error, repr(caught.value)
    message = str(caught.value)
    for word in words:
        assert word in message, f"{word!r} not in: {message[:2000]}"
    assert len(message) < 5000
    return message


def each(*cases: tuple[Any, ...]) -> Any:
    """Parametrizes a test over (id, bad thing, error, *words)."""
    rows = [pytest.param(bad, error, words, id=i) for i, bad, error, *words in cases]
    return pytest.mark.parametrize("bad,error,words", rows)


# --- the files themselves ---


def only(name: str) -> Callable[[Path], Any]:
    """Leaves another kind of file where the weights were."""

    def change(folder: Path) -> None:
        (folder / WEIGHTS).rename(folder / name)

    return change


def in_place_of(name: str, make: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """Puts something else where a file was."""

    def change(folder: Path) -> None:
        (folder / name).rename(folder / "moved")
        make(folder / name)

    return change


to_moved: Callable[[Path], Any] = lambda path: path.symlink_to("moved")
out: Callable[[Path], Any] = lambda path: path.symlink_to("../../blobs/passwd")
to_nothing: Callable[[Path], Any] = lambda path: path.symlink_to("nothing")


@pytest.mark.timeout(60)
@each(
    ("bin", only("adapter_model.bin"), Unsafe, "adapter_model.bin", "code"),
    ("pt", only("adapter_model.pt"), Unsafe, "adapter_model.pt", "code"),
    ("npz", only("adapter_model.npz"), Unsafe, "adapter_model.npz"),
    ("nothing", only("other"), FileNotFoundError, f"no {WEIGHTS}"),
    (
        "weights are a link",
        in_place_of(WEIGHTS, to_moved),
        Unsafe,
        "'moved'",
    ),
    ("config is a link", in_place_of(CONFIG, to_moved), Unsafe, CONFIG),
    ("a link elsewhere", in_place_of(WEIGHTS, out), Unsafe, "blobs/passwd"),
    ("a dead link", in_place_of(WEIGHTS, to_nothing), Unsafe, "'nothing'"),
    ("folder", in_place_of(WEIGHTS, Path.mkdir), Unsafe, WEIGHTS, "regular"),
    ("config is a folder", in_place_of(CONFIG, Path.mkdir), Unsafe, CONFIG),
    ("pipe", in_place_of(WEIGHTS, os.mkfifo), Unsafe, WEIGHTS, "regular"),
    ("config is a pipe", in_place_of(CONFIG, os.mkfifo), Unsafe, CONFIG),
    ("no config", lambda f: (f / CONFIG).unlink(), FileNotFoundError, f"no {CONFIG}"),
)
def test_files_of_other_kinds(
    tmp_path: Path,
    bad: Callable[[Path], Any],
    error: type[Exception],
    words: tuple[str, ...],
) -> None:
    bad(write(tmp_path))
    message = refusal(tmp_path, error, str(tmp_path), *words)
    if error is FileNotFoundError:
        assert "code" not in message


def test_a_file_that_lacks_both_names_both(tmp_path: Path) -> None:
    refusal(tmp_path, FileNotFoundError, CONFIG, WEIGHTS)
    refusal(tmp_path / "none", FileNotFoundError, CONFIG, WEIGHTS)


@pytest.mark.parametrize("name", ["adapter_model.bin", "x.pt", "x.PTH", "x.pkl"])
def test_a_pickle_is_refused_by_its_name(tmp_path: Path, name: str) -> None:
    refusal(tmp_path / name, Unsafe, name, "code")


def test_another_file_of_the_folder(tmp_path: Path) -> None:
    other = write(tmp_path) / "other.safetensors"
    other.write_bytes(b"\x02" + bytes(7) + b"{}")
    refusal(other, AdapterError, "other.safetensors", WEIGHTS)
    other.write_bytes(b"")
    refusal(other, Corrupt, "other.safetensors", "truncated")
    refusal(tmp_path / "none.safetensors", FileNotFoundError, "none.safetensors")


@pytest.mark.parametrize("name", ["", CONFIG, WEIGHTS])
def test_one_of_the_two_files_will_do(tmp_path: Path, name: str) -> None:
    assert jlora.peft.load(write(tmp_path) / name, PARAMS)[0].rank == files.RANK


def test_links_of_the_hub_s_cache_are_followed(tmp_path: Path) -> None:
    snapshot = write(tmp_path / "snapshots" / "main")
    (tmp_path / "blobs").mkdir()
    for name, blob in ((CONFIG, "a" * 40), (WEIGHTS, "b" * 64)):
        (snapshot / name).rename(tmp_path / "blobs" / blob)
        (snapshot / name).symlink_to(f"../../blobs/{blob}")
    assert jlora.peft.load(snapshot, PARAMS)[0].rank == files.RANK


def test_max_bytes(tmp_path: Path) -> None:
    size = (write(tmp_path) / WEIGHTS).stat().st_size
    jlora.peft.load(tmp_path, PARAMS, max_bytes=size)
    refusal(tmp_path, Corrupt, WEIGHTS, f"{size:,}", max_bytes=size - 1)


# --- the container ---

HEADER, DATA = layout(files.tensors())
GOOD = pack(HEADER, DATA)
SIZE = len(DATA)


def entry(name: str, **fields: Any) -> bytes:
    """The file with other claims about one tensor."""
    return pack({**HEADER, name: {**HEADER[name], **fields}}, DATA)


def added(data: bytes = b"", **fields: Any) -> bytes:
    """The file with one more tensor, which is empty unless the fields say otherwise."""
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [SIZE, SIZE]}
    return pack({**HEADER, "more": {**empty, **fields}}, DATA + data)


def raw(entries: str) -> bytes:
    """A file whose header is this text between braces."""
    return pack(f"{{{entries}}}".encode())


def deep(levels: int) -> str:
    return "[" * levels + "]" * levels


TINY = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'


@each(
    ("empty", b"", Corrupt, "truncated"),
    ("seven bytes", GOOD[:7], Corrupt, "truncated", "7 bytes"),
    ("length alone", GOOD[:8], Corrupt, "header"),
    ("header cut", GOOD[:100], Corrupt, "header"),
    ("data cut", GOOD[:-1], Corrupt, f"{SIZE:,}", f"{SIZE - 1:,}"),
    ("data missing", pack(HEADER), Corrupt, f"{SIZE:,}"),
    ("trailing byte", GOOD + b"\0", Corrupt, f"{SIZE + 1:,}"),
    ("length 0", pack(HEADER, DATA, 0), Corrupt, "'{'"),
    ("length 1", pack(HEADER, DATA, 1), Corrupt, "JSON"),
    ("length 2**63", pack(HEADER, DATA, 2**63), Corrupt, f"{2**63:,}"),
    ("length 2**64-1", pack(HEADER, DATA, 2**64 - 1), Corrupt, "header"),
    ("length of file", pack(HEADER, DATA, len(GOOD)), Corrupt, "header"),
    ("starts with space", pack(b" {}"), Corrupt, "'{'"),
    ("is a list", pack(b"[]"), Corrupt, "'{'"),
    ("byte order mark", pack(b"\xef\xbb\xbf{}"), Corrupt, "'{'"),
    ("not UTF-8", pack(b'{"\xff": 1}'), Corrupt, "utf-8"),
    ("cut JSON", pack(b'{"a": '), Corrupt, "JSON"),
    ("two objects", pack(b"{}{}"), Corrupt, "JSON"),
    ("zip", b"PK\x03\x04" + bytes(60), Corrupt, "header"),
    ("pickle", b"\x80\x04\x95" + bytes(60), Corrupt, "header"),
    ("same key twice", raw(f'"a":{TINY},"a":{TINY}'), Corrupt, "'a'", "twice"),
    (
        "dtype twice",
        raw('"a":{"dtype":"F32","dtype":"F16"}'),
        Corrupt,
        "dtype",
    ),
    ("NaN", raw('"a": NaN'), Corrupt, "NaN"),
    ("Infinity", raw('"a": -Infinity'), Corrupt, "-Infinity"),
    ("1e999", raw('"a": 1e999'), Corrupt, "1e999"),
    ("many digits", raw('"a": ' + "1" * 5000), Corrupt, "JSON"),
    ("10,000 deep", raw(f'"a": {deep(10_000)}'), Corrupt, "10001 deep"),
    ("33 deep", raw(f'"a": {deep(32)}'), Corrupt, "33 deep"),
    (
        "metadata is a list",
        pack({"__metadata__": []}),
        Corrupt,
        "__metadata__",
    ),
    ("metadata not text", pack({"__metadata__": {"a": 1}}), Corrupt, "text"),
    ("metadata nests", pack({"__metadata__": {"a": {}}}), Corrupt, "text"),
    ("entry is text", raw('"a": "b"'), Corrupt, "'a'", "entry"),
    ("entry lacks shape", raw('"a": {"dtype": "F32"}'), Corrupt, "'a'"),
    ("entry has more", entry(A, more=1), Corrupt, A, "exactly"),
    ("no such dtype", entry(A, dtype="F128"), Corrupt, A, "F128"),
    ("dtype is no text", entry(A, dtype=["F32"]), Corrupt, A, "dtype"),
    ("long dtype", entry(A, dtype="F" * 10**5), Corrupt, A, "dtype"),
    ("dtype too narrow", entry(A, dtype="F16"), Corrupt, A, "F16"),
    ("dtype too wide", entry(A, dtype="F64"), Corrupt, A, "F64"),
    ("integers", entry(A, dtype="I32"), AdapterError, "I32"),
    ("other shape", entry(A, shape=[2, 6]), Corrupt, A, "[2, 6]"),
    ("shape is text", entry(A, shape="25"), Corrupt, A, "25"),
    ("negative axes", entry(A, shape=[-2, -5]), Corrupt, A, "[-2, -5]"),
    ("axis is a float", entry(A, shape=[2.0, 5]), Corrupt, A, "2.0"),
    ("axis is a bool", entry(A, shape=[True, 10]), Corrupt, A, "True"),
    ("nine axes", entry(A, shape=[2, 5] + [1] * 7), Corrupt, A, "8 axes"),
    ("2**80 values", entry(A, shape=[2**40] * 2), Corrupt, A, "values"),
    ("2**64 values", entry(A, shape=[2**32] * 2), Corrupt, A, "values"),
    ("endless axes", entry(A, shape=[10**4000] * 8), Corrupt, A, "values"),
    ("empty, 2**63", added(shape=[0, 2**63]), Corrupt, "'more'", "values"),
    ("empty, 2**62", added(shape=[2**62, 0]), Corrupt, "'more'", "values"),
    ("overlap", entry(SECOND_A, data_offsets=[0, 40]), Corrupt, "overlap"),
    ("hole", added(b"1234", data_offsets=[SIZE + 4] * 2), Corrupt, "hole"),
    ("begins late", raw(f'"a":{TINY}'.replace("0,0", "8,8")), Corrupt, "hole"),
    ("past the end", entry(A, data_offsets=[2**40, 2**40 + 40]), Corrupt),
    ("reversed", entry(A, data_offsets=[40, 0]), Corrupt, A, "[40, 0]"),
    ("negative", entry(A, data_offsets=[-40, 0]), Corrupt, A, "[-40, 0]"),
    ("float offsets", entry(A, data_offsets=[0.0, 40]), Corrupt, A, "0.0"),
    ("bool offsets", entry(A, data_offsets=[False, 40]), Corrupt, A, "False"),
    ("one offset", entry(A, data_offsets=[40]), Corrupt, A, "[40]"),
    ("three offsets", entry(A, data_offsets=[0, 20, 40]), Corrupt, A),
    ("no offsets", entry(A, data_offsets=None), Corrupt, A, "None"),
)
def test_container(
    tmp_path: Path, bad: bytes, error: type[Exception], words: tuple[str, ...]
) -> None:
    refusal(write(tmp_path, weights=bad), error, WEIGHTS, *words)


def test_a_header_above_the_cap(tmp_path: Path) -> None:
    with open(write(tmp_path) / WEIGHTS, "wb") as file:
        file.write((100_000_001).to_bytes(8, "little"))
        file.truncate(100_000_100)  # sparse: no disk is taken
    refusal(tmp_path, Corrupt, "100,000,001", "100,000,000")


# As in `attacks/` of the safetensors repository, and beyond: what a file of a few bytes
# makes a careless reader allocate.
SPAN = {"dtype": "F32", "shape": [200, 200], "data_offsets": [0, 160_000]}
GREEDY = {
    "length": pack(HEADER, DATA, 2**62),
    "shape": entry(A, shape=[2**40], data_offsets=[0, 2**42]),
    "offsets": entry(A, data_offsets=[0, 2**60]),
    "empty axes": added(shape=[2**40, 0, 2**40]),
    "overlaps": pack({f"weight_{i}": SPAN for i in range(2000)}, bytes(160_000)),
}


@pytest.mark.parametrize("name", GREEDY)
def test_memory_is_taken_for_what_is_there(tmp_path: Path, name: str) -> None:
    write(tmp_path, weights=GREEDY[name])
    tracemalloc.start()
    try:
        refusal(tmp_path, Corrupt, WEIGHTS)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 20 << 20


def test_a_good_file_takes_no_memory_for_the_limit(tmp_path: Path) -> None:
    write(tmp_path)
    tracemalloc.start()
    try:
        jlora.peft.load(tmp_path, PARAMS)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 20 << 20


# --- the text of the config ---


@each(
    ("empty", b"", "JSON"),
    ("list", b"[]", "no object"),
    ("text", b'"LORA"', "no object"),
    ("null", b"null", "no object"),
    ("cut", json.dumps(config()).encode()[:-1], "JSON"),
    ("byte order mark", b"\xef\xbb\xbf{}", "JSON"),
    ("UTF-16", json.dumps(config()).encode("utf-16"), "JSON"),
    ("not UTF-8", b'{"r": "\xff"}', "utf-8"),
    ("key twice", b'{"peft_type": "LORA", "r": 2, "r": 8}', "'r'", "twice"),
    ("nested key twice", b'{"rank_pattern": {"q": 2, "q": 8}}', "'q'", "twice"),
    ("NaN", b'{"lora_alpha": NaN}', "NaN"),
    ("Infinity", b'{"lora_alpha": Infinity}', "Infinity"),
    ("1e999", b'{"lora_alpha": 1e999}', "1e999"),
    ("many digits", b'{"r": 1' + b"0" * 5000 + b"}", "JSON"),
    ("deep", f'{{"r": {deep(10_000)}}}'.encode(), "10001 deep"),
    ("deep and cut", b"[" * 100_000, "deep"),
    ("too long", b" " * (1 << 20) + b"{", f"{(1 << 20) + 1:,}"),
    ("open string", b'"' + b'\\"' * 500_000, "JSON"),
    ("many strings", b'{"' + b'"",' * 300_000, "JSON"),
)
def test_text_of_the_config(
    tmp_path: Path, bad: bytes, error: str, words: tuple[str, ...]
) -> None:
    begun = time.process_time()
    refusal(write(tmp_path, bad), Corrupt, CONFIG, error, *words)
    assert time.process_time() - begun < 5


# --- its fields ---


@each(
    ("r 0", {"r": 0}, Corrupt, "`r`", "'0'"),
    ("r -1", {"r": -1}, Corrupt, "`r`", "'-1'"),
    ("r 2**40", {"r": 2**40}, Corrupt, "`r`", str(2**40)),
    ("r true", {"r": True}, Corrupt, "`r`", "True"),
    ("r text", {"r": "8"}, Corrupt, "`r`", "'8'"),
    ("r 8.5", {"r": 8.5}, Corrupt, "`r`", "8.5"),
    ("r 2.0", {"r": 2.0}, Corrupt, "`r`", "2.0"),
    ("r null", {"r": None}, Corrupt, "`r`", "None"),
    ("alpha 0", {"lora_alpha": 0}, Corrupt, "`lora_alpha`", "'0'"),
    ("alpha -6", {"lora_alpha": -6}, Corrupt, "`lora_alpha`", "-6"),
    ("alpha text", {"lora_alpha": "6"}, Corrupt, "`lora_alpha`", "'6'"),
    ("alpha true", {"lora_alpha": True}, Corrupt, "`lora_alpha`", "True"),
    ("alpha 1e300", {"lora_alpha": 1e300}, Corrupt, "`lora_alpha`", "1e+300"),
    ("alpha 5e-324", {"lora_alpha": 5e-324}, Corrupt, "`lora_alpha`", "5e-324"),
    ("alpha list", {"lora_alpha": [6]}, Corrupt, "`lora_alpha`", "[6]"),
    ("two", {"r": 0, "lora_alpha": 0}, Corrupt, "`r`", "`lora_alpha`"),
    ("rslora 1", {"use_rslora": 1}, Corrupt, "`use_rslora`", "1"),
    ("bias", {"bias": "some"}, Corrupt, "`bias`", "some"),
    ("dropout 2", {"lora_dropout": 2}, Corrupt, "`lora_dropout`", "2"),
    ("dropout text", {"lora_dropout": "0"}, Corrupt, "`lora_dropout`"),
    ("targets 3", {"target_modules": 3}, Corrupt, "`target_modules`", "3"),
    ("targets [3]", {"target_modules": ["q", 3]}, Corrupt, "`target_modules`"),
    ("targets {}", {"target_modules": {"q": 1}}, Corrupt, "`target_modules`"),
    ("layers", {"layers_to_transform": ["0"]}, Corrupt, "layers_to_transform"),
    ("layer true", {"layers_to_transform": True}, Corrupt, "True"),
    ("ranks list", {"rank_pattern": ["q"]}, Corrupt, "`rank_pattern`"),
    ("rank text", {"rank_pattern": {"q": "2"}}, Corrupt, "`rank_pattern`"),
    ("rank 0", {"rank_pattern": {"q": 0}}, Corrupt, "`rank_pattern`"),
    ("AdaLoRA", {"rank_pattern": {"q": [True]}}, Corrupt, "`rank_pattern`"),
    ("alpha 0 of q", {"alpha_pattern": {"q": 0}}, Corrupt, "`alpha_pattern`"),
    ("saved", {"modules_to_save": "head"}, Corrupt, "`modules_to_save`"),
    ("init", {"init_lora_weights": 3}, Corrupt, "`init_lora_weights`", "3"),
    ("no type", {"peft_type": ...}, AdapterError, "None", "LORA"),
    ("other type", {"peft_type": "BOFT"}, AdapterError, "BOFT", "LORA"),
    ("OFT", {"peft_type": "OFT"}, AdapterError, "OFT", "peft.save_as_lora"),
    ("odd type", {"peft_type": ["LORA"]}, AdapterError, "LORA"),
    ("dora number", {"use_dora": 1}, Corrupt, "use_dora"),
    ("bias of b", {"lora_bias": 1}, Corrupt, "`lora_bias`"),
    ("qalora", {"use_qalora": True}, Unsupported, "`use_qalora`"),
    ("bdlora", {"use_bdlora": {"nblocks": 2}}, Unsupported, "`use_bdlora`"),
    ("alora", {"alora_invocation_tokens": [5]}, Unsupported, "`alora_inv"),
    ("arrow", {"arrow_config": {"top_k": 3}}, Unsupported, "`arrow_config`"),
    ("kasa", {"kasa_config": {"beta": 1}}, Unsupported, "`kasa_config`"),
    ("monteclora", {"monteclora_config": {"a": 1}}, Unsupported, "`montecl"),
    ("velora", {"velora_config": {"a": 1}}, Unsupported, "`velora_config`"),
    ("megatron", {"megatron_config": {"a": 1}}, Unsupported, "`megatron_c"),
    ("layers again", {"layer_replication": [[0, 1]]}, Unsupported, "[0, 1]"),
    ("rows", {"trainable_token_indices": [1]}, AdapterError, "`trainable_t"),
    ("rows of", {"trainable_token_indices": {"e": [1]}}, AdapterError, "`tr"),
    ("row text", {"trainable_token_indices": "1"}, Corrupt, "`trainable_token"),
    ("row -1", {"trainable_token_indices": [-1]}, Corrupt, "`trainable_token"),
    ("row true", {"trainable_token_indices": {"e": [True]}}, Corrupt, "`train"),
    ("row row", {"trainable_token_indices": {"e": 1}}, Corrupt, "`trainable_t"),
    ("future", {"use_future": "yes"}, Unsupported, "`use_future`", "yes"),
    ("future object", {"new": {"a": 0}}, Unsupported, "`new`"),
    ("two at once", {"use_qalora": True, "x": 1}, Unsupported, "qal", "`x`"),
    (
        "layers of a regex",
        {"target_modules": ".", "layers_to_transform": [0]},
        Unsupported,
        "`layers_to_transform` is (0,)",
        "regex",
    ),
    (
        "pattern beside a regex",
        {"target_modules": ".", "layers_to_transform": 0, "layers_pattern": "h"},
        Unsupported,
        "`layers_pattern` is ('h',)",
        "regex",
    ),
    (
        "pattern of no layers",
        {"layers_pattern": ["h"]},
        Unsupported,
        "`layers_pattern`",
        "without `layers_to_transform`",
    ),
    *(
        (init, {"init_lora_weights": init}, Unsupported, init, "base")
        for init in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga")
    ),
)
def test_fields_of_the_config(
    tmp_path: Path, bad: dict[str, Any], error: type[Exception], words: tuple[str, ...]
) -> None:
    refusal(write(tmp_path, config(**bad)), error, CONFIG, *words)


def test_a_bias_of_b_that_is_not_there(tmp_path: Path) -> None:
    folder = write(tmp_path, config(lora_bias=True))
    refusal(folder, AdapterError, WEIGHTS, "`lora_bias` is True", "'q'")


def test_dora_without_magnitudes(tmp_path: Path) -> None:
    folder = write(tmp_path, config(use_dora=True))
    refusal(folder, AdapterError, WEIGHTS, "'q' has no magnitude", "use_dora")


@pytest.mark.parametrize("value", [None, False, 0, "", [], {}])
def test_an_unknown_field_that_says_nothing_is_taken(
    tmp_path: Path, value: Any
) -> None:
    found, _ = jlora.peft.load(write(tmp_path, config(use_future=value)), PARAMS)
    assert found.scaling == files.ALPHA / files.RANK


def test_what_is_ignored_by_name(tmp_path: Path) -> None:
    write(tmp_path, config(use_qalora=True, use_future=3))
    refusal(tmp_path, Unsupported, "use_future", ignore=["use_qalora"])
    jlora.peft.load(tmp_path, PARAMS, ignore=["use_qalora", "use_future"])


def test_missing_fields_have_the_defaults_of_peft(tmp_path: Path) -> None:
    write(tmp_path, config(r=..., rank_pattern={"q|v": 2}, lora_alpha=...))
    assert jlora.peft.load(tmp_path, PARAMS)[0].scaling == 8 / files.RANK


# --- patterns ---

HOSTILE = {
    "plus of plus": "(a+)+$",
    "plus of alternatives": "(a|aa)+",
    "three stars": "((a*)*)*",
    "counts of counts": "((.?){99}){99}",
    "anchors": "|".join([r"(.|.*\A)*"] * 390),
    "50 groups": "(" * 50 + "a" + ")" * 50,
    "100 kB": "a|" * 50_000,
    "100 kB of groups": "(" * 100_000,
    "reference": r"(a)\1",
    "lookahead": "(?=a)a",
    "flags": "(?i)a",
    "open class": "[a",
    "open group": "(a",
    "bad range": "[z-a]",
    "bad count": "a{3,2}",
    "star of nothing": "*",
    "nested class": "[[a]]",
    "classes apart": "[a-z--b]",
    "escapes": "[" + r"\." * 10_000 + "]",
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize(
    "field", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"]
)
def test_patterns_take_no_time(tmp_path: Path, name: str, field: str) -> None:
    pattern = HOSTILE[name]
    value = {pattern: 2} if field.endswith("pattern") else pattern
    # The names that are matched are the file's and those of the params.
    long = "a" * 400 + "!"
    arrays = {
        k.replace("model.q", f"model.{long}"): t for k, t in files.tensors().items()
    }
    params = {"params": {long: PARAMS["params"]["q"], "v": PARAMS["params"]["v"]}}
    said = config(**{"target_modules": [long, "v"], field: value})
    write(tmp_path, said, pack(*layout(arrays)))
    begun = time.process_time()
    try:
        jlora.peft.load(tmp_path, params)
    except AdapterError as error:
        assert len(str(error)) < 5000
    assert time.process_time() - begun < 5


@each(
    ("ranks", {"rank_pattern": {"q": 2, "[pq]": 3}}, "rank_pattern", "'q'"),
    ("alphas", {"alpha_pattern": {"v": 2, ".*": 3}}, "alpha_pattern", "'v'"),
    ("unknown", {"rank_pattern": {"(?=q)q": 2}}, "(?=q)q"),
    ("unknown target", {"target_modules": "(?!v)."}, "(?!v)."),
)
def test_patterns_without_one_meaning(
    tmp_path: Path, bad: dict[str, Any], error: str, words: tuple[str, ...]
) -> None:
    folder = write(tmp_path, config(**bad))
    refusal(folder, Unsupported, error, *words)


@pytest.mark.parametrize(
    "key", ["^model.{}.q", "{}.q", r"model\.{}\.q", ".*{}.q", "{}+"]
)
def test_many_patterns_take_no_time(tmp_path: Path, key: str) -> None:
    pattern = {key.format(number): files.RANK for number in range(30_000)}
    write(tmp_path, config(rank_pattern=pattern))
    begun = time.process_time()
    if "*" in key or "+" in key:
        refusal(tmp_path, Unsupported, "`rank_pattern`", "too many")
    else:
        jlora.peft.load(tmp_path, PARAMS)
    assert time.process_time() - begun < 2


LISTS = {
    "target_modules": lambda long: [*long, "q", "v"],
    "exclude_modules": list,
    "target_parameters": list,
    "modules_to_save": list,
    "layers_pattern": list,
}


@pytest.mark.parametrize("field", LISTS)
def test_many_names_take_no_time(tmp_path: Path, field: str) -> None:
    """A list of a stranger's is looked up, not gone through for each module."""
    params = {
        "params": PARAMS["params"]
        | {f"m{i}.k.0.x": {"kernel": np.ones((1, 1))} for i in range(400)}
    }
    said = {field: LISTS[field]([f"o{i}" for i in range(100_000)])}
    if field == "layers_pattern":
        said |= {"target_modules": ["q", "v", "x"], "layers_to_transform": [1]}
    write(tmp_path, config(**said))
    begun = time.process_time()
    jlora.peft.load(tmp_path, params)
    assert time.process_time() - begun < 3


def test_a_parameter_that_is_promised_and_not_there(tmp_path: Path) -> None:
    write(tmp_path, config(target_parameters=["q.weight"]))
    refusal(tmp_path, AdapterError, "the config selects 'q.weight'", "no factors")
    write(tmp_path, config(target_modules="all-linear", target_parameters=["q.weight"]))
    refusal(tmp_path, AdapterError, "the config selects 'q.weight'", "no factors")


def test_scalings_of_one_kernel_that_are_far_apart(tmp_path: Path) -> None:
    params = {"layers": {"q": {"kernel": np.ones((2, 5, 7), np.float32)}}}
    names = ["layers.0.q", "layers.1.q"]
    shapes = {"A": (2, 5), "B": (7, 2)}
    arrays = {
        f"{PREFIX}{name}.lora_{kind}.weight": np.ones(shape, np.float32)
        for name in names
        for kind, shape in shapes.items()
    }
    alphas = {"layers.0.q": 1e-20, "layers.1.q": 1e29}
    said = config(target_modules=names, alpha_pattern=alphas)
    write(tmp_path, said, pack(*layout(arrays)))
    with pytest.raises(AdapterError, match=r"5e-21.*too far apart.*float32"):
        jlora.peft.load(tmp_path, params, [("layers/q", "layers.{i}.q")])


# --- the tensors ---


def bent(**arrays: Any) -> bytes:
    """The file with other tensors: `q_A=…`; None takes one out."""
    found = dict(files.tensors())
    for short, array in arrays.items():
        module, _, kind = short.rpartition("_")
        key = f"{PREFIX}{module}.lora_{kind}.weight"
        found.pop(key, None)
        if array is not None:
            found[key] = array
    return pack(*layout(found))


def renamed(old: str, new: str) -> bytes:
    """The file with another name for whatever has `old` in its name."""
    return pack(*layout({k.replace(old, new): t for k, t in files.tensors().items()}))


def more(name: str, *shape: int) -> bytes:
    """The file with one more tensor, of zeros."""
    return pack(*layout({**files.tensors(), name: np.zeros(shape, np.float32)}))


zeros: Callable[..., np.ndarray] = lambda *shape: np.zeros(shape, np.float32)
LORA_Q = f"{PREFIX}q.lora"


@each(
    ("only A", bent(q_B=None), AdapterError, "'q'", "both factors"),
    ("only B", bent(v_A=None), AdapterError, "'v'", "both factors"),
    ("ranks differ", bent(q_A=zeros(3, 5)), AdapterError, "'q'", "3 and 2"),
    ("other rank", bent(q_A=zeros(3, 5), q_B=zeros(7, 3)), AdapterError, "'q'", "3"),
    ("transposed", bent(q_A=zeros(2, 7), q_B=zeros(5, 2)), AdapterError, "transposed"),
    ("all of it", bent(q_A=zeros(5, 2), q_B=zeros(2, 7)), AdapterError, "'q'", "5"),
    ("other fan-in", bent(q_A=zeros(2, 6)), AdapterError, "q/kernel", "(5, 7)", "6"),
    ("other fan-out", bent(v_B=zeros(4, 2)), AdapterError, "v/kernel", "4"),
    ("one axis", bent(q_A=zeros(10)), AdapterError, "'q'", "(10,)"),
    ("no axes", bent(q_A=zeros()), AdapterError, "'q'", "()"),
    ("conv 3", bent(q_A=zeros(2, 5, 3), q_B=zeros(7, 2, 1)), AdapterError, "q"),
    (
        "groups",
        bent(q_A=zeros(2, 5, 3), q_B=zeros(7, 1, 1)),
        Unsupported,
        "q",
        "groups",
    ),
    ("empty", bent(q_A=zeros(0, 5), q_B=zeros(7, 0)), AdapterError, "'q'", "(0, 5)"),
    ("no inputs", bent(q_A=zeros(2, 0)), AdapterError, "'q'", "(2, 0)"),
    ("dtypes", bent(q_A=np.zeros((2, 5), np.float16)), AdapterError, "float16"),
    (
        "table",
        renamed(f"{LORA_Q}_A.weight", f"{LORA_Q}_embedding_A"),
        AdapterError,
        "q",
    ),
    (
        "unknown module",
        renamed("model.q", "model.w"),
        AdapterError,
        "'w'",
        "'q.weight'",
    ),
    ("other case", renamed("model.q", "model.Q"), AdapterError, "'Q'"),
    ("mixed prefix", renamed(f"{PREFIX}q", "q"), AdapterError, PREFIX, "q.lora_A"),
    ("twice prefix", renamed(PREFIX, PREFIX * 2), AdapterError, "base_model.model.q"),
    ("adapter name", renamed("_A.weight", "_A.default.weight"), AdapterError, "q"),
    ("two", renamed("q.lora_A.", "q.lora_A.one."), AdapterError, "'one'", "q.lora_B"),
    ("10 kB name", more(PREFIX + "a" * 10_000, 1), Corrupt, "aaa"),
    ("newline", more(PREFIX + "a\n.b", 1), Corrupt, "a\\n.b"),
    ("NUL", more(PREFIX + "a\0", 1), Corrupt, "a\\x00"),
    ("escape", more(PREFIX + "\x1b[31m", 1), Corrupt, "\\x1b"),
    ("empty name", more("", 1), AdapterError, "''"),
    ("prefix alone", more(PREFIX, 1), AdapterError, "''"),
    ("bare key", more(f"{PREFIX}lora_A.weight", 1), AdapterError, "lora_A.weight"),
    ("stranger", more(f"{PREFIX}q.weight", 5, 7), AdapterError, "'q.weight'"),
    ("not in torch", more(f"{PREFIX}x.bias", 5), AdapterError, "'x.bias'"),
    ("DoRA", more(f"{PREFIX}q.lora_magnitude_vector", 7), AdapterError, "use_dora"),
    ("bias of B", more(f"{PREFIX}q.lora_B.bias", 7), AdapterError, "lora_bias"),
    ("long bias", more(f"{PREFIX}q.lora_B.bias", 8), AdapterError, "bias of `b` (8,)"),
    (
        "rows",
        more(f"{PREFIX}q.token_adapter.trainable_tokens_delta", 1, 7),
        AdapterError,
        "trainable_token_indices",
    ),
    ("AdaLoRA", more(f"{PREFIX}q.lora_E", 2, 1), Unsupported, "AdaLoRA"),
    ("no tensors", pack({}), AdapterError, "'q'", "'v'"),
)
def test_tensors(
    tmp_path: Path, bad: bytes, error: type[Exception], words: tuple[str, ...]
) -> None:
    refusal(write(tmp_path, weights=bad), error, *words)


def test_a_module_under_two_names(tmp_path: Path) -> None:
    second = f"{PREFIX}q.weight.lora"
    twins = {f"{second}_A.weight": zeros(2, 5), f"{second}_B.weight": zeros(7, 2)}
    weights = pack(*layout({**files.tensors(), **twins}))
    write(tmp_path, config(target_modules=["q", "v", "q.weight"]), weights)
    refusal(tmp_path, AdapterError, WEIGHTS, "q/kernel", "two names")


def test_a_tensor_below_the_base_layer_and_not(tmp_path: Path) -> None:
    twins = {f"{PREFIX}q.bias": zeros(7), f"{PREFIX}q.base_layer.bias": zeros(7)}
    weights = pack(*layout({**files.tensors(), **twins}))
    write(tmp_path, config(bias="lora_only"), weights)
    refusal(tmp_path, AdapterError, WEIGHTS, "twice")


def test_targets_and_tensors_agree_both_ways(tmp_path: Path) -> None:
    write(tmp_path, config(target_modules=["v"]))
    refusal(tmp_path, AdapterError, "'q' has factors", "does not select")
    write(tmp_path, weights=bent(q_A=None, q_B=None))
    refusal(tmp_path, AdapterError, "selects 'q'", "no factors")
    write(tmp_path, config(target_modules=...))
    refusal(tmp_path, AdapterError, "'q'", "'v'")
    write(tmp_path, config(exclude_modules=["v"]))
    refusal(tmp_path, AdapterError, "'v' has factors")


@pytest.mark.parametrize("said", [{"r": 3}, {"rank_pattern": {"q": 3}}])
def test_the_rank_is_that_of_the_arrays(tmp_path: Path, said: dict[str, Any]) -> None:
    refusal(write(tmp_path, config(**said)), AdapterError, "'q'", "rank 2", "says 3")


def test_numbers_of_layers_are_written_as_torch_does(tmp_path: Path) -> None:
    params = {"layers": {"q": {"kernel": np.ones((4, 5, 7), np.float32)}}}
    rules = [("layers/q", "layers.{i}.q")]
    for number, fine in (("3", True), ("03", False), ("٣", False), ("4", False)):
        name = f"layers.{number}.q"
        arrays = {
            f"{PREFIX}{name}.lora_A.weight": zeros(2, 5),
            f"{PREFIX}{name}.lora_B.weight": zeros(7, 2),
        }
        write(tmp_path, config(target_modules=[name]), pack(*layout(arrays)))
        if fine:
            jlora.peft.load(tmp_path, params, rules)
        else:
            with pytest.raises(AdapterError, match="layers"):
                jlora.peft.load(tmp_path, params, rules)


def test_layers_of_several_dtypes_have_one_that_holds_all(tmp_path: Path) -> None:
    params = {"layers": {"q": {"kernel": np.ones((2, 5, 7), np.float32)}}}
    arrays = {
        f"{PREFIX}layers.{layer}.q.lora_{name}.weight": np.ones(shape, dtype)
        for layer, dtype in enumerate((np.float16, jnp.bfloat16))
        for name, shape in (("A", (2, 5)), ("B", (7, 2)))
    }
    write(tmp_path, config(target_modules=["q"]), pack(*layout(arrays)))
    rules = [("layers/q", "layers.{i}.q")]
    _, adapter = jlora.peft.load(tmp_path, params, rules)
    assert {leaf.dtype for leaf in jax.tree.leaves(adapter)} == {np.dtype("float32")}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
def test_values_are_finite(tmp_path: Path, value: float, dtype: Any) -> None:
    arrays = {name: t.astype(dtype) for name, t in files.tensors().items()}
    arrays[A][1, 3] = value
    write(tmp_path, weights=pack(*layout(arrays)))
    refusal(tmp_path, NonFiniteError, A, "1, the first at (1, 3)")
    _, adapter = jlora.peft.load(tmp_path, PARAMS, allow_nonfinite=True)
    found = np.asarray(adapter["params/q/kernel"].a, np.float32)
    np.testing.assert_array_equal(found, arrays[A].T.astype(np.float32))


def test_float64_needs_x64(tmp_path: Path) -> None:
    arrays = {n: t.astype(np.float64) * 1e300 for n, t in files.tensors().items()}
    write(tmp_path, weights=pack(*layout(arrays)))
    refusal(tmp_path, AdapterError, A, "jax_enable_x64")
    with jax.enable_x64(True):
        _, adapter = jlora.peft.load(tmp_path, PARAMS)
        assert adapter["params/q/kernel"].a.dtype == np.float64
        np.testing.assert_array_equal(adapter["params/q/kernel"].a, arrays[A].T)


@pytest.mark.parametrize("dtype", ["I64", "U8", "BOOL", "F8_E4M3"])
def test_other_dtypes(tmp_path: Path, dtype: str) -> None:
    width = {"I64": 8}.get(dtype, 1)
    spans = {"dtype": dtype, "shape": [4], "data_offsets": [SIZE, SIZE + 4 * width]}
    write(tmp_path, weights=pack({**HEADER, "x": spans}, DATA + bytes(4 * width)))
    refusal(tmp_path, AdapterError, WEIGHTS, dtype)


# --- what jlora notes in a file ---


def seal_of(folder: Path) -> dict[str, Any]:
    header, _ = files.unpack((folder / WEIGHTS).read_bytes())
    return json.loads(header["__metadata__"]["jlora"])


def reseal(folder: Path, text: str) -> None:
    header, data = files.unpack((folder / WEIGHTS).read_bytes())
    header["__metadata__"]["jlora"] = text
    (folder / WEIGHTS).write_bytes(pack(header, data))


@each(
    ("newer", {"version": 99}, FormatVersionError, "99", "newer jlora"),
    ("no version", {"version": None}, Corrupt, "version"),
    ("version 0", {"version": 0}, Corrupt, "version", "0"),
    ("version true", {"version": True}, Corrupt, "version", "True"),
    ("version text", {"version": "1"}, Corrupt, "version", "'1'"),
    ("digest", {"sha256": "0" * 64}, Corrupt, "digest"),
    ("no digest", {"sha256": None}, Corrupt, "digest"),
    ("no scalings", {"scaling": None}, Corrupt, "scaling"),
    ("scalings list", {"scaling": [3.0]}, Corrupt, "scaling"),
    ("scaling", {"scaling": {"q": 4.0}}, Corrupt, "'q'", "4.0", "3.0"),
    ("scaling text", {"scaling": {"q": "3.0"}}, Corrupt, "'q'"),
)
def test_notes(
    tmp_path: Path,
    bad: dict[str, Any],
    error: type[Exception],
    words: tuple[str, ...],
) -> None:
    folder = files.written_by_jlora(tmp_path)
    reseal(folder, json.dumps({**seal_of(folder), **bad}))
    refusal(folder, error, str(folder), *words)


@pytest.mark.parametrize("text", ["", "null", "[]", "{", "3", '{"version": NaN}'])
def test_notes_that_are_none(tmp_path: Path, text: str) -> None:
    folder = files.written_by_jlora(tmp_path)
    reseal(folder, text)
    refusal(folder, Corrupt, str(folder))


@each(
    ("alpha", {"lora_alpha": 12}, "'q'", "3.0", "6.0"),
    ("alpha of v", {"alpha_pattern": {"^v": 7}}, "'v'", "5.0", "7.0"),
    ("rslora", {"use_rslora": True}, "'q'"),
    ("rank", {"r": 4}, "'q'"),
)
def test_a_config_that_was_edited(
    tmp_path: Path, bad: dict[str, Any], error: str, words: tuple[str, ...]
) -> None:
    folder = files.written_by_jlora(tmp_path)
    said = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**said, **bad}))
    refusal(folder, Corrupt, CONFIG, error, *words)


def test_tensors_that_were_swapped(tmp_path: Path) -> None:
    folder = files.written_by_jlora(tmp_path)
    header, data = files.unpack((folder / WEIGHTS).read_bytes())
    (folder / WEIGHTS).write_bytes(pack(header, data[4:8] + data[:4] + data[8:]))
    refusal(folder, Corrupt, "digest")


# --- saving ---

CONFIGS = LoraConfig("q", rank=2, alpha=6.0), LoraConfig("v", rank=1, alpha=5.0)


def some_adapter() -> dict[str, Any]:
    lora = jlora.lora(files.model, CONFIGS)
    return lora.init(jax.random.key(0), PARAMS, np.ones((1, 5), np.float32))


def save(folder: Path, adapter: Any = None, **options: Any) -> None:
    given = some_adapter() if adapter is None else adapter
    jlora.peft.save(folder, PARAMS, given, CONFIGS, **options)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_adapter_that_is_there_stays(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    save(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in names_in(tmp_path)}
    other = jax.tree.map(lambda x: x + 1, some_adapter())
    with pytest.raises(FileExistsError, match=WEIGHTS):
        save(tmp_path, other)
    assert before == {n: (tmp_path / n).read_bytes() for n in names_in(tmp_path)}
    save(tmp_path, other, overwrite=True)
    assert names_in(tmp_path) == sorted([CONFIG, WEIGHTS, "notes.txt"])
    assert (tmp_path / WEIGHTS).read_bytes() != before[WEIGHTS]
    _, found = jlora.peft.load(tmp_path, PARAMS)
    np.testing.assert_array_equal(
        found["params/v/kernel"].a, other["params/v/kernel"].a
    )


def test_a_config_alone_stays_too(tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text("{}")
    with pytest.raises(FileExistsError, match=CONFIG):
        save(tmp_path)
    assert names_in(tmp_path) == [CONFIG]


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(Unsafe, match="link"):
        save(tmp_path / "link", overwrite=True)
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "real" / WEIGHTS).symlink_to("../victim")
    with pytest.raises(Unsafe, match=WEIGHTS):
        save(tmp_path / "real", overwrite=True)
    assert (tmp_path / "victim").read_text() == "mine"
    assert names_in(tmp_path / "real") == [WEIGHTS]


def fail(*_: Any, **__: Any) -> None:
    raise OSError("no space left")


@pytest.mark.parametrize("step", ["replace", "fsync", "chmod"])
@pytest.mark.parametrize("there", [False, True])
def test_an_interrupted_save_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, there: bool
) -> None:
    folder = tmp_path / "adapter"
    if there:
        save(folder)
    before = {n: (folder / n).read_bytes() for n in (CONFIG, WEIGHTS) if there}
    other = jax.tree.map(lambda x: x + 1, some_adapter())
    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="no space left"):
        save(folder, other, overwrite=True)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_of_two_adapters_no_reader_finds_one_file_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path)
    old, replace, seen = (tmp_path / WEIGHTS).read_bytes(), os.replace, []

    def replaced(*names: Any) -> None:
        for act in (lambda *_: None, replace):
            act(*names)
            is_old = (tmp_path / WEIGHTS).read_bytes() == old
            seen.append((is_old, (tmp_path / CONFIG).exists()))

    monkeypatch.setattr(os, "replace", replaced)
    save(tmp_path, jax.tree.map(lambda x: x + 1, some_adapter()), overwrite=True)
    assert seen == [(True, False), (False, False), (False, False), (False, True)]
    assert names_in(tmp_path) == sorted([CONFIG, WEIGHTS])


def test_an_interruption_between_the_two_files_leaves_no_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path)
    replace, calls = os.replace, iter([True, False])
    once = lambda *names: replace(*names) if next(calls) else fail()
    monkeypatch.setattr(os, "replace", once)
    doubled = [dataclasses.replace(c, alpha=2 * c.alpha) for c in CONFIGS]
    adapter = {
        path: dataclasses.replace(factors, scaling=2 * factors.scaling)
        for path, factors in some_adapter().items()
    }
    with pytest.raises(OSError, match="no space left"):
        jlora.peft.save(tmp_path, PARAMS, adapter, doubled, overwrite=True)
    assert names_in(tmp_path) == [WEIGHTS]
    refusal(tmp_path, FileNotFoundError, f"no {CONFIG}")


def test_what_reads_back_differently_is_no_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "read_bytes", lambda _: b"other")
    with pytest.raises(AdapterError, match="reads back differently"):
        save(tmp_path)
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("seed", ["1", "2"])
def test_bytes_are_the_same_in_every_process(tmp_path: Path, seed: str) -> None:
    folder = files.written_by_jlora(tmp_path / "here")
    code = "import peft_files, pathlib, sys; "
    code += "peft_files.written_by_jlora(pathlib.Path(sys.argv[1]))"
    env = {
        **os.environ,
        "PYTHONHASHSEED": seed,
        "PYTHONPATH": os.pathsep.join([PYTHONPATH, os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-c", code, str(tmp_path / "there")]
    subprocess.run(command, env=env, check=True, timeout=300)
    for name in (CONFIG, WEIGHTS):
        here, there = folder / name, tmp_path / "there" / name
        assert here.read_bytes() == there.read_bytes()


@pytest.mark.parametrize("profile", ["peft", "vllm"])
def test_bytes_are_the_same_in_every_order(tmp_path: Path, profile: str) -> None:
    """Neither of the two ranks and scalings is the commoner one."""
    adapter = jax.tree.map(lambda x: x + 1, some_adapter())
    for order, folder in ((sorted, "a"), (lambda x: sorted(x)[::-1], "b")):
        turned = {path: adapter[path] for path in order(adapter)}
        save(tmp_path / folder, turned, profile=profile)
    for name in (CONFIG, WEIGHTS):
        one, other = ((tmp_path / f / name).read_bytes() for f in "ab")
        assert one == other


def test_an_adapter_of_nothing_is_no_file(tmp_path: Path) -> None:
    for profile in ("peft", "vllm"):
        with pytest.raises(AdapterError, match="cannot be saved: it is empty"):
            jlora.peft.save(tmp_path / "a", PARAMS, {}, (), profile=profile)
    params = {"layers": {"q": {"kernel": np.ones((2, 5, 7), np.float32)}}}
    axes = jlora.KernelAxes((0,), (1,), (2,))
    zero = jlora.LoraFactors(jnp.zeros((2, 5, 3)), jnp.zeros((2, 3, 7)), axes, 1.0)
    rules = [("layers/q", "layers.{i}.q")]
    with pytest.raises(AdapterError, match=r"all factors of \['layers/q/k.*are zero"):
        jlora.peft.save(tmp_path / "a", params, {"layers/q/kernel": zero}, (), rules)
    assert not (tmp_path / "a").exists()


def transposed(x: np.ndarray) -> np.ndarray:
    return np.asfortranarray(x)


def strided(x: np.ndarray) -> np.ndarray:
    return np.repeat(x, 2, axis=-1)[..., ::2]


def backwards(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x[::-1])[::-1]


def bfloat16(x: np.ndarray) -> jax.Array:
    return jnp.asarray(x, jnp.bfloat16)


def sharded(x: np.ndarray) -> jax.Array:
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    axis = next((i for i, n in enumerate(x.shape) if n % 4 == 0), None)
    spec = [None if i != axis else "x" for i in range(x.ndim)]
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))


@pytest.mark.parametrize("form", [transposed, strided, backwards, bfloat16, sharded])
def test_values_are_written_whatever_their_layout(
    tmp_path: Path, form: Callable[[np.ndarray], Any]
) -> None:
    params = {"params": {"q": {"kernel": np.ones((8, 12), np.float32)}}}
    model = lambda params, x: x @ params["params"]["q"]["kernel"]
    one = LoraConfig("q", rank=3, alpha=6.0)
    plain = jlora.lora(model, one).init(jax.random.key(0), params, np.ones(8))
    rng = np.random.default_rng(1)
    values = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), plain)
    adapter = jax.tree.map(form, values)
    jlora.peft.save(tmp_path, params, adapter, one)
    header, data = files.unpack((tmp_path / WEIGHTS).read_bytes())
    want = values["params/q/kernel"]
    for key, value in (("A", want.a), ("B", want.b)):
        claim = header[f"{PREFIX}q.lora_{key}.weight"]
        begin, end = claim["data_offsets"]
        dtype = jnp.bfloat16 if form is bfloat16 else np.float32
        stored = np.frombuffer(data[begin:end], dtype).reshape(claim["shape"])
        np.testing.assert_array_equal(stored, np.asarray(value, dtype).T)
    _, found = jlora.peft.load(tmp_path, params)
    jax.tree.map(np.testing.assert_array_equal, found, adapter)


def test_a_path_that_is_not_adapted(tmp_path: Path) -> None:
    (factors,) = [some_adapter()["params/q/kernel"]]
    with pytest.raises(AdapterError, match=r"params/w/kernel.*Nearest"):
        save(tmp_path / "a", {"params/w/kernel": factors})
    with pytest.raises(AdapterError, match="params/v/kernel"):
        save(tmp_path / "a", {"params/v/kernel": factors})
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_saved_are_finite(tmp_path: Path, value: float) -> None:
    bad = jax.tree.map(lambda x: x.at[0, 0].set(value), some_adapter())
    with pytest.raises(NonFiniteError, match=r"q/kernel.*first at \(0, 0\)"):
        save(tmp_path / "a", bad)
    assert not (tmp_path / "a").exists()


def test_a_profile_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'sglang'"):
        save(tmp_path, profile="sglang")
