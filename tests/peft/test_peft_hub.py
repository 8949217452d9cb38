"""Adapters of the Hub: the real client, and a stand-in for the Hub on this machine."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import huggingface_hub.file_download
import huggingface_hub.utils
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hub_files import draw, factors, write_adapter, write_model
from hub_server import READ, WRITE, Hub, hub
from paths import ROOT
from safetensors.numpy import load_file

import jlora
import jlora.peft
import jlora.weights
from jlora.__main__ import DIFFERENT, FAILED, SAME, main

# The client's own, of how it hands a file to its own client.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

NAME = "some-org/an.adapter"
FILES = {jlora.peft.CONFIG, jlora.peft.WEIGHTS}
PARAMS = {"params": {"up": {"kernel": np.zeros((5, 7), np.float32)}}}
PATH = "params/up/kernel"


def adapter_files(place: Path, seed: int = 0, rank: int = 2) -> dict[str, bytes]:
    """The two files of an adapter of `up`, as PEFT writes them."""
    new = draw(seed)
    tensors = factors("up", new(rank, 5), new(7, rank))
    folder = write_adapter(
        place / f"{seed}-{rank}", tensors, r=rank, target_modules=["up"]
    )
    return {name: (folder / name).read_bytes() for name in sorted(FILES)}


def matrices(seed: int = 0, rank: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """The factors of `adapter_files`, as a JAX kernel has them."""
    new = draw(seed)
    return new(rank, 5).T, new(7, rank).T


def assert_is(adapter: Any, seed: int = 0, rank: int = 2) -> None:
    a, b = matrices(seed, rank)
    np.testing.assert_array_equal(adapter[PATH].a, a)
    np.testing.assert_array_equal(adapter[PATH].b, b)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is the working directory."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def server(
    tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Hub]:
    """A Hub for the client in this process, a cache for it, and no token."""
    constants = huggingface_hub.constants
    with hub() as running:
        files = running.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", running.endpoint)
        for module in (
            constants,
            huggingface_hub.file_download,
        ):  # which has its own before 1.0
            name = "HUGGINGFACE_CO_URL_TEMPLATE"
            monkeypatch.setattr(module, name, files, raising=module is constants)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        yield running
        _forget_sessions()


def log_in(monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    monkeypatch.setenv("HF_TOKEN", token)


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    _forget_sessions()  # before 1.0 one knows from its start whether it is offline


def _forget_sessions() -> None:
    """Ends the client's connections: by one name before its release 1.0, one since."""
    if hasattr(huggingface_hub, "close_session"):
        huggingface_hub.close_session()
    else:
        huggingface_hub.utils.reset_sessions()


# --- fetching ---


def test_an_adapter_is_loaded_from_its_two_files(server: Hub, tmp_path: Path) -> None:
    others = {
        "README.md": b"# It",
        "optimizer.pt": b"!",
        "sub/adapter_config.json": b"{",
    }
    server.add(NAME, {**adapter_files(tmp_path), **others})
    config, adapter = jlora.peft.load(NAME, PARAMS)
    assert (config.rank, config.alpha) == (2, 6.0)
    assert_is(adapter)
    assert server.fetched() == FILES


@pytest.mark.parametrize("revision", ["old", "refs/pr/1", "commit"])
def test_a_revision_is_a_branch_a_tag_or_a_commit(
    revision: str, server: Hub, tmp_path: Path
) -> None:
    sha = server.add(NAME, adapter_files(tmp_path, 3), "other")
    server.add(NAME, adapter_files(tmp_path, 4))
    if revision == "commit":
        revision = sha
    else:
        server.repositories[NAME].refs[revision] = sha
    assert_is(jlora.peft.load(NAME, PARAMS, revision=revision)[1], 3)
    assert_is(jlora.peft.load(NAME, PARAMS)[1], 4)


def test_both_files_are_of_one_commit_while_the_branch_moves(
    server: Hub, tmp_path: Path
) -> None:
    new = adapter_files(tmp_path, 1, rank=3)
    server.add(NAME, adapter_files(tmp_path, 0, rank=2))

    def move(request: Any) -> None:
        moved = len(server.repositories[NAME].commits) > 1
        if not moved and request.path.endswith(jlora.peft.WEIGHTS):
            server.add(NAME, new)

    server.before = move
    config, adapter = jlora.peft.load(NAME, PARAMS)
    assert config.rank == 2
    assert_is(adapter, 0)
    config, adapter = jlora.peft.load(NAME, PARAMS)
    assert config.rank == 3
    assert_is(adapter, 1, rank=3)


def test_a_token_reads_what_is_private_and_goes_nowhere_else(
    server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add(NAME, adapter_files(tmp_path), private=True)
    log_in(monkeypatch, READ)
    assert_is(jlora.peft.load(NAME, PARAMS)[1])
    tokens = {r.token for r in server.requests if "/cdn/" in r.path}
    assert tokens == {None}


def test_offline_the_cache_is_used(
    server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sha = server.add(NAME, adapter_files(tmp_path, 5), "v1")
    server.add(NAME, adapter_files(tmp_path, 6))
    jlora.peft.load(NAME, PARAMS, revision="v1")
    offline(monkeypatch)
    server.requests.clear()
    for revision in ("v1", sha):
        assert_is(jlora.peft.load(NAME, PARAMS, revision=revision)[1], 5)
    with pytest.raises(
        jlora.HubError, match=r"HF_HUB_OFFLINE is set.*not in the cache"
    ):
        jlora.peft.load(NAME, PARAMS)
    assert not server.requests


def one_line(error: BaseException) -> str:
    told = str(error)
    assert "\n" not in told
    assert told.startswith(NAME)
    return told


def nothing(server: Hub, files: dict[str, bytes]) -> None:
    pass


def private(server: Hub, files: dict[str, bytes]) -> None:
    server.add(NAME, files, private=True)


def gated(server: Hub, files: dict[str, bytes]) -> None:
    server.add(NAME, files, gated=True)


def a_model(server: Hub, files: dict[str, bytes]) -> None:
    server.add(NAME, {"config.json": b"{}", "model.safetensors": b"?"})


def a_config_alone(server: Hub, files: dict[str, bytes]) -> None:
    server.add(NAME, {jlora.peft.CONFIG: files[jlora.peft.CONFIG]})


def out_of_order(server: Hub, files: dict[str, bytes]) -> None:
    server.add(NAME, files)
    server.fails = 503


LOG_IN = "No token is in use: `hf auth login`, or set HF_TOKEN to one that may read it"
NOT_FOUND = "no such repository, or it is private, and nothing on disk"
Scene = Callable[[Hub, dict[str, bytes]], None]


@pytest.mark.parametrize(
    ("scene", "token", "expected"),
    [
        (nothing, None, (NOT_FOUND, LOG_IN)),
        (private, None, (NOT_FOUND, LOG_IN)),
        (nothing, READ, (NOT_FOUND, "token in use", "may not read it")),
        (gated, None, ("it is gated; ask for access at http", f"/{NAME}.", LOG_IN)),
        (gated, READ, ("it is gated", "token in use", "may not read it")),
        (
            a_model,
            None,
            ("no adapter_config.json and no", "it has config.json, model."),
        ),
        (a_config_alone, None, ("no adapter_model.safetensors; it has adapter_con",)),
        (out_of_order, None, ("the Hub answers with an error", "503", "try again")),
        (private, "hf_made_up", ("the Hub refuses", "token in use", "may not read")),
    ],
)
def test_what_cannot_be_had_is_one_line_that_says_what_to_do(
    scene: Scene,
    token: str | None,
    expected: tuple[str, ...],
    server: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    scene(server, adapter_files(tmp_path))
    if token:
        log_in(monkeypatch, token)
    with pytest.raises(jlora.HubError) as caught:
        jlora.peft.load(NAME, PARAMS)
    told = one_line(caught.value)
    for part in expected:
        assert part in told
    assert not server.fetched() - ({jlora.peft.CONFIG} if scene is gated else set())
    assert main(["inspect", NAME]) == FAILED
    assert capsys.readouterr().err.splitlines()[0].endswith(told)


def test_a_revision_that_is_not_there_is_named(server: Hub, tmp_path: Path) -> None:
    server.add(NAME, adapter_files(tmp_path))
    with pytest.raises(jlora.HubError, match="no such revision; see http") as caught:
        jlora.peft.load(NAME, PARAMS, revision="v9")
    one_line(caught.value)


def test_a_hub_that_is_not_reached_is_named_with_the_cache(
    server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hub() as other:
        gone = other.endpoint
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", gone)
    with pytest.raises(
        jlora.HubError, match=r"cannot be fetched, Connect.*HF_HUB_OFFLINE=1"
    ) as e:
        jlora.peft.load(NAME, PARAMS)
    one_line(e.value)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_a_pickle_is_not_fetched(name: str, server: Hub, tmp_path: Path) -> None:
    files = adapter_files(tmp_path)
    config = {jlora.peft.CONFIG: files[jlora.peft.CONFIG]}
    server.add(NAME, {**config, name: files[jlora.peft.WEIGHTS]})
    with pytest.raises(jlora.UnsafeFormatError, match=f"{name}.*may run code"):
        jlora.peft.load(NAME, PARAMS)
    assert not server.fetched()


def test_sizes_are_checked_before_anything_is_fetched(
    server: Hub, tmp_path: Path
) -> None:
    files = adapter_files(tmp_path)
    server.add(NAME, files)
    size = len(files[jlora.peft.WEIGHTS])
    with pytest.raises(jlora.CorruptFileError, match=f"has {size} bytes, more than"):
        jlora.peft.load(NAME, PARAMS, max_bytes=size - 1)
    assert not server.fetched()
    server.add(NAME, {jlora.peft.CONFIG: b" " * (2 << 20)})
    with pytest.raises(
        jlora.CorruptFileError, match=r"config\.json has 2,097,152 bytes"
    ):
        jlora.peft.load(NAME, PARAMS)
    assert not server.fetched()


def test_files_are_checked_as_those_of_a_folder(server: Hub, tmp_path: Path) -> None:
    files = adapter_files(tmp_path)
    server.add(NAME, {**files, jlora.peft.WEIGHTS: files[jlora.peft.WEIGHTS][:-4]})
    with pytest.raises(jlora.CorruptFileError, match="the file has"):
        jlora.peft.load(NAME, PARAMS)


# --- what is on disk, and what is not ---


def test_what_is_on_disk_is_never_a_repository(
    server: Hub, place: Path, tmp_path: Path
) -> None:
    server.add(NAME, adapter_files(tmp_path, 1))
    folder = place / NAME
    folder.mkdir(parents=True)
    for name, data in adapter_files(tmp_path, 2).items():
        (folder / name).write_bytes(data)
    for path in (NAME, Path(NAME), f"./{NAME}", f"{NAME}/{jlora.peft.CONFIG}"):
        assert_is(jlora.peft.load(path, PARAMS)[1], 2)
    with pytest.raises(ValueError, match=r"`revision` is 'main', and .* is on disk"):
        jlora.peft.load(NAME, PARAMS, revision="main")
    assert not server.requests


@pytest.mark.parametrize(
    "path",
    [
        Path(NAME),
        f"./{NAME}",
        f"{NAME}/more",
        "adapter",
        "../adapter",
        "a/adapter_config.json",
        "a/adapter_model.safetensors",
        "~/adapter",
    ],
)
def test_other_forms_are_paths(path: Any, server: Hub) -> None:
    with pytest.raises(FileNotFoundError, match="adapter"):
        jlora.peft.load(path, PARAMS)
    with pytest.raises(ValueError, match="a repository of the Hub is called 'owner/"):
        jlora.peft.load(path, PARAMS, revision="main")
    assert not server.requests


def test_a_name_below_a_folder_is_the_hub_s_by_its_revision_alone(
    server: Hub, place: Path, tmp_path: Path
) -> None:
    server.add("runs/adapter", adapter_files(tmp_path))
    (place / "runs").mkdir()
    with pytest.raises(
        FileNotFoundError, match=r"no runs/adapter, though runs is a fol"
    ):
        jlora.peft.load("runs/adapter", PARAMS)
    assert not server.requests
    assert_is(jlora.peft.load("runs/adapter", PARAMS, revision="main")[1])


def test_without_the_package_its_name_is_told(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    needed = r"huggingface_hub is needed: pip install 'jlora\[hub\]'"
    with pytest.raises(jlora.HubError, match=f"no folder {NAME}.*{needed}"):
        jlora.peft.load(NAME, PARAMS)
    lora = jlora.lora(model, jlora.LoraConfig("up", rank=2))
    adapter = lora.init(jax.random.key(0), PARAMS, jnp.ones(5))
    with pytest.raises(jlora.HubError, match=f"send an adapter to {NAME}, {needed}"):
        jlora.peft.save("out", PARAMS, adapter, push_to=NAME)
    assert not (place / "out").exists()


def test_the_package_is_imported_when_it_is_needed(tmp_path: Path) -> None:
    adapter_files(tmp_path)
    code = (
        "import sys, jlora.__main__ as m, jlora.peft, jlora.weights; "
        f"m.main(['inspect', {str(tmp_path / '0-2')!r}]); "
        "print('huggingface_hub' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False"


# --- sending ---


def model(params: Any, x: jax.Array) -> jax.Array:
    return x @ params["params"]["up"]["kernel"]


CONFIG = jlora.LoraConfig("up", rank=2, alpha=6.0)


def made(seed: int) -> Any:
    """An adapter with both factors off zero."""
    a, b = map(jnp.asarray, matrices(seed))
    return {PATH: jlora.LoraFactors(a, b, jlora.KernelAxes((), (0,), (1,)), 3.0)}


def send(seed: int, folder: str = "out", **options: Any) -> None:
    jlora.peft.save(folder, PARAMS, made(seed), CONFIG, push_to=NAME, **options)


def test_an_adapter_is_sent_in_one_commit_to_a_private_repository(
    server: Hub, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_in(monkeypatch, WRITE)
    send(7)
    own = server.repositories[NAME]
    assert own.private
    assert own.messages == ["initial commit", "Adapter written by jlora"]
    files = own.commits[own.refs["main"]]
    assert {n: d for n, d in files.items() if n != ".gitattributes"} == {
        name: (place / "out" / name).read_bytes() for name in FILES
    }
    assert_is(jlora.peft.load(NAME, PARAMS)[1], 7)


def test_one_that_is_there_is_replaced_if_that_is_asked_for(
    server: Hub, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_in(monkeypatch, WRITE)
    send(7)
    with pytest.raises(FileExistsError, match=rf"{NAME} on the Hub has \['adapter_con"):
        send(8, "other")
    assert len(server.repositories[NAME].messages) == 2
    assert_is(jlora.peft.load("other", PARAMS)[1], 8)
    send(9, "other", overwrite=True)
    assert len(server.repositories[NAME].messages) == 3
    assert_is(jlora.peft.load(NAME, PARAMS)[1], 9)


def test_a_repository_that_is_there_keeps_its_other_files(
    server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_in(monkeypatch, WRITE)
    server.add(NAME, {"README.md": b"# It"})
    send(7)
    own = server.repositories[NAME]
    assert own.commits[own.refs["main"]]["README.md"] == b"# It"
    assert not own.private


def test_nothing_that_came_meanwhile_is_replaced(
    server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_in(monkeypatch, WRITE)
    other = adapter_files(tmp_path, 1)

    def come(request: Any) -> None:
        if "/commit/" in request.path:
            server.add(NAME, other)

    server.before = come
    with pytest.raises(
        jlora.HubError, match="changed it meanwhile; send the"
    ) as caught:
        send(7)
    one_line(caught.value)
    assert_is(jlora.peft.load(NAME, PARAMS)[1], 1)


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("token", [None, READ])
def test_who_may_not_write_is_told_so_and_has_the_folder(
    token: str | None,
    there: bool,
    server: Hub,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if there:
        server.add(NAME, {"README.md": b"# It"})
    if token:
        log_in(monkeypatch, token)
    with pytest.raises(jlora.HubError, match=r"may (not )?write to it") as caught:
        send(7)
    assert ("No token is in use" in one_line(caught.value)) == (token is None)
    assert_is(jlora.peft.load("out", PARAMS)[1], 7)


@pytest.mark.parametrize("name", ["adapter", "a/b/c", "./a/b", "", 7])
def test_where_no_repository_can_be_nothing_is_written(name: Any, place: Path) -> None:
    with pytest.raises(ValueError, match="a repository of the Hub is called"):
        jlora.peft.save("out", PARAMS, made(0), CONFIG, push_to=name)
    assert not (place / "out").exists()


def test_offline_nothing_is_sent(
    server: Hub, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offline(monkeypatch)
    with pytest.raises(jlora.HubError, match="HF_HUB_OFFLINE is set"):
        send(7)
    assert not server.requests


# --- the command line ---


def test_commands_take_repositories(
    server: Hub,
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.add(NAME, adapter_files(tmp_path, 1), "v1")
    server.add(NAME, adapter_files(tmp_path, 2))
    assert main(["inspect", NAME]) == SAME
    assert "params/up/kernel  5×7" in capsys.readouterr().out
    assert main(["convert", f"{NAME}@v1", "checkpoint"]) == SAME
    assert main(["diff", "checkpoint", f"{NAME}@v1"]) == SAME
    assert main(["diff", NAME, f"{NAME}@v1"]) == DIFFERENT
    weight = draw(9)(7, 5)
    write_model(place / "base", {"up.weight": weight})
    assert main(["merge", "base", f"{NAME}@v1", "merged"]) == SAME
    a, b = matrices(1)
    merged = load_file(place / "merged" / "model.safetensors")["up.weight"]
    np.testing.assert_allclose(merged, weight + 3.0 * (a @ b).T, rtol=1e-6, atol=1e-6)
    jlora.weights.merge_folder("base", NAME, "again", revision="v1")
    again = load_file(place / "again" / "model.safetensors")["up.weight"]
    np.testing.assert_array_equal(again, merged)


def test_a_folder_with_an_at_sign_is_a_folder(
    server: Hub, place: Path, tmp_path: Path
) -> None:
    folder = place / "runs" / "adapter@v1"
    folder.mkdir(parents=True)
    for name, data in adapter_files(tmp_path).items():
        (folder / name).write_bytes(data)
    assert main(["inspect", "runs/adapter@v1"]) == SAME
    assert main(["inspect", "runs/adapter@v2"]) == FAILED
    assert [r.path for r in server.requests] == ["/api/models/runs/adapter/revision/v2"]


def test_the_environment_alone_says_where_the_hub_is(
    tmp_path: Path, place: Path
) -> None:
    def inspect(**more: str) -> subprocess.CompletedProcess[str]:
        own = {
            "HF_HOME": str(tmp_path / "home"),
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
        }
        return subprocess.run(
            [sys.executable, "-m", "jlora", "inspect", NAME],
            capture_output=True,
            text=True,
            cwd=place,
            env={**os.environ, **own, **more},
        )

    with hub() as running:
        running.add(NAME, adapter_files(tmp_path), private=True)
        refused = inspect(HF_ENDPOINT=running.endpoint, HF_TOKEN="")
        online = inspect(HF_ENDPOINT=running.endpoint, HF_TOKEN=READ)
        endpoint = running.endpoint
    cached = inspect(HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="1")
    assert refused.returncode == FAILED
    assert len(refused.stderr.splitlines()) == 1
    assert "No token is in use" in refused.stderr
    assert online.returncode == SAME, online.stderr
    assert "params/up/kernel" in online.stdout
    assert cached.returncode == SAME, cached.stderr
    assert cached.stdout == online.stdout
