from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from codefend.bench import EvalConfig
from codefend.core import images
from codefend.tasks import load
from codefend.tasks.metrics import all_tags
from codefend.tasks.readers import (
    LazyExamples,
    Record,
    read_coco_captions,
    read_textvqa,
    read_vqa,
    resize_and_crop,
    subset,
)
from codefend.types import CodefendError, Task

CAPTIONS = {
    "images": [
        {"id": 9, "file_name": "COCO_val2014_000000000009.png"},
        {"id": 25, "file_name": "COCO_val2014_000000000025.png"},
        {"id": 30, "file_name": "nobody_described_this.png"},
    ],
    "annotations": [
        {"image_id": 25, "id": 1, "caption": "A giraffe eats leaves."},
        {"image_id": 9, "id": 2, "caption": "A box of food."},
        {"image_id": 9, "id": 3, "caption": "Meat and bread in a tray."},
        {"image_id": 77, "id": 4, "caption": "An image of another subset."},
    ],
}
QUESTIONS = {
    "data_subtype": "val2014",
    "questions": [
        {"image_id": 9, "question": "Is this food?", "question_id": 9000},
        {"image_id": 25, "question": "How many giraffes?", "question_id": 25000},
        {"image_id": 25, "question": "Not annotated?", "question_id": 25001},
    ],
}
ANNOTATIONS = {
    "annotations": [
        {"question_id": i, "image_id": i // 1000, "answer_type": kind, "answers": [{"answer": a, "answer_id": 1}] * 10}
        for i, kind, a in [(25000, "number", "1"), (9000, "yes/no", "yes")]
    ]
}
TEXT = {
    "data": [
        {"question": "what is the brand?", "image_id": "003a8ae2ef43b901", "answers": ["nokia"] * 9 + ["none"]},
        {"question": "what time?", "image_id": "0054c91397f2fe05", "answers": [{"answer": "12:50"}], "question_id": 7},
    ]
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images of several sizes under COCO's and TextVQA's names."""
    place = tmp_path / "images"
    place.mkdir()
    shapes = {
        "COCO_val2014_000000000009": (20, 30),
        "COCO_val2014_000000000025": (16, 12),
        "003a8ae2ef43b901": (8, 8),
        "0054c91397f2fe05": (10, 9),
    }
    for i, (name, (height, width)) in enumerate(shapes.items()):
        images.save(place / f"{name}.png", torch.full((3, height, width), i / 10).mul(255).round() / 255)
    return place


def write_file(folder: Path, name: str, content: Any) -> Path:
    path = folder.parent / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def coco(folder: Path, **options: Any) -> Task:
    return read_coco_captions(write_file(folder, "captions_val2014.json", CAPTIONS), folder, **options)


def vqa(folder: Path, **options: Any) -> Task:
    questions, annotations = write_file(folder, "q.json", QUESTIONS), write_file(folder, "a.json", ANNOTATIONS)
    return read_vqa(questions, annotations, folder, **options)


# --- the readers ------------------------------------------------------------------------------------------------------


def test_coco_captions_become_one_example_per_image(folder: Path) -> None:
    task = coco(folder, prompt="Say what you see.", target="a pig flies")
    assert (task.name, task.headline, task.target) == ("captions_val2014", "cider_d", "a pig flies")
    first, second = task.examples
    assert (first.id, first.prompt) == ("9", "Say what you see.")
    assert first.references == ("A box of food.", "Meat and bread in a tray.")
    assert second.references == ("A giraffe eats leaves.",)
    assert first.image.shape == (3, 20, 30)
    assert second.image.shape == (3, 16, 12)
    torch.testing.assert_close(second.image, torch.full((3, 16, 12), 0.1), atol=0.003, rtol=0)


def test_a_coco_task_can_be_scored_in_parts(folder: Path) -> None:
    task = coco(folder)
    answers = ["a box of food", "a zebra"]
    whole = task.metrics["cider_d"](answers, task.examples)
    parts = [task.metrics["cider_d"](answers[i : i + 1], task.examples[i : i + 1]) for i in range(2)]
    assert torch.equal(torch.cat(parts), whole)
    assert whole[0] > 1 > whole[1]
    assert set(task.metrics) == {"cider_d", "bleu4", "rouge_l"}


def test_vqa_joins_questions_with_their_annotations(folder: Path) -> None:
    task = vqa(folder, prompt="{question}\nAnswer the question using a single word or phrase.")
    first, second = task.examples
    assert first.id == "9000"
    assert first.prompt == "Is this food?\nAnswer the question using a single word or phrase."
    assert [first.kind, second.kind] == ["yes/no", "number"]
    assert second.references == ("1",) * 10
    assert second.image.shape == (3, 16, 12)  # matched by the number at the end of the file name
    assert task.metrics[task.headline](["Yes.", "two"], task.examples).tolist() == [1.0, 0.0]
    assert vqa(folder).examples[0].prompt == "Is this food?"


def test_textvqa_takes_strings_and_objects_as_answers(folder: Path) -> None:
    task = read_textvqa(write_file(folder, "TextVQA_val.json", TEXT), folder)
    first, second = task.examples
    assert first.references == ("nokia",) * 9 + ("none",)
    assert second.references == ("12:50",)
    assert [first.id, second.id] == ["0", "7"]
    assert [first.image.shape[1:], second.image.shape[1:]] == [(8, 8), (10, 9)]


def test_images_are_loaded_on_access_only(folder: Path) -> None:
    task = coco(folder)
    image = folder / "COCO_val2014_000000000025.png"
    image.write_bytes(b"not a image")
    assert len(task.examples[1:]) == 1  # slicing loads nothing
    assert isinstance(task.examples[:1], LazyExamples)
    with pytest.raises(CodefendError, match=r"COCO_val2014_000000000025\.png"):
        task.examples[-1]
    with pytest.raises(IndexError):
        task.examples[2]


# --- sizes and subsets -----------------------------------------------------------------------------------------------


def test_size_makes_batches_of_different_images(folder: Path) -> None:
    batch = torch.stack([example.image for example in coco(folder, size=14).examples])
    assert batch.shape == (2, 3, 14, 14)
    assert torch.equal(batch, images.quantize8(batch))
    with pytest.raises(CodefendError, match="size must be 1"):
        coco(folder, size=0)


def test_resize_and_crop_keeps_the_centre_of_the_longer_side() -> None:
    wide = torch.zeros(3, 10, 30)
    wide[:, :, 10:20] = 1
    assert torch.equal(resize_and_crop(wide, 10), torch.ones(3, 10, 10))
    assert torch.equal(resize_and_crop(wide.transpose(1, 2), 10), torch.ones(3, 10, 10))
    checks = torch.arange(64 * 64).reshape(1, 64, 64).remainder(2).float().expand(3, 64, 64)
    grey = resize_and_crop(checks, 16)  # antialiased: fine stripes become grey, not black or white
    torch.testing.assert_close(grey, torch.full_like(grey, 0.5), atol=0.1, rtol=0)
    assert resize_and_crop(torch.rand(3, 7, 13), 32).shape == (3, 32, 32)
    assert resize_and_crop(torch.rand(3, 333, 1000), 111).shape == (3, 111, 111)


def test_a_subset_is_fixed_nested_and_in_order() -> None:
    items = list(range(1000))
    small, large = subset(items, 10), subset(items, 50)
    assert small == subset(items, 10) == sorted(small)
    assert set(small) < set(large)
    assert small[-1] > 500 > small[0]
    assert subset(items, None) == subset(items, 5000) == items
    with pytest.raises(CodefendError, match="limit must be 1"):
        subset(items, 0)


def test_limit_needs_only_the_images_that_it_keeps(folder: Path) -> None:
    assert [e.id for e in coco(folder, limit=1).examples] == [subset(["9", "25"], 1)[0]]
    assert len(vqa(folder, limit=1).examples) == 1


def test_lazy_examples_carry_kind_and_no_tags(folder: Path) -> None:
    examples = LazyExamples([Record("x", folder / "003a8ae2ef43b901.png", "Why?", kind="reason")])
    assert examples[0].kind == "reason"
    assert all_tags(["x"], examples).isnan().all()


# --- what is refused -------------------------------------------------------------------------------------------------


def test_missing_images_are_counted_and_the_first_is_named(folder: Path) -> None:
    (folder / "COCO_val2014_000000000025.png").unlink()
    with pytest.raises(CodefendError, match=r"1 of 2 images are missing .*000000000025\.png"):
        coco(folder)
    with pytest.raises(CodefendError, match=r"1 of 2 images are missing .* image id 25"):
        vqa(folder)
    for reader in (coco, vqa):
        with pytest.raises(CodefendError, match="nowhere"):
            reader(folder / "nowhere")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"bad\.json is not valid JSON: .*line 1 column"),
        ("[1]", "expected a JSON object at the top level, not list"),
        ({"info": {}}, r"bad\.json has no list 'annotations' at the top level \(it holds 'info'\)"),
        ({"annotations": {}}, "no list 'annotations'"),
        ({"annotations": [3]}, r"bad\.json: annotations\[0\] must be an object, not int"),
        ({"annotations": [{"caption": "a"}]}, r"annotations\[0\] has no 'image_id'"),
        (
            {"annotations": [{"image_id": 1, "caption": None}]},
            r"annotations\[0\]: 'caption' must be text, not NoneType",
        ),
        ({"annotations": [{"image_id": True, "caption": "a"}]}, "'image_id' must be a number or text, not bool"),
        ({"annotations": [], "images": []}, "no image has a caption"),
    ],
)
def test_malformed_captions_are_located(folder: Path, content: Any, message: str) -> None:
    with pytest.raises(CodefendError, match=message):
        read_coco_captions(write_file(folder, "bad.json", content), folder)


def test_a_missing_file_is_named(folder: Path) -> None:
    with pytest.raises(CodefendError, match=r"cannot read .*absent\.json: No such file"):
        read_textvqa(folder / "absent.json", folder)
    (folder / "latin.json").write_bytes(b'{"data": "\xe9"}')
    with pytest.raises(CodefendError, match=r"latin\.json is not valid JSON"):
        read_textvqa(folder / "latin.json", folder)


def test_malformed_answers_are_located(folder: Path) -> None:
    row = TEXT["data"][0]
    for answers, message in [
        ([{"text": "x"}], r"data\[0\]\['answers'\]\[0\] has no 'answer'"),
        ([1], r"data\[0\]\['answers'\]\[0\] must be an object, not int"),
        ("yes", "'answers' must be a list, not str"),
    ]:
        with pytest.raises(CodefendError, match=message):
            read_textvqa(write_file(folder, "bad.json", {"data": [{**row, "answers": answers}]}), folder)
    with pytest.raises(CodefendError, match="'data' is empty"):
        read_textvqa(write_file(folder, "bad.json", {"data": []}), folder)


def test_questions_and_annotations_of_different_splits_are_refused(folder: Path) -> None:
    annotations = write_file(folder, "a.json", {"annotations": [{"question_id": 1, "answers": []}]})
    with pytest.raises(CodefendError, match=r"a\.json: no question of .*q\.json is annotated"):
        read_vqa(write_file(folder, "q.json", QUESTIONS), annotations, folder)


# --- the registry ----------------------------------------------------------------------------------------------------


def test_readers_are_tasks_of_the_registry_and_of_evaluations(folder: Path) -> None:
    captions = write_file(folder, "captions.json", CAPTIONS)
    questions, annotations = write_file(folder, "q.json", QUESTIONS), write_file(folder, "a.json", ANNOTATIONS)
    task = load("coco-captions", annotations=captions, images=folder, size=8, limit=1)
    assert [example.image.shape for example in task.examples] == [(3, 8, 8)]
    assert len(load("vqav2", questions=questions, annotations=annotations, images=folder).examples) == 2
    assert len(load("textvqa", data=write_file(folder, "t.json", TEXT), images=folder).examples) == 2
    config = EvalConfig(tasks=(f"coco-captions:annotations={captions}", f"images={folder}", "size=8", "vqa"))
    first, second = config.cases.values()
    assert load(first.task, **first.options).examples[0].image.shape == (3, 8, 8)
    assert second == ("vqa", "pocket", {})


@pytest.mark.parametrize(
    ("options", "split", "problem"),
    [
        ({"images": "x"}, "test", "'annotations' is not given; give annotations=PATH, images=PATH"),
        ({"annotations": "x", "images": "y", "sise": "8"}, "test", "no option 'sise'"),
        ({"annotations": "x", "images": "y", "size": "big"}, "test", "size must be a whole number of pixels"),
        ({"annotations": "x", "images": "y"}, "val", "no split 'val'; leave split out"),
    ],
)
def test_wrong_options_of_a_reader_are_errors(options: dict[str, str], split: str, problem: str) -> None:
    with pytest.raises(CodefendError, match=problem):
        load("coco-captions", split=split, **options)
