"""Keeps the shape of the house: who may import whom, and how long a thing may grow. Reads the source, runs nothing."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# A room imports itself and the floors below; never a neighbour, never upward.
FLOORS = {
    1: ("records", "log", "config", "trd_kernels"),
    2: ("metrics", "estimators", "planning", "weight_sync"),
    3: ("tasks", "data", "objectives"),
    4: ("rollout", "mcore"),
    5: ("trainer", "benchmarks", "certificate"),
    6: ("reporting",),
    7: ("train", "job", "generate", "evaluate", "report", "audit", "throughput"),
}
FLOOR = {room: floor for floor, rooms in FLOORS.items() for room in rooms}
TOP = max(FLOORS)  # mains may share code with each other
MAINS = tuple(f"megatron_trd/{main}.py" for main in ("train", "generate", "evaluate", "report", "audit"))
SERVER_MAIN = "megatron_trd/rollout/embedded/server.py"

HTTP = ("aiohttp", "httpx", "requests", "urllib3", "urllib.request", "http", "socketserver", "fastapi", "uvicorn")
# A library -> the only paths in the packages that may import it.
HOMES = {
    "megatron": ("megatron_trd/mcore/",),
    **dict.fromkeys(HTTP, ("megatron_trd/rollout/",)),
    "triton": ("kernels/trd_kernels/",),
    "argparse": ("megatron_trd/config/cli.py", SERVER_MAIN),
    "yaml": ("megatron_trd/config/cli.py", SERVER_MAIN),
}
ENVIRONMENT = {"environ", "environb", "getenv", "putenv"}

MAX_FILE_LINES = 350
LONG_FILES = ("megatron_trd/config/schema.py",)  # a table of fields and their documentation
MAX_FUNCTION_LINES = 60
MAX_KERNEL_LINES = 150


def _parse(*folders: str) -> dict[str, ast.Module]:
    paths = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return {str(path.relative_to(ROOT)): ast.parse(path.read_text(encoding="utf-8"), path.name) for path in paths}


PACKAGES = _parse("megatron_trd", "kernels/trd_kernels")
MODULES = {  # module name -> path
    path.removeprefix("kernels/").removesuffix(".py").removesuffix("/__init__").replace("/", "."): path
    for path in PACKAGES
}


def _imports(path: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield (line, absolute dotted name) of every import, those inside functions too."""
    package = path.removeprefix("kernels/").split("/")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def _our_module(name: str) -> str | None:
    """The module of ours that an imported name lies in; the name itself may be a function."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name or None


def _room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if parts[0] == "megatron_trd" and len(parts) > 1 else parts[0]


EDGES = {
    module: {(line, target) for line, name in _imports(path, PACKAGES[path]) if (target := _our_module(name))}
    for module, path in MODULES.items()
}


def _fail_on(violations: list[str]) -> None:
    assert not violations, "\n" + "\n".join(violations)


def test_there_is_something_to_check() -> None:
    assert {"megatron_trd.records", "megatron_trd.config.schema", "trd_kernels"} <= MODULES.keys()
    assert any(EDGES.values())


def test_every_room_has_a_floor() -> None:
    rooms = {_room(module) for module in MODULES} - {"megatron_trd"}
    _fail_on([f"{room}: give it a floor in FLOORS" for room in sorted(rooms - FLOOR.keys())])


def test_no_arrow_upward_and_none_between_neighbours() -> None:
    violations = []
    for module, targets in EDGES.items():
        here = _room(module)
        for line, target in sorted(targets):
            there = _room(target)
            if here == there or here not in FLOOR or there not in FLOOR:
                continue
            if FLOOR[there] > FLOOR[here] or (FLOOR[there] == FLOOR[here] < TOP):
                where = f"{MODULES[module]}:{line}"
                violations.append(f"{where}: {here} (floor {FLOOR[here]}) imports {target} (floor {FLOOR[there]})")
    _fail_on(violations)


def test_no_import_circles() -> None:
    done: set[str] = set()
    circles: list[str] = []

    def visit(module: str, trail: tuple[str, ...]) -> None:
        if module in trail:
            circles.append(" -> ".join([*trail[trail.index(module) :], module]))
        elif module not in done:
            for _, target in sorted(EDGES[module]):
                if target != module:
                    visit(target, (*trail, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())
    _fail_on(circles)


@pytest.mark.parametrize("library", HOMES)
def test_a_library_stays_in_its_home(library: str) -> None:
    _fail_on(
        [
            f"{path}:{line}: imports {name}; only {', '.join(HOMES[library])} may import {library}"
            for path, tree in PACKAGES.items()
            if not path.startswith(HOMES[library])
            for line, name in _imports(path, tree)
            if f"{name}.".startswith(f"{library}.")
        ]
    )


def test_parallel_state_is_known_in_one_file() -> None:
    home = "megatron_trd/mcore/groups.py"
    violations = []
    for path, tree in PACKAGES.items():
        lines = {line for line, name in _imports(path, tree) if "parallel_state" in name.split(".")}
        lines |= {n.lineno for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr == "parallel_state"}
        violations += [f"{path}:{line}: parallel_state outside {home}" for line in sorted(lines) if path != home]
    _fail_on(violations)


def test_only_mains_read_the_environment() -> None:
    violations = []
    for path, tree in PACKAGES.items():
        if path in (*MAINS, SERVER_MAIN):
            continue
        lines = {line for line, name in _imports(path, tree) if name in {f"os.{what}" for what in ENVIRONMENT}}
        lines |= {n.lineno for n in ast.walk(tree) if isinstance(n, ast.Attribute) and _is_environment(n)}
        violations += [f"{path}:{line}: reads the environment; a main hands values down" for line in sorted(lines)]
    _fail_on(violations)


def _is_environment(node: ast.Attribute) -> bool:
    return node.attr in ENVIRONMENT and isinstance(node.value, ast.Name) and node.value.id == "os"


def test_no_handler_swallows_everything() -> None:
    violations = []
    for path, tree in PACKAGES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler) and _catches_everything(node) and not _raises(node):
                violations.append(f"{path}:{node.lineno}: name the exceptions, or raise again")
    _fail_on(violations)


def _catches_everything(handler: ast.ExceptHandler) -> bool:
    names = {node.id for node in ast.walk(handler.type or ast.Name("Exception")) if isinstance(node, ast.Name)}
    return bool(names & {"Exception", "BaseException"})


def _raises(handler: ast.ExceptHandler) -> bool:
    return any(isinstance(node, ast.Raise) for node in ast.walk(handler))


def test_files_are_short() -> None:
    violations = []
    for path in _parse("megatron_trd", "kernels", "tools", "examples"):
        lines = len((ROOT / path).read_text(encoding="utf-8").splitlines())
        if lines > MAX_FILE_LINES and path not in LONG_FILES:
            violations.append(f"{path}: {lines} lines, at most {MAX_FILE_LINES}; one concept is one file")
    _fail_on(violations)


def test_functions_are_short() -> None:
    """Lines without the docstring; what a function documents shall not make it too long."""
    violations = []
    for path, tree in _parse("megatron_trd", "kernels", "tools", "examples").items():
        limit = MAX_KERNEL_LINES if path.startswith("kernels/") else MAX_FUNCTION_LINES
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = _code_lines(node)
                if lines > limit:
                    violations.append(f"{path}:{node.lineno}: {node.name} has {lines} lines, at most {limit}")
    _fail_on(violations)


def _code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    lines = (function.end_lineno or function.lineno) - function.lineno + 1
    if ast.get_docstring(function) is not None:
        text = function.body[0]
        lines -= (text.end_lineno or text.lineno) - text.lineno + 1
    return lines


def test_the_rules_can_fail() -> None:
    tree = ast.parse(
        "import os\nfrom megatron.core import parallel_state\nfrom ..mcore import gpt\nfrom . import refine\n"
        "try:\n    import yaml\nexcept Exception:\n    pass\nx = os.environ['A']\n"
    )
    names = [name for _, name in _imports("megatron_trd/rollout/engine.py", tree)]
    assert {"megatron.core.parallel_state", "megatron_trd.mcore.gpt", "megatron_trd.rollout.refine", "yaml"} <= {*names}
    (handler,) = (node for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler))
    assert _catches_everything(handler) and not _raises(handler)
    assert sum(isinstance(n, ast.Attribute) and _is_environment(n) for n in ast.walk(tree)) == 1
    assert (_our_module("megatron_trd.records.Problem"), _our_module("megatron.core")) == ("megatron_trd.records", None)
    assert (_room("megatron_trd.mcore.gpt"), _room("trd_kernels.output")) == ("mcore", "trd_kernels")
