"""The walls of the house, read off the imports with `ast`, and the README's tree against the real one."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "bigmodel_jax"

# Imports go down only; a room on one floor may import another on the same floor where no circle results.
FLOORS = {
    "cli": 7,
    "train": 6, "offline": 6, "probe": 6, "assess": 6, "answers": 6, "talk": 6, "harness": 6, "convert": 6,
    "launch": 6, "train_lanes": 6, "status": 6, "certify": 6, "study": 6,
    "plan": 6,
    "experiment": 5, "sections": 5, "programs": 5, "inherit": 5, "checkpoint": 5, "record": 5, "evaluate": 5,
    "planner": 5, "workdir": 5, "lanes": 5, "stopping": 5, "report": 5, "screen": 5, "small": 5,
    "learn": 4, "hf": 4, "generate": 4,
    "models": 3, "metrics": 3, "events": 3,
    "parallel": 2,
    "tree": 1, "flops": 1, "chips": 1, "data": 1, "measures": 1, "agreement": 1, "schema": 1, "mup": 1,
    "variants": 1, "fingerprint": 1,
    "errors": 0, "atomic": 0, "": 0,
}  # fmt: skip
NEVER_EACH_OTHER = [("learn", "models")]
ONLY = {
    "orbax": {"checkpoint"},
    "flax": {"models"},
    "tensorflow": {"data"},
    "tensorflow_datasets": {"data"},
    "ml_collections": {"experiment"},
    "lm_eval": {"harness"},
}
MESH_AXES = {"data", "stage", "fsdp", "expert", "context", "tensor"}
BANNED = re.compile(r"(^|/)(utils?|helpers?|managers?|misc|common)\.py$")


def imports(source: str) -> list[str]:
    """Dotted names of everything a module imports, at any depth."""
    out = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            out += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            out += [f"{node.module}.{alias.name}" for alias in node.names]
    return out


def room(path: Path) -> str:
    part = path.relative_to(PACKAGE).parts[0]
    return part.removesuffix(".py").replace("__init__", "")


def rooms_imported(source: str) -> set[str]:
    names = [n.split(".") for n in imports(source) if n.split(".")[0] == "bigmodel_jax"]
    return {n[1] if len(n) > 1 and n[1] in FLOORS else "" for n in names}


def violations(name: str, source: str) -> list[str]:
    """Every rule that a module of room `name` breaks."""
    out = []
    for other in rooms_imported(source) - {name}:
        if FLOORS[other] > FLOORS[name]:
            out.append(f"{name} (floor {FLOORS[name]}) imports {other} (floor {FLOORS[other]})")
        if (name, other) in NEVER_EACH_OTHER:
            out.append(f"{name} imports {other}")
    for module in imports(source):
        top = module.split(".")[0]
        if top in ONLY and name not in ONLY[top]:
            out.append(f"{name} imports {module}")
        if top == "jax" and name in ("data", "measures"):
            out.append(f"{name} imports {module}")
        if top == "configs":
            out.append(f"{name} imports configs")
    return out


MODULES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down_only(path: Path):
    assert room(path) in FLOORS, f"give the room of {path} a floor"
    assert violations(room(path), path.read_text()) == []


def test_the_rules_can_fail():
    assert violations("tree", "from bigmodel_jax.experiment import build")
    assert violations("learn", "from bigmodel_jax.models import MODELS")
    assert violations("train", "import orbax.checkpoint as ocp")
    assert violations("data", "import jax.numpy")
    assert violations("experiment", "from configs import lm_tiny")
    assert not violations("train", "from bigmodel_jax.checkpoint import Checkpointer")


def test_no_import_circles():
    graph = {}
    for path in MODULES:
        parts = path.relative_to(ROOT).with_suffix("").parts
        graph[".".join(p for p in parts if p != "__init__")] = imports(path.read_text())
    edges = {
        module: {n for name in names for n in (name, name.rpartition(".")[0]) if n in graph and n != module}
        for module, names in graph.items()
    }
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"import circle: {' -> '.join((*trail, module))}"
        if module in done:
            return
        for other in edges[module]:
            if not module.startswith(other + "."):  # a package's __init__ may list its modules
                visit(other, (*trail, module))
        done.add(module)

    for module in graph:
        visit(module, ())


def axis_names_outside_parallel(source: str) -> list[str]:
    """String literals inside PartitionSpec(...) or P(...) calls that name a mesh axis."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) in (
            "PartitionSpec", "P", "psum", "pmean", "all_gather", "axis_index", "make_mesh",
        ):  # fmt: skip
            for inner in ast.walk(node):
                if isinstance(inner, ast.Constant) and inner.value in MESH_AXES:
                    found.append(inner.value)
    return found


def test_only_parallel_names_a_mesh_axis():
    for path in MODULES:
        if room(path) != "parallel":
            assert axis_names_outside_parallel(path.read_text()) == [], path
    assert axis_names_outside_parallel("PartitionSpec(None, 'fsdp')")


def test_no_junk_drawers_and_no_long_files():
    for path in MODULES:
        assert not BANNED.search(str(path)), path
        assert len(path.read_text().splitlines()) <= 450, f"{path} is too long"
    assert BANNED.search("bigmodel_jax/utils.py")


def documented_tree(readme: str) -> list[str]:
    """Files named in the README's annotated tree: the fenced block that starts with 'bigmodel/'."""
    block = re.search(r"```text\nbigmodel/\n(.*?)```", readme, re.S)[1]
    stack: list[str] = []
    files = []
    for line in block.splitlines():
        if not line.strip():
            continue
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        stack = stack[: depth - 1] + [name]
        if not name.endswith("/"):
            files.append("".join(stack))
    return files


def test_readme_tree_is_the_real_tree():
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    code = {f for f in tracked if f.endswith(".py") and f.split("/")[0] in ("bigmodel_jax", "configs", "benchmarks")}
    code = {f for f in code if not f.endswith("__init__.py")}
    documented = documented_tree((ROOT / "README.md").read_text())
    assert sorted(set(documented)) == sorted(documented), "named twice in README"
    named = {
        f for f in documented if f.endswith(".py") and f.split("/")[0] in ("bigmodel_jax", "configs", "benchmarks")
    }
    assert named - code == set(), "named in README, not in the tree"
    assert code - named == set(), "in the tree, not named in README"


def test_no_two_test_files_have_one_name():
    """pytest imports them by name."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(set(names)) == sorted(names)


@pytest.mark.parametrize("command", (("check",), ("format", "--check")))
def test_one_style_everywhere(command, tmp_path):
    """Ruff by pyproject.toml; the copy of a file with two spaces too many is the control."""
    ruff = [sys.executable, "-m", "ruff", command[0], "--quiet", "--no-cache", *command[1:]]
    done = subprocess.run([*ruff, "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (tmp_path / "wrong.py").write_text("import  os\n")
    assert subprocess.run([*ruff, str(tmp_path)], cwd=ROOT, capture_output=True).returncode == 1
