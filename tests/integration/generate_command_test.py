"""Tests of `python -m dr_jax.generate` as a user starts it."""

import pytest
import small_language_model
from forked_command import ForkedCommand

from dr_jax import deploy


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("generate")
  small_language_model.save(folder / "model")
  return folder


@pytest.fixture(scope="module")
def command(folder):
  """Runs the command in forks of one process."""
  forked = ForkedCommand(folder, "generate")

  def run(**flags):
    given = {"artifact": folder / "model", "bits": 8, "prompt": "abc"} | flags
    return forked(
      *(
        f"--{name}={value}"
        for name, value in given.items()
        if value is not None
      )
    )

  yield run
  forked.close()


def test_a_prompt_is_continued_at_bits_that_change_between_bytes(
  command, folder
):
  ended = command(bits="8:3,2", bytes=6, prompt="f\u00e9", end=False)
  assert (ended.code, ended.err) == (0, "")
  decoder = deploy.Decoder(folder / "model")
  prompt = "f\u00e9".encode()
  text = bytes(decoder.stream(prompt, bits=(8, 8, 8, 2, 2, 2)))
  assert ended.out == (prompt + text).decode(errors="replace") + "\n"


def test_the_number_of_the_last_bit_width_is_the_end(command):
  drawn = {"temperature": 1.5, "top_k": 20, "seed": 3, "cache": "int8"}
  whole = command(bits="4:8", end=False, **drawn)
  assert (whole.code, whole.err) == (0, "")
  first = command(bits=4, bytes=8, end=False, **drawn)
  assert whole.out == first.out


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    ({"bits": None}, "--bits must be set; see --help"),
    ({"prompt": None}, "--prompt must be set; see --help"),
    ({"prompt": ""}, "--prompt must not be empty, got ''"),
    ({"temperature": "nan"}, "--temperature must be a number >= 0, got nan"),
    ({"bits": 3}, "bits must be one of (8, 4, 2), got 3"),
    ({"bits": "8:2,3"}, "--bits must be of (8, 4, 2), got 3"),
    ({"bits": "8,4"}, "--bits must be a bit-width, or several, each but the"),
    ({"bits": "8:x"}, "--bits must be a bit-width, or several, each but the"),
    ({"artifact": "/nowhere"}, "/nowhere/manifest.json"),
    ({"temperature": -1}, "flag --temperature=-1"),
    ({"cache": "int4"}, "flag --cache=int4"),
  ],
)
def test_bad_input_is_one_line_and_exit_code_2(command, flags, message):
  ended = command(**flags)
  assert (ended.code, ended.out) == (2, "")
  assert message in ended.err and ended.err.count("\n") == 1
