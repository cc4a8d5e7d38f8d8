"""After training: channels pruned by the clients' ranks or votes, extreme weights set to 0, fine-tuning.

These are the steps of Wu et al. 2020, arXiv:2011.01767. A step takes a `Mitigation` and returns the next one, so that
steps chain in any order and number::

    start = begin(model, measure)
    pruned = prune(start, aggregate_ranks(ranks), accuracy, x)
    done = fine_tune(adjust_extreme_weights(pruned, accuracy), train, rounds=2)
    done.model, done.table

What the server makes of the clients' ranks or votes (`aggregate_ranks`, `aggregate_votes`) is plain arithmetic on what
they sent; how they obtain them (`channel_activations`, `ranks_of`, `votes_of`) and how some may lie (`lied`) is apart.
The paper's layers, deltas and budgets are not published where they could be read; ours are settings. A channel is an
output channel of a convolution or a unit of a dense layer. Models are torch modules.
"""

from gradlens.mitigation.channels import channel_activations, pruned_layer, without_channels, without_extreme_weights
from gradlens.mitigation.orders import (
    PruningOrder,
    aggregate_ranks,
    aggregate_votes,
    lied,
    ranks_of,
    trigger_channels,
    votes_of,
)
from gradlens.mitigation.steps import Mitigation, Train, adjust_extreme_weights, begin, fine_tune, prune

__all__ = [
    "Mitigation",
    "PruningOrder",
    "Train",
    "adjust_extreme_weights",
    "aggregate_ranks",
    "aggregate_votes",
    "begin",
    "channel_activations",
    "fine_tune",
    "lied",
    "prune",
    "pruned_layer",
    "ranks_of",
    "trigger_channels",
    "votes_of",
    "without_channels",
    "without_extreme_weights",
]
