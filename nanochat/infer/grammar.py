"""Answers in a grammar, such as JSON of a schema: before each step, a mask of the tokens that may follow.

llguidance computes the mask on the host, in tens of microseconds, from the tokens so far. So a row with a grammar is
masked after its last token has been read, and while there is one, no step starts before the last one is read.
"""

import functools
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanochat.config import UserError
from nanochat.data import Tokenizer

INSTALL = 'structured output needs llguidance: pip install "llguidance>=1"'
# Small models that may write any number of spaces often write nothing else.
JSON_OPTIONS: Any = {"whitespace_flexible": False}


def from_json_schema(schema: dict[str, Any]) -> str:
    """Return the grammar of a JSON schema; UserError if it is not valid, or has what llguidance does not support."""
    matcher = _llguidance().LLMatcher
    try:
        grammar = matcher.grammar_from_json_schema(schema, overrides=JSON_OPTIONS)
        is_wrong, problems = matcher.validate_grammar_with_warnings(grammar)
    except (ValueError, RecursionError) as error:
        is_wrong, problems = True, [str(error)]
    if is_wrong:
        raise UserError(problems[0].partition("\n")[0][:200])
    return grammar


def start(tokenizer: Tokenizer, grammar: str) -> Any:
    """Return the state of an answer in this grammar."""
    return _llguidance().LLMatcher(_ll_tokenizer(tokenizer), grammar)


def mask_(bias_V: Tensor, state: Any, logit_bias: Iterable[tuple[int, float]], end: int) -> None:
    """Let only tokens that may follow be drawn, by the bias of the row; `end` if a limit of llguidance is reached."""
    allowed_V = torch.zeros(len(bias_V), dtype=torch.bool)
    if state.is_error():
        allowed_V[end] = True
    else:
        bits = np.unpackbits(np.frombuffer(state.compute_bitmask(), np.uint8), bitorder="little", count=len(bias_V))
        allowed_V[: len(bits)] = torch.from_numpy(bits).bool()
    bias_V.zero_()
    for token, bias in logit_bias:
        bias_V[token] += bias
    bias_V.masked_fill_(~allowed_V.to(bias_V.device), -torch.inf)


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise UserError(INSTALL) from None
    return llguidance


@functools.lru_cache(2)
def _ll_tokenizer(tokenizer: Tokenizer) -> Any:
    from llguidance.tiktoken import lltokenizer_from_encoding

    end = tokenizer.special("<|assistant_end|>")
    return lltokenizer_from_encoding(tokenizer.encoding, n_vocab=tokenizer.vocab_size, eos_token=end)
