"""The update on eight simulated devices is the update on one, the Fisher matrix included.

The number of devices is fixed once JAX runs, so the comparison has a process of its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from jax import random
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import numpyro_helmholtz as nh

from .programs import SBN

ROOT = Path(__file__).resolve().parents[2]
DEVICES = 8
FRONTS = {
    "RWS": lambda *programs: nh.RWS(*programs, num_particles=4),
    "unit": lambda *programs: nh.NaturalRWS(*programs, num_particles=4, fisher="unit"),
    "kronecker": lambda *programs: nh.NaturalRWS(*programs, num_particles=4),
}


@pytest.fixture(scope="module")
def found():
    flags = os.environ.get("XLA_FLAGS", "")
    env = os.environ | {
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={DEVICES}",
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, "-m", __name__]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("front", FRONTS)
def test_eight_devices_take_the_step_of_one(found, front):
    gaps = found[front]
    assert gaps["devices"] == DEVICES and gaps["sums"] > 0
    assert 1e-4 < gaps["moved"]
    assert gaps["loss"] < 1e-11 and gaps["params"] < 1e-13
    assert gaps["memory"] < 1e-12


def gap(a, b):
    """The largest difference between the numbers of two trees."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max((float(np.abs(np.asarray(x) - np.asarray(y)).max()) for x, y in pairs), default=0.0)


def compare(make):
    """Two updates on one device and the same two on all of them."""
    mesh = Mesh(np.array(jax.devices()), ("data",))
    x = jnp.array(np.random.default_rng(0).integers(0, 2, (2 * DEVICES, 3)), jnp.float64)
    sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    sbn = SBN()
    svi = make(sbn.model, sbn.guide)
    start = one = svi.init(random.key(1), x)
    many = jax.device_put(one, NamedSharding(mesh, PartitionSpec()))
    update = jax.jit(svi.update)
    compiled = update.lower(many, sharded).compile()
    for _ in range(2):
        one, loss = update(one, x)
        many, total = update(many, sharded)
    return {
        "devices": len(sharded.sharding.device_set),
        "sums": compiled.as_text().count("all-reduce("),  # partial sums of the devices
        "moved": gap(svi.get_params(one), svi.get_params(start)),
        "params": gap(svi.get_params(one), svi.get_params(many)),
        "memory": gap(one.memory, many.memory),
        "loss": abs(float(loss - total)),
    }


if __name__ == "__main__":
    numpyro.enable_x64()
    print(json.dumps({name: compare(make) for name, make in FRONTS.items()}))
