"""Statistics that follow a client's residuals from round to round: what repeats, and what its labels explain."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from gradlens.errors import CannotSay
from gradlens.geometry import cosines, mean_of_largest
from gradlens.log import Accumulated, Round, UpdateLog
from gradlens.log.accumulated import BUDGET, residuals_of, sketch_rows
from gradlens.log.round import BLOCK
from gradlens.settings import whole_number
from gradlens.statistics.accumulation import accumulated_grams, cohort_with_past
from gradlens.statistics.cohort import table

LABELS = 64  # most labels that drift is regressed on: for a vocabulary it would take more memory than the clients do


def accomplices(log: UpdateLog, neighbours: int = 3) -> pd.DataFrame:
    """How strongly each client pulls together with its closest companions once its labels are accounted for.

    Parameters
    ----------
    log : UpdateLog
        The rounds so far; the clients of the last one are judged.
    neighbours : int, default 3
        As many as the accomplices that an attacker is expected to have; at most all others. The default is our own.

    Returns
    -------
    DataFrame, float64 [client, layer]
        In units of the reference clients' median squared norm, so that 1 is another client like itself; 0 where nothing
        is left, as in the final bias.

    Raises
    ------
    CannotSay
        Where it abstains.
    InputError
        Unless `neighbours` is a whole number of at least 1.

    Notes
    -----
    A client's labels show in its final-bias update, round by round. The residuals (`Accumulated`) of all clients in all
    rounds so far are the observations of a regression of each layer on this label drift. What it leaves unexplained is
    summed per client and divided by the root of its rounds. The value is the mean inner product with the `neighbours`
    reference clients where it is largest. Clients with the same unusual labels are alike until their labels are
    accounted for; clients with one poisoned objective stay alike.

    **Abstains** when fewer than 3 clients are comparable, or most of them have taken part only once: nothing has added
    up; when more than 5,000 clients have been seen; and when the model has no final bias, or one of more than 64
    labels.

    **Fails when** there is a single attacker, or the poison moves the layers just as its labels do.

    Examples
    --------
    >>> from gradlens.examples import example_log
    >>> from gradlens.statistics import accomplices
    >>> accomplices(example_log())["fc2.bias"].abs().max().item()  # labels explain all of the final bias
    0.0
    """
    whole_number("accomplices: neighbours", neighbours, least=1)
    bias = log.model.final_bias
    if bias is None:
        raise CannotSay("the model has no final bias, which tells the label drift")
    if log.model[bias].size > LABELS:
        raise CannotSay(f"the final bias has {log.model[bias].size} labels, drift is regressed on {LABELS} at most")
    round_, rows, rounds = cohort_with_past(log)
    reference = accumulated_grams(log).reference
    accumulated, drifts = log.accumulated, log.folded(_LabelDrifts())
    weights = accumulated.sums[bias].astype(np.float64) @ np.linalg.pinv(drifts.moments, rcond=1e-9, hermitian=True)
    values = np.zeros((len(round_), len(log.model.parameters)))
    for column, name in enumerate(log.model.parameters):
        if name != bias:
            gram = _gram_of_unexplained(name, accumulated, drifts, weights) / np.sqrt(np.outer(rounds, rounds))
            with np.errstate(all="ignore"):  # only in rows that become NaN
                values[:, column] = _common_pull(gram, reference, neighbours)[rows]
    return table(round_, log.model.parameters, values)


def consistency(log: UpdateLog) -> pd.DataFrame:
    """Cosine of each client's residual in the last round to the sum of its earlier residuals, layer by layer.

    Parameters
    ----------
    log : UpdateLog
        The rounds so far; the clients of the last one are judged.

    Returns
    -------
    DataFrame, float64 [client, layer]
        From -1 to 1; 0 for a client without a past, and where either norm is 0.

    Raises
    ------
    CannotSay
        Where it abstains.

    Notes
    -----
    A residual is the update minus the cohort's median, as `Accumulated` sums it. The cosine is about 0 for the noise of
    local training, and positive where a client pulls the same way again and again, as label skew and poison do. It
    falls where an attacker starts, stops or takes turns.

    **Abstains** when fewer than 3 clients are comparable, or most of them have taken part only once: nothing has added
    up.

    **Fails when** label skew makes benign clients as consistent as attackers are.

    Examples
    --------
    >>> from gradlens.examples import example_log
    >>> from gradlens.statistics import consistency
    >>> consistency(example_log())["fc1.weight"].idxmax()
    'client-9'
    """
    round_, rows, _ = cohort_with_past(log)
    accumulated, values = log.accumulated, np.zeros((len(round_), len(log.model.parameters)))
    for column, name in enumerate(log.model.parameters):
        sums, dots = accumulated.sums[name], 0.0
        for start, now in _residual_blocks(round_, name, log.model[name].size, sketched=accumulated.sketched):
            past = sums[rows[round_.comparable], start : start + now.shape[1]] - now
            pairs = ((now, past), (now, now), (past, past))
            dots = dots + np.stack([np.einsum("ki,ki->k", one, other, dtype=np.float64) for one, other in pairs])
        products, squares, past_squares = np.asarray(dots)
        with np.errstate(all="ignore"):  # only in rows that become NaN
            values[round_.comparable, column] = cosines(products, np.sqrt(squares * past_squares))
    return table(round_, log.model.parameters, values)


def _residual_blocks(round_: Round, layer: str, size: int, *, sketched: bool) -> Iterator[tuple[int, np.ndarray]]:
    """What a round adds to `Accumulated` in a layer, block after block: (start, float32 [client, number])."""
    residuals = residuals_of(round_, layer)
    if sketched:
        yield 0, sketch_rows(layer, residuals.clipped(0, size))
        return
    for start in range(0, size, BLOCK):
        yield start, residuals.clipped(start, min(start + BLOCK, size))


@dataclass(frozen=True, eq=False)
class _Drifts:
    """Sums over all residuals of a log: drift x drift [label, label], and layer -> drift x layer [label, number]."""

    moments: np.ndarray
    crossed: dict[str, np.ndarray]
    sketched: bool


@dataclass(frozen=True)
class _LabelDrifts:
    """Adds the label drifts of one more round: a step for `UpdateLog.folded`."""

    def __call__(self, before: _Drifts | None, log: UpdateLog) -> _Drifts:
        if before is not None:
            before = replace(before, crossed={name: np.array(each) for name, each in before.crossed.items()})
        return self.carry(before, log)

    def carry(self, before: _Drifts | None, log: UpdateLog) -> _Drifts:
        """Does the same in the arrays of the state before."""
        round_, bias = log[-1], log.model.final_bias
        assert bias is not None
        labels = log.model[bias].size
        if before is None:
            sketched = 4 * labels * log.model.num_parameters > BUDGET / 4
            nothing = {name: np.zeros((1, log.model[name].size), np.float32) for name in log.model.parameters}
            widths = {name: (sketch_rows(name, each) if sketched else each).shape[1] for name, each in nothing.items()}
            crossed = {name: np.zeros((labels, width), np.float32) for name, width in widths.items()}
            before = _Drifts(np.zeros((labels, labels)), crossed, sketched)
        if not round_.comparable.any():
            return before
        drift = residuals_of(round_, bias).clipped(0, labels).astype(np.float64)
        for name, sums in before.crossed.items():
            for start, now in _residual_blocks(round_, name, log.model[name].size, sketched=before.sketched):
                sums[:, start : start + now.shape[1]] += drift.T @ now  # in float64: the clients' order changes nothing
        return replace(before, moments=before.moments + drift.T @ drift)


def _gram_of_unexplained(name: str, accumulated: Accumulated, drifts: _Drifts, weights: np.ndarray) -> np.ndarray:
    """Inner products of what the label drift leaves of a layer's sums, float64 [seen, seen].

    weights: [seen, label], by which the drift x layer sums explain each client's.
    """
    sums, crossed = accumulated.sums[name], drifts.crossed[name]
    if accumulated.sketched != drifts.sketched:  # the sketch of a sum is the sum of the sketches
        sums = sums if accumulated.sketched else sketch_rows(name, sums)
        crossed = crossed if drifts.sketched else sketch_rows(name, crossed)
    gram = np.zeros((len(sums), len(sums)))
    with np.errstate(all="ignore"):  # a residual that overflowed stays in its own row and column
        for start in range(0, sums.shape[1], BLOCK):
            part = slice(start, start + BLOCK)
            left = sums[:, part].astype(np.float64) - weights @ crossed[:, part]
            gram += left @ left.T
    return gram


def _common_pull(gram: np.ndarray, reference: np.ndarray, neighbours: int) -> np.ndarray:
    """Mean of each row's largest products with others of the reference, over the median of their squares."""
    largest = mean_of_largest(gram, reference, neighbours)
    typical = np.median(np.diagonal(gram)[reference])
    return largest / typical if typical > 0 else np.zeros(len(gram))
