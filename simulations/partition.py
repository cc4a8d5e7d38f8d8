"""Which training samples each client holds; every sample belongs to exactly one client."""

from collections.abc import Callable, Mapping
from typing import Annotated, NamedTuple

import numpy as np
from pydantic import Field, validate_call

from gradlens.errors import InputError
from simulations.tasks import Task


class Split(NamedTuple):
    """Which samples each client holds: a sorted array of positions per client.

    Parameters
    ----------
    train : list of array
        Positions in x_train, [client]; every sample belongs to exactly one client.
    test : list of array, optional
        Positions in x_test of what the client's own writers wrote; None where the partition knows no writers.

    Examples
    --------
    >>> import numpy as np
    >>> [len(part) for part in Split([np.arange(3), np.arange(3, 8)]).train]
    [3, 5]
    """

    train: list[np.ndarray]
    test: list[np.ndarray] | None = None


Partition = Callable[[Task, int, np.random.Generator], Split]  # (task, number of clients, generator) -> split
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]

ATTEMPTS = 1_000  # draws of a skewed partition before it is called impossible


@validate_call(config={"strict": True})
def iid() -> Partition:
    """Shares out the samples at random, in equal numbers.

    Returns
    -------
    Partition
        Sizes differ by one sample at most. It raises InputError where there are fewer samples than clients.

    Examples
    --------
    >>> import numpy as np
    >>> from simulations.tasks import load_task
    >>> split = iid()(load_task("digits"), 10, np.random.default_rng(0))
    >>> sorted({len(part) for part in split.train})
    [143, 144]
    """

    def split(task: Task, num_clients: int, rng: np.random.Generator) -> Split:
        _check(task.y_train, num_clients, 1)
        return Split([np.sort(part) for part in np.array_split(rng.permutation(len(task.y_train)), num_clients)])

    return split


@validate_call(config={"strict": True})
def round_robin() -> Partition:
    """Gives sample i to client i modulo the number of clients [1]_.

    Nothing is drawn; shares are alike where the samples are in no order.

    Returns
    -------
    Partition
        It raises InputError where there are fewer samples than clients.

    References
    ----------
    .. [1] Bilgin 2021, arXiv:2111.14683, as in the code.

    Examples
    --------
    >>> import numpy as np
    >>> from simulations.tasks import load_task
    >>> round_robin()(load_task("digits"), 500, np.random.default_rng(0)).train[3]
    array([   3,  503, 1003])
    """

    def split(task: Task, num_clients: int, rng: np.random.Generator) -> Split:
        _check(task.y_train, num_clients, 1)
        return Split([np.arange(client, len(task.y_train), num_clients) for client in range(num_clients)])

    return split


@validate_call(config={"strict": True})
def dirichlet(alpha: Positive = 0.5, minimum: Count = 10) -> Partition:
    """Skews labels: each class is shared out in proportions drawn from a symmetric Dirichlet distribution [1]_.

    Parameters
    ----------
    alpha : float
        Concentration of the distribution; the smaller, the more skewed. 0.5 is common in the literature.
    minimum : int
        Samples that every client holds at least; 10 is a plain choice.

    Returns
    -------
    Partition
        It raises InputError where 1,000 draws give some client fewer samples.

    Notes
    -----
    A client that already holds its share of the data gets nothing of the classes that follow, and the whole is drawn
    again until every client holds `minimum` samples.

    References
    ----------
    .. [1] Yurochkin et al. 2019, arXiv:1905.12022.

    Examples
    --------
    >>> import numpy as np
    >>> from simulations.tasks import load_task
    >>> split = dirichlet(alpha=0.1)(load_task("digits"), 10, np.random.default_rng(0))
    >>> min(len(part) for part in split.train) >= 10
    True
    """

    def split(task: Task, num_clients: int, rng: np.random.Generator) -> Split:
        labels = task.y_train
        _check(labels, num_clients, minimum)
        for _ in range(ATTEMPTS):
            holders = _holders(labels, num_clients, alpha, rng)
            if np.bincount(holders, minlength=num_clients).min() >= minimum:
                return Split(_parts(holders, num_clients))
        raise InputError(
            f"dirichlet: no draw in {ATTEMPTS:,} with alpha {alpha:g} gave each of {num_clients} clients "
            f"{minimum} of {len(labels)} samples; raise alpha or lower minimum"
        )

    return split


@validate_call(config={"strict": True})
def labels(per_client: Count = 2) -> Partition:
    """Skews labels: no client holds more than a few of them.

    Parameters
    ----------
    per_client : int
        Labels that a client holds at most; 2 as in [1]_.

    Returns
    -------
    Partition
        It raises InputError where there are more classes than shards, or fewer samples.

    Notes
    -----
    Each class is cut at random into shards, the larger classes into more, `per_client` shards per client in all; each
    client gets as many at random. So shards are of about equal size, and some clients get two of one class. Unlike in
    [1]_, a shard never holds two classes.

    References
    ----------
    .. [1] McMahan et al. 2017, arXiv:1602.05629, section 3.

    Examples
    --------
    >>> import numpy as np
    >>> from simulations.tasks import load_task
    >>> task = load_task("digits")
    >>> split = labels()(task, 10, np.random.default_rng(0))
    >>> max(len(set(task.y_train[part].tolist())) for part in split.train)
    2
    """

    def split(task: Task, num_clients: int, rng: np.random.Generator) -> Split:
        _check(task.y_train, num_clients, per_client)
        shards = _shards(task, num_clients, per_client, rng)
        dealt = rng.permutation(len(shards)).reshape(num_clients, per_client)
        return Split([np.sort(np.concatenate([shards[i] for i in hand])) for hand in dealt])

    return split


@validate_call(config={"strict": True})
def writer() -> Partition:
    """Gives each writer (or speaking role) whole to one client, test samples included.

    Returns
    -------
    Partition
        It raises InputError where the task does not say whose its samples are, or knows fewer writers than clients.

    Notes
    -----
    Where there are more writers than clients each client gets several: the largest writers first, each to the client
    that holds the fewest samples so far; chance decides between equals. Test samples of a writer without training
    samples go to no client.

    Examples
    --------
    >>> from dataclasses import replace
    >>> import numpy as np
    >>> from simulations.tasks import load_task
    >>> task = load_task("digits")
    >>> task = replace(task, owners_train=np.array(["Ann", "Bob", "Eve"])[np.arange(1437) % 3])
    >>> [len(part) for part in writer()(task, 3, np.random.default_rng(0)).train]
    [479, 479, 479]
    """
    return _by_writer


@validate_call(config={"strict": True})
def quantity(alpha: Positive = 0.5, minimum: Count = 10) -> Partition:
    """Skews sizes: clients hold unequal numbers of samples of the same kind.

    Parameters
    ----------
    alpha : float
        Concentration of the symmetric Dirichlet distribution that sizes are drawn from; 0.5 is common for skew.
    minimum : int
        Samples that every client holds at least; 10 is a plain choice.

    Returns
    -------
    Partition
        It raises InputError where there are fewer samples than that.

    Notes
    -----
    Each client holds `minimum` samples and its proportion of the rest. In [1]_ the proportions of the whole are drawn
    again until all clients are large enough, which hardly ever ends for many clients.

    References
    ----------
    .. [1] Li, Diao, Chen and He 2022, arXiv:2102.02079, section on quantity skew.

    Examples
    --------
    >>> import numpy as np
    >>> from simulations.tasks import load_task
    >>> split = quantity(minimum=50)(load_task("digits"), 10, np.random.default_rng(0))
    >>> min(len(part) for part in split.train) >= 50
    True
    """

    def split(task: Task, num_clients: int, rng: np.random.Generator) -> Split:
        total = len(task.y_train)
        _check(task.y_train, num_clients, minimum)
        shares = rng.dirichlet(np.full(num_clients, alpha))
        extra = np.rint(np.cumsum(shares)[:-1] * (total - num_clients * minimum)).astype(np.int64)
        cuts = extra + minimum * np.arange(1, num_clients)
        return Split([np.sort(part) for part in np.split(rng.permutation(total), cuts)])

    return split


@validate_call(config={"strict": True})
def pseudo_writer(components: Count = 16) -> Partition:
    """Makes up writers for images that name none: each client holds one style of each class.

    Parameters
    ----------
    components : int
        Leading principal components in which styles are told apart; 16 is a plain choice.

    Returns
    -------
    Partition
        It raises InputError for text, and where a class has fewer different images than there are clients.

    Notes
    -----
    The images of a class are grouped by k-means on their leading principal components into as many styles as there are
    clients; each client gets one of them at random. Test images go to the client of the nearest style of their class.
    It is a stand-in for real writers: what the styles of one client have in common is chance.

    Examples
    --------
    >>> import numpy as np
    >>> from simulations.tasks import load_task
    >>> split = pseudo_writer()(load_task("digits"), 5, np.random.default_rng(0))
    >>> sum(len(part) for part in split.train), sum(len(part) for part in split.test)
    (1437, 360)
    """

    def split(task: Task, num_clients: int, rng: np.random.Generator) -> Split:
        if task.is_text:
            raise InputError(f"pseudo_writer: expected images, task {task.name} is text")
        holders, readers = np.zeros(len(task.y_train), np.int64), np.full(len(task.y_test), -1)
        for label in np.unique(task.y_train):
            train, test = np.flatnonzero(task.y_train == label), np.flatnonzero(task.y_test == label)
            images = task.x_train[train].reshape(len(train), -1)
            if (different := len(np.unique(images, axis=0))) < num_clients:
                raise InputError(
                    f"pseudo_writer: {num_clients} clients need as many different images of each class, "
                    f"task {task.name} has {different} of class {task.label_names[label]}"
                )
            client_of = rng.permutation(num_clients)
            tested = task.x_test[test].reshape(len(test), images.shape[1])
            style, of_test = _styles(images, tested, num_clients, components, rng)
            holders[train], readers[test] = client_of[style], client_of[of_test]
        return Split(_parts(holders, num_clients), _parts(readers, num_clients))

    return split


PARTITIONS: Mapping[str, Callable[..., Partition]] = {
    "iid": iid,
    "round_robin": round_robin,
    "dirichlet": dirichlet,
    "labels": labels,
    "writer": writer,
    "quantity": quantity,
    "pseudo_writer": pseudo_writer,
}


def _shards(task: Task, num_clients: int, per_client: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Positions of samples of one class each, `per_client` arrays per client."""
    classes, sizes = np.unique(task.y_train, return_counts=True)
    if len(classes) > num_clients * per_client:
        raise InputError(
            f"labels: {num_clients} clients with {per_client} labels each cannot hold the {len(classes)} classes "
            f"of task {task.name}; raise per_client"
        )
    numbers = np.ones(len(classes), np.int64)
    for _ in range(num_clients * per_client - len(classes)):
        numbers[np.argmax(sizes / numbers)] += 1  # the class whose shards are largest is cut once more
    return [
        shard
        for label, number in zip(classes, numbers, strict=True)
        for shard in np.array_split(rng.permutation(np.flatnonzero(task.y_train == label)), number)
    ]


def _by_writer(task: Task, num_clients: int, rng: np.random.Generator) -> Split:
    if task.owners_train is None:
        raise InputError(f"writer: task {task.name} does not say who wrote its samples")
    writers, written, sizes = np.unique(task.owners_train, return_inverse=True, return_counts=True)
    if len(writers) < num_clients:
        raise InputError(
            f"writer: {num_clients} clients need at least as many writers, task {task.name} has {len(writers)}"
        )
    order = rng.permutation(len(writers))  # of equally large writers, and below of clients, chance decides
    clients, held = rng.permutation(num_clients), np.zeros(num_clients, np.int64)
    client_of = np.zeros(len(writers), np.int64)
    for number in order[np.argsort(-sizes[order], kind="stable")]:
        place = np.argmin(held)
        client_of[number] = clients[place]
        held[place] += sizes[number]
    train = _parts(client_of[written], num_clients)
    if task.owners_test is None:
        return Split(train)
    wrote = np.minimum(np.searchsorted(writers, task.owners_test), len(writers) - 1)
    known = writers[wrote] == task.owners_test
    return Split(train, _parts(np.where(known, client_of[wrote], -1), num_clients))


def _holders(labels: np.ndarray, num_clients: int, alpha: float, rng: np.random.Generator) -> np.ndarray:
    """One draw: the client that holds each sample, int64 [sample]."""
    holders = np.zeros(len(labels), np.int64)
    held = np.zeros(num_clients, np.int64)
    for label in np.unique(labels):
        samples = rng.permutation(np.flatnonzero(labels == label))
        shares = rng.dirichlet(np.full(num_clients, alpha)) * (held * num_clients < len(labels))
        # a tiny alpha may give the whole class to clients that have their share already: all then share it equally
        shares = shares / shares.sum() if shares.sum() > 0 else np.full(num_clients, 1 / num_clients)
        cuts = np.rint(np.cumsum(shares)[:-1] * len(samples)).astype(np.int64)
        holder = np.repeat(np.arange(num_clients), np.diff(cuts, prepend=0, append=len(samples)))
        holders[samples] = holder
        held += np.bincount(holder, minlength=num_clients)
    return holders


def _styles(
    train: np.ndarray, test: np.ndarray, number: int, components: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The style of each image of one class, [image, pixel] -> int [image] from 0 to number - 1."""
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA
    from threadpoolctl import threadpool_limits

    seed = int(rng.integers(2**31))
    with threadpool_limits(1):  # several threads add up in another order each time
        axes = PCA(min(components, *train.shape), random_state=seed).fit(train.astype(np.float64))
        leading = axes.transform(train.astype(np.float64))
        styles = KMeans(number, n_init="auto", random_state=seed).fit(leading)
        nearest = styles.predict(axes.transform(test.astype(np.float64))) if len(test) else []
    return np.asarray(styles.labels_), np.asarray(nearest, np.int64)


def _parts(holders: np.ndarray, num_clients: int) -> list[np.ndarray]:
    """Client of each sample -> samples of each client; those of client -1 belong to none."""
    return [np.flatnonzero(holders == client) for client in range(num_clients)]


def _check(labels: np.ndarray, num_clients: int, minimum: int) -> None:
    if len(labels) < num_clients * minimum:
        raise InputError(
            f"partition: {num_clients} clients with at least {minimum} samples each need "
            f"{num_clients * minimum} samples, found {len(labels)}"
        )
