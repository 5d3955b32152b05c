"""One graph for pages of every size: what a size decides in eager mode must decide nothing in a graph."""

import torch
from helpers import pixels, relative_error, tiny_config

from deepseek_ocr_vision import DeepSeekOCRVisionModel


# Height and width in tokens: rectangles, windows that fit the grid and that do not, tables that fit and that do not.
SIZES = [(2, 3), (3, 2), (7, 7), (2, 2), (10, 2), (4, 3), (2, 5), (7, 2), (3, 3), (6, 4)]


def test_compiled_for_any_size_one_graph_serves_pages_of_ten_sizes():
    """Pins a graph for each size of page: by padding that was 1 or not, and tables that were resized or not."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.manual_seed(0)
    model = DeepSeekOCRVisionModel(tiny_config(feature_mode="concat", clip_config={"num_hidden_layers": 1}))
    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend, dynamic=True, fullgraph=True)
    for height, width in SIZES:
        page = pixels(1, 64 * height, 64 * width)
        actual, expected = compiled(page).last_hidden_state, model(page).last_hidden_state
        assert relative_error(actual, expected) < 1e-5, (height, width)
    of_graph, of_model = (torch.autograd.grad(out.sum(), model.sam_model.pos_embed)[0] for out in (actual, expected))
    assert relative_error(of_graph, of_model) < 1e-3
    assert len(graphs) == 1
