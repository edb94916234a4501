"""The command line of the benchmarks."""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import click
import jax
from rich.console import Console
from rich.progress import track

from benchmarks import roofline as roofline_suite
from benchmarks.measure import device_time
from jaxnsa.implementations import get_kernel_info

RESULTS = Path(__file__).parent / "results"
