"""Makes runs: federated training under attack, recorded as gradlens reads it."""

from simulations.attacks import ATTACKS, SCHEDULES
from simulations.cohorts import malicious_clients
from simulations.federated import attack_success, label_counts, run
from simulations.partition import PARTITIONS
from simulations.sweeps import run_sweep
from simulations.tasks import MODELS, TASKS

# isort: split
from simulations.scenario import Scenario, load_sweep, sweep  # after the module that is called sweep, too

__all__ = [
    "ATTACKS",
    "MODELS",
    "PARTITIONS",
    "SCHEDULES",
    "TASKS",
    "Scenario",
    "attack_success",
    "label_counts",
    "load_sweep",
    "malicious_clients",
    "run",
    "run_sweep",
    "sweep",
]
