"""ImageNet, Omniglot and the sprite of clothes: pictures with a class."""

from __future__ import annotations

import io
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PilImage

from flamingo.document import Image, Medium, Video
from flamingo.errors import FlamingoError
from icl_eval.datasets import load_dataset
from icl_eval.datasets.checking import problems
from icl_eval.sources import load_pool
from icl_eval.tasks import load_task
from tests.icl_eval.datasets.published import picture, write_json


def pixels(medium: Medium) -> np.ndarray:
    assert isinstance(medium, Image)
    return np.asarray(PilImage.open(io.BytesIO(medium.data)).convert("L"))


# -- ImageNet ----------------------------------------------------------------------------------------------------------


def write_imagenet(folder: Path, packed: str = "") -> list[bytes]:
    """Three images of two classes, in a folder or packed; their bytes in the order of ImageFolder."""
    names = ("n01440764/ILSVRC2012_val_00000293.JPEG", "n01440764/b.JPEG", "n02012849/a.JPEG")
    contents = [picture(folder / "val" / name, level) for level, name in enumerate(names)]
    if packed:
        with tarfile.open(folder / "val.tar", "w") as tar, zipfile.ZipFile(folder / "val.zip", "w") as archive:
            for name in reversed(names):
                tar.add(folder / "val" / name, f"./{name}")
                archive.write(folder / "val" / name, f"val/{name}")
        for name in names:
            (folder / "val" / name).unlink()
        (folder / "val" / "n01440764").rmdir()
        (folder / "val" / "n02012849").rmdir()
        (folder / "val").rmdir()
        (folder / ("val.zip" if packed == "tar" else "val.tar")).unlink()
    return contents


@pytest.mark.parametrize("packed", ["", "tar", "zip"])
def test_imagenet_in_a_folder_tar_or_zip(packed: str, tmp_path: Path) -> None:
    """Packed images of another class or order than those in folders, so that draws differ with the packing."""
    contents = write_imagenet(tmp_path / "imagenet", packed)
    (tmp_path / "imagenet" / "classnames.txt").write_text("n02012849 crane, the bird\nn01440764 tench\n")
    dataset = load_dataset("imagenet", tmp_path)
    examples = dataset.examples("val")
    assert [example.id for example in examples] == [
        "n01440764/ILSVRC2012_val_00000293.JPEG",
        "n01440764/b.JPEG",
        "n02012849/a.JPEG",
    ]
    assert [example.label for example in examples] == ["tench", "tench", "crane, the bird"]
    assert [example.answers for example in examples] == [("tench",), ("tench",), ("crane, the bird",)]
    assert dataset.candidates() == ("crane, the bird", "tench")
    assert [dataset.medium(example.media[0]).data for example in examples] == contents  # type: ignore[union-attr]


@pytest.mark.parametrize("file", ["LOC_synset_mapping.txt", "synset_words.txt", "imagenet_class_index.json"])
def test_imagenets_other_files_of_names(file: str, tmp_path: Path) -> None:
    """All synonyms taken for a name, Keras's underscores in it, or its classes in the order of their keys as text."""
    write_imagenet(tmp_path / "imagenet")
    path = tmp_path / "imagenet" / file
    if path.suffix == ".json":
        rows = {"10": ["n02012849", "crane"], "2": ["n01440764", "great_tench"]}
        write_json(path, rows)
    else:
        path.write_text("n01440764 great tench, Tinca tinca\n\nn02012849 crane\n")
    dataset = load_dataset("imagenet", tmp_path)
    assert dataset.candidates() == ("great tench", "crane")
    assert [example.label for example in dataset.examples("val")] == ["great tench", "great tench", "crane"]


def test_imagenets_names_that_two_classes_share(tmp_path: Path) -> None:
    """A name twice among the candidates, of which only the first could be right."""
    write_imagenet(tmp_path / "imagenet")
    (tmp_path / "imagenet" / "classnames.txt").write_text("n01440764 crane\nn02012849 crane\n")
    assert load_dataset("imagenet", tmp_path).candidates() == ("crane",)


def test_folders_that_are_names(tmp_path: Path) -> None:
    """One's own classes that need a file of names."""
    for name in ("red_panda/1.png", "owl/1.png"):
        picture(tmp_path / "imagenet" / "train" / name)
    dataset = load_dataset("imagenet", tmp_path)
    assert [example.label for example in dataset.examples("train")] == ["owl", "red panda"]
    assert dataset.candidates() == ("owl", "red panda")
    picture(tmp_path / "imagenet" / "train" / "loose.png")
    with pytest.raises(FlamingoError, match=r"image loose\.png, expected it in a folder of its class"):
        dataset.examples("train")


@pytest.mark.parametrize("names", ["", "n02012849 crane\n"])
def test_imagenet_needs_a_name_of_every_class(names: str, tmp_path: Path) -> None:
    """WordNet ids that become class names, or images of a class without a name that are left out."""
    write_imagenet(tmp_path / "imagenet")
    if names:
        (tmp_path / "imagenet" / "classnames.txt").write_text(names)
    with pytest.raises(FlamingoError, match=r"val: n01440764/ILSVRC\S+: class n01440764, expected one that classn"):
        load_dataset("imagenet", tmp_path).examples("val")


def test_a_folder_beside_named_classes_is_no_class(tmp_path: Path) -> None:
    """Thumbnails or the like beside the classes, taken for a class that is no candidate."""
    write_imagenet(tmp_path / "imagenet")
    (tmp_path / "imagenet" / "classnames.txt").write_text("n01440764 tench\nn02012849 crane\n")
    picture(tmp_path / "imagenet" / "val" / "thumbnails" / "1.png")
    with pytest.raises(FlamingoError, match=r"val: thumbnails/1\.png: class thumbnails, expected one that classnames"):
        load_dataset("imagenet", tmp_path).examples("val")


def test_a_malformed_file_of_names(tmp_path: Path) -> None:
    """A list of names alone, of which the first words are taken for ids."""
    write_imagenet(tmp_path / "imagenet")
    (tmp_path / "imagenet" / "classnames.txt").write_text("n01440764 tench\ngreat white shark\n")
    with pytest.raises(FlamingoError, match=r"classnames\.txt: entry 2: 'great white shark', expected a WordNet id"):
        load_dataset("imagenet", tmp_path).candidates()


# -- Omniglot ----------------------------------------------------------------------------------------------------------


def test_omniglots_official_zip_and_folder(tmp_path: Path) -> None:
    """Drawings in the order of alphabets, not of the official numbers; a folder that makes other examples."""
    names = ("Zulu/character02/0002_01.png", "Zulu/character01/0001_02.png", "Balinese/character01/0108_01.png")
    for level, name in enumerate(names):
        picture(tmp_path / "a" / "omniglot" / "images_background" / name, level)
    (tmp_path / "b" / "omniglot").mkdir(parents=True)
    with zipfile.ZipFile(tmp_path / "b" / "omniglot" / "images_background.zip", "w") as archive:
        for name in names:
            path = tmp_path / "a" / "omniglot" / "images_background" / name
            archive.write(path, f"images_background/{name}")
    folder, packed = (load_dataset("omniglot", tmp_path / each) for each in ("a", "b"))
    for dataset in (folder, packed):
        examples = dataset.examples("background")
        assert [example.id for example in examples] == ["0001_02", "0002_01", "0108_01"]
        assert [example.label for example in examples] == ["0001", "0002", "0108"]
        assert examples[2].fields == {"alphabet": "Balinese", "character": "character01"}
        assert [int(pixels(dataset.medium(example.media[0])).max()) for example in examples] == [1, 0, 2]


def test_omniglots_array(tmp_path: Path) -> None:
    """Drawings inside out, shifted by packing, or of another class."""
    drawings = np.random.default_rng(0).random((3, 2, 5, 11)) > 0.5
    (tmp_path / "omniglot").mkdir()
    np.savez_compressed(tmp_path / "omniglot" / "images_evaluation.npz", labels=np.zeros(1), images=drawings)
    dataset = load_dataset("omniglot", tmp_path)
    examples = dataset.examples("evaluation")
    assert [example.id for example in examples] == [f"000{kind}_0{drawer}" for kind in (1, 2, 3) for drawer in (1, 2)]
    read = np.stack([pixels(dataset.medium(example.media[0])) for example in examples])
    np.testing.assert_array_equal(read.reshape(drawings.shape), drawings * np.uint8(255))
    for name in ("evaluation/0004_01.png", "evaluation/0001_03.png", "evaluation/0000_01.png", "evaluation/a.png"):
        with pytest.raises(FlamingoError, match=r"images_evaluation\.npz/\S+: no such drawing"):
            dataset.medium(name)


@pytest.mark.parametrize(
    "key, shape, found",
    [
        ("images", (2, 3, 4), r"bool \(2, 3, 4\)"),
        ("images", (0, 20, 5, 5), r"bool \(0, 20, 5, 5\)"),
        ("data", (1, 1, 1, 1), r"no item named 'images\.npy'"),
    ],
)
def test_another_array_is_refused(key: str, shape: tuple[int, ...], found: str, tmp_path: Path) -> None:
    """Another npz of that name, read as drawings."""
    (tmp_path / "omniglot").mkdir()
    np.savez(tmp_path / "omniglot" / "images_background.npz", **{key: np.zeros(shape, bool)})
    with pytest.raises(FlamingoError, match=rf"images_background\.npz: expected an npz file of drawings .*{found}"):
        load_dataset("omniglot", tmp_path).examples("background")


@pytest.mark.parametrize("name", ["images_background.npz", "images_background.zip"])
def test_a_download_that_was_changed_is_named(name: str, tmp_path: Path) -> None:
    """A damaged archive that raises zlib's own error, which names no file."""
    (tmp_path / "omniglot").mkdir()
    path = tmp_path / "omniglot" / name
    if path.suffix == ".npz":
        np.savez_compressed(path, images=np.random.default_rng(0).random((9, 20, 50, 50)) > 0.5)
    else:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("images_background/A/character01/0001_01.png", bytes(range(256)) * 99)
    data = bytearray(path.read_bytes())
    data[100:120] = b"\xff" * 20
    path.write_bytes(data)
    dataset = load_dataset("omniglot", tmp_path)
    with pytest.raises(FlamingoError, match=name.replace(".", r"\.")):
        dataset.medium(dataset.examples("background")[0].media[0])


def test_real_omniglot(real_data: Path) -> None:
    """The repack that disagrees with the official drawings, in ids, classes or pixels."""
    dataset = load_dataset("omniglot", real_data)
    array, official = dataset.examples("background"), dataset.examples("background_small1")
    assert len(array) == 964 * 20 and len(official) == 136 * 20
    assert official[0].fields == {"alphabet": "Balinese", "character": "character01"}
    repacked = {example.id: example for example in array}
    for example in official[::97]:
        assert repacked[example.id].label == example.label
        np.testing.assert_array_equal(
            pixels(dataset.medium(repacked[example.id].media[0])), pixels(dataset.medium(example.media[0]))
        )


# -- the sprite --------------------------------------------------------------------------------------------------------


def test_real_clothes(real_data: Path) -> None:
    """Classes a row off, rows and columns exchanged, or pictures cut between two."""
    dataset = load_dataset("fashion", real_data)
    examples = dataset.examples("all")
    assert len(examples) == 900 and [example.id for example in examples[:31:30]] == ["0-0", "1-0"]
    labels = [example.label for example in examples]
    assert labels == [name for name in dataset.candidates() for _ in range(90)]
    sprite = np.asarray(PilImage.open(real_data / "fashion_sprite" / "fashion-mnist-sprite.png").convert("L"))
    np.testing.assert_array_equal(pixels(dataset.medium("2-5")), sprite[56:84, 140:168])
    trousers = [pixels(dataset.medium(e.media[0])).mean(axis=0) > 20 for e in examples if e.label == "Trouser"]
    sneakers = [pixels(dataset.medium(e.media[0])).mean(axis=0) > 20 for e in examples if e.label == "Sneaker"]
    assert np.mean(trousers) < 0.6 < np.mean(sneakers), "trousers are narrow, sneakers are wide"
    for name in ("30-0", "0-30", "-1-0", "0"):
        with pytest.raises(FlamingoError, match=r"fashion-mnist-sprite\.png: "):
            dataset.medium(name)
    assert problems("fashion", real_data) == []


def test_another_sprite_is_refused(tmp_path: Path) -> None:
    """A picture of another size, cut into pictures of no class."""
    picture(tmp_path / "fashion" / "fashion-mnist-sprite.png")
    with pytest.raises(FlamingoError, match=r"\(4, 4\), expected 10 × 3 rows of pictures of 28 × 28"):
        load_dataset("fashion", tmp_path).examples("all")


def test_light_and_dark_are_exchanged_where_a_task_says_so(tmp_path: Path) -> None:
    """Pictures shown as they are under a task that exchanges their ground, or one task's taken for the other's."""
    drawings = np.zeros((5, 20, 8, 9), bool)
    drawings[0, 0, 2:4, 3] = True
    (tmp_path / "omniglot").mkdir()
    np.savez_compressed(tmp_path / "omniglot" / "images_background.npz", images=drawings)
    task = load_task("omniglot_5way")
    assert task.inverted
    plain, inverted = (load_pool(replace(task, inverted=each), tmp_path) for each in (False, True))
    found = [pixels(pool.media(pool.indices(pool.queries[0]))[0]) for pool in (plain, inverted)]
    assert np.array_equal(found[0], drawings[0, 0] * np.uint8(255)) and np.array_equal(found[1], 255 - found[0])
    assert plain.name(0) != inverted.name(0)


def test_frames_of_videos_are_exchanged_too(tmp_path: Path) -> None:
    """A video under a task of exchanged pictures that is shown as it is."""
    (tmp_path / "mine").mkdir()
    frames = [PilImage.new("RGB", (4, 4), (level, 0, 0)) for level in (0, 100)]
    frames[0].save(tmp_path / "mine" / "clip.webp", save_all=True, append_images=frames[1:], lossless=True)
    (tmp_path / "mine" / "test.jsonl").write_text('{"video": "clip.webp", "answer": "a"}\n')
    task = replace(load_task("omniglot_5way"), dataset="mine", split="test", support="test", ways=0)
    (video,) = (pool := load_pool(task, tmp_path)).media(pool.indices(pool.queries[0]))
    assert isinstance(video, Video)
    shown = [np.asarray(PilImage.open(io.BytesIO(frame.data)))[0, 0].tolist() for frame in video.frames]
    assert shown == [[255, 255, 255], [155, 255, 255]]
