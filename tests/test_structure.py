"""The shape of the package: imports, docstrings, annotations, style, the wheel."""

import ast
import inspect
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import jlora

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "jlora").glob("*.py"))
TREES = {f.stem: ast.parse(f.read_text(encoding="utf-8")) for f in SOURCES}
each_module = pytest.mark.parametrize("name", TREES)

# A module imports only from those above it.
ORDER = """
_axes _decompose _dtypes _errors _frames _mosaic _paths _patterns _symbolic _taps
_alternatives _compat _factors _files _fuse _init _memory _peft_config _rules _untrusted
_config _elementwise _families _flops _peft_keys _peft_stack _seal _sharding
_torch_layout
_entries _group _layout _mixed_mesh _quantized
_channels _choice _conv _dora _dropout _forms _lazy _placement _ragged _trace _view
_adapted _branch _fingerprint _linear _match _matrices _mixed_arguments _recall
_stackable _target
_broadcast _emit _gather _labelled _measure _merge _mixed _moving _new_entry _norms
_record _spectrum _stack _unfit
_algebra _compare _moving_init _plan _products _quantized_moves _recording _restoring
_triplets
_allocation _base _combine _consume _dora_uses _lazy_moves _siblings
_adalora _mix _moves _peft_configs _peft_write _select _torch_params
_analyze _collectives _peft_lora_bias _peft_vllm _peft_whole _sum
_carry _control_flow _linear_use _peft_read
_discover _interpret _peft_alone
_decide _inputs
_conflicts _data_init
_targets
_quantize _transform
""".split()

ALLOWED = {"jax", "jaxlib", "numpy", "jlora"}
# The one library that a module without an underscore may import besides.
DOORS = {
    "linen": "flax",
    "nnx": "flax",
    "optim": "optax",
    "checkpoint": "orbax",
    "peft": "safetensors",
    "quant": "qwix",
    "weights": "safetensors",
}


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Runs `python ...` in the root of the repository."""
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True
    )


def walk(name: str, *kinds: type[ast.AST]) -> Iterator[ast.AST]:
    """The nodes of some kinds in a module."""
    return (node for node in ast.walk(TREES[name]) if isinstance(node, kinds))


# imports


def test_import_needs_jax_and_numpy_alone() -> None:
    code = """if True:
        import sys, jax, numpy
        before = set(sys.modules)
        import jlora
        print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
        """
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
    new = set(done.stdout.split())
    assert "jlora" in new
    assert new <= ALLOWED | sys.stdlib_module_names


def relative_imports(name: str) -> set[str]:
    """The modules of the package that a module imports, at any depth of its code."""
    found = set()
    for node in walk(name, ast.ImportFrom):
        assert isinstance(node, ast.ImportFrom)
        if node.level:
            assert node.level == 1, f"{name} imports from above the package"
            found |= {node.module} if node.module else {a.name for a in node.names}
    return {module.partition(".")[0] for module in found if module}


def absolute_imports(name: str) -> set[str]:
    """The full names of the modules that a module imports from elsewhere."""
    found = set()
    for node in walk(name, ast.Import, ast.ImportFrom):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_the_order_of_imports_names_each_module_once() -> None:
    private = [n for n in TREES if n.startswith("_") and not n.startswith("__")]
    assert sorted(ORDER) == sorted(private)


@pytest.mark.parametrize("name", ORDER)
def test_a_module_imports_only_from_those_above_it(name: str) -> None:
    assert relative_imports(name) <= set(ORDER[: ORDER.index(name)])


@pytest.mark.parametrize("name", ORDER)
def test_a_private_module_imports_jax_and_numpy_alone(name: str) -> None:
    roots = {module.partition(".")[0] for module in absolute_imports(name)}
    assert roots <= {"jax", "numpy"} | sys.stdlib_module_names


@pytest.mark.parametrize("name", [n for n in TREES if not n.startswith("_")])
def test_a_module_without_an_underscore_is_a_door_to_one_library(name: str) -> None:
    roots = {module.partition(".")[0] for module in absolute_imports(name)}
    assert roots <= {"jax", "numpy", DOORS[name]} | sys.stdlib_module_names


@each_module
def test_nothing_private_of_jax_is_imported(name: str) -> None:
    assert not {m for m in absolute_imports(name) if "._" in m}
    assert "jax._src" not in source(name)


# what the code may not do


def source(name: str) -> str:
    """The text of a module."""
    return (ROOT / "jlora" / f"{name}.py").read_text(encoding="utf-8")


@each_module
def test_no_frames_are_inspected(name: str) -> None:
    banned = r"_getframe|currentframe|inspect\.stack|f_back|f_locals|settrace"
    assert not re.search(banned, source(name))


@each_module
def test_nothing_is_left_undone(name: str) -> None:
    assert not re.search(r"NotImplementedError|TODO|FIXME|XXX", source(name))


def imported_names(name: str) -> set[str]:
    """The names that a module binds by importing."""
    nodes = walk(name, ast.Import, ast.ImportFrom)
    aliases = [alias for node in nodes for alias in node.names]  # type: ignore[attr-defined]
    return {alias.asname or alias.name.partition(".")[0] for alias in aliases}


def root_of(node: ast.expr) -> str:
    """The first name of a chain such as `jax.lax.scan`."""
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


@each_module
def test_no_imported_thing_is_changed(name: str) -> None:
    changed = set()
    for node in walk(name, ast.Attribute, ast.Subscript, ast.Call):
        if isinstance(node, ast.Call):
            if root_of(node.func) in ("setattr", "delattr"):
                changed.add(root_of(node.args[0]))
        elif isinstance(node, ast.Attribute | ast.Subscript):
            if not isinstance(node.ctx, ast.Load):
                changed.add(root_of(node))
    assert not changed & imported_names(name)


@each_module
def test_files_are_short(name: str) -> None:
    assert len(source(name).splitlines()) <= 430


# docstrings and annotations

Function = ast.FunctionDef | ast.AsyncFunctionDef


@each_module
def test_every_function_is_annotated(name: str) -> None:
    bare = []
    methods = {
        id(child)
        for owner in walk(name, ast.ClassDef)
        for child in ast.iter_child_nodes(owner)
    }
    for node in walk(name, ast.FunctionDef, ast.AsyncFunctionDef):
        assert isinstance(node, Function)
        spec = node.args
        args = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs]
        args += [a for a in (spec.vararg, spec.kwarg) if a is not None]
        if id(node) in methods and args and args[0].arg in ("self", "cls"):
            args = args[1:]
        if node.returns is None or any(a.annotation is None for a in args):
            bare.append(f"{name}.py:{node.lineno} {node.name}")
    assert not bare


@each_module
def test_every_module_has_a_docstring(name: str) -> None:
    assert ast.get_docstring(TREES[name])


@each_module
def test_every_public_definition_has_a_docstring(name: str) -> None:
    """Of the modules: functions, classes, and the methods of public classes."""
    owners = [
        TREES[name],
        *(c for c in TREES[name].body if isinstance(c, ast.ClassDef)),
    ]
    bare = [
        f"{name}.py:{node.lineno} {node.name}"
        for owner in owners
        if not getattr(owner, "name", "").startswith("_")
        for node in ast.iter_child_nodes(owner)
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_")
        if not ast.get_docstring(node)
    ]
    assert not bare


def test_every_public_name_has_a_docstring_of_its_own() -> None:
    names = [n for n in vars(jlora) if not n.startswith("_") and n not in TREES]
    assert len(names) > 10
    for name in names:
        thing = getattr(jlora, name)
        if inspect.isclass(thing) or inspect.isfunction(thing):
            doc = thing.__doc__ or ""
            # A dataclass without a docstring is given its signature instead.
            assert doc and not doc.startswith(f"{name}("), name


# the tools, and what is shipped


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [["ruff", "check", "--no-cache"], ["ruff", "format", "--check", "--no-cache"]],
    ids=["check", "format"],
)
def test_ruff_is_content(command: list[str]) -> None:
    done = run("-m", *command, ".")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_pyright_is_content() -> None:
    done = run("-m", "pyright", "--pythonpath", sys.executable)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_its_marker(tmp_path: Path) -> None:
    done = run("-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("jlora-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    package = {name for name in names if not name.startswith("jlora-")}
    assert package == {f"jlora/{f.name}" for f in SOURCES} | {"jlora/py.typed"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_changelog_knows_the_version() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    version = re.search(r'^version = "(.*)"$', project, re.MULTILINE)
    assert version
    assert f"## [{version[1]}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
