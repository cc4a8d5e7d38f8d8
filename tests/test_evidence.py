"""Evidence levels: what is recorded at each, what can be asked of it, and who is told that it cannot."""

import gc
import json
import weakref
from collections.abc import Callable

import numpy as np
import pytest

import gradlens
from gradlens import AGGREGATORS, DETECTORS, STATISTICS, CannotSay, Evidence, InputError, LogWriter, ModelSpec, Recorder
from gradlens.aggregators import filtered, mean
from gradlens.evaluation import auc
from gradlens.ingestion import with_csv_truth
from gradlens.integrations import Answer, kept
from gradlens.log import Round, UpdateLog, levels
from gradlens.log.writer import read_header
from planted import CLIENTS, CULPRIT, MODEL, PLANTED, STATE, clean_log

SKETCH = Evidence("sketch", width=8, seed=1)
LAYERS = Evidence("layers", ("fc2.weight", "fc2.bias"))
BIG = {  # two layers that are sketched at 512 numbers
    "fc1.weight": np.zeros((40, 60), np.float32),
    "fc1.bias": np.zeros(40, np.float32),
    "fc2.weight": np.zeros((30, 40), np.float32),
    "fc2.bias": np.zeros(30, np.float32),
    "fc3.weight": np.zeros((10, 30), np.float32),
    "fc3.bias": np.zeros(10, np.float32),
}


@pytest.fixture
def by_rows(monkeypatch):
    """A final weight of 24 numbers is too large to be recorded whole."""
    monkeypatch.setattr(levels, "WHOLE_SIZE", 20)
    levels._reduction.cache_clear()
    yield Evidence("sketch", width=4, seed=1)
    levels._reduction.cache_clear()


@pytest.fixture
def as_one(by_rows, monkeypatch):
    """It has too many rows, too."""
    monkeypatch.setattr(levels, "MOST_SKETCHED_ROWS", 3)
    return by_rows


# --- what is recorded


def test_each_level_records_what_it_says(by_rows):
    recorded = SKETCH.on(MODEL)
    shapes = {layer.name: layer.sketch_of and layer.shape for layer in recorded.model.layers}
    assert shapes == {"fc1.weight": (8,), "fc1.bias": None, "norm.count": None, "fc2.weight": None, "fc2.bias": None}
    assert recorded.summed == ("fc1.weight",)
    assert [layer.shape for layer in by_rows.on(MODEL).model.layers] == [(4,), (4,), (), (4, 4), (4,)]
    layers = LAYERS.on(MODEL)
    assert list(layers.model) == ["norm.count", "fc2.weight", "fc2.bias"]
    assert layers.summed == ("fc1.weight", "fc1.bias")
    assert (layers.model.final_weight, layers.model.final_bias) == ("fc2.weight", "fc2.bias")
    assert Evidence().on(MODEL).model is MODEL


def test_a_final_weight_is_whole_until_it_is_large_and_one_sketch_where_it_has_many_rows(as_one):
    def final(rows: int, columns: int) -> tuple[int, ...]:
        state = {"w": np.zeros((rows, columns), np.float32), "b": np.zeros(rows, np.float32)}
        return Evidence("sketch", seed=0).on(ModelSpec.of(state)).model["w"].shape

    assert final(2, 9) == (2, 9)
    assert final(3, 2_000) == (3, 512)
    assert final(3, 400) == (3, 400)
    assert final(4, 2_000) == (512,)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Evidence("some"), "level is one of full, layers, sketch, found 'some'"),
        (lambda: Evidence("layers"), "level 'layers' names the layers"),
        (lambda: Evidence("sketch", ("fc1.weight",)), "level 'layers' names the layers"),
        (lambda: Evidence("layers", "fc1.weight"), "level 'layers' names the layers"),
        (lambda: Evidence("sketch", width=0), "width is a whole number"),
        (lambda: Evidence("sketch", seed=-1), "seed is a whole number"),
        (lambda: Evidence("layers", ("head",)).on(MODEL), "no parameter layer 'head'"),
        (lambda: Evidence("layers", ("norm.count",)).on(MODEL), "no parameter layer 'norm.count'"),
        (lambda: Evidence.from_json({"level": "sketch"}), "not readable"),
        (lambda: Evidence.from_json({"level": "sketch", "layers": [], "width": 8, "seed": "x"}), "not readable"),
        (lambda: SKETCH.on(MODEL).of_round(LAYERS.of_log(clean_log(1))[0]), "recorded at another level"),
        (lambda: UpdateLog(SKETCH.on(MODEL).model, [clean_log(1)[0]]), "recorded as a sketch"),
    ],
)
def test_what_cannot_be_is_said(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_the_seed_is_a_secret_of_its_own_unless_it_is_given():
    one, other = Evidence("sketch"), Evidence("sketch")
    assert one.seed != other.seed
    assert one.seed > 2**64  # with a chance of 1 in 2^64 it is not
    assert str(one.seed) not in repr(one)
    assert Evidence.from_json(json.loads(json.dumps(one.to_json()))) == one
    assert Evidence.from_json(None) == Evidence()


def test_a_sketch_of_a_log_holds_the_sketches_of_its_updates_and_global_models_and_exact_norms():
    log = edited_log("boosted")
    part = SKETCH.of_log(log)
    reduction = SKETCH.on(MODEL)
    for whole, round_ in zip(log, part, strict=True):
        for row in range(len(whole)):
            arrays, moments = reduction.update({name: whole.updates[name][row] for name in MODEL}, None)
            for name, array in arrays.items():
                np.testing.assert_array_equal(round_.updates[name][row], array)
            np.testing.assert_array_equal(round_.moments["fc1.weight"][row], moments["fc1.weight"])
        for name in MODEL.parameters:
            np.testing.assert_allclose(round_.norms[name], whole.norms[name], rtol=1e-6)
        np.testing.assert_allclose(round_.total_norms, whole.total_norms, rtol=1e-6)
        np.testing.assert_array_equal(round_.comparable, whole.comparable)
        gram = round_.updates["fc1.weight"].astype(np.float64) @ round_.updates["fc1.weight"].T
        np.testing.assert_allclose(round_.gram["fc1.weight"], gram, rtol=1e-6)
        assert (round_.global_model["fc1.weight"].shape, round_.global_model["fc2.weight"].shape) == ((8,), (4, 6))


def edited_log(planted: str) -> UpdateLog:
    return PLANTED[planted].log()


def with_numbers(layer: str, value: float) -> UpdateLog:
    """The culprit sends one such number in a layer."""
    log = clean_log(2)
    rounds = []
    for round_ in log:
        updates = {name: np.array(array) for name, array in round_.updates.items()}
        updates[layer][CLIENTS.index(CULPRIT)].reshape(-1)[3] = value
        rounds.append(Round(round_.index, round_.clients, round_.num_examples, updates, STATE, {}, round_.buffers))
    return UpdateLog(MODEL, rounds)


@pytest.mark.parametrize("level", [SKETCH, LAYERS], ids=["sketch", "layers"])
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6, 1e30])
def test_who_is_comparable_is_judged_on_everything_that_was_sent(level, value):
    whole, part = with_numbers("fc1.weight", value), level.of_log(with_numbers("fc1.weight", value))
    np.testing.assert_array_equal(part[-1].finite, whole[-1].finite)
    np.testing.assert_array_equal(part[-1].comparable, np.array(CLIENTS) != CULPRIT)
    verdict = part.verdict(DETECTORS["layer_norms"]())
    assert verdict.scores[CLIENTS.index(CULPRIT)] == np.inf
    if level is SKETCH:  # nobody else's scores rest on it
        others = part.keep(np.array(CLIENTS) != CULPRIT)
        alone = others.verdict(DETECTORS["layer_cosines"]()).scores
        np.testing.assert_allclose(np.delete(part.verdict(DETECTORS["layer_cosines"]()).scores, 5), alone, rtol=1e-9)


def test_kurtosis_follows_from_moments_where_numbers_are_not_recorded():
    whole, part = STATISTICS["kurtosis"](clean_log(1)), STATISTICS["kurtosis"](SKETCH.of_log(clean_log(1)))
    np.testing.assert_allclose(part["fc1.weight"], whole["fc1.weight"], atol=2e-4)
    np.testing.assert_array_equal(part["fc2.weight"], whole["fc2.weight"])
    constant = with_numbers("fc1.weight", 0.0)
    for round_ in constant:
        round_.updates["fc1.weight"].flags.writeable = True
        round_.updates["fc1.weight"][:] = 3.0
    assert (STATISTICS["kurtosis"](SKETCH.of_log(constant))["fc1.weight"] == 0).all()


# --- what can be asked

ANSWER = {  # of every log
    *("final_bias", "final_bias_deviation", "final_bias_direction", "layer_norms", "layer_cosines"),
    *("aggregate_cosines", "global_cosines", "kurtosis", "spectral", "neighbour_distances", "neighbour_cosines"),
    *("accumulated_norms", "accumulated_spectral", "accumulated_neighbours", "accomplices", "label_drift_residual"),
    *("consistency", "persistence", "prediction_residual"),
    *("hdbscan", "isolation_forest", "local_outlier_factor", "bilgin", "krum", "multi_krum", "dnc", "flame", "rflbat"),
    *("foolsgold", "fldetector", "panel"),
}
NEED_NUMBERS = {
    *("sign_agreement", "large_share", "multi_metrics", "signguard", "alignins", "rlr", "flanders"),
}
NEED_A_FINAL_LAYER = {"neup", "threshold_exceedings", "final_spectrum", "tolpegin", "auror", "deepsight", "freqfed"}
NEED_ITS_ROWS = {"final_rows", "two_clusters", "agglomerative", "lfighter"}
NEED_MORE_THAN_A_LOG = {"ddif", "fltrust"}


def asked(name: str) -> Callable[[UpdateLog], str]:
    """Why a statistic or a detector of this name cannot say, '' if it can."""

    def detector(log: UpdateLog) -> str:
        settings = {"start": 2} if name == "fldetector" else {}
        return DETECTORS[name](**settings)(log).abstained

    def statistic(log: UpdateLog) -> str:
        try:
            STATISTICS[name](log)
        except CannotSay as reason:
            return str(reason)
        return ""

    return detector if name in DETECTORS else statistic


def test_for_every_statistic_and_detector_it_is_decided_what_it_says_of_sketches():
    decided = [ANSWER, NEED_NUMBERS, NEED_A_FINAL_LAYER, NEED_ITS_ROWS, NEED_MORE_THAN_A_LOG]
    assert set().union(*decided) == {*STATISTICS, *DETECTORS}
    assert sum(map(len, decided)) == len({*STATISTICS, *DETECTORS})


@pytest.mark.parametrize("name", [*STATISTICS, *(name for name in DETECTORS if name not in STATISTICS)])
def test_a_sketch_is_asked_for_what_it_can_say_and_for_nothing_else(name, request):
    log = clean_log(4)
    whole = asked(name)(log)
    assert bool(whole) == (name in NEED_MORE_THAN_A_LOG)
    for fixture, abstains in (
        ("", NEED_NUMBERS),
        ("by_rows", NEED_NUMBERS | NEED_A_FINAL_LAYER),
        ("as_one", NEED_NUMBERS | NEED_A_FINAL_LAYER | NEED_ITS_ROWS),
    ):
        level = request.getfixturevalue(fixture) if fixture else Evidence("sketch", width=8, seed=1)
        levels._reduction.cache_clear()
        reason = asked(name)(level.of_log(log))
        assert bool(reason) == (name in abstains | NEED_MORE_THAN_A_LOG), (fixture, reason)
        if name in NEED_NUMBERS:
            assert "was recorded as a sketch of" in reason


@pytest.mark.parametrize("name", AGGREGATORS)
@pytest.mark.parametrize("level", [SKETCH, LAYERS], ids=["sketch", "layers"])
def test_nothing_is_aggregated_of_what_is_not_whole(name, level):
    log = level.of_log(clean_log(2))
    with pytest.raises(InputError, match="nothing can be aggregated from it; aggregate where the updates are"):
        AGGREGATORS[name]()(log)


def test_what_needs_models_or_gradients_says_that_they_were_not_recorded():
    log = SKETCH.of_log(clean_log(2))
    with pytest.raises(CannotSay, match="of which not everything was recorded"):
        gradlens.statistics.ddif(log, predict=lambda state: np.full((2, 4), 0.25))
    with pytest.raises(CannotSay, match="not recorded in full, which the influence needs"):
        gradlens.influence(log, lambda state: {})
    assert "of which not everything was recorded" in DETECTORS["fltrust"](reference=lambda log: {})(log).abstained
    assert len(gradlens.sybils(log)) == len(gradlens.sybils(clean_log(2)))


def test_a_filter_decides_on_sketches_and_leaves_the_aggregation_to_others():
    log = SKETCH.of_log(edited_log("boosted"))
    rule = filtered(mean(), DETECTORS["layer_norms"](), action="clip")
    decision = rule.decision(log)
    whole = rule.decision(edited_log("boosted"))
    np.testing.assert_allclose(decision.weights, whole.weights, rtol=1e-5)
    assert decision.weights.min() < 0.5
    with pytest.raises(InputError, match="nothing can be aggregated"):
        rule(log)


def big_log(seed: int, culprits: int = 3) -> UpdateLog:
    """Twenty clients of whom the first pull fc1 their own common way, in each of four rounds."""
    rng = np.random.default_rng(seed)
    model, pull = ModelSpec.of(BIG), rng.normal(size=(40, 60))
    rounds = []
    for index in range(4):
        updates = {name: rng.normal(size=(20, *array.shape)).astype(np.float32) for name, array in BIG.items()}
        updates["fc1.weight"][:culprits] += 1.5 * pull
        rounds.append(Round(index, np.array([f"c{i:02d}" for i in range(20)]), np.ones(20), updates, BIG))
    return UpdateLog(model, rounds)


@pytest.mark.parametrize("name", ["krum", "spectral", "neighbour_cosines", "accumulated_neighbours", "foolsgold"])
def test_a_sketch_tells_the_same_clients_apart(name):
    def score(log: UpdateLog) -> np.ndarray:
        if name in DETECTORS:
            return log.verdict(DETECTORS[name]()).scores
        return STATISTICS[name](log)["fc1.weight"].to_numpy()

    log = big_log(0)
    whole, part = score(log), score(Evidence("sketch", seed=3).of_log(log))
    culprits = np.arange(20) < 3
    assert auc(part, culprits) == auc(whole, culprits)
    assert auc(whole, culprits) in (0, 1)  # Krum takes those nearest to one another for the best
    assert np.corrcoef(whole, part)[0, 1] > 0.9
    assert np.abs(whole - part).max() > 1e-3  # they are not the same numbers


def test_equal_updates_stay_equal():
    log = SKETCH.of_log(edited_log("equal pair"))
    for name in ("krum", "spectral", "layer_cosines", "foolsgold"):
        scores = log.verdict(DETECTORS[name]()).scores
        assert scores[CLIENTS.index("client-01")] == pytest.approx(scores[CLIENTS.index("client-08")], rel=1e-9)
    assert log[-1].squared_distances[1, 8] == 0


def test_parts_of_a_sketched_log_are_sketched_too():
    log = SKETCH.of_log(clean_log(3))
    part = log.keep(np.arange(4))
    assert not part[-1].is_whole
    np.testing.assert_array_equal(part[-1].norms["fc1.weight"], log[-1].norms["fc1.weight"][:4])
    with pytest.raises(CannotSay, match="sketch of 8 numbers"):
        part[-1].flat("fc1.weight")
    with pytest.raises(InputError, match="nothing can be aggregated"):
        log.combined(np.eye(12))
    assert log.only("fc1.weight")[0].moments.keys() == {"fc1.weight"}
    assert log.only("fc2.bias")[0].is_whole


# --- runs


def local(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: (array + rng.normal(size=array.shape)).astype(np.float32) for name, array in BIG.items()}


COHORT = {f"client-{i}": local(i) for i in range(6)}


@pytest.mark.parametrize(
    "asked_for", ["sketch", Evidence("sketch", width=64), Evidence("layers", ("fc3.weight", "fc3.bias"))], ids=str
)
def test_a_recorded_run_reads_as_the_log_would_be_reduced(tmp_path, asked_for):
    with Recorder(tmp_path / "part", evidence=asked_for) as recorder, Recorder(tmp_path / "whole") as other:
        for each in (recorder, other):
            each.log_round(BIG, {**COHORT, "odd": {"fc1.weight": BIG["fc1.weight"]}})
            each.commit(local(9))
            each.log_round(local(9), COHORT.items())
            each.commit(local(10))
    run, whole = gradlens.open(tmp_path / "part"), gradlens.open(tmp_path / "whole")
    assert run.verify().intact
    assert (run.evidence, run.model) == (recorder.evidence, whole.model)
    for round_, reduced in zip(run.log, recorder.evidence.of_log(whole.log), strict=True):
        assert round_.refused == reduced.refused
        for parts in ("updates", "moments", "global_model"):
            found, expected = getattr(round_, parts), getattr(reduced, parts)
            assert list(found) == list(expected)
            for name in found:
                np.testing.assert_array_equal(found[name], expected[name])
    for found, expected in zip(run.states(), whole.states(), strict=True):
        assert all(np.array_equal(found[name], expected[name]) for name in BIG)
    shares = [sum(f.stat().st_size for f in (tmp_path / each / "updates").iterdir()) for each in ("part", "whole")]
    assert shares[0] < shares[1] / 2


def test_a_run_goes_on_with_its_own_signs_and_at_no_other_level(tmp_path):
    with Recorder(tmp_path / "run", evidence="sketch") as recorder:
        recorder.log_round(BIG, COHORT)
        recorder.commit(BIG)
        recorder.leave_open()
    with pytest.raises(InputError, match="the run records 'sketch of 512 numbers a layer', 'full' was asked for"):
        Recorder(tmp_path / "run")
    with Recorder(tmp_path / "run", evidence="sketch") as again:
        assert again.evidence.seed == recorder.evidence.seed
        again.log_round(local(3), COHORT)  # not where the last round ended: an empty one stands between
        again.commit(BIG)
    log = gradlens.open(tmp_path / "run").log
    assert [len(round_) for round_ in log] == [6, 0, 6]
    assert log[2].moments.keys() == log[1].moments.keys() == {"fc1.weight", "fc2.weight"}


def test_a_writer_takes_whole_rounds_and_an_archive_can_be_thinned_out(tmp_path):
    log = big_log(0)
    with LogWriter.create(tmp_path / "run", log.model, BIG, evidence=Evidence("sketch", seed=4)) as writer:
        writer.commit(log[0], BIG)
        writer.commit(writer.evidence.of_log(log)[1], BIG)
    found, expected = gradlens.open(tmp_path / "run").log, Evidence("sketch", seed=4).of_log(log)
    for number in range(2):
        np.testing.assert_array_equal(found[number].gram["fc1.weight"], expected[number].gram["fc1.weight"])


def test_a_reduced_run_is_not_taken_for_a_whole_one(tmp_path):
    with Recorder(tmp_path / "run", evidence="sketch") as recorder:
        recorder.log_round(BIG, COHORT)
    header = json.loads((tmp_path / "run/run.json").read_text())
    assert (header["format"], header["evidence"]["level"]) == (2, "sketch")
    with Recorder(tmp_path / "whole") as recorder:
        recorder.log_round(BIG, COHORT)
    assert json.loads((tmp_path / "whole/run.json").read_text()).keys() == header.keys() - {"evidence"}
    (tmp_path / "run/run.json").write_text(json.dumps({k: v for k, v in header.items() if k != "evidence"}))
    with pytest.raises(InputError, match="a run of format 2 must have the key 'evidence'"):
        read_header(tmp_path / "run")


def test_a_framework_weighs_every_layer_down_whatever_of_it_is_recorded():
    softly = filtered(mean(), DETECTORS["layer_norms"](), action="down_weight")
    big = {name: BIG[name] + 30 * (array - BIG[name]) for name, array in local(7).items()}
    answers = [Answer(None, name, state, 10) for name, state in {**COHORT, "big": big}.items()]
    changed = [
        kept(Recorder(filter=softly, evidence=level), BIG, answers)[-1].state
        for level in (Evidence("layers", ("fc3.weight",)), Evidence("sketch", seed=1), "full")
    ]
    assert all(set(each) == set(BIG) for each in changed)
    assert np.abs(changed[1]["fc1.bias"]).max() < np.abs(big["fc1.bias"]).max() / 1.5
    for name in BIG:
        np.testing.assert_allclose(changed[1][name], changed[2][name], rtol=1e-3)


@pytest.mark.parametrize("level", ["sketch", "full"])
def test_below_full_no_answer_is_held_once_the_next_one_comes(level):
    alive: list[weakref.ref] = []
    most = 0

    class Big(np.ndarray):
        """An array that can be seen to be gone."""

    def answers():
        nonlocal most
        for number in range(30):
            state = local(number)
            owner = Big(BIG["fc1.weight"].shape, np.float32)
            owner[...] = state["fc1.weight"]
            state["fc1.weight"] = owner
            del owner
            alive.append(weakref.ref(state["fc1.weight"]))
            yield f"client-{number:02d}", state
            del state
            gc.collect(0)
            most = max(most, sum(each() is not None for each in alive))

    recorder = Recorder(evidence=level)
    recorder.log_round(BIG, answers())
    assert len(recorder.log[0]) == 30
    assert most <= 1 if level == "sketch" else most > 20


def test_a_run_without_whole_updates_is_inspected_asked_and_reported(tmp_path):
    from typer.testing import CliRunner

    from gradlens.cli import app

    log = big_log(1)
    with Recorder(tmp_path / "run", evidence="sketch", sent="updates", detector="spectral") as recorder:
        for round_ in log:
            sent = {str(c): {n: round_.updates[n][i] for n in BIG} for i, c in enumerate(round_.clients)}
            recorder.log_round(BIG, sent)
            recorder.commit(BIG)
    (tmp_path / "truth.csv").write_text("client\nc00\nc01\nc02\n")
    with_csv_truth(tmp_path / "run", tmp_path / "truth.csv")

    def says(*words: str) -> str:
        said = CliRunner().invoke(app, list(words))
        assert said.exit_code == 0, (words, said.output)
        return said.output

    run, page = str(tmp_path / "run"), tmp_path / "page.html"
    assert "sketch of 512 numbers a layer" in says("inspect", run)
    assert "3980" in says("inspect", run)  # parameters that were sent
    assert "c01" in says("detect", run, "--detector", "spectral")
    assert "was recorded as a sketch of 512 numbers" in says("detect", run, "--detector", "signguard")
    assert "fc1.weight" in says("localize", run)
    says("report", run, "-o", str(page))
    assert "fc1.weight" in page.read_text()
