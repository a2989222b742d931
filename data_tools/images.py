"""The decoder: any picture file -> upright 8-bit sRGB pixels, or words that say why not.

Every picture of the toolkit goes through `decode`: size, hash, bucket and training see the same pixels.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from data_tools.errors import RefusedError
from data_tools.files import read_regular

DECODER = "2"
"""Changes when the same bytes give other pixels or other words; what older scans saw is then looked at again."""

with contextlib.suppress(ImportError):
    import pillow_heif

    pillow_heif.register_heif_opener()
    DECODER += f" heif {pillow_heif.__version__}"

# keep: sizes are checked here before anything is decoded, and what is odd about a file becomes a note or a refusal.
warnings.filterwarnings("ignore", module=r"PIL\.")

SUFFIXES = frozenset(
    {
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".apng",
        ".webp",
        ".gif",
        ".bmp",
        ".tif",
        ".tiff",
        ".avif",
        ".heic",
        ".heif",
    }
)
"""File endings that are taken for pictures; what a file really is, its content says."""
# keep: a closed list, because Pillow would also start Ghostscript for EPS and open formats nobody trains on.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF")
MAX_PIXELS = 64_000_000
"""Largest picture that is decoded; 64 MP are 192 MB of RGB. A 48 kB PNG can hold 400 MP."""
MAX_FILE_BYTES = 512 * 2**20
MIN_SIDE = 8
"""Pixels; the autoencoders of all families shrink by 8, so a smaller picture has no latent at all."""
WHITE, BLACK = (255, 255, 255), (0, 0, 0)
"""Behind transparent pixels: white behind pictures, black behind masks, of which these places do not count."""
MAGIC = re.compile(
    rb"\x89PNG\r\n|\xff\xd8\xff|GIF8|RIFF....WEBP|BM|II\*\0|MM\0\*|....ftyp(?:avi[fs]|hei[cx]|mif1|msf1)", re.DOTALL
)
"""How files of the formats above begin."""
GAMMA_SLACK = 0.05
"""Programs write 0.45, 0.4545 and the like and mean sRGB."""
REPLACE = "copy it again from the original, or remove it"
Color = tuple[int, int, int]

ORIENTATION = 0x0112
BITS_PER_SAMPLE = 258
# EXIF orientation -> (what turns the stored pixels upright, how a note calls it; degrees are clockwise)
UPRIGHT = {
    2: (Image.Transpose.FLIP_LEFT_RIGHT, "EXIF mirrored"),
    3: (Image.Transpose.ROTATE_180, "EXIF rotated 180"),
    4: (Image.Transpose.FLIP_TOP_BOTTOM, "EXIF flipped"),
    5: (Image.Transpose.TRANSPOSE, "EXIF mirrored and rotated 270"),
    6: (Image.Transpose.ROTATE_270, "EXIF rotated 90"),
    7: (Image.Transpose.TRANSVERSE, "EXIF mirrored and rotated 90"),
    8: (Image.Transpose.ROTATE_90, "EXIF rotated 270"),
}


def read_picture(path: Path, background: Color = WHITE) -> Image.Image:
    """Decode one picture file completely into upright 8-bit sRGB, as `decode` does.

    Args:
        path: a regular file; pipes, sockets and devices are refused without being waited for.
        background: red, green, blue in 0 to 255, shown where the picture is transparent.

    Raises:
        RefusedError: the file cannot be read or decoded whole, or exceeds `MAX_PIXELS`.
    """
    return decode(read_regular(path, MAX_FILE_BYTES), background)[0]


def decode(data: bytes, background: Color = WHITE, *, shrink: float = 1.0) -> tuple[Image.Image, tuple[str, ...]]:
    """The bytes of a picture file -> (upright RGB picture, notes on what had to be done to it).

    The header is checked before anything is decoded; EXIF rotation, colour profile, 16-bit and float depth, palette,
    CMYK and transparency are applied; of an animation the first frame is taken.

    Args:
        data: the whole file.
        background: shown where the picture is transparent.
        shrink: how many times smaller the picture may come out; above 2 a JPEG is decoded at a half, a quarter or an
            eighth of its size, which takes a fraction of the time, and never smaller than size / shrink.

    Raises:
        RefusedError: not a picture, damaged, too large, or pixel values without a known white level.
    """
    image = _open(data)
    notes: list[str] = []
    try:
        if shrink >= 2:
            image.draft(None, (int(image.width / shrink), int(image.height / shrink)))
        return _upright_rgb(image, background, notes), tuple(notes)
    except RefusedError:
        raise
    except Exception as error:  # hostile bytes make decoders raise nearly anything
        raise _damaged(error) from error


def opacity(data: bytes) -> Image.Image:
    """How opaque each pixel of a picture file is, upright, mode L; 255 everywhere without transparency.

    Raises:
        RefusedError: as `decode` does.
    """
    image = _open(data)
    try:
        image.load()
        left = _orientation(image, [])
        alpha = _split_alpha(image)[1] or Image.new("L", image.size, 255)
    except RefusedError:
        raise
    except Exception as error:  # hostile bytes make decoders raise nearly anything
        raise _damaged(error) from error
    return alpha.transpose(UPRIGHT[left][0]) if left in UPRIGHT else alpha


def _open(data: bytes) -> Image.Image:
    """Read the header only."""
    if not data:
        raise RefusedError("is empty (0 bytes)", "there is no picture in it", REPLACE)
    Image.init()
    try:
        image = Image.open(BytesIO(data), formats=[name for name in FORMATS if name in Image.OPEN])
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        pixels = re.search(r"\d+", str(error))
        raise _too_large(f"is a decompression bomb ({int(pixels[0]) if pixels else 0:,} pixels)") from error
    except UnidentifiedImageError as error:
        heic = data[4:8] == b"ftyp" and "HEIF" not in Image.OPEN
        if MAGIC.match(data) and not heic:
            raise RefusedError("has a damaged header, or is cut off", "its size is unknown", REPLACE) from error
        start = data[:16].decode("ascii", errors="replace")
        raise RefusedError(
            f"is not a picture we can decode (it starts with {start!r})",
            "HEIC needs a plugin" if heic else f"known are {', '.join(FORMATS)}",
            "pip install pillow-heif, or save it as JPEG or PNG" if heic else REPLACE,
        ) from error
    except Exception as error:  # hostile bytes make header readers raise nearly anything
        raise RefusedError(
            f"has a damaged header ({type(error).__name__}: {error})", "its size is unknown", REPLACE
        ) from error
    if image.width * image.height > MAX_PIXELS:
        raise _too_large(f"is {image.width} x {image.height} pixels")
    return image


def _damaged(error: Exception) -> RefusedError:
    words = " ".join(str(error).split())
    what = "is truncated" if "truncated" in words.lower() else f"is damaged ({type(error).__name__}: {words})"
    return RefusedError(what, "parts of the picture would be missing", REPLACE)


def _too_large(what: str) -> RefusedError:
    return RefusedError(
        what,
        f"pictures above {MAX_PIXELS // 10**6} million pixels are not decoded, to keep memory bounded",
        "save a smaller version: training uses a few million pixels at most",
    )


def _upright_rgb(image: Image.Image, background: Color, notes: list[str]) -> Image.Image:
    frames = getattr(image, "n_frames", 1)
    stored = _orientation(image, notes)
    profile = image.info.get("icc_profile")
    image.load()
    # keep: asked again, because Pillow turns TIFF upright itself and PNG may carry EXIF behind the pixels.
    left = _orientation(image, notes)
    colors, alpha = _split_alpha(image)
    rgb = _to_srgb(colors, profile, notes)
    if profile is None:
        rgb = _to_srgb_gamma(rgb, image.info, notes)
    if alpha is not None and alpha.getextrema() != (255, 255):
        canvas = Image.new("RGB", rgb.size, background)
        canvas.paste(rgb, mask=alpha)
        rgb = canvas
        notes.append(f"alpha composited on {color_name(background)}")
    if left in UPRIGHT:
        rgb = rgb.transpose(UPRIGHT[left][0])
    turned = left if left in UPRIGHT else stored
    if turned in UPRIGHT:
        notes.append(UPRIGHT[turned][1])
    if frames > 1:
        notes.append(f"first of {frames} frames")
    return rgb


def color_name(color: Color) -> str:
    """ "white", "black" or "#rrggbb"."""
    return {WHITE: "white", BLACK: "black"}.get(color, "#{:02x}{:02x}{:02x}".format(*color))


def _orientation(image: Image.Image, notes: list[str]) -> int:
    """The EXIF orientation, 1 when there is none; broken EXIF gets a note, since the pixels may be fine."""
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except Exception:  # EXIF parsers raise nearly anything on damaged bytes
        value = None
    if value == 1 or value in UPRIGHT:
        return int(value)
    note = "EXIF orientation unreadable, taken as upright"
    if note not in notes:
        notes.append(note)
    return 1


def _split_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Colours in one of the modes L, RGB, CMYK, YCbCr, LAB, HSV, and opacity (L) or None."""
    if image.mode.startswith("I;16"):
        return _grey_16(image)
    if image.mode in ("I", "F"):
        return _grey_32(image), None
    if image.mode == "LA":
        return image.getchannel("L"), image.getchannel("A")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return rgba.convert("RGB"), rgba.getchannel("A")
    if image.mode == "1":
        return image.convert("L"), None
    return (image.convert("RGB") if image.mode in ("P", "PA", "RGBX") else image), None


def _grey_16(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """16-bit grey -> 8-bit grey; Pillow's own conversion clips at 255, which makes nearly all of it white."""
    values = np.asarray(image).astype(np.uint32)
    white = _white_level(image)
    grey = Image.fromarray(((np.minimum(values, white) * 255 + white // 2) // white).astype(np.uint8))
    key = image.info.get("transparency")
    alpha = None if key is None else Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8))
    return grey, alpha


def _white_level(image: Image.Image) -> int:
    """Largest value of a 16-bit-mode picture: 12-bit TIFFs are stored in the same mode."""
    bits = getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE, (16,))
    return int(2 ** (bits[0] if isinstance(bits, tuple) else bits)) - 1


def _grey_32(image: Image.Image) -> Image.Image:
    """Float grey in 0 to 1, or 16-bit values in a 32-bit mode (older Pillow, PNG) -> 8-bit grey."""
    values = np.asarray(image).astype(np.float64)
    low, high = float(values.min()), float(values.max())
    top = 1.0 if image.mode == "F" else 65535.0
    agreed = image.mode == "F" or image.format == "PNG"
    if not (agreed and low >= 0.0 and high <= top):
        raise RefusedError(
            f"holds {'float' if image.mode == 'F' else '32-bit'} grey values from {low:g} to {high:g}",
            "no rule says which of them is white (floats are expected in 0 to 1)",
            "save it with 8 or 16 bits",
        )
    return Image.fromarray(np.rint(values / top * 255).astype(np.uint8))


def _to_srgb(image: Image.Image, profile: bytes | None, notes: list[str]) -> Image.Image:
    """Apply the embedded colour profile; without one the values are taken as sRGB."""
    if image.mode == "LAB":
        lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
        notes.append("LAB converted")
        return _transform(image, lab)
    if image.mode == "YCbCr":
        image = image.convert("RGB")
    cmyk = image.mode == "CMYK"
    if profile:
        try:
            image, name = _through_profile(image, profile)
            if name:
                notes.append(f"ICC {name} to sRGB")
        except (ImageCms.PyCMSError, OSError, ValueError):
            notes.append("ICC profile unusable, taken as sRGB")
    if cmyk:
        notes.append("CMYK converted" if image.mode == "RGB" else "CMYK converted without a profile")
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_srgb_gamma(image: Image.Image, info: Mapping[Any, Any], notes: list[str]) -> Image.Image:
    """Apply the exponent that a PNG without a profile may name, as browsers do.

    Source: PNG specification, 4th edition, 11.3.2.2: sample = light ** gamma; sRGB is taken as 1 / 2.2.
    """
    gamma = info.get("gamma")
    if not gamma or "srgb" in info or abs(gamma * 2.2 - 1) < GAMMA_SLACK:
        return image
    notes.append(f"PNG gamma {gamma:g} to sRGB")
    return image.point([round(255 * (value / 255) ** (1 / (2.2 * gamma))) for value in range(256)] * 3)


def _through_profile(image: Image.Image, data: bytes) -> tuple[Image.Image, str]:
    """(sRGB picture, name of the profile), or (the picture as it is, "") when the profile already is sRGB."""
    profile = ImageCms.ImageCmsProfile(BytesIO(data))
    name = ImageCms.getProfileDescription(profile).strip()
    if profile.profile.xcolor_space.strip() == "RGB" and image.mode == "L":
        image = image.convert("RGB")
    if image.mode == "RGB" and "srgb" in name.lower():
        return image, ""
    return _transform(image, profile), name or "profile"


def _transform(image: Image.Image, profile: ImageCms.ImageCmsProfile) -> Image.Image:
    converted = ImageCms.profileToProfile(
        image,
        profile,
        ImageCms.createProfile("sRGB"),
        outputMode="RGB",
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
        flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )
    assert converted is not None, "profileToProfile returns None only when it works in place"
    return converted
