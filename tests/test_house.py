# SPDX-License-Identifier: Apache-2.0
"""The rules of the house, checked on the source: layers, sizes, names, what importing may cost."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE_FOLDERS = ("r1jax", "pallas_kernels", "configs", "experiments", "tests", ".ci")
LIBRARY = ("r1jax/", "pallas_kernels/")

FILE_LINES, KERNEL_FILE_LINES, FUNCTION_LINES = 400, 700, 60
POSITIONAL_ARGUMENTS, ALL_ARGUMENTS = 5, 10

# Higher imports lower, never the reverse. `r1jax` itself (its __init__) may re-export from any
# layer.
LAYERS = {
    "experiments": 7,
    "configs": 6,  # what a config file needs is the schema
    "r1jax.cli": 7,
    "r1jax.train": 6,
    "r1jax.eval": 6,
    "r1jax.rl": 5,
    "r1jax.infer": 5,
    "r1jax.data": 5,
    "r1jax.io": 5,
    "r1jax.optim": 5,
    "r1jax.nn": 4,
    "r1jax.parallel": 3,
    "r1jax.ops": 2,
    "r1jax.config": 1,
    "r1jax.sharding": 1,
    "pallas_kernels": 0,
}
# Pure array code: these packages may not see modules, configs or mesh names.
PURE = {"r1jax.ops": ("flax", "r1jax"), "pallas_kernels": ("flax", "r1jax")}
PRIVATE_JAX = re.compile(r"^(jax\._src|jax\.core|jax\.interpreters|jaxlib)\b")
BANNED_NNX = {"jit", "grad", "value_and_grad", "scan", "vmap", "pmap", "remat", "Optimizer"}
BANNED_CALLS = {"eval", "exec", "compile", "__import__"}
# A verifier's time limit is its pool's: a signal cannot end what holds the interpreter, nor work in
# a thread.
BANNED_NAMES = {"signal.alarm", "signal.setitimer", "builtins.eval", "builtins.exec"}
# What runs programs runs as a process of its own, behind a fence; nothing may import it.
FENCED = "r1jax/rl/rewards/jail/"
VAGUE_NAMES = re.compile(r"(^|_)(utils?|helpers?|misc|common\d*)$|_v\d+$")


def python_files(*prefixes: str) -> list[Path]:
    found = [p for folder in SOURCE_FOLDERS for p in (ROOT / folder).rglob("*.py")]
    names = ((p.relative_to(ROOT).as_posix(), p) for p in sorted(found))
    return [p for name, p in names if not prefixes or name.startswith(prefixes)]


def name_of(path: Path) -> str:
    """`r1jax/ops/rope.py` → `r1jax.ops.rope`; a package's `__init__.py` → the package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_of(module: str) -> str | None:
    """The entry of LAYERS a dotted name belongs to, or None (`r1jax` itself, third parties)."""
    parts = module.split(".")
    return next((k for n in (2, 1) if (k := ".".join(parts[:n])) in LAYERS), None)


def imports_of(source: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of each import in the file; `from a import b` gives `a` and `a.b`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only"
            yield node.lineno, node.module
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def upward_imports(module: str, source: str) -> list[str]:
    own = layer_of(module)
    wrong = []
    for line, name in imports_of(source):
        other = layer_of(name)
        up = own is not None and other is not None and LAYERS[other] > LAYERS[own]
        tests = name.split(".")[0] == "tests"
        impure = own in PURE and name.startswith(PURE[own]) and layer_of(name) != own
        if up or tests or (impure and name not in ("r1jax", "r1jax.ops")):
            wrong.append(f"{module}:{line} imports {name}")
    return wrong


def test_imports_point_down_only():
    files = [p for p in python_files() if not name_of(p).startswith(("tests", ".ci"))]
    assert [w for p in files for w in upward_imports(name_of(p), p.read_text())] == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("r1jax.ops.rope", "from r1jax import nn"),
        ("r1jax.ops.rope", "import flax.nnx"),
        ("r1jax.ops.rope", "def f():\n    from r1jax.config import ModelConfig"),
        ("r1jax.nn.mla", "from r1jax.train.step import train_step"),
        ("r1jax.train.sft", "import r1jax.cli.display"),
        ("r1jax.io.metrics", "from tests import conftest"),
        ("pallas_kernels.shapes", "from r1jax.ops import rope"),
    ],
)
def test_the_layering_test_can_fail(module, source):
    assert upward_imports(module, source)


def test_no_import_cycles():
    """Among siblings of a layer the order is free, but no module imports itself through others."""
    sources = {name_of(p): p.read_text() for p in python_files(*LIBRARY)}
    packages = {name_of(p) for p in python_files(*LIBRARY) if p.name == "__init__.py"}
    graph = {m: {n for _, n in imports_of(s) if n in sources} - {m} for m, s in sources.items()}
    for (
        module
    ) in graph:  # `from package import module` runs the package only; that edge is not a cycle
        graph[module] = {n for n in graph[module] if not (n in packages and module.startswith(n))}
    state: dict[str, int] = {}

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert state.get(module) != 1, f"import cycle: {' -> '.join((*trail, module))}"
        if module not in state:
            state[module] = 1
            for other in sorted(graph[module]):
                visit(other, (*trail, module))
            state[module] = 2

    for module in sorted(graph):
        visit(module, ())


def arguments_of(node: ast.FunctionDef | ast.AsyncFunctionDef) -> tuple[int, int]:
    """(positional, all) arguments, `self` and `cls` not counted."""
    positional = [a.arg for a in node.args.posonlyargs + node.args.args]
    positional = positional[1:] if positional[:1] in (["self"], ["cls"]) else positional
    return len(positional), len(positional) + len(node.args.kwonlyargs)


def oversized(name: str, source: str, file_lines: int) -> list[str]:
    found = [f"{name}: {n} lines"] if (n := len(source.splitlines())) > file_lines else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            positional, all_ = arguments_of(node)
            if lines > FUNCTION_LINES:
                found.append(f"{name}:{node.lineno} {node.name}: {lines} lines")
            by_keyword = node.name.startswith("test_")  # pytest fills these in by name
            # Pallas gives a kernel one reference for each operand, by position.
            by_operand = name.startswith("pallas_kernels/") and node.name.endswith("kernel")
            if not (by_keyword or by_operand) and (
                positional > POSITIONAL_ARGUMENTS or all_ > ALL_ARGUMENTS
            ):
                found.append(f"{name}:{node.lineno} {node.name}: {positional} of {all_} positional")
    return found


def test_sizes():
    found = []
    for path in python_files():
        name = path.relative_to(ROOT).as_posix()
        cap = KERNEL_FILE_LINES if name.startswith("pallas_kernels/") else FILE_LINES
        found += oversized(name, path.read_text(), cap)
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "\n" * (FILE_LINES + 1),
        "def f():\n" + "    x = 1\n" * FUNCTION_LINES,
        "def f(a, b, c, d, e, g): ...",
        "def f(a, *, b, c, d, e, g, h, i, j, k, l): ...",
    ],
)
def test_the_size_test_can_fail(source):
    assert oversized("x.py", source, FILE_LINES)


def forbidden(source: str, *, fenced: bool = False) -> list[str]:
    """What no file of the library may do, as `line: reason`; a fenced one may run programs."""
    found = []
    for line, name in imports_of(source):
        if PRIVATE_JAX.match(name):
            found.append(f"{line}: {name} is private or gone in a supported version")
        if name in BANNED_NAMES and not fenced:
            found.append(f"{line}: {name}")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            base = ast.unparse(node.value)
            if PRIVATE_JAX.match(f"{base}.{node.attr}"):
                found.append(f"{node.lineno}: {base}.{node.attr}")
            if base == "nnx" and node.attr in BANNED_NNX or node.attr == "sow":
                found.append(f"{node.lineno}: {base}.{node.attr}: use the transforms of jax")
            if f"{base}.{node.attr}" in BANNED_NAMES and not fenced:
                found.append(f"{node.lineno}: {base}.{node.attr}")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in BANNED_CALLS and not fenced:
                found.append(f"{node.lineno}: {node.func.id}()")
        elif isinstance(node, ast.Assert):
            found.append(f"{node.lineno}: assert; raise ValueError or use chex")
    found += [
        f"{i}: unfinished" for i, s in enumerate(source.splitlines(), 1) if UNFINISHED.search(s)
    ]
    return found


UNFINISHED = re.compile(r"#.*\b(TODO|FIXME|XXX)\b|\bNotImplementedError\b")


def test_nothing_forbidden_in_the_library():
    found = [
        f"{name_of(path)}:{wrong}"
        for path in python_files(*LIBRARY)
        for wrong in forbidden(
            path.read_text(), fenced=path.relative_to(ROOT).as_posix().startswith(FENCED)
        )
    ]
    assert found == []


def test_nothing_imports_what_is_fenced():
    package = FENCED.rstrip("/").replace("/", ".")
    found = [
        f"{name_of(path)}:{line}"
        for path in python_files()
        if not path.relative_to(ROOT).as_posix().startswith(FENCED)
        for line, name in imports_of(path.read_text())
        if name.startswith((package, "jail"))
    ]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "from jax._src import core",
        "import jax\njax.core.Tracer",
        "from flax import nnx\nnnx.jit(f)",
        "self.sow('a', b)",
        "eval(answer)",
        "builtins.eval(answer)",
        "signal.alarm(3)",
        "from signal import alarm",
        "assert x > 0",
        "x = 1  # TODO later",
        "raise NotImplementedError",
    ],
)
def test_the_forbidden_test_can_fail(source):
    assert forbidden(source)


def test_file_headers_and_names():
    for path in python_files():
        name = path.relative_to(ROOT).as_posix()
        assert path.read_text().startswith("# SPDX-License-Identifier: Apache-2.0\n"), name
        assert ast.get_docstring(ast.parse(path.read_text())), f"{name} has no docstring"
        assert not VAGUE_NAMES.search(path.stem), f"{name}: name the idea"


def test_top_level_is_fixed():
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if tracked.returncode:
        pytest.skip("not a git checkout")
    top = {line.split("/")[0] for line in tracked.stdout.splitlines()}
    allowed = {"pyproject.toml", "README.md", "LICENSE", *SOURCE_FOLDERS}
    assert {name for name in top if not name.startswith(".")} <= allowed


LIGHT = [
    "r1jax.rl",
    "pallas_kernels",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("r1jax", "r1jax.ops")),
]
# Processor seconds, not wall: the machine that runs the tests may be busy with other things.
LIGHT_SECONDS = 1.0
IMPORT = """
import logging, sys, time
import jax
began = time.process_time()
import {module}
took = time.process_time() - began
assert not logging.getLogger().handlers, "configures logging"
assert took < {limit}, f"{{took:.2f}} s beyond jax"
"""


@pytest.mark.parametrize("module", LIGHT)
def test_import_is_light(module):
    """Importing touches no device, prints and configures nothing, and costs little beyond JAX."""
    if not (ROOT / module.replace(".", "/") / "__init__.py").exists():
        pytest.skip(f"{module} is not written yet")
    # A platform that does not exist: the first touch of a device would raise.
    env = {**os.environ, "JAX_PLATFORMS": "no_such_platform", "PYTHONPATH": str(ROOT)}
    code = IMPORT.format(module=module, limit=LIGHT_SECONDS)
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout == ""
