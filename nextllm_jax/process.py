"""Environment variables that must be set before the process starts, and the re-execution that sets them.

On a CPU, XLA allocates its temporaries at every call, and page faults of new memory take a fifth of a training step.
Huge pages, and an allocator that keeps freed memory, avoid this cost. glibc reads both settings only at startup.
"""

import os
import sys
from pathlib import Path

TRAINING_ENVIRONMENT = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184:"
    "glibc.malloc.arena_max=1",
}
"""Environment variables of a training process. Those that the user has set are not changed."""

PLANNING_ENVIRONMENT = {
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
"""Environment variables with which libtpu compiles on a machine without a TPU: it does not query a metadata server, and
does not prevent other processes from doing the same. Its programs cannot be read from a compilation cache. The last two
name an arbitrary machine, since libtpu needs one; they do not determine the compilation target."""


def describe() -> str:
    """A line for --help about the variables that `restart_with_settings` sets."""
    settings = ", ".join(f"{name}={value}" for name, value in TRAINING_ENVIRONMENT.items())
    return f"Sets these environment variables before it starts, unless they are set already: {settings}."


def restart_with_settings() -> None:
    """Re-execute this process with TRAINING_ENVIRONMENT set. Does nothing if it is set already, or if not on Linux.

    Must be called before jax is imported.
    """
    missing = {name: value for name, value in TRAINING_ENVIRONMENT.items() if name not in os.environ}
    if missing and sys.platform == "linux":
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **missing})


def cache_directory() -> Path:
    """The cache directory of this package: nextllm_jax in XDG_CACHE_HOME, or in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nextllm_jax"


def use_planning_settings() -> None:
    """Set PLANNING_ENVIRONMENT in this process, replacing existing values. Must be called before jax is imported."""
    os.environ.update(PLANNING_ENVIRONMENT)


def use_compilation_cache() -> None:
    """Keep compiled programs between runs, in JAX_COMPILATION_CACHE_DIR or the user's cache directory.

    It includes programs that compile in less than a second, which jax leaves out by default: together they are a sixth
    of a warm start. XLA's own caches are off: their path would be part of the name of each program, so a program would
    not be found in a copy of the directory elsewhere, see `training.compiled_programs`.
    """
    import jax

    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    if not jax.config.values["jax_compilation_cache_dir"]:
        jax.config.update("jax_compilation_cache_dir", str(cache_directory() / "compiled"))
