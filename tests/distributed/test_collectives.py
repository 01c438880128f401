"""Messages between ranks: values, shared errors, one connection per job, and the name of a lost rank."""

import os
import threading
from pathlib import Path

import ranks

from nanochat import distributed, jsonl
from nanochat.config import UserError


def exchange() -> list[object]:
    here = distributed.init("cpu")
    group, background = distributed.control_group(), distributed.control_group(background=True)
    assert group is distributed.control_group() and group.group is not background.group
    in_thread: list[object] = []

    def gather_in_thread() -> None:
        in_thread.extend(distributed.all_gather_object(i + here.rank, group=background) for i in range(50))

    # Two threads communicate at the same time, each in its own order.
    thread = threading.Thread(target=gather_in_thread)
    thread.start()
    assert [distributed.all_gather_object((i, here.rank)) for i in range(50)] == [[(i, 0), (i, 1)] for i in range(50)]
    thread.join()
    assert in_thread == [[i, i + 1] for i in range(50)]
    errors = []
    for error in (UserError("disk full"), jsonl.InvalidLineError(Path("a.jsonl"), 3, "not valid JSON"), KeyError("x")):
        try:
            with distributed.raise_on_any_failure():
                if here.rank == 1:
                    raise error
        except Exception as caught:
            errors.append(f"{type(caught).__name__}: {caught}")
    value = distributed.broadcast_object({"rank": here.rank})
    distributed.close()
    return [value, *errors]


def test_ranks_exchange_values_and_raise_the_same_error() -> None:
    first, second = ranks.call(2, exchange)
    both = [{"rank": 0}, "UserError: disk full", "InvalidLineError: a.jsonl:3: not valid JSON"]
    assert first == [*both, "RuntimeError: rank 1 failed: KeyError: 'x'"]
    assert second == [*both, "KeyError: 'x'"]


def lose_rank_1() -> str:
    here = distributed.init("cpu")
    if here.rank == 1:
        os._exit(0)
    try:
        distributed.all_gather_object(here.rank)
    except distributed.LostRankError as error:
        return str(error)
    return "nothing was lost"


def test_a_lost_rank_is_named() -> None:
    first, _, third = ranks.call(3, lose_rank_1)
    assert first == third == "rank 1 of the job has exited or does not answer; its output says why"
