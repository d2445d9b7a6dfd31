"""From files to arrays: small sets of binary images.

``load`` gives scikit-learn's embedded digits, MNIST, Fashion-MNIST, or any folder with
the same two IDX files. Grey values are numbers in [0, 1]. They are made binary once, with
a fixed seed, and not anew at each visit. Another seed is another data set: log-likelihoods
of MNIST agree between two such draws only to a few tenths of a nat.

References:
    The IDX format: LeCun, Cortes and Burges, "The MNIST database of handwritten digits".
    Sampling the pixels: Salakhutdinov and Murray, "On the quantitative analysis of deep
    belief networks", ICML 2008.
"""

from __future__ import annotations

import gzip
import math
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

import numpy as np

__all__ = ["Dataset", "load", "read_idx"]

Binarize = Literal["sample", "threshold"]

# The two files of images; `{}` is "train" or "t10k". Some tools unpack them with a dot.
_FILES = tuple(
    stem + ending
    for ending in ("", ".gz")
    for stem in ("{}-images-idx3-ubyte", "{}-images.idx3-ubyte")
)
_DEBIAN = Path("/usr/share/datasets")
_DEBIAN_NAMES = {"mnist": "mnist", "fashion": "fashion-mnist"}
_URLS = {
    "mnist": "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "fashion": "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
}
# MD5 of the packed files, as their authors publish them.
_HASHES = {
    ("mnist", "train"): "md5:f68b3c2dcbeaaa9fbdd348bbdeb94873",
    ("mnist", "t10k"): "md5:9fb629c4189551a2d022fa330f9573f3",
    ("fashion", "train"): "md5:8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    ("fashion", "t10k"): "md5:bef4ecab320f06d8554ea6380940ec79",
}
_DIGITS_TRAIN = 1500
_DIGITS_SPLIT_SEED = 0


@dataclass(frozen=True)
class Dataset:
    """Images as rows of pixels.

    Attributes:
        train: float32 array of shape (images, pixels).
        test: float32 array of shape (images, pixels).
        shape: height and width of an image; their product is the number of pixels.
        name: what was asked for.
    """

    train: np.ndarray
    test: np.ndarray
    shape: tuple[int, int]
    name: str


def load(
    name_or_folder: str | os.PathLike[str] = "digits",
    *,
    binarize: Binarize | None = "sample",
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
) -> Dataset:
    """Load a set of images.

    MNIST and Fashion-MNIST are looked for in this order: ``folder``; the folder
    ``$HELMHOLTZ_DATA/<name>``; ``./data/<name>``; Debian's ``/usr/share/datasets``; else they
    are downloaded, checked against their published checksum and kept in the user's cache.

    Args:
        name_or_folder: ``"digits"``, ``"mnist"``, ``"fashion"``, or a folder that holds
            ``train-images-idx3-ubyte`` and ``t10k-images-idx3-ubyte``, plain or ``.gz``.
        binarize: ``"sample"`` draws each pixel once from a Bernoulli with the grey value as
            its mean; ``"threshold"`` gives 1 from one half on; ``None`` keeps the grey values.
        seed: Seed of that draw. The split of the digits does not depend on it.
        folder: Where the files of ``"mnist"`` or ``"fashion"`` are.

    Returns:
        The training and the test images.

    Raises:
        FileNotFoundError: If a folder or a file is missing.
        ValueError: If a file is not a whole IDX file, or an option is unknown.
    """
    name = os.fspath(name_or_folder)
    if binarize not in ("sample", "threshold", None):
        raise ValueError(f'binarize must be "sample", "threshold" or None, got {binarize!r}.')
    if folder is not None and name not in _URLS:
        raise ValueError(f'folder= goes with "mnist" or "fashion" only, got {name!r} with it.')

    if name == "digits":
        train, test = _digits()
    else:
        train, test = (read_idx(_path(name, part, folder)) for part in ("train", "t10k"))
        if train.shape[1:] != test.shape[1:]:
            raise ValueError(
                f"The training images of {name!r} have shape {train.shape[1:]}, "
                f"the test images {test.shape[1:]}; they must be equal."
            )
        train, test = train / np.float32(255), test / np.float32(255)

    rng = np.random.default_rng(seed)
    rows = [_binary(images.reshape(len(images), -1), binarize, rng) for images in (train, test)]
    shape = (int(train.shape[1]), int(train.shape[2]))
    return Dataset(rows[0], rows[1], shape, name)


def read_idx(path: str | os.PathLike[str]) -> np.ndarray:
    """Read an IDX file of images, plain or ``.gz``.

    Args:
        path: The file.

    Returns:
        Bytes of shape (images, height, width).

    Raises:
        ValueError: If the file is not an IDX file of images, is empty, or is cut short. The
            message names the file.
    """
    path = Path(path)
    content = _unpacked(path)
    if len(content) < 16:
        raise ValueError(f"{path}: {len(content)} bytes are too few for the header of an IDX file.")
    magic, *shape = struct.unpack(">4I", content[:16])
    if magic != 0x0803:
        raise ValueError(
            f"{path}: not an IDX file of images: it starts with 0x{magic:08x}, "
            "expected 0x00000803 (unsigned bytes, three dimensions)."
        )
    if 0 in shape:
        raise ValueError(f"{path}: an IDX file without pixels, of shape {tuple(shape)}.")
    found, expected = len(content) - 16, math.prod(shape)
    if found != expected:
        raise ValueError(
            f"{path}: {'truncated' if found < expected else 'too long'}: its header says shape "
            f"{tuple(shape)}, which is {expected} bytes of pixels, but {found} follow."
        )
    return np.frombuffer(content, np.uint8, offset=16).reshape(shape)


def _unpacked(path: Path) -> bytes:
    packed = path.read_bytes()
    if path.suffix != ".gz":
        return packed
    try:
        return gzip.decompress(packed)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a whole gzip file: {error}") from error


def _digits() -> tuple[np.ndarray, np.ndarray]:
    """The 1,797 digits of scikit-learn, 8x8 with 17 grey values, shuffled and split."""
    from sklearn.datasets import load_digits

    images = load_digits().images.astype(np.float32) / np.float32(16)
    images = images[np.random.default_rng(_DIGITS_SPLIT_SEED).permutation(len(images))]
    return images[:_DIGITS_TRAIN], images[_DIGITS_TRAIN:]


def _binary(grey: np.ndarray, binarize: Binarize | None, rng: np.random.Generator) -> np.ndarray:
    if binarize is None:
        return grey.astype(np.float32)
    if binarize == "threshold":
        return (grey >= 0.5).astype(np.float32)
    return (rng.random(grey.shape, dtype=np.float32) < grey).astype(np.float32)


def _path(name: str, part: str, folder: str | os.PathLike[str] | None) -> Path:
    """The file of one part, ``"train"`` or ``"t10k"``, of a named set or of a folder."""
    given = Path(folder) if folder is not None else Path(name) if name not in _URLS else None
    if given is not None:
        return _in_folder(given, part) or _missing(given, part)
    for candidate in _usual_folders(name):
        found = _in_folder(candidate, part)
        if found is not None:
            return found
    return _download(name, part)


def _usual_folders(name: str) -> Iterator[Path]:
    if os.environ.get("HELMHOLTZ_DATA"):
        yield Path(os.environ["HELMHOLTZ_DATA"]) / name
    yield Path("data") / name
    yield _DEBIAN / _DEBIAN_NAMES[name]


def _in_folder(folder: Path, part: str) -> Path | None:
    candidates = (folder / file.format(part) for file in _FILES)
    return next((path for path in candidates if path.is_file()), None)


def _missing(folder: Path, part: str) -> NoReturn:
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{str(folder)!r} is no folder, and none of the known sets: digits, mnist, fashion."
        )
    names = ", ".join(file.format(part) for file in _FILES)
    raise FileNotFoundError(f"{folder}: found none of {names}.")


def _download(name: str, part: str) -> Path:
    """Fetch one file into the user's cache; a file with another checksum is refused."""
    import pooch

    file = f"{part}-images-idx3-ubyte.gz"
    try:
        path = pooch.retrieve(
            _URLS[name] + file,
            known_hash=_HASHES[name, part],
            fname=file,
            path=pooch.os_cache("helmholtz-ppl") / name,
            progressbar=True,
        )
    except OSError as error:  # requests' errors are OSErrors
        looked = ", ".join(str(folder) for folder in _usual_folders(name))
        raise FileNotFoundError(
            f"{name}: {file} is not in {looked}, and could not be downloaded: {error}. "
            "Put the file into one of these folders, or name its folder."
        ) from error
    return Path(path)
