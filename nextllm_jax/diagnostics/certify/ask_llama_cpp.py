"""What llama.cpp makes of a GGUF file: a script for `outside.ask`, which imports nothing of ours."""

import json
import sys
import urllib.request
from pathlib import Path
from typing import Any


def open_server(module: Any, file: str, context: int) -> Any:
    """A server of one slot with a float32 cache."""
    params = module.CommonParams()
    params.model.path = file
    params.n_ctx, params.n_parallel, params.n_gpu_layers = context, 1, 0
    params.warmup = params.use_jinja = params.fit_params = False
    params.verbosity = 0
    params.flash_attn_type = module.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = module.ggml_type.GGML_TYPE_F32  # else float16
    return module.Server(params)


def continued(server: Any, prompt: list[int], question: dict[str, Any]) -> dict[str, Any]:
    """The greedy continuation of a prompt, and (id, log probability) of the likeliest 8 tokens at each position."""
    request = {
        "prompt": prompt,
        "n_predict": question["new_tokens"],
        "temperature": 0,
        "n_probs": 8,
        "ignore_eos": True,
        "cache_prompt": False,
        "logit_bias": [[id, False] for id in question["banned"]],
    }
    steps = server.handle_completions(request)["choices"][0]["logprobs"]["content"]
    likeliest = [[(top["id"], top["logprob"]) for top in step["top_logprobs"]] for step in steps]
    return {"tokens": [step["id"] for step in steps], "likeliest": likeliest}


def ids_of(server: Any, text: str) -> list[int]:
    """The ids of a text, in which no special token is recognized."""
    body = json.dumps({"content": text, "add_special": False, "parse_special": False}).encode()
    url = f"{server.listening_address.rstrip('/')}/tokenize"
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.loads(response.read())["tokens"]


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """The values of `outside.Answer`."""
    import xllamacpp

    server = open_server(xllamacpp, question["file"], question["context"])
    return {
        "version": xllamacpp.__version__,
        "probes": [continued(server, prompt, question) for prompt in question["prompts"]],
        "ids": [ids_of(server, text) for text in question["texts"]],
    }


def main() -> None:
    """Write answer.json next to the question."""
    question = json.loads(Path(sys.argv[1]).read_text())
    try:
        import xllamacpp  # noqa: F401
    except ImportError as error:
        sys.stdout.write(error.name or str(error))
        sys.exit(3)
    (Path(question["folder"]) / "answer.json").write_text(json.dumps(answer(question)))


if __name__ == "__main__":
    main()
    sys.stdout.flush()
