"""Tests of decoding: whole images, and crops decoded no larger than needed."""

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from dr_jax.data import decoding, fast_images, transforms

BOX = (70, 30, 330, 270)
SMALL = (60, 60)


@pytest.fixture(params=["pillow", "fast"])
def library(request, monkeypatch):
  fast = request.param == "fast"
  if fast and not fast_images.AVAILABLE:
    pytest.skip("needs the extra images")
  monkeypatch.setattr(fast_images, "AVAILABLE", fast)


def stored(image, **options):
  """The bytes of a JPEG."""
  file = io.BytesIO()
  image.save(file, "jpeg", quality=90, **options)
  return file.getvalue()


def cropped(encoded, box=BOX, size=SMALL, channels=3):
  return decoding.OpenImage(encoded, channels).crop(box, size)


def resized(image, box=BOX, size=SMALL):
  return image.crop(box).resize(size, Image.Resampling.BILINEAR)


def distance(image, other):
  """Of 255, per pixel and channel."""
  pair = (np.asarray(each).astype(int) for each in (image, other))
  return np.abs(np.subtract(*pair))


def test_a_png_comes_out_as_it_went_in(picture, encoded):
  pixels = picture(0)
  image = decoding.decode(encoded(pixels), 3)
  np.testing.assert_array_equal(np.asarray(image), pixels)


def test_a_jpeg_comes_out_nearly_as_it_went_in(picture, encoded):
  pixels = picture(0).astype(int)
  image = np.asarray(decoding.decode(encoded(picture(0), "jpeg"), 3)).astype(
    int
  )
  # Quality 75 of a smooth image: a few of 255 on average.
  assert 0 < np.abs(image - pixels).mean() < 6


def test_colors_are_converted_to_the_channels_wanted(picture, encoded):
  gray = picture(0, (9, 7, 1))
  image = np.asarray(decoding.decode(encoded(gray), 3))
  np.testing.assert_array_equal(image, np.repeat(gray, 3, axis=2))
  alpha = np.concatenate([picture(1), picture(2)[..., :1]], axis=2)
  image = np.asarray(decoding.decode(encoded(alpha), 3))
  np.testing.assert_array_equal(image, picture(1))
  assert decoding.decode(encoded(picture(1)), 1).mode == "L"
  np.testing.assert_array_equal(
    np.asarray(decoding.decode(gray, 1)), gray[..., 0]
  )


def test_a_truncated_or_foreign_file_cannot_be_decoded(picture, encoded):
  for kind in ("png", "jpeg"):
    whole = encoded(picture(0), kind)
    for part in (b"", whole[:10], whole[: len(whole) * 2 // 3], b"x" * 99):
      with pytest.raises(decoding.UnreadableImage):
        decoding.decode(part, 3)


def test_sixteen_bits_are_refused_and_not_clipped():
  file = io.BytesIO()
  Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(file, "png")
  with pytest.raises(decoding.UnreadableImage, match="more than 8 bits"):
    decoding.decode(file.getvalue(), 1)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_crop_that_shrinks_is_nearly_that_of_the_whole_image(
  picture, library, mode, channels
):
  encoded = stored(Image.fromarray(picture(0, (301, 399, 3))).convert(mode))
  whole = decoding.decode(encoded, channels)
  found = distance(cropped(encoded, channels=channels), resized(whole))
  # Decoded at a quarter: another low-pass filter than averaging.
  assert 0 < found.mean() < 1 and found.max() < 8


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_crop_that_shrinks_is_turned_as_viewers_show_it(
  picture, library, orientation
):
  exif = Image.Exif()
  exif[0x0112] = orientation
  encoded = stored(Image.fromarray(picture(3, (400, 400, 3))), exif=exif)
  whole = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded)))
  assert distance(cropped(encoded), resized(whole)).mean() < 1
  as_stored = decoding.OpenImage(encoded, 3, orient=False).crop(BOX, SMALL)
  whole = Image.open(io.BytesIO(encoded))
  assert distance(as_stored, resized(whole)).mean() < 1


def test_a_turned_image_has_the_size_that_viewers_show(picture):
  exif = Image.Exif()
  exif[0x0112] = 6
  encoded = stored(Image.fromarray(picture(0, (20, 30, 3))), exif=exif)
  assert decoding.OpenImage(encoded, 3).size == (20, 30)
  assert decoding.OpenImage(encoded, 3, orient=False).size == (30, 20)


@pytest.mark.parametrize("size", [(131, 60), (60, 121), (300, 300)])
def test_a_crop_less_than_twice_as_large_is_that_of_the_whole_image(
  picture, library, size
):
  encoded = stored(Image.fromarray(picture(0, (301, 399, 3))))
  want = resized(decoding.decode(encoded, 3), size=size)
  # Weights of 16 bits round the last of 8 bits differently.
  tolerance = int(fast_images.AVAILABLE)
  assert distance(cropped(encoded, size=size), want).max() <= tolerance


@pytest.mark.parametrize("shape", [(301, 399, 3), (301, 399, 1)])
def test_other_formats_are_decoded_in_full(picture, encoded, library, shape):
  pixels = picture(0, shape)
  got = cropped(encoded(pixels), channels=shape[-1])
  want = resized(Image.fromarray(pixels.squeeze()))
  tolerance = int(fast_images.AVAILABLE)
  assert distance(got, want).max() <= tolerance


def test_an_evaluation_decodes_in_full(picture):
  encoded = stored(Image.fromarray(picture(0, (300, 300, 3))))
  transform = transforms.Transform("none", 30)
  got = transform.test(decoding.OpenImage(encoded, 3))
  want = decoding.decode(encoded, 3).resize((30, 30), Image.Resampling.BILINEAR)
  np.testing.assert_array_equal(got, np.asarray(want))


def test_a_crop_of_a_damaged_image_cannot_be_decoded(picture, library):
  encoded = stored(Image.fromarray(picture(0, (301, 399, 3))))
  for size in (SMALL, (300, 300)):
    opened = decoding.OpenImage(encoded[: len(encoded) // 2], 3)
    with pytest.raises(decoding.UnreadableImage, match="truncated"):
      opened.crop(BOX, size)


@pytest.mark.skipif(not fast_images.AVAILABLE, reason="the extra images")
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
def test_both_decoders_give_the_same_bits(
  picture, progressive, subsampling, reduction
):
  options = {"progressive": progressive, "subsampling": subsampling}
  encoded = stored(Image.fromarray(picture(0, (45, 67, 3))), **options)
  image = Image.open(io.BytesIO(encoded))
  image.draft(None, (67 // reduction, 45 // reduction))
  got = fast_images.decode_jpeg(encoded, (67, 45), reduction)
  np.testing.assert_array_equal(got, np.asarray(image))


@pytest.mark.skipif(not fast_images.AVAILABLE, reason="the extra images")
@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_other_color_spaces_are_left_to_pillow(picture, mode):
  encoded = stored(Image.fromarray(picture(0, (45, 67, 3))).convert(mode))
  assert fast_images.decode_jpeg(encoded, (67, 45), 1) is None
