"""Imports point down only, between floors and between the rooms of a floor, and never in a circle."""

import ast
import functools
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.smoke

ROOT = Path(__file__).resolve().parents[1]

FLOORS = {
    "registry": {"registry"},
    "strategies": {"registry", "strategies"},
    "evaluators": {"registry", "evaluators"},
    "compress": {"registry", "strategies", "evaluators", "compress"},
}

ROOMS = {
    "registry": ("errors", "text", "sites", "component", "tensors", "roles", "catalog", "checks"),
    "compress": (
        "bundled",
        "output",
        "engine",
        "models",
        "calibration",
        "files",
        "pruning",
        "runs",
        "export",
        "recovery",
        "ablation",
        "reporting",
        "bench",
        "demo",
        "cli",
    ),
}
"""The rooms of a floor, the lowest first: a room may import what stands before it."""

LONG = 400
"""Lines from which a module is mentioned. A room is one idea; a long module may be right, and is looked at."""

Import = tuple[int, tuple[str, ...]]


def imported(tree: ast.Module, package: tuple[str, ...]) -> Iterator[Import]:
    """Line and dotted path, below ``prunekit``, of everything of ours that a module of ``package`` imports."""
    for node in ast.walk(tree):
        names: list[list[str]] = []
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
        for name in names:
            if name[0] == "prunekit":
                yield node.lineno, tuple(name[1:])


parsed = functools.cache(ast.parse)
"""The syntax tree of a source; the three checks read the same files."""


def sources(root: Path, floor: str) -> Iterator[tuple[Path, ast.Module]]:
    """Path below ``root`` and syntax tree of every module of a floor."""
    for path in sorted((root / floor).rglob("*.py")):
        yield path.relative_to(root), parsed(path.read_text())


def between_floors(root: Path) -> list[str]:
    """One line for every import that points up or sideways: what it is, and what must move where."""
    complaints = []
    for floor, allowed in FLOORS.items():
        for here, tree in sources(root, floor):
            for line, target in imported(tree, here.parent.parts):
                other = target[0] if target else "the package itself"
                if other in FLOORS and other not in allowed:
                    complaints.append(
                        f"{here}:{line} imports {'.'.join(target)}: {floor} may import {' and '.join(sorted(allowed))} "
                        f"only; move what it needs from {other}/ down to registry/, or {here} up to compress/"
                    )
    return complaints


def between_rooms(root: Path) -> list[str]:
    """One line for every import that points to a higher room of the same floor, and for every room without a place."""
    complaints = []
    for floor, rooms in ROOMS.items():
        for here, tree in sources(root, floor):
            if len(here.parts) == 2 and here.name == "__init__.py":
                continue  # the floor's front door names what is public, wherever it is
            room = here.parts[1].removesuffix(".py")
            if room not in rooms:
                complaints.append(
                    f"{here}: {room} is not a room of {floor}/; give it a place in ROOMS, or move it into one"
                )
                continue
            for line, target in imported(tree, here.parent.parts):
                other = target[1] if target[:1] == (floor,) and len(target) > 1 else room
                if other in rooms and rooms.index(other) > rooms.index(room):
                    complaints.append(
                        f"{here}:{line} imports {'.'.join(target)}: {room} stands below {other}; move what it needs "
                        f"down to {floor}/{room}, or {here} up to {floor}/{other}"
                    )
    return complaints


def circles(root: Path) -> list[str]:
    """Modules of one room that import each other at their top, as ``a -> b -> a``."""
    graph: dict[str, set[str]] = {}
    for floor in FLOORS:
        for here, tree in sources(root, floor):
            name = ".".join(here.with_suffix("").parts).removesuffix(".__init__")
            top = ast.Module([node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))], [])
            graph[name] = {".".join(target) for _, target in imported(top, here.parent.parts)}
    # What is imported is a module, or a name of one.
    edges = {
        name: {
            found for target in targets if (found := target if target in graph else target.rpartition(".")[0]) in graph
        }
        for name, targets in graph.items()
    }
    found, done = [], set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            found.append(" -> ".join((*path[path.index(name) :], name)))
        elif name not in done:
            for other in sorted(edges[name] - {name}):
                visit(other, (*path, name))
            done.add(name)

    for name in sorted(edges):
        visit(name, ())
    return found


def test_imports_point_down_between_floors():
    assert (ROOT / "registry" / "roles").is_dir()
    assert between_floors(ROOT) == []


def test_imports_point_down_between_rooms():
    assert between_rooms(ROOT) == []
    for floor, rooms in ROOMS.items():
        there = {
            path.stem for path in (ROOT / floor).iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()
        }
        assert there - {"__init__"} == set(rooms)


def test_no_module_imports_itself_by_way_of_others():
    assert circles(ROOT) == []


def mention_long_modules(root: Path) -> None:
    """Warn of modules of many lines. It is advice, not a rule: a long module can be one idea."""
    for floor in FLOORS:
        for path in sorted((root / floor).rglob("*.py")):
            lines = len(path.read_text().splitlines())
            if lines > LONG:
                warnings.warn(f"{path.relative_to(root)} has {lines} lines; is it still one idea?", stacklevel=2)


def test_long_modules_are_mentioned(tree):
    mention_long_modules(ROOT)
    (tree / "registry/sites.py").write_text("x = 1\n" * (LONG + 1))
    with pytest.warns(UserWarning, match=r"^registry/sites\.py has 401 lines"):
        mention_long_modules(tree)


def test_the_package_itself_imports_nothing():
    tree = ast.parse((ROOT / "__init__.py").read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]


@pytest.fixture
def tree(tmp_path):
    """A checkout in which everything is as it should be."""
    sources = {
        "__init__.py": "",
        "registry/roles/parts.py": "import torch\nfrom ..sites import Site\n",
        "registry/sites.py": "",
        "strategies/pp/__init__.py": "from ...registry import Scorer\nfrom ..allocation import Uniform\n",
        "evaluators/cost.py": "from ..registry import Evaluator\nfrom prunekit.registry import Subject\n",
        "compress/pruning/prune.py": "from ... import registry\nfrom ..engine.engine import Engine\n",
        "compress/engine/engine.py": "from ...strategies.pp import PP\nimport prunekit.evaluators\n",
    }
    for name, source in sources.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source)
    assert between_floors(tmp_path) == between_rooms(tmp_path) == circles(tmp_path) == []
    return tmp_path


@pytest.mark.parametrize(
    ("file", "source", "target"),
    [
        ("registry/roles/parts.py", "from ...strategies import pp", "strategies.pp"),
        ("registry/roles/parts.py", "from ... import compress", "compress"),
        ("registry/roles/parts.py", "def f():\n    import prunekit.evaluators.cost", "evaluators.cost"),
        ("strategies/pp/__init__.py", "from ...compress.prune import prune", "compress.prune.prune"),
        ("strategies/pp/__init__.py", "from prunekit import evaluators", "evaluators"),
        ("strategies/wanda.py", "from ..evaluators.cost import Cost", "evaluators.cost.Cost"),
        ("evaluators/cost.py", "if TYPE_CHECKING:\n    from ..compress import x", "compress.x"),
        ("evaluators/cost.py", "from ..strategies.pp import PP", "strategies.pp.PP"),
        ("evaluators/cost.py", "import importlib\nimportlib.import_module('prunekit.compress')", "compress"),
    ],
)
def test_the_check_of_floors_can_fail(tree, file, source, target):
    (tree / file).write_text(source)
    (complaint,) = between_floors(tree)
    floor, other = file.split("/")[0], target.split(".")[0]
    line = len(source.splitlines())
    assert complaint.startswith(f"{file}:{line} imports {target}: {floor} may import ")
    assert f"from {other}/ down to registry/, or {file} up to compress/" in complaint


@pytest.mark.parametrize(
    ("file", "source", "room", "other"),
    [
        ("compress/runs/pipeline.py", "from ..ablation.store import Store", "runs", "ablation"),
        ("compress/engine/engine.py", "def f():\n    from ..pruning.prune import prune", "engine", "pruning"),
        ("registry/tensors/moments.py", "from ..roles.parts import Scorer", "tensors", "roles"),
    ],
)
def test_the_check_of_rooms_can_fail(tree, file, source, room, other):
    (tree / file).parent.mkdir(parents=True, exist_ok=True)
    (tree / file).write_text(source)
    (complaint,) = between_rooms(tree)
    floor = file.split("/")[0]
    assert complaint.startswith(f"{file}:{len(source.splitlines())} imports {floor}.{other}.")
    assert f"{room} stands below {other}; move what it needs down to {floor}/{room}, or {file} up" in complaint


def test_a_room_without_a_place_is_named(tree):
    (tree / "compress" / "attic.py").write_text("")
    assert between_rooms(tree) == [
        "compress/attic.py: attic is not a room of compress/; give it a place in ROOMS, or move it into one"
    ]


def test_the_check_of_circles_can_fail(tree):
    (tree / "compress/engine/cut.py").write_text("from .engine import Engine\n")
    (tree / "compress/engine/engine.py").write_text("from .cut import Cut\n")
    assert circles(tree) == ["compress.engine.cut -> compress.engine.engine -> compress.engine.cut"]
