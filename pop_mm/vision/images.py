"""One image, from wherever it comes, as an upright RGB picture; or one sentence that says why not."""

from __future__ import annotations

import base64
import binascii
import os
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeAlias
from urllib.parse import unquote

from ..errors import PopError, one_line

if TYPE_CHECKING:
    from PIL import Image

ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | IO[bytes] | Image.Image"

PIP_LINE = 'pip install "pop_mm[qwen-vl]"'
MAX_PIXELS = 89_478_485  # Pillow's own default: 256 MiB of RGB
MAX_BYTES = 128 * 2**20

# Raster formats that Pillow decodes by itself. Others stay closed: EPS, for one, would run Ghostscript.
_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF")
_SIGNATURES = {
    b"%PDF": "a PDF document",
    b"%!PS": "a PostScript file",
    b"\xc5\xd0\xd3\xc6": "a PostScript file",
    b"PK\x03\x04": "a zip archive or office document",
    b"\x1f\x8b": "gzip data",
}


class InputError(PopError, ValueError):
    """An image, a question or a chat cannot be prepared for the model."""


def is_url(source: object) -> bool:
    """Whether ``source`` is an http(s) URL, which nothing here downloads."""
    return isinstance(source, str) and source.lower().startswith(("http://", "https://"))


def load_image(source: ImageSource, *, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES) -> Image.Image:
    """Return an image as RGB, 8 bits a channel, upright.

    Parameters
    ----------
    source : str, path, bytes, binary file or PIL.Image.Image
        A string is a path, a ``file://`` URI or a base64 ``data:`` URI. An image is copied, never changed.
    max_pixels : int
        Larger images are refused by their header, before they are decoded. Pillow's own limit
        (``PIL.Image.MAX_IMAGE_PIXELS``, refused beyond twice that) stays in force and is not touched.
    max_bytes : int
        Larger files are refused without being read.

    Returns
    -------
    PIL.Image.Image
        Mode RGB. EXIF orientation is applied. Of an animation or a multi-page file it is the first frame (of an open
        image, the frame it stands at). Transparency is flattened on white. 16-bit grey is scaled, not clipped; CMYK is
        converted without its colour profile.

    Raises
    ------
    InputError
        No such file, a folder, an http(s) URL, nothing in it, no image or a format that is not a raster image, damaged
        or truncated, too large, without area, of a pixel type that has no defined white (32-bit), or an open 16-bit colour
        PNG with a transparent colour (of which Pillow keeps 8 bits: give the file).
    """
    from PIL import Image

    if isinstance(source, Image.Image):
        name, image = f"the {source.mode} image of {source.width} x {source.height}", source
        _check_size(name, image, max_pixels)
        data = None
    else:
        name, data = _read(source, max_bytes)
        image = _open(name, data, max_pixels)
    try:
        image = _keyed(name, image, data)
        return _to_rgb(_eight_bits(name, _upright(image)))
    except InputError:
        raise
    except Exception as error:  # decoders raise whatever they stumble over
        raise InputError(
            f"{_start(name)} cannot be decoded: {_reason(error)}. It is damaged, cut short or of an unusual kind; save "
            "it again as PNG or JPEG."
        ) from error


def _read(source: Any, max_bytes: int) -> tuple[str, bytes]:
    """A name for messages and the bytes, at most ``max_bytes``."""
    if isinstance(source, str) and source.startswith("data:"):
        name, data = f"the data URI {_short(source)}", _from_data_uri(source)
    elif is_url(source):
        raise InputError(
            f"{_short(source)} is a URL, and load_image downloads nothing. Download it and give the file, or use "
            f"the URL in a chat for a Qwen-VL processor after `{PIP_LINE}`."
        )
    elif isinstance(source, str | os.PathLike):
        name, data = _from_path(source, max_bytes)
    elif isinstance(source, bytes | bytearray | memoryview):
        name, data = "the image given as bytes", bytes(source)
    elif hasattr(source, "read"):
        name = f"the image file {_short(str(getattr(source, 'name', 'in memory')))}"
        data = _from_file(name, source, max_bytes)
    else:
        raise InputError(
            f"An image can be a path, bytes, a binary file or a PIL image; got {type(source).__name__}. "
            "PIL.Image.fromarray makes an image of an array."
        )
    if not data:
        raise InputError(f"{_start(name)} is empty (0 bytes). Check how it was written or downloaded.")
    if len(data) > max_bytes:
        raise _too_many_bytes(name, max_bytes)
    return name, data


def _from_data_uri(uri: str) -> bytes:
    header, comma, payload = uri.partition(",")
    if not comma or not header.endswith(";base64"):
        raise InputError(f"The data URI {_short(uri)} is not of the form data:image/png;base64,<data>.")
    return from_base64(payload)


def from_base64(text: str) -> bytes:
    """Decode base64, line breaks allowed. Raises ``InputError``."""
    try:
        return base64.b64decode("".join(unquote(text).split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"The base64 data of an image is damaged: {_reason(error)}. Encode the file again.") from error


def _from_path(source: str | os.PathLike[str], max_bytes: int) -> tuple[str, bytes]:
    text = os.fspath(source)
    if text.startswith("file://"):
        text = unquote(text[len("file://") :].removeprefix("localhost"))
    name = f"the image file {_short(text)}"
    try:
        path = Path(text).expanduser()
        if path.is_dir():
            raise InputError(f"{_short(text)} is a folder, not an image. Give one of the files in it.")
        if path.exists() and not path.is_file():
            raise InputError(f"{_short(text)} is no ordinary file (a device or a pipe). Give an image file.")
        if path.stat().st_size > max_bytes:
            raise _too_many_bytes(name, max_bytes)
        return name, path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(
            f"There is no image file {_short(text)} (looked from {Path.cwd()}). Check the path."
        ) from error
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # a null byte, a name too long, an unknown ~user
        raise InputError(f"{_start(name)} cannot be read: {_reason(error)}. Check its path and permissions.") from error


def _from_file(name: str, file: Any, max_bytes: int) -> bytes:
    try:
        if hasattr(file, "seekable") and file.seekable():
            file.seek(0)
        data = file.read(max_bytes + 1)
    except (OSError, ValueError) as error:  # ValueError: closed, or text that is no UTF-8
        raise InputError(f"{_start(name)} cannot be read: {_reason(error)}. Open it with mode 'rb'.") from error
    if not isinstance(data, bytes | bytearray):
        raise InputError(f"{_start(name)} is open as text. Open it with mode 'rb'.")
    return bytes(data)


def _open(name: str, data: bytes, max_pixels: int) -> Image.Image:
    from io import BytesIO

    from PIL import Image, UnidentifiedImageError

    Image.init()
    try:
        image = Image.open(BytesIO(data), formats=[kind for kind in _FORMATS if kind in Image.OPEN])
    except UnidentifiedImageError as error:
        raise InputError(
            f"{_start(name)} is not an image that can be read: it looks like {_guess(data)}. Give PNG, JPEG, WebP, "
            "GIF, BMP, TIFF, PPM, JPEG 2000 or AVIF."
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"{_start(name)} is refused before decoding: {_reason(error)}. Scale it down.") from error
    except Exception as error:
        raise InputError(f"{_start(name)} is damaged: {_reason(error)}. Save or download it again.") from error
    _check_size(name, image, max_pixels)
    return image


def _check_size(name: str, image: Image.Image, max_pixels: int) -> None:
    if not (image.width and image.height):
        raise InputError(f"{_start(name)} has no area ({image.width} x {image.height} pixels). Give another image.")
    if image.width * image.height > max_pixels:
        raise InputError(
            f"{_start(name)} has {image.width} x {image.height} = {image.width * image.height:,} pixels, more than the "
            f"{max_pixels:,} that are decoded. Scale it down, or raise max_pixels if you trust the file."
        )


def _upright(image: Image.Image) -> Image.Image:
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # unreadable EXIF says nothing about orientation
        return image


def _keyed(name: str, image: Image.Image, data: bytes | None) -> Image.Image:
    """The image, loaded; where one value of a PNG is transparent (tRNS), that value is in the scale of the pixels.

    Pillow makes 8 bits of pixels of 2 and 4 bits, and of 16-bit colours, but leaves the transparent value in the file's scale.
    """
    key = image.info.get("transparency")
    tiles = getattr(image, "tile", None) if image.format == "PNG" else None  # empty once the image is loaded
    raw = tiles[0][3] if tiles else None
    image.load()
    if isinstance(key, int) and raw in ("L;2", "L;4"):
        image = image.copy()
        image.info["transparency"] = key * (85 if raw == "L;2" else 17)
    elif isinstance(key, tuple) and data is not None and raw == "RGB;16B":
        image = _without_colour(image, data, key)
    elif isinstance(key, tuple) and data is None and (raw == "RGB;16B" or max(key) > 0xFF):
        raise InputError(
            f"{_start(name)} comes from a 16-bit PNG with a transparent colour, and an open image keeps 8 bits of it. Give "
            "the file instead."
        )
    return image


def _without_colour(image: Image.Image, data: bytes, colour: tuple[int, int, int]) -> Image.Image:
    """A 16-bit colour PNG, of which Pillow kept the upper bytes, with an alpha channel that is 0 at one 16-bit colour."""
    from io import BytesIO

    import numpy as np
    from PIL import Image

    lower = Image.open(BytesIO(data), formats=["PNG"])
    lower.tile = [lower.tile[0]._replace(args="RGB;16L")]  # read as little-endian: the other byte
    values = np.asarray(image).astype(np.uint16) << 8 | np.asarray(lower)
    opaque = (values != np.array(colour, np.uint16)).any(-1)
    image = image.copy()
    del image.info["transparency"]
    image.putalpha(Image.fromarray(255 * opaque.astype(np.uint8)))
    return image


def _eight_bits(name: str, image: Image.Image) -> Image.Image:
    """16-bit grey as 8-bit grey, with an alpha channel if one value is transparent; other images as they are."""
    from PIL import Image

    if not (image.mode.startswith("I") or image.mode == "F"):
        return image
    import numpy as np

    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 0xFFFF:
        raise InputError(
            f"{_start(name)} has 32-bit pixels (mode {image.mode}, {values.min():g} to {values.max():g}), and "
            "nothing says which value is white. Scale it to 8 bits."
        )
    grey = Image.fromarray(((values.astype(np.uint32) * 255 + 0x7FFF) // 0xFFFF).astype(np.uint8))
    key = image.info.get("transparency")
    if isinstance(key, int):
        grey.putalpha(Image.fromarray(255 * (values != key).astype(np.uint8)))
    return grey


def _to_rgb(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _guess(data: bytes) -> str:
    start = data[:2048]
    for signature, kind in _SIGNATURES.items():
        if start.startswith(signature):
            return kind
    if start[4:8] == b"ftyp":
        return "a HEIC image or a video"
    if b"<svg" in start.lower():
        return "an SVG drawing"
    try:
        start[:-3].decode("utf-8") if len(data) > len(start) else start.decode("utf-8")
    except UnicodeDecodeError:
        return "unknown binary data, or a damaged image"
    return "a web page" if b"<html" in start.lower() else "text"


def _too_many_bytes(name: str, limit: int) -> InputError:
    return InputError(
        f"{_start(name)} has more than {limit:,} bytes, the most that are read. Scale it down, or raise max_bytes."
    )


def _short(text: str) -> str:
    return repr(text if len(text) <= 120 else f"{text[:40]}...{text[-20:]}")


def _start(name: str) -> str:
    return name[0].upper() + name[1:]


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or one_line(error)
