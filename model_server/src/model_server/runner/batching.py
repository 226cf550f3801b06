"""Concurrent callers' rows in one call of the model, and each caller's part of its answer.

No timer: what waits when the model is free goes together. Callers go together only where the model
gets from them what it would get from each alone: the same function, columns and types of values.

Whether its answers are those that it would give to each alone is tried: at first callers are asked
alone, and once more together. Only questions that differ prove anything, those with answers of
their own the most, and it takes several trials. The same question over and over, as of probes and
load generators, goes together once its copies were tried, but only with itself. Later, one call in
some hundreds is checked by asking one of its callers alone. A model whose answers once differ is
asked one by one for as long as the process lives.
"""

import json
import math
import struct
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, chain, pairwise
from typing import Any

from . import wire
from .inputs import InputError
from .model import Model, ModelError
from .question import FUNCTIONS, Question
from .values import NoJsonFormError

_MOST_ROWS = wire.MOST_JOINED_ROWS
"""Of one joined call."""
_MOST_ROWS_OF_A_QUICK_CALL = 256
_QUICK_SECONDS = 0.25e-3
_FORGETTING = 1.02
"""Where a call of the model costs so little, one for all saves less than is lost while callers and
workers wait for its end: they have answers earlier of several calls."""
_MOST_BYTES = 8 * 2**20
"""Of the requests in one joined call."""
_MOST_ROWS_OF_ONE = 1024
"""A caller with more goes alone: joining would gain him nothing."""
_QUESTIONS_OF_A_TRIAL = 8
_ENOUGH_PROOF = 256
_PROOF_OF_AN_ANSWER = 16
"""A question that differs from the first of a trial counts so much if its answer does too, else 1:
models that look at all rows often give most of them one answer, right or not."""
_CALLS_UNTIL_A_CHECK = 256
_RELATIVE_TOLERANCE = 1e-6
_ABSOLUTE_TOLERANCE = 1e-9
_TOLERANCE_OF_SINGLES = 1e-4
"""Absolute and relative, of numbers that come from single precision."""
_BEYOND_INT64 = 2**63
_WIDEST_KEPT = 256
"""Values of a row; where null may be any of many, no two rows have the same types."""
_LIST, _FLOAT, _INT = {list}, {float}, {int}
_NESTED = frozenset((list, dict))
_PLAIN_NUMBERS = frozenset((int, float))

_UNKNOWN = object()

Answer = bytes | InputError | ModelError
"""The JSON for a caller, or why he gets none."""
_Answered = tuple[Answer, int]
"""With the rows of the call, if this is its first answer, else 0."""


@dataclass
class _Waiting:
    question: Question
    size: int
    ticket: Any
    key: Any = _UNKNOWN
    """Questions of the same key go together; None goes alone."""


@dataclass
class _Learnt:
    """What trials have shown of one function of the model."""

    apart: bool = False
    """Together, it has answered otherwise than alone."""
    proof: int = 0
    repeated: Question | None = None
    """Copies of this one were answered together as alone."""
    unchecked: int = 0
    """Joined calls since the last one that was checked."""
    quickest: float = math.inf
    """Seconds of the quickest call, which counts for less with each call since."""

    def most_rows(self) -> int:
        """Of a joined call."""
        return _MOST_ROWS_OF_A_QUICK_CALL if self.quickest < _QUICK_SECONDS else _MOST_ROWS

    def allows(self, questions: list[Question]) -> bool:
        """Whether these may go together without a trial."""
        if self.proof >= _ENOUGH_PROOF:
            return True
        known = self.repeated
        return known is not None and all(
            (question.body == known.body != b"") or _is_copy(question, known)
            for question in questions
        )


class Batcher:
    """Asks one model on behalf of many callers, the longest waiting first."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._queue: deque[_Waiting] = deque()
        self._learnt = {function: _Learnt() for function in FUNCTIONS}

    def __bool__(self) -> bool:
        """Whether anybody waits."""
        return bool(self._queue)

    @property
    def batching(self) -> bool:
        """Whether callers of predict go together, as far as is known."""
        return self._model.batching and not self._learnt["predict"].apart

    def put(self, question: Question, size: int, ticket: Any) -> None:
        """Let a caller wait: his question, the bytes of his request, and how to find him again."""
        self._queue.append(_Waiting(question, size, ticket))

    def answer_next(self) -> Iterator[tuple[Any, int, int, Answer]]:
        """Answer who waits longest and all who can go with him: ticket, rows, call's rows, answer.

        The rows of a call of the model are told once, with the first answer that came of it.
        """
        together = self._take()
        answers = self._answers([waiting.question for waiting in together])
        for waiting, (answer, call_rows) in zip(together, answers, strict=True):
            yield waiting.ticket, len(waiting.question.data), call_rows, answer

    def _take(self) -> list[_Waiting]:
        first = self._queue.popleft()
        together = [first]
        # Where nobody else waits, nobody needs to know with whom this one goes.
        if not self._queue or self._key(first) is None:
            return together
        most_rows = self._learnt[first.question.function].most_rows()
        rows, size = len(first.question.data), first.size
        others: list[_Waiting] = []
        while self._queue and rows < most_rows:
            waiting = self._queue.popleft()
            fits = (
                rows + len(waiting.question.data) <= most_rows
                and size + waiting.size <= _MOST_BYTES
            )
            if fits and self._key(waiting) == first.key:
                rows += len(waiting.question.data)
                size += waiting.size
                together.append(waiting)
            else:
                others.append(waiting)
        self._queue.extendleft(reversed(others))
        return together

    def _key(self, waiting: _Waiting) -> Any:
        """Its key, found out when it is asked for first."""
        question = waiting.question
        if not self._model.batching or self._learnt[question.function].apart:
            return None
        if waiting.key is _UNKNOWN:
            waiting.key = _key(
                question,
                alike=self._model.numbers_are_alike(question.data, question.dtype),
                arrays=self._model.makes_arrays and question.dtype is None,
            )
        return waiting.key

    def _answers(self, questions: list[Question]) -> list[_Answered]:
        if len(questions) == 1:
            return [self._alone(questions[0])]
        learnt = self._learnt[questions[0].function]
        answers: list[_Answered] = []
        while len(questions) > 1 and not learnt.apart:
            if learnt.allows(questions):
                return answers + self._together(questions)
            answers += self._both_ways(questions[:_QUESTIONS_OF_A_TRIAL])
            questions = questions[_QUESTIONS_OF_A_TRIAL:]
        return answers + [self._alone(question) for question in questions]

    def _alone(self, question: Question) -> _Answered:
        try:
            answer = _reply(question, self._predict(question, question.data))
        except (InputError, ModelError) as error:
            return error, 0
        return answer, len(question.data)

    def _together(self, questions: list[Question]) -> list[_Answered]:
        """One call. Where it fails, the halves apart, until whoever spoils it is alone."""
        if len(questions) == 1:
            return [self._alone(questions[0])]
        try:
            parts = self._parts(questions)
        except (InputError, ModelError):
            middle = len(questions) // 2
            return self._together(questions[:middle]) + self._together(questions[middle:])
        if parts is None or not self._passes_check(questions, parts):
            self._part_for_good(
                questions[0].function, "Those who were joined before may have got wrong answers."
            )
            return [self._alone(question) for question in questions]
        untold = sum(len(question.data) for question in questions)
        answers: list[_Answered] = []
        for question, part in zip(questions, parts, strict=True):
            try:
                answers.append((_reply(question, part), untold))
                untold = 0
            except (InputError, ModelError) as error:
                answers.append((error, 0))
        return answers

    def _passes_check(self, questions: list[Question], parts: list[Any]) -> bool:
        """Whether one of them, if it is time for a check, gets the same answer alone."""
        learnt = self._learnt[questions[0].function]
        learnt.unchecked += 1
        if learnt.unchecked < _CALLS_UNTIL_A_CHECK:
            return True
        learnt.unchecked = 0
        others = [n for n, one in enumerate(questions) if one.data != questions[0].data]
        number = others[-1] if others else 0
        answer, _ = self._alone(questions[number])
        # An error may be of this moment; it says nothing about the others.
        return not isinstance(answer, bytes) or self._say_the_same(
            [questions[number]], [parts[number]], [answer]
        )

    def _both_ways(self, questions: list[Question]) -> list[_Answered]:
        """Ask alone, and learn whether together says the same."""
        answers = [self._alone(question) for question in questions]
        good = [
            (question, answer)
            for question, (answer, _) in zip(questions, answers, strict=True)
            if isinstance(answer, bytes)
        ]
        if len(good) > 1:
            asked = [question for question, _ in good]
            try:
                parts = self._parts(asked)
            except (InputError, ModelError):
                parts = None
            if parts is not None and self._say_the_same(
                asked, parts, [answer for _, answer in good]
            ):
                self._count_as_proof(asked, parts)
            else:
                self._part_for_good(questions[0].function)
        return answers

    def _say_the_same(
        self, questions: list[Question], parts: list[Any], answers: list[bytes]
    ) -> bool:
        """Whether parts of a joined call are the answers that were given alone."""
        try:
            return all(
                _is_alike(json.loads(_reply(question, part)), json.loads(answer))
                for question, part, answer in zip(questions, parts, answers, strict=True)
            )
        except (InputError, ModelError):
            return False

    def _count_as_proof(self, questions: list[Question], parts: list[Any]) -> None:
        """Take a trial in which together said the same as alone for what it is worth."""
        first = questions[0]
        learnt = self._learnt[first.function]
        if all(question.data == first.data for question in questions):
            learnt.repeated = first
            return
        answer = _first_row(first, parts[0])
        for question, part in zip(questions, parts, strict=True):
            row = question.data[0]
            # Rows of NaN are never equal.
            if row not in first.data and repr(row) != repr(first.data[0]):
                differs = _first_row(first, part) != answer
                learnt.proof += _PROOF_OF_AN_ANSWER if differs else 1
        if learnt.proof >= _ENOUGH_PROOF:
            learnt.repeated = None

    def _parts(self, questions: list[Question]) -> list[Any] | None:
        """Each one's part of one prediction; None where it is not one item for each row."""
        rows = [row for question in questions for row in question.data]
        prediction = self._predict(questions[0], rows)
        try:
            return _cut(prediction, [len(question.data) for question in questions])
        except Exception as error:
            raise ModelError("The model's answer cannot be cut.") from error

    def _predict(self, question: Question, rows: list[Any]) -> Any:
        started = time.perf_counter()
        prediction = self._model.predict(rows, question.function, question.dtype, question.params)
        learnt = self._learnt[question.function]
        learnt.quickest = min(learnt.quickest * _FORGETTING, time.perf_counter() - started)
        return prediction

    def _part_for_good(self, function: str, warning: str = "") -> None:
        learnt = self._learnt[function]
        if not learnt.apart:
            learnt.apart, learnt.repeated = True, None
            sys.stderr.write(
                f"{function} does not answer row by row: its callers are asked one by one."
                f"{' ' * bool(warning)}{warning}\n"
            )


def _reply(question: Question, part: Any) -> bytes:
    try:
        return question.reply(part)
    except InputError:
        raise
    except NoJsonFormError as error:
        raise ModelError(str(error)) from error
    except Exception as error:
        # Of the model's own objects, asked what they hold.
        raise ModelError(
            f"The model's answer has no JSON form ({type(error).__name__}: {error})."
        ) from error


def _first_row(question: Question, part: Any) -> bytes | None:
    """What the caller would be told of the first row of a part, his own or another's."""
    try:
        return _reply(question, _rows(part, 0, 1))
    except (InputError, ModelError):
        return None


def _is_copy(question: Question, known: Question) -> bool:
    """Whether they are one question; to Python, 1, 1.0 and True are equal."""
    return (
        question.dtype == known.dtype
        and question.data == known.data
        and repr(question.data) == repr(known.data)
    )


def _key(question: Question, *, alike: bool, arrays: bool) -> Any:
    """What questions must share to go together; None where one has to go alone.

    With `alike`, whole numbers go with floats; with `arrays`, where there is a float beside them in
    the question, which makes them floats alone as well.
    """
    rows = question.data
    if question.params or len(rows) > _MOST_ROWS_OF_ONE:
        return None
    try:
        kinds = _kinds_of_table(rows, alike, arrays)
        if kinds is None:
            kinds = frozenset([_kind(row, alike) for row in rows])
    except (OverflowError, RecursionError):
        return None
    return question.function, question.dtype, kinds


def _kinds_of_table(rows: list[Any], alike: bool, arrays: bool) -> frozenset[Any] | None:
    """The kinds of rows of numbers, all of one length; looked at as a whole.

    None where each row has to be looked at.
    """
    if set(map(type, rows)) != _LIST or len(set(map(len, rows))) > 1:
        return None
    width = len(rows[0])
    types = set(map(type, chain.from_iterable(rows)))
    if types <= _PLAIN_NUMBERS and (alike or types == _FLOAT or (arrays and float in types)):
        return frozenset([(float,) * width])
    if types and types <= _PLAIN_NUMBERS:
        values = list(chain.from_iterable(rows))
        if _are_small(min(values), max(values)):
            if types == _INT:
                return frozenset([(int,) * width])
            # One iterator, as many times as a row has values: a row's types at a time.
            return frozenset(zip(*[map(type, values)] * width, strict=True))
    return None


def _kind(value: Any, alike: bool) -> Any:
    """What decides the type that a value gets in an array or a data frame.

    With `alike`, whole numbers are floats. Else raises OverflowError for those beyond 64 bits with
    a sign: what they become depends on their neighbours.
    """
    if isinstance(value, list):
        types = tuple(map(type, value))
        if alike and _NESTED.isdisjoint(types):
            return _known_without_int(types) if len(types) <= _WIDEST_KEPT else _without_int(types)
        if (
            types
            and not alike
            and _PLAIN_NUMBERS.issuperset(types)
            and (int not in types or _are_small(min(value), max(value)))
        ):
            return types
        return tuple([_kind(item, alike) for item in value])
    if isinstance(value, dict):
        return tuple([(key, _kind(item, alike)) for key, item in value.items()])
    if type(value) is int:
        if alike:
            return float
        if not _are_small(value, value):
            raise OverflowError
    return type(value)


def _are_small(smallest: float, largest: float) -> bool:
    """Whether numbers from one to the other are whole ones of 64 bits, where they are whole."""
    return smallest >= -_BEYOND_INT64 and largest < _BEYOND_INT64


def _without_int(types: tuple[type, ...]) -> tuple[type, ...]:
    return tuple([float if one is int else one for one in types])


_known_without_int = lru_cache(maxsize=1024)(_without_int)


def _cut(prediction: Any, lengths: list[int]) -> list[Any] | None:
    """Parts of these lengths; None where they are not all of it."""
    if hasattr(prediction, "tocsr"):
        # Of the sparse matrices, not all can be cut.
        prediction = prediction.tocsr()
    if _length(prediction) != sum(lengths):
        return None
    ends = list(accumulate(lengths, initial=0))
    return [_rows(prediction, start, end) for start, end in pairwise(ends)]


def _rows(prediction: Any, start: int, end: int) -> Any:
    return getattr(prediction, "iloc", prediction)[start:end]


def _length(prediction: Any) -> int | None:
    if isinstance(prediction, list):
        return len(prediction)
    shape = getattr(prediction, "shape", None)
    return shape[0] if isinstance(shape, tuple) and shape else None


def _is_alike(one: Any, other: Any) -> bool:
    """Whether two answers say the same; numbers may differ by how their sums were ordered."""
    if isinstance(one, float) and isinstance(other, int | float):
        if _are_singles(one, other):
            tolerance = _TOLERANCE_OF_SINGLES
            return math.isclose(one, other, rel_tol=tolerance, abs_tol=tolerance)
        return math.isclose(one, other, rel_tol=_RELATIVE_TOLERANCE, abs_tol=_ABSOLUTE_TOLERANCE)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_is_alike, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(
            _is_alike(item, other[key]) for key, item in one.items()
        )
    return bool(one == other)


def _are_singles(*numbers: float) -> bool:
    """Whether they have no more digits than single precision, and are not both whole."""
    try:
        return any(number % 1 for number in numbers) and all(
            _SINGLE.unpack(_SINGLE.pack(number))[0] == number for number in numbers
        )
    except OverflowError:
        return False


_SINGLE = struct.Struct("f")
