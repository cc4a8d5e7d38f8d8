"""Makes runs: federated training under attack, recorded as gradlens reads it."""

from gradlens.errors import InputError

try:
    import torch  # noqa: F401
except ImportError:
    raise InputError("simulations need torch: pip install 'gradlens-forensics[simulations]'") from None

from simulations.attacks import ATTACKS, SCHEDULES
from simulations.cohorts import malicious_clients
from simulations.measure import attack_success, label_counts, measure_of
from simulations.partition import PARTITIONS
from simulations.rounds import run
from simulations.scenario import Scenario, load_sweep, stored_scenario, sweep
from simulations.sweeps import run_sweep
from simulations.tasks import MODELS, TASKS

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
    "measure_of",
    "run",
    "run_sweep",
    "stored_scenario",
    "sweep",
]
