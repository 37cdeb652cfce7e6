"""What to change when a training does not fit its devices, as flags in the order in which to try them."""

from collections.abc import Iterator, Mapping

from nextllm_jax.config import Config


def advice(config: Config, mesh: Mapping[str, int], hbm_bytes: float, state_bytes: float) -> list[str]:
    """Sentences with flags, those first that cost least. `state_bytes`: of the training state on one device."""
    return list(_advice(config, mesh, hbm_bytes, state_bytes))


def _advice(config: Config, mesh: Mapping[str, int], hbm_bytes: float, state_bytes: float) -> Iterator[str]:
    training, model = config.training, config.model
    if mesh["data"] > 1:
        yield (
            f"--mesh.data 1 --mesh.fsdp {mesh['fsdp'] * mesh['data']}: every device keeps a copy of what fsdp would "
            f"divide by {mesh['data']} more"
        )
    if state_bytes > 0.8 * hbm_bytes:
        yield (
            f"more devices: parameters and moments alone are {state_bytes / hbm_bytes:.0%} of the memory of one; give "
            "a larger --topology, and --mesh.fsdp with it"
        )
    rows = training.global_batch_size // (training.accumulation_steps * mesh["data"] * mesh["fsdp"])
    if rows > 1:
        steps = training.accumulation_steps * rows
        yield (
            f"--training.accumulation-steps {steps}: one sequence on a device at a time, not {rows}; the batch and the "
            "result stay the same"
        )
    if model.remat != "full":
        yield f"--model.remat full: keeps only what goes into each layer, where {model.remat} keeps more"
    if rows <= 1 and model.num_kv_heads % (2 * mesh["tensor"]) == 0:
        yield (
            f"--mesh.tensor {2 * mesh['tensor']} --mesh.fsdp {max(mesh['fsdp'] // 2, 1)}: two devices share a "
            "sequence, each with half of the heads and of the MLP"
        )
    if rows <= 1:
        shorter = config.data.sequence_length // 2
        yield f"--data.sequence-length {shorter}: activations halve, and so does what is learnt from a step"
    if rows <= 1:
        yield "a larger --topology: twice the devices halve parameters and moments"
