"""Strangers' files: damaged, hostile and odd ones are refused with reasons; none crashes or fools the reader."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from finetune.errors import CheckpointError, UnsafeError, UserError
from finetune.header import clean, open_tensors, read_header
from finetune.interchange.inspection import inspect_file
from tests.conftest import command
from tests.interchange.files import noise, raw, write

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def entry(**changes) -> dict:
    return {**F32, **changes}


HOSTILE = {
    "endless header": lambda p: raw(p, {"a": F32}, bytes(8), length=1 << 62),
    "header longer than the file": lambda p: raw(p, {"a": F32}, bytes(8), length=10_000),
    "empty": lambda p: p.write_bytes(b""),
    "seven bytes": lambda p: p.write_bytes(b"\0" * 7),
    "not json": lambda p: raw(p, b"{{{{"),
    "not utf-8": lambda p: raw(p, b'{"\xff\xfe": 1}'),
    "a list": lambda p: raw(p, [1, 2, 3]),
    "brackets without end": lambda p: raw(p, b'{"a":' + b"[" * 200_000),
    "deep metadata": lambda p: raw(p, b'{"__metadata__":' + b'{"a":' * 5000 + b"1" + b"}" * 5001),
    "a name twice": lambda p: raw(p, f'{{"a":{json.dumps(F32)},"a":{json.dumps(F32)}}}'.encode(), bytes(8)),
    "overlapping": lambda p: raw(p, {"a": F32, "b": entry(data_offsets=[4, 12])}, bytes(12)),
    "a gap": lambda p: raw(p, {"a": F32, "b": entry(data_offsets=[12, 20])}, bytes(20)),
    "bytes behind": lambda p: raw(p, {"a": F32}, bytes(9)),
    "cut off": lambda p: raw(p, {"a": F32}, bytes(7)),
    "offsets backwards": lambda p: raw(p, {"a": entry(data_offsets=[8, 0])}, bytes(8)),
    "negative offsets": lambda p: raw(p, {"a": entry(data_offsets=[-8, 0])}, bytes(8)),
    "fractions": lambda p: raw(p, {"a": entry(data_offsets=[0.0, 8.0])}, bytes(8)),
    "booleans": lambda p: raw(p, {"a": entry(shape=[True])}, bytes(8)),
    "huge shape": lambda p: raw(p, {"a": entry(shape=[1 << 40, 1 << 40])}, bytes(8)),
    "shape and bytes disagree": lambda p: raw(p, {"a": entry(shape=[3])}, bytes(8)),
    "unknown format": lambda p: raw(p, {"a": entry(dtype="F13")}, bytes(8)),
    "format of another kind": lambda p: raw(p, {"a": entry(dtype=["F32"])}, bytes(8)),
    "missing fields": lambda p: raw(p, {"a": {"dtype": "F32"}}, bytes(8)),
    "too many dimensions": lambda p: raw(p, {"a": entry(shape=[1] * 100 + [2])}, bytes(8)),
    "metadata of numbers": lambda p: raw(p, {"__metadata__": {"a": 1}, "a": F32}, bytes(8)),
    "a zip": lambda p: p.write_bytes(b"PK\x03\x04" + bytes(100)),
    "a git-lfs pointer": lambda p: p.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n"),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_hostile_files_are_refused(name, tmp_path):
    """A file from the internet must not crash, hang, fill the memory or be half believed."""
    path = tmp_path / "file.safetensors"
    HOSTILE[name](path)
    with pytest.raises(CheckpointError) as refused:
        inspect_file(path)
    assert len(refused.value.problems) <= 13
    assert len(refused.value.text()) < 5000


def test_a_picture_that_is_named_by_mistake_is_called_a_picture(tmp_path):
    """"Its header claims to be 727,905,341,920,923,785 bytes long" says nothing to anybody."""
    Image.new("RGB", (8, 8)).save(tmp_path / "01.png")
    with pytest.raises(CheckpointError, match="it is a PNG picture"):
        inspect_file(tmp_path / "01.png")


def test_pickles_are_never_opened(tmp_path):
    """Opening one runs its code."""
    (tmp_path / "model.ckpt").write_bytes(b"\x80\x04")
    with pytest.raises(UnsafeError):
        inspect_file(tmp_path / "model.ckpt")


def test_all_that_is_wrong_is_said_at_once(tmp_path):
    """Mending a file one message at a time is no fun."""
    path = raw(tmp_path / "f.safetensors", {"a": entry(dtype="F13"), "b": entry(shape=[9])}, bytes(16))
    with pytest.raises(CheckpointError) as refused:
        read_header(path)
    assert len(refused.value.problems) == 2


def test_metadata_cannot_play_with_the_terminal(tmp_path, capsys, monkeypatch):
    """Escape sequences in a title could clear the screen, fake output or change the window's title."""
    evil = "\x1b[2J\x1b]0;gotcha\x07 [bold red]boo[/bold red] \u202e end"
    stems = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {f"{stems}.lora_down.weight": noise(2, 1280), f"{stems}.lora_up.weight": noise(1280, 2),
               f"\x1b[31m{stems}": noise(1)}  # fmt: skip
    path = write(tmp_path / "evil.safetensors", tensors, {"modelspec.title": evil, "ss_tag_frequency": "[" * 9000})
    printed = command(capsys, monkeypatch, "inspect", path)
    assert "\x1b" not in printed and "\x07" not in printed and "\u202e" not in printed
    assert "[bold red]boo[/bold red]" in printed
    for value in json.loads(command(capsys, monkeypatch, "inspect", path, "--json"))["training"].values():
        assert clean(value) == value


@given(st.binary(max_size=300), st.integers(0, 400))
@settings(max_examples=150, deadline=None)
def test_any_bytes_end_in_a_message(tmp_path_factory, body, length):
    """Whatever a file holds, the answer is facts or a UserError."""
    path = tmp_path_factory.mktemp("any") / "f.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + body)
    try:
        inspect_file(path)
    except UserError as error:
        assert str(path) in error.text()


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_numbers_are_read_as_torch_reads_them(dtype, tmp_path):
    """numpy knows neither bf16 nor 8-bit floats, so they are widened by hand."""
    values = torch.cat([noise(500, size=30.0), torch.tensor([0.0, -0.0, 1e-4, -3e-3, 240.0])]).to(dtype)
    save_file({"a": values}, tmp_path / "f.safetensors")
    header = read_header(tmp_path / "f.safetensors")
    with open_tensors(header) as tensors:
        assert np.array_equal(np.array(tensors.array("a"), dtype=np.float32), values.float().numpy())


def test_every_8_bit_float_is_right():
    """All 256 codes of both formats against torch."""
    from finetune.header import _eight_bits

    codes = torch.arange(256, dtype=torch.uint8)
    for name, dtype in (("F8_E4M3", torch.float8_e4m3fn), ("F8_E5M2", torch.float8_e5m2)):
        assert np.array_equal(_eight_bits(name), codes.view(dtype).float().numpy(), equal_nan=True)
