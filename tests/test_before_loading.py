"""What is checked before transformers loads a checkpoint: by one rule for every way in, and before memory is taken."""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from fuzz_checkpoints import dump, join, split
from helpers import assert_same_weights, released_tensors, run_python, tiny_config, write_checkpoint
from hub_server import HubServer
from transformers import AutoModel

from deepseek_ocr_vision import (
    DeepSeekOCRVisionConfig,
    DeepSeekOCRVisionImageProcessor,
    DeepSeekOCRVisionModel,
    load_encoder,
)
from deepseek_ocr_vision.__main__ import main
from deepseek_ocr_vision.composites import build_llava
from deepseek_ocr_vision.hub_upload import stage
from deepseek_ocr_vision.saving.checksums import write_checksums
from deepseek_ocr_vision.weights import check_checkpoint


REPO = "me/encoder"


@pytest.fixture
def saved(tmp_path) -> Path:
    """An encoder in four files, with a variant of one file and a variant of many."""
    model = DeepSeekOCRVisionModel(tiny_config())
    model.save_pretrained(tmp_path / "saved", variant="one")
    model.save_pretrained(tmp_path / "saved", variant="many", max_shard_size="50KB")
    model.save_pretrained(tmp_path / "saved", max_shard_size="50KB")
    return tmp_path / "saved"


def change_header(path: Path, change) -> None:
    """Rewrite a file's header by a function that changes it in place."""
    header, data = split(path.read_bytes())
    change(header)
    path.write_bytes(join(dump(header), data))


def change_config(folder: Path, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


# Names


@pytest.mark.parametrize(
    ("index", "options"),
    [
        ("model.safetensors.index.json", {}),
        ("model.safetensors.index.many.json", {"variant": "many"}),
    ],
)
@pytest.mark.parametrize("subfolder", ["", "inner"])
def test_no_index_leads_out_of_the_folder(tmp_path, saved, index, options, subfolder):
    """Pins the index of a variant or a subfolder, which nothing looked at, and which transformers follows."""
    folder = saved / subfolder
    if subfolder:
        shutil.copytree(saved, folder)
    name = next(iter(json.loads((folder / index).read_text())["weight_map"].values()))
    (folder / name).rename(tmp_path / "outside.safetensors")
    (folder / index).write_text((folder / index).read_text().replace(name, "../outside.safetensors"))
    with pytest.raises(ValueError, match="no safetensors file in the same folder; refused"):
        AutoModel.from_pretrained(saved, subfolder=subfolder, **options)


@pytest.mark.parametrize("name", ["../outside.safetensors", "inner/x.safetensors", "x.bin", 3, ".hidden.safetensors"])
def test_no_configuration_names_weights_elsewhere(saved, name):
    """Pins `transformers_weights`, by which a configuration tells what is loaded."""
    change_config(saved, lambda config: config.update(transformers_weights=name))
    with pytest.raises(ValueError, match=r"names .* as `transformers_weights`"):
        AutoModel.from_pretrained(saved)


def test_every_variant_is_checked_as_the_weights_are(saved):
    """Pins a damaged variant, which ended in an error of the library without a path."""
    assert AutoModel.from_pretrained(saved, variant="one")
    (saved / "model.one.safetensors").write_bytes(b"<html>")
    shard = sorted(saved.glob("model.many-*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"model\.one\.safetensors is no safetensors file. It looks like an HTML"):
        AutoModel.from_pretrained(saved, variant="one")
    with pytest.raises(ValueError, match=rf"{shard} is cut: .* fetch it again"):
        AutoModel.from_pretrained(saved, variant="many")


# Sizes and dtypes


@pytest.mark.parametrize("stated", ["own", "released"])
def test_sizes_that_do_not_match_the_file_are_refused_before_memory_is_taken(tmp_path, stated):
    """Pins gigabytes that were allocated, and a million layers that were built, before shapes were compared."""
    model = DeepSeekOCRVisionModel(tiny_config(feature_mode="projected"))
    model.save_pretrained(tmp_path / "own")
    write_checkpoint(tmp_path / "released", released_tensors(model), model.config)
    stages = {"own": ("sam_config", "clip_config"), "released": ("sam_config", "encoder_config")}[stated]
    changes = [(stages[1], {"intermediate_size": 50_000_000}), (stages[1], {"num_hidden_layers": 10**6})]
    changes += [
        (stages[0], {"num_hidden_layers": 10**6}),
        (stages[0], {"mlp_dim": 10**15}),
        (None, {"num_channels": 10**9}),
    ]
    changes += [(stages[1], {"grid_size": 20_000, "image_size": 20_000 * 14})]
    if stated == "released":
        changes.remove((None, {"num_channels": 10**9}))
    output = run_python(f"""
        import json, resource, time
        from pathlib import Path
        from deepseek_ocr_vision import DeepSeekOCRVisionModel
        folder, changes = Path({os.fspath(tmp_path / stated)!r}), {changes!r}
        sound = (folder / "config.json").read_text()
        load = DeepSeekOCRVisionModel.{"from_pretrained" if stated == "own" else "from_deepseek_ocr"}
        load(folder)
        for stage, fields in changes:
            config = json.loads(sound)
            parts = config if stage is None else (config.get("vision_config") or config)[stage]
            parts.update(fields)
            (folder / "config.json").write_text(json.dumps(config))
            memory, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
            try:
                load(folder)
            except ValueError as error:
                taken = time.process_time() - started
                memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
                print(stage, taken < 1, memory < 100_000, len(str(error)) < 2000)
    """)
    assert [line.split()[1:] for line in output.splitlines()] == [["True"] * 3] * len(changes)


@pytest.mark.parametrize("changes", [{"intermediate_size": 50_000_000}, {"num_hidden_layers": 10**6}])
def test_sizes_of_a_quantised_checkpoint_are_compared_by_what_is_not_quantised(saved, changes):
    """Pins a `quantization_config` in a file, with which no size at all was looked at."""
    quantised = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
    change_config(saved, lambda config: config.update(quantised))
    change_config(saved, lambda config: config["clip_config"].update(changes))
    with pytest.raises(ValueError, match=r"fc1\.bias \(found \[64\], expected \[50000000\]\)|have 2 layers"):
        AutoModel.from_pretrained(saved)


def test_an_adapter_is_not_taken_for_the_model_that_it_names(saved, tmp_path):
    """Pins weights of another place than the one that was named and checked."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    adapted = peft.get_peft_model(AutoModel.from_pretrained(saved), peft.LoraConfig(target_modules=["qkv_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"adapter holds an adapter\. `AutoModel"):
        DeepSeekOCRVisionModel.from_pretrained(tmp_path / "adapter")
    try:
        loaded = AutoModel.from_pretrained(tmp_path / "adapter")
    except ValueError as error:
        if "lora_A" not in str(error):
            raise
        pytest.skip("transformers 5.0 newly initialises the weights of any model's adapter, which is an error here")
    assert any("lora" in name for name, _ in loaded.named_parameters())
    assert loaded.default_image_processor().size == AutoModel.from_pretrained(saved).default_image_processor().size
    shard = sorted(saved.glob("model-*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes().replace(b'"F32"', b'"I32"'))
    with pytest.raises(ValueError, match="has dtype I32"):
        AutoModel.from_pretrained(tmp_path / "adapter")


@pytest.mark.parametrize("dtype", ["I32", "U32"])
def test_whole_numbers_are_no_weights(saved, dtype):
    """Pins bits that mean -0.1 and are loaded as -1110279296.0."""

    def change(header):
        for name, entry in header.items():
            if name != "__metadata__":
                entry["dtype"] = dtype

    change_header(saved / "model.one.safetensors", change)
    for strict in (True, False):
        with pytest.raises(ValueError, match=rf"model\.one\.safetensors: .* has dtype {dtype}; weights have F64, F32"):
            AutoModel.from_pretrained(saved, variant="one", strict=strict)


# The Hub


def test_what_the_hub_gives_is_checked_in_the_cache(tmp_path):
    """Pins `SafetensorError` without path or advice, from a Hub id; and an index in a repository that leads out."""
    model = DeepSeekOCRVisionModel(tiny_config())
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="50KB")
    files = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    shards = {path.name: path.read_bytes() for path in (tmp_path / "many").iterdir()}
    weights = files["model.safetensors"]
    shard = sorted(name for name in shards if name.endswith(".safetensors"))[-1]
    index = shards["model.safetensors.index.json"]
    repositories = {
        "me/sound": files,
        "me/shards": shards,
        "me/cut": files | {"model.safetensors": weights[:-100]},
        "me/html": files | {"model.safetensors": b"<!DOCTYPE html><html></html>"},
        "me/lost": {name: data for name, data in files.items() if name != "model.safetensors"},
        "me/cut-shard": shards | {shard: shards[shard][:-1]},
        "me/outside": shards | {"model.safetensors.index.json": index.replace(shard.encode(), b"../x.safetensors")},
    }
    with HubServer() as hub:
        for name, contents in repositories.items():
            hub.add_repository(name, contents)
        output = run_python(
            f"""
            from deepseek_ocr_vision import DeepSeekOCRVisionModel, load_encoder
            from deepseek_ocr_vision.__main__ import main
            for name in {list(repositories)!r}:
                try:
                    print(name, DeepSeekOCRVisionModel.from_pretrained(name).num_parameters())
                except Exception as error:
                    print(name, type(error).__name__, str(error).replace("\\n", " "))
            arguments = ["encode", "page.png", "--model", "me/cut", "--out", {str(tmp_path / "tokens")!r}]
            print("exit code", main(arguments))
            """,
            **hub.environment(tmp_path / "home"),
        )
    lines = dict(line.split(" ", 1) for line in output.splitlines())
    assert lines["me/sound"] == lines["me/shards"] == str(model.num_parameters())
    assert "model.safetensors is cut:" in lines["me/cut"]
    assert "It looks like an HTML" in lines["me/html"]
    assert lines["me/lost"].startswith("OSError me/lost: ")
    assert f"{shard} is cut:" in lines["me/cut-shard"]
    assert "no safetensors file in the same folder; refused" in lines["me/outside"]
    assert all(line.startswith("ValueError") for name, line in lines.items() if name in ("me/cut", "me/html"))
    assert lines["exit"] == "code 1"


# A whole checkpoint in place of the encoder's


def test_a_whole_checkpoint_is_called_that(tmp_path):
    """Pins a wrong `model_type` or a wrong width, where what is wrong is the kind of checkpoint."""
    model = DeepSeekOCRVisionModel(tiny_config(feature_mode="projected"))
    released = write_checkpoint(tmp_path / "released", released_tensors(model), model.config)
    (tmp_path / "llava").mkdir()
    llava = {"model_type": "llava", "vision_config": model.config.to_dict(), "text_config": {"model_type": "llama"}}
    (tmp_path / "llava" / "config.json").write_text(json.dumps(llava))
    (tmp_path / "other").mkdir()
    other = llava | {"vision_config": {"model_type": "clip_vision_model"}}
    (tmp_path / "other" / "config.json").write_text(json.dumps(other))
    for folder in (released, tmp_path / "llava", tmp_path / "other"):
        with pytest.raises(ValueError, match=r"is a whole checkpoint .*from_deepseek_ocr.*extract"):
            DeepSeekOCRVisionModel.from_pretrained(folder)
    # Of a LLaVA around this encoder the configuration gives its tower's, as with every model of transformers.
    assert DeepSeekOCRVisionConfig.from_pretrained(tmp_path / "llava").to_dict() == model.config.to_dict()
    for folder in (released, tmp_path / "other"):
        with pytest.raises(ValueError, match=r"is a whole checkpoint .*from_deepseek_ocr.*extract"):
            DeepSeekOCRVisionConfig.from_pretrained(folder)


# Verifying


def test_verify_means_that_it_loads_and_gives_finite_tokens(tmp_path):
    """Pins "all there and finite" of files that nothing can load, and a refusal of an encoder of grey images."""
    grey = DeepSeekOCRVisionModel(tiny_config(num_channels=1))
    grey.save_pretrained(tmp_path / "grey")
    assert "all there and finite" in check_checkpoint(tmp_path / "grey")
    weights = tmp_path / "grey" / "model.safetensors"
    sound = weights.read_bytes()
    header, data = split(sound)
    for damaged in (
        join(b"\xef\xbb\xbf" + dump(header), data),
        join(dump(header).decode().encode("utf-16"), data),
        join(dump(header | {"__metadata__": {"format": 3}}), data),
    ):
        weights.write_bytes(damaged)
        with pytest.raises(ValueError, match=str(weights)):
            check_checkpoint(tmp_path / "grey")
    weights.write_bytes(sound)
    change_config(tmp_path / "grey", lambda config: config["clip_config"].update(hidden_act="none"))
    with pytest.raises(ValueError, match="hidden_act"):
        check_checkpoint(tmp_path / "grey")
    grey.sam_model.neck[1].weight.data.fill_(3e38)
    grey.save_pretrained(tmp_path / "large")
    with pytest.raises(ValueError, match="tokens of a page are not finite"):
        check_checkpoint(tmp_path / "large")


# Checksums


def test_a_flipped_byte_is_found_before_anything_is_derived(tmp_path):
    """Pins corruption that gets new checksums, or none: extract, write-back and stage wrote sums of the damaged file,
    `export` and `build_llava` files without any.
    """
    model = DeepSeekOCRVisionModel(tiny_config(feature_mode="projected"))
    released = write_checkpoint(tmp_path / "released", released_tensors(model), model.config)
    assert main(["extract", str(released), str(tmp_path / "encoder")]) == 0
    with pytest.raises(FileNotFoundError, match="SHA256SUMS"):
        DeepSeekOCRVisionModel.from_deepseek_ocr(released, verify_checksums=True)
    write_checksums(released)
    assert DeepSeekOCRVisionModel.from_deepseek_ocr(released, verify_checksums=True)
    for folder in (released, tmp_path / "encoder"):
        (path,) = folder.glob("*.safetensors")
        contents = bytearray(path.read_bytes())
        contents[-1] ^= 1
        path.write_bytes(contents)
    weights = next(released.glob("*.safetensors"))
    encoder, out = str(tmp_path / "encoder"), tmp_path / "out"
    for source in (released, weights):
        with pytest.raises(ValueError, match="is not what SHA256SUMS says"):
            DeepSeekOCRVisionModel.from_deepseek_ocr(source, verify_checksums=True)
        with pytest.raises(ValueError, match="is not what SHA256SUMS says"):
            model.write_deepseek_ocr(source, out)
        assert main(["extract", str(source), str(out)]) == 1
    assert main(["write-back", encoder, str(released), str(out)]) == 1
    assert main(["export", encoder, "--format", "pt2", "--out", str(out)]) == 1
    for derive in (lambda: stage(encoder, out, repo_id=REPO), lambda: build_llava(encoder=encoder)):
        with pytest.raises(ValueError, match="is not what SHA256SUMS says"):
            derive()
    assert not out.exists()


# The image processor


def test_the_image_processor_comes_from_where_the_model_came_from(tmp_path):
    """Pins a checkpoint in a subfolder, encoded with another preprocessing than the saved one, in silence."""
    model = DeepSeekOCRVisionModel(tiny_config())
    for folder, size in (("outer", 192), ("outer/inner", 256)):
        model.save_pretrained(tmp_path / folder)
        DeepSeekOCRVisionImageProcessor(size=size).save_pretrained(tmp_path / folder)
    inner = AutoModel.from_pretrained(tmp_path / "outer", subfolder="inner")
    assert inner.default_image_processor().size["width"] == 256
    assert AutoModel.from_pretrained(tmp_path / "outer").default_image_processor().size["width"] == 192
    _, image_processor = load_encoder(tmp_path / "outer")
    assert image_processor.size["width"] == 192


def test_no_image_processor_is_loaded_from_a_place_that_a_configuration_names(tmp_path):
    """Pins a tower inside a composite whose configuration names somebody's repository: its code was run."""
    DeepSeekOCRVisionImageProcessor(size=256).save_pretrained(tmp_path / "elsewhere")
    config = tiny_config()
    config.name_or_path = str(tmp_path / "elsewhere")
    tower = AutoModel.from_config(config)
    assert tower.default_image_processor().size["width"] == 128


def test_on_the_hub_it_is_of_the_same_commit_and_the_token_is_not_kept(tmp_path):
    """Pins a branch that moves on between loading and encoding, and a secret in a pickled model."""
    model = DeepSeekOCRVisionModel(tiny_config())
    model.save_pretrained(tmp_path / "one")
    DeepSeekOCRVisionImageProcessor(size=192).save_pretrained(tmp_path / "one")
    DeepSeekOCRVisionImageProcessor(size=256).save_pretrained(tmp_path / "two")
    first = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    later = first | {"preprocessor_config.json": (tmp_path / "two" / "preprocessor_config.json").read_bytes()}
    with HubServer(token="hf_test_token") as hub:
        hub.add_repository(REPO, first, private=True)
        (tmp_path / "go").mkdir()
        code = f"""
            import pickle, sys, time, copy
            from pathlib import Path
            from deepseek_ocr_vision import DeepSeekOCRVisionModel
            model = DeepSeekOCRVisionModel.from_pretrained({REPO!r}, token="hf_test_token")
            Path({str(tmp_path / "go" / "loaded")!r}).touch()
            while not Path({str(tmp_path / "go" / "pushed")!r}).exists():
                time.sleep(0.01)
            print(model.default_image_processor().size["width"])
            print("hf_test_token" in repr(vars(model)) or b"hf_test_token" in pickle.dumps(model._origin))
            print(copy.deepcopy(model)._origin["revision"] == model._origin["revision"])
        """
        with ThreadPoolExecutor(1) as pool:
            job = pool.submit(run_python, code, **hub.environment(tmp_path / "home"))
            while not (tmp_path / "go" / "loaded").exists() and not job.done():
                pass
            commits = hub.repositories[REPO].commits
            hub.add_repository(REPO, later, private=True)
            hub.repositories[REPO].commits |= commits
            (tmp_path / "go" / "pushed").touch()
            output = job.result()
    assert output.split() == ["192", "False", "True"]


def test_a_checkpoint_that_was_loaded_and_saved_is_the_same(saved):
    """Pins that the checks in front change nothing about a sound checkpoint, in any of its forms."""
    models = [AutoModel.from_pretrained(saved, variant=variant) for variant in (None, "one", "many")]
    assert_same_weights(models[1], models[0])
    assert_same_weights(models[2], models[0])
    half = AutoModel.from_pretrained(saved, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16


# One way to load


def test_an_encoder_and_its_image_processor_come_from_a_checkpoint_of_any_kind(tmp_path):
    """Pins commands that took a released checkpoint or not, each by a way of its own."""
    model = DeepSeekOCRVisionModel(tiny_config(feature_mode="projected"))
    released = write_checkpoint(tmp_path / "released", released_tensors(model), model.config)
    model.save_pretrained(tmp_path / "own")
    DeepSeekOCRVisionImageProcessor("deepseek-ocr-encoder", size=192).save_pretrained(tmp_path / "own")
    concat = DeepSeekOCRVisionModel(tiny_config(feature_mode="concat"))
    tensors = {f"model.vision_tower.{name}": weight for name, weight in concat.state_dict().items()}
    llava = write_checkpoint(tmp_path / "llava", tensors, concat.config)
    (llava / "config.json").write_text(json.dumps({"model_type": "llava", "vision_config": concat.config.to_dict()}))
    DeepSeekOCRVisionImageProcessor("deepseek-ocr", size=256).save_pretrained(llava)
    for source, options, expected in (
        (tmp_path / "own", {}, ("projected", "deepseek-ocr-encoder", 192)),
        (tmp_path / "own", {"preset": "deepseek-ocr", "feature_mode": "concat"}, ("concat", "deepseek-ocr", 128)),
        (released, {}, ("residual", "deepseek-ocr-encoder", 128)),
        (released, {"preset": "deepseek-ocr"}, ("concat", "deepseek-ocr", 128)),
        (
            next(released.glob("*.safetensors")),
            {"feature_mode": "projected"},
            ("projected", "deepseek-ocr-encoder", 128),
        ),
        (llava, {}, ("concat", "deepseek-ocr", 256)),
    ):
        encoder, image_processor = load_encoder(source, **options)
        found = (encoder.config.feature_mode, image_processor.preset, image_processor.size["width"])
        assert found == expected
        assert not encoder.training


@pytest.mark.parametrize(
    ("field", "value"), [("dtype", "x"), ("dtype", 3), ("quantization_config", "x"), ("id2label", 3)]
)
def test_a_field_of_every_model_that_holds_something_else_is_named(saved, field, value):
    """Pins an `AttributeError` out of transformers that names no field."""
    change_config(saved, lambda config: config.update({field: value}))
    for load in (DeepSeekOCRVisionConfig.from_pretrained, AutoModel.from_pretrained):
        # transformers 5.0 has words of its own for some.
        with pytest.raises(ValueError, match=f"`{field}` is {value!r}|Argument {field} should be"):
            load(saved)
