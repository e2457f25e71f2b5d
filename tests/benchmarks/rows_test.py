"""Tests of what a benchmark prints while it measures."""

from dr_jax.benchmarks import network, rows, scaling


def test_a_row_is_printed_before_the_next_one_is_measured(capsys):
  seen = []

  def measured():
    for count in (1, 2):
      yield count, scaling.Speed(100.0 * count, 0.5, 0)
      seen.append(capsys.readouterr().out.splitlines()[-1])

  setting = network.Setting("resnet8", image_size=8)
  scaling.print_table(setting, 16, "processes", measured())
  assert seen == [
    "| 1 | 100.0 | 100.0 | 1.00 | 0.500 |  |",
    "| 2 | 200.0 | 100.0 | 1.00 | 0.500 | 0.000 |",
  ]


def test_rounds_and_programs_are_noted_apart_from_the_table(capsys):
  assert rows.prepared("float", lambda: 3) == 3
  for number in rows.turns(2):
    assert f"round {number + 1}/2" not in capsys.readouterr().err
  table = rows.Rows("title", ("step", "s", "of float"))
  table.add("float", "0.5")
  out, err = capsys.readouterr()
  assert err == "round 2/2\n"
  assert out.splitlines() == [
    *("title", "", "| step | s | of float |", "| --- | ---: | ---: |"),
    "| float | 0.5 |  |",
  ]
