"""Started by path: makes its folder a package of a name that no model's module will have."""

import importlib
import importlib.util
import sys
from pathlib import Path

_NAME = "odsp_model_runner"

if __name__ == "__main__":
    _folder = Path(__file__).parent
    _spec = importlib.util.spec_from_file_location(
        _NAME, _folder / "__init__.py", submodule_search_locations=[str(_folder)]
    )
    if _spec is None or _spec.loader is None:
        raise SystemExit(f"{_folder} is not complete")
    _package = importlib.util.module_from_spec(_spec)
    sys.modules[_NAME] = _package
    _spec.loader.exec_module(_package)
    importlib.import_module(f"{_NAME}.process").main(sys.argv[1:])
