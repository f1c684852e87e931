"""The mathematics of noise, shared by prior, decoder and upsamplers; it knows no network.

schedule    how much noise at each step, and which steps to keep
process     noising, the posterior, conversions between eps, x_0 and v
objective   what a network is trained on
guidance    Denoisers -> Denoiser
steppers    one step of DDPM, DDIM
sampler     the loop over steps: noise -> picture
"""

from dalle2_jax.diffusion.guidance import classifier_free
from dalle2_jax.diffusion.objective import mse_loss
from dalle2_jax.diffusion.process import Denoised, from_x0_eps, posterior, q_sample, to_x0_eps
from dalle2_jax.diffusion.sampler import SamplerConfig, integrate, predictor, sample
from dalle2_jax.diffusion.schedule import Level, Schedule, make_schedule, respace
from dalle2_jax.diffusion.steppers import Ddim, Ddpm, Stepper

__all__ = [
    "Ddim",
    "Ddpm",
    "Denoised",
    "Level",
    "SamplerConfig",
    "Schedule",
    "Stepper",
    "classifier_free",
    "from_x0_eps",
    "integrate",
    "make_schedule",
    "mse_loss",
    "posterior",
    "predictor",
    "q_sample",
    "respace",
    "sample",
    "to_x0_eps",
]
