import json
import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model_server.runner import batching
from model_server.runner.batching import Answer, Batcher
from model_server.runner.inputs import InputError, model_input
from model_server.runner.model import Model, ModelError
from model_server.runner.question import Question
from model_server.runner.values import to_json

BAD = -1


class Doubling(Model):
    """Doubles an array; refuses what holds BAD. Counts how often it is called."""

    def __init__(self, *, numbers_are_alike: bool = False) -> None:
        self.calls: list[int] = []
        self.numbers_are_alike = numbers_are_alike

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


def _ask(batcher: Batcher, questions: list[Question]) -> list[Answer]:
    """The answers to questions that all wait before the first is answered."""
    for number, question in enumerate(questions):
        batcher.put(question, 100, number)
    answers: dict[int, Answer] = {}
    while batcher:
        for number, rows, answer in batcher.answer_next():
            assert number not in answers
            assert rows == len(questions[number].data)
            answers[number] = answer
    return [answers[number] for number in range(len(questions))]


def _told(answer: Answer) -> Any:
    return json.loads(answer) if isinstance(answer, bytes) else (type(answer), str(answer))


def _proven(model: Model) -> Batcher:
    """A batcher that knows of its model that it answers row by row."""
    batcher = Batcher(model)
    for function in ("predict", "predict_proba"):
        _ask(batcher, [_question([[n, n]], function=function) for n in range(2)])
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
    assert list(map(_told, together)) == list(map(_told, alone))


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
    assert batcher.batching
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
    answers_rows = True
    model = Custom(lambda rows: rows if answers_rows else rows.sum())
    batcher = _proven(model)
    answers_rows = False
    questions = [_question([[n]]) for n in range(3)]
    assert list(map(_told, _ask(batcher, questions))) == [0, 1, 2]
    assert not batcher.batching


def test_a_model_may_opt_out() -> None:
    model = Doubling()
    model.batching = False
    batcher = Batcher(model)
    assert not batcher.batching
    _ask(batcher, [_question([[n]]) for n in range(3)])
    assert model.calls == [1, 1, 1]


def test_params_and_many_rows_go_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "_MOST_ROWS_OF_ONE", 3)
    model = Doubling()
    batcher = _proven(model)
    model.calls.clear()
    many, some = [[1, 1]] * 4, [[1, 1]] * 2
    _ask(batcher, [_question(many), _question(some), _question(some, params={"a": 1})])
    assert model.calls == [4, 2, 2]


def test_a_batch_has_a_largest_size(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_an_answer_without_json_form_is_an_error_of_its_caller_only() -> None:
    model = Custom(lambda rows: [object() if row[0] == 7 else 1 for row in rows])
    answers = _ask(_proven(model), [_question([[n, n]]) for n in (6, 7, 8)])
    assert [_told(answers[0]), _told(answers[2])] == [[1], [1]]
    assert isinstance(answers[1], ModelError)
    assert "no JSON form" in str(answers[1])
