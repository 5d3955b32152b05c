"""How the examples train by default."""

from dataclasses import dataclass, field

from transformers import TrainingArguments


@dataclass
class SmallModelArguments(TrainingArguments):
    """transformers' `TrainingArguments` with defaults that suit the small model, and images in the batches."""

    learning_rate: float = field(default=1e-3, metadata={"help": "Highest learning rate of what is new."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "How the learning rate falls."})
    warmup_steps: float = field(
        default=0.2,
        metadata={"help": "Steps in which the learning rate rises from 0; below 1, that share of all steps."},
    )
    weight_decay: float = field(default=0.01, metadata={"help": "AdamW's weight decay."})
    adam_beta2: float = field(default=0.98, metadata={"help": "AdamW's second beta."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep of each run."})
    dataloader_pin_memory: bool = field(default=False, metadata={"help": "Pin memory, for GPUs."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Leave it: the collator needs the images."})
    prediction_loss_only: bool = field(default=True, metadata={"help": "Evaluate the loss alone while training."})
    report_to: str = field(default="none", metadata={"help": "Where Trainer reports to, such as `tensorboard`."})
