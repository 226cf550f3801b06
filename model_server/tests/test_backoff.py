from model_server.backoff import Backoff


def test_pauses_double_up_to_the_longest_one() -> None:
    backoff = Backoff(first=1, longest=60)
    assert [backoff.pause(failures) for failures in range(1, 9)] == [1, 2, 4, 8, 16, 32, 60, 60]
    # A week of failures.
    assert backoff.pause(10_000) == 60
