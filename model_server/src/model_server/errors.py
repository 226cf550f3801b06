"""What can go wrong, and what an HTTP client is told about it."""

import errno

OUT_OF_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)
"""Of an OSError: so many files and connections are open that one more cannot be."""


class ModelServerError(Exception):
    """The base: its text is one sentence for the caller."""

    retry_after: float | None = None
    """In how many seconds to try again, where that is known."""


class InvalidRequestError(ModelServerError):
    """The request is not what the API takes, or the model refuses its data."""


class BodyTooLargeError(ModelServerError):
    """The request is larger than allowed."""


class UnsupportedBodyError(ModelServerError):
    """The request's body is packed in a way that is not taken."""


class ModelNotFoundError(ModelServerError):
    """The registry knows no such model, version or alias."""


class ModelNotLoadedError(ModelServerError):
    """Only something loaded can be unloaded."""


class ModelNotLoadableError(ModelServerError):
    """The model's files or requirements cannot be turned into a running model."""


class ModelNotReadyError(ModelServerError):
    """The model shall be loaded and does not run yet, or not for now."""


class MemoryBudgetError(ModelServerError):
    """The memory for models has no room for one more."""


class ModelFailedError(ModelServerError):
    """The model's own code failed, or its answer has no JSON form."""


class RunnerEndedError(ModelServerError):
    """The model's process ended before it answered."""


class RunnerBusyError(ModelServerError):
    """So many callers wait for a model already that one more is sent away."""


class ServerBusyError(ModelServerError):
    """A worker holds as much of questions and answers as it may."""


class RunnerUnavailableError(ModelServerError):
    """Processes of models cannot be started or stopped now."""


class DeadlineExceededError(ModelServerError):
    """A load or a prediction took longer than allowed."""


class RunnerHangsError(DeadlineExceededError):
    """A prediction took longer than allowed, and the model's process has long been silent."""

    def __init__(self, sentence: str, seconds: float) -> None:
        super().__init__(sentence)
        self.seconds = seconds
        """For how long it has answered nothing."""


class IndexUnavailableError(ModelServerError):
    """The package index does not answer."""


class BuilderUnavailableError(ModelServerError):
    """The unit that builds packages from source does not answer."""


class RegistryUnavailableError(ModelServerError):
    """MLflow does not answer."""


class RegistryRefusedError(ModelServerError):
    """MLflow answers, but not with what was asked for."""


class CatalogUnavailableError(ModelServerError):
    """The database of what shall be loaded does not answer."""


STATUS_CODES: dict[type[ModelServerError], int] = {
    InvalidRequestError: 422,
    BodyTooLargeError: 413,
    UnsupportedBodyError: 415,
    ModelNotFoundError: 404,
    ModelNotLoadedError: 404,
    ModelNotLoadableError: 422,
    ModelNotReadyError: 503,
    MemoryBudgetError: 507,
    ModelFailedError: 500,
    RunnerEndedError: 503,
    RunnerBusyError: 503,
    ServerBusyError: 503,
    RunnerUnavailableError: 503,
    DeadlineExceededError: 504,
    IndexUnavailableError: 503,
    BuilderUnavailableError: 503,
    RegistryUnavailableError: 503,
    RegistryRefusedError: 502,
    CatalogUnavailableError: 503,
}
"""The one place where an error becomes a status; 503 also tells the client when to try again."""


_BY_NAME = {kind.__name__: kind for kind in STATUS_CODES}


def status_of(error: ModelServerError) -> int:
    """The status code of an error, also of one that is a kind of another."""
    return STATUS_CODES[_BY_NAME[name_of(error)]]


def name_of(error: ModelServerError) -> str:
    """The name by which an error can be made again."""
    return next(kind.__name__ for kind in type(error).__mro__ if kind in STATUS_CODES)


def named(name: str, sentence: str) -> ModelServerError:
    """An error that was noted, maybe by another version of the server."""
    return _BY_NAME.get(name, ModelNotReadyError)(sentence)
