"""YAML read as data, with limits on size, depth and numbers, and on what its aliases expand to."""

from __future__ import annotations

from typing import Any

import yaml

from nemo_megacpp.errors import UserError
from nemo_megacpp.printable import cut, shown

LIMIT = 1 << 20
"""Most bytes of a file."""
_DEPTH = 50
_NODES = 20_000
"""Most values, keys included, with every alias counted as what it stands for."""
_ALIASES = 100
_DIGITS = 40
_SCALAR = 1 << 16


class _Loader(yaml.SafeLoader):
    """Refuses duplicate keys, of which YAML's own loader takes the last, and endless numbers."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]:
            if key.value in seen:
                line = key.start_mark.line + 1
                raise UserError(f"gives {cut(key.value)} twice, again in line {line}.")
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> Any:
        if len(node.value) > _DIGITS:
            line = node.start_mark.line + 1
            raise UserError(f"has a number of {len(node.value):,} characters in line {line}.")
        is_int = node.tag.endswith(":int")
        return self.construct_yaml_int(node) if is_int else self.construct_yaml_float(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_number)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_number)


def parse_yaml(text: str) -> tuple[Any, yaml.Node | None]:
    """Return what a YAML text holds, and its nodes.

    Raises:
        UserError: it is larger, deeper or refers to itself more than anything that this package
            reads; a key is given twice. The message goes on from the name of what was read.
        yaml.YAMLError, ValueError: it is not YAML; YAML of an impossible date.
    """
    _validate_events(text)
    return yaml.load(text, Loader=_Loader), yaml.compose(text, Loader=yaml.SafeLoader)


def _validate_events(text: str) -> None:
    """Refuse before anything is composed: composing recurses, and expansion comes after it."""
    sizes: dict[str, int] = {}
    outer: list[tuple[str | None, int]] = []
    nodes = aliases = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = event.start_mark.line + 1
        size = 0
        if isinstance(event, yaml.AliasEvent):
            aliases += 1
            if event.anchor in [anchor for anchor, _ in outer]:
                raise UserError(f"refers to {shown(event.anchor)} inside itself in line {line}.")
            if aliases > _ALIASES:
                raise UserError(f"has more than {_ALIASES} aliases, in line {line}.")
            size = sizes.get(event.anchor, 1)
        elif isinstance(event, yaml.ScalarEvent):
            size = 1
            if len(event.value) > _SCALAR:
                raise UserError(
                    f"has a text of {len(event.value):,} characters in line {line}; at most "
                    f"{_SCALAR:,}."
                )
        elif isinstance(event, yaml.CollectionStartEvent):
            outer.append((event.anchor, nodes))
            if len(outer) > _DEPTH:
                raise UserError(f"is nested deeper than {_DEPTH} in line {line}.")
            size = 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = outer.pop()
            if anchor is not None:
                sizes[anchor] = nodes - before
            continue
        nodes += size
        if nodes > _NODES:
            raise UserError(
                f"has more than {_NODES:,} values, aliases expanded, up to line {line}."
            )


def reason(error: Exception) -> str:
    """Return what a YAML error says, no longer than needed."""
    return cut(str(error), 600)
