"""What the ranks of test_rl_experiment.py run: --experiment=rl with a reward that a random model gets."""

import sys
from typing import Any

import launch
from nanochat.train import Reward, rl


def ascii_share(row: Any, text: str) -> float:
    """Return the share of characters that are ASCII, in halves: so that answers often have the same."""
    return round(2 * sum(ord(letter) < 128 for letter in text) / max(len(text), 1)) / 2


def reward(task: Any) -> Reward:
    return ascii_share


def launch_rl(*words: str) -> None:
    """Run launch.py with that reward."""
    rl.correct_reward = reward
    sys.exit(launch.main(["launch.py", *words]))
