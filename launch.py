"""usage: torchrun launch.py --experiment=<name> [--set <setting>=<value>]... [--resume] [--help]
--set overrides one setting, --resume goes on after a stop, --help with an experiment shows its page and settings."""

import ast
import dataclasses
import importlib
import json
import os
import signal
import sys
import time
import tomllib
from pathlib import Path

from absl import flags

from nanochat import distributed
from nanochat.config import UsageError, UserError, describe, nearest, override
from nanochat.distributed import hardware

ROOT = Path(__file__).resolve().parent


def main(argv: list[str]) -> int:
    """Run one command line; returns 0, 1 (failed), 2 (wrong usage) or 130 (interrupted by Ctrl-C)."""
    try:
        start(argv)
        return 0
    except UserError as error:
        return fail(f"error: {error}", 2 if isinstance(error, UsageError) else 1)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # torchrun passes the same Ctrl-C on once more
        return fail("stopped by Ctrl-C", 130)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and (extra := extra_with(str(error.name).split(".")[0])):
            return fail(f'error: the package {error.name} is missing: pip install -e ".[{extra}]"', 1)
        sys.excepthook(type(error), error, error.__traceback__)
        return 1


def start(argv: list[str]) -> None:
    """Parse the flags and run the experiment they name. Raises: UserError."""
    files = {path.stem: path.read_bytes() for path in sorted((ROOT / "experiments").glob("[!_]*.py"))}
    docs = {name: ast.get_docstring(ast.parse(code)) or "-" for name, code in files.items()}
    overview = "\n".join([f"{__doc__}", *(f"  {name:<18}{doc.splitlines()[0]}" for name, doc in docs.items())])
    flag = flags.FlagValues()
    flags.DEFINE_string("experiment", "", "", flag_values=flag)
    flags.DEFINE_multi_string("set", [], "", flag_values=flag)
    flags.DEFINE_boolean("resume", False, "", flag_values=flag)
    flags.DEFINE_boolean("help", False, "", short_name="h", flag_values=flag)
    try:
        words = flag(argv)[1:]
    except flags.Error as error:
        raise UsageError(f"{error}\n\n{overview}") from None
    name = flag["experiment"].value
    if flag["help"].value and not name:
        return print(overview)
    if name not in docs:
        wrong = f"--experiment={name}: no such experiment" if name else "no --experiment given"
        raise UsageError(f"{wrong}{nearest(name or ' '.join(words), docs)}\n\n{overview}")
    hardware.tune_allocator()
    module = importlib.import_module(f"experiments.{name}")
    config = module.config()
    if flag["help"].value:
        return print(f"{docs[name]}\n\nsettings (--set <name>=<value>) and their defaults:\n\n{describe(config)}")
    if flag["resume"].value and not hasattr(config, "resume"):
        raise UsageError(f"--resume: {name} has nothing to resume")
    if words and not hasattr(config, "args"):
        raise UsageError(f"{words[0]}: {name} takes no words; a setting is given as --set name=value")
    config = dataclasses.replace(config, args=tuple(words)) if words else config
    config = override(config, (flag["set"].value or []) + ["resume=true"] * bool(flag["resume"].value))
    with distributed.distributed_context(getattr(config, "device", "auto"), getattr(config, "dtype", "auto")) as here:
        module.run(config, here)


def fail(message: str, code: int) -> int:
    """Print `message` from one of this machine's failing ranks, the lowest as a rule; returns `code`."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # torchrun's <attempt>/<local rank>/error.json
        time.sleep(0.1 * int(os.environ["LOCAL_RANK"]))
        summary = {"message": message.splitlines()[0], "extraInfo": {"timestamp": f"{time.time():.0f}"}}
        Path(path).write_text(json.dumps({"message": summary}), "utf-8")
        try:
            Path(path).parent.with_name("reported").touch(exist_ok=False)
        except FileExistsError:
            return code
    print(message, file=sys.stderr, flush=True)
    return code


def extra_with(package: str) -> str:
    """Return the extra of pyproject.toml that installs `package`, or an empty string."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    return next((name for name, needs in extras.items() if any(n.startswith(f"{package}>=") for n in needs)), "")


if __name__ == "__main__":
    code = main(sys.argv)
    sys.stdout.flush()
    (os._exit if code and "RANK" in os.environ else sys.exit)(code)  # an orderly end would wait for the other ranks
