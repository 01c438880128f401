"""The routes of the API: answers in chats and completions of texts, in our own dialect and in OpenAI's."""

from typing import TYPE_CHECKING

from nanochat.lazy import lazy_exports

if TYPE_CHECKING:
    from nanochat.serve.api import answers, chat, completions
    from nanochat.serve.api.answers import ApiConfig

__getattr__ = lazy_exports(__name__, __file__)
