"""Charts of a run's training: accuracy, curves over steps, sizes, time.

Each takes a `runs.Run` and returns a chart, or None without its data.
"""

from __future__ import annotations

from typing import Any

from dr_jax.report.chart import (
  GRAY,
  Chart,
  bits_colors,
  bits_name,
  color,
  figure,
  finite,
)
from dr_jax.report.runs import Run
from dr_jax.runtime.tasks import TASKS

# Of networks that serve every bit-width, by the stage that has their scores.
_JOINT = {
  "multi_precision": "joint training",
  "supernet": "SuperNet",
}


def accuracy(run: Run) -> Chart | None:
  """The metric per bit-width: joint networks, separate ones, and float."""
  task = TASKS[run.task]
  labels = [bits_name(b) for b in run.bits]
  data = []
  for stage, name in _JOINT.items():
    if stage in run.stages:
      scores = run.stages[stage]["scores"]
      values = [finite(task.value(scores[str(b)])) for b in run.bits]
      data.append(_line(name, labels, values, color(len(data))))
  separate = {
    bits_name(b): finite(task.value(result["scores"][str(b)]))
    for b in run.bits
    if (result := run.stages.get(f"separate/{b}"))
  }
  if separate:
    x, y = list(separate), list(separate.values())
    data.append(_line("separate LSQ", x, y, color(2)))
  if not data:
    return None
  if "pretrain" in run.stages:
    value = finite(task.value(run.stages["pretrain"]["scores"]["float"]))
    line = _line("float", labels, [value] * len(labels), GRAY)
    dashed = {"mode": "lines", "line": {"color": GRAY, "dash": "dash"}}
    data.append(line | dashed)
  words = "accuracy" if task.higher_is_better else task.metric
  return Chart(
    "accuracy",
    f"{words.capitalize()} per bit-width",
    "On the test set, of networks as they are deployed. A joint network serves "
    "every bit-width; separate ones are trained for one each.",
    figure(data, x="weights and activations", y=task.metric),
  )


def _line(name, x, y, line_color):
  return {
    "type": "scatter",
    "mode": "lines+markers",
    "name": name,
    "x": x,
    "y": y,
    "line": {"color": line_color},
    "marker": {"size": 9, "color": line_color},
  }


def learning_curves(run: Run) -> list[Chart]:
  """The losses of training and of validation: a chart per stage."""
  return [
    Chart(
      f"loss-{stage.replace('_', '-')}",
      f"Learning curves: {stage.replace('_', ' ')}",
      "Training loss, each point a mean over the steps since the one before"
      + (
        "; dotted, the loss on the examples held out for validation."
        if any(name == "validation_loss" for _, name in curves)
        else "."
      ),
      figure(
        [
          _curve(bits, name, points, _curve_color(run, bits))
          for (bits, name), points in curves.items()
        ],
        x="step",
        y="loss",
        # More marks than this have labels that run into each other.
        yaxis={"type": "log", "nticks": 6},
      ),
    )
    for stage, curves in _curves(
      run.metrics, ("loss", "validation_loss")
    ).items()
  ]


def scale_gradients(run: Run) -> list[Chart]:
  """The gradient of the scales of weights while training: a chart per stage."""
  return [
    Chart(
      f"scale-gradients-{stage.replace('_', '-')}",
      f"Gradients of scales while training: {stage.replace('_', ' ')}",
      "Norm of the gradient of all scales of weights in the pass at each "
      "bit-width, before ALRS and the optimizer, at the steps that are logged.",
      figure(
        [
          _curve(bits, name, points, _curve_color(run, bits))
          for (bits, name), points in curves.items()
        ],
        x="step",
        y="norm of the gradient",
        yaxis={"type": "log", "exponentformat": "power"},
      ),
    )
    for stage, curves in _curves(run.metrics, ("scale_gradient_norm",)).items()
  ]


def _curves(metrics, names):
  """{stage: {(bits, name): [(step, value)]}} of the numbers of these names."""
  curves: dict[str, dict[Any, list[tuple[int, float | None]]]] = {}
  ends: dict[str, dict[str, int]] = {}
  for record in metrics:
    if record["name"] not in names:
      continue
    stage, _, part = record["stage"].partition("/")
    # Networks of separate bit-widths are trained from the same step on, phases
    # of one network one after the other.
    phase = "" if stage == "separate" else part
    phases = ends.setdefault(stage, {})
    before = sum(end for name, end in phases.items() if name != phase)
    phases[phase] = record["step"]
    bits = "float" if record["bits"] is None else record["bits"]
    points = curves.setdefault(stage, {}).setdefault((bits, record["name"]), [])
    points.append((before + record["step"], finite(record["value"])))
  return curves


def _curve_color(run, bits):
  """That of the bit-width; of words, as "random", one more."""
  return bits_colors(run.bits).get(bits, color(len(run.bits)))


def _curve(bits, name, points, shade):
  validation = name == "validation_loss"
  return {
    "type": "scatter",
    "mode": "lines+markers" if validation or len(points) < 2 else "lines",
    "name": bits_name(bits) + ", validation" * validation,
    "x": [step for step, _ in points],
    "y": [value for _, value in points],
    "line": {"color": shade, "dash": "dot" if validation else "solid"},
  }


def sizes(run: Run) -> Chart | None:
  """Bytes of the float network, the artifact, and a copy per bit-width."""
  export = run.stages.get("export")
  if export is None:
    return None
  colors = bits_colors(run.bits)
  bars = [
    ("float", export["float_bytes"], GRAY),
    ("one artifact", export["stored_bytes"], color(len(run.bits))),
    *((bits_name(b), export["bytes_at"][str(b)], colors[b]) for b in run.bits),
  ]
  return Chart(
    "sizes",
    "Sizes",
    "Bytes of the float network's parameters; of the one artifact on disk, "
    "which serves every bit-width; and of a copy whose weights serve one "
    "bit-width alone.",
    figure(
      [_bars(*map(list, zip(*bars, strict=True)))],
      x="bytes",
      showlegend=False,
      height=100 + 36 * len(bars),
      yaxis={"autorange": "reversed"},
    ),
  )


def stage_seconds(run: Run, of: str = "seconds") -> dict[str, float | None]:
  """Seconds by stage: of all of it, or of its "train_seconds" alone."""
  return {
    name: finite(result[of])
    for name, result in run.stages.items()
    if isinstance(result.get(of), int | float)
  }


def seconds(run: Run) -> Chart | None:
  """Seconds of every stage, and of its training steps."""
  whole = stage_seconds(run)
  if not whole:
    return None
  steps = stage_seconds(run, "train_seconds")
  return Chart(
    "seconds",
    "Time",
    "Seconds of each stage as a whole (compilation, training, evaluation), and "
    "of its training steps at their median speed.",
    figure(
      [
        _bars(list(whole), list(whole.values()), color(0), "stage"),
        _bars(list(steps), list(steps.values()), color(1), "training steps"),
      ],
      x="seconds",
      height=140 + 44 * len(whole),
      yaxis={"autorange": "reversed"},
    ),
  )


def _bars(names, values, colors, name=""):
  return {
    "type": "bar",
    "orientation": "h",
    "name": name,
    "y": names,
    "x": values,
    "marker": {"color": colors},
    "texttemplate": "%{x:,}",
    "hovertemplate": "%{y}: %{x:,}<extra></extra>",
  }
