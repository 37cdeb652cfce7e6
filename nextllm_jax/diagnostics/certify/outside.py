"""Asks other programs in processes of their own, perhaps in another Python environment."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nextllm_jax.progress import phase

EXIT_MISSING = 3
"""Exit code of a script whose package is not installed; it prints the package's name."""


class Answer(NamedTuple):
    """What another program answered."""

    values: dict[str, Any]
    arrays: dict[str, np.ndarray]
    missing: str | None = None
    """The package that is not installed; then there is no answer."""
    error: str | None = None
    """The last line of an error; then there is no answer."""


def ask(script: str, question: dict[str, Any], python: str | None) -> Answer:
    """The answer of a script of this folder to a question, run by `python` or by this interpreter."""
    with tempfile.TemporaryDirectory(prefix="nextllm-certify-") as name:
        folder = Path(name)
        (folder / "question.json").write_text(json.dumps({**question, "folder": name}))
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        if python is not None:
            environment.pop("PYTHONPATH", None)
        command = [python or sys.executable, str(Path(__file__).with_name(script)), str(folder / "question.json")]
        try:
            with phase(f"running {script.removesuffix('.py')}"):
                done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        except OSError as error:
            return Answer({}, {}, error=f"{command[0]} cannot be run ({error.strerror or error})")
        if done.returncode == EXIT_MISSING:
            return Answer({}, {}, missing=done.stdout.strip())
        if done.returncode != 0:
            lines = (done.stderr or done.stdout).strip().splitlines()
            return Answer({}, {}, error=lines[-1] if lines else f"exit code {done.returncode}")
        if not (folder / "answer.json").exists():
            return Answer({}, {}, error=f"{command[0]} did not run {script}; give a Python interpreter")
        arrays = {}
        if (folder / "answer.npz").exists():
            with np.load(folder / "answer.npz") as found:
                arrays = {key: found[key] for key in found.files}
        return Answer(json.loads((folder / "answer.json").read_text()), arrays)
