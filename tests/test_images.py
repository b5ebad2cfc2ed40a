"""Pictures in every mode a camera or editor writes, and the ones that must be refused."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from inlay_config import images
from inlay_config.errors import InputError

RED = (200, 30, 10)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels worth the name."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(b"\0" * 64)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"])
def test_every_listed_format_opens_as_rgb(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "picture.bin"  # the bytes decide, not the name
    Image.new("RGB", (9, 5), RED).save(path, format=kind)
    image = images.open_image(path)
    assert image.mode == "RGB" and image.size == (9, 5)
    assert np.abs(np.asarray(image, dtype=int) - RED).max() <= 4


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "x.tiff"
    if mode == "I;16":
        Image.fromarray(np.full((3, 4), 52428, dtype=np.uint16)).save(path)
    else:
        Image.new("RGB", (4, 3), (204, 204, 204)).convert(mode).save(tmp_path / "x.tiff")
    image = images.open_image(path)
    assert image.mode == "RGB" and image.size == (4, 3)
    if mode != "1":  # dithered
        assert np.abs(np.asarray(image, dtype=int) - 204).max() <= 3


def test_transparency_goes_over_white(tmp_path: Path) -> None:
    picture = Image.new("RGBA", (2, 1), (*RED, 255))
    picture.putpixel((1, 0), (0, 0, 0, 0))
    picture.save(tmp_path / "x.png")
    opened = images.open_image(tmp_path / "x.png")
    assert [opened.getpixel((x, 0)) for x in (0, 1)] == [RED, (255, 255, 255)]

    palette = Image.new("P", (2, 1), 1)
    palette.putpalette([0, 0, 0, *RED])
    palette.putpixel((1, 0), 0)
    palette.save(tmp_path / "p.png", transparency=0)
    opened = images.open_image(tmp_path / "p.png")
    assert [opened.getpixel((x, 0)) for x in (0, 1)] == [RED, (255, 255, 255)]


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    ramp = np.arange(256, dtype=np.uint16)[None] * 257
    Image.fromarray(ramp).save(tmp_path / "x.png")
    opened = np.asarray(images.open_image(tmp_path / "x.png"))
    assert (opened[0, :, 0] == np.arange(256)).all()


def test_floats_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((2, 2), 0.5, dtype=np.float32)).save(tmp_path / "x.tiff")
    with pytest.raises(InputError, match="neither 8 nor 16 bits"):
        images.open_image(tmp_path / "x.tiff")


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned a quarter to the right
    Image.new("RGB", (8, 4)).save(tmp_path / "x.jpg", exif=exif)
    assert images.open_image(tmp_path / "x.jpg").size == (4, 8)


def test_the_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (2, 2), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert images.open_image(tmp_path / "x.gif").getpixel((0, 0)) == (255, 0, 0)


def test_one_pixel_is_a_picture(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1), RED).save(tmp_path / "x.png")
    assert images.open_image(tmp_path / "x.png").getpixel((0, 0)) == RED


@pytest.mark.parametrize(("width", "height"), [(20_000, 20_000), (8_001, 8_000), (1, 64_000_001)])
def test_too_many_pixels_are_refused_from_the_header(
    tmp_path: Path, width: int, height: int
) -> None:
    (tmp_path / "x.png").write_bytes(png_header(width, height))
    with pytest.raises(InputError, match=r"too large: .* 64 megapixels"):
        images.open_image(tmp_path / "x.png")


@pytest.mark.parametrize(
    "data",
    [b"", b"no picture", b"%PDF-1.4", png_header(64, 64), b"\x89PNG\r\n\x1a\n" + b"\0" * 40],
    ids=["empty", "text", "pdf", "truncated", "garbage"],
)
def test_what_is_no_picture_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.png").write_bytes(data)
    with pytest.raises(InputError, match=r"^input\.mask: '.*x\.png' cannot be read: .* Use a PNG"):
        images.open_image(tmp_path / "x.png", where="input.mask")


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"input\.image: there is no file"):
        images.open_image(tmp_path / "x.png")
    with pytest.raises(InputError, match="cannot be read"):
        images.open_image(tmp_path)


def test_unlisted_formats_are_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, format="PPM")
    (tmp_path / "x.png").write_bytes(buffer.getvalue())
    with pytest.raises(InputError, match="cannot be read"):
        images.open_image(tmp_path / "x.png")


def test_tensors_and_pictures_are_inverse() -> None:
    array = np.random.default_rng(0).integers(0, 256, (3, 5, 3), dtype=np.uint8)
    tensor = images.to_tensor(Image.fromarray(array))
    assert tensor.shape == (1, 3, 3, 5) and tensor.dtype == torch.float32
    assert (np.asarray(images.to_pil(tensor)[0]) == array).all()
    grey = images.to_tensor(Image.fromarray(array[..., 0]))
    assert grey.shape == (1, 1, 3, 5) and images.to_pil(grey)[0].mode == "L"
    assert len(images.to_pil(torch.full((2, 3, 4, 4), 1.7))) == 2  # out of range is clamped


def test_pictures_come_as_paths_pil_or_tensors(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    clear.save(tmp_path / "x.png")
    for form in (clear, tmp_path / "x.png", str(tmp_path / "x.png"), torch.ones(1, 3, 2, 2)):
        pictures = images.as_pictures(image=form, mask=form)
        assert pictures["image"].mode == "RGB" and pictures["mask"].mode == "L"
        assert pictures["image"].getpixel((0, 0)) == (255, 255, 255)
    assert images.as_pictures(image=None, mask=None) == {}
    with pytest.raises(InputError, match=r"input\.mask: int is no picture"):
        images.as_pictures(image=None, mask=3)


def test_saving_leaves_no_half_written_file(tmp_path: Path) -> None:
    target = tmp_path / "x.png"
    images.save(Image.new("RGB", (4, 4), RED), target)
    assert images.open_image(target).getpixel((0, 0)) == RED
    before = target.read_bytes()
    with pytest.raises(OSError, match="disk full"), images.whole(target) as partial:
        partial.write_bytes(b"half")
        raise OSError("disk full")
    assert target.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["x.png"]


@pytest.mark.parametrize("name", ["../x", "../../x", "a/../../x", "/etc/x", "a\0b", ".."])
def test_names_that_climb_out_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="climbs out"):
        images.safe_join(tmp_path, name)


@settings(deadline=None)
@given(st.text(max_size=30))
def test_a_joined_name_is_inside_or_refused(name: str) -> None:
    folder = Path("some/folder")
    try:
        path = images.safe_join(folder, name)
    except InputError:
        return
    assert path.resolve().is_relative_to(folder.resolve())


def test_a_link_that_leads_out_is_refused(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "link").symlink_to(tmp_path)
    with pytest.raises(InputError, match="climbs out"):
        images.safe_join(tmp_path / "inside", "link/x")
