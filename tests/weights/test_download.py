"""Addresses and names of weights: fetched once, from a server on this machine, and verified; errors say what to do."""

import hashlib
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from torchvision.models import get_model_weights

from fastrcnn.weights import WeightError, download, fetch, read_state
from fastrcnn.weights.catalog import CATALOG, resolve

BODY = bytes(range(256)) * 5000
SHA = hashlib.sha256(BODY).hexdigest()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        if "absent" in self.path:
            return self.send_error(404)
        if "slow" in self.path:
            time.sleep(0.3)
        self.send_response(200)
        self.send_header("Content-Length", len(BODY) + ("torn" in self.path))
        self.end_headers()
        self.wfile.write(BODY)
        return None

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """.url, and .asked: the paths asked for; the cache is tmp_path/cache."""
    monkeypatch.setenv("FASTRCNN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked = []
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def files(folder):
    return [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_a_file_is_fetched_once(server, tmp_path, capfd):
    for _ in range(2):
        path = fetch(f"{server.url}/some/where%3A/model_final.pkl?x=1")
        assert path.read_bytes() == BODY
    assert server.asked == ["/some/where%3A/model_final.pkl?x=1"]
    assert files(tmp_path / "cache") == [path]
    assert fetch(f"{server.url}/else/where/model_final.pkl") != path  # many files have the same name
    assert capfd.readouterr() == ("", "")  # a progress bar only on a terminal


def test_checksums(server):
    good = [f"/{SHA[:8]}.pth", f"/model-{SHA[:8]}.pth", f"/a.pth#sha256={SHA}", "/model-20240101.pth"]
    for name in good:
        for _ in range(2):
            fetch(server.url + name)
    for name in ("/model-0123abcd.pth", f"/b.pth#sha256={'0' * 64}"):
        with pytest.raises(WeightError, match=f"what came was discarded: its SHA-256 is {SHA}, wanted 0"):
            fetch(server.url + name)
    assert len(server.asked) == len(good) + 2
    with pytest.raises(WeightError, match="delete it, so that it is fetched again"):
        fetch(f"{server.url}/a.pth#sha256={'0' * 64}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent.pth", "404 Not Found; check the address, or download"),
        ("torn.pth", "broke off after 1280000 of 1280001"),
    ],
)
def test_failures_leave_nothing_behind(server, tmp_path, name, message):
    with pytest.raises(WeightError, match=message):
        fetch(f"{server.url}/{name}")
    assert not files(tmp_path / "cache")


def test_without_a_network(server, tmp_path):
    server.shutdown()
    server.server_close()
    with pytest.raises(WeightError, match=rf"cannot be fetched: .*; check the network, or .* put it at {tmp_path}"):
        fetch(f"{server.url}/model.pth")


def test_one_of_several_downloads(server, tmp_path):
    """Threads stand for processes: the lock of a file holds between any two openings of it."""
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(fetch, [f"{server.url}/slow.pth"] * 4))
    assert len(paths) == 1
    assert paths.pop().read_bytes() == BODY
    assert server.asked == ["/slow.pth"]


def test_local_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": torch.ones(2)}, tmp_path / "a b.pth")
    for source in ("a b.pth", tmp_path / "a b.pth", f"file://{tmp_path}/a%20b.pth", "file:a%20b.pth"):
        assert torch.equal(read_state(source).state["weight"], torch.ones(2))
    with pytest.raises(WeightError, match="delete it"):
        fetch(f"file:a%20b.pth#sha256={'0' * 64}")
    for absent in ("no.pth", tmp_path / "no.pth", "file:no.pth"):
        with pytest.raises(FileNotFoundError, match=r"no weights at .*no\.pth"):
            fetch(absent)


def test_the_usual_cache(monkeypatch):
    monkeypatch.delenv("FASTRCNN_CACHE", raising=False)
    assert download.cache_folder() == Path(os.path.expanduser("~/.cache/fastrcnn"))


def test_names():
    facebook = "https://dl.fbaipublicfiles.com/"
    assert resolve("catalog://ImageNetPretrained/MSRA/R-50") == f"{facebook}detectron/ImageNetPretrained/MSRA/R-50.pkl"
    assert resolve("catalog://Caffe2Detectron/COCO/37697547/e2e_keypoint_rcnn_R-50-FPN_1x") == (
        f"{facebook}detectron/37697547/12_2017_baselines/e2e_keypoint_rcnn_R-50-FPN_1x.yaml.08_42_54.kdzV35ao/output/train/"
        "keypoints_coco_2014_train%3Akeypoints_coco_2014_valminusminival/generalized_rcnn/model_final.pkl"
    )
    assert resolve("catalog://MaskRCNNBenchmark/e2e_mask_rcnn_X_101_32x8d_FPN_1x") == (
        "https://download.pytorch.org/models/maskrcnn/e2e_mask_rcnn_X_101_32x8d_FPN_1x.pth"
    )
    assert len(CATALOG) == 5 + 10 + 8
    path = "COCO-Detection/faster_rcnn_R_50_FPN_1x/137257794/model_final_b275ba.pkl"
    assert resolve(f"detectron2://{path}") == f"{facebook}detectron2/{path}"
    weights = get_model_weights("resnet50")
    assert resolve("torchvision://resnet50") == weights.DEFAULT.url
    assert resolve("torchvision://resnet50/IMAGENET1K_V1") == weights.IMAGENET1K_V1.url
    detector = get_model_weights("fasterrcnn_resnet50_fpn").COCO_V1.url
    assert resolve("torchvision://fasterrcnn_resnet50_fpn") == detector
    assert download._HASH_IN_NAME.search(detector)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("catalog://MSRA/R-50", r"no such entry; there are catalog://ImageNetPretrained/MSRA/R-50, "),
        ("torchvision://resnet51", r"torchvision has no model 'resnet51'"),
        ("torchvision://resnet50/V3", r"no weights 'V3' of resnet50; there are IMAGENET1K_V1, IMAGENET1K_V2"),
        ("ftp://host/model.pth", r"ftp://host/model\.pth: an address of weights begins with http://"),
    ],
)
def test_names_that_do_not_exist(address, message):
    with pytest.raises(WeightError, match=message):
        fetch(address)
