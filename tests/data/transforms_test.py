"""Tests of augmentation, against numpy by hand."""

import numpy as np
import pytest
from PIL import Image

from dr_jax.data import fast_images, transforms
from dr_jax.data.decoding import OpenImage


def opened(pixels):
  return OpenImage(pixels, channels=pixels.shape[-1])


def words(seed):
  return np.random.Philox(seed).random_raw(transforms.WORDS)


def chosen(**chances):
  """Words whose numbers in [0, 1) are given by position."""
  values = np.full(transforms.WORDS, 0.5)
  for name, chance in chances.items():
    values[int(name[1:])] = chance
  return (values * 2.0**53).astype(np.uint64) << np.uint64(11)


def test_images_are_normalized_per_channel(picture):
  transform = transforms.Transform(mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 2.0))
  pixels = picture(0)
  got = np.empty(pixels.shape, np.float32)
  transform.normalize(transform.test(opened(pixels)), got)
  want = (pixels / 255 - [0.5, 0.25, 0.0]) / [0.5, 0.25, 2.0]
  # float32: 24 bits.
  np.testing.assert_allclose(got, want, atol=1e-6)


def test_nothing_is_augmented_by_default(picture):
  transform = transforms.Transform()
  image = opened(picture(0))
  for seed in range(3):
    got = transform.train(image, words(seed))
    np.testing.assert_array_equal(got, transform.test(image))
  np.testing.assert_array_equal(got, picture(0))


def test_a_gray_image_has_one_channel(picture):
  image = opened(picture(0, (6, 5, 1)))
  assert transforms.Transform().test(image).shape == (6, 5, 1)


@pytest.mark.parametrize("flip", [0.49, 0.5])
@pytest.mark.parametrize(("across", "left"), [(0, 0), (0.5, 4), (0.999, 8)])
@pytest.mark.parametrize(("down", "top"), [(0, 0), (0.12, 1), (0.999, 8)])
def test_pad_and_crop_takes_a_window_of_the_padded_image(
  picture, flip, across, left, down, top
):
  pixels = picture(0, (10, 12, 3))
  got = transforms.Transform("pad_and_crop").train(
    opened(pixels), chosen(_0=flip, _1=across, _2=down)
  )
  padded = np.pad(pixels, ((4, 4), (4, 4), (0, 0)))
  want = padded[top : top + 10, left : left + 12]
  want = want[:, ::-1] if flip < 0.5 else want
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("fast", [False, True])
def test_a_random_resized_crop_resizes_its_box(picture, fast, monkeypatch):
  if fast and not fast_images.AVAILABLE:
    pytest.skip("needs the extra images")
  monkeypatch.setattr(fast_images, "AVAILABLE", fast)
  pixels = picture(0, (40, 60, 3))
  image = Image.fromarray(pixels)
  drawn = chosen(_0=0.9, _1=0.3, _2=0.8, _3=0.4, _4=0.7)
  transform = transforms.Transform("random_resized_crop", 16)
  got = transform.train(opened(pixels), drawn)
  area = 40 * 60 * (0.08 + 0.92 * 0.4)
  ratio = np.exp(np.log(3 / 4) + 0.7 * (np.log(4 / 3) - np.log(3 / 4)))
  w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
  left, top = int(0.3 * (61 - w)), int(0.8 * (41 - h))
  box = image.crop((left, top, left + w, top + h))
  want = np.asarray(box.resize((16, 16), Image.Resampling.BILINEAR))
  # Weights of 16 bits round the last of 8 bits differently.
  np.testing.assert_allclose(got.astype(int), want, rtol=0, atol=int(fast))
  drawn = chosen(_0=0.1, _1=0.3, _2=0.8, _3=0.4, _4=0.7)
  flipped = transform.train(opened(pixels), drawn)
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
  pixels = picture(0, (300, 400, 3))
  got = transforms.Transform("random_resized_crop", 224).test(opened(pixels))
  resized = Image.fromarray(pixels).resize(
    (341, 256), Image.Resampling.BILINEAR
  )
  want = np.asarray(resized)[16:240, 58:282]
  np.testing.assert_array_equal(got, want)


def test_without_a_margin_the_shorter_side_is_the_size(picture):
  pixels = picture(0, (20, 26, 3))
  got = transforms.Transform("none", 20).test(opened(pixels))
  np.testing.assert_array_equal(got, pixels[:, 3:23])
  cropped = transforms.Transform("pad_and_crop", 8).train(
    opened(pixels), words(0)
  )
  assert cropped.shape == (8, 8, 3)
