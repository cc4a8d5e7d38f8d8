"""Pictures: what is drawn and what the titles claim, never pixels."""

from io import BytesIO

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from sklearn.metrics import roc_auc_score

from gradlens.errors import InputError
from gradlens.evaluation import auc, mean_interval, roc_points
from gradlens.log import ModelSpec, Round, UpdateLog
from gradlens.plots import (
    clients_by_bias,
    conditions,
    label_counts,
    percent,
    plain,
    plot_final_bias,
    plot_localization,
    plot_localization_along,
    plot_roc,
    plot_scores,
    plot_training,
)
from planted import CLIENTS, GROUP, STATE, clean_log, edited

HOSTILE = ["<script>alert(1)</script>", "$\\frac{$", "_hidden", "北京\u202e", "x" * 300, "a\nb", "%d {0} \x00"]


@pytest.fixture
def ax():
    return Figure(figsize=(6, 4), layout="constrained").subplots()


def title(ax) -> str:
    return ax.get_title(loc="left").replace("\n", " ")


def draw(ax) -> str:
    """The picture as SVG; its texts stand in comments."""
    file = BytesIO()
    ax.get_figure().savefig(file, format="svg")
    return file.getvalue().decode()


def biased(rounds: int = 2) -> UpdateLog:
    """The clients of GROUP push class 1 up."""

    def push(updates, rows):
        updates["fc2.bias"][rows, 1] += 3.0

    return edited(clean_log(rounds), push, GROUP)


def truth(rounds: int = 2) -> pd.DataFrame:
    rows = [(r, c, c in GROUP, c in GROUP) for r in range(rounds) for c in CLIENTS]
    return pd.DataFrame(rows, columns=["round", "client", "compromised", "poisoned"])


# plot_final_bias ----------------------------------------------------------------------------------------------


def test_final_bias_shows_the_centred_updates_malicious_clients_on_top(ax):
    log = biased()
    assert plot_final_bias(log, truth(), ax=ax) is ax
    bias = log[-1].updates["fc2.bias"].astype(np.float64)
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert {name.split()[-1] for name in names[:3]} == set(GROUP)
    assert all(name.startswith("malicious") for name in names[:3])
    assert sorted(name.split()[-1] for name in names) == sorted(CLIENTS)
    drawn = ax.collections[0].get_array().reshape(12, 4)
    order = [CLIENTS.index(name.split()[-1]) for name in names]
    np.testing.assert_allclose(drawn, (bias - np.median(bias, axis=0))[order], atol=1e-6)
    assert title(ax) == "Round 1: the 3 malicious clients stand out (AUC 1.00)"
    assert ax.get_xlabel() == "class"
    assert "[logits]" in draw(ax)


def test_final_bias_colours_are_symmetric_and_shared_on_request(ax):
    plot_final_bias(biased(), ax=ax, scale=0.25)
    assert ax.collections[0].get_clim() == (-0.25, 0.25)
    other = Figure().subplots()
    low, high = plot_final_bias(biased(), ax=other).collections[0].get_clim()
    assert low == -high < 0


def test_final_bias_marks_signs_so_that_grey_print_can_be_read(ax):
    plot_final_bias(biased(), truth(), ax=ax)
    signs = [text.get_text() for text in ax.texts]
    assert signs.count("+") == 3  # the three pushed cells, all else is far below half of the scale


def test_final_bias_of_an_attack_that_does_nothing_is_said_not_to_stand_out(ax):
    usual = clients_by_bias(clean_log(2))[6:8]  # two of the least unusual clients
    guilty = truth().assign(poisoned=lambda t: t["client"].isin(usual))
    plot_final_bias(clean_log(2), guilty, ax=ax)
    assert title(ax).startswith("Round 1: the 2 malicious clients do not stand out (AUC 0.")


def test_final_bias_without_truth_names_who_deviates_most(ax):
    def push(updates, rows):
        updates["fc2.bias"][rows, 2] -= 5.0

    plot_final_bias(edited(clean_log(2), push, ["client-07"]), ax=ax)
    assert title(ax).startswith("Round 1: client-07 deviates most, class 2,")


def test_final_bias_hatches_a_client_beyond_comparison(ax):
    def spoil(updates, rows):
        updates["fc1.weight"][rows] = np.nan

    plot_final_bias(edited(clean_log(2), spoil, ["client-07"]), ax=ax)
    assert "not comparable" in [text.get_text() for text in ax.texts]
    assert title(ax) == "Round 1: 1 client sent an update beyond comparison"


def test_final_bias_follows_a_given_order_and_adds_who_is_missing_from_it(ax):
    order = clients_by_bias(biased(), truth())
    assert set(order[:3]) == set(GROUP)
    plot_final_bias(clean_log(), order=order[:5], ax=ax)
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert names[:5] == order[:5]
    assert sorted(names) == sorted(CLIENTS)


def test_final_bias_says_why_there_is_no_picture(ax):
    plot_final_bias(clean_log(clients=("a", "b")), ax=ax)
    assert title(ax) == "Round 3: no final-bias picture"
    assert not ax.axison
    assert clients_by_bias(clean_log(clients=("a", "b"))) == []


def test_final_bias_of_many_clients_shows_the_most_unusual_and_says_so(ax):
    log = clean_log(1, clients=[f"c{i}" for i in range(60)])
    plot_final_bias(log, ax=ax)
    assert len(ax.get_yticklabels()) == 40
    assert ax.get_ylabel() == "client (40 of 60 shown)"


# plot_localization --------------------------------------------------------------------------------------------


def places() -> pd.DataFrame:
    rows = []
    for malicious in (1, 4):
        for phase in ("first 3 attacked rounds", "later"):
            for control in (True, False):
                for layer, gain in (("fc1.weight", 0.05), ("fc2.bias", 0.11)):
                    value = 0.52 if control else 0.5 + gain * malicious - (0.2 if phase == "later" else 0)
                    rows.append(
                        (malicious, control, phase, layer, "layer_norms", "", value, 0.01 if value > 0.9 else 0.5)
                    )
    columns = ["num_malicious", "control", "phase", "layer", "statistic", "unit", "auc", "p"]
    return pd.DataFrame(rows, columns=columns)


def test_localization_draws_every_auc_beside_its_control_on_a_fixed_scale(ax):
    plot_localization(places(), ax=ax)
    assert ax.collections[0].get_clim() == (0, 1)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["1 malicious", "4 malicious"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["fc1.weight", "fc2.bias"] * 4
    drawn = ax.collections[0].get_array().reshape(2, 11)
    np.testing.assert_allclose(drawn[1, :5].filled(-1), [0.7, 0.94, -1, 0.52, 0.52])  # attacked, gap, its control
    blocks = [text.get_text() for text in ax.texts if "\n" in text.get_text()]
    assert blocks == [
        f"{phase}\n{kind}"
        for phase in ("first 3 attacked rounds", "later")
        for kind in ("attacked", "attack-free control")
    ]
    assert {"0.94", "0.70", "0.52"} <= {text.get_text() for text in ax.texts}
    assert title(ax) == "layer_norms: fc2.bias separates best (AUC 0.94, control at most 0.52)"
    assert sum(not patch.get_fill() for patch in ax.patches) == 1  # one p below 0.05 is outlined
    assert "p < 0.05" in ax.get_xlabel()


def test_localization_says_when_no_layer_separates(ax):
    plot_localization(places().query("num_malicious == 1"), ax=ax)
    assert title(ax) == "layer_norms: no layer separates (best AUC 0.61, control at most 0.52)"


def test_localization_chooses_the_statistic_that_separates_best(ax):
    weaker = places().assign(statistic="final_bias", auc=0.5)
    plot_localization(pd.concat([weaker, places()]), ax=ax)
    assert title(ax).startswith("layer_norms:")
    plot_localization(pd.concat([weaker, places()]), statistic="final_bias", ax=Figure().subplots())


def test_localization_takes_the_table_of_a_single_call(ax):
    table = pd.DataFrame(
        {
            "layer": ["fc1.weight", "fc2.bias", "fc2.bias"],
            "statistic": "s",
            "unit": ["", "", "3"],
            "auc": [0.5, 0.95, 1.0],
        }
    )
    plot_localization(table, ax=ax)
    assert title(ax) == "s: fc2.bias separates best (AUC 0.95)"  # units are not drawn
    assert "condition" not in ax.get_ylabel()


def test_localization_without_rows_says_so(ax):
    plot_localization(places().iloc[:0], statistic="layer_norms", ax=ax)
    assert title(ax) == "layer_norms: nothing was localized"


def test_conditions_name_what_is_varied_and_drop_settings_that_tell_nothing_apart():
    rows = [
        {"attack": "trigger(size=3)", "num_malicious": 2, "learning_rate": 0.1, "detector": "none"},
        {"attack": "label_flip(source_label=7)+scaling(factor=5)", "num_malicious": 1, "learning_rate": 0.02},
    ]
    assert conditions(rows) == ["trigger, 2 malicious, lr 0.1", "label_flip+scaling, 1 malicious, lr 0.02"]
    apart = [{"attack": "trigger(size=3)"}, {"attack": "trigger(size=4)"}]
    assert conditions(apart) == ["trigger(size=3)", "trigger(size=4)"]
    assert conditions([{}]) == ["all runs"]
    usual = {"attack": "trigger", "filter": "drop", "schedule": "every_round"}
    assert conditions([usual, usual | {"filter": "clip"}]) == ["trigger", "trigger, filter clip"]


# plot_localization_along --------------------------------------------------------------------------------------


def along(axis="learning_rate", values=(0.02, 0.05, 0.2)) -> pd.DataFrame:
    """One statistic falls along the axis, one stays; each has its control."""
    rows = []
    for i, value in enumerate(values):
        falling, figures = 0.95 - 0.2 * i, (0.01, 5, 4.0 - 2 * i, 0.48 + 0.01 * i, 1.0 + 3 * i, "truth")
        for place, auc_ in (
            (("fc2.bias", "final_bias", ""), falling),
            (("fc2.bias", "final_bias", "3"), falling),
            (("fc1.weight", "layer_norms", ""), 0.97),
        ):
            rows.append((value, False, *place, auc_, auc_ - 0.05, auc_ + 0.02, *figures))
    columns = [axis, "control", "layer", "statistic", "unit", "auc", "low", "high", "p", "seeds"]
    table = pd.DataFrame(rows, columns=[*columns, "effect", "control_auc", "control_effect", "labels"])
    free = table.assign(control=True, auc=table["control_auc"], control_auc=np.nan, control_effect=np.nan)
    return pd.concat([table, free], ignore_index=True)


def labels_of(ax) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_along_draws_each_place_with_its_interval_and_its_control(ax):
    plot_localization_along(along(), "learning_rate", ax=ax)
    assert labels_of(ax) == [
        "layer_norms in fc1.weight",
        "final_bias in fc2.bias",
        "chance",
        "control: the same clients, no attack",
    ]
    drawn = {container.get_label(): container for container in ax.containers}
    falling, bars = drawn["final_bias in fc2.bias"], drawn["final_bias in fc2.bias"].lines[2][0]
    np.testing.assert_allclose(falling.lines[0].get_ydata(), [0.95, 0.75, 0.55])
    ends = [segment[:, 1] for segment in bars.get_segments()]
    np.testing.assert_allclose(ends, [[0.9, 0.97], [0.7, 0.77], [0.5, 0.57]])
    grey = [line for line in ax.lines if line.get_color() == "0.6" and len(line.get_xdata())]
    assert len(grey) == 2
    for line in grey:
        np.testing.assert_allclose(line.get_ydata(), [0.48, 0.49, 0.5])
    chance = [line for line in ax.lines if line.get_label() == "chance"]
    assert set(chance[0].get_ydata()) == {0.5}


def test_along_differs_without_colour(ax):
    plot_localization_along(along(), "learning_rate", ax=ax)
    lines = [container.lines[0] for container in ax.containers]
    assert len({line.get_linestyle() for line in lines}) == 2 or len({line.get_marker() for line in lines}) == 2
    assert len({line.get_marker() for line in lines}) == 2


def test_along_titles_are_the_finding(ax):
    places = [("fc2.bias", "final_bias"), ("fc1.weight", "layer_norms")]
    plot_localization_along(along(), "learning_rate", places=places, ax=ax)
    assert title(ax) == (
        "final_bias in fc2.bias falls with learning rate: AUC 0.95 at 0.02, 0.55 at 0.2 "
        "(there layer_norms in fc1.weight 0.97, control at most 0.50)"
    )
    turned = along(values=(0.2, 0.05, 0.02))  # the order of the table is not that of the axis
    plot_localization_along(turned, "learning_rate", places=places, ax=ax)
    assert title(ax).startswith("final_bias in fc2.bias rises with learning rate: AUC 0.55 at 0.02, 0.95 at 0.2")
    plot_localization_along(along(), "learning_rate", places=places[1:], ax=ax)
    assert title(ax) == "layer_norms in fc1.weight stays with learning rate: AUC 0.97 to 0.97 (control at most 0.50)"
    both = pd.concat([along(), turned.assign(learning_rate=turned["learning_rate"] + 1)])
    plot_localization_along(both, "learning_rate", places=places[:1], ax=ax)
    assert title(ax).startswith("final_bias in fc2.bias changes with learning rate: AUC 0.55 to 0.95")


@pytest.mark.parametrize(
    ("axis", "values", "label", "ticks", "scale"),
    [
        ("learning_rate", (0.02, 0.05, 0.2), "learning rate", ["0.02", "0.05", "0.2"], "log"),
        ("num_malicious", (1, 2, 3), "malicious clients", ["1", "2", "3"], "linear"),
        ("num_malicious", (0, 2, 8), "malicious clients", ["0", "2", "8"], "linear"),
        (
            "partition",
            ("iid", "dirichlet(alpha=1)", "$\\frac{"),
            "partition",
            ["iid", "dirichlet 1", "$\\frac{"],
            "linear",
        ),
    ],
)
def test_along_marks_the_values_of_its_axis(ax, axis, values, label, ticks, scale):
    plot_localization_along(along(axis, values), axis, ax=ax)
    draw(ax)
    assert ax.get_xlabel() == label
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ticks
    assert ax.get_xscale() == scale
    assert ax.get_ylabel().startswith("AUC")


def test_along_rounds_since_the_attack_began(ax):
    plot_localization_along(along("since", range(4)), "since", ax=ax)
    assert ax.get_xlabel() == "rounds since the attack began"
    assert "over the rounds since the attack began" in title(ax)


def test_along_in_robust_sigmas_stands_beside_the_farthest_benign_client(ax):
    plot_localization_along(along(), "learning_rate", measure="effect", places=[("fc2.bias", "final_bias")], ax=ax)
    assert ax.get_ylabel() == "effect [robust sigmas]"
    assert "control: the farthest benign client" in labels_of(ax)
    assert title(ax) == (
        "final_bias in fc2.bias falls with learning rate: effect 4.00 at 0.02, 0.00 at 0.2 (control at most 7.00)"
    )


def test_along_without_a_control_has_none(ax):
    alone = along().drop(columns="control").drop_duplicates(["learning_rate", "layer", "statistic", "unit"])
    plot_localization_along(alone.assign(control_auc=np.nan), "learning_rate", ax=ax)
    assert labels_of(ax)[-1] == "chance"
    assert "control" not in title(ax)


def test_along_refuses_what_is_no_single_line(ax):
    two = pd.concat([along().assign(phase="early"), along().assign(phase="later")])
    with pytest.raises(InputError, match=r"has several rows at learning_rate 0.02; choose the rows of one condition"):
        plot_localization_along(two, "learning_rate", ax=ax)
    with pytest.raises(InputError, match="axis: expected a column of the table"):
        plot_localization_along(along(), "learning_rat", ax=ax)
    with pytest.raises(InputError, match="measure: expected one of auc, effect, found 'p'"):
        plot_localization_along(along(), "learning_rate", measure="p", ax=ax)
    plot_localization_along(along().iloc[:0], "learning_rate", ax=ax)
    assert title(ax) == "Nothing was localized along learning_rate"


def test_a_heat_map_ignores_the_columns_of_localize_that_are_no_setting(ax):
    table = along().drop(columns=["learning_rate"]).drop_duplicates(["control", "layer", "statistic", "unit"])
    plot_localization(table, statistic="final_bias", ax=ax)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["all runs"]


# plot_scores --------------------------------------------------------------------------------------------------


def scores(malicious=("c0",), rounds: int = 5, gain: float = 5.0) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = [(r, f"c{i}", rng.uniform(1, 2) + gain * (f"c{i}" in malicious)) for r in range(rounds) for i in range(6)]
    table = pd.DataFrame(rows, columns=["round", "client", "score"])
    return table.assign(malicious=table["client"].isin(malicious), flag=table["score"] > 3, abstained="")


def lines_of(ax) -> dict[str, list]:
    thin = [line for line in ax.lines if line.get_linewidth() == 0.8]
    return {"benign": thin, "malicious": [line for line in ax.lines if line.get_marker() == "o"]}


def test_scores_draw_a_line_per_client_and_malicious_ones_differ_beyond_colour(ax):
    table = scores()
    plot_scores(table, threshold=3.0, ax=ax)
    lines = lines_of(ax)
    assert (len(lines["benign"]), len(lines["malicious"])) == (5, 1)
    (line,) = lines["malicious"]
    np.testing.assert_allclose(line.get_ydata(), table.loc[table["client"] == "c0", "score"])
    assert line.get_linewidth() > 2 * lines["benign"][0].get_linewidth()
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["malicious (1)", "benign (5)", "threshold 3"]
    assert (
        title(ax)
        == "Malicious clients stand out: AUC 1.00 over 5 rounds, 100\N{NO-BREAK SPACE}% of their updates flagged"
    )
    assert ax.get_xlabel() == "round"


def test_scores_auc_leaves_out_rounds_and_updates_without_poison(ax):
    table = scores(gain=0.0)
    late = (table["client"] == "c0") & (table["round"] >= 3)
    table.loc[late, "score"] += 10
    plot_scores(table.assign(malicious=late), ax=ax)
    assert title(ax) == "Malicious clients stand out: AUC 1.00 over 2 rounds"
    assert len(lines_of(ax)["malicious"]) == 1


def test_scores_of_a_control_count_false_flags(ax):
    table = scores(malicious=()).assign(flag=[True] + [False] * 29)
    plot_scores(table, threshold=3.0, ax=ax)
    assert title(ax) == "No attack: 1 of 30 updates flagged (3.3\N{NO-BREAK SPACE}%)"


def test_scores_without_truth_name_who_is_flagged_most(ax):
    plot_scores(scores().drop(columns="malicious"), threshold=3.0, ax=ax)
    assert title(ax) == "c0 is flagged most: 5 of 5 rounds, first in round 0"
    other = Figure().subplots()
    plot_scores(scores(malicious=()).drop(columns="malicious"), threshold=3.0, ax=other)
    assert title(other) == "No client is flagged in 5 rounds"


def test_scores_without_truth_draw_and_name_the_three_most_suspicious(ax):
    table = scores().assign(flag=lambda t: t["client"].eq("c0") | (t["client"].eq("c4") & t["round"].ge(3)))
    plot_scores(table.drop(columns="malicious"), ax=ax)
    third = table[~table["client"].isin(["c0", "c4"])].groupby("client")["score"].median().idxmax()
    assert labels_of(ax) == ["c0", "c4", third, "others (3)"]
    thick = [line for line in ax.lines if line.get_linewidth() == 1.6]
    for line, client in zip(thick, ["c0", "c4", third], strict=True):
        np.testing.assert_allclose(line.get_ydata(), table.loc[table["client"].eq(client), "score"])
    assert len({(line.get_color(), str(line.get_linestyle())) for line in thick}) == 3
    assert len(lines_of(ax)["benign"]) == 3


def test_infinite_scores_are_marked_at_the_upper_edge(ax):
    table = scores()
    table.loc[table["client"] == "c3", "score"] = np.inf
    plot_scores(table, threshold=3.0, ax=ax)
    (marks,) = [line for line in ax.lines if line.get_marker() == "^"]
    assert len(marks.get_xdata()) == 5
    assert set(marks.get_ydata()) == {ax.get_ylim()[1]}
    assert "infinite" in [text.get_text() for text in ax.get_legend().get_texts()]


def test_two_pictures_of_scores_share_their_limits():
    left, right = Figure().subplots(1, 2)
    attacked, free = scores(gain=40.0), scores(malicious=())
    plot_scores(attacked, threshold=3.0, beside=free, ax=left)
    plot_scores(free, threshold=3.0, beside=attacked, ax=right)
    assert left.get_ylim() == right.get_ylim()
    assert left.get_yscale() == right.get_yscale()


def test_one_huge_score_makes_the_axis_logarithmic_and_the_threshold_stays_in_view(ax):
    table = scores()
    table.loc[0, "score"] = 1e6
    plot_scores(table, threshold=3.0, ax=ax)
    assert ax.get_yscale() == "symlog"
    assert ax.get_ylim()[0] < 3 < 1e6 < ax.get_ylim()[1]


def test_abstained_rounds_are_left_out_and_no_scores_is_said(ax):
    table = scores().assign(abstained=lambda t: np.where(t["round"] == 0, "too few", ""))
    plot_scores(table, ax=ax)
    assert min(line.get_xdata().min() for line in lines_of(ax)["benign"]) == 1
    other = Figure().subplots()
    plot_scores(table.assign(abstained="too few"), ax=other)
    assert title(other) == "No scores"


# plot_roc -----------------------------------------------------------------------------------------------------


def detected() -> pd.DataFrame:
    rng = np.random.default_rng(1)
    malicious = np.arange(60) < 12
    parts = [
        pd.DataFrame({"detector": name, "score": rng.normal(size=60) + gain * malicious, "malicious": malicious})
        for name, gain in (("weak", 0.5), ("strong", 3.0))
    ]
    return pd.concat(parts, ignore_index=True).assign(abstained="")


def test_roc_draws_steps_from_corner_to_corner_the_best_first_in_the_legend(ax):
    table = detected()
    plot_roc(roc_points(table), ax=ax)
    curves = [line for line in ax.lines if line.get_drawstyle() == "steps-post"]
    assert len({line.get_linestyle() for line in curves}) == 2 or len({str(c._dash_pattern) for c in curves}) == 2
    for line in curves:
        assert (line.get_xdata()[0], line.get_ydata()[0]) == (0, 0)
        assert (line.get_xdata()[-1], line.get_ydata()[-1]) == (1, 1)
    strong = table[table["detector"] == "strong"]
    expected = roc_auc_score(strong["malicious"], strong["score"])
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels[0] == f"strong: AUC {expected:.2f}"
    assert title(ax) == f"strong separates best: AUC {expected:.2f}"


def test_roc_quotes_the_interval_of_the_evaluation(ax):
    figures = pd.DataFrame(
        {"detector": ["weak", "strong"], "metric": "auc", "value": [0.6, 0.9], "low": [0.5, 0.85], "high": [0.7, 0.95]}
    )
    plot_roc(roc_points(detected()), figures=figures, ax=ax)
    assert "0.90 [0.85, 0.95]".replace(", ", ",\N{NO-BREAK SPACE}") in title(ax)
    with pytest.raises(InputError, match="one auc row for detector 'strong', found 0"):
        plot_roc(roc_points(detected()), figures=figures.iloc[:1], ax=ax)


def test_roc_of_a_control_speaks_of_chance_and_a_poor_one_of_no_separation(ax):
    table = detected().query("detector == 'weak'")
    weak = roc_points(table.assign(malicious=np.arange(60) % 5 == 1))  # at random
    plot_roc(weak.assign(control=True), ax=ax)
    assert title(ax).startswith("By chance at most AUC")
    other = Figure().subplots()
    plot_roc(weak, ax=other)
    assert title(other).startswith("No detector separates (best AUC")


def test_roc_without_a_curve_says_so(ax):
    plot_roc(roc_points(detected().assign(malicious=False)), ax=ax)
    assert title(ax) == "No ROC curve"


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=40))
def test_area_is_the_auc_of_scikit_learn(pairs):
    values, malicious = (np.array(column) for column in zip(*pairs, strict=True))
    if malicious.all() or not malicious.any():
        assert np.isnan(auc(values, malicious))
    else:
        assert auc(values, malicious) == pytest.approx(roc_auc_score(malicious, values))


# plot_training ------------------------------------------------------------------------------------------------


def metrics(filters=("",), control=(False,), asr: float = 0.9) -> pd.DataFrame:
    rows = []
    for seed in range(3):
        for name in filters:
            for free in control:
                for r in range(6):
                    rate = 0.02 if free or name else asr * (r + 1) / 6 + 0.01 * seed
                    rows.append((r, seed, name, free, 0.5 + 0.07 * r, rate))
    return pd.DataFrame(rows, columns=["round", "seed", "filter", "control", "main_accuracy", "asr"])


def test_training_draws_the_mean_over_seeds_with_and_without_a_filter(ax):
    table = metrics(filters=("", "final_bias"))
    plot_training(table, ax=ax)
    lines = {line.get_label(): line for line in ax.lines if len(line.get_xdata())}
    measures = {"main accuracy", "attack success rate"}
    assert set(lines) >= measures | {f"{measure}, filter final_bias" for measure in measures}
    mean = table[table["filter"] == ""].groupby("round")["asr"].mean()
    np.testing.assert_allclose(lines["attack success rate"].get_ydata(), mean)
    assert lines["main accuracy"].get_linestyle() == "-"
    assert lines["main accuracy, filter final_bias"].get_linestyle() != "-"
    assert lines["attack success rate"].get_marker() == "o"  # told apart from main accuracy in grey
    assert len(ax.collections) == 4  # a band each
    assert title(ax) == "The filter lowers ASR: 0.91 to 0.02, main accuracy 0.85 to 0.85"
    assert "3 seeds" in ax.get_xlabel()
    assert ax.get_ylabel() == "share of test samples"


def test_the_band_of_training_is_the_interval_of_the_mean(ax):
    two = pd.DataFrame({"round": [0, 0, 1, 1], "seed": [0, 1, 0, 1], "asr": np.nan})
    plot_training(two.assign(main_accuracy=[0.50, 0.52, 0.70, 0.90]), ax=ax)
    band = ax.collections[0].get_paths()[0].vertices
    for index, values in enumerate(([0.50, 0.52], [0.70, 0.90])):
        heights = band[band[:, 0] == index, 1]
        assert (heights.min(), heights.max()) == pytest.approx(mean_interval(np.array(values), 0, 1))


def test_training_names_the_control_and_a_filter_that_does_nothing(ax):
    table = metrics(control=(False, True))
    plot_training(table, ax=ax)
    assert title(ax) == "ASR 0.91 (control 0.02), main accuracy 0.85"
    grey = [line for line in ax.lines if line.get_label().endswith("no attack")]
    assert len({to_rgb(line.get_color()) for line in grey}) == 1
    useless = pd.concat([metrics(), metrics().assign(filter="median")])
    other = Figure().subplots()
    plot_training(useless, ax=other)
    assert title(other).startswith("The filter does not lower ASR: 0.91 to 0.91")


def test_training_without_attack_speaks_of_main_accuracy_only(ax):
    plot_training(metrics(control=(True,)).assign(asr=np.nan), ax=ax)
    assert title(ax) == "No attack: main accuracy 0.85"
    other = Figure().subplots()
    plot_training(metrics()[["round", "main_accuracy"]].iloc[:6].assign(asr=np.nan), ax=other)
    assert title(other) == "Main accuracy 0.85"
    assert "one seed" in other.get_xlabel()


# label_counts -------------------------------------------------------------------------------------------------


def held(counts, labels=None) -> pd.DataFrame:
    """The table of counts [client, label]; labels are called 0, 1, ... unless named."""
    counts = np.asarray(counts)
    labels = list(range(counts.shape[1])) if labels is None else labels
    rows = [(f"c{i:02d}", labels[k], counts[i, k]) for i, k in np.ndindex(counts.shape)]
    return pd.DataFrame(rows, columns=["client", "label", "count"])


def test_label_counts_draws_each_number_and_leaves_zeros_empty(ax):
    counts = np.array([[3, 0, 1], [2, 1_000, 0]])
    assert label_counts(held(counts, ["cat", "dog", "owl"]), ax=ax) is ax
    np.testing.assert_array_equal(ax.collections[0].get_array().reshape(2, 3), counts)
    drawn = {tuple(np.array(text.get_position()) - 0.5): text.get_text() for text in ax.texts}
    assert drawn == {(0, 0): "3", (2, 0): "1", (0, 1): "2", (1, 1): "1000"}
    assert [label.get_text() for label in ax.get_xticklabels()] == ["cat", "dog", "owl"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["c00", "c01"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("label", "client")
    assert ax.collections[0].get_clim()[0] == 0
    assert "samples" in draw(ax)


def test_label_counts_can_be_read_in_grey(ax):
    label_counts(held([[0, 1, 2, 3, 4, 5]]), ax=ax)
    colours = np.array([to_rgb(ax.collections[0].cmap(level)) for level in np.linspace(0, 1, 6)])
    assert (np.diff(colours @ [0.299, 0.587, 0.114]) < -0.05).all()  # the darker the more


def test_label_counts_titles_say_whether_labels_differ(ax):
    rng = np.random.default_rng(0)
    fair = rng.multinomial(100, np.full(10, 0.1), size=20)
    label_counts(held(fair), ax=ax)
    assert title(ax).startswith("Labels are spread evenly (V 0.0")
    assert title(ax).endswith("; 20 clients of 100 samples")
    unequal = np.array([rng.multinomial(size, np.full(10, 0.1)) for size in np.geomspace(10, 2_000, 20).astype(int)])
    other = label_counts(held(unequal), ax=Figure().subplots())
    assert title(other).startswith("Labels are spread evenly (V 0.0")
    assert title(other).endswith("; 20 clients of 10 to 2,000 samples")
    skewed = np.kron(np.eye(5, dtype=int), np.full((4, 2), 50))
    other = label_counts(held(skewed), ax=Figure().subplots())
    assert title(other).replace("\N{NO-BREAK SPACE}", " ") == (
        "Labels differ between clients (V 0.66): the commonest is 50 % of a client, 10 % of all; "
        "20 clients of 100 samples"
    )


def test_label_counts_quotes_cramers_v_without_its_bias(ax):
    """By hand: chi square 36 of 100 samples, phi^2 .36 - 1 / 99, both sides 2 - 1 / 99 - 1."""
    label_counts(held([[40, 10], [10, 40]]), ax=ax)
    expected = np.sqrt((0.36 - 1 / 99) / (1 - 1 / 99))
    assert f"(V {expected:.2f})" in title(ax)
    assert f"{expected:.2f}" == "0.59"


def test_label_counts_ignores_who_and_what_is_empty_and_adds_up_rows(ax):
    counts = np.array([[30, 0, 20], [0, 0, 0], [20, 0, 30]])
    table = held(counts)
    halves = pd.concat([table.assign(count=table["count"] // 2)] * 2)
    label_counts(halves[halves["count"] > 0], ax=ax)  # pairs without a row count 0
    other = label_counts(held(counts), ax=Figure().subplots())
    measure = title(other).partition(";")[0]
    assert title(ax).partition(";")[0] == measure
    assert title(other).endswith("; 3 clients of 0 to 50 samples")


@pytest.mark.parametrize("counts", [[[5, 3]], [[5], [3]], [[5, 0], [3, 0]]])
def test_label_counts_of_one_client_or_one_label_compares_nothing(ax, counts):
    label_counts(held(counts), ax=ax)
    assert title(ax).startswith("Labels cannot be compared: ")


def test_label_counts_of_nothing_says_so(ax):
    assert title(label_counts(held([[0, 0]]), ax=ax)) == "No label counts"
    assert title(label_counts(held(np.zeros((0, 2))), ax=Figure().subplots())) == "No label counts"


def test_label_counts_of_many_shows_the_most_frequent_labels_and_the_first_clients(ax):
    rng = np.random.default_rng(0)
    counts = rng.poisson(np.arange(65), size=(50, 65))
    label_counts(held(counts), ax=ax)
    assert ax.collections[0].get_array().size == 40 * 40
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("label (40 of 65 shown)", "client (40 of 50 shown)")
    names = [label.get_text() for label in ax.get_xticklabels()]
    frequent = np.sort(np.argsort(counts.sum(axis=0))[-40:])
    assert names == [str(label) for label in frequent]
    assert len(ax.get_yticklabels()) == 20  # every second
    assert not ax.texts


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 5).flatmap(
        lambda width: st.lists(st.lists(st.integers(0, 50), min_size=width, max_size=width), min_size=1, max_size=5)
    )
)
def test_label_counts_speaks_of_any_counts(counts):
    ax = label_counts(held(counts), ax=Figure().subplots())
    assert "nan" not in title(ax)


# names from outside -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_drawn_as_plain_short_text(name):
    shown = plain(name)
    assert shown.isascii()
    assert shown.isprintable()
    assert len(shown) <= 24


def test_every_picture_survives_hostile_names(ax):
    names = np.array([*HOSTILE, "a", "b"], dtype=np.str_)
    rng = np.random.default_rng(0)
    updates = {name: rng.normal(size=(len(names), *value.shape)).astype(value.dtype) for name, value in STATE.items()}
    round_ = Round(0, names, np.ones(len(names)), updates, STATE, buffers=("norm.count",))
    log = UpdateLog(ModelSpec.of(STATE, buffers=["norm.count"]), [round_])
    guilty = pd.DataFrame({"round": 0, "client": names, "compromised": True, "poisoned": names == HOSTILE[0]})
    assert "<script>" not in draw(plot_final_bias(log, guilty, ax=ax))
    table = scores().assign(client=lambda t: t["client"].map(lambda c: HOSTILE[int(c[1:])])).drop(columns="malicious")
    draw(plot_scores(table, threshold=3.0, ax=Figure().subplots()))
    points = roc_points(detected())
    draw(plot_roc(points.assign(detector=HOSTILE[1]), ax=Figure().subplots()))
    draw(plot_training(metrics(filters=("", HOSTILE[1])), ax=Figure().subplots()))
    table = held(np.eye(len(HOSTILE), dtype=int) + 1, [*HOSTILE[:-2], " ", ""])
    draw(label_counts(table.assign(client=table["client"].map(lambda c: HOSTILE[int(c[1:])])), ax=Figure().subplots()))
    draw(plot_localization(places().assign(layer=HOSTILE[1], num_malicious=HOSTILE[3]), ax=Figure().subplots()))
    hostile = along().assign(layer=HOSTILE[1]).drop_duplicates(["learning_rate", "control", "statistic", "unit"])
    draw(plot_localization_along(hostile, "learning_rate", ax=Figure().subplots()))


@settings(max_examples=200)
@given(st.text(max_size=60), st.integers(8, 40))
def test_plain_names_are_ascii_printable_and_short(name, most):
    shown = plain(name, most)
    assert shown.isascii()
    assert shown.isprintable()
    assert len(shown) <= most
    if name.isascii() and name.isprintable() and len(name) <= most:
        assert shown == name


@pytest.mark.parametrize(
    ("share", "text"), [(0, "0 %"), (0.004, "0.4 %"), (0.05, "5 %"), (0.123, "12 %"), (1, "100 %")]
)
def test_percentages_have_the_digits_that_matter(share, text):
    assert percent(share).replace("\N{NO-BREAK SPACE}", " ") == text


def test_a_plot_without_an_ax_draws_on_the_current_one():
    import matplotlib.pyplot as plt

    try:
        assert plot_scores(scores()) is plt.gca()
    finally:
        plt.close("all")
