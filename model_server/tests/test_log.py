import json
import logging

from model_server.log import JsonFormatter


def test_a_record_is_one_line_of_json() -> None:
    record = logging.makeLogRecord(
        {"name": "here", "msg": "two\n%s", "args": ("lines",), "model": "iris", "levelname": "INFO"}
    )
    line = JsonFormatter().format(record)
    assert "\n" not in line
    content = json.loads(line)
    assert content.pop("time").endswith("+00:00")
    assert content == {
        "level": "info",
        "logger": "here",
        "message": "two\nlines",
        "model": "iris",
    }


def test_an_exception_is_part_of_its_line() -> None:
    try:
        int("no")
    except ValueError as error:
        information = (type(error), error, error.__traceback__)
    line = JsonFormatter().format(logging.makeLogRecord({"exc_info": information}))
    assert "ValueError: invalid literal" in json.loads(line)["exception"]
