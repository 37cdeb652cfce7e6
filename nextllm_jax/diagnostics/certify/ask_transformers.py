"""What transformers makes of a Hugging Face directory: a script for `outside.ask`, which imports nothing of ours."""

import importlib
import json
import sys
import warnings
from pathlib import Path
from typing import Any


def logits_of(question: dict[str, Any]) -> list[Any]:
    """The last logits of each probe, float32 [kept, V]. With `memory_bytes`, other weights stay on the disk."""
    import torch
    import transformers

    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    options: dict[str, Any] = {"dtype" if version >= (4, 56) else "torch_dtype": torch.float32}
    if question.get("memory_bytes"):
        options |= {"device_map": "auto", "max_memory": {"cpu": question["memory_bytes"]}}
        options["offload_folder"] = str(Path(question["folder"]) / "offload")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        question["directory"], attn_implementation="eager", **options
    ).eval()
    if question.get("adapter"):
        peft = importlib.import_module("peft")
        model = peft.PeftModel.from_pretrained(model, question["adapter"]).eval()
    found = []
    with torch.no_grad():
        for tokens, positions in question["probes"]:
            ids = torch.tensor([tokens])
            # The mask is stated, since positions with gaps would count as several documents.
            answer = model(
                input_ids=ids, position_ids=torch.tensor([positions]), attention_mask=torch.ones_like(ids),
                use_cache=False,
            )  # fmt: skip
            found.append(answer.logits[0, -question["kept"] :].float().numpy())
    return found


def texts_of(question: dict[str, Any]) -> dict[str, Any]:
    """The ids of texts, and the conversation as text and as ids, by AutoTokenizer."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(question["directory"])
    values: dict[str, Any] = {"class": type(tokenizer).__name__, "added": tokenizer.get_added_vocab()}
    values["special"] = tokenizer.all_special_tokens
    values["ids"] = [tokenizer(text)["input_ids"] for text in question["texts"]]
    if question.get("messages"):
        values["chat"] = tokenizer.apply_chat_template(question["messages"], tokenize=False)
        values["chat_ids"] = tokenizer(values["chat"], add_special_tokens=False)["input_ids"]
    return values


def answer(question: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(values, arrays) for `outside.Answer`."""
    import transformers

    values: dict[str, Any] = {"version": transformers.__version__}
    arrays = {f"logits_{i}": logits for i, logits in enumerate(logits_of(question))} if question["probes"] else {}
    if question.get("texts"):
        try:
            values["text"] = texts_of(question)
        except Exception as error:  # the logits are still of use
            values["text_error"] = f"{type(error).__name__}: {error}".splitlines()[0]
    return values, arrays


def main() -> None:
    """Write answer.json and answer.npz next to the question."""
    warnings.simplefilter("ignore")
    question = json.loads(Path(sys.argv[1]).read_text())
    try:
        import numpy as np
        import torch  # noqa: F401
        import transformers  # noqa: F401

        if question.get("adapter"):
            importlib.import_module("peft")
    except ImportError as error:
        sys.stdout.write(error.name or str(error))
        sys.exit(3)
    values, arrays = answer(question)
    folder = Path(question["folder"])
    np.savez(folder / "answer.npz", **arrays)
    (folder / "answer.json").write_text(json.dumps(values))


if __name__ == "__main__":
    main()
