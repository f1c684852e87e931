"""Respacing: the steps of a schedule that a sampler takes.

*Respacing* (Nichol & Dhariwal 2021, arXiv 2102.09672, section 4) selects the alpha_bar of some of the
timesteps and derives the betas of the jumps between them:

    beta_k = 1 - alpha_bar_{t_k} / alpha_bar_{t_{k-1}}                                        (1)

Steps may be spaced evenly in t, or by how much noise there is. Evenly in log SNR (Lu et al. 2022,
arXiv 2206.00927, section 3.4), each step removes the same share of the noise that is left. After
Karras et al. 2022 (arXiv 2206.00364, eq. 5) the ratio sigma = noise rate / signal rate goes over n steps as

    sigma_k = (sigma_max^(1/rho) + k / (n - 1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho    (2)

Both start at sigma = 80 (ibid., table 1) where a schedule goes further, as cosine does to 20,000: x_t has no
information about x_0 beyond, and the steps are better spent below.

A network is trained on integer timesteps only, so each level takes the timestep nearest in log SNR, or the next
one that is not taken: n levels are always n different steps.
"""

import functools
import re

import numpy as np
from jaxtyping import Float, Int

from dalle2_jax.diffusion.schedule import Schedule, selected
from dalle2_jax.errors import UserError, shown

SIGMA_MAX = 80.0
"""The highest noise-to-signal ratio that the last two spacings start from."""

GRAMMAR = "50, 'ddim50', '10,10,3,2,2', 'fast27', 'logsnr20', 'karras20', 'karras20:7', 't:0,250,500,999' or '20/4'"


def respace(schedule: Schedule, spec: int | str) -> Schedule:
    """Returns the schedule of a part of the steps, eq. (1); the same object for the same arguments.

    Args:
        schedule: the schedule to take steps from, T steps.
        spec: which steps; the first four in the grammar of the public code (guided-diffusion, GLIDE):
            50 or "50"       50 steps evenly spaced from the first to the last, both included;
                             1 takes only the last
            "10,10,3,2,2"    this many evenly spaced steps in each of equal sections, cleanest first
            "ddim50"         every (T/50)-th step from the first (Song et al. 2021, sec. 4)
            "fast27"         "10,10,3,2,2", whose last step is moved two back from pure noise
            "logsnr20"       20 steps evenly spaced in log SNR
            "karras20:7"     20 steps after eq. (2) with rho = 7, the default
            "t:0,250,999"    exactly these timesteps
            "20/4"           4 of the steps of "20" (or of any of the above): every fifth, up to the last

    Raises:
        UserError: more steps than the schedule has, a stride or a share that does not divide, timesteps that do not
            exist or do not ascend, or another syntax.
    """
    return _respace(schedule, str(spec).replace(" ", ""))


@functools.cache
def _respace(schedule: Schedule, spec: str) -> Schedule:
    indices = _selected_steps(schedule, spec)
    if len(indices) == schedule.num_steps:
        return schedule
    return selected(schedule, indices)


def _selected_steps(schedule: Schedule, spec: str) -> Int[np.ndarray, "n"]:
    """Returns the indices that a respacing selects, ascending."""
    num_steps = schedule.num_steps
    if match := re.fullmatch(r"(.+)/([1-9]\d{0,8})", spec):
        return _share(_selected_steps(schedule, match[1]), int(match[2]), match[1])
    if spec == "fast27":
        indices = _sections(num_steps, [10, 10, 3, 2, 2])
        indices[-1] = num_steps - 3
        return indices
    if match := re.fullmatch(r"ddim(\d{1,9})", spec):
        return _strided(num_steps, int(match[1]))
    if match := re.fullmatch(r"logsnr([1-9]\d{0,8})", spec):
        return _nearest(schedule, _even_log_snr(schedule, _within(num_steps, int(match[1]))))
    if match := re.fullmatch(r"karras([1-9]\d{0,8})(?::(\d{1,9}(?:\.\d{1,9})?))?", spec):
        return _nearest(schedule, _karras(schedule, _within(num_steps, int(match[1])), float(match[2] or 7)))
    if match := re.fullmatch(r"t:(\d{1,9}(?:,\d{1,9})*)", spec):
        return _listed(schedule, [int(word) for word in match[1].split(",")])
    if not re.fullmatch(r"[1-9]\d{0,8}(,[1-9]\d{0,8})*", spec):
        raise UserError(f"not a respacing: {shown(spec)}; write one like {GRAMMAR}")
    return _sections(num_steps, [int(word) for word in spec.split(",")])


def _within(num_steps: int, count: int) -> int:
    if count > num_steps:
        raise UserError(f"a respacing asks for {count} of {num_steps} steps; ask for at most {num_steps}")
    return count


def _sections(num_steps: int, counts: list[int]) -> np.ndarray:
    """Returns ``counts`` steps of equal sections, whose lengths differ by one step at most, the longer ones first."""
    if counts == [1]:
        # Even spacing would select step 0, from which noise cannot become an image.
        return np.array([num_steps - 1])
    sections = np.array_split(np.arange(num_steps), _within(num_steps, len(counts)))
    return np.concatenate([_even(section, count) for section, count in zip(sections, counts, strict=True)])


def _even(section: np.ndarray, count: int) -> np.ndarray:
    """Returns count of the steps of a section, from its first to its last."""
    stride = (len(section) - 1) / (_within(len(section), count) - 1) if count > 1 else 0.0
    # A running sum and half-to-even rounding, as the public code has, decide the ties.
    return section[np.rint(np.cumsum([0.0] + [stride] * (count - 1))).astype(int)]


def _strided(num_steps: int, count: int) -> np.ndarray:
    """Returns every k-th step, for the smallest k that gives exactly count of them."""
    strides = {len(range(0, num_steps, k)): k for k in range(num_steps, 0, -1)}
    if count not in strides:
        nearest = min(strides, key=lambda n: abs(n - count))
        raise UserError(f"'ddim{count}' does not divide {num_steps} steps; the nearest that does is 'ddim{nearest}'")
    return np.arange(0, num_steps, strides[count])


def _share(indices: np.ndarray, count: int, spec: str) -> np.ndarray:
    """Returns count of some steps, evenly spaced, the last one included."""
    if len(indices) % count:
        options = ", ".join(str(n) for n in range(1, len(indices)) if len(indices) % n == 0)
        raise UserError(f"{count} does not divide the {len(indices)} steps of {spec!r}; these do: {options}")
    stride = len(indices) // count
    return indices[stride - 1 :: stride]


def _listed(schedule: Schedule, timesteps: list[int]) -> np.ndarray:
    if any(b <= a for a, b in zip(timesteps, timesteps[1:], strict=False)):
        raise UserError(f"the timesteps of a respacing must ascend: {','.join(map(str, timesteps))}")
    missing = [t for t in timesteps if t not in schedule.timesteps]
    if missing:
        raise UserError(f"there is no timestep {missing[0]}: the schedule's go to {schedule.timesteps[-1]}")
    return np.searchsorted(schedule.timesteps, timesteps)


def _ends(schedule: Schedule) -> tuple[float, float]:
    """Returns the log SNR of the first step and of the last that is used."""
    return schedule.log_snr[0], max(schedule.log_snr[-1], -2 * np.log(SIGMA_MAX))


def _even_log_snr(schedule: Schedule, count: int) -> np.ndarray:
    """Returns evenly spaced log SNRs, cleanest first; a single one is the noisiest."""
    first, last = _ends(schedule)
    return np.linspace(first, last, count) if count > 1 else np.array([last])


def _karras(schedule: Schedule, count: int, rho: float) -> np.ndarray:
    """Levels of eq. (2) as log SNR = -2 log sigma, cleanest first."""
    if not 0 < rho <= 1_000_000:
        raise UserError(f"the rho of a Karras spacing must be above 0 and at most 1000000, not {rho}")
    first, last = _ends(schedule)
    low = np.exp((last - first) / 2 / rho)  # (sigma_min / sigma_max)^(1 / rho), which cannot overflow
    with np.errstate(divide="ignore"):
        return last - 2 * rho * np.log(np.linspace(low, 1.0, count) if count > 1 else np.array([1.0]))


def _nearest(schedule: Schedule, targets: Float[np.ndarray, "n"]) -> np.ndarray:
    """Returns a different step for each of descending log SNRs: the nearest, or the next that is not taken."""
    log_snr, count = schedule.log_snr, len(targets)
    indices = np.abs(log_snr[None, :] - targets[:, None]).argmin(axis=1)
    order = np.arange(count)
    indices = np.maximum.accumulate(indices - order) + order  # ascending: each at least one more than the previous
    return np.minimum(indices, schedule.num_steps - count + order)
