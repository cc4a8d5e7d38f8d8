"""What a CSV says about the clients of a recording: who was malicious, how many examples an update rests on."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from gradlens.errors import InputError
from gradlens.ingestion.disk import disk_faults_as_input_errors
from gradlens.ingestion.formats import first_line
from gradlens.log.intake import shown
from gradlens.log.writer import TRUTH_COLUMNS, record_truth
from gradlens.run import Run


def with_csv_truth(run: Path | str, csv: Path | str) -> Run:
    """Adds the ground truth to a run that has none: a CSV with the column client, and round, compromised, poisoned.

    Without `round` a row holds for all rounds of the client; without `compromised` the clients named are; without
    `poisoned` every update of theirs is. Updates of clients that are not named are benign. Rounds are those of the run.
    Raises: InputError where a client or round is not the run's, or a value is neither true nor false.
    """
    with disk_faults_as_input_errors(Path(csv), Path(run)):
        return _with_truth(Run.open(Path(run)), csv)


def _with_truth(found: Run, csv: Path | str) -> Run:
    """The run with what the CSV says, see `with_csv_truth`."""
    rows = [(round_.index, str(client)) for round_ in found.log for client in (*round_.clients, *round_.refused)]
    known = pd.DataFrame(rows, columns=["round", "client"])
    table, on = _clients(csv, known, "the column client, and round, compromised, poisoned", "the run")
    compromised = _booleans(table, "compromised", csv, np.ones(len(table), bool))
    poisoned = _booleans(table, "poisoned", csv, compromised)
    table = table[on].assign(compromised=compromised, poisoned=poisoned)
    whole = known.merge(table, on=on, how="left")
    flags = {name: whole[name].eq(True) for name in ("compromised", "poisoned")}
    record_truth(found.path, whole.assign(**flags)[list(TRUTH_COLUMNS)])
    return Run.open(found.path)


def examples_in(csv: Path | str, sent: Mapping[int, Iterable[str]]) -> dict[int, dict[str, int]]:
    """Round -> client -> number of examples: a CSV with the columns client, num_examples, and round where it varies.

    sent: round -> who sent a model, rounds as the recording numbers them.
    Raises: InputError where a client or round is not there, a count is none, or one that sent a model has no row.
    """
    rows = [(number, client) for number, clients in sent.items() for client in clients]
    known = pd.DataFrame(rows, columns=["round", "client"]).drop_duplicates()
    table, on = _clients(csv, known, "the columns client, num_examples, and round where it varies", "the recording")
    if "num_examples" not in table.columns:
        raise InputError(f"{csv}: the column num_examples is missing, found {list(table)}")
    if len(wrong := table.loc[~table["num_examples"].str.fullmatch(r"\d{1,18}", flags=re.ASCII), "num_examples"]):
        raise InputError(f"{csv}: num_examples is a count, found {wrong.iloc[0]!r:.80}")
    whole = known.merge(table, on=on, how="left")
    if (missing := whole["num_examples"].isna()).any():
        raise InputError(f"{csv}: it has no {_said(whole.loc[missing, ['round', 'client']].iloc[0])}")
    counts: dict[int, dict[str, int]] = {number: {} for number in sent}
    for number, client, count in zip(whole["round"], whole["client"], whole["num_examples"], strict=True):
        counts[number][client] = int(count)
    return counts


def _clients(csv: Path | str, known: pd.DataFrame, expected: str, where: str) -> tuple[pd.DataFrame, list[str]]:
    """The rows of a CSV about clients, each that of one known [round, client], and the columns that say of which."""
    try:
        table = pd.read_csv(csv, dtype=str, keep_default_na=False)
    except (OSError, ValueError, UnicodeDecodeError) as error:
        raise InputError(f"{csv}: not readable as CSV: {first_line(error)}") from error
    if "client" not in table.columns:
        raise InputError(f"{csv}: expected {expected}; found {list(table)}")
    on = [name for name in ("round", "client") if name in table.columns]
    if "round" in table.columns:
        wrong = table.loc[~table["round"].str.fullmatch(r"\d{1,9}"), "round"]
        if len(wrong):
            raise InputError(f"{csv}: round {wrong.iloc[0]!r:.80} is no number")
        table["round"] = table["round"].astype(np.int64)
    if table.duplicated(on).any():
        raise InputError(f"{csv}: {_said(table.loc[table.duplicated(on), on].iloc[0])} stands there twice")
    strangers = table.merge(known.drop_duplicates(on), on=on, how="left", indicator=True)["_merge"] == "left_only"
    if strangers.any():
        raise InputError(f"{csv}: {where} has no {_said(table.loc[strangers.to_numpy(), on].iloc[0])}")
    return table, on


def _booleans(table: pd.DataFrame, name: str, csv: Path | str, usual: np.ndarray) -> np.ndarray:
    if name not in table.columns:
        return usual
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    values = table[name].str.strip().str.lower()
    if (wrong := table.loc[~values.isin(words), name]).size:
        raise InputError(f"{csv}: {name} is true or false, found {wrong.iloc[0]!r:.80}")
    return values.map(words).to_numpy(bool)


def _said(row: pd.Series) -> str:
    return ", ".join(f"{name} {shown(str(value))}" for name, value in row.items())
