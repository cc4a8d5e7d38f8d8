"""PEFT on tiny models of transformers: adapters as `save_pretrained` writes them, and as Flower's clients send them."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is asked of the hub

import io
from copy import deepcopy

import numpy as np
import pandas as pd
import pytest
from needed import needed

torch, transformers, peft, flwr = needed("torch", "transformers", "peft", "flwr")

from flwr.app import ArrayRecord, MetricRecord, RecordDict  # noqa: E402
from flwr.serverapp.strategy import FedAvg  # noqa: E402

import gradlens  # noqa: E402
from gradlens import DETECTORS, Recorder, filtered  # noqa: E402
from gradlens.aggregators import mean  # noqa: E402
from gradlens.detectors.products import on_products  # noqa: E402
from gradlens.ingestion import ingest  # noqa: E402
from gradlens.integrations.flower import GradlensStrategy  # noqa: E402
from gradlens.log.adapters import pairs_of, with_products  # noqa: E402
from gradlens.log.global_model import spec_of  # noqa: E402
from integration.flower_fakes import FakeGrid, state_of  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by PEFT
RANK, SMALL, SCALING, ROUNDS, WORDS = 4, 2, 2.0, 3, 40
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "initializer_range": 0.3,
}
CLIENTS = [*(f"client_{number}" for number in range(6)), "client_small", "client_loud"]


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=WORDS,
        n_positions=16,
        n_embd=16,
        n_layer=1,
        n_head=2,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config), {"target_modules": ["c_attn"], "fan_in_fan_out": True}


def llama():
    config = transformers.LlamaConfig(vocab_size=WORDS, num_key_value_heads=1, **SIZES)
    return transformers.LlamaForCausalLM(config), {"target_modules": ["q_proj", "v_proj"]}


def bert():
    config = transformers.BertConfig(vocab_size=WORDS, max_position_embeddings=16, num_labels=3, **SIZES)
    return transformers.BertForSequenceClassification(config), {
        "target_modules": ["query", "value"], "task_type": "SEQ_CLS",
    }  # fmt: skip


MODELS = {"gpt2": gpt2, "llama": llama, "bert": bert}


def adapted(name, rank=RANK):
    """A model with adapters, the same for everybody; PEFT multiplies their product by `SCALING`, whatever the rank."""
    torch.manual_seed(0)
    model, where = MODELS[name]()
    return peft.get_peft_model(model.eval(), peft.LoraConfig(r=rank, lora_alpha=SCALING * rank, **where))


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def state(model):
    return {name: value.detach().clone() for name, value in peft.get_peft_model_state_dict(model).items()}


def of_rank(arrays, rank):
    """The first components of adapters."""
    axes = {name: "A" if "lora_A" in name else "B" if "lora_B" in name else "" for name in arrays}
    return {n: v[:rank] if axes[n] == "A" else v[:, :rank] if axes[n] == "B" else v for n, v in arrays.items()}


def loaded(model, arrays):
    peft.set_peft_model_state_dict(model, arrays)
    return model


def trained(model, client, index):
    """What a client makes of the model: some steps on sequences of its own; one client exaggerates tenfold."""
    start, draws = state(model), torch.Generator().manual_seed(100 * index + CLIENTS.index(client))
    chosen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    words = torch.randint(0, WORDS, (8, 10), generator=draws)
    labels = words if model.config.model_type != "bert" else words[:, 0] % 3
    for _ in range(4):
        for parameter, slope in zip(chosen, torch.autograd.grad(model(input_ids=words, labels=labels).loss, chosen),
                                    strict=True):  # fmt: skip
            parameter.data -= 0.5 * slope
    factor = 10 if client == "client_loud" else 1
    return {name: start[name] + factor * (value - start[name]) for name, value in state(model).items()}


def filled(arrays, like):
    """Adapters of any rank in the shapes of others, with zeros."""
    return {
        name: torch.nn.functional.pad(value, [n for a, b in zip(value.shape[::-1], like[name].shape[::-1], strict=True)
                                              for n in (0, b - a)])
        for name, value in arrays.items()
    }  # fmt: skip


def rounds(name):
    """The global adapters of each round, and what the clients send; the mean leaves out who exaggerates."""
    models = {rank: adapted(name, rank) for rank in (RANK, SMALL)}
    before = state(models[RANK])
    for index in range(ROUNDS):
        sent = {}
        for client in CLIENTS:
            rank = SMALL if client == "client_small" else RANK
            sent[client] = trained(loaded(models[rank], of_rank(before, rank)), client, index)
        yield before, sent
        kept = [filled(arrays, before) for client, arrays in sent.items() if client != "client_loud"]
        before = {layer: sum(arrays[layer] for arrays in kept) / len(kept) for layer in before}


def merged(model, arrays):
    """The weights of the layers that have adapters once PEFT has merged them, in the order of the model."""
    targets = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    whole = deepcopy(loaded(model, arrays)).merge_and_unload()
    names = [name.removeprefix("base_model.model.") for name in targets]
    return [whole.get_submodule(name).weight.detach().double().numpy() for name in names]


@pytest.fixture(scope="module", params=list(MODELS))
def name(request):
    return request.param


@pytest.fixture(scope="module")
def played(name):
    return list(rounds(name))


def test_the_norm_of_a_product_is_that_of_the_change_that_peft_merges(name, played):
    recorder, models = Recorder(), {rank: adapted(name, rank) for rank in (RANK, SMALL)}
    for before, sent in played:
        recorder.log_round(before, sent)
        round_ = recorder.log[-1]
        assert round_.refused == {}
        assert set(round_.clients) == set(CLIENTS)
        pairs, product = pairs_of(recorder.model), with_products(recorder.log)[-1]
        start = merged(models[RANK], before)
        assert len(pairs) == len(start) == (1 if name == "gpt2" else 2)
        for row, client in enumerate(round_.clients.tolist()):
            after = merged(models[SMALL if client == "client_small" else RANK], sent[client])
            for pair, one, other in zip(pairs, start, after, strict=True):
                change = (other - one) / SCALING
                if name == "gpt2":  # whose kernels are [in, out]
                    change = change.T
                rounding, norm = np.abs(one).max() * 2.0**-24, np.linalg.norm(change)  # of a weight that is merged
                np.testing.assert_allclose(product.updates[pair.name][row], change, rtol=1e-5, atol=2 * rounding)
                found, most = product.norms[pair.name][row], 2 * rounding * np.sqrt(change.size)
                np.testing.assert_allclose(found, norm, rtol=1e-5, atol=most)
                assert norm > 100 * most


def test_only_the_head_that_is_trained_with_the_adapters_answers(name, played):
    model = spec_of(played[0][0])
    if name == "bert":
        assert (model.final_weight, model.final_bias) == tuple(
            f"base_model.model.classifier.{part}" for part in ("weight", "bias")
        )
    else:
        assert model.final_weight is model.final_bias is None
        assert len(model.parameters) == 2 * len(pairs_of(model))


@pytest.fixture
def saved(name, played, tmp_path):
    """A folder as clients and a server leave it behind with `save_pretrained`."""
    models = {rank: adapted(name, rank) for rank in (RANK, SMALL)}
    for index, (before, sent) in enumerate(played):
        loaded(models[RANK], before).save_pretrained(tmp_path / "in" / f"round_{index}" / "global")
        for client, arrays in sent.items():
            rank = SMALL if client == "client_small" else RANK
            loaded(models[rank], arrays).save_pretrained(tmp_path / "in" / f"round_{index}" / client)
    return tmp_path / "in"


def test_saved_adapters_become_a_run_in_which_the_loud_one_is_found(played, saved, tmp_path, command):
    assert {path.name for path in (saved / "round_0" / "client_0").iterdir()} >= {"adapter_model.safetensors"}
    code, _, complaint = command("ingest", saved, "-o", tmp_path / "run")
    assert code == 0, complaint
    run = gradlens.open(tmp_path / "run")
    assert run.verify().intact
    for round_, (before, sent) in zip(run.log, played, strict=True):
        assert round_.refused == {}
        assert {f"client_{client}" for client in round_.clients} == set(CLIENTS)
        for layer in run.model:
            np.testing.assert_array_equal(round_.global_model[layer], before[layer].numpy())
            rows = [filled(sent[f"client_{client}"], before)[layer] - before[layer] for client in round_.clients]
            np.testing.assert_allclose(round_.updates[layer], np.stack([row.numpy() for row in rows]), atol=1e-7)
    code, out, complaint = command("detect", tmp_path / "run", "--detector", "layer_norms", "--csv")
    assert code == 0, complaint
    tables = [pd.read_csv(io.StringIO(out)), gradlens.detect(run, {"layer_norms": DETECTORS["layer_norms"]()})]
    for table in tables:
        assert len(table) == ROUNDS * len(CLIENTS)
        assert table.loc[table.groupby("round")["score"].idxmax(), "client"].tolist() == ["loud"] * ROUNDS
        assert table[table["client"] == "loud"]["flag"].all()
    np.testing.assert_allclose(tables[0]["score"], tables[1]["score"], rtol=1e-6)


def test_adapters_that_are_not_safetensors_are_read_as_well(name, played, tmp_path):
    model = adapted(name)
    for client in CLIENTS[:3]:
        folder = tmp_path / "in" / "round_0" / client
        loaded(model, played[0][1][client]).save_pretrained(folder, safe_serialization=False)
        assert (folder / "adapter_model.bin").is_file()
    run = ingest(tmp_path / "in", tmp_path / "run").run
    assert (run.log[0].clients.tolist(), run.log[0].refused) == (["0", "1", "2"], {})
    assert len(pairs_of(run.model)) == (1 if name == "gpt2" else 2)


def test_clients_of_flower_send_adapters_and_the_loud_one_is_left_out(name, tmp_path):
    """One client has a smaller rank: what goes on to Flower's mean is filled up, and everybody starts from it again."""
    models = {rank: adapted(name, rank) for rank in (RANK, SMALL)}
    start = state(models[RANK])

    def client(place, index, arrays):
        rank = SMALL if CLIENTS[place] == "client_small" else RANK
        model = loaded(models[rank], of_rank({n: torch.tensor(v) for n, v in arrays.items()}, rank))
        said = MetricRecord({"num-examples": 10, "partition-id": place})
        return RecordDict({"arrays": ArrayRecord(trained(model, CLIENTS[place], index)), "metrics": said})

    rule = filtered(mean(), on_products(DETECTORS["layer_norms"]()))
    inner = FedAvg(fraction_evaluate=0.0, min_train_nodes=len(CLIENTS), min_available_nodes=len(CLIENTS))
    with Recorder(tmp_path / "run", filter=rule) as recorder:
        strategy = GradlensStrategy(inner, recorder)
        result = strategy.start(FakeGrid(len(CLIENTS), client), ArrayRecord(start), num_rounds=ROUNDS)
    run = gradlens.open(tmp_path / "run")
    assert run.verify().intact
    assert [(len(round_), round_.refused) for round_ in run.log] == [(len(CLIENTS), {})] * ROUNDS
    loud = str(CLIENTS.index("client_loud"))
    for _, decided in run.verdicts.groupby("round"):
        assert loud in set(decided["client"][~decided["kept"]])
        assert decided["kept"].sum() > len(CLIENTS) / 2
    after = [*[round_.global_model for round_ in run.log][1:], state_of(result.arrays)]
    for prefix, found in zip(run.log.prefixes(), after, strict=True):
        round_ = prefix[-1]
        rows = np.isin(round_.clients, run.verdicts.query(f"round == {round_.index} and kept")["client"])
        for layer, array in round_.global_model.items():
            expected = array + round_.updates[layer][rows].mean(axis=0)
            np.testing.assert_allclose(found[layer], expected, atol=1e-6)
    last = {layer: torch.tensor(array) for layer, array in after[-1].items()}  # of the server's rank, which PEFT loads
    for one, other in zip(merged(models[RANK], start), merged(models[RANK], last), strict=True):
        assert np.abs(other - one).max() > 1e-3
