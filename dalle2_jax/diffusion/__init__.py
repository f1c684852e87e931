"""The mathematics of noise, shared by prior, decoder and upsamplers; it knows no network.

schedule      how much noise there is at each step           respacing     which steps a sampler takes
process       noising, the posterior, (eps, x_0, v)          variance      how wide a reverse step is
objective     what a network is trained on                   timesteps     on which steps
likelihood    the bound in bits per dimension                guidance      Denoisers -> Denoiser
steppers      one step of DDPM, DDIM, its inversion          solvers       one step of Euler, Heun, DPM-Solver++, UniPC
sampler       the loop over steps: noise -> picture          inpainting    the loop around known pixels
thresholding  what becomes of an x_0 out of range
"""

from dalle2_jax.diffusion.guidance import Course, branches, guided
from dalle2_jax.diffusion.inpainting import Inpainting, resampling
from dalle2_jax.diffusion.likelihood import bits_per_dim, vlb_terms
from dalle2_jax.diffusion.objective import Objective, training_loss
from dalle2_jax.diffusion.process import Denoised, from_x0_eps, posterior, q_sample, to_x0_eps
from dalle2_jax.diffusion.respacing import respace
from dalle2_jax.diffusion.sampler import SAMPLERS, SamplerConfig, integrate, invert, make_stepper, predictor, sample
from dalle2_jax.diffusion.schedule import Level, Schedule, make_schedule, shifted, with_zero_terminal_snr
from dalle2_jax.diffusion.solvers import DpmSolver, Heun, UniPc
from dalle2_jax.diffusion.steppers import Ddim, Ddpm, InverseDdim, Stepper
from dalle2_jax.diffusion.thresholding import thresholding
from dalle2_jax.diffusion.timesteps import LossHistory, draw, empty_history, record
from dalle2_jax.diffusion.variance import NoiseMoments

__all__ = [
    "SAMPLERS",
    "Course",
    "Ddim",
    "Ddpm",
    "Denoised",
    "DpmSolver",
    "Heun",
    "Inpainting",
    "InverseDdim",
    "Level",
    "LossHistory",
    "NoiseMoments",
    "Objective",
    "SamplerConfig",
    "Schedule",
    "Stepper",
    "UniPc",
    "bits_per_dim",
    "branches",
    "draw",
    "empty_history",
    "from_x0_eps",
    "guided",
    "integrate",
    "invert",
    "make_schedule",
    "make_stepper",
    "posterior",
    "predictor",
    "q_sample",
    "record",
    "resampling",
    "respace",
    "sample",
    "shifted",
    "thresholding",
    "to_x0_eps",
    "training_loss",
    "vlb_terms",
    "with_zero_terminal_snr",
]
