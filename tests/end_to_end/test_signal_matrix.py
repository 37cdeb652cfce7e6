"""Phase x signal x process: each leaves a state that the same command continues to the same end, and exits 75.

`python -m pytest -m slow tests/end_to_end/test_signal_matrix.py -s` prints a line for each.
"""

import re
import signal

import pytest

from tests.processes import RUN, Processes, assert_same_losses, saved_steps

WHO = [(1, [0]), (2, [0]), (2, [1]), (2, [0, 1])]
SIGNALS = [signal.SIGINT, signal.SIGTERM]
NO_CACHE = {"JAX_ENABLE_COMPILATION_CACHE": "0"}
LONG_EVALUATION = ["--training.evaluation-batch-size", "2"]

# Environment and arguments that make a phase long enough to hit, and what is printed or there when it begins.
PHASES = {
    "compiling": (NO_CACHE, [], r"compiling the train step"),
    "step": ({}, [], r"step 5/40"),
    "compiling an evaluation": (NO_CACHE, [], r"step 20/40"),
    "evaluation": ({}, LONG_EVALUATION, r"step 20/40"),
    "save": ({}, [], "checkpoints"),
    "last evaluation": ({}, LONG_EVALUATION, r"step 40/40"),
}


def interrupt(door, phase, number, count, who):
    """Exit codes, seconds to the end, output of process 0."""
    environment, arguments, began = PHASES[phase]
    with Processes(door, count, *arguments, **environment) as processes:
        if phase == "save":
            checkpoints = door.directory / RUN / "checkpoints"
            processes.wait_until(lambda: checkpoints.exists() and any(checkpoints.glob("15*")), "a save")
        else:
            processes.wait_for(began)
        processes.signal(number, *who)
        codes, seconds = processes.end()
        return codes, seconds, processes.outputs()


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize(("count", "who"), WHO)
def test_a_signal_in_any_phase_loses_nothing(trained, door, phase, number, count, who):
    codes, seconds, output = interrupt(door, phase, number, count, who)
    steps = saved_steps(door.directory / RUN)
    print(f"\n{phase} | {number.name} | {who} of {count} | exit {codes} | {seconds:.2f} s | saved {steps}")
    if phase == "last evaluation" and "finished at step 40" in output:  # it came behind the last place to stop at
        assert codes == [0] * count, output
    else:
        assert codes == [75] * count, output
        saved = re.search(r"saved step (\d+) and stopped", output)
        assert saved or "nothing is lost" in output
        assert steps[-1:] == ([int(saved[1])] if saved else [])
    assert "Traceback" not in output
    door.run("train.py", "--config", "config.py")
    assert_same_losses(door.directory, trained.directory)


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize(("count", "who"), WHO)
def test_a_signal_while_preparing_leaves_what_is_continued(door, number, count, who):
    (door.directory / "data").unlink()  # that of the other tests
    arguments = ["--data.corpus", "stdlib", "--data.tokenizer", "train", "--data.num-processes", "1"]
    with Processes(door, count, *arguments) as processes:
        processes.wait_for("training a tokenizer")
        processes.signal(number, *who)
        codes, seconds = processes.end()
        print(f"\npreparing data | {number.name} | {who} of {count} | exit {codes} | {seconds:.2f} s")
        assert codes == [75] * count, processes.outputs()
        assert "while preparing data: nothing is lost" in processes.output(0)
    assert not (door.directory / "runs").exists()
    options = [argument.replace("--data.", "--") for argument in arguments]
    again = door.run("nextllm_jax.cli", "prepare", "--config", "config.py", *options)
    assert "continuing the interrupted preparation" in again.stderr


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_while_waiting_for_the_others(door, number):
    with Processes(door, 2, absent=[1]) as processes:
        processes.wait_for("waiting for 2 processes")
        processes.signal(number)
        codes, seconds = processes.end()
        print(f"\nwaiting | {number.name} | 0 of 2 | exit {codes} | {seconds:.2f} s")
        assert codes == [75]
