"""Messages from quantities that are already checked.

A message that comes from outside is validated when it is decoded or built: that is pydantic's work, and takes one to three
microseconds. The planner's core makes eight values for each task, from numbers that were validated before or that it computed
itself; checking them again was an eighth of its time. `maker` gives a function that builds such a message at once: equal to
the validated one, as frozen, with the same bytes on the wire. What it is given is taken as it is (an int is not made a float,
a name is not looked at), so it is for code whose quantities are known, and for tests that compare both.
"""

from __future__ import annotations

import keyword
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from pydantic import BaseModel

from bus.values import Frozen

P = ParamSpec("P")
M = TypeVar("M", bound=Frozen)

# The four things that a pydantic model consists of; setting them is what its own `model_construct` does, among more.
_SLOTS = {
    f"_set{at}": BaseModel.__dict__[name].__set__
    for at, name in enumerate(("__dict__", "__pydantic_fields_set__", "__pydantic_extra__", "__pydantic_private__"))
}


def maker(message: Callable[P, M]) -> Callable[P, M]:
    """A function with the parameters of a message class that builds the message without validating it.

    Raises `TypeError` for a class with fields whose default must be computed, or which go by another name outside.
    """
    assert isinstance(message, type)
    assert issubclass(message, Frozen)
    fields = message.model_fields
    names: dict[str, Any] = {**_SLOTS, "_new": object.__new__, "_class": message, "_given": set(fields)}
    parameters = []
    for name, info in fields.items():
        if info.default_factory is not None or info.alias is not None or keyword.iskeyword(name):
            raise TypeError(f"{message.__name__}.{name} cannot be made unchecked")
        if info.is_required():
            parameters.append(name)
        else:
            names[f"_default_{name}"] = info.default
            parameters.append(f"{name}=_default_{name}")
    # The order of the fields is the order of the keys on the wire.
    source = (
        f"def make(*, {', '.join(parameters)}):\n"
        "    made = _new(_class)\n"
        f"    _set0(made, {{{', '.join(f'{name!r}: {name}' for name in fields)}}})\n"
        "    _set1(made, _given)\n"
        "    _set2(made, None)\n"
        "    _set3(made, None)\n"
        "    return made\n"
    )
    exec(source, names)  # only names of fields stand in it
    made: Callable[P, M] = names["make"]
    made.__doc__ = f"A `{message.__name__}`, unchecked."
    return made
