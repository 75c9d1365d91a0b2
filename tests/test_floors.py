"""A module imports from its own floor or below, never above, and no import has an effect."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import kvzip

PACKAGE = Path(kvzip.__file__).parent
PYPROJECT = PACKAGE.parent / "pyproject.toml"

# The floors, from the ground up. A folder stands for all modules in it; a module of its own goes before its folder.
FLOORS = [
    ["kvzip.errors", "kvzip.files", "kvzip._version", "kvzip.progress", "kvzip.memory", "kvzip.parts", "kvzip.ops"],
    [
        "kvzip.budget",
        "kvzip.chunks",
        "kvzip.recipes",
        "kvzip.methods",
        "kvzip.context",
        "kvzip.portable",
        "kvzip.scorers",
        "kvzip.profilers",
        "kvzip.replayed",
        "kvzip.selecting",
        "kvzip.transforms",
        "kvzip.fetch",
    ],
    ["kvzip.backends", "kvzip.store", "kvzip.models.catalogue", "kvzip.models.cache"],
    ["kvzip.hf", "kvzip.models"],
    [
        "kvzip.compress",
        "kvzip.certificate",
        "kvzip.generation",
        "kvzip.profiles",
        "kvzip.sharing",
        "kvzip.surrogates",
        "kvzip.distill",
    ],
    [
        "kvzip.options",
        "kvzip.auto",
        "kvzip.export",
        "kvzip.session",
        "kvzip.compressed",
        "kvzip.prefilled",
        "kvzip.llm",
        "kvzip.loading",
        "kvzip.inspect",
    ],
    ["kvzip.integrations"],
    ["kvzip.eval"],
    ["kvzip.bench"],
    ["kvzip.cli", "kvzip.__main__"],
]
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}

# Who may import which library: inside a function too. Torch and Python's own modules are free to all.
LIBRARIES = {
    "transformers": [
        "kvzip.hf", "kvzip.models.convert", "kvzip.compress", "kvzip.generation", "kvzip.session", "kvzip.llm",
        "kvzip.sharing",
        "kvzip.loading", "kvzip.bench", "kvzip.cli.loading",
    ],
    "tokenizers": ["kvzip.models"],
    "huggingface_hub": ["kvzip.models", "kvzip.eval.tasks.hub", "kvzip.hf.described"],
    "gguf": ["kvzip.models"],
    "filelock": ["kvzip.models"],
    "safetensors": ["kvzip.store.files", "kvzip.models", "kvzip.surrogates", "kvzip.hf.described"],
    "numpy": ["kvzip.models"],
    "rich": ["kvzip.cli", "kvzip.inspect"],
    "typer": ["kvzip.cli"],
    "datasets": ["kvzip.eval.tasks.hub"],
    "nltk": ["kvzip.eval.code_similarity"],
    "pyarrow": ["kvzip.eval.tasks.hub"],
    "rouge_score": ["kvzip.eval.metrics"],
    "matplotlib": ["kvzip.bench.plots", "kvzip.eval.drawing"],
    "vllm": ["kvzip.integrations.vllm"],
}  # fmt: skip


@dataclass(frozen=True)
class Import:
    """One import statement.  at_once: it runs when the module is imported, not when a function is called."""

    importer: str
    target: str
    line: int
    at_once: bool


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def imports_in(importer: str, node: ast.AST, at_once: bool = True) -> Iterator[Import]:
    """All imports below `node` but those for type checkers alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(importer, alias.name, child.lineno, at_once) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert not child.level, f"{importer}:{child.lineno}: write imports in full"
            for alias in child.names:
                whole = f"{child.module}.{alias.name}"
                yield Import(importer, whole if whole in MODULES else str(child.module), child.lineno, at_once)
        elif is_type_checking(child):
            assert isinstance(child, ast.If)
            for other in child.orelse:
                yield from imports_in(importer, other, at_once)
        else:
            yield from imports_in(importer, child, at_once and not isinstance(child, ast.FunctionDef | ast.Lambda))


@lru_cache(maxsize=1)
def all_imports() -> tuple[Import, ...]:
    trees = ((name, ast.parse(path.read_text(encoding="utf-8"))) for name, path in MODULES.items())
    return tuple(found for name, tree in trees for found in imports_in(name, tree))


def is_within(module: str, owner: str) -> bool:
    return module == owner or module.startswith(f"{owner}.")


def floor_of(module: str) -> int | None:
    """The floor of a module or of the nearest folder above it."""
    owners = [name for name in FLOOR_OF if is_within(module, name)]
    return FLOOR_OF[max(owners, key=len)] if owners else None


def test_every_module_has_a_floor() -> None:
    homeless = [name for name in MODULES if name != "kvzip" and floor_of(name) is None]
    assert not homeless, f"give these a floor in {Path(__file__).name}: {homeless}"


def test_no_module_imports_from_above() -> None:
    wrong = []
    for found in all_imports():
        if not is_within(found.target, "kvzip") or found.importer == "kvzip":
            continue
        here, there = floor_of(found.importer), floor_of(found.target)
        if here is None or there is None or there > here:
            wrong.append(f"{found.importer}:{found.line} (floor {here}) imports {found.target} (floor {there})")
    assert not wrong, "\n".join(wrong)


def test_the_root_imports_only_from_the_ground() -> None:
    targets = {found.target for found in all_imports() if found.importer == "kvzip"}
    assert {t for t in targets if is_within(t, "kvzip")} == {"kvzip._version", "kvzip.errors"}


def test_imports_go_round_in_no_circle() -> None:
    below: dict[str, set[str]] = {name: set() for name in MODULES}
    for found in all_imports():
        if found.at_once and found.target in MODULES and found.importer != "kvzip":
            below[found.importer].add(found.target)
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"a circle: {' -> '.join((*path, module))}"
        if module not in done:
            for target in below[module] - {module}:
                visit(target, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


def libraries() -> set[tuple[str, str, int]]:
    """(library, importer, line) of every import that is neither ours, nor Python's, nor torch."""
    tops = ((found.target.partition(".")[0], found) for found in all_imports())
    free = {*sys.stdlib_module_names, "kvzip", "torch"}
    return {(top, found.importer, found.line) for top, found in tops if top not in free}


def test_each_library_is_imported_only_where_it_belongs() -> None:
    wrong = [
        f"{importer}:{line} imports {library}"
        for library, importer, line in sorted(libraries())
        if not any(is_within(importer, owner) for owner in LIBRARIES.get(library, []))
    ]
    assert not wrong, "\n".join(wrong)


def test_each_library_is_a_declared_dependency() -> None:
    declared = re.search(r"^dependencies = \[(.*?)^\]", PYPROJECT.read_text(encoding="utf-8"), re.M | re.S)
    assert declared is not None
    extras = re.findall(r"^(?:plots|eval|vllm) = \[(.*?)\]", PYPROJECT.read_text(encoding="utf-8"), re.M)
    assert len(extras) == 3
    names = {name.replace("-", "_") for name in re.findall(r'"([\w-]+)', "".join([declared[1], *extras]))}
    assert {library for library, _, _ in libraries()} <= names


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_loads_nothing_heavy() -> None:
    run(
        "import sys, kvzip; dir(kvzip); kvzip.KVZipError; kvzip.__version__\n"
        "loaded = {'torch', 'transformers', 'numpy', 'typer', 'rich'} & set(sys.modules)\n"
        "assert not loaded, loaded"
    )


def test_importing_every_module_registers_nothing() -> None:
    absent = {"vllm"} if find_spec("vllm") is None else set()  # has an environment of its own
    needing = {found.importer for found in all_imports() if found.at_once and found.target.partition(".")[0] in absent}
    needing |= {found.importer for found in all_imports() if found.at_once and found.target in needing}
    names = [name for name in MODULES if name != "kvzip.__main__" and name not in needing]
    run(
        f"from importlib import import_module\nfor name in {names}: import_module(name)\n"
        "from transformers import AttentionInterface\n"
        "from transformers.masking_utils import AttentionMaskInterface\n"
        "from kvzip.hf.seam import ATTENTION_NAME, register\n"
        "registries = AttentionInterface(), AttentionMaskInterface()\n"
        "assert not [r for r in registries if ATTENTION_NAME in r], 'registered by an import'\n"
        "register()\n"
        "assert all(ATTENTION_NAME in r for r in registries)"
    )
