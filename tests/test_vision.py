import base64
import copy
import io
import struct
import subprocess
import sys
import warnings
import zlib
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, BatchFeature, pipeline

from helpers.tiny_processors import processor_folder, tokenizer
from pop_mm.errors import PopError
from pop_mm.samples import SampleError
from pop_mm.vision import (
    InputError,
    chat,
    decode,
    image_token_counts,
    load_image,
    load_processor,
    prepare,
    prepare_chats,
)

QWEN = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
ALL = [*QWEN, "llava", "llava_next", "llava_onevision", "idefics3", "internvl"]
PIP_LINE = r'pip install "pop_mm\[qwen-vl\]"'


def picture(width=60, height=90, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image, kind="PNG", **settings):
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    """``processor("llava")``, loaded once."""
    return cache(lambda family: load_processor(processor_folder(family, tmp_path_factory.mktemp(family))))


@pytest.fixture(scope="module")
def qwen(processor):
    """``qwen("qwen3_vl")``: a processor, and a tiny model of that type for it."""
    vision = dict(depth=2, num_heads=2, out_hidden_size=32, hidden_size=16)
    own = {
        "qwen2_vl": dict(embed_dim=16, hidden_size=32, mlp_ratio=2),
        "qwen2_5_vl": dict(intermediate_size=32, fullatt_block_indexes=[1], window_size=56),
        "qwen3_vl": dict(intermediate_size=32, deepstack_visual_indexes=[0], num_position_embeddings=64),
    }

    @cache
    def build(family):
        made = processor(family)
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
        text = dict(vocab_size=len(made.tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2)
        text.update(num_attention_heads=4, num_key_value_heads=2, head_dim=8, rope_parameters=rope, eos_token_id=None)
        tokens = {f"{kind}_token_id": getattr(made, f"{kind}_token_id") for kind in ("image", "video")}
        for kind in ("start", "end"):
            tokens[f"vision_{kind}_token_id"] = made.tokenizer.convert_tokens_to_ids(f"<|vision_{kind}|>")
        config = AutoConfig.for_model(family, text_config=text, vision_config={**vision, **own[family]}, **tokens)
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config).double().eval()  # ties in float32 would flip tokens
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, made.tokenizer.pad_token_id
        return made, model

    return build


# images ---------------------------------------------------------------------------------------------------------------


def test_every_kind_of_source_gives_the_same_pixels(tmp_path):
    image, path = picture(), tmp_path / "a b.png"
    data = encoded(image)
    path.write_bytes(data)
    uri = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    with path.open("rb") as file:
        file.read(5)  # it is read from its start all the same
        sources = [path, str(path), f"file://{path}", f"file://{str(path).replace(' ', '%20')}", uri, data]
        for source in [*sources, bytearray(data), io.BytesIO(data), file, image]:
            loaded = load_image(source)
            assert loaded.mode == "RGB" and loaded.tobytes() == image.tobytes()
    assert load_image(image) is not image


COLOURS = [
    ("1", 1, (255, 255, 255)),
    ("L", 200, (200, 200, 200)),
    ("LA", (10, 0), (255, 255, 255)),
    ("RGBA", (255, 0, 0, 128), (255, 127, 127)),
    ("RGBa", (128, 0, 0, 128), (255, 127, 127)),
    ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
    ("YCbCr", (90, 128, 128), (90, 90, 90)),
    ("HSV", (0, 255, 255), (255, 0, 0)),
    ("I;16", 32768, (128, 128, 128)),
    ("I;16B", 65535, (255, 255, 255)),
    ("I", 257, (1, 1, 1)),
]


@pytest.mark.parametrize(("mode", "colour", "expected"), COLOURS)
@given(width=st.integers(1, 40), height=st.integers(1, 40))
@hypothesis_settings(max_examples=5, deadline=None, derandomize=True)
def test_every_mode_and_size_becomes_rgb(mode, colour, expected, width, height):
    image = Image.new(mode, (width, height), colour)
    loaded = load_image(image)
    assert loaded.mode == "RGB" and loaded.size == (width, height)
    assert loaded.getcolors() == [(width * height, expected)]
    assert image.mode == mode


@pytest.mark.parametrize(("mode", "key"), [("L", 7), ("RGB", (7, 7, 7)), ("1", 1), ("P", 1), ("P", bytes([255, 0]))])
def test_transparent_colours_and_palettes_turn_white(mode, key):
    image = Image.new(mode, (2, 1), 0)
    if mode == "P":
        image.putpalette([9, 9, 9, 255, 0, 0])
    image.putpixel((1, 0), 1 if mode in "1P" else key)
    loaded = load_image(encoded(image, transparency=key))
    assert loaded.getpixel((0, 0)) == ((9, 9, 9) if mode == "P" else (0, 0, 0))
    assert loaded.getpixel((1, 0)) == (255, 255, 255)


def png(bits, colour_type, rows, **chunks):
    """A PNG, written without Pillow: ``rows`` ``[H, W, samples]`` in the file's scale; chunks are PLTE and tRNS."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    def line(row):
        if bits >= 8:
            return b"\0" + row.astype(">u2" if bits == 16 else np.uint8).tobytes()
        return b"\0" + np.packbits([[v >> b & 1 for b in reversed(range(bits))] for v in row.flatten()]).tobytes()

    rows = np.asarray(rows)
    header = struct.pack(">IIBBBBB", rows.shape[1], rows.shape[0], bits, colour_type, 0, 0, 0)
    parts = [(b"IHDR", header), *((name.encode(), data) for name, data in chunks.items())]
    parts += [(b"IDAT", zlib.compress(b"".join(line(row) for row in rows))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_a_transparent_grey_of_any_depth_turns_white(bits):
    largest = 2**bits - 1
    greys = sorted({0, 1, largest // 3, largest * 3 // 4, largest})
    for key in greys:
        loaded = np.asarray(load_image(png(bits, 0, [[[v] for v in greys]] * 2, tRNS=struct.pack(">H", key))))
        for value, pixel in zip(greys, loaded[1], strict=True):
            assert abs(int(pixel[0]) - (255 if value == key else value * 255 / largest)) <= 0.5
    opaque = np.asarray(load_image(png(bits, 0, [[[v] for v in greys]])))
    assert np.abs(opaque[0, :, 0] - np.array(greys) * 255 / largest).max() <= 0.5


@pytest.mark.parametrize("bits", [8, 16])
def test_a_transparent_colour_turns_white_and_its_neighbours_do_not(bits):
    unit = 257 if bits == 16 else 1
    key = (32 * unit, 7 * unit, 200 * unit)
    row = [key, (key[0] + 1, *key[1:]), (*key[:2], key[2] - 1), (0, 0, 0), key[::-1]]
    data = png(bits, 2, [row, row[::-1]], tRNS=struct.pack(">HHH", *key))
    loaded = np.asarray(load_image(data)).astype(int)
    assert loaded[0, 0].tolist() == loaded[1, -1].tolist() == [255, 255, 255]
    for value, pixel in zip(row[1:], loaded[0, 1:], strict=True):
        assert np.abs(pixel - np.array(value) / unit).max() <= 1
    if bits == 16:
        unread, read = Image.open(io.BytesIO(data)), Image.open(io.BytesIO(data))
        read.load()
        for image in (unread, read):
            with pytest.raises(InputError, match=r"16-bit PNG with a transparent colour.*Give the file"):
                load_image(image)


@pytest.mark.parametrize(("bits", "colour_type"), [(8, 4), (16, 4), (8, 6), (16, 6)])
def test_alpha_channels_of_any_depth_are_laid_on_white(bits, colour_type):
    largest, colours = 2**bits - 1, 1 if colour_type == 4 else 3
    shares = [(0.25, 0), (0.25, 1), (0.5, 0.5), (0, 0.25)]
    loaded = np.asarray(
        load_image(png(bits, colour_type, [[[*[int(v * largest)] * colours, int(a * largest)] for v, a in shares]]))
    )
    for (value, alpha), pixel in zip(shares, loaded[0], strict=True):
        assert np.abs(pixel - 255 * (alpha * value + 1 - alpha)).max() <= 2


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_transparent_entries_of_a_palette_turn_white(bits):
    palette = bytes([9, 9, 9, 200, 0, 100])
    loaded = np.asarray(load_image(png(bits, 3, [[[0], [1]]], PLTE=palette, tRNS=bytes([255, 0]))))
    assert loaded.tolist() == [[[9, 9, 9], [255, 255, 255]]]
    loaded = np.asarray(load_image(png(bits, 3, [[[0], [1]]], PLTE=palette, tRNS=bytes([255, 128]))))
    assert np.abs(loaded[0, 1].astype(int) - [227, 127, 177]).max() <= 1


def test_an_open_image_with_a_transparent_grey_is_not_changed():
    for bits in (4, 16):
        data = png(bits, 0, [[[1], [3], [15]]], tRNS=struct.pack(">H", 3))
        image = Image.open(io.BytesIO(data))
        assert np.asarray(load_image(image))[0, 1].tolist() == [255, 255, 255]
        assert image.info["transparency"] == 3


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_and_not_clipped(kind):
    grey = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    loaded = load_image(encoded(Image.fromarray(grey), kind))
    assert [loaded.getpixel((x, 0))[0] for x in range(4)] == [0, 1, 128, 255]


def test_cmyk_jpeg_has_its_colours():
    red, green, blue = load_image(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")).getpixel((4, 4))
    assert red > 250 and green < 5 and blue < 5


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.new("RGB", (2, 3))
    image.putpixel((0, 0), (255, 255, 255))
    loaded = load_image(encoded(image, exif=exif))
    corners = {1: (0, 0), 2: (1, 0), 3: (1, 2), 4: (0, 2), 5: (0, 0), 6: (2, 0), 7: (2, 1), 8: (0, 1)}
    assert loaded.size == ((2, 3) if orientation < 5 else (3, 2))
    assert loaded.getpixel(corners[orientation]) == (255, 255, 255)
    assert load_image(Image.open(io.BytesIO(encoded(image, exif=exif)))).tobytes() == loaded.tobytes()


def test_damaged_exif_does_not_matter():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = encoded(picture(), "JPEG", exif=b"Exif\0\0MM\0*garbage")
        assert load_image(data).size == (60, 90)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_first_frame_of_an_animation(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert Image.open(io.BytesIO(data)).n_frames == 2
    red, _, blue = load_image(data).getpixel((4, 4))
    assert red > 250 and blue < 5


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"%PDF-1.7\n", "a PDF document"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "a PostScript file"),
        (b"<?xml version='1.0'?>\n<svg xmlns='x'/>", "an SVG drawing"),
        (b"<!doctype html><html>Not found", "a web page"),
        ("naïve".encode() * 1000, "text"),
        (b"PK\x03\x04\0\0", "a zip archive"),
        (b"\0\0\0\x18ftypheic\0\0", "a HEIC image"),
        (bytes(range(256)), "unknown binary data"),
        (b"", "is empty"),
        (encoded(picture())[:20], "damaged"),
    ],
)
def test_what_is_no_image_is_named(data, found, tmp_path):
    (tmp_path / "x.png").write_bytes(data)
    for source in (data, tmp_path / "x.png"):
        with pytest.raises(InputError, match=found):
            load_image(source)


def test_sources_that_cannot_be_read(tmp_path):
    text = tmp_path / "x.txt"
    text.write_text("hello")
    closed = text.open("rb")
    closed.close()
    cases = {
        "There is no image file .*looked from": tmp_path / "no.png",
        "is a folder": tmp_path,
        "no ordinary file": "/dev/zero",
        "null byte": "a\0b",
        "too long": "a" * 5000,
        "home directory": "~nobody-here/x.png",
        "closed file": closed,
        "open as text": io.StringIO("x"),
        "got ndarray.*fromarray": np.zeros((4, 4, 3)),
        "got NoneType": None,
        "base64 data .* damaged": "data:image/png;base64,####",
        "not of the form": "data:image/png,abc",
        f"is a URL.*{PIP_LINE}": "https://example.org/a.png",
        "has no area": Image.new("RGB", (0, 4)),
        "32-bit pixels": Image.new("F", (2, 2), 0.5),
        "70000 to 70000": Image.new("I", (2, 2), 70000),
    }
    for found, source in cases.items():
        with pytest.raises(InputError, match=found) as raised:
            load_image(source)
        assert len(str(raised.value)) < 400
    assert issubclass(InputError, PopError) and issubclass(InputError, ValueError)


@given(share=st.floats(0, 0.95), kind=st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"]))
@hypothesis_settings(max_examples=40, deadline=None, derandomize=True)
def test_a_truncated_image_is_an_input_error(share, kind):
    data = encoded(picture(32, 32), kind)
    with pytest.raises(InputError):
        load_image(data[: int(share * len(data))])


@given(place=st.integers(0, 400), byte=st.integers(0, 255), kind=st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "BMP"]))
@hypothesis_settings(max_examples=40, deadline=None, derandomize=True)
def test_a_flipped_byte_gives_an_image_or_an_input_error(place, byte, kind):
    data = bytearray(encoded(picture(12, 12), kind))
    data[place % len(data)] = byte
    with suppress(InputError):
        assert load_image(bytes(data), max_pixels=10**6).mode == "RGB"


def test_a_decompression_bomb_is_refused_before_it_is_decoded(monkeypatch):
    bomb, limit = encoded(Image.new("1", (3000, 3000))), Image.MAX_IMAGE_PIXELS
    huge = encoded(Image.new("1", (20_000, 10_000)))
    Image.init()  # some of Pillow's plug-ins draw a palette as they are imported
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(InputError, match=r"3000 x 3000 = 9,000,000 pixels, more than the 8,999,999"):
        load_image(bomb, max_pixels=8_999_999)
    with pytest.raises(InputError, match=r"before decoding.*decompression bomb"):  # Pillow's own limit
        load_image(huge, max_pixels=10**9)
    assert limit == Image.MAX_IMAGE_PIXELS


def test_large_files_are_not_read(tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(encoded(picture()))
    for source in (path, path.read_bytes(), io.BytesIO(path.read_bytes())):
        with pytest.raises(InputError, match="more than 1,000 bytes"):
            load_image(source, max_bytes=1000)


# processors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ALL)
def test_a_left_padded_batch_equals_single_rows(processor, family):
    made = processor(family)
    chats = [
        chat(None, "no image"),
        chat(picture(), "one?"),
        chat([picture(30, 30), picture(200, 40)], "a longer question"),
    ]
    together = prepare_chats(made, chats)
    alone = [prepare_chats(made, one) for one in chats]
    for row, single in enumerate(alone):
        length = single["input_ids"].shape[1]
        assert torch.equal(together["input_ids"][row, -length:], single["input_ids"][0])
        assert (
            together["attention_mask"][row].tolist() == [0] * (together["input_ids"].shape[1] - length) + [1] * length
        )
    assert image_token_counts(made, together) == [counts for one in alone for counts in image_token_counts(made, one)]
    if family in QWEN:
        for key in ("pixel_values", "image_grid_thw"):
            assert torch.equal(together[key], torch.cat([one[key] for one in alone[1:]]))


@pytest.mark.parametrize("family", QWEN)
@given(sizes=st.lists(st.tuples(st.integers(1, 150), st.integers(1, 150)), min_size=1, max_size=3))
@hypothesis_settings(max_examples=10, deadline=None, derandomize=True)
def test_grids_match_placeholders(processor, family, sizes):
    made = processor(family)
    inputs = prepare(made, [picture(*size) for size in sizes], "what?")
    grid = inputs["image_grid_thw"]
    assert len(grid) == len(sizes) and grid.prod(-1).sum() == len(inputs["pixel_values"])
    placeholders = (inputs["input_ids"] == made.image_token_id).sum().item()
    assert placeholders == (grid.prod(-1) // 4).sum().item()
    assert torch.equal(inputs["mm_token_type_ids"], (inputs["input_ids"] == made.image_token_id).long())


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("size", [(1, 1), (1, 3), (3, 1), (3, 3), (1, 200), (200, 1)])
def test_tiny_and_thin_images(processor, family, size):
    inputs = prepare(processor(family), picture(*size), "what?")
    assert inputs["pixel_values"].isfinite().all()


@pytest.mark.parametrize("family", ALL)
def test_too_thin_an_image_is_refused_in_a_sentence(processor, family):
    with pytest.raises(InputError, match="An image of 402 x 2 pixels is 201 times as long as it is wide"):
        prepare(processor(family), picture(402, 2), "what?")


@pytest.mark.parametrize("family", ["qwen2_5_vl", "internvl", "llava"])
def test_a_saved_processor_is_the_same(processor, family, tmp_path):
    made = processor(family)
    made.save_pretrained(tmp_path)
    again = load_processor(tmp_path)
    assert type(again).__name__ == type(made).__name__
    question = chat(picture(), "what?")
    assert same(prepare_chats(again, question), prepare_chats(made, question))


def test_smolvlm_needs_no_torchvision(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.models.smolvlm.processing_smolvlm.num2words", str)
    inputs = prepare(load_processor(processor_folder("smolvlm", tmp_path)), picture(), "what?")
    assert inputs["pixel_values"].shape[:2] == (1, 5)


def test_what_needs_torchvision_says_so(tmp_path):
    with pytest.raises(InputError, match=f"needs torchvision, which is not installed.*{PIP_LINE}"):
        load_processor(processor_folder("pixtral", tmp_path))


def test_videos_need_torchvision(processor):
    with pytest.raises(InputError, match="takes no videos"):
        processor("qwen2_5_vl")(text="<|video_pad|>", videos=[np.zeros((2, 28, 28, 3), dtype=np.uint8)])


def test_a_broken_torchvision_is_named(tmp_path, monkeypatch):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    (tmp_path / "torchvision-0.1.dist-info").mkdir()
    (tmp_path / "torchvision-0.1.dist-info" / "METADATA").write_text("Name: torchvision\nVersion: 0.1\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        InputError, match=r"torchvision 0.1 is installed but does not work next to torch .*nms.*uninstall"
    ):
        load_processor(processor_folder("qwen2_vl", tmp_path / "qwen"))


def test_a_wrong_hub_id_fails_on_the_first_file(monkeypatch):
    def asked(*args, **kwargs):
        raise OSError("we couldn't connect")

    monkeypatch.setattr(AutoConfig, "from_pretrained", asked)
    monkeypatch.setattr("transformers.ProcessorMixin.get_processor_dict", lambda *args: pytest.fail("asked for more"))
    with pytest.raises(SampleError, match="hub cannot be reached"):
        load_processor("nobody/nothing")


def test_folders_that_hold_no_processor(tmp_path):
    with pytest.raises(SampleError, match="no such folder"):
        load_processor(tmp_path / "nothing")
    with pytest.raises(SampleError, match="could not be loaded"):
        load_processor(tmp_path)
    folder = tmp_path / "text"
    tokenizer("llava").save_pretrained(folder)
    AutoConfig.for_model("llama").save_pretrained(folder)
    with pytest.raises(InputError, match="does not take images and text"):
        load_processor(folder)
    with pytest.raises(InputError, match="does not take images and text"):
        prepare(tokenizer("llava"), None, "what?")


# chats ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen3_vl", "llava"])
def test_every_format_of_message_is_the_same_prompt(processor, family, tmp_path):
    made, path = processor(family), tmp_path / "x.png"
    picture().save(path)
    text = base64.b64encode(path.read_bytes()).decode()
    expected = prepare(made, picture(), "what?")
    parts = [
        {"type": "image", "image": str(path)},
        {"type": "image", "image": f"file://{path}"},
        {"type": "image", "path": path},
        {"type": "image", "url": f"data:image/png;base64,{text}"},
        {"type": "image", "base64": text},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{text}", "detail": "low"}},
        {"image": picture()},
    ]
    for part in parts:
        messages = [{"role": "user", "content": [part, {"type": "text", "text": "what?"}]}]
        before = copy.copy(messages[0]["content"])
        assert same(prepare_chats(made, messages), expected)
        assert messages[0]["content"] == before
    assert same(prepare_chats(made, [{"role": "user", "content": [parts[0], "what?"]}]), expected)


def test_system_prompts_and_second_turns(processor):
    made = processor("qwen2_5_vl")
    first = chat(picture(), "one?", system="Be kind.")
    second = chat(picture(30, 30), "two?", history=[*first, {"role": "assistant", "content": "yes"}])
    text = made.tokenizer.decode(prepare_chats(made, second)["input_ids"][0]).replace("<|image_pad|>", "")
    assert text == (
        "<|im_start|>system\nBe kind.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|vision_end|>one?<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|vision_end|>two?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert len(prepare_chats(made, second)["image_grid_thw"]) == 2
    with pytest.raises(InputError, match="system prompt already"):
        chat(None, "two?", system="Be brief.", history=first)


def test_chats_that_cannot_be_prepared(processor):
    made = processor("qwen2_5_vl")
    user = "user"
    cases = {
        "neither an image nor a question": lambda: chat(None, " "),
        "question must be a string; got int": lambda: chat(None, 5),
        "no messages": lambda: prepare_chats(made, []),
        "at least one user message": lambda: prepare_chats(made, [[]]),
        "role and content": lambda: prepare_chats(made, [{"content": "x"}]),
        "string or a dict; got int": lambda: prepare_chats(made, [{"role": user, "content": [5]}]),
        "image part without an image": lambda: prepare_chats(made, [{"role": user, "content": [{"type": "image"}]}]),
        "type 'audio'": lambda: prepare_chats(made, [{"role": user, "content": [{"type": "audio", "audio": "a"}]}]),
        "cannot prepare this prompt.*no images were passed": lambda: prepare(made, None, "<|image_pad|>?"),
        "There is no image file": lambda: prepare(made, ["no.png"], "what?"),
    }
    for found, ask in cases.items():
        with pytest.raises(InputError, match=found):
            ask()


def test_device_and_dtype(processor, qwen):
    inputs = prepare(processor("llava"), picture(), "what?", dtype=torch.bfloat16, device="meta")
    assert inputs["pixel_values"].dtype == torch.bfloat16 and inputs["input_ids"].dtype == torch.int64
    assert {value.device.type for value in inputs.values()} == {"meta"}
    made, model = qwen("qwen2_5_vl")
    assert prepare(made, picture(), "what?", model=model)["pixel_values"].dtype == model.dtype == torch.float64


def test_token_types_are_made_where_a_processor_leaves_them_out(processor, monkeypatch):
    made = processor("qwen2_5_vl")
    expected = prepare(made, picture(), "what?")
    monkeypatch.setattr(made, "return_mm_token_type_ids", False)
    assert same(prepare(made, picture(), "what?"), expected)


# generation -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", QWEN)
def test_generation_from_end_to_end(qwen, family):
    made, model = qwen(family)
    chats = [chat(picture(), "what is this?"), chat(None, "hello"), chat([picture(30, 70), picture()], "both?")]
    settings = dict(max_new_tokens=6, do_sample=False)
    inputs = prepare_chats(made, chats, model=model)
    texts = decode(made, model.generate(**inputs, **settings), inputs)
    for one, text in zip(chats, texts, strict=True):
        single = prepare_chats(made, one, model=model)
        output = model.generate(**single, **settings, return_dict_in_generate=True)
        assert decode(made, output, single) == [text]
    assert image_token_counts(model, inputs) == image_token_counts(made, inputs)
    del inputs["mm_token_type_ids"]
    assert [row["image"] for row in image_token_counts(model, inputs)] == [
        row["image"] for row in image_token_counts(made, inputs)
    ]
    turn = [*chats[0], {"role": "assistant", "content": texts[0]}]
    following = prepare(made, None, "and?", history=turn, model=model)
    assert len(decode(made, model.generate(**following, **settings), following)) == 1


def test_decode_leaves_out_the_prompt_and_special_tokens(processor):
    made = processor("qwen2_5_vl")
    inputs = prepare(made, picture(), "what?")
    answer = made.tokenizer("a häuser<|im_end|><|endoftext|>", return_tensors="pt")["input_ids"]
    assert decode(made, torch.cat([inputs["input_ids"], answer], dim=1), inputs) == ["a häuser"]


def test_the_pipeline_takes_the_processor(qwen):
    made, model = qwen("qwen3_vl")
    ask = pipeline("image-text-to-text", model=model, processor=made)
    chats = [chat(picture(), "one?"), chat(picture(30, 90), "another one?")]
    made.tokenizer.padding_side = "left"
    answers = ask(
        text=chats, batch_size=2, return_full_text=False, max_new_tokens=4, generate_kwargs={"do_sample": False}
    )
    inputs = prepare_chats(made, chats, model=model)
    expected = decode(made, model.generate(**inputs, max_new_tokens=4, do_sample=False), inputs)
    assert [answer[0]["generated_text"] for answer in answers] == expected


# Qwen's own format of messages ----------------------------------------------------------------------------------------


def test_without_the_extra_qwen_format_names_the_pip_line(processor):
    made = processor("qwen2_5_vl")
    cases = {
        "The URL 'https://a.b/c.png'": {"type": "image", "image": "https://a.b/c.png"},
        "The URL 'http://a.b/c.png'": {"type": "image_url", "image_url": {"url": "http://a.b/c.png"}},
        "max_pixels in a message": {"type": "image", "image": picture(), "max_pixels": 9},
        "A video": {"type": "video", "video": "a.mp4"},
    }
    for asked, part in cases.items():
        with pytest.raises(InputError, match=f"{asked} needs qwen_vl_utils, which is not installed.*{PIP_LINE}"):
            prepare_chats(made, [{"role": "user", "content": [part]}])
        with pytest.raises(InputError, match=f"{asked} is Qwen's own format, and this is a LlavaProcessor"):
            prepare_chats(processor("llava"), [{"role": "user", "content": [part]}])


@pytest.fixture
def utils(processor, monkeypatch):
    """A stand-in for qwen_vl_utils 0.0.14 (and torchvision) that downloads from a dict and notes what it is asked."""
    for family in (*QWEN, "llava"):  # transformers would load a processor otherwise beside a torchvision
        processor(family)
    calls, web = [], {}

    def fetch_image(part, factor):
        image = web[part["image"]] if isinstance(part["image"], str) else part["image"]
        if "resized_height" in part:
            return image.resize((part["resized_width"] // factor * factor, part["resized_height"] // factor * factor))
        assert part["min_pixels"] <= part["max_pixels"], "The max_pixels of image must be greater than min_pixels."
        width, height = (max(factor, round(edge / factor) * factor) for edge in image.size)
        return image.resize((width, height), Image.Resampling.BICUBIC)

    def process_vision_info(conversations, return_video_kwargs, return_video_metadata, image_patch_size):
        parts = [part for message in conversations for part in message["content"]]
        calls.append(parts)
        images = [fetch_image(part, 2 * image_patch_size) for part in parts if part["type"] == "image"]
        frames = (torch.zeros(4, 3, 56, 56), {"fps": 2.0, "frames_indices": [0, 1, 2, 3], "total_num_frames": 4})
        videos = [frames for part in parts if part["type"] == "video"]
        return images or None, videos or None, {"do_sample_frames": False}

    module = ModuleType("qwen_vl_utils")
    module.process_vision_info = process_vision_info
    monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "qwen_vl_utils", module)
    return SimpleNamespace(calls=calls, web=web)


@pytest.mark.parametrize("family", QWEN)
def test_the_extra_changes_no_pixel(processor, family, monkeypatch, request):
    made = processor(family)
    chats = [chat(picture(100, 130), "one?"), chat(None, "none"), chat([picture(140, 90), picture()], "two?")]
    expected = prepare_chats(made, chats)
    utils = request.getfixturevalue("utils")
    assert same(prepare_chats(made, chats), expected)
    limits = made.image_processor.size
    assert [part["max_pixels"] for part in utils.calls[0]] == [limits["longest_edge"]] * 3


def test_urls_and_sizes_go_through_qwen_vl_utils(processor, utils):
    made = processor("qwen2_5_vl")
    utils.web["https://a.b/c.png"] = picture(100, 60)
    part = {"type": "image_url", "image_url": {"url": "https://a.b/c.png"}, "resized_height": 57, "resized_width": 113}
    inputs = prepare_chats(made, [{"role": "user", "content": [part, {"type": "text", "text": "what?"}]}])
    assert inputs["image_grid_thw"].tolist() == [[1, 4, 8]]
    assert image_token_counts(made, inputs)[0]["image"] == 8
    assert utils.calls == [[{"min_pixels": 4 * 28**2, "max_pixels": 64 * 28**2, "type": "image"} | utils.calls[0][0]]]
    assert utils.calls[0][0]["image"] == "https://a.b/c.png"
    for wrong, found in [({"max_pixels": 9}, "min_pixels"), ({"image": "https://a.b/d.png"}, "d.png")]:
        with pytest.raises(InputError, match=f"qwen_vl_utils cannot prepare.*{found}"):
            prepare_chats(made, [{"role": "user", "content": [{"type": "image", "image": picture(), **wrong}]}])
    with pytest.raises(InputError, match="Qwen's own format"):
        prepare(processor("llava"), "https://a.b/c.png", "what?")


def test_videos_go_to_the_processor_with_their_metadata(processor, utils, monkeypatch):
    made, seen = processor("qwen3_vl"), {}
    monkeypatch.setattr(type(made), "__call__", lambda self, **given: seen.update(given) or BatchFeature())
    content = [{"type": "video", "video": "a.mp4"}, {"type": "image", "image": picture()}, "what?"]
    prepare_chats(made, [{"role": "user", "content": content}])
    assert seen["videos"][0][0].shape == (4, 3, 56, 56) and seen["video_metadata"][0]["fps"] == 2.0
    assert seen["do_resize"] is False and seen["do_sample_frames"] is False
    assert seen["images"][0][0].size == (64, 96)


def test_import_is_light():
    script = "import sys, pop_mm.vision; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "PIL", "numpy"} & set(done.stdout.split())
    assert Path(sys.modules["pop_mm.vision"].__file__).parent.name == "vision"
