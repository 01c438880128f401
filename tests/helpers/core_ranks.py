"""What the ranks of test_core.py run: CORE on the small bundle, with plain or sharded parameters."""

import functools
import json
import random
from pathlib import Path

import torch
from small_model import random_params
from tensordict import TensorDict

from nanochat import distributed, model, tree
from nanochat.data import Tokenizer, tokenizer
from nanochat.distributed import ShardingConfig, sharding
from nanochat.eval import Results, core, core_bundle
from nanochat.model import Compute, ModelConfig

BUNDLE = Path(__file__).parents[1] / "data" / "core_bundle"


@functools.cache
def small_tokenizer() -> Tokenizer:
    """Return a tokenizer learned from the bundle's own rows."""
    texts = [path.read_text("utf-8") for path in sorted(BUNDLE.glob("eval_data/*/*.jsonl"))]
    return tokenizer.train(texts, 400)


def small_config() -> ModelConfig:
    """Return a shape in which prompts are longer than all windows together."""
    return ModelConfig(sequence_len=64, vocab_size=400, n_layer=3, n_head=4, n_kv_head=2, n_embd=32, window_pattern="L")


def evaluate(params: TensorDict, compute: Compute = Compute()) -> Results:
    """Return the scores of the small model, from several batches a task, and seldom an even number of them."""
    bundle = core_bundle.read(BUNDLE)
    return core.evaluate(params, small_config(), small_tokenizer(), bundle, compute=compute, tokens_per_batch=700)


def as_json(results: Results) -> str:
    """Return all answers, with every bit of their losses."""
    assert not results.failed
    return json.dumps([results.core, {label: task.answers for label, task in results.tasks.items()}])


def evaluate_on_ranks(mode: str) -> str:
    """Return the answers of all tasks as JSON; `mode`: replicate or fsdp."""
    here = distributed.init("cpu")
    params, compute = random_params(small_config()), Compute()
    if mode == "fsdp":
        sharding_plan = sharding.make_plan(ShardingConfig("fsdp"), here, model.spec(small_config()))
        assert sharding_plan is not None
        shards = {name: sharding.place(sharding_plan, name, x) for name, x in tree.flatten(params).items()}
        params = sharding.gather(sharding_plan, tree.unflatten(shards), torch.float32)
        compute = Compute(all_gather=sharding.gather_layer(sharding_plan, torch.float32))
    random.seed(here.rank)  # results do not depend on it
    answers = as_json(evaluate(params, compute))
    distributed.close()
    return answers
