"""Imports point down only, and every module stays small enough to read at one go."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "registry": {"registry"},
    "strategies": {"registry", "strategies"},
    "evaluators": {"registry", "evaluators"},
    "compress": {"registry", "strategies", "evaluators", "compress"},
}
MAX_LINES = 300


def imported(tree: ast.Module, package: tuple[str, ...]) -> list[tuple[int, tuple[str, ...]]]:
    """Line and dotted path, below ``prunekit``, of everything of ours that a module of ``package`` imports."""
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module.split(".") if node.module else []
            if node.level:
                base = ["prunekit", *package[: len(package) - node.level + 1], *base]
            names = [[*base, alias.name] for alias in node.names]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module" and node.args:
            target = node.args[0]
            names = [target.value.split(".")] if isinstance(target, ast.Constant) else []
        found += [(node.lineno, tuple(name[1:])) for name in names if name[0] == "prunekit"]
    return found


def upward_imports(root: Path) -> list[str]:
    """One line for every import that points up or sideways: what it is, and what must move where."""
    complaints = []
    for floor, allowed in MAY_IMPORT.items():
        for path in sorted((root / floor).rglob("*.py")):
            here = path.relative_to(root)
            for line, target in imported(ast.parse(path.read_text()), here.parent.parts):
                other = target[0] if target else "the package itself"
                if other in MAY_IMPORT and other not in allowed:
                    complaints.append(
                        f"{here}:{line} imports {'.'.join(target)}: {floor} may import {' and '.join(sorted(allowed))} "
                        f"only; move what it needs from {other}/ down to registry/, or {here} up to compress/"
                    )
    return complaints


def long_modules(root: Path) -> list[str]:
    """Our modules of more lines than one reads at one go."""
    paths = [path for floor in [*MAY_IMPORT, "tests", "docs"] for path in sorted((root / floor).rglob("*.py"))]
    lengths = [(path.relative_to(root), len(path.read_text().splitlines())) for path in paths]
    remedy = "it holds two things, give each its own module"
    return [f"{path} has {n} lines (at most {MAX_LINES}): {remedy}" for path, n in lengths if n > MAX_LINES]


def test_imports_point_down():
    assert (ROOT / "registry" / "roles.py").is_file()
    assert upward_imports(ROOT) == []


def test_modules_are_small():
    assert long_modules(ROOT) == []


def test_the_package_itself_imports_nothing():
    tree = ast.parse((ROOT / "__init__.py").read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]


@pytest.fixture
def tree(tmp_path):
    """A checkout in which everything is as it should be."""
    sources = {
        "__init__.py": "",
        "registry/roles.py": "import torch\nfrom .sites import Site\n",
        "strategies/pp/__init__.py": "from ...registry import Scorer\nfrom ..allocation import Uniform\n",
        "evaluators/cost.py": "from ..registry import Evaluator\nfrom prunekit.registry import Subject\n",
        "compress/prune.py": "from .. import registry\nfrom ..strategies.pp import PP\nimport prunekit.evaluators\n",
    }
    for name, source in sources.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source)
    assert upward_imports(tmp_path) == []
    assert long_modules(tmp_path) == []
    return tmp_path


@pytest.mark.parametrize(
    ("file", "source", "target"),
    [
        ("registry/roles.py", "from ..strategies import pp", "strategies.pp"),
        ("registry/roles.py", "from .. import compress", "compress"),
        ("registry/roles.py", "def f():\n    import prunekit.evaluators.cost", "evaluators.cost"),
        ("strategies/pp/__init__.py", "from ...compress.prune import prune", "compress.prune.prune"),
        ("strategies/pp/__init__.py", "from prunekit import evaluators", "evaluators"),
        ("strategies/wanda.py", "from ..evaluators.cost import Cost", "evaluators.cost.Cost"),
        ("evaluators/cost.py", "if TYPE_CHECKING:\n    from ..compress import x", "compress.x"),
        ("evaluators/cost.py", "from ..strategies.pp import PP", "strategies.pp.PP"),
        ("evaluators/cost.py", "import importlib\nimportlib.import_module('prunekit.compress')", "compress"),
    ],
)
def test_the_check_can_fail(tree, file, source, target):
    (tree / file).write_text(source)
    (complaint,) = upward_imports(tree)
    floor, other = file.split("/")[0], target.split(".")[0]
    line = len(source.splitlines())
    assert complaint.startswith(f"{file}:{line} imports {target}: {floor} may import ")
    assert f"from {other}/ down to registry/, or {file} up to compress/" in complaint


def test_the_length_check_can_fail(tree):
    (tree / "strategies" / "long.py").write_text("x = 1\n" * (MAX_LINES + 1))
    (complaint,) = long_modules(tree)
    assert complaint.startswith("strategies/long.py has 301 lines")
