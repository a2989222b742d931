"""The house rules, read from the code itself: layers, lengths, cycles, imports, randomness, knobs."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from finetune.config import Run
from finetune.run_files import fields_of

ROOT = Path(__file__).parent.parent
PACKAGES = ("finetune", "data_tools")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
OTHERS = sorted([*ROOT.glob("recipes/**/*.py"), *ROOT.glob("benchmarks/**/*.py"), *ROOT.glob("docs/**/*.py")])

LAYERS = {
    "finetune.errors": 0, "finetune.rng": 0, "finetune.config": 0, "finetune.storage": 0, "finetune.tracking": 0,
    "finetune.run_files": 0, "finetune.version": 0, "finetune.show": 0, "finetune.weighted": 0,
    "finetune.prompt_lines": 0,
    "finetune.header": 0, "finetune.devices": 0, "finetune.dtypes": 0, "finetune.by_path": 0, "finetune.quiet": 0,
    "finetune.live": 1, "data_tools": 1, "the drawn world": 1, "finetune": 1, "finetune.console": 1,
    "finetune.families": 2, "finetune.objectives": 2, "finetune.adapters": 2,
    "finetune.interchange": 2.5, "finetune.sampling": 3,
    "finetune.data": 4,
    "finetune.training": 5, "finetune.export": 5,
    "finetune.early_checks": 5.5, "finetune.studio": 5.5,
    "finetune.demo": 6, "finetune.artifact": 6, "finetune.pictures": 6, "finetune.cli": 7, "finetune.__main__": 8,
}  # fmt: skip
"""Longest matching prefix decides; imports go downwards or stay in the own package."""
DRAWN_WORLD = {
    "finetune.demo", "finetune.demo.scenes", "finetune.demo.shapes", "finetune.demo.subjects",
    "finetune.demo.pictures_folder", "finetune.demo.prompts", "finetune.demo.checker",
}  # fmt: skip
"""The part of the demo that knows nothing of training: pictures drawn by code, the checker, and where the base lies."""


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


KNOWN = {module_name(file) for file in FILES}


def room(module: str) -> str:
    """The entry of LAYERS that a module belongs to; a module without one belongs nowhere and fails."""
    if module in DRAWN_WORLD:
        return "the drawn world"
    keys = [key for key in LAYERS if module == key or (key != "finetune" and module.startswith(f"{key}."))]
    return max(keys, key=len)


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def own_imports(path: Path) -> Iterator[tuple[ast.stmt, str]]:
    """Every import of our own code, as a module that exists."""
    here = module_name(path)
    package = here if path.name == "__init__.py" else here.rpartition(".")[0]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
                base = f"{parent}.{base}".rstrip(".")
            names = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in KNOWN else base for alias in node.names]
        else:
            continue
        yield from ((node, name) for name in names if name.split(".")[0] in PACKAGES)


@cache
def guarded_for_types(path: Path) -> set[int]:
    """Lines under `if TYPE_CHECKING:`; they are never executed."""
    return {
        inner.lineno
        for node in ast.walk(tree(path))
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
        if hasattr(inner, "lineno")
    }


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_go_downwards(path):
    """A lower layer that knows a higher one cannot be understood, tested or reused alone."""
    here = room(module_name(path))
    skip = guarded_for_types(path)
    wrong = [
        name
        for node, name in own_imports(path)
        if node.lineno not in skip and room(name) != here and LAYERS[room(name)] >= LAYERS[here] and LAYERS[here] != 0
    ]
    upward = [name for node, name in own_imports(path) if node.lineno not in skip and LAYERS[room(name)] > LAYERS[here]]
    assert not wrong + upward, f"{module_name(path)} (layer {LAYERS[here]}) imports {wrong + upward}"


def test_no_import_cycle():
    """Two modules that import each other are one module that has been cut in the wrong place."""
    graph = {
        module_name(path): {name for node, name in own_imports(path) if node.lineno not in guarded_for_types(path)}
        for path in FILES
    }
    done: set[str] = set()

    def walk(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"import cycle: {' -> '.join([*trail[trail.index(module):], module])}"
        if module not in done:
            for other in sorted(graph.get(module, set()) - {module}):
                walk(other, (*trail, module))
            done.add(module)

    for module in graph:
        walk(module, ())


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_own_code_is_imported_at_the_top(path):
    """A lazy import of our own hides a dependency; only tables load what they name, through importlib."""
    top = {id(node) for node in tree(path).body}
    tops = {node.lineno for node in tree(path).body}
    lazy = [
        name for node, name in own_imports(path)
        if id(node) not in top and node.lineno not in tops and node.lineno not in guarded_for_types(path)
    ]  # fmt: skip
    assert not lazy


@pytest.mark.parametrize("path", [*FILES, *OTHERS], ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_stay_short(path):
    """File <= 400 lines, function <= 80 lines, at most 8 positional parameters: longer ones are missing a name."""
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 80, f"{node.name} is {node.end_lineno - node.lineno + 1} lines long"


FORBIDDEN_CALLS = {
    "torch.load", "torch.save", "torch.rand", "torch.randn", "torch.randint", "torch.randperm", "torch.manual_seed",
    "torch.rand_like", "torch.randn_like", "pickle.load", "pickle.loads", "pickle.dump", "pickle.dumps", "eval", "exec",
    "print",
    "np.random.seed", "np.random.rand", "np.random.randn", "np.random.normal", "np.random.uniform", "random.random",
    "random.choice", "random.shuffle", "random.seed", "random.randint", "random.sample",
}  # fmt: skip
ALLOWED = {("finetune.rng", "torch.manual_seed")}


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_no_global_randomness_no_pickle_no_print(path):
    """Draws are keyed, files cannot run code, and only the command line talks."""
    for node in ast.walk(tree(path)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        keyed = any(keyword.arg == "generator" for keyword in node.keywords)
        if name in FORBIDDEN_CALLS and not keyed and (module_name(path), name) not in ALLOWED:
            pytest.fail(f"{module_name(path)}:{node.lineno} calls {name}")


def test_only_the_families_know_a_family():
    """`if family == ...` anywhere else means the design has lost something."""
    for path in FILES:
        if room(module_name(path)) == "finetune.families":
            continue
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Compare):
                texts = {c.value for c in ast.walk(node) if isinstance(c, ast.Constant) and isinstance(c.value, str)}
                assert not texts & {"sd1", "sd2", "sdxl", "sd3", "flux"}, f"{module_name(path)}:{node.lineno}"


def leaf_fields(model=Run, prefix="") -> Iterator[str]:
    for name, section in fields_of(model).items():
        if section:
            yield from leaf_fields(section, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def test_every_knob_is_used_and_explained():
    """A knob that nothing reads is a lie to the user; one without a meaning is a riddle."""
    used = {
        node.attr
        for path in FILES
        if room(module_name(path)) != "finetune.config" and module_name(path) != "finetune.run_files"
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Attribute)
    }
    unused = [field for field in leaf_fields() if field.rsplit(".", 1)[-1] not in used]
    assert not unused

    def unexplained(model, prefix="") -> Iterator[str]:
        for name, section in fields_of(model).items():
            if section:
                yield from unexplained(section, f"{prefix}{name}.")
            elif name != "output_dir" and not model.model_fields[name].description:
                yield f"{prefix}{name}"

    assert not list(unexplained(Run))


TABLE_FILES = ("objectives", "adapters", "training", "export", "captioners")


def test_every_table_entry_is_documented():
    """What can be chosen by name is explained where it is defined."""
    for path in FILES:
        if not any(part in TABLE_FILES for part in path.parts):
            continue
        module = tree(path)
        functions = {n.name: n for n in module.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
        for node in module.body:
            targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
            if not any(isinstance(t, ast.Name) and t.id.isupper() for t in targets):
                continue
            if isinstance(node.value, ast.Dict):
                for value in node.value.values:
                    if isinstance(value, ast.Name) and value.id in functions:
                        assert ast.get_docstring(functions[value.id]), f"{module_name(path)}.{value.id}"
