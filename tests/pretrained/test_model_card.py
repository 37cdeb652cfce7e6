"""The model card of an export, as huggingface_hub reads it."""

import pytest

hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is missing; install the extra 'parity'")
pytest.importorskip("safetensors", reason="safetensors is missing; install the extra 'interop'")

from nextllm_jax.diagnostics.certify.certificate import Certificate, failed, ok  # noqa: E402
from nextllm_jax.diagnostics.certify.certify import write_certificate  # noqa: E402
from nextllm_jax.pretrained.convert import export_model, import_model  # noqa: E402
from nextllm_jax.pretrained.model_card import _public  # noqa: E402
from tests.runs import metrics  # noqa: E402


def test_the_card_of_a_run_states_what_it_is_and_how_good(trained, tmp_path):
    run = trained.directory / "runs" / "config"
    export_model(str(run), str(tmp_path / "small"), file_format="huggingface", license="apache-2.0", step="latest")
    card = hub.ModelCard.load(tmp_path / "small" / "README.md")
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "transformers")
    assert card.data.pipeline_tag == "text-generation"
    last = metrics(run, "validation")[-1]
    for row in (
        "| family | llama |",
        "| layers | 2 (global) |",
        "| context | 128 tokens |",
        "| corpus | corpus |",
        "| trained on | 40 steps, up to 20,480 tokens |",
        f"| step | {last['step']} |",
        f"| bits_per_byte | {last['bits_per_byte']:.4g} |",
    ):
        assert f"\n{row}\n" in card.text, row
    assert '"learning_rate": 0.005' in card.text
    assert str(trained.directory) not in card.content
    assert _public({"data": {"corpus": "/home/me/texts", "path": "data"}}) == {"data": {"corpus": "texts"}}


def test_a_certificate_is_added_to_the_card(trained, tmp_path):
    out = tmp_path / "out"
    export_model(str(trained.directory / "runs" / "config"), str(out), file_format="huggingface")
    before = (out / "README.md").read_text()
    assert "Not certified yet" in before
    for n, rows in enumerate([(ok("numpy, 64 tokens", "<|eos|>"),), (failed("files", "other", "untied head"),)]):
        written = write_certificate(str(out), Certificate("out", rows))
        assert written == out / "certificate.json"
        card = (out / "README.md").read_text()
        assert card.count("NOT CERTIFIED") == card.count("\n| files | FAILED | untied head |\n") == len(rows) * (n == 1)
        assert card.count("\n| numpy, 64 tokens | ok | <\\|eos\\|> |\n") == (n == 0)
    assert card.partition("## Certificate")[0] == before.partition("## Certificate")[0]
    for others in (b"mine\n", b"\xff"):  # the second is no UTF-8
        (out / "README.md").write_bytes(others)
        assert write_certificate(str(out), Certificate("out", ())) == out / "certificate.json"
        assert (out / "README.md").read_bytes() == others


def test_the_card_of_an_imported_model_has_no_training(trained, tmp_path):
    export_model(str(trained.directory / "runs" / "config"), str(tmp_path / "out"), file_format="huggingface")
    import_model(str(tmp_path / "out"), str(tmp_path / "run"))
    for source in ("out", "run"):
        export_model(str(tmp_path / source), str(tmp_path / f"{source} again"), file_format="huggingface")
        card = hub.ModelCard.load(tmp_path / f"{source} again" / "README.md")
        assert card.data.license == "unknown"
        assert "## Data" not in card.text
        assert "## Metrics" not in card.text
        assert "| tokens | 320 |" in card.text
