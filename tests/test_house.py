"""The house keeps its order: one direction of imports, no circle, no room that has grown too large."""
import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = [("core",), ("config", "grading"), ("data",), ("models",), ("rollout", "judges"), ("eval",), ("train",),
          ("export", "report", "plan"), ("commands",), ("cli", "__main__")]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted([*ROOT.glob("minimath/**/*.py"), *ROOT.glob("kernels/*.py")])


def module_of(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    parts = ["minimath", *parts] if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path, known: set[str]) -> dict[str, bool]:
    """Module of ours -> whether the file needs it to be imported itself, of all import statements."""
    found = {}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):  # kernels/ alone has relative ones
            base = ".".join(filter(None, ("minimath.kernels" * (node.level > 0), node.module)))
            names = [f"{base}.{alias.name}" for alias in node.names] + [base]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            if name in known and name != module_of(path):
                found[name] = found.get(name, False) or node in tree.body
    return found


MODULES = {module_of(path): path for path in FILES}
ARROWS = {name: imports_of(path, set(MODULES)) for name, path in MODULES.items()}


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "minimath"


def test_imports_run_one_way():
    wrong = [f"{module} -> {other}" for module, others in ARROWS.items() for other in others
             if room(module) in FLOOR and room(other) in FLOOR and room(module) != room(other)
             and FLOOR[room(other)] >= FLOOR[room(module)]]
    assert not wrong, f"imports against {' < '.join('/'.join(rooms) for rooms in FLOORS)}: {wrong}"


def test_every_module_has_a_room():
    assert {room(module) for module in MODULES} <= {*FLOOR, "minimath", "kernels", "recipes"}


def test_no_circle_of_imports():
    done, path = set(), []

    def visit(module):
        if module in path:
            pytest.fail("a circle: " + " -> ".join([*path[path.index(module):], module]))
        if module not in done:
            path.append(module)
            for other in ARROWS[module]:
                visit(other)
            done.add(path.pop())

    for module in ARROWS:
        visit(module)


def test_kernels_import_torch_and_triton_alone():
    for path in ROOT.glob("kernels/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                assert node.module.split(".")[0] not in ("transformers", "peft", "numpy", "datasets"), path
                assert not node.module.startswith("minimath.") or node.module.startswith("minimath.kernels"), path


def functions():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield path.relative_to(ROOT), node


def test_no_file_above_350_lines():
    long = {str(path.relative_to(ROOT)): n for path in FILES if (n := len(path.read_text().splitlines())) > 350}
    assert not long


def test_no_function_above_60_lines():
    assert not [f"{path}:{node.lineno} {node.name}" for path, node in functions()
                if node.end_lineno - node.lineno + 1 > 60]


def test_no_function_with_more_than_9_parameters():
    assert not [f"{path}:{node.lineno} {node.name}" for path, node in functions() if path.parts[0] != "kernels"
                and len(node.args.posonlyargs) + len(node.args.args) + len(node.args.kwonlyargs) > 9]


@pytest.mark.parametrize("name, most", [("sft", 120), ("rlaif", 170)])
def test_the_loops_stay_short(name, most):
    text = (ROOT / "minimath" / "train" / f"{name}.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= most
    loop = next(node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef) and node.name == name)
    body = "\n".join(map(ast.unparse, loop.body[1:]))
    for word in ("dist.", "rank", "checkpoint", "signal", "memory", "resume", "Interrupted"):
        assert word not in body, word


def test_the_front_readme_is_a_door():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
