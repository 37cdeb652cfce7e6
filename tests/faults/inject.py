"""Runs a script of ours with one fault at one moment: `python inject.py FAULT MODULE:NAME COUNT SCRIPT ARGUMENTS`.

The fault strikes when the named function is called for the COUNT-th time, before it does anything:

    kill       the process dies as if by kill -9
    SIGTERM    the process gets that signal; any other signal's name will do, and several joined by +
    hold       the process prints "held" and waits for a file named "released"
    gone DIR   the directory is renamed to "gone"
    full       the function fails as on a disk without room
    clock      from here on the clock is a day behind
    MODULE:NAME is written with dots for nested names, as in nextllm_jax.training.writers:MetricsWriter.train
"""

import errno
import functools
import importlib
import os
import runpy
import signal
import sys
import time


def strike(fault: str) -> None:
    """Do what the fault's name says."""
    if fault == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if fault == "clock":
        true_time = time.time
        time.time = lambda: true_time() - 86_400
    elif fault == "hold":
        print("held", flush=True)
        while not os.path.exists("released"):
            time.sleep(0.01)
    elif fault.startswith("gone "):
        os.rename(fault.removeprefix("gone "), "gone")
    elif fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    else:
        for name in fault.split("+"):
            os.kill(os.getpid(), signal.Signals[name])
        time.sleep(0.5)  # the thread that takes signals may have to wait for a processor


def arm(fault: str, place: str, count: int) -> None:
    """Replace the named function by one that strikes at its `count`-th call."""
    module_name, _, name = place.partition(":")
    *owners, last = name.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module_name))
    function, calls = getattr(owner, last), 0

    @functools.wraps(function)
    def armed(*arguments, **options):
        nonlocal calls
        calls += 1
        if calls == count:
            strike(fault)
        return function(*arguments, **options)

    setattr(owner, last, armed)


if __name__ == "__main__":
    fault, place, count, script, *rest = sys.argv[1:]
    # train.py starts itself again with these set; then this file starts again too, and arms itself only once.
    if "GLIBC_TUNABLES" in os.environ:
        arm(fault, place, int(count))
    sys.argv = [script, *rest]
    sys.path[0] = os.path.dirname(script)
    runpy.run_path(script, run_name="__main__")
