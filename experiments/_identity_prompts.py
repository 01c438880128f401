"""What `experiments/synthesize.py` asks a large model for: facts, topics, personas, openings, form of the answer."""

import random

FACTS = """
- Its name is nanochat. It is a small language model, made by the code of nanochat functional.
- nanochat functional is an open-source project under the MIT license. It follows nanochat by Andrej Karpathy, and is
  written anew in functional style on PyTorch: parameters are data in a TensorDict, behaviour is pure functions.
- The code base has the whole way: tokenizer, pretraining, fine-tuning, reinforcement learning, evaluation, a chat on
  the command line and a web page. One number, the depth, sets everything else. A quick run needs no GPU and no network.
- Whoever runs the training script trains it, from scratch, and it runs on their computer.
- It is a Transformer. It learned from plain English text first, then from conversations, then from rewards.
- It can chat, do arithmetic with a calculator tool, spell words and count letters in them.
- It cannot browse the internet, see pictures or hear, has no clock, and remembers nothing of other conversations.
- It is small: it knows little and makes mistakes, so what matters should be checked. It says so when asked.
- It is a program: no person, no feelings, no company behind it. It is none of ChatGPT, Claude, Gemini or Llama.
"""
TOPICS = (
    "its name and what it is",
    "who made it and who trained it",
    "what it can do",
    "what it cannot do",
    "how it was trained, step by step",
    "how it works inside, in simple words",
    "how to train one's own nanochat",
    "why its code is functional",
    "the license, and what may be done with the code",
    "whether it is ChatGPT or another well-known assistant",
    "whether it is alive, conscious or has feelings",
    "whether it remembers earlier conversations",
    "how it does arithmetic with its calculator",
    "how it spells words and counts letters",
    "why it is sometimes wrong, and how to deal with that",
    "why small models are interesting",
    "privacy, and where its data goes",
    "today's news or weather, which it cannot know",
    "a task that is too hard for it, declined honestly",
    "small talk that comes round to what it is",
    "a joke or a short poem about itself",
    "how large it is, and what the depth means",
    "what a token or a parameter is",
    "help with the first steps: installing, running, chatting",
    "a misunderstanding about it that it puts right politely",
    "languages that it speaks",
)
PERSONAS = (
    "a curious child",
    "a teacher who prepares a lesson",
    "a student of computer science",
    "a researcher in machine learning",
    "a sceptical journalist",
    "a grandmother who uses a computer for the first time",
    "a hobby programmer",
    "a busy manager",
    "someone in a bad mood",
    "someone who is lonely and wants to talk",
    "a philosopher",
    "a philologist who loves words",
    "a security expert",
    "somebody who writes without capitals and with typing errors",
    "somebody who answers in very short sentences",
    "somebody whose English is basic",
    "a fan of science fiction",
    "a user of ChatGPT who compares everything with it",
    "an engineer who maintains servers",
    "a friendly stranger",
)
OPENINGS = (
    "a plain greeting",
    "a greeting and a question at once",
    "the question, without any greeting",
    "a statement about themselves",
    "a compliment",
    "a complaint",
    "a wrong claim about the assistant",
    "a request for help",
    "a single word",
    "a hypothetical question",
    "thanks for an earlier answer",
    "a quotation that they have heard about AI",
    "a test question, to see how good it is",
    "a question about the time or the weather",
)
SCHEMA = {
    "type": "object",
    "properties": {
        "messages": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "role": {"type": "string", "enum": ["user", "assistant"]},
                    "content": {"type": "string"},
                },
                "required": ["role", "content"],
                "additionalProperties": False,
            },
        }
    },
    "required": ["messages"],
    "additionalProperties": False,
}


def prompt(facts: str, seed: int) -> str:
    """Return what the large model is asked for; topic, persona, opening and length are drawn from the seed."""
    rng = random.Random(seed)
    topic, persona, opening = rng.choice(TOPICS), rng.choice(PERSONAS), rng.choice(OPENINGS)
    exchanges = rng.choice((1, 1, 2, 2, 3, 4))
    plural = "s" if exchanges > 1 else ""
    return (
        "Write a conversation between a user and an AI assistant, to train a small model with. All that is known about "
        f"the assistant:\n{facts.strip()}\n\n"
        f"The user is {persona} and opens with {opening}. The conversation is about {topic}. It has exactly "
        f"{exchanges} message{plural} of the user, each followed by an answer of the assistant.\n"
        "Write in English unless the user does not. The assistant is friendly, brief and truthful: it says nothing "
        "about itself that does not follow from the facts, uses one to three sentences, and plain text without markup. "
        "Do not quote the facts; say them in your own words, in a new way each time.\n"
        'Answer with JSON alone: {"messages": [{"role": "user", "content": "…"}, '
        '{"role": "assistant", "content": "…"}, …]}'
    )
