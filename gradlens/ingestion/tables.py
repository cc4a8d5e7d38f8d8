"""CSV files about the clients of a recording: the ground truth, and numbers of training examples."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from gradlens.errors import InputError
from gradlens.ingestion.disk import disk_faults_as_input_errors
from gradlens.ingestion.formats import first_line
from gradlens.log.intake import shown
from gradlens.log.manifest import named_file
from gradlens.log.writer import TRUTH_COLUMNS, record_truth
from gradlens.run import Run


def with_csv_truth(run: Path | str, csv: Path | str) -> Run:
    """Adds the ground truth from a CSV file to a run that has none.

    Parameters
    ----------
    run : Path or str
        The folder of the run.
    csv : Path or str
        A row per client, or per round and client. Columns: client, and optionally round (as the run numbers it; without
        it a row holds for all rounds of the client), compromised (without it every client in the file is), poisoned
        (without it every update of a compromised client is). Clients without a row are benign.

    Returns
    -------
    Run
        The run, opened again.

    Raises
    ------
    InputError
        If the run already has a ground truth or another writer holds it, or if the file cannot be read, a client or
        round is not in the run, a row appears twice, or a value is neither true nor false.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> from gradlens import LogWriter
    >>> from gradlens.examples import example_log
    >>> log = example_log(rounds=2)
    >>> with TemporaryDirectory() as folder:
    ...     with LogWriter.create(f"{folder}/run", log.model, log[0].global_model) as writer:
    ...         writer.commit(log[0], log[1].global_model)
    ...     _ = Path(folder, "truth.csv").write_text("client,poisoned\\nclient-9,yes\\n")
    ...     with_csv_truth(f"{folder}/run", f"{folder}/truth.csv").truth.tail(2).values.tolist()
    [[0, 'client-8', False, False], [0, 'client-9', True, True]]
    """
    with disk_faults_as_input_errors(Path(csv), Path(run)):
        return _with_truth(Run.open(Path(run)), csv)


def _with_truth(opened: Run, csv: Path | str) -> Run:
    """The run with the ground truth of a CSV file, see `with_csv_truth`."""
    rows = [(round_.index, str(client)) for round_ in opened.log for client in (*round_.clients, *round_.refused)]
    known = pd.DataFrame(rows, columns=["round", "client"])
    table, on = _clients(csv, known, "the column client, and round, compromised, poisoned", "the run")
    compromised = _booleans(table, "compromised", csv, np.ones(len(table), bool))
    poisoned = _booleans(table, "poisoned", csv, compromised)
    table = table[on].assign(compromised=compromised, poisoned=poisoned)
    whole = known.merge(table, on=on, how="left")
    flags = {name: whole[name].eq(True) for name in ("compromised", "poisoned")}
    record_truth(opened.path, whole.assign(**flags)[list(TRUTH_COLUMNS)])
    return Run.open(opened.path)


def examples_in(csv: Path | str, sent: Mapping[int, Iterable[str]]) -> dict[int, dict[str, int]]:
    """Reads the numbers of training examples from a CSV file.

    Parameters
    ----------
    csv : Path or str
        Columns: client, num_examples, and round if the numbers vary over rounds.
    sent : Mapping of int to iterable of str
        Round -> the clients that sent a model; rounds as the recording numbers them.

    Returns
    -------
    dict
        Round -> client -> number of examples.

    Raises
    ------
    InputError
        If the file cannot be read, a column is missing, a client or round is not in the recording, a row appears twice,
        a value is not a count, or a client that sent a model has no row.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     _ = Path(folder, "counts.csv").write_text("client,num_examples\\na,600\\nb,20\\n")
    ...     examples_in(f"{folder}/counts.csv", {0: ["a", "b"], 1: ["b"]})
    {0: {'a': 600, 'b': 20}, 1: {'b': 20}}
    """
    rows = [(number, client) for number, clients in sent.items() for client in clients]
    known = pd.DataFrame(rows, columns=["round", "client"]).drop_duplicates()
    table, on = _clients(csv, known, "the columns client, num_examples, and round where it varies", "the recording")
    if "num_examples" not in table.columns:
        raise InputError(f"{csv}: the column num_examples is missing, found {list(table)}")
    if len(wrong := table.loc[~table["num_examples"].str.fullmatch(r"\d{1,18}", flags=re.ASCII), "num_examples"]):
        raise InputError(f"{csv}: num_examples must be a count, found {wrong.iloc[0]!r:.80}")
    whole = known.merge(table, on=on, how="left")
    if (missing := whole["num_examples"].isna()).any():
        raise InputError(f"{csv}: it has no row for {_named(whole.loc[missing, ['round', 'client']].iloc[0])}")
    counts: dict[int, dict[str, int]] = {number: {} for number in sent}
    for number, client, count in zip(whole["round"], whole["client"], whole["num_examples"], strict=True):
        counts[number][client] = int(count)
    return counts


def _clients(csv: Path | str, known: pd.DataFrame, expected: str, where: str) -> tuple[pd.DataFrame, list[str]]:
    """Reads a CSV about clients; also returns which of the columns round and client it has.

    Raises InputError if the file cannot be read, lacks the column client, has a row twice, or names a round or client
    that is not among the `known` ones.
    """
    try:
        table = pd.read_csv(named_file(csv), dtype=str, keep_default_na=False)
    except InputError:
        raise
    except (OSError, ValueError, UnicodeDecodeError) as error:
        raise InputError(f"{csv}: not readable as CSV: {first_line(error)}") from error
    if "client" not in table.columns:
        raise InputError(f"{csv}: expected {expected}; found {list(table)}")
    on = [name for name in ("round", "client") if name in table.columns]
    if "round" in table.columns:
        wrong = table.loc[~table["round"].str.fullmatch(r"\d{1,9}"), "round"]
        if len(wrong):
            raise InputError(f"{csv}: round must be a whole number, found {wrong.iloc[0]!r:.80}")
        table["round"] = table["round"].astype(np.int64)
    if table.duplicated(on).any():
        raise InputError(f"{csv}: {_named(table.loc[table.duplicated(on), on].iloc[0])} appears twice")
    strangers = table.merge(known.drop_duplicates(on), on=on, how="left", indicator=True)["_merge"] == "left_only"
    if strangers.any():
        raise InputError(f"{csv}: {where} has no {_named(table.loc[strangers.to_numpy(), on].iloc[0])}")
    return table, on


def _booleans(table: pd.DataFrame, name: str, csv: Path | str, default: np.ndarray) -> np.ndarray:
    """A column of true and false, `default` if it is missing; raises InputError for any other value."""
    if name not in table.columns:
        return default
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    values = table[name].str.strip().str.lower()
    if (wrong := table.loc[~values.isin(words), name]).size:
        raise InputError(f"{csv}: {name} must be true or false, found {wrong.iloc[0]!r:.80}")
    return values.map(words).to_numpy(bool)


def _named(row: pd.Series) -> str:
    """A row in words, such as "round '3', client 'a'"."""
    return ", ".join(f"{name} {shown(str(value))}" for name, value in row.items())
