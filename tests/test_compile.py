"""Sizes of pages that a graph leaves open: what a size decides in eager mode must decide nothing in it."""

import torch
from helpers import pixels, relative_error, tiny_config

from deepseek_ocr_vision import DeepSeekOCRVisionModel


# Height and width in tokens: rectangles, windows that fit the grid and that do not, tables that fit and that do not.
SIZES = [(2, 3), (3, 2), (6, 6), (2, 2), (10, 2), (4, 3), (2, 5), (7, 2), (3, 3), (6, 4)]


def small_model() -> DeepSeekOCRVisionModel:
    torch.manual_seed(0)
    return DeepSeekOCRVisionModel(tiny_config(feature_mode="concat", clip_config={"num_hidden_layers": 1})).eval()


def test_without_gradients_two_compiled_graphs_at_most_serve_pages_of_ten_sizes():
    """Pins a graph for each size of page: by padding that was 1 or not, and tables that were resized or not."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = small_model()
    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend, dynamic=True, fullgraph=True)
    for height, width in SIZES:
        page = pixels(1, 64 * height, 64 * width)
        with torch.no_grad():
            actual, expected = compiled(page).last_hidden_state, model(page).last_hidden_state
        assert relative_error(actual, expected) < 1e-5, (height, width)
    assert len(graphs) <= 2
    if hasattr(torch.compiler, "is_exporting"):  # torch 2.6 cannot tell a compiled graph from an exported one
        calls = [str(node.target) for graph in graphs for node in graph.graph.nodes]
        assert any("blockwise_attention" in call for call in calls)  # and not a bias of 0.8 GB a block


def test_compiled_in_one_graph_it_gives_the_same_tokens_and_gradients():
    """Pins what Inductor makes of it, forward and backward."""
    model = small_model().train()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True)
    expected, actual = (run(pixels()).last_hidden_state for run in (model, compiled))
    gradients = [torch.autograd.grad(t.square().sum(), list(model.parameters())) for t in (expected, actual)]
    assert relative_error(actual, expected) < 1e-4
    for of_eager, of_compiled in zip(*gradients, strict=True):
        assert relative_error(of_compiled, of_eager) < 1e-3


def test_compiled_training_goes_on_with_pages_of_another_size():
    """Pins PyTorch 2.14's missing backward pass for a table that is resized to an open size.

    By itself `torch.compile` leaves open whatever has changed between two calls.
    """
    model = small_model().train()
    position = model.sam_model.pos_embed
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for batch_size, height, width in [(1, 2, 2), (2, 4, 3)]:
        page = pixels(batch_size, 64 * height, 64 * width)
        expected, actual = (run(page).last_hidden_state for run in (model, compiled))
        gradients = [torch.autograd.grad(tokens.square().sum(), position)[0] for tokens in (expected, actual)]
        assert relative_error(actual, expected) < 1e-5, (height, width)
        assert relative_error(gradients[1], gradients[0]) < 1e-4, (height, width)


def test_exported_once_it_gives_the_tokens_of_pages_of_ten_other_sizes():
    """Pins an export with dynamic height and width that refused every size but its own, with gradients enabled."""
    model = small_model()
    batch, rows, columns = (
        torch.export.Dim(name, min=low, max=64) for name, low in zip("brc", (1, 2, 2), strict=True)
    )
    sizes = {"pixel_values": {0: batch, 2: 64 * rows, 3: 64 * columns}}
    example = {"pixel_values": pixels(2, 64 * 5, 64 * 4)}
    program = torch.export.export(model, (), example, dynamic_shapes=sizes, strict=False).module()
    for number, (height, width) in enumerate(SIZES):
        page = pixels(1 + number % 3, 64 * height, 64 * width)
        with torch.no_grad():
            actual, expected = program(pixel_values=page).last_hidden_state, model(page).last_hidden_state
        assert relative_error(actual, expected) < 1e-5, (height, width)
