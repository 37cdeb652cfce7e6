import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nextllm_jax.process import TRAINING_ENVIRONMENT

PROGRAM = """
import json, os, sys
from nextllm_jax.process import restart_with_settings
restart_with_settings()
print(json.dumps([os.environ.get("GLIBC_TUNABLES"), sys.argv[1:]]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the settings are glibc's")
@pytest.mark.parametrize("own", [None, "glibc.malloc.check=0"])
def test_a_process_restarts_itself_with_the_settings_and_its_arguments(own, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    environment.pop("GLIBC_TUNABLES", None)
    if own:
        environment["GLIBC_TUNABLES"] = own
    command = [sys.executable, str(program), "--a", "b c"]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert json.loads(out) == [own or TRAINING_ENVIRONMENT["GLIBC_TUNABLES"], ["--a", "b c"]]
