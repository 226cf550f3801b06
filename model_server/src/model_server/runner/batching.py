"""Concurrent callers' rows in one call of the model, and each caller's part of its answer.

No timer: what waits when the model is free goes together. Callers go together only where the model
gets from them what it would get from each alone: the same function, columns and types of values.
At first a model is asked both ways, alone and together; it has to say the same.
"""

import json
import math
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from .inputs import InputError
from .model import Model, ModelError
from .question import Question
from .values import NoJsonFormError

_MOST_ROWS = 4096
"""Of one joined call."""
_MOST_BYTES = 8 * 2**20
"""Of the requests in one joined call."""
_MOST_ROWS_OF_ONE = 1024
"""A caller with more goes alone: joining would gain him nothing."""
_QUESTIONS_OF_A_TRIAL = 8
_RELATIVE_TOLERANCE = 1e-6
_ABSOLUTE_TOLERANCE = 1e-9
_LARGEST_INT64 = 2**63 - 1
_NESTED = frozenset((list, dict))

Answer = bytes | InputError | ModelError
"""The JSON for a caller, or why he gets none."""


@dataclass
class _Waiting:
    question: Question
    size: int
    ticket: Any
    key: Any
    """Questions of the same key go together; None goes alone."""


class Batcher:
    """Asks one model on behalf of many callers, the longest waiting first."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._queue: deque[_Waiting] = deque()
        self._row_by_row: dict[str, bool] = {}
        """By function; what is not in it has not been tried."""

    def __bool__(self) -> bool:
        """Whether anybody waits."""
        return bool(self._queue)

    @property
    def batching(self) -> bool:
        """Whether callers of predict go together, as far as is known."""
        return self._model.batching and self._row_by_row.get("predict", True)

    def put(self, question: Question, size: int, ticket: Any) -> None:
        """Let a caller wait: his question, the bytes of his request, and how to find him again."""
        key = None
        if self._model.batching and self._row_by_row.get(question.function, True):
            key = _key(question, numbers_are_alike=self._model.numbers_are_alike)
        self._queue.append(_Waiting(question, size, ticket, key))

    def answer_next(self) -> Iterator[tuple[Any, int, Answer]]:
        """Answer who waits longest and all who can go with him: ticket, rows, answer."""
        together = self._take()
        answers = self._answers([waiting.question for waiting in together])
        for waiting, answer in zip(together, answers, strict=True):
            yield waiting.ticket, len(waiting.question.data), answer

    def _take(self) -> list[_Waiting]:
        first = self._queue.popleft()
        together = [first]
        if first.key is None:
            return together
        rows, size = len(first.question.data), first.size
        others: list[_Waiting] = []
        while self._queue:
            waiting = self._queue.popleft()
            if waiting.key == first.key:
                rows += len(waiting.question.data)
                size += waiting.size
                if rows > _MOST_ROWS or size > _MOST_BYTES:
                    others.append(waiting)
                    break
                together.append(waiting)
            else:
                others.append(waiting)
        self._queue.extendleft(reversed(others))
        return together

    def _answers(self, questions: list[Question]) -> list[Answer]:
        if len(questions) == 1:
            return [self._alone(questions[0])]
        row_by_row = self._row_by_row.get(questions[0].function)
        if row_by_row:
            return self._together(questions)
        if row_by_row is None:
            tried, rest = questions[:_QUESTIONS_OF_A_TRIAL], questions[_QUESTIONS_OF_A_TRIAL:]
            return self._both_ways(tried) + (self._answers(rest) if rest else [])
        return [self._alone(question) for question in questions]

    def _alone(self, question: Question) -> Answer:
        try:
            return _reply(question, self._predict(question, question.data))
        except (InputError, ModelError) as error:
            return error

    def _together(self, questions: list[Question]) -> list[Answer]:
        """One call. Where it fails, the halves apart, until whoever spoils it is alone."""
        if len(questions) == 1:
            return [self._alone(questions[0])]
        try:
            parts = self._parts(questions)
        except (InputError, ModelError):
            middle = len(questions) // 2
            return self._together(questions[:middle]) + self._together(questions[middle:])
        if parts is None:
            self._learn(questions[0].function, row_by_row=False)
            return [self._alone(question) for question in questions]
        answers: list[Answer] = []
        for question, part in zip(questions, parts, strict=True):
            try:
                answers.append(_reply(question, part))
            except (InputError, ModelError) as error:
                answers.append(error)
        return answers

    def _both_ways(self, questions: list[Question]) -> list[Answer]:
        """Ask alone, and learn whether together says the same."""
        answers = [self._alone(question) for question in questions]
        good = [
            (question, answer)
            for question, answer in zip(questions, answers, strict=True)
            if isinstance(answer, bytes)
        ]
        if len(good) > 1:
            try:
                parts = self._parts([question for question, _ in good])
                row_by_row = parts is not None and all(
                    _is_alike(json.loads(_reply(question, part)), json.loads(answer))
                    for (question, answer), part in zip(good, parts, strict=True)
                )
            except (InputError, ModelError):
                row_by_row = False
            self._learn(questions[0].function, row_by_row=row_by_row)
        return answers

    def _parts(self, questions: list[Question]) -> list[Any] | None:
        """Each one's part of one prediction; None where it is not one item for each row."""
        rows = [row for question in questions for row in question.data]
        prediction = self._predict(questions[0], rows)
        if hasattr(prediction, "tocsr"):
            # Of the sparse matrices, not all can be cut.
            prediction = prediction.tocsr()
        if _length(prediction) != len(rows):
            return None
        items = getattr(prediction, "iloc", prediction)
        parts = []
        start = 0
        for question in questions:
            end = start + len(question.data)
            parts.append(items[start:end])
            start = end
        return parts

    def _predict(self, question: Question, rows: list[Any]) -> Any:
        return self._model.predict(rows, question.function, question.dtype, question.params)

    def _learn(self, function: str, *, row_by_row: bool) -> None:
        self._row_by_row[function] = row_by_row
        if not row_by_row:
            sys.stderr.write(
                f"{function} does not answer row by row: its callers are asked one by one.\n"
            )


def _reply(question: Question, part: Any) -> bytes:
    try:
        return question.reply(part)
    except NoJsonFormError as error:
        raise ModelError(str(error)) from error


def _key(question: Question, *, numbers_are_alike: bool) -> Any:
    rows = question.data
    if question.params or len(rows) > _MOST_ROWS_OF_ONE:
        return None
    alike = numbers_are_alike and (question.dtype is None or question.dtype.startswith("float"))
    try:
        kinds = frozenset([_kind(row, alike) for row in rows])
    except RecursionError:
        return None
    return question.function, question.dtype, kinds


def _kind(value: Any, alike: bool) -> Any:
    """What decides the type that a value gets in an array or a data frame."""
    if isinstance(value, list):
        types = tuple(map(type, value))
        if alike and _NESTED.isdisjoint(types):
            return _without_int(types)
        return tuple([_kind(item, alike) for item in value])
    if isinstance(value, dict):
        return tuple([(key, _kind(item, alike)) for key, item in value.items()])
    if type(value) is int:
        if alike:
            return float
        return int if -_LARGEST_INT64 <= value <= _LARGEST_INT64 else "large"
    return type(value)


@lru_cache(maxsize=1024)
def _without_int(types: tuple[type, ...]) -> tuple[type, ...]:
    return tuple(float if one is int else one for one in types)


def _length(prediction: Any) -> int | None:
    if isinstance(prediction, list):
        return len(prediction)
    shape = getattr(prediction, "shape", None)
    return shape[0] if isinstance(shape, tuple) and shape else None


def _is_alike(one: Any, other: Any) -> bool:
    """Whether two answers say the same; numbers may differ by how their sums were ordered."""
    if isinstance(one, float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=_RELATIVE_TOLERANCE, abs_tol=_ABSOLUTE_TOLERANCE)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_is_alike, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(
            _is_alike(item, other[key]) for key, item in one.items()
        )
    return bool(one == other)
