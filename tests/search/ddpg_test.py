"""The agent of DDPG: its memory, noise, networks and lessons, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from dr_jax.search.ddpg import (
  Ddpg,
  Memory,
  Steps,
  act,
  programs,
  steps,
  truncated,
  value,
)


def test_steps_link_what_the_agent_saw_with_what_it_saw_next():
  states = np.float32([[1, 2], [3, 4], [5, 6]])
  found = steps(states, np.float32([0.1, 0.2, 0.3]), -7.5)
  np.testing.assert_array_equal(
    found.state, np.float32([[1, 2, 1], [3, 4, 0.1], [5, 6, 0.2]])
  )
  np.testing.assert_array_equal(found.after[:2], found.state[1:])
  np.testing.assert_array_equal(found.action, np.float32([[0.1], [0.2], [0.3]]))
  np.testing.assert_array_equal(found.reward, [[-7.5]] * 3)
  np.testing.assert_array_equal(found.last, [[0], [0], [1]])
  assert {array.dtype for array in found} == {np.dtype(np.float32)}


def numbered(first, count):
  """Steps that carry their number everywhere."""
  number = np.arange(first, first + count, dtype=np.float32)[:, None]
  wide = np.repeat(number, 2, 1)
  return Steps(wide, number, number, wide, number)


def test_the_memory_forgets_the_oldest_steps():
  memory, rng = Memory(5, 2), np.random.default_rng(0)
  for first, kept in (
    (0, {0, 1, 2}),
    (3, {1, 2, 3, 4, 5}),
    (6, {*range(4, 9)}),
  ):
    memory.add(numbered(first, 3))
    drawn = memory.sample(rng, (40, 5))
    assert set(np.unique(drawn.action)) == kept
    assert drawn.state.shape == drawn.after.shape == (40, 5, 2)
    for array in drawn:
      np.testing.assert_array_equal(array[..., :1], drawn.action)


def agent_of(ddpg, seed=0, width=3, hidden=4):
  """An agent whose copies and last layers are not special."""
  rng = np.random.default_rng(seed)
  agent = ddpg.init(rng, width, hidden)
  networks = [
    [
      tuple(jnp.asarray(rng.normal(size=a.shape), jnp.float32) for a in layer)
      for layer in network
    ]
    for network in agent[:4]
  ]
  return agent._replace(**dict(zip(agent._fields, networks, strict=False)))


def batch_of(seed=0, count=7, width=3):
  rng = np.random.default_rng(seed)
  last = (np.arange(count) % 3 == 2)[:, None]
  arrays = [
    *(rng.random((count, width)), rng.random((count, 1))),
    *(rng.normal(size=(count, 1)), rng.random((count, width)), last),
  ]
  return Steps(*(np.asarray(a, np.float32) for a in arrays))


def forward(network, x):
  """Output and last hidden layer, in float64."""
  *layers, (weight, bias) = [
    [np.asarray(a, np.float64) for a in layer] for layer in network
  ]
  for w, b in layers:
    x = np.maximum(x @ w + b, 0)
  return x @ weight + bias, x


def actions(network, state):
  return 1 / (1 + np.exp(-forward(network, state)[0]))


def test_networks_have_two_hidden_layers_and_start_small():
  agent = Ddpg(1e-4, 1e-3, 0.01, 1.0).init(np.random.default_rng(0), 9, 300)
  for network, inputs in ((agent.actor, 9), (agent.critic, 10)):
    shapes = [(w.shape, b.shape) for w, b in network]
    assert shapes == [
      *(((inputs, 300), (300,)), ((300, 300), (300,)), ((300, 1), (1,)))
    ]
    for (weight, bias), bound in zip(
      network, (inputs**-0.5, 300**-0.5, 3e-3), strict=True
    ):
      assert weight.dtype == bias.dtype == jnp.float32
      # Of at least 300 draws one comes that near to the bound.
      assert 0.95 * bound < np.abs(weight).max() <= bound
      assert 0 < np.abs(bias).max() <= bound
  for own, slow in (
    (agent.actor, agent.slow_actor),
    (agent.critic, agent.slow_critic),
  ):
    jax.tree.map(np.testing.assert_array_equal, own, slow)


def test_actor_and_critic_compute_relu_networks():
  agent, batch = agent_of(Ddpg(1.0, 1.0, 1.0, 1.0)), batch_of()
  # Float32 sums of a few terms of size 1.
  np.testing.assert_allclose(
    jax.jit(act)(agent.actor, batch.state),
    actions(agent.actor, batch.state),
    rtol=1e-5,
  )
  both = np.concatenate([batch.state, batch.action], 1)
  np.testing.assert_allclose(
    jax.jit(value)(agent.critic, batch.state, batch.action),
    forward(agent.critic, both)[0],
    rtol=1e-5,
    atol=1e-5,
  )


@pytest.mark.parametrize("width", [0.0, 1e-3, 0.1, 0.5, 3.0])
def test_noise_is_a_normal_distribution_truncated_to_actions(width):
  uniform = np.linspace(0, 1, 101, dtype=np.float32)[:-1]
  for mean in (0.0, 0.02, 0.5, 0.9, 1.0):
    drawn = jax.jit(truncated)(
      np.full(100, mean, np.float32), np.float32(width), uniform
    )
    assert float(drawn.min()) >= 0 and float(drawn.max()) <= 1
    scale = max(width, 1e-6)
    low, high = -mean / scale, (1 - mean) / scale
    expected = scipy.stats.truncnorm.ppf(uniform, low, high, mean, scale)
    # Float32 near 1 leaves little of the upper tail: there errors are some
    # hundredths of the width.
    np.testing.assert_allclose(drawn, expected, atol=2e-2 * scale + 1e-6)


def test_each_layer_sees_the_previous_action_in_a_walk():
  walk, _ = programs(Ddpg(1.0, 1.0, 1.0, 1.0))
  agent = agent_of(Ddpg(1.0, 1.0, 1.0, 1.0))
  states = np.random.default_rng(1).random((5, 2)).astype(np.float32)
  uniform = np.random.default_rng(2).random(5).astype(np.float32)
  found = np.asarray(walk(agent.actor, states, uniform, np.float32(0.3)))
  assert found.shape == (5,)
  before = 1.0
  for state, drawn, action in zip(states, uniform, found, strict=True):
    mean = actions(agent.actor, np.array([[*state, before]]))[0, 0]
    low, high = -mean / 0.3, (1 - mean) / 0.3
    expected = scipy.stats.truncnorm.ppf(drawn, low, high, mean, 0.3)
    # Float32 distribution functions and their inverse.
    np.testing.assert_allclose(action, expected, rtol=1e-4, atol=1e-5)
    before = action


def first_moments(state):
  """The gradient of Adam's first step: its first moment is a tenth of it."""
  return jax.tree.map(lambda m: np.asarray(m) / 0.1, state[0].mu)


def test_the_critic_learns_reward_over_baseline_and_what_follows():
  ddpg = Ddpg(actor_rate=1e-3, critic_rate=1e-2, tau=0.1, discount=0.7)
  agent, batch = agent_of(ddpg), batch_of()
  updated = jax.jit(ddpg.update)(agent, batch, np.float32(0.25))
  follows, _ = forward(
    agent.slow_critic,
    np.concatenate([batch.after, actions(agent.slow_actor, batch.after)], 1),
  )
  target = batch.reward - 0.25 + 0.7 * np.where(batch.last, 0, follows)
  found, hidden = forward(
    agent.critic, np.concatenate([batch.state, batch.action], 1)
  )
  gradient = first_moments(updated.critic_state)
  weight, bias = gradient[-1]
  # Float32 means of seven terms of size 10.
  np.testing.assert_allclose(
    weight, hidden.T @ (2 * (found - target)) / 7, rtol=1e-4, atol=1e-4
  )
  np.testing.assert_allclose(bias, (2 * (found - target)).mean(0), rtol=1e-4)
  # Adam's first step is the learning rate, against the sign of the gradient.
  for before, after, slope in zip(
    *map(jax.tree.leaves, (agent.critic, updated.critic, gradient)), strict=True
  ):
    step = -1e-2 * np.sign(slope) * (np.abs(slope) > 1e-4)
    np.testing.assert_allclose(after - before, step, atol=1e-5)


def test_the_actor_climbs_what_the_updated_critic_expects():
  ddpg = Ddpg(actor_rate=1e-3, critic_rate=1e-1, tau=0.1, discount=1.0)
  agent, batch = agent_of(ddpg, seed=3), batch_of()
  updated = jax.jit(ddpg.update)(agent, batch, np.float32(0))

  def expected(bias):
    actor = [*agent.actor[:-1], (agent.actor[-1][0], bias)]
    chosen = actions(actor, batch.state)
    both = np.concatenate([batch.state, chosen], 1)
    return forward(updated.critic, both)[0].mean()

  bias = np.asarray(agent.actor[-1][1], np.float64)
  slope = (expected(bias + 1e-6) - expected(bias - 1e-6)) / 2e-6
  gradient = first_moments(updated.actor_state)
  # Float32 against float64 of a sum of seven products.
  np.testing.assert_allclose(gradient[-1][1], -slope, rtol=1e-3)
  step = updated.actor[-1][1] - agent.actor[-1][1]
  np.testing.assert_allclose(step, 1e-3 * np.sign(slope), rtol=1e-3)


def test_copies_follow_by_a_fraction_of_the_difference():
  ddpg = Ddpg(actor_rate=0.1, critic_rate=0.1, tau=0.25, discount=1.0)
  agent, batch = agent_of(ddpg), batch_of()
  updated = jax.jit(ddpg.update)(agent, batch, np.float32(0))
  for own, slow, moved in (
    (updated.actor, agent.slow_actor, updated.slow_actor),
    (updated.critic, agent.slow_critic, updated.slow_critic),
  ):
    jax.tree.map(
      lambda o, s, m: np.testing.assert_allclose(
        m, 0.25 * o + 0.75 * s, rtol=1e-5, atol=1e-6
      ),
      *(own, slow, moved),
    )


def test_an_episode_learns_from_one_batch_after_the_other():
  ddpg = Ddpg(actor_rate=1e-2, critic_rate=1e-2, tau=0.1, discount=0.9)
  _, learn = programs(ddpg)
  agent, batches = agent_of(ddpg), [batch_of(seed) for seed in range(3)]
  together = learn(
    agent, jax.tree.map(lambda *a: np.stack(a), *batches), np.float32(0.5)
  )
  one = jax.jit(ddpg.update)
  for batch in batches:
    agent = one(agent, batch, np.float32(0.5))
  # The same float32 operations; compilers may order sums differently.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
    *(together, agent),
  )
