import hashlib
import io
import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image
from transformers.image_transforms import convert_to_rgb
from transformers.image_utils import load_image

from topt_deploy.errors import BadData, IOFailure
from topt_deploy.prompts.images import FORMATS, open_image

MODES = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA"),
    "JPEG": ("L", "RGB", "CMYK"),
    "WEBP": ("RGB", "RGBA"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB"),
    "BMP": ("1", "L", "P", "RGB", "RGBA"),
    "GIF": ("1", "L", "P", "RGB", "RGBA"),
}
SIZES = ((1, 1), (13, 7), (5, 31))
ORIENTATION = 0x0112


def picture(mode="RGB", size=(13, 7), seed=0):
    """Noise in any mode."""
    width, height = size
    rng = np.random.default_rng(seed)
    if mode in ("I", "I;16", "F"):
        kind = {"I": np.int32, "I;16": np.uint16, "F": np.float32}[mode]
        return Image.fromarray(rng.integers(0, 2**16, (height, width)).astype(kind))
    if mode in ("1", "P"):
        return picture("RGB", size, seed).convert(mode)
    bands = len(Image.new(mode, (1, 1)).getbands())
    values = rng.integers(0, 256, (height, width, bands), dtype=np.uint8)
    return Image.frombytes(mode, size, values.tobytes())


def encoded(image=None, kind="PNG", **options):
    stream = io.BytesIO()
    (image or picture()).save(stream, kind, **options)
    return stream.getvalue()


@pytest.fixture
def read(tmp_path):
    """Read bytes as the file x below the data folder."""

    def call(data, **limits):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / "x").write_bytes(data)
        return open_image(tmp_path / "data", "x", **limits)

    return call


@pytest.fixture
def same(read, tmp_path):
    """Our pixels are transformers' own, also after the processors' conversion."""

    def call(data):
        ours = read(data)
        theirs = convert_to_rgb(load_image(str(tmp_path / "data" / "x")), return_numpy=True)
        assert ours.pixels.dtype == np.uint8
        assert np.array_equal(ours.pixels, theirs)
        return ours

    return call


class TestPixels:
    @pytest.mark.parametrize("size", SIZES, ids=str)
    @pytest.mark.parametrize(("kind", "mode"), [(kind, mode) for kind, modes in MODES.items() for mode in modes])
    def test_every_mode_as_transformers_reads_it(self, same, kind, mode, size):
        same(encoded(picture(mode, size), kind))

    @pytest.mark.parametrize(("kind", "mode"), [("PNG", "I;16"), ("TIFF", "I;16"), ("TIFF", "I"), ("TIFF", "F")])
    def test_more_than_8_bits_are_refused(self, read, kind, mode):
        """transformers would clip them: 16-bit grey to white, fractions to black."""
        with pytest.raises(BadData, match="more than 8 bits"):
            read(encoded(picture(mode), kind))

    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_turned_as_exif_says(self, same, kind, orientation):
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        turned = same(encoded(picture(), kind, exif=exif)).pixels
        assert turned.shape == ((13, 7, 3) if orientation > 4 else (7, 13, 3))

    def test_a_palette_with_an_alpha_per_colour(self, same):
        same(encoded(picture("P"), transparency=bytes(range(256))))

    @pytest.mark.parametrize("mode", ["L", "P", "RGB"])
    def test_a_colour_that_stands_for_transparency(self, same, mode):
        image = picture(mode)
        where = np.asarray(image) == image.getpixel((0, 0))
        pixels = same(encoded(image, transparency=image.getpixel((0, 0)))).pixels
        assert (pixels[where if where.ndim == 2 else where.all(axis=2)] == 255).all()

    def test_colours_of_16_bits(self, same):
        rows = b"".join(b"\0" + struct.pack(">12H", *range(i, 60000 + i, 5000)) for i in range(3))
        assert same(png(4, 3, zlib.compress(rows), depth=16)).pixels.max() > 200

    def test_the_first_frame_of_several(self, same):
        for kind in ("GIF", "TIFF", "WEBP", "PNG"):
            frames = [picture("RGB", seed=seed) for seed in range(3)]
            lossless = {"lossless": True} if kind == "WEBP" else {}
            first = same(encoded(frames[0], kind, save_all=True, append_images=frames[1:], **lossless)).pixels
            if kind != "GIF":  # 256 colours
                assert np.array_equal(first, np.asarray(frames[0]))

    def test_hash_and_name(self, read):
        data = encoded()
        found = read(data)
        assert found.sha256 == hashlib.sha256(data).hexdigest()
        assert found.name == "x"


class TestPlaces:
    @pytest.fixture
    def root(self, tmp_path):
        root = tmp_path / "data"
        (root / "street" / "a b").mkdir(parents=True)
        for place in (root / "street" / "a b" / "é:1.png", root / "top.png", tmp_path / "secret.png"):
            place.write_bytes(encoded())
        (tmp_path / "data-of-others").mkdir()
        (tmp_path / "data-of-others" / "x.png").write_bytes(encoded())
        return root

    def test_inside(self, root):
        assert open_image(root, "street/a b/é:1.png").name == "street/a b/é:1.png"
        assert open_image(root, str(root / "top.png")).pixels.shape == (7, 13, 3)
        assert open_image(root, "./street//a b/é:1.png").pixels.shape == (7, 13, 3)

    def test_a_relative_root(self, root, monkeypatch):
        monkeypatch.chdir(root.parent)
        assert open_image(root.relative_to(root.parent), "top.png").pixels.shape == (7, 13, 3)

    def test_links(self, root):
        (root / "inside.png").symlink_to("street/a b/é:1.png")
        (root / "outside.png").symlink_to(root.parent / "secret.png")
        (root / "up").symlink_to("..")
        (root / "circle").symlink_to("circle")
        assert open_image(root, "inside.png").pixels.shape == (7, 13, 3)
        for name in ("outside.png", "up/secret.png"):
            with pytest.raises(BadData, match="outside the data folder") as refused:
                open_image(root, name)
            assert name in str(refused.value)
        with pytest.raises(BadData, match="no such image"):
            open_image(root, "circle")

    def test_a_root_that_is_a_link(self, root):
        (root.parent / "link").symlink_to(root)
        assert open_image(root.parent / "link", "top.png").pixels.shape == (7, 13, 3)

    @pytest.mark.parametrize(
        "name", ["../secret.png", "street/../../secret.png", "street/../top.png", "..", "", "a\0b"]
    )
    def test_names_that_are_none(self, root, name):
        with pytest.raises(BadData, match="not a plain path") as refused:
            open_image(root, name)
        assert "a path relative to" in refused.value.expected

    def test_absolute_paths_outside(self, root):
        for path in (root.parent / "secret.png", root.parent / "data-of-others" / "x.png", "/etc/passwd"):
            with pytest.raises(BadData, match="outside the data folder"):
                open_image(root, str(path))

    def test_addresses(self, root):
        inline = "data:image/png;base64," + "A" * 10_000
        for name in (f"file://{root}/top.png", "file:top.png", "https://example.org/a.png", "s3://b/a.png", inline):
            with pytest.raises(BadData, match="not from addresses") as refused:
                open_image(root, name)
            assert "a path relative to" in refused.value.expected
            assert len(str(refused.value)) < 1000

    def test_absent(self, root):
        for name in ("none.png", "top.png/x", "n" * 5000):
            with pytest.raises(BadData, match="no such image") as refused:
                open_image(root, name)
            assert name[:100] in refused.value.file

    def test_special_files(self, root):
        os.mkfifo(root / "pipe")
        for name, reason in (("pipe", "not a plain file"), ("street", "Is a directory")):
            with pytest.raises(BadData, match=reason) as refused:
                open_image(root, name)
            assert refused.value.file.endswith(name)

    def test_no_permission(self, root, monkeypatch):
        def refuse(*_):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(os, "open", refuse)
        with pytest.raises(BadData, match="Permission denied"):
            open_image(root, "top.png")

    def test_a_failing_disk_is_no_bad_image(self, root, monkeypatch):
        def fail(_):
            raise OSError(5, "Input/output error")

        monkeypatch.setattr("topt_deploy.prompts.images.stat.S_ISREG", fail)
        with pytest.raises(IOFailure, match="Input/output error"):
            open_image(root, "top.png")


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width, height, data=b"", depth=8):
    header = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def tiff(size, tile, data):
    """A TIFF of one tile, deflated."""
    long, short = 4, 3
    entries = [(256, long, size[0]), (257, long, size[1]), (258, short, 8), (259, short, 8), (262, short, 1)]
    entries += [(277, short, 1), (322, long, tile[0]), (323, long, tile[1]), (324, long, 0), (325, long, len(data))]
    start = 14 + 12 * len(entries)
    out = b"II*\0" + struct.pack("<IH", 8, len(entries))
    for tag, kind, value in entries:
        out += struct.pack("<HHII", tag, kind, 1, start if tag == 324 else value)
    return out + struct.pack("<I", 0) + data


class TestAttacks:
    @pytest.mark.parametrize(
        "data",
        [b"", b"no image", b"%PDF-1.7 ...", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%!PS-Adobe-3.0 EPSF-3.0\n"],
        ids=["empty", "text", "pdf", "svg", "eps"],
    )
    def test_not_an_image(self, read, data):
        with pytest.raises(BadData, match="not an image of a known format") as refused:
            read(data)
        assert refused.value.file.endswith("/x")
        assert "PNG, JPEG" in refused.value.expected

    @pytest.mark.parametrize("kind", ["PPM", "TGA", "PCX", "ICO", "EPS", "JPEG2000", "ICNS", "SGI"])
    def test_formats_that_stay_shut(self, read, kind):
        with pytest.raises(BadData, match="not an image of a known format"):
            read(encoded(picture("RGB", (16, 16)), kind))

    @pytest.mark.parametrize("kind", FORMATS)
    @pytest.mark.parametrize("keep", [12, 0.3, 0.6, 0.9])
    def test_truncated(self, read, kind, keep):
        data = encoded(picture("RGB", (200, 100)), kind)
        with pytest.raises(BadData) as refused:
            read(data[: keep if keep == 12 else int(keep * len(data))])
        assert refused.value.file.endswith("/x")

    @pytest.mark.parametrize(
        "size", [(8001, 8000), (10_000, 10_000), (70_000, 70_000), (2**31 - 1, 2**31 - 1)], ids=str
    )
    def test_a_bomb_is_not_decoded(self, read, size, monkeypatch):
        monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
        with pytest.raises(BadData, match=r"too many pixels|decompression bomb"):
            read(png(*size))

    def test_limits(self, read):
        data = encoded(picture("RGB", (20, 10)))
        assert read(data, max_pixels=200, max_bytes=len(data)).pixels.shape == (10, 20, 3)
        with pytest.raises(BadData, match="too many pixels") as refused:
            read(data, max_pixels=199)
        assert (refused.value.expected, refused.value.found) == ("at most 199", "20 × 10")
        with pytest.raises(BadData, match="too large"):
            read(data, max_bytes=len(data) - 1)

    def test_limits_beyond_pillows_own_warning(self, read, recwarn):
        row = zlib.compress(bytes(1 + 3 * 9500) * 9500, 1)
        assert read(png(9500, 9500, row), max_pixels=10**8).pixels.shape == (9500, 9500, 3)
        assert not recwarn.list

    def test_a_tiff_whose_tile_is_larger_than_the_image(self, read):
        data = zlib.compress(bytes(64 * 64))
        assert read(tiff((16, 16), (64, 64), data)).pixels.shape == (16, 16, 3)
        with pytest.raises(BadData, match="too many pixels") as refused:
            read(tiff((16, 16), (40_000, 40_000), data))
        assert refused.value.found == "40000 × 40000"

    def test_a_gif_whose_frame_is_larger_than_the_screen(self, read):
        data = bytearray(encoded(picture("P", (300, 200)), "GIF"))
        data[6:10] = struct.pack("<HH", 2, 2)
        with pytest.raises(BadData, match="too many pixels") as refused:
            read(bytes(data), max_pixels=300 * 200 - 1)
        assert refused.value.found == "300 × 200"

    @pytest.mark.parametrize("kind", FORMATS)
    def test_damage_is_never_a_traceback(self, read, kind):
        """A few bytes changed anywhere: read, or refused as a user's error."""
        data = encoded(picture("RGB", (24, 16)), kind, **({"compression": "tiff_lzw"} if kind == "TIFF" else {}))
        rng, refused = np.random.default_rng(0), 0
        for _ in range(150):
            damaged = np.frombuffer(data, np.uint8).copy()
            at = rng.choice(min(len(data), 400), 3)
            damaged[at] ^= rng.integers(1, 256, 3, dtype=np.uint8)
            try:
                read(damaged.tobytes(), max_pixels=10**6)
            except BadData:
                refused += 1
        assert refused > 5


def test_importing_it_imports_no_pillow():
    code = "import sys, topt_deploy.prompts.images; sys.exit('PIL' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
