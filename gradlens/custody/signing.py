"""Clients sign what they send: `sign_update` at a client, the keys at the server, and the check of a recorded run."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, cast

import numpy as np

from gradlens.custody.seals import Seals, private_key, public_key
from gradlens.errors import InputError
from gradlens.log import Round
from gradlens.log.arrays import Unfit, as_array
from gradlens.log.signatures import KEY, Signers, Statement, digest_of
from gradlens.log.sources import ArraySource
from gradlens.run import Run

SUFFIX = ".pub"  # of the file of a public key, after the client's name
LONGEST_NAMES = 300  # characters of a client's and a run's name, so that every statement fits into `LONGEST`
MOST_FAULTS = 20  # clients that are named one by one


def sign_update(key_file: Path | str, *, client: str, round: int, arrays: Mapping[str, Any], run: str = "") -> str:
    """Signs what a client is about to send.

    Parameters
    ----------
    key_file : Path or str
        The client's private Ed25519 key in PEM, without a password (`new_key`).
    client : str
        Its name, as the server knows it.
    round : int
        Index of the round whose global model it started from, from 0, as the server says (`Recorder.next_round`).
    arrays : Mapping
        Layer -> array, all that is sent and as it is sent: another type of numbers is another signature.
    run : str, default ""
        The name of the run that clients and server agreed on; it keeps a signature from passing in another run.

    Returns
    -------
    str
        The statement with its signature, to send along.

    Raises
    ------
    InputError
        Where the key cannot be read, a value is no array, or a name or the round cannot be.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> from gradlens.custody import new_key
    >>> with TemporaryDirectory() as folder:
    ...     _ = new_key(Path(folder) / "client-1")
    ...     text = sign_update(f"{folder}/client-1", client="client-1", round=3, arrays={"fc.bias": [0.5, 1.0]})
    >>> Statement.read(text).round
    3
    """
    if not isinstance(round, int | np.integer) or not 0 <= round < 2**63:
        raise InputError(f"sign_update: round is the index of a round, found {round!r:.80}")
    if not isinstance(run, str) or len(run) + len(str(client)) > LONGEST_NAMES:
        raise InputError(f"sign_update: client and run are names, of {LONGEST_NAMES} characters together at most")
    numbers, kinds = {}, {}
    for name, value in arrays.items():
        try:
            numbers[name], kinds[name] = as_array(value)
        except Unfit as reason:
            raise InputError(f"sign_update: layer {name!r:.80} {reason}") from reason
    statement = Statement(str(client), run, int(round), digest_of(numbers, kinds))
    signature = private_key(Path(key_file)).sign(statement.signed)
    return replace(statement, signature=signature.hex()).text


def keys_of_clients(keys: Path | str | Mapping[str, str]) -> dict[str, str]:
    """The public keys of clients.

    Parameters
    ----------
    keys : Path, str or Mapping
        A folder with a file NAME.pub in PEM for each client, or client -> 64 hexadecimal digits.

    Returns
    -------
    dict of str to str
        Client -> public key in hexadecimal digits.

    Raises
    ------
    InputError
        Where there is no key, or one cannot be read or proves nothing, since everybody can sign for it.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> from gradlens.custody import new_key
    >>> with TemporaryDirectory() as folder:
    ...     public = new_key(Path(folder) / "client-1")
    ...     keys_of_clients(folder) == {"client-1": public}
    True
    """
    from cryptography.hazmat.primitives.asymmetric import ed25519  # noqa: F401 - missing is said now, not per update

    if isinstance(keys, Mapping):
        found = {str(name): key for name, key in keys.items()}
        if odd := [name for name, key in found.items() if not (isinstance(key, str) and KEY.fullmatch(key))]:
            raise InputError(f"client_keys: expected 64 hexadecimal digits for each client, not so for {odd[0]!r:.80}")
    else:
        folder = Path(keys)
        if not folder.is_dir():
            raise InputError(f"{folder}: expected a folder with a public key NAME{SUFFIX} for each client, found none")
        found = {path.name.removesuffix(SUFFIX): public_key(path) for path in sorted(folder.glob(f"*{SUFFIX}"))}
    if not found:
        raise InputError(f"{keys}: expected a public key NAME{SUFFIX} for each client, found none")
    if weak := [name for name, key in found.items() if _is_weak(bytes.fromhex(key))]:
        raise InputError(
            f"client_keys: the key of {weak[0]!r:.80} is a point of small order, for which anybody can sign"
        )
    return found


def _is_weak(key: bytes) -> bool:
    """Whether a public key is one of the eight points of small order on the curve, by its y.

    y is 0, 1 or -1, or doubling gives y = 0, which on -x^2 + y^2 = 1 + d x^2 y^2 means x^2 = -y^2.
    """
    prime = 2**255 - 19
    d, y = -121665 * pow(121666, -1, prime), int.from_bytes(key, "little") % 2**255
    return y * (y**2 - 1) * (d * y**4 + 2 * y**2 - 1) % prime == 0


def check_updates(folder: Path, keys: Mapping[str, str]) -> Seals:
    """Checks the clients' signatures of a recorded run.

    Parameters
    ----------
    folder : Path
        Of the run.
    keys : Mapping of str to str
        Client -> public key in hexadecimal digits (`keys_of_clients`).

    Returns
    -------
    Seals
        A fault for each client with an update that it did not sign. Faults, and no error, for whatever the run holds.

    Notes
    -----
    A signature proves which digest a client signed, for which round. That the recorded numbers are those is proved
    where they have that digest: always where clients sent updates in the recorded types, of which everything was
    recorded. From local models the server derived the updates, and adding the global model does not always give
    every bit back.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> from gradlens.examples import example_run
    >>> with TemporaryDirectory() as folder:
    ...     seals = check_updates(example_run(f"{folder}/run"), {"client-0": "00" * 32})
    >>> seals.says
    ('0 of 40 updates are signed by the keys of their clients',)
    """
    try:
        run = Run.open(folder)
        source = run.header.get("source")
        source = source if isinstance(source, dict) else {}
        if "shared from" in source:
            return Seals((), ("a shared copy holds no signatures of clients; the run that it was made from may",))
        return _checked(run, keys, source.get("recorder"))
    except InputError as error:
        return Seals((), (f"signatures of clients cannot be checked: {error}",))


def _checked(run: Run, keys: Mapping[str, str], recorder: Any) -> Seals:
    recorder = recorder if isinstance(recorder, dict) else {}
    kept = cache(lambda index: frozenset(run.log[index].signatures.values()))
    signers = Signers(keys, recorder.get("run_name"), kept)
    count, signed, exact, names = 0, 0, 0, set()
    faults: dict[tuple[str, str], list[int]] = defaultdict(list)
    for round_ in run.log:
        count += len(round_)
        rows = _rows(round_)
        for row, client in enumerate(round_.clients.tolist()):
            start = round_.started.get(client, round_.index)
            try:
                if start > round_.index:
                    raise Unfit(f"started from round {start}, which is a later one")
                text = round_.signatures.get(client)
                statement = signers.checked(text, _name(client, start, keys), start, round_.index)
            except Unfit as reason:
                faults[client, str(reason)].append(round_.index)
                continue
            signed, names = signed + 1, names | {statement.run}
            if rows:
                base = None if recorder.get("sent") == "updates" else run.log[start].global_model
                exact += statement.digest == _digest({layer: each[row] for layer, each in rows.items()}, base)
    of_run = f", for the run {', '.join(map(repr, sorted(names - {''})))}" if names - {""} else ""
    says = [f"{signed} of {count} updates are signed by the keys of their clients{of_run}"]
    if signed:
        says.append(f"{exact} of these {signed} are recorded bit for bit as signed")
    if exact < signed:
        says[-1] += "; of the others the signature proves the digest that was signed, the numbers are the recorder's"
    return Seals(tuple(says), tuple(_in_words(faults)))


def _name(row: str, start: int, keys: Mapping[str, str]) -> str:
    """The client whose row it is: of a client's earlier answers the row says from which round (`received`)."""
    return row if row in keys else row.removesuffix(f" (from round {start})")


def _rows(round_: Round) -> dict[str, list[np.ndarray]]:
    """Layer -> each client's update, not copied; nothing where not everything was recorded."""
    if not round_.is_whole:
        return {}
    source = cast(ArraySource, round_.source)  # as it is read from a file
    return {layer: list(chain.from_iterable(source.pieces(layer))) for layer in source}


def _digest(update: Mapping[str, np.ndarray], base: Mapping[str, np.ndarray] | None) -> str:
    """The digest that what was sent has if it had the recorded types; base: the global model it started from."""
    with np.errstate(all="ignore"):  # infinite is what was sent, or what the sum is
        arrays = update if base is None else {layer: base[layer] + array for layer, array in update.items()}
    return digest_of(arrays, {layer: array.dtype.name for layer, array in arrays.items()})


def _in_words(faults: Mapping[tuple[str, str], list[int]]) -> Iterator[str]:
    for (client, reason), rounds in list(faults.items())[:MOST_FAULTS]:
        listed = ", ".join(map(str, rounds[:10])) + (", ..." if len(rounds) > 10 else "")
        where = f"round {listed}" if len(rounds) == 1 else f"{len(rounds)} rounds ({listed})"
        yield f"{client} in {where}: {reason}"
    if (more := len(faults) - MOST_FAULTS) > 0:
        yield f"and {more} more such faults of clients"
