import os
from collections.abc import Mapping

import numpy as np
import pytest

from dr_jax.allocate import Allocation
from tests.support import disk

LAYERS = ["stem", "block0/conv1", "head"]


def test_an_allocation_is_an_immutable_mapping_in_the_given_order():
  given = {"stem": np.int64(8), "head": 4}
  allocation = Allocation(given)
  given["head"] = 2
  assert isinstance(allocation, Mapping)
  assert list(allocation.items()) == [("stem", 8), ("head", 4)]
  assert all(type(b) is int for b in allocation.values())
  with pytest.raises(TypeError):
    allocation["head"] = 2


def test_equality_and_hash_ignore_the_order():
  one, other = Allocation({"a": 8, "b": 4}), Allocation({"b": 4, "a": 8})
  assert one == other == {"a": 8, "b": 4}
  assert len({one, other}) == 1
  assert one != Allocation({"a": 4, "b": 8})
  assert eval(repr(one)) == one


def test_positions_and_bits_go_both_ways():
  index = np.array([0, 2, 1])
  allocation = Allocation.from_index(LAYERS, (8, 4, 2), index)
  assert list(allocation.values()) == [8, 2, 4]
  assert allocation.index((8, 4, 2)).tolist() == index.tolist()
  assert allocation.index((2, 4, 8)).dtype == np.int64
  assert Allocation.uniform(LAYERS, 4) == dict.fromkeys(LAYERS, 4)
  with pytest.raises(
    ValueError, match=r"bits\['block0/conv1'\] must be one of \(8, 4\), got 2"
  ):
    allocation.index((8, 4))


def test_the_mean_weights_all_layers_equally():
  assert Allocation({"a": 8, "b": 3}).mean_bits == 5.5
  assert Allocation({}).mean_bits == 0


def test_the_table_is_aligned_and_takes_more_columns():
  allocation = Allocation({"stem": 8, "block0/conv1": 4})
  assert str(allocation) == (
    "layer         bits\nstem             8\nblock0/conv1     4"
  )
  table = allocation.table(parameters={"stem": 432})
  assert table == (
    "layer         bits  parameters\n"
    "stem             8         432\n"
    "block0/conv1     4"
  )


def test_a_file_keeps_entries_and_order(tmp_path):
  path = tmp_path / "allocation.json"
  path.write_text("old")
  allocation = Allocation({"z": 8, "größe/conv": 2, "a": 4})
  allocation.save(path)
  assert list(Allocation.load(path).items()) == list(allocation.items())
  assert os.listdir(tmp_path) == ["allocation.json"]
  assert path.read_text(encoding="utf-8") == allocation.to_json()


def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path):
  path = tmp_path / "allocation.json"
  Allocation({"a": 8}).save(path)
  with disk.full_after(1), pytest.raises(OSError, match="File too large"):
    Allocation({"a": 2}).save(path)
  assert Allocation.load(path) == {"a": 8}


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"", "must be a JSON object"),
    (b'{"a": 8', "must be a JSON object"),
    (b"[8, 4]", r"must be a JSON object .* got \[8, 4\]"),
    (b'{"a": 8, "a": 4}', "must be a JSON object .* it has 'a' twice"),
    (b'{"a": "8"}', r"a must be an integer, got '8'"),
    (b'{"a": 8.0}', r"a must be an integer, got 8\.0"),
    (b'{"a": true}', "a must be an integer, got True"),
    (b'{"a": 0}', r"bits\['a'\] must be an integer >= 1, got 0"),
    (b'{"": 8}', "layer must be a non-empty string, got ''"),
    (b"\xff\xfe", "utf-8"),
    (b"[" * 100_000, "nested too deep"),
  ],
)
def test_a_damaged_file_is_named(tmp_path, content, message):
  path = tmp_path / "allocation.json"
  path.write_bytes(content)
  with pytest.raises(ValueError, match=message) as error:
    Allocation.load(path)
  assert str(error.value).startswith(f"{path}: ")
  assert "\n" not in str(error.value)


def test_a_directory_in_place_of_a_file_is_named(tmp_path):
  with pytest.raises(ValueError, match=f"^{tmp_path}: must be a regular file$"):
    Allocation.load(tmp_path)


def test_a_missing_file_is_not_found(tmp_path):
  with pytest.raises(FileNotFoundError):
    Allocation.load(tmp_path / "none.json")


def test_an_allocation_must_fit_the_layers_and_the_candidates():
  allocation = Allocation({"stem": 8, "tail": 4})
  allocation.check(["tail", "stem"], (8, 4))
  with pytest.raises(ValueError) as error:
    allocation.check(["stem", "head"], (8, 4))
  assert str(error.value) == (
    "allocation must name exactly the layers ['stem', 'head'], but has unknown "
    "layers ['tail'], missing layers ['head']"
  )
  with pytest.raises(ValueError, match="unknown layers .'tail'., missing"):
    allocation.check(["stem"], (8, 4))
  with pytest.raises(
    ValueError, match=r"bits\['tail'\] must be one of \(8, 2\), got 4"
  ):
    allocation.check(["stem", "tail"], (8, 2))


@pytest.mark.parametrize(
  ("layers", "index", "message"),
  [
    (["a", "b"], [0], r"index must have one position.*got \[0\]"),
    (["a", "a"], [0, 1], r"index must have one position.*got \[0, 1\]"),
    (["a"], [-1], r"index must be an integer in 0\.\.1, got -1"),
    (["a"], [2], r"index must be an integer in 0\.\.1, got 2"),
    (["a"], [0.0], r"index must be an integer in 0\.\.1, got 0\.0"),
  ],
)
def test_positions_that_do_not_fit_are_named(layers, index, message):
  with pytest.raises(ValueError, match=message):
    Allocation.from_index(layers, (8, 4), index)


@pytest.mark.parametrize("bits", [True, 2.5, "8", -1, None])
def test_bits_must_be_positive_integers(bits):
  with pytest.raises(
    ValueError, match=r"bits\['a'\] must be an integer >= 1, got"
  ):
    Allocation({"a": bits})
