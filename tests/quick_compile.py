"""Settings of XLA for the tests: compile fast rather than well.

Programs here are tiny and run a few times. XLA's costly optimisations would take most of the
time. Import this before anything runs in JAX.

With ``JAX_COMPILATION_CACHE_DIR=FOLDER`` in the environment JAX keeps what it compiled from run to
run, and the second takes less than half the time.
"""

import os
from importlib.metadata import PackageNotFoundError, version


def flags() -> list[str]:
    found = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
    try:
        # An unknown flag ends the process, and these may come and go. The first saves two thirds.
        if version("jaxlib").startswith("0.10."):
            found += ["--xla_cpu_use_fusion_emitters=false"]
            found += ["--xla_cpu_parallel_codegen_split_count=1"]
    except PackageNotFoundError:
        pass
    return found


FLAGS = " ".join(flags())
os.environ.setdefault("XLA_FLAGS", FLAGS)
# Compiled programs need not know which line of Python each of their operations comes from.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
