"""Keras on torch: real models, trained a little, as a server records them and as their arrays are ingested."""

import os

os.environ.setdefault("KERAS_BACKEND", "torch")

import numpy as np
import pytest
from needed import needed

keras, torch = needed("keras", "torch")

import gradlens  # noqa: E402
from gradlens import STATISTICS, Recorder  # noqa: E402
from gradlens.ingestion import ingest  # noqa: E402
from gradlens.log.adapters import pairs_of, with_products  # noqa: E402
from gradlens.log.global_model import spec_of  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"  # of Keras's own variables
)
INPUTS, CLASSES, CLIENTS, SOURCE, TARGET = 8, 4, 6, 0, 2
Dense, Input = keras.layers.Dense, keras.layers.Input


@pytest.fixture(autouse=True)
def _alike():
    """One thread, one seed, and names of layers that count from the start."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    keras.utils.clear_session()
    keras.utils.set_random_seed(0)
    yield
    torch.set_num_threads(threads)


def normalized(outputs=CLASSES):
    """A model with batch normalization, whose kernels are [in, out]."""
    layers = [Dense(6), keras.layers.BatchNormalization(), keras.layers.ReLU(), Dense(outputs, activation="softmax")]
    return keras.Sequential([Input((INPUTS,)), *layers])


def two_headed(*, first, names=("main", "aux")):
    """A model with an auxiliary head, which stands before or behind the main one."""
    inputs = Input((INPUTS,))
    low = Dense(6, activation="relu", name="low")(inputs)
    high = Dense(5, activation="relu", name="high")(low)
    if first:
        aux, main = Dense(3, name=names[1])(low), Dense(CLASSES, name=names[0])(high)
    else:
        main, aux = Dense(CLASSES, name=names[0])(high), Dense(3, name=names[1])(low)
    return keras.Model(inputs, [aux, main] if first else [main, aux])


def named(model):
    return {variable.path: variable.numpy() for variable in model.weights}


def placed(model):
    return {str(place): array for place, array in enumerate(model.get_weights())}


def data(client):
    """Groups of points; the last client calls those of one class by another."""
    rng = np.random.default_rng(client)
    labels = rng.integers(0, CLASSES, 200)
    points = np.eye(CLASSES, INPUTS)[labels] * 3 + rng.normal(size=(200, INPUTS))
    if client == CLIENTS - 1:
        labels = np.where(labels == SOURCE, TARGET, labels)
    return points.astype(np.float32), labels


def rounds(model, states=named, number=3):
    """The global model of each round and what the clients make of it: real training, averaged."""
    model.compile(keras.optimizers.SGD(0.05), "sparse_categorical_crossentropy")
    for _ in range(number):
        weights, before, sent = model.get_weights(), states(model), {}
        trained = []
        for client in range(CLIENTS):
            model.set_weights(weights)
            model.fit(*data(client), epochs=1, batch_size=20, shuffle=False, verbose=0)
            sent[f"client-{client}"] = states(model)
            trained.append(model.get_weights())
        model.set_weights([np.mean(arrays, axis=0) for arrays in zip(*trained, strict=True)])
        yield before, sent, states(model)


def test_a_model_is_recorded_with_its_final_layer_and_its_buffers(tmp_path):
    with Recorder(tmp_path / "run") as recorder:
        for before, sent, after in rounds(normalized()):
            assert recorder.log_round(before, sent).kept == list(sent)
            recorder.commit(after)
    run = gradlens.open(tmp_path / "run")
    assert run.verify().intact
    assert [(len(round_), round_.refused) for round_ in run.log] == [(CLIENTS, {})] * 3
    model = run.model
    assert model.buffers == tuple(f"sequential/batch_normalization/moving_{what}" for what in ("mean", "variance"))
    assert (model.final_weight, model.final_bias) == ("sequential/dense_1/kernel", "sequential/dense_1/bias")
    assert (model[model.final_weight].shape, model.num_units(model.final_weight)) == ((6, CLASSES), CLASSES)
    assert model.found_final_layer.certainty == "certain"
    assert all(np.abs(run.log[0].updates[name]).max() > 0 for name in model.buffers)  # they move, and are no statistic
    table = STATISTICS["layer_norms"](run.log)
    assert not [column for column in table if "moving" in column]


def test_units_of_a_kernel_are_its_columns():
    *_, (before, sent, _) = rounds(normalized(), number=1)
    recorder = Recorder()
    recorder.log_round(before, sent)
    log = recorder.log
    bias, kernel = "sequential/dense_1/bias", "sequential/dense_1/kernel"
    moved = {name: np.stack([state[name] - before[name] for state in sent.values()]) for name in (bias, kernel)}
    apart = {name: rows - np.median(rows, axis=0) for name, rows in moved.items()}
    drift, columns = STATISTICS["final_bias"](log), STATISTICS["final_rows"](log)
    np.testing.assert_allclose(moved[bias].sum(axis=1), 0, atol=1e-5)  # as the bias of a softmax under SGD
    np.testing.assert_allclose(drift.loc[list(sent)], apart[bias], atol=1e-6)
    np.testing.assert_allclose(columns.loc[list(sent)], np.linalg.norm(apart[kernel], axis=1), rtol=1e-4)
    culprit = f"client-{CLIENTS - 1}"
    labels = gradlens.suspected_labels(log).loc[culprit]
    assert (labels["target"], labels["source"]) == (TARGET, SOURCE)
    assert (drift[f"{bias}[{TARGET}]"].idxmax(), drift[f"{bias}[{SOURCE}]"].idxmin()) == (culprit, culprit)


def test_weights_without_names_say_as_much_as_those_with():
    found = []
    for states in (named, placed):
        keras.utils.clear_session()
        keras.utils.set_random_seed(0)
        recorder = Recorder()
        for before, sent, after in rounds(normalized(), states, number=2):
            recorder.log_round(before, sent)
            recorder.commit(after)
        found.append(recorder.log)
    model = found[1].model
    assert (model.final_weight, model.final_bias, set(model.buffers)) == ("6", "7", {"4", "5"})
    for statistic in ("final_bias", "final_rows"):
        expected, same = (STATISTICS[statistic](log).to_numpy() for log in found)
        np.testing.assert_array_equal(same, expected)


@pytest.mark.parametrize("first", [True, False], ids=["aux first", "aux last"])
def test_an_auxiliary_head_is_not_taken_for_the_one_that_answers(first):
    model = two_headed(first=first)
    spec = spec_of(named(model))
    assert (spec.final_weight, spec.final_bias) == ("main/kernel", "main/bias")
    assert spec.num_units("main/kernel") == CLASSES
    for states in (named(two_headed(first=first, names=("one", "other"))), placed(model)):
        spec = spec_of(states)
        assert spec.final_weight is spec.final_bias is None
        assert "may each answer" in spec.found_final_layer.why


def test_where_a_square_kernel_has_no_name_its_columns_are_not_guessed():
    model = normalized(outputs=6)
    assert spec_of(named(model)).final_weight == "sequential/dense_1/kernel"
    assert spec_of(placed(model)).final_weight is None


def test_further_layers_are_read_as_they_are_meant():
    normalization, spectral = keras.layers.Normalization(), keras.layers.SpectralNormalization(Dense(6))
    model = keras.Sequential([Input((INPUTS,)), normalization, spectral, keras.layers.Dropout(0.1), Dense(CLASSES)])
    normalization.adapt(data(0)[0])
    spec = spec_of({variable.path: variable for variable in model.variables})  # as they are, seeds among them
    assert {name.split("/")[-1] for name in spec.buffers} >= {"mean", "variance", "count", "vector_u"}
    assert {name.split("/")[-1] for name in spec.parameters} == {"kernel", "bias"}
    words = keras.Sequential([Input((5,)), keras.layers.Embedding(20, 6), keras.layers.LSTM(5), Dense(3)])
    assert spec_of(named(words)).final_bias == "sequential_1/dense_2/bias"
    images = [keras.layers.Conv2D(6, 3), keras.layers.BatchNormalization(), keras.layers.Flatten(), Dense(10)]
    spec = spec_of(named(keras.Sequential([Input((8, 8, 1)), *images])))
    assert spec.num_units(str(spec.final_weight)) == 10
    assert [name.split("/")[-1] for name in spec.buffers] == ["moving_mean", "moving_variance"]


def test_adapters_are_judged_by_what_they_add_to_the_kernel():
    model = normalized()
    dense = model.layers[0]
    dense.enable_lora(2, lora_alpha=2)  # by which the product is multiplied with 1
    (before, sent, _), kernels = next(rounds(model, number=1)), []
    (pair,) = pairs_of(spec_of(before))
    frozen = sent["client-0"]["sequential/dense/kernel"]
    np.testing.assert_array_equal(frozen, before["sequential/dense/kernel"])
    recorder = Recorder()
    recorder.log_round(before, sent)
    updates = with_products(recorder.log)[-1].updates[pair.name]
    for state in [before, *sent.values()]:
        model.set_weights(list(state.values()))
        kernels.append(keras.ops.convert_to_numpy(dense.kernel))  # with its adapter
    for update, kernel in zip(updates, kernels[1:], strict=True):
        np.testing.assert_allclose(update, kernel - kernels[0], atol=1e-6)
        assert np.abs(update).max() > 1e-4


def test_arrays_in_files_become_a_run(tmp_path):
    folder = tmp_path / "in"
    states = list(rounds(normalized()))
    for number, (before, sent, _) in enumerate(states):
        (folder / f"round_{number}").mkdir(parents=True)
        np.savez(folder / f"global_{number}.npz", **before)
        for client, state in sent.items():
            np.savez(folder / f"round_{number}" / f"{client}.npz", **state)
    done = ingest(folder, tmp_path / "run")
    assert done.faults == ()
    bias = str(done.run.model.final_bias)
    assert bias == "sequential/dense_1/bias"
    for round_, (before, sent, _) in zip(done.run.log, states, strict=True):
        expected = [sent[client][bias] - before[bias] for client in round_.clients]
        np.testing.assert_array_equal(round_.updates[bias], expected)
        np.testing.assert_array_equal(round_.global_model["sequential/dense/kernel"], before["sequential/dense/kernel"])


@pytest.mark.parametrize("name", ["client_{}.keras", "client_{}.weights.h5"])
def test_files_that_keras_writes_are_one_line(tmp_path, command, name):
    model = normalized()
    for client in range(3):
        path = tmp_path / "round_0" / name.format(client)
        path.parent.mkdir(exist_ok=True)
        model.save(path) if name.endswith(".keras") else model.save_weights(path)
    for source in (tmp_path, tmp_path / "round_0" / name.format(0)):
        code, out, complaint = command("ingest", source, "-o", tmp_path / "run")
        assert (code, out) == (2, "")
        (line,) = complaint.splitlines()
        assert "numpy.savez('round_3/client_7.npz', **{v.path: v.numpy() for v in model.weights})" in line
    assert not (tmp_path / "run").exists()


def test_what_that_line_says_works(tmp_path):
    for client in range(3):
        model = normalized()
        np.savez(tmp_path / f"round_3_client_{client}.npz", **{v.path: v.numpy() for v in model.weights})
        keras.utils.clear_session()
    assert ingest(tmp_path, tmp_path / "run").run.log[0].clients.tolist() == ["0", "1", "2"]
