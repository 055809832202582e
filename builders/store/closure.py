"""The code that a stage runs, found from its source, so that the key of a stored result can forget no part of it.

A stage is a function. Its code is its own text, what it uses of its file, and every file of the house
that these import, directly or through others, also inside functions or by a module's name in a string (the modules of
processes). Libraries count by version. It is all text: nothing is imported, so nothing depends on what was loaded.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

HOUSE = ("builders", "cluster", "loadtest", "measure", "online", "runtime")
_ROOT = Path(__file__).parents[2]
_MODULE = re.compile(rf"({'|'.join(HOUSE)})(\.\w+)+")


def code_key(stage: Callable[..., Any], root: Path = _ROOT) -> dict[str, Any]:
    """Digest of the source that `stage` runs, and the versions of the libraries which that imports.

    `stage` is a function, one inside a function, or a `partial` of these; all of the outermost one counts. Raises
    LookupError when a module of the house that is imported has no file.
    """
    file, name = _definition(stage)
    own, imported = _used(file.read_text(), name)
    files = closure(imported, root)
    libraries = {top for source in files.values() for top in _libraries(_imported(source))} | set(_libraries(imported))
    parts = [own, *(f"{module} {hashlib.sha256(files[module].encode()).hexdigest()}" for module in sorted(files))]
    return {
        "code": hashlib.sha256("\n".join(parts).encode()).hexdigest(),
        "libraries": tool_versions(*sorted(libraries)),
    }


def closure(imported: Iterable[str], root: Path = _ROOT) -> dict[str, str]:
    """Source text by module, of all modules of the house that these imports reach.

    A package on the way to a module counts by its text; of one that hands names on, only those are followed.
    """
    found: dict[str, str] = {}
    queue, seen = sorted(imported), set(imported)
    while queue:
        modules, symbol = _path(queue.pop(), root)
        for module in modules:
            found[module] = found.get(module) or _file(module, root).read_text()
        fresh = _handed_on(found[modules[-1]], symbol) - seen if modules else set()
        seen |= fresh
        queue.extend(sorted(fresh))
    return found


def _path(name: str, root: Path) -> tuple[list[str], str]:
    """The packages down to the module that `name` means, that one, and what is meant in it; no module for a library."""
    sure, _, rest = name.partition(":")
    parts, symbols = sure.split("."), [part for part in rest.split(":") if part]
    if parts[0] not in HOUSE:
        return [], ""
    while symbols and _candidates(".".join([*parts, symbols[0]]), root):
        parts.append(symbols.pop(0))
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)], ":".join(symbols)


def _handed_on(text: str, symbol: str) -> frozenset[str]:
    """What a module imports; where `symbol` is nothing but imported there, only what is behind that."""
    defined, imports = _parsed(text)
    if symbol in imports and symbol not in defined:
        return frozenset(imports[symbol])
    return _imported(text)


def tool_versions(*modules: str) -> dict[str, str]:
    """The version of whatever distribution provides each module, with its name where that is another one.

    Nothing is imported; `absent` where there is none.
    """
    return {module: _version(module) for module in modules}


def _version(module: str) -> str:
    names = sorted({name.replace("_", "-").lower() for name in _providers().get(module, ())}) or [module]
    found = []
    for name in names:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        found.append(version if name == module.replace("_", "-") else f"{name} {version}")
    return ", ".join(found) or "absent"


@functools.cache
def _providers() -> Mapping[str, list[str]]:
    return metadata.packages_distributions()


def _definition(stage: Callable[..., Any]) -> tuple[Path, str]:
    """The file of the stage, and the name of its outermost function there."""
    while isinstance(stage, functools.partial):
        stage = stage.func
    return Path(stage.__code__.co_filename), stage.__qualname__.split(".")[0]


def _used(text: str, name: str) -> tuple[str, set[str]]:
    """What `name` uses of its file, as text, and what that imports."""
    defined, imports = _parsed(text)
    if name not in defined:
        raise LookupError(f"no {name} at the top level of the file that should define it")
    lines, queue, seen = text.splitlines(), [name], {name}
    imported: set[str] = set()
    while queue:
        node = defined[queue.pop()]
        imported |= _names(node)
        for used in {each.id for each in ast.walk(node) if isinstance(each, ast.Name)} - seen:
            imported |= imports.get(used, set())
            if used in defined:
                seen.add(used)
                queue.append(used)
    parts = ["\n".join(lines[_first_line(defined[each]) - 1 : defined[each].end_lineno]) for each in sorted(seen)]
    return "\n".join(parts), imported


@functools.cache
def _parsed(text: str) -> tuple[dict[str, ast.stmt], dict[str, set[str]]]:
    """What a file defines at its top level, and the modules behind each name that it imports there."""
    defined: dict[str, ast.stmt] = {}
    imports: dict[str, set[str]] = {}
    for statement in ast.parse(text).body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            defined[statement.name] = statement
        elif isinstance(statement, ast.Assign | ast.AnnAssign):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            defined |= {each.id: statement for target in targets for each in ast.walk(target)
                        if isinstance(each, ast.Name)}  # fmt: skip
        else:
            for each in ast.walk(statement):
                for alias in each.names if isinstance(each, ast.Import | ast.ImportFrom) else ():
                    bound = alias.asname or alias.name.split(".")[0]
                    imports.setdefault(bound, set()).update(_of_alias(each, alias))
    return defined, imports


def _first_line(node: ast.stmt) -> int:
    decorators: list[ast.expr] = getattr(node, "decorator_list", [])
    return min([node.lineno, *(each.lineno for each in decorators)])


@functools.cache
def _imported(text: str) -> frozenset[str]:
    return frozenset(_names(ast.parse(text)))


def _names(tree: ast.AST) -> set[str]:
    """Dotted names that are imported, or stand as strings. `from a import b` may be a module a.b: `a:b`."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.update(name for alias in node.names for name in _of_alias(node, alias))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and _MODULE.fullmatch(node.value):
            found.add(node.value.replace(".", ":"))
    return found


def _of_alias(node: ast.AST, alias: ast.alias) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield alias.name
    elif isinstance(node, ast.ImportFrom):
        if node.level or node.module is None:
            raise LookupError(f"line {node.lineno}: a relative import; the house imports by whole names")
        yield f"{node.module}:{alias.name}"


def _libraries(imported: Iterable[str]) -> Iterator[str]:
    tops = (re.split("[.:]", name)[0] for name in imported)
    return (top for top in tops if top not in HOUSE and top not in sys.stdlib_module_names)


def _file(module: str, root: Path) -> Path:
    found = _candidates(module, root)
    if not found:
        raise LookupError(f"module {module} is imported, but {root} holds no source of it")
    return found[0]


def _candidates(module: str, root: Path) -> list[Path]:
    path = root.joinpath(*module.split("."))
    return [file for file in (path / "__init__.py", path.with_name(f"{path.name}.py")) if file.is_file()]
