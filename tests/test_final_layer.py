"""Which layer answers: found by names, order and shapes, named by the user, or unknown."""

import re
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import gradlens
from gradlens import DETECTORS, STATISTICS, CannotSay, InputError, ModelSpec, Recorder, Round, UpdateLog
from gradlens.ingestion import ingest
from gradlens.integrations import Answer, kept
from gradlens.log.global_model import found_buffers, spec_of


def shapes(**layers):
    return {name.replace("__", "."): np.zeros(shape) for name, shape in layers.items()}


def alphabetical(state):
    return dict(sorted(state.items()))


class Net(nn.Module):
    """Modules in the order in which they are given."""

    def __init__(self, **modules):
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)


MLP = {"0.weight": (6, 8), "0.bias": (6,), "2.weight": (4, 6), "2.bias": (4,)}
KERAS = {"dense/kernel": (8, 6), "dense/bias": (6,), "out/kernel": (6, 4), "out/bias": (4,)}
FLAX = {
    "params/Conv_0/bias": (8,), "params/Conv_0/kernel": (3, 3, 1, 8), "params/Dense_0/bias": (16,),
    "params/Dense_0/kernel": (392, 16), "params/Dense_1/bias": (10,), "params/Dense_1/kernel": (16, 10),
}  # fmt: skip
NUMBERED = {f"layers.{i}.{part}": s for i in ("0", "12", "8") for part, s in (("bias", (6,)), ("weight", (6, 6)))}
FOUND = [
    (MLP, "2.weight", "2.bias", 4),
    (KERAS, "out/kernel", "out/bias", 4),
    (FLAX, "params/Dense_1/kernel", "params/Dense_1/bias", 10),
    (NUMBERED, "layers.12.weight", "layers.12.bias", 6),
    ({"0": (6, 8), "1": (6,), "2": (4, 6), "3": (4,)}, "2", "3", 4),
    ({"0": (8, 6), "1": (6,), "2": (6, 4), "3": (4,)}, "2", "3", 4),
    ({"head.weight": (4, 6), "head.bias": (4,), "body.weight": (6, 8)}, "head.weight", "head.bias", 4),
    ({"fc.weight": (4, 6), "aux.fc.weight": (4, 3), "body.weight": (6, 8)}, "fc.weight", None, 4),
    ({"up.weight": (8, 3, 2, 2), "up.bias": (3,)}, "up.weight", "up.bias", 3),
    ({"c.weight": (8, 3, 3, 3), "deconv.weight": (8, 8, 2, 2), "deconv.bias": (8,)}, "deconv.weight", "deconv.bias", 8),
    ({"b.weight": (8, 3, 3, 3), "outc.weight": (5, 8, 1, 1), "outc.bias": (5,)}, "outc.weight", "outc.bias", 5),
    ({"a.weight": (6, 8), "b.bias": (1,), "b.weight_g": (1, 1), "b.weight_v": (1, 6)}, "b.weight_v", "b.bias", 1),
    ({"user.weight": (6, 9), "item.weight": (4, 9), "rating.weight": (3, 10)}, "rating.weight", None, 3),
    ({"wte.weight": (50, 8), "mlp.weight": (8, 8), "lm_head.weight": (50, 8)}, "lm_head.weight", None, 50),
]  # fmt: skip


@pytest.mark.parametrize(("layers", "weight", "bias", "outputs"), FOUND, ids=lambda value: None)
def test_the_layer_that_answers_is_found(layers, weight, bias, outputs):
    model = spec_of({name: np.zeros(shape) for name, shape in layers.items()})
    assert (model.final_weight, model.final_bias) == (weight, bias)
    assert model.num_units(weight) == outputs
    assert model.found_final_layer.certainty in ("certain", "likely")


@pytest.mark.parametrize(
    "layers",
    [
        pytest.param({"a.weight": (4, 6), "b.weight": (6, 8), "a.z": (1,)}, id="the last feeds the first"),
        pytest.param({"b.weight": (6, 8), "head1.weight": (3, 6), "head2.weight": (4, 6)}, id="two heads"),
        pytest.param({"wte.weight": (50, 8), "mlp.weight": (32, 8), "proj.weight": (8, 32)}, id="a tied head"),
        pytest.param({"0": (8, 6), "1": (6,), "2": (4, 4), "3": (4,)}, id="a square matrix without a name"),
        pytest.param({"fc.weight": (4, 6), "body.weight": (6, 8), "project.weight": (16, 6)}, id="a projection last"),
        pytest.param({"0": (8, 6), "1": (6,), "2": (6, 4), "3": (4,), "4": (6, 3), "5": (3,)}, id="two ends, no names"),
        pytest.param({"z.weight": (6, 8), "main.weight": (4, 6), "side.weight": (3, 6)}, id="two ends"),
        pytest.param({"z.weight": (6, 1, 3, 3), "fc2.weight": (4, 24), "loc.weight": (2, 24)}, id="a localization"),
        pytest.param({"q.lora_A.weight": (2, 8), "q.lora_B.weight": (8, 2)}, id="adapters alone"),
        pytest.param({"b": (5,)}, id="vectors alone"),
    ],
)
def test_where_it_is_not_sure_nothing_is_named(layers):
    model = spec_of({name: np.zeros(shape) for name, shape in layers.items()})
    assert model.final_weight is model.final_bias is None
    assert model.found_final_layer.certainty == "unknown"
    with pytest.raises(CannotSay):
        STATISTICS["final_rows"](log_of(model, {name: np.zeros(shape) for name, shape in layers.items()}))


def log_of(model, state, clients=4):
    rng = np.random.default_rng(0)
    state = {name: np.asarray(array, np.float32) for name, array in state.items()}
    updates = {name: rng.normal(size=(clients, *array.shape)).astype(np.float32) for name, array in state.items()}
    names = np.array([f"c{i}" for i in range(clients)])
    return UpdateLog(model, [Round(0, names, np.ones(clients, int), updates, state, {}, model.buffers)])


def test_heads_of_torch_are_found_whatever_wraps_them_or_stands_behind_them():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # both forms are in use
        wraps = [nn.utils.spectral_norm, nn.utils.weight_norm, *vars(nn.utils.parametrizations).values()]
        wraps = [wrap for wrap in wraps if getattr(wrap, "__name__", "") in ("spectral_norm", "weight_norm")]
        models = [nn.Sequential(nn.Linear(8, 6), wrap(nn.Linear(6, 5))) for wrap in wraps]
    assert len(models) == 4
    for model in models:
        spec = spec_of(model.state_dict())
        assert (spec.final_bias, spec.num_units(str(spec.final_weight))) == ("1.bias", 5)
        assert len(spec.buffers) in (0, 2)  # u and v, that are no more than a hint for the next step
    recurrent = Net(embed=nn.Embedding(20, 8), fc=nn.Linear(16, 20), lstm=nn.LSTM(8, 16))
    auxiliary = Net(conv=nn.Conv2d(1, 8, 3), fc=nn.Linear(32, 10), aux_head=nn.Linear(8, 10))
    for model in (recurrent, auxiliary):
        assert spec_of(model.state_dict()).final_weight == "fc.weight"
        assert spec_of(alphabetical(model.state_dict())).final_weight == "fc.weight"
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    words = Net(embed=nn.Embedding(30, 16), encoder=nn.TransformerEncoder(layer, 2), decoder=nn.Linear(16, 30))
    assert spec_of(words.state_dict()).final_bias == "decoder.bias"


@pytest.mark.parametrize("name", ["head", "head.weight", "head.bias"])
def test_a_final_layer_is_named_by_its_weight_bias_or_module(name, tmp_path):
    state = shapes(head__weight=(4, 6), head__bias=4, other__weight=(9, 6), other__bias=9)
    spec = spec_of(state, final_layer=name)
    assert (spec.final_weight, spec.final_bias) == ("head.weight", "head.bias")
    recorder = Recorder(final_layer=name)
    kept(recorder, state, [Answer(None, f"c{i}", state, 1) for i in range(3)])
    assert recorder.log.model.final_bias == "head.bias"
    for client in "abc":
        np.savez(tmp_path / f"round_0_client_{client}.npz", **state)
    assert ingest(tmp_path, tmp_path / "run", final_layer=name).run.model.final_bias == "head.bias"


def test_a_final_layer_that_is_not_there_is_an_error():
    state = shapes(a__weight=(4, 6), a__bias=4)
    with pytest.raises(InputError, match="final layer: the model has no layer 'b', only 'a"):
        spec_of(state, final_layer="b")
    with pytest.raises(InputError, match="no layer 'b'"):
        Recorder(final_layer="b").log_round(state, {"c": state})


def test_inspect_says_what_was_found_why_and_how_surely(tmp_path):
    from gradlens.cli.inspect import _run_facts

    state = shapes(head__weight=(4, 6), head__bias=4, body__weight=(6, 8))
    for name, path in ((None, tmp_path / "found"), ("body", tmp_path / "named")):
        with Recorder(path, final_layer=name) as recorder:
            recorder.log_round(state, {f"c{i}": state for i in range(3)})
            recorder.commit(state)
    assert _run_facts(gradlens.open(tmp_path / "found"))["final layer"] == (
        "head.weight, head.bias (likely: named as a head, and no other layer takes its outputs)"
    )
    assert _run_facts(gradlens.open(tmp_path / "named"))["final layer"] == "body.weight (as recorded)"


def transposed(log):
    """The log of the same numbers as a Keras model holds them: kernels are [in, out]."""
    turn = {"fc1.weight": "dense/kernel", "fc1.bias": "dense/bias", "fc2.weight": "out/kernel", "fc2.bias": "out/bias"}
    rounds = []
    for round_ in log:
        updates = {turn[n]: np.swapaxes(round_.updates[n], 1, -1) for n in turn}
        state = {turn[n]: np.transpose(round_.global_model[n]) for n in turn}
        rounds.append(Round(round_.index, round_.clients, round_.num_examples, updates, state))
    return UpdateLog(spec_of(rounds[0].global_model), rounds)


FINAL = [name for name in STATISTICS if name.startswith("final_") or name in ("neup", "threshold_exceedings")]


@pytest.mark.parametrize("name", FINAL)
def test_statistics_of_kernels_are_those_of_the_same_numbers_in_torch(name):
    from gradlens.examples import example_log

    log = example_log()
    expected, found = STATISTICS[name](log), STATISTICS[name](transposed(log))
    np.testing.assert_allclose(found.to_numpy(), expected.to_numpy(), rtol=1e-6)


@pytest.mark.parametrize("name", ["tolpegin", "lfighter", "deepsight", "freqfed", "final_rows", "final_bias", "auror"])
def test_detectors_on_kernels_judge_as_on_the_same_numbers_in_torch(name):
    from gradlens.examples import example_log

    log = example_log(num_malicious=3)
    expected, found = DETECTORS[name]()(log), DETECTORS[name]()(transposed(log))
    if name != "freqfed":  # whose frequencies depend on the order of the numbers, as published
        np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5, atol=1e-9)
    assert not found.abstained


def test_labels_are_attributed_on_kernels_as_in_torch():
    from gradlens.examples import example_log

    log = example_log()
    expected, found = gradlens.suspected_labels(log), gradlens.suspected_labels(transposed(log))
    assert found[["target", "source"]].equals(expected[["target", "source"]])
    np.testing.assert_allclose(found["strength"], expected["strength"], rtol=1e-5)


def test_running_statistics_are_buffers_by_their_names():
    names = ["bn/moving_mean", "bn/moving_variance", "batch_stats/BatchNorm_0/mean", "batch_stats/BatchNorm_0/var"]
    names += ["normalization/mean", "normalization/variance", "nnx/bn/mean", "nnx/bn/var", "spectral/vector_u"]
    state = {"fc/kernel": np.zeros((2, 2)), **{name: np.zeros(2) for name in names}}
    assert found_buffers(state) == names
    assert found_buffers({"latent/mean": np.zeros(2), "other/variance": np.zeros(2), "latent/var": np.zeros(3)}) == []


@pytest.mark.parametrize(
    ("model", "found"),
    [
        ([np.zeros(2)], "found list; {str(place): array for place, array in enumerate(arrays)} names arrays by their"),
        ({0: np.zeros(2)}, "found dict with the name 0"),
        (None, "found NoneType"),
    ],
)
def test_a_global_model_without_names_is_an_error_that_says_what_to_do(model, found):
    with pytest.raises(InputError, match=re.escape(f"layer -> array, whose names are text, {found}")):
        Recorder().log_round(model, {})


def test_running_statistics_are_buffers_by_their_place_in_a_list():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3))
    state = {str(i): array.numpy() for i, array in enumerate(net.state_dict().values())}
    assert sorted(found_buffers(state)) == ["4", "5", "6"]  # mean, variance, counter
    keras = [np.zeros((3, 3, 1, 4)), np.zeros(4), np.ones(4), np.zeros(4), np.zeros(4), np.ones(4), np.zeros((16, 3))]
    assert found_buffers({str(i): array for i, array in enumerate(keras)}) == ["4", "5"]
    keras[5] = -keras[5]  # no variance
    assert found_buffers({str(i): array for i, array in enumerate(keras)}) == []
    recurrent = nn.LSTM(4, 4, num_layers=2).state_dict()
    assert found_buffers({str(i): array for i, array in enumerate(recurrent.values())}) == []


def test_tied_layers_are_said_to_count_twice(tmp_path):
    table = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
    for client in "abc":
        np.savez(tmp_path / f"round_0_client_{client}.npz", **{"embed.weight": table, "head.weight": table})
    notes = ingest(tmp_path, tmp_path / "run").notes
    assert any(note.startswith("head.weight holds the numbers of embed.weight") for note in notes)


# Heads


def binary(seed=0, clients=20):
    return log_of(spec_of(shapes(a__weight=(6, 8), a__bias=6, b__weight=(1, 6), b__bias=1)), shapes(
        a__weight=(6, 8), a__bias=6, b__weight=(1, 6), b__bias=1), clients)  # fmt: skip


def test_one_output_has_no_shares_and_no_labels():
    log = binary()
    for name in ("neup", "threshold_exceedings"):
        with pytest.raises(CannotSay, match="has one output, whose share is always 1"):
            STATISTICS[name](log)
    verdict = DETECTORS["deepsight"]()(log)
    assert "one output" in verdict.abstained
    assert not verdict.flags.any()
    with pytest.raises(CannotSay, match="of a binary task or a regression"):
        gradlens.suspected_labels(log)
    drift = gradlens.label_drift(log)
    assert drift.columns.tolist() == ["b.bias[0]"]
    assert "label 1 of a binary task" in drift.attrs["unit"]


@pytest.mark.parametrize("name", ["auror", "bilgin", "final_bias", "final_rows", "freqfed", "lfighter", "tolpegin"])
def test_no_detector_of_the_final_layer_flags_most_of_honest_clients_for_one_output(name):
    verdict = DETECTORS[name]()(binary())
    assert verdict.abstained or verdict.flags.mean() <= 0.5


def gradient_of(loss, outputs, labels, hidden):
    """The update of a final layer after a step of rate 1 down a loss."""
    layer = nn.Linear(hidden.shape[1], outputs)
    loss(layer(hidden), labels).backward()
    with torch.no_grad():
        return {"b.weight": -layer.weight.grad.numpy(), "b.bias": -layer.bias.grad.numpy()}, layer


def test_label_drift_is_label_minus_prediction_for_sigmoids_pixels_and_squares():
    torch.manual_seed(0)
    hidden = torch.rand(50, 6)
    several = (torch.rand(50, 3) > 0.5).float()
    cases = [
        (lambda out, y: nn.functional.binary_cross_entropy_with_logits(out, y) * 3, 3, several, torch.sigmoid),
        (nn.functional.mse_loss, 1, torch.rand(50, 1), lambda out: out),
        (nn.functional.cross_entropy, 3, torch.randint(3, (50,)), lambda out: out.softmax(1)),
    ]
    for loss, outputs, labels, answer in cases:
        update, layer = gradient_of(loss, outputs, labels, hidden)
        spec = spec_of({"b.weight": np.zeros((outputs, 6)), "b.bias": np.zeros(outputs)})
        rows = {name: np.stack([np.zeros_like(array)] * 4 + [array]) for name, array in update.items()}
        state = {name: np.zeros_like(array) for name, array in update.items()}
        log = UpdateLog(spec, [Round(0, np.array(list("abcde")), np.ones(5, int), rows, state)])
        predicted = answer(layer(hidden)).detach()
        truth = nn.functional.one_hot(labels, 3) if labels.dtype == torch.int64 else labels
        factor = 2 if loss is nn.functional.mse_loss else 1
        expected = factor * (truth - predicted).mean(dim=0).numpy()
        np.testing.assert_allclose(gradlens.label_drift(log).loc["e"], expected, rtol=1e-4, atol=1e-7)


def test_a_vocabulary_of_fifty_thousand_is_judged_by_its_bias():
    words = 50_000
    state = {"embed.weight": np.zeros((words, 4)), "fc.weight": np.zeros((words, 24)), "fc.bias": np.zeros(words)}
    log = log_of(spec_of(state), state, clients=5)
    log[-1].updates["fc.bias"]  # [client, word]
    rows = {name: np.array(rows) for name, rows in log[-1].updates.items()}
    rows["fc.bias"][4, 777] += 50
    log = UpdateLog(log.model, [Round(0, log[-1].clients, log[-1].num_examples, rows, log[-1].global_model)])
    assert gradlens.suspected_labels(log).loc["c4", "target"] == 777
    assert gradlens.label_drift(log).loc["c4"].idxmax() == "fc.bias[777]"
    assert ModelSpec.of(state).num_units("fc.weight") == words
