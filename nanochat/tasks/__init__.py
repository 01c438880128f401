"""Tasks: conversations to train on and to evaluate with, loaded by name.

from nanochat import tasks
tasks.load("gsm8k", "test").row(0)
tasks.from_text("mmlu:auxiliary_train")
"""

from typing import TYPE_CHECKING

from nanochat.lazy import lazy_exports

if TYPE_CHECKING:
    from nanochat.tasks.catalog import about, from_text, load, names, options_of, split_text
    from nanochat.tasks.conversations import Preference, read_preferences, ultrafeedback
    from nanochat.tasks.multiple_choice import letter_ids, multiple_choice_prompt
    from nanochat.tasks.task import MissingDataError, Task, mixture, plain_text, qa_conversation, slice_task

__getattr__ = lazy_exports(__name__, __file__)
