"""The routes that continue a text, in OpenAI's dialect, and those that encode and decode tokens, in vLLM's.

The model has seen every document after <|bos|>, so it reads that before a prompt that does not have it. The response
does not show it: the tokens, log-probabilities and offsets of an echo are those of the prompt as it was sent.
"""

import asyncio
import codecs
import functools
import statistics
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple

from fastapi import Request, Response
from pydantic_core import to_json

from nanochat import infer
from nanochat.data import Tokenizer, chat_format
from nanochat.eval.likelihood import SequenceLogprobs
from nanochat.serve import scheduler as scheduling
from nanochat.serve import schema
from nanochat.serve.api import answers, chat
from nanochat.serve.api.answers import EventStream, Update
from nanochat.serve.scheduler import Scheduler
from nanochat.serve.schema import ApiError, CompletionLogprobs, TextChoice, TextCompletionRequest
from nanochat.serve.worker import ScoreRequest, WorkerInfo

MAX_SCORED = 2**18  # log-probabilities of an echo, alternatives included: some megabytes


class Prompt(NamedTuple):
    """A prompt: its tokens as they were sent, those that the model reads, and its text."""

    sent: list[int]
    ids: list[int]
    text: str


async def completion(request: Request, body: TextCompletionRequest) -> Any:
    """Continue each prompt, as a stream or in one piece."""
    scheduler: Scheduler = request.app.state.scheduler
    config: answers.ApiConfig = request.app.state.api
    info = answers.ready_model(scheduler, config, body.model)
    prompts = await asyncio.to_thread(_read_prompts, info, body)
    n, is_scored = body.best_of or body.n, body.echo and body.logprobs is not None
    grammar = await answers.grammar_of(body.response_format)
    requests: list[infer.Request] = []
    if body.max_tokens:
        logprobs = 0 if body.logprobs is None and n > body.n else body.logprobs
        for prompt in prompts:
            requests += answers.sampling_requests(
                body, config, info, prompt.ids, body.token_limit, n, logprobs, grammar
            )
        if is_scored and n == body.max_tokens == 1 and _is_greedy(requests[0]):
            requests = []  # the scores of the prompt say what follows it
    _check_lengths(info, body, prompts, n_answer=int(bool(requests)))
    scores = await _score(request, scheduler, info, prompts, body.logprobs or 0) if is_scored else []
    echoes = await asyncio.to_thread(_echoes, info.tokenizer, body, prompts, scores) if body.echo else []
    if requests:
        streams, updates = answers.submit(scheduler, info, requests, stops=body.stop, raw=True, with_tokens=True)
    else:
        streams, updates = [], _scored_updates(info.tokenizer, body, len(prompts), scores)

    def choice(update: Update) -> TextChoice:
        text = "".join(piece.text for piece in update.pieces)
        start = len(prompts[update.index // n].text) if body.echo else 0
        logprobs = _generated_logprobs(info.tokenizer, body, update, start) if body.logprobs is not None else None
        return TextChoice(index=update.index, text=text, logprobs=logprobs, finish_reason=update.finish)

    def usage() -> schema.Usage:
        n_tokens = sum(stream.n_tokens for stream in streams) if streams else body.max_tokens * len(prompts)
        return answers.usage(sum(len(prompt.ids) for prompt in prompts), n_tokens)

    header: Any = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion"}
    header |= {"created": int(time.time()), "model": info.name}

    async def chunks() -> AsyncIterator[bytes]:
        include_usage = body.stream_options is not None and body.stream_options.include_usage
        more = {"usage": None} if include_usage else {}
        if echoes:
            first = [echoes[i // n].model_copy(update={"index": i}) for i in range(n * len(prompts))]
            yield answers.encode([header | {"choices": [echo]} | more for echo in first])
        async for update in updates:
            is_new = bool(update.pieces or update.tokens or update.finish)
            yield answers.encode([header | {"choices": [choice(update)]} | more] if is_new else [], update.error)
            if update.error:
                return
        if include_usage:
            yield answers.encode([header | {"choices": [], "usage": usage()}])
        yield b"data: [DONE]\n\n"

    if body.stream:
        return EventStream(scheduler, streams, chunks())
    parts = [[echoes[i // n]] if echoes else [] for i in range(n * len(prompts))]
    likelihoods: list[list[float]] = [[] for _ in parts]
    async with answers.cancelled_on_exit(request.receive, scheduler, streams):
        async for update in updates:
            if update.error:
                raise update.error
            parts[update.index].append(choice(update))
            likelihoods[update.index] += [token.logprobs[0] for token in update.tokens if token.logprobs]

    def respond() -> bytes:  # not in the event loop: an echo may have many tokens
        kept = list(range(len(parts)))
        if n > body.n:
            means = [statistics.fmean(values) if values else answers.LEAST_LOGPROB for values in likelihoods]
            ranked = [sorted(kept[i : i + n], key=lambda i: -means[i]) for i in range(0, len(kept), n)]
            kept = [i for group in ranked for i in group[: body.n]]
        choices = [_join(index, parts[i]) for index, i in enumerate(kept)]
        return to_json(schema.TextCompletion(**header, choices=choices, usage=usage()))

    return Response(await asyncio.to_thread(respond), media_type="application/json")


def _read_prompts(info: WorkerInfo, body: TextCompletionRequest) -> list[Prompt]:
    tokenizer, prompts = info.tokenizer, []
    for number, prompt in enumerate(body.prompt):
        where = "prompt" if len(body.prompt) == 1 else f"prompt[{number}]"
        if isinstance(prompt, str):
            sent, text = tokenizer.encode(prompt), prompt
            schema.check_text(where, prompt)
        elif min(prompt) < 0 or max(prompt) >= tokenizer.vocab_size:
            schema.refuse(where, f"has a token id outside of 0 … {tokenizer.vocab_size - 1}")
        else:
            sent, text = prompt, tokenizer.decode(prompt)
        start = [tokenizer.bos] if body.add_special_tokens and sent[:1] != [tokenizer.bos] else []
        if not start and not sent:
            schema.refuse(where, "is empty")
        prompts.append(Prompt(sent, start + sent, text))
    return prompts


def _check_lengths(info: WorkerInfo, body: TextCompletionRequest, prompts: Sequence[Prompt], n_answer: int) -> None:
    for number, prompt in enumerate(prompts):
        if len(prompt.ids) > info.context - n_answer:
            message = f"prompt {number} has {len(prompt.ids)} tokens with <|bos|>; at most {info.context - n_answer}"
            raise ApiError(400, f"{message} are allowed", param="prompt", code="context_length_exceeded")
    n_scored = sum(len(prompt.ids) for prompt in prompts) * ((body.logprobs or 0) + 1)
    if body.echo and body.logprobs is not None and n_scored > MAX_SCORED:
        schema.refuse("prompt", f"asks for {n_scored:,} log-probabilities: at most {MAX_SCORED:,} are allowed")


def _is_greedy(request: infer.Request) -> bool:
    """Return whether a request takes the token that the model finds most likely."""
    penalties = (request.repetition_penalty - 1, request.presence_penalty, request.frequency_penalty)
    return request.temperature == 0 and not (request.logit_bias or request.grammar) and not any(penalties)


# Log-probabilities


async def _score(
    request: Request, scheduler: Scheduler, info: WorkerInfo, prompts: Sequence[Prompt], top: int
) -> list[SequenceLogprobs]:
    """Return the log-probabilities of the prompts' tokens, from a worker."""
    wake = asyncio.Event()
    scored = ScoreRequest(tuple(tuple(prompt.ids) for prompt in prompts), max(top, 1))
    (stream,) = scheduling.submit(scheduler, info.name, [scored], wake)
    async with answers.cancelled_on_exit(request.receive, scheduler, [stream]):
        while not stream.ended:
            await wake.wait()
            wake.clear()
    if stream.error:
        raise stream.error
    return [stream.scores[number] for number in range(len(prompts))]


def _echoes(
    tokenizer: Tokenizer, body: TextCompletionRequest, prompts: Sequence[Prompt], scores: Sequence[SequenceLogprobs]
) -> list[TextChoice]:
    """Return each prompt as the beginning of a choice; its first token has no log-probability, as with OpenAI."""
    echoes = [TextChoice(index=0, text=prompt.text, finish_reason=None) for prompt in prompts]
    text_of = functools.cache(functools.partial(answers.token_text, tokenizer))
    for echo, prompt, score in zip(echoes, prompts, scores):
        echo.logprobs = CompletionLogprobs()
        decoder, offset = codecs.getincrementaldecoder("utf-8")("replace"), 0
        before = len(prompt.ids) - len(prompt.sent)
        for i, token in enumerate(prompt.sent):
            at = before + i - 1  # of the token that predicts it
            logprobs = infer.TokenLogprobs(float(score.logprobs[at]), _alternatives(score, at)) if i else None
            _append(echo.logprobs, text_of, token, logprobs, body.logprobs or 0, offset)
            offset += len(decoder.decode(tokenizer.decode_bytes([token])))
    return echoes


def _alternatives(score: SequenceLogprobs, at: int) -> tuple[tuple[int, float], ...]:
    return tuple(zip(score.top_ids[at].tolist(), score.top_logprobs[at].tolist()))


async def _scored_updates(
    tokenizer: Tokenizer, body: TextCompletionRequest, n: int, scores: Sequence[SequenceLogprobs]
) -> AsyncIterator[Update]:
    """Yield the answers to requests for no token, or for the most likely one."""
    for index in range(n):
        if not body.max_tokens:
            yield Update(index, finish="length")
            continue
        top = _alternatives(scores[index], -1)
        reader = answers.AnswerReader(tokenizer, body.stop, raw=True, with_tokens=True)
        pieces, tokens = reader.feed([(top[0][0], infer.TokenLogprobs(top[0][1], top))], ended=True)
        is_end = top[0][0] in (tokenizer.bos, tokenizer.special("<|assistant_end|>"))
        yield Update(index, pieces, tokens, reader.finish or ("stop" if is_end else "length"))


def _generated_logprobs(
    tokenizer: Tokenizer, body: TextCompletionRequest, update: Update, start: int
) -> CompletionLogprobs:
    result, text_of = CompletionLogprobs(), functools.partial(answers.token_text, tokenizer)
    for token in update.tokens:
        _append(result, text_of, token.id, token.logprobs, body.logprobs or 0, start + token.offset)
    return result


def _append(
    result: CompletionLogprobs, text_of: Any, token: int, logprobs: infer.TokenLogprobs | None, top: int, offset: int
) -> None:
    """Add a token; its alternatives, and it, are a dict as OpenAI writes it."""
    result.tokens.append(text_of(token))
    result.text_offset.append(offset)
    result.token_logprobs.append(answers.finite(logprobs[0]) if logprobs else None)
    alternatives = [*logprobs[1][:top], (token, logprobs[0])] if logprobs else []
    values = {text_of(other): answers.finite(value) for other, value in alternatives}
    result.top_logprobs.append(values if logprobs else None)


def _join(index: int, parts: Sequence[TextChoice]) -> TextChoice:
    """Return the parts of a choice as one."""
    logprobs = CompletionLogprobs() if any(part.logprobs for part in parts) else None
    for part in parts:
        if logprobs and part.logprobs:
            for name in CompletionLogprobs.model_fields:
                getattr(logprobs, name).extend(getattr(part.logprobs, name))
    text = "".join(part.text for part in parts)
    return TextChoice(index=index, text=text, logprobs=logprobs, finish_reason=parts[-1].finish_reason)


# Tokens


async def tokenize(request: Request, body: schema.TokenizeRequest) -> schema.TokenizeResponse:
    """Return the token ids of a text or a conversation."""
    info = answers.ready_model(request.app.state.scheduler, request.app.state.api, body.model)
    tokenizer = info.tokenizer

    def encode() -> list[int]:
        if body.prompt in tokenizer.specials:
            return [tokenizer.special(str(body.prompt))]
        if body.prompt is not None:
            return [tokenizer.bos] * body.add_special_tokens + tokenizer.encode(body.prompt)
        if body.add_generation_prompt:
            return chat.prompt_ids(info, body.messages or [], limit=None)
        try:
            return chat_format.render(tokenizer, {"messages": chat.conversation(body.messages or [])})[0]
        except chat_format.ConversationError as error:
            raise ApiError(400, str(error), param="messages") from None

    ids = await asyncio.to_thread(encode)
    texts = [answers.token_text(tokenizer, token) for token in ids] if body.return_token_strs else None
    return schema.TokenizeResponse(tokens=ids, count=len(ids), max_model_len=info.context, token_strs=texts)


async def detokenize(request: Request, body: schema.DetokenizeRequest) -> schema.DetokenizeResponse:
    """Return the text of token ids, special tokens by name."""
    info = answers.ready_model(request.app.state.scheduler, request.app.state.api, body.model)
    try:
        return schema.DetokenizeResponse(prompt=await asyncio.to_thread(info.tokenizer.decode, body.tokens))
    except ValueError as error:
        raise ApiError(400, str(error), param="tokens") from None


async def tokenizer_info(request: Request, model: str | None = None) -> dict[str, Any]:
    """Return what a client needs to know of the tokenizer."""
    info = answers.ready_model(request.app.state.scheduler, request.app.state.api, model)
    return {
        "tokenizer_class": "nanochat",
        "bos_token": "<|bos|>",
        "eos_token": "<|assistant_end|>",
        "additional_special_tokens": list(info.tokenizer.specials),
        "vocab_size": info.tokenizer.vocab_size,
        "model_max_length": info.context,
    }
