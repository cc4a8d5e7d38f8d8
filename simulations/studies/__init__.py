"""The experiments behind the committed figures: each is a command, and `python -m simulations.studies` lists them all.

A study reads recorded runs, writes a table of figures to `reports/`, and makes a page or a section of the results from
that table.
"""

from typing import NamedTuple

__all__ = ["STUDIES", "Study"]


class Study(NamedTuple):
    """What a study shows, and the commands that make its committed results.

    Parameters
    ----------
    about : str
        One line.
    commands : tuple of str
        To be run from the root of the repository; `make reports` runs most of them.

    Examples
    --------
    >>> STUDIES["defenses"].commands[-1]
    'python -m simulations.studies.defenses runs/defenses'
    """

    about: str
    commands: tuple[str, ...]


def _simulate(*names: str) -> tuple[str, ...]:
    return tuple(f"gradlens simulate simulations/scenarios/{name}.toml -o runs/{name}" for name in names)


STUDIES = {
    "shipped_reference": Study(
        "what investigations rest on where a recording has no null of its own: gradlens/case/reference.json",
        ("python -m simulations.studies.shipped_reference",),
    ),
    "cases": Study(
        "how often an investigation finds attackers, and how often it accuses innocent clients: cases.csv",
        ("python -m simulations.studies.cases",),
    ),
    "gauntlet": Study(
        "every detector against every attack, beside attack-free runs: gauntlet.csv, gauntlet.html",
        ("python -m simulations.studies.gauntlet",),
    ),
    "evidence_levels": Study(
        "verdicts on sketches beside verdicts on whole updates: evidence.csv, evidence.html",
        (
            "python -m simulations.studies.gauntlet --keep",
            "python -m simulations.studies.evidence_levels runs/gauntlet",
        ),
    ),
    "localization": Study(
        "where poisoned updates differ from benign ones, and when that fades: localization.csv, localization.html",
        (*_simulate("localization"), "python -m simulations.studies.localization runs/localization"),
    ),
    "norm_clipping": Study(
        "norm clipping and weak differential privacy (Sun et al. 2019): norm_clipping.csv, norm_clipping.html",
        (
            *_simulate("norm_clipping", "norm_clipping_femnist"),
            "python -m simulations.studies.norm_clipping runs/norm_clipping runs/norm_clipping_femnist",
        ),
    ),
    "pruning": Study(
        "what pruning and fine-tuning after training leave of a backdoor (Wu et al. 2020): pruning.csv, pruning.html",
        (*_simulate("pruning"), "python -m simulations.studies.pruning runs/pruning"),
    ),
    "attacks": Study(
        "what each attack achieves against a server without a defense: attacks.csv, replacement.csv",
        (
            *_simulate("attacks", "attacks_data", "replacement"),
            "python -m simulations.studies.attacks runs/attacks runs/attacks_data runs/replacement",
        ),
    ),
    "defenses": Study(
        "what each aggregation rule and each live filter leaves of each attack: defenses.csv",
        (*_simulate("defenses"), "python -m simulations.studies.defenses runs/defenses"),
    ),
    "picture": Study(
        "the README's picture: where poisoned updates differ, layer by layer: picture.png",
        (*_simulate("first_look"), "python -m simulations.studies.picture runs/first_look reports/picture.png"),
    ),
}
