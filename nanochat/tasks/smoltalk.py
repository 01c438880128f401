"""SmolTalk: 460,000 conversations about everything, the smaller edition that is meant for small models.

Source: https://huggingface.co/datasets/HuggingFaceTB/smol-smoltalk, arXiv 2502.02737.
"""

from pathlib import Path

from nanochat.config import UserError
from nanochat.data import Conversation, chat_format
from nanochat.tasks import hub_table
from nanochat.tasks.task import Task


def load(split: str = "train", *, source: str | Path | None = None) -> Task:
    """Return the task.

    Args:
        split: train or test. source: files to read instead of the hub.

    Raises:
        UserError: the data cannot be had, or is not of the right form.
    """
    columns = {"messages": list}
    table = hub_table.read(
        hub_table.Source("smoltalk", "HuggingFaceTB/smol-smoltalk", None, "data", split, columns), source
    )
    return Task("smoltalk", "chat", len(table), lambda index: _row(table, index))


def _row(table: hub_table.Table, index: int) -> Conversation:
    row = {"messages": table[index]["messages"]}
    try:
        chat_format.check(row)
    except UserError as error:
        raise table.bad(index, str(error)) from None
    return row
