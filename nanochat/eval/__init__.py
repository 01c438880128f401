"""Evaluation: bits per byte, the CORE metric, chat tasks, log-likelihoods, and the significance of differences."""

from typing import TYPE_CHECKING

from nanochat.lazy import lazy_exports

if TYPE_CHECKING:
    from nanochat.eval import bpb, chat_eval, core, core_bundle, likelihood, results, significance
    from nanochat.eval.bpb import bits_per_byte
    from nanochat.eval.chat_eval import ModelUnderTest, Score
    from nanochat.eval.config import CHAT_CORE, TITLES, ChatEvalConfig
    from nanochat.eval.core import Answer, Question, Results, TaskResult
    from nanochat.eval.core_bundle import Bundle
    from nanochat.eval.significance import Interval

__getattr__ = lazy_exports(__name__, __file__)
