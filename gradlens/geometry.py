"""Ratios, cosines, distances and centering for vectors that are known by their inner products.

A Gram matrix holds the inner products of all pairs of vectors, float64 [vector, vector]. Nothing here knows of
clients, layers or rounds.
"""

import numpy as np

ROUNDING = 1e-12  # relative size of what float64 rounding leaves of a difference between equal sums of products
TIE = 1e-9  # relative difference below which two scores count as equal, or two points as one


def ratio(numerator: np.ndarray, denominator: np.ndarray, otherwise: float = 0.0) -> np.ndarray:
    """Divides where the denominator is positive and returns `otherwise` elsewhere.

    Examples
    --------
    >>> ratio(np.array([1.0, 2.0]), np.array([4.0, 0.0])).tolist()
    [0.25, 0.0]
    """
    out = np.full(np.broadcast_shapes(np.shape(numerator), np.shape(denominator)), otherwise)
    return np.divide(numerator, denominator, out=out, where=denominator > 0)


def cosines(products: np.ndarray, lengths: np.ndarray, clip: bool = True) -> np.ndarray:
    """Cosines from inner products and the products of the two lengths; 0 where a vector is 0.

    Parameters
    ----------
    products : ndarray
        Inner products of pairs of vectors.
    lengths : ndarray
        The length of the one vector times that of the other, of the same shape.
    clip : bool, default True
        Whether the last digit that rounding may add beyond 1 or -1 is cut off.

    Examples
    --------
    >>> cosines(np.array([2.0, 0.0]), np.array([4.0, 0.0])).tolist()
    [0.5, 0.0]
    """
    found = ratio(products, lengths)
    return np.clip(found, -1.0, 1.0) if clip else found


def pairwise_cosines(gram: np.ndarray) -> np.ndarray:
    """Cosines of all pairs of vectors of a Gram matrix, not clipped; 0 where a vector is 0."""
    lengths = np.sqrt(np.diagonal(gram))
    return cosines(gram, np.outer(lengths, lengths), clip=False)


def cosine_distances(gram: np.ndarray, along: np.ndarray | None = None, square: float = 0.0) -> np.ndarray:
    """1 - cosine of all pairs of vectors g + u_i, from the inner products of the u_i.

    Uses 1 - cos = sin^2 / (1 + cos) and, for sin^2, Lagrange's identity on the difference of the two vectors, so that a
    large common part g costs no digits.

    Parameters
    ----------
    gram : ndarray, float64 [vector, vector]
        Inner products of the u_i.
    along : ndarray, float64 [vector], optional
        Inner products of g with the u_i; without it there is no common part.
    square : float, default 0
        Inner product of g with itself.

    Returns
    -------
    ndarray, float64 [vector, vector]
        From 0 to 2; 0 for equal vectors, 1 between a vector of zeros and any other.

    Examples
    --------
    >>> x = np.array([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]])
    >>> cosine_distances(x @ x.T).tolist()
    [[0.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]
    """
    squares = np.diagonal(gram)
    along = np.zeros(len(gram)) if along is None else along
    inner = gram + along[:, None] + along + square
    whole_squares = squares + 2 * along + square
    apart = squared_distances(gram)
    towards = squares[:, None] - gram + along[:, None] - along
    lengths = np.sqrt(np.maximum(whole_squares[:, None], 0)) * np.sqrt(np.maximum(whole_squares, 0))
    sines = np.maximum(whole_squares[:, None] * apart - towards**2, 0)
    distances = np.ones_like(gram)
    near, far = (inner > 0) & (lengths > 0), (inner <= 0) & (lengths > 0)
    distances[near] = sines[near] / lengths[near] / (lengths[near] + inner[near])
    distances[far] = 1 - inner[far] / lengths[far]
    distances[apart == 0] = 0
    return (distances + distances.T) / 2


def squared_distances(gram: np.ndarray) -> np.ndarray:
    """Squared Euclidean distances of all pairs of vectors of a Gram matrix; 0 below a millionth of their lengths.

    Examples
    --------
    >>> x = np.array([[0.0, 3.0], [4.0, 0.0]])
    >>> squared_distances(x @ x.T).tolist()
    [[0.0, 25.0], [25.0, 0.0]]
    """
    squares = np.diagonal(gram)
    both = squares[:, None] + squares
    apart = both - 2 * gram
    return np.where(apart > ROUNDING * both, apart, 0.0)


def distances(points: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Euclidean distances of points from other points, [point, number] and [other, number] -> [point, other]."""
    return np.sqrt(np.square(points[:, None] - others).sum(axis=2))


def centered(gram: np.ndarray, products: np.ndarray, square: float) -> np.ndarray:
    """The Gram matrix of the vectors minus a center.

    Parameters
    ----------
    gram : ndarray, float64 [vector, vector]
        Inner products of the vectors.
    products : ndarray, float64 [vector]
        Inner products of the vectors with the center.
    square : float
        Inner product of the center with itself.

    Examples
    --------
    >>> x = np.array([[1.0], [3.0]])
    >>> centered(x @ x.T, products=np.array([2.0, 6.0]), square=4.0).tolist()
    [[1.0, -1.0], [-1.0, 1.0]]
    """
    return gram - products[:, None] - products[None, :] + square


def about_reference_mean(gram: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """The Gram matrix of all vectors minus the mean of those of a reference.

    Parameters
    ----------
    gram : ndarray, float64 [vector, vector]
        Inner products of the vectors.
    reference : ndarray, bool [vector]
        Whose mean is subtracted.

    Examples
    --------
    >>> x = np.array([[1.0], [3.0], [9.0]])
    >>> about_reference_mean(x @ x.T, np.array([True, True, False])).diagonal().tolist()
    [1.0, 1.0, 49.0]
    """
    means = gram[:, reference].mean(axis=1)
    return centered(gram, means, means[reference].mean())


def centered_on_mean(gram: np.ndarray) -> np.ndarray:
    """The Gram matrix of the vectors minus their mean, symmetric to the last bit.

    Examples
    --------
    >>> x = np.array([[1.0], [3.0]])
    >>> centered_on_mean(x @ x.T).tolist()
    [[1.0, -1.0], [-1.0, 1.0]]
    """
    minus_mean = gram - gram.mean(axis=0) - gram.mean(axis=1, keepdims=True) + gram.mean()
    return (minus_mean + minus_mean.T) / 2


def mean_of_largest(pairs: np.ndarray, reference: np.ndarray, count: int) -> np.ndarray:
    """The mean of each row's largest entries among the columns of a reference, without the row's own column.

    Parameters
    ----------
    pairs : ndarray, float64 [vector, vector]
        Of every vector with every other.
    reference : ndarray, bool [vector]
        Which columns count.
    count : int
        How many of the largest are averaged, at most all.

    Examples
    --------
    >>> pairs = np.array([[9.0, 1.0, 2.0], [1.0, 9.0, 3.0], [2.0, 3.0, 9.0]])
    >>> mean_of_largest(pairs, np.array([True, True, True]), count=1).tolist()
    [2.0, 3.0, 3.0]
    """
    others = np.array(pairs)
    np.fill_diagonal(others, -np.inf)
    count = min(count, int(reference.sum()) - 1)
    return np.sort(others[:, reference], axis=1)[:, -count:].mean(axis=1)
