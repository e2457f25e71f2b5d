"""Tests of configuration files as the command loads them, and of its flags."""

import os
import pathlib
import random
import re

import pytest
from ml_collections import ConfigDict, config_dict

from dr_jax.config import ConfigError, flags, from_dict
from dr_jax.pipeline import comparison

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
GOOD = "from ml_collections import ConfigDict\n"

# What a file holds, and what the error says behind the file's name.
BAD_FILES = [
  ("", " must define a function get_config"),
  ("x = 1", " must define a function get_config"),
  ("get_config = 3", " must define a function get_config"),
  ("def config():\n  return 1", " must define a function get_config"),
  ("a b", ", line 1: SyntaxError: invalid syntax"),
  ("\nx = (", r", line 2: SyntaxError: '\(' was never closed"),
  ("def f():\nreturn 1", ", line 2: IndentationError: expected an indented"),
  ("if 1:\n\tx = 1\n        y = 2", ", line 3: TabError: inconsistent"),
  ("x = '\xe9", ", line 1: SyntaxError: unterminated string"),
  ("return 3", ", line 1: SyntaxError: 'return' outside function"),
  (b"\xff\xfe\x00", ".*: .*Error"),
  (b"x = '\xe9'", ", line 1: SyntaxError: .*utf-8"),
  (b"x = 1\x00", ": .*null bytes"),
  (b"# coding: none\n", ": SyntaxError: unknown encoding: none"),
  ("\x7fELF", ", line 1: SyntaxError: invalid non-printable"),
  ("{'seed': 3}", " must define a function get_config"),
  ("x = " + "(" * 300 + ")" * 300, ".*: SyntaxError: too many nested"),
  ("import nothing_like_it", ", line 1: ModuleNotFoundError: No module named"),
  ("from dr_jax import nothing", ", line 1: .*Error: .*nothing"),
  ("x = 1\nx / 0", ", line 2: ZeroDivisionError: division by zero"),
  ("raise Exception", ", line 1: Exception$"),
  ("raise ValueError('one\\ntwo')", ", line 1: ValueError: one two$"),
  ("raise SystemExit(0)", ", line 1: SystemExit: 0"),
  ("import sys; sys.exit()", ", line 1: SystemExit$"),
  ("open('nothing.txt')", ", line 1: FileNotFoundError: .*nothing.txt"),
  ("def get_config():\n  raise RuntimeError('no')", ", line 2: RuntimeErr.*no"),
  ("def get_config():\n  assert 0, 'why'", ", line 2: AssertionError: why"),
  ("def get_config():\n  return {}['k']", ", line 2: KeyError: 'k'"),
  ("def get_config():\n  return None.x", ", line 2: AttributeError: 'NoneType"),
  ("def get_config():\n  return get_config()", ", line 2: RecursionError"),
  ("\ndef get_config(a, b):\n  pass", ", line 2: TypeError: .*missing 2"),
  ("def get_config():\n  pass", ", line 1: .* ConfigDict, got NoneType"),
  ("def get_config():\n  return {}", ", line 1: .* ConfigDict, got dict"),
  ("def get_config():\n  return 3", ", line 1: .* ConfigDict, got int"),
  ("def get_config():\n  return int", ", line 1: .* ConfigDict, got type"),
  ("def get_config():\n  yield 1", ", line 1: .* ConfigDict, got generator"),
  (
    GOOD + "def get_config():\n  c = ConfigDict({'a': 1})\n  c.a = 'x'",
    ", line 4: TypeError: .*'a'",
  ),
  (
    GOOD + "def get_config():\n  return ConfigDict(3)",
    ", line 3: AttributeError: 'int'",
  ),
  (
    GOOD + "def get_config():\n  return ConfigDict().lock().x",
    ", line 3: AttributeError: .*x",
  ),
]


@pytest.mark.parametrize(("text", "message"), BAD_FILES)
def test_a_file_that_fails_is_an_error_with_its_name_and_line(
  tmp_path, text, message
):
  path = tmp_path / "bad.py"
  content = text if isinstance(text, bytes) else text.encode()
  path.write_bytes(content)
  with pytest.raises(ConfigError) as caught:
    flags.load(str(path))
  words = str(caught.value)
  assert re.match(re.escape(str(path)) + message, words), words
  assert [p.name for p in tmp_path.iterdir()] == ["bad.py"]


def test_an_error_in_an_imported_file_has_the_line_that_led_there(tmp_path):
  path = tmp_path / "bad.py"
  path.write_text("def get_config():\n  import json\n  json.loads('{')\n")
  with pytest.raises(ConfigError, match=r"bad\.py, line 3: JSONDecodeError"):
    flags.load(str(path))


def test_a_syntax_error_in_an_imported_file_names_that_file(
  tmp_path, monkeypatch
):
  monkeypatch.syspath_prepend(tmp_path)
  (tmp_path / "its_part.py").write_text("\n\nx = = 1")
  path = tmp_path / "bad.py"
  path.write_text("import its_part")
  with pytest.raises(ConfigError, match=r"its_part\.py, line 3: SyntaxError"):
    flags.load(str(path))


@pytest.mark.parametrize("kind", ["missing", "directory", "pipe"])
def test_what_is_not_a_file_is_an_error_at_once(tmp_path, kind):
  path = tmp_path / "it"
  if kind == "directory":
    path.mkdir()
  elif kind == "pipe":
    os.mkfifo(path)
  with pytest.raises(ConfigError, match="--config=.*it' is not a file"):
    flags.load(f"{path}:432")


def test_the_argument_is_all_that_follows_the_first_colon(tmp_path):
  path = tmp_path / "good.py"
  path.write_text(
    GOOD + "def get_config(arg=None):\n  return ConfigDict({'arg': arg})"
  )
  for argument, arg in (("", None), (":", ""), (":a:b", "a:b")):
    assert flags.load(f"{path}{argument}").to_dict() == {"arg": arg}


def test_a_file_may_define_dataclasses(tmp_path):
  path = tmp_path / "good.py"
  path.write_text(
    "from __future__ import annotations\nimport dataclasses\n"
    + GOOD
    + "@dataclasses.dataclass\nclass A:\n  x: int = 3\n"
    "def get_config():\n  return ConfigDict(dataclasses.asdict(A()))"
  )
  assert flags.load(str(path)).x == 3


def test_a_required_field_without_a_value_is_named():
  config = ConfigDict({"data": {"name": "digits"}})
  config.data.path = config_dict.required_placeholder(str)
  with pytest.raises(ConfigError, match="data.path must be set, got None"):
    flags.values(config)
  config.data.path = "x"
  assert flags.values(config) == {"data": {"name": "digits", "path": "x"}}


def mutant(text, rng):
  """Returns the bytes of a file with a few of them changed."""
  code = bytearray(text)
  for _ in range(rng.randint(1, 3)):
    at = rng.randrange(len(code))
    match rng.randrange(4):
      case 0:
        del code[at : at + rng.randint(1, 20)]
      case 1:
        code[at] = rng.randrange(256)
      case 2:
        code[at:at] = rng.choice(PIECES)
      case 3:
        start = rng.randrange(len(code))
        code[at:at] = code[start : start + rng.randint(1, 30)]
  return bytes(code)


PIECES = (
  *(b"(", b")", b"'", b"\n", b" ", b"=", b",", b"-", b"\x00", b"**", b"[]"),
  *(b"1e400", b"None", b"9" * 30, b"lambda: 0", b"{1: 2}", b"\n  return 3\n"),
)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
  "cases", [200, pytest.param(3000, marks=pytest.mark.slow)]
)
def test_a_damaged_file_is_a_configuration_or_one_line(tmp_path, cases):
  rng = random.Random(13)
  texts = [path.read_bytes() for path in sorted(CONFIGS.glob("*.py"))]
  # Behind the docstring.
  texts = [(text, text.index(b"from ml_")) for text in texts]
  path, wrong = tmp_path / "config.py", 0
  for _ in range(cases):
    text, start = rng.choice(texts)
    path.write_bytes(text[:start] + mutant(text[start:], rng))
    try:
      values = flags.values(flags.load(str(path)))
      if "methods" in values:
        comparison.from_values(values)
      else:
        from_dict(values)
    except ConfigError as error:
      assert "\n" not in str(error)
      wrong += 1
  assert cases / 2 < wrong < cases
