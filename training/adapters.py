"""What LoRA adapts in the encoder, as peft takes it: `LoraConfig(target_modules=LORA_TARGETS["sam"])`.

LoRA (arXiv 2106.09685) freezes a layer's weight and learns a difference of low rank beside it. The ends of their names
say which layers; rank, alpha and dropout are the user's, and so is peft (`pip install peft`).
"""

LORA_TARGETS: dict[str, list[str]] = {
    "sam": ["attn.qkv", "attn.proj", "mlp.lin1", "mlp.lin2"],
    "neck": ["sam_model.neck.0", "sam_model.neck.2"],
    "compressor": ["sam_model.net_2", "sam_model.net_3"],
    "clip": ["self_attn.qkv_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2"],
    "projector": ["projector.layers"],
}
"""The layers of each stage, in the order of the data; lists, so that `LORA_TARGETS["sam"] + LORA_TARGETS["clip"]` is
both. `"sam"` and `"clip"` are all linear layers of their transformers, `"neck"` and `"compressor"` the convolutions
between them, `"projector"` the released projector of the feature modes that have one.

In a composite they also hit a language model whose layers are named alike, as Phi's and Phi-3's are, and Llama's,
Mistral's and Qwen's are not. `LoraConfig(exclude_modules=r".*language_model.*")` leaves it out.
"""

LANGUAGE_MODEL_LORA_TARGETS: dict[str, list[str]] = {
    "projector": ["model.multi_modal_projector"],
    "attention": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"],
    "mlp": ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"],
    "shared_experts": ["shared_experts.gate_proj", "shared_experts.up_proj", "shared_experts.down_proj"],
}
"""The linear layers behind the encoder of the whole model: its projector, and those of its language model, `"mlp"`
in the dense first layer. No layer of the encoder has such a name.
"""

LANGUAGE_MODEL_LORA_PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
"""The routed experts, which are no layers but tensors of all experts of a layer: for peft's `target_parameters`, and
without dropout. An adapter of rank r has r rows for each expert.
"""
