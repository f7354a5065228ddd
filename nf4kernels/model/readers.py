"""Which layers' weights the model's own code reads, found in the source of its forward methods."""

import ast
import functools
import inspect
import textwrap
import types
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from ..nn.experts_layout import WEIGHTS
from .walk import inside

LEAVES = {"weight", *WEIGHTS}
# What the packed weight answers as the dense one would; its dtype and its shape are others.
HARMLESS = {"device", "requires_grad", "is_meta", "is_cuda", "grad", "ndim", "dim", "layout"}
ANY = "*"  # every child, where the source names one by a variable
DEEPEST = 6  # longer paths than this are not followed

Path = tuple[str, ...]  # from the module to something in it, by attribute or by a constant in brackets


def readers_of_weights(modules: Iterable[nn.Module]) -> dict[nn.Module, str]:
    """layer -> who reads its weight, as "Class.function"; of every layer that a module's forward reads.

    That is read off the source of `forward`, of the methods that it calls, and of the functions that it hands the
    module or a part of it. A weight that is read by another way is not found.
    """
    found: dict[nn.Module, str] = {}
    for module in modules:
        own = getattr(vars(module).get("forward"), "__func__", None)  # replaced on the instance
        kind: Any = type(module)
        for path, function in _reads(kind, own):
            for layer in _resolve(module, path):
                found.setdefault(layer, f"{kind.__name__}.{function}")
    return found


def _resolve(module: nn.Module, path: Path) -> Iterator[nn.Module]:
    module = inside(module)
    if not path:
        yield module
        return
    for name, child in module._modules.items():
        if child is not None and path[0] in (ANY, name):
            yield from _resolve(child, path[1:])


@functools.lru_cache(maxsize=4096)
def _reads(kind: type[nn.Module], own_forward: Any) -> tuple[tuple[Path, str], ...]:
    """(path to a layer whose weight is read, name of the function that reads it)."""
    reads: dict[Path, str] = {}
    todo: list[tuple[Any, int, frozenset]] = []  # a function, the position of self in it or -1, what is bound to what
    done = set()
    for forward in (own_forward, *_methods(kind, "forward")):
        todo.append((forward, 0, frozenset()))
    while todo:
        function, position, bound = todo.pop()
        function = inspect.unwrap(function) if callable(function) else function
        code = getattr(function, "__code__", None)
        if code is None or (code, bound) in done:
            continue
        done.add((code, bound))
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        used = _names(code)
        methods = {name: found for name in used if (found := _methods(kind, name))} if position == 0 else {}
        todo += [(method, 0, frozenset()) for found in methods.values() for method in found]
        callees = {name: [f] for name in used if _mentions_a_weight(f := function.__globals__.get(name))}
        if not names or not (used & LEAVES or callees):
            continue
        tree = _tree(function)
        if tree is None:
            continue
        source = _Source(tree, {*bound, (names[0], ())} if position == 0 else bound)
        for path in source.reads:
            reads.setdefault(path, function.__name__)
        for name, argument, path in source.handed_on():
            for callee in callees.get(name, ()):
                parameters = inspect.unwrap(callee).__code__.co_varnames
                parameter = parameters[argument] if isinstance(argument, int) else argument
                todo.append((callee, -1, frozenset({(parameter, path)})))
    return tuple(reads.items())


def _names(code: types.CodeType) -> set[str]:
    """The attributes and globals of a function and of those in it, and its strings, for getattr."""
    names = {*code.co_names, *(constant for constant in code.co_consts if isinstance(constant, str))}
    return names.union(*(_names(inner) for inner in code.co_consts if isinstance(inner, types.CodeType)))


def _mentions_a_weight(function: Any) -> bool:
    if not isinstance(function, types.FunctionType):
        return False
    code = getattr(inspect.unwrap(function), "__code__", None)
    return code is not None and code.co_argcount > 0 and bool(_names(code) & LEAVES)


def _methods(kind: type, name: str) -> list[Any]:
    """The functions of that name of the class and of its bases, which super() may call; nn.Module's are not meant."""
    found = []
    for base in kind.__mro__:
        member = None if base in (nn.Module, object) else vars(base).get(name)
        if isinstance(member, property):
            member = member.fget
        member = getattr(member, "__func__", member)
        if isinstance(member, types.FunctionType):
            found.append(member)
    return found


def _tree(function: Any) -> ast.FunctionDef | None:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError):  # without source, or a lambda in the middle of an expression
        return None
    return tree if isinstance(tree, ast.FunctionDef) else None


class _Source:
    """What a function's source reaches from the variables that hold the module or a part of it.

    Attributes:
        reads: the paths to what has its weight read.
    """

    def __init__(self, tree: ast.FunctionDef, bound: Iterable[tuple[str, Path]]) -> None:
        self.variables: dict[str, set[Path]] = {}
        for name, path in bound:
            self.variables.setdefault(name, set()).add(path)
        self.nodes = list(ast.walk(tree))
        self.parents = {child: node for node in self.nodes for child in ast.iter_child_nodes(node)}
        known = -1
        while known != (known := sum(map(len, self.variables.values()))):  # `layer = self.proj`, until none is new
            for node in self.nodes:
                self._follow(node)
        self.reads = [path for node in self.nodes for path in self._read(node)]

    def handed_on(self) -> Iterator[tuple[str, int | str, Path]]:
        """(name of a function, position or name of the argument, path of what it is given)."""
        for node in self.nodes:
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                arguments: list[tuple[int | str | None, ast.expr]] = [*enumerate(node.args)]
                arguments += [(keyword.arg, keyword.value) for keyword in node.keywords]
                for position, value in arguments:
                    if position is not None:
                        yield from ((node.func.id, position, path) for path in self._paths(value))

    def _paths(self, node: ast.AST | None) -> set[Path]:
        """What an expression may be, from the module."""
        if isinstance(node, ast.Name):
            return self.variables.get(node.id, set())
        if isinstance(node, ast.NamedExpr):
            return self._paths(node.value)
        if isinstance(node, ast.Attribute):
            return _longer(self._paths(node.value), node.attr)
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Slice):
            return self._paths(node.value)  # of the children some, by the names that they had
        if isinstance(node, ast.Subscript):
            return _longer(self._paths(node.value), _constant(node.slice))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr" and node.args:
            return _longer(self._paths(node.args[0]), _constant(node.args[1]))
        return set()

    def _follow(self, node: ast.AST) -> None:
        """Bind what an assignment or a loop binds."""
        if isinstance(node, ast.Assign):
            for target in node.targets:
                self._bind(target, node.value)
        elif isinstance(node, ast.NamedExpr | ast.AnnAssign):
            self._bind(node.target, node.value)
        elif isinstance(node, ast.For | ast.comprehension):
            for name, iterable in _loops(node.target, node.iter):
                self.variables.setdefault(name, set()).update(_longer(self._paths(iterable), ANY))

    def _bind(self, target: ast.expr, value: ast.expr | None) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for each, its_value in zip(target.elts, value.elts):
                self._bind(each, its_value)
        elif isinstance(target, ast.Name):
            self.variables.setdefault(target.id, set()).update(self._paths(value))

    def _read(self, node: ast.AST) -> set[Path]:
        """The paths to what has its weight read by this very expression."""
        if not isinstance(getattr(node, "ctx", ast.Load()), ast.Load) or isinstance(node, ast.Name | ast.NamedExpr):
            return set()
        parent = self.parents.get(node)
        looks = isinstance(parent, ast.Attribute) and parent.attr in HARMLESS
        compares = isinstance(parent, ast.Compare) and all(isinstance(op, ast.Is | ast.IsNot) for op in parent.ops)
        asks = isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name) and parent.func.id == "isinstance"
        if looks or compares or asks:
            return set()
        return {path[:-1] for path in self._paths(node) if len(path) > 1 and path[-1] in LEAVES}


def _loops(target: ast.expr, iterable: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    """(variable, what it runs over) of a loop, through enumerate and zip."""
    call = iterable.func.id if isinstance(iterable, ast.Call) and isinstance(iterable.func, ast.Name) else None
    if isinstance(target, ast.Name):
        yield target.id, iterable
    elif call is not None and isinstance(target, ast.Tuple) and isinstance(iterable, ast.Call):
        if call == "enumerate" and len(target.elts) == 2 and iterable.args:
            yield from _loops(target.elts[1], iterable.args[0])
        elif call == "zip":
            for each, its_iterable in zip(target.elts, iterable.args):
                yield from _loops(each, its_iterable)


def _longer(paths: set[Path], leaf: str) -> set[Path]:
    return {(*path, leaf) for path in paths if len(path) < DEEPEST}


def _constant(node: ast.expr) -> str:
    return str(node.value) if isinstance(node, ast.Constant) else ANY
