"""What is left to allocate, in a container with a limit and without one."""

from pathlib import Path

import psutil
import pytest

from curvlab import memory

GIB = 2**30


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    free = int(psutil.virtual_memory().available)
    assert memory.available() == pytest.approx(free, rel=0.2)  # no control groups
    (tmp_path / "memory.stat").write_text(f"anon 12\ninactive_file {GIB // 4}\n")
    (tmp_path / "memory.current").write_text(f"{GIB}\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available() == pytest.approx(free, rel=0.2)
    (tmp_path / "memory.max").write_text(f"{GIB + 1000}\n")
    assert memory.available() == GIB // 4 + 1000
    (tmp_path / "memory").mkdir()  # version 1
    (tmp_path / "memory/memory.stat").write_text("total_inactive_file 0\n")
    (tmp_path / "memory/memory.usage_in_bytes").write_text("600\n")
    (tmp_path / "memory/memory.limit_in_bytes").write_text("1000\n")
    assert memory.available() == 400
    with pytest.raises(MemoryError, match=r"a thing needs 500 B, 400 B are free on cpu; instead: a smaller one"):
        memory.announce("a thing", 500, "a smaller one")
    (tmp_path / "memory/memory.usage_in_bytes").write_text("1200\n")
    assert memory.available() == 0
