"""What a client signs of what it sends, how the statement is written, and whether it holds.

A signature (Ed25519) is of the client's name, the run, the round and a digest of all numbers. The statement travels
with it as one text, so that it can be kept, and checked again by whoever has the client's public key.
"""

import hashlib
import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import numpy as np

from gradlens.log.arrays import Unfit, shown

SIGNATURE, ROUND = "gradlens-signature", "gradlens-round"  # in a framework's messages: from a client, to a client
STATEMENT, NUMBERS = b"gradlens update 1\n", b"gradlens numbers 1\n"  # what is signed or hashed serves nothing else
LONGEST = 4_096  # characters of a statement
KEY = re.compile(r"[0-9a-f]{64}")
FORMS = {"digest": KEY, "signature": re.compile(r"[0-9a-f]{128}")}


@dataclass(frozen=True)
class Statement:
    """What a client says it sent, and its signature.

    Attributes
    ----------
    client, run : str
        The client's name, and the name of the run.
    round : int
        Index of the round whose global model the client started from.
    digest : str
        Of the numbers (`digest_of`), in hexadecimal digits.
    signature : str
        Ed25519, in hexadecimal digits.

    Examples
    --------
    >>> statement = Statement("client-1", "", 3, digest="00" * 32, signature="00" * 64)
    >>> Statement.read(statement.text).round
    3
    """

    client: str
    run: str
    round: int
    digest: str
    signature: str = ""

    @classmethod
    def read(cls, value: Any) -> Self:
        """The statement that a text holds; raises Unfit for anything else, whatever it is."""
        if type(value) is not str:
            raise Unfit(f"signature: expected text, found {type(value).__name__:.80}")
        if len(value) > LONGEST:
            raise Unfit(f"signature: expected at most {LONGEST:,} characters, found {len(value):,}")
        try:
            made = cls(**json.loads(value))
        except (ValueError, TypeError, RecursionError):
            made = None
        if made is None or not made._is_of_its_form():
            raise Unfit(f"signature: not readable as one, found {shown(value)}")
        return made

    def _is_of_its_form(self) -> bool:
        texts = (self.client, self.run, self.digest, self.signature)
        if not all(type(text) is str for text in texts) or type(self.round) is not int:
            return False
        return 0 <= self.round < 2**63 and all(form.fullmatch(getattr(self, name)) for name, form in FORMS.items())

    @property
    def text(self) -> str:
        """The statement and its signature as JSON in ASCII, always the same for the same statement."""
        return json.dumps(asdict(self), sort_keys=True)

    @property
    def signed(self) -> bytes:
        """The bytes that are signed; each part has its length before it, so that no two statements share them."""
        parts = [_measured(self.run), _measured(self.client), _number(self.round), bytes.fromhex(self.digest)]
        return STATEMENT + b"".join(parts)

    def is_signed_by(self, key: str) -> bool:
        """Whether the holder of a public key, in hexadecimal digits, signed this statement."""
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

        try:
            Ed25519PublicKey.from_public_bytes(bytes.fromhex(key)).verify(bytes.fromhex(self.signature), self.signed)
        except (InvalidSignature, ValueError):
            return False
        return True


@dataclass(frozen=True, eq=False)
class Signers:
    """Whose signatures are expected.

    Attributes
    ----------
    keys : Mapping of str to str
        Client -> its public key in hexadecimal digits.
    run : str or None
        The name of the run that must be signed; None: any.
    kept : callable, optional
        (index of an earlier round) -> the texts that were kept of it, none of which counts a second time.
    """

    keys: Mapping[str, str]
    run: str | None = None
    kept: Callable[[int], Collection[str]] = field(default=lambda index: ())

    def checked(
        self, value: Any, client: str, start: int, index: int, digest: Callable[[], str] | None = None
    ) -> Statement:
        """The statement of a client about what it sent.

        Parameters
        ----------
        value : Any
            What came as the signature, None if nothing did.
        client : str
            Its name.
        start : int
            Index of the round whose global model it started from.
        index : int
            Index of the round in which it arrived.
        digest : callable, optional
            () -> the digest of the numbers that it sent, where they are known.

        Raises
        ------
        Unfit
            Where it is no signature, not this client's, or of something else.
        """
        if client not in self.keys:
            raise Unfit("signature: no key is known of this client")
        if value is None:
            raise Unfit("signature: none")
        statement = Statement.read(value)
        if not statement.is_signed_by(self.keys[client]):
            raise Unfit(f"signature: not of client {shown(client)}")
        for name, found, expected in (
            ("client", statement.client, client),
            ("run", statement.run, self.run),
            ("round", statement.round, start),
        ):
            if expected is not None and found != expected:
                raise Unfit(f"signature: of {name} {shown(found)}, expected {shown(expected)}")
        if digest is not None and statement.digest != digest():
            raise Unfit("signature: of other numbers than were sent")
        for earlier in range(start, index):
            if statement.text in self.kept(earlier):
                raise Unfit(f"signature: of what was already sent in round {earlier}")
        return statement


def digest_of(arrays: Mapping[str, np.ndarray], kinds: Mapping[str, str]) -> str:
    """SHA-256 over all numbers of an answer with the layers' names, types and shapes, in hexadecimal digits.

    Parameters
    ----------
    arrays : Mapping
        Layer -> array, in any order and byte order.
    kinds : Mapping
        Layer -> the type that its numbers had, as `as_array` gives it.

    Notes
    -----
    Layers come in the order of their names in UTF-8; each name, type, shape and row of bytes (little-endian, in C
    order) has its length before it.

    Examples
    --------
    >>> one, other = np.zeros(4, np.float32), np.zeros((2, 2), np.float32)
    >>> digest_of({"a": one}, {"a": "float32"}) == digest_of({"a": other}, {"a": "float32"})
    False
    """
    digest = hashlib.sha256(NUMBERS + _number(len(arrays)))
    for name in sorted(arrays, key=_utf8):
        array = arrays[name]
        shape = b"".join(map(_number, array.shape))
        digest.update(_measured(name) + _measured(kinds[name]) + _number(array.ndim) + shape + _number(array.nbytes))
        digest.update(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def kept_text(value: Any) -> str:
    """What the record keeps of a signature: the statement, or in a few characters what came in its place."""
    try:
        return Statement.read(value).text
    except Unfit as reason:
        return str(reason)


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _number(number: int) -> bytes:
    return number.to_bytes(8, "big")


def _measured(text: str) -> bytes:
    """A text with its length before it."""
    return _number(len(_utf8(text))) + _utf8(text)
