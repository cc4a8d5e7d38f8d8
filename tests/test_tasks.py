"""Tasks: the right pictures in the right range, only those asked for, whose they are, and nothing said meanwhile."""

import io
import json
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from gradlens.errors import InputError
from simulations.tasks import TASKS, Task, build_model, cross_entropy, images, load_task


@pytest.fixture(scope="module")
def digits():
    return load_task("digits")


@pytest.fixture
def folder(tmp_path):
    """A folder in Hugging Face layout: 30 train and 12 test pictures of 5 x 4 grey pixels, of 3 classes."""
    return write_folder(tmp_path / "animals")


def write_folder(folder, **columns):
    """Pictures whose first pixel is their number; further columns: name -> (split size -> values)."""
    import datasets

    rng = np.random.default_rng(0)
    kinds = {name: datasets.ClassLabel(num_classes=4) if name == "writer_id" else datasets.Value("string")
             for name in columns}  # fmt: skip
    features = datasets.Features(
        {**kinds, "img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog", "owl"])}
    )
    datasets.disable_progress_bars()
    for split, size in (("train", 30), ("test", 12)):
        pixels = rng.integers(256, size=(size, 5, 4), dtype=np.uint8)
        pixels[:, 0, 0] = np.arange(size)  # which picture it is
        rows = {"img": [Image.fromarray(p) for p in pixels], "label": [i % 3 for i in range(size)]}
        rows |= {name: values(size) for name, values in columns.items()}
        table = datasets.Dataset.from_dict(rows, features=features)
        folder.mkdir(exist_ok=True)
        table.to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))
    datasets.enable_progress_bars()
    return folder


def numbers(x: np.ndarray) -> np.ndarray:
    """Which pictures of a folder these are."""
    return np.rint(x[:, 0, 0, 0] * 255).astype(int)


def test_digits_are_those_of_scikit_learn(digits):
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    assert digits.x_train.shape == (1_437, 1, 8, 8)
    assert digits.x_test.shape == (360, 1, 8, 8)
    assert digits.x_train.dtype == np.float32
    assert digits.y_train.dtype == np.int64
    assert (digits.x_train.min(), digits.x_train.max()) == (0, 1)
    assert digits.num_classes == 10
    assert digits.input_shape == (1, 8, 8)
    found = np.concatenate([digits.x_train, digits.x_test]).reshape(1_797, 64) * 16
    both = np.column_stack([found, np.concatenate([digits.y_train, digits.y_test])])
    np.testing.assert_array_equal(np.unique(both, axis=0), np.unique(np.column_stack([images, labels]), axis=0))


def test_the_test_digits_are_stratified(digits):
    train, test = np.bincount(digits.y_train), np.bincount(digits.y_test)
    np.testing.assert_allclose(test / (train + test), 0.2, atol=0.005)


def test_a_task_is_remembered_and_cannot_be_changed(digits):
    assert load_task("digits") is digits
    for array in (digits.x_train, digits.y_train, digits.x_test, digits.y_test):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def test_samples_are_drawn_without_repetition_by_seed(digits):
    rows = {image.tobytes() for image in digits.x_train}
    some, other = load_task("digits", 200, 0), load_task("digits", 200, 1)
    drawn = [image.tobytes() for image in some.x_train]
    assert set(drawn) <= rows
    assert len(set(drawn)) >= 199  # two digits of the set might be equal
    assert (some.x_train != other.x_train).any()
    np.testing.assert_array_equal(some.x_test, digits.x_test)
    with pytest.raises(InputError, match="has 1,437 training samples, 1,438 are asked for"):
        load_task("digits", 1_438)


def test_a_folder_is_loaded_as_it_is(folder, capfd):
    task = load_task(str(folder))
    said = capfd.readouterr()
    assert said.out + said.err == ""
    assert task.input_shape == (1, 5, 4)
    assert task.label_names == ("cat", "dog", "owl")
    np.testing.assert_array_equal(numbers(task.x_train), np.arange(30))
    np.testing.assert_array_equal(task.y_train, np.arange(30) % 3)
    np.testing.assert_array_equal(task.y_test, np.arange(12) % 3)
    assert build_model(task, "mlp")(torch.tensor(task.x_test)).shape == (12, 3)


def test_only_the_pictures_asked_for_are_decoded(folder, monkeypatch):
    decoded = []
    opened = Image.open
    monkeypatch.setattr(Image, "open", lambda file: decoded.append(file) or opened(file))
    task = load_task(str(folder), 7)
    assert len(decoded) == 7 + 12
    assert len(np.unique(task.x_train[:, 0, 0, 0])) == 7
    load_task(str(folder), 7)
    assert len(decoded) == 7 + 12
    np.testing.assert_array_equal(task.y_train, numbers(task.x_train) % 3)


def test_a_name_is_looked_for_below_the_data_folder(folder, monkeypatch):
    monkeypatch.setenv("GRADLENS_DATA", str(folder.parent))
    np.testing.assert_array_equal(load_task("animals").x_test, load_task(str(folder)).x_test)


def test_the_data_library_is_as_loud_as_before(folder):
    import datasets

    datasets.enable_progress_bars()
    before = datasets.utils.logging.get_verbosity()
    load_task(str(folder), 3)
    assert not datasets.are_progress_bars_disabled()
    assert datasets.utils.logging.get_verbosity() == before


@pytest.mark.parametrize("name", ["fashion_mnist", "mnist"])
def test_real_pictures_are_the_bytes_of_the_file(data_root, name):
    task = load_task(str(data_root / name), 50)
    assert task.input_shape == (1, 28, 28)
    assert task.num_classes == 10
    table = pq.read_table(data_root / name / "test-00000-of-00001.parquet")
    np.testing.assert_array_equal(task.y_test, table["label"].to_numpy())
    for row in (0, 17, 9_999):
        picture = Image.open(io.BytesIO(table["image"][row].as_py()["bytes"]))
        np.testing.assert_array_equal(np.rint(task.x_test[row, 0] * 255), np.asarray(picture))


def test_colour_and_another_label_column(data_root):
    assert load_task(str(data_root / "cifar10"), 5).input_shape == (3, 32, 32)
    assert load_task(str(data_root / "femnist")).y_train.max() == 9


def test_an_unknown_task_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as refused:
        load_task("digitz")
    assert f"expected {', '.join(TASKS)}, a folder" in str(refused.value)
    assert "found 'digitz'" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_folder_of_something_else_is_one_line(tmp_path):
    (tmp_path / "train.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError) as refused:
        load_task(str(tmp_path))
    assert str(tmp_path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_missing_extra_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    images._splits.cache_clear()
    with pytest.raises(InputError, match="pip install 'gradlens-forensics\\[data\\]'"):
        load_task(str(folder), 11)


# whose samples they are ---------------------------------------------------------------------------------------


def test_owners_are_read_and_stay_with_their_samples(tmp_path):
    folder = write_folder(tmp_path / "people", user_id=lambda size: [f"user {i % 7}" for i in range(size)])
    for task in (load_task(str(folder)), load_task(str(folder), 11, 1)):
        assert task.owners_train.tolist() == [f"user {i % 7}" for i in numbers(task.x_train)]
        assert task.owners_test.tolist() == [f"user {i % 7}" for i in range(12)]
        with pytest.raises(ValueError, match="read-only"):
            task.owners_train[0] = "me"


def test_a_writer_of_class_labels_is_no_label(tmp_path):
    folder = write_folder(tmp_path / "people", writer_id=lambda size: [i % 4 for i in range(size)])
    task = load_task(str(folder))
    assert task.label_names == ("cat", "dog", "owl")
    assert task.owners_train.tolist() == [str(i % 4) for i in range(30)]


def test_without_such_a_column_nobody_owns(folder, digits):
    assert load_task(str(folder)).owners_train is None
    assert digits.owners_train is None


def test_the_writers_of_femnist(data_root):
    task = load_task(str(data_root / "femnist"))
    assert set(task.owners_train) == set(task.owners_test) == {f"client_{i}" for i in range(12)}
    assert len(task.owners_train) == len(task.y_train) == 4_799
    both = np.concatenate([task.owners_train, task.owners_test])
    assert (both == "client_11").sum() == 459  # as the folder's description counts


# samples kept out ---------------------------------------------------------------------------------------------


def test_semantic_backdoors_are_extras_and_never_trained_on(folder):
    (folder / "semantic_backdoors.json").write_text(json.dumps({"stripes": [7, 3], "wall": [3, 29, 0]}))
    task = load_task(str(folder))
    assert {name: numbers(x).tolist() for name, x in task.extras.items()} == {"stripes": [7, 3], "wall": [3, 29, 0]}
    assert numbers(task.x_train).tolist() == [i for i in range(30) if i not in (0, 3, 7, 29)]
    np.testing.assert_array_equal(task.y_train, numbers(task.x_train) % 3)
    some = load_task(str(folder), 26, 1)
    assert sorted(numbers(some.x_train)) == numbers(task.x_train).tolist()
    with pytest.raises(ValueError, match="read-only"):
        task.extras["wall"][0] = 0
    with pytest.raises(InputError, match="has 26 training samples, 27 are asked for"):
        load_task(str(folder), 27)


@pytest.mark.parametrize("text", ["[1, 2]", "{", '{"wall": [30]}', '{"wall": [-1]}', '{"wall": [0.5]}', '{"wall": []}'])
def test_a_wrong_list_of_backdoors_is_one_line(folder, text):
    (folder / "semantic_backdoors.json").write_text(text)
    with pytest.raises(InputError, match=r"semantic_backdoors\.json: .*expected a") as refused:
        load_task(str(folder))
    assert "\n" not in str(refused.value)


def test_the_semantic_backdoors_of_cifar10(data_root):
    task = load_task(str(data_root / "cifar10"), 40)
    rows = json.loads((data_root / "cifar10" / "semantic_backdoors.json").read_text())
    assert {name: x.shape for name, x in task.extras.items()} == {
        "racing_stripes": (22, 3, 32, 32), "green_cars": (30, 3, 32, 32), "striped_wall": (12, 3, 32, 32)
    }  # fmt: skip
    table = pq.read_table(data_root / "cifar10" / "train-00000-of-00001.parquet")
    for name, position in (("racing_stripes", 0), ("striped_wall", 11)):
        picture = Image.open(io.BytesIO(table["img"][rows[name][position]].as_py()["bytes"]))
        found = np.rint(task.extras[name][position] * 255).transpose(1, 2, 0)
        np.testing.assert_array_equal(found, np.asarray(picture))
    with pytest.raises(InputError, match="has 49,936 training samples"):
        load_task(str(data_root / "cifar10"), 50_000)


# a task of one's own ------------------------------------------------------------------------------------------

OWN = """
import numpy as np
from simulations.tasks import Task

def stripes(samples, seed):
    size = 8 if samples is None else samples
    x = np.random.default_rng(seed).random((size, 1, 3, 3)).astype(np.float32)
    y = np.arange(size) % 2
    return Task("stripes", x, y, x[:2], y[:2], ("no", "yes"))

def stubborn(samples, seed):
    return stripes(None, seed)

def wrong(samples, seed):
    return "no task"

def doubles(samples, seed):
    task = stripes(samples, seed)
    return Task("doubles", task.x_train.astype(float), task.y_train, task.x_test, task.y_test, task.label_names)

def unnamed(samples, seed):
    task = stripes(samples, seed)
    return Task("unnamed", task.x_train, task.y_train, task.x_test, task.y_test, ("no",))

def short(samples, seed):
    task = stripes(samples, seed)
    return Task("short", task.x_train, task.y_train[1:], task.x_test, task.y_test, task.label_names)

def broken(samples, seed):
    task = stripes(samples, seed)
    return Task("broken", task.x_train * np.float32("nan"), task.y_train, task.x_test, task.y_test, task.label_names)

def uneven(samples, seed):
    task = stripes(samples, seed)
    return Task("uneven", task.x_train, task.y_train, task.x_test[:, :, 1:], task.y_test, task.label_names)

number = 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module `own_tasks` that can be imported."""
    (tmp_path / "own_tasks.py").write_text(OWN)
    (tmp_path / "own_fault.py").write_text("raise RuntimeError('first line\\nsecond line')")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in ("own_tasks", "own_fault"):
        sys.modules.pop(name, None)


def test_a_task_of_ones_own_is_called_with_samples_and_seed(own):
    task = load_task("own_tasks:stripes", 5, 3)
    assert isinstance(task, Task)
    assert task.name == "stripes"
    np.testing.assert_array_equal(task.x_train, np.random.default_rng(3).random((5, 1, 3, 3)).astype(np.float32))
    assert load_task("own_tasks:stripes", 5, 3) is task
    with pytest.raises(ValueError, match="read-only"):
        task.x_train[0] = 0
    assert build_model(task, "mlp")(torch.tensor(task.x_test)).shape == (2, 2)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("no_such_module:stripes", ": cannot import 'no_such_module:stripes': No module named 'no_such_module'"),
        ("own_fault:stripes", ": cannot import 'own_fault:stripes': first line second line"),
        ("own_tasks:plaid", ": cannot import 'own_tasks:plaid': module 'own_tasks' has no attribute 'plaid'"),
        ("own_tasks:number", ": expected a function, 'own_tasks:number' is of type int"),
        ("own_tasks:wrong", "expected a Task, the function returned a str"),
        ("own_tasks:stubborn", "expected 5 training samples, found 8"),
        ("own_tasks:doubles", "x_train: expected float32, or int64 tokens, found float64"),
        ("own_tasks:unnamed", "y_train: expected 0 to 0, found 0 to 1"),
        ("own_tasks:short", "train: expected as many samples as labels and owners, at least one, found 5 and 4"),
        ("own_tasks:broken", "x_train: expected finite numbers only"),
        ("own_tasks:uneven", "expected samples of one kind, train has (1, 3, 3), test (1, 2, 3)"),
    ],
)
def test_what_is_no_task_is_one_line(own, name, says):
    with pytest.raises(InputError) as refused:
        load_task(name, 5)
    assert str(refused.value) == (f"task{says}" if says.startswith(":") else f"task {name}: {says}")


def test_a_task_says_what_it_is_made_of(digits):
    assert digits.input_shape == (1, 8, 8)
    assert not digits.is_text
    assert dict(digits.extras) == {}
    assert digits.encode is digits.model is digits.final_layer is digits.num_tokens is None
    assert digits.loss is cross_entropy


def test_the_loss_is_the_cross_entropy_of_each_sample(rng):
    outputs, labels = rng.normal(size=(5, 4)), np.array([0, 3, 1, 1, 2])
    expected = np.log(np.exp(outputs).sum(axis=1)) - outputs[np.arange(5), labels]
    np.testing.assert_allclose(cross_entropy(torch.tensor(outputs), torch.tensor(labels)), expected, rtol=1e-12)
