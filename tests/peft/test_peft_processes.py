"""Two processes save one adapter as PEFT's files: both get the errors of the first.

This file is also the script that they run.
"""

import builtins
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import hub_server
import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from paths import PYTHONPATH
from processes import finish, free_port

import jlora
import jlora.checkpoint
import jlora.peft
from jlora._files.processes import packed, unpacked

CONFIG = jlora.LoraConfig("w", rank=3, alpha=5.0)
NAME = "someone/adapter"


def values(sign: int = 1) -> dict[str, Any]:
    """An adapter, the same in every process."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: sign * rng.normal(size=shape).astype(np.float32)
    axes = jlora.KernelAxes((), (0,), (1,))
    return {"w/kernel": jlora.LoraFactors(normal(16, 3), normal(3, 24), axes, 5 / 3)}  # type: ignore[arg-type]


BASE = {"w": {"kernel": np.ones((16, 24), np.float32)}}


def sharded(adapter: Any) -> Any:
    """The adapter in arrays that no process holds as a whole."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), (AxisType.Auto,) * 2)
    place = NamedSharding(mesh, P("x", "y"))
    places = jlora.shardings({"w/kernel": place}, adapter)
    make = lambda x, to: jax.make_array_from_callback(x.shape, to, x.__getitem__)
    return jax.tree.map(make, adapter, places)


def refused(kind: type[Exception], word: str, call: Any) -> None:
    """Whether the same error comes to this process."""
    try:
        call()
    except kind as error:
        assert type(error) is kind and word in str(error), repr(error)
    else:
        raise AssertionError(f"no {kind.__name__} of {word!r}")


def work(folder: Path) -> None:
    """What each of the processes does."""
    adapter = sharded(values())
    assert not adapter["w/kernel"].b.is_fully_addressable
    save = lambda to, **more: jlora.peft.save(
        folder / to, BASE, adapter, CONFIG, **more
    )
    save("one")
    refused(FileExistsError, "has ['adapter_model", lambda: save("one"))
    refused(NotADirectoryError, "plain", lambda: save("plain/below"))
    refused(jlora.UnsafeFormatError, "is a link", lambda: save("link"))
    # Where only the first process lacks the library:
    lacking = {"huggingface_hub": None} if jax.process_index() == 0 else {}
    with mock.patch.dict(sys.modules, lacking):
        word = "huggingface_hub is needed"
        refused(jlora.HubError, word, lambda: save("two", push_to=NAME))
    assert not (folder / "two").exists()
    # And where all lack it but the first, which sends:
    lacking = {} if jax.process_index() == 0 else {"huggingface_hub": None}
    with mock.patch.dict(sys.modules, lacking):
        save("two", push_to=NAME)
    refused(FileExistsError, "on the Hub has", lambda: save("three", push_to=NAME))
    with mock.patch.dict(os.environ, HF_TOKEN=hub_server.READ):
        refused(
            jlora.HubError,
            "may not write",
            lambda: save("four", push_to="someone/other"),
        )
    save("two", push_to=NAME, overwrite=True)
    # A checkpoint, for which the first process looks at the folder.
    one = lambda to: jlora.checkpoint.save(folder / to, adapter, config=CONFIG)
    refused(NotADirectoryError, "plain", lambda: one("plain/below"))
    one("checkpoint")


def start(
    folder: Path, log: Path, hub: dict[str, str], *who: str
) -> tuple[subprocess.Popen[bytes], Path]:
    gone = ("JAX_", "XLA_", "HF_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(gone)}
    with log.open("wb") as file:
        child = subprocess.Popen(
            [sys.executable, __file__, str(folder), *who],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**kept, **hub, "PYTHONPATH": PYTHONPATH, "JAX_PLATFORMS": "cpu"},
        )
    return child, log


@pytest.mark.slow
def test_what_fails_on_the_first_of_two_processes_fails_on_both(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("no folder")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    logs = [tmp_path / f"log{i}" for i in range(2)]
    with hub_server.hub() as server:
        hub = {"HF_ENDPOINT": server.endpoint, "HF_TOKEN": hub_server.WRITE}
        hub |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        who = [f"127.0.0.1:{free_port()}"]
        finish([start(tmp_path, log, hub, *who, str(i)) for i, log in enumerate(logs)])
        assert len(server.repositories[NAME].messages) == 3
    for place in ("one", "two"):
        _, found = jlora.peft.load(tmp_path / place, BASE)
        jax.tree.map(np.testing.assert_array_equal, found, values())


ERRORS = [
    FileExistsError("it is there\nalready"),
    PermissionError(13, "Permission denied", "/folder"),
    jlora.HubError('"quoted" – and no ASCII'),
    jlora.UnsafeFormatError("x" * 10_000),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no start"),
]


@pytest.mark.parametrize("error", ERRORS)
def test_an_error_is_told_by_its_type_and_message(error: Exception) -> None:
    found = unpacked(packed(error))
    odd = isinstance(error, UnicodeDecodeError)  # it takes more than a message
    assert type(found) is (RuntimeError if odd else type(error))
    wanted = f"UnicodeDecodeError: {error}" if odd else str(error)
    assert str(found) == wanted or (
        str(found).endswith(" ...")
        and wanted.startswith(str(found)[:-4])
        and len(str(found)) > 1000
    )
    assert unpacked(packed(None)) is None and packed(None).shape == packed(error).shape


def test_what_is_no_error_of_pythons_or_of_jloras_is_told_too() -> None:
    class OddError(Exception):
        pass

    assert not hasattr(builtins, "OddError")
    found = unpacked(packed(OddError("why")))
    assert type(found) is RuntimeError and str(found) == "OddError: why"


if __name__ == "__main__":
    where, coordinator, number = sys.argv[1:]
    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, 2, int(number))
    work(Path(where))
