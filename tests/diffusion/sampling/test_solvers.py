"""Every solver has the order that it claims, on a mixture with its exact score; then parity with public solvers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from analytic_denoisers import exact_flow, mixture_law, normals, relative_error
from raised import mentions
from scheduler_recordings import (
    DIFFUSION_RUNS,
    SCALED_RUNS,
    THIRD_ORDER_RUN,
    UNCLIP_RUNS,
    scheduler_input,
    scheduler_network,
    scheduler_network_with_variance,
)
from stepping import ODE_STEPPERS, SCHEDULES, walk

from dalle2_jax.diffusion import (
    Ddim,
    Ddpm,
    DpmSolver,
    Heun,
    UniPc,
    in_float32,
    make_schedule,
    predictor,
    respace,
)
from dalle2_jax.diffusion.variance import LEARNED
from dalle2_jax.errors import UserError

FINE = make_schedule("cosine", 20_000)
MIXTURE = mixture_law([0.3, 0.7], [-1.0, 0.8], [0.4, 0.25])
ORDERS = {"ddim": 1, "euler": 1, "heun": 2, "dpmpp_2m": 2, "dpmpp_3m": 3, "unipc": 3}


def evenly(count):
    """A respacing of so many levels evenly in log SNR, all well inside the schedule, where timesteps are dense."""
    wanted = np.linspace(5, -9, count)
    return "t:" + ",".join(str(np.abs(FINE.log_snr - level).argmin()) for level in wanted)


@functools.cache
def start_and_end():
    """x_T [32, 1], and x_0 where the exact flow takes it."""
    x_T = np.asarray(normals((32, 1)), np.float64)
    first, last = (int(evenly(2)[2:].split(",")[end]) for end in (0, 1))
    return x_T, exact_flow(MIXTURE, x_T, FINE.log_snr[last], FINE.log_snr[first])


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.numerics
def test_a_solver_converges_with_the_order_that_it_claims(name):
    x_T, exact = start_and_end()
    errors = []
    for count in (41, 81, 161):
        x_0 = walk(ODE_STEPPERS[name], FINE, evenly(count), MIXTURE, x_T)
        errors.append([np.sqrt(np.mean((x - exact) ** 2)) for x in x_0.values()])
    orders = np.log2(np.divide(errors[:-1], errors[1:]))
    np.testing.assert_allclose(orders[0], ORDERS[name], atol=0.25)
    np.testing.assert_allclose(orders[1], ORDERS[name], atol=0.1)


def test_eulers_method_is_ddim_and_so_is_dpm_solver_of_order_one():
    x_T, _ = start_and_end()
    ddim, *others = (walk(s, FINE, evenly(41), MIXTURE, x_T)["v"] for s in (Ddim(0.0), Heun(1), DpmSolver(1)))
    for other in others:
        np.testing.assert_allclose(other, ddim, atol=1e-5)


def integral(power, half_log_snr, h):
    """int_0^h e^(r - h) (lambda + r)^power dr, by Simpson's rule."""
    r = np.linspace(0, h, 1001)
    values = np.exp(r - h) * (half_log_snr + r) ** power
    return (values[0] + 4 * values[1::2].sum() + 2 * values[2:-1:2].sum() + values[-1]) * h / 3000


@pytest.mark.parametrize("power", [0, 1, 2])
def test_three_values_integrate_a_parabola_exactly(power):
    """The integral of x_0 in the exact solution: what 3M steps ahead by, and what UniPC corrects its steps by."""
    schedule = respace(FINE, evenly(12))
    half_log_snr = 0.5 * schedule.log_snr
    values = half_log_snr**power
    ahead, corrected = DpmSolver(3).rows(schedule).weights, UniPc().rows(schedule).weights
    for i in range(1, 9):
        h = half_log_snr[i - 1] - half_log_snr[i]
        exact = schedule.signal_rate[i - 1] * integral(power, half_log_snr[i], h)
        np.testing.assert_allclose(ahead[i] @ values[i : i + 3], exact, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(corrected[i - 1] @ values[i - 1 : i + 2], exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_solver_with_noise_is_of_order_one_ddpm_with_the_small_variance(name):
    schedule = respace(SCHEDULES[name], 30)
    rows, ddpm = DpmSolver(1, stochastic=True).rows(schedule), Ddpm("fixed_small").rows(schedule)
    np.testing.assert_allclose(rows.x_t_weight, ddpm.x_t_weight, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(rows.weights[:, 0], ddpm.x_0_weight, rtol=1e-5)
    np.testing.assert_allclose(rows.std, ddpm.std, rtol=1e-5)


@pytest.mark.parametrize("order", [1, 2])
def test_euler_and_heun_cannot_start_in_pure_noise(order):
    with pytest.raises(UserError, check=mentions("'euler'", "'heun'", "'ddim'", "'dpmpp_2m'")):
        Heun(order).rows(SCHEDULES["zero_terminal_snr"])


@functools.partial(jax.jit, static_argnames=("stepper", "prediction_type", "clip"))
def step(stepper, prediction_type, clip, x_t, row, noise, carry):
    variance_type = getattr(stepper, "variance", "fixed_small")
    denoiser = scheduler_network_with_variance if variance_type in LEARNED else scheduler_network
    hook = (lambda x_0: jnp.clip(x_0, -clip, clip)) if clip else None
    return stepper.step(predictor(prediction_type, denoiser, hook, variance_type), x_t, row, lambda: noise, carry)


def trajectory(run, rows, x_T):
    x_t, carry, states = x_T, run.stepper.init(x_T), []
    noises = scheduler_input("noise")
    for turn, index in enumerate(range(run.schedule.num_steps - 1, -1, -1)):
        row = jax.tree.map(lambda table, index=index: table[index], rows)
        noise = noises[turn % len(noises)]
        x_t, carry = step(run.stepper, run.prediction_type, run.clip, x_t, row, noise, carry)
        states.append(x_t)
    return states


@pytest.mark.parametrize("run", DIFFUSION_RUNS, ids=lambda run: run.path)
def test_whole_runs_equal_diffusers(run):
    states = trajectory(run, run.stepper.rows(run.schedule), scheduler_input("x_T"))
    for state, expected in zip(states, run.trajectory, strict=True):
        assert relative_error(state, expected) < 1e-5


@pytest.mark.parametrize("run", SCALED_RUNS, ids=lambda run: run.path)
def test_whole_runs_of_scaled_states_equal_diffusers(run):
    """diffusers starts from sigma x_T, which is s x_T here."""
    x_T = jnp.float32(run.schedule.noise_rate[-1]) * scheduler_input("x_T")
    states = trajectory(run, run.stepper.rows(run.schedule), x_T)
    signal_rates = np.sqrt(run.schedule.alpha_bar_prev)[::-1]
    for state, signal_rate, expected in zip(states, signal_rates, run.trajectory, strict=True):
        assert relative_error(state / np.float32(signal_rate), expected) < 1e-5


def with_half_of_the_curvature(schedule, rows):
    """The rows of 3M as in public code, which gives m'' h^2 / 2 half of its weight, int_0^h e^(r - h) (r / h)^2 dr."""
    weights, half_log_snr = rows.weights.copy(), 0.5 * schedule.log_snr
    for i in range(1, schedule.num_steps - 2):
        h, h_0, h_1 = half_log_snr[i - 1 : i + 2] - half_log_snr[i : i + 3]
        r_0, r_1 = h_0 / h, h_1 / h
        curvature = np.array([1 / r_0, -1 / r_0 - 1 / r_1, 1 / r_1]) / (r_0 + r_1)
        whole = 1 - 2 / h - 2 * np.expm1(-h) / h**2
        weights[i] -= np.float32(np.sqrt(schedule.alpha_bar[i - 1]) * whole / 2 * curvature)
    return rows._replace(weights=weights)


def test_a_whole_third_order_run_equals_diffusers():
    run = THIRD_ORDER_RUN
    rows = with_half_of_the_curvature(run.schedule, run.stepper.rows(run.schedule))
    for state, expected in zip(trajectory(run, rows, scheduler_input("x_T")), run.trajectory, strict=True):
        assert relative_error(state, expected) < 1e-5


@pytest.mark.parametrize("run", UNCLIP_RUNS, ids=lambda run: run.path)
def test_whole_unclip_runs_equal_diffusers(run):
    """UnCLIPScheduler takes 1 - alpha_bar in float32: at the last step its weight of x_0 is 0.9995 instead of 1."""
    timesteps = "t:" + ",".join(map(str, run.schedule.timesteps))
    rows = run.stepper.rows(respace(in_float32(make_schedule("cosine", 1000)), timesteps))
    for state, expected in zip(trajectory(run, rows, scheduler_input("x_T")), run.trajectory, strict=True):
        assert relative_error(state, expected) < 1e-5
