"""Names of published weights and the addresses that they stand for."""

from torchvision.models import get_model_weights, list_models

from fastrcnn.weights.errors import WeightError

_FILES = "https://dl.fbaipublicfiles.com/"
_IMAGENET = {
    "MSRA/R-50": "MSRA/R-50.pkl",
    "MSRA/R-50-GN": "47261647/R-50-GN.pkl",
    "MSRA/R-101": "MSRA/R-101.pkl",
    "MSRA/R-101-GN": "47592356/R-101-GN.pkl",
    "FAIR/20171220/X-101-32x8d": "20171220/X-101-32x8d.pkl",
}
# what Detectron's training added to the name
_DETECTRON = {
    "35857197/e2e_faster_rcnn_R-50-C4_1x": "01_33_49.iAX0mXvW",
    "35857345/e2e_faster_rcnn_R-50-FPN_1x": "01_36_30.cUF7QR7I",
    "35857890/e2e_faster_rcnn_R-101-FPN_1x": "01_38_50.sNxI7sX7",
    "36761737/e2e_faster_rcnn_X-101-32x8d-FPN_1x": "06_31_39.5MIHi1fZ",
    "35858791/e2e_mask_rcnn_R-50-C4_1x": "01_45_57.ZgkA7hPB",
    "35858933/e2e_mask_rcnn_R-50-FPN_1x": "01_48_14.DzEQe4wC",
    "35861795/e2e_mask_rcnn_R-101-FPN_1x": "02_31_37.KqyEK4tT",
    "36761843/e2e_mask_rcnn_X-101-32x8d-FPN_1x": "06_35_59.RZotkLKI",
    "37129812/e2e_mask_rcnn_X-152-32x8d-FPN-IN5k_1.44x": "09_35_36.8pzTQKYK",
    "37697547/e2e_keypoint_rcnn_R-50-FPN_1x": "08_42_54.kdzV35ao",
}
_BENCHMARK = tuple(
    f"e2e_{kind}_rcnn_{backbone}_1x"
    for kind in ("faster", "mask")
    for backbone in ("R_50_C4", "R_50_FPN", "R_101_FPN", "X_101_32x8d_FPN")
)


def _detectron(name: str, signature: str) -> str:
    model = name.split("/")[1]
    keypoints = "keypoints_" if "keypoint" in model else ""
    data = f"{keypoints}coco_2014_train%3A{keypoints}coco_2014_valminusminival"
    folder = f"{_FILES}detectron/{name.split('/')[0]}/12_2017_baselines/{model}.yaml.{signature}"
    return f"{folder}/output/train/{data}/generalized_rcnn/model_final.pkl"


# maskrcnn-benchmark's names, and below MaskRCNNBenchmark/ the models that it published
CATALOG = (
    {f"ImageNetPretrained/{name}": f"{_FILES}detectron/ImageNetPretrained/{file}" for name, file in _IMAGENET.items()}
    | {f"Caffe2Detectron/COCO/{name}": _detectron(name, signature) for name, signature in _DETECTRON.items()}
    | {f"MaskRCNNBenchmark/{name}": f"https://download.pytorch.org/models/maskrcnn/{name}.pth" for name in _BENCHMARK}
)


def resolve(address: str) -> str:
    """The http(s) or file address that a catalog://, torchvision:// or detectron2:// name means; others as they are.

    catalog://NAME is an entry of CATALOG. torchvision://MODEL is the newest weights of a model of torchvision, as
    torchvision://MODEL/COCO_V1 those of that name. detectron2://PATH is a file of detectron2's model zoo. WeightError,
    with the names there are, for another.
    """
    scheme, separator, name = address.partition("://")
    if not separator:
        return address
    if scheme == "catalog":
        if name not in CATALOG:
            raise WeightError(f"{address}: no such entry; there are {', '.join(f'catalog://{n}' for n in CATALOG)}")
        return CATALOG[name]
    if scheme == "torchvision":
        return _torchvision(address, *name.split("/", 1))
    if scheme == "detectron2":
        return f"{_FILES}detectron2/{name}"
    return address


def _torchvision(address: str, model: str, version: str = "DEFAULT") -> str:
    if model not in list_models():
        raise WeightError(f"{address}: torchvision has no model {model!r}; torchvision.models.list_models() names all")
    versions = get_model_weights(model)
    if version not in versions.__members__:
        known = ", ".join(versions.__members__) or "none"
        raise WeightError(f"{address}: no weights {version!r} of {model}; there are {known}")
    return versions[version].url
