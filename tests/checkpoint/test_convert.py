"""Reference checkpoints to parameters and back, older ones, and files that are refused."""

import dataclasses
import io
import math
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_model import CONFIG, random_batch, random_params
from torch import Tensor

from nanochat import model, tree
from nanochat.checkpoint import convert
from nanochat.config import UserError
from nanochat.model import attention, gpt


def reference(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return convert.to_reference(random_params(dtype=dtype), CONFIG)


def test_round_trip(capsys: pytest.CaptureFixture[str]):
    params = random_params()
    back = convert.from_reference(convert.to_reference(params, CONFIG), CONFIG)
    a, b = tree.flatten(params), tree.flatten(back)
    assert list(a) == list(b) and all(torch.equal(a[n], b[n]) for n in a)
    assert all(a[n].data_ptr() != b[n].data_ptr() for n in a), "the parameters own their memory"
    assert torch.equal(model.apply(back, random_batch()["inputs"]), model.apply(params, random_batch()["inputs"]))
    again = convert.to_reference(back)
    assert all(torch.equal(x, again[n]) for n, x in reference().items())
    assert capsys.readouterr().out == ""


def test_embeddings_keep_half_precision_and_matrices_become_float32():
    half = {name: x.bfloat16() for name, x in reference().items()}
    params = tree.flatten(convert.from_reference(half, CONFIG))
    for name, row in model.spec(CONFIG).items():
        assert params[name].dtype == (torch.bfloat16 if row.embedding else torch.float32), name
    assert torch.equal(params["wte"], half["transformer.wte.weight"])


def test_names_of_a_compiled_model_and_0d_scalars_are_accepted():
    scalars = {"smear_lambda": torch.tensor(0.5), "backout_lambda": torch.tensor(0.25)}
    compiled = {f"_orig_mod.{name}": x for name, x in (reference() | scalars).items()}
    params, want = tree.flatten(convert.from_reference(compiled, CONFIG)), tree.flatten(random_params())
    assert params["smear_lambda"].tolist() == [0.5] and params["backout_lambda"].tolist() == [0.25]
    assert all(torch.equal(params[n], want[n]) for n in want if n not in scalars)


NEWER = ("resid_lambdas", "x0_lambdas", "smear", "backout", "value_embeds", "ve_gate")


def test_older_checkpoint_gets_neutral_values(capsys: pytest.CaptureFixture[str]):
    old = {name: x for name, x in reference().items() if not any(part in name for part in NEWER)}
    params = convert.from_reference(old, CONFIG)
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and printed.startswith("reference checkpoint: older format, neutral values for")
    for name in ("resid_lambdas", "x0_lambdas", "smear_gate", "smear_lambda", "backout_lambda", "value_embed"):
        assert name in printed
    assert params["resid_lambdas"].tolist() == [1, 1, 1] and params["x0_lambdas"].tolist() == [0, 0, 0]
    # The same logits as a plain transformer, written out here.
    tokens = random_batch()["inputs"]
    x = gpt.rms(params["wte"][tokens])
    rotary = gpt.rotation(torch.arange(tokens.shape[1]), CONFIG.head_dim, x.dtype)
    for i, window in enumerate(CONFIG.windows):
        layer = params["layers", str(i)]
        attn = layer["attn"].exclude("value_embed", "value_gate")
        q, k, v = gpt.project_qkv(attn, gpt.rms(x), tokens, rotary, CONFIG, model.Compute())
        x = x + attention.sdpa(q, k, v, window).flatten(2) @ attn["proj"].T
        x = x + gpt.mlp(layer["mlp"], gpt.rms(x), model.Compute())
    want = model.unembed(gpt.rms(x), params["lm_head"], CONFIG)
    torch.testing.assert_close(model.apply(params, tokens, config=CONFIG), want)


UNKNOWN = "is not of nanochat's GPT with 3 layers"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"bert.encoder": torch.ones(2)}, f"bert.encoder {UNKNOWN}"),
        ({"transformer.h.3.mlp.c_fc.weight": torch.ones(2)}, f"transformer.h.3.mlp.c_fc.weight {UNKNOWN}"),
        ({"value_embeds.1.weight": torch.ones(2)}, f"value_embeds.1.weight {UNKNOWN}"),
        ({"lm_head.weight": torch.ones(64, 32)}, "lm_head.weight has shape (64, 32), the config wants (128, 32)"),
        ({"transformer.h.1.attn.c_q.weight": None}, "transformer.h.1.attn.c_q.weight is missing"),
    ],
)
def test_mismatched_parameters_are_refused(changed: dict[str, Tensor | None], message: str):
    state_dict = {name: x for name, x in (reference() | changed).items() if x is not None}
    with pytest.raises(UserError) as error:
        convert.from_reference(state_dict, CONFIG)
    assert str(error.value) == f"reference checkpoint: {message}"


def test_config_from_meta_file(capsys: pytest.CaptureFixture[str]):
    fields = dataclasses.asdict(CONFIG)
    assert convert.config_from_reference(fields | {"dropout": 0.0}) == CONFIG
    assert capsys.readouterr().out == ""
    del fields["window_pattern"]
    assert convert.config_from_reference(fields) == dataclasses.replace(CONFIG, window_pattern="L")
    assert "older format, window_pattern L" in capsys.readouterr().out
    with pytest.raises(UserError, match="reference checkpoint: model n_layer=0: must be at least 1"):
        convert.config_from_reference(fields | {"n_layer": 0})
    for wrong in ("3", 3.0, math.nan, None, True, [3]):
        with pytest.raises(UserError, match=re.escape(f"its model_config has n_layer={wrong!r}, expected int")):
            convert.config_from_reference(fields | {"n_layer": wrong})
    with pytest.raises(UserError, match=r"transformer.h.999999999.attn.c_q.weight is missing"):
        convert.from_reference(reference(), dataclasses.replace(CONFIG, n_layer=10**9))
    del fields["n_kv_head"]
    with pytest.raises(UserError, match="reference checkpoint: its model_config has no n_kv_head"):
        convert.config_from_reference(fields)


class Payload:
    """Runs code when unpickled: here it would make a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.mark),)


def save_bare(x: object, path: Path) -> None:
    """Write as files were before torch's zip format."""
    path.write_bytes(pickle.dumps(x, 2))


@pytest.mark.parametrize("write", [torch.save, save_bare])
def test_pickled_code_is_refused_and_never_runs(tmp_path: Path, write: Callable[[object, Path], object]):
    path, mark = tmp_path / "model.pt", tmp_path / "mark"
    write(reference() | {"lm_head.weight": Payload(mark)}, path)
    with pytest.raises(UserError) as error:
        convert.load_reference(path, CONFIG)
    assert str(error.value).startswith(f"{path}: not a file of plain tensors: it is corrupt, or contains code")
    assert "\n" not in str(error.value) and "weights_only" not in str(error.value)
    assert not mark.exists()
    if write is save_bare:
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert mark.exists(), "the payload is a real one"


FC = "transformer.h.1.mlp.c_fc.weight"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (FC, lambda x: x.long(), "int64 on cpu"),
        (FC, lambda x: x.to("meta"), "float32 on meta"),
        (FC, lambda x: x.to_sparse(), "sparse_coo float32"),
        (FC, lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "qint8"),
        (FC, lambda x: torch.nested.nested_tensor(list(x)), "does not hold"),
        (FC, lambda x: torch.ones(1).expand(x.shape), "does not hold"),
        (FC, lambda x: {"weight": x}, f"not a state_dict (a mapping of names to tensors): '{FC}' is a dict"),
        ("transformer.wte.weight", lambda x: x.double(), "float64"),
        (f"_orig_mod.{FC}", lambda x: x, "it has a parameter twice, with _orig_mod. and without"),
        (7, lambda x: x, "not a state_dict (a mapping of names to tensors): 7 is a Tensor"),
        (None, lambda x: x, "None is a Tensor"),
        (("a",), lambda x: x, "('a',) is a Tensor"),
        ("a\nb", lambda x: x, f"a\\nb {UNKNOWN}"),
    ],
)
def test_files_of_other_tensors_are_refused(tmp_path: Path, name: object, change: Callable, message: str):
    state_dict = reference()
    value = change(state_dict.get(str(name), state_dict[FC]))
    torch.save({**state_dict, name: value}, tmp_path / "model.pt")
    with pytest.raises(UserError, match=f"^{re.escape(str(tmp_path / 'model.pt'))}: .*{re.escape(message)}"):
        convert.load_reference(tmp_path / "model.pt", CONFIG)


def test_damaged_packed_and_other_files_are_refused(tmp_path: Path):
    path, packed = tmp_path / "model.pt", io.BytesIO()
    torch.save(reference(), path)
    saved = path.read_bytes()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as copy:
        for name in archive.namelist():
            copy.writestr(name, archive.read(name))
    middle = len(saved) // 2
    for content, message in {
        saved[:middle]: "not a file of plain tensors",
        saved[:middle] + bytes([saved[middle] ^ 1]) + saved[middle + 1 :]: "not a file of plain tensors",
        packed.getvalue(): "not a file of plain tensors",
        b"": "not a file of plain tensors",
        (64).to_bytes(8, "little") + b'{"lm_head.weight": {': "not a file of plain tensors: it is a safetensors file",
        b"version https://git-lfs.github.com/spec/v1": "not a file of plain tensors: it is a Git LFS pointer",
        b"\n<!DOCTYPE html>": "not a file of plain tensors: it is a web page",
    }.items():
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"^{re.escape(str(path))}: {message}"):
            convert.load_reference(path, CONFIG)


def test_unreadable_files_are_refused(tmp_path: Path):
    (tmp_path / "garbage.pt").write_bytes(b"not a checkpoint at all")
    torch.save([torch.ones(1)], tmp_path / "list.pt")
    torch.save({"model": {"lm_head.weight": torch.ones(1)}}, tmp_path / "nested.pt")
    messages = {
        "no.pt": "cannot be read (No such file or directory)",
        ".": "cannot be read (Is a directory)",
        "garbage.pt": "not a file of plain tensors",
        "list.pt": "not a state_dict",
        "nested.pt": "not a state_dict",
    }
    for name, message in messages.items():
        with pytest.raises(UserError, match=re.escape(f"{tmp_path / name}: {message}")):
            convert.load_reference(tmp_path / name, CONFIG)
