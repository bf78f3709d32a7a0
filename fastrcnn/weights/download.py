"""Files of weights from the network, fetched once."""

import contextlib
import hashlib
import os
import re
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from urllib.parse import quote, urlsplit

from tqdm import tqdm

from fastrcnn.weights.catalog import resolve
from fastrcnn.weights.errors import WeightError

try:
    import fcntl
except ImportError:  # Windows, where processes that start together may each download; the last one's file stays
    fcntl = None

TIMEOUT = 30  # seconds without an answer
# torch.hub's rule: the file name ends with the beginning of its SHA-256; digits alone are rather a date
_HASH_IN_NAME = re.compile(r"-(?=[0-9]*[a-f])([0-9a-f]{8,64})\.\w+$")


def cache_folder() -> Path:
    """Where downloaded weights are kept: the folder that FASTRCNN_CACHE names, or ~/.cache/fastrcnn."""
    return Path(os.environ.get("FASTRCNN_CACHE") or Path.home() / ".cache" / "fastrcnn")


def fetch(source: str | Path) -> Path:
    """The local file of a path, a file: or http(s) address, or a name of the catalog (see `catalog.resolve`).

    A download is kept under `cache_folder()`, by host and path; it takes its name only when it is complete, and of
    several processes one downloads while the others wait. The file must have the checksum that the address ends with
    as "#sha256=…", or else the one in its name. FileNotFoundError, or WeightError saying what can be done.
    """
    if Path(source).is_file():
        return Path(source)
    if isinstance(source, Path) or not re.match(r"[a-z][a-z0-9]+:", source):  # one letter is a drive of Windows
        raise FileNotFoundError(f"no weights at {source}")
    address, _, wanted = source.partition("#sha256=")
    url = resolve(address)
    parts = urlsplit(url)
    if parts.scheme == "file":
        path = Path(urllib.request.url2pathname(parts.path))
        if not path.is_file():
            raise FileNotFoundError(f"no weights at {path}, which {source} names")
    elif parts.scheme in ("http", "https"):
        wanted = wanted or "".join(_HASH_IN_NAME.findall(parts.path))
        folders = [quote(part, safe="%+=@,") for part in (parts.netloc, *parts.path.split("/")) if part.strip(".")]
        path = cache_folder().joinpath(*folders)
        if parts.query:
            path = path.with_name(f"{hashlib.sha256(parts.query.encode()).hexdigest()[:8]}-{path.name}")
        if not path.is_file():
            with _alone(path):
                if not path.is_file():  # another process may have been first
                    _download(url, path, wanted)
                    return path
    else:
        known = "http://, https://, file:, catalog://, torchvision:// or detectron2://"
        raise WeightError(f"{source}: an address of weights begins with {known}")
    _verify(path, wanted, f"{path} is not the file that {source} names", "delete it, so that it is fetched again")
    return path


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Holds the lock of a file, against other processes too; it goes when its process ends, however that ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f"{path.name}.lock"), "w") as lock:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _download(url: str, path: Path, wanted: str) -> None:
    advice = f"or download the file on another machine and name its path, or put it at {path}"
    request = urllib.request.Request(url, headers={"User-Agent": "fastrcnn"})
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file, urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            size = int(answer.headers.get("Content-Length") or 0)
            # disable=None: only on a terminal
            with tqdm.wrapattr(answer, "read", total=size or None, desc=path.name, disable=None) as body:
                shutil.copyfileobj(body, file, 1 << 20)
            if size and file.tell() != size:
                raise WeightError(f"{url}: broke off after {file.tell()} of {size} bytes; try again, {advice}")
        _verify(part, wanted, f"{url}: what came was discarded", f"try again, {advice}")
        os.replace(part, path)
    except urllib.error.HTTPError as error:
        reason = f"the server answers {error.code} {error.reason}"
        raise WeightError(f"{url}: {reason}; check the address, {advice}") from error
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise WeightError(f"{url} cannot be fetched: {reason}; check the network, {advice}") from error
    finally:
        part.unlink(missing_ok=True)


def _verify(path: Path, wanted: str, trouble: str, advice: str) -> None:
    if not wanted:
        return
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not found.startswith(wanted.lower()):
        raise WeightError(f"{trouble}: its SHA-256 is {found}, wanted {wanted}; {advice}")
