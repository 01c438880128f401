"""Fetch pretraining data: download ClimbMix shards, or write another source as parquet shards.

    torchrun launch.py --experiment=data                                 170 shards of about 100 MB, and the last one
    torchrun launch.py --experiment=data --set num_shards=8              a few, to try things out; -1 for all 6542
    torchrun launch.py --experiment=data --set data.source=embedded      text of the Python installation, no network
    torchrun launch.py --experiment=data --set data.source=hub:roneneldan/TinyStories

170 shards take a few minutes on a fast line. Run the command again to resume an interrupted download. Any
folder of parquet or jsonl files with a text column is used as it is (`--set data.source=<folder>`): nothing to fetch,
but this command shows what is in it. Prints the folder, its shards and the next command.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated

from nanochat.config import Settings, base_dir
from nanochat.data import DataConfig, Options, download, sources, tokenizer
from nanochat.eval import core_bundle
from nanochat.text import table

if TYPE_CHECKING:
    from nanochat.distributed import Runtime


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """What to fetch, and how.

    Attributes:
        num_shards: ClimbMix shards to train on, -1 for all; the one that validates comes on top.
        base_url: address of the folder that holds ClimbMix's shards.
        bundle_url: address of the bundle that the CORE metric is computed with; none: not fetched.
        bundle_sha256: SHA-256 that its zip file must have; none: any.
        download: workers, attempts and the wait between them.
    """

    data: DataConfig = DataConfig()
    num_shards: Annotated[int, "at least 1, or -1 for all", lambda x: x == -1 or x >= 1] = 170
    base_url: str = download.CLIMBMIX_URL
    bundle_url: str | None = core_bundle.URL
    bundle_sha256: str | None = core_bundle.SHA256
    download: Options = Options()


config = Config


def run(config: Config, runtime: Runtime) -> None:
    if not runtime.is_main:
        return
    source, parts = config.data.source, sources.parts_of(config.data)
    if any(part.source == "climbmix" for _, part in parts):
        folder = base_dir() / "climbmix"
        print(f"climbmix: {config.num_shards if config.num_shards >= 0 else 'all'} shards into {folder}", flush=True)
        fetched = download.climbmix(folder, config.num_shards, config.download, base_url=config.base_url)
        print(f"{fetched} files fetched now" if fetched else "all of them were there already")
        if config.bundle_url:
            bundle = core_bundle.fetch(config.bundle_url, config.download, config.bundle_sha256)
            print(f"evaluation bundle: {bundle}")
    rows = []
    for split in sources.SPLITS:
        files = sources.shards_of(config.data, split)
        megabytes = sum(shard.path.stat().st_size for shard in files) / 1e6
        part = " (part of it)" if files[0].part != "all" else ""
        rows.append([split, f"{len(files)} shards", f"{megabytes:,.1f} MB{part}"])
    print(table(rows))
    first = next(sources.texts(config.data, "train"))
    folders = ", ".join(str(sources.folder_of(part)) for _, part in parts)
    print(f"in {folders}; the first document begins: {first[:60]!r}")
    setting = "" if source == DataConfig().source else f" --set data.source={source}"
    trained = (tokenizer.default_dir() / tokenizer.TOKENS_FILE).exists()
    print(f"next: torchrun launch.py --experiment={'pretrain_d20' if trained else 'tokenizer'}{setting}")
