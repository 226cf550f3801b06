"""Pauses between tries, each twice as long as the one before."""

from dataclasses import dataclass

_MOST_DOUBLINGS = 30


@dataclass(frozen=True)
class Backoff:
    """The first pause and the longest one, in seconds."""

    first: float
    longest: float

    def pause(self, failures: int) -> float:
        """How long to wait after so many failures in a row, one at least."""
        return min(self.first * 2.0 ** min(failures - 1, _MOST_DOUBLINGS), self.longest)
