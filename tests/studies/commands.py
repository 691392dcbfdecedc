"""Studies as commands."""

import subprocess
import sys
from pathlib import Path

STUDIES = Path(__file__).parents[2] / "studies"


def command(script: str, out: Path, *arguments: str) -> list[str]:
    """The command line of a study's tiny preset."""
    return [sys.executable, str(STUDIES / script), "--preset", "tiny", "--out", str(out), *arguments]


def run_study(script: str, environment: dict[str, str], out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run it to its end, in the folder that holds `out`."""
    given = command(script, out, *arguments)
    return subprocess.run(given, env=environment, capture_output=True, text=True, timeout=300, cwd=out.parent)
