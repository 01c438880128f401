"""Settings of the evaluation by chat tasks."""

import dataclasses

from nanochat.config import NonNegativeFloat, NonNegativeInt, PositiveInt, Settings, UserError

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
class ChatEvalConfig(Settings):
    """How chat tasks are evaluated.

    Attributes:
        max_problems: evaluate only the first problems of each task; none: all.
        max_generative: the same limit for generative tasks alone.
        samples: answers to each problem, which counts as solved if any is correct.
        temperature: sampling temperature; 0 is greedy.
        top_k: sample from so many most likely tokens; 0: from all.
        max_tokens: maximum length of an answer.
        seed: sampling seed.
        slots: answers generated at once.
        batch_tokens: tokens in a multiple-choice batch, padding included.
        compile: use torch.compile for generation; none: on a GPU only.
    """

    max_problems: PositiveInt | None = None
    max_generative: PositiveInt | None = None
    samples: PositiveInt = 1
    temperature: NonNegativeFloat = 0.0
    top_k: NonNegativeInt = 50
    max_tokens: PositiveInt = 512
    seed: int = 42
    slots: PositiveInt = 32
    batch_tokens: PositiveInt = 16384
    compile: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples > 1 and self.temperature == 0:
            raise UserError(f"samples={self.samples}: are all the same at temperature 0; set temperature=1")
