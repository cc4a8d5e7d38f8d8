"""Tasks of tables: rows of features, told apart in two classes."""

from collections import OrderedDict
from typing import Any

import numpy as np

from simulations.tasks.task import Task, frozen, selection

SITES = 12  # made up: the data say nothing of hospitals


def breast_cancer(samples: int | None = None, seed: int = 0) -> Task:
    """The 569 tumors with 30 measurements each that come with scikit-learn, benign (0) or malignant (1).

    Parameters
    ----------
    samples : int, optional
        Number of training samples; None, the default, for all 455. The other 114, drawn stratified, are for testing.
    seed : int
        Of the draw of training samples.

    Returns
    -------
    Task
        Features are in standard deviations of the training rows. The owners are 12 sites that are made up: k-means
        groups of similar tumors, since the data name no hospital. Its own model (`model = "own"`) has one hidden layer
        of 16 units and answers by one logit, which is positive for malignant.

    Examples
    --------
    >>> task = breast_cancer()
    >>> task.x_train.shape, task.label_names, len(set(task.owners_train))
    ((455, 30), ('benign', 'malignant'), 12)
    """
    from sklearn.cluster import KMeans
    from sklearn.datasets import load_breast_cancer
    from sklearn.model_selection import train_test_split

    bunch: Any = load_breast_cancer()
    y = (1 - bunch.target).astype(np.int64)  # scikit-learn counts malignant as 0
    train, test = train_test_split(np.arange(len(y)), test_size=114, stratify=y, random_state=0)
    mean, scale = bunch.data[train].mean(axis=0), bunch.data[train].std(axis=0)
    x = ((bunch.data - mean) / scale).astype(np.float32)
    groups = KMeans(SITES, n_init="auto", random_state=0).fit(x[train])
    sites = np.array([f"site {group + 1}" for group in groups.predict(x)])
    chosen = train[selection("breast_cancer", len(train), samples, seed)]
    names = ("benign", "malignant")
    owners = sites[chosen], sites[test]
    return frozen(Task("breast_cancer", x[chosen], y[chosen], x[test], y[test], names, *owners, model=_one_logit))


def _one_logit() -> Any:
    from torch import nn

    return nn.Sequential(OrderedDict(fc1=nn.Linear(30, 16), relu=nn.ReLU(), fc2=nn.Linear(16, 1)))
