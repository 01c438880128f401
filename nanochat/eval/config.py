"""Settings of evaluation by chat tasks."""

import dataclasses

from nanochat.config import UserError

CHAT_CORE = ("arc_easy", "arc_challenge", "mmlu", "gsm8k", "humaneval")
TITLES = {
    "arc_easy": "ARC-Easy",
    "arc_challenge": "ARC-Challenge",
    "mmlu": "MMLU",
    "gsm8k": "GSM8K",
    "humaneval": "HumanEval",
    "spellingbee": "SpellingBee",
    "simplespelling": "SimpleSpelling",
    "arithmetic": "Arithmetic",
}


@dataclasses.dataclass(frozen=True)
class ChatEvalConfig:
    """How tasks are evaluated.

    Attributes:
        max_problems: of each task, the first ones; none: all. max_generative: the same of a task that generates.
        samples: answers to a problem, which is solved if any is right.
        temperature, top_k: of the sampling; temperature 0 is greedy, top_k 0 takes all tokens in.
        max_tokens: of an answer. seed: of the draws.
        slots: answers generated at once. batch_tokens: of a batch of multiple choice, with its padding.
        compile: the generation, by torch.compile; none: on a GPU.
    """

    max_problems: int | None = None
    max_generative: int | None = None
    samples: int = 1
    temperature: float = 0.0
    top_k: int = 50
    max_tokens: int = 512
    seed: int = 42
    slots: int = 32
    batch_tokens: int = 16384
    compile: bool | None = None

    def __post_init__(self) -> None:
        for name in ("max_problems", "max_generative", "samples", "max_tokens", "slots", "batch_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: must be at least 1")
        for name in ("temperature", "top_k"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)}: must be at least 0")
        if self.samples > 1 and self.temperature == 0:
            raise UserError(f"samples={self.samples}: are all the same at temperature 0; set temperature=1")
