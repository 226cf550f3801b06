"""What ODSP's server does beside being fast: one truth, callers apart, aliases that move."""

from __future__ import annotations

import json
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

from bench.serving import load
from bench.serving.client import call, post
from bench.serving.registry import Registry
from bench.serving.systems import NATIVE, Place, Rows, System

#: The longest that a model's first load may take (seconds).
LOADED_S = 300
ASKED = 40
ROUNDS = 20
#: Callers at once; one of them sends rows of the wrong width.
CALLERS = 8
MOVES = 3
#: Load before the first move and after each, beside the time until it is noticed (seconds).
PAUSE_S = 3
CONNECTIONS = 64
#: The longest that a moved alias may go unnoticed before the move counts as failed (seconds).
NOTICED_S = 30
#: Of the load that goes on meanwhile; it is ended when the moves are done (seconds).
LONGEST_LOAD_S = 240


def one_truth(place: Place, rows: Rows, answers: list[int]) -> dict[str, int]:
    """Of 40 each: wrong lists after a load and after a DELETE, wrong answers after the DELETE.

    Every request has a connection of its own, so that all workers are asked. An answer after the
    DELETE is right when it predicts: a POST loads on first use.
    """
    base = f"http://127.0.0.1:{place.port}"
    model = f"{base}/{place.model}/sklearn/1"
    call(f"{base}/load_model/{place.model}/sklearn/1", timeout=LOADED_S)
    lacking = sum(_states(base, place.model) != ["ready"] for _ in range(ASKED))
    call(model, method="DELETE", timeout=60)
    lingering = sum(_states(base, place.model) != [] for _ in range(ASKED))
    question = json.dumps(NATIVE.question(rows[:1])).encode()
    wrong = 0
    for _ in range(ASKED):
        status, answer = post(f"{base}/{place.model}/1", question)
        wrong += status != 200 or NATIVE.classes(answer) != answers[:1]
    return {
        "asked": ASKED,
        "wrong_after_load": lacking,
        "wrong_after_delete": lingering,
        "wrong_answers_after_delete": wrong,
    }


def one_bad_caller(place: Place, model: str, rows: Rows, answers: list[int]) -> dict[str, int]:
    """Of 140 good callers, how many one bad caller at the same moment failed; 20 rounds of 8."""
    url = f"http://127.0.0.1:{place.port}/{model}/1"
    call(url, json.dumps(NATIVE.question(rows[:1])).encode(), timeout=LOADED_S)
    bad = json.dumps(NATIVE.question([[0.0] * 5])).encode()
    together = Barrier(CALLERS)

    def ask(caller: int) -> tuple[int, Any]:
        together.wait(timeout=60)
        if caller == CALLERS // 2:
            return post(url, bad)
        return post(url, json.dumps(NATIVE.question([rows[caller]])).encode())

    good = failed = accepted = 0
    with ThreadPoolExecutor(CALLERS) as callers:
        for _ in range(ROUNDS):
            for caller, (status, answer) in enumerate(callers.map(ask, range(CALLERS))):
                if caller == CALLERS // 2:
                    accepted += not 400 <= status < 500
                else:
                    good += 1
                    failed += status != 200 or NATIVE.classes(answer) != [answers[caller]]
    return {"good_callers": good, "failed": failed, "bad_callers_not_told": accepted}


def alias_moves(
    place: Place, system: System, registry: Registry
) -> dict[str, int | list[float | None]]:
    """Requests failed while an alias moves between two versions under load of 64 connections."""
    registry.set_alias(place.model, "bench", 1)
    url = f"http://127.0.0.1:{place.port}/{place.model}/bench"
    question = system.body(registry.rows[:1])
    body = place.folder / "alias.body"
    body.write_bytes(question)
    right = {1: registry.answers[place.model][0]}
    # Version 2 adds ten to every class.
    right[2] = right[1] + 10
    call(url, question, timeout=LOADED_S)
    wrk = load.start(url, body, CONNECTIONS, LONGEST_LOAD_S)
    noticed: list[float | None] = []
    try:
        time.sleep(PAUSE_S)
        for move in range(MOVES):
            version = 2 - move % 2
            registry.set_alias(place.model, "bench", version)
            noticed.append(_seconds_until(url, question, right[version]))
            time.sleep(PAUSE_S)
    finally:
        wrk.send_signal(signal.SIGINT)
        figures = load.read(wrk)
    return {
        "requests": int(figures["requests"]),
        "failed": int(figures["errors"]),
        "seconds_until_noticed": noticed,
    }


def _seconds_until(url: str, question: bytes, wanted: int) -> float | None:
    """Until an answer is the wanted class; None if it never is."""
    started = time.monotonic()
    while (passed := time.monotonic() - started) < NOTICED_S:
        status, answer = post(url, question)
        if status == 200 and NATIVE.classes(answer) == [wanted]:
            return round(passed, 1)
        time.sleep(0.1)
    return None


def _states(base: str, model: str) -> list[str]:
    """Of every loaded version of a model."""
    entries = call(f"{base}/loaded_models", timeout=30)
    return [entry["state"] for entry in entries if entry["model_name"] == model]
