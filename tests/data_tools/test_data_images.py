"""The decoder: what the pixels of every kind of file become, and which files are refused by name."""

from __future__ import annotations

import io
import os
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from data_tools.errors import RefusedError
from data_tools.fingerprints import phash, pixel_sha256
from data_tools.images import UPRIGHT, decode, read_picture


def encoded(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def header_only_png(width: int, height: int) -> bytes:
    """A well-formed PNG of any size, in a few bytes: rows of zeros compress a thousandfold."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8)
    data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "WEBP", "GIF", "JPEG", "AVIF"])
def test_every_format_gives_the_same_picture(draw, format):
    """The file format is storage; the picture must not depend on it."""
    lossless = {"lossless": True} if format == "WEBP" else {}
    image, notes = decode(encoded(draw(), format, **lossless))
    error = np.abs(pixels(image) - pixels(draw())).mean()
    assert image.size == (48, 32) and error < (0.01 if format in ("PNG", "BMP", "TIFF", "WEBP") else 8)
    assert notes == ()


@pytest.mark.parametrize("format", ["PNG", "TIFF", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied_everywhere(draw, format, orientation):
    """Phones store the turn in EXIF; a picture lying on its side teaches the model lying subjects."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {"quality": 98} if format == "JPEG" else {}
    image, notes = decode(encoded(draw(), format, exif=exif, **options))
    wanted = draw() if orientation == 1 else draw().transpose(UPRIGHT[orientation][0])
    assert image.size == wanted.size
    assert np.abs(pixels(image) - pixels(wanted)).mean() < 4
    assert notes == (() if orientation == 1 else (UPRIGHT[orientation][1],))


def test_broken_exif_is_noted_and_the_picture_kept(draw):
    """Damaged EXIF is common after editing; the pixels are fine, but silence would hide a lost rotation."""
    image, notes = decode(encoded(draw(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"))
    assert image.size == (48, 32)
    assert notes == () or "unreadable" in notes[0]
    exif = Image.Exif()
    exif[0x0112] = 77
    assert decode(encoded(draw(), "JPEG", exif=exif))[1] == ("EXIF orientation unreadable, taken as upright",)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_grey_keeps_its_greys(format):
    """A plain conversion clips at 255: peers train on white."""
    values = np.linspace(0, 65535, 64 * 32).reshape(32, 64).astype(np.uint16)
    image, _ = decode(encoded(Image.fromarray(values), format))
    assert np.abs(pixels(image)[..., 0] - np.rint(values / 257)).max() <= 1


def test_16_bit_rgb_png_keeps_its_colours(draw):
    """Scanners write 48-bit PNG; the colours must come out as in 8 bits."""
    source = np.asarray(draw()).astype(np.uint16) * 257
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in source)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 48, 32, 16, 2, 0, 0, 0))
    image, _ = decode(png + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    assert np.abs(pixels(image) - pixels(draw())).max() <= 1


def test_float_tiff_in_0_to_1_is_scaled_and_others_are_refused():
    """Floats have no white level but by convention; guessing one would change every picture."""
    values = np.linspace(0, 1, 32 * 32, dtype=np.float32).reshape(32, 32)
    image, _ = decode(encoded(Image.fromarray(values), "TIFF"))
    assert np.abs(pixels(image)[..., 0] - np.rint(values * 255)).max() == 0
    for bad in (values * 1000, values * np.nan):
        with pytest.raises(RefusedError, match="float grey values"):
            decode(encoded(Image.fromarray(bad), "TIFF"))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "1-bit tRNS"])
def test_transparent_pixels_show_the_background(mode):
    """Below transparency lies whatever the editor left there; peers train on it."""
    image = Image.new("RGBA", (40, 30), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (20, 0, 40, 30))
    options = {}
    if mode == "LA":
        image = image.convert("LA")
    elif mode == "P":
        image = image.quantize(8)
    elif mode == "1-bit tRNS":
        image = Image.fromarray(np.where(np.arange(40) < 20, 255, 0).astype(np.uint8)[None].repeat(30, 0))
        options = {"transparency": 255}
    result, notes = decode(encoded(image, "PNG", **options), (10, 200, 30))
    assert result.getpixel((5, 5)) == (10, 200, 30) and result.getpixel((35, 5)) == (0, 0, 0)
    assert notes == ("alpha composited on #0ac81e",)


def test_opaque_alpha_changes_nothing(draw):
    """An alpha channel that hides nothing must neither change pixels nor earn a note."""
    image, notes = decode(encoded(draw().convert("RGBA"), "PNG"), (1, 2, 3))
    assert notes == () and (pixels(image) == pixels(draw())).all()


@pytest.mark.parametrize("mode", ["P", "L", "1", "CMYK", "LAB", "YCbCr"])
def test_every_mode_becomes_rgb(draw, mode):
    """Training sees three channels; the look must survive the way there."""
    image = (
        ImageCms.profileToProfile(
            draw(), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
        )
        if mode == "LAB"
        else draw().quantize(256)
        if mode == "P"
        else draw().convert(mode)
    )
    result, notes = decode(encoded(image, "PNG" if mode in ("P", "L", "1") else "TIFF"))
    wanted = draw() if mode in ("P", "CMYK", "LAB", "YCbCr") else draw().convert(mode).convert("RGB")
    assert np.abs(pixels(result) - pixels(wanted)).mean() < 6
    assert ("CMYK converted without a profile" in notes) == (mode == "CMYK")


def linear_profile() -> bytes:
    """A minimal ICC profile: sRGB's primaries (adapted to D50), but a gamma of 1."""

    def fixed(*values: float) -> bytes:
        return b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    primaries = {
        b"rXYZ": (0.4361, 0.2225, 0.0139),
        b"gXYZ": (0.3851, 0.7169, 0.0971),
        b"bXYZ": (0.1431, 0.0606, 0.7141),
    }
    tags = {name: b"XYZ \0\0\0\0" + fixed(*value) for name, value in primaries.items()}
    tags[b"wtpt"] = b"XYZ \0\0\0\0" + fixed(0.9642, 1.0, 0.8249)
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), b"curv\0\0\0\0\0\0\0\0")
    tags[b"desc"] = b"desc\0\0\0\0" + struct.pack(">I", 7) + b"linear\0" + bytes(81)
    table, body = b"", b""
    for name, value in tags.items():
        table += name + struct.pack(">II", 132 + 12 * len(tags) + len(body), len(value))
        body += value + bytes(-len(value) % 4)
    rest = b"mntrRGB XYZ " + bytes(12) + b"acsp" + bytes(28) + fixed(0.9642, 1.0, 0.8249) + bytes(48)
    start = struct.pack(">I", 132 + len(table) + len(body)) + bytes(4) + b"\x02\x40\0\0"
    return start + rest + struct.pack(">I", len(tags)) + table + body


def test_embedded_profile_is_applied(draw):
    """Cameras embed wider or other colour spaces; read as sRGB, all colours come out wrong."""
    result, notes = decode(encoded(draw(), "PNG", icc_profile=linear_profile()))
    light = pixels(draw()) / 255
    wanted = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055) * 255
    assert notes == ("ICC linear to sRGB",) and np.abs(pixels(result) - wanted).max() < 4


def test_srgb_profile_changes_nothing_and_a_broken_one_is_noted(draw):
    """Most profiles are sRGB itself; a damaged one must not cost the picture, nor pass in silence."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for image in (draw(), draw().convert("L")):
        result, notes = decode(encoded(image, "PNG", icc_profile=srgb))
        assert np.abs(pixels(result) - pixels(image.convert("RGB"))).max() <= 1
        assert "ICC profile unusable, taken as sRGB" not in notes
    result, notes = decode(encoded(draw(), "PNG", icc_profile=b"not a profile"))
    assert notes == ("ICC profile unusable, taken as sRGB",) and (pixels(result) == pixels(draw())).all()


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_is_taken_and_said(draw, format):
    """Peers take the first frame too, but tell nobody."""
    options = {"save_all": True, "append_images": [draw(tint=3), draw(tint=5)]}
    if format == "WEBP":
        options["lossless"] = True
    image, notes = decode(encoded(draw(tint=1), format, **options))
    assert notes == ("first of 3 frames",)
    assert np.abs(pixels(image) - pixels(draw(tint=1))).mean() < 8


@pytest.mark.parametrize("format", ["JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF", "AVIF"])
@pytest.mark.parametrize("part", [0.3, 0.6, 0.9])
def test_truncated_files_are_refused(tmp_path, draw, format, part):
    """Half a download decodes to half a picture and a grey rest, unless it is loaded whole and checked."""
    noisy = Image.effect_noise((64, 64), 80).convert("RGB")
    data = encoded(noisy, format)
    path = tmp_path / f"half.{format.lower()}"
    path.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(RefusedError, match=r"truncated|damaged") as caught:
        read_picture(path)
    assert caught.value.code == 3


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>", "DOCTYPE"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "pillow-heif|damaged header"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "not a picture"),
        (b"\x89PNG\r\n\x1a\n", "has a damaged header"),
    ],
)
def test_files_that_are_no_picture_say_what_they_are(data, reason):
    """A saved error page called photo.png is the most common broken picture of all."""
    with pytest.raises(RefusedError, match=reason):
        decode(data)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "AVIF", "GIF", "TIFF", "BMP"])
def test_what_is_said_of_a_damaged_file_is_the_same_every_time(draw, format):
    """Lines are gathered by their words, and reports compared; an address in memory would make each its own."""
    data = encoded(draw(200, 150), format)
    for tenth in range(1, 10):
        words = set()
        for _ in range(2):
            with pytest.raises(RefusedError) as caught:
                decode(data[: len(data) * tenth // 10])
            words.add(str(caught.value))
        assert len(words) == 1 and " at 0x" not in words.pop()


@pytest.mark.parametrize(("gamma", "noted"), [(100_000, True), (45_455, False), (45_000, False)])
def test_a_png_that_names_its_gamma_is_read_as_browsers_show_it(draw, gamma, noted):
    """Linear pixels taken for sRGB are far too dark; programs that write 0.45 mean sRGB."""
    image = draw(48, 32)
    chunk = b"gAMA" + struct.pack(">I", gamma)
    data = encoded(image, "PNG")
    data = data[:33] + struct.pack(">I", 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[33:]
    read, notes = decode(data)
    expected = 255 * (pixels(image) / 255) ** (1 / 2.2) if noted else pixels(image)
    assert notes == (("PNG gamma 1 to sRGB",) if noted else ()) and np.abs(pixels(read) - expected).max() <= 0.5


@pytest.mark.parametrize("side", [10_000, 20_000])
def test_huge_pictures_are_refused_from_the_header(tmp_path, side):
    """A 48 kB file can ask for gigabytes; the answer must come before any pixel, in little memory."""
    path = tmp_path / "bomb.png"
    path.write_bytes(header_only_png(side, side))
    code = (
        "import re, sys, pathlib\nfrom data_tools.images import read_picture\n"
        "from data_tools.errors import RefusedError\n"
        "try: read_picture(pathlib.Path(sys.argv[1]))\n"
        "except RefusedError as error: print(error)\n"
        # keep: not ru_maxrss, which a child inherits from the process that started it.
        "status = pathlib.Path('/proc/self/status')\n"
        "peak = re.search(r'VmHWM:\\s+(\\d+)', status.read_text())[1] if status.exists() else 0\n"
        "print('MB', int(peak) // 1024)"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "64 million pixels" in result.stdout, result.stderr
    assert int(result.stdout.split("MB")[-1]) < 256


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipes_and_sockets_are_never_waited_for(tmp_path):
    """Opening a named pipe waits for its writer for ever; peers hang."""
    os.mkfifo(tmp_path / "pipe.png")
    short = Path(tempfile.mkdtemp())
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(short / "socket.png"))  # its path may not exceed about 100 bytes
        for path in (tmp_path / "pipe.png", short / "socket.png", tmp_path):
            seen: list[BaseException] = []

            def attempt(path=path, seen=seen):
                try:
                    read_picture(path)
                except RefusedError as error:
                    seen.append(error)

            thread = threading.Thread(target=attempt, daemon=True)
            thread.start()
            thread.join(5)
            assert not thread.is_alive() and seen, path
    (short / "socket.png").unlink()
    short.rmdir()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_bytes_decode_or_are_refused(draw, data):
    """Whatever a disk or a mail did to a file: a picture within the limits, or a refusal; never a crash."""
    format = data.draw(st.sampled_from(["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"]))
    raw = bytearray(encoded(draw(24, 16), format))
    for _ in range(data.draw(st.integers(1, 6))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        image, _ = decode(bytes(raw))
    except RefusedError:
        return
    assert image.mode == "RGB" and image.width * image.height <= 64_000_000


def test_phash_is_near_for_copies_and_far_for_others(draw):
    """The hash is for finding near copies, so re-encoding must move few bits and another picture many."""

    def bits(one: Image.Image, other: Image.Image) -> int:
        return bin(int(phash(one), 16) ^ int(phash(other), 16)).count("1")

    generator = np.random.default_rng(0)
    first, second = (
        Image.fromarray(generator.integers(0, 255, (12, 12, 3), dtype=np.uint8)).resize(
            (256, 200), Image.Resampling.BICUBIC
        )
        for _ in range(2)
    )
    copy = decode(encoded(first.resize((128, 100)), "JPEG", quality=60))[0]
    assert len(phash(first)) == 16 and bits(first, copy) <= 6 and bits(first, second) >= 16
    assert phash(Image.new("RGB", (50, 50), (9, 9, 9))) == phash(Image.new("RGB", (60, 40), (9, 9, 9)))


def test_pixel_hash_sees_pixels_and_size_only(draw):
    """Exact copies in other formats are copies; the same bytes in another shape are not."""
    png, bmp = (decode(encoded(draw(), format))[0] for format in ("PNG", "BMP"))
    assert pixel_sha256(png) == pixel_sha256(bmp)
    assert pixel_sha256(Image.new("RGB", (8, 16))) != pixel_sha256(Image.new("RGB", (16, 8)))
