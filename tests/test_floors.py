"""Imports point down only, nothing imports torch, and `import sftjax` and `sftjax --help` start without jax."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "sftjax"
FILES = sorted(p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")

# the floor of every folder and file; a file's own entry goes before its folder's
FLOORS = {
    "chips.py": 0,
    "tree.py": 0,
    "sharding.py": 0,
    "hosts.py": 0,
    "join.py": 0,
    "watch.py": 0,
    "config.py": 0,
    "check.py": 0,
    "data/batch.py": 0,  # the shape of a batch, without any code: what models and losses are written for
    "weights": 1,
    "models": 2,
    "losses": 3,
    "data": 3,
    "hf": 3,
    "train": 4,
    "generate": 4,
    "evaluate": 4,
    "tasks": 5,
    "plan": 5,
    "serve": 5,
    "options.py": 6,
    "cli_data.py": 6,
    "cli.py": 6,
}


def floor(file: str) -> int:
    return FLOORS[file] if file in FLOORS else FLOORS[file.split("/")[0]]


def imports(file: str) -> set[str]:
    """Modules that a file imports, inside functions too; `if TYPE_CHECKING` does not count."""
    found: set[str] = set()

    def walk(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            walk(child)

    walk(ast.parse((PACKAGE / file).read_text(encoding="utf-8")))
    return found


def target(module: str) -> str | None:
    """The file of this package that `sftjax.a.b[.name]` means; None for other packages and for `sftjax` itself."""
    parts = module.split(".")
    if parts[0] != "sftjax":
        return None
    for n in range(len(parts), 1, -1):
        inner = "/".join(parts[1:n])
        for candidate in (f"{inner}.py", f"{inner}/__init__.py"):
            if candidate in FILES:
                return candidate
    return None


@pytest.mark.parametrize("file", FILES)
def test_imports_point_down(file):
    for module in sorted(imports(file)):
        if (below := target(module)) is not None:
            assert floor(below) <= floor(file), f"{file} (floor {floor(file)}) imports {below} (floor {floor(below)})"
        assert module.split(".")[0] not in ("torch", "peft", "trl"), f"{file} imports {module}"


def test_the_walk_sees_imports():
    """What the test above rests on."""
    assert (
        target("sftjax.weights.kinds.LowRank") == "weights/kinds.py"
        and target("sftjax.losses.masked_xent") == "losses/__init__.py"
    )
    assert target("sftjax.train") == "train/__init__.py" and target("jax.numpy") is None
    assert "sftjax.generate.chat.run_chat" in imports("cli.py")  # inside a function
    assert "sftjax.hf.model.Model" not in imports("__init__.py")  # for the type checker alone


@pytest.mark.parametrize(
    "code",
    ["import sftjax", "import sftjax.cli, contextlib\nwith contextlib.suppress(SystemExit):\n    sftjax.cli.main(['--help'])"],
    ids=["import", "help"],
)
def test_starts_without_jax(code):
    code = f"import sys\nsys.argv = ['sftjax', '--help']\n{code}\nheavy = {{'jax', 'flax', 'transformers', 'torch', 'datasets'}}"
    code += "\nprint('loaded:', sorted(heavy & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    assert out.strip().endswith("loaded: []") and (("usage: sftjax" in out) == ("cli" in code))
