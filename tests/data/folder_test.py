"""Tests of image folders, and of sources of encoded images on them."""

import io
import os
import shutil
import warnings

import numpy as np
import pytest
from PIL import Image, ImageOps

from dr_jax import data
from dr_jax.data import decoding, folder


def test_images_are_sorted_by_class_and_name(make_folder):
  path = make_folder()
  (path / "train" / "dog" / "00.PNG").write_bytes(b"")
  (path / "train" / "dog" / "notes.txt").write_text("no image")
  (path / "train" / "dog" / ".hidden.png").write_text("no image")
  (path / "train" / ".cache").mkdir()
  (path / "train" / "readme.png").write_text("no class")
  (path / "train" / "cat" / "more").mkdir()
  with pytest.warns(UserWarning) as warned:
    found = folder.scan(path, "train")
  (message,) = (str(warning.message) for warning in warned)
  assert message.startswith(
    f"{path}/train/readme.png, {path}/train/cat/more, "
    f"{path}/train/dog/notes.txt: left out; images are CLASS/NAME"
  )
  assert found.classes == ("cat", "dog")
  names = [found.name(i).removeprefix(f"{path}/train/") for i in range(25)]
  assert names[:3] == ["cat/00.png", "cat/01.JPG", "cat/02.png"]
  assert names[12:15] == ["dog/00.PNG", "dog/00.png", "dog/01.JPG"]
  assert names == sorted(names) and len(found) == 25
  assert found.labels.tolist() == [0] * 12 + [1] * 13
  assert found.read(14)[1] == 1


def test_a_folder_is_loaded_as_its_files_are(make_folder, picture):
  loaded = data.load("folder", path=str(make_folder()))
  assert loaded.num_classes == 2 and loaded.shape == (20, 24, 3)
  assert (len(loaded.train), len(loaded.test)) == (24, 10)
  example = loaded.train[12]
  assert example["image"].dtype == np.float32 and example["label"] == 1
  want = picture(1000 + 500) / np.float32(255)
  np.testing.assert_array_equal(example["image"], want)
  np.testing.assert_array_equal(
    loaded.test[0]["image"], picture(400) / np.float32(255)
  )


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda path: shutil.rmtree(path / "test"), "has no directory 'test'"),
    (
      lambda path: shutil.rmtree(path / "test" / "cat"),
      "test must have the classes of .*train, but lacks cat$",
    ),
    (
      lambda path: (path / "test" / "cat").rename(path / "test" / "owl"),
      "test must have the classes of .*train, but lacks cat$",
    ),
    (
      lambda path: [f.unlink() for f in (path / "test" / "dog").iterdir()],
      r"test/dog must have images \(\.png, .*\), but has none$",
    ),
    (
      lambda path: [shutil.rmtree(d) for d in (path / "test").iterdir()],
      "test must have one directory per class, but has none",
    ),
  ],
)
def test_a_folder_that_lacks_something_is_one_line(
  make_folder, change, message
):
  path = make_folder()
  change(path)
  with pytest.raises(ValueError, match=message) as error:
    data.load("folder", path=str(path))
  assert "\n" not in str(error.value)


def test_a_class_that_only_the_test_split_has_is_an_error(make_folder):
  path = make_folder()
  shutil.copytree(path / "test" / "cat", path / "test" / "owl")
  with pytest.raises(
    ValueError, match="train must have the classes of .*test, but lacks owl"
  ):
    data.load("folder", path=str(path))


def test_no_path_is_an_error_that_shows_the_layout():
  with pytest.raises(ValueError, match="path must be a directory of images as"):
    data.load("folder")


def test_images_of_different_sizes_need_a_size(make_folder, picture, encoded):
  path = make_folder()
  odd = path / "train" / "cat" / "03.JPG"
  odd.write_bytes(encoded(picture(0, (8, 9, 3)), "jpeg"))
  loaded = data.load("folder", path=str(path))
  with pytest.raises(
    ValueError, match=r"03\.JPG must have the shape .* got \(8, 9, 3\)"
  ):
    loaded.train[3]
  loaded = data.load("folder", path=str(path), image_size=8)
  assert loaded.shape == (8, 8, 3)
  assert next(data.epoch(loaded.train, batch_size=24))["image"].shape[1] == 8


@pytest.mark.parametrize("field", ["mean", "std"])
def test_normalization_has_a_number_for_each_channel(make_folder, field):
  with pytest.raises(ValueError, match=rf"^{field} must be 3 .* got \(0\.5,\)"):
    data.load("folder", path=str(make_folder()), **{field: (0.5,)})


def _torn(make_folder, *names):
  path = make_folder()
  for name in names:
    file = path / "train" / name
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
  return str(path)


def test_an_unreadable_image_stops_with_its_name(make_folder):
  path = _torn(make_folder, "cat/03.JPG")
  loaded = data.load("folder", path=path)
  message = r"cat/03\.JPG cannot be read \(.*\); repair it"
  with pytest.raises(data.UnreadableImage, match=message):
    list(data.epoch(loaded.train, batch_size=8))


def test_workers_hand_over_pixels_and_steps_see_normalized_images(make_folder):
  loaded = data.load(
    "folder", path=str(make_folder()), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)
  )
  batches = data.batches(loaded.train, batch_size=8, seed=0)
  handed, seen = batches._shard(0)["image"], batches[0]["image"]
  assert (handed.dtype, seen.dtype) == (np.uint8, np.float32)
  want = (handed / 255 - [0.5, 0.4, 0.3]) / [0.2, 0.3, 0.4]
  np.testing.assert_allclose(seen, want, rtol=0, atol=1e-6)  # float32's digits
  (whole,) = data.epoch(loaded.test, batch_size=10)
  pixels = loaded.test.read(np.arange(10))["image"]
  assert pixels.dtype == np.uint8
  want = (pixels / 255 - [0.5, 0.4, 0.3]) / [0.2, 0.3, 0.4]
  np.testing.assert_allclose(whole["image"], want, rtol=0, atol=1e-6)


def test_the_next_example_takes_the_place_of_unreadable_ones(make_folder):
  path = _torn(make_folder, "cat/11.JPG", "dog/00.png")
  loaded = data.load("folder", path=path, on_decode_error="skip")
  whole = data.load("folder", path=str(make_folder("whole")))
  for index in (11, 12):
    got, want = loaded.train[index], whole.train[13]
    np.testing.assert_array_equal(got["image"], want["image"])
    assert got["label"] == want["label"] == 1
  batch = whole.train.gather(np.arange(24))
  with pytest.warns(UserWarning) as warned:
    (got,) = data.epoch(loaded.train, batch_size=24)
  assert [str(w.message) for w in warned] == [
    f"{path}/train/{name}: cannot be read; the next example takes its place"
    for name in ("cat/11.JPG", "dog/00.png")
  ]
  # They do not count in an evaluation, where they would count twice.
  assert got["mask"].tolist() == [1] * 11 + [0] * 2 + [1] * 11
  np.testing.assert_array_equal(got["image"][13:], batch["image"][13:])


def test_an_unreadable_image_that_fills_a_batch_counts_once(make_folder):
  loaded = data.load(
    "folder",
    path=_torn(make_folder, "cat/00.png"),
    on_decode_error="skip",
    image_size=8,
  )
  with pytest.warns(UserWarning, match="00.png"):
    (batch,) = data.epoch(loaded.train, batch_size=32)
  assert batch["mask"].sum() == 23
  assert list(loaded.train.unreadable.values()) == [1]


def test_the_last_example_is_replaced_by_the_first(make_folder):
  loaded = data.load(
    "folder", path=_torn(make_folder, "dog/11.JPG"), on_decode_error="skip"
  )
  np.testing.assert_array_equal(
    loaded.train[23]["image"], loaded.train[0]["image"]
  )
  assert loaded.train[23]["label"] == 0


def test_a_file_that_is_gone_is_an_unreadable_image(make_folder):
  path = make_folder()
  loaded = data.load("folder", path=str(path))
  (path / "train" / "cat" / "05.JPG").unlink()
  with pytest.raises(
    data.UnreadableImage,
    match=r"05\.JPG cannot be read \(No such file",
  ):
    loaded.train[5]


def test_unreadable_images_are_named_once_and_counted(make_folder):
  loaded = data.load(
    "folder", path=_torn(make_folder, "cat/03.JPG"), on_decode_error="skip"
  )
  batches = data.batches(loaded.train, batch_size=24, seed=0)
  with pytest.warns(UserWarning, match="03.JPG") as warned:
    for step in range(3):
      assert set(batches[step]) == {"image", "label"}
  assert len(warned) == 1
  ((name, count),) = loaded.train.unreadable.items()
  assert name.endswith("cat/03.JPG") and count == 3
  assert not loaded.test.unreadable


def test_nothing_readable_at_all_is_an_error(make_folder):
  path = make_folder()
  for file in (path / "train").rglob("*.*"):
    file.write_bytes(b"")
  with pytest.raises(data.UnreadableImage, match="nor can any other"):
    data.load("folder", path=str(path), on_decode_error="skip")


def test_held_out_examples_take_no_training_examples_place(make_folder):
  names = [f"cat/{n:02}.{'png' if n % 2 == 0 else 'JPG'}" for n in range(12)]
  path = _torn(make_folder, *names)
  loaded = data.load("folder", path=path, on_decode_error="skip", image_size=16)
  kept, held = data.hold_out(loaded.train, 0.25)
  assert (len(kept), len(held)) == (18, 6)

  def seen(source):
    with pytest.warns(UserWarning, match="cannot be read"):
      (batch,) = data.epoch(source, batch_size=len(source))
    return {image.tobytes() for image in batch["image"]}

  assert not seen(kept) & seen(held)


def test_a_label_out_of_range_is_an_error(make_folder):
  source = data.load("folder", path=str(make_folder())).train
  source.examples.labels[4] = -1
  with pytest.raises(
    ValueError, match="04.png must have a label in 0..1, got -1"
  ):
    source[4]


@pytest.mark.parametrize(
  "suffix", ["webp", "jfif", "jpe", "bmp", "tif", "tiff", "gif", "ppm"]
)
def test_images_of_other_suffixes_are_read(make_folder, picture, suffix):
  path = make_folder()
  file = path / "train" / "cat" / f"new.{suffix}"
  kind = {"jfif": "jpeg", "jpe": "jpeg", "tif": "tiff"}.get(suffix, suffix)
  Image.fromarray(picture(3)).save(file, kind)
  loaded = data.load("folder", path=str(path))
  got = loaded.train[12]
  assert loaded.train.examples.name(12) == str(file) and got["label"] == 0
  with Image.open(file) as image:
    want = np.asarray(image.convert("RGB")) / np.float32(255)
  np.testing.assert_array_equal(got["image"], want)


def _dangling(path):
  """Links that lead nowhere: two images and a class."""
  for name in ("cat/aa.png", "dog/bb.JPG", "owl"):
    (path / "train" / name).symlink_to("/nowhere/that/is")
  return path


def test_links_that_lead_nowhere_stop_with_their_names(make_folder):
  path = _dangling(make_folder())
  message = (
    rf"^{path}/train/owl, {path}/train/cat/aa\.png, {path}/train/dog/bb\.JPG: "
    "a link must lead to a file or directory"
  )
  with pytest.raises(ValueError, match=message):
    data.load("folder", path=str(path))


def test_links_that_lead_nowhere_are_counted_when_skipped(make_folder):
  path = _dangling(make_folder())
  with pytest.warns(UserWarning, match="train/owl: left out, since the link"):
    loaded = data.load("folder", path=str(path), on_decode_error="skip")
  assert len(loaded.train) == 26 and loaded.num_classes == 2
  with pytest.warns(UserWarning, match="cannot be read; the next example"):
    list(data.epoch(loaded.train, batch_size=26))
  assert sorted(loaded.train.unreadable) == [
    f"{path}/train/cat/aa.png",
    f"{path}/train/dog/bb.JPG",
  ]


@pytest.mark.parametrize("target", ["aa.png", "00.png/x", "a" * 300])
def test_links_that_cannot_be_followed_lead_nowhere(make_folder, target):
  path = make_folder()
  link = path / "train" / "cat" / "aa.png"
  link.symlink_to(target)
  with pytest.raises(ValueError, match=f"^{link}: a link must lead to a file"):
    data.load("folder", path=str(path))
  loaded = data.load("folder", path=str(path), on_decode_error="skip")
  assert len(loaded.train) == 25


@pytest.mark.parametrize("target", ["fifo", "/dev/zero"])
def test_links_to_what_has_no_end_are_unreadable(make_folder, target):
  path = make_folder()
  os.mkfifo(path / "fifo")
  link = path / "train" / "cat" / "zz.png"
  link.symlink_to(path / target)
  source = data.load("folder", path=str(path), on_decode_error="skip").train
  assert source.examples.name(12) == str(link)
  with pytest.raises(data.UnreadableImage, match="must be a regular file"):
    source.examples.read(12)


def test_links_of_other_suffixes_that_lead_nowhere_are_named(make_folder):
  path = make_folder()
  link = path / "train" / "cat" / "list.csv"
  link.symlink_to("/nowhere/that/is")
  with pytest.warns(UserWarning, match=f"^{link}: left out; images are"):
    data.load("folder", path=str(path))


def test_links_that_lead_somewhere_are_read(make_folder):
  path = make_folder()
  (path / "train" / "cat" / "zz.png").symlink_to(path / "train/dog/00.png")
  (path / "train" / "dog").rename(path / "elsewhere")
  (path / "train" / "dog").symlink_to(path / "elsewhere")
  (path / "train" / "cat" / "zz.png").unlink()
  (path / "train" / "cat" / "zz.png").symlink_to(path / "elsewhere/00.png")
  loaded = data.load("folder", path=str(path))
  assert len(loaded.train) == 25 and loaded.num_classes == 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_viewers_show_them(
  make_folder, picture, orientation
):
  path = make_folder()
  exif = Image.Exif()
  exif[0x0112] = orientation
  for split in ("train", "test"):
    for name in ("cat", "dog"):
      for file in (path / split / name).iterdir():
        image = Image.fromarray(picture(5))
        image.save(file, "jpeg", quality=95, exif=exif)
  file = path / "train" / "cat" / "00.png"
  with Image.open(file) as image:
    stored = image.convert("RGB")
    shown = ImageOps.exif_transpose(image).convert("RGB")
  for orient, image in ((True, shown), (False, stored)):
    loaded = data.load("folder", path=str(path), orient=orient)
    want = np.asarray(image) / np.float32(255)
    assert loaded.shape == want.shape
    np.testing.assert_array_equal(loaded.train[0]["image"], want)


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_tiff_images_are_turned_only_if_asked(
  picture, orientation, compression
):
  stored = Image.fromarray(picture(5))
  file = io.BytesIO()
  stored.save(
    file, "tiff", tiffinfo={0x0112: orientation}, compression=compression
  )
  exif = stored.getexif()
  exif[0x0112] = orientation
  shown = ImageOps.exif_transpose(stored)
  for orient, want in ((True, shown), (False, stored)):
    got = decoding.decode(file.getvalue(), 3, orient=orient)
    np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


def test_a_reason_names_no_object_of_the_process(make_folder):
  path = make_folder()
  (path / "train" / "cat" / "03.JPG").write_bytes(b"this is no image at all")
  loaded = data.load("folder", path=str(path))
  with pytest.raises(data.UnreadableImage) as error:
    loaded.train[3]
  assert str(error.value).startswith(
    f"{path}/train/cat/03.JPG cannot be read (cannot identify image file);"
  )


def test_palettes_with_transparency_and_damaged_exif_data_warn_of_nothing():
  palette = Image.new("P", (4, 4), 1)
  palette.putpalette([0, 0, 0, 10, 20, 30])
  file = io.BytesIO()
  palette.save(file, "png", transparency=bytes([255, 0]))
  turned = io.BytesIO()
  Image.new("RGB", (4, 4), (10, 20, 30)).save(
    turned, "png", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"
  )
  for encoded in (file, turned):
    with warnings.catch_warnings():
      warnings.simplefilter("error")
      image = decoding.decode(encoded.getvalue(), 3)
    assert image.getpixel((0, 0)) == (10, 20, 30)


def test_a_path_may_begin_with_the_home_directory(make_folder, monkeypatch):
  path = make_folder()
  monkeypatch.setenv("HOME", str(path.parent))
  assert len(data.load("folder", path=f"~/{path.name}").train) == 24


@pytest.mark.parametrize(
  ("labels", "message"),
  [
    ([0, -1, 2], r"labels must be in 0\.\.4, got -1 at 1"),
    ([0, 5, 7], r"labels must be in 0\.\.4, got 5 at 1"),
    ([0, 0.5, 1], "labels must be integers, got float64"),
    ([0, 1], r"labels must have shape \(3,\), .* got \(2,\)"),
  ],
)
def test_arrays_with_wrong_labels_are_refused(labels, message):
  images = np.zeros((3, 8, 8, 1), np.float32)
  with pytest.raises(ValueError, match=message):
    data.ArraySource(images, np.array(labels), num_classes=5)


def test_a_negative_label_is_refused_whatever_the_number_of_classes():
  images = np.zeros((2, 8, 8, 1), np.float32)
  with pytest.raises(ValueError, match="labels must be >= 0, got -1 at 1"):
    data.ArraySource(images, np.array([0, -1], np.int32))
