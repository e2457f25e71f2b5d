"""Tests of decoding and augmentation, against numpy by hand."""

import io

import numpy as np
import pytest
from PIL import Image

from dr_jax.data import transforms


def words(seed):
  return np.random.Philox(seed).random_raw(transforms.WORDS)


def chosen(**chances):
  """Words whose numbers in [0, 1) are given by position."""
  values = np.full(transforms.WORDS, 0.5)
  for name, chance in chances.items():
    values[int(name[1:])] = chance
  return (values * 2.0**53).astype(np.uint64) << np.uint64(11)


def test_a_png_comes_out_as_it_went_in(picture, encoded):
  pixels = picture(0)
  image = transforms.decode(encoded(pixels), 3)
  np.testing.assert_array_equal(np.asarray(image), pixels)


def test_a_jpeg_comes_out_nearly_as_it_went_in(picture, encoded):
  pixels = picture(0).astype(int)
  image = np.asarray(transforms.decode(encoded(picture(0), "jpeg"), 3)).astype(
    int
  )
  # Quality 75 of a smooth image: a few of 255 on average.
  assert 0 < np.abs(image - pixels).mean() < 6


def test_colors_are_converted_to_the_channels_wanted(picture, encoded):
  gray = picture(0, (9, 7, 1))
  image = np.asarray(transforms.decode(encoded(gray), 3))
  np.testing.assert_array_equal(image, np.repeat(gray, 3, axis=2))
  alpha = np.concatenate([picture(1), picture(2)[..., :1]], axis=2)
  image = np.asarray(transforms.decode(encoded(alpha), 3))
  np.testing.assert_array_equal(image, picture(1))
  assert transforms.decode(encoded(picture(1)), 1).mode == "L"
  np.testing.assert_array_equal(
    np.asarray(transforms.decode(gray, 1)), gray[..., 0]
  )


def test_a_truncated_or_foreign_file_cannot_be_decoded(picture, encoded):
  for kind in ("png", "jpeg"):
    whole = encoded(picture(0), kind)
    for part in (b"", whole[:10], whole[: len(whole) * 2 // 3], b"x" * 99):
      with pytest.raises(transforms.UnreadableImage):
        transforms.decode(part, 3)


def test_sixteen_bits_are_refused_and_not_clipped():
  file = io.BytesIO()
  Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(file, "png")
  with pytest.raises(transforms.UnreadableImage, match="more than 8 bits"):
    transforms.decode(file.getvalue(), 1)


def test_images_are_normalized_per_channel(picture):
  transform = transforms.Transform(mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 2.0))
  pixels = picture(0)
  got = np.empty(pixels.shape, np.float32)
  transform.normalize(transform.test(Image.fromarray(pixels)), got)
  want = (pixels / 255 - [0.5, 0.25, 0.0]) / [0.5, 0.25, 2.0]
  # float32: 24 bits.
  np.testing.assert_allclose(got, want, atol=1e-6)


def test_nothing_is_augmented_by_default(picture):
  transform = transforms.Transform()
  image = Image.fromarray(picture(0))
  for seed in range(3):
    got = transform.train(image, words(seed))
    np.testing.assert_array_equal(got, transform.test(image))
  np.testing.assert_array_equal(got, picture(0))


def test_a_gray_image_has_one_channel(picture):
  image = Image.fromarray(picture(0, (6, 5, 1))[..., 0])
  assert transforms.Transform().test(image).shape == (6, 5, 1)


@pytest.mark.parametrize("flip", [0.49, 0.5])
@pytest.mark.parametrize(("across", "left"), [(0, 0), (0.5, 4), (0.999, 8)])
@pytest.mark.parametrize(("down", "top"), [(0, 0), (0.12, 1), (0.999, 8)])
def test_pad_and_crop_takes_a_window_of_the_padded_image(
  picture, flip, across, left, down, top
):
  pixels = picture(0, (10, 12, 3))
  got = transforms.Transform("pad_and_crop").train(
    Image.fromarray(pixels), chosen(_0=flip, _1=across, _2=down)
  )
  padded = np.pad(pixels, ((4, 4), (4, 4), (0, 0)))
  want = padded[top : top + 10, left : left + 12]
  want = want[:, ::-1] if flip < 0.5 else want
  np.testing.assert_array_equal(got, want)


def test_a_random_resized_crop_resizes_its_box(picture):
  image = Image.fromarray(picture(0, (40, 60, 3)))
  drawn = chosen(_0=0.9, _1=0.3, _2=0.8, _3=0.4, _4=0.7)
  got = transforms.Transform("random_resized_crop", 16).train(image, drawn)
  area = 40 * 60 * (0.08 + 0.92 * 0.4)
  ratio = np.exp(np.log(3 / 4) + 0.7 * (np.log(4 / 3) - np.log(3 / 4)))
  w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
  left, top = int(0.3 * (61 - w)), int(0.8 * (41 - h))
  box = image.crop((left, top, left + w, top + h))
  want = np.asarray(box.resize((16, 16), Image.Resampling.BILINEAR))
  np.testing.assert_array_equal(got, want)
  drawn = chosen(_0=0.1, _1=0.3, _2=0.8, _3=0.4, _4=0.7)
  flipped = transforms.Transform("random_resized_crop", 16).train(image, drawn)
  np.testing.assert_array_equal(flipped, got[:, ::-1])


def test_random_boxes_keep_area_ratio_and_image():
  rng = np.random.default_rng(0)
  areas = []
  for _ in range(2000):
    left, top, right, bottom = transforms.random_box(500, 375, rng.random(31))
    assert 0 <= left < right <= 500 and 0 <= top < bottom <= 375
    w, h = right - left, bottom - top
    # Rounding to pixels of a side of at least 100.
    assert 0.74 < w / h < 1.35
    areas.append(w * h / (500 * 375))
  assert 0.079 < min(areas) < 0.1 and max(areas) > 0.9
  # Tries of uniform area and log-uniform ratio, those that fit.
  area = rng.uniform(0.08, 1, 10**6) * 500 * 375
  ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3), 10**6))
  fits = (area * ratio <= 500**2) & (area / ratio <= 375**2)
  # Standard deviation of a single area 0.21: five of the mean of 2000.
  assert abs(np.mean(areas) - area[fits].mean() / (500 * 375)) < 0.024


@pytest.mark.parametrize(
  ("size", "want"), [((100, 10), (43, 0, 56, 10)), ((10, 99), (0, 43, 10, 56))]
)
def test_an_image_that_no_box_fits_is_cropped_to_its_center(size, want):
  # An area of 100 % fits an image of this shape with no ratio allowed.
  assert transforms.random_box(*size, [0.5, 0.5] + [0.999, 0.5] * 10) == want


def test_test_images_are_the_center_of_a_resized_image(picture):
  image = Image.fromarray(picture(0, (300, 400, 3)))
  got = transforms.Transform("random_resized_crop", 224).test(image)
  resized = image.resize((341, 256), Image.Resampling.BILINEAR)
  want = np.asarray(resized)[16:240, 58:282]
  np.testing.assert_array_equal(got, want)


def test_without_a_margin_the_shorter_side_is_the_size(picture):
  image = Image.fromarray(picture(0, (20, 26, 3)))
  got = transforms.Transform("none", 20).test(image)
  np.testing.assert_array_equal(got, picture(0, (20, 26, 3))[:, 3:23])
  cropped = transforms.Transform("pad_and_crop", 8).train(image, words(0))
  assert cropped.shape == (8, 8, 3)
