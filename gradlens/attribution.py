"""Attribution: which labels an attacker flips, who is responsible for a misclassified sample, who are Sybils.

No ground truth is needed; if it is known, `attribution_accuracy` says how often the suspected labels are right.
"""

from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import pandas as pd
from scipy.sparse.csgraph import connected_components

from gradlens.errors import CannotSay, InputError
from gradlens.evaluation.labels import attribution_accuracy
from gradlens.geometry import ROUNDING, TIE, cosines, ratio
from gradlens.log import Round, UpdateLog
from gradlens.scorers import robustly_scaled
from gradlens.statistics.cohort import SMALLEST, cohort, table, units

__all__ = ["Gradient", "attribution_accuracy", "influence", "label_drift", "suspected_labels", "sybils"]

# global model -> gradient of the loss, both layer -> array; the gradient of layers that are left out is 0
Gradient = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]

ORDINARY = 10  # earlier rounds of a client from which its ordinary label skew is taken
MOST_NUMBERS = 1 << 20  # of the final weight, above which its bias alone is asked


def label_drift(log: UpdateLog, learning_rate: float | None = None) -> pd.DataFrame:
    """Measures how much more or less of each label a client saw than the model predicts, relative to the cohort.

    Parameters
    ----------
    log : UpdateLog
        The clients of its last round are judged.
    learning_rate : float, optional
        The clients' learning rate. The update of the final bias is divided by it, which gives the surplus of labels, in
        shares of a batch summed over steps; without it the table is in logits.

    Returns
    -------
    DataFrame, float64 [client, class]
        A class is a unit of the final layer, "fc2.bias[c]", or without a final bias "fc2.weight[c]". ``attrs["unit"]``
        names the unit of the values.

    Raises
    ------
    CannotSay
        With fewer than 3 comparable clients, or without a final layer.
    InputError
        If the learning rate is not a positive number, or is given for a model without a final bias.

    Notes
    -----
    Under plain SGD and softmax cross-entropy the final bias moves by exactly ::

        learning rate * sum over local steps of mean over the batch of (y - p)

    label minus predicted probability [1]_. The cohort's median is subtracted, so that what all clients have in common
    (the model's own bias, classes it is still learning) cancels. Without a final bias the row sums of the final weight
    are used instead: each sample is then weighted by the sum of its features, so the values are not counts of labels
    and no learning rate is accepted. Reading poisoned labels from the bias is due to [2]_.

    A sigmoid for each label under binary cross-entropy moves its bias by the same formula, label by label; a single
    logit is positive for label 1. Of a squared error it is twice (target minus answer), where targets take the place of
    labels. Where every pixel or token is a sample, the mean goes over these.

    References
    ----------
    .. [1] Jebreel et al. 2022, arXiv:2207.01982, eq. (1).
    .. [2] Bilgin 2021, arXiv:2111.14683.

    Examples
    --------
    >>> from gradlens.examples import example_log
    >>> drift = label_drift(example_log())
    >>> drift.loc["client-9"].idxmin(), drift.loc["client-9"].idxmax()  # it flips label 3 to label 1
    ('fc2.bias[3]', 'fc2.bias[1]')
    >>> drift.attrs["unit"]
    'logits'
    """
    round_ = cohort(log)
    layer = log.model.final_bias or _final_layer(log)
    with np.errstate(all="ignore"):  # only in rows of clients that are not comparable
        rows = log.model.by_unit(layer, round_.flat(layer).astype(np.float64)).sum(axis=2)
    unit = "logits"
    if log.model.final_bias is None:
        unit = "row sums of the final weight, for want of a final bias: each sample counts by the sum of its features"
    if rows.shape[1] == 1:
        unit += ", of one output: positive is label 1 of a binary task, or a larger answer of a regression"
    if learning_rate is not None:
        if not (np.isfinite(learning_rate) and learning_rate > 0):
            raise InputError(f"learning_rate is a positive number, found {learning_rate}")
        if log.model.final_bias is None:
            raise InputError("learning_rate turns the final bias into labels, and this model has none: leave it out")
        rows, unit = rows / learning_rate, "surplus labels, in shares of a batch summed over steps"
    drift = table(round_, units(layer, rows.shape[1]), _minus_median(rows, round_.comparable))
    drift.attrs["unit"] = unit
    return drift


def suspected_labels(log: UpdateLog, rounds: Collection[int] | None = None) -> pd.DataFrame:
    """Estimates each client's target label and source label, under the assumption that it is malicious.

    Parameters
    ----------
    log : UpdateLog
        The clients of its last round are judged.
    rounds : collection of int, optional
        Indices of the suspicious rounds, such as those in which the client was flagged; by default the last one. The
        client's rounds before the first of them are taken as benign. Name the rounds if the client has poisoned for as
        long as half of its last 10 rounds; otherwise the attack itself is taken as benign.

    Returns
    -------
    DataFrame [client]
        target (Int64): the class of the largest surplus. source (Int64): the class that holds more than half of the
        whole deficit; <NA> means several, since a backdoor trigger relabels all classes and label flipping one.
        strength: the robust z-score of the client's largest surplus within the cohort. rounds: in how many suspicious
        rounds it took part. <NA> and NaN for clients that are not comparable or took part in none; target and source
        are <NA> if no class gained. Benign clients have a largest surplus, too: the strength tells whether it matters.

    Raises
    ------
    CannotSay
        With fewer than 3 comparable clients, without a final layer, or with one of a single output.
    InputError
        If a round is not in the log.

    Notes
    -----
    The final weight's update is a sum over samples of (y - p) x features [1]_: the surplus of each label, and the
    samples it occurred on. The whole update is first scaled to the cohort's median norm, since boosting also multiplies
    what is common; then the cohort's median is subtracted, and the median of the client's own last 10 rounds before the
    suspicious ones, its ordinary label skew. The leading singular component is one kind of sample, and the labels that
    it gained and lost: the evidence [class], signed for features that are not negative, as after a ReLU. A model
    without a final weight is judged by its final bias. Evidence of several rounds is added and divided by the square
    root of their number. The baselines and the component are our own, chosen on simulations of digits and
    Fashion-MNIST; `reports/gauntlet.html` shows how often they are right.

    References
    ----------
    .. [1] Jebreel et al. 2022, arXiv:2207.01982, eq. (1).

    Examples
    --------
    >>> from gradlens.examples import example_log
    >>> suspected_labels(example_log()).columns.tolist()
    ['target', 'source', 'strength', 'rounds']
    """
    round_ = cohort(log)
    layer = _final_layer(log)
    if log.model.num_units(layer) < 2:
        raise CannotSay(
            f"the final layer {layer!r} has one output, of a binary task or a regression, and no labels to tell apart; "
            "label_drift tells in which direction each client pulls it"
        )
    evidence, count = _accumulated(log, layer, rounds)
    known = round_.comparable & (count > 0)
    rows = np.where(known[:, None], evidence, 0)
    strength = np.full(len(rows), np.nan)
    if known.any():
        strength[known] = robustly_scaled(rows[known].max(axis=1, keepdims=True))[:, 0]
    has_surplus = rows.max(axis=1, initial=0) > TIE * np.abs(rows).max(initial=0)
    columns = {
        "target": pd.Series(np.where(has_surplus, rows.argmax(axis=1), np.nan)).astype("Int64"),
        "source": pd.Series(np.where(has_surplus, [_source(row) for row in rows], np.nan)).astype("Int64"),
        "strength": strength,
        "rounds": count,
    }
    return pd.DataFrame(columns).set_axis(pd.Index(round_.clients.tolist(), name="client", dtype=object))


def influence(
    log: UpdateLog,
    gradient: Gradient,
    clean: Gradient | None = None,
    *,
    rounds: Collection[int] | None = None,
    normalised: bool = True,
    learning_rate: float | Mapping[int, float] = 1.0,
    per_round: bool = False,
) -> pd.DataFrame:
    """Measures how far each client's updates moved the model towards misclassifying given samples (FLForensics).

    Parameters
    ----------
    log : UpdateLog
        All its rounds must have been recorded in full.
    gradient : callable
        Global model (layer -> array, before the round) -> gradient (layer -> array) of the mean loss of the
        misclassified samples, with the model's wrong output as their label.
    clean : callable, optional
        The same gradient for samples that truly are of that class (the authors' code: uniform noise labeled with it).
        The first influence of malicious clients is large and the second is small; for benign clients with many samples
        of the class, both are large.
    rounds : collection of int, optional
        The rounds to use, by default all (the paper stores every 10th).
    normalised : bool, default True
        Whether each update is scaled to norm 1, whatever its boost, as in the authors' code. False gives the
        first-order change of the loss by the update as sent, in units of loss; such an update already contains the
        learning rate, so `learning_rate` must then be left at its default.
    learning_rate : float or mapping of int to float, default 1.0
        One for all rounds, or round -> rate.
    per_round : bool, default False
        Whether to divide by the number of rounds that the client took part in, for runs that sample clients.

    Returns
    -------
    DataFrame [client]
        All clients of the log, sorted by name: influence, clean_influence (with `clean`), rounds. A positive influence
        means that the client lowered that loss; in units of loss per unit of weight x learning rate.

    Raises
    ------
    InputError
        If a gradient names an unknown layer, has another shape or is not finite.
    CannotSay
        If a round was not recorded in full.

    Notes
    -----
    The influence is summed over the client's rounds [1]_::

        learning rate / participants * <-gradient, update / |update|>

    A round in which a client sent numbers that are not finite does not count for it. Details that are not in the
    abstract follow the authors' code, github.com/jyqhahah/FLForensics, which takes the gradient after the round instead
    of before it.

    References
    ----------
    .. [1] Jia et al. 2024, arXiv:2407.07221.

    Examples
    --------
    >>> from gradlens.examples import example_log
    >>> def gradient(state):  # of a loss that falls as label 1 gains on label 3
    ...     return {"fc2.bias": [0.0, -1.0, 0.0, 1.0]}
    >>> influence(example_log(), gradient, normalised=False)["influence"].idxmax()
    'client-9'
    """
    if not normalised and learning_rate != 1.0:
        raise InputError("learning_rate weighs normalised updates; an update as sent holds its own already")
    wanted = {"influence": gradient} | ({} if clean is None else {"clean_influence": clean})
    chosen = None if rounds is None else _known(log, rounds)
    sums: dict[str, np.ndarray] = {}
    for round_ in log:
        if chosen is not None and round_.index not in chosen:
            continue
        if not round_.is_whole:
            raise CannotSay(f"round {round_.index} was not recorded in full, which the influence needs")
        weight = learning_rate[round_.index] if isinstance(learning_rate, Mapping) else learning_rate
        finite = np.flatnonzero(round_.finite)
        moved = np.stack([_descent(round_, finite, log.model.parameters, loss) for loss in wanted.values()], axis=1)
        if normalised:
            norms = round_.total_norms[finite]
            moved /= np.where(norms > 0, norms, 1)[:, None]
        moved *= weight / max(len(round_), 1)
        for client, row in zip(round_.clients[finite].tolist(), moved, strict=True):
            sums[client] = sums.get(client, np.zeros(len(wanted) + 1)) + np.append(row, 1)
        for client in round_.clients.tolist():
            sums.setdefault(client, np.zeros(len(wanted) + 1))
    clients = sorted(sums)
    values = np.array([sums[client] for client in clients]).reshape(len(clients), len(wanted) + 1)
    if per_round:
        values[:, :-1] /= np.maximum(values[:, -1:], 1)
    table_ = pd.DataFrame(values, pd.Index(clients, name="client", dtype=object), [*wanted, "rounds"])
    return table_.astype({"rounds": np.int64})


def sybils(log: UpdateLog, similarity: float = 0.99, nearer: float = 10.0) -> pd.DataFrame:
    """Groups the clients that sent nearly the same update in the last round, or scaled copies of it.

    Parameters
    ----------
    log : UpdateLog
        Its last round is judged.
    similarity : float, default 0.99
        The cosine from which two updates are linked; our own choice. In the simulated iid and Dirichlet runs pairs of
        benign clients stay below 0.93.
    nearer : float, default 10.0
        How many times smaller than the median over all pairs 1 - cosine must be; our own choice.

    Returns
    -------
    DataFrame [client]
        group (from 0, the largest first, then by name), similarity (the largest cosine to another member), size (of the
        group). Empty if there are no groups; clients that are not comparable are left out.

    Raises
    ------
    CannotSay
        With more than 5,000 clients.
    InputError
        If `similarity` or `nearer` is out of its range.

    Notes
    -----
    Two clients are linked by the cosine of their whole updates. If local training has little noise, all benign updates
    are alike without being copies: hence `nearer`. Equal updates are always linked, and so are all-zero updates. A
    group is a connected component; a client whose update was copied is in the group of its copies.

    Examples
    --------
    >>> import numpy as np
    >>> from gradlens import UpdateLog
    >>> from gradlens.examples import example_log
    >>> log = example_log()
    >>> twice = log[-1].combined(np.eye(10)[[0, 1, 2, 3, 4, 5, 6, 7, 9, 9]])  # client-8 copies client-9
    >>> sybils(UpdateLog(log.model, [twice])).index.tolist()
    ['client-8', 'client-9']
    """
    if not 0 < similarity <= 1:
        raise InputError(f"similarity is a cosine above 0 and at most 1, found {similarity}")
    if not nearer >= 1:
        raise InputError(f"nearer is a factor of at least 1, found {nearer}")
    round_ = log[-1]
    order = np.flatnonzero(round_.comparable)
    order = order[np.argsort(round_.clients[order])]
    cosine = _cosines(round_, order)
    distance = 1 - cosine
    pairs = distance[np.triu_indices(len(order), 1)]
    bound = min(1 - similarity, np.median(pairs) / nearer) if len(pairs) else 0.0
    linked = distance <= max(bound, ROUNDING)
    np.fill_diagonal(linked, False)
    _, labels = connected_components(linked, directed=False)
    sizes = np.bincount(labels, minlength=1)
    groups = [np.flatnonzero(labels == label) for label in np.argsort(-sizes, kind="stable") if sizes[label] > 1]
    np.fill_diagonal(cosine, -1)
    rows = [
        (str(round_.clients[order[i]]), number, cosine[i, members].max(), len(members))
        for number, members in enumerate(groups)
        for i in members
    ]
    columns = {"client": object, "group": np.int64, "similarity": np.float64, "size": np.int64}
    return pd.DataFrame(rows, columns=list(columns)).astype(columns).set_index("client")


def _final_layer(log: UpdateLog) -> str:
    model = log.model
    whole = model.final_weight is not None and len(model[model.final_weight].shape) > 1
    layer = model.final_weight if whole else model.final_bias
    if layer is None:
        raise CannotSay("the model has no final layer, recorded class by class, from which labels are estimated")
    if model[layer].size > MOST_NUMBERS and model.final_bias is not None:  # a vocabulary: its bias tells its words
        return model.final_bias
    return layer


def _minus_median(rows: np.ndarray, comparable: np.ndarray) -> np.ndarray:
    """Subtracts the median of the comparable rows from all rows."""
    with np.errstate(all="ignore"):  # only in rows of clients that are not comparable
        return rows - np.median(rows[comparable], axis=0)


def _to_median_norm(log: UpdateLog) -> np.ndarray:
    """The factors that scale each comparable client's last update to their median norm, float64 [comparable]."""
    round_ = log[-1]
    norms = round_.total_norms[round_.comparable]
    return np.median(norms) / np.where(norms > 0, norms, 1) if len(norms) else norms


def _matched_drift(log: UpdateLog, layer: str) -> dict[str, np.ndarray]:
    """Client of the last round -> its update of the layer, scaled to the median norm, minus the cohort's median.

    Updates are [unit, number]; empty with fewer than three comparable clients.
    """
    round_ = log[-1]
    factors = log.remembered(_to_median_norm)
    if len(factors) < SMALLEST:
        return {}
    rows = round_.flat(layer)[round_.comparable] * factors[:, None]
    rows = log.model.by_unit(layer, _minus_median(rows, np.ones(len(rows), bool)))
    return dict(zip(round_.clients[round_.comparable].tolist(), rows, strict=True))


def _accumulated(log: UpdateLog, layer: str, rounds: Collection[int] | None) -> tuple[np.ndarray, np.ndarray]:
    """The evidence [client, class] beyond each client's ordinary label skew, and the number of rounds it rests on."""
    chosen = {log.last_index} if rounds is None else _known(log, rounds)
    clients, start = log[-1].clients.tolist(), min(chosen)
    drifts, count = np.zeros((len(clients), *_matrix(log, layer))), np.zeros(len(clients), np.int64)
    before: list[list[np.ndarray]] = [[] for _ in clients]
    for stop in range(len(log), 0, -1):
        prefix = log[:stop]
        if prefix.last_index >= start and prefix.last_index not in chosen:
            continue
        if prefix.last_index < start and all(len(rows) >= ORDINARY for rows in before):
            break
        drift = _matched_drift(prefix, layer)
        for i, client in enumerate(clients):
            if client in drift and prefix.last_index >= start:
                drifts[i] += drift[client]
                count[i] += 1
            elif client in drift and len(before[i]) < ORDINARY:
                before[i].append(drift[client])
    for i, rows in enumerate(before):
        drifts[i] -= count[i] * np.median(rows, axis=0) if rows else 0
    return _leading(drifts) / np.sqrt(np.maximum(count, 1))[:, None], count


def _matrix(log: UpdateLog, layer: str) -> tuple[int, int]:
    units = log.model.num_units(layer)
    return units, log.model[layer].size // units


def _leading(matrices: np.ndarray) -> np.ndarray:
    """The left singular vector [class], times the singular value, of each client's matrix [class, number].

    Its sign is such that the right singular vector has a positive sum.
    """
    classes = np.zeros(matrices.shape[:2])
    for i, matrix in enumerate(matrices):
        if not matrix.any():
            continue
        tall = matrix.shape[0] > matrix.shape[1]
        vector = np.linalg.eigh(matrix.T @ matrix if tall else matrix @ matrix.T)[1][:, -1]
        numbers = vector if tall else matrix.T @ vector
        numbers = numbers / np.linalg.norm(numbers)
        classes[i] = matrix @ numbers * (1 if numbers.sum() >= 0 else -1)
    return classes


def _known(log: UpdateLog, rounds: Collection[int]) -> set[int]:
    """The rounds as a set; raises InputError if it is empty or a round is not in the log."""
    recorded = {prefix.last_index for prefix in log.prefixes()}
    missing = sorted(set(rounds) - recorded)
    if missing or not rounds:
        wrong = f"round {missing[0]}" if missing else "none"
        raise InputError(f"rounds must name rounds of the log, {min(recorded)} to {max(recorded)}, found {wrong}")
    return set(rounds)


def _source(row: np.ndarray) -> float:
    """The class that holds more than half of the deficit, NaN if no class does."""
    deficit = np.maximum(-row, 0)
    return float(deficit.argmax()) if deficit.max() > deficit.sum() / 2 else np.nan


def _descent(round_: Round, rows: np.ndarray, layers: Sequence[str], gradient: Gradient) -> np.ndarray:
    """<-gradient at the round's global model, update> for these rows, float64 [row]."""
    gradients = {name: np.asarray(array) for name, array in gradient(round_.global_model).items()}
    if unknown := sorted(set(gradients) - set(layers)):
        raise InputError(f"the gradient must name layers of the model, {', '.join(layers)}, found {unknown[0]!r}")
    moved = np.zeros(len(rows))
    for name, array in gradients.items():
        if array.shape != np.shape(round_.global_model[name]) or not np.isfinite(array).all():
            expected = f"shape {np.shape(round_.global_model[name])} and finite numbers"
            raise InputError(f"the gradient of {name!r} must have {expected}, found shape {array.shape}")
        flat, start = array.reshape(-1).astype(np.float64), 0
        for block in round_.blocks(name):
            moved -= block[rows].astype(np.float64) @ flat[start : start + block.shape[1]]
            start += block.shape[1]
    return moved


def _cosines(round_: Round, order: np.ndarray) -> np.ndarray:
    """Cosines of the whole updates of these clients, float64 [client, client]; 1 between all-zero updates."""
    gram = np.sum([round_.gram[name][np.ix_(order, order)] for name in round_.parameters], axis=0)
    norms = np.sqrt(np.diagonal(gram))
    cosine = cosines(ratio(gram, norms[:, None]), norms[None, :])  # one norm at a time: a product could underflow
    cosine[np.ix_(norms == 0, norms == 0)] = 1
    return cosine
