from types import SimpleNamespace


class Model:
    @staticmethod
    def load(folder: str) -> SimpleNamespace:
        return SimpleNamespace(signature=None, metadata=None)
