import pytest
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.datasets.pascal_voc import CLASS_NAMES, load_voc_instances
from PIL import Image

from rethink_d2.data.files import data_paths, missing_files
from rethink_d2.data.voc import load_voc, register_voc

BCCD = ("RBC", "WBC", "Platelets")
BOX = ("11", "12", "30", "40")


def xml(name="cat", box=BOX, extra="<difficult>0</difficult>"):
    sides = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    return f"<object><name>{name}</name>{extra}<bndbox>{sides}</bndbox></object>"


@pytest.fixture
def voc_data(real_data):
    if not (real_data / "BCCD").is_dir():
        pytest.skip("needs the small VOC and BCCD data beside COCO's")
    return real_data


def write_image(root, image_id, *objects, size="<size><width>64</width><height>48</height></size>"):
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    text = f"<annotation>{size}{''.join(objects)}</annotation>"
    (root / "Annotations" / f"{image_id}.xml").write_text(text)
    Image.new("RGB", (64, 48)).save(root / "JPEGImages" / f"{image_id}.jpg")
    with open(root / "ImageSets/Main/train.txt", "a") as f:
        f.write(f"{image_id}\n")


@pytest.fixture
def register():
    names = []

    def add(name, *args, **kwargs):
        names.append(name)
        register_voc(name, *args, **kwargs)
        return name

    yield add
    for name in names:
        if name in DatasetCatalog:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


def objects(records):
    return [a for r in records for a in r["annotations"]]


@pytest.mark.parametrize("folder", ["VOC2007", "VOC2012"])
def test_records_with_difficult_objects_are_detectron2s(voc_data, folder):
    root = str(voc_data / folder)
    assert load_voc([(root, "trainval", 2007)], True) == load_voc_instances(root, "trainval", CLASS_NAMES)


def test_zero_size_boxes_are_left_out_and_counted(voc_data, caplog):
    root = str(voc_data / "BCCD")
    with caplog.at_level("INFO"):
        ours = load_voc([(root, "trainval", 2012)], class_names=BCCD)
    assert "2 zero-size boxes left out" in caplog.text
    theirs = load_voc_instances(root, "trainval", BCCD)
    different = [(a, b) for a, b in zip(ours, theirs, strict=True) if a != b]
    assert [r["image_id"] for r, _ in different] == ["BloodImage_00338", "BloodImage_00343"]
    for a, b in different:
        left_out = [o for o in b["annotations"] if o not in a["annotations"]]
        assert len(left_out) == 1 and left_out[0]["bbox"][0] == left_out[0]["bbox"][2] - 1


def test_difficult_objects_are_left_out_of_the_training_sets_only(voc_data, caplog):
    with caplog.at_level("INFO"):
        easy = objects(DatasetCatalog.get("voc_2007_trainval_no_difficult"))
    assert "2 difficult objects left out" in caplog.text
    everything = objects(DatasetCatalog.get("voc_2007_trainval"))
    assert (len(easy), len(everything)) == (15, 17)
    assert all(o in everything for o in easy)
    # Genuine: the only chairs of 000005.jpg that are marked difficult.
    assert {CLASS_NAMES[o["category_id"]] for o in everything if o not in easy} == {"chair"}


def test_parts_of_objects_are_no_objects(voc_data):
    """2007_000027.xml has a person with four parts: head, hand and two feet."""
    records = load_voc([(str(voc_data / "VOC2012"), "train", 2012)])
    person = next(r for r in records if r["image_id"] == "2007_000027")
    assert [o["bbox"] for o in person["annotations"]] == [[173, 100, 349, 351]]
    assert len(objects(records)) == 11


def test_unions_of_the_paper(voc_data):
    parts = ("voc_2007_trainval", "voc_2012_train", "voc_2007_test")
    records = [DatasetCatalog.get(f"{name}_no_difficult") for name in parts]
    assert DatasetCatalog.get("voc_0712_train") == records[0] + records[1]
    assert DatasetCatalog.get("voc_0712_train_15k") == records[0] + records[1] + records[2]
    for name in ("voc_0712_train", "voc_0712_train_15k"):
        assert MetadataCatalog.get(name).thing_classes == list(CLASS_NAMES)
        assert missing_files(name) == []


@pytest.mark.parametrize("stock", ["voc_2007_test", "voc_2012_train", "voc_2012_val"])
def test_variants_have_the_metadata_that_evaluation_reads(stock):
    theirs, ours = (MetadataCatalog.get(n).as_dict() for n in (stock, f"{stock}_no_difficult"))
    assert {k: v for k, v in ours.items() if k != "name"} == {k: v for k, v in theirs.items() if k != "name"}


def test_own_classes_from_several_folders(tmp_path, register):
    for folder, name in (("a", "dent"), ("b", "scratch")):
        write_image(tmp_path / folder, "1", xml(name))
    parts = [(tmp_path / "a", "train", 2012), (tmp_path / "b", "train", 2012)]
    name = register("voc_test_own", parts, class_names=["scratch", "dent"])
    records = DatasetCatalog.get(name)
    assert [o["category_id"] for o in objects(records)] == [1, 0]
    assert all(str(tmp_path) in r["file_name"] for r in records)
    assert MetadataCatalog.get(name).get("thing_classes") == ["scratch", "dent"]


def test_files_of_other_programs_are_read(tmp_path):
    """Fractions, no <difficult>, blank lines in the list, which has a single image."""
    write_image(tmp_path, "1", xml(box=("1.5", "2.25", "30.5", "40"), extra=""))
    with open(tmp_path / "ImageSets/Main/train.txt", "a") as f:
        f.write("\n\n")
    (record,) = load_voc([(tmp_path, "train", 2012)])
    assert record["annotations"][0]["bbox"] == [0.5, 1.25, 30.5, 40]
    assert (record["height"], record["width"], record["image_id"]) == (48, 64, "1")


@pytest.mark.parametrize("box", [("11", "12", "11", "40"), ("11", "12", "30", "12"), ("11", "12", "9", "40")])
def test_a_box_must_have_an_area(tmp_path, box):
    write_image(tmp_path, "1", xml(box=box), xml())
    assert len(objects(load_voc([(tmp_path, "train", 2012)]))) == 1


@pytest.mark.parametrize(
    "content, words",
    [
        (xml("unicorn"), ["1.xml", "'unicorn'", "class_names"]),
        (xml(box=("a", "2", "3", "4")), ["1.xml", "'a'"]),
        ("<object><name>cat</name></object>", ["1.xml", "bndbox/xmin"]),
        ("<object><bndbox/></object>", ["1.xml", "bndbox/xmin"]),
        ("<object>", ["1.xml", "mismatched tag"]),
    ],
)
def test_a_bad_annotation_is_named(tmp_path, content, words):
    write_image(tmp_path, "1", content)
    with pytest.raises(ValueError) as error:
        load_voc([(tmp_path, "train", 2012)])
    assert all(word in str(error.value) for word in words)


def test_an_annotation_without_size_is_named(tmp_path):
    write_image(tmp_path, "1", xml(), size="")
    with pytest.raises(ValueError, match="1.xml.*size/height"):
        load_voc([(tmp_path, "train", 2012)])


@pytest.mark.parametrize("path", ["Annotations/1.xml", "JPEGImages/1.jpg", "ImageSets/Main/train.txt"])
def test_a_missing_file_is_named(tmp_path, path):
    write_image(tmp_path, "1", xml())
    (tmp_path / path).unlink()
    with pytest.raises(ValueError, match=f"{path} is missing"):
        load_voc([(tmp_path, "train", 2012)])


@pytest.mark.parametrize("text, words", [("\n", "lists no images"), ("1 -1\n2  1\n", "'1 -1'")])
def test_a_list_holds_one_name_per_line(tmp_path, text, words):
    """VOC's own lists per class (cat_train.txt) have a second column."""
    write_image(tmp_path, "1", xml())
    (tmp_path / "ImageSets/Main/cat_train.txt").write_text(text)
    with pytest.raises(ValueError, match=f"cat_train.txt.*{words}"):
        load_voc([(tmp_path, "cat_train", 2012)])


@pytest.mark.parametrize(
    "parts", [[], [("a", "train", 2010)], [("a", "train", 2012), ("b", "train", "2007")]]
)
def test_the_year_selects_a_metric(register, parts):
    with pytest.raises(ValueError, match="voc_test_year.*2007.*2012"):
        register("voc_test_year", parts)
    assert "voc_test_year" not in DatasetCatalog


def test_what_several_folders_lack_is_listed_once(tmp_path, register):
    write_image(tmp_path / "a", "1", xml())
    parts = [
        (tmp_path / folder, split, 2012) for folder, split in (("a", "train"), ("b", "train"), ("b", "val"))
    ]
    name = register("voc_test_missing", parts)
    lists = [f"{tmp_path}/b/ImageSets/Main/{split}.txt" for split in ("train", "val")]
    assert missing_files(name) == [f"{tmp_path}/b", *lists]
    assert data_paths(name)[0][:2] == [f"{tmp_path}/a", f"{tmp_path}/a/ImageSets/Main/train.txt"]


def test_detectron2_trains_on_the_union(voc_data):
    records = get_detection_dataset_dicts(("voc_0712_train",))
    mapper = DatasetMapper(is_train=True, augmentations=[], image_format="BGR")
    samples = [mapper(record) for record in records]
    assert [len(s["instances"]) for s in samples] == [len(r["annotations"]) for r in records]
    assert len(samples) == 10
