"""What goes into the engine and what comes out of it."""

import dataclasses
import math
from collections.abc import Hashable
from typing import NamedTuple

from nanochat.config import UserError

MAX_TOP_LOGPROBS = 20  # OpenAI's limit
NO_FILTERS = (1.0, 0.0, 1.0, 0.0, 0.0)  # `Request.filters` of a request that sets none


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt to continue; `sampling` defines what the settings do, and in which order."""

    prompt: tuple[int, ...]  # at least one id
    max_tokens: int = 512  # limit on new tokens, tool results included
    temperature: float = 0.8  # 0 takes the most likely token
    top_k: int = 50  # draw among the k most likely tokens; 0: among all
    seed: int = 0  # the same seed gives the same tokens, whatever else is decoded
    top_p: float = 1.0  # draw among the fewest most likely tokens that have this probability together
    min_p: float = 0.0  # draw among the tokens at least this fraction as likely as the most likely one
    repetition_penalty: float = 1.0  # over 1: against tokens of the prompt and the answer
    presence_penalty: float = 0.0  # over 0: against tokens of the answer
    frequency_penalty: float = 0.0  # the same, times how often each occurred
    logit_bias: tuple[tuple[int, float], ...] = ()  # (id, what is added to its logit)
    grammar: str | None = None  # of the whole answer, see `grammar`; it calls no tools
    logprobs: int | None = None  # report each token's log-probability, and those of so many alternatives

    @property
    def filters(self) -> tuple[float, ...]:
        """What `sampling.draw_filtered` takes as numbers."""
        return (
            self.top_p,
            self.min_p,
            self.repetition_penalty,
            self.presence_penalty,
            self.frequency_penalty,
        )

    @property
    def is_filtered(self) -> bool:
        """Whether it needs more than temperature and top_k, which are drawn faster."""
        return self.filters != NO_FILTERS or bool(self.logit_bias or self.grammar) or self.logprobs is not None


class TokenLogprobs(NamedTuple):
    """Log-probabilities of one token, by the model's distribution before penalties, biases and temperature."""

    logprob: float  # of the drawn token
    top: tuple[tuple[int, float], ...]  # (id, logprob) of the most likely tokens, most likely first


class Event(NamedTuple):
    """One new token of the request `key`."""

    key: Hashable
    token: int
    sampled: bool  # False for a token of a tool result
    finish: str | None  # of the last token: "stop" (<|assistant_end|> or <|bos|>), or "length" (no more room)
    logprobs: TokenLogprobs | None = None  # of a sampled token, if the request asks for them


class Completion(NamedTuple):
    """All new tokens of a request, which of them were sampled, and how it finished; see `Event`."""

    tokens: list[int]
    sampled: list[bool]
    finish: str

    @property
    def content(self) -> list[int]:
        """The tokens without the one that stopped it."""
        return self.tokens[:-1] if self.finish == "stop" else self.tokens


def check(request: Request, vocab_size: int, context: int) -> None:
    """Raise UserError where a request cannot be answered."""
    n_prompt, last = len(request.prompt), vocab_size - 1
    if not request.prompt or not all(0 <= token <= last for token in request.prompt):
        raise UserError(f"prompt of {n_prompt} tokens: expected at least one, within 0 … {last}")
    if n_prompt >= context:
        raise UserError(f"prompt of {n_prompt} tokens: the context of {context} leaves no room for an answer")
    if request.max_tokens < 1:
        raise UserError(f"max_tokens={request.max_tokens}: expected at least 1")
    if not (request.temperature >= 0 and request.top_k >= 0 and -(2**63) <= request.seed < 2**63):
        settings = f"temperature={request.temperature}, top_k={request.top_k}, seed={request.seed}"
        raise UserError(f"{settings}: expected 0 or more for the first two, and a seed of 64 bits")
    for name in ("top_p", "min_p"):
        if not 0 <= getattr(request, name) <= 1:
            raise UserError(f"{name}={getattr(request, name)}: expected a number from 0 to 1")
    if not 0 < request.repetition_penalty < math.inf:
        raise UserError(f"repetition_penalty={request.repetition_penalty}: expected a number over 0")
    for name in ("presence_penalty", "frequency_penalty"):
        if not math.isfinite(getattr(request, name)):
            raise UserError(f"{name}={getattr(request, name)}: expected a finite number")
    for token, bias in request.logit_bias:
        if not (0 <= token <= last and math.isfinite(bias)):
            raise UserError(f"logit_bias of {bias} for token {token}: expected a finite number and an id of 0 … {last}")
    if request.logprobs is not None and not 0 <= request.logprobs <= MAX_TOP_LOGPROBS:
        raise UserError(f"logprobs={request.logprobs}: expected 0 to {MAX_TOP_LOGPROBS} alternatives")
