"""usage: torchrun launch.py --experiment=<name> [--set <setting>=<value>]... [--resume] [--help]
--set changes one setting, --resume continues a stopped run, --help with an experiment explains its settings."""

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

from experiments import _renamed
from nanochat import distributed
from nanochat.config import UsageError, UserError, explain, nearest, override
from nanochat.distributed import hardware

ROOT = Path(__file__).resolve().parent


def main(argv: list[str]) -> int:
    """Run one command line; returns 0, 1 (failed), 2 (wrong usage) or 130 (interrupted by Ctrl-C)."""
    try:
        start(argv)
        return 0
    except SystemExit as stopped:
        return stopped.code if isinstance(stopped.code, int) else fail(f"{stopped.code}", 1)
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
    """Parse the flags and run the experiment they name; torch is imported when nothing is wrong with them."""
    files = sorted((ROOT / "experiments").glob("[!_]*.py"))
    docs = {path.stem: ast.get_docstring(ast.parse(path.read_bytes())) or "-" for path in files}
    flag = flags.FlagValues()
    flags.DEFINE_string("experiment", "", "", flag_values=flag)
    flags.DEFINE_multi_string("set", [], "", flag_values=flag)
    flags.DEFINE_boolean("resume", False, "", flag_values=flag)
    flags.DEFINE_boolean("help", False, "", short_name="h", flag_values=flag)
    try:
        args = flag(argv)[1:]
    except flags.Error as error:
        raise UsageError(f"{error}; the flags are --experiment, --set, --resume and --help") from None
    name, settings, resume = flag["experiment"].value or "", flag["set"].value or [], bool(flag["resume"].value)
    if flag["help"].value and not name:
        return print("\n".join([f"{__doc__}", *(f"  {name:<18}{doc.splitlines()[0]}" for name, doc in docs.items())]))
    if name not in docs:
        problem = f"--experiment={name}: no such experiment" if name else "no --experiment given"
        if name in _renamed.EXPERIMENTS:
            raise UsageError(f"--experiment={name}: is now {_renamed.EXPERIMENTS[name]}")
        raise UsageError(f"{problem}{nearest(name or ' '.join(args), docs)}")
    module = importlib.import_module(f"experiments.{name}")
    config = module.config()
    if flag["help"].value:
        return print(f"{docs[name]}\n\nsettings (--set name=value) with their types and defaults:\n\n{explain(config)}")
    if resume and not hasattr(config, "resume"):
        raise UsageError(f"--resume: {name} has nothing to resume")
    if args and not hasattr(config, "args"):
        raise UsageError(f"{args[0]}: unexpected argument; change a setting with --set name=value")
    config = dataclasses.replace(config, args=tuple(args)) if args else config
    config = override(config, [*settings, *["resume=true"] * resume], _renamed.SETTINGS)
    hardware.tune_allocator()  # before torch is imported
    with distributed.distributed_context(getattr(config, "device", "auto"), getattr(config, "dtype", "auto")) as here:
        module.run(config, here)


def fail(message: str, code: int) -> int:
    """Print `message` from the first of this machine's failing ranks; returns `code`."""
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
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    return next((name for name, needs in extras.items() if any(n.startswith(f"{package}>=") for n in needs)), "")


if __name__ == "__main__":
    code = main(sys.argv)
    sys.stdout.flush()
    # An orderly end would wait: for the other ranks, and after a signal for threads that are reading.
    (os._exit if code > 128 or (code and "RANK" in os.environ) else sys.exit)(code)
