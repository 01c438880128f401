"""Messages between ranks: values, shared errors, one connection per job, and the name of a lost rank."""

import os
import threading

import ranks

from nanochat import distributed
from nanochat.config import UserError


def exchange() -> list[object]:
    here = distributed.init("cpu")
    group, background = distributed.control_group(), distributed.control_group(background=True)
    assert group is distributed.control_group() and group.group is not background.group
    found: list[object] = [distributed.all_gather_object({"rank": here.rank}), distributed.broadcast_object(here.rank)]
    # Two threads communicate at the same time, each in its own order.
    thread = threading.Thread(
        target=lambda: [found.append(distributed.all_gather_object(i + here.rank, group=background)) for i in range(50)]
    )
    thread.start()
    main = [distributed.all_gather_object([i, here.rank]) for i in range(50)]
    thread.join()
    assert main == [[[i, 0], [i, 1]] for i in range(50)] and found[2:] == [[i, i + 1] for i in range(50)]
    for error in (UserError("disk full"), KeyError("x")):
        try:
            with distributed.raise_on_any_failure():
                if here.rank == 1:
                    raise error
        except (UserError, KeyError, RuntimeError) as caught:
            found.append(f"{type(caught).__name__}: {caught}")
    distributed.close()
    return found[:2] + found[52:]


def test_ranks_exchange_values_and_raise_the_same_error() -> None:
    first, second = ranks.call(2, exchange)
    both = [[{"rank": 0}, {"rank": 1}], 0, "UserError: disk full"]
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
    found = ranks.call(3, lose_rank_1)
    assert found[0] == found[2] == "rank 1 of the job has exited or does not answer; its output says why"
