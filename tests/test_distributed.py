"""Several processes on JAX's own engine, `jax.distributed`: each computes for its requests."""

import os
import socket
import subprocess
import sys
from pathlib import Path


def test_two_processes_of_four_devices_equal_one():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    script = Path(__file__).with_name("distributed_process.py")
    paths = [str(Path(__file__).parent), *sys.path]
    environment = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    processes = [
        subprocess.Popen(
            [sys.executable, script, coordinator, "2", str(process)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
        assert "equal on 4 devices" in output
