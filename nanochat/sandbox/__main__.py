"""Run a program in the sandbox: `python -m nanochat.sandbox [program.py]`, by default from standard input."""

import sys
from pathlib import Path

from nanochat.config import UserError
from nanochat.sandbox import bubblewrap

try:
    result = bubblewrap.run(Path(sys.argv[1]).read_text("utf-8") if sys.argv[1:] else sys.stdin.read())
except UserError as error:
    sys.exit(str(error))
sys.stdout.write(result.stdout)
sys.stderr.write(result.stderr)
print(f"{result.error or 'success'} ({result.seconds:.2f} s)", file=sys.stderr)
sys.exit(not result.success)
