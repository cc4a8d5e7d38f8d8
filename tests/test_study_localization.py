"""The page on localisation: its figures come from the runs, and its sentences from the figures."""

import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from conftest import ROOT


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """reports/localisation.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "reports"))
        import localisation
    patch = pytest.MonkeyPatch()
    patch.setattr(localisation, "PERMUTATIONS", 9)
    yield localisation
    patch.undo()


@pytest.fixture(scope="module")
def evidence(page, tmp_path_factory):
    """What the page says of a few rounds of a few of its runs."""
    from simulations import load_sweep, run_sweep

    toml = ROOT / "simulations/scenarios/localisation.toml"
    small = {"rounds": 5, "poison_rate": 0.5, "num_malicious": 4}
    cells = [(rate, seed) for rate in (0.05, 0.1) for seed in (0, 1)]
    scenarios = [each for rate, seed in cells for each in load_sweep(toml, learning_rate=rate, seed=seed, **small)[0]]
    near = [each for each in scenarios if each.label("partition") == "iid" or each.learning_rate == 0.1]
    near = [each for each in near if each.label("partition") != "dirichlet(alpha=1)"]
    axes = [*page.CENTRE, "seed"]
    return page.gathered(run_sweep(near, tmp_path_factory.mktemp("runs") / "sweep", axes=axes, progress=False))


def sentences(blocks) -> str:
    return " ".join(" ".join([block["text"], *block["points"]]) for block in blocks)


def test_the_scenarios_are_the_product_and_the_skew_around_its_centre(page):
    from simulations import load_sweep

    scenarios, axes = load_sweep(ROOT / "simulations/scenarios/localisation.toml")
    attacked = [each for each in scenarios if not each.is_control]
    assert axes == [*page.CENTRE, "seed"]
    assert len(attacked) == (4 * 4 * 4 + 4 * 3) * 5
    assert any(all(each.label(name) == value for name, value in page.CENTRE.items()) for each in attacked)


def test_the_drift_is_that_of_the_recorded_bias(evidence):
    for row in evidence.drifts[evidence.drifts["round"].eq(0)].itertuples():
        settings = evidence.sweep.settings
        same = settings["seed"].eq(row.seed) & settings["learning_rate"].eq(row.learning_rate)
        run = evidence.sweep.run(settings.index[same & ~settings["control"] & settings["partition"].eq("iid")][0])
        moved = np.asarray(run.log[0].updates["fc2.bias"])[:, 1].astype(np.float64)
        guilty = np.isin(run.log[0].clients, run.truth.loc[run.truth["poisoned"], "client"])
        assert row.drift == pytest.approx(moved[guilty].mean() - moved[~guilty].mean(), rel=1e-4)
        steps = 2 * np.ceil(run.log[0].num_examples[guilty] / 18).mean()  # two epochs in batches of 18
        assert row.expected == pytest.approx(row.learning_rate * steps * 0.5 * 0.9)
        assert 0.6 < row.share < 1.1


def test_the_page_is_written_from_the_tables(page, evidence):
    html = page.page(evidence)
    assert {name for name in ("axes", "rounds", "product", "theory", "provenance") if f'id="{name}"' in html} == {
        "axes", "rounds", "product", "theory", "provenance"
    }  # fmt: skip
    assert html.count("<img") == 8
    said = sentences(page.findings(evidence))
    assert "nan" not in said
    assert {"dirichlet 0.5", "dirichlet 0.1"} <= set(re.findall(r"dirichlet [\d.]*\d", said))
    own = evidence.phases[evidence.phases["partition"].eq("iid") & evidence.phases["learning_rate"].eq(0.1)]
    own = own[own["statistic"].eq("final_bias") & own["phase"].eq(page.EARLY)].iloc[0]
    assert f"the final bias carries the signal in the first 3 attacked rounds: AUC {own['auc']:.2f}" in said


def test_other_tables_give_other_sentences(page, evidence):
    """Where nothing separates and drifts are noise, the page does not claim the theory."""
    rng = np.random.default_rng(0)
    deaf = {"auc": 0.5, "low": 0.4, "high": 0.6, "effect": 0.0}
    noise = evidence.drifts.assign(drift=rng.normal(size=len(evidence.drifts)))
    noise = noise.assign(share=noise["drift"] / noise["expected"])
    other = replace(
        evidence, phases=evidence.phases.assign(**deaf), rounds=evidence.rounds.assign(**deaf), drifts=noise
    )
    said = sentences(page.findings(other))
    assert "the final bias is silent" in said
    assert "neither shrinks nor grows" in said
    assert "At 2 of 2 learning rates the final bias falls below" in said


def test_the_committed_table_holds_what_the_scenarios_ask_for(page):
    table = pd.read_csv(page.CSV)
    whole = table[table["phase"].notna()]
    assert len(whole.drop_duplicates(list(page.CENTRE))) == 4 * 4 * 4 + 4 * 3
    assert (whole["seeds"] == 5).all()
    assert table[["auc", "low", "high", "control_auc", "control_effect"]].notna().all(axis=None)
