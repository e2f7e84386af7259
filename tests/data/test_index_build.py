"""Reading any COCO file piece by piece: Detectron2's records and filters of it."""

import json

import msgspec
import pytest
from detectron2.data import MetadataCatalog
from detectron2.data.build import (
    filter_images_with_few_keypoints,
    filter_images_with_only_crowd_annotations,
)
from detectron2.data.datasets import load_coco_json
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rethink_d2.data import _index_build
from rethink_d2.data._index_build import build, pieces
from rethink_d2.data.index import IndexedRecords
from rethink_d2.data.loader import drop_unusable


def same(ours, theirs):
    """Types and the order of keys too, which the text shows."""
    return repr(list(ours)) == repr(list(theirs))


polygons = st.lists(st.lists(st.one_of(st.integers(0, 40), st.floats(-5, 50)), max_size=9), max_size=3)
masks = st.one_of(
    polygons,
    st.none(),
    st.just({"size": [3, 2], "counts": [1, 2, 3]}),
    st.just({"size": [3, 2], "counts": "12\\0"}),
)
boxes = st.one_of(
    st.lists(st.one_of(st.integers(-9, 60), st.floats(-9, 60, width=32)), min_size=4, max_size=4),
    st.just([9.0, 9.0, 1e-7, 9.0]),  # no width in single precision
)
points = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(0, 2)), max_size=4)
annotations = st.lists(
    st.fixed_dictionaries(
        {"image_id": st.integers(1, 5), "category_id": st.sampled_from([7, 9]), "bbox": boxes},
        optional={
            "iscrowd": st.integers(0, 1),
            "segmentation": masks,
            "keypoints": points.map(lambda p: [v for point in p for v in point]),
            "area": st.floats(0, 9),
            "caption": st.sampled_from(['}, {"a', "é\n"]),
        },
    ),
    max_size=12,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(annotations, st.sampled_from([None, 1]), st.integers(0, 4))
def test_records_and_filters_of_any_file_are_detectron2_s(tmp_path, given, indent, minimum):
    heights = enumerate([50, 30, 50, 30], 1)
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "height": h, "width": 40} for i, h in heights],
        "annotations": [{"id": i, **annotation} for i, annotation in enumerate(given)],
        "categories": [{"id": 9, "name": "cup"}, {"id": 7, "name": "mug"}],
    }
    path, name = tmp_path / "any.json", "index_any"
    path.write_text(json.dumps(content, indent=indent))
    MetadataCatalog.pop(name, None)
    theirs = load_coco_json(str(path), "images", name)
    build(str(path), tmp_path / "any.index")
    ours = IndexedRecords(tmp_path / "any.index", "images")
    assert same(ours, theirs)
    assert same(ours.with_keypoints(minimum), filter_images_with_few_keypoints(theirs, minimum))
    assert same(ours.with_instances(), filter_images_with_only_crowd_annotations(theirs))
    (ours, our_counts), (theirs, their_counts) = drop_unusable(ours), drop_unusable(theirs)
    assert same(ours, theirs) and our_counts == their_counts
    ours, theirs = ours.with_instances(), filter_images_with_only_crowd_annotations(theirs)
    assert same(ours, theirs)
    classes = [a["category_id"] for r in theirs for a in r["annotations"] if not a.get("iscrowd", 0)]
    assert ours.instances_per_class().tolist() == [classes.count(0), classes.count(1)]
    assert ours.portrait.tolist() == [r["height"] > r["width"] for r in theirs]
    assert ours.ids.tolist() == [r["image_id"] for r in theirs]


elements = st.lists(
    st.dictionaries(
        st.text(max_size=3),
        st.recursive(
            st.one_of(st.integers(0, 9), st.sampled_from(['},{"', '"}', "\\", "},"])),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=1), inner),
            max_leaves=4,
        ),
        max_size=3,
    ),
    max_size=6,
)


@settings(max_examples=30, deadline=None)
@given(elements, st.integers(1, 60), st.sampled_from([None, 2]))
def test_pieces_of_any_size_hold_everything_once(values, size, indent):
    text = json.dumps(values, indent=indent).encode()
    found = list(pieces(msgspec.Raw(text), dict, size))
    assert [element for piece, _ in found for element in piece] == values
    assert sum(length for _, length in found) == len(text) - 2


def test_an_element_of_another_kind_is_refused_at_once(monkeypatch):
    """Not looked for in ever larger pieces, which would take hours in a large file."""
    searches, between = [], _index_build._BETWEEN

    class Between:
        def search(self, *args):
            searches.append(args)
            return between.search(*args)

    monkeypatch.setattr(_index_build, "_BETWEEN", Between())
    text = msgspec.Raw(b'[{"a": "x"}, {"a": 1}, {"a": 2}]')
    with pytest.raises(msgspec.ValidationError, match="str"):
        list(pieces(text, dict[str, int], 1))
    assert len(searches) == 1
