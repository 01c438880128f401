"""ARC-Easy, ARC-Challenge (arXiv 1803.05457) and MMLU (arXiv 2009.03300): exam questions as multiple choice."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanochat.config import UserError
from nanochat.data import Conversation, Tokenizer
from nanochat.tasks.hub_table import HubTable, hub_task
from nanochat.tasks.task import Task, qa_conversation

ARC_COLUMNS = {"question": str, "choices": dict, "answerKey": str}
MMLU = HubTable("cais/mmlu", "all", "all", {"question": str, "choices": list, "answer": int})
MMLU_LETTERS = ("A", "B", "C", "D")


def arc_easy(split: str = "train", *, source: str | Path | None = None) -> Task:
    """ARC-Easy: school science exams, multiple choice; the questions that simple methods answer."""
    return _arc("arc_easy", "ARC-Easy", split, source)


def arc_challenge(split: str = "train", *, source: str | Path | None = None) -> Task:
    """ARC-Challenge: school science exams, multiple choice; the questions that simple methods get wrong."""
    return _arc("arc_challenge", "ARC-Challenge", split, source)


def _arc(name: str, subset: str, split: str, source: str | Path | None) -> Task:
    table = HubTable("allenai/ai2_arc", subset, subset, ARC_COLUMNS)
    return hub_task(name, "multiple_choice", table, _arc_conversation, split, source, baseline=0.25)


def _arc_conversation(row: dict[str, Any]) -> Conversation:
    letters, texts, answer = row["choices"].get("label"), row["choices"].get("text"), row["answerKey"]
    if not letters or not texts or len(letters) != len(texts):
        raise UserError("choices: expected at least one label, and one text for each label")
    if answer not in letters:
        raise UserError(f"answerKey {answer!r} is not one of the labels {', '.join(letters)}")
    prompt = multiple_choice_prompt(row["question"], letters, texts)
    return {**qa_conversation(prompt, answer), "letters": list(letters)}


def mmlu(split: str = "train", *, source: str | Path | None = None) -> Task:
    """MMLU: exams in 57 subjects, multiple choice with four choices.

    Args:
        split: train (auxiliary_train of the data set), test, validation or dev.
    """
    split = "auxiliary_train" if split == "train" else split
    return hub_task("mmlu", "multiple_choice", MMLU, _mmlu_conversation, split, source, baseline=0.25)


def _mmlu_conversation(row: dict[str, Any]) -> Conversation:
    if len(row["choices"]) != len(MMLU_LETTERS) or not 0 <= row["answer"] < len(MMLU_LETTERS):
        raise UserError(f"expected four choices and an answer of 0 to 3, got answer {row['answer']}")
    prompt, answer = multiple_choice_prompt(row["question"], MMLU_LETTERS, row["choices"]), MMLU_LETTERS[row["answer"]]
    return {**qa_conversation(prompt, answer), "letters": list(MMLU_LETTERS), "subject": row.get("subject", "")}


def multiple_choice_prompt(question: str, letters: Sequence[str], choices: Sequence[str]) -> str:
    """Return the user message that asks a question with lettered choices.

    The letter follows its choice, which is easier for small models, and directly follows the `=`, so that it is the
    same token as in the answer.
    """
    lines = "".join(f"- {choice}={letter}\n" for letter, choice in zip(letters, choices, strict=True))
    return f"Multiple Choice question: {question}\n{lines}\nRespond only with the letter of the correct answer."


def letter_ids(tokenizer: Tokenizer, letters: Sequence[str]) -> list[int]:
    """Return the token id of each letter, the same in `multiple_choice_prompt` and as the answer."""
    ids = []
    for letter in letters:
        answer, in_prompt = tokenizer.encode(letter), tokenizer.encode(f"- x={letter}\n- x")
        if len(answer) != 1 or answer[0] not in in_prompt:
            raise UserError(
                f"the tokenizer does not keep the letter {letter!r} of a choice as one token in question and answer: "
                "train it on text with fewer lists of choices"
            )
        ids += answer
    return ids
