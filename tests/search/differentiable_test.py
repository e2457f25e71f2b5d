"""Tests of searches by gradient: what they learn, find, and remember."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
import training_network as training
from flax import nnx

from dr_jax import allocate, nn, quant, search, train
from dr_jax.quant import SCALE_MIN
from dr_jax.search import differentiable

SEARCHES = (search.edmips, search.dnas)
BITS = (8, 4, 2)


@pytest.fixture
def learned(monkeypatch):
  """The logits that every search ended in, in order."""
  seen, find = [], differentiable.most_probable

  def record(problem, logits, budgets):
    seen.append(logits)
    return find(problem, logits, budgets)

  monkeypatch.setattr(differentiable, "most_probable", record)
  return seen


class Batches:
  """Random batches by step; raises at one of them, and lists what was asked."""

  def __init__(self, stop=None):
    self.stop, self.asked = stop, []

  def __getitem__(self, step):
    self.asked.append(step)
    if step == self.stop:
      raise problems.Stop
    rng = np.random.default_rng(step)
    image = rng.normal(size=(4, 2)).astype(np.float32)
    return {"image": image, "label": np.zeros(4, np.int32)}


@functools.cache
def additive_network(layers, bits, seed):
  """A network whose cross-entropy is the expected damage, plus its own part.

  Examples of class 0 get logits (-10 - damage, x w): far below the other
  class, where the cross-entropy is linear.
  """
  damage = jnp.asarray(problems.damage(layers, bits, seed), jnp.float32)

  def apply(params, batch_stats, index, image, train=False):
    del train
    wrong = 10 + (index * damage).sum() + (image @ params["w"]).sum(1)
    return jnp.stack([-wrong, 0 * wrong], 1), batch_stats

  return nn.Functional(
    apply=apply,
    params={"w": jnp.zeros((2, 2))},
    batch_stats={},
    bits=bits,
    param_labels={"w": "weight"},
    layers=layers,
    scale_layers=(),
  )


def trainable(network, batches, **fields):
  return search.SuperNet(
    network, network.params, network.batch_stats, batches, **fields
  )


def additive(
  layers=6,
  seed=0,
  batches=None,
  bits=problems.BITS,
  directory=None,
  **fields,
):
  """A problem of additive damage that can be searched by gradient."""
  network = additive_network(layers, bits, seed)
  batches = Batches() if batches is None else batches
  supernet = trainable(network, batches, directory=directory)
  return problems.problem(layers, bits, seed, supernet=supernet, **fields)


class Net(nnx.Module):
  """Two convolutions with a norm, and two linear layers."""

  def __init__(self, rngs):
    self.conv1 = nnx.Conv(1, 4, (3, 3), use_bias=False, rngs=rngs)
    self.norm = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
    self.conv2 = nnx.Conv(4, 4, (3, 3), strides=2, rngs=rngs)
    self.hidden = nnx.Linear(4, 4, rngs=rngs)
    self.head = nnx.Linear(4, 3, rngs=rngs)

  def __call__(self, x):
    x = self.conv2(nnx.relu(self.norm(self.conv1(x))))
    return self.head(nnx.relu(self.hidden(x.mean((1, 2)))))


@functools.cache
def convolutional():
  model = nn.quantize(
    Net(nnx.Rngs(0)),
    weight=quant.double_rounding(BITS),
    activation=quant.lsq_activation(BITS),
    sample=training.batch()["image"],
    norm="switchable",
    skip=(),
  )
  return nn.layer_table(model), nn.functional(model)


class TrainingBatches:
  def __getitem__(self, step):
    return jax.tree.map(np.asarray, training.batch(step))


def real(**fields):
  """A problem of a real network."""
  table, network = convolutional()
  costs = {"bops": allocate.bops([row.macs for row in table], BITS)}
  score = problems.Additive(problems.damage(len(table), BITS))
  fields = {"supernet": trainable(network, TrainingBatches()), **fields}
  return problems.Searchable(
    table=table,
    bits=BITS,
    costs=costs,
    evaluate=search.Evaluator(score),
    **fields,
  )


def hyperparams(**changes):
  """Four layers: 0 and 2 are tied, 1 is free, 3 is pinned to position 1."""
  given = differentiable.Hyperparams(
    rows=jnp.array([0, 1, 0, 3]),
    relative_costs=jnp.zeros((2, 4, 3)),
    strength=jnp.float32(0),
    learning_rate=jnp.float32(1e-3),
    logit_learning_rate=jnp.float32(0.1),
    hot=jnp.float32(1),
    cold=jnp.float32(1),
    steps=jnp.float32(9),
    noise=jnp.float32(0),
    alternate=jnp.bool_(False),
  )
  return given._replace(**changes)


LOGITS = jnp.array([[0.5, -1.0, 0.2], [1.0, 0.0, -2.0]])


def softmax(logits):
  exponentials = np.exp(np.asarray(logits, np.float64))
  return exponentials / exponentials.sum(-1, keepdims=True)


def mixture(step=0, seed=0, logits=LOGITS, **changes):
  key = jax.random.key(seed)
  return differentiable.mixture(
    logits, key, jnp.int32(step), hyperparams(**changes)
  )


def test_tied_layers_share_probabilities_and_a_pinned_one_has_no_choice():
  p = softmax(LOGITS)
  # Single float32 operations around an exponential.
  np.testing.assert_allclose(
    mixture(), [p[0], p[1], p[0], [0, 1, 0]], rtol=1e-6
  )


@pytest.mark.parametrize(
  "step, temperature", [(0, 5.0), (4, 2.5**0.5), (8, 0.5)]
)
def test_the_temperature_falls_exponentially(step, temperature):
  mixed = mixture(step, hot=jnp.float32(5), cold=jnp.float32(0.5))
  expected = softmax(LOGITS / temperature)
  # A float32 power, divided into logits of up to 4.
  np.testing.assert_allclose(mixed[:2], expected, rtol=1e-5)


def test_a_single_step_is_taken_at_the_first_temperature():
  mixed = mixture(hot=jnp.float32(5), steps=jnp.float32(1))
  np.testing.assert_allclose(mixed[:2], softmax(LOGITS / 5), rtol=1e-5)


def test_draws_choose_each_bit_width_as_often_as_its_probability():
  draws = 4000
  draw = jax.jit(jax.vmap(lambda t: mixture(t, noise=jnp.float32(1))))
  chosen = np.asarray(draw(jnp.arange(draws)))[:, :2].argmax(-1)
  for row, p in enumerate(softmax(LOGITS)):
    share = np.bincount(chosen[:, row], minlength=3) / draws
    # Five standard errors of a share; the draws are fixed.
    assert (np.abs(share - p) < 5 * np.sqrt(p * (1 - p) / draws)).all()


def test_the_temperature_divides_the_draw_as_well():
  noise = jnp.float32(1)
  sharp, flat = (
    np.log(np.asarray(mixture(hot=jnp.float32(t), noise=noise))[:2])
    for t in (1, 4)
  )
  spread = sharp - sharp.mean(1, keepdims=True)
  # Logarithms of float32 probabilities of down to 1e-3.
  np.testing.assert_allclose(
    4 * (flat - flat.mean(1, keepdims=True)), spread, rtol=1e-4, atol=1e-5
  )


def test_draws_depend_on_seed_and_step():
  noise = jnp.float32(1)
  mixed = [mixture(s, k, noise=noise) for s, k in ((0, 0), (1, 0), (0, 1))]
  assert len({np.asarray(m).tobytes() for m in mixed}) == 3


def initial(**changes):
  _, network = convolutional()
  return train.TrainState(
    step=jnp.int32(0),
    params={"weights": network.params, "logits": LOGITS},
    opt_state={
      "weights": train.make_optimizer(
        "adam", param_labels=network.param_labels
      ).init(network.params),
      "logits": differentiable._optimizers(network.param_labels)["logits"].init(
        LOGITS
      ),
    },
    batch_stats=network.batch_stats,
    key=jax.random.key(0),
    memory={},
  )._replace(**changes)


@functools.cache
def differentiated():
  state, batch, apply = initial(), training.batch(), convolutional()[1].apply

  def value(logits, given):
    trained = {"weights": state.params["weights"], "logits": logits}
    return differentiable.loss(trained, apply, state, batch, given)[0]

  return jax.jit(jax.value_and_grad(value))


def loss_and_gradient(given):
  return differentiated()(LOGITS, given)


SHARES = np.array(
  [
    # Expected shares are about 1.5 and 0.4 of the budgets.
    [[0.6, 0.3, 0.1], [0.5, 0.4, 0.2], [0.6, 0.5, 0.1], [0.9, 0.5, 0.3]],
    [[0.2, 0.1, 0.0], [0.1, 0.1, 0.1], [0.2, 0.1, 0.0], [0.3, 0.1, 0.1]],
  ]
)


def test_only_what_exceeds_a_budget_is_priced():
  p = softmax(LOGITS)
  mixed = np.stack([p[0], p[1], p[0], [0, 1, 0]])
  used = (mixed * SHARES).sum((1, 2))
  assert used[0] > 1 > used[1]
  free, _ = loss_and_gradient(hyperparams())
  for scale in (1.0, 3.0):
    given = hyperparams(
      relative_costs=jnp.asarray(SHARES * scale, jnp.float32),
      strength=jnp.float32(7),
    )
    priced, _ = loss_and_gradient(given)
    excess = np.maximum(used * scale - 1, 0).sum()
    # Differences of float32 losses of about 10.
    np.testing.assert_allclose(priced - free, 7 * excess, rtol=1e-5)


def test_the_gradient_of_a_logit_is_what_its_candidate_contributes():
  _, network = convolutional()
  state, batch = initial(), training.batch()
  p = softmax(LOGITS)
  mixed = np.stack([p[0], p[1], p[0], [0, 1, 0]])

  def by_mixture(m):
    outputs, _ = network.apply(
      network.params, state.batch_stats, m, batch["image"], train=True
    )
    return train.cross_entropy(outputs, batch["label"])

  each = jax.jit(jax.grad(by_mixture))(jnp.asarray(mixed, jnp.float32))
  each = np.asarray(each, np.float64) + 7 * SHARES[0]
  # Of the tied layers together, less the mean over the candidates.
  by_group = np.stack([each[0] + each[2], each[1]])
  expected = p * (by_group - (p * by_group).sum(1, keepdims=True))
  given = hyperparams(
    relative_costs=jnp.asarray(SHARES, jnp.float32), strength=jnp.float32(7)
  )
  _, gradient = loss_and_gradient(given)
  np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)


def program():
  _, network = convolutional()
  param_labels, treedef = jax.tree.flatten(network.param_labels)
  return differentiable.program(network.apply, tuple(param_labels), treedef)


def moved(step, given):
  """Which of weights and logits a step moved, with the states around it."""
  before = initial(step=jnp.int32(step))
  after, losses = program()(
    jax.tree.map(jnp.copy, before), training.batch(), given
  )
  assert losses.shape == (1,)
  assert int(after.step) == step + 1
  old, new = (state.batch_stats["norm"]["mean"] for state in (before, after))
  assert (old != new).all()
  changed = set()
  for field in ("params", "opt_state"):
    for part in ("weights", "logits"):
      old, new = (
        jax.tree.leaves(getattr(state, field)[part])
        for state in (before, after)
      )
      if any((a != b).any() for a, b in zip(old, new, strict=True)):
        changed.add((field, part))
  return changed, before, after


def both(part):
  return {("params", part), ("opt_state", part)}


def test_weights_and_logits_learn_from_the_same_or_from_separate_batches():
  apart = hyperparams(alternate=jnp.bool_(True))
  assert moved(0, hyperparams())[0] == both("weights") | both("logits")
  assert moved(1, hyperparams())[0] == both("weights") | both("logits")
  assert moved(0, apart)[0] == both("weights")
  assert moved(1, apart)[0] == both("logits")


def test_the_first_step_of_each_goes_down_by_its_own_learning_rate():
  given = hyperparams(
    relative_costs=jnp.asarray(SHARES, jnp.float32), strength=jnp.float32(7)
  )
  _, before, after = moved(0, given)
  _, gradient = loss_and_gradient(given)
  step = after.params["logits"] - before.params["logits"]
  # Adam's first step is the rate, but for its epsilon.
  np.testing.assert_allclose(step, -0.1 * jnp.sign(gradient), rtol=1e-4)
  kernel = [s.params["weights"]["conv1"]["kernel"] for s in (before, after)]
  largest = jnp.abs(kernel[1] - kernel[0]).max()
  np.testing.assert_allclose(largest, 1e-3, rtol=1e-3)


def test_scales_stay_positive_however_large_the_step():
  _, _, after = moved(0, hyperparams(learning_rate=jnp.float32(100)))
  weights, param_labels = (
    after.params["weights"],
    convolutional()[1].param_labels,
  )
  pairs = zip(
    jax.tree.leaves(weights), jax.tree.leaves(param_labels), strict=True
  )
  scales = np.concatenate([s.ravel() for s, kind in pairs if kind == "scale"])
  assert scales.min() == np.float32(SCALE_MIN)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("fraction", [0.0, 0.2, 1.0])
def test_the_most_probable_assignment_within_the_budget_is_found(
  fraction, seed
):
  problem = problems.problem(6, ties=((0, 2, 3),), pinned={4: 1})
  groups = problem.groups()
  logits = np.random.default_rng(seed).normal(size=(len(groups), 4))
  budgets = problems.budgets(problem, 0.4 + 0.6 * fraction)
  rows = np.log(softmax(logits))

  def probability(index):
    return sum(rows[g, index[group[0]]] for g, group in enumerate(groups))

  fitting = [
    i for i in problems.assignments(problem) if problem.fits(i, budgets)
  ]
  found = differentiable.most_probable(problem, logits, budgets)
  assert found == max(fitting, key=probability)
  if fraction == 1:
    highest = logits.argmax(1)
    assert [found[group[0]] for group in groups] == list(highest)


def test_tied_layers_count_as_one_choice():
  costs = {"size": np.array([[2, 1], [2, 1], [4, 2]])}
  problem = problems.problem(3, (8, 2), ties=((0, 1),), costs=costs)
  # One group must give way: of the pair it is less unlikely.
  logits = np.array([[1.0, 0.0], [1.5, 0.0]])
  found = differentiable.most_probable(problem, logits, {"size": 6})
  assert found == (1, 1, 0)


@pytest.mark.parametrize("strategy", SEARCHES)
def test_where_all_layers_cost_the_same_the_best_assignment_is_found(strategy):
  problem = additive(bits=(8, 2))
  budgets = {"sum_bits": 3 * 8 + 3 * 2}
  result = problems.search(strategy, problem, budgets, strength=0.1)
  assert problems.index_of(problem, result) == problems.best(problem, budgets)
  assert result.evaluations == len(problem.evaluate.score.calls) == 1


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("strategy", SEARCHES)
def test_a_search_comes_close_to_the_best_assignment(strategy, seed):
  problem = additive(seed=seed)
  budgets = problems.budgets(problem, 0.5)
  result = problems.search(strategy, problem, budgets, strength=1.0)
  losses = [
    problem.evaluate.score.damage[np.arange(6), list(index)].sum()
    for index in problems.assignments(problem)
    if problem.fits(index, budgets)
  ]
  assert len(losses) > 1000
  # Probabilities solve a relaxation; one assignment is not far from them.
  assert np.mean(np.array(losses) < result.loss) < 0.02
  assert problem.fits(problems.index_of(problem, result), budgets)


@pytest.mark.parametrize("strategy", SEARCHES)
def test_a_large_strength_moves_to_the_lowest_bits(strategy, learned):
  problem = additive()
  budgets = problems.budgets(problem, 0.0)
  problems.search(strategy, problem, budgets, strength=1e4)
  assert (learned[0].argmax(1) == 3).all()


def test_the_expected_cost_settles_at_the_budget(learned):
  problem = additive(ties=((0, 3), (2, 4)), pinned={1: 0, 2: 1})
  budgets = problems.budgets(problem, 0.6)
  problems.search(search.edmips, problem, budgets, strength=3.0)
  cost, p = problem.costs["stored_bits"], softmax(learned[0])
  assert [tuple(g) for g in problem.groups()] == [(0, 3), (5,)]
  expected = cost[1, 0] + cost[2, 1] + cost[4, 1]
  expected += (p[0] * (cost[0] + cost[3])).sum() + (p[1] * cost[5]).sum()
  # The price acts only above the budget: the cost swings around it by what
  # a step of 0.05 in the logits changes.
  assert abs(expected / budgets["stored_bits"] - 1) < 0.05


def test_dnas_learns_its_logits_from_every_second_batch(learned):
  problem = additive()
  budgets = problems.budgets(problem)
  for steps in (1, 2):
    problems.search(search.dnas, problem, budgets, steps=steps)
  assert not learned[0].any()
  # Adam's first step is the rate, but for its epsilon beside gradients of
  # down to 1e-6.
  np.testing.assert_allclose(np.abs(learned[1]), 0.05, rtol=1e-2)


def test_both_temperatures_matter(learned):
  problem = additive()
  budgets = problems.budgets(problem)
  for temperature, final in ((5.0, 0.5), (5.0, 0.6), (4.0, 0.5)):
    problems.search(
      search.dnas,
      problem,
      budgets,
      steps=6,
      temperature=temperature,
      final_temperature=final,
    )
  assert len({logits.tobytes() for logits in learned}) == 3


@pytest.mark.parametrize("strategy", SEARCHES)
def test_within_the_budget_only_accuracy_counts(strategy, learned):
  problem = additive()
  budgets = problems.budgets(problem, 1.0)
  result = problems.search(strategy, problem, budgets, strength=1e4)
  problems.search(strategy, problem, budgets, strength=0.0)
  np.testing.assert_array_equal(*learned)
  assert set(result.allocation.values()) == {8}


@pytest.mark.parametrize("strategy", SEARCHES)
def test_tied_layers_share_bits_and_pinned_ones_keep_theirs(strategy):
  problem = additive(ties=((0, 3), (2, 4)), pinned={1: 2, 4: 1})
  result = problems.search(
    strategy, problem, problems.budgets(problem, 0.5), steps=20
  )
  index = problems.index_of(problem, result)
  assert index[0] == index[3]
  assert index[1:3] + index[4:5] == (2, 1, 1)


def test_with_every_layer_pinned_there_is_nothing_to_learn():
  batches = Batches()
  pins = dict.fromkeys(range(6), 1)
  problem = additive(pinned=pins, batches=batches)
  result = problems.search(
    search.edmips, problem, problems.budgets(problem, 1.0)
  )
  assert problems.index_of(problem, result) == (1,) * 6
  assert not batches.asked


def test_the_seed_decides_the_draws_and_nothing_else(learned):
  problem = additive()
  budgets = problems.budgets(problem)
  for seed in (0, 0, 1):
    problems.search(search.dnas, problem, budgets, seed=seed, steps=10)
  for seed in (0, 1):
    problems.search(search.edmips, problem, budgets, seed=seed, steps=10)
  np.testing.assert_array_equal(learned[0], learned[1])
  assert (learned[0] != learned[2]).any()
  np.testing.assert_array_equal(learned[3], learned[4])


@pytest.mark.parametrize("strategy", SEARCHES)
def test_a_stopped_search_resumes_to_the_same_bits(strategy, learned, tmp_path):
  options = dict(steps=12, checkpoint_every=4)
  whole = additive()
  budgets = problems.budgets(whole)
  expected = problems.search(strategy, whole, budgets, **options)
  stopped = additive(batches=Batches(stop=10), directory=tmp_path)
  with pytest.raises(problems.Stop):
    problems.search(strategy, stopped, budgets, **options)
  assert not stopped.evaluate.score.calls
  again = additive(batches=Batches(), directory=tmp_path)
  result = problems.search(strategy, again, budgets, **options)
  assert again.supernet.batches.asked == [8, 9, 10, 11]
  np.testing.assert_array_equal(*learned)
  assert result.trials[0][:3] == expected.trials[0][:3]
  done = additive(batches=Batches(), directory=tmp_path)
  problems.search(strategy, done, budgets, **options)
  assert done.supernet.batches.asked == []


def test_a_search_resumes_only_from_its_own_checkpoints(tmp_path):
  options = dict(steps=2)
  problem = additive(directory=tmp_path)
  budgets = problems.budgets(problem)
  problems.search(search.dnas, problem, budgets, **options)
  other = problem.supernet._replace(params={"w": jnp.ones((2, 2))})
  others = [
    (search.edmips, problem, budgets, options),
    (search.dnas, problem, problems.budgets(problem, 0.5), options),
    (search.dnas, problem, budgets, options | {"seed": 1}),
    (search.dnas, problem, budgets, options | {"temperature": 4.0}),
    (
      search.dnas,
      dataclasses.replace(problem, supernet=other),
      budgets,
      options,
    ),
    (
      search.dnas,
      dataclasses.replace(problem, pinned={2: 0}),
      budgets,
      options,
    ),
  ]
  for strategy, changed, limits, changes in others:
    problem.supernet.batches.asked.clear()
    problems.search(strategy, changed, limits, **changes)
    assert problem.supernet.batches.asked == [0, 1]


def test_the_supernet_is_not_changed():
  problem = real()
  arrays = problem.supernet.params, problem.supernet.batch_stats
  before = jax.tree.map(np.array, arrays)
  for strategy in SEARCHES:
    problems.search(
      strategy, problem, problems.budgets(problem, 0.4, ["bops"]), steps=3
    )
  jax.tree.map(np.testing.assert_array_equal, before, arrays)


def test_one_program_serves_all_budgets_and_both_searches():
  differentiable.program.cache_clear()
  problem = real()
  for strategy, fraction, strength in (
    (search.edmips, 0.4, 0.3),
    (search.edmips, 0.7, 3.0),
    (search.dnas, 0.2, 0.1),
  ):
    budgets = problems.budgets(problem, fraction, ["bops"])
    problems.search(strategy, problem, budgets, steps=2, strength=strength)
  assert program()._cache_size() == 1


@pytest.mark.parametrize("strategy", SEARCHES)
def test_a_loss_that_is_not_finite_ends_the_search_in_one_line(strategy):
  class Broken(Batches):
    def __getitem__(self, step):
      batch = super().__getitem__(step)
      return {**batch, "image": np.full_like(batch["image"], np.nan)}

  problem = additive(batches=Broken())
  name = strategy.__name__
  with pytest.raises(train.NonFiniteError, match=f"{name}: loss is nan at"):
    problems.search(strategy, problem, problems.budgets(problem), steps=3)


@pytest.mark.parametrize("strategy", SEARCHES)
def test_a_budget_that_cannot_be_kept_is_rejected_before_training(strategy):
  problem = additive()
  with pytest.raises(allocate.Infeasible):
    problems.search(strategy, problem, {"stored_bits": 1})
  assert not problem.supernet.batches.asked
  assert not problem.evaluate.score.calls


@pytest.mark.parametrize(
  "option, value",
  [
    *(("steps", value) for value in (0, 2.5)),
    *(("checkpoint_every", value) for value in (0, None)),
    *(("learning_rate", value) for value in (0, -1.0, float("inf"))),
    *(("logit_learning_rate", value) for value in (0.0, float("nan"))),
    *(("strength", value) for value in (-0.1, float("nan"), "1")),
    *(("temperature", value) for value in (0, "hot")),
    ("final_temperature", 0.0),
    ("seed", 0.5),
  ],
)
def test_an_option_out_of_range_is_rejected_by_name(option, value):
  problem = additive()
  with pytest.raises(ValueError, match=rf"^{option} must be .*, got"):
    problems.search(
      search.dnas, problem, problems.budgets(problem), **{option: value}
    )
  assert not problem.supernet.batches.asked
