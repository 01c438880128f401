"""Run a program in the sandbox: `python -m nanochat.sandbox program.py`."""

import sys

from nanochat.sandbox import bubblewrap

sys.exit(bubblewrap.main())
