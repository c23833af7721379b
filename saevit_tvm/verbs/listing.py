"""models and targets: what can be built, and for what."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saevit_tvm.targets import Target


def models() -> dict[str, Any]:
    """Every registered model with its size, and the models of others that a table says were built and compared."""
    from saevit_tvm.models import TESTED, describe, names

    return {
        "models": [{"name": name} | describe(name) for name in names()],
        "tested": json.loads(TESTED.read_text()),
    }


def targets() -> dict[str, Any]:
    """Every named target, and what proof of what is built for it can be had here."""
    from saevit_tvm import backends
    from saevit_tvm.targets import all_targets

    rows = []
    for target in all_targets():
        how = backends.how_to_run(target)
        rows.append(
            {
                "name": target.name,
                "summary": target.summary,
                "arch": target.arch,
                "features": list(target.features),
                "dtypes": list(target.dtypes),
                "proof": {"host": target.proof, None: _instead(target)}.get(how, how),
                "runs_here": how == "host",
                "emulator": target.emulator,
                "why": backends.why_not(target),
                "fingerprint": target.fingerprint,
                "tvm": target.tvm,
            }
        )
    return {"targets": rows}


def _instead(target: Target) -> str:
    """The proof of what cannot be run here."""
    from saevit_tvm import backends
    from saevit_tvm.proof.stand_in import can_stand_in

    found = backends.get(target.kind).stand_in_proof() if can_stand_in(target) else None
    return found or "none"
