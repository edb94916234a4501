"""One of several processes of `test_distributed.py`: data-parallel metadata over a global mesh.

`python distributed_process.py COORDINATOR PROCESSES PROCESS`
"""

import sys

import jax

coordinator, processes, process = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(coordinator, processes, process)

import numpy as np  # noqa: E402
from helpers import assert_same, inputs  # noqa: E402
from jax.sharding import NamedSharding, PartitionSpec  # noqa: E402

import jaxnsa  # noqa: E402
from jaxnsa import reference  # noqa: E402

BS = 3  # requests of a device
OPTIONS = {"real_page_size": 4, "nsa_index_topk": 9}
PREFILL = OPTIONS | {"max_total_tokens": 12, "max_total_keys": 60}

devices = jax.device_count()
assert devices == 4 * processes
mesh = jax.make_mesh((devices,), ("data",))
split, whole = PartitionSpec("data"), PartitionSpec()
seq_lens, indices, pool = inputs(BS * devices, pool_cols=20)
extend = np.random.default_rng(0).integers(-1, 6, BS * devices, dtype=np.int32)


def global_array(value, spec):
    sharding = NamedSharding(mesh, spec)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def step(seq_lens, extend, indices, pool):
    decode = jaxnsa.precompute_decode_metadata(
        seq_lens, indices, pool, implementation="xla", **OPTIONS
    )
    prefill = jaxnsa.precompute_extend_metadata(
        seq_lens, extend, indices, pool, implementation="xla", **PREFILL
    )
    tokens = jax.lax.psum(prefill.nsa_cu_seqlens_k[-1:], "data")
    return decode, prefill, tokens


decode, prefill, tokens = jax.jit(
    jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(split, split, split, whole),
        out_specs=(split, split, whole),
    )
)(*(global_array(a, split) for a in (seq_lens, extend, indices)), global_array(pool, whole))


def expected(k):
    """What one process computes for the requests of device k."""
    own = slice(k * BS, (k + 1) * BS)
    arguments = seq_lens[own], indices[own], pool
    return (
        reference.precompute_decode_metadata(*arguments, **OPTIONS),
        reference.precompute_extend_metadata(
            seq_lens[own], extend[own], indices[own], pool, **PREFILL
        ),
    )


def shard(tree, k):
    """What device k of this process holds."""
    return jax.tree.map(lambda array: np.asarray(array.addressable_shards[k].data), tree)


wanted = [expected(k) for k in range(devices)]
for k, device in enumerate(jax.local_devices()):
    place = list(mesh.devices).index(device)
    assert_same(shard((decode, prefill), k), wanted[place])
total = sum(int(w[1].nsa_cu_seqlens_k[-1]) for w in wanted)
assert np.asarray(tokens.addressable_data(0)).tolist() == [total]
print("equal on", len(jax.local_devices()), "devices")
