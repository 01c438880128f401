"""Reference checkpoints to parameters and back, older ones, and files that are refused."""

import dataclasses
import os
import pickle
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


def test_names_match_the_reference():
    names = set(reference())
    layer = {"attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}
    want = {f"transformer.h.{i}.{name}.weight" for i in range(3) for name in layer}
    want |= {f"transformer.h.{i}.attn.ve_gate.weight" for i in (0, 2)} | {f"value_embeds.{i}.weight" for i in (0, 2)}
    want |= {"transformer.wte.weight", "lm_head.weight", "smear_gate.weight"}
    assert names == want | {"resid_lambdas", "x0_lambdas", "smear_lambda", "backout_lambda"}


def test_round_trip():
    params = random_params()
    back = convert.from_reference(convert.to_reference(params, CONFIG), CONFIG)
    a, b = tree.flatten(params), tree.flatten(back)
    assert list(a) == list(b) and all(torch.equal(a[n], b[n]) for n in a)
    assert all(a[n].data_ptr() != b[n].data_ptr() for n in a), "the parameters own their memory"
    assert torch.equal(model.apply(back, random_batch()["inputs"]), model.apply(params, random_batch()["inputs"]))
    again = convert.to_reference(back)
    assert all(torch.equal(x, again[n]) for n, x in reference().items())


def test_embeddings_keep_half_precision_and_matrices_become_float32():
    half = {name: x.bfloat16() for name, x in reference().items()}
    params = tree.flatten(convert.from_reference(half, CONFIG))
    rows = model.spec(CONFIG)
    assert {n: x.dtype for n, x in params.items()} == {
        n: torch.bfloat16 if rows[n].embedding else torch.float32 for n in rows
    }
    assert torch.equal(params["wte"], half["transformer.wte.weight"])


def test_names_of_a_compiled_model_are_accepted():
    compiled = {f"_orig_mod.{name}": x for name, x in reference().items()}
    a, b = tree.flatten(convert.from_reference(compiled, CONFIG)), tree.flatten(random_params())
    assert all(torch.equal(a[n], b[n]) for n in b)


def test_0d_scalars_are_accepted():
    old = reference() | {"smear_lambda": torch.tensor(0.5), "backout_lambda": torch.tensor(0.25)}
    params = convert.from_reference(old, CONFIG)
    assert params["smear_lambda"].tolist() == [0.5] and params["backout_lambda"].tolist() == [0.25]


NEWER = ("resid_lambdas", "x0_lambdas", "smear", "backout", "value_embeds", "ve_gate")


def test_older_checkpoint_gets_neutral_values(capsys: pytest.CaptureFixture[str]):
    whole = reference()
    old = {name: x for name, x in whole.items() if not any(part in name for part in NEWER)}
    params = convert.from_reference(old, CONFIG)
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and printed.startswith("reference checkpoint: older format, neutral values for")
    for name in ("resid_lambdas", "x0_lambdas", "smear_gate", "smear_lambda", "backout_lambda", "value_embed"):
        assert name in printed
    assert params["resid_lambdas"].tolist() == [1, 1, 1] and params["x0_lambdas"].tolist() == [0, 0, 0]
    # The same logits as a plain transformer, written out here.
    tokens = random_batch()["inputs"]
    x = first = gpt.rms(params["wte"][tokens])
    rotary = gpt.rotation(torch.arange(tokens.shape[1]), CONFIG.head_dim, x.dtype)
    for i, window in enumerate(CONFIG.windows):
        layer = params["layers", str(i)]
        attn = layer["attn"].exclude("value_embed", "value_gate")
        q, k, v = gpt.project_qkv(attn, gpt.rms(x), tokens, rotary, CONFIG, model.Compute())
        x = x + attention.sdpa(q, k, v, window).flatten(2) @ attn["proj"].T
        x = x + gpt.mlp(layer["mlp"], gpt.rms(x), model.Compute())
    want = model.unembed(gpt.rms(x), params["lm_head"], CONFIG)
    torch.testing.assert_close(model.apply(params, tokens, config=CONFIG), want)
    assert not torch.equal(x, first)


def test_complete_checkpoint_prints_nothing(capsys: pytest.CaptureFixture[str]):
    convert.from_reference(reference(), CONFIG)
    assert capsys.readouterr().out == ""


LAYERS = "does not belong to a model of 3 layers"
MISFITS = [  # what is added to a whole checkpoint, and what is said of it
    ({"transformer.h.0.attn.rotary": torch.ones(2)}, "unknown parameter 'transformer.h.0.attn.rotary'; it is not of"),
    ({"bert.encoder": torch.ones(2)}, "unknown parameter 'bert.encoder'; it is not of nanochat's GPT"),
    ({"transformer.h.3.mlp.c_fc.weight": torch.ones(2)}, f"layers.3.mlp.fc {LAYERS}"),
    ({"value_embeds.1.weight": torch.ones(2)}, f"layers.1.attn.value_embed {LAYERS}"),
    ({"lm_head.weight": torch.ones(64, 32)}, "lm_head has shape (64, 32), the config wants (128, 32)"),
    ({"lm_head.weight": torch.tensor(1.0)}, "lm_head has shape (1,), the config wants (128, 32)"),
]


@pytest.mark.parametrize("extra, message", MISFITS)
def test_mismatched_parameters_are_refused(extra: dict[str, Tensor], message: str):
    with pytest.raises(UserError) as error:
        convert.from_reference(reference() | extra, CONFIG)
    assert str(error.value).startswith(f"reference checkpoint: {message}")


@pytest.mark.parametrize("name", ["lm_head.weight", "transformer.h.1.attn.c_q.weight"])
def test_missing_parameter_without_neutral_value_is_refused(name: str):
    state_dict = reference()
    del state_dict[name]
    with pytest.raises(UserError) as error:
        convert.from_reference(state_dict, CONFIG)
    assert str(error.value) == f"reference checkpoint: {convert.to_ours(name)} is missing"


def test_config_from_meta_file(capsys: pytest.CaptureFixture[str]):
    fields = dataclasses.asdict(CONFIG)
    assert convert.config_from_reference(fields | {"dropout": 0.0}) == CONFIG
    assert capsys.readouterr().out == ""
    del fields["window_pattern"]
    assert convert.config_from_reference(fields) == dataclasses.replace(CONFIG, window_pattern="L")
    assert "older format, window_pattern L" in capsys.readouterr().out
    with pytest.raises(UserError, match="reference checkpoint: model n_layer=0: must be at least 1"):
        convert.config_from_reference(fields | {"n_layer": 0})
    del fields["n_kv_head"]
    with pytest.raises(UserError, match="reference checkpoint: its model_config has no n_kv_head"):
        convert.config_from_reference(fields)


# --- files ----------------------------------------------------------------------------------------------------------


def test_file_of_tensors_loads(tmp_path: Path):
    path = tmp_path / "model_000010.pt"
    torch.save(reference(dtype=torch.bfloat16), path)
    params = tree.flatten(convert.load_reference(path, CONFIG))
    want = tree.flatten(random_params(dtype=torch.bfloat16))
    assert all(torch.equal(params[n], want[n]) and params[n].dtype == want[n].dtype for n in want)


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


def test_invalid_files_are_refused(tmp_path: Path):
    missing, garbage, empty = tmp_path / "no.pt", tmp_path / "garbage.pt", tmp_path / "empty.pt"
    garbage.write_bytes(b"not a checkpoint at all")
    empty.write_bytes(b"")
    with pytest.raises(UserError, match=r"no\.pt: no such file"):
        convert.load_reference(missing, CONFIG)
    for path in (garbage, empty):
        with pytest.raises(UserError, match=rf"{path.name}: not a file of plain tensors"):
            convert.load_reference(path, CONFIG)
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\)"):
        convert.load_reference(tmp_path, CONFIG)
    for content in ([torch.ones(1)], {"model": {"lm_head.weight": torch.ones(1)}}, torch.ones(2)):
        other = tmp_path / "other.pt"
        torch.save(content, other)
        with pytest.raises(UserError, match=r"other\.pt: not a state_dict"):
            convert.load_reference(other, CONFIG)
