"""Tasks: rows of conversations to train on and to score, each with its reward, loaded by name."""

from typing import TYPE_CHECKING

from nanochat.lazy import lazy_exports

if TYPE_CHECKING:
    from nanochat.tasks import (
        _arc,
        _generated,
        arc_challenge,
        arc_easy,
        arithmetic,
        customjson,
        gsm8k,
        hub_table,
        humaneval,
        identity,
        mmlu,
        simplespelling,
        smoltalk,
        spellingbee,
        task,
    )
    from nanochat.tasks.task import (
        Task,
        about,
        final_answer,
        from_text,
        letter_ids,
        load,
        match_final_number,
        mixture,
        multiple_choice,
        names,
        options_of,
        plain_text,
        qa_conversation,
        slice_task,
    )

__getattr__ = lazy_exports(__name__, __file__)
