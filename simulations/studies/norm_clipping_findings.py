"""What the page on norm clipping and weak DP says, in sentences computed from the rows of `norm_clipping.csv`."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from gradlens.evaluation import mean_interval
from gradlens.plots import count, percent
from gradlens.reporting.page import Block, finding, listed, measured, number

PAPER_NORM = 2.0  # Sun et al. say that most benign norms are below it; their M are 3, 5 and 10
STOPPED_ASR = (
    0.1  # an attack is stopped if its ASR lies no farther above the control's, surely if its interval does not
)
LITTLE_COST = 1.0  # point of main accuracy that a defense may cost
NO_DEFENSE, CONTROL = "no defense", "attack-free control"
UNCONSTRAINED, BOUNDED = "unconstrained", "norm-bounded"
ATTACKS = (UNCONSTRAINED, BOUNDED)
LINES = [*ATTACKS, CONTROL]
CENTER = ["malicious", "period", "tasks"]


class Place(NamedTuple):
    """The rows of one task and model.

    Parameters
    ----------
    name : str
        Task and model.
    runs, rounds, norms, detectors : DataFrame
        The rows of each part of `norm_clipping.csv`; a column `rule` names the defense (not of norms).
    center : Series
        The number of attackers, the period and the number of tasks with which every rule was run.
    q90 : float
        The 90th percentile of benign norms since the first attacked round.
    """

    name: str
    runs: pd.DataFrame
    rounds: pd.DataFrame
    norms: pd.DataFrame
    detectors: pd.DataFrame
    center: pd.Series
    q90: float

    @property
    def rules(self) -> list[str]:
        """No defense, then clipping from the largest bound to the smallest, then with noise."""
        rules = self.runs.drop_duplicates("rule").sort_values(["std", "bound"], ascending=False, na_position="first")
        return rules["rule"].tolist()

    @property
    def clipping(self) -> list[str]:
        """The rules that clip and add no noise."""
        return [rule for rule in self.rules if rule.startswith("clipping")]

    @property
    def noisy(self) -> list[str]:
        """The rules that clip and add noise."""
        return [rule for rule in self.rules if rule.startswith("weak")]

    @property
    def bounds(self) -> list[float]:
        """The bounds of all rules, in ascending order."""
        return sorted(self.runs["bound"].dropna().unique())

    @property
    def first(self) -> int:
        """The first attacked round."""
        return int(self.norms["first"].dropna().iloc[0])

    @property
    def controls(self) -> pd.DataFrame:
        """The attack-free controls."""
        return self.runs[self.runs["attack"].eq("none")]

    def at_center(self, attack: str) -> pd.DataFrame:
        """The runs under an attack at the center."""
        is_here = np.all([self.runs[name].eq(self.center[name]) for name in CENTER], axis=0)
        return self.runs[is_here & self.runs["attack"].eq(attack)]


def places_of(rows: pd.DataFrame) -> list[Place]:
    """The rows of `norm_clipping.csv` by task and model, with the rules in words."""
    places = []
    for (task, model), place in rows.groupby(["task", "model"], sort=False):
        parts = {str(name): part for name, part in place.groupby("part")}
        norms = parts["norms"]
        q90 = float(norms.loc[norms["round"].isna(), "q90"].iloc[0])
        runs, rounds, detectors = (
            part.assign(rule=[rule_name(bound, std, q90) for bound, std in part[["bound", "std"]].to_numpy()])
            for part in (parts["runs"], parts["rounds"], parts["detectors"])
        )
        places.append(Place(f"{task}, {model}", runs, rounds, norms, detectors, rounds[CENTER].iloc[0], q90))
    return places


def multiple(bound: float, q90: float) -> str:
    """A bound as a multiple of the 90th percentile of benign norms."""
    times = bound / q90
    return f"{times:.1f}" if times >= 1 else f"{times:.2f}"


def rule_name(bound: float, std: float, q90: float) -> str:
    """A defense in words, its bound as a multiple of the 90th percentile of benign norms."""
    if np.isnan(bound):
        return NO_DEFENSE
    times = multiple(bound, q90)
    return f"clipping at {times} x" if np.isnan(std) else f"weak DP at {times} x, noise {std:g}"


class Estimate(NamedTuple):
    """A mean over seeds with its 95 % interval.

    Examples
    --------
    >>> Estimate(0.5, 0.25, 0.75).in_words(1)
    '0.5 [0.2, 0.8]'
    """

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: pd.Series | np.ndarray, least: float = 0.0, most: float = 1.0) -> "Estimate":
        """Of values [seed] that cannot leave a range, leaving NaN out; NaN if there are none."""
        array = np.asarray(values, np.float64)
        array = array[~np.isnan(array)]
        return cls(float(array.mean()) if len(array) else np.nan, *mean_interval(array, least, most))

    def in_words(self, digits: int = 2) -> str:
        """The mean with its interval."""
        if digits == 2 or np.isnan(self.mean):
            return measured(*self)
        interval = "" if np.isnan(self.low) else f" [{number(self.low, digits)}, {number(self.high, digits)}]"
        return f"{number(self.mean, digits)}{interval}"

    def is_stopped(self, *, surely: bool = True) -> bool:
        """Whether this excess of ASR counts as none; surely: by the upper end of its interval, where it has one."""
        return (self.high if surely and not np.isnan(self.high) else self.mean) <= STOPPED_ASR


def excess(rows: pd.DataFrame) -> Estimate:
    """ASR above that of the control, seed by seed."""
    return Estimate.of(rows["asr"] - rows["control_asr"], least=-1)


def cost(place: Place, rows: pd.DataFrame) -> Estimate:
    """Main accuracy of runs minus that of the attack-free runs without a defense, in points, seed by seed."""
    undefended = of_rule(place.controls, NO_DEFENSE).set_index("seed")["main_accuracy"]
    return Estimate.of(100 * (rows.set_index("seed")["main_accuracy"] - undefended).dropna(), -100, 100)


def of_rule(rows: pd.DataFrame, rule: str) -> pd.DataFrame:
    """The rows of one defense."""
    return rows[rows["rule"].eq(rule)]


def stops(place: Place, rule: str, *, surely: bool = True) -> bool:
    """Whether no attack at the center gets farther than on the control; False if none was run."""
    estimates = [excess(of_rule(place.at_center(attack), rule)) for attack in ATTACKS]
    known = [estimate for estimate in estimates if not np.isnan(estimate.mean)]
    return bool(known) and all(estimate.is_stopped(surely=surely) for estimate in known)


def largest_that_stops(place: Place, *, surely: bool = True) -> str | None:
    """The largest bound at which, and at all smaller ones, both attacks at the center are stopped."""
    largest = None
    for rule in reversed(place.clipping):
        if not stops(place, rule, surely=surely):
            break
        largest = rule
    return largest


def its_attack(place: Place) -> pd.DataFrame:
    """Attacked runs: without a defense under the unconstrained attack, with one under the attack that knows it."""
    is_undefended, attack = place.runs["rule"].eq(NO_DEFENSE), place.runs["attack"]
    return place.runs[np.where(is_undefended, attack.eq(UNCONSTRAINED), attack.eq(BOUNDED))]


def along_setting(place: Place, rows: pd.DataFrame, setting: str) -> pd.DataFrame:
    """The rows at the center apart from one setting, of the rules that were run with several values of it."""
    fixed = {"fraction": ["tasks"], "tasks": ["malicious", "period"]}[setting]
    central = rows[np.all([rows[name].eq(place.center[name]) for name in fixed], axis=0)]
    return central[central.groupby("rule")[setting].transform("nunique").gt(1)]


def findings(places: Sequence[Place]) -> list[Block]:
    """The findings, each computed from the figures, whichever way they fall."""
    blocks = [undefended(places), stopping(places), unconstrained(places), noise(places), passing(places)]
    return [*blocks, *over_settings(places), detection(places)]


def undefended(places: Sequence[Place]) -> Block:
    """Whether the attack works where nothing is clipped."""
    points, works = [], 0
    for place in places:
        runs = of_rule(place.at_center(UNCONSTRAINED), NO_DEFENSE)
        works += excess(runs).mean > STOPPED_ASR
        asr, control = Estimate.of(runs["asr"]).in_words(), Estimate.of(runs["control_asr"]).in_words()
        points.append(
            f"{place.name}: ASR {asr}, control {control}, changing by {number(swing(place))} from round to round; "
            f"main accuracy {cost(place, runs).in_words(1)} points"
        )
    sentence = f"Unconstrained boosting implants the backdoor in {works} of {count(len(places), 'condition')}."
    return finding("No defense", sentence, points)


def swing(place: Place) -> float:
    """How far the ASR of the unconstrained attack, undefended, changes from one attacked round to the next."""
    rows = of_rule(place.rounds, NO_DEFENSE)
    rows = rows[rows["round"].ge(place.first)].sort_values(["seed", "round"])
    return float(rows.groupby("seed")["asr"].diff().abs().mean())


def stopping(places: Sequence[Place]) -> Block:
    """The bound that stops both attacks, and what it costs."""
    points, num_stopped, num_cheap = [], [], []
    for surely in (True, False):
        rules = [largest_that_stops(place, surely=surely) for place in places]
        costs = [_costs(place, rule) for place, rule in zip(places, rules, strict=True) if rule]
        num_stopped.append(len(costs))
        num_cheap.append(sum(is_cheap for _, is_cheap in costs))
        how = "surely" if surely else "by the means alone"
        points += [f"{line} ({how})" for line, _ in costs if not any(line in other for other in points)]
    for place in places:
        estimates = [
            f"{rule} {excess(of_rule(place.at_center(BOUNDED), rule)).in_words()} "
            f"(unconstrained {excess(of_rule(place.at_center(UNCONSTRAINED), rule)).in_words()})"
            for rule in place.clipping
        ]
        none = "" if largest_that_stops(place, surely=False) else "no M stops it, "
        points.append(f"{place.name}: {none}norm-bounded ASR above control: {'; '.join(estimates)}")
    sentence = (
        f"In {num_stopped[0]} of {count(len(places), 'condition')} there is an M that keeps the ASR of both attacks, "
        f"upper ends of intervals included, within {STOPPED_ASR:g} of the control; with that M mean main accuracy, "
        f"attacked or not, stays within {LITTLE_COST:g} point of no defense and no attack in {num_cheap[0]}. By the "
        f"means alone: {num_stopped[1]} and {num_cheap[1]}."
    )
    return finding("The M that stops it", sentence, points)


def _costs(place: Place, rule: str) -> tuple[str, bool]:
    """What a bound that stops both attacks costs, in words, and whether that is little."""
    runs = {"attack-free": place.controls} | {f"{attack} attack": place.at_center(attack) for attack in ATTACKS}
    costs = {name: cost(place, of_rule(rows, rule)) for name, rows in runs.items()}
    words = ", ".join(f"{estimate.in_words(1)} {name}" for name, estimate in costs.items())
    is_cheap = min(costs.values()).mean >= -LITTLE_COST
    return f"{place.name}: {rule} and below; main accuracy in points {words}", is_cheap


def unconstrained(places: Sequence[Place]) -> Block:
    """Whether an attack that does not know of clipping gets past it, beside the one that knows M."""
    boosted, knowing = (
        [excess(of_rule(place.at_center(attack), rule)) for place in places for rule in place.clipping]
        for attack in ATTACKS
    )
    surely, on_average = (sum(estimate.is_stopped(surely=way) for estimate in boosted) for way in (True, False))
    farther = sum(known.mean - plain.mean > STOPPED_ASR for known, plain in zip(knowing, boosted, strict=True))
    sentence = (
        f"Clipping stops the attack that does not know of it at {surely} of {count(len(boosted), 'bound')}, by the "
        f"means alone at {on_average}; the attack that knows M gets farther by more than {STOPPED_ASR:g} at {farther}."
    )
    return finding("Boosted and clipped", sentence)


def noise(places: Sequence[Place]) -> Block:
    """What noise adds to clipping at the same bound."""
    points, lower, costly = [], 0, 0
    for place in places:
        for rule in place.noisy:
            bound = of_rule(place.runs, rule)["bound"].iloc[0]
            plain = rule_name(float(bound), np.nan, place.q90)
            with_noise, without = (of_rule(place.at_center(BOUNDED), name).set_index("seed") for name in (rule, plain))
            if with_noise.empty or without.empty:
                continue
            change = Estimate.of((with_noise["asr"] - without["asr"]).dropna(), least=-1)
            noise_cost, plain_cost = (cost(place, of_rule(place.controls, name)) for name in (rule, plain))
            lower, costly = lower + (change.mean <= -STOPPED_ASR), costly + (noise_cost.mean < -LITTLE_COST)
            points.append(
                f"{place.name}, {rule}: ASR {change.in_words()} against clipping alone; main accuracy attack-free "
                f"{noise_cost.in_words(1)} points against no defense, {plain_cost.in_words(1)} with clipping alone"
            )
    sentence = (
        f"Noise on top of clipping lowers the norm-bounded ASR by {STOPPED_ASR:g} or more in {lower} of "
        f"{count(len(points), 'case')}, and costs more than {LITTLE_COST:g} point of accuracy in {costly}."
    )
    return finding("Weak DP", sentence, points)


def passing(places: Sequence[Place]) -> Block:
    """Which updates pass the clipping unchanged: norm-bounded, unconstrained and benign ones."""
    points = []
    for place in places:
        plain, bounded = (place.runs.loc[place.runs["attack"].eq(attack), "clipped"].dropna() for attack in ATTACKS)
        by_rule = place.controls["clipped_benign"].groupby(place.controls["rule"]).mean()
        benign = ", ".join(f"{percent(by_rule[rule])} at {rule}" for rule in place.clipping)
        points.append(
            f"{place.name}: {percent(bounded.mean())} of the norm-bounded updates are longer than M, "
            f"{percent(plain.mean())} of the unconstrained ones; of benign ones {benign}"
        )
    most = max(place.runs.loc[place.runs["attack"].eq(BOUNDED), "clipped"].max() for place in places)
    sentence = (
        "Every norm-bounded update passes the clipping whole."
        if most == 0
        else f"Up to {percent(most)} of a run's norm-bounded updates are clipped."
    )
    return finding("Senders", sentence, points)


def over_settings(places: Sequence[Place]) -> Iterator[Block]:
    """What more attackers, and what more tasks, change."""
    for setting, what in (("fraction", "attackers"), ("tasks", "tasks")):
        points, changes, lost = [], [], []
        for place in places:
            rows = along_setting(place, its_attack(place), setting)
            for rule in (rule for rule in place.rules if rows["rule"].eq(rule).any()):
                above = {value: excess(runs) for value, runs in of_rule(rows, rule).groupby(setting)}
                first, *_, last = (estimate.mean for estimate in above.values())
                changes.append(last - first)
                words = [f"{above[value].in_words()} at {_value(setting, value)}" for value in above]
                points.append(f"{place.name}, {rule}: ASR above control {', '.join(words)}")
                if rule == largest_that_stops(place):
                    values = [value for value in above if not above[value].is_stopped()]
                    lost += [f"{place.name} at {_value(setting, value)}" for value in values]
        if not changes:
            continue
        through = f"; the M that stops the attack at the center no longer does in {listed(lost)}" if lost else ""
        sentence = (
            f"From the fewest to the most {what} the ASR above control rises by more than {STOPPED_ASR:g} under "
            f"{sum(change > STOPPED_ASR for change in changes)} of {count(len(changes), 'rule')} and falls by more "
            f"than that under {sum(-change > STOPPED_ASR for change in changes)}{through}."
        )
        yield finding(what.capitalize(), sentence, points)


def _value(setting: str, value: Any) -> str:
    return f"{percent(float(value))} of updates" if setting == "fraction" else count(int(value), "task")


def detection(places: Sequence[Place]) -> Block:
    """What detectors see of the norm-bounded attack, where it gets through and where it does not."""
    points = []
    best: dict[bool, list[float]] = {False: [], True: []}
    names = {name for place in places for name in place.detectors["detector"]}
    for place in places:
        rows = place.detectors[place.detectors["attack"].eq(BOUNDED) & place.detectors["metric"].eq("tpr_5")]
        for rule, figures in rows.groupby("rule", sort=False):
            runs = of_rule(place.at_center(BOUNDED), str(rule))
            best[excess(runs).is_stopped(surely=False)].append(float(figures["value"].max()))
            rates = ", ".join(
                f"{name} {number(value)}" for name, value in zip(figures["detector"], figures["value"], strict=True)
            )
            points.append(f"{place.name}, {rule} (ASR {number(runs['asr'].mean())}): {rates}")
    where = {False: f"ASR above control is over {STOPPED_ASR:g}", True: f"ASR above control is at most {STOPPED_ASR:g}"}
    ranges = [f"{number(min(best[key]))} to {number(max(best[key]))} where {where[key]}" for key in best if best[key]]
    sentence = (
        f"Of the norm-bounded attackers' updates the best of {count(len(names), 'detector')} catches "
        f"{', '.join(ranges)}, at 5 % nominal FPR."
    )
    return finding("Detectors", sentence, points)
