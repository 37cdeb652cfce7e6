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
from nextllm_jax.config.mixture import parse_mixture
from nextllm_jax.config.model import ModelConfig
from nextllm_jax.config.optimizer import OptimizerConfig
from nextllm_jax.config.reporting import EvaluationConfig, LoggingConfig, parse_texts

FORMAT, FIRST_FORMAT = "nextllm_jax config 2", "nextllm_jax config 1"
"""Formats of config.json. A file of the first format does not state it. In runs of that format the warmup always took
warmup_steps, even in a shorter schedule, and the wsd decay could overlap the warmup."""

_OTHER_ORDER = OnResume("override", "the data starts over in another order; the weights are kept")
_OTHER_WINDOWS = OnResume("override", "the data starts over, split into other windows in another order")
_OTHER_BATCHES = OnResume("override", "the data continues at its current position, with more or fewer windows per step")
_OTHER_MIXTURE = OnResume(
    "override",
    "each source continues at its next window, and validation losses are not comparable with the earlier ones",
)
_OTHER_ADAPTERS = OnResume("override", "the adapters are scaled differently, so the model changes abruptly")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The corpus, its tokenizer, and the windows that it is split into."""

    corpus: ChoosesData[str] = "stdlib"
    """stdlib (the source code of Python's standard library); a file, directory or glob of text, .jsonl, .json or
    .parquet files; or hf:NAME for a Hugging Face dataset, by name or local directory."""
    text_field: ChoosesData[str] = "text"
    """Field with the text, in jsonl, parquet and Hugging Face rows."""
    messages_field: ChoosesData[str | None] = None
    """Field with a conversation, a list of {role, content} or {from, value}, such as messages. Only what the assistant
    says is in the loss mask. none: rows hold text."""
    chat_template: ChoosesData[str | None] = None
    """Jinja file that formats such conversations as text; none: the tokenizer's own chat template."""
    hf_config: ChoosesData[str | None] = None
    """Configuration name of the Hugging Face dataset, such as sample-10BT."""
    hf_split: ChoosesData[str] = "train"
    """Split of the Hugging Face dataset."""
    tokenizer: ChoosesTokenizer[str] = "train"
    """train (trains a byte-level BPE on the corpus), gpt2, cl100k_base, o200k_base, or the path of a .tiktoken ranks
    file, a saved tokenizer directory, a Hugging Face directory, a tokenizer.json or a .gguf file."""
    vocab_size: ChoosesTokenizer[int] = 8192
    """Vocabulary size of a trained tokenizer, including special tokens."""
    path: Annotated[str | None, OnResume("free", OTHER_DATA)] = None
    """Directory of the prepared shards, also gs://BUCKET/DIRECTORY or s3://BUCKET/DIRECTORY; none:
    data/<corpus>-<tokenizer>-<hash of these settings>."""
    mixture: Annotated[tuple[str, ...], _OTHER_MIXTURE] = ()
    """Several sources instead of corpus or path, each with a weight and perhaps a limit of epochs, such as data/web:0.3
    stdlib:0.7:2. A source is a prepared directory or a corpus. Corpora are prepared with these settings; if the
    tokenizer is trained, all use that of the first source. none: there is one source."""
    mixture_paths: Free[tuple[str, ...]] = ()
    """Directory of the prepared data of each source, if it is not where mixture says. A run records it."""
    verify: Free[Literal["sampled", "full"]] = "sampled"
    """How much of the data to checksum at startup, in addition to checking file sizes. sampled: 1,024 random blocks of
    256 KiB, and at least one block of each file, on disk; in a bucket none, since each block is checksummed whenever it
    is read; full: everything."""
    cache_dir: Free[str | None] = None
    """Local directory for data that was read from a bucket, which the processes of a host can share, and for preparing
    data in a bucket; none: keep data in memory, and prepare in the user's cache directory."""
    cache_bytes: Free[int] = 2**30
    """Maximum size of the data that is kept, in memory or in cache_dir."""
    sequence_length: Annotated[int, _OTHER_WINDOWS] = 256
    """Tokens in a training window."""
    validation_fraction: ChoosesData[float] = 0.05
    """Fraction of the documents that are held out, chosen by a hash of the text."""
    deduplicate: ChoosesData[Literal["none", "exact"]] = "none"
    """exact: keep only the first of the documents with the same text; none: keep all."""
    skip_bad_rows: ChoosesData[int] = 0
    """Maximum number of rows that are skipped because they cannot be read or formatted; 0: the first one is an
    error."""
    tokens_per_shard: Free[int] = 50_000_000
    """Maximum number of tokens in a shard file."""
    num_processes: Free[int] = 0
    """Number of tokenizing processes; 0: one per core."""

    def __post_init__(self) -> None:
        _check_types(self, "data.")
        _require_positive(self, "data.", "sequence_length")
        _require(bool(self.corpus), "data.corpus is empty; give stdlib, hf:NAME, or a file, directory or glob")
        fraction = self.validation_fraction
        _require(0 < fraction < 1, f"data.validation_fraction is {fraction}; it must be between 0 and 1")
        size = self.vocab_size
        _require(size >= 258, f"data.vocab_size is {size}; it must be at least 258, for 256 bytes and 2 special tokens")
        local = "://" not in (self.cache_dir or "")
        _require(local, f"data.cache_dir is {self.cache_dir}; it must be a directory on a local disk")
        shard = self.tokens_per_shard
        _require(shard >= 1024, f"data.tokens_per_shard is {shard}; it must be at least 1024")
        for name in ("num_processes", "skip_bad_rows", "cache_bytes"):
            value = getattr(self, name)
            _require(value >= 0, f"data.{name} is {value}; it cannot be negative")
        if self.mixture:
            self._check_mixture(len(parse_mixture(self.mixture)))
        _require(bool(self.mixture) or not self.mixture_paths, "data.mixture_paths is set, but not data.mixture")

    def _check_mixture(self, sources: int) -> None:
        _require(self.path is None, f"data.path is {self.path}, but data.mixture names the data too; leave one out")
        _require(
            self.messages_field is None,
            "data.messages_field does not apply to data.mixture; prepare the conversations (nextllm prepare), and name "
            "their directory in data.mixture",
        )
        _require(
            len(self.mixture_paths) in (0, sources),
            f"data.mixture_paths has {len(self.mixture_paths)} directories for {sources} sources of data.mixture",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The length of training, the batch size, and how often to log and evaluate."""

    steps: int = 5000
    """Global batches to train on, including skipped ones."""
    global_batch_size: Annotated[int, _OTHER_BATCHES] = 16
    """Sequences per optimizer step, over all devices and microbatches."""
    accumulation_steps: Free[int] = 1
    """Microbatches that each global batch is split into, to save memory."""
    log_every_steps: Free[int] = 10
    """Steps between lines of metrics.jsonl."""
    evaluate_every_steps: Free[int] = 500
    """Steps between evaluations on the whole validation set. Training also evaluates at the end."""
    evaluation_batch_size: Free[int] = 32
    """Sequences per evaluation batch, rounded up to a multiple that the mesh can shard. It does not affect the
    result."""
    max_skipped_steps: Free[int] = 10
    """Training fails after this many consecutive skipped steps. A step is skipped if its loss, gradient or update is
    not finite, or if its loss is a spike."""
    spike_factor: float = 0.0
    """Skip a step whose loss exceeds this factor, such as 1.5, times the median of the recent losses; 0: never."""
    spike_window_steps: int = 100
    """Number of recent losses in that median, including those of skipped steps. No step counts as a spike until there
    are so many."""
    ema_decay: Fixed[float] = 0.0
    """Decay per step of a moving average of the weights, such as 0.999, which is evaluated, sampled, saved and exported
    instead of the trained weights; 0: none. Early steps use at most (1 + step) / (10 + step)."""
    sample_prompts: Free[tuple[str, ...] | None] = None
    """Prompts for the text in samples.txt, generated at every evaluation; none: the beginnings of held-out documents,
    or of held-out conversations up to the first answer."""
    sample_tokens: Free[int] = 96
    """New tokens for each prompt; 0: no samples."""
    preemption_seconds: Free[float | None] = None
    """Seconds from SIGTERM to the end of the machine, such as 25 on a spot VM. A save that would take longer is not
    started, see checkpoint.megabytes_per_second; none: SIGTERM always saves."""

    def __post_init__(self) -> None:
        _check_types(self, "training.")
        _require_positive(
            self, "training.", "steps", "global_batch_size", "accumulation_steps", "log_every_steps",
            "evaluate_every_steps", "evaluation_batch_size", "max_skipped_steps", "spike_window_steps",
        )  # fmt: skip
        factor = self.spike_factor
        decay = self.ema_decay
        _require(0 <= decay < 1, f"training.ema_decay is {decay}; it must be at least 0 and below 1")
        message = f"training.spike_factor is {factor}; it must be greater than 1, or 0 to skip no spikes"
        _require(factor == 0 or factor > 1, message)
        _require(self.sample_tokens >= 0, f"training.sample_tokens is {self.sample_tokens}; it cannot be negative")
        if self.preemption_seconds is not None:
            _require_positive(self, "training.", "preemption_seconds")
        batch, parts = self.global_batch_size, self.accumulation_steps
        _require(
            batch % parts == 0,
            f"training.accumulation_steps {parts} does not divide training.global_batch_size {batch}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters on the frozen weights of init_from; only the adapters are trained (Hu et al., 2021)."""

    rank: Fixed[int] = 0
    """Rank of the adapters; 0: no adapters, all weights are trained."""
    alpha: Annotated[float, _OTHER_ADAPTERS] = 16.0
    """The output of an adapter is multiplied by alpha / rank."""
    rank_stabilized: Annotated[bool, _OTHER_ADAPTERS] = False
    """Multiply it by alpha / sqrt(rank) instead (rsLoRA)."""
    targets: Fixed[tuple[str, ...]] = ()
    """Matrices that get adapters, such as q v; empty: all."""
    frozen: Fixed[Literal["unquantized", "int8", "int4"]] = "unquantized"
    """How the frozen base weights are stored. unquantized: in model.param_dtype; int8: matrices in 8 bits, with one
    scale per output channel; int4: matrices in 4 bits, with a scale and a minimum per group of 32 inputs."""
    adapter: NoEffect[str | None] = None
    """Directory of a PEFT adapter (adapter_config.json, adapter_model.safetensors) to start from. It determines rank,
    alpha, rank_stabilized and targets; none: new adapters."""

    @property
    def scale(self) -> float:
        """The factor on the output of an adapter."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    def __post_init__(self) -> None:
        _check_types(self, "lora.")
        _require(self.rank >= 0, f"lora.rank is {self.rank}; it cannot be negative")
        _require_positive(self, "lora.", "alpha")
        _require(all(self.targets), "lora.targets has an empty name; leave it out for all matrices, or name some: q v")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are saved, and which are kept. The best checkpoint is always kept."""

    every_steps: int = 500
    """Steps between saves. A new best validation loss and the last step are also saved."""
    keep_last: int = 2
    """Number of latest checkpoints that are kept. With 2, one is left if the latest is damaged later."""
    keep_every_steps: int = 0
    """Also keep every checkpoint whose step is a multiple of this; 0: none."""
    scratch: str | None = None
    """Directory, or gs://BUCKET/DIRECTORY, for checkpoints that are saved only to resume from, such as one whose
    objects the bucket deletes after some days. The best checkpoint, the last step and multiples of keep_every_steps are
    saved in the run directory. none: all are."""
    strict: bool = False
    """Fail if the latest checkpoint is damaged. Otherwise it is set aside, and training resumes from the one before."""
    megabytes_per_second: float = 1000.0
    """Megabytes (10^6 bytes) that each host can write per second. Used to estimate the time of a save, in plan, in
    doctor, and for training.preemption_seconds until a save was measured."""

    def __post_init__(self) -> None:
        _check_types(self, "checkpoint.")
        _require_positive(self, "checkpoint.", "every_steps", "keep_last", "megabytes_per_second")
        every = self.keep_every_steps
        _require(every >= 0, f"checkpoint.keep_every_steps is {every}; it cannot be negative")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each mesh axis. One axis may be -1 and takes the remaining devices."""

    data: int = -1
    """Data parallelism: the batch is sharded, parameters are replicated."""
    fsdp: int = 1
    """Fully sharded data parallelism: batch, parameters and optimizer state are sharded."""
    sequence: int = 1
    """Context parallelism: sequences are sharded, and each device gathers all keys and values."""
    tensor: int = 1
    """Tensor parallelism: heads, mlp and vocabulary are sharded."""
    expert: int = 1
    """Expert parallelism: experts are sharded. For everything else, these devices are further ones along fsdp."""
    slices: int = 1
    """TPU slices, or other groups of devices, that are connected by a slower network. It must divide data, which is
    split over the slices first; the other axes stay within a slice."""

    def sizes(self, num_devices: int) -> tuple[int, int, int, int, int]:
        """(data, fsdp, sequence, tensor, expert) with -1 resolved; their product is num_devices."""
        sizes = [self.data, self.fsdp, self.sequence, self.tensor, self.expert]
        named = f"mesh data {self.data}, fsdp {self.fsdp}, sequence {self.sequence}, tensor {self.tensor}"
        named += f", expert {self.expert}" if self.expert != 1 else ""
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
        return (sizes[0], sizes[1], sizes[2], sizes[3], sizes[4])

    def __post_init__(self) -> None:
        _check_types(self, "mesh.")
        sizes = {name: getattr(self, name) for name in ("data", "fsdp", "sequence", "tensor", "expert")}
        for name, size in sizes.items():
            message = f"mesh.{name} is {size}; it must be positive, or -1 for the remaining devices"
            _require(size == -1 or size > 0, message)
        _require(list(sizes.values()).count(-1) <= 1, "only one mesh axis may be -1; set the others")
        _require_positive(self, "mesh.", "slices")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One complete run."""

    workdir: Free[str | None] = None
    """Run directory, or gs://BUCKET/DIRECTORY; none: runs/<name of the config file>."""
    seed: Annotated[int, _OTHER_ORDER] = 0
    """Seed of the initial weights and of the data order."""
    init_from: NoEffect[str | None] = None
    """Initial weights: a run directory (its best checkpoint), a Hugging Face directory, a GGUF file, or a published
    model: smollm2. The model config and the tokenizer come from there; only execution settings (dtype, attention,
    remat) are kept from this config."""
    platform: Free[Literal["auto", "cpu", "gpu", "tpu"]] = "auto"
    """Platform to require; auto: whichever jax selects."""
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    checkpoint: Free[CheckpointConfig] = dataclasses.field(default_factory=CheckpointConfig)
    mesh: Free[MeshConfig] = dataclasses.field(default_factory=MeshConfig)
    evaluation: Free[EvaluationConfig] = dataclasses.field(default_factory=EvaluationConfig)
    logging: Free[LoggingConfig] = dataclasses.field(default_factory=LoggingConfig)

    def __post_init__(self) -> None:
        _check_types(self, "")
        _require(0 <= self.seed < 2**32, f"seed is {self.seed}; it must be between 0 and 2^32 - 1")
        _require(
            not self.lora.rank or self.init_from is not None,
            f"lora.rank is {self.lora.rank}, but adapters need a base model; set init_from",
        )
        _require(
            self.lora.adapter is None or self.init_from is not None,
            f"lora.adapter is {self.lora.adapter}, but an adapter needs its base model; set init_from",
        )
        _require(
            not self.lora.rank or self.optimizer.name != "muon",
            f"lora.rank is {self.lora.rank}, but muon trains whole matrices, not adapters; set optimizer.name to adamw",
        )
        _require(
            not self.lora.rank or self.model.parametrization == "standard",
            f"lora.rank is {self.lora.rank}, but completep has no rates for adapters; leave model.parametrization out",
        )
        self._check_evaluation()
        if self.init_from is None:  # else the model is not known yet
            self.check_fit()

    @property
    def steps_between_evaluations(self) -> int:
        """Steps between evaluations of `evaluation.texts` and `evaluation.lm_eval_tasks`."""
        return self.evaluation.every_steps or self.training.evaluate_every_steps

    def _check_evaluation(self) -> None:
        every, validation = self.evaluation.every_steps, self.training.evaluate_every_steps
        _require(
            every is None or every % validation == 0,
            f"evaluation.every_steps is {every}; it must be a multiple of training.evaluate_every_steps {validation}",
        )
        sources = {source.name for source in parse_mixture(self.data.mixture)} if self.data.mixture else set()
        for name, _ in parse_texts(self.evaluation.texts):
            _require(
                name not in sources,
                f"evaluation.texts has {name}, which also is a source of data.mixture; write NAME:PATH with another "
                "name",
            )

    def check_fit(self) -> None:
        """Raise InputError if the context length of the model is too small for the data.

        The vocabulary is compared too if the config determines that of the data.
        """
        length, context = self.data.sequence_length, self.model.context_length
        _require(length <= context, f"data.sequence_length {length} exceeds model.context_length {context}")
        tokens, rows = self.data.vocab_size, self.model.vocab_size
        decided = self.data.tokenizer == "train" and self.data.path is None and not self.data.mixture and rows > 0
        _require(
            not decided or tokens <= rows,
            f"data.vocab_size {tokens} exceeds model.vocab_size {rows}; lower it, or leave model.vocab_size out",
        )

    def to_json(self) -> str:
        """The whole config as indented JSON, read back by `from_json`."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=2) + "\n"
