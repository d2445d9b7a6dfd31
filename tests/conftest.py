"""What all tests share: rare collections of garbage, programs compiled once, an order of files."""

import gc
import os
import shutil
import tempfile


def pytest_configure(config) -> None:
    """A folder for what JAX compiles: small programs come again in each worker and each file."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = tempfile.mkdtemp(prefix="jax-cache-")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def pytest_collection_modifyitems(items) -> None:
    """The long file of tutorials first: at the end one worker would be left with it."""
    items.sort(key=lambda item: item.path.name != "test_tutorials.py")


def pytest_collection_finish() -> None:
    """With two libraries loaded, collections of garbage would take a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
