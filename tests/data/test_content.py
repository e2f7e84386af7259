"""What is made from a file belongs to its content: an index is found by it, and removed with it."""

import hashlib
import json
import os
import shutil

import pytest
import test_index
from detectron2.data import MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from test_index import document, index_files, same, stock

from rethink_d2.data import content, index

cache, register = test_index.cache, test_index.register  # the fixtures


def test_a_change_that_keeps_size_and_time_is_seen(register, tmp_path):
    """As cp -p, rsync -t and tar leave it."""
    name, path = register(document(3)), tmp_path / "index_test.json"
    first, stat = index.load(name), path.stat()
    digest = index.dataset_digest(name)
    register(json.dumps(document(3)).replace("8.5", "7.5"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    assert same(index.load(name), stock(name)) and not same(index.load(name), first)
    assert digest != index.dataset_digest(name) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_same_content_with_another_time_or_place_has_the_same_index(
    register, cache, tmp_path, monkeypatch
):
    name, path = register(document(3)), tmp_path / "index_test.json"
    records = list(index.load(name))
    monkeypatch.setattr(index, "build", None)
    os.utime(path)
    assert same(index.load(name), records)
    (tmp_path / "elsewhere").mkdir()
    path.rename(tmp_path / "elsewhere" / path.name)
    register_coco_instances("index_moved", {}, str(tmp_path / "elsewhere" / path.name), str(tmp_path))
    assert same(index.load("index_moved"), records)
    assert len(index_files(cache)) == 1


def test_a_file_is_read_for_its_hash_once(register, monkeypatch):
    name = register(document(3))
    digest = index.dataset_digest(name)
    content._digest.cache_clear()  # as another process
    monkeypatch.setattr(hashlib, "file_digest", None)
    assert index.dataset_digest(name) == digest
    os.utime(MetadataCatalog.get(name).json_file)
    with pytest.raises(TypeError):
        index.dataset_digest(name)


def test_an_index_is_removed_when_its_content_is_gone_and_nobody_reads_it(register, cache, tmp_path):
    name = register(document(3))
    text = (tmp_path / "index_test.json").read_text()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "index_test.json").write_text(text)
    register_coco_instances("index_other", {}, str(tmp_path / "other" / "index_test.json"), str(tmp_path))
    for each in (name, "index_other"):
        assert len(index.load(each)) == 3
    register(document(4))
    assert len(index.load(name)) == 4
    assert len(index_files(cache)) == 2, "the other file has that content still"
    read = index.load("index_other")
    shutil.copy(tmp_path / "index_test.json", tmp_path / "other" / "index_test.json")
    register(document(5))
    for each in ("index_other", name):
        index.load(each)
    assert len(index_files(cache)) == 3, "it is mapped"
    assert len(read) == 3
    del read
    register(document(6))
    index.load(name)
    assert sorted(len(index.IndexedRecords(path, "")) for path in index_files(cache)) == [4, 6]
