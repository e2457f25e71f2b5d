"""JSON that nobody vouches for."""

import json
import random
import string

import pytest

from dr_jax.runtime import schema
from dr_jax.runtime.schema import COUNT, NAME, NUMBER, Where

PERSON = {"name": NAME, "age": (None, COUNT), "notes": [str], ...: float}


@pytest.mark.parametrize(
  ("value", "message"),
  [
    ([], "it must be an object with name, age, notes, got []"),
    ({"name": "a", "age": 1}, "it must be an object with name, age, notes"),
    ({"name": "", "age": 1, "notes": []}, "name must be a string that is not"),
    ({"name": "a", "age": -1, "notes": []}, "age must be null or an integer"),
    ({"name": "a", "age": True, "notes": []}, "age must be null or an integer"),
    ({"name": "a", "age": 2**63, "notes": []}, "got 9223372036854775808"),
    (
      {"name": "a", "age": 1, "notes": [1]},
      r"notes[0] must be a string, got 1",
    ),
    (
      {"name": "a", "age": 1, "notes": [], "x": float("nan")},
      "x must be a finite number, got nan",
    ),
  ],
)
def test_the_first_entry_that_does_not_match_is_named(value, message):
  with pytest.raises(ValueError) as error:
    schema.check(value, PERSON)
  assert message in str(error.value) and "\n" not in str(error.value)


def test_what_matches_passes():
  schema.check({"name": "a", "age": None, "notes": [], "x": 1}, PERSON)
  schema.check({"a": [object]}, {...: object})
  schema.check([float("nan"), 1, 2.0], [NUMBER])
  schema.check([3], Where([int], lambda v: len(v) == 1, "one integer"))


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("[" * 100_000, "nested too deep"),
    ("[" * 40 + "]" * 40, "nested too deep"),
    ('{"a": 1, "a": 2}', "it has 'a' twice"),
    ("", "Expecting value"),
    (b"\xff\xfe\xfa", "codec can't decode|utf"),
    ("1" * 5000, "Exceeds the limit"),
  ],
)
def test_text_that_is_no_plain_json_is_an_error(text, message):
  with pytest.raises(ValueError, match=message):
    schema.parse(text)


def test_2000_random_texts_are_parsed_or_refused():
  rng = random.Random(0)
  letters = string.printable + '{}[]":,0123456789eE.-+' * 8
  for _ in range(2000):
    text = "".join(rng.choices(letters, k=rng.randrange(30)))
    try:
      value = schema.parse(text)
    except ValueError:
      continue
    assert schema.parse(json.dumps(value)) == value or value != value
