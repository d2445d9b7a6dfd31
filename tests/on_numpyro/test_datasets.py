import gzip
import shutil
import struct

import numpy as np
import pytest

from numpyro_helmholtz import datasets


def idx(images, magic=0x0803):
    return struct.pack(">4I", magic, *images.shape) + images.astype(np.uint8).tobytes()


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    return {part: rng.integers(0, 256, (n, 4, 3)) for part, n in (("train", 7), ("t10k", 5))}


@pytest.fixture
def folder(tmp_path, images):
    """The training images packed, the test images plain."""
    packed = gzip.compress(idx(images["train"]))
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(packed)
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx(images["t10k"]))
    return tmp_path


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """A working directory, a Debian folder and a cache with nothing in them."""
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    monkeypatch.delenv("HELMHOLTZ_DATA", raising=False)
    monkeypatch.setattr(datasets, "_DEBIAN", empty / "debian")
    return empty


def test_digits_are_binary_split_and_reproducible():
    data = datasets.load("digits")
    assert data.train.shape == (1500, 64) and data.test.shape == (297, 64)
    assert data.shape == (8, 8) and data.name == "digits"
    assert data.train.dtype == np.float32
    assert set(np.unique(data.train)) == {0.0, 1.0}
    np.testing.assert_array_equal(data.train, datasets.load("digits").train)
    assert not np.array_equal(data.train, datasets.load("digits", seed=1).train)


def test_the_split_of_the_digits_does_not_depend_on_the_seed():
    one, two = (datasets.load("digits", binarize=None, seed=seed) for seed in (0, 1))
    assert np.array_equal(one.test, two.test)


def test_sampled_pixels_have_the_grey_value_as_their_mean():
    grey = datasets.load("digits", binarize=None).train
    draws = np.stack([datasets.load("digits", seed=seed).train for seed in range(20)])
    error = (draws.mean(0) - grey).mean(0)
    spread = np.sqrt((grey * (1 - grey)).mean(0) / (20 * len(grey)))
    assert (np.abs(error) <= 5 * spread).all()
    assert (draws[:, grey == 0] == 0).all() and (draws[:, grey == 1] == 1).all()


def test_threshold():
    grey = datasets.load("digits", binarize=None).train
    assert np.array_equal(datasets.load("digits", binarize="threshold").train, (grey >= 0.5))


def test_folder_of_idx_files_packed_and_plain(folder, images):
    data = datasets.load(folder, binarize=None)
    assert data.shape == (4, 3)
    np.testing.assert_allclose(data.train * 255, images["train"].reshape(7, 12), atol=1e-4)
    np.testing.assert_allclose(data.test * 255, images["t10k"].reshape(5, 12), atol=1e-4)


def test_names_with_a_dot(folder):
    (folder / "t10k-images-idx3-ubyte").rename(folder / "t10k-images.idx3-ubyte")
    assert len(datasets.load(folder).test) == 5


@pytest.mark.parametrize("name", ["mnist", "fashion"])
@pytest.mark.parametrize("place", ["argument", "environment", "data", "debian"])
def test_search_order(name, place, folder, nowhere, monkeypatch):
    argument = None
    if place == "argument":
        argument = folder
    else:
        target = {
            "environment": nowhere / "set" / name,
            "data": nowhere / "data" / name,
            "debian": nowhere / "debian" / {"mnist": "mnist", "fashion": "fashion-mnist"}[name],
        }[place]
        target.mkdir(parents=True)
        for file in folder.glob("*-images-*"):
            shutil.copy(file, target)
    if place == "environment":
        monkeypatch.setenv("HELMHOLTZ_DATA", str(nowhere / "set"))
    data = datasets.load(name, folder=argument)
    assert len(data.train) == 7 and data.name == name


def fake_download(monkeypatch, tmp_path, reply):
    """Let pooch fetch from a dictionary instead of the network."""
    pooch = pytest.importorskip("pooch")
    asked = []

    def downloader(url, output_file, _pooch):
        asked.append(url)
        with open(output_file, "wb") as file:
            file.write(reply(url))

    monkeypatch.setattr(pooch.core, "choose_downloader", lambda *_, **__: downloader)
    monkeypatch.setattr(pooch, "os_cache", lambda project: tmp_path / "cache" / project)
    return asked


def test_download_with_checksum(nowhere, images, tmp_path, monkeypatch):
    import hashlib

    packed = {part: gzip.compress(idx(images[part])) for part in images}
    for part, content in packed.items():
        digest = "md5:" + hashlib.md5(content).hexdigest()
        monkeypatch.setitem(datasets._HASHES, ("mnist", part), digest)
    asked = fake_download(
        monkeypatch, tmp_path, lambda url: packed["train" if "train" in url else "t10k"]
    )
    data = datasets.load("mnist", binarize=None)
    np.testing.assert_allclose(data.test * 255, images["t10k"].reshape(5, 12), atol=1e-4)
    datasets.load("mnist")
    assert len(asked) == 2, "the second time the files are in the cache"


def test_download_with_a_wrong_checksum(nowhere, tmp_path, monkeypatch):
    fake_download(monkeypatch, tmp_path, lambda url: b"something else")
    with pytest.raises(ValueError, match="hash.*train-images-idx3-ubyte"):
        datasets.load("mnist")


def test_download_without_network(nowhere, tmp_path, monkeypatch):
    def no_network(url):
        raise OSError("no network")

    fake_download(monkeypatch, tmp_path, no_network)
    with pytest.raises(FileNotFoundError, match="data/mnist.*no network"):
        datasets.load("mnist")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\0\0\x08", "3 bytes are too few"),
        (idx(np.ones((2, 4, 3)), magic=0x0801), "starts with 0x00000801"),
        (idx(np.ones((2, 4, 3)))[:-1], r"truncated.*\(2, 4, 3\).*24 bytes.*23 follow"),
        (idx(np.ones((2, 4, 3))) + b"\0", "too long.*25 follow"),
        (idx(np.ones((0, 4, 3))), "without pixels"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_broken_file_is_named(tmp_path, content, message, packed):
    path = tmp_path / ("broken.gz" if packed else "broken")
    path.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(ValueError, match=message) as error:
        datasets.read_idx(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("cut", [slice(None, -9), slice(None, 12), slice(3, None)])
def test_broken_gzip_is_named(tmp_path, cut):
    path = tmp_path / "broken.gz"
    path.write_bytes(gzip.compress(idx(np.ones((2, 4, 3))))[cut])
    with pytest.raises(ValueError, match="broken.gz: not a whole gzip file"):
        datasets.read_idx(path)


def test_missing_folder_missing_file_and_unequal_shapes(folder, images):
    with pytest.raises(FileNotFoundError, match="known sets: digits, mnist, fashion"):
        datasets.load("mnits")
    (folder / "t10k-images-idx3-ubyte").write_bytes(idx(images["t10k"][:, :2]))
    with pytest.raises(ValueError, match=r"\(4, 3\).*\(2, 3\)"):
        datasets.load(folder)
    (folder / "t10k-images-idx3-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match="t10k-images-idx3-ubyte.gz"):
        datasets.load(folder)


def test_unknown_options():
    with pytest.raises(ValueError, match="binarize"):
        datasets.load("digits", binarize="median")
    with pytest.raises(ValueError, match="folder="):
        datasets.load("digits", folder="somewhere")
