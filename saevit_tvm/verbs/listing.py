"""models and targets: what can be built, and for what."""

from __future__ import annotations

from typing import Any


def models() -> dict[str, Any]:
    """Every registered model with its size."""
    from saevit_tvm.models import describe, names

    return {"models": [{"name": name} | describe(name) for name in names()]}


def targets() -> dict[str, Any]:
    """Every named target, and whether this machine can run what is built for it."""
    from saevit_tvm.targets import all_targets, runs_here

    rows = []
    for target in all_targets():
        runnable, why = runs_here(target)
        rows.append(
            {
                "name": target.name,
                "summary": target.summary,
                "arch": target.arch,
                "features": list(target.features),
                "proof": target.proof if runnable else "none",
                "runs_here": runnable,
                "why": why,
                "fingerprint": target.fingerprint,
                "tvm": target.tvm,
            }
        )
    return {"targets": rows}
