"""Names: what is built in, what an installed package adds, and functions that a user names."""

import sys
from importlib.metadata import EntryPoint

import pytest

from gradlens import names
from gradlens.detectors import DETECTORS
from gradlens.errors import InputError
from gradlens.names import available, hint, imported, named, nothing_imported

TABLE = {"krum": max, "flame": min}
MODULE = """
value = 3

def loud():
    return "loud"
"""


@pytest.fixture(autouse=True)
def modules(tmp_path, monkeypatch):
    """Modules to name: `their_module`, `broken_module`, which fails on import, and `mute_module`, without a reason."""
    (tmp_path / "their_module.py").write_text(MODULE)
    (tmp_path / "broken_module.py").write_text("raise RuntimeError('out of order\\nand more')")
    (tmp_path / "mute_module.py").write_text("raise RuntimeError")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in ("their_module", "broken_module", "mute_module"):
        sys.modules.pop(name, None)


@pytest.fixture
def package(monkeypatch):
    """A function that pretends that an installed package adds entry points: name -> "module:function"."""

    def add(kind: str = "detectors", **values: str) -> None:
        points = {name: EntryPoint(name, value, f"gradlens.{kind}") for name, value in values.items()}
        monkeypatch.setattr(names, "installed", lambda asked: points if asked == kind else {})

    return add


# named -------------------------------------------------------------------------------------------------------


def test_a_built_in_name_is_looked_up():
    assert named("detectors", TABLE, "krum") is max
    assert named("detectors", DETECTORS, "krum") is DETECTORS["krum"]


def test_a_function_of_a_module_is_imported():
    assert named("detectors", TABLE, "their_module:loud")() == "loud"


def test_an_installed_package_adds_a_name(package):
    package(loud="their_module:loud")
    assert named("detectors", TABLE, "loud")() == "loud"
    with pytest.raises(InputError, match="scorer: there is no 'loud'"):
        named("scorers", TABLE, "loud")


def test_a_built_in_name_is_not_replaced(package):
    package(krum="broken_module:krum")
    assert named("detectors", TABLE, "krum") is max
    assert "broken_module" not in sys.modules


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("broken_module:loud", "detector: 'loud' of unknown package cannot be imported: out of order"),
        ("mute_module:loud", "detector: 'loud' of unknown package cannot be imported: RuntimeError"),
        ("no_such_module:loud", "detector: 'loud' of unknown package cannot be imported: No module named"),
        ("their_module:quiet", "detector: 'loud' of unknown package cannot be imported: module 'their_module' has no"),
        ("their_module:value", "detector: 'loud' of unknown package is no function: int"),
    ],
)
def test_what_is_wrong_with_an_entry_point_is_one_line(package, value, reason):
    package(loud=value)
    with pytest.raises(InputError) as refused:
        named("detectors", TABLE, "loud")
    assert str(refused.value).startswith(reason)
    assert "\n" not in str(refused.value)


def test_an_unknown_name_gets_the_nearest_built_in_and_installed_ones(package):
    package(flames="their_module:loud")
    with pytest.raises(InputError) as refused:
        named("detectors", TABLE, "flam")
    assert str(refused.value) == (
        "detector: there is no 'flam'; did you mean flame or flames? `gradlens list detectors` shows all"
    )
    with pytest.raises(InputError, match=r"^--detector: there is no 'flam'"):
        named("detectors", TABLE, "flam", "--detector")


@pytest.mark.parametrize("name", ["", "a:b:c", "a.b", ":loud", "their_module:", "1st:loud", "their module:loud"])
def test_what_is_no_name_is_unknown(name):
    with pytest.raises(InputError, match="detector: there is no "):
        named("detectors", TABLE, name)


def test_a_long_name_is_cut():
    with pytest.raises(InputError) as refused:
        named("detectors", TABLE, "x" * 10_000)
    assert len(str(refused.value)) < 200


# available and hint ------------------------------------------------------------------------------------------


def test_every_name_says_where_it_is_from(package):
    package(krum="broken_module:krum", loud="their_module:loud")
    assert available("detectors", TABLE) == {"krum": "built in", "flame": "built in", "loud": "unknown package"}
    assert available("scorers", TABLE) == {"krum": "built in", "flame": "built in"}
    assert not {"broken_module", "their_module"} & set(sys.modules)  # nothing is imported to be listed


def test_an_installed_name_says_which_package_and_version(tmp_path):
    information = tmp_path / "their_package-1.2.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.2\n")
    (information / "entry_points.txt").write_text("[gradlens.detectors]\nloud = their_module:loud\n")
    assert available("detectors", TABLE)["loud"] == "their-package 1.2"
    assert named("detectors", TABLE, "loud")() == "loud"


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("kurm", "", "; did you mean krum?"),
        ("kurm", "detectors", "; did you mean krum? `gradlens list detectors` shows all"),
        ("nothing like it", "", ""),
        ("nothing like it", "detectors", "; `gradlens list detectors` shows all"),
    ],
)
def test_a_hint(name, kind, expected):
    assert hint(name, TABLE, kind) == expected


def test_a_hint_names_three_at_most_and_the_same_ones_in_any_order():
    known = ["krum1", "krum2", "krum3", "krum4"]
    assert hint("krum", known) == hint("krum", reversed(known))
    assert hint("krum", known).count(" or ") == 2


# imported ----------------------------------------------------------------------------------------------------


def test_a_function_is_imported():
    assert imported("detector", "their_module:loud")() == "loud"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("loud", "detector: expected module:function, found 'loud'"),
        ("broken_module:loud", "detector: cannot import 'broken_module:loud': out of order and more"),
        ("mute_module:loud", "detector: cannot import 'mute_module:loud': RuntimeError"),
        ("no_such_module:loud", "detector: cannot import 'no_such_module:loud': No module named 'no_such_module'"),
        (
            "their_module:quiet",
            "detector: cannot import 'their_module:quiet': module 'their_module' has no attribute 'quiet'",
        ),
        ("their_module:value", "detector: expected a function, 'their_module:value' is of type int"),
    ],
)
def test_what_cannot_be_imported_is_one_line(name, reason):
    with pytest.raises(InputError) as refused:
        imported("detector", name)
    assert str(refused.value) == reason


# nothing_imported --------------------------------------------------------------------------------------------


def test_within_it_a_function_is_refused_and_its_module_not_imported():
    with nothing_imported(), pytest.raises(InputError) as refused:
        named("detectors", TABLE, "their_module:loud")
    assert str(refused.value) == (
        "detector: the run names code of its own, 'their_module:loud', which is not imported unless you trust it"
        " (--trust-code)"
    )
    assert "their_module" not in sys.modules
    assert named("detectors", TABLE, "their_module:loud")() == "loud"  # after it


def test_within_it_a_module_that_is_imported_already_is_refused_as_well():
    imported("detector", "their_module:loud")
    with nothing_imported(), pytest.raises(InputError, match="trust-code"):
        imported("detector", "their_module:loud")


def test_within_it_built_in_and_installed_names_stand(package):
    package(loud="their_module:loud")
    with nothing_imported():
        assert named("detectors", TABLE, "krum") is max
        assert named("detectors", TABLE, "loud")() == "loud"


def test_what_is_trusted_is_imported():
    with nothing_imported(refuse=False):
        assert imported("detector", "their_module:loud")() == "loud"


def test_trust_within_distrust_is_refused():
    with nothing_imported(), nothing_imported(refuse=False), pytest.raises(InputError, match="trust-code"):
        imported("detector", "their_module:loud")


def test_an_error_within_it_ends_it():
    with pytest.raises(ZeroDivisionError), nothing_imported():
        raise ZeroDivisionError
    assert imported("detector", "their_module:loud")() == "loud"
