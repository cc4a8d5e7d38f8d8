"""Tasks and models: the right pictures in the right range, only those asked for, and nothing said meanwhile."""

import io
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from gradlens.log import InputError
from simulations import tasks
from simulations.tasks import MODELS, build_model, load_task


@pytest.fixture(scope="module")
def digits():
    return load_task("digits")


@pytest.fixture
def folder(tmp_path):
    """A folder in Hugging Face layout: 30 train and 12 test pictures of 5 x 4 grey pixels, of 3 classes."""
    import datasets

    rng = np.random.default_rng(0)
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog", "owl"])})
    datasets.disable_progress_bars()
    for split, size in (("train", 30), ("test", 12)):
        pixels = rng.integers(256, size=(size, 5, 4), dtype=np.uint8)
        pixels[:, 0, 0] = np.arange(size)  # which picture it is
        rows = {"img": [Image.fromarray(p) for p in pixels], "label": [i % 3 for i in range(size)]}
        table = datasets.Dataset.from_dict(rows, features=features)
        (tmp_path / "animals").mkdir(exist_ok=True)
        table.to_parquet(str(tmp_path / "animals" / f"{split}-00000-of-00001.parquet"))
    datasets.enable_progress_bars()
    return tmp_path / "animals"


def test_digits_are_those_of_scikit_learn(digits):
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    assert digits.x_train.shape == (1_437, 1, 8, 8)
    assert digits.x_test.shape == (360, 1, 8, 8)
    assert digits.x_train.dtype == np.float32
    assert digits.y_train.dtype == np.int64
    assert (digits.x_train.min(), digits.x_train.max()) == (0, 1)
    assert digits.num_classes == 10
    assert digits.image_shape == (1, 8, 8)
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
    assert task.image_shape == (1, 5, 4)
    assert task.label_names == ("cat", "dog", "owl")
    np.testing.assert_array_equal(np.rint(task.x_train[:, 0, 0, 0] * 255), np.arange(30))
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
    np.testing.assert_array_equal(task.y_train, np.rint(task.x_train[:, 0, 0, 0] * 255).astype(int) % 3)


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
    assert task.image_shape == (1, 28, 28)
    assert task.num_classes == 10
    table = pq.read_table(data_root / name / "test-00000-of-00001.parquet")
    np.testing.assert_array_equal(task.y_test, table["label"].to_numpy())
    for row in (0, 17, 9_999):
        picture = Image.open(io.BytesIO(table["image"][row].as_py()["bytes"]))
        np.testing.assert_array_equal(np.rint(task.x_test[row, 0] * 255), np.asarray(picture))


def test_colour_and_another_label_column(data_root):
    assert load_task(str(data_root / "cifar10"), 5).image_shape == (3, 32, 32)
    assert load_task(str(data_root / "femnist")).y_train.max() == 9


def test_an_unknown_task_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as refused:
        load_task("digitz")
    assert "expected digits, a folder" in str(refused.value)
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
    tasks._splits.cache_clear()
    with pytest.raises(InputError, match="pip install 'gradlens-forensics\\[data\\]'"):
        load_task(str(folder), 11)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_its_seeds_and_draws_from_nothing(digits, name):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = build_model(digits, name, 3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    second, other = build_model(digits, name, 3), build_model(digits, name, 4)
    for (layer, one), two, three in zip(first.named_parameters(), second.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two), layer
        assert not torch.equal(one, three), layer


def test_models_have_the_layers_and_sizes_they_promise(digits):
    def sizes(task, name):
        model = build_model(task, name)
        return sum(p.numel() for p in model.parameters()), [layer for layer, _ in model.named_children()]

    assert sizes(digits, "mlp") == (64 * 32 + 32 + 32 * 10 + 10, ["fc1", "fc2"])
    blank = np.zeros((1, 1, 28, 28), np.float32)
    grey = tasks.Task("blank", blank, np.zeros(1, np.int64), blank, np.zeros(1, np.int64), tuple("0123456789"))
    assert sizes(grey, "cnn") == (56_970, ["conv1", "conv2", "fc1", "fc2"])
    assert build_model(digits, "cnn")(torch.tensor(digits.x_test[:2])).shape == (2, 10)


def test_an_unknown_model_is_one_line(digits):
    with pytest.raises(InputError, match="expected one of mlp, cnn, found 'vgg'"):
        build_model(digits, "vgg")
