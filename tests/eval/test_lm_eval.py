"""lm-evaluation-harness on an exported folder gives the accuracy of our own scorer under the same template."""

from pathlib import Path

import core_ranks
import lm_eval_tasks
import pytest
import tiny_run
from small_model import random_params

from experiments import export
from nanochat import distributed

LABELS = ["arc_easy", "copa", "lambada_openai"]


@pytest.mark.slow
def test_accuracies_are_equal(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    pytest.importorskip("accelerate", reason='pip install -e ".[dev]"')
    lm_eval = pytest.importorskip("lm_eval", reason='pip install -e ".[dev]"')
    config = core_ranks.small_config()
    params, tok = random_params(config), core_ranks.small_tokenizer()
    tiny_run.save_run(base, config=config, params=params, tok=tok)
    export.run(export.Config(run="bot"), distributed.init("cpu"))
    # Longer prompts than the training context, which the harness would cut.
    settings = f"pretrained={base / 'exports' / 'bot_hf'},trust_remote_code=True,add_bos_token=True,max_length=640"
    tasks = lm_eval_tasks.tasks(core_ranks.BUNDLE, LABELS, base)
    results = lm_eval.simple_evaluate("hf", settings, tasks, device="cpu", batch_size=16, bootstrap_iters=0)
    for label in LABELS:
        accuracy, ours = lm_eval_tasks.scores(params, config, tok, core_ranks.BUNDLE, label)
        assert results["results"][f"local_{label}"]["acc,none"] == pytest.approx(accuracy), label
        for row, theirs in zip(ours, results["samples"][f"local_{label}"], strict=True):
            for scored, (log_likelihood, greedy) in zip(row, theirs["filtered_resps"], strict=True):
                assert float(log_likelihood) == pytest.approx(-scored.nats, abs=1e-3)
                assert str(greedy) == str(scored.n_correct_greedy == scored.n_tokens)
