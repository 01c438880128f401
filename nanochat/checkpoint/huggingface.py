"""A model as a folder that Hugging Face transformers opens with `trust_remote_code=True`, and back.

The modeling and configuration files and the chat template in `hf/` are copied into the folder; nothing of this package
is needed to use it. Byte-level BPE is written so that `tokenizers` gives tiktoken's ids for every text.
"""

import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

from nanochat import jsonl, model, tree
from nanochat.checkpoint import convert, tensor_files
from nanochat.config import UserError
from nanochat.data import Tokenizer, tokenizer
from nanochat.model import ModelConfig, Params

# Our name -> that in the folder; in a layer, without "layers.{i}."
NAMES = {
    "wte": "model.embed_tokens.weight",
    "lm_head": "lm_head.weight",
    "resid_lambdas": "model.resid_lambdas",
    "x0_lambdas": "model.x0_lambdas",
    "smear_gate": "model.smear_gate.weight",
    "smear_lambda": "model.smear_lambda",
    "backout_lambda": "model.backout_lambda",
    "attn.q": "model.layers.{i}.self_attn.q_proj.weight",
    "attn.k": "model.layers.{i}.self_attn.k_proj.weight",
    "attn.v": "model.layers.{i}.self_attn.v_proj.weight",
    "attn.proj": "model.layers.{i}.self_attn.o_proj.weight",
    "attn.value_gate": "model.layers.{i}.self_attn.value_gate.weight",
    "attn.value_embed": "model.layers.{i}.self_attn.value_embed.weight",
    "mlp.fc": "model.layers.{i}.mlp.up_proj.weight",
    "mlp.proj": "model.layers.{i}.mlp.down_proj.weight",
}
CONFIG_NAMES = {
    "sequence_len": "max_position_embeddings",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads",
    "n_embd": "hidden_size",
}
MODEL_TYPE = "nanochat_gpt"
FILES = Path(__file__).parent / "hf"  # copied, never imported
MARK = r"\x{FDD0}\x{FDD1}"  # before a special token's name, and twice between texts: see hf/chat_template.jinja


def save(folder: Path, params: Params, tok: Tokenizer, *, step: int, stage: str, shard_size: int | str = "5GB") -> None:
    """Write a model into an empty folder, without the model card. Matrices keep their dtype."""
    config = model.config_of(params)
    flat = tree.flatten(params)
    tensor_files.write(folder, {convert.renamed(name, NAMES): x for name, x in flat.items()}, shard_size)
    for file in FILES.iterdir():
        if file.suffix in (".py", ".jinja"):
            shutil.copyfile(file, folder / file.name)
    dtype = str(flat["lm_head"].dtype).removeprefix("torch.")
    for name, content in {
        "config.json": config_json(config, tok, dtype) | {"step": step, "stage": stage},
        "generation_config.json": generation_json(tok),
        "tokenizer.json": tokenizer_json(tok),
        "tokenizer_config.json": tokenizer_settings(tok, config),
    }.items():
        jsonl.write_atomic(folder / name, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def load(folder: Path) -> tuple[Params, Tokenizer, dict[str, Any]]:
    """Return the model in a folder that `save` wrote, or `save_pretrained` after training, and its config.json."""
    settings = tensor_files.json_object(folder / "config.json")
    if settings.get("model_type") != MODEL_TYPE:
        problem = f"has model_type {str(settings.get('model_type'))[:100]!r}, expected {MODEL_TYPE!r}"
        raise UserError(f"{folder / 'config.json'}: {problem}; only folders of --experiment=export are converted")
    names = {name: CONFIG_NAMES.get(name, name) for name in ModelConfig.__dataclass_fields__}
    config = convert.config_from(settings, str(folder / "config.json"), names)
    params, _ = convert.from_named(tensor_files.read(folder), config, NAMES, str(folder))
    return params, read_tokenizer(folder / "tokenizer.json"), settings


def config_json(config: ModelConfig, tok: Tokenizer, dtype: str) -> dict[str, Any]:
    fields = {CONFIG_NAMES.get(name, name): getattr(config, name) for name in ModelConfig.__dataclass_fields__}
    classes = {"AutoConfig": "configuration_nanochat.NanochatConfig", "AutoModel": "modeling_nanochat.NanochatModel"}
    return {
        "model_type": MODEL_TYPE,
        "architectures": ["NanochatForCausalLM"],
        "auto_map": classes | {"AutoModelForCausalLM": "modeling_nanochat.NanochatForCausalLM"},
        **fields,
        "dtype": dtype,
        "tie_word_embeddings": False,
        "use_cache": True,
        **token_ids(tok),
    }


def token_ids(tok: Tokenizer) -> dict[str, Any]:
    """An answer ends with <|assistant_end|>, and where the next document would begin."""
    stops = [tok.special("<|assistant_end|>"), tok.bos]
    return {"bos_token_id": tok.bos, "eos_token_id": stops, "pad_token_id": tok.bos}


def generation_json(tok: Tokenizer) -> dict[str, Any]:
    """The settings with which `--experiment=chat` draws tokens."""
    return token_ids(tok) | {"do_sample": True, "temperature": 0.8, "top_k": 50}


# The tokenizer


def tokenizer_settings(tok: Tokenizer, config: ModelConfig) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|assistant_end|>",
        "pad_token": "<|bos|>",
        "extra_special_tokens": [name for name in tok.specials if name not in ("<|bos|>", "<|assistant_end|>")],
        "split_special_tokens": True,  # text that spells a special token is text
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.sequence_len,
    }


def tokenizer_json(tok: Tokenizer) -> dict[str, Any]:
    """Return the content of tokenizer.json for `tokenizers`.

    `ignore_merges` looks a whole piece up first, as tiktoken does; so a special token's name is its id where the chat
    template has marked it, which makes it a piece of its own. No other text does: the pattern splits the names.
    """
    chars = tokenizer.byte_chars()
    vocab = {"".join(chars[byte] for byte in token): i for i, token in enumerate(tok.tokens)}
    merges = [["".join(chars[byte] for byte in part) for part in pair] for pair in merge_pairs(tok)]
    specials = {name: tok.special(name) for name in tok.specials}
    names = "|".join(re.escape(name) for name in tok.specials)
    follows = rf"(?:{MARK}|{names}|\z)"
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    splits = [
        (f"{MARK}{follows}", "Isolated"),
        (f"{MARK}(?:{names})|{tok.pattern}", "Isolated"),
        (f"{MARK}(?={follows})", "Removed"),
    ]
    pre = [{"type": "Split", "pattern": {"Regex": r}, "behavior": b, "invert": False} for r, b in splits]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": name, **flags} for name, i in specials.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*pre, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "ignore_merges": True, "vocab": vocab | specials, "merges": merges},
    }


def merge_pairs(tok: Tokenizer) -> list[tuple[bytes, bytes]]:
    """Return the pair that makes each token, by rank of the token.

    tiktoken merges the pair whose token has the lowest rank, whatever its halves. Within the bytes of a token it does
    so as if they stood alone, since no merge has crossed their border, so each token comes from one pair only.
    """
    ranks = {token: rank for rank, token in enumerate(tok.tokens)}
    pairs = []
    for token in tok.tokens:
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            joined = [ranks.get(a + b, len(ranks)) for a, b in itertools.pairwise(parts)]
            i = joined.index(min(joined))
            if joined[i] == len(ranks):
                break  # tiktoken has this token only as a whole piece
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            pairs.append((parts[0], parts[1]))
    return pairs


def read_tokenizer(path: Path) -> Tokenizer:
    """Return the tokenizer in a tokenizer.json that `tokenizer_json` made, or `save_pretrained` of it."""
    content = tensor_files.json_object(path)
    byte_of = {char: byte for byte, char in tokenizer.byte_chars().items()}
    try:
        specials = {token["content"]: token["id"] for token in content["added_tokens"]}  # type: ignore[index]
        vocab = {name: i for name, i in content["model"]["vocab"].items() if name not in specials}  # type: ignore[index]
        tokens = [bytes(byte_of[char] for char in name) for name in sorted(vocab, key=vocab.__getitem__)]
        regex = content["pre_tokenizer"]["pretokenizers"][1]["pattern"]["Regex"]  # type: ignore[index]
        tok = Tokenizer(
            tuple(tokens),
            next((pattern for pattern in tokenizer.PATTERNS if regex.endswith(f"|{pattern}")), regex),
            tuple(sorted(specials, key=specials.__getitem__)),
        )
        if sorted([*vocab.values(), *specials.values()]) != list(range(tok.vocab_size)):
            raise ValueError("its ids have holes")
        tokenizer.check(tok)
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        raise UserError(f"{path}: not a tokenizer of --experiment=export ({type(error).__name__}: {error})") from None
    return tok
