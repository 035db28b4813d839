"""The YAML that recipes are written in: decimal numbers, no dates, no key twice."""

from __future__ import annotations

import re
from typing import Any

import yaml

INT, FLOAT, TIMESTAMP = (f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "timestamp"))


class RecipeLoader(yaml.SafeLoader):
    """YAML whose numbers are decimal, without dates, and in which no key may come twice.

    YAML 1.1, PyYAML's dialect, reads 0100 as 64, 1:30 as 90, 2024-01-01 as a date, and 2e-4 as text.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key {key.value!r} is given twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_decimal(self, node: Any) -> int:
        return int(self.construct_scalar(node))


class RecipeDumper(yaml.SafeDumper):
    """Puts into quotes the text that `RecipeLoader` would read as a number."""


RecipeLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag not in (INT, FLOAT, TIMESTAMP)]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for tag, number in (
    (INT, r"[-+]?\d[\d_]*"),
    (FLOAT, r"[-+]?(\d[\d_]*\.[\d_]*|\.\d[\d_]*|\.(inf|Inf|INF))|\.(nan|NaN|NAN)"),
    (FLOAT, r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+"),
):
    for reader_or_writer in (RecipeLoader, RecipeDumper):
        reader_or_writer.add_implicit_resolver(tag, re.compile(rf"^({number})$", re.ASCII), list("-+0123456789."))
RecipeLoader.add_constructor(INT, RecipeLoader.construct_decimal)


def from_yaml(text: str) -> Any:
    """Raises ValueError, in one line."""
    try:
        return yaml.load(text, Loader=RecipeLoader)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError) as error:  # the latter: odd !!tags
        raise ValueError(" ".join(str(error).split())) from None


def to_yaml(content: Any) -> str:
    return yaml.dump(content, Dumper=RecipeDumper, sort_keys=False, allow_unicode=True)
