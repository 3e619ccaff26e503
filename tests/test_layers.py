"""The architecture of docs/architecture.md, enforced by reading the source."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import idist

PACKAGE = Path(idist.__file__).parent
MODULES = {
    ".".join(("idist", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

# A part imports those before it, never one after it; no part imports one in its own row.
LAYERS = (
    ("errors",),
    ("topology",),
    ("environments", "failures", "horovodrun", "mpiexec"),
    ("rendezvous",),
    ("backends",),
    ("watch",),
    ("runtime",),
    ("groups", "logs", "randomness", "reductions"),
    ("wire",),
    ("collectives",),
    ("preemption", "ranks"),
    ("auto", "checkpoint"),
    ("launchers",),
    ("parallel",),
    ("testing",),
    ("idist",),
    ("cli",),
    ("__main__",),
)
HEIGHT = {part: height for height, row in enumerate(LAYERS) for part in row}
STRANGERS = {"backends": "environments"}
WITHOUT_TORCH = ("errors", "topology", "environments")

BACKENDS = re.compile(r"\b(gloo|nccl(?!-tests)|mpi|ucc|xccl|hccl|xla|horovod|hvd)\b", re.IGNORECASE)
# Where backends are named: their own files, and the registry. An environment or launcher may bear a backend's name.
NAMERS = {module for module in MODULES if module.startswith("idist.backends")} - {"idist.backends.base"}
NAMESAKES = ("idist.environments", "idist.launchers")


def part_of(module: str) -> str:
    """``idist.backends.c10d`` is of the part ``backends``; the public face, ``idist``, is one of its own."""
    return module.split(".")[1] if "." in module else module


def imports(module: str) -> Iterator[str]:
    """Every module that ``module`` names in an import, also inside functions and ``if TYPE_CHECKING``."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None, f"{module} has a relative import"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in MODULES else node.module


def words(module: str) -> Iterator[tuple[int, str]]:
    """The string constants of ``module`` with their lines, without docstrings."""
    tree = ast.parse(MODULES[module].read_text())
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.lineno, node.value


def test_every_part_has_its_layer() -> None:
    assert {part_of(module) for module in MODULES} == HEIGHT.keys()


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module: str) -> None:
    part = part_of(module)
    for imported in imports(module):
        if imported.split(".")[0] == "idist" and part_of(imported) != part:
            other = part_of(imported)
            assert HEIGHT[other] < HEIGHT[part], f"{module} imports {imported}, which is not below it"
            assert STRANGERS.get(part) != other, f"{part} and {other} must not know each other"


@pytest.mark.parametrize("module", [module for module in MODULES if part_of(module) in WITHOUT_TORCH])
def test_who_and_where_needs_the_standard_library_alone(module: str) -> None:
    roots = {imported.split(".")[0] for imported in imports(module)}
    assert roots <= sys.stdlib_module_names | {"idist"}


@pytest.mark.parametrize("module", sorted(set(MODULES) - NAMERS))
def test_backends_are_named_in_their_own_files(module: str) -> None:
    allowed = {module.rpartition(".")[2]} if module.startswith(NAMESAKES) else set()
    named = [(line, name) for line, text in words(module) for name in BACKENDS.findall(text)]
    assert [(line, name) for line, name in named if name.lower() not in allowed] == []
