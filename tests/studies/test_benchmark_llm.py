"""The tiny benchmark on language models runs as people run it, and its answers agree; seconds are nobody's business."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

SCRIPT = Path(__file__).parents[2] / "studies" / "benchmark_llm.py"
KEYS = {"section", "work", "ours_s", "against", "against_s", "ratio", "goal", "met", "bound", "max_rel_diff", "note"}
KEYS |= {"commit", "torch", "threads", "cpu", "preset", "seed", "transformers"}
CONSTRAINED = ("projected gradient", "projected update", "eigenbasis")


def test_tiny_benchmark(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--preset", "tiny", "--out", str(tmp_path), "--threads", "1"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment.pop("CURVLAB_DATA", None)
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert str(tmp_path / "benchmark_llm.json") in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["benchmark_llm.json"]
    rows = json.loads((tmp_path / "benchmark_llm.json").read_text())
    assert {row["section"] for row in rows} >= {"factors", "layer", "model", "stages"}
    for row in rows:
        assert set(row) >= KEYS
        assert math.isfinite(row["ours_s"])
        assert row["ours_s"] > 0
        if row["ratio"] is not None:
            assert math.isfinite(row["ratio"])
        if row["goal"]:
            sign, number = row["goal"].split()
            assert row["met"] == (row["ratio"] <= float(number) if sign == "≤" else row["ratio"] >= float(number))
        if row["max_rel_diff"] is not None:
            assert 0 < row["max_rel_diff"] < 1e-3, row  # two answers, not one compared with itself
        if row["bound"] is not None and row["section"] in ("factors", "model"):
            assert 1 < row["bound"] < 10
    layer = [row for row in rows if row["section"] == "layer"]
    for name in CONSTRAINED:
        for what in ("whole model's step", "projection alone"):
            (llama, qwen) = [row for row in layer if row["work"].startswith(f"{what}, {name}: ")]
            assert llama["max_rel_diff"] < 1e-5
            assert qwen["max_rel_diff"] < 1e-5
    assert all(row["max_rel_diff"] is not None for row in rows if row["section"] in ("peers", "model"))
    stages = [row for row in rows if row["section"] == "stages"]
    assert all(row["device"] == "cpu" and row["peak_bytes"] > 0 for row in stages)
    assert sum("edits" in row["work"] for row in stages) == 3


@pytest.fixture(scope="module")
def study() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_llm", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["benchmark_llm"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


class Products(TorchDispatchMode):
    """Multiply-adds of the matrix products meanwhile (attention's own are of another kind)."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("mm", "bmm", "addmm"):
            x, y = args[-2:]
            self.count += x.numel() * y.shape[-1]
        return func(*args, **(kwargs or {}))


def products(function: Callable[[], Any]) -> int:
    with Products() as counter:
        function()
    return counter.count


def test_operations_of_the_passes_are_counted_right(study: ModuleType) -> None:
    shape = study.MINI
    torch.manual_seed(0)
    model = shape.build()
    ids = torch.randint(shape.vocabulary, (2, 16))
    batch = study.Batch({"input_ids": ids}, ids)
    found = products(lambda: study.forward_backward(model, [batch], shape.layers[0]))
    assert found == 32 * shape.forward_backward(0)


@pytest.mark.parametrize("name", ["LLAMA", "QWEN"])
def test_operations_of_a_step_are_counted_right(study: ModuleType, name: str) -> None:
    shape = getattr(study, name).scaled(64)
    shape = replace(shape, width=32, mlp=96)
    d, f, tokens = 32, 96, 20
    bench = study.Bench.of(shape, tokens, 0)
    values = torch.linspace(1, 0.1, d, dtype=torch.float64), torch.linspace(1, 0.1, f, dtype=torch.float64)
    null = bench.null_space(values, 0.5)
    ways = study.layer_ways(bench, null, partial(torch.optim.SGD, lr=1.0))
    for way in ways.values():
        way.step()
    took = {key: products(way.step) for key, way in ways.items()}
    assert took["plain"] == 3 * tokens * d * f
    assert took["plain, lowest"] == 2 * tokens * d * f
    rotations = [took[key] - took["plain" + key.removeprefix("eigenbasis")] for key in took if "eigenbasis" in key]
    edited = len(shape.edited)
    assert (edited - 1) * rotations[0] + rotations[1] == tokens * shape.rotations()
    assert took["four products"] - took["plain"] == 2 * d * f * (d + f)
    (block,) = null.blocks
    for key in ("projected gradient", "projected update"):
        assert took[key] - took["plain"] == block.basis.cost(block.removed)


def test_operations_of_a_whole_step_are_counted_right(study: ModuleType) -> None:
    """The model above the lowest edited block, whose down_proj alone is run."""
    shape = study.LLAMA.scaled(64)
    shape = replace(shape, blocks=shape.edited[-1] + 2)
    torch.manual_seed(0)
    counted = []
    for constrained in (False, True):
        step = study.Tail.of(shape, 64, 0).way(constrained, partial(torch.optim.SGD, lr=1.0))[0]
        step()
        counted.append(products(step))
    assert counted == [64 * shape.step(), 64 * (shape.step() + shape.rotations())]
