"""What holds for every detector that judges a round by distances or directions alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import planted
from gradlens.detectors.directions import alignins, fltrust, rlr, signguard
from gradlens.detectors.distances import dnc, krum, multi_krum, multi_metrics
from one_round import log_of

seeds = st.integers(0, 2**32 - 1)


def mean_update(log):
    """A reference: the mean of the clients, as if the server had data of its own like theirs."""
    return {name: np.asarray(log[-1].updates[name], np.float64).mean(axis=0) for name in log.model}


DETECTORS = {
    "alignins": alignins(),
    "rlr": rlr(),
    "fltrust": fltrust(mean_update),
    "signguard": signguard(),
    "krum": krum(),
    "multi_krum": multi_krum(),
    "multi_metrics": multi_metrics(),
    "multi_metrics, as coded": multi_metrics(features="code"),
    "multi_metrics, centred": multi_metrics(centred=True),
    "dnc": dnc(),
}
every_detector = pytest.mark.parametrize("detector", DETECTORS.values(), ids=list(DETECTORS))


def random_log(seed, clients=9):
    """Clients of different sizes with a direction in common; some numbers are 0, as behind a unit that never fires."""
    rng = np.random.default_rng(seed)
    sizes = rng.lognormal(0, 0.5, (clients, 1))
    layers = [sizes * (rng.normal(size=n) + rng.normal(size=(clients, n))) for n in (70, 31)]
    for layer in layers:
        layer[rng.random(layer.shape) < 0.2] = 0
    return log_of(*layers, state=[rng.normal(size=70), rng.normal(size=31)])


@every_detector
@settings(deadline=None, max_examples=20)
@given(seed=seeds, first=st.integers(0, 8), second=st.integers(0, 8))
def test_a_sybil_pair_has_one_score_and_one_fate(detector, seed, first, second):
    log = random_log(seed)
    rows = {name: np.array(a) for name, a in log[-1].updates.items()}
    for array in rows.values():
        array[second] = array[first]
    verdict = detector(log_of(*rows.values(), state=list(log[-1].global_model.values())))
    assert verdict.scores[first] == pytest.approx(verdict.scores[second], rel=1e-9)
    assert verdict.flags[first] == verdict.flags[second]


@every_detector
@pytest.mark.parametrize("scale", [1e-6, 1e3])
def test_scores_have_no_unit(detector, scale):
    log = random_log(3)
    model = [scale * array for array in log[-1].global_model.values()]
    larger = log_of(*(scale * array for array in log[-1].updates.values()), state=model)
    np.testing.assert_allclose(detector(larger).scores, detector(log).scores, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(detector(larger).flags, detector(log).flags)


@every_detector
@settings(deadline=None, max_examples=20)
@given(seed=seeds)
def test_order_of_clients_changes_nothing(detector, seed):
    log, order = random_log(seed), np.random.default_rng(seed).permutation(9)
    verdict, shuffled = detector(log), detector(planted.taken(log, order))
    np.testing.assert_allclose(shuffled.scores, verdict.scores[order], rtol=1e-7, atol=1e-12)
    np.testing.assert_array_equal(shuffled.flags, verdict.flags[order])
