"""The public names and their signatures are those of public_api.txt, so that a change of them is a decision.

After a change that is meant: ``.venv/bin/python tests/test_public_api.py > tests/public_api.txt``, and a line in the
changelog.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import idist
import idist.testing
from idist.backends import base as backends
from idist.environments import base as environments

LIST = Path(__file__).parent / "public_api.txt"
MODULES: dict[str, tuple[ModuleType, tuple[str, ...]]] = {
    "idist": (idist, tuple(idist.__all__)),
    "idist.testing": (idist.testing, tuple(idist.testing.__all__)),
    "idist.backends.base": (backends, ("Backend", "Group", "Work")),
    "idist.environments.base": (environments, ("Environment", "Rejected", "Variables")),
}


def described() -> Iterator[str]:
    for module, (found, names) in MODULES.items():
        for name in sorted(names):
            yield from of(f"{module}.{name}", getattr(found, name))


def of(name: str, thing: object) -> Iterator[str]:
    if not isinstance(thing, type):
        yield f"{name}{inspect.signature(thing)}" if callable(thing) else f"{name}: {type(thing).__name__}"
        return
    bases = ", ".join(base.__name__ for base in thing.__bases__ if base is not object)
    yield f"class {name}({bases})"
    if "__init__" in vars(thing) and not getattr(thing, "_is_protocol", False):
        yield f"    {inspect.signature(thing)}"
    for member in sorted(member for member in vars(thing) if not member.startswith("_")):
        value = inspect.getattr_static(thing, member)
        if isinstance(value, (classmethod, staticmethod)):
            value = value.__func__
        yield f"    {member}{inspect.signature(value) if callable(value) else ''}"


def test_every_change_of_a_public_name_is_in_the_list() -> None:
    assert list(described()) == LIST.read_text().splitlines()


def test_every_public_name_has_a_docstring() -> None:
    missing = [name for name in idist.__all__ if callable(getattr(idist, name)) and not getattr(idist, name).__doc__]
    assert missing == []


def test_every_public_name_is_in_the_reference() -> None:
    pages = (Path(__file__).parents[1] / "docs" / "reference").glob("*.rst")
    text = " ".join(page.read_text() for page in pages).split()
    assert [name for name in idist.__all__ if name.removesuffix("()") not in text and f"{name}()" not in text] == []


if __name__ == "__main__":
    print("\n".join(described()))
