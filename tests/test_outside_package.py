"""A package of somebody else's adds a detector and an attack by entry points: listed, used by name, gone when it is."""

import json
import os
import shutil
import subprocess
import sys

import pytest

import gradlens

MODULE = '''"""A detector and an attack of somebody else's."""
from functools import partial

import numpy as np

from gradlens.detectors import score_by
from gradlens.scorers import robust_zscore
from gradlens.statistics import layer_norms
from simulations.attacks import Attack


def loud(threshold: float = 4.0):
    """Flags clients whose update is long in some layer."""
    return score_by(layer_norms, robust_zscore, threshold=threshold)


def reverse(factor: float = 2.0) -> Attack:
    """Sends the negative of what was trained, several times over."""

    def send(updates, benign, situation):
        return {name: -factor * np.asarray(array) for name, array in updates.items()}

    return Attack(send=send)
'''
ENTRY_POINTS = """[gradlens.detectors]
loud = acme_lens:loud
krum = acme_lens:loud

[gradlens.attacks]
reverse = acme_lens:reverse
"""
SCENARIO = """rounds = 2
num_clients = 6
num_malicious = 1
attack = { reverse = { factor = 3.0 } }
detector = { loud = { threshold = 5.0 } }
"""


@pytest.fixture
def site(tmp_path):
    """A folder as pip leaves it: the module and the metadata of its distribution."""
    folder = tmp_path / "site"
    information = folder / "acme_lens-1.2.dist-info"
    information.mkdir(parents=True)
    (folder / "acme_lens.py").write_text(MODULE)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-lens\nVersion: 1.2\n")
    (information / "entry_points.txt").write_text(ENTRY_POINTS)
    (tmp_path / "s.toml").write_text(SCENARIO)
    return folder


def ran(site, *words: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join(part for part in (str(site), os.environ.get("PYTHONPATH", "")) if part)
    code = "from gradlens.cli import main; main()"
    environment = os.environ | {"PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=site.parent, env=environment
    )


def test_it_is_listed_used_by_name_and_gone_when_it_is_uninstalled(site):
    listed = json.loads(ran(site, "list", "--json").stdout)
    (loud,) = (row for row in listed["detectors"] if row["name"] == "loud")
    assert (loud["from"], loud["summary"]) == ("acme-lens 1.2", "Flags clients whose update is long in some layer.")
    assert [row["from"] for row in listed["detectors"] if row["name"] == "krum"] == ["built in"]
    assert [row["from"] for row in listed["attacks"] if row["name"] == "reverse"] == ["acme-lens 1.2"]
    assert "detectors: loud (from acme-lens 1.2)" in ran(site, "doctor").stdout

    simulated = ran(site, "simulate", "s.toml", "-o", "run")
    assert simulated.returncode == 0, simulated.stderr
    run = gradlens.open(site.parent / "run")
    assert run.scenario["attack"] == {"reverse": {"factor": 3.0}}
    assert run.scenario["detector"] == {"loud": {"threshold": 5.0}}
    assert set(run.verdicts["detector"]) == {"loud(threshold=5)"}
    flags = ran(site, "detect", "run", "-d", "loud", "--csv")
    assert flags.returncode == 0, flags.stderr
    assert flags.stdout.splitlines()[1].split(",")[2] == "loud"

    shutil.rmtree(site)
    site.mkdir()
    assert "acme" not in ran(site, "list").stdout
    for words in (["detect", "run", "-d", "loud"], ["simulate", "s.toml", "-o", "again"]):
        done = ran(site, *words)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert "loud" in done.stderr or "reverse" in done.stderr
    assert ran(site, "inspect", "run").returncode == 0
    assert ran(site, "verify", "run").returncode == 0
