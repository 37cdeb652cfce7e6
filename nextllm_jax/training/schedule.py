"""The learning rate as a function of the step."""

import optax

from nextllm_jax.config import OptimizerConfig


def schedule(config: OptimizerConfig, training_steps: int) -> optax.Schedule:
    """The learning rate as a function of the step, with a warmup.

    The first step has `learning_rate` divided by the number of warmup steps, not zero, so no step is wasted. The last
    step of the schedule has the final learning rate, which later steps keep. The warmup takes at most half of the
    schedule, and the decay never overlaps it.
    """
    steps, warmup = config.schedule_length(training_steps), config.warmup_length(training_steps)
    peak = config.learning_rate
    final = peak * config.final_learning_rate_fraction
    last = steps - warmup - 1  # the last step of the schedule, counted from the end of the warmup
    if config.schedule == "constant":
        main = optax.constant_schedule(peak)
    elif last == 0:
        main = optax.constant_schedule(final)
    elif config.schedule == "cosine":
        main = optax.cosine_decay_schedule(peak, last, alpha=config.final_learning_rate_fraction)
    else:
        wsd_decay = min(max(round(steps * config.decay_steps_fraction), 1), last)
        decay = wsd_decay if config.schedule == "wsd" else last
        main = optax.linear_schedule(peak, final, decay, transition_begin=last - decay)
    if not warmup:
        return main
    rise = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, main], [warmup])


def describe_warmup(config: OptimizerConfig, training_steps: int) -> str | None:
    """A message if the schedule is so short that the warmup is shorter than configured; else None."""
    steps, warmup = config.schedule_length(training_steps), config.warmup_length(training_steps)
    if warmup == config.warmup_steps:
        return None
    return (
        f"warming up for {warmup} steps instead of optimizer.warmup_steps {config.warmup_steps}, "
        f"since the warmup takes at most half of the schedule's {steps} steps"
    )
