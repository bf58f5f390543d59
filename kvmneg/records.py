# SPDX-License-Identifier: LGPL-2.1-or-later
"""Named tuples as typing.NamedTuple makes them, without its price at a start.

    class Pair(NamedTuple):
        first: int
        second: str = ""

typing compiles each annotation and each constructor: 0.13 ms a class, and a daemon's start needs forty of them, besides
1.5 ms for typing itself. A type checker sees typing's own. The same: `_fields`, `_field_defaults`, `_make`, `_replace`,
`_asdict`, patterns, pickling, equality with tuples. Not the same: a class over such a class adds no fields.
"""

from __future__ import annotations

__all__ = ["NamedTuple"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any, NamedTuple, Self
else:
    from operator import itemgetter

    try:
        from _collections import _tuplegetter
    except ImportError:  # another Python than CPython

        def _tuplegetter(place: int, doc: str) -> property:
            return property(itemgetter(place), doc=doc)

    class _Kind(type):
        """Makes of annotated names the fields of a tuple."""

        def __new__(kind, name: str, bases: tuple[type, ...], body: dict[str, Any]) -> type:
            body["__slots__"] = ()
            if bases != (tuple,) and not hasattr(bases[0], "_fields"):
                fields = tuple(body.get("__annotations__", ()))
                defaults = {field: body[field] for field in fields if field in body}
                if tuple(defaults) != fields[len(fields) - len(defaults) :]:
                    raise TypeError(f"{name}: a field without a default follows one that has one")
                body |= {field: _tuplegetter(place, "") for place, field in enumerate(fields)}
                body |= {"_fields": fields, "_field_defaults": defaults, "__match_args__": fields}
            return type.__new__(kind, name, bases, body)

    class NamedTuple(tuple, metaclass=_Kind):
        """The base of classes with fields."""

        def __new__(cls, *values: Any, **named: Any) -> Self:
            if named or len(values) != len(cls._fields):
                values = _arranged(cls, values, named)
            return tuple.__new__(cls, values)

        @classmethod
        def _make(cls, values: Iterable[Any]) -> Self:
            made = tuple.__new__(cls, values)
            if len(made) != len(cls._fields):
                raise TypeError(f"{cls.__name__} has {len(cls._fields)} fields, not {len(made)}")
            return made

        def _replace(self, **changed: Any) -> Self:
            values = [changed.pop(field, value) for field, value in zip(self._fields, self, strict=True)]
            if changed:
                raise TypeError(f"{type(self).__name__} has no fields {', '.join(changed)}")
            return tuple.__new__(type(self), values)

        def _asdict(self) -> dict[str, Any]:
            return dict(zip(self._fields, self, strict=True))

        def __repr__(self) -> str:
            shown = (f"{field}={value!r}" for field, value in zip(self._fields, self, strict=True))
            return f"{type(self).__name__}({', '.join(shown)})"

        def __getnewargs__(self) -> tuple[Any, ...]:
            return tuple(self)

    def _arranged(cls: type, values: tuple[Any, ...], named: dict[str, Any]) -> list[Any]:
        """Every field's value: by place, by name, by default. Raises TypeError as a call with these would."""
        fields, defaults = cls._fields, cls._field_defaults
        found = list(values)
        for field in fields[len(values) :]:
            if field in named:
                found.append(named.pop(field))
            elif field in defaults:
                found.append(defaults[field])
            else:
                raise TypeError(f"{cls.__name__} needs {field!r}")
        if named or len(found) > len(fields):
            raise TypeError(f"{cls.__name__} takes no {', '.join(named) or f'{len(values)} values'}")
        return found
