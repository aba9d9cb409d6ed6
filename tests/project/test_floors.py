"""The floors: a module imports only from lower floors or from its own folder, and importing minillm does no work."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import minillm

PACKAGE = Path(minillm.__file__).parent
FLOORS = {
    "files": 0, "later": 0, "config": 0, "shipped": 0, "ops": 0,
    "layers": 1, "tokenizers": 1,
    "models": 2, "peft": 2, "data": 2,
    "generation": 3, "prompting": 3, "finetune": 3,
    "training": 4,
    "evaluation": 5,
    "recipes": 6,
    "cli": 7, "edu": 7, "__main__": 8,
}  # fmt: skip
HEAVY = (
    "transformers",
    "peft",
    "matplotlib",
    "optuna",
    "sentencepiece",
    "tqdm",
    "huggingface_hub",
    "tokenizers",
    "jinja2",
    "sklearn",
    "scipy",
    "sacrebleu",
    "seqeval",
)


def imports(path: Path) -> set[str]:
    """The full names of all modules that a file imports anywhere, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports in full"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def unit(name: str) -> str:
    """The floor's unit of 'minillm.ops.rope' is 'ops'."""
    return name.split(".")[1]


def violations(path: Path, name: str) -> list[str]:
    own = unit(name)
    found = []
    for imported in imports(path):
        parts = imported.split(".")
        if parts[0] != "minillm" or len(parts) < 2 or parts[1] not in FLOORS or parts[1] == own:
            continue
        neighbours_on_floor_0 = FLOORS[own] == FLOORS[parts[1]] == 0
        if FLOORS[parts[1]] >= FLOORS[own] and not neighbours_on_floor_0:
            found.append(f"{name} (floor {FLOORS[own]}) imports {imported} (floor {FLOORS[parts[1]]})")
    return found


def modules() -> list[tuple[Path, str]]:
    paths = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]
    return [(path, ".".join(("minillm", *path.relative_to(PACKAGE).with_suffix("").parts))) for path in paths]


def test_every_module_stands_on_a_floor():
    assert not {unit(name) for _, name in modules()} - set(FLOORS)


def test_imports_go_down():
    assert not [line for path, name in modules() for line in violations(path, name)]


def test_the_check_itself_finds_a_violation(tmp_path):
    file = tmp_path / "x.py"
    file.write_text("def f():\n    from minillm.peft import tune\n")
    assert sorted(violations(file, "minillm.models.x")) == [
        "minillm.models.x (floor 2) imports minillm.peft (floor 2)",
        "minillm.models.x (floor 2) imports minillm.peft.tune (floor 2)",
    ]
    assert not violations(file, "minillm.training.x")


@pytest.mark.parametrize("name", ["minillm", "minillm.cli"])
def test_importing_stays_light(name):
    code = f"import sys, {name}; print(*sorted(m for m in {HEAVY} if m in sys.modules), 'torch' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.split() == ["False"]
