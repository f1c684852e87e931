"""Discrete-time diffusion: schedules, objectives and samplers for any network ``(x_t, t) -> prediction``.

schedule      signal and noise rates of each step            respacing     the steps that a sampler takes
process       noising, (eps, x_0, v), clipping of x_0         variance      the variance of a reverse step
objective     the training loss                              timesteps     sampling of training timesteps
likelihood    the variational bound, bits per dimension      guidance      classifier-free guidance
steppers      one step of DDPM, DDIM, its inversion          solvers       one step of Euler, Heun, DPM-Solver++, UniPC
sampler       configuration, `sample`, `invert`              loop          the loop over steps, `SamplingOptions`
inpainting    known pixels, RePaint                          distillation  the loss of a student of few steps
"""

from dalle2_jax.diffusion.distillation import StudentSteps, distillation_loss, distillation_target
from dalle2_jax.diffusion.guidance import GuidanceSchedule, branches, guided
from dalle2_jax.diffusion.inpainting import Inpainting, resampling
from dalle2_jax.diffusion.likelihood import bits_per_dim, vlb_terms
from dalle2_jax.diffusion.loop import SamplingOptions, integrate, predictor
from dalle2_jax.diffusion.objective import Objective, training_loss
from dalle2_jax.diffusion.process import (
    Denoised,
    from_x0_eps,
    posterior,
    q_sample,
    thresholding,
    to_x0_eps,
)
from dalle2_jax.diffusion.respacing import respace
from dalle2_jax.diffusion.sampler import (
    SAMPLERS,
    SamplerConfig,
    invert,
    make_stepper,
    sample,
    steps_of,
)
from dalle2_jax.diffusion.schedule import (
    Level,
    Schedule,
    in_float32,
    make_schedule,
    of_alpha_bar,
    shifted,
    with_zero_terminal_snr,
)
from dalle2_jax.diffusion.solvers import DpmSolver, Heun, UniPc
from dalle2_jax.diffusion.steppers import Ddim, Ddpm, InverseDdim, Stepper
from dalle2_jax.diffusion.timesteps import (
    LossHistory,
    empty_history,
    importance,
    quartile_losses,
    record,
    sample_timesteps,
)
from dalle2_jax.diffusion.variance import NoiseStatistics

__all__ = [
    "SAMPLERS",
    "GuidanceSchedule",
    "Ddim",
    "Ddpm",
    "Denoised",
    "DpmSolver",
    "Heun",
    "Inpainting",
    "InverseDdim",
    "Level",
    "LossHistory",
    "NoiseStatistics",
    "Objective",
    "SamplerConfig",
    "SamplingOptions",
    "Schedule",
    "Stepper",
    "StudentSteps",
    "UniPc",
    "bits_per_dim",
    "branches",
    "distillation_loss",
    "distillation_target",
    "empty_history",
    "from_x0_eps",
    "guided",
    "importance",
    "in_float32",
    "integrate",
    "invert",
    "make_schedule",
    "make_stepper",
    "of_alpha_bar",
    "posterior",
    "predictor",
    "q_sample",
    "record",
    "resampling",
    "respace",
    "sample",
    "sample_timesteps",
    "quartile_losses",
    "shifted",
    "steps_of",
    "thresholding",
    "to_x0_eps",
    "training_loss",
    "vlb_terms",
    "with_zero_terminal_snr",
]
