"""Clients sign what they send: the server refuses what is not theirs, the record keeps it, `verify` checks it again."""

import hashlib
import json
import struct
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from conftest import STATE
from gradlens import DETECTORS, Evidence, InputError, LogWriter, Recorder, Run, Signed, StartedFrom
from gradlens.custody import check_updates, keys_of_clients, new_key, share, sign_update, thinned
from gradlens.errors import EverybodyRefused
from gradlens.log import files
from gradlens.log.arrays import Unfit
from gradlens.log.files import write_updates
from gradlens.log.manifest import read_manifest, sha256
from gradlens.log.signatures import Signers, Statement, digest_of
from gradlens.log.writer import read_header

CLIENTS = ("a", "b", "c", "d")


@pytest.fixture(scope="session")
def keys(tmp_path_factory) -> Path:
    """A folder with the private and the public key of each client."""
    folder = tmp_path_factory.mktemp("keys")
    for client in (*CLIENTS, "mallory"):
        new_key(folder / client)
    return folder


def local(seed: int, start=STATE) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        name: array + np.asarray(rng.normal(size=array.shape), np.float32) if array.dtype == np.float32 else array + 1
        for name, array in start.items()
    }


def signed(keys, client, round_, state, *, by=None, run=""):
    return Signed(sign_update(keys / (by or client), client=client, round=round_, arrays=state, run=run), state)


def cohort(keys, round_, run=""):
    return {client: signed(keys, client, round_, local(10 * round_ + i), run=run) for i, client in enumerate(CLIENTS)}


def recorded(folder, keys, rounds=3, **settings) -> Path:
    """A closed run whose clients all signed."""
    with Recorder(folder, client_keys=keys, **settings) as recorder:
        for round_ in range(rounds):
            recorder.log_round(STATE, cohort(keys, round_, settings.get("run_name", "")))
            recorder.commit(STATE)
    return folder


def reason_of(recorder, client):
    return recorder.log[-1].refused.get(client, "")


@pytest.mark.parametrize("level", ["full", Evidence("sketch", width=4, seed=1)], ids=["full", "sketch"])
@pytest.mark.parametrize("sent", ["models", "updates"])
def test_what_clients_signed_is_recorded_with_their_signatures(tmp_path, keys, level, sent, command):
    folder = recorded(tmp_path / "run", keys, evidence=level, sent=sent, detector="layer_norms")
    run = Run.open(folder)
    assert run.verify().intact
    assert [set(round_.clients) for round_ in run.log] == [set(CLIENTS)] * 3
    for round_ in run.log:
        statements = {client: Statement.read(text) for client, text in round_.signatures.items()}
        assert {client: s.client for client, s in statements.items()} == {client: client for client in CLIENTS}
        assert {s.round for s in statements.values()} == {round_.index}
    status, out, _ = command("verify", folder, "--client-keys", keys)
    assert status == 0
    assert "12 of 12 updates are signed by the keys of their clients" in out
    whole = [local(10 * round_ + i) for round_ in range(3) for i in range(4)] if level == "full" else []
    base = STATE if sent == "models" else {name: np.zeros_like(array) for name, array in STATE.items()}
    exact = sum(all((base[n] + (a - base[n]) == a).all() for n, a in state.items()) for state in whole)
    assert f"{exact} of these 12 are recorded bit for bit as signed" in out
    assert ("the numbers are the recorder's" in out) == (exact < 12)


def test_local_models_are_found_bit_for_bit_where_adding_the_global_model_gives_them_back(tmp_path, keys):
    zero = {name: np.zeros_like(array) for name, array in STATE.items()}
    with Recorder(tmp_path / "run", client_keys=keys) as recorder:
        recorder.log_round(zero, {"a": signed(keys, "a", 0, local(1))})
        recorder.commit(STATE)
        half = {n: a + np.asarray(2.0**-30, a.dtype) for n, a in zero.items() if a.dtype == np.float32}
        lost = {**STATE, **half}  # beside numbers of size 1, the last bits of these are lost
        recorder.log_round(STATE, {"b": signed(keys, "b", 1, lost)})
        recorder.commit(STATE)
    says = check_updates(tmp_path / "run", keys_of_clients(keys)).says
    assert says[1].startswith("1 of these 2 are recorded bit for bit as signed; of the others")


# --- what is signed -----------------------------------------------------------------------------------------------


def test_a_second_signer_made_from_the_specification_is_understood(keys):
    """docs/reference/run_format.md, in the plainest words."""

    def measured(text):
        return struct.pack(">Q", len(text.encode())) + text.encode()

    state = {"b": np.arange(6, dtype=">f4").reshape(2, 3), "ä": np.array(7, np.int64), "a": np.zeros((0, 2))}
    hashed = b"gradlens numbers 1\n" + struct.pack(">Q", 3)
    for name, kind, code in (("a", "float64", "<f8"), ("b", "float32", "<f4"), ("ä", "int64", "<i8")):
        array = state[name]
        hashed += measured(name) + measured(kind) + struct.pack(f">Q{array.ndim}Q", array.ndim, *array.shape)
        content = array.astype(code).tobytes("C")
        hashed += struct.pack(">Q", len(content)) + content
    digest = hashlib.sha256(hashed).digest()
    statement = b"gradlens update 1\n" + measured("run 1") + measured("a") + struct.pack(">Q", 5) + digest
    private = Ed25519PrivateKey.generate()
    text = json.dumps(
        {"client": "a", "run": "run 1", "round": 5, "digest": digest.hex(), "signature": private.sign(statement).hex()}
    )
    key = private.public_key().public_bytes_raw().hex()
    kinds = {"a": "float64", "b": "float32", "ä": "int64"}
    assert Signers({"a": key}, "run 1").checked(text, "a", 5, 5, lambda: digest_of(state, kinds)).round == 5
    other = sign_update(keys / "a", client="a", round=5, arrays=state, run="run 1")
    assert Statement.read(other).digest == digest.hex()


names = st.text(alphabet="ab\x00", max_size=3)
arrays = st.builds(
    lambda kind, shape, start: (np.arange(np.prod(shape, dtype=int)) + start).astype(kind).reshape(shape),
    st.sampled_from(["float32", "float64", "int32", "int64", "uint8", "bool"]),
    st.sampled_from([(), (0,), (1,), (2,), (1, 2), (2, 1), (1, 1, 2), (4,), (2, 2)]),
    st.integers(0, 2),
)
states = st.dictionaries(names, arrays, max_size=3)


def written(state):
    """A state so that two are equal if they are the same in everything that is signed."""
    return sorted((name, a.dtype.name, a.shape, a.tobytes()) for name, a in state.items())


@given(one=states, other=states)
def test_different_numbers_have_different_digests(one, other):
    digests = [digest_of(state, {n: a.dtype.name for n, a in state.items()}) for state in (one, other)]
    assert (digests[0] == digests[1]) == (written(one) == written(other))


@given(*[st.tuples(names, names, st.integers(0, 2))] * 2)
def test_different_statements_are_different_bytes(one, other):
    made = [Statement(client, run, round_, "00" * 32).signed for client, run, round_ in (one, other)]
    assert (made[0] == made[1]) == (one == other)


TRAPS = [
    ({"ab": [1.0]}, {"a": [1.0], "b": []}),
    ({"a": [1.0, 2.0]}, {"a": [[1.0, 2.0]]}),
    ({"a": [1.0], "b": [2.0]}, {"a": [2.0], "b": [1.0]}),
    ({"a": np.zeros(2, np.float32)}, {"a": np.zeros(1, np.float64)}),
    ({"a": np.zeros(1, np.float32)}, {"a": np.zeros(1, np.int32)}),
    ({"a": np.array(0.0)}, {"a": np.array(-0.0)}),
]


@pytest.mark.parametrize(("one", "other"), TRAPS, ids=str)
def test_the_same_bytes_in_another_order_are_something_else(keys, one, other):
    recorder = Recorder(client_keys=keys, sent="updates")
    signature = sign_update(keys / "a", client="a", round=0, arrays=one)
    state = {name: np.asarray(array, np.float64) for name, array in other.items() if np.size(array)}
    with pytest.warns(EverybodyRefused):
        recorder.log_round(state, {"a": Signed(signature, other)})
    assert reason_of(recorder, "a") == "signature: of other numbers than were sent"
    assert recorder.log[-1].signatures["a"] == signature


@pytest.fixture(scope="session")
def signers(keys):
    return Signers(keys_of_clients(keys), "r")


@pytest.fixture(scope="session")
def signature(keys):
    return sign_update(keys / "a", client="a", round=4, arrays=local(1), run="r")


@given(data=st.data())
def test_whatever_is_altered_is_refused(signers, signature, data):
    state = local(1)

    def refused(text=signature, client="a", round_=4, sent=state, run="r"):
        kinds = {name: array.dtype.name for name, array in sent.items()}
        with suppress(Unfit):
            replace(signers, run=run).checked(text, client, round_, round_, lambda: digest_of(sent, kinds))
            return False
        return True

    assert not refused()
    layer = data.draw(st.sampled_from(sorted(state)))
    bit = data.draw(st.integers(0, 8 * state[layer].nbytes - 1))
    flipped = bytearray(state[layer].tobytes())
    flipped[bit // 8] ^= 1 << bit % 8
    changed = np.frombuffer(bytes(flipped), state[layer].dtype).reshape(state[layer].shape)
    assert refused(sent={**state, layer: changed})
    assert refused(sent={**state, layer: state[layer].astype(np.float64)})
    assert refused(sent={**state, layer: state[layer].reshape(1, *state[layer].shape)})
    assert refused(sent={name + " " * (name == layer): array for name, array in state.items()})
    assert refused(sent={name: array for name, array in state.items() if name != layer})
    assert refused(sent={**state, data.draw(st.text().filter(lambda n: n not in state)): np.zeros(0)})
    assert refused(client=data.draw(st.text().filter(lambda name: name != "a") | st.sampled_from(CLIENTS[1:])))
    assert refused(round_=data.draw(st.integers(0, 2**63 - 1).filter(lambda number: number != 4)))
    assert refused(run=data.draw(st.text().filter(lambda name: name != "r")))
    place = data.draw(st.integers(0, len(signature) - 1))
    character = data.draw(st.characters(codec="ascii"))
    text = signature[:place] + character + signature[place + 1 :]
    same = False
    with suppress(Unfit):
        same = Statement.read(text) == Statement.read(signature)  # a blank for a blank of another kind
    assert refused(text=text) or same


# --- at the server ------------------------------------------------------------------------------------------------


class Grumpy:
    def __str__(self):
        raise SystemExit

    __repr__ = __eq__ = __len__ = __iter__ = __hash__ = __str__  # type: ignore[assignment]


HOSTILE = {
    "none": (None, "signature: none"),
    "number": (7, "expected text, found int"),
    "bytes": (b"\x00" * 64, "expected text, found bytes"),
    "list": ([1] * 100, "expected text, found list"),
    "array": (np.zeros(3), "expected text, found ndarray"),
    "object": (Grumpy(), "expected text, found Grumpy"),
    "empty": ("", "not readable as one, found ''"),
    "huge": ("x" * 50_000_000, "at most 4,096 characters, found 50,000,000"),
    "nested": ("[" * 4_000, "not readable as one"),
    "deep": ('{"a":' * 800, "not readable as one"),
    "number in text": ("1" * 4_096, "not readable as one"),
    "null": ("null", "not readable as one"),
    "other keys": ('{"client": "a", "__class__": 1}', "not readable as one"),
    "escapes": ("\x1b[2J\ud800\u202e", r"not readable as one, found '\x1b[2J\ud800\u202e'"),
}
FIELDS = {
    "client": [7, None, ["a"], True],
    "run": [7, None, {}],
    "round": [-1, 2**63, 1.0, True, "0", None, 10**300],
    "digest": ["", "00" * 31, "zz" * 32, "0" * 63 + "\n", "AA" * 32, 7, None],
    "signature": ["", "00" * 63, "00" * 65, "AA" * 64, 0, None],
}
GOOD = asdict(Statement("odd", "", 0, "00" * 32, "00" * 64))
HOSTILE |= {
    f"{name} {value!r:.20}": (json.dumps({**GOOD, name: value}), "not readable as one")
    for name, values in FIELDS.items()
    for value in values
}


@pytest.mark.parametrize("case", HOSTILE)
def test_whatever_comes_as_a_signature_is_a_reason_and_no_crash(tmp_path, keys, case):
    value, reason = HOSTILE[case]
    public = keys_of_clients(keys)
    with Recorder(tmp_path / "run", client_keys={**public, "odd": public["mallory"]}) as recorder:
        decision = recorder.log_round(STATE, {**cohort(keys, 0), "odd": Signed(value, local(7))})
        recorder.commit(STATE)
    assert decision.kept == list(CLIENTS)
    round_ = Run.open(tmp_path / "run").log[0]
    assert reason in round_.refused["odd"]
    assert round_.refused["odd"].isprintable()
    assert len(round_.refused["odd"]) < 200
    assert len(round_.signatures.get("odd", "")) < 200
    assert decision.reasons.tolist()[-1] == f"refused: {round_.refused['odd']}"


@pytest.mark.parametrize("case", HOSTILE)
def test_without_keys_whatever_comes_is_kept_in_a_few_characters_and_nothing_is_refused(tmp_path, keys, case):
    value, reason = HOSTILE[case]
    with Recorder(tmp_path / "run") as recorder:
        recorder.log_round(STATE, {**cohort(keys, 0), "odd": Signed(value, local(7))})
        recorder.commit(STATE)
    round_ = Run.open(tmp_path / "run").log[0]
    assert not round_.refused
    assert reason in round_.signatures["odd"] if value is not None else "odd" not in round_.signatures
    assert all(Statement.read(round_.signatures[client]).client == client for client in CLIENTS)
    seals = check_updates(tmp_path / "run", keys_of_clients(keys))
    assert seals.says[0].startswith("4 of 5 updates are signed")
    assert seals.faults == ("odd in round 0: signature: no key is known of this client",)


def test_who_signs_nothing_or_for_others_or_again_is_refused_with_the_reason(keys):
    recorder = Recorder(client_keys=keys, run_name="trial")
    recorder.log_round(STATE, {"a": signed(keys, "a", 0, local(0), run="trial")})
    recorder.commit(STATE)
    states = [local(i) for i in range(9)]
    sent = {
        "a": signed(keys, "a", 0, local(0), run="trial"),  # again
        "b": states[1],
        "c": signed(keys, "c", 1, states[2], by="mallory", run="trial"),
        "d": Signed(signed(keys, "a", 1, states[3], run="trial").signature, states[3]),  # a's, in d's name
        "e": signed(keys, "mallory", 1, states[4], run="trial"),
    }
    with pytest.warns(EverybodyRefused):
        decision = recorder.log_round(STATE, sent)
    assert decision.kept == []
    assert dict(recorder.log[-1].refused) == {
        "a": "signature: of round 0, expected 1",
        "b": "signature: none",
        "c": "signature: not of client 'c'",
        "d": "signature: not of client 'd'",
        "e": "signature: no key is known of this client",
    }
    recorder.commit(STATE)
    again = {
        "a": Signed(signed(keys, "a", 2, states[5], run="trial").signature, states[6]),
        "b": signed(keys, "b", 2, states[6]),
        "c": Signed(sign_update(keys / "c", client="a", round=2, arrays=states[7], run="trial"), states[7]),
        "d": signed(keys, "d", 2, states[8], run="trial"),
    }
    assert recorder.log_round(STATE, again).kept == ["d"]
    assert dict(recorder.log[-1].refused) == {
        "a": "signature: of other numbers than were sent",
        "b": "signature: of run '', expected 'trial'",
        "c": "signature: of client 'a', expected 'c'",
    }


def test_a_second_answer_without_a_signature_is_not_mixed_up_with_the_signed_one(keys):
    recorder = Recorder(client_keys=keys)
    both = [*cohort(keys, 0).items(), ("a", local(99))]
    assert recorder.log_round(STATE, both).kept == ["b", "c", "d"]
    assert reason_of(recorder, "a").startswith("2 different answers came under this name")
    assert "signature: none" in reason_of(recorder, "a")


def test_a_late_answer_is_signed_for_the_round_it_started_from_and_counts_once(tmp_path, keys):
    with Recorder(tmp_path / "run", client_keys=keys) as recorder:
        for round_ in range(2):
            recorder.log_round(STATE, {"a": signed(keys, "a", round_, local(round_))})
            recorder.commit(STATE)
        late = StartedFrom(0, signed(keys, "b", 0, local(5)))
        wrong = StartedFrom(1, signed(keys, "c", 2, local(6)))
        old = StartedFrom(1, signed(keys, "a", 1, local(1)))  # what a sent in time, as if it came late
        recorder.log_round(STATE, {"b": late, "c": wrong, "a": old})
        assert dict(recorder.log[-1].started) == {"b": 0}
        assert reason_of(recorder, "c") == "signature: of round 2, expected 1"
        assert reason_of(recorder, "a") == "signature: of what was already sent in round 1"
        recorder.commit(STATE)
        two = [
            ("b", late),
            ("b", signed(keys, "b", 3, local(7))),
            ("d", StartedFrom(1, signed(keys, "d", 1, local(8)))),
        ]
        two += [("d", signed(keys, "d", 3, local(9)))]
        recorder.log_round(STATE, two)
        recorder.commit(STATE)
    round_ = Run.open(tmp_path / "run").log[-1]
    assert set(round_.clients) == {"b", "d", "d (from round 1)"}
    assert round_.refused == {"b (from round 0)": "signature: of what was already sent in round 2"}
    seals = check_updates(tmp_path / "run", keys_of_clients(keys))
    assert seals.says[0].startswith("6 of 6 updates")
    assert seals.faults == ()


@pytest.mark.parametrize("where", ["memory", "folder"])
def test_clients_are_told_the_round_that_will_be_recorded(tmp_path, keys, monkeypatch, where):
    moved = {name: array + np.asarray(1, array.dtype) for name, array in STATE.items()}
    path = tmp_path / "run" if where == "folder" else None
    recorder = Recorder(path, client_keys=keys)
    placed, told = files._placed, []

    def step(start, after, commit=True):
        told.append(recorder.next_round(start))
        recorder.log_round(start, {"a": signed(keys, "a", told[-1], local(1))})
        assert recorder.log[-1].index == told[-1]
        assert not recorder.log[-1].refused
        if commit:
            recorder.commit(after)

    def full(path):
        raise OSError(28, "No space left on device")

    step(STATE, moved)
    step(moved, moved)
    step(STATE, moved)  # from another model than the last round ended with: after a gap
    step(moved, STATE, commit=False)
    step(STATE, moved)
    if where == "folder":
        monkeypatch.setattr(files, "_placed", full)
        with pytest.warns(RuntimeWarning, match="No space left"):
            step(moved, moved)
        monkeypatch.setattr(files, "_placed", placed)
        step(moved, moved)
        recorder.leave_open()
        recorder = Recorder(path, client_keys=keys)
        step(moved, moved)
    assert told == ([0, 1, 3, 4, 5, 6, 7, 8] if where == "folder" else [0, 1, 2, 3, 4])
    recorder.close()


def test_other_libraries_and_left_out_layers_are_signed_as_they_are_sent(keys):
    torch = pytest.importorskip("torch")
    recorder = Recorder(client_keys=keys, layers=["fc1.*"])
    tensors = {name: torch.tensor(array) for name, array in local(1).items()}
    half = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items() if name.startswith("fc1")}
    with_head = signed(keys, "a", 0, tensors)
    arrays = Signed(with_head.signature, {name: tensor.numpy() for name, tensor in tensors.items()})
    widened = Signed(signed(keys, "c", 0, half).signature, {name: tensor.float() for name, tensor in half.items()})
    less = Signed(signed(keys, "d", 0, tensors).signature, {n: t for n, t in tensors.items() if n.startswith("fc1")})
    sent = {"a": arrays, "b": signed(keys, "b", 0, half), "c": widened, "d": less}
    assert recorder.log_round(STATE, sent).kept == ["a", "b"]
    assert {reason_of(recorder, client) for client in "cd"} == {"signature: of other numbers than were sent"}


# --- keys ---------------------------------------------------------------------------------------------------------


def test_keys_that_cannot_be_are_said_before_anything_is_recorded(tmp_path, keys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.pub").write_text("no key")
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "a.pub").write_bytes((keys / "a").read_bytes())
    for given_keys, message in (
        (tmp_path / "none", "expected a folder with a public key NAME.pub for each client"),
        (tmp_path / "empty", "expected a public key NAME.pub for each client, found none"),
        (tmp_path / "bad", "expected a public key in PEM"),
        (tmp_path / "private", "expected a public key in PEM"),
        ({}, "expected a public key NAME.pub for each client, found none"),
        ({"a": "0" * 63}, "expected 64 hexadecimal digits for each client, not so for 'a'"),
        ({"a": keys / "a.pub"}, "expected 64 hexadecimal digits"),
    ):
        with pytest.raises(InputError, match=message):
            Recorder(tmp_path / "run", client_keys=given_keys)
        assert not (tmp_path / "run").exists()


PRIME = 2**255 - 19
D = -121665 * pow(121666, -1, PRIME)


def root(number):
    """A square root modulo the prime of the curve, or None."""
    number %= PRIME
    found = pow(number, (PRIME + 3) // 8, PRIME)
    if found * found % PRIME != number:
        found = found * pow(2, (PRIME - 1) // 4, PRIME) % PRIME
    return found if found * found % PRIME == number else None


def order_eight():
    """The y of the points of order 8: d y^4 + 2 y^2 = 1."""
    roots = [root((sign * root(1 + D) - 1) * pow(D, -1, PRIME)) for sign in (1, -1)]
    return [y for found in roots if found is not None for y in (found, PRIME - found)]


WEAK = [0, 1, PRIME - 1, PRIME, PRIME + 1, *order_eight()]


@pytest.mark.parametrize("y", WEAK, ids=lambda y: f"{y:x}"[:12])
def test_a_key_for_which_anybody_can_sign_is_refused(y):
    key = y.to_bytes(32, "little").hex()
    forged = (Statement("a", "", number, "00" * 32, "01" + "00" * 63) for number in range(300))
    if y < PRIME:  # the library takes no other way of writing a number
        assert any(statement.is_signed_by(key) for statement in forged)
    with pytest.raises(InputError, match="the key of 'a' is a point of small order, for which anybody can sign"):
        keys_of_clients({"a": key})


def test_usual_keys_are_not_weak(keys):
    assert len(WEAK) == 7
    assert set(keys_of_clients(keys)) == {*CLIENTS, "mallory"}
    for client in CLIENTS:
        assert (keys / client).stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"round": -1}, "round is the index of a round, found -1"),
        ({"round": "3"}, "round is the index of a round, found '3'"),
        ({"run": 7}, "client and run are names"),
        ({"client": "x" * 301}, "client and run are names, of 300 characters"),
        ({"arrays": {"fc": ["text"]}}, "layer 'fc' must hold numbers"),
    ],
)
def test_what_cannot_be_signed_is_said_in_one_line(keys, changes, message):
    with pytest.raises(InputError, match=message):
        sign_update(keys / "a", **{"client": "a", "round": 0, "arrays": local(1), **changes})
    with pytest.raises(InputError, match="expected a private key in PEM"):
        sign_update(keys / "a.pub", client="a", round=0, arrays=local(1))


def test_the_longest_names_fit(keys):
    name = "\U0001f600" * 100  # 12 characters each in ASCII
    text = sign_update(keys / "a", client=name, round=2**63 - 1, arrays=local(1), run=name * 2)
    assert Statement.read(text).client == name


# --- the record ---------------------------------------------------------------------------------------------------


def rewritten(folder, number, change):
    """Replaces a round by `change` of it, and rebuilds the whole chain, as the run's keeper could."""
    reduction, _ = read_header(folder)
    round_ = Run.open(folder).log[number]
    held = replace(round_, updates={layer: round_.updates[layer].copy() for layer in round_.updates})
    write_updates(folder / "updates" / f"round-{number:06d}.arrow", reduction.model, change(held))
    rebuilt(folder)


def rebuilt(folder):
    previous, lines = "0" * 64, []
    for line in read_manifest(folder).lines:
        new = {**line, "previous": previous}
        if "files" in line:
            new["files"] = {name: sha256(folder / name) for name in line["files"]}
        lines.append(json.dumps(new).encode())
        previous = hashlib.sha256(lines[-1]).hexdigest()
    (folder / "manifest.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
    (folder / "closed").write_text(previous + "\n")
    assert Run.open(folder).verify().intact


def with_signatures(change):
    return lambda round_: replace(round_, signatures=change(dict(round_.signatures)))


def altered(text, **fields):
    return replace(Statement.read(text), **fields).text


TAMPERED = {
    "exchanged": (lambda s: {**s, "a": s["b"], "b": s["a"]}, {"a": "not of client 'a'", "b": "not of client 'b'"}),
    "taken out": (lambda s: {n: t for n, t in s.items() if n != "c"}, {"c": "signature: none"}),
    "all out": (lambda s: {}, dict.fromkeys(CLIENTS, "signature: none")),
    "digest": (lambda s: {**s, "a": altered(s["a"], digest="11" * 32)}, {"a": "not of client 'a'"}),
    "round": (lambda s: {**s, "a": altered(s["a"], round=0)}, {"a": "not of client 'a'"}),
    "no text": (lambda s: {**s, "a": "\x1b[31m"}, {"a": r"not readable as one, found '\x1b[31m'"}),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_signatures_that_were_tampered_with_do_not_pass_though_the_chain_was_rebuilt(tmp_path, keys, case, command):
    change, expected = TAMPERED[case]
    folder = recorded(tmp_path / "run", keys)
    rewritten(folder, 1, with_signatures(change))
    seals = check_updates(folder, keys_of_clients(keys))
    assert seals.says[0].startswith(f"{12 - len(expected)} of 12 updates are signed")
    assert len(seals.faults) == len(expected)
    for fault, (client, reason) in zip(seals.faults, sorted(expected.items()), strict=True):
        assert fault.startswith(f"{client} in round 1: ")
        assert reason in fault
    status, out, _ = command("verify", folder, "--client-keys", keys)
    assert status == 1
    assert "NOT INTACT" in out
    assert "\x1b" not in out
    assert command("verify", folder)[0] == 0  # without the keys the rebuilt chain passes, as ever


def test_a_round_that_is_put_in_the_place_of_another_is_found_by_its_signatures(tmp_path, keys):
    folder = recorded(tmp_path / "run", keys)
    first = Run.open(folder).log[0]
    rewritten(folder, 1, lambda round_: replace(round_, updates=first.updates, signatures=first.signatures))
    faults = check_updates(folder, keys_of_clients(keys)).faults
    assert faults == tuple(f"{c} in round 1: signature: of round 0, expected 1" for c in CLIENTS)


def test_a_round_of_another_run_is_found_by_the_runs_name(tmp_path, keys):
    folder, other = (recorded(tmp_path / name, keys, run_name=name) for name in ("trial", "other"))
    taken = Run.open(other).log[1]
    rewritten(folder, 1, lambda round_: replace(round_, updates=taken.updates, signatures=taken.signatures))
    seals = check_updates(folder, keys_of_clients(keys))
    assert seals.says[0] == "8 of 12 updates are signed by the keys of their clients, for the run 'trial'"
    assert seals.faults == tuple(f"{c} in round 1: signature: of run 'other', expected 'trial'" for c in CLIENTS)


@pytest.mark.filterwarnings("ignore::gradlens.errors.EverybodyRefused")  # such numbers are recorded, and not used
@pytest.mark.parametrize("sent", ["models", "updates"])
@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_numbers_that_are_not_finite_can_be_signed(tmp_path, keys, value, sent):
    state = {name: array if array.dtype != np.float32 else np.full_like(array, value) for name, array in STATE.items()}
    huge = {name: array if array.dtype != np.float32 else np.full_like(array, -3e38) for name, array in STATE.items()}
    with Recorder(tmp_path / "run", client_keys=keys, sent=sent) as recorder:
        recorder.log_round(huge, {"a": signed(keys, "a", 0, state)})
        recorder.commit(STATE)
    seals = check_updates(tmp_path / "run", keys_of_clients(keys))
    assert seals.says[0].startswith("1 of 1 updates are signed")
    if sent == "updates":
        assert seals.says[1] == "1 of these 1 are recorded bit for bit as signed"


def test_numbers_that_were_changed_are_no_longer_those_that_were_signed(tmp_path, keys):
    folder = recorded(tmp_path / "run", keys, sent="updates")
    assert check_updates(folder, keys_of_clients(keys)).says[1] == "12 of these 12 are recorded bit for bit as signed"

    def change(round_):
        updates = {layer: round_.updates[layer].copy() for layer in round_.updates}
        updates["fc2.bias"][2, 1] = np.nextafter(updates["fc2.bias"][2, 1], np.float32(np.inf))
        return replace(round_, updates=updates)

    rewritten(folder, 2, change)
    says = check_updates(folder, keys_of_clients(keys)).says
    assert says[1].startswith("11 of these 12 are recorded bit for bit as signed; of the others the signature proves")


@pytest.mark.parametrize("content", [b"[]", b'{"a": 3}', b"{", b"\xff", b'{"a":' * 100_000])
def test_signatures_in_another_form_are_an_error_of_one_line(tmp_path, keys, content, command):
    folder = recorded(tmp_path / "run", keys)
    path = folder / "updates" / "round-000001.arrow"
    table = pa.ipc.open_file(path).read_all()
    table = table.replace_schema_metadata({**table.schema.metadata, b"signatures": content})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    rebuilt(folder)
    with pytest.raises(InputError, match=r"signatures|cannot be read"):
        len(Run.open(folder).log[1])
    status, out, _ = command("verify", folder, "--client-keys", keys)
    assert status == 1
    assert "signatures of clients cannot be checked" in out


@pytest.mark.parametrize("start", [-(10**18), 2, 10**18])
def test_a_round_that_cannot_have_been_the_start_is_a_fault(tmp_path, keys, start):
    folder = recorded(tmp_path / "run", keys)
    statement = sign_update(keys / "a", client="a", round=max(start, 0), arrays=local(1))
    rewritten(folder, 1, lambda r: replace(r, started={"a": start}, signatures={**r.signatures, "a": statement}))
    faults = check_updates(folder, keys_of_clients(keys)).faults
    assert len(faults) == 1
    assert faults[0].startswith("a in round 1: ")


def test_a_run_without_signatures_is_written_as_before_and_fails_the_check(tmp_path, record, keys, command):
    folder = record().folder
    metadata = pa.ipc.open_file(folder / "updates" / "round-000000.arrow").schema.metadata
    assert set(metadata) == {b"round", b"refused"}
    assert all(not round_.signatures for round_ in Run.open(folder).log)
    assert command("verify", folder)[0] == 0
    status, out, _ = command("verify", folder, "--client-keys", keys)
    assert status == 1
    assert "0 of 12 updates are signed" in out
    assert "a in 3 rounds (0, 1, 2): signature: none" in out
    assert "bit for bit" not in out


def test_verify_says_what_it_needs(tmp_path, keys, command):
    folder = recorded(tmp_path / "run", keys, run_name="trial")
    assert command("verify", folder, "--client-keys", tmp_path / "none")[0] == 2
    assert "for the run 'trial'" in command("verify", folder, "--client-keys", keys)[1]
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "a.pub").write_bytes((keys / "a.pub").read_bytes())
    (tmp_path / "some" / "b.pub").write_bytes((keys / "mallory.pub").read_bytes())
    status, out, _ = command("verify", folder, "--client-keys", tmp_path / "some", "--json")
    found = json.loads(out)[str(folder)]
    assert (status, found["intact"]) == (1, False)
    assert found["seals"][0] == "3 of 12 updates are signed by the keys of their clients, for the run 'trial'"
    assert found["faults"] == [
        "b in 3 rounds (0, 1, 2): signature: not of client 'b'",
        "c in 3 rounds (0, 1, 2): signature: no key is known of this client",
        "d in 3 rounds (0, 1, 2): signature: no key is known of this client",
    ]


def test_many_faults_are_counted(tmp_path, keys):
    with Recorder(tmp_path / "run") as recorder:
        for _ in range(12):
            recorder.log_round(STATE, {f"c{i:02d}": local(i) for i in range(25)})
            recorder.commit(STATE)
    faults = check_updates(tmp_path / "run", keys_of_clients(keys)).faults
    assert len(faults) == 21
    assert faults[0].startswith("c00 in 12 rounds (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ...): ")
    assert faults[-1] == "and 5 more such faults of clients"


def test_a_sweep_has_no_signatures(tmp_path, keys, command):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.json").write_text('{"format": 1, "axes": [], "runs": {}, "controls": {}}')
    status, _, said = command("verify", tmp_path / "sweep", "--client-keys", keys)
    assert status == 2
    assert "expected the folder of a run, found a sweep" in said


# --- copies -------------------------------------------------------------------------------------------------------


def test_a_shared_copy_holds_no_signature_and_says_so(tmp_path, keys, command):
    folder = recorded(tmp_path / "run", keys, run_name="trial")
    run = Run.open(folder)
    names = share(run, tmp_path / "copy", seed=0)
    copy = Run.open(tmp_path / "copy")
    assert copy.verify().intact
    assert all(not round_.signatures for round_ in copy.log)
    content = b"".join(path.read_bytes() for path in sorted((tmp_path / "copy").rglob("*")) if path.is_file())
    for text in (text for round_ in run.log for text in round_.signatures.values()):
        statement = Statement.read(text)
        assert statement.digest.encode() not in content
        assert statement.signature.encode() not in content
    assert b"trial" not in content
    assert len(names) == 4
    status, out, _ = command("verify", tmp_path / "copy", "--client-keys", keys)
    assert status == 1
    assert "a shared copy holds no signatures of clients" in out


@pytest.mark.parametrize("evidence", [Evidence("sketch", width=4, seed=1), Evidence("layers", layers=("fc2.bias",))])
def test_a_thinner_run_keeps_the_signatures(tmp_path, keys, evidence):
    folder = recorded(tmp_path / "run", keys, run_name="trial", sent="updates")
    run = Run.open(folder)
    thinned(run, tmp_path / "thin", evidence)
    thin = Run.open(tmp_path / "thin")
    assert [dict(round_.signatures) for round_ in thin.log] == [dict(round_.signatures) for round_ in run.log]
    seals = check_updates(tmp_path / "thin", keys_of_clients(keys))
    assert seals.faults == ()
    assert seals.says[0] == "12 of 12 updates are signed by the keys of their clients, for the run 'trial'"
    assert seals.says[1].startswith("0 of these 12 are recorded bit for bit as signed")


def test_what_asks_detectors_takes_signed_runs_like_any_other(tmp_path, keys):
    run = Run.open(recorded(tmp_path / "run", keys))
    plain = Run.open(tmp_path / "run").log
    verdict = DETECTORS["layer_norms"]()(run.log)
    with LogWriter.create(tmp_path / "plain", run.model, run.start) as writer:
        for round_, state in zip(plain, run.states(), strict=True):
            writer.commit(replace(round_, signatures={}), state)
    np.testing.assert_array_equal(verdict.scores, DETECTORS["layer_norms"]()(Run.open(tmp_path / "plain").log).scores)
