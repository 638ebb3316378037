"""``--where``: a condition on rows, read as Python reads it, never run as Python; Arrow evaluates it and skips what cannot match."""

import ast
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import ConfigError

LONGEST = 10_000
"""Characters of a condition."""
_COMPARISONS = {ast.Eq: "__eq__", ast.NotEq: "__ne__", ast.Lt: "__lt__", ast.LtE: "__le__", ast.Gt: "__gt__", ast.GtE: "__ge__"}
_HINT = "write it like: age >= 18 and split == 'train'; known are == != < <= > >= in, not in, is None, and, or, not, col('odd name')"


@dataclass(frozen=True, kw_only=True)
class Condition:
    """What rows must fulfil to be part of the input. Where it is null, as a comparison with null is, it is not fulfilled."""

    expression: pc.Expression
    columns: tuple[str, ...]
    """Those that must be read to know."""


def condition(text: str, columns: pa.Schema) -> Condition:
    """Raises ConfigError if the text is no condition on these columns."""
    try:
        tree = ast.parse(text.strip()[: LONGEST + 1], mode="eval").body if len(text) <= LONGEST else None
        if tree is None:
            raise ConfigError(f"the condition has {len(text)} characters; at most {LONGEST} are read")
        parser = _Parser(columns)
        expression = parser.truth(tree)
        columns.empty_table().filter(expression)  # Arrow's own opinion of the types
    except ConfigError as error:
        raise ConfigError(*(f"the condition {text[:200]!r} cannot be used: {problem}" for problem in error.problems)) from None
    except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError, pa.ArrowException) as error:
        said = error.msg if isinstance(error, SyntaxError) else str(error).splitlines()[0]
        raise ConfigError(f"the condition {text[:200]!r} cannot be used: {said}; {_HINT}") from None
    return Condition(expression=expression, columns=tuple(parser.used))


class _Parser:
    """From Python's syntax tree to an Arrow expression; whatever is not named here is refused."""

    def __init__(self, columns: pa.Schema):
        self.columns = columns
        self.used: dict[str, None] = {}

    def truth(self, node: ast.expr) -> pc.Expression:
        match node:
            case ast.BoolOp(op=op, values=[first, *others]):
                whole = self.truth(first)
                for other in others:
                    whole = whole & self.truth(other) if isinstance(op, ast.And) else whole | self.truth(other)
                return whole
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return ~self.truth(operand)
            case ast.Compare(left=left, ops=ops, comparators=rights):
                lefts = [left, *rights[:-1]]
                links = [self.comparison(a, op, b) for a, op, b in zip(lefts, ops, rights, strict=True)]
                whole = links[0]
                for link in links[1:]:  # 18 <= age < 65
                    whole = whole & link
                return whole
        field, kind = self.column(node)
        if not pa.types.is_boolean(kind):
            raise ConfigError(f"{ast.unparse(node)!r} alone is no condition, because it is {kind}; {_HINT}")
        return field

    def comparison(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> pc.Expression:
        if isinstance(op, ast.Is | ast.IsNot):
            if not (isinstance(right, ast.Constant) and right.value is None):
                raise ConfigError(f"after 'is' stands None; {_HINT}")
            null = self.column(left)[0].is_null()
            return null if isinstance(op, ast.Is) else ~null
        if isinstance(op, ast.In | ast.NotIn):
            field, kind = self.column(left)
            if not isinstance(right, ast.List | ast.Tuple | ast.Set):
                raise ConfigError(f"after 'in' stands a list like ['a', 'b']; {_HINT}")
            values = pa.array([_literal(element, kind).as_py() for element in right.elts], kind)
            inside = field.isin(values)
            return inside if isinstance(op, ast.In) else field.is_valid() & ~inside
        if _is_value(left):
            if _is_value(right):
                raise ConfigError(f"{ast.unparse(left)} and {ast.unparse(right)} are both no columns; {_HINT}")
            field, kind = self.column(right)
            return getattr(pc.scalar(_literal(left, kind)), _COMPARISONS[type(op)])(field)
        field, kind = self.column(left)
        other = pc.scalar(_literal(right, kind)) if _is_value(right) else self.column(right)[0]
        return getattr(field, _COMPARISONS[type(op)])(other)

    def column(self, node: ast.expr) -> tuple[pc.Expression, pa.DataType]:
        """A column by its name, ``a.b`` inside a struct, or ``col("odd name")``, and the type of its values."""
        name, *inside = _path(node)
        if name not in self.columns.names:
            raise ConfigError(f"there is no column {name!r}; there are {', '.join(self.columns.names)}")
        self.used[name] = None
        kind = self.columns.field(name).type
        for part in inside:
            if not pa.types.is_struct(kind) or kind.get_field_index(part) < 0:
                raise ConfigError(f"there is no {part!r} in column {name!r}, which is {kind}")
            kind = kind.field(part).type
        field = pc.field(name, *inside) if inside else pc.field(name)
        return (field.cast(kind.value_type), kind.value_type) if pa.types.is_dictionary(kind) else (field, kind)


def _path(node: ast.expr) -> list[str]:
    match node:
        case ast.Name(id=name):
            return [name]
        case ast.Attribute(value=value, attr=part):
            return [*_path(value), part]
        case ast.Call(func=ast.Name(id="col"), args=[ast.Constant(value=str(name))], keywords=[]):
            return [name]
    raise ConfigError(f"{ast.unparse(node)!r} is no column; {_HINT}")


def _is_value(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) or (isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub))


def _literal(node: ast.expr, kind: pa.DataType) -> pa.Scalar:
    """A number, text, True or False as a value of a column's type, or as it is where it only compares with it (17.5, int64)."""
    sign = -1 if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) else 1
    node = node.operand if isinstance(node, ast.UnaryOp) and sign < 0 else node
    value: Any = node.value if isinstance(node, ast.Constant) else ...
    if not isinstance(value, str | int | float) or (sign < 0 and isinstance(value, str | bool)):
        raise ConfigError(f"{ast.unparse(node)!r} is no value to compare with; {_HINT}")
    value = value if isinstance(value, str) else sign * value
    if isinstance(value, float) and (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        return pa.scalar(value)
    try:
        return pa.scalar(str(value) if pa.types.is_decimal(kind) else value).cast(kind)
    except pa.ArrowException as error:
        raise ConfigError(f"{value!r} cannot be compared with {kind}: {str(error).splitlines()[0]}") from None
