"""The tiny benchmark runs as people run it, and its answers agree; seconds are nobody's business here."""

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "studies" / "benchmark_curvature.py"
KEYS = {"work", "ours_s", "peer", "peer_s", "ratio", "max_rel_diff", "goal", "note"}
KEYS |= {"commit", "torch", "threads", "dtype", "cpu", "preset", "seed"}


def test_tiny_benchmark(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--preset", "tiny", "--out", str(tmp_path), "--threads", "1"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert str(tmp_path / "benchmark.json") in done.stdout
    rows = json.loads((tmp_path / "benchmark.json").read_text())
    for row in rows:
        assert set(row) >= KEYS
        for key in ("ours_s", "peer_s", "ratio"):
            assert math.isfinite(row[key])
            assert row[key] > 0
        assert row["ratio"] == row["peer_s"] / row["ours_s"]
        assert 0 <= row["max_rel_diff"] < 1e-3, row
    for work in ("dense GGN", "dense Hessian", "K-FAC", "EK-FAC", "projector", "γ of fc2", "constrained step"):
        assert any(work in row["work"] for row in rows), work
    # two answers, not one compared with itself
    assert sum(row["max_rel_diff"] > 0 for row in rows) > len(rows) / 2
    steps = [row for row in rows if row["work"].startswith("constrained step")]
    assert max(row["max_rel_diff"] for row in steps) < 1e-5
    assert all(row["ours_bytes"] > 0 for row in steps)
    with (tmp_path / "growth.csv").open() as file:
        growth = list(csv.DictReader(file))
    assert {row["work"] for row in growth} == {"K-FAC", "GGN rows and top k", "dense GGN"}
    assert all(float(row["seconds"]) > 0 and float(row["peak_bytes"]) > 0 for row in growth)
    assert "| work |" in (tmp_path / "benchmark.md").read_text()
