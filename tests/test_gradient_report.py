"""`gradient_report`: every diagnosis by a model that really fails so."""

import math
from datetime import timedelta

import pytest
import torch
from helpers import ROOT, pixels, run_python, tiny_config
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from deepseek_ocr_vision import DeepSeekOCRVisionModel
from deepseek_ocr_vision.training.gradient_report import GradientReport, gradient_report


ENCODER = [f"sam.{name}" for name in ("patch_embed", "blocks.0", "blocks.1", "neck", "compressor")]
ENCODER += [f"clip.{name}" for name in ("embeddings", "layers.0", "layers.1")]
IMAGE_TOKEN = 31


class Reader(nn.Module):
    """An encoder and a head, registered against the order of the data."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.head = nn.Linear(32, 2, dtype=dtype)
        self.encoder = DeepSeekOCRVisionModel(tiny_config()).to(dtype)

    def forward(self, pixel_values: torch.Tensor, *, is_cut: bool = False) -> torch.Tensor:
        pooled = self.encoder(pixel_values).pooler_output
        return self.head(pooled.detach() if is_cut else pooled).square().mean()


@pytest.fixture
def reader() -> Reader:
    return Reader()


@pytest.fixture
def llava() -> LlavaForConditionalGeneration:
    text_config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=32, pad_token_id=0
    )
    config = LlavaConfig(
        vision_config=tiny_config(),
        text_config=text_config,
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )
    return LlavaForConditionalGeneration(config)


@pytest.fixture
def one_process():
    """A group of processes with this one alone in it."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def llava_inputs(labels: list[int] | None = None, *, has_image: bool = True) -> dict[str, torch.Tensor]:
    """A word, an image of 2 x 2 tokens, two words; by default every word is a label."""
    image = IMAGE_TOKEN if has_image else 3
    input_ids = torch.tensor([[1, *[image] * 4, 5, 6]])
    labels = torch.tensor([labels or [1, *[-100] * 4, 5, 6]])
    return {"input_ids": input_ids, "labels": labels} | ({"pixel_values": pixels(1)} if has_image else {})


def states(report: GradientReport) -> dict[str, str]:
    return {row.name: row.state for row in report.rows}


def only_problem(report: GradientReport) -> str:
    (problem,) = report.problems
    return problem


# Rows


def test_a_composite_that_trains_has_a_row_for_each_layer_group_in_the_order_of_the_data(llava):
    """Pins the names, their order, and that a healthy model is not accused of anything."""
    report = gradient_report(llava, llava(**llava_inputs()).loss)
    language_model = ("embed_tokens", "layers.0", "layers.1", "norm")
    assert [row.name for row in report.rows] == [
        *(f"model.vision_tower.{name}" for name in ENCODER),
        "model.multi_modal_projector",
        *(f"model.language_model.{name}" for name in language_model),
    ]
    assert [row.encoder for row in report.rows] == ["model.vision_tower"] * 8 + [None] * 5
    assert set(states(report).values()) == {"with gradient"}
    assert (report.problems, report.notes) == ([], [])
    assert str(report).endswith("No problems.")


def test_every_parameter_counts_once_tied_ones_too(llava):
    """Pins the tied embedding, which is the language model's head as well, and norms that are those of PyTorch."""
    report = gradient_report(llava, llava(**llava_inputs()).loss)
    names = [name for row in report.rows for name in row.with_gradient]
    assert sorted(names) == sorted(name for name, _ in llava.named_parameters())
    total = torch.nn.utils.get_total_norm(parameter.grad for parameter in llava.parameters())
    assert math.hypot(*(row.norm for row in report.rows)) == pytest.approx(total.item(), rel=1e-5)


def test_an_encoder_comes_first_wherever_it_is_registered(reader):
    """Pins a head made before its encoder, by which a cut would be sought on the wrong side."""
    report = gradient_report(reader, reader(pixels()))
    assert [row.name for row in report.rows] == [*(f"encoder.{name}" for name in ENCODER), "head"]


@pytest.mark.parametrize("wrap", [lambda model: model, torch.compile, nn.parallel.DistributedDataParallel])
def test_wrappers_do_not_show(tiny_model, wrap, one_process):
    """Pins an encoder alone, and that neither DistributedDataParallel nor torch.compile hides it."""
    report = gradient_report(wrap(tiny_model), tiny_model(pixels()).last_hidden_state.mean())
    assert [row.name for row in report.rows] == ENCODER
    assert report.problems == []


def test_lora_adapters_are_in_the_groups_of_what_they_adapt(tiny_model):
    """Pins peft's wrappers, and that the zero gradient of A at the first step is no alarm."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = peft.get_peft_model(tiny_model, peft.LoraConfig(target_modules=["qkv", "qkv_proj"]))
    report = gradient_report(model, model(pixels()).last_hidden_state.mean())
    rows = {row.name: row for row in report.rows}
    assert list(rows) == ENCODER
    assert (len(rows["sam.blocks.0"].with_gradient), len(rows["sam.blocks.0"].zero)) == (1, 1)
    assert rows["sam.neck"].state == "frozen"
    assert report.problems == []
    assert "LoRA's A is zero as long as its B is" in report.notes[1]


def test_a_model_without_lists_of_layers_is_reported_module_by_module():
    """Pins models that are not ours: experts within a layer, an own parameter, plain modules."""
    layer = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])})
    model = nn.ModuleDict({"body": nn.ModuleDict({"layers": nn.ModuleList([layer])}), "head": nn.Linear(2, 2)})
    model.register_parameter("temperature", nn.Parameter(torch.ones(1)))
    assert [row.name for row in gradient_report(model).rows] == ["temperature", "body.layers.0", "head"]


# The backward pass


def test_the_report_backpropagates_a_loss_that_was_not(reader):
    """Pins that it takes the place of `backward()`: the gradients are there, and right, for the optimizer."""
    reader(pixels()).backward()
    expected = [parameter.grad.clone() for parameter in reader.parameters()]
    reader.zero_grad()
    gradient_report(reader, reader(pixels()))
    assert all(
        torch.equal(parameter.grad, grad) for parameter, grad in zip(reader.parameters(), expected, strict=True)
    )


def checkpointed(reader: Reader, *, use_reentrant: bool) -> torch.Tensor:
    return checkpoint(reader, pixels().requires_grad_(), use_reentrant=use_reentrant)


@pytest.mark.parametrize(
    "loss_of",
    [
        lambda reader: reader(pixels()),
        lambda reader: reader(pixels()).sum() * 2 + 1,
        lambda reader: checkpointed(reader, use_reentrant=False),
        lambda reader: checkpointed(reader, use_reentrant=True),
    ],
    ids=["plain", "scaled", "checkpoint", "reentrant checkpoint"],
)
def test_a_loss_that_was_backpropagated_is_left_alone(reader, loss_of):
    """Pins gradients that a second backward pass would double, or an error that it would raise."""
    loss = loss_of(reader)
    loss.backward()
    gradients = [parameter.grad.clone() for parameter in reader.parameters()]
    assert gradient_report(reader, loss).problems == []
    assert all(map(torch.equal, [parameter.grad for parameter in reader.parameters()], gradients))


def test_without_a_loss_the_gradients_that_there_are_count(reader):
    """Pins the call within a training loop whose loss is out of reach."""
    assert "call this between `loss.backward()` and `zero_grad()`" in only_problem(gradient_report(reader))
    reader(pixels()).backward()
    assert gradient_report(reader).problems == []


# The loss


def test_a_loss_without_a_way_back_is_told_by_what_made_it(reader):
    """Pins the error "element 0 of tensors does not require grad and does not have a grad_fn" and its false cures."""
    with torch.no_grad():
        loss = reader(pixels())
    assert "has no `grad_fn`, though 68 parameters are trainable" in only_problem(gradient_report(reader, loss))
    silenced = loss.clone().requires_grad_()
    assert "silences the error and trains nothing" in only_problem(gradient_report(reader, silenced))
    with torch.inference_mode():
        loss = reader(pixels())
    assert "`torch.inference_mode()`" in only_problem(gradient_report(reader, loss))


def test_reentrant_checkpointing_above_frozen_inputs_is_among_the_causes(reader):
    """Pins the commonest way to that error with LoRA: trained weights inside, but no input that needs a gradient."""
    loss = checkpoint(reader, pixels(), use_reentrant=True)
    with pytest.raises(RuntimeError, match="does not require grad and does not have a grad_fn"):
        loss.backward()
    assert "reentrant gradient checkpointing" in only_problem(gradient_report(reader, loss))


def test_a_loss_of_another_model_is_noticed(reader):
    """Pins a copy that is trained in the place of the model."""
    assert "of another model or of a copy" in only_problem(gradient_report(reader, Reader()(pixels())))


def test_everything_frozen_is_a_problem_and_the_cause_of_all_others(reader):
    """Pins one sentence, in place of one for each consequence."""
    reader.requires_grad_(False)
    report = gradient_report(reader, reader(pixels()))
    assert "Every parameter is frozen" in only_problem(report)
    assert report.notes == []


def test_a_frozen_encoder_is_no_problem(reader):
    """Pins the commonest use: what reads the tokens needs no gradient through the encoder."""
    reader.encoder.freeze()
    report = gradient_report(reader, reader(pixels()))
    assert report.problems == []
    assert report.notes == [
        "The encoder `encoder` is frozen. What reads its tokens trains without a gradient through it."
    ]


def test_frozen_groups_are_noted(reader):
    """Pins an encoder that is trained in part."""
    reader.encoder.freeze("sam.patch_embed", "sam.neck", "sam.compressor")
    (note,) = gradient_report(reader, reader(pixels())).notes
    assert note == "Frozen: `encoder.sam.patch_embed`, `encoder.sam.neck` and `encoder.sam.compressor`."


# Missing


def test_a_cut_behind_the_encoder_is_placed(reader):
    """Pins `detach` and `no_grad` between a trainable encoder and what reads its tokens."""
    report = gradient_report(reader, reader(pixels(), is_cut=True))
    assert [row.is_unreached for row in report.rows] == [True] * 8 + [False]
    problem = only_problem(report)
    assert "cut between `encoder.clip.layers.1` and `head`" in problem
    assert "or the batch has no images" in problem


def test_a_cut_within_the_encoder_is_placed(reader):
    """Pins the place, between two layers, and that the images are not suspected there."""
    reader.encoder.sam_model.blocks[1].register_forward_hook(lambda module, inputs, output: output.detach())
    problem = only_problem(gradient_report(reader, reader(pixels())))
    assert "`encoder.sam.patch_embed` to `encoder.sam.blocks.1` (3 groups) get no gradient" in problem
    assert "cut between `encoder.sam.blocks.1` and `encoder.sam.neck`" in problem
    assert "images" not in problem


def test_a_cut_is_placed_over_frozen_groups(reader):
    """Pins trained blocks in front of a frozen CLIP that somebody put under `no_grad`."""
    reader.encoder.freeze("sam.neck", "sam.compressor", "clip")
    reader.encoder.sam_model.neck.register_forward_hook(lambda module, inputs, output: output.detach())
    assert "between `encoder.sam.blocks.1` and `head`" in only_problem(gradient_report(reader, reader(pixels())))


def test_a_batch_without_images_is_told_from_a_cut(llava):
    """Pins text alone, which leaves the projector without a gradient, too."""
    problem = only_problem(gradient_report(llava, llava(**llava_inputs(has_image=False)).loss))
    assert "to `model.multi_modal_projector` (9 groups) get no gradient" in problem
    assert "the batch has no images" in problem
    assert "cut between" not in problem


def test_what_the_forward_pass_does_not_use_is_named(reader):
    """Pins a forgotten head, and single parameters, at which DistributedDataParallel stops."""
    reader.other_head = nn.Linear(32, 2)
    reader.head.register_parameter("scale", nn.Parameter(torch.ones(2)))
    unused_head, unused_scale = gradient_report(reader, reader(pixels())).problems
    assert unused_head == "`other_head` gets no gradient, though what comes before does: it had no part in the loss."
    assert "1 of 3 parameters of `head` have no gradient, `head.scale`" in unused_scale
    reader.encoder.vision_model.transformer.layers[0].forward = lambda hidden_states, **_: (hidden_states, None)
    skipped, *_ = gradient_report(reader, reader(pixels())).problems
    assert "`encoder.clip.layers.0` gets no gradient, though what comes before and after does" in skipped


# Zero


def test_a_batch_whose_labels_are_all_ignored_is_recognised(llava):
    """Pins a loss of NaN with gradients of zero, which an optimizer applies without a word."""
    report = gradient_report(llava, llava(**llava_inputs([-100] * 7)).loss)
    assert set(states(report).values()) == {"zero"}
    about_loss, about_gradients = report.problems
    assert "The loss is nan: the cross entropy of a batch in which every label is -100" in about_loss
    assert "Every gradient is zero" in about_gradients


def test_labels_in_front_of_the_image_leave_the_encoder_with_zeros(llava):
    """Pins causal attention: text cannot depend on an image that comes after it."""
    batch = llava_inputs()
    order = torch.tensor([0, 5, 6, 1, 2, 3, 4])
    batch |= {"input_ids": batch["input_ids"][:, order], "labels": batch["labels"][:, order]}
    problem = only_problem(gradient_report(llava, llava(**batch).loss))
    assert (
        "The gradient of `model.vision_tower.sam.patch_embed` to `model.multi_modal_projector` (9 groups)" in problem
    )
    assert "does not depend on the images" in problem


def test_a_dead_part_is_named(reader):
    """Pins zeros in a single group, while gradients go past it."""
    reader.encoder.vision_model.transformer.layers[0].register_forward_hook(
        lambda module, inputs, output: (inputs[0] + 0 * output[0], output[1])
    )
    problem = only_problem(gradient_report(reader, reader(pixels())))
    assert problem.startswith("The gradient of `encoder.clip.layers.0` is zero: what comes of it")


def test_underflow_of_float16_is_suspected():
    """Pins gradients too small for float16, and that bfloat16, which holds them, is not accused."""
    reader = Reader(torch.float16)
    loss = reader(pixels()) * 1e-12
    assert "Gradients in float16 underflow to zero easily" in only_problem(gradient_report(reader, loss))
    reader = Reader(torch.bfloat16)
    assert gradient_report(reader, reader(pixels()) * 1e-12).problems == []


@pytest.mark.parametrize("factor", [1e-36, 1e36])
def test_norms_whose_squares_leave_float32_are_right(tiny_model, factor):
    """Pins gradients of 1e-30, which are not zero, and of 1e30, which are not infinite."""
    expected = gradient_report(tiny_model, tiny_model(pixels()).last_hidden_state.mean())
    scaled = DeepSeekOCRVisionModel(tiny_config()).double()
    scaled.load_state_dict(tiny_model.state_dict())
    (scaled(pixels()).last_hidden_state.mean() * factor).backward()
    for parameter, source in zip(tiny_model.parameters(), scaled.parameters(), strict=True):
        parameter.grad = source.grad.float()
    report = gradient_report(tiny_model)
    assert report.problems == []
    for row, other in zip(report.rows, expected.rows, strict=True):
        assert row.norm == pytest.approx(other.norm * factor, rel=1e-4)


# NaN and infinity


def test_nan_is_followed_from_the_loss_to_the_pixels(reader):
    """Pins where NaN comes in: at the group that the backward pass meets first."""
    reader.encoder.sam_model.neck.register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * math.nan,))
    report = gradient_report(reader, reader(pixels()))
    problem = only_problem(report)
    assert "3 of 9 groups hold NaN or infinity" in problem
    assert "meets them first in `encoder.sam.blocks.1`" in problem
    assert "In the order of the data the first is `encoder.sam.patch_embed`" in problem
    assert math.isnan(report.rows[0].norm)


def test_weights_that_are_not_finite_are_named(reader):
    """Pins the advice to go back, which nothing else mends."""
    with torch.no_grad():
        reader.head.bias[0] = math.inf
    about_loss, about_gradients, about_weights = gradient_report(reader, reader(pixels())).problems
    assert about_loss.startswith("The loss is inf: the forward pass has left the range of its numbers")
    assert "first in `head`" in about_gradients
    assert about_weights.startswith("`head.bias`: NaN or infinity is in the weights themselves")


def test_overflow_of_float16_is_suspected():
    """Pins gradients too large for float16 of a loss that is finite."""
    reader = Reader(torch.float16)
    reader.head.weight.register_hook(lambda gradient: gradient * 60000 * 60000)
    problem = only_problem(gradient_report(reader, reader(pixels())))
    assert problem.startswith("The gradient of `head` holds NaN or infinity: `head.weight`.")
    assert "Gradients in float16 overflow to infinity easily" in problem


# Earlier steps


def test_gradients_of_an_earlier_step_are_not_taken_for_those_of_this_one(reader):
    """Pins a path cut in the midst of training, which the gradients left over hide."""
    gradient_report(reader, reader(pixels()))
    report = gradient_report(reader, reader(pixels(), is_cut=True))
    cut, stale = report.problems
    assert "cut between `encoder.clip.layers.1` and `head`" in cut
    assert "and 63 more: the gradient there is of an earlier step" in stale
    assert report.notes[-1].startswith("There were gradients already")


def test_zeros_of_zero_grad_are_no_earlier_step(reader):
    """Pins `zero_grad(set_to_none=False)`, after which every gradient is there, and none says anything."""
    gradient_report(reader, reader(pixels()))
    reader.zero_grad(set_to_none=False)
    assert "cut between" in only_problem(gradient_report(reader, reader(pixels(), is_cut=True)))


def test_gradient_accumulation_is_no_problem(reader):
    """Pins steps that are meant to add up."""
    gradient_report(reader, reader(pixels()))
    assert gradient_report(reader, reader(pixels(3))).problems == []


def test_a_frozen_parameter_that_keeps_its_gradient_is_a_problem(reader):
    """Pins freezing between `backward` and `zero_grad`: an optimizer moves what has a gradient, frozen or not."""
    gradient_report(reader, reader(pixels()))
    reader.encoder.freeze("sam")
    optimizer = torch.optim.SGD(reader.parameters(), lr=1.0)
    before = reader.encoder.sam_model.pos_embed.clone()
    problem = only_problem(gradient_report(reader, reader(pixels())))
    assert "and 36 more: frozen, but with the gradient of an earlier step" in problem
    optimizer.step()
    assert not torch.equal(reader.encoder.sam_model.pos_embed, before)


# Unusual parameters and gradients


def test_parameters_made_under_inference_mode_are_named():
    """Pins the error "Inference tensors cannot be saved for backward" that comes of weights, not of tokens."""
    with torch.inference_mode():
        reader = Reader()
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        reader(pixels())
    assert "made or loaded under `torch.inference_mode()`" in only_problem(gradient_report(reader))


def test_parameters_on_the_meta_device_are_named():
    """Pins a model whose weights were never loaded, forward and backward of which run without an error."""
    with torch.device("meta"):
        reader = Reader()
    assert "on the meta device" in only_problem(gradient_report(reader, reader(pixels().to("meta"))))


def test_sparse_and_empty_gradients_are_measured():
    """Pins embeddings with sparse gradients, of which a row that comes twice counts as a sum."""
    model = nn.ModuleDict({"embedding": nn.Embedding(4, 2, sparse=True)})
    model.register_parameter("empty", nn.Parameter(torch.zeros(0, 2)))
    rows = model["embedding"](torch.tensor([1, 1])).sum() + model.empty.sum()
    report = gradient_report(model, rows)
    assert {row.name: row.norm for row in report.rows} == {"embedding": pytest.approx(math.sqrt(8)), "empty": 0}


def norms_in_pieces_are_right(rank: int, store: str) -> bool:
    """Whether FSDP2 on two processes, of which this is one, is reported with the norms of a single process."""
    store = distributed.FileStore(store, 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    torch.manual_seed(0)
    reader = Reader()
    expected = {row.name: pytest.approx(row.norm, rel=1e-5) for row in gradient_report(reader, reader(pixels())).rows}
    reader.zero_grad()
    for module in (*reader.encoder.sam_model.blocks, reader):
        fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
    report = gradient_report(reader, reader(pixels()))
    accumulated = gradient_report(reader, reader(pixels()))
    distributed.destroy_process_group()
    problems = report.problems + accumulated.problems
    return not problems and {row.name: row.norm for row in report.rows} == expected


@pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="FSDP2 of this PyTorch needs a GPU")
def test_gradients_in_pieces_on_two_processes_are_measured_as_one(tmp_path):
    """Pins FSDP2: a piece may be zero or empty where the gradient is not, and the root's parameters change places."""
    output = run_python(f"""
        import os, sys
        sys.path.insert(0, {str(ROOT / "tests")!r})
        from test_gradient_report import norms_in_pieces_are_right

        child = os.fork()
        is_right = norms_in_pieces_are_right(0 if child else 1, {str(tmp_path / "store")!r})
        if not child:
            os._exit(not is_right)
        print(is_right, os.waitpid(child, 0)[1])
    """)
    assert output.split() == ["True", "0"]


# Arguments, text and image


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("encoder",), TypeError, "`model` has to be a torch.nn.Module, got a str"),
        ((nn.Linear(1, 1), {"loss": 1}), TypeError, "`loss` has to be a torch.Tensor or None, got a dict"),
        ((nn.Linear(1, 1), torch.ones(2, 3)), ValueError, r"`loss` has to be one number, got shape \[2, 3\]"),
    ],
)
def test_wrong_arguments_are_errors(arguments, error, message):
    """Pins a model's whole output in the place of its loss, and a loss for each sample."""
    with pytest.raises(error, match=message):
        gradient_report(*arguments)


def test_problems_raise_on_request_only(reader):
    """Pins `raise_on_problems` in a training loop, and that a healthy step passes."""
    reader.other_head = nn.Linear(32, 2)
    with pytest.raises(RuntimeError, match="`other_head` gets no gradient"):
        gradient_report(reader, reader(pixels()), raise_on_problems=True)
    report = gradient_report(reader)
    with pytest.raises(RuntimeError, match="`other_head` gets no gradient"):
        report.raise_for_problems()
    del reader.other_head
    gradient_report(reader, reader(pixels()), raise_on_problems=True)


def test_the_text_shows_rows_problems_and_notes(reader):
    """Pins what people read: counts, norms, and what is wrong beneath."""
    reader.encoder.freeze("sam")
    lines = str(gradient_report(reader, reader(pixels(), is_cut=True))).splitlines()
    assert " ".join(lines[0].split()) == "layer group trainable with gradient zero missing non-finite norm"
    assert lines[1].split() == ["encoder.sam.patch_embed", *"-----", "frozen"]
    assert lines[8].split() == ["encoder.clip.layers.1", "12", "-", "-", "12", "-", "none"]
    assert lines[9].split()[:-1] == ["head", "2", "2", "-", "-", "-"]
    assert "Problems:" in lines
    assert "Notes:" in lines
    assert max(map(len, lines)) <= 100


def test_the_image_shows_every_state(reader, tmp_path):
    """Pins an image of groups that have no norm, or none that fits a logarithmic scale."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    reader.encoder.freeze("sam.patch_embed")
    reader.other_head = nn.Linear(32, 2)
    reader(pixels()).backward()
    reader.encoder.sam_model.net_2.weight.grad.fill_(math.inf)
    for parameter in reader.encoder.vision_model.transformer.layers[0].parameters():
        parameter.grad.zero_()
    report = gradient_report(reader)
    assert set(states(report).values()) == {"with gradient", "zero", "missing", "non-finite", "frozen"}
    report.plot(tmp_path / "gradient_flow.svg")
    image = (tmp_path / "gradient_flow.svg").read_text()
    assert all(f"<!-- {text} -->" in image for text in [*states(report), *states(report).values()])
