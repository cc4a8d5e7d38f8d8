"""What the page on norm clipping and weak DP says, in sentences computed from the table of norm_clipping.py."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from gradlens.evaluation import bootstrap
from gradlens.plots import count, percent
from gradlens.reporting.page import Block, finding, listed, measured, number

PAPER_NORM = 2.0  # of which Sun et al. say that most benign norms are below it; their M are 3, 5 and 10
STOPPED = (
    0.1  # an attack is stopped if its ASR above the control's is no higher, surely so if the interval's end is not
)
WITHIN = 1.0  # point of main accuracy that a defence may cost
NO_DEFENCE, CONTROL = "no defence", "attack-free control"
UNCONSTRAINED, BOUNDED = "unconstrained", "norm-bounded"
LINES = [UNCONSTRAINED, BOUNDED, CONTROL]


class Place(NamedTuple):
    """One task and model: its runs, rounds, norms and detectors, a column `rule` saying which defence in words.

    centre: number of attackers, frequency and number of tasks at which every rule was run; q90: of the benign norms.
    """

    name: str
    runs: pd.DataFrame
    rounds: pd.DataFrame
    norms: pd.DataFrame
    detectors: pd.DataFrame
    centre: pd.Series
    q90: float

    @property
    def rules(self) -> list[str]:
        """No defence, then clipping from the largest bound to the smallest, then noise."""
        rules = self.runs.drop_duplicates("rule").sort_values(["std", "bound"], ascending=False, na_position="first")
        return rules["rule"].tolist()

    @property
    def clipping(self) -> list[str]:
        """Those that clip and add no noise."""
        return [rule for rule in self.rules if rule.startswith("clipping")]

    @property
    def first(self) -> int:
        """The first attacked round."""
        return int(self.norms["first"].dropna().iloc[0])

    @property
    def free(self) -> pd.DataFrame:
        """The attack-free controls."""
        return self.runs[self.runs["attack"].eq("none")]

    def at_centre(self, attack: str) -> pd.DataFrame:
        """The runs under an attack at the centre."""
        here = np.all([self.runs[name].eq(value) for name, value in self.centre.items()], axis=0)
        return self.runs[here & self.runs["attack"].eq(attack)]


def places_of(found: pd.DataFrame) -> list[Place]:
    """The table by task and model, with the rules in words."""
    places = []
    for (task, model), part in found.groupby(["task", "model"], sort=False):
        parts = {str(name): rows for name, rows in part.groupby("part")}
        norms = parts["norms"]
        q90 = float(norms.loc[norms["round"].isna(), "q90"].iloc[0])
        runs, rounds, detected = (
            parts[name].assign(rule=[rule_name(b, s, q90) for b, s in parts[name][["bound", "std"]].to_numpy()])
            for name in ("runs", "rounds", "detectors")
        )
        centre = rounds[["malicious", "period", "tasks"]].iloc[0]
        places.append(Place(f"{task}, {model}", runs, rounds, norms, detected, centre, q90))
    return places


def multiple(bound: float, q90: float) -> str:
    """A bound over the benign norms' 90th percentile, in words."""
    times = bound / q90
    return f"{times:.1f}" if times >= 1 else f"{times:.2f}"


def rule_name(bound: float, std: float, q90: float) -> str:
    """A defence in words, its bound as a multiple of the benign norms' 90th percentile."""
    if np.isnan(bound):
        return NO_DEFENCE
    times = multiple(bound, q90)
    return f"clipping at {times} x" if np.isnan(std) else f"weak DP at {times} x, noise {std:g}"


class Figure95(NamedTuple):
    """A mean over seeds with its 95 % interval."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: pd.Series | np.ndarray) -> "Figure95":
        """Of values [seed]; NaN of none."""
        array = np.asarray(values, np.float64)
        array = array[~np.isnan(array)]
        return cls(float(array.mean()) if len(array) else np.nan, *bootstrap(array))

    def said(self, digits: int = 2) -> str:
        """The figure with its interval, in words."""
        if digits == 2 or np.isnan(self.mean):
            return measured(*self)
        interval = "" if np.isnan(self.low) else f" [{number(self.low, digits)}, {number(self.high, digits)}]"
        return f"{number(self.mean, digits)}{interval}"


def excess(rows: pd.DataFrame) -> Figure95:
    """ASR above that of the control, seed by seed."""
    return Figure95.of(rows["asr"] - rows["control_asr"])


def is_stopped(above: Figure95, *, surely: bool = True) -> bool:
    """Whether an ASR above that of the control is none, surely: by the upper end of its interval where it has one."""
    return (above.high if surely and not np.isnan(above.high) else above.mean) <= STOPPED


def cost(place: Place, rows: pd.DataFrame) -> Figure95:
    """Main accuracy of runs minus that of the attack-free runs without defence, in points, seed by seed."""
    without = place.free[place.free["rule"].eq(NO_DEFENCE)].set_index("seed")["main_accuracy"]
    return Figure95.of(100 * (rows.set_index("seed")["main_accuracy"] - without).dropna())


def of_rule(rows: pd.DataFrame, rule: str) -> pd.DataFrame:
    """The rows of one defence."""
    return rows[rows["rule"].eq(rule)]


def stops(place: Place, rule: str, *, surely: bool = True) -> bool:
    """Whether no attack at the centre gets farther than the control; False where none was run."""
    reached = [excess(of_rule(place.at_centre(attack), rule)) for attack in (UNCONSTRAINED, BOUNDED)]
    known = [each for each in reached if not np.isnan(each.mean)]
    return bool(known) and all(is_stopped(each, surely=surely) for each in known)


def its_attack(place: Place) -> pd.DataFrame:
    """Attacked runs: without defence under the unconstrained attack, with one under the attack that knows it."""
    attack = np.where(place.runs["rule"].eq(NO_DEFENCE), UNCONSTRAINED, BOUNDED)
    return place.runs[place.runs["attack"].eq(attack)]


def along_setting(place: Place, rows: pd.DataFrame, name: str) -> pd.DataFrame:
    """The rows at the centre but for one setting, of rules that were run at more than one value of it."""
    fixed = {"fraction": ["tasks"], "tasks": ["malicious", "period"]}[name]
    found = rows[np.all([rows[each].eq(place.centre[each]) for each in fixed], axis=0)]
    return found[found.groupby("rule")[name].transform("nunique").gt(1)]


def findings(places: Sequence[Place]) -> list[Block]:
    """Sentences with figures, whichever way they fall."""
    found = [undefended(places), stopping(places), unconstrained(places), noise(places), passing(places)]
    return [*found, *over_settings(places), seen(places)]


def undefended(places: Sequence[Place]) -> Block:
    """Whether the attack works where nothing is clipped."""
    lines, works = [], 0
    for place in places:
        own = of_rule(place.at_centre(UNCONSTRAINED), NO_DEFENCE)
        works += excess(own).mean > STOPPED
        asr, control = Figure95.of(own["asr"]).said(), Figure95.of(own["control_asr"]).said()
        lines.append(
            f"{place.name}: ASR {asr}, control {control}, changing by {number(swing(place))} from round to round; "
            f"main accuracy {cost(place, own).said(1)} points"
        )
    said = f"Unconstrained boosting implants the backdoor in {works} of {count(len(places), 'condition')}."
    return finding("No defence", said, lines)


def swing(place: Place) -> float:
    """How much the ASR of the unconstrained attack without defence changes from one attacked round to the next."""
    rows = of_rule(place.rounds, NO_DEFENCE)
    rows = rows[rows["round"].ge(place.first)].sort_values(["seed", "round"])
    return float(rows.groupby("seed")["asr"].diff().abs().mean())


def largest_that_stops(place: Place, *, surely: bool = True) -> str | None:
    """The largest bound at which, and at all below it, neither attack at the centre gets anywhere."""
    found = None
    for rule in reversed(place.clipping):
        if not stops(place, rule, surely=surely):
            break
        found = rule
    return found


def stopping(places: Sequence[Place]) -> Block:
    """The bound that stops both attacks, and what it costs."""
    lines, stopped, cheap = [], [], []
    for surely in (True, False):
        rules = [largest_that_stops(place, surely=surely) for place in places]
        said = [_costs(place, rule) for place, rule in zip(places, rules, strict=True) if rule]
        stopped.append(len(said))
        cheap.append(sum(is_cheap for _, is_cheap in said))
        word = "surely" if surely else "by the means alone"
        lines += [f"{line} ({word})" for line, _ in said if not any(line in other for other in lines)]
    for place in places:
        each = [
            f"{rule} {excess(of_rule(place.at_centre(BOUNDED), rule)).said()} "
            f"(unconstrained {excess(of_rule(place.at_centre(UNCONSTRAINED), rule)).said()})"
            for rule in place.clipping
        ]
        none = "" if largest_that_stops(place, surely=False) else "no M stops it, "
        lines.append(f"{place.name}: {none}norm-bounded ASR above control: {'; '.join(each)}")
    of = count(len(places), "condition")
    said = (
        f"In {stopped[0]} of {of} there is an M that keeps the ASR of both attacks, upper ends of intervals included, "
        f"within {STOPPED:g} of the control; there mean main accuracy, attacked or not, stays within {WITHIN:g} point "
        f"of no defence and no attack in {cheap[0]}. By the means alone: {stopped[1]} and {cheap[1]}."
    )
    return finding("The M that stops it", said, lines)


def _costs(place: Place, rule: str) -> tuple[str, bool]:
    """What a bound that stops both attacks costs, in words, and whether that is little."""
    runs = {"attack-free": place.free} | {f"{attack} attack": place.at_centre(attack) for attack in LINES[:2]}
    costs = {name: cost(place, of_rule(rows, rule)) for name, rows in runs.items()}
    said = ", ".join(f"{each.said(1)} {name}" for name, each in costs.items())
    return f"{place.name}: {rule} and below; main accuracy in points {said}", min(costs.values()).mean >= -WITHIN


def unconstrained(places: Sequence[Place]) -> Block:
    """Whether an attack that does not know of clipping gets past it, against the one that knows M."""
    of, knowing = (
        [excess(of_rule(place.at_centre(attack), rule)) for place in places for rule in place.clipping]
        for attack in LINES[:2]
    )
    surely, on_average = (sum(is_stopped(each, surely=way) for each in of) for way in (True, False))
    farther = sum(knows.mean - boosted.mean > STOPPED for knows, boosted in zip(knowing, of, strict=True))
    sentence = (
        f"Clipping stops the attack that does not know of it at {surely} of {count(len(of), 'bound')}, by the means "
        f"alone at {on_average}; the attack that knows M gets farther by more than {STOPPED:g} at {farther}."
    )
    return finding("Boosted and clipped", sentence)


def noise(places: Sequence[Place]) -> Block:
    """What noise adds to clipping at the same bound."""
    lines, lower, dear, of = [], 0, 0, 0
    for place in places:
        for rule in (rule for rule in place.rules if rule.startswith("weak")):
            bound = of_rule(place.runs, rule)["bound"].iloc[0]
            plain = rule_name(float(bound), np.nan, place.q90)
            own, bare = (of_rule(place.at_centre(BOUNDED), each).set_index("seed") for each in (rule, plain))
            if own.empty or bare.empty:
                continue
            asr = Figure95.of((own["asr"] - bare["asr"]).dropna())
            free, alone = (cost(place, of_rule(place.free, each)) for each in (rule, plain))
            lower, dear, of = lower + (asr.mean <= -STOPPED), dear + (free.mean < -WITHIN), of + 1
            lines.append(
                f"{place.name}, {rule}: ASR {asr.said()} against clipping alone; main accuracy attack-free "
                f"{free.said(1)} points against no defence, {alone.said(1)} with clipping alone"
            )
    sentence = (
        f"Noise on top of clipping lowers the norm-bounded ASR by {STOPPED:g} or more in {lower} of "
        f"{count(of, 'case')}, and costs more than {WITHIN:g} point of accuracy in {dear}."
    )
    return finding("Weak DP", sentence, lines)


def passing(places: Sequence[Place]) -> Block:
    """Whether what the norm-bounded attack sends passes, and whether what the other sends does."""
    lines = []
    for place in places:
        shares = [place.runs.loc[place.runs["attack"].eq(attack), "clipped"].dropna() for attack in LINES[:2]]
        free = place.free["clipped_benign"].groupby(place.free["rule"]).mean()
        benign = ", ".join(f"{percent(free[rule])} at {rule}" for rule in place.clipping)
        lines.append(
            f"{place.name}: {percent(shares[1].mean())} of the norm-bounded updates are longer than M, "
            f"{percent(shares[0].mean())} of the unconstrained ones; of benign ones {benign}"
        )
    worst = max(place.runs.loc[place.runs["attack"].eq(BOUNDED), "clipped"].max() for place in places)
    said = "Every norm-bounded update passes the clipping whole." if worst == 0 else (
        f"Up to {percent(worst)} of a run's norm-bounded updates are clipped."
    )  # fmt: skip
    return finding("Senders", said, lines)


def over_settings(places: Sequence[Place]) -> Iterator[Block]:
    """What more attackers, and what more tasks change."""
    for name, about, what in (("fraction", "Attackers", "attackers"), ("tasks", "Tasks", "tasks")):
        lines, rising, falling, of, beaten = [], 0, 0, 0, []
        for place in places:
            rows = along_setting(place, its_attack(place), name)
            for rule in (rule for rule in place.rules if rows["rule"].eq(rule).any()):
                own = of_rule(rows, rule).groupby(name)
                above = {value: excess(each) for value, each in own}
                first, *_, last = (each.mean for each in above.values())
                rising, falling, of = rising + (last - first > STOPPED), falling + (first - last > STOPPED), of + 1
                points = ", ".join(f"{above[key].said()} at {_value(name, key)}" for key in above)
                lines.append(f"{place.name}, {rule}: ASR above control {points}")
                if rule == largest_that_stops(place):
                    beaten += [f"{place.name} at {_value(name, key)}" for key in above if not is_stopped(above[key])]
        if not of:
            continue
        through = f"; the M that stops the attack at the centre no longer does in {listed(beaten)}" if beaten else ""
        sentence = (
            f"From the fewest to the most {what} the ASR above control rises by more than {STOPPED:g} under "
            f"{rising} of {count(of, 'rule')} and falls by more than that under {falling}{through}."
        )
        yield finding(about, sentence, lines)


def _value(name: str, value: Any) -> str:
    return f"{percent(float(value))} of updates" if name == "fraction" else count(int(value), "task")


def seen(places: Sequence[Place]) -> Block:
    """What detectors see of the norm-bounded attack, where it gets through and where it does not."""
    lines = []
    best: dict[bool, list[float]] = {False: [], True: []}
    names = {name for place in places for name in place.detectors["detector"]}
    for place in places:
        rows = place.detectors[place.detectors["attack"].eq(BOUNDED) & place.detectors["metric"].eq("tpr_5")]
        for rule, own in rows.groupby("rule", sort=False):
            runs = of_rule(place.at_centre(BOUNDED), str(rule))
            best[is_stopped(excess(runs), surely=False)].append(float(own["value"].max()))
            said = ", ".join(
                f"{name} {number(value)}" for name, value in zip(own["detector"], own["value"], strict=True)
            )
            lines.append(f"{place.name}, {rule} (ASR {number(runs['asr'].mean())}): {said}")
    where = {False: f"ASR above control is over {STOPPED:g}", True: f"ASR above control is at most {STOPPED:g}"}
    ranges = [f"{number(min(best[low]))} to {number(max(best[low]))} where {where[low]}" for low in best if best[low]]
    sentence = (
        f"Of the norm-bounded attackers' updates the best of {count(len(names), 'detector')} catches "
        f"{', '.join(ranges)}, at 5 % nominal FPR."
    )
    return finding("Detectors", sentence, lines)
