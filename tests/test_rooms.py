"""The rooms of the package: each imports from those before it, and nothing imports in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import nemo_megacpp

ROOT = Path(nemo_megacpp.__file__).parent

ROOMS = (
    *("printable", "errors", "json_files", "yaml_files", "values", "render", "side_channels"),
    *("mixer_settings", "hybrid_fields"),
    *("pattern", "core", "families", "layout", "settings", "config"),
    *("mixers", "formulas", "specs", "runtime", "checkpoint", "contract", "proof", "data"),
    *("evaluation", "hf", "inference"),
    *(
        "recipes",
        "preflight",
        "runs",
        "start",
        "nemo",
        "megatron_args",
        "bridge",
        "doctor",
        "commands",
        "cli",
    ),
)
"""A room imports from those before it."""
FRONT_ENDS = {"nemo", "megatron_args", "bridge"}
"""They do not import each other."""
REMOTE = ROOT / "hf" / "remote"
"""Files that are copied into an export, where they import each other by relative imports."""


def _imports(path: Path, package: str = "nemo_megacpp") -> Iterator[str]:
    """Yield every module of a package that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level and path.parent == REMOTE:
                continue
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] == package)


def _name(path: Path) -> str:
    parts = ("nemo_megacpp", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts).removesuffix(".__init__")


FILES = {_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def _module(name: str) -> str:
    """Return the module of an imported name: the name itself, or what it is defined in."""
    return name if name in FILES else name.rpartition(".")[0]


def _graph() -> dict[str, set[str]]:
    graph = {name: set(map(_module, _imports(path))) for name, path in FILES.items()}
    assert len(graph) > 100
    for name, imported in graph.items():
        assert imported <= FILES.keys(), f"{name} imports {imported - FILES.keys()}"
    return graph


def _room(name: str) -> str:
    return (*name.split("."), "")[1]


def test_rooms_import_downwards() -> None:
    """Each room from those before it, without exception."""
    climbs = []
    for name, imported in _graph().items():
        for other in imported:
            room, target = _room(name), _room(other)
            if room in ("", "__main__") or target == "":
                continue
            assert room in ROOMS and target in ROOMS, f"{name} imports {other}: no such room"
            if ROOMS.index(target) > ROOMS.index(room):
                climbs.append(f"{name} imports {other}")
            if {room, target} <= FRONT_ENDS and room != target:
                climbs.append(f"{name} imports {other}: two front ends")
    assert not climbs


def test_no_module_imports_in_a_circle() -> None:
    """A package and what it gathers from its modules count as one way only."""
    graph = {
        name: {other for other in imported if not name.startswith(f"{other}.")}
        for name, imported in _graph().items()
    }
    TopologicalSorter(graph).prepare()  # raises CycleError, with the circle


def test_what_is_exported_stands_alone() -> None:
    """It imports torch, transformers and its neighbours; mamba_ssm where that is installed. The
    model's file imports all others itself: transformers copies no others."""
    files = [path for path in REMOTE.glob("*.py") if path.name != "__init__.py"]
    names = {path.stem for path in files}
    model = ast.parse((REMOTE / "modeling_nemo_megacpp.py").read_text(encoding="utf-8"))
    beside = {n.module for n in ast.walk(model) if isinstance(n, ast.ImportFrom) and n.level}
    assert beside == names - {"modeling_nemo_megacpp"}
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.module in names, f"{path} imports {node.module}"
            elif isinstance(node, ast.Import | ast.ImportFrom):
                modules = [node.module] if isinstance(node, ast.ImportFrom) else []
                modules += [alias.name for alias in node.names] if not modules else []
                for module in modules:
                    root = (module or "").split(".")[0]
                    assert root in {
                        "__future__",
                        "collections",
                        "math",
                        "typing",
                        "torch",
                        "transformers",
                    } or (root == "mamba_ssm"), f"{path} imports {module}"


def test_only_the_runtime_knows_the_stand_ins() -> None:
    stand_ins = {"cpu_torch", "cpu_megatron", "cpu_nemo", "cpu_scripts", "cpu_bridge"}
    users = {
        name
        for name, path in FILES.items()
        for imported in _imports(path)
        if stand_ins & set(imported.split("."))
    }
    assert users, "the scan must see the import in runtime/host.py"
    assert set(map(_room, users)) == {"runtime"}


def _asks_for_a_release(path: Path) -> list[str]:
    """Return where a file asks which Megatron-Core is there: by its version, by an import that may
    fail, or by a signature."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            names = {alias.name for alias in node.names}
            megatron = (node.module or "").startswith("megatron")
            if megatron and ("package_info" in node.module or "__version__" in names):
                found.append(f"line {node.lineno}: Megatron's version")
            if node.module == "inspect" and "signature" in names:
                found.append(f"line {node.lineno}: signatures")
        elif isinstance(node, ast.Try):
            imports = [n for n in ast.walk(node) if isinstance(n, ast.Import | ast.ImportFrom)]
            if any("megatron.core" in ast.unparse(each) for each in imports) and any(
                "ImportError" in ast.unparse(handler.type)
                for handler in node.handlers
                if handler.type is not None
            ):
                found.append(f"line {node.lineno}: an import of Megatron that may fail")
    return found


def test_only_the_seam_asks_for_a_release() -> None:
    """What differs between releases of Megatron-Core stands in ``core``."""
    asking = {name: found for name, path in FILES.items() if (found := _asks_for_a_release(path))}
    assert set(map(_room, asking)) == {"core"}, asking


def test_a_command_is_one_file() -> None:
    """Its name in the command line is the file's."""
    from nemo_megacpp.cli import COMMANDS

    files = {name.rpartition(".")[2] for name in FILES if _room(name) == "commands"}
    names = {command.__name__.rpartition(".")[2] for command in COMMANDS}
    assert files - {"commands", "arguments"} == names


def test_no_test_imports_from_another() -> None:
    """What two test files use is in a file of its own."""
    imported = {
        f"{path.name} imports {name}"
        for path in Path(__file__).parent.rglob("*.py")
        for name in _imports(path, "tests")
        if any(part.startswith("test_") for part in name.split("."))
    }
    assert not imported
