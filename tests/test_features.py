"""Stored features: computed once, right, whole after any interruption, and as good to train on as images."""

import copy
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from encoding_helpers import IMAGE_PROCESSOR, image, png
from helpers import tiny_config
from torch import nn
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, Trainer
from transformers import TrainingArguments as Arguments

from deepseek_ocr_vision import DeepSeekOCRVisionImageProcessor, DeepSeekOCRVisionModel, DeepSeekOCRVisionProcessor
from deepseek_ocr_vision.composites.small import byte_tokenizer
from deepseek_ocr_vision.saving.staging import PREFIX, staging_folder
from deepseek_ocr_vision.training.collator import ImageTextCollator
from deepseek_ocr_vision.training.features import FeatureCollator, precompute_features, precomputed_features


datasets = pytest.importorskip("datasets")


def pages(*seeds: int) -> datasets.Dataset:
    """A dataset with an image a row."""
    rows = {"image": [{"bytes": png(seed), "path": None} for seed in seeds], "number": list(seeds)}
    return datasets.Dataset.from_dict(rows, datasets.Features(image=datasets.Image(), number=datasets.Value("int64")))


def compute(dataset: datasets.Dataset, model: nn.Module, cache_dir: Path, **options) -> datasets.Dataset:
    options = {"processor": IMAGE_PROCESSOR, "pages_per_file": 2, "show_progress": False} | options
    return precompute_features(dataset, model, cache_dir=cache_dir, **options)


class Counted:
    """Counts the images that an encoder encodes, less those that are blank."""

    def __init__(self, model: DeepSeekOCRVisionModel):
        self.number = 0
        model.sam_model.register_forward_pre_hook(self.count)

    def count(self, _module, inputs) -> None:
        contrast = inputs[0].flatten(2).std(dim=2)  # [P, 3]
        self.number += (contrast > 0).any(dim=1).sum().item()

    def since_asked(self) -> int:
        number, self.number = self.number, 0
        return number


def parts(cache_dir: Path) -> dict[str, bytes]:
    return {str(path.relative_to(cache_dir)): path.read_bytes() for path in cache_dir.rglob("*.parquet")}


def tokens_by_id(cache_dir: Path) -> dict[str, bytes]:
    """The tokens of the one table in a folder, where no id is twice."""
    (settings,) = cache_dir.glob("*/settings.json")
    tables = [pq.read_table(path, columns=["id", "tokens"]) for path in settings.parent.glob("*.parquet")]
    rows = [(row["id"], np.array(row["tokens"]).tobytes()) for table in tables for row in table.to_pylist()]
    assert len(dict(rows)) == len(rows)
    return dict(rows)


# What is stored


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored_as", [None, torch.bfloat16, torch.float16])
def test_features_are_the_models_tokens_bit_for_bit(tiny_model, tmp_path, dtype, stored_as):
    """Pins bfloat16, which Parquet does not have, and casts on the way through `datasets`, which likes float32."""
    tiny_model.to(dtype)
    features = compute(pages(0, 1, 2), tiny_model, tmp_path, dtype=stored_as)["features"]
    expected = tiny_model.encode([image(seed) for seed in range(3)], image_processor=IMAGE_PROCESSOR)
    assert [tokens.dtype for tokens in features] == [stored_as or dtype] * 3
    assert all(torch.equal(a, b.to(stored_as or dtype)) for a, b in zip(features, expected, strict=True))


def test_a_row_has_its_own_columns_and_its_tokens(tiny_model, tmp_path):
    """Pins order and columns, through what people do with a dataset before they train on it."""
    result = compute(pages(0, 1, 2, 3), tiny_model, tmp_path)
    assert result.column_names == ["image", "number", "features"]
    expected = dict(zip(range(4), result["features"], strict=True))
    assert len({tokens.sum().item() for tokens in expected.values()}) == 4
    parts = result.remove_columns("image").shuffle(seed=1).train_test_split(2, seed=1)
    for row in (*parts["train"], *parts["test"]):
        assert row.keys() == {"number", "features"}
        assert torch.equal(row["features"], expected[row["number"]])


def test_lists_of_images_give_lists_of_tokens(tiny_model, tmp_path):
    """Pins rows with several images, with none, and with the same one twice."""
    cells = [[png(0), png(1)], [], None, [png(1), png(0), png(1)]]
    as_images = [None if cell is None else [{"bytes": each, "path": None} for each in cell] for cell in cells]
    columns = datasets.Features(image=datasets.List(datasets.Image()))
    counted = Counted(tiny_model)
    result = compute(datasets.Dataset.from_dict({"image": as_images}, columns), tiny_model, tmp_path)
    assert counted.since_asked() == 2
    first, second = tiny_model.encode([image(0), image(1)], image_processor=IMAGE_PROCESSOR)
    expected = [[first, second], [], [], [second, first, second]]
    for row, tokens in zip(result["features"], expected, strict=True):
        assert len(row) == len(tokens)
        assert all(map(torch.equal, row, tokens))


def test_a_row_without_an_image_has_no_features(tiny_model, tmp_path):
    """Pins `None`, as tables have it where rows differ."""
    columns = datasets.Features(image=datasets.Image())
    dataset = datasets.Dataset.from_dict({"image": [None, {"bytes": png(0), "path": None}]}, columns)
    nothing, tokens = compute(dataset, tiny_model, tmp_path)["features"]
    assert nothing is None
    assert tokens.shape == (4, 32)


def test_pages_of_several_sizes_have_as_many_tokens_as_they_need(tiny_model, tmp_path):
    """Pins batches, which hold images of one size only."""
    sizes = [(128, 128), (64, 192), (64, 192), (64, 64)]
    images = [image(seed, *size) for seed, size in enumerate(sizes)]
    as_they_are = DeepSeekOCRVisionImageProcessor(do_resize=False)
    dataset = datasets.Dataset.from_dict({"image": images})
    features = compute(dataset, tiny_model, tmp_path, processor=as_they_are, batch_size=4, pages_per_file=4)
    expected = tiny_model.encode(images, image_processor=as_they_are)
    for tokens, others in zip(features["features"], expected, strict=True):
        torch.testing.assert_close(tokens, others, rtol=0, atol=1e-5)


def test_paths_threads_and_processors_change_nothing(tiny_model, tmp_path):
    """Pins columns of paths, preparing ahead, and processors that hold the image processor."""
    for seed in range(5):
        (tmp_path / f"{seed}.png").write_bytes(png(seed))
    paths = datasets.Dataset.from_dict({"image": [str(tmp_path / f"{seed}.png") for seed in range(5)]})
    processor = DeepSeekOCRVisionProcessor(IMAGE_PROCESSOR)
    expected = compute(pages(*range(5)), tiny_model, tmp_path / "a", batch_size=2)["features"]
    result = compute(paths, tiny_model, tmp_path / "b", batch_size=2, processor=processor, num_workers=2)["features"]
    assert all(map(torch.equal, result, expected))
    counted = Counted(tiny_model)
    compute(paths, tiny_model, tmp_path / "a", processor=processor)
    assert counted.since_asked() == 0


# What is computed again


def test_an_image_is_computed_once_and_a_changed_one_alone_again(tiny_model, tmp_path):
    """Pins keys by content: neither rows, nor names, nor other datasets make an image another one."""
    counted = Counted(tiny_model)
    compute(pages(0, 1, 2, 1, 0), tiny_model, tmp_path)
    assert counted.since_asked() == 3
    before = parts(tmp_path)
    result = compute(pages(2, 7, 0, 1), tiny_model, tmp_path)
    assert counted.since_asked() == 1
    assert before.items() <= parts(tmp_path).items()
    expected = tiny_model.encode([image(seed) for seed in (2, 7, 0, 1)], image_processor=IMAGE_PROCESSOR)
    assert all(map(torch.equal, result["features"], expected))


def test_a_change_of_weights_configuration_image_processor_or_dtype_computes_everything_again(tiny_model, tmp_path):
    """Pins what a key holds beside the image: any of these left out would give another encoder's tokens."""
    dataset = pages(0, 1)
    compute(dataset, tiny_model, tmp_path)
    trained = copy.deepcopy(tiny_model)
    with torch.no_grad():
        trained.sam_model.pos_embed[0, 0, 0, 0] += 1e-3
    configured = DeepSeekOCRVisionModel(tiny_config())
    configured.load_state_dict(tiny_model.state_dict())
    configured.config.sam_config.window_size = 4
    changes = [
        (trained, {}),
        (configured, {}),
        (tiny_model, {"processor": DeepSeekOCRVisionImageProcessor("deepseek-ocr", size=128)}),
        (tiny_model, {"dtype": torch.float16}),
    ]
    for model, options in changes:
        counted = Counted(model)
        compute(dataset, model, tmp_path, **options)
        assert counted.since_asked() == 2
    assert len(list(tmp_path.iterdir())) == 1 + len(changes)
    counted = Counted(tiny_model)
    compute(dataset, tiny_model, tmp_path)
    assert counted.since_asked() == 0


def test_a_loaded_encoder_is_the_one_that_was_saved(tiny_model, tmp_path):
    """Pins the fingerprint against what transformers notes in a configuration: paths, versions, classes."""
    compute(pages(0), tiny_model, tmp_path / "features")
    tiny_model.save_pretrained(tmp_path / "encoder")
    IMAGE_PROCESSOR.save_pretrained(tmp_path / "encoder")
    loaded = DeepSeekOCRVisionModel.from_pretrained(tmp_path / "encoder")
    image_processor = DeepSeekOCRVisionImageProcessor.from_pretrained(tmp_path / "encoder")
    counted = Counted(loaded)
    compute(pages(0), loaded, tmp_path / "features", processor=image_processor)
    assert counted.since_asked() == 0


# Interruptions


def in_a_child(run: Callable[[], None]) -> int:
    """Start a process that has all that this one has; it ends with 0 if `run` returns."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        run()
        code = 0
    finally:
        os._exit(code)


def killed_at(number: int, model: DeepSeekOCRVisionModel, run: Callable[[], None]) -> None:
    """Run up to the given one of its renames, syncs of files and images, and no further."""
    left = [number]

    def count(*_args) -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def counting(call: Callable) -> Callable:
        def counted(*args):
            count()
            return call(*args)

        return counted

    os.replace, os.fsync = counting(os.replace), counting(os.fsync)
    model.register_forward_pre_hook(count)
    run()


def leftovers(cache: Path) -> list[Path]:
    return [path for path in cache.rglob("*") if path.name.startswith(PREFIX)]


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked")
def test_killed_at_any_point_it_goes_on_and_two_processes_store_nothing_twice(tiny_model, tmp_path):
    """Pins SIGKILL at every rename, sync of a file and image. In the end there are the tokens of a run that was
    never killed, each once, nothing is left over, and no dead process holds a lock. So it is with two processes at
    the same time.
    """
    dataset, killed, shared = pages(*range(4)), tmp_path / "killed", tmp_path / "shared"
    compute(dataset, tiny_model, tmp_path / "whole")
    expected = tokens_by_id(tmp_path / "whole")
    codes, saw_leftovers = [], False
    while not codes or codes[-1] != 0:
        point = len(codes) + 1
        child = in_a_child(lambda at=point: killed_at(at, tiny_model, lambda: compute(dataset, tiny_model, killed)))
        codes.append(os.waitpid(child, 0)[1])
        saw_leftovers |= bool(leftovers(killed))
    assert tokens_by_id(killed) == expected
    assert not leftovers(killed)
    assert saw_leftovers
    assert len(codes) > 5
    assert codes[:-1] == [signal.SIGKILL] * (len(codes) - 1)
    children = [in_a_child(lambda: compute(dataset, tiny_model, shared)["features"]) for _ in range(2)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert tokens_by_id(shared) == expected
    assert not leftovers(shared)


def test_a_full_disk_leaves_what_was_finished(tiny_model, tmp_path):
    """Pins an error that says so, and a store that goes on when there is room again."""
    counted = Counted(tiny_model)
    compute(pages(0, 1), tiny_model, tmp_path)
    before = parts(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            compute(pages(0, 1, 2, 3), tiny_model, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert parts(tmp_path) == before
    assert not list(tmp_path.rglob(".*"))
    counted.since_asked()
    assert len(compute(pages(0, 1, 2, 3), tiny_model, tmp_path)) == 4
    assert counted.since_asked() == 2


def test_what_a_killed_process_began_to_write_goes_and_what_another_writes_stays(tiny_model, tmp_path):
    """Pins leftovers of work that never comes again, as after a change of the dataset."""
    compute(pages(0), tiny_model, tmp_path)
    (folder,) = tmp_path.iterdir()
    dead = folder / f"{PREFIX}dead"
    dead.mkdir()
    (dead / "part-0.parquet").touch()
    with staging_folder(folder) as alive:
        compute(pages(0), tiny_model, tmp_path)
        assert list(folder.glob(".*")) == [alive]


def test_a_damaged_file_is_named(tiny_model, tmp_path):
    """Pins a file cut off by other means, whose rows must not pass for stored."""
    compute(pages(0, 1), tiny_model, tmp_path)
    (path,) = tmp_path.rglob("*.parquet")
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ValueError, match=f"{path.name} is damaged"):
        compute(pages(0, 1), tiny_model, tmp_path)


# Mistakes


def broken_pages() -> datasets.Dataset:
    cells = [{"bytes": data, "path": None} for data in (png(0), b"no image", png(1)[:200], png(2))]
    cells.append({"bytes": None, "path": "/missing.png"})
    columns = datasets.Features(image=datasets.Image(), number=datasets.Value("int64"))
    return datasets.Dataset.from_dict({"image": cells, "number": range(5)}, columns)


@pytest.mark.parametrize(("row", "words"), [(1, "cannot identify"), (2, "truncated"), (4, "No such file")])
def test_a_bad_image_is_an_error_with_its_row(tiny_model, tmp_path, row, words):
    """Pins errors by which the image is found again."""
    with pytest.raises(OSError, match=rf"Row 1, column 'image': .*{words}"):
        compute(broken_pages().select([0, row]), tiny_model, tmp_path)


def test_a_file_that_changes_while_features_are_computed_is_an_error(tiny_model, tmp_path):
    """Pins tokens stored under the key of another image."""
    paths = [tmp_path / f"{row}.png" for row in range(3)]
    for seed, path in enumerate(paths):
        path.write_bytes(png(seed))
    tiny_model.register_forward_hook(lambda *_: paths[2].write_bytes(png(7)) and None)
    with pytest.raises(ValueError, match=r"Row 2.*changed"):
        compute(datasets.Dataset.from_dict({"image": [str(path) for path in paths]}), tiny_model, tmp_path / "cache")


def test_bad_images_are_left_out_on_request_and_named(tiny_model, tmp_path, caplog):
    """Pins rows that move up: each keeps its own tokens."""
    result = compute(broken_pages(), tiny_model, tmp_path, on_bad_image="skip")
    assert result["number"][:] == [0, 3]
    expected = tiny_model.encode([image(0), image(2)], image_processor=IMAGE_PROCESSOR)
    assert all(map(torch.equal, result["features"], expected))
    assert "rows of 3 images" in caplog.text
    assert all(f"Row {row}, column 'image': " in caplog.text for row in (1, 2, 4))


def test_tokens_that_the_dtype_cannot_hold_are_an_error(tiny_model, tmp_path):
    """Pins infinities that would be trained on for good."""
    with torch.no_grad():
        tiny_model.vision_model.embeddings.position_embedding.weight.fill_(1.0)
        tiny_model.sam_model.net_3.weight.mul_(1e7)
    with pytest.raises(ValueError, match=r"Row 0.*not finite in torch.float16"):
        compute(pages(0), tiny_model, tmp_path, dtype=torch.float16)


WRONG = {
    "dtype": (ValueError, {"dtype": torch.int8}),
    "batch_size": (ValueError, {"batch_size": 0}),
    "pages_per_file": (TypeError, {"pages_per_file": 1.5}),
    "num_workers": (ValueError, {"num_workers": -1}),
    "on_bad_image": (ValueError, {"on_bad_image": "ignore"}),
    "image_column": (ValueError, {"image_column": "scan"}),
    "features_column": (ValueError, {"features_column": "number"}),
    "processor": (TypeError, {"processor": "deepseek-ocr"}),
    "model": (TypeError, {"model": nn.Linear(1, 1)}),
    "dataset": (TypeError, {"dataset": [{"image": None}]}),
    "number": (TypeError, {"image_column": "number"}),
    "transform": (ValueError, {"dataset": pages(0).with_transform(dict)}),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_named(tiny_model, tmp_path, name):
    """Pins errors before anything is computed or written."""
    kind, wrong = WRONG[name]
    arguments = {"dataset": pages(0), "model": tiny_model} | wrong
    with pytest.raises(kind, match=name):
        compute(cache_dir=tmp_path / "features", **arguments)
    assert not (tmp_path / "features").exists()


# Training


@pytest.fixture
def llava() -> LlavaForConditionalGeneration:
    """A LLaVA with a frozen encoder."""
    text_config = LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=300,
        pad_token_id=0,
    )
    config = LlavaConfig(
        vision_config=tiny_config(),
        text_config=text_config,
        image_token_index=2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.freeze()
    return model


@pytest.fixture
def processor() -> LlavaProcessor:
    return LlavaProcessor(IMAGE_PROCESSOR, byte_tokenizer(), patch_size=64, vision_feature_select_strategy="full")


def samples() -> datasets.Dataset:
    """Rows with two images, one and none."""
    counts = [2, 1, 0, 0, 1, 2, 1, 0]
    images = [[{"bytes": png(10 * row + index), "path": None} for index in range(n)] for row, n in enumerate(counts)]
    texts = [f"a{'<image>b' * number}{'c' * row}" for row, number in enumerate(counts)]
    columns = datasets.Features(images=datasets.List(datasets.Image()), text=datasets.Value("string"))
    return datasets.Dataset.from_dict({"images": images, "text": texts}, columns)


def train(model: nn.Module, dataset: datasets.Dataset, collator: ImageTextCollator, output_dir: Path) -> list[float]:
    """Train for six steps and give the losses."""
    arguments = Arguments(
        str(output_dir),
        max_steps=6,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=3,
        report_to="none",
        remove_unused_columns=False,
        disable_tqdm=True,
        use_cpu=True,
        seed=1,
    )
    trainer = Trainer(model, arguments, data_collator=collator, train_dataset=dataset)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_losses_are_those_of_training_with_images_and_checkpoints_are_whole(llava, processor, tmp_path):
    """Pins that nothing but the time of a step is different, and that what `Trainer` saves has the encoder in it."""
    other = copy.deepcopy(llava)
    expected = train(other, samples(), ImageTextCollator(processor), tmp_path / "images")
    stored = compute(samples(), llava.model.vision_tower, tmp_path, processor=processor, image_column="images")
    stored = stored.remove_columns("images")
    counted = Counted(llava.model.vision_tower)
    with precomputed_features(llava, stored):
        losses = train(llava, stored, FeatureCollator(processor), tmp_path / "features")
    assert losses == pytest.approx(expected, abs=1e-6)
    assert max(expected) - min(expected) > 0.1
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path / "features" / "checkpoint-6")
    for model in (llava, loaded):
        for (name, tensor), reference in zip(model.named_parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(tensor, reference, rtol=0, atol=1e-5, msg=name)
    assert counted.since_asked() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_composite_takes_images_and_features_alike(llava, processor, tmp_path, dtype):
    """Pins evaluation with images beside training with features, generation, and what comes after."""
    tower = llava.eval().model.vision_tower
    stored = compute(samples(), tower, tmp_path, image_column="images", dtype=dtype)
    images = ImageTextCollator(processor)([samples()[row] for row in range(3)])
    features = FeatureCollator(processor)([stored[row] for row in range(3)])
    assert features.keys() == images.keys()
    assert features["pixel_values"].shape == (3, 4, 32)
    assert all(torch.equal(features[name], images[name]) for name in ("input_ids", "attention_mask", "labels"))
    expected = llava(**images).logits
    with precomputed_features(llava, stored) as inside:
        assert inside is llava
        with precomputed_features(llava, stored):
            assert torch.equal(llava(**images).logits, expected)
        tolerance = 1e-6 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(llava(**features).logits, expected, rtol=0, atol=tolerance)
        del features["labels"]
        assert llava.generate(**features, max_new_tokens=3, do_sample=False).shape[1] == expected.shape[1] + 3
        outputs = tower(features["pixel_values"])
        assert torch.equal(outputs.pooler_output, outputs.last_hidden_state.mean(dim=1))
        assert outputs.hidden_states[-1] is outputs.last_hidden_state
        assert len(tower(features["pixel_values"], return_dict=False)) == 3
    assert "forward" not in vars(tower)
    assert torch.equal(llava(**images).logits, expected)
    with pytest.raises(ValueError, match="pixel_values"):
        tower(features["pixel_values"])


def test_images_of_several_numbers_of_tokens_share_a_batch(llava, processor, tmp_path):
    """Pins pages of several sizes, which LLaVA cannot take in one batch as images."""
    llava.eval()
    rows = [{"image": image(0, 128, 128), "text": "<image>a"}, {"image": image(1, 64, 192), "text": "<image>a"}]
    as_they_are = DeepSeekOCRVisionImageProcessor(do_resize=False)
    stored = compute(datasets.Dataset.from_list(rows), llava.model.vision_tower, tmp_path, processor=as_they_are)
    processor.image_processor = as_they_are
    batch = FeatureCollator(processor, padding_side="right")(list(stored))
    assert batch["pixel_values"].shape == (1, 4 + 3, 32)
    with precomputed_features(llava, stored):
        logits = llava(**batch).logits
    for row, expected_logits in zip(rows, logits, strict=True):
        alone = llava(**ImageTextCollator(processor)([row])).logits[0]
        torch.testing.assert_close(expected_logits[: len(alone)], alone, rtol=0, atol=1e-5)


def test_a_batch_without_images_still_touches_the_projector(llava, processor, tmp_path):
    """Pins processes that train together, where one has a batch without images."""
    stored = compute(samples(), llava.model.vision_tower, tmp_path, image_column="images")
    batch = FeatureCollator(processor)([stored[2], stored[3]])
    with precomputed_features(llava, stored):
        llava(**batch).loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in llava.model.multi_modal_projector.parameters())


def test_what_would_train_on_wrong_features_is_refused(llava, tmp_path):
    """Pins every way in which stored features are not those of the encoder in the model."""
    tower = llava.model.vision_tower
    stored = compute(pages(0), tower, tmp_path)

    def refused(kind, words, model, *pages) -> None:
        with pytest.raises(kind, match=words), precomputed_features(model, *pages):
            raise AssertionError("it was not refused")

    refused(TypeError, "Give the datasets", llava)
    refused(TypeError, "Dataset 1.*lost its", llava, stored, stored.with_format("torch"))
    refused(ValueError, "has none", llava.model.language_model, stored)
    refused(ValueError, "2 of them, at ", nn.ModuleList([llava, copy.deepcopy(llava)]), stored)
    tower.unfreeze("clip.layers.1")
    refused(ValueError, "freeze", llava, stored)
    tower.freeze()
    llava.config.vision_feature_layer = -2
    refused(ValueError, "vision_feature_layer.* is -2", llava, stored)
    llava.config.vision_feature_layer = -1
    with torch.no_grad():
        tower.sam_model.pos_embed += 1
    refused(ValueError, "Dataset 0 has features of another encoder", llava, stored)


def test_features_of_a_wrong_kind_are_errors(llava, processor, tmp_path):
    """Pins ids that pass for tokens where the transform is lost, and tokens of another width."""
    stored = compute(pages(0), llava.model.vision_tower, tmp_path)
    collate = FeatureCollator(processor)
    with pytest.raises(ValueError, match="Sample 0 of the batch has no 'features'"):
        collate([{"text": "<image>a"}])
    with pytest.raises(TypeError, match=r"Sample 0 of the batch has a str under 'features'.*transform"):
        collate([stored.with_format(None)[0] | {"text": "<image>a"}])
    with precomputed_features(llava, stored):
        with pytest.raises(ValueError, match=r"\[images, tokens, 32\], got torch.float32 \[1, 4, 16\]"):
            llava.model.vision_tower(torch.zeros(1, 4, 16))
        with pytest.raises(ValueError, match="output_attentions"):
            llava.model.vision_tower(torch.zeros(1, 4, 32), output_attentions=True)


def test_datasets_of_one_table_can_be_joined(tiny_model, tmp_path):
    """Pins ids in place of tokens after `concatenate_datasets`, and the advice for a transform that is lost."""
    first, second = compute(pages(0), tiny_model, tmp_path), compute(pages(1, 2), tiny_model, tmp_path)
    joined = datasets.concatenate_datasets([first, second])
    expected = tiny_model.encode([image(seed) for seed in range(3)], image_processor=IMAGE_PROCESSOR)
    assert all(torch.equal(row["features"], each) for row, each in zip(joined, expected, strict=True))
    again = compute(joined.with_format(None).remove_columns("features"), tiny_model, tmp_path)
    assert torch.equal(again[2]["features"], expected[2])


def test_a_composite_trains_on_pages_in_tiles(llava, processor, tmp_path):
    """Pins inputs beside `pixel_values`, images with different numbers of tiles, and a LLaVA, which can be given no
    tiles of an image but can be given their tokens.
    """
    processor.image_processor = DeepSeekOCRVisionImageProcessor("deepseek-ocr", mode="gundam")
    images = [image(0, 700, 1300), image(1, 300, 300)]
    rows = [{"image": each, "text": "<image>a"} for each in images]
    tower = llava.model.vision_tower
    stored = compute(datasets.Dataset.from_list(rows), tower, tmp_path, processor=processor, batch_size=2)
    expected = tower.encode(images, image_processor=processor.image_processor)
    assert [len(tokens) for tokens in expected] == [2 * 100 + 256, 256]
    assert all(map(torch.equal, stored["features"], expected))
    batch = FeatureCollator(processor)(list(stored))
    with precomputed_features(llava, stored):
        assert llava(**batch).loss.isfinite()
