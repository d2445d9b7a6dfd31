"""Settings of XLA for the tests: compile fast rather than well.

Programs here are tiny and run a few times. XLA's costly optimisations would take most of the
time. Import this before anything runs in JAX.

With ``JAX_COMPILATION_CACHE_DIR=FOLDER JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0`` in the
environment JAX keeps what it compiled, and a second run takes less than half the time.
"""

import os
from importlib.metadata import PackageNotFoundError, version


def flags() -> list[str]:
    found = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
    try:
        # An unknown flag ends the process, and this one may come and go. It saves two thirds.
        if version("jaxlib").startswith("0.10."):
            found.append("--xla_cpu_use_fusion_emitters=false")
    except PackageNotFoundError:
        pass
    return found


FLAGS = " ".join(flags())
os.environ.setdefault("XLA_FLAGS", FLAGS)
