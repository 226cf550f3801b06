import runpy
from pathlib import Path
from types import SimpleNamespace


class _Loaded:
    def __init__(self, folder: str) -> None:
        self.predict = runpy.run_path(str(Path(folder, "model.py")))["predict"]
        # As of a model with type hints: it takes the rows as they are.
        signature = SimpleNamespace(
            inputs=None, outputs=None, params=None, _is_signature_from_type_hint=True
        )
        self.metadata = SimpleNamespace(signature=signature, metadata=None)


def load_model(folder: str) -> _Loaded:
    return _Loaded(folder)
