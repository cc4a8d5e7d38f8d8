"""Seals on the head of a run or sweep: signatures (Ed25519) and time stamps (RFC 3161).

A chain of hashes proves nothing against the operator, who can rebuild it. A signature binds the holder of a key to one
head; a time stamp of an authority proves that the head existed by then. Both lie beside the manifest and change nothing
that was committed. No network is used: a request goes into a file, and the authority's reply comes from one.
"""

import hashlib
import json
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gradlens.errors import InputError
from gradlens.log.files import replace_with
from gradlens.log.manifest import SIGNATURES, STAMP, regular_file

LARGEST = 1 << 20  # bytes of a file of signatures, a key, a certificate or a stamp
PURPOSE = b"gradlens head 1\n"  # before the head in what is signed, so that a signature serves nothing else


@dataclass(frozen=True)
class Seals:
    """What the seals of a run say.

    Attributes
    ----------
    says : tuple of str
        A sentence for each signature and for the time stamp.
    faults : tuple of str
        What is wrong with them.

    Examples
    --------
    >>> Seals().faults
    ()
    """

    says: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()


def new_key(path: Path) -> str:
    """Makes a key to sign with: a private key at a path, which its owner alone may read, and `path`.pub beside it.

    Parameters
    ----------
    path : Path
        Where to; nothing may be there.

    Returns
    -------
    str
        The public key in hexadecimal digits, to note elsewhere.

    Raises
    ------
    InputError
        Where something is there already, or cannot be written.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     len(new_key(Path(folder) / "examiner"))
    64
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

    public = path.with_name(f"{path.name}.pub")
    if taken := [place for place in (path, public) if os.path.lexists(place)]:
        raise InputError(f"{taken[0]}: it exists; a key is never overwritten, name another file")
    key = Ed25519PrivateKey.generate()
    try:
        replace_with(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), secret=True)
        replace_with(public, key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    except OSError as error:
        raise InputError(f"{path}: a key cannot be written here: {error.strerror or error}") from error
    return _hexadecimal(key.public_key())


def sign(folder: Path, head: str, key: Path) -> str:
    """Signs the head of a run or sweep, beside the signatures that are there.

    Parameters
    ----------
    folder : Path
        Of the run or sweep; `signatures.json` in it is written.
    head : str
        The head that was verified.
    key : Path
        A private Ed25519 key in PEM, without a password.

    Returns
    -------
    str
        The public key in hexadecimal digits.

    Raises
    ------
    InputError
        Where the key or the signatures that are there cannot be read.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     public = new_key(Path(folder) / "examiner")
    ...     sign(Path(folder), "00" * 32, Path(folder) / "examiner") == public
    True
    """
    private = private_key(key)
    public = _hexadecimal(private.public_key())
    entry = {"head": head, "public_key": public, "signature": private.sign(PURPOSE + head.encode()).hex()}
    before = [each for each in _signatures(folder) if (each["head"], each["public_key"]) != (head, public)]
    content = {"format": 1, "signatures": [*before, entry]}
    replace_with(folder / SIGNATURES, json.dumps(content, indent=1).encode())
    return public


def stamp_request(head: str) -> bytes:
    """The request for a time stamp on a head, as a time-stamping authority takes it (RFC 3161, DER).

    Parameters
    ----------
    head : str
        Of a run or sweep.

    Examples
    --------
    >>> len(stamp_request("00" * 32)) > 50
    True
    """
    from rfc3161_client import HashAlgorithm, TimestampRequestBuilder

    builder = TimestampRequestBuilder().data(PURPOSE + head.encode()).hash_algorithm(HashAlgorithm.SHA256)
    return builder.cert_request(cert_request=True).build().as_bytes()


def add_stamp(folder: Path, head: str, reply: Path) -> str:
    """Keeps the reply of a time-stamping authority beside a run or sweep.

    Parameters
    ----------
    folder : Path
        Of the run or sweep; `stamp.tsr` in it is written.
    head : str
        The head that was stamped.
    reply : Path
        The authority's reply (DER).

    Returns
    -------
    str
        The time of the stamp, ISO 8601.

    Raises
    ------
    InputError
        Where the reply is none, was refused, or is of another head.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     _ = (Path(folder) / "reply.tsr").write_bytes(b"")
    ...     try:
    ...         add_stamp(Path(folder), "00" * 32, Path(folder) / "reply.tsr")
    ...     except InputError as error:
    ...         print("not the reply of a time-stamping authority" in str(error))
    True
    """
    content = regular_file(reply, LARGEST).read_bytes()
    answer = _stamp(content, str(reply))
    if answer.tst_info.message_imprint.message != _digest(answer, head):
        raise InputError(f"{reply}: the stamp is of something else than the head {head}")
    replace_with(folder / STAMP, content)
    return answer.tst_info.gen_time.isoformat()


def check_seals(
    folder: Path, heads: Collection[str], *, key: Path | None = None, authority: Path | None = None
) -> Seals:
    """Checks the seals of a run or sweep.

    Parameters
    ----------
    folder : Path
        Of the run or sweep.
    heads : collection of str
        Its heads so far, the last one the present one; a seal may be older.
    key : Path, optional
        A public key in PEM that must have signed.
    authority : Path, optional
        Certificates in PEM, the authority's root among them, by which the stamp must be signed; without it a stamp is
        read, not checked.

    Returns
    -------
    Seals
        Faults, and no error, for whatever lies in the folder.

    Raises
    ------
    InputError
        Where the key or the certificates cannot be read.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     _ = new_key(Path(folder) / "examiner")
    ...     _ = sign(Path(folder), "00" * 32, Path(folder) / "examiner")
    ...     len(check_seals(Path(folder), ["00" * 32]).says), check_seals(Path(folder), ["11" * 32]).says
    (1, ())
    """
    heads = list(heads)
    says, faults = _signatures_say(folder, heads, key)
    if os.path.lexists(folder / STAMP):
        said, fault = _stamp_says(folder, heads, authority)
        says, faults = [*says, *said], [*faults, *fault]
    elif authority is not None:
        faults.append("no time stamp, which --authority asks for")
    return Seals(tuple(says), tuple(faults))


def _signatures_say(folder: Path, heads: list[str], key: Path | None) -> tuple[list[str], list[str]]:
    """What the signatures say, and what is wrong with them."""
    wanted = None if key is None else public_key(key)
    says, faults, signed = [], [], set()
    try:
        entries = _signatures(folder)
    except InputError as error:
        entries, faults = [], [str(error).removeprefix(f"{folder}/")]
    for entry in entries:
        whose = f"signature of {entry['public_key'][:16]}"
        if not _is_signed(entry):
            faults.append(f"{whose}: it does not fit the head {entry['head']:.64}")
        elif entry["head"] not in heads:
            faults.append(f"{whose}: it is of the head {entry['head']:.64}, which is not in the chain")
        else:
            signed.add(entry["public_key"])
            later = len(heads) - 1 - heads.index(entry["head"])
            says.append(f"signed by {entry['public_key']}" + (f", {later} lines before the head" if later else ""))
    if wanted is not None and wanted not in signed:
        faults.append(f"not signed by the key {key}, {wanted}")
    return says, faults


def _hexadecimal(key: Any) -> str:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return key.public_bytes(Encoding.Raw, PublicFormat.Raw).hex()


def private_key(path: Path) -> Any:
    """The private Ed25519 key in a PEM file; raises InputError for anything else."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    key = _loaded(path, "a private key in PEM without a password", partial(load_pem_private_key, password=None))
    if not isinstance(key, Ed25519PrivateKey):
        raise InputError(f"{path}: expected an Ed25519 key, found another kind; `gradlens seal --new-key` makes one")
    return key


def public_key(path: Path) -> str:
    """The public Ed25519 key in a PEM file, in hexadecimal digits; raises InputError for anything else."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    key = _loaded(path, "a public key in PEM", load_pem_public_key)
    if not isinstance(key, Ed25519PublicKey):
        raise InputError(f"{path}: expected an Ed25519 key, found another kind")
    return _hexadecimal(key)


def _signatures(folder: Path) -> list[dict[str, str]]:
    """The signatures that lie in a folder, [] where there are none; raises InputError for anything else."""
    path = folder / SIGNATURES
    if not os.path.lexists(path):
        return []
    try:
        content = json.loads(regular_file(path, LARGEST).read_bytes())
        entries = [
            {name: str(entry[name]) for name in ("head", "public_key", "signature")} for entry in content["signatures"]
        ]
        if content["format"] != 1:
            raise ValueError(f"format {content['format']}")
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: not readable as signatures of format 1: {error!r:.100}") from error
    return entries


def _is_signed(entry: dict[str, str]) -> bool:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(entry["public_key"]))
        key.verify(bytes.fromhex(entry["signature"]), PURPOSE + entry["head"].encode())
    except (InvalidSignature, ValueError):
        return False
    return True


def _stamp(content: bytes, where: str) -> Any:
    from rfc3161_client import PKIStatus, decode_timestamp_response

    try:
        answer = decode_timestamp_response(content)
        granted = PKIStatus(answer.status) in (PKIStatus.GRANTED, PKIStatus.GRANTED_WITH_MODS)
        _ = granted and answer.tst_info  # parsed when it is read
    except ValueError as error:
        raise InputError(f"{where}: not the reply of a time-stamping authority (RFC 3161): {error}") from error
    if not granted:
        raise InputError(f"{where}: the authority refused the time stamp, status {answer.status}")
    return answer


def _digest(answer: Any, head: str) -> bytes:
    """The digest of what is stamped, by the algorithm of the reply."""
    names = {"2.16.840.1.101.3.4.2.1": "sha256", "2.16.840.1.101.3.4.2.2": "sha384", "2.16.840.1.101.3.4.2.3": "sha512"}
    name = names.get(answer.tst_info.message_imprint.hash_algorithm.dotted_string)
    return b"" if name is None else hashlib.new(name, PURPOSE + head.encode()).digest()


def _stamp_says(folder: Path, heads: list[str], authority: Path | None) -> tuple[list[str], list[str]]:
    """What the stamp says, and what is wrong with it."""
    from cryptography.x509 import load_pem_x509_certificates
    from rfc3161_client import VerificationError, VerifierBuilder

    try:
        answer = _stamp(regular_file(folder / STAMP, LARGEST).read_bytes(), STAMP)
    except (InputError, OSError) as error:
        return [], [str(error).removeprefix(f"{folder}/")]
    stamped = [head for head in heads if _digest(answer, head) == answer.tst_info.message_imprint.message]
    if not stamped:
        return [], [f"{STAMP}: it is of a head that is not in the chain"]
    sentence = f"time-stamped {answer.tst_info.gen_time.isoformat()}"
    if authority is None:
        return [f"{sentence} (not checked: --authority names whom to trust)"], []
    builder = VerifierBuilder()
    for certificate in dict.fromkeys(_loaded(authority, "certificates in PEM", load_pem_x509_certificates)):
        builder = builder.add_root_certificate(certificate)
    try:
        builder.build().verify_message(answer, PURPOSE + stamped[-1].encode())
    except VerificationError as error:
        return [], [f"{STAMP}: not signed by the authority {authority}: {error}"]
    return [f"{sentence}, signed by the authority {authority}"], []


def _loaded(path: Path, what: str, load: Callable[[bytes], Any]) -> Any:
    """What a small file holds; raises InputError where it is something else."""
    try:
        return load(regular_file(path, LARGEST).read_bytes())
    except (ValueError, TypeError, OSError) as error:
        raise InputError(f"{path}: expected {what}: {error}") from error
