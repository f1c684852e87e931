"""What public samplers computed: ../fixtures/schedulers.npz, recorded from diffusers 0.42.1 and guided-diffusion.

inputs/{x_T, x_0, noise, fake_*} and {scheduler}/{schedule}/.../{steps}/{timesteps, trajectory}: whole runs of
diffusers on [2, 64]; x after each step (of Heun's method, after each second evaluation), step i drawing noise[i].
guided/*: steps and a run with a learned variance, and steps of DDIM inversion, by guided-diffusion, of the inputs
of ``public_recordings``.
"""

import pathlib
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from dalle2_jax.diffusion import (
    Ddim,
    Ddpm,
    DpmSolver,
    Heun,
    Stepper,
    make_schedule,
    respace,
    with_zero_terminal_snr,
)
from dalle2_jax.diffusion.schedule import of_alpha_bar

SCHEDULERS = np.load(pathlib.Path(__file__).parents[1] / "fixtures" / "schedulers.npz")


class Run(NamedTuple):
    """A recorded run, and what computes it here."""

    path: str
    stepper: Stepper
    prediction_type: str = "eps"
    clip: float | None = None

    @property
    def trajectory(self):
        return SCHEDULERS[f"{self.path}/trajectory"]

    @property
    def schedule(self):
        """The steps taken. Cosine's alpha_bar is a product in float32 as in diffusers, which moves its end by 1e-5."""
        name = self.path.split("/")[1]
        schedule = make_schedule({"lin": "linear", "slin": "scaled_linear"}.get(name, "cosine"), 1000)
        if "zero_snr" in self.path:
            schedule = with_zero_terminal_snr(schedule)
        elif name not in ("lin", "slin"):
            alpha_bar = np.cumprod(1 - np.float32(schedule.betas), dtype=np.float32)
            schedule = of_alpha_bar(np.float64(alpha_bar), schedule.timesteps)
        return respace(schedule, "t:" + ",".join(map(str, SCHEDULERS[f"{self.path}/timesteps"])))


def _of_each_schedule(path, *arguments):
    return [Run(path.format(name), *arguments) for name in ("lin", "cos", "slin")]


DIFFUSION_RUNS = [
    *_of_each_schedule("ddim/{}/eta0.0/clip0/10", Ddim(0.0)),
    *_of_each_schedule("ddim/{}/rescale_zero_snr_v_trailing/10", Ddim(0.0), "v"),
    *_of_each_schedule("dpm/{}/dpmsolver++/order1/karras0/final_zero/10", DpmSolver(1)),
    *_of_each_schedule("dpm/{}/dpmsolver++/order2/karras0/final_zero/10", DpmSolver(2)),
    Run("ddim/cos/pred_sample/10", Ddim(0.0), "x0"),
    Run("ddim/lin/pred_v/10", Ddim(0.0), "v"),
    Run("dpm/cos/dpmsolver++/order2/pred_sample/10", DpmSolver(2), "x0"),
    Run("dpm/cos/dpmsolver++/order2/pred_v/10", DpmSolver(2), "v"),
    Run("dpm/slin/dpmsolver++/order2/spacing_trailing/10", DpmSolver(2)),
]
for _name in ("lin", "cos"):
    DIFFUSION_RUNS += [
        Run(f"ddim/{_name}/eta0.5/clip0/10", Ddim(0.5)),
        Run(f"ddim/{_name}/eta1.0/clip1/use_clipped_model_output/10", Ddim(1.0), "eps", 1.0),
        Run(f"ddpm/{_name}/fixed_small/10", Ddpm("fixed_small"), "eps", 1.0),
        Run(f"ddpm/{_name}/fixed_large/10", Ddpm("fixed_large"), "eps", 1.0),
        Run(f"dpm/{_name}/sde-dpmsolver++/order1/karras0/final_zero/10", DpmSolver(1, stochastic=True)),
        Run(f"dpm/{_name}/sde-dpmsolver++/order2/karras0/final_zero/10", DpmSolver(2, stochastic=True)),
    ]

SCALED_RUNS = [
    *_of_each_schedule("euler/{}/karras0/10", Heun(1)),
    *_of_each_schedule("heun/{}/karras0/10", Heun(2)),
]
"""Those whose state is x over the signal rate."""

THIRD_ORDER_RUN = Run("dpm/lin/dpmsolver++/order3/karras0/final_zero/25", DpmSolver(3))

UNCLIP_RUNS = [
    Run("unclip/epsilon/fixed_small_log/10", Ddpm("fixed_small"), "eps", 1.0),
    Run("unclip/sample/fixed_small_log/10", Ddpm("fixed_small"), "x0", 5.0),
    Run("unclip/epsilon/learned_range/10", Ddpm("learned_range"), "eps", 1.0),
]

INVERSIONS = [f"ddim_inverse/{name}/set_alpha_to_one0/10" for name in ("lin", "cos", "slin")]


def scheduler_input(name):
    return jnp.asarray(SCHEDULERS[f"inputs/{name}"])


def scheduler_network(x_t, t):
    """The network of diffusers' recordings: a x + b t / 1000 + c, on [2, 64]."""
    a, b, c = (scheduler_input(f"fake_{name}")[None] for name in "abc")
    return a * x_t + b * (t.astype(jnp.float32) / 1000)[:, None] + c


def scheduler_network_with_variance(x_t, t):
    """The same, with its output for the variance."""
    prediction = scheduler_network(x_t, t)
    return jnp.concatenate([prediction, jnp.tanh(jnp.flip(prediction, axis=-1))], axis=-1)
