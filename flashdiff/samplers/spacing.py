"""Times of a number of steps: spread over the schedule, along a longer solver's, or chosen among a student's own."""

import numpy as np

from flashdiff.samplers.settings import SamplerSettings
from flashdiff.schedule import NoiseSchedule, Schedule


def spaced_times(settings: SamplerSettings, schedule: Schedule, steps: int) -> list[float]:
    """By the settings' spacing, as diffusers has it; those of `linspace` may be fractions."""
    if settings.timesteps:
        return chosen_times(settings.timesteps, steps)
    last = schedule.num_train_timesteps
    match settings.spacing:
        case "linspace":
            return [float(time) for time in np.linspace(0, last - 1, steps, dtype=np.float32)[::-1]]
        case "leading":
            offset = schedule.steps_offset if isinstance(schedule, NoiseSchedule) else 0
            return [float(step * (last // steps) + offset) for step in reversed(range(steps))]
        case "trailing":
            return [float(round(last - step * (last / steps)) - 1) for step in range(steps)]


def solver_times(settings: SamplerSettings, schedule: Schedule, steps: int) -> list[float]:
    """`steps` of the times of a solver of `original_steps`, the noisiest first: LCM's and TCD's rule."""
    if settings.timesteps:
        return chosen_times(settings.timesteps, steps)
    count = settings.original_steps
    distance = schedule.num_train_timesteps // count
    trained = [distance * number - 1 for number in range(count, 0, -1)]
    return [float(trained[int(index)]) for index in np.floor(np.linspace(0, count, num=steps, endpoint=False))]


def chosen_times(timesteps: tuple[int, ...], steps: int) -> list[float]:
    """`steps` of a student's own times, spread evenly from the noisiest on."""
    return [float(timesteps[round(step * len(timesteps) / steps)]) for step in range(steps)]
