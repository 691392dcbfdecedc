"""Studies as modules: importing one takes longer than running it by its tiny preset."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

STUDIES = Path(__file__).parents[1] / "studies"


def load_study(name: str) -> Any:
    """The module of studies/<name>.py."""
    spec = importlib.util.spec_from_file_location(f"{name}_study", STUDIES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
