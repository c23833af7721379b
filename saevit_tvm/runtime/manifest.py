"""The manifest of an artifact and the other JSON that scripts read, each held by a schema in `schemas/`.

The schemas are JSON Schema 2020-12 and use few of its keywords, so checking them takes one small function;
a schema library would be a quarter of the time that loading an artifact takes.
"""

from __future__ import annotations

import json
import re
from functools import cache
from importlib import resources
from typing import Any

from saevit_tvm.runtime.tensors import pictures
from saevit_tvm.support.errors import ArtifactError, UsageError

FORMAT = 1

_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
    "null": (type(None),),
}


@cache
def schema(kind: str) -> dict[str, Any]:
    """The JSON Schema of one kind of document: "manifest", "verify", "bench", "tune", "build" and so on."""
    text = (resources.files("saevit_tvm.runtime") / "schemas" / f"{kind}.schema.json").read_text("utf-8")
    return json.loads(text)


def kinds() -> list[str]:
    """Every kind of document that has a schema."""
    folder = resources.files("saevit_tvm.runtime") / "schemas"
    return sorted(file.name.removesuffix(".schema.json") for file in folder.iterdir())


def validate(document: Any, kind: str = "manifest") -> None:
    """Raise ArtifactError unless the document has the keys and types that its schema asks for."""
    fault = _fault(document, schema(kind), "")
    if fault:
        raise ArtifactError(f"the {kind} is not valid: {fault}; it was written by another version, or by hand.")


def encode(manifest: dict[str, Any]) -> bytes:
    """The one spelling of a manifest: same content, same bytes; one key a line, for people to read."""
    lines = (
        f"  {json.dumps(key)}: {json.dumps(manifest[key], sort_keys=True, allow_nan=False)}" for key in sorted(manifest)
    )
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def batches(manifest: dict[str, Any]) -> list[int]:
    """How many pictures the artifact takes at a time, smallest first: its library has a function for each."""
    return manifest.get("batches", [pictures(manifest["inputs"][0]["shape"])])


def entry(batch: int, largest: int) -> str:
    """The library's function for so many pictures. The largest is `main`: shapes in the manifest are those of it."""
    return "main" if batch == largest else f"main_{batch}"


def at_batch(manifest: dict[str, Any], batch: int) -> dict[str, Any]:
    """The manifest as if the artifact took so many pictures only."""
    known = batches(manifest)
    if batch not in known:
        raise UsageError(f"the artifact takes {', '.join(map(str, known))} pictures at a time, not {batch}.")
    if batch == known[-1]:
        return manifest
    changed = {
        key: [each | {"shape": [batch, *each["shape"][1:]]} for each in manifest[key]] for key in ("inputs", "outputs")
    }
    return manifest | changed | {"recipe": manifest["recipe"] | {"batch": batch}, "reference": None}


def _fault(value: Any, rule: dict[str, Any], where: str) -> str | None:
    """The first thing wrong with the value, in words, or None."""
    name = f"'{where}'" if where else "the document"
    types = rule.get("type", [])
    types = [types] if isinstance(types, str) else types
    if types and not any(_is(value, kind) for kind in types):
        return f"{name} must be {' or '.join(types)}, not {_show(value)}"
    if "enum" in rule and value not in rule["enum"]:
        return f"{name} must be one of {', '.join(map(str, rule['enum']))}, not {_show(value)}"
    if "pattern" in rule and isinstance(value, str) and not re.search(rule["pattern"], value):
        return f"{name} must match {rule['pattern']}, not {_show(value)}"
    if "minimum" in rule and _is(value, "number") and not value >= rule["minimum"]:
        return f"{name} must be at least {rule['minimum']}, not {value}"
    if isinstance(value, list):
        if len(value) < rule.get("minItems", 0):
            return f"{name} must have at least {rule['minItems']} entries, not {len(value)}"
        parts = [(item, rule.get("items", {}), index) for index, item in enumerate(value)]
    elif isinstance(value, dict):
        missing = [key for key in rule.get("required", []) if key not in value]
        if missing:
            return f"{name} lacks {', '.join(missing)}"
        rules, others = rule.get("properties", {}), rule.get("additionalProperties", {})
        parts = [(item, rules.get(key, others), key) for key, item in value.items()]
    else:
        return None
    # Only as deep as the schema goes, whatever the document holds.
    faults = (_fault(item, part, f"{where}.{key}" if where else str(key)) for item, part, key in parts if part)
    return next(filter(None, faults), None)


def _show(value: Any) -> str:
    return "a list" if isinstance(value, list) else "an object" if isinstance(value, dict) else repr(value)[:60]


def _is(value: Any, kind: str) -> bool:
    """JSON's idea of a type: true is no number, and 2.0 is an integer."""
    if isinstance(value, bool):
        return kind == "boolean"
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _TYPES[kind])
