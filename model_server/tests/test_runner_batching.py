import json
import math
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model_server.runner import batching
from model_server.runner.batching import Answer, Batcher
from model_server.runner.inputs import InputError, model_input
from model_server.runner.model import Model, ModelError
from model_server.runner.native import read_native
from model_server.runner.open_inference import read_inference
from model_server.runner.question import FUNCTIONS, Question
from model_server.runner.values import to_json

BAD = -1
TRIALS = 24
"""Questions, each with an answer of its own, after which a model is known to answer row by row."""


class Doubling(Model):
    """Doubles an array; refuses what holds BAD. Counts how often it is called."""

    def __init__(self, *, numbers_are_alike: bool = False) -> None:
        self.calls: list[int] = []
        self.lists_become_floats = self.records_become_floats = numbers_are_alike
        self.makes_arrays = True

    def ask(
        self, data: list[Any], function: str, dtype: str | None, params: dict[str, Any] | None
    ) -> Any:
        self.calls.append(len(data))
        rows = model_input(data, dtype=dtype)
        if any(BAD in (row.values() if isinstance(row, dict) else row) for row in data):
            raise ValueError("a bad row")
        return self.answer(rows)

    def answer(self, rows: Any) -> Any:
        return rows + rows


class Custom(Doubling):
    """Answers what the test says."""

    def __init__(self, answer: Callable[[Any], Any]) -> None:
        super().__init__()
        self._answer = answer

    def answer(self, rows: Any) -> Any:
        return self._answer(rows)


def _question(data: list[Any], **options: Any) -> Question:
    asked = {"function": "predict", "dtype": None, "params": None, "reply": to_json} | options
    return Question(data, **asked)


def _ask(
    batcher: Batcher, questions: list[Question], calls: list[int] | None = None
) -> list[Answer]:
    """The answers to questions that all wait before the first is answered.

    The rows of the calls that were told with them are put into `calls`.
    """
    for number, question in enumerate(questions):
        batcher.put(question, 100, number)
    answers: dict[int, Answer] = {}
    while batcher:
        for number, rows, call_rows, answer in batcher.answer_next():
            assert number not in answers
            assert rows == len(questions[number].data)
            answers[number] = answer
            if call_rows and calls is not None:
                calls.append(call_rows)
    return [answers[number] for number in range(len(questions))]


def _told(answer: Answer) -> Any:
    return json.loads(answer) if isinstance(answer, bytes) else (type(answer), str(answer))


def _proven(model: Model) -> Batcher:
    """A batcher that knows of its model that it answers row by row."""
    batcher = Batcher(model)
    for function in FUNCTIONS:
        _ask(batcher, [_question([[n, n]], function=function) for n in range(TRIALS)])
    return batcher


_VALUES = st.one_of(
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False, width=32),
    st.text("ab1", max_size=3),
    st.booleans(),
    st.none(),
    st.just(BAD),
)
_ROWS = st.one_of(
    st.lists(st.lists(_VALUES, min_size=1, max_size=3), max_size=3),
    st.lists(st.fixed_dictionaries({"a": _VALUES, "b": _VALUES}), min_size=1, max_size=3),
    st.integers(1, 2).flatmap(
        lambda width: st.lists(
            st.lists(st.integers(0, 9), min_size=width, max_size=width), min_size=1, max_size=3
        )
    ),
)
_QUESTIONS = st.lists(
    st.builds(
        _question,
        _ROWS,
        function=st.sampled_from(["predict", "predict_proba"]),
        dtype=st.sampled_from([None, None, "float64", "str", "nonsense"]),
        params=st.sampled_from([None, {}, {"a": 1}]),
    ),
    max_size=12,
)


@settings(deadline=None)  # the first one imports numpy
@given(questions=_QUESTIONS)
def test_each_caller_gets_what_he_would_get_alone(questions: list[Question]) -> None:
    """Whoever asks beside him, and whatever is wrong with the others."""
    together = _ask(_proven(Doubling()), questions)
    alone = [_ask(Batcher(Doubling()), [question])[0] for question in questions]
    # As texts, for 1 and 1.0 are equal.
    assert list(map(repr, together)) == list(map(repr, alone))


_EDGES = st.sampled_from([0, 1.0, -(2**63), 2**63, 2**63 + 1, 2**64, 1e300, math.nan])
_TABLES = st.builds(
    lambda values, width: [values[n : n + width] for n in range(0, len(values), width)],
    st.sampled_from(
        [st.integers(0, 9), st.floats(0, 9), st.integers(0, 9) | st.floats() | _EDGES]
    ).flatmap(lambda values: st.lists(values, min_size=12, max_size=12)),
    # With 5, the last row is a shorter one.
    st.sampled_from([1, 2, 3, 4, 5, 6]),
)


@given(rows=_TABLES, alike=st.booleans(), arrays=st.booleans())
def test_a_table_has_the_kinds_of_its_rows(
    rows: list[list[float]], alike: bool, arrays: bool
) -> None:
    kinds = batching._kinds_of_table(rows, alike, arrays)
    # In an array, one float is enough.
    alike = alike or (arrays and any(type(value) is float for row in rows for value in row))
    if kinds is not None:
        assert kinds == {tuple([batching._kind(value, alike) for value in row]) for row in rows}


def test_numbers_beside_a_float_go_with_others_floats_in_an_array() -> None:
    """Some clients write 5.0 as 5, wherever it comes."""
    model = Doubling()
    batcher = _proven(model)
    model.calls.clear()
    _ask(batcher, [_question([row]) for row in ([5, 0.5], [0.5, 5], [1.5, 0.5])])
    assert model.calls == [3]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([20095], [20095.0]),
        ([1], [True]),
        ([1.0], [True]),
        ([2**63 + 1], [-(2**63)]),
        ({"a": 7}, {"a": 7.0}),
    ],
)
def test_equal_values_of_other_types_are_other_questions(one: Any, other: Any) -> None:
    """Together, the one would become what the other is."""
    questions = [_question([one]), _question([other])]
    texts = Custom(lambda rows: rows.map(str) if hasattr(rows, "map") else rows.astype(str))
    alone = [_ask(Batcher(texts), [question])[0] for question in questions]
    for batcher in (Batcher(texts), _proven(texts)):
        # Both wait beside a copy, which is what equal questions are joined by.
        for question in questions:
            _ask(batcher, [question, question])
        assert _ask(batcher, questions) == alone


def test_a_question_of_other_types_is_no_copy() -> None:
    """Where a model casts them they may go together; but it has not been tried."""
    model = Doubling(numbers_are_alike=True)
    batcher = Batcher(model)
    _ask(batcher, 2 * [_question([[1]])])
    model.calls.clear()
    _ask(batcher, [_question([[1]]), _question([[1.0]])])
    assert model.calls == [1, 1, 2]


@settings(deadline=None)
@given(
    data=st.lists(
        st.lists(
            st.lists(st.one_of(st.integers(0, 2**40), st.floats(0, 1e9)), min_size=2, max_size=2),
            min_size=1,
            max_size=3,
        ),
        min_size=1,
        max_size=12,
    )
)
def test_whole_numbers_go_with_others_where_the_model_casts_them(
    data: list[list[list[float]]],
) -> None:
    model = Doubling(numbers_are_alike=True)
    batcher = _proven(model)
    model.calls.clear()
    answers = _ask(batcher, [_question(rows) for rows in data])
    assert model.calls == [sum(map(len, data))]
    for answer, rows in zip(answers, data, strict=True):
        assert _told(answer) == [[2 * value for value in row] for row in rows]


def test_one_bad_caller_fails_alone_and_costs_few_calls() -> None:
    model = Doubling()
    batcher = _proven(model)
    model.calls.clear()
    answers = _ask(batcher, [_question([[BAD if n == 70 else n]]) for n in range(140)])
    assert model.calls[0] == 140
    assert len(model.calls) <= 2 * math.ceil(math.log2(140)) + 1
    assert isinstance(answers[70], InputError)
    assert [_told(answer) for n, answer in enumerate(answers) if n != 70] == [
        [[2 * n]] for n in range(140) if n != 70
    ]


@pytest.mark.parametrize(
    "answer",
    [
        lambda rows: rows.sum(),
        lambda rows: {"doubled": (rows + rows).tolist()},
        lambda rows: [1, 2],
        lambda rows: rows - rows.mean(),
        lambda rows: "one",
    ],
    ids=["number", "record", "always two", "of its neighbours", "text"],
)
def test_a_model_that_does_not_answer_row_by_row_is_asked_one_by_one(
    answer: Callable[[Any], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    model = Custom(answer)
    batcher = Batcher(model)
    questions = [_question([[float(n)]]) for n in range(12)]
    alone = [_told(_ask(Batcher(Custom(answer)), [question])[0]) for question in questions]
    assert list(map(_told, _ask(batcher, questions))) == alone
    assert not batcher.batching
    model.calls.clear()
    assert list(map(_told, _ask(batcher, questions))) == alone
    # It has been learnt: no more call in vain.
    assert model.calls == 12 * [1]
    assert capsys.readouterr().err.count("one by one") == 1


def test_a_model_that_stops_answering_row_by_row_is_noticed() -> None:
    model = Custom(lambda rows: rows)
    batcher = _proven(model)
    model._answer = lambda rows: rows.sum()
    questions = [_question([[n]]) for n in range(3)]
    assert list(map(_told, _ask(batcher, questions))) == [0, 1, 2]
    assert not batcher.batching


def _centred(rows: Any) -> Any:
    return rows - rows.mean()


def test_what_equal_questions_have_shown_is_not_believed_of_others() -> None:
    batcher = Batcher(Custom(_centred))
    # Of equal rows, each is the mean, in whatever company.
    assert list(map(_told, _ask(batcher, 2 * [_question([[1.0]])]))) == 2 * [[[0.0]]]
    assert batcher.batching
    answers = _ask(batcher, [_question([[1.0]]), _question([[5.0]])])
    assert list(map(_told, answers)) == 2 * [[[0.0]]]
    assert not batcher.batching


@settings(deadline=None)
@given(
    groups=st.lists(
        st.lists(
            st.lists(st.sampled_from([[1.0], [5.0], [math.nan]]), min_size=1, max_size=2),
            min_size=1,
            max_size=4,
        ),
        max_size=20,
    ),
    answer=st.sampled_from(
        [
            _centred,
            lambda rows: rows - rows[0],
            lambda rows: rows + len(rows),
            lambda rows: rows / rows.sum(),
            lambda rows: rows.cumsum(),
            lambda rows: rows[::-1],
        ]
    ),
)
def test_nobody_gets_an_answer_that_depends_on_others(
    groups: list[list[list[list[float]]]], answer: Callable[[Any], Any]
) -> None:
    batcher = Batcher(Custom(answer))
    for group in groups:
        # Of NaN, no two are one, as when they come in binary tensors.
        questions = [_question([[value + 0.0 for value in row] for row in rows]) for rows in group]
        alone = [_ask(Batcher(Custom(answer)), [question])[0] for question in questions]
        assert list(map(_told, _ask(batcher, questions))) == list(map(_told, alone))


def test_equal_questions_go_together_after_one_trial() -> None:
    model = Doubling()
    batcher = Batcher(model)
    questions = [_question([[7, 7]]) for _ in range(20)]
    for calls in (8 * [1] + [8, 12], [20]):
        model.calls.clear()
        assert list(map(_told, _ask(batcher, questions))) == 20 * [[[14, 14]]]
        assert model.calls == calls
    model.calls.clear()
    _ask(batcher, [_question([[7, 7]]), _question([[7, 8]])])
    assert model.calls == [1, 1, 2]


@pytest.mark.parametrize(
    ("answer", "questions"),
    [(lambda rows: rows, TRIALS), (lambda rows: [0] * len(rows), 300)],
    ids=["answers of their own", "one answer for all"],
)
def test_it_takes_several_trials_to_be_trusted(
    answer: Callable[[Any], Any], questions: int
) -> None:
    model = Custom(answer)
    batcher = Batcher(model)
    for number in range(questions // 2):
        _ask(batcher, [_question([[n, n]]) for n in (2 * number, 2 * number + 1)])
    assert model.calls == questions // 2 * [1, 1, 2]
    model.calls.clear()
    for _ in range(20):
        _ask(batcher, [_question([[n, n]]) for n in range(8)])
    assert model.calls[:9] == 8 * [1] + [8]
    assert model.calls[-2:] == [8, 8]


def test_one_call_in_some_hundreds_is_checked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(batching, "_CALLS_UNTIL_A_CHECK", 3)
    model = Custom(lambda rows: rows)
    batcher = _proven(model)
    model.calls.clear()
    questions = [_question([[float(n)]]) for n in range(5)]
    for _ in range(6):
        assert list(map(_told, _ask(batcher, questions))) == [[[n]] for n in range(5)]
    assert model.calls == 2 * [5, 5, 5, 1]
    model._answer = _centred
    for _ in range(2):
        _ask(batcher, questions)
    model.calls.clear()
    assert list(map(_told, _ask(batcher, questions))) == 5 * [[[0.0]]]
    assert model.calls == [5, 1] + 5 * [1]
    assert not batcher.batching
    assert "may have got wrong answers" in capsys.readouterr().err


def test_an_error_of_the_moment_is_no_answer_to_a_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "_CALLS_UNTIL_A_CHECK", 1)
    model = Custom(lambda rows: rows)
    batcher = _proven(model)

    def hiccup(rows: Any) -> Any:
        if len(rows) == 1:
            raise OSError("away")
        return rows

    model._answer = hiccup
    answers = _ask(batcher, [_question([[n]]) for n in range(3)])
    assert list(map(_told, answers)) == [[[n]] for n in range(3)]
    assert batcher.batching


@pytest.mark.parametrize(("precision", "alike"), [("float32", True), ("float64", False)])
@pytest.mark.parametrize(
    "answer",
    [lambda rows: rows / 3 * (1 + len(rows) * 3e-6), lambda rows: rows * 0 + (len(rows) - 1) / 1e6],
    ids=["relative", "beside zero"],
)
def test_the_order_of_sums_is_no_difference(
    answer: Callable[[Any], Any], precision: str, alike: bool
) -> None:
    """Single precision has fewer digits, so more of them may differ."""
    batcher = Batcher(Custom(lambda rows: answer(rows).astype(precision)))
    _ask(batcher, [_question([[n, n]]) for n in range(8)])
    assert batcher.batching == alike


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_whole_numbers_differ_by_one(precision: str) -> None:
    batcher = Batcher(Custom(lambda rows: (rows + 1e5 + len(rows)).astype(precision)))
    _ask(batcher, [_question([[n, n]]) for n in range(8)])
    assert not batcher.batching


def test_the_types_of_wide_rows_are_not_kept() -> None:
    """Rows with null here and there have types of their own, each as large as the row."""
    batcher = Batcher(Doubling(numbers_are_alike=True))
    before = batching._known_without_int.cache_info().currsize
    for number in range(10):
        row: list[Any] = 1000 * [1.0]
        row[number] = None
        batcher.put(_question([row]), 1000, number)
    while batcher:
        list(batcher.answer_next())
    assert batching._known_without_int.cache_info().currsize == before


def test_a_model_may_opt_out() -> None:
    model = Doubling()
    model.batching = False
    batcher = Batcher(model)
    assert not batcher.batching
    _ask(batcher, [_question([[n]]) for n in range(3)])
    assert model.calls == [1, 1, 1]


@pytest.mark.parametrize(
    ("rows", "calls", "told"),
    [
        ([1, 2, 3], [6], [6]),
        # Of the calls that failed, nobody has an answer.
        ([1, 2, BAD, 1], [1 + 2 + 1 + 1, 3, 2, 1, 1], [3, 1]),
    ],
)
def test_a_call_is_told_once_of_which_an_answer_came(
    rows: list[int], calls: list[int], told: list[int]
) -> None:
    model = Doubling()
    batcher = _proven(model)
    model.calls.clear()
    questions = [_question([[BAD, 0]] if n == BAD else n * [[n, n]]) for n in rows]
    counted: list[int] = []
    _ask(batcher, questions, counted)
    assert model.calls == calls
    assert counted == told


def test_params_and_many_rows_go_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "_MOST_ROWS_OF_ONE", 3)
    model = Doubling()
    batcher = _proven(model)
    model.calls.clear()
    many, some = [[1, 1]] * 4, [[1, 1]] * 2
    _ask(batcher, [_question(many), _question(some), _question(some, params={"a": 1})])
    assert model.calls == [4, 2, 2]


def test_a_batch_has_a_largest_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "_QUICK_SECONDS", 0)
    model = Doubling()
    batcher = _proven(model)
    questions = [_question([[n, n]]) for n in range(5)]
    for limit, size in (("_MOST_ROWS", 2), ("_MOST_BYTES", 299)):
        with monkeypatch.context() as patched:
            patched.setattr(batching, limit, size)
            model.calls.clear()
            answers = _ask(batcher, questions)
        assert model.calls == [2, 2, 1]
        assert list(map(_told, answers)) == [[[2 * n, 2 * n]] for n in range(5)]


class Timed(Doubling):
    """Takes as long as it says, by a clock that nothing else moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self._now = 0.0
        monkeypatch.setattr(batching, "time", SimpleNamespace(perf_counter=lambda: self._now))

    def answer(self, rows: Any) -> Any:
        self._now += self.seconds
        return super().answer(rows)


@pytest.mark.parametrize(("seconds", "calls"), [(0.0002, [200, 200, 200]), (0.0003, [600])])
def test_quick_calls_are_of_fewer_rows(
    monkeypatch: pytest.MonkeyPatch, seconds: float, calls: list[int]
) -> None:
    """Where a call as such costs little, others need not wait until a large one is done."""
    model = Timed(monkeypatch, seconds)
    batcher = _proven(model)
    model.calls.clear()
    _ask(batcher, [_question([[n, row] for row in range(100)]) for n in range(6)])
    assert model.calls == calls


def test_who_asks_for_many_rows_keeps_nobody_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Timed(monkeypatch, 0.0001)
    batcher = _proven(model)
    model.calls.clear()
    _ask(batcher, [_question([[n, row] for row in range(1 + 999 * (n % 2))]) for n in range(10)])
    assert model.calls == [5, *(5 * [1000])]


def test_one_quick_call_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a model that knew an answer already."""
    model = Timed(monkeypatch, 0.001)
    batcher = _proven(model)
    questions = [_question([[n, row] for row in range(100)]) for n in range(6)]
    model.seconds = 0.00001
    _ask(batcher, questions[:1])
    model.seconds = 0.001
    for _ in range(200):
        _ask(batcher, questions[:1])
    model.calls.clear()
    _ask(batcher, questions)
    assert model.calls == [600]


def test_parts_of_data_frames_and_of_sparse_matrices() -> None:
    import pandas as pd
    from scipy.sparse import coo_matrix

    for answer, expected in (
        (lambda rows: pd.DataFrame({"x": rows[:, 0]}), lambda n: [{"x": n}]),
        (lambda rows: pd.Series(rows[:, 0]), lambda n: [n]),
        (coo_matrix, lambda n: [[n, n]]),
        (lambda rows: rows[:, 0].tolist(), lambda n: [n]),
    ):
        model = Custom(answer)
        batcher = _proven(model)
        model.calls.clear()
        answers = _ask(batcher, [_question([[n, n]]) for n in range(5)])
        assert model.calls == [5]
        assert list(map(_told, answers)) == [expected(n) for n in range(5)]


class Stubborn:
    """An answer of so many rows that can be neither cut nor told."""

    def __init__(self, rows: int) -> None:
        self.shape = (rows,)

    def __getitem__(self, rows: slice) -> Any:
        raise NotImplementedError("no slices")

    def tolist(self) -> Any:
        raise TypeError("got an unsupported type")


def _endless(rows: Any) -> list[Any]:
    answer: list[Any] = []
    answer.append(answer)
    return answer


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (lambda rows: Stubborn(len(rows)), "no JSON form .TypeError: got an unsupported type"),
        (_endless, "deep|RecursionError"),
    ],
)
@pytest.mark.parametrize(
    ("read", "body"),
    [
        (read_native, b'{"data": [[1.5]]}'),
        (
            read_inference,
            b'{"inputs": [{"name": "x", "shape": [1, 1], "datatype": "FP64", "data": [1.5]}]}',
        ),
    ],
)
def test_an_answer_that_cannot_be_told_is_an_error_of_the_model(
    read: Callable[[bytes], Question], body: bytes, answer: Callable[[Any], Any], sentence: str
) -> None:
    """The process goes on, whatever the answer's own methods do."""
    answers = _ask(Batcher(Custom(answer)), [read(body) for _ in range(3)])
    assert [type(one) for one in answers] == 3 * [ModelError]
    assert re.search(sentence, str(answers[0]))


def test_an_answer_that_cannot_be_cut_is_no_trial_passed() -> None:
    class Whole(Stubborn):
        def tolist(self) -> Any:
            return self.shape[0] * [1]

    batcher = Batcher(Custom(lambda rows: Whole(len(rows))))
    assert list(map(_told, _ask(batcher, [_question([[n]]) for n in range(3)]))) == 3 * [[1]]
    assert not batcher.batching


def test_an_answer_without_json_form_is_an_error_of_its_caller_only() -> None:
    model = Custom(lambda rows: rows)
    batcher = _proven(model)
    model._answer = lambda rows: [object() if row[0] == 7 else 1 for row in rows]
    calls: list[int] = []
    answers = _ask(batcher, [_question([[n, n]]) for n in (7, 6, 8)], calls)
    assert [_told(answers[1]), _told(answers[2])] == [[1], [1]]
    assert isinstance(answers[0], ModelError)
    assert "no JSON form" in str(answers[0])
    # The call is told by the first who gets his part of it.
    assert calls == [3]
