from model_server.errors import STATUS_CODES, ModelServerError


def test_every_error_has_its_status() -> None:
    assert set(ModelServerError.__subclasses__()) == set(STATUS_CODES)
    assert all(400 <= status < 600 for status in STATUS_CODES.values())
