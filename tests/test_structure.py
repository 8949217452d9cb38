"""The shape of the package: imports, docstrings, annotations, style, the wheel."""

import ast
import inspect
import re
import subprocess
import sys
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from paths import ROOT

import jlora
from jlora._adapter.variants import VARIANTS
from jlora._rules import CARRY, CONSUME, CONTROL_FLOW

PACKAGE = ROOT / "jlora"
SOURCES = sorted(PACKAGE.rglob("*.py"))


def dotted(file: Path) -> str:
    """The name of a module within the package: `_rules.conv`, `peft`, `_rules`."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and parts[:-1] else parts)


TREES = {dotted(f): ast.parse(f.read_text(encoding="utf-8")) for f in SOURCES}
FILES = {dotted(f): f for f in SOURCES}
each_module = pytest.mark.parametrize("name", TREES)

# The rooms, and the rooms that each may import from, besides `_errors` and itself. Two
# wings do not meet: the engine (`_product`, `_rules`, `_program`) knows factors of a
# value and no adapters; the rooms of adapters know no jaxpr. Two rooms see both.
LAWS = {
    # the ground
    "_jax": "",
    "_params": "_jax",
    "_files": "",
    # the engine
    "_product": "_jax _params",
    "_rules": "_jax _params _product",
    "_program": "_jax _params _product _rules",
    # the adapters
    "_adapter": "_jax _params",
    "_algebra": "_jax _params _adapter",
    "_inits": "_jax _params _adapter _algebra",
    "_torch": "_jax _params _adapter",
    "_peft": "_params _adapter _files _torch",
    "_checkpoint": "_params _adapter _files",
    "_formats": "_params _adapter _files _torch _peft",
    # where they meet
    "_plan": "_jax _params _product _rules _program _adapter",
    "_lora": "_jax _params _product _rules _program _adapter _algebra _plan",
}
ENGINE = {"_product", "_rules", "_program"}
ADAPTERS = {"_adapter", "_algebra", "_inits", "_torch", "_peft"}
ADAPTERS |= {"_checkpoint", "_formats"}
PUBLIC = [name for name in TREES if not name.startswith("_")]
PRIVATE = [name for name in TREES if name.partition(".")[0] in LAWS]

ALLOWED = {"jax", "jaxlib", "numpy", "jlora"}
# What private modules import besides, one library each.
OWN_LIBRARIES = {
    "_files.safetensors": {"safetensors"},
    "_files.hub": {"huggingface_hub"},  # within functions: it is an extra
    "_formats.gguf": {"gguf"},
}
# The one library that a door, a module without an underscore, may import besides.
DOORS = {
    "adalora": "jax",
    "linen": "flax",
    "nnx": "flax",
    "optim": "optax",
    "checkpoint": "orbax",
    "peft": "jax",
    "quant": "qwix",
    "tunix": "orbax",
    "weights": "jax",
}


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Runs `python ...` in the root of the repository."""
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True
    )


NAMES = (ast.Name, ast.Attribute)


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
    found, package = set(), FILES[name].parent.relative_to(PACKAGE).parts
    for node in walk(name, ast.ImportFrom):
        assert isinstance(node, ast.ImportFrom)
        if node.level:
            above = package[: len(package) - node.level + 1]
            base = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names:
                whole = f"{base}.{alias.name}" if base else alias.name
                found.add(whole if whole in TREES else base or "__init__")
    return found


def absolute_imports(name: str) -> set[str]:
    """The full names of the modules that a module imports from elsewhere."""
    found = set()
    for node in walk(name, ast.Import, ast.ImportFrom):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room(name: str) -> str:
    """The room of a module, or its own name if it is in none."""
    return name.partition(".")[0]


def arrows(name: str) -> set[str]:
    """The other rooms that a module imports from."""
    return set(map(room, relative_imports(name))) - {room(name), "_errors"}


def in_a_circle(graph: dict[str, set[str]]) -> list[str]:
    """The nodes left when those that lead nowhere are taken away, again and again."""
    left = dict(graph)
    while ends := [n for n, to in left.items() if not to & set(left)]:
        for end in ends:
            del left[end]
    return sorted(left)


def test_each_module_is_in_a_room_or_a_door() -> None:
    outside = {name for name in TREES if name not in PRIVATE}
    assert outside == {"__init__", "__main__", "_errors", *DOORS}
    assert {room(name) for name in PRIVATE} == set(LAWS)


@pytest.mark.parametrize("name", PRIVATE)
def test_a_module_imports_only_from_the_rooms_that_its_room_may(name: str) -> None:
    assert arrows(name) <= set(LAWS[room(name)].split())


@pytest.mark.parametrize("one", LAWS)
def test_each_arrow_that_a_room_may_use_is_used(one: str) -> None:
    used = set().union(*(arrows(name) for name in PRIVATE if room(name) == one))
    assert used == set(LAWS[one].split())


def test_rooms_and_the_files_in_them_have_no_circle() -> None:
    assert not in_a_circle({one: set(law.split()) for one, law in LAWS.items()})
    assert not in_a_circle({name: relative_imports(name) for name in TREES})


def test_the_wings_do_not_meet() -> None:
    for name in PRIVATE:
        others = ADAPTERS if room(name) in ENGINE else ENGINE
        if room(name) in ENGINE | ADAPTERS:
            assert not arrows(name) & others, name


# Where a module is imported by a string: a format when it is asked for, and the door to
# a library that `import jlora` must not open.
BY_NAME = {"__init__", "__main__", "_lora.quantize"}
UNSEEN = {
    "_importlib.import_module",
    "importlib.import_module",
    "import_module",
    "__import__",
    "exec",
    "eval",
}


@each_module
def test_nothing_is_imported_in_a_way_that_these_tests_do_not_see(name: str) -> None:
    calls = {ast.unparse(n.func) for n in walk(name, ast.Call)}  # type: ignore[attr-defined]
    assert bool(calls & UNSEEN) == (name in BY_NAME)


@pytest.mark.parametrize("name", DOORS)
def test_a_door_opens_no_other_door(name: str) -> None:
    assert not relative_imports(name) & set(DOORS)


@pytest.mark.parametrize("name", PRIVATE)
def test_a_private_module_imports_jax_and_numpy_alone(name: str) -> None:
    own = OWN_LIBRARIES.get(name, set())
    roots = {module.partition(".")[0] for module in absolute_imports(name)}
    assert roots <= {"jax", "numpy"} | own | sys.stdlib_module_names


@pytest.mark.parametrize("name", PUBLIC)
def test_a_module_without_an_underscore_is_a_door_to_one_library(name: str) -> None:
    roots = {module.partition(".")[0] for module in absolute_imports(name)}
    assert roots <= {"jax", "numpy", DOORS[name]} | sys.stdlib_module_names


# The variants of LoRA, whose kinds are told apart by their table alone. Factors are
# what all of them become, and any leaf may be trained whole.
ROOM_OF_VARIANTS = "_adapter.variants"
CLASSES = {v.entry.__name__ for v in VARIANTS} - {"LoraFactors", "object"}
# The fields of a `LoraConfig` by which one of them is chosen, and of an entry.
FIELDS = {"full", "variant"}.union(*(v.settings for v in VARIANTS))
CHOICES = re.compile(rf"\b(config|c|entry)\.({'|'.join(sorted(FIELDS))})\b")


@pytest.mark.parametrize(
    "name", [n for n in TREES if not n.startswith(ROOM_OF_VARIANTS)]
)
def test_a_variant_is_known_in_its_own_file_alone(name: str) -> None:
    """Where names are made public, and where a config is checked, they are named."""
    assert CLASSES >= {"SlicedFactors", "TrainedRows"}
    named = {ast.unparse(n).rpartition(".")[2] for n in walk(name, *NAMES)}
    assert not named & CLASSES
    if name != "_adapter.config":
        assert not CHOICES.search(source(name))


def test_each_variant_is_in_the_table_once() -> None:
    room = f"{ROOM_OF_VARIANTS}."
    files = {name.removeprefix(room) for name in TREES if name.startswith(room)}
    line = re.compile(r"from \.(\w+) import [A-Z_]+$", re.MULTILINE)
    assert sorted(line.findall(source(ROOM_OF_VARIANTS))) == sorted(files - {"variant"})


@each_module
def test_nothing_private_of_what_is_imported_is_used(name: str) -> None:
    assert not {m for m in absolute_imports(name) if "._" in m}
    assert "jax._src" not in source(name)
    private = re.compile(r"_[a-z]")
    read = [n for n in walk(name, ast.Attribute) if isinstance(n, ast.Attribute)]
    roots = {root_of(n) for n in read if private.match(n.attr)}
    assert not roots & imported_names(name)


# one primitive, one file

# The modules that have the name of a primitive besides the file of its rule.
NAMED_ELSEWHERE = {
    "_jax.platforms": {"by_platform"},  # ours
    "_rules.calls": {"name"},  # a parameter of `jit`
    "_product.low_rank": {"name"},  # a policy of `jax.checkpoint` is asked about it
    # Others in other releases.
    "_jax.versions": {"jit", "pjit", "checkpoint", "remat2", "pcast"},
    "_program.siblings": {"convert_element_type"},  # values that differ by a cast
    "_formats": {"checkpoint"},  # the door
    "__init__": {"checkpoint"},  # the door
}


def test_a_primitive_is_named_in_the_file_of_its_rule_alone() -> None:
    """What jlora knows of it stands there: others ask its record, not its name."""
    names, files = {*CARRY, *CONSUME, *CONTROL_FLOW}, defaultdict(set)
    assert names >= {"add", "conv_general_dilated", "dot_general", "gather", "scan"}
    for module in TREES:
        for node in walk(module, ast.Constant):
            if isinstance(node, ast.Constant) and node.value in names:
                files[node.value].add(module)
    for module, known in NAMED_ELSEWHERE.items():
        for name in known:
            files[name].remove(module)
    assert {room(module) for found in files.values() for module in found} == {"_rules"}
    assert not {name for name in names if len(files[name]) > 1}
    nowhere = {name for name in names if not files[name]}
    # The table has them from there.
    assert (
        nowhere <= NAMED_ELSEWHERE["_jax.versions"] | NAMED_ELSEWHERE["_jax.platforms"]
    )


# what the code may not do


def source(name: str) -> str:
    """The text of a module."""
    return FILES[name].read_text(encoding="utf-8")


@each_module
def test_no_frames_are_inspected(name: str) -> None:
    banned = r"_getframe|currentframe|inspect\.stack|f_back|f_locals|settrace"
    assert not re.search(banned, source(name))


@each_module
def test_nothing_is_left_undone(name: str) -> None:
    assert not re.search(r"raise NotImplemented|TODO|FIXME|XXX", source(name))


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
    # JAX takes the rules of one's own primitives in tables that it has for that.
    rules = {"ad", "batching", "partial_eval"} if name == "_jax.platforms" else set()
    assert not changed & imported_names(name) - rules


@each_module
def test_files_are_short(name: str) -> None:
    assert len(source(name).splitlines()) <= 350


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
    sources = {f"jlora/{file.relative_to(PACKAGE).as_posix()}" for file in SOURCES}
    assert package == sources | {"jlora/py.typed"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_changelog_knows_the_version() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    version = re.search(r'^version = "(.*)"$', project, re.MULTILINE)
    assert version
    assert f"## [{version[1]}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
