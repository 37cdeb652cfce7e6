"""Messages and progress go to standard error, and a program that uses this package can silence or route them."""

import re
import subprocess
import sys
import time

import pytest

from nextllm_jax import progress

PROGRAM = """
import logging, time
{setup}
from nextllm_jax import progress
progress._LOG_SECONDS = 0.1
progress.show_messages()
progress.show_messages()
log = logging.getLogger("nextllm_jax.data.prepare")
for step in progress.progress_bar(range(4), desc="working", unit=" steps"):
    time.sleep(0.06)
    if step == 2:
        log.info("half-way")
        log.warning("100% full")
print("result")
"""


def run(setup: str = "") -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", PROGRAM.format(setup=setup)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "result\n"
    return done


def test_messages_and_progress_are_lines_of_a_log() -> None:
    lines = run().stderr.splitlines()
    bars = [line for line in lines if line.startswith("working: ")]
    assert re.search(r"\| [23]/4 \[00:00, ETA 00:00, .* steps/s\]$", bars[0])
    assert bars[-1].startswith("working: 100%|")
    assert [line for line in lines if line not in bars] == ["half-way", "WARNING: 100% full"]


@pytest.mark.parametrize(
    ("setup", "shown"),
    [
        ("logging.getLogger('nextllm_jax').setLevel(logging.ERROR)", []),
        ("logging.basicConfig()", ["half-way", "WARNING: 100% full"]),  # as orbax does when it is imported
        (
            "logging.basicConfig(format='%(name)s %(message)s')",
            ["nextllm_jax.data.prepare " + text for text in ("half-way", "100% full")],
        ),
        ("logging.getLogger('nextllm_jax').addHandler(logging.NullHandler())", []),
    ],
)
def test_the_caller_decides_about_messages(setup: str, shown: list[str]) -> None:
    assert [line for line in run(setup).stderr.splitlines() if not line.startswith("working")] == shown


def test_short_work_leaves_no_line_in_a_log() -> None:
    program = PROGRAM.format(setup="").replace("_LOG_SECONDS = 0.1", "_LOG_SECONDS = 30.0")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr == "half-way\nWARNING: 100% full\n"


def test_a_phase_reports_itself_if_it_is_long(messages, monkeypatch):
    with progress.phase("quick"):
        pass
    monkeypatch.setattr(progress, "_PHASE_SECONDS", 0.01)
    with progress.phase("long"):
        while not messages.messages:
            time.sleep(0.001)
    assert messages.messages[0] == "long ..."
    assert re.fullmatch(r"long took \d+\.\d s", messages.messages[1])
