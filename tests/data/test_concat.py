import pytest
from data.makers import annotation, write_coco

from fastrcnn.data import COCODataset, ConcatDataset, DataError


def test_indices_go_through_all_datasets(tmp_path):
    first = COCODataset(**write_coco(tmp_path / "a", [annotation(1)], [(1, 40, 30), (2, 30, 40)]))
    second = COCODataset(**write_coco(tmp_path / "b", [annotation(9)], [(8, 20, 30), (9, 25, 30), (10, 40, 50)]))
    joined = ConcatDataset([first, second])
    assert len(joined) == 5
    assert [joined.get_idxs(i) for i in range(5)] == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]
    assert [joined.get_img_info(i)["id"] for i in range(5)] == [1, 2, 8, 9, 10]
    image, target, index = joined[3]
    assert (image.size, len(target), index) == ((25, 30), 1, 3)
    assert joined.categories == first.categories


def test_categories_must_agree(tmp_path):
    first = COCODataset(**write_coco(tmp_path / "a", []))
    second = COCODataset(**write_coco(tmp_path / "b", [], categories=[{"id": 1, "name": "bird"}]))
    with pytest.raises(DataError, match="different categories"):
        ConcatDataset([first, second])
