"""Custody: signatures and time stamps on a head, copies for a second examiner, thinner runs."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from gradlens import DETECTORS, Evidence, InputError, Run
from gradlens.custody import add_stamp, check_seals, new_key, share, sign, stamp_request, thinned
from gradlens.examples import example_run

CONFIG = """
[tsa]
default_tsa = here
[here]
serial = {folder}/serial
signer_digest = sha256
digests = sha256
default_policy = 1.2.3.4.1
accuracy = secs:1
ess_cert_id_alg = sha256
[ca]
basicConstraints = critical,CA:TRUE
keyUsage = critical,keyCertSign
[signer]
basicConstraints = critical,CA:FALSE
keyUsage = critical,digitalSignature
extendedKeyUsage = critical,timeStamping
"""


@pytest.fixture
def run(tmp_path):
    return Path(example_run(tmp_path / "run"))


def head_of(run):
    return Run.open(run).head


def heads_of(run):
    return list(Run.open(run).manifest.hashes)


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    """A time-stamping authority of our own: request file -> reply file, and its root certificate."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not here, which plays the time-stamping authority")
    folder = tmp_path_factory.mktemp("authority")
    (folder / "tsa.cnf").write_text(CONFIG.format(folder=folder))
    (folder / "serial").write_text("01\n")

    def openssl(*arguments):
        subprocess.run(["openssl", *map(str, arguments)], cwd=folder, check=True, capture_output=True)

    openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "ca.key", "-out", "ca.pem", "-days", "30",
            "-subj", "/CN=Root", "-addext", "basicConstraints=critical,CA:TRUE", "-addext",
            "keyUsage=critical,keyCertSign")  # fmt: skip
    openssl("req", "-newkey", "rsa:2048", "-nodes", "-keyout", "tsa.key", "-out", "tsa.csr", "-subj", "/CN=Authority")
    openssl("x509", "-req", "-in", "tsa.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "30",
            "-extfile", "tsa.cnf", "-extensions", "signer", "-out", "tsa.pem")  # fmt: skip

    def stamped(request: bytes) -> Path:
        (folder / "request.tsq").write_bytes(request)
        openssl("ts", "-reply", "-config", "tsa.cnf", "-section", "here", "-queryfile", "request.tsq", "-signer",
                "tsa.pem", "-inkey", "tsa.key", "-out", "reply.tsr")  # fmt: skip
        return folder / "reply.tsr"

    return stamped, folder / "ca.pem"


def test_a_signature_is_of_this_head_and_of_this_key(run, tmp_path):
    public = new_key(tmp_path / "me")
    assert (tmp_path / "me").stat().st_mode & 0o077 == 0
    assert sign(run, head_of(run), tmp_path / "me") == public
    seals = check_seals(run, heads_of(run), key=tmp_path / "me.pub")
    assert seals.says == (f"signed by {public}",)
    assert seals.faults == ()
    new_key(tmp_path / "other")
    assert "not signed by the key" in check_seals(run, heads_of(run), key=tmp_path / "other.pub").faults[0]
    assert Run.open(run).verify().intact  # what lies beside the chain is no intruder


def test_a_second_examiner_signs_beside_the_first(run, tmp_path):
    publics = [new_key(tmp_path / name) for name in ("one", "two")]
    for name in ("one", "two", "one"):
        sign(run, head_of(run), tmp_path / name)
    assert sorted(check_seals(run, heads_of(run)).says) == sorted(f"signed by {public}" for public in publics)


def test_a_signature_outlives_what_is_committed_later_and_no_rewriting(run, tmp_path):
    new_key(tmp_path / "me")
    before = heads_of(run)
    sign(run, before[-2], tmp_path / "me")
    assert check_seals(run, before).says[0].endswith("1 lines before the head")
    assert "which is not in the chain" in check_seals(run, ["0" * 64]).faults[0]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'{"format": 2, "signatures": []}', b'{"format": 1, "signatures": [3]}', b"\xff" * 9,
     b'{"format": 1, "signatures": [{"head": "a", "public_key": "zz", "signature": "00"}]}'],
)  # fmt: skip
def test_what_somebody_left_as_signatures_is_a_fault_and_no_crash(run, content):
    (run / "signatures.json").write_bytes(content)
    assert len(check_seals(run, heads_of(run)).faults) == 1


def test_a_changed_signature_does_not_fit(run, tmp_path):
    new_key(tmp_path / "me")
    sign(run, head_of(run), tmp_path / "me")
    content = json.loads((run / "signatures.json").read_text())
    content["signatures"][0]["head"] = heads_of(run)[0]
    (run / "signatures.json").write_text(json.dumps(content))
    assert "does not fit the head" in check_seals(run, heads_of(run)).faults[0]


def test_a_key_is_never_overwritten_and_others_are_refused(run, tmp_path):
    new_key(tmp_path / "me")
    with pytest.raises(InputError, match="a key is never overwritten"):
        new_key(tmp_path / "me")
    with pytest.raises(InputError, match="expected a private key in PEM"):
        sign(run, head_of(run), tmp_path / "me.pub")
    with pytest.raises(InputError, match="expected a public key in PEM"):
        check_seals(run, heads_of(run), key=tmp_path / "me")


def test_a_time_stamp_is_of_this_head_and_of_this_authority(run, authority, tmp_path):
    stamped, root = authority
    time = add_stamp(run, head_of(run), stamped(stamp_request(head_of(run))))
    assert check_seals(run, heads_of(run), authority=root).says == (
        f"time-stamped {time}, signed by the authority {root}",
    )
    assert "not checked" in check_seals(run, heads_of(run)).says[0]
    with pytest.raises(InputError, match="the stamp is of something else than the head"):
        add_stamp(run, heads_of(run)[0], stamped(stamp_request(head_of(run))))
    other = tmp_path / "other.pem"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", str(tmp_path / "k"), "-out",
                    str(other), "-days", "30", "-subj", "/CN=Root"], check=True, capture_output=True)  # fmt: skip
    assert "not signed by the authority" in check_seals(run, heads_of(run), authority=other).faults[0]
    assert "of a head that is not in the chain" in check_seals(run, ["0" * 64], authority=root).faults[0]


def test_a_stamp_that_is_none_is_a_fault_and_a_missing_one_that_is_asked_for_too(run, authority):
    _, root = authority
    assert check_seals(run, heads_of(run), authority=root).faults == ("no time stamp, which --authority asks for",)
    (run / "stamp.tsr").write_bytes(b"no stamp")
    assert "not the reply of a time-stamping authority" in check_seals(run, heads_of(run)).faults[0]
    with pytest.raises(InputError, match="not the reply of a time-stamping authority"):
        add_stamp(run, head_of(run), run / "stamp.tsr")


def test_the_commands_seal_and_verify(run, authority, tmp_path, command):
    stamped, root = authority
    assert command("seal", run, "--new-key", tmp_path / "me")[0] == 0
    assert command("seal", run, "--request", tmp_path / "request.tsq")[0] == 0
    reply = stamped((tmp_path / "request.tsq").read_bytes())
    assert command("seal", run, "--stamp", reply)[0] == 0
    said = command("verify", run, "--key", tmp_path / "me.pub", "--authority", root)
    assert said[0] == 0
    assert "signed by " in said[1]
    assert "time-stamped " in said[1]
    new_key(tmp_path / "other")
    assert command("verify", run, "--key", tmp_path / "other.pub")[0] == 1
    assert command("seal")[0] == 2
    (run / "updates" / "round-000000.arrow").unlink()
    assert command("seal", run, "--key", tmp_path / "me")[0] == 2  # evidence that is not intact is not sealed


def test_a_shared_copy_names_nobody_and_holds_no_update(run, tmp_path):
    original = Run.open(run)
    names = share(original, tmp_path / "copy", seed=0)
    copy = Run.open(tmp_path / "copy")
    assert copy.verify().intact
    assert copy.header["source"] == {"shared from": {"head": original.head, "rounds": len(original.log)}}
    content = b"".join(path.read_bytes() for path in sorted((tmp_path / "copy").rglob("*")) if path.is_file())
    assert not any(name.encode() in content for name in names)
    for before, after in zip(original.log, copy.log, strict=True):
        assert [names[name] for name in before.clients.tolist()] == after.clients.tolist()
        np.testing.assert_allclose(after.total_norms, before.total_norms, rtol=1e-6)
        np.testing.assert_array_equal(after.num_examples, before.num_examples)
    verdict, shared = (DETECTORS["layer_norms"]()(each.log) for each in (original, copy))
    np.testing.assert_allclose(shared.scores, verdict.scores, rtol=1e-4)


def test_a_thinned_run_says_what_it_was_and_keeps_the_rest(run, tmp_path):
    original = Run.open(run)
    thinned(original, tmp_path / "thin", Evidence("sketch", width=8, seed=1))
    thin = Run.open(tmp_path / "thin")
    assert thin.verify().intact
    assert thin.header["source"]["thinned from"] == {
        "head": original.head, "rounds": len(original.log), "evidence": original.evidence.settings
    }  # fmt: skip
    assert [round_.clients.tolist() for round_ in thin.log] == [round_.clients.tolist() for round_ in original.log]
    assert thin.metrics.equals(original.metrics)
    with pytest.raises(InputError, match="expected a run that was recorded in full"):
        thinned(thin, tmp_path / "thinner", Evidence("sketch"))


def test_whole_layers_of_updates_are_not_shared(run, tmp_path):
    thinned(Run.open(run), tmp_path / "layers", Evidence("layers", layers=("fc2.bias",)))
    with pytest.raises(InputError, match="whole layers were recorded"):
        share(Run.open(tmp_path / "layers"), tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    thinned(Run.open(run), tmp_path / "thin", Evidence("sketch", seed=1))
    assert len(share(Run.open(tmp_path / "thin"), tmp_path / "copy")) == 10
    assert Run.open(tmp_path / "copy").verify().intact


def test_prune_asks_before_it_throws_anything_away(run, command):
    before = head_of(run)
    said = command("prune", run)
    assert (said[0], head_of(run)) == (0, before)
    assert "--yes does it" in said[1]
    assert command("prune", run, "--keep", "sketch", "--yes")[0] == 0
    assert Run.open(run).evidence.level == "sketch"
    assert Run.open(run).header["source"]["thinned from"]["head"] == before
    assert sorted(path.name for path in run.parent.iterdir() if path.name.startswith(".run")) == []
    assert command("prune", run, "--yes")[0] == 2


def test_evidence_that_is_not_intact_is_neither_shared_nor_thinned(run, tmp_path):
    path = run / "updates" / "round-000001.arrow"
    path.write_bytes(path.read_bytes() + b" ")
    for write in (lambda out: share(Run.open(run), out), lambda out: thinned(Run.open(run), out, Evidence("sketch"))):
        with pytest.raises(InputError, match="expected an intact run"):
            write(tmp_path / "copy")
        assert not (tmp_path / "copy").exists()


def test_the_command_share_keeps_the_names_where_it_is_told(run, tmp_path, command):
    said = command("share", run, "-o", tmp_path / "copy", "--names", tmp_path / "names.csv")
    assert said[0] == 0
    assert "gives away: every global model" in said[1]
    assert (tmp_path / "names.csv").read_text().startswith("client,name\n")
    assert command("share", run, "-o", tmp_path / "other", "--names", tmp_path / "names.csv")[0] == 2
