"""The schemas are proper JSON Schema, and the small checker agrees with a real one."""

from __future__ import annotations

import copy
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from saevit_tvm.runtime import manifest as manifests
from saevit_tvm.support.errors import ArtifactError

UNDERSTOOD = {
    "$schema", "title", "description", "type", "required", "properties", "additionalProperties", "items",
    "minItems", "minimum", "enum", "pattern",
}  # fmt: skip

DOCUMENTS: dict[str, dict[str, Any]] = {
    "verify": {"passed": True, "max_abs_error": 1e-6, "max_rel_error": None, "proof": "host"},
    "bench": {
        "results": [{"name": "torch", "threads": 1, "median_ms": 2, "p10_ms": 1.5, "p90_ms": 3.0, "ratio": None}]
    },
    "bench-pair": {
        "artifacts": [
            {
                "artifact": f"{name}.so",
                "model": "saevit_xs",
                "target": "native",
                "dtype": "float32",
                "median_ms": 2,
                "p10_ms": 1.5,
                "p90_ms": 3.0,
                "first_ms": 200,
                "runs": 90,
            }
            for name in "ab"
        ],
        "input_shape": [1, 3, 224, 224],
        "threads": 2,
        "ratio": 0.98,
        "ratio_p10": 0.97,
        "ratio_p90": 1,
        "ratios": [0.97, 0.98, 1],
        "equal": False,
        "max_abs_difference": None,
        "core_round_trip_ns": [60.5],
        "note": None,
    },
    "emulated-pair": {
        "artifacts": [
            {"artifact": f"{name}.so", "model": "saevit_xs", "kind": "a model", "float_ops": 32} for name in "ab"
        ],
        "kind": "a model",
        "ratios": {"instructions": 0.5, "float_ops": None},
        "note": "they differ",
    },
    "tune-export": {
        "exported": "xs.tar",
        "candidates": 9,
        "kernels": 3,
        "failed": 0,
        "bytes": 1000,
        "target": "cuda-sm_90",
        "dtype": "float32",
        "seconds": 1.5,
    },
    "tune-import": {
        "imported": "results.jsonl",
        "new": 8,
        "known": 1,
        "valid": 8,
        "failed": 1,
        "damaged": 0,
        "machines": [{"device": "a GPU"}],
        "target": "cuda-sm_90",
        "store": "store",
        "seconds": 0.5,
    },
    "emulated": {
        "machine": "qemu, cortex-a76 model",
        "kind": "a model",
        "instructions": 9,
        "classes": {"fma": 4},
        "bytes_loaded": 64,
        "bytes_stored": 16,
        "float_ops": 32,
        "float_ops_per_instruction": 3.6,
    },
    "modelled": {
        "model": "saevit_xs",
        "target": "mali",
        "kind": "a model",
        "launches": 3,
        "float_ops": 9,
        "bytes": 8,
        "bytes_loaded": 7,
        "bytes_stored": 6,
        "devices": [
            {
                "name": "mali-g52",
                "family": "mali",
                "chip": "a chip",
                "gigaflops": 76.8,
                "gigabytes_per_second": 10.6,
                "roofline_ms": 1.5,
                "memory_bound": 2,
                "occupancy": 0.5,
            }
        ],
        "kernels": [
            {
                "kernel": "conv_kernel",
                "calls": 3,
                "grid": [1, 2, 3],
                "group": [16, 4, 1],
                "float_ops": 3,
                "bytes": 2,
                "bytes_loaded": 2,
                "bytes_stored": 2,
                "local_bytes": 0,
                "registers": 20,
                "on": {"mali-g52": {"us": 0.5, "bound": "memory", "occupancy": 1, "groups_a_core": 4}},
            }
        ],
    },
    "tune": {"trials": 8, "valid": 7, "failed": 1, "best_ms": 0.5, "seconds": 3.2},
    "build": {"artifact": "out/x.so", "manifest": "out/x.json"},
    "models": {
        "models": [{"name": "saevit_xs", "params": 6_100_000, "gmacs": 0.78}],
        "tested": [{"model": "timm:resnet18", "input": "1x3x224x224", "max_rel_error": 2e-6}],
    },
    "targets": {"targets": [{"name": "native", "summary": "this machine", "arch": "x86_64"}]},
    "doctor": {"checks": [{"name": "tvm", "ok": True, "detail": "0.27.0"}]},
    "sdk": {
        "sdk": "sdk",
        "artifact": "x.so",
        "artifact_digest": f"sha256:{'0' * 64}",
        "model": "saevit_xs",
        "target": "arm64",
        "flavours": ["static"],
        "files": ["include/saevit.h"],
        "warnings": [],
        "verification": {"static": {"passed": True, "max_abs_error": 0, "max_rel_error": 0, "proof": "qemu"}},
    },
    "logs-list": {"store": "records", "fingerprints": []},
    "logs-show": {
        "fingerprint": "aarch64-cortex-a76-4c",
        "origin": "own",
        "modelled": False,
        "trials": 9,
        "valid": 8,
        "failed": 1,
        "failures": {"timeout": 1},
        "pruned": 0,
        "models": [],
        "machines": [{"trials": 9}],
        "bytes": 4096,
        "last": None,
        "path": "records/aarch64-cortex-a76-4c",
        "kernels": [],
    },
    "logs-check": {"store": "records", "damaged": False, "fingerprints": []},
    "logs-merge": {"into": "records", "fingerprints": []},
    "logs-prune": {"store": "records", "fingerprints": []},
    "tracker": {
        "tracker": "here:9190",
        "keys": [{"key": "rpi4", "servers": 2, "free": 1, "busy": 1, "pending": 0}],
        "servers": [{"key": "rpi4", "address": "10.0.0.7:9090"}],
    },
    "rpc-server": {
        "target": "rpi4",
        "program": "rpc/rpc-server",
        "readme": "rpc/README.txt",
        "libraries": ["rpc/libtvm_ffi.so"],
        "bytes": 9,
    },
}


def keywords(rule: Any) -> set[str]:
    """Every schema keyword in use, at any depth."""
    found = set(rule)
    for inner in [*rule.get("properties", {}).values(), rule.get("items"), rule.get("additionalProperties")]:
        found |= keywords(inner) if isinstance(inner, dict) else set()
    return found


def test_every_schema_is_draft_2020_12_and_understood() -> None:
    assert set(manifests.kinds()) == {*DOCUMENTS, "manifest"}
    for kind in manifests.kinds():
        schema = manifests.schema(kind)
        assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
        jsonschema.Draft202012Validator.check_schema(schema)
        assert keywords(schema) <= UNDERSTOOD


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_documents_need_each_of_their_keys(kind: str) -> None:
    manifests.validate(DOCUMENTS[kind], kind)
    for key in DOCUMENTS[kind]:
        short = {name: value for name, value in DOCUMENTS[kind].items() if name != key}
        with pytest.raises(ArtifactError, match=f"lacks {key}"):
            manifests.validate(short, kind)


def test_manifest_faults_are_named(sample: Any) -> None:
    changes: list[tuple[dict[str, Any], str]] = [
        ({"inputs": []}, "'inputs' must have at least 1 entries, not 0"),
        ({"inputs": [{"name": "x", "shape": [0], "dtype": "int8"}]}, "'inputs.0.shape.0' must be at least 1"),
        ({"model": 3}, "'model' must be string, not 3"),
        ({"weights_digest": "md5:1"}, "'weights_digest' must match"),
        ({"regions": {"saa": {"found": 1}}}, "'regions.saa' lacks expected"),
        ({"size": True}, "'size' must be integer, not True"),
    ]
    for change, words in changes:
        with pytest.raises(ArtifactError, match=words):
            manifests.validate({**sample.manifest, **change})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats(-2, 2) | st.sampled_from(["", "host", "float32"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=5,
)


def places(document: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in the document."""
    items: Any = document.items() if isinstance(document, dict) else enumerate(document)
    found = []
    for key, value in items:
        found.append((document, key))
        found += places(value) if isinstance(value, (dict, list)) else []
    return found


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_agrees_with_a_schema_library(sample: Any, data: st.DataObject) -> None:
    documents = {**DOCUMENTS, "manifest": sample.manifest}
    kind = data.draw(st.sampled_from(sorted(documents)))
    document = copy.deepcopy(documents[kind])
    container, key = data.draw(st.sampled_from(places(document)))
    if data.draw(st.booleans()):
        container[key] = data.draw(json_values)
    else:
        container.pop(key)
    proper = jsonschema.Draft202012Validator(manifests.schema(kind)).is_valid(document)
    try:
        manifests.validate(document, kind)
    except ArtifactError:
        assert not proper
    else:
        assert proper


def test_encoding_is_canonical_and_readable() -> None:
    text = manifests.encode({"b": {"y": 1, "x": [1, 2]}, "a": "ü"})
    assert text == b'{\n  "a": "\\u00fc",\n  "b": {"x": [1, 2], "y": 1}\n}\n'
    assert manifests.encode({"a": "ü", "b": {"x": [1, 2], "y": 1}}) == text
    with pytest.raises(ValueError, match="not JSON compliant"):
        manifests.encode({"error": float("nan")})
