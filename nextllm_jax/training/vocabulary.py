"""The vocabulary of a run: the prepared data decides it, and the model follows unless the config states its rows."""

import dataclasses

from nextllm_jax.checkpoint.run_dir import RunDir
from nextllm_jax.config import Config
from nextllm_jax.config.files import workdir_of
from nextllm_jax.data.shards import DataPath, Dataset
from nextllm_jax.storage.downloads import tokenizer_path
from nextllm_jax.tokenizer.published import load_tokenizer

ROWS_MULTIPLE = 128
"""The rows of an embedding are a multiple of this: a mesh can shard them, and they fill matrix units."""


def with_vocab_size(config: Config, data: DataPath | None, *, overwrite: bool = False) -> Config:
    """The config with the rows of the embedding in model.vocab_size.

    If the config does not state them (0), they are those of the run in its workdir, unless `overwrite` starts it over,
    or else the number of tokens rounded up to a multiple of ROWS_MULTIPLE. The tokens are those of the prepared data in
    `data`; None: of the tokenizer that the config names.

    Raises InputError if the run, the data or the tokenizer cannot be read.
    """
    if config.model.vocab_size:
        return config
    if not overwrite and (run := RunDir(workdir_of(config))).exists():
        rows = run.read_config().model.vocab_size
    else:
        rows = -(-_num_tokens(config, data) // ROWS_MULTIPLE) * ROWS_MULTIPLE
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=rows))


def _num_tokens(config: Config, data: DataPath | None) -> int:
    if data is not None:
        return Dataset.open(data, verify="sizes").vocab_size
    name = config.data.tokenizer
    return config.data.vocab_size if name == "train" else load_tokenizer(tokenizer_path(name)).vocab_size
