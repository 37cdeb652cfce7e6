"""A run goes on with other devices and processes than it was saved with: the same losses to float32's rounding."""

import itertools
import signal

import pytest

from tests.processes import Processes, assert_same_losses, devices

STEPS = 40


def mesh(**sizes):
    return [word for name, size in sizes.items() for word in (f"--mesh.{name}", size)]


def until(step):
    return ["--training.steps", step, "--optimizer.schedule-steps", STEPS, "--training.sample-tokens", 0]


# Number of devices and the mesh of them; each row holds every axis.
MESHES = {
    "1": (1, mesh(data=1)),
    "2": (2, mesh(data=1, fsdp=2)),
    "4": (4, mesh(data=1, sequence=2, tensor=2)),
    "8": (8, mesh(data=2, fsdp=2, tensor=2)),
    "8 in another way": (8, mesh(data=1, fsdp=4, sequence=2)),
}


@pytest.mark.slow
def test_a_run_that_moves_from_mesh_to_mesh_has_the_losses_of_one_device(trained, door):
    for step, name in [(21, "8"), (40, "4")]:
        count, sizes = MESHES[name]
        door.run("train.py", "--config", "config.py", *sizes, *until(step), XLA_FLAGS=devices(count))
    assert_same_losses(door.directory, trained.directory, but_validation_of=(21,))


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), list(itertools.permutations(MESHES, 2)))
def test_every_mesh_is_continued_by_every_other(trained, door, before, after):
    for step, (count, sizes) in [(17, MESHES[before]), (40, MESHES[after])]:
        door.run("train.py", "--config", "config.py", *sizes, *until(step), XLA_FLAGS=devices(count))
    assert_same_losses(door.directory, trained.directory, but_validation_of=(17,))


# Processes, devices of each, and the mesh of all.
LAYOUTS = {
    "1 of 8": (1, 8, mesh(data=2, fsdp=2, tensor=2)),
    "2 of 4": (2, 4, mesh(data=2, fsdp=2, tensor=2)),
    "2 of 1": (2, 1, mesh(data=1, fsdp=2)),
    "4 of 2": (4, 2, mesh(data=1, fsdp=2, sequence=2, tensor=2)),
}


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), list(itertools.permutations(LAYOUTS, 2)))
def test_any_processes_continue_what_others_began(trained, door, before, after):
    count, each, sizes = LAYOUTS[before]
    with Processes(door, count, *sizes, *until(STEPS), XLA_FLAGS=devices(each)) as processes:
        processes.wait_for("step 17/40")
        processes.signal(signal.SIGTERM, count - 1)
        codes, _ = processes.end()
        assert codes == [75] * count, processes.outputs()
    count, each, sizes = LAYOUTS[after]
    with Processes(door, count, *sizes, *until(STEPS), XLA_FLAGS=devices(each)) as processes:
        codes, _ = processes.end()
        assert codes == [0] * count, processes.outputs()
        assert "continuing from step" in processes.output(0)
    assert_same_losses(door.directory, trained.directory)
