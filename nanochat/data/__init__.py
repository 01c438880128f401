"""From text to batches: tokenizer, sources of documents, packing, the pretraining loader, the chat format."""

from typing import TYPE_CHECKING

from nanochat.lazy import lazy_exports

if TYPE_CHECKING:
    from nanochat.data import chat_format, download, embedded, loader, mixture, packing, records, sources, tokenizer
    from nanochat.data.chat_format import Conversation, ConversationError, Message, Piece, Reader
    from nanochat.data.download import Options
    from nanochat.data.loader import prefetch
    from nanochat.data.sources import CorruptShardError, DataConfig
    from nanochat.data.tokenizer import PATTERN, SPECIALS, Tokenizer

__getattr__ = lazy_exports(__name__, __file__)
