"""The public names of the package and of its doors, read from their source."""

import ast

from paths import ROOT

PACKAGE = ROOT / "jlora"
DOORS = sorted(f.stem for f in PACKAGE.glob("[!_]*.py"))


def _tree(module: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))


def imported_names(module: str = "__init__") -> list[str]:
    """The names that a module imports from the package under their own name."""
    imports = [n for n in ast.walk(_tree(module)) if isinstance(n, ast.ImportFrom)]
    names = [alias.asname for node in imports for alias in node.names if node.level]
    found = [name for name in names if name and not name.startswith("_")]
    return [name for name in found if name not in DOORS]


def public_names(module: str) -> list[str]:
    """The names of a door: what it defines, and what it takes in to hand on."""
    tree, defined = _tree(module), []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.append(node.name)
        elif isinstance(node, ast.Assign):
            defined += [t.id for t in node.targets if isinstance(t, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            defined.append(node.target.id)
    imports = [n for n in tree.body if isinstance(n, ast.ImportFrom) and n.level]
    aliases = [alias for node in imports for alias in node.names]
    handed_on = [alias.name for alias in aliases if alias.asname == alias.name]
    return [name for name in defined + handed_on if not name.startswith("_")]
