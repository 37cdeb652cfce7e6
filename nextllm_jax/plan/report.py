"""Plans as tables for people and as JSON for programs."""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from nextllm_jax.hardware import readable_bytes
from nextllm_jax.plan.collectives import Collective, Traffic
from nextllm_jax.plan.compile import Memory, OutOfMemory
from nextllm_jax.plan.decoding import DecodingPlan, Phase
from nextllm_jax.plan.roofline import Roofline
from nextllm_jax.plan.training import TrainingPlan

_DAY = 86_400.0


class Budget(NamedTuple):
    """The durations and token counts that a report converts into each other at the best possible speed."""

    days: float
    """Days, reported as steps and tokens."""
    tokens: float | None
    """Tokens, reported as days; None: the tokens of training.steps."""

    def steps(self, plan: TrainingPlan) -> int | None:
        """The largest number of steps in these days; None for an unknown chip."""
        return int(self.days * _DAY / plan.roofline.seconds) if plan.roofline else None

    def days_of_tokens(self, plan: TrainingPlan) -> float | None:
        """The smallest number of days that the tokens take; None for an unknown chip."""
        tokens = self.tokens or plan.config.training.steps * plan.tokens_per_step
        return tokens / plan.tokens_per_second / _DAY if plan.tokens_per_second else None


_FIELDS = (
    *("parameters", "active_parameters", "compile_seconds", "fits", "estimated_peak_bytes", "flops_per_step"),
    *("unknown_loops", "tokens_per_second", "mfu_bound"),
)


def training_json(plan: TrainingPlan, budget: Budget) -> dict[str, Any]:
    """The plan as JSON values. Bytes are per device; bytes of collectives are per device and step.

    Values that need the speed or the capacity of a device are None for an unknown chip.
    """
    config, check, steps = plan.config, plan.flops_check, budget.steps(plan)
    return {
        **_target_json(plan),
        **{name: getattr(plan, name) for name in _FIELDS},
        "sequence_length": config.data.sequence_length,
        "global_batch_size": config.training.global_batch_size,
        "accumulation_steps": config.training.accumulation_steps,
        "remat": config.model.remat,
        "estimated": plan.compile_seconds is None,
        "memory": _memory_json(plan),
        "out_of_memory": plan.out_of_memory and dataclasses.asdict(plan.out_of_memory),
        "advice": list(plan.advice),
        "save": plan.save._asdict(),
        "flops_check": check and check._asdict() | {"relative_difference": check.relative_difference},
        "collectives": _traffic_json(plan.traffic),
        "collectives_minimum": _traffic_json(plan.minimum),
        "roofline": plan.roofline and _roofline_json(plan.roofline),
        "step_seconds": plan.roofline and plan.roofline.seconds,
        "days": budget.days_of_tokens(plan),
        "budget": {"days": budget.days, "steps": steps, "tokens": steps and steps * plan.tokens_per_step},
    }


def _memory_json(plan: TrainingPlan) -> dict[str, Any]:
    """The memory of the compiled step or of the estimate. If the step does not fit, unreported numbers are None."""
    if plan.memory:
        return dataclasses.asdict(plan.memory)
    if plan.out_of_memory:
        temporaries, peak = plan.out_of_memory.temporary_bytes, plan.needed_bytes
    else:
        temporaries, peak = plan.estimated_peak_bytes - plan.argument_bytes, plan.estimated_peak_bytes
    return {"argument_bytes": plan.argument_bytes, "temporary_bytes": temporaries, "peak_bytes": peak}


def decoding_json(plan: DecodingPlan) -> dict[str, Any]:
    """The plan as JSON values. Bytes are per device; bytes of collectives are per device and run of a program."""
    return {
        **_target_json(plan),
        **dataclasses.asdict(plan.request),
        "quantization": plan.quantization and plan.quantization.to_json(),
        "parameter_bytes": plan.parameter_bytes,
        "cache_bytes": plan.cache_bytes,
        "prefill": _phase_json(plan.prefill),
        "decode": plan.decode and _phase_json(plan.decode),
    }


def _phase_json(phase: Phase) -> dict[str, Any]:
    compiled, roofline = phase.compiled, phase.roofline
    return {
        "tokens": phase.tokens,
        "compile_seconds": compiled.seconds,
        "memory": compiled.memory and dataclasses.asdict(compiled.memory),
        "out_of_memory": compiled.out_of_memory and dataclasses.asdict(compiled.out_of_memory),
        "collectives": _traffic_json(phase.traffic),
        "roofline": roofline and _roofline_json(roofline),
        "tokens_per_second": roofline and phase.tokens / roofline.seconds,
    }


def _target_json(plan: TrainingPlan | DecodingPlan) -> dict[str, Any]:
    return {
        "topology": plan.topology,
        "device_kind": plan.device_kind,
        "devices": math.prod(plan.mesh.values()),
        "mesh": dict(plan.mesh),
        "hbm_bytes": plan.chip and plan.chip.hbm_bytes,
    }


def _traffic_json(traffic: Mapping[Collective, Traffic] | None) -> list[dict[str, Any]] | None:
    return None if traffic is None else [key._asdict() | sent._asdict() for key, sent in traffic.items()]


def _roofline_json(roofline: Roofline) -> dict[str, Any]:
    seconds = {f"{name}_seconds": value for name, value in dataclasses.asdict(roofline).items()}
    return seconds | {"bound": roofline.bound}


def training_table(plan: TrainingPlan, budget: Budget) -> str:
    """The plan as text: blocks of lines."""
    blocks: list[Iterable[str]] = [_training_head(plan), _training_memory(plan), _training_traffic(plan)]
    if plan.roofline:
        blocks.append(_training_time(plan, plan.roofline, budget))
    blocks.append([str(plan.save)])
    return "\n\n".join("\n".join(block) for block in blocks)


def _training_head(plan: TrainingPlan) -> Iterator[str]:
    training, length = plan.config.training, plan.config.data.sequence_length
    steps = training.accumulation_steps
    microbatches = f" in {steps} microbatches" if steps > 1 else ""
    yield _target_line(plan)
    active = f", {plan.active_parameters:,} of them active" if plan.config.model.num_experts else ""
    yield f"{plan.parameters:,} parameters{active}, remat {plan.config.model.remat}"
    yield f"{training.global_batch_size:,} sequences of {length:,} tokens per step{microbatches}"


def _axes(plan: TrainingPlan | DecodingPlan) -> str:
    return ", ".join(f"{name} {size}" for name, size in plan.mesh.items() if size > 1)


def _target_line(plan: TrainingPlan | DecodingPlan) -> str:
    axes = _axes(plan)
    return f"{plan.topology}: {math.prod(plan.mesh.values()):,} x {plan.device_kind}{f', mesh {axes}' if axes else ''}"


def _line(name: str, value: str, note: str = "") -> str:
    return f"  {name:32}{value:>14}{note and '  '}{note}"


def _training_memory(plan: TrainingPlan) -> Iterator[str]:
    yield "memory per device"
    yield from _memory_lines(plan.memory, plan.out_of_memory, plan.argument_bytes)
    if plan.compile_seconds is None:
        yield _line("peak", readable_bytes(plan.estimated_peak_bytes), "estimated; leave out --fast to compile")
    if plan.needed_bytes:
        yield _line("needed", readable_bytes(plan.needed_bytes))
    if plan.limit_bytes is None:
        yield "the capacity and the speed of the device are unknown"
        return
    yield _line("capacity", readable_bytes(plan.limit_bytes))
    yield "it fits" if plan.fits else "it does NOT fit; try these changes, in this order:"
    for number, sentence in enumerate(plan.advice, 1):
        yield f"  {number}. {sentence}"


def _memory_lines(memory: Memory | None, out_of_memory: OutOfMemory | None, argument_bytes: int) -> Iterator[str]:
    yield _line("arguments", readable_bytes(memory.argument_bytes if memory else argument_bytes))
    if memory:
        yield _line("temporaries", readable_bytes(memory.temporary_bytes))
        yield _line("peak", readable_bytes(memory.peak_bytes))
        if memory.host_bytes:
            yield _line("host memory", readable_bytes(memory.host_bytes))
    elif out_of_memory and out_of_memory.temporary_bytes:
        yield _line("temporaries", readable_bytes(out_of_memory.temporary_bytes))


def _training_traffic(plan: TrainingPlan) -> Iterator[str]:
    if not plan.traffic and not plan.minimum:
        yield "no communication between devices"
        return
    if plan.traffic:
        yield "sent per device and step"
        yield from _traffic_lines(plan.traffic)
    if plan.unknown_loops:
        yield f"{plan.unknown_loops} loops with an unknown trip count are counted as one iteration"
    yield "lower bound on what is sent"
    yield from _traffic_lines(plan.minimum)


def _traffic_lines(traffic: Mapping[Collective, Traffic]) -> Iterator[str]:
    """The large collectives, the other ones in one line, and the total."""
    total = sum(sent.sent_bytes for sent in traffic.values())
    small = 0.0
    for collective, sent in sorted(traffic.items(), key=lambda item: -item[1].sent_bytes):
        if sent.sent_bytes < total / 1000:
            small += sent.sent_bytes
        else:
            note = f"{sent.count:,.0f} times, {collective.dtype}, over {collective.axes}"
            yield _line(collective.kind, readable_bytes(sent.sent_bytes), note)
    if small:
        yield _line("other", readable_bytes(small))
    yield _line("total", readable_bytes(total))


def _training_time(plan: TrainingPlan, roofline: Roofline, budget: Budget) -> Iterator[str]:
    yield "lower bound on the time of a step"
    yield from _roofline_lines(roofline)
    yield _line("tokens/s, upper bound", f"{plan.tokens_per_second:,.0f}", f"MFU {plan.mfu_bound:.1%}")
    sequential = plan.tokens_per_step / roofline.seconds_without_overlap
    yield _line("tokens/s without overlap", f"{sequential:,.0f}")
    check = plan.flops_check
    note = f"the compiler counts {check.relative_difference:+.1%} for two layers" if check else ""
    yield _line("FLOPs", f"{plan.flops_per_step:.3e}", note)
    what = f"{budget.tokens:.3e} tokens" if budget.tokens else f"{plan.config.training.steps:,} steps"
    yield f"{what} take at least {budget.days_of_tokens(plan):,.2f} days"
    steps = budget.steps(plan) or 0
    yield f"{budget.days:g} days are enough for at most {steps:,} steps or {steps * plan.tokens_per_step:.3e} tokens"


def _roofline_lines(roofline: Roofline) -> Iterator[str]:
    for name, seconds in dataclasses.asdict(roofline).items():
        if seconds:
            yield _line(name, _seconds(seconds), "bottleneck" if name == roofline.bound else "")


def _seconds(seconds: float) -> str:
    return f"{seconds:,.3f} s" if seconds >= 1 else f"{1e3 * seconds:,.3f} ms"


def decoding_table(plan: DecodingPlan) -> str:
    """The plan as text: blocks of lines."""
    request = plan.request
    head = [
        _target_line(plan),
        f"{request.batch_size:,} rows, prompts of {request.prompt_tokens:,} tokens, {request.new_tokens:,} new ones",
        _line("parameters per device", readable_bytes(plan.parameter_bytes), str(plan.quantization or "")),
        _line("KV cache of all rows", readable_bytes(plan.cache_bytes)),
    ]
    blocks = [head, [*_phase("prefill", plan.prefill, plan)]]
    if plan.decode:
        blocks.append([*_phase("a decode step", plan.decode, plan)])
    return "\n\n".join("\n".join(block) for block in blocks)


def _phase(name: str, phase: Phase, plan: DecodingPlan) -> Iterator[str]:
    yield name
    yield from _memory_lines(phase.compiled.memory, phase.compiled.out_of_memory, plan.parameter_bytes)
    yield _line("capacity", readable_bytes(plan.chip.hbm_bytes))
    if phase.roofline is None:
        yield "it does NOT fit; give fewer rows, shorter prompts, or more of --mesh.tensor"
        return
    if phase.traffic:
        yield "sent per device"
        yield from _traffic_lines(phase.traffic)
    yield "lower bound on the time"
    yield from _roofline_lines(phase.roofline)
    yield _line("tokens/s, upper bound", f"{phase.tokens / phase.roofline.seconds:,.0f}")


def search_json(plans: Sequence[TrainingPlan], budget: Budget) -> dict[str, Any]:
    """The plans that fit as JSON values, best first."""
    return {"candidates": [training_json(plan, budget) for plan in plans]}


def search_table(plans: Sequence[TrainingPlan], budget: Budget) -> str:
    """A table of the plans that fit, best first, then the details of the best one."""
    lines = [f"{'mesh':40}{'remat':>16}{'accum.':>7}{'peak':>12}{'step':>12}{'MFU':>8}"]
    for plan in plans[:20]:
        assert plan.roofline is not None  # search needs a known chip
        peak = readable_bytes(plan.memory.peak_bytes if plan.memory else plan.estimated_peak_bytes)
        steps = plan.config.training.accumulation_steps
        note = "" if plan.memory else "  estimated"
        lines.append(
            f"{_axes(plan):40}{plan.config.model.remat:>16}{steps:>7}{peak:>12}{_seconds(plan.roofline.seconds):>12}"
            f"{plan.mfu_bound:>8.1%}{note}"
        )
    if not plans:
        return "none of the compiled variants fits"
    return "\n".join(lines) + "\n\nthe best:\n" + training_table(plans[0], budget) + "\n\n" + _flags(plans[0])


def _flags(plan: TrainingPlan) -> str:
    """The command-line options that select this plan."""
    mesh = " ".join(f"--mesh.{name} {size}" for name, size in plan.mesh.items())
    training = plan.config.training
    return f"{mesh} --model.remat {plan.config.model.remat} --training.accumulation-steps {training.accumulation_steps}"
