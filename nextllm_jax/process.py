"""Settings of the process that must stand before it starts, and the one re-execution that makes them stand.

XLA on a CPU allocates its temporaries anew at every call, so the page faults of fresh memory cost it a
fifth of a training step. Huge pages and an allocator that keeps what it frees take that cost away, and
glibc reads both only at start.
"""

import os
import sys
from pathlib import Path

TRAINING_ENVIRONMENT = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184:"
    "glibc.malloc.arena_max=1",
}
"""Environment variables of a training process; one that the user has set is left alone."""

PLANNING_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
"""Environment variables with which libtpu compiles where there is no TPU: it looks for no metadata server, and keeps no
other process from doing the same. The last two name some machine, of which it would complain otherwise; they do not
decide what is compiled for."""


def describe() -> str:
    """One line that says what `restart_with_settings` sets, for --help."""
    settings = ", ".join(f"{name}={value}" for name, value in TRAINING_ENVIRONMENT.items())
    return f"Sets before it starts, unless you have: {settings}."


def restart_with_settings() -> None:
    """Replace this process by itself with TRAINING_ENVIRONMENT set; do nothing where it is set already.

    Call it before jax is imported. Elsewhere than on Linux it does nothing.
    """
    missing = {name: value for name, value in TRAINING_ENVIRONMENT.items() if name not in os.environ}
    if missing and sys.platform == "linux":
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **missing})


def cache_directory() -> Path:
    """Where this package keeps what it can make again: nextllm_jax in XDG_CACHE_HOME, or in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nextllm_jax"


def use_planning_settings() -> None:
    """Set PLANNING_ENVIRONMENT in this process, whatever stood there. Call it before jax is imported."""
    os.environ.update(PLANNING_ENVIRONMENT)


def use_compilation_cache() -> None:
    """Keep compiled programs between runs, in JAX_COMPILATION_CACHE_DIR or the user's cache directory."""
    import jax

    if not jax.config.values["jax_compilation_cache_dir"]:
        jax.config.update("jax_compilation_cache_dir", str(cache_directory() / "compiled"))
