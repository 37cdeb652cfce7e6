"""Every setting of a run: its name, its default, its meaning and its checks.

The command line overrides any field by its dotted name (`--training.steps 500`). Importing this module does
not import jax.
"""

import dataclasses
import json
import math
from typing import Annotated, Literal

from nextllm_jax.config.checks import check_types as _check_types
from nextllm_jax.config.checks import require as _require
from nextllm_jax.config.checks import require_positive as _require_positive
from nextllm_jax.config.fields import OTHER_DATA, ChoosesData, ChoosesTokenizer, Fixed, Free, NoEffect, OnResume
from nextllm_jax.config.model import ModelConfig

FORMAT, FIRST_FORMAT = "nextllm_jax config 2", "nextllm_jax config 1"
"""Formats of config.json. The first, which the file does not state, is of runs that warmed up for all of
warmup_steps, however short the schedule, and whose wsd decay could overlap the warmup."""

_OTHER_ORDER = OnResume("override", "the data begins again in another order, the weights stay")
_OTHER_WINDOWS = OnResume("override", "the data begins again, cut into other windows in another order")
_OTHER_BATCHES = OnResume("override", "the data goes on where it is, with more or fewer windows a step")
_OTHER_ADAPTERS = OnResume("override", "the adapters count for more or less from the next step on, and the model jumps")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read, how it is tokenized, and how it is cut into windows."""

    corpus: ChoosesData[str] = "stdlib"
    """stdlib (Python's own standard library source), a file, a directory or a glob of text, .jsonl(.gz) or
    .parquet, or hf:NAME for a Hugging Face dataset (name or local directory)."""
    text_field: ChoosesData[str] = "text"
    """Field of jsonl, parquet and Hugging Face rows that holds the text."""
    messages_field: ChoosesData[str | None] = None
    """Field of rows that holds a conversation, a list of {role, content}, such as messages: training is on what the
    assistant says alone. None: rows hold text."""
    chat_template: ChoosesData[str | None] = None
    """Jinja file that turns such conversations into text; none: the tokenizer's own template."""
    hf_config: ChoosesData[str | None] = None
    """Configuration name of a Hugging Face dataset, such as sample-10BT."""
    hf_split: ChoosesData[str] = "train"
    """Split of a Hugging Face dataset."""
    tokenizer: ChoosesTokenizer[str] = "train"
    """train (a byte-level BPE of the corpus), gpt2, cl100k_base, o200k_base, or the path of a .tiktoken ranks
    file, of a saved tokenizer directory, or of a Hugging Face directory or tokenizer.json."""
    vocab_size: ChoosesTokenizer[int] = 8192
    """Size of the tokenizer that 'train' makes, special tokens included."""
    path: Annotated[str | None, OnResume("free", OTHER_DATA)] = None
    """Directory of the prepared shards; none: data/<corpus>-<tokenizer>-<hash of these settings>."""
    verify: Free[Literal["sampled", "full"]] = "sampled"
    """What is compared with its checksum at the start, beside the sizes of all files. sampled: 1,024 blocks of 256 KiB
    and one of each file, drawn anew each time. That is all of 256 MiB, and a swapped file is always found; in S bytes
    more, one flipped bit is found with probability 256 MiB / S, and damage to a share f of the blocks with
    1 - (1 - f)^1024, such as 0.99 for f = 0.0045. full: every byte, so that every flipped bit is found."""
    sequence_length: Annotated[int, _OTHER_WINDOWS] = 256
    """Tokens in a training window."""
    validation_fraction: ChoosesData[float] = 0.05
    """Share of the documents held out, chosen by a hash of the document's name or text."""
    tokens_per_shard: Free[int] = 50_000_000
    """Most tokens in one shard file."""
    num_processes: Free[int] = 0
    """Processes that tokenize; 0: one per core."""

    def __post_init__(self) -> None:
        _check_types(self, "data.")
        _require_positive(self, "data.", "sequence_length")
        _require(bool(self.corpus), "data.corpus is empty; give stdlib, hf:NAME, or a file, directory or glob")
        fraction = self.validation_fraction
        _require(0 < fraction < 1, f"data.validation_fraction is {fraction}; it must lie between 0 and 1")
        size = self.vocab_size
        _require(size >= 258, f"data.vocab_size is {size}; the 256 bytes and the special tokens need at least 258")
        shard = self.tokens_per_shard
        _require(shard >= 1024, f"data.tokens_per_shard is {shard}; at least 1024 is needed")
        _require(self.num_processes >= 0, f"data.num_processes is {self.num_processes}; it cannot be negative")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Global-norm clipping, AdamW and a learning-rate schedule."""

    learning_rate: float = 3e-3
    """Peak learning rate."""
    schedule: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    """What follows the warmup: cosine decay, stable then linear decay, linear decay, or nothing."""
    warmup_steps: int = 100
    """Steps of linear warmup, at most half of the schedule; it begins at learning_rate / steps, not at 0."""
    schedule_steps: int | None = None
    """Length of the schedule, warmup included; none: training.steps. State it to extend a run later."""
    decay_steps_fraction: float = 0.2
    """Share of the schedule that the wsd decay takes; it takes at most the steps that the warmup leaves."""
    final_learning_rate_fraction: float = 0.1
    """Learning rate at the end of a decay, as a share of the peak."""
    b1: float = 0.9
    """Decay of AdamW's first moment."""
    b2: float = 0.95
    """Decay of AdamW's second moment."""
    eps: float = 1e-8
    """Epsilon of AdamW."""
    weight_decay: float = 0.1
    """Decoupled weight decay; norms and biases are never decayed."""
    decay_embeddings: bool = False
    """Decay the embedding and the output head too."""
    clip_norm: float = 1.0
    """Greatest global norm of the accumulated gradient."""
    first_moment_dtype: Fixed[Literal["float32", "bfloat16"]] = "float32"
    """Type in which AdamW's first moment is kept."""
    shard_over_data: Free[bool] = False
    """Divide AdamW's moments over mesh.data too (ZeRO-1), and the accumulated gradient: less memory, but new parameters
    travel after each step, and gradients after each microbatch instead of once a step."""
    offload_state: Free[bool] = False
    """Keep AdamW's moments in the host's memory (TPU and GPU). A device has those of a few layers at a time, and those
    of embedding and head; the layers' come twice in each step, to check that the update is finite and to take it."""

    def __post_init__(self) -> None:
        _check_types(self, "optimizer.")
        _require_positive(self, "optimizer.", "learning_rate", "clip_norm", "eps")
        for name in ("warmup_steps", "weight_decay"):
            value = getattr(self, name)
            _require(value >= 0, f"optimizer.{name} is {value}; it cannot be negative")
        for name in ("decay_steps_fraction", "final_learning_rate_fraction"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"optimizer.{name} is {value}; it must lie between 0 and 1")
        for name in ("b1", "b2"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"optimizer.{name} is {value}; it must be at least 0 and below 1")
        length = self.schedule_steps or 0
        _require(length >= 0, f"optimizer.schedule_steps is {length}; it cannot be negative")

    def schedule_length(self, training_steps: int) -> int:
        """Steps of the schedule, warmup included."""
        return self.schedule_steps or training_steps

    def warmup_length(self, training_steps: int) -> int:
        """Steps that the schedule warms up for: warmup_steps, but at most half of the schedule."""
        return min(self.warmup_steps, self.schedule_length(training_steps) // 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How long, how large a batch, and how often to look."""

    steps: int = 5000
    """Global batches to train on, skipped ones included."""
    global_batch_size: Annotated[int, _OTHER_BATCHES] = 16
    """Sequences in one optimizer step, over all devices and microbatches."""
    accumulation_steps: Free[int] = 1
    """Microbatches that a global batch is cut into, to save memory."""
    log_every_steps: Free[int] = 10
    """Steps between lines of metrics.jsonl."""
    evaluate_every_steps: Free[int] = 500
    """Steps between evaluations of the whole validation set; also one at the end."""
    evaluation_batch_size: Free[int] = 32
    """Sequences in one batch of an evaluation, rounded up to what the mesh divides; the result does not depend
    on it."""
    max_skipped_steps: Free[int] = 10
    """Skipped steps in a row (loss, gradient or update not finite, or a spike) after which training gives up."""
    spike_factor: float = 0.0
    """Skip steps whose loss is over this times the median of the last losses, such as 1.5; 0: never."""
    spike_window_steps: int = 100
    """Losses that this median is over, those of skipped steps included; before there are so many, none is a spike."""
    sample_prompts: Free[tuple[str, ...]] = ("def ", "import ", "class ")
    """Prompts that samples.txt continues at every evaluation; none: no samples."""
    sample_tokens: Free[int] = 96
    """New tokens for each of those prompts; 0: no samples."""

    def __post_init__(self) -> None:
        _check_types(self, "training.")
        _require_positive(
            self, "training.", "steps", "global_batch_size", "accumulation_steps", "log_every_steps",
            "evaluate_every_steps", "evaluation_batch_size", "max_skipped_steps", "spike_window_steps",
        )  # fmt: skip
        factor = self.spike_factor
        _require(factor == 0 or factor > 1, f"training.spike_factor is {factor}; it must be over 1, or 0 for never")
        _require(self.sample_tokens >= 0, f"training.sample_tokens is {self.sample_tokens}; it cannot be negative")
        batch, parts = self.global_batch_size, self.accumulation_steps
        _require(
            batch % parts == 0,
            f"training.accumulation_steps {parts} does not divide training.global_batch_size {batch}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters on the frozen weights of init_from; the adapters alone are trained (Hu et al. 2021)."""

    rank: Fixed[int] = 0
    """Rank of the adapters; 0: none, all weights are trained."""
    alpha: Annotated[float, _OTHER_ADAPTERS] = 16.0
    """The product of the adapters counts alpha / rank times."""
    targets: Fixed[tuple[str, ...]] = ()
    """Matrices that get adapters, such as q v; empty: all."""
    frozen: Fixed[Literal["unquantized", "int8"]] = "unquantized"
    """How the frozen weights are kept: in model.param_dtype, or their matrices in 8 bits, a scale a channel."""

    def __post_init__(self) -> None:
        _check_types(self, "lora.")
        _require(self.rank >= 0, f"lora.rank is {self.rank}; it cannot be negative")
        _require_positive(self, "lora.", "alpha")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the next token is drawn from the logits."""

    temperature: float = 0.8
    """Divides the logits; 0 is greedy and ignores the other settings but the repetition penalty."""
    top_k: int = 50
    """Keep the k most likely tokens; 0: all."""
    top_p: float = 0.95
    """Keep the fewest tokens whose probabilities reach this sum; 1: all."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the most likely one; 0: none."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens already in prompt or text; 1: off."""

    def __post_init__(self) -> None:
        _check_types(self, "")
        _require(self.temperature >= 0, f"temperature is {self.temperature}; it cannot be negative")
        _require(self.top_k >= 0, f"top_k is {self.top_k}; it cannot be negative")
        _require(0 < self.top_p <= 1, f"top_p is {self.top_p}; it must be over 0 and at most 1")
        _require(0 <= self.min_p <= 1, f"min_p is {self.min_p}; it must lie between 0 and 1")
        _require(self.repetition_penalty > 0, f"repetition_penalty is {self.repetition_penalty}; it must be positive")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the run is saved, and what is kept; the best checkpoint always is."""

    every_steps: int = 500
    """Steps between saves; every new best and the end are saved too."""
    keep_last: int = 2
    """Latest checkpoints that are kept. With 2 there is one to go back to if the latest is damaged later."""
    keep_every_steps: int = 0
    """Keep every checkpoint whose step is a multiple of this; 0: none."""
    strict: bool = False
    """Refuse to continue from a damaged checkpoint; otherwise it is set aside and the one before it is used."""

    def __post_init__(self) -> None:
        _check_types(self, "checkpoint.")
        _require_positive(self, "checkpoint.", "every_steps", "keep_last")
        every = self.keep_every_steps
        _require(every >= 0, f"checkpoint.keep_every_steps is {every}; it cannot be negative")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each mesh axis; one axis may be -1 and takes what is left."""

    data: int = -1
    """Data parallelism: the batch is divided, parameters are copied."""
    fsdp: int = 1
    """Fully sharded data parallelism: batch, parameters and optimizer state are divided."""
    sequence: int = 1
    """Context parallelism: each sequence is split, and each device gathers all keys and values."""
    tensor: int = 1
    """Tensor parallelism: heads, mlp and vocabulary are divided."""
    slices: int = 1
    """TPU slices, or groups of other devices, that only a slower network joins; no axis but data crosses it, and this
    is its outer factor: it must divide data."""

    def sizes(self, num_devices: int) -> tuple[int, int, int, int]:
        """(data, fsdp, sequence, tensor) with -1 resolved; their product is num_devices."""
        sizes = [self.data, self.fsdp, self.sequence, self.tensor]
        named = f"mesh data {self.data}, fsdp {self.fsdp}, sequence {self.sequence}, tensor {self.tensor}"
        fixed = math.prod(size for size in sizes if size != -1)
        if -1 in sizes and num_devices % fixed == 0:
            sizes[sizes.index(-1)] = num_devices // fixed
        _require(
            math.prod(sizes) == num_devices,
            f"{named} does not use {num_devices} devices exactly; change an axis, or set one to -1",
        )
        _require(
            sizes[0] % self.slices == 0,
            f"mesh.slices {self.slices} does not divide mesh.data {sizes[0]}; no other axis may cross slices",
        )
        return (sizes[0], sizes[1], sizes[2], sizes[3])

    def __post_init__(self) -> None:
        _check_types(self, "mesh.")
        sizes = {name: getattr(self, name) for name in ("data", "fsdp", "sequence", "tensor")}
        for name, size in sizes.items():
            _require(size == -1 or size > 0, f"mesh.{name} is {size}; it must be positive, or -1 for what is left")
        _require(list(sizes.values()).count(-1) <= 1, "only one mesh axis may be -1")
        _require_positive(self, "mesh.", "slices")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One complete run."""

    workdir: Free[str | None] = None
    """Run directory; none: runs/<name of the config file>."""
    seed: Annotated[int, _OTHER_ORDER] = 0
    """Seed of the initial weights and of the order of the data."""
    init_from: NoEffect[str | None] = None
    """Run directory (its best checkpoint), Hugging Face directory or GGUF file whose weights training starts from. The
    model and the tokenizer are the source's; of the model's settings only those that say how it is computed stay."""
    platform: Free[Literal["auto", "cpu", "gpu", "tpu"]] = "auto"
    """Platform that must be there; auto: the best that jax finds."""
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    checkpoint: Free[CheckpointConfig] = dataclasses.field(default_factory=CheckpointConfig)
    mesh: Free[MeshConfig] = dataclasses.field(default_factory=MeshConfig)

    def __post_init__(self) -> None:
        _check_types(self, "")
        _require(0 <= self.seed < 2**32, f"seed is {self.seed}; it must lie between 0 and 2^32 - 1")
        _require(
            not self.lora.rank or self.init_from is not None,
            f"lora.rank is {self.lora.rank}, but adapters need weights to stand on; set init_from",
        )
        if self.init_from is None:  # else the model is not known yet
            self.check_fit()

    def check_fit(self) -> None:
        """Raise InputError if model and data do not go together."""
        length, context = self.data.sequence_length, self.model.context_length
        _require(length <= context, f"data.sequence_length {length} is over model.context_length {context}")
        tokens, rows = self.data.vocab_size, self.model.vocab_size
        fits = self.data.tokenizer != "train" or tokens <= rows
        _require(fits, f"data.vocab_size {tokens} is over model.vocab_size {rows}")

    def to_json(self) -> str:
        """The whole config as indented JSON, read back by `from_json`."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=2) + "\n"
