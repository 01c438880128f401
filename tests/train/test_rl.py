"""Reinforcement learning: gradient against REINFORCE by hand, seeded rollouts, train steps, pass@k."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from rl_ranks import ascii_share
from scripted_draws import script_draws
from small_model import Unchanged, assert_trees_close, random_params
from torch import Tensor

from nanochat import infer, model, optim, train, tree
from nanochat.config import UserError
from nanochat.data import Tokenizer, chat_format
from nanochat.model import ModelConfig, loss
from nanochat.tasks import Task, qa_conversation
from nanochat.tasks.task import match_final_number
from nanochat.train import Rollout, RolloutConfig, TrainState, rl

TOK = Tokenizer(tuple(bytes([i]) for i in range(256)))
CONFIG = ModelConfig(sequence_len=32, vocab_size=TOK.vocab_size, n_layer=2, n_head=2, n_kv_head=1, n_embd=32)
ROLLOUTS = RolloutConfig(prompts_per_step=4, samples_per_prompt=3, max_tokens=8, slots=5)
CPU = torch.device("cpu")
END = TOK.special("<|assistant_end|>")


def rollout(prompt: Sequence[int], tokens: Sequence[int], reward: float, forced: Sequence[int] = ()) -> Rollout:
    sampled = [i not in forced for i in range(len(tokens))]
    return Rollout(tuple(prompt), list(tokens), sampled, "stop", "", reward)


# Two examples: one of three answers, whose second had a tool force two tokens into it; one of two.
GROUPS = [
    [
        rollout([1, 2, 3], [4, 5, 6], 1.0),
        rollout([1, 2, 3], [7, 8, 9, 10, 11], 0.0, forced=(2, 3)),
        rollout([1, 2, 3], [12], 0.0),
    ],
    [rollout([13, 14], [15, 16], 0.25), rollout([13, 14], [17], 1.0)],
]
# The same by hand: (tokens that were sampled for the example, advantage, ids, places of what was sampled).
BY_HAND = [
    (7, 2 / 3, [1, 2, 3, 4, 5, 6], [3, 4, 5]),
    (7, -1 / 3, [1, 2, 3, 7, 8, 9, 10, 11], [3, 4, 7]),
    (7, -1 / 3, [1, 2, 3, 12], [3]),
    (3, -0.375, [13, 14, 15, 16], [2, 3]),
    (3, 0.375, [13, 14, 17], [2]),
]


# --- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pad", "widths"), [(None, [3, 7]), (4, [4, 8]), (3, [3, 12]), (16, [16, 16])])
def test_micro_batches_of_sorted_rows_have_few_lengths(pad: int | None, widths: list[int]):
    rows = [row for group in GROUPS for row in rl.weighted(group)]
    batches = rl.micro_batches(rows, 2, 3, 1.0, pad, CPU)
    assert [batch["inputs"].shape for batch in batches] == [(3, width) for width in widths]


def plain_loss(params: Any) -> Tensor:
    """Return the loss from its definition: each answer's log-probabilities, summed up one row at a time."""
    total = torch.zeros((), dtype=torch.float64)
    for count, advantage, ids, drawn in BY_HAND:
        logp_TV = model.apply(params, torch.tensor([ids]), config=CONFIG)[0].double().log_softmax(-1)
        total = total - advantage * sum(logp_TV[i - 1, ids[i]] for i in drawn) / count
    return total / len(GROUPS)


@pytest.mark.parametrize("batch_rows", [1, 2, 5, 8])
@pytest.mark.parametrize("chunk_tokens", [None, 4])
def test_gradient_equals_reinforce(batch_rows: int, chunk_tokens: int | None):
    params = random_params(CONFIG)
    leaves = tree.map(lambda x: x.clone().requires_grad_(), params)
    want_loss = plain_loss(leaves)
    grads = torch.autograd.grad(want_loss, tree.leaves(leaves), allow_unused=True, materialize_grads=True)
    want = tree.unflatten(dict(zip(tree.flatten(params), grads)))
    rows = [row for group in GROUPS for row in rl.weighted(group)]
    n_batches = -(-len(rows) // batch_rows)
    batches = rl.micro_batches(rows, n_batches, batch_rows, n_batches / len(GROUPS), None, CPU)
    seen: list[Any] = []

    def update(state: TrainState, grads: Any, scale: Tensor, value: Tensor, hparams: Any) -> Any:
        seen.append((tree.map(lambda g: g * scale, grads), value))
        return state, {}

    loss_fn = functools.partial(loss.next_token, config=CONFIG, chunk_tokens=chunk_tokens)
    state = train.init(params, model.spec(CONFIG))
    train.train_step(state, batches, {}, value_and_grad=train.gradient(loss_fn), update=update)
    assert_trees_close(seen[0][0], want, rtol=2e-5, atol=1e-7)
    assert float(seen[0][1]) == pytest.approx(float(want_loss.detach()), rel=1e-5)


def test_equal_rewards_give_no_rows():
    assert rl.advantages([1.0, 0.0, 0.0, 1.0]) == [0.5, -0.5, -0.5, 0.5]
    assert rl.advantages([0.1] * 3) == [0.0] * 3
    assert rl.weighted([rollout([1], [2, 3], 0.7)] * 3) == []


# --- answers ----------------------------------------------------------------------------------------------------------


def task(size: int = 6, right: Any = lambda row, text: "7" in text) -> Task:
    return Task("sevens", "generative", size, lambda i: qa_conversation(f"say {'7' * (1 + i % 3)}", "7"), right)


def make_engine(**settings: Any) -> infer.Engine:
    options: dict[str, Any] = {"slots": ROLLOUTS.slots, "context": 60, "compile": False, "copy_params": True} | settings
    return infer.start(random_params(CONFIG), CONFIG, TOK, **options)


def sample(
    numbers: Sequence[int], config: RolloutConfig = ROLLOUTS, seed: int = 1, **settings: Any
) -> list[list[Rollout]]:
    return rl.rollouts(
        make_engine(**settings), TOK, task(), rl.correct_reward(task()), numbers, config=config, seed=seed
    )


def test_answers_depend_only_on_row_index_and_seed():
    want = sample(range(8))
    assert [len(group) for group in want] == [3] * 8
    assert len({tuple(rollout.tokens) for group in want for rollout in group}) == 24
    assert sample([5, 3]) == [want[5], want[3]] and sample(range(8), slots=2) == want
    assert sample(range(8), seed=2) != want
    assert want[0][0].prompt == want[6][0].prompt, "number 6 is row 0 again, with draws of its own"
    prompt = chat_format.prompt(TOK, task().row(2)["messages"][:1])
    assert list(want[2][0].prompt) == prompt[-CONFIG.sequence_len :]
    for rollout in [rollout for group in want for rollout in group]:
        assert rollout.finish == ("stop" if rollout.tokens[-1] in (END, TOK.bos) else "length")
        assert len(rollout.tokens) <= 8


def test_rollouts_mark_tool_tokens_and_carry_rewards(monkeypatch: pytest.MonkeyPatch):
    call = [TOK.special("<|python_start|>"), *b"3+4", TOK.special("<|python_end|>")]
    result = [TOK.special("<|output_start|>"), *b"7", TOK.special("<|output_end|>")]
    row = qa_conversation("3+4?", "7")
    n_prompt = len(chat_format.prompt(TOK, row["messages"][:1]))
    texts = [[*call, *result, *b"#7", END], [*b"It is 5", END], [*call, *result, *b"8", END]]
    script = {rl.seed_of(1, 0, i): text for i, text in enumerate(texts)}
    script_draws(monkeypatch, lambda request: script[request.seed])
    sum_task = Task("sum", "generative", 1, lambda i: row, lambda row, text: text == "#7")
    config = dataclasses.replace(ROLLOUTS, max_tokens=20)
    (group,) = rl.rollouts(make_engine(), TOK, sum_task, rl.correct_reward(sum_task), [0], config=config, seed=1)
    assert [answer.tokens for answer in group] == texts
    assert group[0].sampled == [True] * 5 + [False] * 3 + [True] * 3
    assert [answer.text for answer in group] == ["#7", "It is 5", "8"] and [a.reward for a in group] == [1.0, 0.0, 0.0]
    rows = rl.weighted(group)
    forced = range(n_prompt + 5, n_prompt + 8)
    assert all(row.weights[i] == 0 for row in (rows[0], rows[2]) for i in (*range(n_prompt), *forced))
    assert [sum(w != 0 for w in row.weights) for row in rows] == [8, 8, 7]
    assert sum(rows[0].weights) == pytest.approx(8 * (2 / 3) / (8 + 8 + 7))


def test_prompt_batches_wrap_around_and_resume():
    stream = rl.prompt_batches(task(), TOK, 64, 4)
    batches = [next(stream) for _ in range(3)]
    assert [batch["numbers"] for batch, _, _ in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert [stats["epoch"] for _, _, stats in batches] == pytest.approx([4 / 6, 8 / 6, 2])
    assert next(rl.prompt_batches(task(), TOK, 64, 4, batches[1][1]))[0] == batches[2][0]
    assert next(rl.prompt_batches(task(), TOK, 64, 2, batches[1][1]))[0]["numbers"] == [8, 9]
    position = next(rl.prompt_batches(task(), TOK, 8, 4, batches[0][1]))[1]["position"]
    assert position["skipped"][0].startswith("4 of 8 prompts (50.0%) shortened: longer than 8 tokens; a base model")
    with pytest.raises(UserError, match="5 rows of sevens: the run has 6 of sevens"):
        next(rl.prompt_batches(task(5), TOK, 64, 4, batches[0][1]))


def test_pass_at_k_is_any_of_the_first_k(monkeypatch: pytest.MonkeyPatch):
    solved = [[False, False, True], [True, False, False], [False, False, False], [False, True, True]]
    monkeypatch.setattr(rl, "MAX_K", 3)
    grades = [[[correct, n < 2] for n, correct in enumerate(answers)] for answers in solved]
    monkeypatch.setattr(rl.chat_eval, "sample_answers", lambda *_: grades)
    got = rl.pass_at_k(make_engine(), TOK, task(), 4, ROLLOUTS)
    assert got == {"rl/pass_at_1": 0.25, "rl/pass_at_2": 0.5, "rl/pass_at_3": 0.75}
    by_number = dataclasses.replace(task(), is_correct=match_final_number)
    assert rl.pass_at_k(make_engine(), TOK, by_number, 4, ROLLOUTS) == got | {
        "rl/pass_at_1-lenient": 1.0,
        "rl/pass_at_3-lenient": 1.0,
    }


def test_task_without_reward_and_invalid_settings_raise():
    with pytest.raises(UserError, match="task chat: cannot score"):
        rl.correct_reward(Task("chat", "chat", 1, lambda i: {}))
    with pytest.raises(UserError, match="temperature=0: must be above 0"):
        RolloutConfig(temperature=0)
    with pytest.raises(UserError, match="samples_per_prompt=1: must be at least 2"):
        RolloutConfig(samples_per_prompt=1)


# --- steps ------------------------------------------------------------------------------------------------------------


def rates(lr: float) -> Any:
    groups = optim.param_group_settings(optim.OptimConfig(0.3, 0.1, 0.05, 0.5), CONFIG.n_embd, weight_decay=0.0)
    for group in groups.values():
        group["lr"] *= lr
    return optim.as_hparams(groups)


def stepper(reward: rl.Reward, config: RolloutConfig = ROLLOUTS, donate: bool = False, seen: Any = None) -> Any:
    """Return (state, numbers, hparams) -> (state, metrics), with its own engine; `seen` collects the answers."""
    engine = make_engine(slots=config.slots)
    loss_fn = functools.partial(loss.next_token, config=CONFIG, chunk_tokens=64)
    train_step = functools.partial(
        train.train_step, value_and_grad=train.gradient(loss_fn), update=train.make_update(donate=donate)
    )

    def answers(params: Any, numbers: Sequence[int]) -> list[list[Rollout]]:
        infer.load_params_(engine, params)
        groups = rl.rollouts(engine, TOK, task(), reward, numbers, config=config, seed=3)
        if seen is not None:
            seen.append(groups)
        return groups

    step = functools.partial(rl.rl_step, rollout_fn=answers, train_step=train_step, batch_rows=config.slots)
    return lambda state, numbers, hparams: step(state, [{"numbers": numbers}], hparams)


def test_step_is_pure_and_reports_rollout_metrics():
    state = train.init(random_params(CONFIG), model.spec(CONFIG))
    seen: list[Any] = []
    with Unchanged(state.params, state.opt_state):
        new, metrics = stepper(ascii_share, seen=seen)(state, [0, 1, 2, 3], rates(0.1))
    (groups,) = seen
    answers = [answer for group in groups for answer in group]
    assert float(metrics["rl/reward"]) == pytest.approx(sum(answer.reward for answer in answers) / 12)
    assert float(metrics["rl/answer_tokens"]) == sum(len(answer.tokens) for answer in answers) / 12
    assert float(metrics["tokens"]) == sum(len(answer.tokens) for answer in answers)
    assert float(metrics["rl/finished"]) == sum(answer.finish == "stop" for answer in answers) / 12
    assert float(metrics["rl/mixed"]) == sum(len({answer.reward for answer in group}) > 1 for group in groups) / 4
    assert metrics["finite"] and float(metrics["grad_norm"]) > 0
    assert float(metrics["perf/rollout_tokens_per_second"]) > 0
    assert int(new.step) == 1 and not torch.equal(new.params["lm_head"], state.params["lm_head"])


def test_step_with_equal_rewards_only_advances_the_step_count():
    state = train.init(random_params(CONFIG), model.spec(CONFIG))
    step = stepper(lambda row, text: 1.0)
    new, metrics = step(state, [0, 1, 2, 3], rates(0.1))
    assert int(new.step) == 1 and float(metrics["rl/reward"]) == 1.0 and float(metrics["rl/mixed"]) == 0.0
    assert metrics["finite"] and float(metrics["loss"]) == 0.0
    assert all(torch.equal(x, y) for x, y in zip(tree.leaves(new.params), tree.leaves(state.params)))
    assert int(new.opt_state["step"]) == 0


@pytest.mark.parametrize("sign", [1, -1])
def test_rewarded_answers_become_more_likely(sign: int):
    config = RolloutConfig(prompts_per_step=3, samples_per_prompt=8, max_tokens=6, slots=24)
    state = train.init(random_params(CONFIG), model.spec(CONFIG))
    step, shares = stepper(lambda row, text: sign * ascii_share(row, text), config, donate=True), []
    for number in range(0, 45, 3):
        state, metrics = step(state, range(number, number + 3), rates(0.04))
        shares.append(sign * float(metrics["rl/reward"]))
    first, last = sum(shares[:3]) / 3, sum(shares[-3:]) / 3
    assert sign * (last - first) > 0.15, shares
