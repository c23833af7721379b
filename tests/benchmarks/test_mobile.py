"""What the comparison of mobile GPUs keeps, and what its table says."""

from __future__ import annotations

import json


def test_a_row_takes_the_place_of_its_like(script, tmp_path):
    mobile = script("mobile")
    ours = {"launches": 85, "bytes": 33_800_000, "float_ops": 1_600_000_000, "roofline_ms": 4.0}
    for row in (
        mobile._row("m", "mnn", "float32", launches=400, bytes=67_600_000, max_abs_error=2e-6),
        mobile._row("m", mobile.OURS, "float16", gpu="mali-g610", **ours | {"launches": 84}),
        mobile._row("m", mobile.OURS, "float32", gpu="mali-g610", **ours),
        mobile._row("m", mobile.OURS, "float32", gpu="mali-g610", **ours | {"launches": 76}),
        mobile._row("m", mobile.OURS, "float32", gpu="adreno-740", **ours),
    ):
        mobile.keep(tmp_path, row)
    kept = json.loads((tmp_path / "mobile.json").read_text())
    assert [(row["runtime"], row["launches"]) for row in kept] == [
        *((mobile.OURS, n) for n in (76, 85, 84)),
        ("mnn", 400),
    ]
    table = [line for line in (tmp_path / "mobile.md").read_text().splitlines() if line.startswith("|")]
    head, _, mali, _, _, mnn = ([cell.strip() for cell in line.strip("|").split("|")] for line in table)
    assert len(head) == len(mali) == len(mnn)
    assert dict(zip(head, mali, strict=True))["model, ms"] == "4.00"
    told = dict(zip(head, mnn, strict=True))
    assert told["MB moved"] == "67.6" and dict(zip(head, mali, strict=True))["MFLOP"] == "1600"
    assert told["launches"] == "at least 400" and told["MB alone on mali-g610, ms"] == "2.00"
    assert dict(zip(head, mali, strict=True))["MB alone on adreno-740, ms"] == ""


def test_kernels_of_a_kind_count_together(script):
    rows = [{"kernel": "conv_kernel", "calls": 2}, {"kernel": "conv12_kernel", "calls": 1}]
    assert script("mobile")._kinds(rows) == {"conv": 3}
